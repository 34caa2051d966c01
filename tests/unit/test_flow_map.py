"""`FlowMap`: what reaches the network, what comes back, and the oracles everything else is measured with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, Linear, LogRatio, ModelCard, Trig, Velocity
from tests import models
from tests.oracles import GaussianConsistency, GaussianOracle, MixtureOracle

PATHS = [VE(), Linear(), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)


class Spy(nn.Module):
    """Returns a fixed function of its input and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x, noise, labels=None):
        self.x, self.noise, self.labels = x, noise, labels
        return (self.scale.to(x.dtype) * x).tanh()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_estimate_is_skip_x_plus_out_f():
    network = Spy()
    model = FlowMap(network, VE(), EDM(time_input=LogRatio(250.0)))
    x, t, labels = 3 * normal(2, 3, 4, 4), torch.tensor([0.5, 3.0]), torch.tensor([1, 2])
    found = model.denoised(x, t, labels)
    for i, sigma in enumerate((0.5, 3.0)):
        root = (sigma**2 + 0.25) ** 0.5
        expected = 0.25 / root**2 * x[i] + sigma * 0.5 / root * (2 * x[i] / root).tanh()
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(network.x[i], x[i] / root)
    torch.testing.assert_close(network.noise, 250 * t.log())
    assert network.labels is labels


def test_only_the_inside_of_the_network_runs_in_low_precision():
    network = Spy()
    model = FlowMap(network, VE(), EDM()).compute_in(torch.bfloat16)
    x, t = normal(2, 3, 4, 4), torch.tensor([0.002, 80.0])
    for found in (model.denoised(x, t), model.jump(x, t, t / 2), model.velocity(x, t)):
        assert network.x.dtype == torch.bfloat16
        assert network.noise.dtype == torch.float32
        assert found.dtype == torch.float32
    # what the skip carries is not rounded to bfloat16: at t_min that is the whole image
    boundary = FlowMap(network, VE(), BoundaryEDM()).compute_in(torch.bfloat16)
    assert torch.equal(boundary.denoised(x, t)[0], x[0])
    assert model.compute_in(None).denoised(x, t).dtype == torch.float32
    assert network.x.dtype == torch.float32


@paths
def test_f_at_t_min_is_x_to_the_last_bit(path):
    model = models.model("consistency", path=path)
    for n in (1, 5):
        x = normal(n, 3, 8, 8)
        t = torch.full((n,), path.t_min)
        assert torch.equal(model.denoised(x, t), x)
        assert torch.equal(model.jump(x, t, t), x)


@paths
@pytest.mark.parametrize("kind", [EDM(), BoundaryEDM(), Velocity()], ids=lambda kind: kind.kind)
def test_a_jump_to_where_one_is_changes_nothing(path, kind):
    model = FlowMap(Spy(), path, kind)
    t = torch.linspace(path.t_min, path.t_max, 10)[:-1]
    x = normal(9, 3, 4, 4)
    assert torch.equal(model.jump(x, t, t), x)


def test_meanflows_jump_is_a_straight_line():
    model = FlowMap(Spy(), Linear(), Velocity())
    x, t, s = normal(2, 3, 4, 4), torch.tensor([0.9, 0.4]), torch.tensor([0.0, 0.3])
    raw = (2 * x).tanh()
    torch.testing.assert_close(model.jump(x, t, s), x - (t - s)[:, None, None, None] * raw)
    torch.testing.assert_close(model.denoised(x, t), x - t[:, None, None, None] * raw)
    torch.testing.assert_close(model.velocity(x, t), raw)


@paths
def test_velocity_is_the_slope_of_the_jump(path):
    model = FlowMap(Spy().double(), path, EDM())
    t = torch.linspace(path.t_min, path.t_max, 9, dtype=torch.float64)[1:-1]
    x, h = normal(7, 3, 4, 4, dtype=torch.float64), 1e-6
    slope = (model.jump(x, t, t + h) - model.jump(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(model.velocity(x, t), slope, rtol=1e-6, atol=1e-6)


def test_calling_it_says_what_to_call():
    model = FlowMap(Spy(), VE(), EDM(), ModelCard("denoiser", 4))
    with pytest.raises(TypeError, match="denoised"):
        model(torch.zeros(1, 3, 4, 4), torch.ones(1))


def test_the_card_has_the_image_shape():
    assert ModelCard("denoiser", 32, channels=1).image_shape == (1, 32, 32)


# The oracles themselves.


def points(path, n=6):
    """Times away from the ends, where finite differences work."""
    span = path.t_max - path.t_min
    return torch.linspace(path.t_min + 0.02 * span, path.t_max - 0.02 * span, n, dtype=torch.float64)


@paths
@pytest.mark.parametrize("kind", [GaussianOracle, MixtureOracle])
def test_the_oracles_denoiser_is_tweedies_formula(path, kind):
    """D = (x + sigma^2 d/dx log p(x)) / alpha, with p the density of x_t by numerical convolution."""
    oracle = kind(path)
    z, weight = quadrature(100)
    for t in (points(path, 7) if path.kind != "ve" else torch.tensor([0.05, 0.3, 1.0, 5.0])).tolist():
        alpha, sigma = float(path.alpha(torch.tensor(t))), float(path.sigma(torch.tensor(t)))
        means = oracle.means if kind is MixtureOracle else (oracle.mean,)
        weights = oracle.weights if kind is MixtureOracle else (1.0,)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)
        above, below = torch.zeros_like(x), torch.zeros_like(x)
        for mean, share in zip(means, weights, strict=True):
            x0 = mean + oracle.std * z
            likelihood = torch.exp(-((x[:, None] - alpha * x0) ** 2) / (2 * sigma**2))
            above += share * (likelihood * weight * x0).sum(1)
            below += share * (likelihood * weight).sum(1)
        found = oracle.denoised(x[:, None, None, None], torch.full((9,), t, dtype=torch.float64)).flatten()
        torch.testing.assert_close(found, above / below, rtol=2e-3, atol=2e-3)


def quadrature(n):
    """Nodes and weights of expectations under N(0, 1), by the trapezoid rule (spectrally accurate here)."""
    z = torch.linspace(-8, 8, 40 * n, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    return z, weight / weight.sum()


@paths
def test_the_gaussian_jump_solves_the_ode(path):
    oracle = GaussianOracle(path)
    t = points(path)
    x, h = normal(6, 1, 1, 1, dtype=torch.float64), 1e-6
    slope = (oracle.jump(x, t, t + h) - oracle.jump(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(oracle.velocity(x, t), slope, rtol=1e-6, atol=1e-6)


@paths
def test_gaussian_jumps_compose(path):
    for oracle in (GaussianOracle(path), GaussianConsistency(path)):
        t = points(path)
        x, r = normal(6, 1, 1, 1, dtype=torch.float64), 0.6 * t
        s = torch.full_like(t, path.t_min)
        torch.testing.assert_close(oracle.jump(oracle.jump(x, t, r), r, s), oracle.jump(x, t, s))
        torch.testing.assert_close(oracle.jump(x, t, t), x, rtol=1e-14, atol=1e-14)


def test_the_gaussian_consistency_function_is_the_one_known_for_ve():
    """mu + sqrt((s^2 + eps^2) / (s^2 + t^2)) (x - mu)."""
    model = GaussianConsistency(VE(), mean=0.3, std=0.5)
    x, t = normal(5, 1, 1, 1, dtype=torch.float64), torch.tensor([0.002, 0.1, 1, 10, 80], dtype=torch.float64)
    factor = ((0.25 + 0.002**2) / (0.25 + t**2)).sqrt()[:, None, None, None]
    torch.testing.assert_close(model.denoised(x, t), 0.3 + factor * (x - 0.3))
