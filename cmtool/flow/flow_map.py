"""`FlowMap`: a network, a path and a parameterization. The only model class.

A denoiser (diffusion model), a consistency model and a two-time model are this one object seen at different times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmtool.flow.parameterization import Coefficients, Parameterization
from cmtool.flow.path import Path, expand

Role = Literal["denoiser", "consistency"]


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
    teacher: str = ""
    data: str = ""
    licence: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.resolution, self.resolution)


class FlowMap(nn.Module):
    """A network read through a path and a parameterization.

    Args:
        network: called as `network(x, noise, labels=None)`; x [B, C, H, W] in `compute_dtype`, noise [B] float32.
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

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The estimate D(x_t, t): E[x0 | x_t] for a denoiser, f(x_t, t) for a consistency model.

        Args:
            x_t: noisy samples, shape [B, C, H, W].
            t: path times, shape [B].
            labels: class indices, shape [B], or None.
        Returns:
            Tensor of the shape of `x_t`.
        """
        return self._estimate(self.parameterization.denoised(self.path, t), x_t, t, labels)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """dx_t / dt of the probability-flow ODE; shapes as `denoised`."""
        return self.path.ode_velocity(x_t, self.denoised(x_t, t, labels), t)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_s from x_t in one network call, s <= t, both [B]; s = t_min is the consistency function."""
        return self._estimate(self.parameterization.jump(self.path, t, s), x_t, t, labels)

    def _estimate(self, coefficients: Coefficients, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        # Channels-last from end to end: a convolution whose gradient arrives in another layout is many times slower.
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        skip, out, inp = (expand(c, x_t) for c in coefficients)
        raw = self.network(
            (inp * x_t).to(self.compute_dtype or x_t.dtype), self.parameterization.noise(self.path, t), labels=labels
        )
        return skip * x_t + out * raw.to(x_t.dtype)

    def extra_repr(self) -> str:
        return f"path={self.path}, parameterization={self.parameterization}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("say what you want of a FlowMap: .denoised, .velocity or .jump")
