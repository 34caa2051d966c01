"""Denoising: its optimum is the posterior mean, its least loss the posterior variance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmtool.errors import ConfigError
from cmtool.flow import EDM, VE, Linear, Velocity
from cmtool.networks import MLPConfig
from cmtool.solvers import Heun
from cmtool.times import Karras, LogNormal
from cmtool.training import weights
from cmtool.training.distances import L2, PseudoHuber
from cmtool.training.objectives import Denoising
from cmtool.training.tangents import Adaptive, Learned
from cmtool.training.trajectory import Batch, Teacher
from tests import models
from tests.objectives.gaussian import MEAN, STD, Exact, Wide, gaussian_batch, generator, normal, paths
from tests.objectives.quadrature import Given, expectation, hermite
from tests.oracles import GaussianOracle, MixtureOracle

LEVELS = torch.tensor([0.1, 0.5, 1.0, 2.5], dtype=torch.float64)  # sigma / alpha

oracles = pytest.mark.parametrize("kind", [GaussianOracle, MixtureOracle])


def bent(kind):
    """The oracle plus tilt sin(2 x + 1): wrong in a way that is not linear."""

    class Bent(kind):
        def __init__(self, path, tilt):
            super().__init__(path)
            self.tilt = torch.nn.Parameter(torch.tensor(tilt, dtype=torch.float64))

        def denoised(self, x_t, t, labels=None, augment=None):
            return super().denoised(x_t, t) + self.tilt * torch.sin(2 * x_t + 1)

    return Bent


def components(oracle):
    if isinstance(oracle, MixtureOracle):
        return [(share, mean, oracle.std) for share, mean in zip(oracle.weights, oracle.means, strict=True)]
    return [(1.0, oracle.mean, oracle.std)]


def expected_loss(model, t, n=60):
    batch, times, rule = expectation(model.path, components(model), t, n=n)
    objective = Denoising(times=times, distance=L2(), weight=rule).build()
    return objective(model, model, batch, 0.0, generator()).value


@paths
@oracles
@pytest.mark.parametrize("level", LEVELS.tolist())
def test_the_exact_denoiser_is_stationary_and_best(path, kind, level):
    t = path.time(torch.tensor([level], dtype=torch.float64))
    losses, grads = {}, {}
    for tilt in (0.0, 0.1, -0.1):
        model = bent(kind)(path, tilt)
        loss = expected_loss(model, t)
        loss.backward()
        losses[tilt], grads[tilt] = float(loss.detach()), float(model.tilt.grad)
    assert abs(grads[0.0]) < 1e-4 * abs(grads[0.1])
    assert grads[0.1] > 0 > grads[-0.1]
    assert losses[0.0] < min(losses[0.1], losses[-0.1])
    # the loss is the least one plus tilt^2 E sin^2: E g (x0 - D) = 0
    assert losses[0.1] == pytest.approx(losses[-0.1], rel=1e-4)


@paths
def test_the_least_loss_is_the_posterior_variance(path):
    oracle = GaussianOracle(path)
    for level in LEVELS:
        t = path.time(level[None])
        variance = 1 / (1 / oracle.std**2 + 1 / level**2)
        assert float(expected_loss(oracle, t)) == pytest.approx(float(variance), rel=1e-9)


def test_the_gradient_in_expectation_is_twice_the_error_times_its_slope():
    """By hand, at one level on VE: d/d tilt of E (D + tilt g - x0)^2 = 2 tilt E g^2."""
    model = bent(GaussianOracle)(VE(), 0.3)
    expected_loss(model, torch.tensor([1.0], dtype=torch.float64)).backward()
    z, w = hermite(60)
    x = model.mean + (model.std**2 + 1) ** 0.5 * z
    assert float(model.tilt.grad) == pytest.approx(float(0.6 * (w * torch.sin(2 * x + 1) ** 2).sum()), rel=1e-8)


def test_the_published_loss_by_hand():
    """Karras et al. (2022), eq. 2 with table 1: lambda(sigma) |D - x0|^2, ln sigma ~ N(-1.2, 1.2^2)."""
    x0 = torch.rand(64, 3, 4, 4, generator=generator(1)) * 2 - 1
    oracle = GaussianOracle(VE(), image_shape=(3, 4, 4))
    config = Denoising()
    assert (config.times, config.weight) == (LogNormal(-1.2, 1.2), weights.Karras(0.5))
    batch = Batch(x0, None, torch.randn(64, 3, 4, 4, generator=generator(2)))
    loss = config.build()(oracle, oracle, batch, 0.0, generator(3))
    sigma = loss.t[:, None, None, None]
    error = oracle.denoised(x0 + sigma * batch.eps, loss.t) - x0
    by_hand = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * error**2).mean((1, 2, 3))
    torch.testing.assert_close(loss.per_sample, by_hand)
    torch.testing.assert_close(loss.value, by_hand.mean())
    assert torch.equal(loss.t, LogNormal(-1.2, 1.2)(VE(), 64, 0.0, generator(3)).t)


# Flow matching.


def perceptron(path, parameterization):
    config = MLPConfig(resolution=2, in_channels=1, out_channels=1, width=16, depth=1)
    return models.model("denoiser", config, path, parameterization).double().requires_grad_(True)


def test_on_the_straight_path_it_is_flow_matching():
    """|F - (eps - x0)|^2, Lipman et al. (2022), whatever the times."""
    path, batch = Linear(), gaussian_batch(64)
    model = perceptron(path, Velocity())
    loss = Denoising(Wide(LogNormal(0.0, 1.3)), weight=weights.VelocityError()).build()(
        model, model, batch, 0.0, generator()
    )
    t = loss.t[:, None, None, None]
    raw = model.network((1 - t) * batch.x0 + t * batch.eps, loss.t)
    torch.testing.assert_close(loss.per_sample, (raw - (batch.eps - batch.x0)).square().mean((1, 2, 3)).detach())
    assert float(loss.t.std()) > 0.1


@paths
@pytest.mark.parametrize("parameterization", [EDM(), Velocity()], ids=lambda kind: kind.kind)
def test_on_any_path_it_is_the_error_of_the_velocity(path, parameterization):
    batch, model = gaussian_batch(4), perceptron(path, parameterization)
    t = path.time(torch.tensor([0.1, 0.5, 1.5, 6.0], dtype=torch.float64))
    loss = Denoising(Given(t, t, t), weight=weights.VelocityError()).build()(model, model, batch, 0.0, generator())
    error = model.velocity(path.mix(batch.x0, batch.eps, t), t) - path.velocity(batch.x0, batch.eps, t)
    torch.testing.assert_close(loss.per_sample, error.square().mean((1, 2, 3)).detach())


def test_the_noise_of_the_batch_is_used_and_else_drawn():
    path, (x0, _, eps, _) = VE(), gaussian_batch(4)
    t = torch.tensor([0.1, 0.5, 1.5, 6.0], dtype=torch.float64)
    oracle = GaussianOracle(path, MEAN, STD)
    objective = Denoising(Given(t, t, t), weight=weights.Uniform()).build()
    with_noise, again, drawn, other = (
        objective(oracle, oracle, Batch(x0, None, noise), 0.0, generator(seed)).per_sample
        for noise, seed in ((eps, 0), (eps, 1), (None, 0), (None, 1))
    )
    expected = (oracle.denoised(path.mix(x0, eps, t), t) - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(with_noise, expected)
    assert torch.equal(with_noise, again)
    assert not torch.equal(drawn, other)
    assert not torch.equal(drawn, with_noise)


# ReFlow: pairs that a teacher's ODE makes.


class Straight(GaussianOracle):
    """The exact model of the pairs (x0, eps) with x0 = mean + std eps: they do not cross."""

    def posterior_mean(self, x_t, t):
        alpha, sigma = (f(t)[:, None, None, None] for f in (self.path.alpha, self.path.sigma))
        return self.mean + self.std * (x_t - alpha * self.mean) / (alpha * self.std + sigma)


class Keeper(Straight):
    """Keeps what it was asked for."""

    def denoised(self, x_t, t, labels=None, augment=None):
        self.asked = x_t, t, labels
        return super().denoised(x_t, t)


def reflow(solver, substeps=1, path=None):
    rho = 1.0 if path is None else path.rho
    return Denoising(Wide(LogNormal(0.0, 1.3)), weight=weights.Uniform(), pairs=Teacher(solver, substeps, Karras(rho)))


@paths
def test_the_pairs_are_solved_from_fresh_noise(path):
    """x0 is what the ODE makes of the noise, and x_t lies between the two: the image of the batch has no part in it."""
    model = Keeper(path, MEAN, STD)
    batch = gaussian_batch(16)
    objective = reflow(Exact()).build(GaussianOracle(path, MEAN, STD))
    labels = torch.arange(16)
    loss = objective(model, model, batch._replace(labels=labels), 0.0, generator(4))
    again = objective(model, model, Batch(normal(16, 1, 2, 2, seed=8), labels), 0.0, generator(4))
    assert torch.equal(loss.per_sample, again.per_sample)
    x_t, t, found = model.asked
    assert found is labels
    # what the noise was can be read off, since x0 is a function of it
    start, low = (torch.full((16,), time, dtype=torch.float64) for time in (path.t_max, path.t_min))
    alpha, sigma = (f(t)[:, None, None, None] for f in (path.alpha, path.sigma))
    exact = GaussianOracle(path, MEAN, STD)
    scale = exact.jump(path.sigma(start)[:, None, None, None] * torch.ones_like(x_t), start, low)
    offset = exact.jump(torch.zeros_like(x_t), start, low)
    slope = scale - offset
    eps = (x_t - alpha * offset) / (alpha * slope + sigma)
    assert abs(float(eps.mean())) < 4 / 8
    assert float(eps.std()) == pytest.approx(1, abs=0.4)
    x0 = exact.jump(path.sigma(start)[:, None, None, None] * eps, start, low)
    torch.testing.assert_close(path.mix(x0, eps, t), x_t, rtol=1e-6, atol=1e-6)
    error = model.posterior_mean(x_t, t) - x0
    torch.testing.assert_close(loss.per_sample, error.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-7)
    fresh = objective(model, model, batch, 0.0, generator(5))
    assert not torch.equal(fresh.per_sample, loss.per_sample)


@paths
def test_the_paths_of_solved_pairs_are_known_exactly(path):
    """ReFlow's loss goes down to nothing, as denoising's never does; what is left is the solver's error."""
    model, oracle, batch = Straight(path, MEAN, STD), GaussianOracle(path, MEAN, STD), gaussian_batch(64)
    exact, wrong, coarse, fine = (
        float(objective.build(oracle)(one, one, batch, 0.0, generator()).value)
        for objective, one in (
            (reflow(Exact()), model),
            (reflow(Exact()), oracle),
            (reflow(Heun(), 16, path), model),
            (reflow(Heun(), 32, path), model),
        )
    )
    assert exact < 1e-4 * wrong  # t_max and t_min are not quite pure noise and data
    assert 3 * (fine - exact) < coarse - exact < 1e-2 * wrong
    assert fine > exact


def test_the_image_of_a_pair_is_its_own_noises():
    """Stored pairs need no teacher: the same numbers as solved ones."""
    path, oracle = Linear(), GaussianOracle(Linear(), MEAN, STD)
    config, batch = reflow(Exact()), gaussian_batch(16)
    model = Keeper(path, 0.1, 0.4)
    assert config.needs_teacher
    with pytest.raises(ConfigError, match="teacher"):
        config.build()
    solved = config.build(oracle)(model, model, batch, 0.0, generator(4))
    x_t, t, _ = model.asked
    t = t[:, None, None, None]
    eps = (x_t - (1 - t) * MEAN) / ((1 - t) * STD + t)
    stored = replace(config, pairs=None, times=Given(solved.t, solved.t, solved.t)).build()(
        model, model, Batch(MEAN + STD * eps, None, eps), 0.0, generator(9)
    )
    torch.testing.assert_close(stored.per_sample, solved.per_sample, rtol=1e-6, atol=1e-9)


# Balances.


@pytest.mark.parametrize("balance", [Adaptive(0.7, 0.02), Learned(8)], ids=lambda balance: balance.kind)
def test_a_balance_applies_to_weighted_losses(balance):
    batch, oracle = gaussian_batch(32), GaussianOracle(VE(), MEAN, STD)
    config = Denoising(Wide(LogNormal()), PseudoHuber(0.1), weights.Karras())
    plain = config.build()(oracle, oracle, batch, 0.0, generator())
    objective = replace(config, balance=balance).build().double()
    found = objective(oracle, oracle, batch, 0.0, generator())
    torch.testing.assert_close(found.per_sample, plain.per_sample)
    torch.testing.assert_close(found.value, objective.balance(plain.per_sample, VE(), plain.t).mean())
    assert len(list(objective.parameters())) == (2 if isinstance(balance, Learned) else 0)
