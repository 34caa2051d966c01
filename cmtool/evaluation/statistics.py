"""Means and covariances of features, and the Fréchet distance between them; all in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 4096  # vectors in float64 at once


class Statistics(NamedTuple):
    """A set of vectors as a Gaussian."""

    mean: Tensor  # float64 [D]
    covariance: Tensor  # float64 [D, D]
    number: int  # of vectors


def statistics(vectors: Tensor) -> Statistics:
    """The mean and the unbiased covariance of vectors [N, D], N >= 2.

    Raises:
        ValueError: for fewer than two.
    """
    if len(vectors) < 2:
        raise ValueError(f"a covariance takes at least 2 vectors, found {len(vectors)}")
    mean = torch.stack([part.double().sum(0) for part in vectors.split(_ROWS)]).sum(0) / len(vectors)
    covariance = torch.zeros(2 * mean.shape, dtype=torch.float64)
    for part in vectors.split(_ROWS):
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred)
    return Statistics(mean, covariance / (len(vectors) - 1), len(vectors))


def frechet(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Wasserstein-2 distance of two Gaussians.

    Dowson and Landau (1982); of Inception features it is the FID of Heusel et al. (2017), arXiv:1706.08500. The trace
    of the root is taken as that of the symmetric (A C2 A)^(1/2) with A = C1^(1/2), which has the same eigenvalues: no
    complex numbers, and nothing to add to a singular covariance.

    Raises:
        ValueError: for vectors of different lengths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"vectors of {len(one.mean)} and of {len(other.mean)} numbers are not compared")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    inner = root @ other.covariance @ root
    crossed = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    moved = (one.mean - other.mean).square().sum()
    return max(0.0, float(moved + one.covariance.trace() + other.covariance.trace() - 2 * crossed))
