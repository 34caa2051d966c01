"""The multistep loop: exact on Gaussian data for any number of steps, with and without constraints."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from cmtool.editing import AvgPool, Luma, Mask, project
from cmtool.errors import UsageError
from cmtool.flow import EDM, VE, BoundaryEDM, Linear, Piecewise, Trig, Velocity
from cmtool.sampler import check_times, default_times, sample
from cmtool.solvers import DDIM, solve
from cmtool.times import Karras
from tests import models
from tests.models import micro
from tests.oracles import GaussianConsistency, GaussianOracle, MixtureOracle, learned

PATHS = [VE(), Linear(t_min=0.002, t_max=0.99), Linear(), Trig(), Trig(0.0, math.pi / 2)]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.kind}-{path.t_max:.3g}")
TIMES = {1: [1.0], 2: [1.0, 0.4], 5: [1.0, 0.8, 0.55, 0.3, 0.1]}  # shares of the grid's coordinate, from t_min up


def points(path, steps):
    return Karras(path.rho).at(path, 1 - torch.tensor(TIMES[steps], dtype=torch.float64))


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


# Landing on the next time.


def silence(i):
    raise AssertionError("there is no noise in landing on the next time")


def ahead(model, x, times, **options):
    """The states of a loop that lands on the next time."""
    return list(sample(model, x, times, noise=silence, landing="next", **options))


def kept(path):
    return torch.tensor([path.t_min], dtype=torch.float64)


@paths
@pytest.mark.parametrize("steps", [1, 2, 5, 17])
def test_the_exact_flow_map_ends_at_the_end_of_the_ode_in_any_number_of_steps(path, steps):
    exact = GaussianOracle(path, 0.3, 0.5)
    times = Karras(path.rho).times(path, steps + 1)[:-1].double()
    x = exact.draw(path.t_max, 50, dtype=torch.float64)
    expected = exact.jump(x, times[:1].expand(50), kept(path).expand(50))
    models_ = [exact, GaussianConsistency(path, 0.3, 0.5), learned(exact, EDM(), two_times=True)]
    for model in [*models_, learned(exact, Velocity(), two_times=True)]:
        states = ahead(model, x, times, clip=False)
        torch.testing.assert_close(states[-1].denoised, expected, rtol=1e-5, atol=1e-5)
        assert [state.step for state in states] == list(range(1, steps + 1))
        for state, t in zip(states, times, strict=True):  # on the way it stays on the ODE
            at = t.expand(50)
            torch.testing.assert_close(state.x, exact.jump(x, times[:1].expand(50), at), rtol=1e-5, atol=1e-5)
    # a model that is not told where it lands is a denoiser, and needs many steps
    rough = ahead(learned(exact, EDM()), x, times, clip=False)[-1].denoised
    assert float((rough - expected).abs().max()) > (0.1 if steps < 3 else 0.01)


@paths
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", [EDM(), Velocity()], ids=lambda kind: kind.kind)
def test_a_denoiser_that_lands_on_the_next_time_is_ddim(path, clip, kind):
    oracle = MixtureOracle(path, means=(-1.2, 0.1, 0.9))
    model = learned(oracle, kind)
    times = Karras(path.rho).times(path, 8)[:-1].double()
    x = 1.3 * path.sigma(times[0]) * draws((100, 1, 1, 1), dtype=torch.float64)(0)

    def denoise(x, t):
        estimate = oracle.denoised(x, t)
        return estimate.clamp(-1, 1) if clip else estimate

    solved = list(solve(DDIM(), denoise, path, x, torch.cat([times, kept(path)])))
    states = ahead(model, x, times, clip=clip)
    close = {"rtol": 1e-4, "atol": 1e-5}  # ln(sigma / alpha) has a ceiling, at 1e6
    for state, before in zip(states[1:], solved, strict=False):
        torch.testing.assert_close(state.x, before.x, **close)
    for state in states[:-1]:  # shown is the clean image that is held fixed
        torch.testing.assert_close(state.denoised, denoise(state.x, torch.full((100,), state.t).double()), **close)
    end = solved[-1].x.clamp(-1, 1) if clip else solved[-1].x
    torch.testing.assert_close(states[-1].denoised, end, **close)
    assert bool((oracle.denoised(states[-1].x, times[-1:].expand(100)).abs() > 1).any())  # the clip has work to do


@pytest.mark.parametrize("path", PATHS[:3], ids=lambda path: f"{path.kind}-{path.t_max:.3g}")
@pytest.mark.parametrize("op", ["mask", "luma", "pool"])
def test_a_constraint_projects_the_clean_image_of_every_step(path, op):
    op = {"mask": Mask(HOLE.double() > 0), "luma": Luma(), "pool": AvgPool(2)}[op]
    model = models.model("denoiser", path=path).double()
    y = op.A(draws((1, 3, 8, 8), seed=3, dtype=torch.float64)(0).clamp(-1, 1) / 2)
    times = Karras(path.rho).times(path, 5)[:-1].double()
    x = path.sigma(times[0]) * draws((4, 3, 8, 8), dtype=torch.float64)(0)

    def constrain(x0):
        return project(op, x0, y)

    states = ahead(model, x, times, constrain=constrain)
    for t, s, state in zip(times, [*times[1:], kept(path)[0]], states, strict=True):
        torch.testing.assert_close(state.x, x)
        torch.testing.assert_close(op.A(state.denoised), y.expand(4, *y.shape[1:]), rtol=0, atol=1e-9)
        held = constrain(model.denoised(x, t.expand(4)).clamp(-1, 1))
        moved = path.transport(x, held, t.expand(4), s.expand(4))
        expected = constrain(moved.clamp(-1, 1)) if state is states[-1] else held
        torch.testing.assert_close(state.denoised, expected, rtol=1e-9, atol=1e-9)
        x = moved


@paths
@pytest.mark.parametrize("kind", [BoundaryEDM(), Piecewise()], ids=lambda kind: kind.kind)
def test_for_a_consistency_model_it_is_the_deterministic_view(path, kind):
    """x' = (x - f) / (t - t_min) in VE's coordinates, solved exactly while f is held fixed; the end is f itself."""
    model = learned(GaussianConsistency(path, 0.3, 0.5), kind)
    times = Karras(path.rho).times(path, 6)[:-1].double()
    if float(path.alpha(times[0])) < 1e-6:
        times = times[1:]  # pure noise has no coordinates on VE
    x = model.path.sigma(times[0]) * draws((20, 1, 1, 1), dtype=torch.float64)(0)
    states = ahead(model, x, times, clip=False)
    low = kept(path)
    for t, s, state in zip(times, [*times[1:], low[0]], states, strict=True):
        torch.testing.assert_close(state.x, x, rtol=1e-9, atol=1e-9)
        f = model.denoised(x, t.expand(20)) / path.alpha(low)
        share = (path.ratio(s) - path.ratio(low)) / (path.ratio(t) - path.ratio(low))
        x = path.alpha(s) * (f + share * (x / path.alpha(t) - f))
    torch.testing.assert_close(states[-1].denoised, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[-1].denoised, model.denoised(states[-1].x, times[-1:].expand(20)))


@paths
def test_many_of_its_steps_double_the_spread_of_gaussian_data(path):
    """Which is why the stochastic form is the default: f is where the ODE ends, no denoiser that says where it goes.

    On VE with t_min -> 0 the solution of x' = (x - f) / t, f = m + s / sqrt(s^2 + t^2) (x - m), is
    x_0 - m = (2 s / t) exp(-asinh(s / t)) (x_t - m), close to 2 s (x_t - m) / t.
    """
    model = learned(GaussianConsistency(path, 0.0, 0.1), BoundaryEDM())
    x = path.sigma(torch.tensor(path.t_max)) * torch.ones(1, 1, 1, 1, dtype=torch.float64)
    spread = {}
    for steps in (1, 4, 500):
        times = Karras(7.0).times(path, steps + 1)[:-1].double()
        spread[steps] = float(ahead(model, x, times, clip=False)[-1].denoised)
    assert spread[1] == pytest.approx(0.1, rel=0.03)
    assert 0.102 < spread[4] < 0.18
    assert spread[500] == pytest.approx(0.2, rel=0.05)


@paths
def test_one_step_is_one_jump_however_it_lands(path):
    model = models.model(path=path, config=micro(num_classes=3))
    x, times = path.sigma(torch.tensor(path.t_max)) * draws((3, 3, 8, 8))(0), default_times(model, 1)
    labels = torch.tensor([0, 2, 1])
    ends = [
        last(sample(model, x, times, noise=silence, labels=labels, landing=landing)).denoised
        for landing in ("t_min", "next")
    ]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ends[0], model.jump(x, times.expand(3), torch.full((3,), path.t_min), labels).clamp(-1, 1)
    )
    other = ahead(model, x, times, labels=labels.flip(0))[-1].denoised
    assert not torch.equal(other[0], ends[1][0])


@paths
def test_a_last_point_at_t_min_changes_nothing(path):
    exact = GaussianOracle(path, 0.3, 0.5)
    times = Karras(path.rho).times(path, 4).double()
    x = exact.draw(path.t_max, 20, dtype=torch.float64)
    whole, short = ahead(exact, x, times), ahead(exact, x, times[:-1])
    torch.testing.assert_close(whole[-1].denoised, short[-1].denoised, rtol=1e-12, atol=1e-12)
    assert len(whole) == 4


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
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_jumps_that_land_on_the_next_time_take_a_grid_of_their_own(path, steps):
    told = tuple(path.t_max * (1 - 0.1 * step) for step in range(steps))
    model = models.model(path=path, grid_rho=path.rho, times={str(steps): told})
    grid = Karras(path.rho).times(path, steps + 1)
    assert torch.equal(default_times(model, steps, "next"), grid[:-1])
    assert default_times(model, steps, "t_min").tolist() == pytest.approx(told)


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
@pytest.mark.parametrize("landing", ["t_min", "next"])
def test_at_least_one_step(steps, landing):
    with pytest.raises(UsageError, match="at least 1"):
        default_times(models.model(), steps, landing)
