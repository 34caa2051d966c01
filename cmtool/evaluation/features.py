"""What images are compared by: a function from uint8 images to vectors.

`RandomFeatures` needs no weights file and is always there. Its numbers are comparable with each other, with nothing
published, and are never called FID.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_BATCH = 256


class Features(Protocol):
    """A feature extractor."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] as float32 vectors [B, D] on the CPU; each by itself, whatever else is there."""
        ...


class RandomFeatures:
    """Mean responses of random filters, at a fourth of the image each, over scales from the pixel up.

    Three layers of random zero-mean filters with rectification and pooling, on the image and on the image halved. The
    filters come from a seed, and are the same on every machine.

    Args:
        channels: of the images, 1 or 3.
        width: filters a layer.
        seed: of the filters.
    """

    name = "random"

    def __init__(self, channels: int = 3, width: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.channels = channels
        self._filters = []
        for entering in (channels, width, width):
            weight = torch.randn(width, entering, 3, 3, generator=generator, dtype=torch.float64)
            weight -= weight.mean((2, 3), keepdim=True) * (torch.arange(width) % 4 > 0)[:, None, None, None]
            self._filters.append((weight / weight.flatten(1).norm(dim=1)[:, None, None, None]).float())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """See `Features`.

        Raises:
            ValueError: for images with another number of channels, or smaller than 8x8.
        """
        if images.shape[1] != self.channels or min(images.shape[2:]) < 8:
            raise ValueError(f"expected images [B, {self.channels}, >= 8, >= 8], found {list(images.shape)}")
        x = images.float().cpu() / 127.5 - 1
        parts = []
        for _ in range(2):
            response = x
            for weight in self._filters:
                response = F.conv2d(response, weight, padding=1).abs()
                parts.append(F.adaptive_avg_pool2d(response, 2).flatten(1))
                response = F.avg_pool2d(response, 2)
                if min(response.shape[2:]) < 2:
                    break
            x = F.avg_pool2d(x, 2)
        return torch.cat(parts, dim=1)


def extract(features: Features, batches: Iterable[Tensor]) -> Tensor:
    """The vectors of uint8 images that come in batches, float32 [N, D]."""
    made = [features(part) for batch in batches for part in _parts(batch)]
    if not made:
        raise ValueError("there are no images")
    return torch.cat(made)


def _parts(images: Tensor) -> Iterator[Tensor]:
    yield from images.split(_BATCH)
