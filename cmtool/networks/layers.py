"""Layers shared by the networks.

Parameters stay in the type they are stored in and are cast to the type of the activations where they are used: the
caller picks the compute type by the type of its input. On a CPU feature maps lie channels-last in memory, which is what
makes low-precision convolutions fast there; shapes are always [B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Conv2d):
    """A convolution that computes in the type of its input and keeps the resolution (at stride 1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The convolution, times `gain` (applied to the weights: far fewer numbers than the output has)."""
        weight, bias = self.weight, self.bias
        assert bias is not None
        if gain != 1:
            weight, bias = weight * gain, bias * gain
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride=self.stride, padding=self.padding)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the type of its input, with statistics in float32 or better.

    As many groups as possible up to 32, each of the same size and of at least `group_channels` channels.
    """

    def __init__(self, channels: int, *, eps: float, group_channels: int) -> None:
        most = max(1, min(32, channels // group_channels))
        groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor] | None = None, *, silu: bool = False) -> Tensor:
        """The norm; then, with `film` = (scale, shift) [B, C] each, times 1 + scale plus shift; then SiLU if asked."""
        weight, bias = self.weight.expand(x.shape[0], -1), self.bias.expand(x.shape[0], -1)
        if film is not None:
            scale, shift = film
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        if x.device.type == "cpu" and not torch.compiler.is_exporting():
            return _Normalise.apply(x, weight, bias, self.num_groups, self.eps, silu)[0]
        return _normalise(x, weight, bias, self.num_groups, self.eps, silu)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Group norm with a weight and a bias [B, C] of each sample's own, then SiLU if asked."""
    y = F.group_norm(x.contiguous(), groups, eps=eps)  # its forward-mode derivative fails on other layouts
    y = torch.addcmul(bias.to(x.dtype)[:, :, None, None], y, weight.to(x.dtype)[:, :, None, None])
    return F.silu(y) if silu else y


class _Normalise(torch.autograd.Function):
    """`_normalise` for channels-last tensors on a CPU, where torch's kernel is several times slower than a copy.

    Sums over pixels, which are fast, do all the work: per sample and channel, out = silu(a x + c), and the gradient
    is dx = a dz + c1 x + c0 with numbers that come from the sums of x, x^2, dz and dz x.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _group_mean(wide.mean((2, 3)), groups)
        squares = wide.square() if wide is x else wide.square_()
        variance = _group_mean(squares.mean((2, 3)), groups) - mean.square()
        rstd = (variance.clamp_min(0) + eps).rsqrt()
        factor = (weight * rstd).to(x.dtype)  # rounded before the mean is taken off: both see the same factor
        y = torch.addcmul(_pixels(bias - mean * factor, x), x, _pixels(factor, x))
        return (F.silu(y), y, mean, rstd) if silu else (y, y.new_empty(0), mean, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.groups, ctx.eps, ctx.silu = inputs
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, *rest)
        ctx.save_for_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weight, bias, y, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            project, hat, slope = _linearise(x, weight, bias, ctx.groups, ctx.eps, ctx.silu)
            grad = grad * slope
            dx = project(grad * weight[:, :, None, None])
            return dx.to(x.dtype), (grad * hat).sum((2, 3)), grad.sum((2, 3)), None, None, None
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, y)
        sum_grad = grad.sum((2, 3)).to(mean.dtype)  # accumulated wide, rounded once: enough for a gradient
        sum_hat = ((grad * x).sum((2, 3)) - mean * sum_grad) * rstd
        pixels = x.shape[2] * x.shape[3]
        c1 = _group_mean(weight * sum_hat, ctx.groups) / -pixels * rstd.square()
        c0 = _group_mean(weight * sum_grad, ctx.groups) / -pixels * rstd - mean * c1
        dx = torch.addcmul(_pixels(c0, x), x, _pixels(c1, x)).addcmul_(grad, _pixels(weight * rstd, x))
        return dx, sum_hat, sum_grad, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Any:
        x, weight, bias = ctx.saved_tensors
        project, hat, slope = _linearise(x, weight, bias, ctx.groups, ctx.eps, ctx.silu)
        change = torch.zeros_like(hat)
        if dx is not None:
            change = change + weight[:, :, None, None] * project(dx.to(hat.dtype))
        if dweight is not None:
            change = change + dweight[:, :, None, None] * hat
        if dbias is not None:
            change = change + dbias[:, :, None, None]
        return (change * slope).to(x.dtype), None, None, None


def _linearise(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """`_normalise` around x, in operations that can be differentiated again.

    Returns:
        The derivative of the standardised x (a symmetric map), the standardised x, and the slope of the SiLU.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def mean(values: Tensor) -> Tensor:
        return _group_mean(values.mean((2, 3)), groups)[:, :, None, None]

    centred = wide - mean(wide)
    rstd = (mean(centred.square()) + eps).rsqrt()
    hat = centred * rstd
    y = torch.addcmul(bias[:, :, None, None], hat, weight[:, :, None, None])
    slope = y.sigmoid() * (1 + y * (-y).sigmoid()) if silu else torch.ones_like(y)
    return lambda change: rstd * (change - mean(change) - hat * mean(hat * change)), hat, slope


def _group_mean(channels: Tensor, groups: int) -> Tensor:
    """Each channel's value replaced by the mean of its group: [B, C] to [B, C]."""
    grouped = channels.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _pixels(channels: Tensor, like: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, 1] in the type of `like`."""
    return channels.to(like.dtype)[:, :, None, None]


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
    if qkv.device.type == "cpu":  # where the gradient of torch's bfloat16 kernel is several times slower
        qkv = qkv.to(torch.promote_types(dtype, torch.float32))
    pixels = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in pixels.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2).to(dtype)


def drop(x: Tensor, share: float) -> Tensor:
    """Dropout: a `share` of the entries zero, the others scaled up.

    The same entries under the same seed whether or not a forward-mode derivative is taken along, which torch's own does
    not promise: its kernels there draw in another order.
    """
    if not share:
        return x
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - share)
    return x * kept * (1 / (1 - share))


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
        known = known & (torch.rand(labels.shape, device=labels.device) >= hidden)
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
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x, noise.to(wide), gap.to(wide)
