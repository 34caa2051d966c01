"""Objectives: what a training step minimises.

`Denoising` regresses on the data at one time; `Consistency` compares the model at t with its target at a neighbour r on
the same trajectory. Configs are frozen dataclasses; `build` makes the module that holds what has weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cmtool import rng
from cmtool.errors import ConfigError
from cmtool.flow.flow_map import FlowMap
from cmtool.flow.path import Path
from cmtool.times import Adjacent, LogNormal
from cmtool.training import distances, weights
from cmtool.training.distances import L1, L2, LPIPS, PseudoHuber
from cmtool.training.targets import AdaptiveAverage, MovingAverage, Online
from cmtool.training.trajectory import Batch, Data, PathSample, Teacher

AnyDistance = L1 | L2 | PseudoHuber | LPIPS
AnyWeight = (
    weights.Uniform | weights.SNR | weights.SNRPlusOne | weights.TruncatedSNR | weights.Karras | weights.InverseGap
)


class Loss(NamedTuple):
    """The mean over the batch, the losses of the samples [B], and the times they were computed at [B]."""

    value: Tensor
    per_sample: Tensor
    t: Tensor


class Objective(nn.Module):
    """One training objective. `forward(model, target, batch, progress, generator) -> Loss`."""

    def forward(
        self, model: FlowMap, target: FlowMap, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The loss of a batch.

        Args:
            model: what is trained.
            target: the weights of the comparison; the model itself for online targets and for denoising.
            batch: clean images with labels.
            progress: share of the training done, in [0, 1]; curricula are functions of it.
            generator: source of times, noise and dropout seeds, on the device of the batch.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Denoising:
    """weight * d(D(x_t, t), x0): denoising score matching. Karras et al. (2022), arXiv:2206.00364, eq. 2."""

    kind: ClassVar[str] = "denoising"
    times: LogNormal = field(default_factory=LogNormal)
    distance: AnyDistance = field(default_factory=L2)
    weight: AnyWeight = field(default_factory=weights.Karras)
    target: Online = field(default_factory=Online)

    @property
    def needs_teacher(self) -> bool:
        return False

    def build(self, teacher: FlowMap | None = None, backbone: Mapping[str, Tensor] | None = None) -> Objective:
        """The module of this objective."""
        return DenoisingLoss(self, backbone)


@dataclass(frozen=True)
class Consistency:
    """weight * d(f(x_t, t), f-(x_r, r)): consistency distillation and training. Song et al. (2023), eq. 7 and 10."""

    kind: ClassVar[str] = "consistency"
    trajectory: Data | Teacher = field(default_factory=Teacher)
    times: Adjacent = field(default_factory=Adjacent)
    distance: AnyDistance = field(default_factory=L2)
    weight: AnyWeight = field(default_factory=weights.Uniform)
    target: Online | MovingAverage | AdaptiveAverage = field(default_factory=Online)

    @property
    def needs_teacher(self) -> bool:
        return isinstance(self.trajectory, Teacher)

    def build(self, teacher: FlowMap | None = None, backbone: Mapping[str, Tensor] | None = None) -> Objective:
        """The module of this objective.

        Raises:
            ConfigError: without the teacher that its trajectory needs.
        """
        return ConsistencyLoss(self, teacher, backbone)


class DenoisingLoss(Objective):
    """`Denoising` at work."""

    def __init__(self, config: Denoising, backbone: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.distance = distances.build(config.distance, backbone)

    def forward(
        self, model: FlowMap, target: FlowMap, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        times = self.config.times(model.path, len(batch.x0), progress, generator)
        sample = noised(model.path, batch, times.t, generator)
        with rng.forked(_dropout_seed(generator), batch.x0.device):
            estimate = model.denoised(sample.x_t, sample.t, batch.labels)
        losses = self.config.weight(model.path, times) * self.distance(estimate, batch.x0)
        return Loss(losses.mean(), losses.detach(), sample.t)


class ConsistencyLoss(Objective):
    """`Consistency` at work."""

    def __init__(
        self, config: Consistency, teacher: FlowMap | None = None, backbone: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.distance = distances.build(config.distance, backbone)
        if isinstance(config.trajectory, Teacher):
            if teacher is None:
                raise ConfigError("this objective follows a teacher, and there is none", "give one with --teacher")
            self.trajectory: object = config.trajectory.bind(teacher)
        else:
            self.trajectory = config.trajectory

    def forward(
        self, model: FlowMap, target: FlowMap, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        times = self.config.times(model.path, len(batch.x0), progress, generator)
        sample = noised(model.path, batch, times.t, generator)
        seed = _dropout_seed(generator)
        with torch.no_grad():
            x_r = self.trajectory.step(model, sample, times.r)  # type: ignore[attr-defined]
            with rng.forked(seed, batch.x0.device):
                goal = target.jump(x_r, times.r, times.s, batch.labels)
        # The same seed: both passes drop the same units.
        with rng.forked(seed, batch.x0.device):
            estimate = model.jump(sample.x_t, sample.t, times.s, batch.labels)
        losses = self.config.weight(model.path, times) * self.distance(estimate, goal)
        return Loss(losses.mean(), losses.detach(), sample.t)


def noised(path: Path, batch: Batch, t: Tensor, generator: torch.Generator) -> PathSample:
    """The batch at times t [B], with the batch's own noise or fresh noise."""
    eps = batch.eps
    if eps is None:
        eps = torch.empty_like(batch.x0).normal_(generator=generator)  # in the memory layout of the batch
    return PathSample(path.mix(batch.x0, eps, t), t, batch.x0, eps, batch.labels)


def _dropout_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


OBJECTIVES: dict[str, type] = {"denoising": Denoising, "consistency": Consistency}
