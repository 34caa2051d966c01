"""The multistep loop: denoise, project, renoise; or denoise, project, go on.

Algorithms 1 (sampling) and 4 (zero-shot editing) of Song et al. (2023), arXiv:2303.01469, are this one loop with
different starts and constraints. Where each jump lands on the next time instead of on clean images, nothing is
renoised: so two-time models are sampled. For a consistency model f it is the deterministic view x' = (x - f) / t, which
is not the ODE of its data: f is the end of that ODE and no denoiser, and the more steps, the wider the samples spread
(of Gaussian data towards twice the standard deviation). Only the stochastic form keeps what a consistency model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmtool.errors import UsageError
from cmtool.flow.flow_map import FlowMap
from cmtool.times import Karras

Landing = Literal["t_min", "next"]


class SampleState(NamedTuple):
    """Where sampling is after a network call."""

    step: int  # 1 after the first call; also the number of network calls so far
    t: float  # the time the network was called at
    x: Tensor  # what it was called with, shape [B, C, H, W]
    denoised: Tensor  # the clean images the call implies, clipped and projected


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
    landing: Landing = "t_min",
) -> Iterator[SampleState]:
    """Run the loop; the last state's `denoised` is the result.

    Landing on t_min, the stochastic multistep form: x0 = f(x, t_n), clipped to [-1, 1], projected; then
    x = diffuse(x0, t_min -> t_{n+1}). Landing on the next time: the clean image that the jump t_n -> t_{n+1} implies is
    clipped and projected, and x moves on along it.

    Args:
        model: a consistency or two-time model; a denoiser with `landing="next"` (that is DDIM).
        start: samples at times[0], shape [B, C, H, W].
        times: decreasing path times, one a network call, shape [n].
        noise: `noise(i)` gives the standard normal noise [B, C, H, W] for the renoising after call i >= 1.
        constrain: projection of a clean image on what is known of it; see `cmtool.editing`.
        labels: class indices [B] or None.
        clip: clamp the estimate to the image range before projecting and renoising, as the reference does.
        landing: where a jump lands: "t_min" or "next".
    Yields:
        A `SampleState` after each network call.
    Raises:
        ValueError: for times that do not decrease.
    """
    if bool((times[1:] >= times[:-1]).any()):
        raise ValueError("sampling times must decrease")
    path, x, batch = model.path, start, (start.shape[0],)
    # The loop reads its times on the CPU, where it waits for no device; there a single one is a plain factor.
    times = times.to("cpu", x.dtype)
    t_min = times.new_tensor(path.t_min)

    def cleaned(x0: Tensor) -> Tensor:
        x0 = x0.clamp(-1, 1) if clip else x0
        return x0 if constrain is None else constrain(x0)

    for i, t in enumerate(times, start=1):
        last = i == len(times)
        then = t_min if last else times[i]
        here, after = (x.new_full(batch, float(time)) for time in (t, then if landing == "next" else t_min))
        landed = model.jump(x, here, after, labels)
        if landing == "next":
            # The jump is read as a clean image held fixed on the way, which is what can be clipped and projected.
            still = bool(t == then)
            x0 = cleaned(landed if still else path.implied(x, landed, here, after))
            moved = x0 if still else path.transport(x, x0, here, after)
            yield SampleState(i, float(t), x, cleaned(moved) if last else x0)
            x = moved
        else:
            x0 = cleaned(landed)
            yield SampleState(i, float(t), x, x0)
            x = x if last else path.diffuse(x0, t_min, then, noise(i).to(x))


def default_times(model: FlowMap, steps: int, landing: Landing = "t_min") -> Tensor:
    """The time points of a sample in `steps` network calls: the recommended ones, else even indices of the grid.

    A single call is made at t_max. Without a recommendation the indices are round(i (N - 1) / steps), i < steps, on the
    model's own grid of N points. Jumps that land on the next time take a grid of `steps` + 1 points, t_min the last.
    """
    if steps < 1:
        raise UsageError(f"--steps is the number of network calls and at least 1, found {steps}")
    card = model.card
    if landing == "next":
        return Karras(card.grid_rho).times(model.path, steps + 1)[:-1]
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
