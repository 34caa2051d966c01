"""Weights lambda(t, r) of the losses; each a function of (path, times) that gives one number a sample.

The signal-to-noise ratio is (sigma / alpha)^-2 at the start t; on VE that is t^-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, get_args

import torch
from torch import Tensor

from cmtool.flow.path import Path
from cmtool.times import Times


class Weight(Protocol):
    """(path, times [B]) -> [B]."""

    kind: ClassVar[str]

    def __call__(self, path: Path, times: Times) -> Tensor: ...


def _snr(path: Path, times: Times) -> Tensor:
    return path.ratio(times.t) ** -2


@dataclass(frozen=True)
class Uniform:
    """1. All published consistency models of Song et al. (2023)."""

    kind: ClassVar[str] = "uniform"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return torch.ones_like(times.t)


@dataclass(frozen=True)
class SNR:
    """snr."""

    kind: ClassVar[str] = "snr"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return _snr(path, times)


@dataclass(frozen=True)
class SNRPlusOne:
    """snr + 1."""

    kind: ClassVar[str] = "snr_plus_one"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return _snr(path, times) + 1


@dataclass(frozen=True)
class TruncatedSNR:
    """max(snr, 1). Salimans and Ho (2022), arXiv:2202.00512."""

    kind: ClassVar[str] = "truncated_snr"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return _snr(path, times).clamp_min(1.0)


@dataclass(frozen=True)
class Karras:
    """snr + 1 / sigma_data^2 = (t^2 + sigma_data^2) / (t sigma_data)^2. Karras et al. (2022), table 1.

    Args:
        power: times (sigma / alpha)^power. In continuous time, where neighbours lie a share of the noise level apart,
            1 makes it what 0 is on a grid for losses linear in the derivative, 2 for their squares.
    """

    kind: ClassVar[str] = "karras_weight"
    sigma_data: float = 0.5
    power: float = 0.0

    def __call__(self, path: Path, times: Times) -> Tensor:
        weight = _snr(path, times) + 1 / self.sigma_data**2
        return weight * path.ratio(times.t) ** self.power if self.power else weight


@dataclass(frozen=True)
class InverseGap:
    """1 / (t - r). Song and Dhariwal (2023), arXiv:2310.14189, section 3.4."""

    kind: ClassVar[str] = "inverse_gap"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return 1 / (times.t - times.r)


@dataclass(frozen=True)
class InverseJump:
    """1 / (t - s)^2: of the squared error of a jump on `Linear`, that of its mean velocity. Frans et al. (2024)."""

    kind: ClassVar[str] = "inverse_jump"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return (times.t - times.s) ** -2


@dataclass(frozen=True)
class VelocityError:
    """What turns the squared error of D into that of the path's velocity; on `Linear` it is 1 / t^2.

    dx_t / dt is linear in D with the factor (alpha' sigma - alpha sigma') / sigma; with this weight `Denoising` is flow
    matching, Lipman et al. (2022), arXiv:2210.02747.

    Args:
        power: of the factor; 1 for losses that are linear in the error.
    """

    kind: ClassVar[str] = "velocity_error"
    power: float = 2.0

    def __call__(self, path: Path, times: Times) -> Tensor:
        alpha, sigma = path.alpha(times.t), path.sigma(times.t)
        d_alpha, d_sigma = path.derivative(times.t)
        return ((alpha * d_sigma - sigma * d_alpha) / sigma) ** self.power


@dataclass(frozen=True)
class InverseRatio:
    """alpha / sigma; on `Trig` it is 1 / (sigma_data tan t), the prior weight of Lu and Song (2024), section 4.2."""

    kind: ClassVar[str] = "inverse_ratio"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return 1 / path.ratio(times.t)


@dataclass(frozen=True)
class Alpha:
    """alpha_t; on `Trig` it is cos t, the factor of the tangent of Lu and Song (2024), section 4.1."""

    kind: ClassVar[str] = "alpha"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return path.alpha(times.t)


AnyWeight = (
    Uniform | SNR | SNRPlusOne | TruncatedSNR | Karras | InverseGap | InverseJump | VelocityError | InverseRatio | Alpha
)
WEIGHTS: dict[str, type] = {weight.kind: weight for weight in get_args(AnyWeight)}
