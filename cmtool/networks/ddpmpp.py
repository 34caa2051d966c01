"""DDPM++ and NCSN++: the U-Net of Song et al. (2021), arXiv:2011.13456, in the form of Karras et al. (2022).

The state dict has the names and layouts of the EDM release (its `model.*` entries without that prefix).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks.configs import DDPMppConfig, level_resolutions
from cmtool.networks.convolution import Conv2d, convolve, normed
from cmtool.networks.layers import Linear, MapGap, Resample, attend, look_up, noise_features, prepare
from cmtool.networks.norms import GroupNorm, Pending
from cmtool.networks.recomputed import Recomputed

Layer = TypeVar("Layer", bound=Linear | Conv2d)

HALF = math.sqrt(0.5)  # the sum of two independent signals of variance 1, times this, has variance 1


class DDPMpp(nn.Module):
    """DDPM++ / NCSN++; see `DDPMppConfig`.

    Constant resampling filters, which the EDM release stores with the weights, are checked and dropped on loading.
    """

    def __init__(self, config: DDPMppConfig) -> None:
        super().__init__()
        self.config = config
        emb_channels = config.channels * config.channel_mult_emb
        noise_channels = config.channels * config.channel_mult_noise

        self.map_noise = Fourier(noise_channels) if config.embedding == "fourier" else None
        self.map_label = _init(Linear(config.num_classes, noise_channels)) if config.num_classes else None
        self.map_augment = _init(Linear(config.augment_dim, noise_channels, bias=False)) if config.augment_dim else None
        self.map_gap = MapGap(noise_channels, noise_channels) if config.two_times else None
        self.map_layer0 = _init(Linear(noise_channels, emb_channels))
        self.map_layer1 = _init(Linear(emb_channels, emb_channels))

        def block(width: int, out: int, *, attention: bool = False, up: bool = False, down: bool = False) -> Block:
            resample = Resample(config.resample_filter, up=up) if up or down else None
            return Block(width, out, emb_channels, config.dropout, attention=attention, resample=resample)

        resolutions = level_resolutions(config.resolution, config.channel_mult)
        levels = [(f"{r}x{r}", r, m * config.channels) for r, m in zip(resolutions, config.channel_mult, strict=True)]
        name, _, _ = levels[0]
        width, aux = config.channels, config.in_channels
        self.enc = nn.ModuleDict({f"{name}_conv": _init(Conv2d(config.in_channels, width, 3))})
        skips = [width]
        for level, (name, resolution, out) in enumerate(levels):
            if level > 0:
                self.enc[f"{name}_down"] = block(width, width, down=True)
                if config.encoder == "residual":
                    self.enc[f"{name}_aux_residual"] = _init(DownConv(aux, width, config.resample_filter))
                    aux = width
                skips.append(width)
            for index in range(config.num_blocks):
                attention = resolution in config.attention_resolutions
                self.enc[f"{name}_block{index}"] = block(width, out, attention=attention)
                width = out
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, (name, resolution, out) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(width, width, attention=True)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, up=True)
            for index in range(config.num_blocks + 1):
                attention = index == config.num_blocks and resolution in config.attention_resolutions
                self.dec[f"{name}_block{index}"] = block(width + skips.pop(), out, attention=attention)
                width = out
        self.dec[f"{name}_aux_norm"] = GroupNorm(width, eps=1e-6, group_channels=4)
        self.dec[f"{name}_aux_conv"] = _init(Conv2d(width, config.out_channels, 3), gain=1e-5)
        self.register_load_state_dict_pre_hook(_drop_filters)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None, gap: Tensor) -> Tensor:
        """Everything that is not the image, as one vector: [B, channels * channel_mult_emb]."""
        count = self.map_layer0.in_features
        features = noise_features(noise, count, endpoint=True) if self.map_noise is None else self.map_noise(noise)
        emb = torch.cat(features.chunk(2, dim=1)[::-1], dim=1)
        if self.map_label is not None:
            # a linear map of the one-hot label, scaled to variance 1, is a row of a table
            table = self.map_label.weight.t().to(emb.dtype) * math.sqrt(self.config.num_classes)
            hidden = self.config.label_dropout if self.training else 0.0
            emb = emb + look_up(table, labels, emb.shape[0], hidden) + self.map_label.bias.to(emb.dtype)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        if self.map_gap is not None:
            emb = emb + self.map_gap(gap)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

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
            augment: [B, augment_dim], or None for zeros.
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
            augment_dim=config.augment_dim,
            two_times=config.two_times,
        )
        emb = self.embed(noise, labels, augment, gap).to(x.dtype)
        aux = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * HALF
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = layer(x, silu=True)
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return x.contiguous()


class Block(Recomputed):
    """Residual block with the embedding added after the first convolution, and attention after the second."""

    def __init__(
        self, width: int, out: int, emb_channels: int, dropout: float, *, attention: bool, resample: Resample | None
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.resample = resample
        self.norm0 = GroupNorm(width, eps=1e-6, group_channels=4)
        self.conv0 = _init(Conv2d(width, out, 3))
        self.affine = _init(Linear(emb_channels, out))
        self.norm1 = GroupNorm(out, eps=1e-6, group_channels=4)
        self.conv1 = _init(Conv2d(out, out, 3), gain=1e-5)
        self.skip = _init(Conv2d(width, out, 1)) if width != out or resample else None
        self.attention = attention
        if attention:
            self.norm2 = GroupNorm(out, eps=1e-6, group_channels=4)
            self.qkv = _init(Conv2d(out, 3 * out, 1), gain=math.sqrt(0.2))
            self.proj = _init(Conv2d(out, out, 1), gain=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        inside: Tensor | Pending
        if self.resample is None:
            inside = self.norm0.pending(x, silu=True)
        else:
            inside, x = self.resample(self.norm0(x, silu=True)), self.resample(x)
        dropout = self.dropout if self.training else 0.0
        second = normed(self.norm1, self.conv0, inside, self.affine(emb), silu=True, dropout=dropout)
        h = self.conv1(second, gain=HALF)
        x = torch.add(h, x, alpha=HALF) if self.skip is None else h + self.skip(x, gain=HALF)
        if self.attention:
            h = attend(_qkv_blocks(self.qkv, self.norm2(x)), 1)
            x = torch.add(self.proj(h, gain=HALF), x, alpha=HALF)
        return x


def _qkv_blocks(conv: Conv2d, x: Tensor) -> Tensor:
    """The projection to queries, keys and values, whose stored rows alternate q, k, v, as three blocks of rows."""
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    weight, bias = (rows.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1).to(x.dtype) for rows in (weight, bias))
    return convolve(x, weight, bias)


class Fourier(nn.Module):
    """Cosines, then sines, of the noise at fixed random frequencies: [B] to [B, count]."""

    freqs: Tensor

    def __init__(self, count: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(count // 2) * scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        exact = self.freqs  # angles of hundreds of turns: `network.bfloat16()` must not round the frequencies
        super()._apply(fn, recurse)
        if self.freqs.dtype != exact.dtype:
            self.freqs = exact.to(self.freqs.device)
        return self

    def forward(self, noise: Tensor) -> Tensor:
        angles = noise[:, None] * (2 * math.pi * self.freqs).to(noise.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class DownConv(Conv2d):
    """A 3x3 convolution, then halving of the resolution; the zero padding of both comes first."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]) -> None:
        super().__init__(in_channels, out_channels, 3)
        self.resample = Resample(taps, up=False, pad=False)
        self.padding = (1 + (len(taps) - 1) // 2,) * 2

    def forward(self, x: Tensor | Pending, gain: float = 1.0, *, biased: bool = True) -> Tensor:
        return self.resample(super().forward(x, gain, biased=biased))


def _init(layer: Layer, gain: float = 1.0) -> Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _drop_filters(network: DDPMpp, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    taps = torch.tensor(network.config.resample_filter, dtype=torch.float32)
    expected = torch.outer(taps, taps) / taps.sum() ** 2
    for key in [key for key in state if key.startswith(prefix) and key.endswith(".resample_filter")]:
        found = state.pop(key).reshape(-1)
        if found.shape != (expected.numel(),) or not torch.allclose(found.float().cpu(), expected.reshape(-1)):
            raise ValueError(f"{key} is not the filter {network.config.resample_filter} of the configuration")
