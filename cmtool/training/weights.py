"""Weights lambda(t, r) of the losses; each a function of (path, times) that gives one number a sample.

The signal-to-noise ratio is (sigma / alpha)^-2 at the start t; on VE that is t^-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

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
    """snr + 1 / sigma_data^2 = (t^2 + sigma_data^2) / (t sigma_data)^2. Karras et al. (2022), table 1."""

    kind: ClassVar[str] = "karras_weight"
    sigma_data: float = 0.5

    def __call__(self, path: Path, times: Times) -> Tensor:
        return _snr(path, times) + 1 / self.sigma_data**2


@dataclass(frozen=True)
class InverseGap:
    """1 / (t - r). Song and Dhariwal (2023), arXiv:2310.14189, section 3.4."""

    kind: ClassVar[str] = "inverse_gap"

    def __call__(self, path: Path, times: Times) -> Tensor:
        return 1 / (times.t - times.r)


WEIGHTS: dict[str, type] = {w.kind: w for w in (Uniform, SNR, SNRPlusOne, TruncatedSNR, Karras, InverseGap)}
