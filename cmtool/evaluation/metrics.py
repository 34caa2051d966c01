"""Numbers that compare two sets of images by their features, and what each is called.

A number that depends on how many images there are carries their count in its name, `fid@1000`, below 10,000.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import UsageError, nearest
from cmtool.evaluation.statistics import Statistics, frechet, statistics

MANY = 10_000  # images from which on a Fréchet distance needs no footnote
NEIGHBOURS = 3
SUBSETS, SUBSET, SEED = 100, 1000, 2020  # of the kernel distance, as torch-fidelity has them
SPLITS = 10
_ROWS = 4096

# What a number means besides its features; goes with every protocol.
DEFINITIONS = {
    "neighbours": NEIGHBOURS,
    "kernel": "(x.y / D + 1)^3",
    "subsets": SUBSETS,
    "subset": SUBSET,
    "splits": SPLITS,
}

# name -> (kind, the features it means, or None for those that are chosen)
METRICS = {
    "fd": ("fd", None),
    "kd": ("kd", None),
    "precision": ("precision", None),
    "recall": ("recall", None),
    "fid": ("fd", "inception"),
    "kid": ("kd", "inception"),
    "is": ("is", "inception"),
    "fd-dinov2": ("fd", "dinov2"),
}


@dataclass(frozen=True)
class Metric:
    """A number to measure: of a kind (fd, kd, precision, recall, is), in some features, a name or a file."""

    kind: str
    features: str

    def name(self, count: int) -> str:
        """What the number is called if it is of so many images."""
        known = {("fd", "inception"): "fid", ("kd", "inception"): "kid", ("is", "inception"): "is"}
        plain = known.get((self.kind, self.features), f"{self.kind}_{PurePath(self.features).stem}")
        return plain if count >= MANY or self.kind == "kd" else f"{plain}@{count}"

    @property
    def needs_vectors(self) -> bool:
        """Whether the mean and covariance of the reference are not enough."""
        return self.kind in ("kd", "precision", "recall")


def parse_metrics(names: Sequence[str], features: str) -> list[Metric]:
    """The metrics of these names; those that name no features take the chosen ones.

    Raises:
        UsageError: an unknown one.
    """
    found = []
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--metrics: there is no metric {name!r}", nearest(name, METRICS))
        kind, own = METRICS[name]
        found.append(Metric(kind, own or features))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Reference:
    """What images are compared with, in some features: statistics, and the vectors [N, D] where they are known."""

    statistics: Statistics
    vectors: Tensor | None = None

    @classmethod
    def of(cls, vectors: Tensor) -> Reference:
        """Of vectors [N, D]."""
        return cls(statistics(vectors), vectors)


def measure(
    metrics: Sequence[Metric], vectors: Tensor, logits: Tensor | None, reference: Reference
) -> dict[str, float]:
    """The numbers of images with these vectors [N, D], all in the same features.

    Args:
        logits: [N, classes] of the classifier the features are of, for the Inception score.
    Raises:
        ValueError: where a metric needs vectors of the reference, or logits, and there are none.
    """
    found: dict[str, float] = {}
    wanted = {metric.kind: metric.name(len(vectors)) for metric in metrics}
    if any(metric.needs_vectors for metric in metrics) and reference.vectors is None:
        raise ValueError("the reference has a mean and a covariance only")
    if "fd" in wanted:
        found[wanted["fd"]] = frechet(statistics(vectors), reference.statistics)
    if "kd" in wanted and reference.vectors is not None:
        mean, spread = kernel_distance(vectors, reference.vectors)
        found[wanted["kd"]], found[f"{wanted['kd']}_std"] = mean, spread
    if {"precision", "recall"} & wanted.keys() and reference.vectors is not None:
        pair = dict(zip(("precision", "recall"), precision_recall(vectors, reference.vectors), strict=True))
        found |= {wanted[kind]: value for kind, value in pair.items() if kind in wanted}
    if "is" in wanted:
        if logits is None:
            raise ValueError("these features are of no classifier")
        mean, spread = inception_score(logits)
        found[wanted["is"]], found[f"{wanted['is']}_std"] = mean, spread
    return found


def kernel_distance(
    vectors: Tensor, reference: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = SEED
) -> tuple[float, float]:
    """The mean and the standard deviation of the squared MMD over random subsets, unbiased: near 0 it may be negative.

    With the kernel (x.y / D + 1)^3 of Inception features it is the KID, Binkowski et al. (2018), arXiv:1801.01401. The
    subsets have `size` vectors, or as many as there are.
    """
    chance = np.random.RandomState(seed)
    size = min(size, len(vectors), len(reference))
    if size < 2:
        raise ValueError("a kernel distance takes at least 2 images")
    found = []
    for _ in range(subsets):
        x = vectors[torch.from_numpy(chance.choice(len(vectors), size, replace=False))].double()
        y = reference[torch.from_numpy(chance.choice(len(reference), size, replace=False))].double()
        within = sum(_kernel(one, one).sum() - _kernel_diagonal(one).sum() for one in (x, y)) / (size * (size - 1))
        found.append(float(within - 2 * _kernel(x, y).mean()))
    return float(np.mean(found)), float(np.std(found))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def precision_recall(vectors: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """How many of the images lie among those of the reference, and how many of the reference among the images.

    A set covers the balls around its points that reach to the third nearest of its other points. Kynkäänniemi et al.
    (2019), arXiv:1904.06991.

    Raises:
        UsageError: for a set with no third neighbour.
    """
    if min(len(vectors), len(reference)) <= neighbours:
        raise UsageError(
            f"precision and recall take more than {neighbours} images, found {len(vectors)} and {len(reference)}",
            "take more images, or other metrics",
        )
    return _covered(vectors, reference, neighbours), _covered(reference, vectors, neighbours)


def _covered(points: Tensor, by: Tensor, neighbours: int) -> float:
    radii = torch.cat([part.kthvalue(neighbours + 1).values for part in _distances(by, by)])
    return float(torch.cat([(part <= radii).any(1) for part in _distances(points, by)]).float().mean())


def _distances(one: Tensor, other: Tensor) -> Iterator[Tensor]:
    for part in one.split(_ROWS):
        yield torch.cdist(part, other)


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = SEED) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)), its mean and standard deviation over splits of the shuffled images.

    Salimans et al. (2016), arXiv:1606.03498.
    """
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    log_p = logits[order].double().log_softmax(1)
    scores = []
    for index in range(min(splits, len(logits))):
        begin, end = (len(logits) * i // min(splits, len(logits)) for i in (index, index + 1))
        part = log_p[begin:end]
        mean = part.exp().mean(0, keepdim=True)
        scores.append(float((part.exp() * (part - mean.log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
