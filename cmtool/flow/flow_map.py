"""`FlowMap`: a network, a path and a parameterization. The only model class.

A denoiser (diffusion model), a consistency model and a two-time model are this one object seen at different times.
`on_path` and `guided` are the same object seen through another path, or under guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmtool.errors import UsageError
from cmtool.flow.parameterization import Coefficients, Parameterization
from cmtool.flow.path import Path, expand

# What a model was trained to do: estimate the clean image at one time, jump to t_min, or jump to any time.
Role = Literal["denoiser", "consistency", "flow_map"]


@dataclass(frozen=True)
class ModelCard:
    """What a file says of its model besides the weights: enough to sample from it without any other flag."""

    role: Role
    resolution: int
    channels: int = 3
    num_classes: int = 0  # 0: unconditional
    class_names: tuple[str, ...] = ()
    grid_points: int = 18  # N of the grid the model was made for; the default of multistep editing
    grid_rho: float = 7.0
    times: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # network calls -> recommended time points
    preset: str = ""
    iterations: int = 0
    average: str = ""  # which average of the weights this is
    guidance: float = 1.0  # the scale of classifier-free guidance distilled into the weights
    teacher: str = ""
    data: str = ""
    licence: str = ""
    source: str = ""  # where imported weights came from: the format and the file
    notes: tuple[str, ...] = ()  # what an importer guessed, and what looks wrong

    def __post_init__(self) -> None:
        if not 2 <= self.grid_points <= 10**6 or not 0 < self.grid_rho < math.inf:
            raise ValueError(f"no grid has {self.grid_points} points with rho {self.grid_rho}")
        for steps, times in self.times.items():
            falling = all(0 < later < earlier for earlier, later in pairwise((math.inf, *times)))
            if not times or not falling or str(steps) != str(len(times)):
                raise ValueError(f"the times {tuple(times)} for {steps} steps are not as many falling numbers")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.resolution, self.resolution)


class FlowMap(nn.Module):
    """A network read through a path and a parameterization.

    Args:
        network: called as `network(x, noise, labels=None)`; x [B, C, H, W] in `compute_dtype`, noise [B] float32. With
            augmentation labels or two times it is also given `augment` [B, A] or `gap` [B].
        path: how data is noised.
        parameterization: how the network's output becomes an estimate.
        card: role, shape and provenance; see `ModelCard`.

    Times, coefficients and results are float32 (or the dtype of x); only the inside of the network runs in
    `compute_dtype`, set with `compute_in`.
    """

    def __init__(
        self, network: nn.Module, path: Path, parameterization: Parameterization, card: ModelCard | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.path = path
        self.parameterization = parameterization
        self.card = card or ModelCard(role="denoiser", resolution=0)
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of x

    def compute_in(self, dtype: torch.dtype | None) -> FlowMap:
        """Run the network in `dtype` (bfloat16 where the hardware is fast at it); returns self."""
        self.compute_dtype = dtype
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The estimate D(x_t, t): E[x0 | x_t] for a denoiser, f(x_t, t) for a consistency model.

        Args:
            x_t: noisy samples, shape [B, C, H, W].
            t: path times, shape [B].
            labels: class indices, shape [B], or None.
            augment: augmentation labels, shape [B, A], or None.
        Returns:
            Tensor of the shape of `x_t`.
        """
        return self._estimate(self.parameterization.denoised(self.path, t), x_t, t, t, labels, augment)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """dx_t / dt of the probability-flow ODE; shapes as `denoised`."""
        return self.path.ode_velocity(x_t, self.denoised(x_t, t, labels, augment), t)

    def jump(
        self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """x_s from x_t in one network call, s <= t, both [B]; s = t_min is the consistency function."""
        return self._estimate(self.parameterization.jump(self.path, t, s), x_t, t, s, labels, augment)

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """The network's own output F at (x_t, t), told the landing s [B] if it takes two times; shape of `x_t`."""
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        inp = self.parameterization.denoised(self.path, t).inp
        return self._network(inp, x_t, t, t if s is None else s, labels, augment)

    @property
    def two_times(self) -> bool:
        """Whether the network is told where a jump lands."""
        return getattr(getattr(self.network, "config", None), "two_times", False)

    def _estimate(
        self,
        coefficients: Coefficients,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        augment: Tensor | None,
    ) -> Tensor:
        # Channels-last from end to end: a convolution whose gradient arrives in another layout is many times slower.
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        skip, out, inp = coefficients
        return expand(skip, x_t) * x_t + expand(out, x_t) * self._network(inp, x_t, t, s, labels, augment)

    def _network(
        self, inp: Tensor, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        told = self.parameterization.noise(self.path, t)
        extra: dict[str, Tensor] = {}
        if augment is not None:
            extra["augment"] = augment
        if self.two_times:
            extra["gap"] = told - self.parameterization.noise(self.path, s)
        x = (expand(inp, x_t) * x_t).to(self.compute_dtype or x_t.dtype)
        raw: Tensor = self.network(x, told, labels=labels, **extra)
        return raw.to(x_t.dtype)

    def extra_repr(self) -> str:
        return f"path={self.path}, parameterization={self.parameterization}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("say what you want of a FlowMap: .denoised, .velocity, .jump or .raw")


def on_path(model: FlowMap, path: Path) -> FlowMap:
    """The model read on another path, at equal noise-to-signal ratio sigma / alpha.

    x_t there and x_u here are the same noisy image up to scale when sigma_t / alpha_t = sigma_u / alpha_u: so an EDM
    denoiser is a denoiser, and a consistency model a consistency model, on any path. Beyond the ends of its own path
    the model is asked at the end; below its first noise level the noise it finds there shrinks with the level.
    """
    return model if model.path == path else OnPath(model, path)


def guided(model: FlowMap, scale: float) -> FlowMap:
    """Classifier-free guidance: estimates D_none + scale (D_label - D_none). Ho and Salimans (2022), arXiv:2207.12598.

    A scale of 1 is the model itself. Needs a network that was trained with some labels dropped.

    Raises:
        UsageError: for a model without labels, one that never saw a dropped label, or a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise UsageError(f"the scale of guidance is a finite number, found {scale}", "1 is no guidance")
    if scale == 1:
        return model
    config = getattr(model.network, "config", None)
    if not getattr(config, "num_classes", 1):
        raise UsageError("guidance needs a model with classes, and this one has none", "leave out the guidance")
    if not getattr(config, "label_dropout", 1):
        raise UsageError(
            "guidance needs a model that was trained with some labels dropped, and this one never was",
            "train it with --set network.label_dropout=0.1",
        )
    return Guided(model, scale)


class _View(FlowMap):
    """A model seen through something; shares its network, card and compute type."""

    def __init__(self, model: FlowMap, path: Path) -> None:
        super().__init__(model.network, path, model.parameterization, model.card)
        self.seen = model
        self.compute_dtype = model.compute_dtype

    def compute_in(self, dtype: torch.dtype | None) -> FlowMap:
        self.seen.compute_in(dtype)
        return super().compute_in(dtype)


class OnPath(_View):
    """See `on_path`."""

    def _own(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The time on the model's own path, and the factor that takes a sample there."""
        theirs, own = self.path, self.seen.path
        u = own.clamp(own.time(theirs.ratio(t)))
        # Both quotients are the same factor; that of the smaller share of noise or data may be 0 / 0.
        noisy = theirs.sigma(t) > theirs.alpha(t)
        by_noise = own.sigma(u) / theirs.sigma(t).where(noisy, torch.ones_like(t))
        by_data = own.alpha(u) / theirs.alpha(t).where(~noisy, torch.ones_like(t))
        return u, expand(torch.where(noisy, by_noise, by_data), x_t)

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        u, factor = self._own(x_t, t)
        estimate = self.seen.denoised(factor * x_t, u, labels, augment)
        # Below the levels the model knows, the noise it finds shrinks with the level. An estimate held fixed instead
        # would be divided by sigma_t in the velocity, and grow without bound.
        level, known = self.path.ratio(t), self.seen.path.ratio(u)
        below = level < known
        share = torch.where(below, level / known, torch.ones_like(t))
        image = x_t / expand(torch.where(below, self.path.alpha(t), torch.ones_like(t)), x_t)
        return estimate + (1 - expand(share, x_t)) * (image - estimate)

    def jump(
        self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        (u, factor), (v, landing) = self._own(x_t, t), self._own(x_t, s)
        return self.seen.jump(factor * x_t, u, v, labels, augment) / landing

    def raw(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError("a model seen on another path has no raw output of its own there")


class Guided(_View):
    """See `guided`. Labelled and unlabelled halves go through the network together."""

    def __init__(self, model: FlowMap, scale: float) -> None:
        super().__init__(model, model.path)
        self.scale = scale

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        return self._both(self.seen.denoised, x_t, (t,), labels, augment)

    def jump(
        self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        return self._both(self.seen.jump, x_t, (t, s), labels, augment)

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        return self._both(self.seen.raw, x_t, (t, t if s is None else s), labels, augment)

    def _both(
        self, ask: Any, x_t: Tensor, times: tuple[Tensor, ...], labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        if labels is None:  # nothing to guide towards
            plain: Tensor = ask(x_t, *times, None, augment)
            return plain
        twice = torch.cat([x_t, x_t]), *(torch.cat([t, t]) for t in times)
        both = ask(
            *twice,
            torch.cat([labels, torch.full_like(labels, -1)]),
            None if augment is None else torch.cat([augment, augment]),
        )
        labelled, plain = both.chunk(2)
        return plain + self.scale * (labelled - plain)
