"""`Continuous`: theorems 3 to 6 of Song et al. (2023), against discrete objectives and closed forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.autograd import functional

from cmtool.flow import EDM, VE, BoundaryEDM, Linear
from cmtool.networks import MLPConfig
from cmtool.times import Karras, RhoUniform, Tangential
from cmtool.training import weights
from cmtool.training.distances import L1, L2, LPIPS, PseudoHuber
from cmtool.training.objectives import Consistency, Continuous, ContinuousLoss, Ingredients
from cmtool.training.trajectory import Data, Teacher
from tests import models
from tests.models import trunk
from tests.objectives.gaussian import (
    GAUSSIAN,
    MEAN,
    STD,
    Exact,
    Wide,
    gaussian_batch,
    generator,
    paths,
    short,
)
from tests.objectives.quadrature import Given, expectation, legendre
from tests.oracles import GaussianConsistency, GaussianOracle, MixtureOracle

SMOOTH = [L2(), PseudoHuber(0.3)]
DISTANCES = [*SMOOTH, L1()]
distances = pytest.mark.parametrize("distance", DISTANCES, ids=lambda distance: distance.kind)


def somewhere(path):
    t = path.time(torch.tensor([0.1, 0.5, 1.5, 6.0], dtype=torch.float64))
    return Given(t, t, torch.full_like(t, path.t_min))


def slope_of(model, batch, times, oracle=None):
    """f and L f along the exact teacher, by differentiating backwards twice."""
    oracle = oracle or GaussianOracle(model.path, MEAN, STD)
    x_t = model.path.mix(batch.x0, batch.eps, times.t)
    v = oracle.velocity(x_t, times.t)
    return functional.jvp(lambda x, t: model.jump(x, t, times.s), (x_t, times.t), (v, torch.ones_like(times.t)))


def build(path, distance=None, trajectory=None, times=None, stop_gradient=True, **rest):
    config = Continuous(
        trajectory or Teacher(), times or somewhere(path), distance or L2(), stop_gradient=stop_gradient, **rest
    )
    return config.build(GaussianOracle(path, MEAN, STD))


def run(objective, model, batch, target=None):
    return objective(model, target or model, batch, 0.0, generator(2))


# Values: theorems 3 and 4.


@paths
def test_the_loss_is_the_square_or_the_size_of_the_derivative(path):
    """E[norm2(L f)^2] for squared l2, E[norm1(L f)] for l1, as means over the image, weighted."""
    batch, times = gaussian_batch(4), somewhere(path)
    model = GaussianConsistency(path, MEAN, STD, tilt=0.3)
    _, slope = slope_of(model, batch, times)
    by_hand = {
        L2(): slope.square().mean((1, 2, 3)),
        L1(): slope.abs().mean((1, 2, 3)),
        PseudoHuber(0.3): slope.square().sum((1, 2, 3)) / 0.6,
    }
    weight = weights.Karras(power=1)
    for distance, expected in by_hand.items():
        found = run(build(path, distance, weight=weight, stop_gradient=False), model, batch)
        torch.testing.assert_close(found.per_sample, weight(path, times) * expected, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(found.value.detach(), found.per_sample.mean())
        assert bool((found.per_sample > 1e-12).all())


@paths
@distances
def test_the_gradient_of_the_derivative_is_that_of_finite_differences(path, distance):
    """Without stop_gradient it runs through the forward-mode derivative."""
    objective, batch, h = build(path, distance, stop_gradient=False), gaussian_batch(4), 1e-5
    model = GaussianConsistency(path, MEAN, STD, tilt=0.3)
    run(objective, model, batch).value.backward()
    up, down = (
        float(run(objective, GaussianConsistency(path, MEAN, STD, tilt=0.3 + step), batch).value.detach())
        for step in (h, -h)
    )
    assert float(model.tilt.grad) == pytest.approx((up - down) / (2 * h), rel=1e-6)
    assert abs(float(model.tilt.grad)) > 1e-4


# (of l1 under stop_gradient, the sign of a derivative that is zero is a matter of rounding)
@paths
@pytest.mark.parametrize(
    ("distance", "stop_gradient"),
    [(L1(), False), *((distance, stop) for distance in SMOOTH for stop in (True, False))],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_the_exact_function_is_stationary(path, distance, stop_gradient):
    losses, grads = [], []
    for tilt in (0.0, 0.2):
        model = GaussianConsistency(path, MEAN, STD, tilt=tilt)
        loss = run(build(path, distance, stop_gradient=stop_gradient), model, gaussian_batch(4)).value
        loss.backward()
        losses.append(abs(float(loss.detach())))
        grads.append(abs(float(model.tilt.grad)))
    assert losses[0] < 1e-10 < 1e-4 * losses[1]
    assert grads[0] < 1e-10 or isinstance(distance, L1)
    assert grads[1] > 1e-4


# The stop-gradient forms: theorems 5 and 6.


def perceptron(path, channels=1, side=2):
    """With EDM's scalings, whose jump to t_min is not quite its estimate."""
    config = MLPConfig(resolution=side, in_channels=channels, out_channels=channels, width=16, depth=1)
    return models.model("consistency", config, path, EDM()).double().requires_grad_(True)


@paths
@distances
def test_the_gradient_is_that_of_f_g_slope(path, distance):
    """d/dtheta E[f^T G(f-) L f-], with G from autograd's Hessian of the distance where both images are one."""
    batch, times, model = gaussian_batch(4), somewhere(path), perceptron(path)
    found = torch.autograd.grad(run(build(path, distance), model, batch).value, list(model.parameters()))
    f, slope = (x.detach() for x in slope_of(model, batch, times))
    if isinstance(distance, L1):
        pull = slope.sign() / slope[0].numel()  # of |f - (f- + h L f)| / h
    else:
        pull = torch.stack(
            [
                (
                    functional.hessian(lambda a, b=b: distance(a[None], b[None]).sum(), b).reshape(4, 4) @ u.flatten()
                ).view_as(b)
                for b, u in zip(f, slope, strict=True)
            ]
        )
    estimate = model.jump(path.mix(batch.x0, batch.eps, times.t), times.t, times.s)
    expected = torch.autograd.grad((estimate * pull).sum() / len(f), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
    assert max(float(grad.abs().max()) for grad in found) > 1e-3


def test_for_squared_l2_it_is_theorem_5():
    """2 E[lambda f^T (d f- / dt - t (d f- / dx) s)] on VE, s the score of the noisy data."""
    path, batch, times = VE(), gaussian_batch(4), somewhere(VE())
    model = GaussianConsistency(path, MEAN, STD, tilt=0.3)
    x_t, t = path.mix(batch.x0, batch.eps, times.t), times.t.clone().requires_grad_()
    score = -(x_t - MEAN) / (STD**2 + times.t[:, None, None, None] ** 2)
    x_t.requires_grad_()
    f = model.jump(x_t, t, times.s)
    # every pixel by itself, so that d f / dx is diagonal; d f / dt pixel by pixel
    (df_dx,) = torch.autograd.grad(f.sum(), x_t, retain_graph=True)
    df_dt = torch.stack(
        [torch.autograd.grad(f[:, :, i, j].sum(), t, retain_graph=True)[0] for i in (0, 1) for j in (0, 1)]
    )
    df_dt = df_dt.T.reshape(4, 1, 2, 2)
    slope = df_dt - times.t[:, None, None, None] * df_dx * score
    expected = 2 * (f * slope).mean((1, 2, 3))
    found = run(build(path), model, batch)
    torch.testing.assert_close(found.per_sample, expected.detach(), rtol=1e-9, atol=1e-12)


@paths
@distances
def test_the_gradient_is_that_of_the_pseudo_objective_with_the_target_held_fixed(path, distance):
    objective, batch, h = build(path, distance), gaussian_batch(4), 1e-5
    target, model = (GaussianConsistency(path, MEAN, STD, tilt=0.1) for _ in range(2))
    run(objective, model, batch, target).value.backward()
    up, down = (
        float(run(objective, GaussianConsistency(path, MEAN, STD, tilt=0.1 + step), batch, target).value.detach())
        for step in (h, -h)
    )
    assert float(model.tilt.grad) == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-12)
    assert target.tilt.grad is None
    assert abs(float(model.tilt.grad)) > 1e-5


@short
@pytest.mark.parametrize("distance", [*SMOOTH, L1()], ids=lambda distance: distance.kind)
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_theorem_6_training_has_the_gradient_of_distillation(path, distance, data):
    """In expectation over data and noise, exactly; not for l1, which is not linear in L f."""
    mixture = MixtureOracle(path)
    oracle, components = {
        "gaussian": (GaussianOracle(path, MEAN, STD), GAUSSIAN),
        "mixture": (mixture, [(w, m, mixture.std) for w, m in zip(mixture.weights, mixture.means, strict=True)]),
    }[data]
    batch, times, rule = expectation(path, components, path.time(torch.tensor([0.6, 1.5]).double()), n=48)
    found = []
    for trajectory in (Teacher(), Data()):
        model = GaussianConsistency(path, 0.1, 0.8, tilt=0.4)
        objective = Continuous(trajectory, times, distance, rule).build(oracle)
        run(objective, model, batch).value.backward()
        found.append(float(model.tilt.grad))
    if isinstance(distance, L1):
        assert abs(found[1] / found[0] - 1) > 1e-2
    else:
        assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert abs(found[0]) > 1e-4


def test_without_stop_gradient_the_data_will_not_do():
    with pytest.raises(ValueError, match="stop_gradient"):
        Continuous(Data(), stop_gradient=False)
    assert Continuous(Teacher(), stop_gradient=False).needs_teacher


def test_a_square_of_the_datas_tangent_is_no_square_of_the_odes():
    """Why: the gradients differ, in expectation, by the spread of the data's tangent."""
    path = VE(0.002, 2.0)
    batch, times, rule = expectation(path, GAUSSIAN, path.time(torch.tensor([0.6, 1.5]).double()), n=32)
    found = []
    for trajectory in (Teacher(), Data()):
        config = Continuous(Teacher(), times, L2(), rule, stop_gradient=False)
        object.__setattr__(config, "trajectory", trajectory)  # past the refusal
        model = GaussianConsistency(path, MEAN, STD, tilt=0.4)
        run(
            ContinuousLoss(config, Ingredients(GaussianOracle(path, MEAN, STD), None, None)), model, batch
        ).value.backward()
        found.append(float(model.tilt.grad))
    assert abs(found[1] / found[0] - 1) > 0.1


# The limit of the discrete objectives.


@paths
@distances
def test_the_discrete_loss_of_close_neighbours_tends_to_it(path, distance):
    """d(f(x_t, t), f(x_r, r)) / h^2, or / h for l1, with h = t - r that halves."""
    batch, times = gaussian_batch(4), somewhere(path)
    model = GaussianConsistency(path, MEAN, STD, tilt=0.3)
    limit = run(build(path, distance, stop_gradient=False), model, batch).per_sample
    power = 1 if isinstance(distance, L1) else 2
    errors = []
    for h in (0.008, 0.004, 0.002, 0.001):
        t, step = times.t, h * times.t
        near = Consistency(Teacher(Exact()), Given(t, t - step, times.s), distance).build(
            GaussianOracle(path, MEAN, STD)
        )
        errors.append(float((run(near, model, batch).per_sample / step**power / limit - 1).abs().mean()))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.1)


@short
@pytest.mark.parametrize("distance", [L2(), PseudoHuber(1.0)], ids=lambda distance: distance.kind)
def test_on_a_grid_distillation_times_the_square_of_its_points_tends_to_it(path, distance):
    """Theorems 3 and 5: N^2 times the loss, N times its gradient under stop_gradient; t' du is the step of the grid."""
    grid, oracle = Karras(path.rho), GaussianOracle(path, MEAN, STD)
    top, bottom = path.t_max ** (1 / path.rho), path.t_min ** (1 / path.rho)

    def time(u):
        return (top + u * (bottom - top)) ** path.rho, path.rho * (top - bottom) * (top + u * (bottom - top)) ** (
            path.rho - 1
        )

    def both(config, batch):
        """The value without stop_gradient of a continuous one; the gradient with it."""
        model = GaussianConsistency(path, MEAN, STD, tilt=0.4)
        loss = run(config.build(oracle), model, batch).value
        loss.backward()
        return float(loss.detach()), float(model.tilt.grad)

    u, w = legendre(24)
    t, rate = time(u)
    batch, times, _ = expectation(path, GAUSSIAN, t, n=24)
    squared, linear = (expectation(path, GAUSSIAN, t, n=24, shares=w * rate**power)[2] for power in (2, 1))
    limits = (
        both(Continuous(Teacher(), times, distance, squared, stop_gradient=False), batch)[0],
        both(Continuous(Teacher(), times, distance, linear, stop_gradient=True), batch)[1],
    )
    errors = []
    for num in (41, 81, 161):
        steps = num - 1
        points = time(torch.arange(num).double() / steps)[0]
        torch.testing.assert_close(points, grid.times(path, num).double(), rtol=1e-6, atol=1e-9)
        batch, times, rule = expectation(path, GAUSSIAN, points[:-1], points[1:], n=24)
        value, gradient = both(Consistency(Teacher(Exact()), times, distance, rule), batch)
        errors.append((steps**2 * value / limits[0] - 1, steps * gradient / limits[1] - 1))
    for coarse, fine in pairwise(errors):
        assert coarse[0] / fine[0] == pytest.approx(4, rel=0.1)  # the loss is symmetric in its neighbours
        assert coarse[1] / fine[1] == pytest.approx(2, rel=0.1)
    assert all(abs(error) < 0.05 for error in errors[-1])


def test_times_and_weights_reach_the_loss():
    path, batch = Linear(), gaussian_batch(64)
    model = GaussianConsistency(path, MEAN, STD, tilt=0.3)
    sampler = Wide(Tangential(RhoUniform(Karras(1.0))))
    plain, weighted = (
        run(build(path, times=sampler, weight=weight), model, batch)
        for weight in (weights.Uniform(), weights.InverseRatio())
    )
    t = sampler(path, 64, 0.0, generator(2)).t
    torch.testing.assert_close(plain.t, t)
    torch.testing.assert_close(weighted.per_sample, plain.per_sample / path.ratio(t))
    assert set(plain.terms) == {"continuous loss"}


# LPIPS.


@pytest.mark.slow
def test_the_form_of_lpips():
    """Forward over the features for the value, and back through that for the pull: both against the distance itself."""
    path, side = VE(), 16
    distance = LPIPS("alex").build(trunk()).double()
    model = perceptron(path, 3, side)
    t = torch.tensor([0.5], dtype=torch.float64)
    times = Given(t, t, torch.full_like(t, path.t_min))
    batch = gaussian_batch(1, (3, side, side))
    f, slope = (x.detach() for x in slope_of(model, batch, times))
    given = Ingredients(GaussianOracle(path, MEAN, STD), None, trunk())
    for stop_gradient in (False, True):
        objective = ContinuousLoss(
            Continuous(Teacher(), times, LPIPS("alex"), stop_gradient=stop_gradient), given
        ).double()
        loss = run(objective, model, batch)
        found = torch.autograd.grad(loss.value, list(model.parameters()))
        # the Hessian of the distance at coincidence, times the slope
        leaf = f.clone().requires_grad_()
        (first,) = torch.autograd.grad(distance(leaf, f).sum(), leaf, create_graph=True)
        (pull,) = torch.autograd.grad((first * slope).sum(), leaf)
        if not stop_gradient:
            assert float(loss.value.detach()) == pytest.approx(float((pull * slope).sum()) / 2, rel=1e-4)
            assert all(bool(grad.isfinite().all()) for grad in found)
            continue
        estimate = model.jump(path.mix(batch.x0, batch.eps, t), t, times.s)
        expected = torch.autograd.grad((estimate * pull).sum(), list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()))


def test_a_network_with_attention_differentiates_twice():
    """Without stop_gradient, weights of every layer are reached through the derivative."""
    model = models.model("consistency", models.micro(in_channels=1, out_channels=1), VE(), BoundaryEDM())
    model.requires_grad_(True)
    batch = gaussian_batch(2, (1, 8, 8))
    batch = batch._replace(x0=batch.x0.float(), eps=batch.eps.float())
    config = Continuous(Teacher(), Tangential(RhoUniform()), L2(), weights.Karras(power=1), stop_gradient=False)
    run(config.build(GaussianOracle(VE(), MEAN, STD)), model, batch).value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert sum(bool((parameter.grad != 0).any()) for parameter in model.parameters()) > 20
