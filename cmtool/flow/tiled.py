"""A model on images larger than its own: overlapping tiles that agree.

Every estimate of a large image is the weighted mean of the estimates of its tiles: Bar-Tal et al. (2023),
arXiv:2302.08113, with a jump in place of a denoising step. All tiles see parts of one noisy image, so they have the
same noise where they overlap; and since each step goes on from the mean, they come to the same picture there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmtool.flow.flow_map import FlowMap, _View

_AT_ONCE = 16  # tiles in one network call, at least


def tiled(model: FlowMap, height: int, width: int, overlap: int | None = None) -> FlowMap:
    """The model on images of this size; the model itself if they are its own.

    Args:
        height, width: at least the model's resolution.
        overlap: pixels that neighbouring tiles share, at least; default a quarter of a tile.
    Raises:
        ValueError: for smaller images, or tiles that are nothing but overlap.
    """
    side = model.card.resolution
    if (height, width) == (side, side):
        return model
    if min(height, width) < side:
        raise ValueError(f"images of {width}x{height} are smaller than tiles of {side}x{side}")
    overlap = side // 4 if overlap is None else overlap
    if not 0 <= overlap < side:
        raise ValueError(f"tiles of {side} pixels cannot share {overlap}")
    return Tiled(model, height, width, overlap)


class Tiled(_View):
    """See `tiled`."""

    def __init__(self, model: FlowMap, height: int, width: int, overlap: int) -> None:
        super().__init__(model, model.path)
        self.side = model.card.resolution
        self.corners = [(y, x) for y in _starts(height, self.side, overlap) for x in _starts(width, self.side, overlap)]
        ramp = (torch.arange(self.side) + 1).clamp(max=overlap + 1).float()
        window = torch.minimum(ramp, ramp.flip(0)) / (overlap + 1)
        self._window = torch.outer(window, window)
        total = torch.zeros(height, width)
        for y, x in self.corners:
            total[y : y + self.side, x : x + self.side] += self._window
        self._total = total

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        return self._mean(x_t, lambda part, copies: self.seen.denoised(part, *_repeated(copies, t, labels, augment)))

    def jump(
        self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        return self._mean(x_t, lambda part, copies: self.seen.jump(part, *_repeated(copies, t, s, labels, augment)))

    def raw(self, *args: object, **kwargs: object) -> Tensor:
        raise TypeError("a model seen in tiles has no raw output of its own")

    def _mean(self, x_t: Tensor, estimate: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The mean over the tiles of what `estimate` makes of [copies * B] of them; shape of `x_t`."""
        made = torch.zeros_like(x_t)
        window = self._window.to(x_t)
        batch = len(x_t)
        copies = max(1, _AT_ONCE // batch)
        for first in range(0, len(self.corners), copies):
            corners = self.corners[first : first + copies]
            parts = torch.cat([x_t[..., y : y + self.side, x : x + self.side] for y, x in corners])
            for (y, x), part in zip(corners, estimate(parts, len(corners)).split(batch), strict=True):
                made[..., y : y + self.side, x : x + self.side] += window * part
        return made / self._total.to(x_t)


def _repeated(copies: int, *values: Tensor | None) -> list[Any]:
    """What belongs to each image, for several tiles of each."""
    return [None if value is None else value.repeat(copies, *(1,) * (value.ndim - 1)) for value in values]


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin: as few as cover the length, evenly spread."""
    if length == side:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(index * (length - side) / (count - 1)) for index in range(count)]
