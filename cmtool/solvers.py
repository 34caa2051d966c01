"""Solvers of the probability-flow ODE: one step each, and the loop over a grid.

A solver knows a denoiser `(x, t) -> D` and a path, nothing else. It integrates dx/dt = path.ode_velocity(x, D, t) in
the path's own time; on VE that is dx/dt = (x - D) / t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool.flow.path import Path, expand

Denoise = Callable[[Tensor, Tensor], Tensor]


class Solver(Protocol):
    """One step x_t -> x_s with s < t; times of shape [B]."""

    kind: ClassVar[str]
    order: ClassVar[int]  # global order of convergence
    calls: ClassVar[int]  # network calls a step

    def step(self, denoise: Denoise, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Euler:
    """x_s = x_t + (s - t) v(x_t, t). First order."""

    kind: ClassVar[str] = "euler"
    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1

    def step(self, denoise: Denoise, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + expand(s - t, x) * path.ode_velocity(x, denoise(x, t), t)


@dataclass(frozen=True)
class DDIM:
    """The denoised image held fixed, `path.transport`. First order. Song et al. (2021), arXiv:2010.02502, eq. 12.

    Exact where D is constant on the way, hence finite at sigma_s = 0, where it returns alpha_s D; on VE and `Linear`
    it is Euler's step.
    """

    kind: ClassVar[str] = "ddim"
    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1

    def step(self, denoise: Denoise, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return path.transport(x, denoise(x, t), t, s)


@dataclass(frozen=True)
class Heun:
    """Trapezoid rule with an Euler predictor. Second order. Karras et al. (2022), arXiv:2206.00364, algorithm 1."""

    kind: ClassVar[str] = "heun"
    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2

    def step(self, denoise: Denoise, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        step = expand(s - t, x)
        v_t = path.ode_velocity(x, denoise(x, t), t)
        x_s = x + step * v_t
        v_s = path.ode_velocity(x_s, denoise(x_s, s), s)
        v_s = torch.where(expand(path.sigma(s), x) > 0, v_s, v_t)  # 0 / 0 where s is free of noise: Euler there
        return x + step * (v_t + v_s) / 2


@dataclass(frozen=True)
class DPMSolver2:
    """Midpoint rule whose midpoint is the mean of t^(1/3). Second order.

    DPM-Solver-2 in the noise-level form of Karras et al. (2022), as OpenAI's code has it ("dpm"): any midpoint within
    O(h^2) of the centre keeps the order; the cube root places it where the curvature is.
    """

    kind: ClassVar[str] = "dpm2"
    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2

    def step(self, denoise: Denoise, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        m = ((t ** (1 / 3) + s ** (1 / 3)) / 2) ** 3
        x_m = x + expand(m - t, x) * path.ode_velocity(x, denoise(x, t), t)
        return x + expand(s - t, x) * path.ode_velocity(x_m, denoise(x_m, m), m)


class SolveState(NamedTuple):
    """Where a solution is after a step."""

    step: int  # 1 after the first step
    t: float  # the time x is at
    x: Tensor
    nfe: int  # network calls so far


@dataclass(frozen=True)
class Churn:
    """Noise added before a step: gamma = min(churn / steps, sqrt(2) - 1) while the noise is in [t_low, t_high].

    Karras et al. (2022), algorithm 2 (S_churn, S_tmin, S_tmax, S_noise). Noise levels are sigma / alpha, which on VE is
    the time.
    """

    churn: float = 0.0
    t_low: float = 0.0
    t_high: float = math.inf
    noise: float = 1.0

    def raised(self, path: Path, t: Tensor, steps: int) -> Tensor:
        """The time reached from t, a scalar."""
        level, gamma = path.ratio(t), min(self.churn / steps, math.sqrt(2) - 1)
        raised = path.time(level * (1 + gamma)) if gamma and self.t_low <= level <= self.t_high else t
        return path.clamp(raised) if path.discrete else raised


@torch.inference_mode()
def solve(
    solver: Solver,
    denoise: Denoise,
    path: Path,
    start: Tensor,
    times: Tensor,
    *,
    noise: Callable[[int], Tensor] | None = None,
    churn: Churn | None = None,
    ancestral: bool = False,
) -> Iterator[SolveState]:
    """Solve the probability-flow ODE from `times[0]` down to `times[-1]`.

    Args:
        denoise: `(x, t) -> D`, shapes [B, ...], [B].
        start: samples at times[0], shape [B, ...].
        times: decreasing, shape [n + 1]. Where the last is noise-free (t = 0), the last step of `Heun` is an Euler
            step, since the velocity there is 0 / 0.
        noise: `noise(i)` gives the standard normal noise of step i >= 1; needed for `churn` and `ancestral`.
        churn: raise the noise level before each step (stochastic sampler of Karras et al.).
        ancestral: step further down than the grid's time and add noise up to it (with `Euler` on VE this is ancestral
            sampling).
    Yields:
        A `SolveState` after each step.
    Raises:
        ValueError: for times that do not decrease, noise that is needed and missing, or noise of two kinds.
    """
    if bool((times[1:] >= times[:-1]).any()):
        raise ValueError("the times of a solution must decrease")
    if noise is None and (ancestral or (churn is not None and churn.churn > 0)):
        raise ValueError("stochastic sampling needs a source of noise")
    if ancestral and churn is not None and churn.churn > 0:
        raise ValueError("noise is added by one of churn and ancestral, not both")
    x, nfe, batch = start, 0, (start.shape[0],)
    points = times.detach().cpu().double()
    for i, (t, s) in enumerate(pairwise(points), start=1):
        up = churn.raised(path, t, len(points) - 1) if churn else t
        if noise is not None and up > t:
            assert churn is not None
            x = path.diffuse(x, t.to(x), up.to(x), churn.noise * noise(i).to(x))
        down = _ancestral_target(path, up, s) if ancestral else s
        rule: Solver = Euler() if down == 0 and solver.kind == Heun.kind else solver
        x = rule.step(denoise, path, x, x.new_full(batch, float(up)), x.new_full(batch, float(down)))
        if noise is not None and down < s:
            x = path.diffuse(x, down.to(x), s.to(x), noise(i).to(x))
        nfe += rule.calls
        yield SolveState(i, float(s), x, nfe)


def _ancestral_target(path: Path, t: Tensor, s: Tensor) -> Tensor:
    """Where to step to from t so that noise up to s keeps the marginals: at the noise level ratio_s^2 / ratio_t.

    The noise added is then what q(x_s | x_t, x0) has: on VE sigma_up^2 = s^2 (t^2 - s^2) / t^2.
    """
    return path.time(path.ratio(s) ** 2 / path.ratio(t))


SOLVERS: dict[str, type] = {"euler": Euler, "ddim": DDIM, "heun": Heun, "dpm2": DPMSolver2}
