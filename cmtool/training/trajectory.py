"""Trajectories: how a sample gets from time t to its neighbour r, and how it moves at t.

From the **data**, with the same noise (consistency training), along a **teacher**'s probability-flow ODE (consistency
distillation), or by the model's **own** jump (shortcut models).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from cmtool.errors import ConfigError
from cmtool.flow.flow_map import FlowMap, guided, on_path
from cmtool.solvers import DDIM, DPMSolver2, Euler, Heun, Solver
from cmtool.times import Karras


class Batch(NamedTuple):
    """Clean images [B, C, H, W] in [-1, 1] with what is known of them, and noise if the source fixes it."""

    x0: Tensor
    labels: Tensor | None = None  # class indices [B]
    eps: Tensor | None = None  # shape of x0
    augment: Tensor | None = None  # augmentation labels [B, A]


class PathSample(NamedTuple):
    """A noisy batch with what it was made of."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    labels: Tensor | None = None
    augment: Tensor | None = None


class Trajectory(Protocol):
    """Moves a sample along its path or ODE. `target` is the model whose path it is and who answers for `Self`."""

    def step(self, target: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        """x_r, shape of x_t."""
        ...

    def velocity(self, target: FlowMap, sample: PathSample) -> Tensor:
        """dx_t / dt, shape of x_t."""
        ...


@dataclass(frozen=True)
class Data:
    """x_r = alpha_r x0 + sigma_r eps with the x0 and eps of x_t. Song et al. (2023), algorithm 3."""

    kind: ClassVar[str] = "data"

    def step(self, target: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        return target.path.mix(sample.x0, sample.eps, r)

    def velocity(self, target: FlowMap, sample: PathSample) -> Tensor:
        return target.path.velocity(sample.x0, sample.eps, sample.t)


@dataclass(frozen=True)
class Self:
    """The target's own jump from t to r. Frans et al. (2024), arXiv:2410.12557: two half jumps teach one."""

    kind: ClassVar[str] = "self"

    def step(self, target: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        return target.jump(sample.x_t, sample.t, r, sample.labels, sample.augment)

    def velocity(self, target: FlowMap, sample: PathSample) -> Tensor:
        return target.velocity(sample.x_t, sample.t, sample.labels, sample.augment)


@dataclass(frozen=True)
class Teacher:
    """The teacher's ODE, solved from t to r. Song et al. (2023), algorithm 2; `bind` it to a model before use.

    The teacher may live on another path than the student: it is read on the student's (`on_path`).

    Args:
        solver: one step of it a sub-step.
        substeps: sub-steps between t and r, evenly spaced in the coordinate of `grid` (evenly in t would waste them all
            on the noisy end).
        guidance: scale of classifier-free guidance of the teacher; 1 is none.
    """

    kind: ClassVar[str] = "teacher"
    solver: Euler | Heun | DPMSolver2 | DDIM = field(default_factory=Heun)
    substeps: int = 1
    grid: Karras = field(default_factory=Karras)
    guidance: float = 1.0

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
        self.guidance = config.guidance
        self.teacher = teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def step(self, target: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        teacher = self._seen_by(target)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return teacher.denoised(x, t, sample.labels, told(teacher, sample.augment))

        solver: Solver = self.config.solver
        grid, path, n = self.config.grid, target.path, self.config.substeps
        x, t = sample.x_t, sample.t
        for i in range(1, n + 1):
            s = r if i == n else grid.between(path, sample.t, r, i / n)
            x = solver.step(denoise, path, x, t, s)
            t = s
        return x

    @torch.no_grad()
    def velocity(self, target: FlowMap, sample: PathSample) -> Tensor:
        teacher = self._seen_by(target)
        return teacher.velocity(sample.x_t, sample.t, sample.labels, told(teacher, sample.augment))

    def _seen_by(self, target: FlowMap) -> FlowMap:
        return on_path(guided(self.teacher, self.guidance), target.path)


def told(model: FlowMap, augment: Tensor | None) -> Tensor | None:
    """The augmentation labels [B, A] or None, for a model that knows them; one trained without is told nothing."""
    config = getattr(model.network, "config", None)
    return augment if getattr(config, "augment_dim", 0) else None


@dataclass(frozen=True)
class Predecessor(Teacher):
    """A teacher that is replaced by its student at the end of each stage. Salimans and Ho (2022), arXiv:2202.00512."""

    kind: ClassVar[str] = "predecessor"
    solver: Euler | Heun | DPMSolver2 | DDIM = field(default_factory=DDIM)
    substeps: int = 2

    def bind(self, teacher: FlowMap) -> PredecessorTrajectory:
        return PredecessorTrajectory(self, teacher)


class PredecessorTrajectory(TeacherTrajectory, nn.Module):
    """A `Predecessor` with its model: a Module, so that its weights are saved with the run."""

    def __init__(self, config: Predecessor, teacher: FlowMap) -> None:
        nn.Module.__init__(self)
        TeacherTrajectory.__init__(self, config, copy.deepcopy(teacher))

    def step(self, target: FlowMap, sample: PathSample, r: Tensor) -> Tensor:
        """x_r.

        Raises:
            ConfigError: if the student is no model of the teacher's kind: they could not take turns.
        """
        if (target.path, target.parameterization) != (self.teacher.path, self.teacher.parameterization):
            raise ConfigError(
                "progressive distillation turns students into teachers, and these differ in path or parameterization",
                "leave out --set path... and --set parameterization...",
            )
        return super().step(target, sample, r)

    def promote(self, model: FlowMap) -> None:
        """Follow this model from now on. It has learned the guidance of its teacher, which is not added once more."""
        self.teacher.network.load_state_dict(model.network.state_dict())
        self.guidance = 1.0

    def get_extra_state(self) -> float:
        return self.guidance

    def set_extra_state(self, state: float) -> None:
        self.guidance = state

    def train(self, mode: bool = True) -> PredecessorTrajectory:
        super().train(mode)
        self.teacher.eval()
        return self


AnyTrajectory = Data | Self | Teacher | Predecessor
TRAJECTORIES: dict[str, type] = {trajectory.kind: trajectory for trajectory in get_args(AnyTrajectory)}
