"""Parameterizations: how the raw output F of a network becomes an estimate.

    D = skip x_t + out F(inp x_t, noise(t))

The coefficients are written for any path through its noise-to-signal ratio; on VE they are the published ones.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, get_args

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
    """scale * ln(sigma / alpha / unit). EDM, its CIFAR-10 consistency models and ECT: 0.25; OpenAI's releases: 250.

    Networks of Song et al. (2021), arXiv:2011.13456, that were trained on images in [0, 1], whose noise levels are half
    of ours, are told ln(sigma / 2): scale 1, unit 2.
    """

    kind: ClassVar[str] = "log_ratio"
    scale: float = 0.25
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not self.unit > 0:
            raise ValueError(f"unit must be positive, found {self.unit}")

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        # The offset keeps t = 0 finite; it changes no float32 time above 1e-29, and is no denormal, which some devices
        # flush to zero. The ceiling does the same for pure noise, t = 1 of `Linear`, and is far above any ratio that
        # carries information.
        ratio = path.ratio(t).clamp_max(1e6)
        return self.scale * torch.log((ratio if self.unit == 1 else ratio / self.unit) + 1e-37)


@dataclass(frozen=True)
class PathTime:
    """scale * t, the path's own time. TrigFlow and flow matching."""

    kind: ClassVar[str] = "path_time"
    scale: float = 1.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        return self.scale * t


@dataclass(frozen=True)
class VPTime:
    """scale * the time of the variance-preserving SDE at this sigma / alpha, where beta(t) = beta_min + beta_d t.

    Song et al. (2021), arXiv:2011.13456, in the form of Karras et al. (2022), table 1, column "VP":
    t = (sqrt(beta_min^2 + 2 beta_d ln(1 + sigma^2)) - beta_min) / beta_d, scale = M - 1 = 999.
    """

    kind: ClassVar[str] = "vp_time"
    beta_d: float = 19.9
    beta_min: float = 0.1
    scale: float = 999.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        squared = self.beta_min**2 + 2 * self.beta_d * torch.log1p(path.ratio(t) ** 2)
        return self.scale * (squared.sqrt() - self.beta_min) / self.beta_d


@dataclass(frozen=True)
class CosineStep:
    """The step of the cosine schedule whose noise level is nearest: iDDPM, as Karras et al. (2022), table 1, read it.

    u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, c1) - 1), u_M = 0, abar_j = sin^2(pi j / (2 M (c2 + 1))); the
    network is told M - 1 - j for the u_j nearest to sigma. Nichol and Dhariwal (2021), arXiv:2102.09672.
    """

    kind: ClassVar[str] = "cosine_step"
    num_steps: int = 1000
    c1: float = 0.001
    c2: float = 0.008

    def levels(self) -> Tensor:
        """u_0 (the largest noise) to u_M = 0; float64 [M + 1]."""
        return torch.tensor(_cosine_levels(self), dtype=torch.float64)

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        levels = self.levels().to(t.device)
        nearest = (path.ratio(t).to(levels.dtype)[..., None] - levels).abs().argmin(-1)
        return (self.num_steps - 1 - nearest).to(t.dtype)


@functools.lru_cache(maxsize=4)
def _cosine_levels(told: CosineStep) -> tuple[float, ...]:
    m = told.num_steps
    bar = [math.sin(j / (m * (told.c2 + 1)) * (math.pi / 2)) ** 2 for j in range(m + 1)]
    levels = [0.0]
    for j in range(m, 0, -1):
        ratio = max(bar[j - 1] / bar[j], told.c1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    return tuple(levels[::-1])


AnyTimeInput = LogRatio | PathTime | VPTime | CosineStep


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
    time_input: AnyTimeInput = field(default_factory=LogRatio)

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
    time_input: AnyTimeInput = field(default_factory=PathTime)

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


@dataclass(frozen=True)
class Epsilon:
    """The network predicts the noise: x_t = alpha x0 + sigma sign F. Ho et al. (2020), arXiv:2006.11239.

    Args:
        sign: -1 for networks that predict minus the noise, which is the score times sigma: NCSN++ of Song et al.
            (2021), arXiv:2011.13456.
        unit_input: the network sees x_t / sqrt(alpha^2 + sigma^2), as on a variance-preserving path; else x_t itself.
    """

    kind: ClassVar[str] = "epsilon"
    sign: float = 1.0
    unit_input: bool = True
    time_input: AnyTimeInput = field(default_factory=PathTime)

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ValueError(f"sign is 1 or -1, found {self.sign}")

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return Coefficients(1 / alpha, -self.sign * sigma / alpha, self._input(path, t))

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients:
        """alpha_s x0 + sigma_s eps for the predicted eps and the x0 it implies: `Path.transport` of the estimate."""
        scale = torch.where(s == t, torch.ones_like(t), path.alpha(s) / path.alpha(t))
        return Coefficients(scale, self.sign * (path.sigma(s) - scale * path.sigma(t)), self._input(path, t))

    def noise(self, path: Path, t: Tensor) -> Tensor:
        return self.time_input(path, t)

    def _input(self, path: Path, t: Tensor) -> Tensor:
        return 1 / _norm(path, t) if self.unit_input else torch.ones_like(t)


@dataclass(frozen=True)
class VPrediction:
    """The network predicts v = a eps - b x0 with a = alpha / n, b = sigma / n, n = sqrt(alpha^2 + sigma^2).

    Salimans and Ho (2022), arXiv:2202.00512, appendix D, on any path. Where alpha^2 + sigma^2 = 1, v is the velocity
    along the great circle from data to noise.
    """

    kind: ClassVar[str] = "v_prediction"
    time_input: AnyTimeInput = field(default_factory=PathTime)

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        norm = _norm(path, t)
        return Coefficients(path.alpha(t) / norm**2, -path.sigma(t) / norm, 1 / norm)

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients:
        """alpha_s x0 + sigma_s eps for the x0 = a x_t / n - b v and eps = b x_t / n + a v that x_t and v imply."""
        alpha, sigma, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
        variance = alpha * alpha + sigma * sigma
        skip = (alpha_s * alpha + sigma_s * sigma) / variance  # exactly 1 at s = t
        return Coefficients(skip, (sigma_s * alpha - alpha_s * sigma) / variance.sqrt(), 1 / _norm(path, t))

    def noise(self, path: Path, t: Tensor) -> Tensor:
        return self.time_input(path, t)


@dataclass(frozen=True)
class Sample:
    """The network predicts x0 itself."""

    kind: ClassVar[str] = "sample"
    time_input: AnyTimeInput = field(default_factory=PathTime)

    def denoised(self, path: Path, t: Tensor) -> Coefficients:
        return Coefficients(torch.zeros_like(t), torch.ones_like(t), 1 / _norm(path, t))

    def jump(self, path: Path, t: Tensor, s: Tensor) -> Coefficients:
        """`Path.transport` of the estimate; exactly x_t at s = t."""
        keep = torch.where(s == t, torch.ones_like(t), path.sigma(s) / path.sigma(t))
        return Coefficients(keep, path.alpha(s) - path.alpha(t) * keep, 1 / _norm(path, t))

    def noise(self, path: Path, t: Tensor) -> Tensor:
        return self.time_input(path, t)


def _norm(path: Path, t: Tensor) -> Tensor:
    """sqrt(alpha^2 + sigma^2): the size of x_t for data of variance 1."""
    return (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()


AnyParameterization = EDM | BoundaryEDM | Piecewise | Velocity | Epsilon | VPrediction | Sample
PARAMETERIZATIONS: dict[str, type] = {p.kind: p for p in get_args(AnyParameterization)}
TIME_INPUTS: dict[str, type] = {told.kind: told for told in get_args(AnyTimeInput)}
