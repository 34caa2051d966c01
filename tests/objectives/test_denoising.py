"""Denoising: its optimum is the posterior mean, its least loss the posterior variance."""

from __future__ import annotations

import pytest
import torch

from cmtool.flow import VE, Linear, Trig
from cmtool.times import LogNormal
from cmtool.training import weights
from cmtool.training.distances import L2
from cmtool.training.objectives import Denoising
from cmtool.training.trajectory import Batch
from tests.objectives.quadrature import expectation, hermite
from tests.oracles import GaussianOracle, MixtureOracle

PATHS = [VE(), Linear(), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
LEVELS = torch.tensor([0.1, 0.5, 1.0, 2.5], dtype=torch.float64)  # sigma / alpha

oracles = pytest.mark.parametrize("kind", [GaussianOracle, MixtureOracle])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bent(kind):
    """The oracle plus tilt sin(2 x + 1): wrong in a way that is not linear."""

    class Bent(kind):
        def __init__(self, path, tilt):
            super().__init__(path)
            self.tilt = torch.nn.Parameter(torch.tensor(tilt, dtype=torch.float64))

        def denoised(self, x_t, t, labels=None):
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
