"""The perceptron fits densities in the plane: exact targets in closed form, sharp ones included."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.networks import MLPConfig, build

DATA = 0.5  # the standard deviation that the preconditioning assumes
ANGLES = torch.arange(6) * (math.pi / 3)
MEANS = 0.7 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
STD = 0.05


def denoised(x, sigma):
    """E[x0 | x] for six round Gaussians on a circle; x [B, 2], sigma [B, 1]."""
    variance = sigma**2 + STD**2
    shares = (-(x[:, None] - MEANS).square().sum(2) / (2 * variance)).softmax(dim=1)
    return (sigma**2 * (shares @ MEANS) + STD**2 * x) / variance


def preconditioned(network, x, sigma, **inputs):
    """D = skip x + out F, Karras et al. (2022), table 1."""
    total = sigma**2 + DATA**2
    raw = network((x / total.sqrt())[:, :, None, None], sigma[:, 0].log() / 4, **inputs)[:, :, 0, 0]
    return DATA**2 / total * x + sigma * DATA / total.sqrt() * raw


def draw(sigma, generator):
    modes = torch.randint(len(MEANS), (len(sigma),), generator=generator)
    noise = torch.randn(2, len(sigma), 2, generator=generator)
    return MEANS[modes] + STD * noise[0] + sigma * noise[1]


def fit(network, loss, iterations=1200):
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def fitted():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(MLPConfig(width=64))
    generator = torch.Generator().manual_seed(0)

    def loss():
        sigma = (1.6 * torch.randn(256, 1, generator=generator) - 2).exp()
        x = draw(sigma, generator)
        weight = (sigma**2 + DATA**2) / (sigma * DATA) ** 2
        return (weight * (preconditioned(network, x, sigma) - denoised(x, sigma)).square()).mean()

    return fit(network, loss)


@pytest.mark.parametrize("sigma", [0.005, 0.03, 0.1, 0.3, 1.0, 10.0])
def test_a_mixture_is_fitted_at_every_noise_level(fitted, sigma):
    """Relative to what the network must explain: the distance between D and skip x."""
    sigma = torch.full((2000, 1), sigma)
    x = draw(sigma, torch.Generator().manual_seed(1))
    exact, total = denoised(x, sigma), sigma**2 + DATA**2
    error = (preconditioned(fitted, x, sigma) - exact).square().mean().sqrt()
    scale = (sigma * DATA / total.sqrt()).square().mean().sqrt()
    assert error < 0.06 * scale


def test_between_two_modes_the_denoiser_is_steep(fitted):
    """Its slope half-way between two modes, 7 here, is that of data at two points: distance^2 / (4 sigma^2)."""
    sigma = torch.full((1, 1), 0.12)
    middle, across = (MEANS[0] + MEANS[1])[None] / 2, (MEANS[0] - MEANS[1])[None]
    _, found = torch.func.jvp(lambda x: preconditioned(fitted, x, sigma), (middle,), (across,))
    _, exact = torch.func.jvp(lambda x: denoised(x, sigma), (middle,), (across,))
    assert exact.norm() > 6 * across.norm()
    assert (found - exact).norm() < 0.25 * exact.norm()


def test_jumps_of_all_lengths_are_fitted():
    """The mean velocity of the straight path from N(0, 0.3^2) to noise, and its slope along the gap."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(MLPConfig(width=64, depth=2, two_times=True))
    generator = torch.Generator().manual_seed(0)

    def variance(t):
        return ((1 - t) * 0.3).square() + t.square()

    def velocity(x, t, gap):  # (x_t - x_s) / (t - s), each point keeping its distance in standard deviations
        return x * (1 - (variance(t - gap) / variance(t)).sqrt()) / gap

    def draw_jumps(count, gap=None):
        random = 0.01 + 0.99 * torch.rand(count, 1, generator=generator).square()
        gap = random if gap is None else torch.full_like(random, gap)
        t = gap + (1 - gap) * torch.rand(count, 1, generator=generator)
        return variance(t).sqrt() * torch.randn(count, 2, generator=generator), t, gap

    def predict(x, t, gap):
        return network(x[:, :, None, None], t[:, 0], gap=gap[:, 0])[:, :, 0, 0]

    def loss():
        jump = draw_jumps(256)
        return (predict(*jump) - velocity(*jump)).square().mean()

    fit(network, loss, iterations=800)
    for size, most in ((1 / 64, 0.5), (1 / 8, 0.25), (1 / 2, 0.12)):
        x, t, gap = draw_jumps(2000, size)
        along = torch.ones_like(gap)
        found, slope = torch.func.jvp(lambda gap, x=x, t=t: predict(x, t, gap), (gap,), (along,))
        exact, exact_slope = torch.func.jvp(lambda gap, x=x, t=t: velocity(x, t, gap), (gap,), (along,))
        assert (found - exact).norm() < 0.03 * exact.norm()
        assert (slope - exact_slope).norm() < most * exact_slope.norm()
