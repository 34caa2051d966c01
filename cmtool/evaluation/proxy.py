"""A cheap measure of a model while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from cmtool.evaluation.features import RandomFeatures, extract
from cmtool.evaluation.statistics import Statistics, frechet, statistics
from cmtool.flow.flow_map import FlowMap
from cmtool.generate import generate
from cmtool.io.images import to_uint8
from cmtool.processes import ALONE, Processes

_SAMPLES, _OF_A_DENOISER = 1024, 256
_SOLVER_STEPS = 10
_REFERENCE = 4096  # images of the data that samples are compared with, at most
_SMALLEST = 8  # side of an image that the features can tell something of


class Images(Protocol):
    """A data set, see `cmtool.training.trainer.Images`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor | None, ...]: ...


class Proxy:
    """The Fréchet distance of samples from the data in `RandomFeatures`: always of the same seeds, classes and images.

    So few samples make it too large by much the same for each model: it ranks the states of one training, and says
    nothing of another's. One-step samples of a model that makes them; of a denoiser a fourth as many, by 10 steps of
    Heun's method.

    Args:
        data: what the model learns from.
        processes: they share the samples, and the first one tells.
    """

    def __init__(self, data: Images, processes: Processes = ALONE) -> None:
        self.data, self.processes = data, processes
        self._reference: Statistics | None = None

    def name(self, model: FlowMap) -> str:
        """What the number is called: the measure, and of how many samples."""
        return f"fd_random@{self._count(model)}"

    @staticmethod
    def suits(model: FlowMap) -> bool:
        """Whether the features can tell something of its images."""
        return model.card.resolution >= _SMALLEST

    def __call__(self, model: FlowMap) -> float:
        """The distance, the same in all processes; all of them call it.

        Args:
            model: the average, with all its weights.
        """
        seeds = range(self._count(model))
        own = self.processes.share(len(seeds))
        features = RandomFeatures(model.card.channels)
        made = (
            extract(features, _uint8(model, seeds[own], self._labels(model, seeds))).vectors
            if len(seeds[own])
            else None
        )
        parts = [part for part in self.processes.gathered(made) if part is not None]
        found = 0.0
        if self.processes.first:
            found = frechet(statistics(torch.cat(parts)), self._data(features))
        return self.processes.told(found)

    def _count(self, model: FlowMap) -> int:
        most = _OF_A_DENOISER if model.card.role == "denoiser" else _SAMPLES
        return max(2, min(most, len(self.data)))

    def _labels(self, model: FlowMap, seeds: range) -> list[int] | None:
        """The class of each seed: that of an image of the data."""
        if not model.card.num_classes:
            return None
        labels: Any = self.data.batch(_spread(len(self.data), len(seeds)))[1]
        return None if labels is None else [int(label) for label in labels]

    def _data(self, features: RandomFeatures) -> Statistics:
        if self._reference is None:
            chosen = _spread(len(self.data), min(_REFERENCE, len(self.data)))
            self._reference = statistics(extract(features, map(self._pictures, chosen.split(256))).vectors)
        return self._reference

    def _pictures(self, indices: Tensor) -> Tensor:
        images = self.data.batch(indices)[0]
        assert images is not None
        return to_uint8(images) if images.is_floating_point() else images


def _spread(size: int, count: int) -> Tensor:
    """`count` indices over `size` things, equally far from each other."""
    return torch.arange(count) * size // count


def _uint8(model: FlowMap, seeds: range, labels: list[int] | None) -> Iterator[Tensor]:
    solver = ("heun", _SOLVER_STEPS) if model.card.role == "denoiser" else (None, None)
    for part in generate(model, seeds, labels=labels, solver=solver[0], steps=solver[1]):
        yield to_uint8(part.images)
