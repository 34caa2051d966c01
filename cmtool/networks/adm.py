"""ADM: the U-Net of Dhariwal & Nichol (2021), arXiv:2105.05233, as released with consistency models.

The state dict has the names and layouts of the OpenAI release.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks.configs import ADMConfig, level_resolutions
from cmtool.networks.convolution import Conv2d, normed
from cmtool.networks.layers import Linear, MapGap, Resample, attend, look_up, noise_features, prepare
from cmtool.networks.norms import GroupNorm, Pending
from cmtool.networks.recomputed import Recomputed


class ADM(nn.Module):
    """The ADM U-Net; see `ADMConfig`."""

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        emb_channels = 4 * config.channels
        resolutions = level_resolutions(config.resolution, config.channel_mult)
        widths = [mult * config.channels for mult in config.channel_mult]

        self.time_embed = nn.ModuleDict(
            {"0": Linear(config.channels, emb_channels), "2": Linear(emb_channels, emb_channels)}
        )
        self.label_emb = nn.Embedding(config.num_classes, emb_channels) if config.num_classes else None
        self.map_gap = MapGap(config.channels, emb_channels) if config.two_times else None

        width = widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv2d(config.in_channels, width, 3)])])
        skips = [width]
        for level, (resolution, out) in enumerate(zip(resolutions, widths, strict=True)):
            for _ in range(config.num_blocks):
                layers: list[nn.Module] = [ResBlock(config, width, out)]
                if resolution in config.attention_resolutions:
                    layers.append(Attention(config, out))
                self.input_blocks.append(nn.ModuleList(layers))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                down = ResBlock(config, width, width, down=True) if config.resblock_updown else Downsample(width)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(width)

        self.middle_block = nn.ModuleList(
            [ResBlock(config, width, width), Attention(config, width), ResBlock(config, width, width)]
        )

        self.output_blocks = nn.ModuleList()
        for level, (resolution, out) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            for index in range(config.num_blocks + 1):
                layers = [ResBlock(config, width + skips.pop(), out)]
                width = out
                if resolution in config.attention_resolutions:
                    layers.append(Attention(config, width))
                if level > 0 and index == config.num_blocks:
                    layers.append(
                        ResBlock(config, width, width, up=True) if config.resblock_updown else Upsample(width)
                    )
                self.output_blocks.append(nn.ModuleList(layers))

        self.out = nn.ModuleDict({"0": _norm(config, width), "2": _zero(Conv2d(width, config.out_channels, 3))})

    def embed(self, noise: Tensor, labels: Tensor | None, gap: Tensor) -> Tensor:
        """Noise level, label and gap as one vector: [B, 4 * channels]."""
        emb = noise_features(noise, self.config.channels, endpoint=False)
        emb = self.time_embed["2"](F.silu(self.time_embed["0"](emb)))
        if self.label_emb is not None:
            hidden = self.config.label_dropout if self.training else 0.0
            emb = emb + look_up(self.label_emb.weight.to(emb.dtype), labels, emb.shape[0], hidden)
        if self.map_gap is not None:
            emb = emb + self.map_gap(gap)
        return emb

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        gap: Tensor | None = None,
    ) -> Tensor:
        """The raw network.

        Args:
            x: [B, in_channels, resolution, resolution]; its type is the type computed in.
            noise: what the network is told about the noise level, [B], float32.
            labels: [B] whole numbers, negative for no label; None for no labels at all.
            augment: must be None: this architecture takes no augmentation vector.
            gap: how far the jump goes, in units of `noise`, [B], float32, of order one; or None for zeros.
        Returns:
            [B, out_channels, resolution, resolution] in the type of `x`.
        Raises:
            ValueError: inputs that this network does not take.
        """
        config = self.config
        x, noise, gap = prepare(
            *(x, noise, labels, augment, gap),
            num_classes=config.num_classes,
            augment_dim=0,
            two_times=config.two_times,
        )
        emb = F.silu(self.embed(noise, labels, gap)).to(x.dtype)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = _run(block, x, emb)
            skips.append(x)
        x = _run(self.middle_block, x, emb)
        for block in self.output_blocks:
            x = _run(block, torch.cat([x, skips.pop()], dim=1), emb)
        x = self.out["2"](self.out["0"](x, silu=True))
        return x.contiguous()


class ResBlock(Recomputed):
    """Residual block: norm, SiLU, (resampling,) convolution, embedding, norm, SiLU, dropout, convolution."""

    def __init__(self, config: ADMConfig, width: int, out: int, *, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.film = config.scale_shift_norm
        self.dropout = config.dropout
        self.resample = Resample((1, 1), up=up) if up or down else None
        self.in_layers = nn.ModuleDict({"0": _norm(config, width), "2": Conv2d(width, out, 3)})
        self.emb_layers = nn.ModuleDict({"1": Linear(4 * config.channels, 2 * out if self.film else out)})
        self.out_layers = nn.ModuleDict({"0": _norm(config, out), "3": _zero(Conv2d(out, out, 3))})
        self.skip_connection = Conv2d(width, out, 1) if width != out else None

    @property
    def layers(self) -> tuple[GroupNorm, Conv2d, GroupNorm, Conv2d]:
        """Norm, convolution, norm, convolution."""
        named: Any = (self.in_layers["0"], self.in_layers["2"], self.out_layers["0"], self.out_layers["3"])
        return named

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, width, H, W] and the embedding after its SiLU [B, 4 * channels]."""
        norm0, conv0, norm1, conv1 = self.layers
        inside: Tensor | Pending
        if self.resample is None:
            inside = norm0.pending(x, silu=True)
        else:
            inside, x = self.resample(norm0(x, silu=True)), self.resample(x)
        emb = self.emb_layers["1"](emb)
        film, added = (emb.chunk(2, dim=1), None) if self.film else (None, emb)
        dropout = self.dropout if self.training else 0.0
        second = normed(norm1, conv0, inside, added, film=film, silu=True, dropout=dropout)
        h = conv1(second)
        return h + (x if self.skip_connection is None else self.skip_connection(x))


class Attention(Recomputed):
    """Residual self-attention over pixels."""

    def __init__(self, config: ADMConfig, width: int) -> None:
        super().__init__()
        self.num_heads = width // config.head_channels if config.head_channels else config.num_heads
        self.norm = _norm(config, width)
        self.qkv = Conv2d(width, 3 * width, 1)
        self.proj_out = _zero(Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(attend(self.qkv(self.norm(x)), self.num_heads))


class Downsample(nn.Module):
    """Halve the resolution by a strided 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution by repetition, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = Resample((1, 1), up=True)
        self.conv = Conv2d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.resample(x))


def _run(layers: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
    return x


def _norm(config: ADMConfig, width: int) -> GroupNorm:
    return GroupNorm(width, eps=1e-5, group_channels=config.group_channels)


def _zero(conv: Conv2d) -> Conv2d:
    """The convolution with zero weights: its block starts as the identity."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
