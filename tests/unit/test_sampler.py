"""The multistep loop: exact on Gaussian data for any number of steps, with and without constraints."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from cmtool.editing import AvgPool, Luma, Mask, project
from cmtool.errors import UsageError
from cmtool.flow import VE, Linear, Trig
from cmtool.sampler import check_times, default_times, sample
from cmtool.times import Karras
from tests import models
from tests.oracles import GaussianConsistency

PATHS = [VE(), Linear(t_min=0.002, t_max=0.99), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
TIMES = {1: [1.0], 2: [1.0, 0.4], 5: [1.0, 0.8, 0.55, 0.3, 0.1]}  # shares of the grid's coordinate, from t_min up


def points(path, steps):
    return Karras().at(path, 1 - torch.tensor(TIMES[steps], dtype=torch.float64))


def last(states):
    *_, state = states
    return state


def draws(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(shape, generator=generator, dtype=dtype)


@paths
@pytest.mark.parametrize("steps", TIMES)
def test_the_exact_consistency_function_keeps_the_moments_exactly(path, steps):
    """f is affine on Gaussian data: pass the rows of an identity through the loop and read mean and variance off."""
    model = GaussianConsistency(path, mean=0.3, std=0.5)
    times, n = points(path, steps).double(), steps
    start = torch.zeros(n + 1, 1, 1, 1, dtype=torch.float64)
    start[n] = 1

    def noise(i):
        rows = torch.zeros_like(start)
        rows[i] = 1
        return rows

    end = last(sample(model, start, times, noise=noise, clip=False)).denoised.flatten()
    constant, gains = end[0], end[1:] - end[0]
    mean = constant + gains[-1] * path.alpha(times[0]) * 0.3
    variance = gains[-1] ** 2 * model.variance(times[0]) + gains[:-1].square().sum()
    t_min = torch.tensor(path.t_min, dtype=torch.float64)
    torch.testing.assert_close(mean, 0.3 * path.alpha(t_min), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(variance, model.variance(t_min), rtol=1e-7, atol=1e-9)
    assert bool((gains != 0).all())  # every noise and the start take part


@paths
@pytest.mark.parametrize("steps", TIMES)
def test_samples_have_the_moments_too(path, steps):
    model, n = GaussianConsistency(path, mean=0.1, std=0.25), 100_000
    times = points(path, steps)
    x = model.draw(float(times[0]), n, seed=1)
    end = last(sample(model, x, times, noise=draws(x.shape), clip=False)).denoised.double()
    t_min = torch.tensor(path.t_min, dtype=torch.float64)
    mean, variance = 0.1 * float(path.alpha(t_min)), float(model.variance(t_min))
    assert float(end.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(end.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))
    normalised = (end - mean) / math.sqrt(variance)
    assert float((normalised**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    # and further steps make new samples, not the first again
    first = model.denoised(x, times[:1].expand(n)).double().detach()
    correlation = float(torch.corrcoef(torch.stack([first.flatten(), end.flatten()]))[0, 1])
    assert correlation > 0.999 if steps == 1 else abs(correlation) < 0.999


def test_states_tell_what_the_network_was_asked():
    model = models.model()
    x, times = 80 * draws((2, 3, 8, 8))(0), torch.tensor([80.0, 5.0, 0.5])
    noises = {i: draws((2, 3, 8, 8), seed=i)(i) for i in (1, 2)}
    states = list(sample(model, x, times, noise=noises.__getitem__))
    assert [state.step for state in states] == [1, 2, 3]
    assert [state.t for state in states] == times.tolist()
    for state in states:
        expected = model.denoised(state.x, times[state.step - 1].expand(2)).clamp(-1, 1)
        assert torch.equal(state.denoised, expected)
    assert torch.equal(states[0].x, x)
    for before, after in pairwise(states):
        t, i = after.t, before.step
        torch.testing.assert_close(after.x, before.denoised + math.sqrt(t**2 - 0.002**2) * noises[i])


def test_clipping_is_in_the_loop_and_can_be_left_out():
    model = GaussianConsistency(VE(), mean=0.9, std=0.5)
    x, times = model.draw(80.0, 1000), torch.tensor([80.0, 1.0])
    clipped, free = (list(sample(model, x, times, noise=draws(x.shape), clip=clip)) for clip in (True, False))
    assert all(float(state.denoised.abs().max()) <= 1 for state in clipped)
    assert all(float(state.denoised.abs().max()) > 1.5 for state in free)
    assert float((clipped[1].x - free[1].x).abs().max()) > 0.5  # also what is renoised is clipped


def test_labels_reach_the_network():
    from tests.models import micro

    model = models.model(config=micro(num_classes=3))
    x, times = 80 * draws((2, 3, 8, 8))(0), torch.tensor([80.0])
    ends = [
        last(sample(model, x, times, noise=draws(x.shape), labels=labels)).denoised
        for labels in (torch.tensor([0, 1]), torch.tensor([0, 2]), None)
    ]
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("times", [[1.0, 1.0], [1.0, 2.0]])
def test_times_must_decrease(times):
    model = GaussianConsistency(VE())
    with pytest.raises(ValueError, match="decrease"):
        next(sample(model, torch.zeros(1, 1, 1, 1), torch.tensor(times), noise=draws((1, 1, 1, 1))))


# With a constraint. For independent Gaussian pixels and these operators the loop is exact too: what is known is y, and
# what is not keeps the data's own distribution.

HOLE = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
HOLE[..., 2:6, 3:8] = True


@pytest.mark.parametrize("op", [Mask(HOLE), Luma(), AvgPool(2)], ids=lambda op: type(op).__name__)
def test_constrained_samples_follow_the_conditional_distribution(op):
    mean, std, n = 0.1, 0.25, 400
    model = GaussianConsistency(VE(), mean, std, image_shape=(3, 8, 8))
    truth = model.draw(0.002, 1, seed=3)
    y = op.A(truth)
    times = Karras().times(VE(), 18)[:-1]
    start = VE().diffuse(
        op.pinv(y).expand(n, -1, -1, -1), torch.tensor(0.002), times[0], draws((n, 3, 8, 8), seed=4)(0)
    )
    states = sample(model, start, times, noise=draws(start.shape), constrain=lambda x: project(op, x, y), clip=False)
    for state in states:
        torch.testing.assert_close(op.A(state.denoised), y.expand(n, *y.shape[1:]), rtol=0, atol=2e-6)
    end = state.denoised.double()
    free = end - op.pinv(op.A(end))
    expected = torch.full((1, 3, 8, 8), mean, dtype=torch.float64)
    expected = expected - op.pinv(op.A(expected))
    # the dimension of what is free, and its variance in every direction
    eye = torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    dimension = 192 - round(float((op.pinv(op.A(eye)) * eye).sum()))
    assert dimension == {Mask: 60, Luma: 128, AvgPool: 144}[type(op)]
    variance = float((free - expected).square().sum()) / n / dimension
    assert variance == pytest.approx(std**2 + 0.002**2, rel=4 * math.sqrt(2 / (n * dimension)))
    off = free.mean(0) - expected[0]
    assert float(off.abs().max()) < 5.5 * std / math.sqrt(n)


# Which times.


def test_recommended_times_come_first():
    model = GaussianConsistency(VE())
    model.card = models.model(times={"2": (80.0, 0.8)}, grid_points=18).card
    assert default_times(model, 2).tolist() == pytest.approx([80.0, 0.8])
    assert default_times(model, 1).tolist() == [80.0]


@paths
@pytest.mark.parametrize("grid_points", [2, 18, 40])
def test_otherwise_they_are_spread_over_the_models_grid(path, grid_points):
    model = models.model(path=path, grid_points=grid_points)
    grid = Karras().times(path, grid_points)
    for steps in range(1, 60):
        times = default_times(model, steps)
        assert len(times) == steps
        assert float(times[0]) == float(grid[0])
        assert bool((times.diff() < 0).all())
        assert float(times[-1]) > float(grid[-1])  # f(x, t_min) = x: a call there would be wasted
        assert torch.equal(check_times(model, times), times)
        if steps < grid_points:
            assert set(times.tolist()) <= set(grid.tolist())
    assert torch.equal(default_times(model, grid_points - 1), grid[:-1])


@paths
def test_both_ends_of_the_path_are_allowed(path):
    ends = torch.tensor([path.t_max, path.t_min])
    assert torch.equal(check_times(models.model(path=path), ends), ends)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([], "no time points"),
        ([80.0, 80.0], "80 before 80"),
        ([1.0, 2.0], "1 before 2"),
        ([81.0], "81 is not on"),
        ([80.0, 0.001], "0.001 is not on"),
        ([80.0, 0.0], "0 is not on"),
        ([math.nan], "nan is not on"),
        ([80.0, math.nan], "80 before nan"),
    ],
)
def test_times_a_model_cannot_use_are_named(times, words):
    with pytest.raises(UsageError, match=words):
        check_times(models.model(), torch.tensor(times))


@pytest.mark.parametrize("steps", [0, -3])
def test_at_least_one_step(steps):
    with pytest.raises(UsageError, match="at least 1"):
        default_times(models.model(), steps)
