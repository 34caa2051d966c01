"""Paths: how data is noised, x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I).

A path is two functions of time and their derivatives; all that any other part needs follows from them and is written
once, in `Path`. Times grow with the noise, from `t_min` (data) to `t_max` (noise).
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


def expand(t: Tensor, x: Tensor) -> Tensor:
    """`t` of shape [B] (or a scalar) reshaped to broadcast against `x` of shape [B, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


@dataclass(frozen=True)
class Path:
    """Base of all paths. Times are tensors of any shape; samples `[B, ...]` go with times `[B]`."""

    kind: ClassVar[str]
    discrete: ClassVar[bool] = False  # whether there are no noise levels beyond the ends
    rho: ClassVar[float] = 1.0  # spacing of this path's usual grid, see `times.Karras`
    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max or not math.isfinite(self.t_max):
            raise ValueError(f"a path needs 0 <= t_min < t_max, found t_min={self.t_min}, t_max={self.t_max}")

    def alpha(self, t: Tensor) -> Tensor:
        """The scale of the data at time t."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise at time t."""
        raise NotImplementedError

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha'(t), sigma'(t))."""
        raise NotImplementedError

    def time(self, ratio: Tensor) -> Tensor:
        """The time whose noise-to-signal ratio sigma / alpha is `ratio`."""
        raise NotImplementedError

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha: the coordinate in which all paths agree (EDM's sigma)."""
        return self.sigma(t) / self.alpha(t)

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps; shapes [B, ...], [B, ...], [B]."""
        t = expand(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx_t / dt = alpha'_t x0 + sigma'_t eps for fixed (x0, eps)."""
        d_alpha, d_sigma = self.derivative(expand(t, x0))
        return d_alpha * x0 + d_sigma * eps

    def ode_velocity(self, x_t: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """Right-hand side of the probability-flow ODE at x_t, given the denoiser's output there.

        The conditional velocity with eps replaced by its estimate (x_t - alpha_t D) / sigma_t; on VE this is
        (x_t - D) / t, Karras et al. (2022), arXiv:2206.00364, eq. 3 with sigma(t) = t.
        """
        at = expand(t, x_t)
        eps = (x_t - self.alpha(at) * denoised) / self.sigma(at)
        return self.velocity(denoised, eps, t)

    def transport(self, x_t: Tensor, denoised: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Move x_t to time s with the data estimate held fixed (DDIM; exact if `denoised` is constant on the way).

        x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) D. Song et al. (2021), arXiv:2010.02502,
        eq. 12 with zero noise, written for any path.
        """
        t, s = expand(t, x_t), expand(s, x_t)
        keep = self.sigma(s) / self.sigma(t)
        return keep * x_t + (self.alpha(s) - self.alpha(t) * keep) * denoised

    def implied(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The estimate D that `transport` would have to hold fixed to land on x_s: its inverse, for s < t.

        Progressive distillation's target, Salimans and Ho (2022), arXiv:2202.00512, appendix G, on any path.
        """
        t, s = expand(t, x_t), expand(s, x_t)
        keep = self.sigma(s) / self.sigma(t)
        return (x_s - keep * x_t) / (self.alpha(s) - self.alpha(t) * keep)

    def like(self, other: Path) -> Path:
        """This path with the ends of another: at the same noise-to-signal ratios."""
        low, high = (
            float(self.time(other.ratio(torch.tensor(t, dtype=torch.float64)))) for t in (other.t_min, other.t_max)
        )
        return replace(self, t_min=low, t_max=high)

    def clamp(self, t: Tensor) -> Tensor:
        """`t` held between the ends of the path."""
        return t.clamp(self.t_min, self.t_max)

    def diffuse(self, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add noise from level s up to level t.

        x_t = a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) eps,  a = alpha_t / alpha_s. With s = t_min on VE this is the
        re-noising line of Algorithm 1, Song et al. (2023), arXiv:2303.01469.

        Args:
            x_s: samples at level s, shape [B, ...].
            s, t: path times, shape [B] or scalar, s <= t.
            eps: standard normal noise, shape of `x_s`.
        Returns:
            Samples at level t, shape of `x_s`.
        Raises:
            ValueError: if any s > t.
        """
        if bool((s > t).any()):
            raise ValueError("diffuse adds noise: it needs s <= t")
        s, t = expand(s, x_s), expand(t, x_s)
        a = self.alpha(t) / self.alpha(s)
        return a * x_s + (self.sigma(t) ** 2 - (a * self.sigma(s)) ** 2).clamp_min(0).sqrt() * eps


@dataclass(frozen=True)
class VE(Path):
    """Variance exploding, x_t = x0 + t eps: the time is the noise level. Karras et al. (2022), arXiv:2206.00364."""

    kind: ClassVar[str] = "ve"
    rho: ClassVar[float] = 7.0
    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class Linear(Path):
    """Straight line from data to noise, x_t = (1 - t) x0 + t eps: rectified flow and flow matching.

    Liu et al. (2022), arXiv:2209.03003; Lipman et al. (2022), arXiv:2210.02747 (with data and noise swapped).
    """

    kind: ClassVar[str] = "linear"
    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)  # not ratio / (1 + ratio): at t = 1 the ratio is infinite


@dataclass(frozen=True)
class Trig(Path):
    """Great circle from data to noise, x_t = cos(t) x0 + sin(t) sigma_data eps: TrigFlow.

    Lu and Song (2024), arXiv:2410.11081, section 3. The default ends are VE's 0.002 and 80 at sigma_data = 0.5.
    """

    kind: ClassVar[str] = "trig"
    t_min: float = math.atan(0.002 / 0.5)
    t_max: float = math.atan(80.0 / 0.5)
    sigma_data: float = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t).clamp_min(0)  # the float32 next to pi / 2 lies above it: a ratio must not turn negative

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.sin(t), self.sigma_data * torch.cos(t)

    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio / self.sigma_data)


Betas = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving, alpha^2 + sigma^2 = 1, in discrete steps: DDPM. Ho et al. (2020), arXiv:2006.11239.

    x_k = sqrt(abar_k) x0 + sqrt(1 - abar_k) eps with abar_k = prod_{i <= k} (1 - beta_i), k = 0 to num_steps - 1. The
    time is the step; between two steps ln(sigma / alpha) is linear in it, so that any solver can walk the path.

    Args:
        betas: "linear" in beta (Ho et al.), "scaled_linear" in its root (latent diffusion), or "squaredcos_cap_v2",
            the squared cosine of Nichol and Dhariwal (2021), arXiv:2102.09672, eq. 17, with betas of at most 0.999.
        beta_start, beta_end: the first and the last beta of the linear ones.
        num_steps: steps of the schedule.
        table: betas of its own instead of all these, one a step.
        zero_snr: shift and scale sqrt(abar) so that the last step holds no data. Lin et al. (2024), arXiv:2305.08891,
            algorithm 1; the last abar is 2^-24 instead of 0, to keep every ratio finite.
    """

    kind: ClassVar[str] = "vp"
    discrete: ClassVar[bool] = True
    t_min: float = 0.0
    t_max: float = 999.0
    betas: Betas = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_steps: int = 1000
    table: tuple[float, ...] = ()
    zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.betas not in get_args(Betas):
            raise ValueError(f"betas are one of {', '.join(get_args(Betas))}, found {self.betas!r}")
        if self.table and len(self.table) != self.num_steps:
            raise ValueError(f"the table has {len(self.table)} betas for {self.num_steps} steps")
        if not 2 <= self.num_steps <= 100_000:
            raise ValueError(f"num_steps must lie in 2 to 100000, found {self.num_steps}")
        if self.t_max > self.num_steps - 1:
            raise ValueError(f"the last step is {self.num_steps - 1}, found t_max={self.t_max}")
        if not all(0 < beta < 1 for beta in self.table or (self.beta_start, self.beta_end)):
            raise ValueError("betas lie between 0 and 1")

    def alpha(self, t: Tensor) -> Tensor:
        # not sqrt(sigmoid(-2 l)): a runtime's sigmoid may be exact to its largest value only, and alpha is small
        return torch.exp(-F.softplus(2 * self._log_ratio(t), threshold=50) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(-F.softplus(-2 * self._log_ratio(t), threshold=50) / 2)

    def derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, slope = self.alpha(t), self.sigma(t), self._knots(t)[1]
        return -alpha * sigma**2 * slope, sigma * alpha**2 * slope

    def time(self, ratio: Tensor) -> Tensor:
        table = self._table(ratio.device)
        wanted = ratio.to(table.dtype).clamp_min(torch.finfo(torch.float32).tiny).log()
        k = torch.searchsorted(table, wanted.contiguous()).clamp(1, len(table) - 1) - 1
        return (k + (wanted - table[k]) / (table[k + 1] - table[k])).to(ratio.dtype)

    def like(self, other: Path) -> VP:
        low, high = (
            min(max(float(self.time(other.ratio(torch.tensor(t, dtype=torch.float64)))), 0.0), self.num_steps - 1.0)
            for t in (other.t_min, other.t_max)  # there are no levels beyond the first and the last step
        )
        return replace(self, t_min=low, t_max=high)

    def _table(self, device: torch.device) -> Tensor:
        whole = replace(self, t_min=0.0, t_max=self.num_steps - 1)
        return torch.tensor(_log_ratios(whole), dtype=torch.float64, device=device)

    def _log_ratio(self, t: Tensor) -> Tensor:
        """ln(sigma / alpha): the table's at whole steps, linear between two, the end pieces prolonged."""
        return self._knots(t)[0]

    def _knots(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table(t.device)
        k = t.detach().floor().long().clamp(0, len(table) - 2)
        slope = table[k + 1] - table[k]
        return (table[k] + (t - k) * slope).to(t.dtype), slope.to(t.dtype)


@functools.lru_cache(maxsize=16)
def _log_ratios(path: VP) -> tuple[float, ...]:
    """ln(sigma / alpha) at each step. Plain numbers: a tensor made while a network is traced would stay a trace."""
    n = path.num_steps
    if path.table:
        betas = list(path.table)
    elif path.betas == "squaredcos_cap_v2":
        bar = [math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(n + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(bar)]
    else:
        root = 2 if path.betas == "scaled_linear" else 1
        low, high = path.beta_start ** (1 / root), path.beta_end ** (1 / root)
        betas = [(low + (high - low) * k / (n - 1)) ** root for k in range(n)]
    kept = list(accumulate((1 - beta for beta in betas), operator.mul))
    if path.zero_snr:
        first, last = math.sqrt(kept[0]), math.sqrt(kept[-1])
        kept = [((math.sqrt(k) - last) * first / (first - last)) ** 2 for k in kept]
        kept[-1] = 2.0**-24
    return tuple(math.log((1 - k) / k) / 2 for k in kept)


AnyPath = VE | Linear | Trig | VP
PATHS: dict[str, type[Path]] = {path.kind: path for path in get_args(AnyPath)}
