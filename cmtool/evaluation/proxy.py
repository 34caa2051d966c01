"""A cheap measure of a model while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmtool.evaluation.features import RandomFeatures
from cmtool.evaluation.judging import Images, rounded, samples, vectors_of
from cmtool.evaluation.statistics import Statistics, frechet, statistics
from cmtool.flow.flow_map import FlowMap
from cmtool.processes import ALONE, Processes

_SAMPLES, _OF_A_DENOISER = 1024, 256
_SOLVER_STEPS = 10
REFERENCE = 4096  # images of the data that samples are compared with, at most
_SMALLEST = 8  # side of an image that the features can tell something of


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

    def suits(self, model: FlowMap) -> bool:
        """Whether there is something to tell: of images large enough, and of more than one."""
        return model.card.resolution >= _SMALLEST and len(self.data) > 1

    def __call__(self, model: FlowMap) -> float:
        """The distance, the same in all processes; all of them call it.

        Args:
            model: the average, with all its weights.
        """
        seeds = range(self._count(model))
        features = RandomFeatures(model.card.channels)
        way = {"solver": "heun", "steps": _SOLVER_STEPS} if model.card.role == "denoiser" else {}
        made = samples(model, seeds, self.processes, labels=self._labels(model, seeds), **way)
        known = vectors_of({features.name: features}, (images for images, _ in made), self.processes)
        found = 0.0
        if self.processes.first:
            found = frechet(statistics(known[features.name].vectors), self._data(features))
        return self.processes.told(found)

    def _count(self, model: FlowMap) -> int:
        most = _OF_A_DENOISER if model.card.role == "denoiser" else _SAMPLES
        return min(most, len(self.data))

    def _labels(self, model: FlowMap, seeds: range) -> list[int] | None:
        """The class of each seed: that of an image of the data."""
        if not model.card.num_classes:
            return None
        labels: Any = self.data.batch(_spread(len(self.data), len(seeds)))[1]
        return None if labels is None else [int(label) for label in labels]

    def _data(self, features: RandomFeatures) -> Statistics:
        if self._reference is None:
            chosen = _spread(len(self.data), min(REFERENCE, len(self.data)))
            pictures = (rounded(self.data.batch(part)[0]) for part in chosen.split(features.batch))
            self._reference = statistics(vectors_of({features.name: features}, pictures)[features.name].vectors)
        return self._reference


def _spread(size: int, count: int) -> Tensor:
    """`count` indices over `size` things, equally far from each other."""
    return torch.arange(count) * size // count
