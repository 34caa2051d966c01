"""Models whose answers are known in closed form: what everything else is measured against.

`GaussianOracle` and `MixtureOracle` are the exact denoisers of data that is Gaussian, or a mixture of Gaussians, in
every coordinate by itself; for the Gaussian the probability-flow ODE has a closed form too, so `GaussianConsistency` is
the exact consistency function. All of them work on any path and wherever a `FlowMap` does.
`learned` makes a real `FlowMap` of one, with a network that knows the answers: what the parameterization, the time
input and the gap do with them is then the code under test. Its labels move the mean, so guidance has a closed form too.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cmtool.flow import EDM, FlowMap, LogRatio, ModelCard, Path
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

    def denoised(self, x_t, t, labels=None, augment=None):
        return self.posterior_mean(x_t, t)

    def velocity(self, x_t, t, labels=None, augment=None):
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

    def jump(self, x_t, t, s, labels=None, augment=None):
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

    def denoised(self, x_t, t, labels=None, augment=None):
        return self.jump(x_t, t, torch.full_like(t, self.path.t_min))

    def jump(self, x_t, t, s, labels=None, augment=None):
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


class Knowing(nn.Module):
    """A network that gives the F for which its `FlowMap` equals an oracle; float64 wherever its input is.

    Args:
        oracle: what to equal; in its jumps if `two_times`, else in `denoised`.
        parameterization: of the `FlowMap` it is for.
        means: the mean of the oracle's data by label; the oracle's own without one (None, -1).
    """

    def __init__(self, oracle, parameterization, two_times=False, means=()) -> None:
        super().__init__()
        self.oracle, self.parameterization, self.means = oracle, parameterization, means
        self.config = SimpleNamespace(two_times=two_times, num_classes=len(means), label_dropout=0.1 * bool(means))
        self.calls = 0

    def forward(self, x, noise, labels=None, gap=None):
        self.calls += 1
        path, p = self.oracle.path, self.parameterization
        t, s = (self._time(path, told) for told in (noise, noise if gap is None else noise - gap))
        skip, out, inp = (expand(c, x) for c in p.denoised(path, t))
        x_t = x / inp
        move = 0.0  # what labels add to the mean
        if self.means:
            known = x.new_tensor([*(mean - self.oracle.mean for mean in self.means), 0.0])
            move = 0.0 if labels is None else expand(known[labels], x)
        answer = self.oracle.denoised(x_t - expand(path.alpha(t), x) * move, t) + move * self._landing(path, t)
        if self.config.two_times and bool((s < t).any()):
            # On the diagonal a jump is nothing and F is the denoiser's; the limit of jumps that shorten.
            skip_s, out_s, _ = (expand(c, x) for c in p.jump(path, t, s))
            jumped = self.oracle.jump(x_t - expand(path.alpha(t), x) * move, t, s) + move * expand(path.alpha(s), x)
            off = expand(s < t, x)
            answer, skip, out = (torch.where(off, a, b) for a, b in ((jumped, answer), (skip_s, skip), (out_s, out)))
        return torch.where(out == 0, torch.zeros_like(x), (answer - skip * x_t) / torch.where(out == 0, 1, out))

    def _time(self, path, told):
        rule = self.parameterization.time_input
        return path.clamp(path.time((told / rule.scale).exp()) if isinstance(rule, LogRatio) else told / rule.scale)

    def _landing(self, path, t):
        """The scale of the data in what `denoised` returns."""
        return path.alpha(t.new_tensor(path.t_min)) if self.oracle.role == "consistency" else 1.0


def learned(oracle, parameterization, two_times=False, means=(), **card) -> FlowMap:
    """The oracle as a `FlowMap` over a network that has learned it exactly; see `Knowing`."""
    role = "flow_map" if two_times else oracle.role
    network = Knowing(oracle, parameterization, two_times, means)
    card = ModelCard(role, oracle.card.resolution, oracle.card.channels, len(means), **card)
    return FlowMap(network, oracle.path, parameterization, card)
