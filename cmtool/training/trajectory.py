"""Trajectories: how a sample gets from time t to its neighbour r.

From the **data**, with the same noise (consistency training), or along a **teacher**'s probability-flow ODE
(consistency distillation).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool.errors import ConfigError
from cmtool.flow.flow_map import FlowMap
from cmtool.solvers import DPMSolver2, Euler, Heun, Solver
from cmtool.times import Karras


class Batch(NamedTuple):
    """Clean images [B, C, H, W] in [-1, 1], class indices [B] or None, and noise if the source fixes it."""

    x0: Tensor
    labels: Tensor | None = None
    eps: Tensor | None = None


class PathSample(NamedTuple):
    """A noisy batch with what it was made of."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    labels: Tensor | None


class Trajectory(Protocol):
    """Moves a sample along its path or ODE."""

    def step(self, model: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        """x_r, shape of x_t."""
        ...


@dataclass(frozen=True)
class Data:
    """x_r = alpha_r x0 + sigma_r eps with the x0 and eps of x_t. Song et al. (2023), algorithm 3."""

    kind: ClassVar[str] = "data"

    def step(self, model: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        return model.path.mix(sample.x0, sample.eps, r)


@dataclass(frozen=True)
class Teacher:
    """The teacher's ODE, solved from t to r. Song et al. (2023), algorithm 2; `bind` it to a model before use.

    Args:
        solver: one step of it a sub-step.
        substeps: sub-steps between t and r, evenly spaced in the coordinate of `grid` (evenly in t would waste them all
            on the noisy end).
    """

    kind: ClassVar[str] = "teacher"
    solver: Euler | Heun | DPMSolver2 = field(default_factory=Heun)
    substeps: int = 1
    grid: Karras = field(default_factory=Karras)

    def __post_init__(self) -> None:
        if self.substeps < 1:
            raise ValueError(f"substeps must be at least 1, found {self.substeps}")

    def bind(self, teacher: FlowMap) -> TeacherTrajectory:
        """The trajectory of this teacher."""
        return TeacherTrajectory(self, teacher)


class TeacherTrajectory:
    """A `Teacher` with its model. Not a Module on purpose: the teacher is never trained or saved with the student."""

    def __init__(self, config: Teacher, teacher: FlowMap) -> None:
        self.config = config
        self.teacher = teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def step(self, model: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.teacher.denoised(x, t, sample.labels)

        solver: Solver = self.config.solver
        grid, path, n = self.config.grid, self.teacher.path, self.config.substeps
        if model.path != path:
            raise ConfigError(f"the student's path is {model.path}, its teacher's {path}", "leave out --set path")
        x, t = sample.x_t, sample.t
        for i in range(1, n + 1):
            s = r if i == n else grid.between(path, sample.t, r, i / n)
            x = solver.step(denoise, path, x, t, s)
            t = s
        return x


TRAJECTORIES: dict[str, type] = {"data": Data, "teacher": Teacher}
