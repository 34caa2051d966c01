"""The Fréchet distance against its closed form for Gaussians that commute, and its laws."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.evaluation.statistics import Statistics, frechet, statistics


def gaussian(mean, variances, turned=None):
    covariance = torch.diag(torch.tensor(variances, dtype=torch.float64))
    turn = torch.eye(len(variances), dtype=torch.float64) if turned is None else turned
    return Statistics(turn @ torch.tensor(mean, dtype=torch.float64), turn @ covariance @ turn.T, 100)


def turn(size):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]


@pytest.mark.parametrize("turned", [None, turn(3)], ids=["axes", "turned"])
@pytest.mark.parametrize("other", [[0.5, 1.0, 9.0], [0.0, 4.0, 1e-12], [0.0, 0.0, 0.0]], ids=str)
def test_gaussians_with_the_same_axes(turned, other):
    mean, one = [1.0, -2.0, 0.5], [2.0, 1.0, 1e-9]
    expected = sum(m * m for m in mean)
    expected += sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(one, other, strict=True))
    found = frechet(gaussian(mean, one, turned), gaussian([0.0] * 3, other, turned))
    assert found == pytest.approx(expected, abs=1e-6)


def test_two_by_two_in_closed_form():
    """tr (C1 C2)^(1/2) of 2x2 matrices is sqrt(tr C1 C2 + 2 sqrt(det C1 C2))."""
    one = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    root = math.sqrt(float((one @ other).trace()) + 2 * math.sqrt(float(torch.det(one) * torch.det(other))))
    zero = torch.zeros(2, dtype=torch.float64)
    expected = float(one.trace() + other.trace()) - 2 * root
    assert frechet(Statistics(zero, one, 9), Statistics(zero, other, 9)) == pytest.approx(expected, rel=1e-12)
    assert frechet(Statistics(zero, other, 9), Statistics(zero, one, 9)) == pytest.approx(expected, rel=1e-12)


def test_a_set_has_no_distance_from_itself_however_few_they_are():
    vectors = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert frechet(statistics(vectors), statistics(vectors.flip(0))) == pytest.approx(0, abs=1e-9)


def test_the_covariance_is_that_of_numpy():
    import numpy as np

    vectors = 1000 + torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = statistics(vectors)
    assert found.covariance.numpy() == pytest.approx(np.cov(vectors.double().numpy().T), rel=1e-9)
    assert found.number == 50


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        statistics(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not compared"):
        frechet(gaussian([0.0], [1.0]), gaussian([0.0, 0.0], [1.0, 1.0]))
