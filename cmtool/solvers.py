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
    """Noise added before a step: gamma = min(churn / steps, sqrt(2) - 1) while t_low <= t <= t_high.

    Karras et al. (2022), algorithm 2 (S_churn, S_tmin, S_tmax, S_noise).
    """

    churn: float = 0.0
    t_low: float = 0.0
    t_high: float = math.inf
    noise: float = 1.0

    def raised(self, t: float, steps: int) -> float:
        """The noise level reached from t."""
        if not self.t_low <= t <= self.t_high:
            return t
        return t * (1 + min(self.churn / steps, math.sqrt(2) - 1))


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
        churn: raise the noise level before each step (stochastic sampler of Karras et al., VE only).
        ancestral: after a step to sigma_down, add noise up to the grid's level (Euler on VE is ancestral sampling).
    Yields:
        A `SolveState` after each step.
    Raises:
        ValueError: for times that do not decrease, or noise that is needed and missing.
    """
    if bool((times[1:] >= times[:-1]).any()):
        raise ValueError("the times of a solution must decrease")
    if noise is None and (ancestral or (churn is not None and churn.churn > 0)):
        raise ValueError("stochastic sampling needs a source of noise")
    x, nfe = start, 0
    points = [float(t) for t in times]
    for i, (t, s) in enumerate(pairwise(points), start=1):
        raised = churn.raised(t, len(points) - 1) if churn else t
        if churn and raised > t:
            assert noise is not None
            x = x + math.sqrt(raised**2 - t**2) * churn.noise * noise(i).to(x)
        down, up = _ancestral_split(raised, s) if ancestral else (s, 0.0)
        to_zero = down == 0 and solver.kind == Heun.kind
        rule: Solver = Euler() if to_zero else solver
        batch = (x.shape[0],)
        x = rule.step(denoise, path, x, x.new_full(batch, raised), x.new_full(batch, down))
        if up:
            assert noise is not None
            x = x + up * noise(i).to(x)
        nfe += rule.calls
        yield SolveState(i, s, x, nfe)


def _ancestral_split(t: float, s: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = s^2 that keep the marginals of a VE step from t to s."""
    up = math.sqrt(s**2 * (t**2 - s**2) / t**2)
    return math.sqrt(s**2 - up**2), up


SOLVERS: dict[str, type] = {"euler": Euler, "heun": Heun, "dpm2": DPMSolver2}
