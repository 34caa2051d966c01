"""Grids, curricula and samplers of training times: published constants and distributions."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.flow import VE, Linear, Trig
from cmtool.times import Adjacent, Constant, Karras, LogNormal, Progressive

PATHS = [VE(), Linear(), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Grids.


@pytest.mark.parametrize(
    ("num", "points"),
    [
        (
            40,
            {
                0: 80,
                1: 69.450946,
                16: 5.380,
                17: 4.365562,
                18: 3.519699,
                20: 2.240,
                22: 1.382368,
                38: 0.003677,
                39: 0.002,
            },
        ),
        (18, {1: 57.585985, 11: 0.585348, 16: 0.007528, 17: 0.002}),
        (201, {106: 1.912844}),
        (151, {62: 5.248503, 67: 3.991219}),
    ],
)
def test_published_time_points(num, points):
    grid = Karras().times(VE(), num)
    for index, expected in points.items():
        assert float(grid[index]) == pytest.approx(
            expected, abs=6e-4 if index in (16, 20) and num == 40 else 6e-7 * max(1, expected)
        )


@paths
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num", [2, 3, 40, 1281])
def test_grids_decrease_and_end_exactly(path, rho, num):
    grid = Karras(rho).times(path, num)
    assert grid.shape == (num,)
    assert grid.dtype == torch.float32
    assert bool((grid.diff() < 0).all())
    assert float(grid[0]) == float(torch.tensor(path.t_max))
    assert float(grid[-1]) == float(torch.tensor(path.t_min))


def test_rho_1_is_uniform():
    torch.testing.assert_close(Karras(1.0).times(Linear(), 5), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@paths
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_locate_inverts_at(path, rho):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    grid = Karras(rho)
    # float32 times carry seven digits; near t = 0 the seventh root spreads them over the coordinate
    torch.testing.assert_close(grid.locate(path, grid.at(path, u)), u, rtol=0, atol=2e-6)


@paths
def test_between_moves_evenly_in_the_coordinate(path):
    grid = Karras()
    points = grid.times(path, 13)
    start, end = points[torch.tensor([2, 4])], points[torch.tensor([6, 12])]
    torch.testing.assert_close(grid.between(path, start, end, 0.25), points[torch.tensor([3, 6])], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grid.between(path, start, end, 1.0), end, rtol=1e-5, atol=1e-7)


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Karras().times(VE(), 1)
    for rho in (0, -7, math.nan):
        with pytest.raises(ValueError, match="rho"):
            Karras(rho)


# Curricula. The rows are (step, N) of Song et al. (2023), appendix C, with K = 800,000.

CIFAR = {0: 2, 1: 3, 1_000: 6, 10_000: 17, 100_000: 54, 400_000: 107, 799_999: 151, 800_000: 151}
IMAGENET = {0: 2, 1: 3, 1_000: 8, 10_000: 23, 100_000: 72, 400_000: 143, 799_999: 201, 800_000: 201}


@pytest.mark.parametrize(("s1", "rows"), [(150, CIFAR), (200, IMAGENET)])
def test_published_curricula(s1, rows):
    assert {step: Progressive(2, s1)(step / 800_000) for step in rows} == rows


@pytest.mark.parametrize("progress", [-1.0, 0.0, 0.3, 1.0, 1.5, 2.0])
def test_the_curriculum_stays_between_its_ends(progress):
    num = Progressive(2, 150)(progress)
    assert 2 <= num <= 151
    assert num == Progressive(2, 150)(min(max(progress, 0), 1))
    assert Constant(18)(progress) == 18


def test_the_curriculum_only_grows():
    values = [Progressive(2, 200)(k / 5000) for k in range(5001)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (2, 201)


@pytest.mark.parametrize("make", [lambda: Constant(1), lambda: Progressive(1, 10), lambda: Progressive(5, 4)])
def test_impossible_curricula_are_refused(make):
    with pytest.raises(ValueError, match="2"):
        make()


# Training times.


@paths
def test_log_normal_is_normal_in_the_log_ratio(path):
    n = 100_000
    times = LogNormal(-1.2, 1.2)(path, n, 0.0, generator())
    log = path.ratio(times.t.double()).log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(n))
    assert float(log.std()) == pytest.approx(1.2, rel=4 / math.sqrt(2 * n))
    assert float(((log + 1.2) / 1.2).pow(4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    assert times.t is times.r
    assert times.t is times.s


def test_log_normal_draws_the_same_noise_levels_on_every_path():
    ve, trig, linear = (LogNormal()(path, 50, 0.0, generator()).t for path in (VE(), Trig(), Linear()))
    torch.testing.assert_close(ve, Trig().ratio(trig), rtol=1e-5, atol=0)
    torch.testing.assert_close(ve, Linear().ratio(linear), rtol=1e-4, atol=0)


@paths
def test_neighbours_are_the_points_of_the_grid(path):
    grid = Karras().times(path, 40)
    times = Adjacent(curriculum=Constant(40)).neighbours(path, torch.arange(39), 40)
    assert torch.equal(times.t, grid[:-1])
    assert torch.equal(times.r, grid[1:])
    assert torch.equal(times.s, grid[-1:].expand(39))


@paths
def test_adjacent_draws_every_pair_equally_often(path):
    num, n = 6, 60_000
    times = Adjacent(curriculum=Constant(num))(path, n, 0.0, generator())
    grid = Karras().times(path, num)
    index = (times.t[:, None] == grid).float().argmax(1)
    assert torch.equal(grid[index], times.t)
    assert torch.equal(grid[index + 1], times.r)
    counts = torch.bincount(index, minlength=num)
    assert int(counts[-1]) == 0  # t_min is nobody's start
    share = n / (num - 1)
    assert bool(((counts[:-1] - share).abs() < 4 * math.sqrt(share)).all())
    assert bool((times.t > times.r).all())
    assert bool((times.r >= times.s).all())


def test_adjacent_follows_its_curriculum():
    sampler = Adjacent(curriculum=Progressive(2, 10))
    first = sampler(VE(), 1000, 0.0, generator())
    assert set(first.t.tolist()) == {80.0}
    last = sampler(VE(), 1000, 1.0, generator())
    assert set(last.t.tolist()) == set(Karras().times(VE(), 11)[:-1].tolist())


def test_times_depend_on_the_generator_alone():
    for sampler in (LogNormal(), Adjacent()):
        a, b, c = (sampler(VE(), 20, 0.5, generator(seed)).t for seed in (3, 3, 4))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
