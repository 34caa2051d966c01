"""Consistency distillation and training against closed forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from cmtool import rng
from cmtool.errors import ConfigError
from cmtool.flow import VE, Linear, Trig
from cmtool.solvers import DDIM, DPMSolver2, Euler, Heun
from cmtool.times import Adjacent, Constant, Karras
from cmtool.training.distances import L1, L2, LPIPS, PseudoHuber
from cmtool.training.objectives import Consistency, Denoising
from cmtool.training.targets import MovingAverage
from cmtool.training.trajectory import Batch, Data, PathSample, Teacher
from tests import models
from tests.models import micro
from tests.objectives.gaussian import GAUSSIAN, MEAN, STD, gaussian_batch, generator, normal, paths, short
from tests.objectives.quadrature import Given, expectation
from tests.oracles import GaussianConsistency, GaussianOracle

DISTANCES = [L2(), L1(), PseudoHuber(c=0.03)]


def distillation(path, substeps, distance=None, num=18, solver=None):
    config = Consistency(Teacher(solver or Heun(), substeps), Adjacent(curriculum=Constant(num)), distance or L2())
    return config.build(GaussianOracle(path, MEAN, STD))


def value(objective, model, batch, target=None):
    return objective(model, target or model, batch, 0.0, generator(2)).value


# The optimum of distillation.


@paths
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda distance: distance.kind)
def test_the_exact_consistency_function_has_no_loss_with_an_exact_teacher(path, distance):
    batch, objective = gaussian_batch(), distillation(path, 64, distance)
    exact = float(value(objective, GaussianConsistency(path, MEAN, STD), batch).detach())
    bent = float(value(objective, GaussianConsistency(path, MEAN, STD, tilt=0.3), batch).detach())
    wrong = float(value(objective, GaussianConsistency(path, MEAN, 1.4 * STD), batch).detach())
    small = {L1: 1e-6, L2: 1e-12, PseudoHuber: 1e-10}[type(distance)]
    assert exact < small
    assert bent > 1000 * small
    assert wrong > 1000 * small


@paths
@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMSolver2()], ids=lambda solver: solver.kind)
def test_what_loss_is_left_is_the_teachers_solver_error(path, solver):
    """With n sub-steps of order p the target is off by n^-p, its square by n^-2p."""
    batch, model = gaussian_batch(), GaussianConsistency(path, MEAN, STD)
    losses = [float(value(distillation(path, n, solver=solver), model, batch).detach()) for n in (4, 8, 16, 32)]
    for coarse, fine in pairwise(losses):
        assert coarse / fine == pytest.approx(4**solver.order, rel=0.1)


@paths
@pytest.mark.parametrize("distance", [L2(), PseudoHuber(c=0.03)], ids=lambda distance: distance.kind)
def test_the_exact_consistency_function_is_stationary(path, distance):
    batch, objective = gaussian_batch(), distillation(path, 64, distance)
    grads = []
    for tilt in (0.0, 0.2):
        model = GaussianConsistency(path, MEAN, STD, tilt=tilt)
        target = GaussianConsistency(path, MEAN, STD)
        value(objective, model, batch, target).backward()
        grads.append(abs(float(model.tilt.grad)))
    assert grads[0] < 1e-3 * grads[1]
    assert grads[1] > 1e-3


@paths
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda distance: distance.kind)
@pytest.mark.parametrize("trajectory", ["teacher", "data"])
def test_the_gradient_is_that_of_the_loss_with_the_target_held_fixed(path, distance, trajectory):
    config = (
        Consistency(Teacher(), Adjacent(), distance)
        if trajectory == "teacher"
        else Consistency(Data(), Adjacent(), distance)
    )
    objective = config.build(GaussianOracle(path, MEAN, STD))
    batch, h = gaussian_batch(64), 1e-5
    target = GaussianConsistency(path, MEAN, STD, tilt=0.1)
    model = GaussianConsistency(path, MEAN, STD, tilt=0.1)
    value(objective, model, batch, target).backward()
    up, down = (
        float(value(objective, GaussianConsistency(path, MEAN, STD, tilt=0.1 + step), batch, target).detach())
        for step in (h, -h)
    )
    assert float(model.tilt.grad) == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-9)
    assert target.tilt.grad is None
    # an online target is the same numbers: the model's own output, without gradient
    online = GaussianConsistency(path, MEAN, STD, tilt=0.1)
    value(objective, online, batch).backward()
    torch.testing.assert_close(online.tilt.grad, model.tilt.grad, rtol=1e-12, atol=0)


# Consistency training, theorem 2 of Song et al. (2023): its gradient is distillation's as the grid grows finer.


def gradients(path, trajectory, parameter, t, r, n=24):
    """d loss / d parameter with an online target, as an expectation over data and noise."""
    batch, times, rule = expectation(path, GAUSSIAN, t, r, n)
    config = Consistency(trajectory, times, L2(), rule)
    objective = config.build(GaussianOracle(path, MEAN, STD))
    model = GaussianConsistency(path, MEAN, STD, tilt=0.4)
    if parameter == "std":
        model = GaussianConsistency(path, MEAN, nn.Parameter(torch.tensor(0.8, dtype=torch.float64)))
    objective(model, model, batch, 0.0, generator()).value.backward()
    return float(getattr(model, parameter).grad)


def pairs(path, num):
    grid = Karras(path.rho).times(path, num).double()
    return grid[:-1], grid[1:]


@short
@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=lambda solver: solver.kind)
def test_training_has_the_gradient_of_distillation_on_a_fine_grid(path, solver):
    distillation, difference = [], []
    for num in (41, 81, 161):
        distillation.append(gradients(path, Teacher(solver), "tilt", *pairs(path, num)))
        difference.append(gradients(path, Data(), "tilt", *pairs(path, num)) - distillation[-1])
    # the gradient falls as the step between neighbours, what separates the two as its square
    for coarse, fine in pairwise(distillation):
        assert coarse / fine == pytest.approx(2, rel=0.12)
    for coarse, fine in pairwise(difference):
        assert coarse / fine == pytest.approx(4, rel=0.12)
    assert 1e-4 < abs(difference[-1] / distillation[-1]) < 0.05


@short
@pytest.mark.parametrize("num", [5, 18])
def test_for_a_model_that_is_linear_in_x_they_are_equal_on_any_grid(path, num):
    """E[x_r | x_t] is one Euler step of the exact teacher (on `Trig` x_t turns: there it is a step of DDIM)."""
    step = DDIM() if isinstance(path, Trig) else Euler()
    teacher, data = (gradients(path, trajectory, "std", *pairs(path, num)) for trajectory in (Teacher(step), Data()))
    assert data == pytest.approx(teacher, rel=1e-9)
    assert abs(data) > 1e-4
    assert abs(gradients(path, Teacher(Heun()), "std", *pairs(path, num)) / data - 1) > 1e-3


@short
def test_the_quadrature_is_converged(path):
    coarse, fine = (gradients(path, Data(), "tilt", *pairs(path, 11), n) for n in (24, 40))
    assert coarse == pytest.approx(fine, rel=1e-8)


@short
def test_the_pull_of_training_away_from_the_exact_function_vanishes_on_a_fine_grid(path):
    """It falls as the square of the step, the gradient elsewhere as the step itself."""
    grads = {}
    for num in (21, 41, 81):
        batch, times, rule = expectation(path, GAUSSIAN, *pairs(path, num), n=24)
        objective = Consistency(Data(), times, L2(), rule).build()
        for tilt in (0.0, 0.4):
            model = GaussianConsistency(path, MEAN, STD, tilt=tilt)
            objective(model, model, batch, 0.0, generator()).value.backward()
            grads[num, tilt] = abs(float(model.tilt.grad))
    for coarse, fine in ((21, 41), (41, 81)):
        assert grads[coarse, 0.0] / grads[fine, 0.0] > 1.7 * grads[coarse, 0.4] / grads[fine, 0.4]
    assert grads[81, 0.0] < 0.1 * grads[81, 0.4]


# A teacher of another path.

VIEWS = [(VE(), Trig()), (Trig(), VE()), (VE(), Linear().like(VE())), (Linear(), Trig()), (Trig(), Linear().like(VE()))]


@pytest.mark.parametrize(("own", "path"), VIEWS, ids=lambda path: path.kind)
def test_a_teacher_is_read_on_the_students_path(own, path):
    """It is the same teacher: the exact one leaves the exact function no loss, and every step is that of its twin."""
    batch = gaussian_batch()
    config = Consistency(Teacher(Heun(), 64, Karras(path.rho)), Adjacent(Karras(path.rho)))
    losses = []
    for model in (GaussianConsistency(path, MEAN, STD), GaussianConsistency(path, MEAN, STD, tilt=0.1)):
        from_afar, at_home = (
            value(config.build(GaussianOracle(where, MEAN, STD)), model, batch).detach() for where in (own, path)
        )
        losses.append(float(from_afar))
        torch.testing.assert_close(from_afar, at_home, rtol=1e-3, atol=1e-9)
    assert losses[0] < 1e-6 * losses[1]


# Who is called with what.


class Spy(GaussianConsistency):
    """Keeps what its jumps were asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def jump(self, x_t, t, s, labels=None, augment=None):
        self.calls.append((x_t.detach().clone(), t, s, labels, torch.is_grad_enabled()))
        return super().jump(x_t, t, s, labels)


@paths
def test_the_model_stands_at_t_and_the_target_at_r(path):
    t, r = (
        torch.tensor(share) * (path.t_max - path.t_min) + path.t_min for share in ([0.5, 0.9, 0.2], [0.4, 0.1, 0.0])
    )
    s = torch.full_like(t, path.t_min)
    batch = Batch(normal(3, 1, 2, 2), torch.tensor([2, 0, 1]), normal(3, 1, 2, 2, seed=1))
    model, target = Spy(path), Spy(path)
    loss = Consistency(Data(), Given(t, r, s), L2()).build()(model, target, batch, 0.0, generator())
    ((x_t, at, land, labels, grad),) = model.calls
    assert torch.equal(x_t, path.mix(batch.x0, batch.eps, t))
    assert (at is t, land is s, labels is batch.labels, grad) == (True, True, True, True)
    ((x_r, at, land, labels, grad),) = target.calls
    assert torch.equal(x_r, path.mix(batch.x0, batch.eps, r))
    assert (at is r, land is s, labels is batch.labels, grad) == (True, True, True, False)
    f, goal = (GaussianConsistency(path).jump(x, at, s) for x, at in ((x_t, t), (x_r, r)))
    torch.testing.assert_close(loss.per_sample, (f - goal).square().mean((1, 2, 3)).detach())
    torch.testing.assert_close(loss.value, loss.per_sample.mean())
    assert loss.t is t


class SlowTeacher(GaussianOracle):
    """Keeps the times and labels it was called with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.times, self.labels = [], []

    def denoised(self, x_t, t, labels=None, augment=None):
        self.times.append(t.clone())
        self.labels.append(labels)
        return super().denoised(x_t, t)


@paths
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_substeps_are_even_in_the_coordinate_of_the_grid(path, rho):
    """Three sub-steps between neighbours of a grid are the points of one three times as fine."""
    grid, fine = Karras(rho).times(path, 6), Karras(rho).times(path, 16)
    teacher = SlowTeacher(path)
    trajectory = Teacher(Euler(), 3, Karras(rho)).bind(teacher)
    t, r, labels = grid[:-1], grid[1:], torch.arange(5)
    x = normal(5, 1, 2, 2).float()
    trajectory.step(teacher, PathSample(x, t, x, x, labels), r)
    assert len(teacher.times) == 3
    for i, found in enumerate(teacher.times):
        torch.testing.assert_close(found, fine[i : 15 + i : 3], rtol=1e-5, atol=1e-7)
    assert all(given is labels for given in teacher.labels)


@paths
def test_a_substep_ends_exactly_where_it_is_asked_to(path):
    oracle = GaussianOracle(path, MEAN, STD)
    t, r = Karras().times(path, 6)[:-1].double(), Karras().times(path, 6)[1:].double()
    x = normal(5, 1, 2, 2)
    for substeps in (1, 40):
        moved = Teacher(Heun(), substeps).bind(oracle).step(oracle, PathSample(x, t, x, x, None), r)
        exact = oracle.jump(x, t, r)
        torch.testing.assert_close(moved, exact, rtol=0, atol=2.0 if substeps == 1 else 2e-3)


def test_the_teacher_is_frozen_and_in_evaluation_mode():
    teacher = models.model("denoiser").train().requires_grad_(True)
    objective = Consistency(Teacher()).build(teacher)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert list(objective.parameters()) == []  # it is no part of what is trained or saved
    objective.train()
    assert not teacher.training


def test_fresh_noise_is_normal_and_belongs_to_the_generator():
    batch = Batch(torch.zeros(4, 3, 32, 32))
    t = torch.full((4,), 1.0)
    model = Spy(VE())
    objective = Consistency(Data(), Given(t, t / 2, torch.full_like(t, 0.002)), L2()).build()
    for seed in (5, 5, 6):
        objective(model, model, batch, 0.0, generator(seed))
    first, again, other = (model.calls[index][0] for index in (1, 3, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.mean()) == pytest.approx(0, abs=4 / 111)
    assert float(first.std()) == pytest.approx(1, abs=4 / 157)
    torch.testing.assert_close(model.calls[0][0], first / 2)  # t and r share their noise


# Dropout.


def dropping(label_dropout=0.0):
    return models.model(config=micro(num_classes=3, dropout=0.5, label_dropout=label_dropout)).train()


@pytest.mark.parametrize("label_dropout", [0.0, 0.5])
def test_model_and_target_drop_the_same_units(label_dropout):
    model = dropping(label_dropout)
    t = torch.full((8,), 2.0)
    batch = Batch(normal(8, 3, 8, 8, dtype=torch.float32), torch.arange(8) % 3)
    objective = Consistency(Data(), Given(t, t, torch.full_like(t, 0.002)), L2()).build()
    copy = dropping(label_dropout)  # a target with weights of its own, as a moving average is
    for target in (model, copy):
        loss = objective(model, target, batch, 0.0, generator())
        assert torch.equal(loss.per_sample, torch.zeros(8))
    # the masks are there, and new with every step
    x = normal(8, 3, 8, 8, dtype=torch.float32)
    assert not torch.equal(model.jump(x, t, t / 2, batch.labels), model.jump(x, t, t / 2, batch.labels))


def test_masks_change_from_step_to_step():
    model = dropping()
    t = torch.full((4,), 2.0)
    x = normal(4, 3, 8, 8, dtype=torch.float32)
    batch = Batch(x, torch.arange(4) % 3, x)
    objective = Denoising(times=Given(t, t, t)).build()
    losses = [float(objective(model, model, batch, 0.0, generator(seed)).value) for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_objectives_leave_the_global_generator_alone():
    model, state = dropping(), torch.get_rng_state()
    batch = Batch(normal(4, 3, 8, 8, dtype=torch.float32), torch.arange(4) % 3)
    for config in (Consistency(Data()), Denoising()):
        config.build()(model, model, batch, 0.0, generator())
    assert torch.equal(torch.get_rng_state(), state)
    with rng.forked(1, "cpu"):
        pass
    assert torch.equal(torch.get_rng_state(), state)


# Refusals.


def test_a_teacher_where_there_must_be_one():
    assert Consistency(Teacher()).needs_teacher
    assert not Consistency(Data()).needs_teacher
    assert not Denoising().needs_teacher
    with pytest.raises(ConfigError, match="teacher"):
        Consistency(Teacher()).build()
    with pytest.raises(ValueError, match="substeps"):
        Teacher(substeps=0)


def test_lpips_needs_its_trunk():
    for config in (replace(Consistency(Data()), distance=LPIPS()), Denoising(distance=LPIPS())):
        with pytest.raises(ValueError, match="trunk"):
            config.build()


def test_the_target_rule_is_data_of_the_objective():
    assert Consistency(target=MovingAverage(0.9)).target.decay(0.5, 18) == 0.9
