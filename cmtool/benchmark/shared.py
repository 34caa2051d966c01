"""The weights and the images that both sides start with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmtool import networks, rng
from cmtool.benchmark.rows import Setup
from cmtool.networks import ADMConfig

_IMAGES = 256


def network(config: ADMConfig, seed: int = 0) -> nn.Module:
    """The network with random weights from the seed.

    Layers that start with zeros get small numbers too: zeros would hide differences between the two sides.
    """
    with rng.forked(rng.derive(seed), "cpu"), torch.no_grad():
        made = networks.build(config)
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return made


def pictures(setup: Setup) -> Tensor:
    """Random images, uint8 [N, C, H, W] on the CPU, where a data set lies; N is at least the batch."""
    config = setup.config
    generator = torch.Generator().manual_seed(1)
    shape = (max(_IMAGES, setup.batch), config.in_channels, config.resolution, config.resolution)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def mask(setup: Setup) -> Tensor:
    """The middle quarter of an image, which inpainting makes new; bool [1, 1, H, W]."""
    side = setup.config.resolution
    found = torch.zeros(1, 1, side, side, dtype=torch.bool)
    found[:, :, side // 4 : side - side // 4, side // 4 : side - side // 4] = True
    return found
