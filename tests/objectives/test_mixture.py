"""`Mixture`: who gets which share of a batch, what it counts, and the methods made that way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmtool.errors import ConfigError
from cmtool.flow import VE, Linear, Trig, Velocity
from cmtool.times import Adjacent, Constant, Fixed, Halving, LogNormal, Mapped, NextGrid, Pair
from cmtool.training import presets, weights
from cmtool.training.distances import L1, L2, PseudoHuber
from cmtool.training.objectives import Consistency, Denoising, Mixture, Part, with_guidance
from cmtool.training.targets import MovingAverage, Truncated
from cmtool.training.trajectory import Batch, Data, Predecessor, Self, Teacher
from tests.objectives.gaussian import GAUSSIAN, MEAN, STD, Exact, Wide, gaussian_batch, generator, inside, normal
from tests.objectives.quadrature import expectation
from tests.oracles import GaussianConsistency, GaussianOracle, learned

DIFFUSION = Denoising(Wide(LogNormal()), L2())
STEPWISE = Consistency(Data(), Wide(Adjacent(curriculum=Constant(6))), L1())


class Spy(GaussianConsistency):
    """Keeps the batches it was asked about."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = []

    def denoised(self, x_t, t, labels=None, augment=None):
        self.asked.append((x_t, t, labels, augment))
        return super().denoised(x_t, t)

    def jump(self, x_t, t, s, labels=None, augment=None):
        self.asked.append((x_t, t, labels, augment))
        return super().jump(x_t, t, s)


def full_batch(n):
    return gaussian_batch(n)._replace(labels=torch.arange(n), augment=normal(n, 9))


def test_each_part_has_its_share_in_order():
    batch, model, target = full_batch(8), Spy(VE(), tilt=0.1), Spy(VE(), tilt=0.2)
    config = Mixture((Part(DIFFUSION, 0.75), Part(STEPWISE, 0.25)))
    loss = config.build()(model, target, batch, 0.0, generator(3))
    first, *_, last = model.asked
    for (x_t, t, labels, augment), piece in ((first, slice(0, 6)), (last, slice(6, 8))):
        torch.testing.assert_close(x_t, VE().mix(batch.x0[piece], batch.eps[piece], t))
        assert torch.equal(labels, batch.labels[piece])
        assert torch.equal(augment, batch.augment[piece])
        assert torch.equal(loss.t[piece], t)
    assert {len(asked[1]) for asked in target.asked} == {2}  # only the second part has a target


def test_its_value_is_the_weighted_sum_of_means():
    """Each part is what it is by itself, on its own piece, after the draws of those before it."""
    batch, model = gaussian_batch(8), GaussianConsistency(VE(), tilt=0.2)
    for weight, other in ((None, None), (1.0, 0.1), (0.0, 3.0)):
        config = Mixture((Part(DIFFUSION, 0.75, weight), Part(STEPWISE, 0.25, other)))
        loss = config.build()(model, model, batch, 0.0, generator(3))
        drawing = generator(3)
        first = DIFFUSION.build()(model, model, Batch(batch.x0[:6], None, batch.eps[:6]), 0.0, drawing)
        second = STEPWISE.build()(model, model, Batch(batch.x0[6:], None, batch.eps[6:]), 0.0, drawing)
        factors = (0.75 if weight is None else weight, 0.25 if other is None else other)
        torch.testing.assert_close(loss.value, factors[0] * first.value + factors[1] * second.value)
        torch.testing.assert_close(loss.per_sample, torch.cat([first.per_sample, second.per_sample]))
        assert list(loss.terms) == ["denoising loss of part 0", "consistency loss of part 1"]
        torch.testing.assert_close(loss.terms["denoising loss of part 0"], first.value.detach())
        torch.testing.assert_close(loss.terms["consistency loss of part 1"], second.value.detach())
        (grad,) = torch.autograd.grad(loss.value, model.tilt)
        (one,) = torch.autograd.grad(factors[0] * first.value, model.tilt)
        (two,) = torch.autograd.grad(factors[1] * second.value, model.tilt)
        torch.testing.assert_close(grad, one + two)
    # without weights every sample counts alike
    shared = Mixture((Part(DIFFUSION, 0.75), Part(STEPWISE, 0.25))).build()(model, model, batch, 0.0, generator(3))
    torch.testing.assert_close(shared.value.detach(), shared.per_sample.mean())


@given(
    cuts=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5),
    more=st.integers(0, 40),
)
def test_the_pieces_tile_the_batch_and_none_is_empty(cuts, more):
    shares = [cut / sum(cuts) for cut in cuts]
    if len(shares) == 1:
        shares = [0.5, 0.5]
    mixture = Mixture(tuple(Part(DIFFUSION, share) for share in shares)).build()
    size = len(shares) + more
    pieces = [piece.labels.tolist() for piece in mixture._split(full_batch(size))]
    assert [index for piece in pieces for index in piece] == list(range(size))
    assert all(pieces)
    if all(share * size >= 1 for share in shares):
        assert all(abs(len(piece) - share * size) <= 1 for piece, share in zip(pieces, shares, strict=True))


def test_a_batch_that_is_too_small_is_refused():
    objective, model = Mixture((Part(DIFFUSION), Part(STEPWISE))).build(), GaussianConsistency(VE())
    with pytest.raises(ConfigError, match="batch of 1 does not share out to 2"):
        objective(model, model, gaussian_batch(1), 0.0, generator())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixture(()),
        lambda: Mixture((Part(DIFFUSION, 0.5),)),
        lambda: Mixture((Part(DIFFUSION, 0.75), Part(STEPWISE, 0.75))),
        lambda: Part(DIFFUSION, 0.0),
        lambda: Part(DIFFUSION, 1.0),
        lambda: Part(DIFFUSION, math.nan),
    ],
)
def test_shares_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match="share"):
        make()


# What a mixture says of itself.


def test_a_mixture_needs_what_its_parts_need():
    follows = Consistency(Teacher(guidance=3.0), target=MovingAverage(0.9), distance=PseudoHuber())
    cut = Consistency(Data(), Mapped(), target=Truncated())
    plain = Mixture((Part(DIFFUSION), Part(STEPWISE)))
    assert (plain.needs_teacher, plain.needs_first, plain.guidance, plain.decay(0.5)) == (False, False, 1.0, 0.0)
    mixed = Mixture((Part(DIFFUSION), Part(follows)))
    assert (mixed.needs_teacher, mixed.needs_first, mixed.guidance, mixed.decay(0.5)) == (True, False, 3.0, 0.9)
    assert Mixture((Part(DIFFUSION), Part(cut))).needs_first
    assert mixed.distances == (L2(), PseudoHuber())
    assert Mixture((Part(Denoising()), Part(Consistency(Data(), Adjacent(curriculum=Constant(40)))))).grid == (40, 7.0)
    with pytest.raises(ConfigError, match="teacher"):
        mixed.build()


def test_guidance_reaches_every_teacher_of_a_mixture():
    follows, solves = Consistency(Teacher()), Denoising(pairs=Teacher(substeps=3))
    guided = with_guidance(Mixture((Part(DIFFUSION, 0.5), Part(follows, 0.25), Part(solves, 0.25))), 2.5)
    assert guided.parts[0].objective is DIFFUSION
    assert guided.parts[1] == Part(Consistency(Teacher(guidance=2.5)), 0.25)
    assert guided.parts[2].objective.pairs == Teacher(substeps=3, guidance=2.5)
    assert with_guidance(follows, 2.0).guidance == 2.0
    with pytest.raises(ConfigError, match="follows none"):
        with_guidance(Mixture((Part(DIFFUSION), Part(STEPWISE))), 2.0)


def test_a_part_that_promotes_sets_the_stages():
    config = Mixture((Part(DIFFUSION), Part(Consistency(Predecessor(), NextGrid(Halving(4))))))
    objective = config.build(GaussianOracle(VE(), MEAN, STD))
    assert objective.stage(0.4) == (1, pytest.approx(0.5))
    student = GaussianOracle(VE())
    student.network.anchor.data.fill_(4.0)
    objective.promote(student)
    assert float(objective.parts[1].trajectory.teacher.network.anchor.detach()) == 4.0


# Methods made of a mixture, at the exact flow map of Gaussian data.


def exact_and_wrong(path, kind):
    return (learned(GaussianConsistency(path, MEAN, STD, tilt=tilt), kind, two_times=True) for tilt in (0.0, 0.3))


def pull(objective, model, batch, progress=0.5):
    loss = objective(model, model, batch, progress, generator(2))
    return abs(float(loss.value.detach())), abs(float(torch.autograd.grad(loss.value, model.network.oracle.tilt)[0]))


def jumps_of(name, **shape):
    recipe = presets.preset(name)(presets.Shape(32, 3, **shape))
    assert (recipe.path, recipe.parameterization) == (Linear(), Velocity())
    diagonal, jumps = (part.objective for part in recipe.objective.parts)
    assert diagonal.weight == weights.VelocityError()  # flow matching
    return jumps


def test_the_jumps_of_a_shortcut_model_are_at_rest():
    jumps = jumps_of("shortcut")
    assert isinstance(jumps.trajectory, Self)
    objective = replace(jumps, times=Wide(jumps.times)).build()
    exact, wrong = (pull(objective, model, gaussian_batch(64)) for model in exact_and_wrong(Linear(), Velocity()))
    assert exact[0] < 1e-12 < 1e-6 * wrong[0]
    assert exact[1] < 1e-8 < 1e-3 * wrong[1]


def test_the_jumps_of_a_distilled_meanflow_model_are_at_rest():
    jumps = jumps_of("meanflow", distils=True)
    assert isinstance(jumps.trajectory, Teacher)
    objective = replace(jumps, times=Wide(jumps.times)).build(GaussianOracle(Linear(), MEAN, STD))
    exact, wrong = (pull(objective, model, gaussian_batch(64)) for model in exact_and_wrong(Linear(), Velocity()))
    assert exact[0] < 1e-12 < 1e-6 * wrong[0]
    assert exact[1] < 1e-8 < 1e-3 * wrong[1]


def test_the_jumps_of_a_trained_meanflow_model_are_at_rest_in_expectation():
    """From data every sample pulls, and together they do not."""
    jumps, path = jumps_of("meanflow"), Linear()
    assert isinstance(jumps.trajectory, Data)
    assert isinstance(jumps.times, Pair)
    batch, times, rule = expectation(path, GAUSSIAN, inside(path, 0.4, 0.8), n=24, s=inside(path, 0.1, 0.5))
    objective = replace(jumps, times=times, weight=rule, balance=None).build()
    exact, wrong = (pull(objective, model, batch) for model in exact_and_wrong(path, Velocity()))
    assert exact[0] > 1e-2  # the spread of the data's velocities, as in flow matching
    assert exact[1] < 1e-6 < 1e-3 * wrong[1]


def test_the_two_parts_of_a_truncated_model_lie_on_both_sides_of_its_boundary():
    recipe = presets.preset("tcm")(presets.Shape(32, 3))
    above, at = (part.objective for part in recipe.objective.parts)
    assert [(part.share, part.weight) for part in recipe.objective.parts] == [(0.75, 1.0), (0.25, 0.1)]
    assert at.times.start == Fixed(1.0)
    for part, low in ((above, 1.0), (at, 1.0)):
        assert part.target == Truncated(1.0)
        times = part.times(VE(), 512, 0.5, generator())
        assert float(times.t.min()) >= low * (1 - 1e-6)
    assert bool((at.times(VE(), 8, 0.5, generator()).r < 1).all())
    # the exact function is at rest in both, whoever answers
    config = Mixture(
        tuple(
            replace(
                part, objective=replace(part.objective, trajectory=Teacher(Exact()), times=Wide(part.objective.times))
            )
            for part in recipe.objective.parts
        )
    )
    objective = config.build(GaussianOracle(VE(), MEAN, STD), first=GaussianConsistency(VE(), MEAN, STD))
    grads = []
    for tilt in (0.0, 0.3):
        model = GaussianConsistency(VE(), MEAN, STD, tilt=tilt)
        objective(model, model, gaussian_batch(64), 0.5, generator(2)).value.backward()
        grads.append(abs(float(model.tilt.grad)))
    assert grads[0] < 1e-9 < 1e-6 * grads[1]


def test_kinds_that_were_never_published_together():
    """Truncated, trigonometric, distilled from a VE teacher, by Pseudo-Huber: the exact function is at rest."""
    oracle = GaussianOracle(VE(), MEAN, STD)
    config = Consistency(
        Teacher(substeps=64),
        Mapped(Fixed(2.0), q=8.0, stages=1),
        PseudoHuber(0.03),
        weights.InverseGap(),
        Truncated(1.0),
    )
    losses = []
    for tilt in (0.0, 0.3):
        model = GaussianConsistency(Trig(), MEAN, STD, tilt=tilt)
        objective = config.build(oracle, first=GaussianConsistency(VE(), MEAN, STD))
        losses.append(float(objective(model, model, gaussian_batch(64), 0.5, generator(2)).value.detach()))
    assert losses[0] < 1e-4 * losses[1]
