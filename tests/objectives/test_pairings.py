"""`Consistency` with every pairing of times: direct, progressive, shortcut, easy, improved and truncated models."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cmtool import networks
from cmtool.errors import ConfigError
from cmtool.flow import EDM, VE, FlowMap, Linear, Trig, Velocity
from cmtool.networks import MLPConfig
from cmtool.times import (
    Adjacent,
    Constant,
    Doubling,
    Dyadic,
    Halving,
    Karras,
    Landing,
    LogNormal,
    LogNormalIndex,
    LogStudentT,
    Mapped,
    NextGrid,
    OnGrid,
)
from cmtool.training import weights
from cmtool.training.distances import L1, L2, PseudoHuber
from cmtool.training.objectives import Consistency
from cmtool.training.targets import AdaptiveAverage, MovingAverage, Online, Truncated
from cmtool.training.trajectory import Data, PathSample, Predecessor, Self, Teacher
from tests.objectives.gaussian import (
    GAUSSIAN,
    MEAN,
    STD,
    Exact,
    Wide,
    gaussian_batch,
    generator,
    inside,
    normal,
    paths,
    short,
)
from tests.objectives.quadrature import Given, expectation
from tests.oracles import GaussianConsistency, GaussianOracle, learned

EASY = Mapped(LogNormal(-1.1, 2.0), stages=4)
CUT = Mapped(LogStudentT(low=1.0), q=16.0, stages=1)
# Along an exact teacher the exact flow map has no loss, sample by sample, whatever the times, the weight and what is
# compared. Each method, with its own.
METHODS = {
    "direct": Consistency(Teacher(Exact(), 3), Landing(OnGrid(curriculum=Constant(6))), L2(), weights.Karras()),
    "direct, any time": Consistency(Teacher(Exact(), 3), Landing(LogNormal()), L1()),
    "progressive": Consistency(
        Predecessor(Exact()), NextGrid(Halving(8)), L2(), weights.TruncatedSNR(), compare_denoised=True
    ),
    "denoised": Consistency(Teacher(Exact()), Adjacent(curriculum=Constant(6)), L2(), compare_denoised=True),
    "shortcut": Consistency(Self(), Dyadic(4), L2(), weights.InverseJump(), MovingAverage(0.9)),
    "easy": Consistency(Teacher(Exact()), EASY, PseudoHuber(0.03), weights.InverseGap()),
    "improved": Consistency(
        Teacher(Exact()), Adjacent(Karras(), Doubling(4, 32), LogNormalIndex(-1.1, 2.0)), PseudoHuber(0.03)
    ),
    "truncated": Consistency(Teacher(Exact()), CUT, PseudoHuber(0.03), weights.InverseGap(), Truncated(1.0)),
}
methods = pytest.mark.parametrize("method", METHODS)


def built(config, path, first=None, wide=True):
    if wide:
        config = replace(config, times=Wide(config.times))
    return config.build(GaussianOracle(path, MEAN, STD), first=first or GaussianConsistency(path, MEAN, STD))


def value(objective, model, batch, target=None, progress=0.6):
    return objective(model, target or model, batch, progress, generator(2)).value


@paths
@methods
def test_the_exact_flow_map_has_no_loss_and_is_stationary(path, method):
    objective, batch = built(METHODS[method], path), gaussian_batch(128)
    losses, grads = {}, {}
    for tilt in (0.0, 0.2):
        model = GaussianConsistency(path, MEAN, STD, tilt=tilt)
        loss = value(objective, model, batch)
        loss.backward()
        losses[tilt], grads[tilt] = float(loss.detach()), abs(float(model.tilt.grad))
    exact = 1e-6 if method == "direct, any time" else 1e-12  # |error| instead of its square
    assert losses[0.0] < exact * losses[0.2]
    if method != "direct, any time":  # l1 has no gradient to vanish
        assert grads[0.0] < 1e-6 * grads[0.2]
    assert grads[0.2] > 1e-5


@paths
@methods
def test_the_gradient_is_that_of_the_loss_with_the_target_held_fixed(path, method):
    objective, batch, h = built(METHODS[method], path), gaussian_batch(64), 1e-5
    target, model = (GaussianConsistency(path, MEAN, STD, tilt=0.1) for _ in range(2))
    value(objective, model, batch, target).backward()
    up, down = (
        float(value(objective, GaussianConsistency(path, MEAN, STD, tilt=0.1 + step), batch, target).detach())
        for step in (h, -h)
    )
    assert float(model.tilt.grad) == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-9)
    assert abs(float(model.tilt.grad)) > 1e-5
    assert target.tilt.grad is None
    online = GaussianConsistency(path, MEAN, STD, tilt=0.1)
    value(objective, online, batch).backward()
    torch.testing.assert_close(online.tilt.grad, model.tilt.grad, rtol=1e-12, atol=0)


# From the data there is no zero to reach, but a pull that vanishes faster than everything else as neighbours close in.


@dataclass(frozen=True)
class Listed:
    """An index law that returns what it was made with."""

    index: Tensor

    def __call__(self, path, points, n, generator):
        return self.index


def easy(path, stage):
    """ECT in one of its stages, where neighbours are nearer by a factor of 3 each."""
    t = inside(path, 0.2, 0.5, 0.9)
    batch, given, rule = expectation(path, GAUSSIAN, t, n=24, weight=weights.InverseGap())
    times = Mapped(given, q=3.0, k=0.5, stages=6)
    return Consistency(Data(), times, PseudoHuber(1.0), rule), batch, (stage + 0.5) / 6


def improved(path, stage):
    """iCT in one of its stages, N = 9, 17, ...: all pairs of the grid, as often as the law draws them."""
    curriculum, law = Doubling(8, 128), LogNormalIndex(-1.1, 2.0)
    progress = (stage + 0.5) / 5
    points = Karras().times(path, curriculum(progress))
    shares = law.probabilities(path, points)
    batch, _, rule = expectation(path, GAUSSIAN, points[:-1].double(), n=16, shares=shares, weight=weights.InverseGap())
    index = torch.arange(len(shares)).repeat_interleave(len(batch.x0) // len(shares))
    times = Wide(Adjacent(Karras(), curriculum, Listed(index)))
    return Consistency(Data(), times, PseudoHuber(1.0), rule), batch, progress


@short
@pytest.mark.parametrize(("make", "stages", "factor"), [(easy, (2, 3, 4), 3), (improved, (2, 3, 4), 2)])
def test_the_pull_away_from_the_exact_function_vanishes_as_neighbours_close_in(path, make, stages, factor):
    """With the weight 1 / (t - r) the gradient keeps its size, and the pull at the exact function falls as t - r."""
    pulls = {0.0: [], 0.4: []}
    for stage in stages:
        config, batch, progress = make(path, stage)
        for tilt, found in pulls.items():
            model = GaussianConsistency(path, MEAN, STD, tilt=tilt)
            value(config.build(), model, batch, progress=progress).backward()
            found.append(abs(float(model.tilt.grad)))
    for coarse, fine in pairwise(pulls[0.0]):
        assert coarse / fine == pytest.approx(factor, rel=0.35)
    assert max(pulls[0.4]) < 1.5 * min(pulls[0.4])
    assert pulls[0.0][-1] < 0.15 * pulls[0.4][-1]


# What is compared with what.


class Spy(GaussianConsistency):
    """Counts its jumps."""

    calls = 0

    def jump(self, x_t, t, s, labels=None, augment=None):
        self.calls += 1
        return super().jump(x_t, t, s)


@paths
@pytest.mark.parametrize("method", ["direct", "progressive"])
def test_where_the_neighbour_is_the_landing_no_target_is_asked(path, method):
    objective = built(METHODS[method], path)
    model, target = Spy(path, tilt=0.2), Spy(path, tilt=0.2)
    value(objective, model, gaussian_batch(16), target)
    assert (model.calls, target.calls) == (1, 0)


@paths
def test_direct_distillation_regresses_on_the_end_of_the_teachers_trajectory(path):
    t = inside(path, 0.3, 0.6, 0.9)
    s = torch.full_like(t, path.t_min)
    batch, model = gaussian_batch(3), GaussianConsistency(path, MEAN, 0.7, tilt=0.2)
    oracle, teacher = GaussianOracle(path, MEAN, STD), Teacher(substeps=40, grid=Karras(path.rho))
    loss = Consistency(teacher, Given(t, s, s)).build(oracle)(model, model, batch, 0.0, generator())
    x_t = path.mix(batch.x0, batch.eps, t)
    end = teacher.bind(oracle).step(oracle, PathSample(x_t, t, batch.x0, batch.eps), s)
    torch.testing.assert_close(loss.per_sample, (model.jump(x_t, t, s) - end).square().mean((1, 2, 3)).detach())
    # that of the model's mistake, but for the solver's
    mistake = (model.jump(x_t, t, s) - oracle.jump(x_t, t, s)).square().mean((1, 2, 3)).detach()
    torch.testing.assert_close(loss.per_sample, mistake, rtol=0.1, atol=0)


@paths
def test_compared_as_clean_images(path):
    """The landings x_s = keep x_t + (alpha_s - alpha_t keep) D, solved for D by hand."""
    t, r, s = inside(path, 0.3, 0.6, 0.9), inside(path, 0.25, 0.5, 0.7), inside(path, 0.1, 0.3, 0.05)
    batch, (model, target) = gaussian_batch(3), (GaussianConsistency(path, tilt=tilt) for tilt in (0.2, -0.1))
    config = Consistency(Data(), Given(t, r, s), compare_denoised=True)
    found = config.build()(model, target, batch, 0.0, generator())
    x_t, x_r = (path.mix(batch.x0, batch.eps, time) for time in (t, r))
    landings = model.jump(x_t, t, s), target.jump(x_r, r, s)
    keep, alpha, alpha_s = (
        c[:, None, None, None] for c in (path.sigma(s) / path.sigma(t), path.alpha(t), path.alpha(s))
    )
    estimates = [(x_s - keep * x_t) / (alpha_s - alpha * keep) for x_s in landings]
    by_hand = (estimates[0] - estimates[1]).square().mean((1, 2, 3)).detach()
    torch.testing.assert_close(found.per_sample, by_hand)
    plain = replace(config, compare_denoised=False).build()(model, target, batch, 0.0, generator()).per_sample
    assert bool(((plain / by_hand - 1).abs() > 1e-3).all())


def test_on_the_straight_path_two_half_jumps_teach_their_mean_velocity():
    """Frans et al. (2024), eq. 4 and 5: |F(x, t, 2 d) - (F(x, t, d) + F(x', t - d, d)) / 2|^2."""
    torch.manual_seed(0)
    config = MLPConfig(resolution=2, in_channels=1, out_channels=1, width=16, depth=1, two_times=True)
    model = FlowMap(networks.build(config).double(), Linear(), Velocity())
    nn.init.normal_(model.network.leave.weight)
    batch = gaussian_batch(32)
    objective = built(METHODS["shortcut"], Linear())
    loss = objective(model, model, batch, 0.0, generator(2))
    t, r, s = Wide(Dyadic(4))(Linear(), 32, 0.0, generator(2))
    torch.testing.assert_close(t - r, r - s)
    d = (t - r)[:, None, None, None]
    with torch.no_grad():
        x_t = Linear().mix(batch.x0, batch.eps, t)
        one = model.raw(x_t, t, r)
        two = model.raw(x_t - d * one, r, s)
        by_hand = (model.raw(x_t, t, s) - (one + two) / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.per_sample, by_hand)
    assert float(by_hand.min()) > 1e-6


# Truncation.


def truncated(path, first, at=1.0):
    """Neighbours at the ratios 0.3, 0.9, 1, 1.5; the starts twice as noisy."""
    r = path.time(torch.tensor([0.3, 0.9, 1.0, 1.5], dtype=torch.float64))
    t = path.time(2 * path.ratio(r))
    # where a float stands on the boundary is not what is tested
    r[2] = r[2].nextafter(torch.tensor(math.inf))
    s = torch.full_like(t, path.t_min)
    return Consistency(Data(), Given(t, r, s), L2(), target=Truncated(at)).build(first=first), (t, r, s)


@paths
@pytest.mark.parametrize("own", [VE(), Trig()], ids=lambda path: path.kind)
def test_below_the_truncation_the_first_stage_answers(path, own):
    """It may be a model of another path, which is read on this one."""
    first = GaussianConsistency(own, MEAN, STD)
    objective, (t, r, s) = truncated(path, first)
    batch = gaussian_batch(4)
    model, target = (GaussianConsistency(path, MEAN, 0.9, tilt=tilt) for tilt in (0.3, -0.2))
    loss = objective(model, target, batch, 0.0, generator())
    x_t, x_r = (path.mix(batch.x0, batch.eps, time) for time in (t, r))
    answers = GaussianConsistency(path, MEAN, STD).jump(x_r, r, s), target.jump(x_r, r, s)
    goal = torch.cat([answers[0][:2], answers[1][2:]])
    by_hand = (model.jump(x_t, t, s) - goal).square().mean((1, 2, 3)).detach()
    torch.testing.assert_close(loss.per_sample, by_hand, rtol=2e-2 if own.kind != path.kind else 1e-9, atol=0)
    # ... and the model is not asked: whatever it says there, these losses stay
    other = objective(model, GaussianConsistency(path, tilt=1.0), batch, 0.0, generator())
    assert (other.per_sample == loss.per_sample).tolist() == [True, True, False, False]
    moved = truncated(path, first, at=0.5)[0](model, target, batch, 0.0, generator())
    assert (moved.per_sample == loss.per_sample).tolist() == [True, False, True, True]


def test_the_first_stage_is_frozen_and_no_part_of_what_is_trained():
    first = GaussianConsistency(VE(), MEAN, STD).train().requires_grad_(True)
    objective, _ = truncated(VE(), first)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not first.training
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {}


def test_a_truncated_model_needs_its_first_stage():
    config = METHODS["truncated"]
    assert config.needs_first
    assert not METHODS["easy"].needs_first
    with pytest.raises(ConfigError, match="--init"):
        config.build(GaussianOracle(VE()))
    with pytest.raises(ValueError, match="positive"):
        Truncated(0.0)


class Told(nn.Module):
    """A network that keeps what it was told; with an augmentation vector if `dim`."""

    def __init__(self, dim):
        super().__init__()
        self.config = SimpleNamespace(augment_dim=dim)
        self.told = []

    def forward(self, x, noise, labels=None, augment=None):
        self.told.append(augment)
        return torch.zeros_like(x)


@pytest.mark.parametrize("dim", [0, 9])
def test_frozen_models_are_told_of_augmentation_if_they_know_it(dim):
    teacher, first = (FlowMap(Told(dim), VE(), EDM()) for _ in range(2))
    batch = gaussian_batch(4)._replace(augment=torch.ones(4, 9))
    model = FlowMap(Told(9), VE(), EDM())
    Consistency(Teacher(), EASY, target=Truncated(1.0)).build(teacher, first=first)(
        model, model, batch, 0.0, generator()
    )
    for frozen in (teacher, first):
        assert frozen.network.told
        assert all((augment is batch.augment) == (dim == 9) for augment in frozen.network.told)
    assert all(augment is batch.augment for augment in model.network.told)


# Progressive distillation: students become teachers.


def predecessor(path=None, guidance=1.0):
    path = path or VE()
    config = Consistency(Predecessor(Exact(), guidance=guidance), NextGrid(Halving(4)))
    return config.build(GaussianConsistency(path, MEAN, STD, tilt=0.1))


def test_stages_are_those_of_the_curriculum():
    """4, 2 and 1 steps; a fifth of the training, and two fifths for each of the last two."""
    objective = predecessor()
    assert [objective.stage(progress)[0] for progress in (0.0, 0.19, 0.2, 0.59, 0.6, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert objective.stage(0.4) == (1, pytest.approx(0.5))
    # the same times along a teacher that stays are one stage
    config = Consistency(Teacher(), NextGrid(Halving(4)))
    assert config.build(GaussianOracle(VE())).stage(0.4) == (0, 0.4)


def test_a_promoted_student_is_the_teacher_from_then_on():
    objective, student = predecessor(), GaussianConsistency(VE(), tilt=0.3)
    teacher = objective.trajectory.teacher
    assert float(teacher.tilt.detach()) == pytest.approx(0.1)
    student.network.anchor.data.fill_(7.0)
    objective.promote(student)
    assert float(teacher.network.anchor.detach()) == 7.0
    student.network.anchor.data.fill_(8.0)  # a copy: the student moves on
    assert float(teacher.network.anchor.detach()) == 7.0
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    objective.train()
    assert not teacher.training


def test_guidance_is_learned_once():
    """The first student is trained on the guided teacher: guided again as a teacher, it would overshoot."""
    data = GaussianOracle(VE(), 0.1, 0.4)
    config = Consistency(Predecessor(guidance=3.0), NextGrid(Halving(4), Karras()))
    objective = config.build(learned(data, EDM(), means=(0.1, 0.6)))
    x, t, s = normal(2, 1, 2, 2), *(torch.full((2,), time, dtype=torch.float64) for time in (2.0, 1.0))
    sample = PathSample(x, t, x, x, torch.tensor([0, 1]))
    student = learned(data, EDM(), means=(0.1, 0.6))

    def asked(trajectory):
        """The clean image of the first label's teacher, and how far the second label is from it."""
        landed = trajectory.step(student, sample, s)
        plain = Predecessor().bind(student).step(student, sample._replace(labels=None), s)
        return (landed - plain).flatten(1).mean(1)

    guided = asked(objective.trajectory)
    objective.promote(student)
    plain = asked(objective.trajectory)
    torch.testing.assert_close(guided, 3 * plain, rtol=1e-6, atol=1e-9)
    assert float(plain[1]) > 0.05
    resumed = config.build(learned(data, EDM(), means=(0.1, 0.6)))
    torch.testing.assert_close(asked(resumed.trajectory), guided)
    resumed.load_state_dict(objective.state_dict())
    torch.testing.assert_close(asked(resumed.trajectory), plain)


def test_the_teacher_is_saved_and_its_own_copy_left_alone():
    oracle = GaussianOracle(VE(), MEAN, STD)
    objective = Consistency(Predecessor(), NextGrid(Halving(4))).build(oracle)
    student = GaussianOracle(VE(), MEAN, STD)
    student.network.anchor.data.fill_(5.0)
    objective.promote(student)
    assert float(oracle.network.anchor.detach()) == 0.0
    other = Consistency(Predecessor(), NextGrid(Halving(4))).build(GaussianOracle(VE(), MEAN, STD))
    other.load_state_dict(objective.state_dict())
    assert float(other.trajectory.teacher.network.anchor.detach()) == 5.0


@pytest.mark.parametrize("student", [GaussianConsistency(Trig()), FlowMap(nn.Identity(), VE(), Velocity())])
def test_a_student_that_cannot_take_its_teachers_place_is_refused(student):
    with pytest.raises(ConfigError, match="differ in path or parameterization"):
        value(predecessor(), student, gaussian_batch(4))


# Refusals.


def test_an_adaptive_average_needs_a_grid_to_adapt_to():
    with pytest.raises(ValueError, match="grid"):
        Consistency(Data(), EASY, target=AdaptiveAverage())
    assert Consistency(Data(), Adjacent(curriculum=Constant(9)), target=AdaptiveAverage(0.9)).decay(
        0.0
    ) == pytest.approx(math.exp(2 * math.log(0.9) / 9))
    assert Consistency(Data(), EASY, target=Online()).decay(0.5) == 0.0
