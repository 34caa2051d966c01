"""Metrics against counts by hand, brute force and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.errors import UsageError
from cmtool.evaluation.metrics import (
    Metric,
    Reference,
    inception_score,
    kernel_distance,
    measure,
    parse_metrics,
    precision_recall,
)


def vectors(count, size=5, seed=0, shift=0.0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_kernel_distance_is_the_unbiased_mmd():
    x, y = vectors(6), vectors(6, seed=1, shift=0.5)

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    between = sum(kernel(a, b) for a in x for b in y) / 36
    mean, spread = kernel_distance(x, y, subsets=3, size=6)
    assert mean == pytest.approx(within - 2 * between, rel=1e-6)
    assert spread == pytest.approx(0, abs=1e-6)  # every subset is all of them


def test_the_kernel_distance_of_one_distribution_is_nothing_on_average():
    found = [kernel_distance(vectors(100, seed=2 * k), vectors(100, seed=2 * k + 1), subsets=1)[0] for k in range(40)]
    mean = sum(found) / 40
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / 39 / 40)
    assert abs(mean) < 4 * spread
    assert min(found) < 0 < max(found)
    assert kernel_distance(vectors(100), vectors(100, seed=1, shift=1.0))[0] > 10 * max(found)


def test_precision_and_recall_by_hand():
    """The third nearest of 0, 1, 2, 3 is 3, 2, 2 and 3 away: together they cover -3 to 6."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    points = torch.tensor([[-3.5], [-2.9], [5.9], [6.1], [1.5], [100.0]])
    precision, recall = precision_recall(points, reference)
    assert precision == pytest.approx(3 / 6)
    # Around 100 the ball reaches to its third nearest, 5.9... all of the reference lies within that of others.
    assert recall == 1.0
    assert precision_recall(reference + 1000, reference) == (0.0, 0.0)
    assert precision_recall(reference, reference) == (1.0, 1.0)
    with pytest.raises(UsageError, match="more than 3 images, found 3 and 4"):
        precision_recall(reference[:3], reference)


def test_inception_scores_of_known_distributions():
    sure = 1000 * torch.eye(4).repeat(25, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.zeros(100, 4))[0] == pytest.approx(1)
    half = torch.tensor([[0.0, 0.0, -1000.0, -1000.0], [-1000.0, -1000.0, 0.0, 0.0]]).repeat(10, 1)
    assert inception_score(half, splits=1)[0] == pytest.approx(2)


def test_names_say_of_how_many():
    metrics = parse_metrics(["fd", "fid", "kid", "is", "fd-dinov2", "precision", "fd"], "random")
    assert [one.name(500) for one in metrics] == [
        *("fd_random@500", "fid@500", "kid", "is@500", "fd_dinov2@500", "precision_random@500")
    ]
    assert Metric("fd", "inception").name(10_000) == "fid"
    assert parse_metrics(["fd"], "inception")[0].name(50_000) == "fid"
    with pytest.raises(UsageError, match="no metric 'fido'"):
        parse_metrics(["fido"], "random")


def test_a_set_is_no_distance_from_itself():
    known = vectors(50)
    metrics = parse_metrics(["fd", "kd", "precision", "recall"], "random")
    found = measure(metrics, known, None, Reference.of(known))
    assert found["fd_random@50"] == pytest.approx(0, abs=1e-9)
    assert (found["precision_random@50"], found["recall_random@50"]) == (1, 1)
    assert found["kd_random"] < 0  # unbiased: the diagonal is left out on one side only


def test_what_is_missing():
    known = vectors(5)
    bare = Reference(Reference.of(known).statistics)
    with pytest.raises(ValueError, match="mean and a covariance only"):
        measure([Metric("kd", "random")], known, None, bare)
    with pytest.raises(ValueError, match="no classifier"):
        measure([Metric("is", "random")], known, None, bare)
