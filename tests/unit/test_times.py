"""Grids, curricula and samplers of training times: published constants and distributions."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool import spec
from cmtool import times as times_module
from cmtool.errors import ConfigError
from cmtool.flow import VE, Linear, Trig
from cmtool.flow.path import PATHS as PATH_KINDS
from cmtool.times import (
    CURRICULA,
    GRIDS,
    INDEX_LAWS,
    TIME_SAMPLERS,
    Adjacent,
    Constant,
    Doubling,
    Dyadic,
    Fixed,
    Halving,
    Karras,
    Landing,
    LogNormal,
    LogNormalIndex,
    LogStudentT,
    Mapped,
    NextGrid,
    OnGrid,
    Pair,
    Progressive,
    RhoUniform,
    Tangential,
    UniformIndex,
)
from tests.parity.goldens import meta

PATHS = [VE(), Linear(), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(sampler, path, n=20_000, progress=0.0, seed=0):
    return sampler(path, n, progress, generator(seed))


def ends(path):
    """The ends of a path as float32 times have them."""
    return (float(torch.tensor(end)) for end in (path.t_min, path.t_max))


def log_ratio(path, t):
    return path.ratio(t.double()).log()


def assert_distributed(values, cdf):
    """Kolmogorov and Smirnov's test: a right sampler fails one seed in 2000, and seeds are fixed."""
    ordered = values.double().sort().values
    n = len(ordered)
    expected = torch.tensor([cdf(value) for value in ordered.tolist()], dtype=torch.float64)
    rank = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(rank - expected, expected - (rank - 1 / n)).max())
    assert distance < math.sqrt(math.log(2 / 0.0005) / (2 * n))


def assert_frequencies(index, probabilities):
    """Every count within four and a half standard deviations; no count where there is no probability."""
    n, p = len(index), torch.as_tensor(probabilities, dtype=torch.float64)
    counts = torch.bincount(index, minlength=len(p)).double()
    assert len(counts) == len(p)
    assert bool(((counts - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt() + 1e-9).all())


def normal_cdf(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def truncated(cdf, low, high):
    return lambda x: (cdf(x) - cdf(low)) / (cdf(high) - cdf(low))


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


# K = 400,000 and 800,000: K' = 50,000 and 100,000.
@pytest.mark.parametrize(("total", "stage"), [(400_000, 50_000), (800_000, 100_000)])
def test_doubling_is_the_published_curriculum(total, stage):
    assert [Doubling()(k / total) for k in range(0, total, stage)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    for i in range(1, 8):
        assert Doubling()((i * stage - 1) / total) == 10 * 2 ** (i - 1) + 1
        assert Doubling()((i * stage) / total) == 10 * 2**i + 1
    assert Doubling()(1.0) == Doubling()(3.0) == 1281
    assert Doubling()(-1.0) == 11


def test_doubling_takes_ends_that_are_no_power_of_two_apart():
    # log2 floor(150/20) + 1 = 3.807: the last stage is a short one
    values = [Doubling(20, 150)(k / 10_000) for k in range(10_001)]
    assert [values.count(n) for n in (21, 41, 81, 151)] == [2627, 2626, 2627, 2121]
    assert Doubling(7, 7)(0.0) == Doubling(7, 7)(1.0) == 8


@given(st.integers(0, 10), st.integers(1, 10**7), st.data())
def test_stages_begin_at_the_exact_step(power, unit, data):
    """However step / K is rounded: stage m of a training of (log2 start + 3) units begins at its own step."""
    start = 2**power
    total = (power + 3) * unit if power else unit
    m = data.draw(st.integers(0, power))
    begin = (m if m < power else m + 1) * unit if power else 0
    length = unit if m < power - 1 else 2 * unit if power else unit
    curriculum = Halving(start)
    assert curriculum.stage(begin / total) == (m, 0.0)
    assert curriculum(begin / total) == (start >> m) + 1
    step = data.draw(st.integers(begin, begin + length - 1))
    index, share = curriculum.stage(step / total)
    assert index == m
    assert share == pytest.approx((step - begin) / length, abs=2e-9)


def test_halving_is_the_released_schedule():
    """From 4096 steps: 50,000 iterations a stage and 100,000 for each of the last two are 750,000 in all."""
    for step, rate, steps in meta("openai")["ema_and_scales"]["progdist"]:
        assert Halving()(step / 750_000) == steps + 1
        assert rate == 1
    rows = {0: 4096, 49_999: 4096, 50_000: 2048, 549_999: 4, 550_000: 2, 649_999: 2, 650_000: 1, 750_000: 1, 10**6: 1}
    assert {step: Halving()(step / 750_000) - 1 for step in rows} == rows


def test_shares_of_a_stage():
    assert Halving(4).stage(0.1) == (0, pytest.approx(0.5))  # 5 units: 4, 2 2, 1 1
    assert Halving(4).stage(0.4) == (1, pytest.approx(0.5))
    assert Halving(4).stage(0.9) == (2, pytest.approx(0.75))
    assert Halving(4).stage(1.0) == Halving(4).stage(7.0) == (2, 1.0)
    assert Halving(2).stage(0.25) == (0, 0.5)
    assert Halving(2).stage(0.5) == (1, 0.0)
    assert Halving(1).stage(0.25) == (0, 0.25)
    assert [Halving(1)(progress) for progress in (-1.0, 0.5, 1.0)] == [2, 2, 2]
    assert Halving(8).stage(-1.0) == (0, 0.0)
    # to 2 steps: 8, 4, 2 2 of four units
    assert [Halving(8, 2)(unit / 4) - 1 for unit in range(5)] == [8, 4, 2, 2, 2]
    assert Halving(8, 2).stage(0.75) == (2, 0.5)
    assert Halving(8, 4).stage(1.0) == (1, 1.0)
    assert Halving(4, 4).stage(0.3) == (0, 0.3)


@pytest.mark.parametrize("start", [0, -2, 3, 100])
def test_halving_starts_at_a_power_of_two(start):
    with pytest.raises(ValueError, match="power of two"):
        Halving(start)


@pytest.mark.parametrize("ends", [(4, 8), (8, 3), (8, 0)])
def test_halving_goes_down_to_a_power_of_two(ends):
    with pytest.raises(ValueError, match="halving"):
        Halving(*ends)


@pytest.mark.parametrize("kind", CURRICULA)
@given(first=st.floats(-1, 2), second=st.floats(-1, 2))
def test_curricula_are_monotone_in_progress_and_nothing_else(kind, first, second):
    curriculum = CURRICULA[kind]()
    early, late = sorted((first, second))
    before, after = curriculum(early), curriculum(late)
    assert (after, before) == (curriculum(late), curriculum(early))  # no memory
    assert min(before, after) >= 2
    assert before >= after if kind == "halving" else before <= after
    assert curriculum(min(max(first, 0.0), 1.0)) == curriculum(first)


@pytest.mark.parametrize("make", [lambda: Constant(1), lambda: Progressive(1, 10), lambda: Progressive(5, 4)])
def test_impossible_curricula_are_refused(make):
    with pytest.raises(ValueError, match="2"):
        make()


@pytest.mark.parametrize("values", [(0, 10), (-1, 10), (11, 10)])
def test_doubling_needs_its_ends_in_order(values):
    with pytest.raises(ValueError, match="1 <= s0 <= s1"):
        Doubling(*values)


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


# Index laws.


@paths
def test_log_normal_index_is_icts_discretised_log_normal(path):
    points, law = Karras().times(path, 12), LogNormalIndex()
    p = law.probabilities(path, points)
    log = [math.log(r) if r > 0 else -math.inf for r in path.ratio(points.double()).tolist()]
    below = [math.erf((x + 1.1) / (math.sqrt(2) * 2.0)) for x in log]
    mass = [high - low for high, low in pairwise(below)]
    torch.testing.assert_close(p, torch.tensor([m / sum(mass) for m in mass], dtype=torch.float64))
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    if path.kind == "linear":  # the whole normal law is between the ends
        assert sum(mass) == pytest.approx(2, abs=1e-12)
    assert_frequencies(law(path, points, 50_000, generator()), p)


@paths
def test_log_normal_index_picks_the_neighbours_of_a_log_normal_draw(path):
    """On a fine grid the starts are distributed like the law itself, cut at the ends of the path."""
    sampler = Adjacent(curriculum=Constant(1281), index=LogNormalIndex(-1.1, 2.0))
    found = draw(sampler, path)
    low, high = (float(x) for x in log_ratio(path, Karras().times(path, 1281)[[-1, 0]]))
    law = truncated(lambda x: normal_cdf((x + 1.1) / 2.0), low, high)
    middle = torch.stack([log_ratio(path, found.t), log_ratio(path, found.r)])
    middle = middle.clamp(-40, 40).mean(0)
    ordered = middle.sort().values.tolist()
    distance = max(abs((i + 0.5) / len(ordered) - law(x)) for i, x in enumerate(ordered))
    assert distance < 0.015
    grid = Karras().times(path, 1281)
    index = torch.searchsorted(-grid, -found.t)
    assert torch.equal(grid[index], found.t)
    assert torch.equal(grid[index + 1], found.r)


def test_a_law_that_misses_the_path_is_refused():
    with pytest.raises(ValueError, match="never falls"):
        draw(Adjacent(index=LogNormalIndex(60.0, 1.0)), VE())


def test_a_narrow_law_takes_one_pair():
    points = Karras().times(VE(), 40)
    index = LogNormalIndex(math.log(1.5), 1e-4)(VE(), points, 100, generator())
    assert set(index.tolist()) == {21}  # t_21 = 1.768 > 1.5 > t_22 = 1.382
    assert float(points[21]) > 1.5 > float(points[22])


# Starts.


@paths
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_rho_uniform_is_uniform_in_the_grid(path, rho):
    grid = Karras(rho)
    found = draw(RhoUniform(grid), path)
    assert found.t is found.r is found.s
    power, (low, high) = 1 / rho, (path.t_min, path.t_max)
    assert_distributed(found.t, lambda t: (t**power - low**power) / (high**power - low**power))
    if rho == 1:
        assert_distributed(found.t, lambda t: (t - low) / (high - low))


@paths
def test_student_t_with_one_degree_is_cauchy(path):
    found = draw(LogStudentT(1.0, -0.3, 0.7), path)
    assert found.t is found.r is found.s
    low, high = log_ratio_ends(path)
    assert_distributed(log_ratio(path, found.t), truncated(lambda x: math.atan((x + 0.3) / 0.7), low, high))


@paths
def test_student_t_with_two_degrees(path):
    low, high = math.log(0.05), log_ratio_ends(path)[1]

    def cdf(x):
        z = (x - 0.5) / 1.3
        return z / math.sqrt(2 + z * z)

    found = draw(LogStudentT(2.0, 0.5, 1.3, low=0.05), path)
    assert_distributed(log_ratio(path, found.t), truncated(cdf, low, high))


@paths
def test_student_t_with_many_degrees_is_normal(path):
    found = draw(LogStudentT(1e7, -1.1, 2.0), path)
    low, high = log_ratio_ends(path)
    assert_distributed(log_ratio(path, found.t), truncated(lambda x: normal_cdf((x + 1.1) / 2.0), low, high))


@pytest.mark.parametrize("low", [None, 1.0])
def test_the_published_student_t(low):
    """df = 0.01, where no sampler without cuts works: against a sum over the density itself."""
    path, law = VE(), LogStudentT(low=low)
    ends = math.log(low or 0.002), math.log(80)
    x = torch.linspace(*ends, 400_001, dtype=torch.float64)
    density = (1 + (x / 0.2) ** 2 / 0.01) ** (-1.01 / 2)
    heap = torch.cat([torch.zeros(1, dtype=torch.float64), (density[1:] + density[:-1]).cumsum(0)])
    heap, step = heap / heap[-1], (ends[1] - ends[0]) / 400_000
    found = draw(law, path)
    assert_distributed(log_ratio(path, found.t), lambda v: float(heap[min(round((v - ends[0]) / step), 400_000)]))
    assert float(found.t.min()) >= (low or 0.002) * (1 - 1e-7)
    assert float(found.t.max()) <= 80


def test_a_student_t_beyond_the_path_is_refused():
    with pytest.raises(ValueError, match="80"):
        draw(LogStudentT(low=80.0), VE())
    assert float(draw(LogStudentT(low=1e-9), VE()).t.min()) >= 0.002 * (1 - 1e-7)


def log_ratio_ends(path):
    """Where the path, or else float32, ends."""
    low, high = (float(path.ratio(torch.tensor(t, dtype=torch.float64))) for t in (path.t_min, path.t_max))
    return math.log(max(low, 2.0**-24)), math.log(min(high, 2.0**24))


@paths
def test_fixed_is_one_ratio(path):
    found = draw(Fixed(0.7), path, n=5)
    assert found.t is found.r is found.s
    torch.testing.assert_close(path.ratio(found.t), torch.full((5,), 0.7))


@paths
def test_on_grid_draws_every_point_but_the_last(path):
    grid = Karras(3.0).times(path, 7)
    found = draw(OnGrid(Karras(3.0), Constant(7)), path)
    index = (found.t[:, None] == grid).float().argmax(1)
    assert torch.equal(grid[index], found.t)
    assert_frequencies(index, [1 / 6] * 6)
    law = LogNormalIndex(0.0, 1.0)
    found = draw(OnGrid(Karras(3.0), Constant(7), law), path)
    assert_frequencies((found.t[:, None] == grid).float().argmax(1), law.probabilities(path, grid))
    assert set(draw(OnGrid(curriculum=Doubling(1, 4)), path, progress=0.0).t.tolist()) == {list(ends(path))[1]}


# Pairings.


@paths
def test_landing_goes_to_the_data(path):
    start = LogNormal(-0.8, 0.4)
    found = draw(Landing(start), path)
    assert found.r is found.s
    assert set(found.s.tolist()) == {next(ends(path))}
    assert torch.equal(found.t, draw(start, path).t)  # nothing near an end, nothing moved
    grid = Karras(path.rho)  # and no point of a fine grid is moved either
    points = grid.times(path, 1281)
    assert set(draw(Landing(OnGrid(grid, Constant(1281))), path).t.tolist()) == set(points[:-1].tolist())


@paths
def test_tangential_stays_at_its_start(path):
    start = LogNormal(-0.8, 0.4)
    found = draw(Tangential(start), path)
    assert found.r is found.t
    assert torch.equal(found.t, draw(start, path).t)
    assert set(found.s.tolist()) == {next(ends(path))}


@paths
@pytest.mark.parametrize("pairing", [Landing, Tangential, Mapped])
def test_starts_outside_the_path_are_held_within(path, pairing):
    low, high = ends(path)
    if path.kind != "linear":
        assert float(draw(pairing(Fixed(1e6)), path, n=1).t) == high
    below = draw(pairing(Fixed(1e-30)), path, n=1)
    assert low < float(below.t)
    assert float(path.ratio(below.t)) <= 1.005 * float(path.ratio(torch.tensor(low))) + 1e-7
    assert float(below.s) == low


# Geng et al. (2024), ECT's released mapping at noise levels 0.01, 0.1, 1, 10, 80.
ECT_TIMES = [0.01, 0.1, 1.0, 10.0, 80.0]
ECT_ROWS = [
    (2.0, 8, 3, [0.00689, 0.07, 0.80303, 9.37477, 75.0]),
    (2.0, 8, 7, [0.00981, 0.09812, 0.98769, 9.96092, 79.6875]),
    (256.0, 1, 0, [0.00981, 0.09812, 0.98769, 9.96092, 79.6875]),
]


@paths
@pytest.mark.parametrize(("q", "stages", "stage", "row"), ECT_ROWS)
def test_mapped_is_the_published_mapping(path, q, stages, stage, row):
    t = path.time(torch.tensor(ECT_TIMES, dtype=torch.float64)).float()
    for progress in (stage / stages, (stage + 0.99) / stages):
        r = Mapped(q=q, stages=stages).neighbour(path, t, progress)
        torch.testing.assert_close(path.ratio(r), torch.tensor(row), rtol=0 if path.kind == "ve" else 2e-5, atol=6e-6)


@paths
@pytest.mark.parametrize("stage", range(8))
def test_mapped_draws_t_and_its_neighbour(path, stage):
    sampler = Mapped(LogNormal(-0.5, 0.5))
    found = draw(sampler, path, n=500, progress=stage / 8)
    assert torch.equal(found.t, draw(LogNormal(-0.5, 0.5), path, n=500).t)
    sigma = path.ratio(found.t.double())
    step = 2.0 ** -(stage + 1) * (1 + 8 / (1 + sigma.exp()))
    least = float(path.ratio(torch.tensor(path.t_min, dtype=torch.float64)))
    torch.testing.assert_close(
        path.ratio(found.r.double()), (sigma * (1 - step)).clamp_min(least), rtol=1e-5, atol=1e-7
    )
    assert set(found.s.tolist()) == {next(ends(path))}


def test_mapped_leaves_an_infinite_ratio():
    """At t = 1 of a straight path there is no signal: float32 times end at a ratio of 2^24, and half of it is less."""
    for b in (0.0, 1.0):
        r = Mapped(q=2.0, k=0.0, b=b, stages=1).neighbour(Linear(), torch.tensor([1.0]), 0.0)
        assert float(r) == pytest.approx(1 - 2.0**-23, abs=2.0**-24)
        assert float(r) < 1


def test_a_quarter_circle_is_a_path():
    """A float32 pi / 2 is past the end, where the noise-to-signal ratio is negative."""
    path = Trig(0.0, math.pi / 2)
    r = Mapped(q=2.0, stages=1).neighbour(path, torch.tensor([math.pi / 2]), 0.0)
    assert 0 < math.pi / 2 - float(r) < 1e-6
    p = LogNormalIndex().probabilities(path, Karras(1.0).times(path, 40))
    assert float(p.sum()) == pytest.approx(1)
    assert bool((p >= 0).all())


def test_mapped_changes_stage_at_the_exact_step():
    t = torch.tensor([1.0])
    sampler = Mapped(stages=8)
    rows = [float(sampler.neighbour(VE(), t, k / 250_000)) for k in range(0, 250_001, 31_250)]
    assert rows == sorted(rows)
    assert len(set(rows)) == 8
    assert rows[-1] == rows[-2] == float(sampler.neighbour(VE(), t, 5.0))
    assert float(sampler.neighbour(VE(), t, 31_249 / 250_000)) == rows[0]
    assert float(sampler.neighbour(VE(), t, -1.0)) == rows[0] == pytest.approx(VE().t_min)


@pytest.mark.parametrize("stages", range(1, 41))
def test_a_stage_begins_where_a_float_says_almost(stages):
    """15 / 22 * 22 is less than 15."""
    sampler, t = Mapped(q=1.1, k=0.0, stages=stages), torch.tensor([10.0])
    for m in range(stages):
        expected = 10 * (1 - 1.1 ** -(m + 1))
        assert float(sampler.neighbour(VE(), t, m / stages)) == pytest.approx(expected, rel=1e-6)


def test_a_mapping_without_sigmoid_is_the_constant_one():
    """b = 0 makes the sigmoid 1/2: r = t (1 - q^-1 (1 + k/2))."""
    t = torch.tensor(ECT_TIMES)
    torch.testing.assert_close(Mapped(q=4.0, k=0.0, b=0.0, stages=1).neighbour(VE(), t, 0.0), 0.75 * t)
    torch.testing.assert_close(Mapped(q=4.0, k=2.0, b=0.0, stages=1).neighbour(VE(), t, 0.0), 0.5 * t)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 1.0])
def test_mapped_is_strict_to_the_last_bit(progress):
    """Where the step is less than a float32 has digits for."""
    for path in PATHS:
        low, high = ends(path)
        t = torch.linspace(low, high, 1001)[1:]
        r = Mapped(q=1e12, k=0.0, stages=3).neighbour(path, t, progress)
        assert bool((r < t).all())
        assert float(r.min()) >= low
        assert bool(((t - r) <= 2e-7 * high).all())


@paths
def test_next_grid_is_a_step_of_the_student(path):
    sampler = NextGrid(Halving(8))
    for progress, steps in [(0.0, 8), (1 / 6, 4), (0.5, 2), (0.9, 1)]:
        grid = Karras().times(path, steps + 1)
        found = draw(sampler, path, progress=progress)
        assert found.r is found.s
        index = (found.t[:, None] == grid).float().argmax(1)
        assert torch.equal(grid[index], found.t)
        assert torch.equal(grid[index + 1], found.s)
        assert_frequencies(index, [1 / steps] * steps)


def test_next_grid_is_the_released_grid():
    """Fractions i / steps of the way in t^(1/7), the last step ending at t_min."""
    found = draw(NextGrid(Halving(1)), VE(), n=3)
    assert (found.t.tolist(), found.s.tolist()) == ([80.0] * 3, [float(torch.tensor(0.002))] * 3)
    found = draw(NextGrid(Halving(2)), VE(), n=100)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert {round(t, 4) for t in found.t.tolist()} == {80.0, round(middle, 4)}


@paths
def test_dyadic_jumps_tile_the_path(path):
    levels = 4
    found = draw(Dyadic(levels), path, n=60_000)
    low, high = ends(path)
    span = path.t_max - path.t_min
    size = (found.t - found.s).double() / span
    level = (-size.log2()).round().long()
    torch.testing.assert_close(size, 0.5 ** level.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close((found.t - found.r).double() / span, size / 2, rtol=1e-4, atol=0)
    position = ((path.t_max - found.t.double()) / span / size).round().long()
    assert_frequencies(2**level - 1 + position, [1 / levels / 2**k for k in range(levels) for _ in range(2**k)])
    first, final = position == 0, position == 2**level - 1
    assert set(found.t[first].tolist()) == {high}
    assert set(found.s[final].tolist()) == {low}
    # one grid for all levels: the times of the coarse are times of the fine, to the last bit
    fine = set(Karras(1.0).times(path, 2**levels + 1).tolist())
    assert {t for times in found for t in times.tolist()} == fine


def test_shortcut_models_own_times():
    found = draw(Dyadic(7), Linear())
    assert set((found.t - found.s).tolist()) == {2.0**-k for k in range(7)}
    assert torch.equal((found.t + found.s) / 2, found.r)
    assert torch.equal((found.t / (found.t - found.s)).frac(), torch.zeros(20_000))


@paths
def test_pair_is_two_draws_in_order(path):
    first, second = LogNormal(-0.6, 1.6), LogNormal(-4.0, 1.6)
    found = draw(Pair(first, second), path)
    assert found.r is found.t
    source = generator()
    a, b = (start(path, 20_000, 0.0, source).t.clamp(path.t_min, path.t_max) for start in (first, second))
    torch.testing.assert_close(found.t, torch.maximum(a, b), rtol=0.005, atol=0)
    assert torch.equal(found.s, torch.minimum(a, b))

    # P(max <= x) = F G and P(min <= x) = 1 - (1 - F)(1 - G)
    def parts(x):
        return normal_cdf((x + 0.6) / 1.6), normal_cdf((x + 4.0) / 1.6)

    if path.kind == "linear":  # no ends in the way
        assert_distributed(log_ratio(path, found.t), lambda x: math.prod(parts(x)))
        assert_distributed(log_ratio(path, found.s), lambda x: 1 - math.prod(1 - p for p in parts(x)))


@pytest.mark.parametrize(("diagonal", "n", "count"), [(0.75, 256, 192), (0.75, 10, 8), (0.0, 9, 0), (1.0, 9, 9)])
def test_the_share_of_the_diagonal_is_exact(diagonal, n, count):
    found, free = (draw(Pair(diagonal=share), Linear(), n=n) for share in (diagonal, 0.0))
    assert torch.equal(found.s == found.t, torch.arange(n) < count)
    assert torch.equal(found.t, free.t)
    assert torch.equal(found.s[count:], free.s[count:])


def test_curricula_reach_the_start_of_a_pairing():
    sampler = Landing(OnGrid(curriculum=Progressive(2, 10)))
    assert set(draw(sampler, VE(), 100, 0.0).t.tolist()) == {80.0}
    assert len(set(draw(sampler, VE(), 1000, 1.0).t.tolist())) == 10


# What all samplers have in common.

STARTS = {"log_normal", "rho_uniform", "log_student_t", "fixed", "on_grid"}
STRICT_R = {"adjacent", "landing", "mapped", "next_grid", "dyadic"}  # t > r
WILD = [LogNormal(-1.1, 2.0), LogNormal(0.0, 30.0), RhoUniform(), LogStudentT(), Fixed(1e-9), Fixed(1e9), OnGrid()]


def variants(kind):
    """A sampler of this kind with its defaults, and on every start that leads it astray."""
    cls = TIME_SAMPLERS[kind]
    if kind == "pair":
        return [cls(a, b, d) for a in WILD for b, d in ((LogNormal(), 0.0), (Fixed(1e9), 0.25))]
    if kind in ("landing", "tangential", "mapped"):
        return [cls(), *(cls(start) for start in WILD)]
    if kind in ("adjacent", "on_grid"):
        return [cls(grid, c(), i()) for grid in (Karras(), Karras(1.0)) for c in CURRICULA.values() for i in LAWS]
    return [cls()]


LAWS = list(INDEX_LAWS.values())


@pytest.mark.parametrize("kind", TIME_SAMPLERS)
@settings(max_examples=60)
@given(
    path=st.sampled_from([VE(), Linear(), Trig(), VE(0.01, 5.0), Linear(0.001, 0.999), Trig(0.0, math.pi / 2)]),
    n=st.integers(1, 40),
    progress=st.floats(-0.5, 1.5),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_times_are_in_order_and_on_the_path(kind, path, n, progress, seed, data):
    sampler = data.draw(st.sampled_from(variants(kind)))
    found = sampler(path, n, progress, generator(seed))
    assert all(t.shape == (n,) and t.dtype == torch.float32 and t.device.type == "cpu" for t in found)
    again = sampler(path, n, progress, generator(seed))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    if kind in STARTS:
        assert found.t is found.r is found.s
        assert bool((found.t >= 0).all())
        if kind not in ("log_normal", "fixed"):
            assert next(ends(path)) <= float(found.t.min()) <= float(found.t.max()) <= list(ends(path))[1]
        return
    low, high = ends(path)
    assert bool(((found.t <= high) & (found.t > low) & (found.s >= low)).all())
    assert bool(((found.t >= found.r) & (found.r >= found.s)).all())
    if kind in STRICT_R:
        assert bool((found.t > found.r).all())
    if kind == "dyadic":
        assert bool((found.r > found.s).all())
    if kind == "pair":
        assert bool((found.t[: round(sampler.diagonal * n)] == found.s[: round(sampler.diagonal * n)]).all())
    if kind in ("adjacent", "landing", "tangential", "mapped"):
        assert bool((found.s == low).all())


@pytest.mark.parametrize("kind", TIME_SAMPLERS)
def test_seeds_and_nothing_else_make_the_difference(kind):
    sampler = TIME_SAMPLERS[kind]()
    if kind == "fixed":
        return
    first, second = (sampler(Linear(), 50, 0.0, generator(seed)).t for seed in (1, 2))
    assert not torch.equal(first, second)


@paths
@pytest.mark.parametrize("kind", TIME_SAMPLERS)
def test_float32_devices_draw_from_the_same_laws(path, kind, monkeypatch):
    """Where a device has no float64, all is computed in float32: the quantiles are the same."""
    sampler, share = TIME_SAMPLERS[kind](), torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    if kind == "next_grid":
        sampler = NextGrid(Halving(16))  # a float32 cannot tell the neighbours of 4097 points apart, near t_min
    exact = draw(sampler, path, n=40_000)
    monkeypatch.setattr(times_module, "_wide", lambda device: torch.float32)
    found = draw(sampler, path, n=40_000, seed=1)
    for a, b in zip(found, exact, strict=True):
        assert bool(a.isfinite().all())
        at, ordered = a.double().quantile(share), b.double().sort().values
        below = torch.searchsorted(ordered, at * (1 - 1e-4)) / len(ordered)
        upto = torch.searchsorted(ordered, at * (1 + 1e-4) + 1e-9, right=True) / len(ordered)
        assert bool((below <= share + 0.02).all())
        assert bool((upto >= share - 0.02).all())


KINDS = {**PATH_KINDS, **GRIDS, **CURRICULA, **INDEX_LAWS, **TIME_SAMPLERS}


def test_tables_name_their_kinds_once():
    assert len(KINDS) == sum(map(len, (PATH_KINDS, GRIDS, CURRICULA, INDEX_LAWS, TIME_SAMPLERS)))
    assert all(cls.kind == kind for kind, cls in KINDS.items())


@pytest.mark.parametrize("kind", TIME_SAMPLERS)
def test_samplers_are_data(kind):
    for sampler in variants(kind):
        told = json.loads(json.dumps(spec.to_dict(sampler)))
        assert spec.from_dict(told, object, KINDS) == sampler
        assert hash(sampler) == hash(spec.from_dict(told, object, KINDS))


def test_parts_of_samplers_can_be_set():
    sampler = Landing()
    for name, value in [
        ("start.index", "log_normal_index"),
        ("start.index.std", "1.5"),
        ("start.curriculum.num", "100"),
    ]:
        sampler = spec.replace(sampler, name, value, KINDS)
    assert sampler == Landing(OnGrid(curriculum=Constant(100), index=LogNormalIndex(-1.1, 1.5)))
    assert spec.replace(Mapped(), "start", "rho_uniform", KINDS) == Mapped(RhoUniform())
    for name, value in [("start", "mapped"), ("start", "karras"), ("start.index", "uniform")]:
        with pytest.raises(ConfigError):
            spec.replace(sampler, name, value, KINDS)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LogNormal(0.0, 0.0), "std"),
        (lambda: LogNormal(0.0, -1.0), "std"),
        (lambda: LogNormal(math.nan, 1.0), "mean"),
        (lambda: LogNormal(0.0, math.inf), "std"),
        (lambda: LogNormalIndex(0.0, 0.0), "std"),
        (lambda: LogNormalIndex(math.inf, 1.0), "mean"),
        (lambda: LogStudentT(0.0), "df"),
        (lambda: LogStudentT(-1.0), "df"),
        (lambda: LogStudentT(math.inf), "df"),
        (lambda: LogStudentT(scale=0.0), "scale"),
        (lambda: LogStudentT(loc=math.nan), "loc"),
        (lambda: LogStudentT(low=0.0), "low"),
        (lambda: LogStudentT(low=-1.0), "low"),
        (lambda: Fixed(0.0), "ratio"),
        (lambda: Fixed(-1.0), "ratio"),
        (lambda: Fixed(math.inf), "ratio"),
        (lambda: Fixed(math.nan), "ratio"),
        (lambda: Mapped(q=1.0), "q"),
        (lambda: Mapped(q=math.nan), "q"),
        (lambda: Mapped(k=-1.0), "k"),
        (lambda: Mapped(b=-1.0), "b"),
        (lambda: Mapped(stages=0), "stages"),
        (lambda: Dyadic(0), "levels"),
        (lambda: Dyadic(17), "levels"),
        (lambda: Pair(diagonal=-0.1), "diagonal"),
        (lambda: Pair(diagonal=1.1), "diagonal"),
        (lambda: Pair(diagonal=math.nan), "diagonal"),
    ],
)
def test_impossible_laws_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_adjacent_draws_the_very_indices_it_always_drew():
    """A training goes on after an update: the uniform law takes the generator's numbers as before there were laws."""
    index = torch.randint(17, (30,), generator=generator(5))
    assert torch.equal(draw(Adjacent(), VE(), 30, seed=5).t, Karras().times(VE(), 18)[index])
    assert torch.equal(UniformIndex()(VE(), Karras().times(VE(), 18), 30, generator(5)), index)


def test_times_depend_on_the_generator_alone():
    for sampler in (LogNormal(), Adjacent()):
        a, b, c = (sampler(VE(), 20, 0.5, generator(seed)).t for seed in (3, 3, 4))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
