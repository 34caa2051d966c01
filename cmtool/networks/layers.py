"""Layers shared by the networks.

Parameters stay in the type they are stored in and are cast to the type of the activations where they are used
(`casting`): the caller picks the compute type by the type of its input. On CPUs and GPUs feature maps lie
channels-last in memory, which is what makes low-precision convolutions fast; shapes are always [B, C, H, W].
Convolutions, norms, dropout and what is recomputed have a file each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks import chance
from cmtool.networks.casting import cast
from cmtool.networks.modes import derived, prompt


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input."""

    keeps_casts = True

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast(self.bias, x.dtype, keep=self.keeps_casts)
        return F.linear(x, cast(self.weight, x.dtype, keep=self.keeps_casts), bias)


class Resample(nn.Module):
    """Halve or double the resolution with a separable filter that keeps constant images constant.

    The filter is a constant of the architecture, hence no part of the state dict.

    Args:
        taps: (1, 1) is a mean over 2x2 pixels, or repetition of each pixel; anything else a depthwise convolution.
        up: double instead of halve.
        pad: False leaves out the zero padding (halving only).
    """

    filter: Tensor

    def __init__(self, taps: tuple[int, ...], *, up: bool, pad: bool = True) -> None:
        super().__init__()
        self.up = up
        self.padding = (len(taps) - 1) // 2 if pad else 0
        self.taps = taps
        self.box = taps[0] == taps[-1] and len(taps) == 2
        self.register_buffer("filter", torch.empty(1, 1, len(taps), len(taps)), persistent=False)
        self.restore_constants()

    def restore_constants(self) -> None:
        """Set the filter, also where the network was built without memory; see `networks.restore_constants`."""
        line = [tap / sum(self.taps) * (2 if self.up else 1) for tap in self.taps]
        self.filter = torch.tensor([[[[a * b for b in line] for a in line]]], dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return repeat2(x) if self.up else F.avg_pool2d(x, 2)
        kernel = self.filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        conv = F.conv_transpose2d if self.up else F.conv2d
        return conv(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


def repeat2(x: Tensor) -> Tensor:
    """Each pixel four times: [B, C, H, W] to [B, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def attend(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention over pixels.

    Args:
        qkv: [B, 3C, H, W]: all queries, then all keys, then all values; the heads lie side by side in each.
    Returns:
        [B, C, H, W].
    """
    batch, _, height, width = qkv.shape
    dtype = qkv.dtype
    if qkv.device.type == "cpu" and torch.is_grad_enabled():
        # Without a gradient torch's bfloat16 kernel is the faster one; its gradient is several times slower.
        qkv = qkv.to(torch.promote_types(dtype, torch.float32))
    pixels = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in pixels.unbind(2))
    if derived() and not torch.is_grad_enabled():
        out = _Attend.apply(q, k, v)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2).to(dtype)


@prompt
class _Attend(torch.autograd.Function):
    """Attention with its forward-mode derivative, for when nothing else is wanted of it: [B, heads, pixels, D] each."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shares = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return shares @ v, shares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def jvp(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        q, k, v, shares = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        change = (dq * scale) @ k.transpose(-2, -1) + q * scale @ dk.transpose(-2, -1)
        # softmax has a symmetric Jacobian: its derivative forwards is the one backwards.
        change = torch._softmax_backward_data(change, shares, -1, shares.dtype)
        return change @ v + shares @ dv, None


def noise_features(noise: Tensor, count: int, *, endpoint: bool) -> Tensor:
    """Cosines, then sines, of the noise at `count` / 2 frequencies from 1 down to 1/10000: [B] to [B, count].

    The last frequency is exactly 1/10000 with `endpoint`; without, it is where the next one would lie.
    """
    half = count // 2
    steps = torch.arange(half, dtype=torch.float32, device=noise.device) / (half - endpoint)
    angles = noise[:, None] * torch.exp(-math.log(10000) * steps).to(noise.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def unit_features(value: Tensor, count: int) -> Tensor:
    """Cosines, then sines, of a number of order one at `count` / 2 frequencies from 1/4 to 16: [B] to [B, count].

    The lowest tells all numbers up to 25 apart, and at the highest 1/128 is an angle of 1/8, which is still easy to
    tell from 0. There is nothing above, because the derivative of a feature is as large as its frequency.
    """
    frequencies = torch.linspace(-2, 4, count // 2, device=value.device).exp2()
    angles = value[:, None] * frequencies.to(value.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class MapGap(Linear):
    """What a network is told about the length of a jump: [B] to [B, out_features], zero before training.

    The features of gap 0 are ones and zeros, not all zeros: the weights may also learn a constant, which the diagonal
    sees too. So a gap that is not given is a gap of zeros, never a term left out. The sines keep a slope at 0.
    """

    def __init__(self, count: int, out_features: int) -> None:
        super().__init__(count, out_features, bias=False)

    def reset_parameters(self) -> None:  # draws no random numbers: the rest starts as it would without this layer
        nn.init.zeros_(self.weight)

    def forward(self, gap: Tensor) -> Tensor:
        return super().forward(unit_features(gap, self.in_features))


def look_up(table: Tensor, labels: Tensor | None, batch: int, hidden: float = 0.0) -> Tensor:
    """The rows of the table [num_classes, D] that the labels name, [batch, D]; zeros for no label (None or negative).

    Args:
        hidden: the share of labels to drop at random.
    """
    if labels is None:
        return table.new_zeros(batch, table.shape[1])
    known = labels >= 0
    if hidden:
        known = known & (chance.keys(labels) >= chance.threshold(hidden)[0])
    return table[labels.clamp_min(0)] * known[:, None].to(table.dtype)


def prepare(
    x: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    augment: Tensor | None,
    gap: Tensor | None,
    *,
    num_classes: int,
    augment_dim: int,
    two_times: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of a network, checked; x laid out for speed, the noise and the gap (or zeros) in float32 or better.

    Raises:
        ValueError: labels, an augmentation vector, a noise or a gap of the wrong shape or type, or for a network
            without them.
    """
    batch = x.shape[0]
    if noise.shape != (batch,):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, not ({batch},)")
    if labels is not None:
        if not num_classes:
            raise ValueError("labels were given to a network without labels")
        if labels.shape != (batch,) or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, not whole numbers of shape ({batch},)")
    if augment is not None and (not augment_dim or augment.shape != (batch, augment_dim)):
        raise ValueError(f"augment has shape {tuple(augment.shape)}; this network takes {augment_dim or 'no'} entries")
    if gap is None:
        gap = torch.zeros_like(noise)
    elif not two_times:
        raise ValueError("a gap was given to a network without two_times")
    elif gap.shape != (batch,):
        raise ValueError(f"gap has shape {tuple(gap.shape)}, not ({batch},)")
    if x.device.type in ("cpu", "cuda"):
        x = x.contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x, noise.to(wide), gap.to(wide)
