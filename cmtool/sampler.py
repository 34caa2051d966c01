"""The multistep loop of consistency models: denoise, project, renoise.

Algorithms 1 (sampling) and 4 (zero-shot editing) of Song et al. (2023), arXiv:2303.01469, are this one loop with
different starts and constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool.errors import UsageError
from cmtool.flow.flow_map import FlowMap
from cmtool.times import Karras


class SampleState(NamedTuple):
    """Where sampling is after a network call."""

    step: int  # 1 after the first call; also the number of network calls so far
    t: float  # the time the network was called at
    x: Tensor  # what it was called with, shape [B, C, H, W]
    denoised: Tensor  # f(x, t), clipped and projected


@torch.inference_mode()
def sample(
    model: FlowMap,
    start: Tensor,
    times: Tensor,
    *,
    noise: Callable[[int], Tensor],
    constrain: Callable[[Tensor], Tensor] | None = None,
    labels: Tensor | None = None,
    clip: bool = True,
) -> Iterator[SampleState]:
    """Run the loop; the last state's `denoised` is the result.

    x_0 = f(x, t_n), clipped to [-1, 1], projected; x = diffuse(x_0, t_min -> t_{n+1}).

    Args:
        model: a consistency model.
        start: samples at times[0], shape [B, C, H, W].
        times: decreasing path times, one a network call, shape [n].
        noise: `noise(i)` gives the standard normal noise [B, C, H, W] for the renoising after call i >= 1.
        constrain: projection of a clean image on what is known of it; see `cmtool.editing`.
        labels: class indices [B] or None.
        clip: clamp the estimate to the image range before projecting and renoising, as the reference does.
    Yields:
        A `SampleState` after each network call.
    Raises:
        ValueError: for times that do not decrease.
    """
    if bool((times[1:] >= times[:-1]).any()):
        raise ValueError("sampling times must decrease")
    path, x = model.path, start
    t_min = times.new_tensor(path.t_min)
    for i, t in enumerate(times, start=1):
        x0 = model.denoised(x, t.to(x).expand(x.shape[0]), labels)
        if clip:
            x0 = x0.clamp(-1, 1)
        if constrain is not None:
            x0 = constrain(x0)
        yield SampleState(i, float(t), x, x0)
        if i < len(times):
            x = path.diffuse(x0, t_min.to(x), times[i].to(x), noise(i).to(x))


def default_times(model: FlowMap, steps: int) -> Tensor:
    """The time points of a sample in `steps` network calls: the recommended ones, else even indices of the grid.

    A single call is made at t_max. Without a recommendation the indices are round(i (N - 1) / steps), i < steps, on the
    model's own grid of N points.
    """
    if steps < 1:
        raise UsageError(f"--steps is the number of network calls and at least 1, found {steps}")
    card = model.card
    if str(steps) in card.times:
        return torch.tensor(card.times[str(steps)], dtype=torch.float32)
    grid = Karras(card.grid_rho).times(model.path, max(card.grid_points, steps + 1))
    index = [round(i * (len(grid) - 1) / steps) for i in range(steps)]
    return grid[index]


def check_times(model: FlowMap, times: Tensor) -> Tensor:
    """`times` if they decrease and lie on the model's path; otherwise a UsageError that says which does not."""
    path = model.path
    values = [float(t) for t in times]
    if not values:
        raise UsageError("no time points given", "for example --times 80,0.8")
    for before, after in pairwise(values):
        if not after < before:
            raise UsageError(f"time points must decrease, found {before:g} before {after:g}")
    for t in values:
        if not path.t_min <= t <= path.t_max * (1 + 1e-6):
            raise UsageError(f"time point {t:g} is not on the model's path, {path.t_min:g} to {path.t_max:g}")
    return times
