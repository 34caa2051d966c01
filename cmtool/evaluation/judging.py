"""A set of images against a reference: one pass over the images, any number of metrics and features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.evaluation.features import Extracted, Features
from cmtool.evaluation.metrics import Metric, Reference, measure
from cmtool.flow.flow_map import FlowMap
from cmtool.generate import generate
from cmtool.io.images import to_uint8
from cmtool.processes import ALONE, Processes

_READ = 256  # images of a data set at once


class Images(Protocol):
    """A data set, see `cmtool.training.trainer.Images`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor | None, ...]: ...


class Judge:
    """Measures sets of images.

    Args:
        metrics: what to measure.
        features: by name, those that the metrics are in.
        references: by the same names.
        processes: those that share the work; all get the numbers.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        features: Mapping[str, Features],
        references: Mapping[str, Reference],
        processes: Processes = ALONE,
    ) -> None:
        self.metrics, self.features, self.references, self.processes = metrics, features, references, processes

    def __call__(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """The numbers of uint8 images; each process brings its share, in the order of the ranks."""
        known = vectors_of(self.features, batches, self.processes)
        found: dict[str, float] = {}
        for name, made in known.items():
            metrics = [metric for metric in self.metrics if metric.features == name]
            found |= measure(metrics, made.vectors, made.logits, self.references[name])
        return self.processes.told(found)


def vectors_of(
    features: Mapping[str, Features], batches: Iterable[Tensor], processes: Processes = ALONE
) -> dict[str, Extracted]:
    """The vectors of uint8 images in each of the features, of all processes together; on the first one only.

    The images are gone through once, and only their vectors are kept.

    Raises:
        ValueError: if there are none.
    """
    own: dict[str, list[Extracted]] = {name: [] for name in features}
    for images in batches:
        for name, extractor in features.items():
            own[name] += [extractor(part) for part in images.split(extractor.batch)]
    found = {}
    for name, made in own.items():
        parts = [one for share in processes.gathered(made) for one in share]
        if processes.first:
            if not parts:
                raise ValueError("there are no images")
            logits = [one.logits for one in parts if one.logits is not None]
            found[name] = Extracted(torch.cat([one.vectors for one in parts]), torch.cat(logits) if logits else None)
    return found


def references_of(
    features: Mapping[str, Features],
    data: Images,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Reference]:
    """A data set as a reference, in each of the features; on the first process only.

    Args:
        progress: told how many images of this process are done.
    """
    made = vectors_of(features, pictures_of(data, processes, progress), processes)
    return {name: Reference.of(one.vectors) for name, one in made.items()}


def pictures_of(
    data: Images, processes: Processes = ALONE, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Tensor]:
    """This process's share of a data set as uint8 images, batch by batch."""
    indices = range(len(data))[processes.share(len(data))]
    for begin in range(0, len(indices), _READ):
        part = indices[begin : begin + _READ]
        yield rounded(data.batch(torch.tensor(part))[0])
        progress(begin + len(part))


def rounded(images: Tensor | None) -> Tensor:
    """Images of a data set as uint8."""
    assert images is not None
    return to_uint8(images) if images.is_floating_point() else images


def samples(
    model: FlowMap, seeds: Sequence[int], processes: Processes = ALONE, **how: Any
) -> Iterator[tuple[Tensor, int]]:
    """This process's share of a model's samples as uint8 images, batch by batch, with the network calls they took.

    Args:
        seeds: of all processes; how: as `cmtool.generate.generate`.
    Raises:
        CheckpointError: for a model whose images are not finite.
    """
    for part in generate(model, seeds[processes.share(len(seeds))], **how):
        if not bool(part.images.isfinite().all()):
            raise CheckpointError("the model makes images with values that are not finite", "cmtool info says more")
        yield to_uint8(part.images), part.nfe
