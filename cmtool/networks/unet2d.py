"""UNet2D: the U-Nets of DDPM and NCSN++ as diffusers' `UNet2DModel` has them.

Ho et al. (2020), arXiv:2006.11239, and Song et al. (2021), arXiv:2011.13456, with what was added to them there. The
state dict has the names and layouts of `UNet2DModel`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks.configs import UNet2DConfig
from cmtool.networks.convolution import Conv2d, convolve, normed
from cmtool.networks.layers import Linear, MapGap, Resample, attend, look_up, noise_features, prepare
from cmtool.networks.norms import GroupNorm, Pending
from cmtool.networks.recomputed import Recomputed

FIR = (1, 3, 3, 1)  # the resampling filter of the Skip levels
FOURIER_SCALE = 16.0


class UNet2D(nn.Module):
    """The U-Net of diffusers' `UNet2DModel`; see `UNet2DConfig`."""

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        emb_channels = config.emb_channels or 4 * widths[0]
        fourier = config.embedding == "fourier"

        self.conv_in = Conv2d(config.in_channels, widths[0], 3)
        self.time_proj = Fourier(widths[0]) if fourier else None
        self.time_embedding = nn.ModuleDict(
            {
                "linear_1": Linear((1 + fourier) * widths[0], emb_channels),
                "linear_2": Linear(emb_channels, emb_channels),
            }
        )
        self.class_embedding = nn.Embedding(config.num_classes, emb_channels) if config.num_classes else None
        self.map_gap = MapGap(widths[0], emb_channels) if config.two_times else None

        last = len(widths) - 1
        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, down in enumerate(config.down_blocks):
            entering = [width] + [widths[level]] * (config.num_blocks - 1)
            width = widths[level]
            self.down_blocks.append(Down(config, down, entering, width, emb_channels, resample=level < last))
            skips += [width] * (config.num_blocks + (level < last))
        self.mid_block = Middle(config, width, emb_channels) if config.middle else None
        self.up_blocks = nn.ModuleList()
        for level, up in enumerate(config.up_blocks):
            pairs: list[tuple[int, int]] = []
            for _ in range(config.num_blocks + 1):
                pairs.append((width, skips.pop()))
                width = widths[last - level]
            self.up_blocks.append(Up(config, up, pairs, width, emb_channels, resample=level < last))

        self.conv_norm_out = _norm(config, width)
        self.conv_out = _zero(Conv2d(width, config.out_channels, 3))

    def embed(self, noise: Tensor, labels: Tensor | None, gap: Tensor) -> Tensor:
        """Noise level, label and gap as one vector: [B, emb_channels]."""
        config = self.config
        if self.time_proj is not None:
            emb = self.time_proj(noise)
        else:
            emb = noise_features(noise, config.widths[0], endpoint=bool(config.freq_shift))
            if not config.cosines_first:
                emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)
        emb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](emb)))
        if self.class_embedding is not None:
            hidden = config.label_dropout if self.training else 0.0
            emb = emb + look_up(self.class_embedding.weight.to(emb.dtype), labels, emb.shape[0], hidden)
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
            noise: what the network is told about the noise level, [B], float32. A Fourier embedding is of the number
                itself: where diffusers takes the logarithm of its time, and divides the output by that time, this is
                the logarithm, and nothing is divided.
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
        image = 2 * x - 1 if config.center_input else x
        x = self.conv_in(image)
        skips = [x]
        for down in self.down_blocks:
            x, image = down(x, emb, image, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        residue: Tensor | None = None
        for up in self.up_blocks:
            x, residue = up(x, emb, residue, skips)
        x = self.conv_out(self.conv_norm_out(x, silu=True))
        return (x if residue is None else x + residue).contiguous()


class Fourier(nn.Module):
    """Sines, then cosines, of the noise at random frequencies: [B] to [B, 2 * count]."""

    weight: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(count) * FOURIER_SCALE)

    def forward(self, noise: Tensor) -> Tensor:
        angles = noise[:, None] * (2 * math.pi * self.weight.to(noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Down(nn.Module):
    """One level of the encoder, `inputs` the widths that its residual blocks take."""

    def __init__(
        self, config: UNet2DConfig, name: str, inputs: list[int], out: int, emb_channels: int, *, resample: bool
    ) -> None:
        super().__init__()
        skip, attention = "Skip" in name, "Attn" in name
        scale = math.sqrt(2) if skip else 1.0
        self.resnets = nn.ModuleList(
            ResBlock(config, width, out, emb_channels, groups=_quarter(width, out) if skip else None, scale=scale)
            for width in inputs
        )
        groups = 32 if skip else _groups(config, out)
        self.attentions = nn.ModuleList(
            Attention(config, out, groups, scale) for _ in range(len(inputs) if attention else 0)
        )
        self.resnet_down = self.skip_conv = self.shrink = self.downsamplers = None
        if resample and skip:
            self.resnet_down = ResBlock(
                config, out, out, emb_channels, groups=_quarter(out, out), scale=scale, resample="down", taps=FIR
            )
            self.shrink = Resample(FIR, up=False)
            self.skip_conv = Conv2d(config.in_channels, out, 1)
        elif resample and (config.downsample == "resnet" if attention else "Resnet" in name):
            self.downsamplers = nn.ModuleList([ResBlock(config, out, out, emb_channels, resample="down")])
        elif resample:
            self.downsamplers = nn.ModuleList([Downsample(out, config.downsample_padding)])

    def forward(self, x: Tensor, emb: Tensor, image: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The features and the image for the next level; what the decoder sees again is added to `skips`."""
        for index, block in enumerate(self.resnets):
            x = block(x, emb)
            if len(self.attentions):
                x = self.attentions[index](x)
            skips.append(x)
        if self.resnet_down is not None:
            assert self.shrink is not None
            assert self.skip_conv is not None
            image = self.shrink(image)
            x = self.skip_conv(image) + self.resnet_down(x, emb)
            skips.append(x)
        elif self.downsamplers is not None:
            x = self.downsamplers[0](x, emb)
            skips.append(x)
        return x, image


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: UNet2DConfig, width: int, emb_channels: int) -> None:
        super().__init__()
        scale = config.middle_scale
        attention = [Attention(config, width, config.middle_groups, scale)] if config.middle_attention else []
        self.attentions = nn.ModuleList(attention)
        self.resnets = nn.ModuleList(ResBlock(config, width, width, emb_channels, scale=scale) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class Up(nn.Module):
    """One level of the decoder, `inputs` the two widths that each of its residual blocks takes."""

    def __init__(
        self,
        config: UNet2DConfig,
        name: str,
        inputs: list[tuple[int, int]],
        out: int,
        emb_channels: int,
        *,
        resample: bool,
    ) -> None:
        super().__init__()
        skip, attention = "Skip" in name, "Attn" in name
        scale = math.sqrt(2) if skip else 1.0
        self.resnets = nn.ModuleList()
        for width, again in inputs:
            # the original's slip of the pen: there the attention levels have 32 groups at almost every width
            groups = _quarter(4 * width + again if attention else width + again, out) if skip else None
            self.resnets.append(ResBlock(config, width + again, out, emb_channels, groups=groups, scale=scale))
        count = 0 if not attention else 1 if skip else len(inputs)
        groups_in_attention = 32 if skip else _groups(config, out)
        self.attentions = nn.ModuleList(Attention(config, out, groups_in_attention, scale) for _ in range(count))
        self.enlarge = Resample(FIR, up=True) if skip else None
        self.resnet_up = self.skip_norm = self.skip_conv = self.upsamplers = None
        if resample and skip:
            self.resnet_up = ResBlock(
                config, out, out, emb_channels, groups=_quarter(out, out), scale=scale, resample="up", taps=FIR
            )
            self.skip_norm = Norm(_quarter(out, out)[0], out, config.eps)
            self.skip_conv = _zero(Conv2d(out, config.out_channels, 3))
        elif resample and (config.upsample == "resnet" if attention else "Resnet" in name):
            self.upsamplers = nn.ModuleList([ResBlock(config, out, out, emb_channels, resample="up")])
        elif resample:
            self.upsamplers = nn.ModuleList([Upsample(out)])

    def forward(
        self, x: Tensor, emb: Tensor, image: Tensor | None, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The features for the next level and the image so far (None before the first); takes from `skips`."""
        for index, block in enumerate(self.resnets):
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
            if len(self.attentions) > index and self.enlarge is None:
                x = self.attentions[index](x)
        if self.enlarge is not None:
            for attention in self.attentions:  # once, after all
                x = attention(x)
            image = None if image is None else self.enlarge(image)
        if self.resnet_up is not None:
            assert self.skip_norm is not None
            assert self.skip_conv is not None
            drawn = self.skip_conv(self.skip_norm(x, silu=True))
            image = drawn if image is None else image + drawn
            x = self.resnet_up(x, emb)
        elif self.upsamplers is not None:
            x = self.upsamplers[0](x, emb)
        return x, image


class ResBlock(Recomputed):
    """Residual block: norm, SiLU, (resampling,) convolution, embedding, norm, SiLU, dropout, convolution.

    Args:
        groups: of the two norms; None for the network's own.
        scale: the sum is divided by this.
        resample: "down" or "up" by 2, with the filter `taps`. Filters other than a box project the input, too.
    """

    def __init__(
        self,
        config: UNet2DConfig,
        width: int,
        out: int,
        emb_channels: int,
        *,
        groups: tuple[int, int] | None = None,
        scale: float = 1.0,
        resample: str = "",
        taps: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        self.film = config.scale_shift_norm
        self.dropout = config.dropout
        self.scale = scale
        self.resample = Resample(taps, up=resample == "up") if resample else None
        first, second = groups or (_groups(config, width), _groups(config, out))
        self.norm1 = Norm(first, width, config.eps)
        self.conv1 = Conv2d(width, out, 3)
        self.time_emb_proj = Linear(emb_channels, 2 * out if self.film else out)
        self.norm2 = Norm(second, out, config.eps)
        self.conv2 = _zero(Conv2d(out, out, 3))
        self.conv_shortcut = Conv2d(width, out, 1) if width != out or taps == FIR else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, width, H, W] and the embedding after its SiLU [B, emb_channels]."""
        inside: Tensor | Pending
        if self.resample is None:
            inside = self.norm1.pending(x, silu=True)
        else:
            inside, x = self.resample(self.norm1(x, silu=True)), self.resample(x)
        emb = self.time_emb_proj(emb)
        film, added = (emb.chunk(2, dim=1), None) if self.film else (None, emb)
        dropout = self.dropout if self.training else 0.0
        second = normed(self.norm2, self.conv1, inside, added, film=film, silu=True, dropout=dropout)
        h = self.conv2(second)
        x = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return x if self.scale == 1 else x / self.scale


class Attention(Recomputed):
    """Residual self-attention over pixels; no norm where `groups` is 0."""

    def __init__(self, config: UNet2DConfig, width: int, groups: int, scale: float) -> None:
        super().__init__()
        self.num_heads = width // config.head_channels if config.head_channels else 1
        self.scale = scale
        self.group_norm = Norm(groups, width, config.eps) if groups else None
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([_zero(Linear(width, width))])

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([part.weight for part in parts]).to(x.dtype)[:, :, None, None]
        qkv = convolve(
            x if self.group_norm is None else self.group_norm(x),
            weight,
            torch.cat([part.bias for part in parts]).to(x.dtype),
        )
        out = self.to_out[0](attend(qkv, self.num_heads).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + out
        return x if self.scale == 1 else x / self.scale


class Downsample(nn.Module):
    """Halve the resolution by a strided 3x3 convolution, with zeros all around or (padding 0) right and below only."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)
        self.conv.padding = (padding, padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repetition, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enlarge = Resample((1, 1), up=True)
        self.conv = Conv2d(width, width, 3)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(self.enlarge(x))


class Norm(GroupNorm):
    """Group norm with a given number of groups."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        nn.GroupNorm.__init__(self, groups, channels, eps=eps)


def _groups(config: UNet2DConfig, width: int) -> int:
    return config.groups or min(width // 4, 32)


def _quarter(width: int, out: int) -> tuple[int, int]:
    """Groups of the two norms of a block on a Skip level."""
    return min(width // 4, 32), min(out // 4, 32)


def _norm(config: UNet2DConfig, width: int) -> Norm:
    return Norm(_groups(config, width), width, config.eps)


def _zero(layer: Conv2d | Linear) -> Conv2d | Linear:
    """The layer with zero weights: its block starts as the identity."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
