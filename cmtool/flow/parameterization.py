"""Parameterizations: how the raw output F of a network becomes an estimate.

    D = skip x_t + out F(inp x_t, noise(t))

The coefficients are written for any path through its noise-to-signal ratio; on VE they are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool.flow.path import Path


class Coefficients(NamedTuple):
    """The three factors of a parameterization, each of the shape of the times."""

    skip: Tensor  # of x_t in the estimate
    out: Tensor  # of the network's output
    inp: Tensor  # of x_t at the network's input


class TimeInput(Protocol):
    """What the network is told about the time."""

    kind: ClassVar[str]

    def __call__(self, path: Path, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LogRatio:
    """scale * ln(sigma / alpha). EDM, its CIFAR-10 consistency models and ECT: 0.25; OpenAI's released models: 250."""

    kind: ClassVar[str] = "log_ratio"
    scale: float = 0.25

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        # The offset keeps t = 0 finite; it changes no float32 time above 1e-29, and is no denormal, which some devices
        # flush to zero. The ceiling does the same for pure noise, t = 1 of `Linear`, and is far above any ratio that
        # carries information.
        return self.scale * torch.log(path.ratio(t).clamp_max(1e6) + 1e-37)


@dataclass(frozen=True)
class PathTime:
    """scale * t, the path's own time. TrigFlow and flow matching."""

    kind: ClassVar[str] = "path_time"
    scale: float = 1.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        return self.scale * t


class Parameterization(Protocol):
    """How F becomes the denoised estimate, and how it becomes a jump from t to s."""

    kind: ClassVar[str]

    def denoised(self, path: Path, t: Tensor) -> Coefficients: ...

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients: ...

    def noise(self, path: Path, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EDM:
    """Preconditioning of Karras et al. (2022), arXiv:2206.00364, table 1, read at sigma / alpha on any path.

    On `Trig` with the same sigma_data it is TrigFlow: skip cos t, out sigma_data sin t, inp 1 / sigma_data.
    """

    kind: ClassVar[str] = "edm"
    sigma_data: float = 0.5
    time_input: LogRatio | PathTime = field(default_factory=LogRatio)

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        alpha, sigma, data = path.alpha(t), path.sigma(t), self.sigma_data
        variance = sigma**2 + (alpha * data) ** 2
        root = variance.sqrt()
        return Coefficients(alpha * data**2 / variance, sigma * data / root, 1 / root)

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients:
        """`Path.transport` of the estimate, with sigma_t divided out: finite at sigma_t = 0, exactly x_t at s = t."""
        alpha, sigma, data = path.alpha(t), path.sigma(t), self.sigma_data
        alpha_s, sigma_s = path.alpha(s), path.sigma(s)
        variance = sigma**2 + (alpha * data) ** 2
        root = variance.sqrt()
        skip = (sigma * sigma_s + (alpha * data) * (alpha_s * data)) / variance
        return Coefficients(skip, (alpha_s * sigma - alpha * sigma_s) * data / root, 1 / root)

    def noise(self, path: Path, t: Tensor) -> Tensor:
        return self.time_input(path, t)


@dataclass(frozen=True)
class BoundaryEDM(EDM):
    """The consistency function's own scalings: f(x, t_min) = x holds by construction.

    Song et al. (2023), arXiv:2303.01469, appendix C: skip = sigma_data^2 / ((t - eps)^2 + sigma_data^2),
    out = sigma_data (t - eps) / sqrt(sigma_data^2 + t^2) with eps = t_min (the shift is not inside the root).

    `denoised` is f itself. A jump to s in between follows the straight line from (t_min, f) to (t, x_t) in the path's
    ratio, the exact solution of the deterministic view x' = (x - f) / (t - t_min) while f is constant: at s = t_min it
    is f and at t = s = t_min it is x.
    """

    kind: ClassVar[str] = "boundary_edm"

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        alpha, alpha_min, data = path.alpha(t), path.alpha(t.new_tensor(path.t_min)), self.sigma_data
        gap = _gap(path, t)
        root = (path.sigma(t) ** 2 + (alpha * data) ** 2).sqrt()
        # skip and out of the paper with ratio - eps = gap / (alpha alpha_min), times alpha_min to land on the path.
        skip = (alpha * data) * (alpha_min * data) / ((gap / alpha_min) ** 2 + (alpha * data) ** 2)
        return Coefficients(skip, gap * data / root, 1 / root)

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients:
        skip, out, inp = self.denoised(path, t)
        # The share of x_t that is kept; where t is t_min itself, f is x and the share does not matter.
        keep = _gap(path, s) / _gap(path, t).clamp_min(torch.finfo(t.dtype).tiny)
        scale = (path.alpha(s) - path.alpha(t) * keep) / path.alpha(t.new_tensor(path.t_min))
        return Coefficients(keep + scale * skip, scale * out, inp)


@dataclass(frozen=True)
class Piecewise(BoundaryEDM):
    """f(x, t) = F(x, t) for t > t_min, and x at t = t_min. Song et al. (2023), arXiv:2303.01469, eq. 4.

    The boundary condition without skip connections: free, and not continuous at t_min, so it takes no derivative there.
    """

    kind: ClassVar[str] = "piecewise"

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        inside = (t > path.t_min).to(t.dtype)
        root = (path.sigma(t) ** 2 + (path.alpha(t) * self.sigma_data) ** 2).sqrt()
        return Coefficients(1 - inside, inside * path.alpha(t.new_tensor(path.t_min)), 1 / root)


def _gap(path: Path, t: Tensor) -> Tensor:
    """alpha_min sigma_t - alpha_t sigma_min: how far t is from t_min, exactly 0 there; t - t_min on VE."""
    start = t.new_tensor(path.t_min)
    return path.alpha(start) * path.sigma(t) - path.alpha(t) * path.sigma(start)


@dataclass(frozen=True)
class Velocity:
    """The network predicts dx_t / dt of the path. On `Linear`, D = x_t - t F and the jump is x_t - (t - s) F."""

    kind: ClassVar[str] = "velocity"
    time_input: LogRatio | PathTime = field(default_factory=PathTime)

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        # Solve x_t = alpha x0 + sigma eps, F = alpha' x0 + sigma' eps for x0.
        alpha, sigma = path.alpha(t), path.sigma(t)
        d_alpha, d_sigma = path.derivative(t)
        det = alpha * d_sigma - sigma * d_alpha
        return Coefficients(d_sigma / det, -sigma / det, torch.ones_like(t))

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients:
        """`Path.transport` of the estimate: alpha_s x0 + sigma_s eps for the x0 and eps that explain x_t and F."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        alpha_s, sigma_s = path.alpha(s), path.sigma(s)
        d_alpha, d_sigma = path.derivative(t)
        det = alpha * d_sigma - sigma * d_alpha
        skip = (alpha_s * d_sigma - sigma_s * d_alpha) / det
        return Coefficients(skip, (alpha * sigma_s - alpha_s * sigma) / det, torch.ones_like(t))

    def noise(self, path: Path, t: Tensor) -> Tensor:
        return self.time_input(path, t)


PARAMETERIZATIONS: dict[str, type] = {p.kind: p for p in (EDM, BoundaryEDM, Piecewise, Velocity)}
TIME_INPUTS: dict[str, type] = {"log_ratio": LogRatio, "path_time": PathTime}
