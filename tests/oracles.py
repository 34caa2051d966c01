"""Models whose answers are known in closed form: what everything else is measured against.

`GaussianOracle` and `MixtureOracle` are the exact denoisers of data that is Gaussian, or a mixture of Gaussians, in
every coordinate by itself; for the Gaussian the probability-flow ODE has a closed form too, so `GaussianConsistency` is
the exact consistency function. All of them work on any path and wherever a `FlowMap` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmtool.flow import EDM, FlowMap, ModelCard, Path
from cmtool.flow.path import expand


class _Oracle(FlowMap):
    """A `FlowMap` that asks no network; its one parameter says on which device it is."""

    role = "denoiser"

    def __init__(self, path: Path, image_shape: tuple[int, int, int] = (1, 1, 1)) -> None:
        channels, resolution, _ = image_shape
        network = nn.Module()
        network.anchor = nn.Parameter(torch.zeros(()))
        super().__init__(network, path, EDM(), ModelCard(self.role, resolution, channels))

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]."""
        raise NotImplementedError

    def denoised(self, x_t, t, labels=None):
        return self.posterior_mean(x_t, t)

    def velocity(self, x_t, t, labels=None):
        return self.path.ode_velocity(x_t, self.posterior_mean(x_t, t), t)


class GaussianOracle(_Oracle):
    """Data N(mean, std^2) in every coordinate; `mean` and `std` may be tensors that broadcast against the images."""

    def __init__(self, path, mean=0.3, std=0.5, image_shape=(1, 1, 1)):
        super().__init__(path, image_shape)
        self.mean, self.std = mean, std

    def variance(self, t: Tensor) -> Tensor:
        """Of x_t."""
        return (self.path.alpha(t) * self.std) ** 2 + self.path.sigma(t) ** 2

    def posterior_mean(self, x_t, t):
        t = expand(t, x_t)
        alpha = self.path.alpha(t)
        return self.mean + alpha * self.std**2 / self.variance(t) * (x_t - alpha * self.mean)

    def jump(self, x_t, t, s, labels=None):
        """The ODE solved exactly: x keeps its distance from the mean in units of the standard deviation."""
        t, s = expand(t, x_t), expand(s, x_t)
        alpha_t, alpha_s = self.path.alpha(t), self.path.alpha(s)
        return alpha_s * self.mean + (self.variance(s) / self.variance(t)).sqrt() * (x_t - alpha_t * self.mean)

    def draw(self, t: float, n: int, seed: int = 0, **options) -> Tensor:
        """n samples of x_t, each of the image shape."""
        generator = torch.Generator().manual_seed(seed)
        at = torch.tensor(t, dtype=options.get("dtype", torch.float32))
        gauss = torch.randn(n, *self.card.image_shape, generator=generator, **options)
        return self.path.alpha(at) * self.mean + self.variance(at).sqrt() * gauss


class GaussianConsistency(GaussianOracle):
    """The exact consistency function of Gaussian data, bent by `tilt` (0: exact).

    The bend is smooth, not linear in x, and nothing at t = s, as for any consistency model.
    """

    role = "consistency"

    def __init__(self, path, mean=0.3, std=0.5, image_shape=(1, 1, 1), tilt=0.0):
        super().__init__(path, mean, std, image_shape)
        self.tilt = nn.Parameter(torch.tensor(tilt, dtype=torch.float64))

    def denoised(self, x_t, t, labels=None):
        return self.jump(x_t, t, torch.full_like(t, self.path.t_min))

    def jump(self, x_t, t, s, labels=None):
        exact = super().jump(x_t, t, s)
        t, s = expand(t, x_t), expand(s, x_t)
        bend = (t - s) / (1 + t) * torch.sin(x_t)
        return exact + (self.tilt * bend).to(exact.dtype)


class MixtureOracle(_Oracle):
    """Data from a mixture of Gaussians of equal width in every coordinate: a denoiser that is not linear."""

    def __init__(self, path, means=(-0.8, 0.1, 0.7), weights=(0.3, 0.2, 0.5), std=0.2, image_shape=(1, 1, 1)):
        super().__init__(path, image_shape)
        self.means, self.weights, self.std = means, weights, std

    def posterior_mean(self, x_t, t):
        means, weights = x_t.new_tensor(self.means), x_t.new_tensor(self.weights)
        t = expand(t, x_t)[..., None]
        alpha, variance = self.path.alpha(t), (self.path.alpha(t) * self.std) ** 2 + self.path.sigma(t) ** 2
        off = x_t[..., None] - alpha * means
        share = (weights.log() - off**2 / (2 * variance)).softmax(-1)
        return (share * (means + alpha * self.std**2 / variance * off)).sum(-1)
