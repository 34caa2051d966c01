"""Layers shared by the networks.

Parameters stay in the type they are stored in and are cast to the type of the activations where they are used: the
caller picks the compute type by the type of its input. Feature maps are kept channels-last in memory, which is what
makes low-precision convolutions fast on CPUs and GPUs; shapes are always [B, C, H, W].
"""

from __future__ import annotations

import math
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
        weight, bias = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
        if film is not None:
            scale, shift = film
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        if x.device.type == "cpu":
            return _Normalise.apply(x, weight, bias, self.num_groups, self.eps, silu)[0]
        return _normalise(x, weight, bias, self.num_groups, self.eps, silu)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Group norm with a weight and a bias [B, C] of each sample's own, then SiLU if asked."""
    y = F.group_norm(x, groups, eps=eps)
    y = torch.addcmul(bias.to(x.dtype)[:, :, None, None], y, weight.to(x.dtype)[:, :, None, None])
    return F.silu(y) if silu else y


class _Normalise(torch.autograd.Function):
    """`_normalise` for channels-last tensors on a CPU, where torch's kernel is several times slower than a copy.

    Sums over pixels, which are fast, do all the work: per sample and channel, out = silu(a x + c), and the gradient
    is dx = a dz + c1 x + c0 with four numbers that come from the sums of x, x^2, dz and dz x.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _group_mean(wide.mean((2, 3)), groups)
        squares = wide.square() if wide is x else wide.square_()
        variance = _group_mean(squares.mean((2, 3)), groups) - mean.square()
        rstd = (variance.clamp_min(0) + eps).rsqrt()
        y = _affine(x, weight, bias, mean, rstd)
        return (F.silu(y, inplace=True) if silu else y), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, ctx.groups, ctx.eps, ctx.silu = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: let torch do both
            y = _normalise(x, weight, bias, ctx.groups, ctx.eps, ctx.silu)
            return (*torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True), None, None, None)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _affine(x, weight, bias, mean, rstd))
        sum_grad = grad.sum((2, 3), dtype=mean.dtype)
        sum_hat = ((grad * x).sum((2, 3), dtype=mean.dtype) - mean * sum_grad) * rstd
        pixels = x.shape[2] * x.shape[3]
        c1 = _group_mean(weight * sum_hat, ctx.groups) / -pixels * rstd.square()
        c0 = _group_mean(weight * sum_grad, ctx.groups) / -pixels * rstd - mean * c1
        dx = torch.addcmul(_pixels(c0, x), x, _pixels(c1, x)).addcmul_(grad, _pixels(weight * rstd, x))
        return dx, sum_hat, sum_grad, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        weight, bias, mean, rstd = (part[:, :, None, None] for part in (weight, bias, mean, rstd))
        hat = (x.to(mean.dtype) - mean) * rstd
        change = torch.zeros_like(hat)
        if dx is not None:
            dx = dx.to(mean.dtype)
            drift = _group_mean(dx.mean((2, 3)), ctx.groups)[:, :, None, None]
            growth = _group_mean((hat * dx).mean((2, 3)), ctx.groups)[:, :, None, None]
            change = change + weight * rstd * (dx - drift - hat * growth)
        if dweight is not None:
            change = change + dweight[:, :, None, None] * hat
        if dbias is not None:
            change = change + dbias[:, :, None, None]
        if ctx.silu:
            change = torch.ops.aten.silu_backward(change, torch.addcmul(bias, hat, weight))
        return change.to(x.dtype), None, None


def _group_mean(channels: Tensor, groups: int) -> Tensor:
    """Each channel's value replaced by the mean of its group: [B, C] to [B, C]."""
    grouped = channels.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _pixels(channels: Tensor, like: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, 1] in the type of `like`."""
    return channels.to(like.dtype)[:, :, None, None]


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """weight (x - mean) rstd + bias, as one multiplication and one addition."""
    factor = (weight * rstd).to(x.dtype)  # rounded before the mean is taken off, so that both see the same factor
    return torch.addcmul(_pixels(bias - mean * factor, x), x, _pixels(factor, x))


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
        self.box = taps[0] == taps[-1] and len(taps) == 2
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps) * (2 if up else 1)
        self.register_buffer("filter", torch.outer(line, line)[None, None], persistent=False)

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
    pixels = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in pixels.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def noise_features(noise: Tensor, count: int, *, endpoint: bool) -> Tensor:
    """Cosines, then sines, of the noise at `count` / 2 frequencies from 1 down to 1/10000: [B] to [B, count].

    The last frequency is exactly 1/10000 with `endpoint`; without, it is where the next one would lie.
    """
    half = count // 2
    steps = torch.arange(half, dtype=torch.float32, device=noise.device) / (half - endpoint)
    angles = noise[:, None] * torch.exp(-math.log(10000) * steps).to(noise.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def one_hot(labels: Tensor | None, num_classes: int, like: Tensor, hidden: float = 0.0) -> Tensor:
    """Labels as rows [B, num_classes] of the type and device of `like` [B, ...]; all zero for no label (None or -1).

    Args:
        hidden: the share of labels to drop at random.
    Raises:
        ValueError: labels of another number or type.
    """
    if labels is None:
        return like.new_zeros(like.shape[0], num_classes)
    if labels.shape != like.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, not whole numbers of shape ({like.shape[0]},)"
        )
    if hidden:
        labels = labels.masked_fill(torch.rand(labels.shape, device=labels.device) < hidden, -1)
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(like.dtype)
