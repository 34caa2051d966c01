"""What both sides are told and start with: the network, its weights, and images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmtool import networks, rng
from cmtool.networks import ADMConfig

# The U-Net of OpenAI's consistency models, small: diffusers' UNet2DModel is the same function of the same weights.
NETWORK = ADMConfig(resolution=32, channels=64, channel_mult=(1, 2, 2), num_blocks=2, attention_resolutions=(16,))
_IMAGES = 256


@dataclass(frozen=True)
class Setup:
    """What a row is measured with.

    Args:
        config: the network.
        batch: images at once.
        device: where to compute, by torch's name.
        dtype: what our side computes in inside the network, by torch's name.
        threads: of torch on a CPU; 0 leaves its choice.
        compiled: whether our side lets torch.compile work on its networks.
        peer_dtype: what the peer computes in, by torch's name; bfloat16 is torch.autocast.
    """

    config: ADMConfig = field(default_factory=lambda: NETWORK)
    batch: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    compiled: bool = False
    peer_dtype: str = "float32"


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
