"""`Recipe`: everything that defines a training, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cmtool.flow.flow_map import Role
from cmtool.flow.parameterization import PARAMETERIZATIONS, TIME_INPUTS, AnyParameterization, BoundaryEDM
from cmtool.flow.path import PATHS, VE, AnyPath
from cmtool.networks import CONFIGS, Config
from cmtool.solvers import SOLVERS
from cmtool.times import CURRICULA, GRIDS, INDEX_LAWS, TIME_SAMPLERS
from cmtool.training.augment import Augment
from cmtool.training.average import AVERAGES, Exponential, HalfLife, Power
from cmtool.training.distances import DISTANCES
from cmtool.training.objectives import OBJECTIVES, AnyObjective
from cmtool.training.tangents import BALANCES, LIMITS
from cmtool.training.targets import TARGETS
from cmtool.training.trajectory import TRAJECTORIES
from cmtool.training.weights import WEIGHTS


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its learning rate over the training.

    lr(p) = lr * min(1, images / warmup) * (final + (1 - final) (1 + cos(pi p)) / 2), p the share of the training done;
    final = 1 is a constant rate.
    """

    kind: ClassVar[str] = "optimizer"
    rule: Literal["radam", "adam", "adamw"] = "radam"
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0  # images
    final: float = 1.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"the learning rate must be positive, found {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), found {self.betas}")
        for name in ("eps", "weight_decay", "warmup", "final"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or none, found {self.clip_norm}")

    def rate(self, progress: float, images: int) -> float:
        """The learning rate at this point of the training."""
        rise = min(1.0, images / self.warmup) if self.warmup else 1.0
        fall = self.final + (1 - self.final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return self.lr * rise * fall


@dataclass(frozen=True)
class Recipe:
    """A training, resolved: no default is left to be looked up elsewhere."""

    preset: str
    role: Role
    objective: AnyObjective
    network: Config
    path: AnyPath = field(default_factory=VE)
    parameterization: AnyParameterization = field(default_factory=BoundaryEDM)
    optimizer: Optimizer = field(default_factory=Optimizer)
    averages: tuple[Exponential | HalfLife | Power, ...] = (Exponential(),)
    init_from_teacher: bool = False
    iterations: int = 10_000
    batch: int = 512
    flip: bool = False  # mirror half of the images
    augment: Augment | None = None  # Karras et al.'s pipe; the network needs its augmentation vector
    two_step: float | None = None  # the second time point of two-step sampling, recommended in the model's file

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1:
            raise ValueError(f"iterations and batch must be at least 1, found {self.iterations} and {self.batch}")
        if not self.averages:
            raise ValueError("at least one average of the weights is needed: it is what is sampled from")
        names = [rule.name for rule in self.averages]
        if len(set(names)) < len(names):
            raise ValueError(f"two averages have the same name: {', '.join(names)}")


KINDS: dict[str, type[Any]] = {
    **PATHS,
    **PARAMETERIZATIONS,
    **TIME_INPUTS,
    **GRIDS,
    **CURRICULA,
    **INDEX_LAWS,
    **TIME_SAMPLERS,
    **DISTANCES,
    **WEIGHTS,
    **TARGETS,
    **TRAJECTORIES,
    **SOLVERS,
    **OBJECTIVES,
    **LIMITS,
    **BALANCES,
    **AVERAGES,
    Augment.kind: Augment,
    Optimizer.kind: Optimizer,
    **CONFIGS,
}
