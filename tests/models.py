"""Small models and data for tests."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cmtool import networks
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, ModelCard
from cmtool.networks.configs import DDPMppConfig


def micro(resolution: int = 8, **changes) -> DDPMppConfig:
    """The smallest network with all kinds of layers: two levels, attention, some ten thousand parameters."""
    options = {"channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (resolution // 2,)}
    return DDPMppConfig(resolution=resolution, **(options | changes))


def model(role="consistency", config=None, path=None, parameterization=None, seed=0, **card) -> FlowMap:
    """A network with random weights large enough to matter (the initial ones make F = 0), ready for sampling."""
    config = config or micro()
    generator = torch.Generator().manual_seed(seed)
    network = networks.build(config)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    parameterization = parameterization or (BoundaryEDM() if role == "consistency" else EDM())
    card = ModelCard(role, config.resolution, config.in_channels, config.num_classes, **card)
    made = FlowMap(network, path or VE(), parameterization, card)
    return made.to(memory_format=torch.channels_last).requires_grad_(False).eval()


class Pictures:
    """A data set in memory: what the trainer asks of one."""

    def __init__(self, count=24, resolution=8, channels=3, classes=0, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Smooth pictures: a random colour that grows along a random direction.
        ramp = torch.linspace(0, 1, resolution)
        colour = torch.rand(count, channels, 1, 1, generator=generator)
        slope = torch.rand(count, 2, 1, 1, generator=generator)
        x = colour * (slope[:, :1] * ramp[None, None, None] + slope[:, 1:] * ramp[None, None, :, None]) * 127
        self.images = x.to(torch.uint8)
        self.labels = torch.arange(count) % classes if classes else None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.images[indices], None if self.labels is None else self.labels[indices]


@cache
def trunk() -> dict[str, Tensor]:
    """AlexNet's convolutions with random weights: a trunk for LPIPS, all of which but its taste can be checked."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {"classifier.1.bias": torch.zeros(4096)}  # of no use
    for layer, (out, width, side) in shapes.items():
        generator = torch.Generator().manual_seed(layer)
        weight = torch.randn(out, width, side, side, generator=generator)
        state[f"features.{layer}.weight"] = weight / (width * side * side) ** 0.5
        state[f"features.{layer}.bias"] = torch.randn(out, generator=generator)
    return state
