"""Averages of the weights, targets, and the learning rate: what their numbers mean."""

from __future__ import annotations

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmtool.training.average import (
    AVERAGES,
    WIDEST,
    Exponential,
    HalfLife,
    Power,
    Profile,
    blend,
    combine,
    fit,
    inner,
)
from cmtool.training.recipe import Optimizer, Recipe
from cmtool.training.targets import AdaptiveAverage, MovingAverage, Online


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_blend_is_torchs_moving_average(decay):
    model, average = net(0), net(0)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    oracle.update_parameters(model)  # the first call copies
    for step in range(5):
        randomise(model, step)
        blend(average, model, decay)
        oracle.update_parameters(model)
    for mine, other in zip(average.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    for mine, other in zip(average.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_blend_at_the_ends_is_exact():
    model, average = net(0), net(1)
    before = [parameter.clone() for parameter in average.parameters()]
    blend(average, model, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), before, strict=True))
    blend(average, model, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(average.parameters(), model.parameters(), strict=True))


def test_blend_leaves_the_model_and_its_gradients_alone():
    model, average = net(0), net(1)
    before = [parameter.clone() for parameter in model.parameters()]
    blend(average, model, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad_fn is None for parameter in average.parameters())


@pytest.mark.parametrize(
    ("images", "batch", "beta"), [(50_000_000, 4096, 0.9999432189950708), (500_000, 512, 0.9992904691)]
)
def test_the_published_decays(images, batch, beta):
    assert HalfLife(images).decay(10**12, batch) == pytest.approx(beta, rel=1e-10)


def test_after_a_half_life_half_of_the_old_weights_is_left():
    rule, batch, left = HalfLife(images=12_800, ramp_up=1e9), 128, 1.0
    for step in range(1, 101):
        left *= rule.decay(step * batch, batch)
    assert left == pytest.approx(0.5, rel=1e-12)


def test_early_on_the_half_life_is_a_share_of_what_was_seen():
    rule = HalfLife(images=10**9, ramp_up=0.05)
    for seen in (1000, 64_000, 10**7):
        assert rule.decay(seen, 100) == pytest.approx(0.5 ** (100 / (0.05 * seen)))
    # so the first weights, which are random, are soon forgotten
    left = math.prod(rule.decay(step * 100, 100) for step in range(1, 1001))
    assert left < 1e-30


def test_names_tell_averages_apart():
    rules = [Exponential(0.9999432189950708), Exponential(0.9999), Exponential(0.999), HalfLife(500), HalfLife(501)]
    rules += [Power(0.05), Power(0.055), Power(0.1)]
    assert len({rule.name for rule in rules}) == len(rules)
    assert Power(0.1).name == "power-0.1"
    assert {rule.kind for rule in rules} == set(AVERAGES)
    assert Exponential(0.5).decay(10**9, 17) == 0.5


def test_a_recipe_refuses_averages_of_one_name():
    """They would be one entry of the trainer's table, and the second rule would be lost without a word."""
    from dataclasses import replace

    from cmtool.training import presets

    recipe: Recipe = presets.preset("edm")(presets.Shape())
    with pytest.raises(ValueError, match="half-life-500"):
        replace(recipe, averages=(HalfLife(500), HalfLife(500, ramp_up=0.1)))


@pytest.mark.parametrize(
    "make", [lambda: Exponential(1.0), lambda: Exponential(-0.1), lambda: HalfLife(0), lambda: HalfLife(5, 0.0)]
)
def test_impossible_averages_are_refused(make):
    with pytest.raises(ValueError, match=r"beta|positive"):
        make()


# Power-function averages.


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.01, 96.99), (0.05, 16.97), (0.1, 6.94), (WIDEST, 0.0)])
def test_the_published_exponents(sigma_rel, gamma):
    assert Power(sigma_rel).gamma == pytest.approx(gamma, abs=5e-3)


@given(st.floats(math.log(1e-6), math.log(WIDEST)).map(math.exp).map(lambda width: min(width, WIDEST)))
def test_the_exponent_has_the_width_asked_for(sigma_rel):
    gamma = Power(sigma_rel).gamma
    assert gamma >= 0
    assert ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 1e-9, 0.29, 1.0, math.nan, math.inf])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel"):
        Power(sigma_rel)


def weights_of_steps(rule, steps, batch):
    """How much the weights after each step count in the average: each step's are another unit vector."""
    model, average = nn.Linear(steps, 1, bias=False).double(), nn.Linear(steps, 1, bias=False).double()
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.copy_(torch.eye(steps, dtype=torch.float64)[step - 1 : step])
        blend(average, model, rule.decay(step * batch, batch))
    return average.weight.detach()[0].numpy()


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25, WIDEST])
@pytest.mark.parametrize("batch", [1, 512])
def test_past_weights_count_by_a_power_function(sigma_rel, batch):
    steps = 400
    rule = Power(sigma_rel)
    found = weights_of_steps(rule, steps, batch)
    edges = (np.arange(steps + 1) / steps) ** (rule.gamma + 1)
    np.testing.assert_allclose(found, np.diff(edges), rtol=1e-9, atol=1e-15)
    assert found.sum() == pytest.approx(1, rel=1e-12)  # nothing is left of the weights before the first step
    # ... as wide as it says: its standard deviation over its length, up to the width of a step
    t = (np.arange(steps) + 0.5) / steps
    mean = found @ t
    assert (found @ (t - mean) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=2e-3)


# Choosing afterwards.


def density(profile, t):
    return np.where(t <= profile.end, (profile.gamma + 1) / profile.end * (t / profile.end) ** profile.gamma, 0.0)


def grid(end, count=200_000):
    """Midpoints of cells, and the width of one."""
    return (np.arange(count) + 0.5) * end / count, end / count


PROFILES = [Profile(10.0, 0.0), Profile(10.0, 6.9), Profile(4.0, 17.0), Profile(25.0, 2.5), Profile(25.0, 97.0)]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations_with_replacement(PROFILES, 2)))
def test_inner_products_are_integrals(one, other):
    t, width = grid(25.0)
    assert (density(one, t).sum() * width, density(other, t).sum() * width) == pytest.approx((1, 1), rel=1e-3)
    assert inner(one, other) == pytest.approx((density(one, t) * density(other, t)).sum() * width, rel=1e-3)
    assert inner(one, other) == inner(other, one)


def stored_profiles(count, end=1.0, widths=(0.05, 0.1)):
    return [Profile(end * (i + 1) / count, Power(width).gamma) for width in widths for i in range(count)]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_fit_is_the_least_squares_one(count, sigma_rel):
    """Against a plain least-squares solution on a grid, the condition on the sum worked in by elimination."""
    stored, wanted = stored_profiles(count), Profile(1.0, Power(sigma_rel).gamma)
    t, _ = grid(1.0, 20_000)
    columns = np.stack([density(profile, t) for profile in stored], 1)
    goal = density(wanted, t)
    rest, *_ = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], goal - columns[:, -1], rcond=None)
    expected = np.append(rest, 1 - rest.sum())
    found = fit(stored, wanted)
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    error = np.linalg.norm(columns @ expected - goal) / np.linalg.norm(goal)
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.gain == pytest.approx(np.linalg.norm(expected), rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5, 50])
@pytest.mark.parametrize("which", [0, -1, "middle"])
def test_a_stored_average_is_found_again(count, which):
    stored = stored_profiles(count)
    index = len(stored) // 2 if which == "middle" else which % len(stored)
    found = fit(stored, stored[index])
    expected = np.zeros(len(stored))
    expected[index] = 1
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-9)
    assert found.error < 1e-6
    assert found.gain == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 5, 200])
@pytest.mark.parametrize("sigma_rel", [0.01, 0.15, WIDEST])
def test_what_never_moves_is_reproduced(count, sigma_rel):
    """However wrong the profile is, the coefficients sum to one."""
    assert sum(fit(stored_profiles(count), Profile(1.0, Power(sigma_rel).gamma)).coefficients) == pytest.approx(
        1, abs=1e-10
    )


@given(unit=st.floats(1e-3, 1e9), seed=st.integers(0, 99))
def test_the_unit_of_time_and_the_order_do_not_matter(unit, seed):
    gamma = Power(0.07).gamma
    stored = stored_profiles(6)
    expected = dict(zip(stored, fit(stored, Profile(1.0, gamma)).coefficients, strict=True))
    shuffled = [stored[i] for i in np.random.default_rng(seed).permutation(len(stored))]
    scaled = fit([Profile(end * unit, gamma) for end, gamma in shuffled], Profile(unit, gamma))
    assert scaled.coefficients == pytest.approx([expected[profile] for profile in shuffled], rel=1e-6, abs=1e-9)


def test_alike_widths_are_given_away_by_their_gain():
    """Both fit; but with two widths almost the same, sums of large numbers of both signs cancel."""
    wanted = Profile(1.0, Power(0.07).gamma)
    good, bad = (fit(stored_profiles(10, widths=widths), wanted) for widths in ((0.05, 0.1), (0.1, 0.1001)))
    assert max(good.error, bad.error) < 0.01
    assert good.gain < 1
    assert bad.gain > 500


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ([], Profile(1, 1)),
        ([Profile(0, 1)], Profile(1, 1)),
        ([Profile(1, -0.5)], Profile(1, 1)),
        ([Profile(1, 1)], Profile(0, 1)),
        ([Profile(1, 1)], Profile(1, math.nan)),
    ],
)
def test_a_fit_needs_profiles(stored, wanted):
    with pytest.raises(ValueError, match="profiles"):
        fit(stored, wanted)


def test_averages_chosen_afterwards_are_those_maintained_all_along():
    """A random walk of weights that start far from zero; kept: two widths. More snapshots, smaller errors."""
    steps, widths, later = 1920, (0.05, 0.1), (0.03, 0.07, 0.15, 0.2)
    model = nn.Linear(300, 1).double()
    averages = {width: nn.Linear(300, 1).double() for width in (*widths, *later)}
    generator = torch.Generator().manual_seed(0)
    kept = {}
    with torch.no_grad():
        model.weight.add_(50)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for width, average in averages.items():
            blend(average, model, Power(width).decay(step, 1))
        if step % (steps // 64) == 0:
            for width in widths:
                kept[step, width] = nn.Linear(300, 1).double()
                kept[step, width].load_state_dict(averages[width].state_dict())

    @torch.no_grad()
    def error(width, count):
        used = [(step, stored) for step, stored in kept if step % (steps // count) == 0]
        assert len(used) == 2 * count
        found = fit([Profile(step, Power(stored).gamma) for step, stored in used], Profile(steps, Power(width).gamma))
        made = nn.Linear(300, 1).double()
        combine(made, zip(found.coefficients, (kept[key] for key in used), strict=True))
        # relative to how far the average is from the newest weights
        scale = (averages[width].weight - model.weight).norm()
        return float((made.weight - averages[width].weight).norm() / scale)

    for width in later:
        errors = [error(width, count) for count in (4, 8, 16, 32, 64)]
        assert all(small < 0.5 * large for large, small in itertools.pairwise(errors)), (width, errors)
        assert errors[-1] < 5e-4, (width, errors)
    assert error(0.05, 4) < 1e-10
    assert error(0.1, 64) < 1e-10


def test_combine_sums_the_parameters_and_leaves_the_buffers():
    modules = [net(seed) for seed in range(3)]
    for seed, module in zip((0, 0, 1), modules, strict=True):
        randomise(module, seed)
    into = net(9)
    buffers = [buffer.clone() for buffer in into.buffers()]
    coefficients = (
        3e4 / 7,
        1 - 3e4 / 7,
        1.0,
    )  # the first two cancel: a sum in float32 would be off in the fourth digit
    combine(into, zip(coefficients, modules, strict=True))
    for made, *parts in zip(into.parameters(), *(module.parameters() for module in modules), strict=True):
        expected = sum(c * part.detach().double() for c, part in zip(coefficients, parts, strict=True))
        torch.testing.assert_close(made.detach().double(), expected, rtol=1e-6, atol=1e-9)
        assert made.requires_grad
        assert made.grad_fn is None
    for made, before in zip(into.buffers(), buffers, strict=True):
        assert torch.equal(made, before)


def test_combine_takes_one_part_at_a_time():
    alive = []

    def parts():
        for seed in range(4):
            module = net(seed)
            alive.append(weakref.ref(module))
            yield 0.25, module
            del module
            assert sum(reference() is not None for reference in alive) <= 1

    combine(net(5), parts())
    assert len(alive) == 4


# Targets. Rows (step of 800,000, openai's mu, the paper's mu) for mu0 = 0.95, s0 = 2, s1 = 200.

MU = {
    0: (0.9025, 0.95),
    1: (0.95, 0.966383),
    1_000: (0.985452, 0.987259),
    10_000: (0.995348, 0.99555),
    100_000: (0.998556, 0.998576),
    800_000: (0.999487, 0.99949),
}


@pytest.mark.parametrize("step", MU)
def test_published_target_decays(step):
    from cmtool.times import Progressive

    progress = step / 800_000
    num = Progressive(2, 200)(progress)
    openai, paper = MU[step]
    assert AdaptiveAverage(0.95, 2, "openai").decay(progress, num) == pytest.approx(openai, abs=6e-7)
    assert AdaptiveAverage(0.95, 2, "paper").decay(progress, num) == pytest.approx(paper, abs=6e-7)


def test_constant_targets():
    assert [Online().decay(p, n) for p, n in ((0, 2), (1, 151))] == [0, 0]
    assert [MovingAverage(0.95).decay(p, n) for p, n in ((0, 2), (1, 151))] == [0.95, 0.95]


@pytest.mark.parametrize(
    "make", [lambda: MovingAverage(1.0), lambda: AdaptiveAverage(0.0), lambda: AdaptiveAverage(1.0)]
)
def test_impossible_targets_are_refused(make):
    with pytest.raises(ValueError, match="mu"):
        make()


# The learning rate.


def test_a_constant_rate():
    rule = Optimizer(lr=4e-4)
    assert [rule.rate(p, n) for p, n in ((0, 1), (0.5, 10**6), (1, 10**9))] == [4e-4] * 3


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    rule = Optimizer(lr=2.0, warmup=1000, final=0.1)
    assert rule.rate(0.0, 250) == pytest.approx(0.5)
    assert rule.rate(0.0, 1000) == rule.rate(0.0, 5000) == pytest.approx(2.0)
    assert rule.rate(0.5, 5000) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rule.rate(1 / 3, 5000) == pytest.approx(2.0 * (0.1 + 0.9 * 0.75))
    assert rule.rate(1.0, 5000) == rule.rate(1.5, 5000) == pytest.approx(0.2)
    assert rule.rate(0.5, 500) == pytest.approx(rule.rate(0.5, 5000) / 2)
