"""Averages of the weights, targets, and the learning rate: what their numbers mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmtool.training.average import AVERAGES, Exponential, HalfLife, blend
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
    assert len({rule.name for rule in rules}) == len(rules)
    assert {rule.kind for rule in rules} == set(AVERAGES)
    assert Exponential(0.5).decay(10**9, 17) == 0.5


def test_a_recipe_refuses_averages_of_one_name():
    """They would be one entry of the trainer's table, and the second rule would be lost without a word."""
    from dataclasses import replace

    from cmtool.training import presets

    recipe: Recipe = presets.edm(presets.Shape())
    with pytest.raises(ValueError, match="half-life-500"):
        replace(recipe, averages=(HalfLife(500), HalfLife(500, ramp_up=0.1)))


@pytest.mark.parametrize(
    "make", [lambda: Exponential(1.0), lambda: Exponential(-0.1), lambda: HalfLife(0), lambda: HalfLife(5, 0.0)]
)
def test_impossible_averages_are_refused(make):
    with pytest.raises(ValueError, match=r"beta|positive"):
        make()


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
