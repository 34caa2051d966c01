"""Layers shared by the networks.

Parameters stay in the type they are stored in and are cast to the type of the activations where they are used (once
for as long as they do not change): the caller picks the compute type by the type of its input. On CPUs and GPUs
feature maps lie channels-last in memory, which is what makes low-precision convolutions fast; shapes are always
[B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from cmtool.networks import native, winograd


def derived() -> bool:
    """Whether forward-mode derivatives or torch.func's transformations are at work, which only autograd knows of."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _plain() -> bool:
    """Whether values are all that is wanted. Autograd's own way around them takes Python as long as they do a GPU."""
    return not torch.is_grad_enabled() and not derived()


class _Kept:
    """What was made of a parameter, as an attribute of it: it goes when the parameter goes, and is never saved."""

    def __init__(self) -> None:
        self.of: tuple[Any, ...] = ()
        self.value: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


def _kept(parameter: Tensor, dtype: torch.dtype, gain: float) -> Tensor:
    """A parameter times a gain, in another type: the same tensor for as long as the parameter does not change."""
    if parameter.is_inference():  # nobody counts its changes
        return (parameter * gain).to(dtype)
    kept = getattr(parameter, "_kept", None)
    if kept is None:
        kept = parameter._kept = _Kept()  # type: ignore[attr-defined]
    now = (parameter._version, parameter.data_ptr(), dtype, gain)
    if kept.of != now:
        with torch.inference_mode(False):  # the next pass may want a gradient
            kept.value = parameter.detach().to(dtype) if gain == 1 else (parameter.detach() * gain).to(dtype)
        kept.of = now
    value: Tensor = kept.value
    return value


class _Cast(torch.autograd.Function):
    """A parameter times a gain, in another type: computed once for as long as the parameter does not change.

    So a step casts each network once, however many passes and micro-batches it takes.
    """

    @staticmethod
    def forward(parameter: Tensor, dtype: torch.dtype, gain: float) -> Tensor:
        return _kept(parameter, dtype, gain).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype, float], output: Tensor) -> None:
        parameter, ctx.dtype, ctx.gain = inputs
        ctx.own = parameter.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.to(ctx.own)
        return grad if ctx.gain == 1 else grad * ctx.gain, None, None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, *_: None) -> Tensor:
        return (change * ctx.gain).to(ctx.dtype)


def _count_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """torch's fused optimizers change parameters without counting it, and `_Cast` would keep old values."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                increment_version(parameter)


register_optimizer_step_post_hook(_count_change)


def cast(parameter: Tensor, dtype: torch.dtype, gain: float = 1.0, *, keep: bool = True) -> Tensor:
    """The parameter times `gain` (in its own type), in the type computed in.

    Args:
        keep: the result for the next call; not for parameters whose memory comes and goes.
    """
    if parameter.dtype == dtype and gain == 1:
        return parameter
    if not keep or torch.compiler.is_compiling() or torch.compiler.is_exporting() or _recording(parameter):
        return parameter.to(dtype) if gain == 1 else (parameter * gain).to(dtype)
    if _plain():
        return _kept(parameter, dtype, gain)
    made: Tensor = _Cast.apply(parameter, dtype, gain)
    return made


def _recording(parameter: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: what it replays has to see the parameter's later values."""
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()


def _quick(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether `winograd` convolves: its operations are none that torch could differentiate or transform."""
    unseen = not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
    return unseen and winograd.usable(x, weight, stride, padding)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    if _quick(x, weight, stride, padding):
        return winograd.forward(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


class _Convolve(torch.autograd.Function):
    """A convolution, by `winograd` where that gains, whose forward-mode derivative leaves out what does not move.

    torch's own computes that of the weights, too: for the usual tangents it convolves x with zeros.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        return _convolved(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.place = inputs
        ctx.shape = output.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if _quick(x, weight, *ctx.place):
            dx = winograd.input_gradient(grad, weight) if wanted[0] else None
            dweight = winograd.weight_gradient(x, grad, weight) if wanted[1] else None
            return dx, dweight, grad.sum((0, 2, 3)) if wanted[2] else None, None, None
        stride, padding = ctx.place
        rest = ([len(weight)], stride, padding, (1, 1), False, (0, 0), 1, wanted)
        return *torch.ops.aten.convolution_backward(grad, x, weight, *rest), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = [] if dx is None else [_convolved(dx, weight, None, *ctx.place)]
        terms += [] if dweight is None else [_convolved(x, dweight, None, *ctx.place)]
        terms += [] if dbias is None else [dbias[:, None, None].expand(ctx.shape)]
        change: Any = sum(terms[1:], start=terms[0])
        return change


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """A convolution as torch's, as fast as it can be had: on CPUs, and under forward-mode derivatives, too."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return F.conv2d(x, weight, bias, stride, padding)
    if _plain():
        return _convolved(x, weight, bias, stride, padding)
    with _forgetting(x):
        if derived() or winograd.usable(x, weight, stride, padding):
            made: Tensor = _Convolve.apply(x, weight, bias, stride, padding)
            return made
        return F.conv2d(x, weight, bias, stride, padding)


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input."""

    keeps_casts = True

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast(self.bias, x.dtype, keep=self.keeps_casts)
        return F.linear(x, cast(self.weight, x.dtype, keep=self.keeps_casts), bias)


class Conv2d(nn.Conv2d):
    """A convolution that computes in the type of its input and keeps the resolution (at stride 1)."""

    keeps_casts = True

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)

    def forward(self, x: Tensor, gain: float = 1.0, *, biased: bool = True) -> Tensor:
        """The convolution, times `gain` (applied to the weights: far fewer numbers than the output has)."""
        weight = cast(self.weight, x.dtype, gain, keep=self.keeps_casts)
        bias = self.bias_as(x, gain) if biased else None
        return convolve(x, weight, bias, self.stride, self.padding)  # type: ignore[arg-type]

    def bias_as(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The bias, times `gain`, in the type of x; [out_channels]."""
        assert self.bias is not None
        return cast(self.bias, x.dtype, gain, keep=self.keeps_casts)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the type of its input, with statistics in float32 or better.

    As many groups as possible up to 32, each of the same size and of at least `group_channels` channels.
    """

    def __init__(self, channels: int, *, eps: float, group_channels: int) -> None:
        most = max(1, min(32, channels // group_channels))
        groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        super().__init__(groups, channels, eps=eps)

    def forward(
        self,
        x: Tensor,
        film: tuple[Tensor, Tensor] | None = None,
        *,
        added: Tensor | None = None,
        silu: bool = False,
        dropout: float = 0.0,
    ) -> Tensor:
        """The norm of x, and what usually stands around it, in as few passes over memory as the device allows.

        Args:
            x: [B, C, H, W].
            film: (scale, shift) [B, C] each: the norm times 1 + scale plus shift.
            added: [B, C], added to x before.
            silu: SiLU after all this.
            dropout: the share of entries to drop at the end; see `drop`.
        """
        weight, bias = self.weight.expand(x.shape[0], -1), self.bias.expand(x.shape[0], -1)
        if film is not None:
            scale, shift = film
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        keys = _keys(x) if dropout else None
        how = native.Shape(self.num_groups, self.eps, silu, *_threshold(dropout))
        direct = not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if direct and (x.device.type == "cpu" or (x.is_cuda and native.kernels() is not None)):
            if _plain():
                return _Normalise.forward(x, added, weight, bias, keys, how)[0]
            out: Tensor = _Normalise.apply(x, added, weight, bias, keys, how)[0]
            return _remade(out, x, (added, weight, bias, keys, how))
        return _normalise(x, added, weight, bias, keys, how)


def normed(norm: nn.Module, conv: nn.Module, x: Tensor, added: Tensor | None = None, **how: Any) -> Tensor:
    """The norm of a convolution (plus `added`, [B, C]); `how` as for the norm.

    On a GPU the norm adds the convolution's bias too: cuDNN takes a pass over memory for it, and one for its gradient.
    """
    biased = not x.is_cuda
    if not biased:
        assert isinstance(conv, Conv2d)
        bias = conv.bias_as(x)
        added = bias.expand(x.shape[0], -1) if added is None else added + bias
    out: Tensor = norm(conv(x, biased=biased), added=added, **how)
    return out


def _normalise(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, how: native.Shape
) -> Tensor:
    """Group norm with a weight and a bias [B, C] of each sample's own, in torch's operations."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _fusible(x, added, weight, bias, keys, how)
    if added is not None:
        x = x + _pixels(added, x)
    y = F.group_norm(x.contiguous(), how.groups, eps=how.eps)  # its forward-mode derivative fails on other layouts
    y = torch.addcmul(_pixels(bias, x), y, _pixels(weight, x))
    y = F.silu(y) if how.silu else y
    return y if keys is None else y * _mask(y, keys, how)


def _fusible(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, how: native.Shape
) -> Tensor:
    """`_normalise` for torch.compile: no operation asks for a layout, so all of it fuses into two passes over x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if added is not None:
        wide = wide + added[:, :, None, None]
    variance, mean = torch.var_mean(wide.unflatten(1, (how.groups, -1)), dim=(2, 3, 4), correction=0)
    each = x.shape[1] // how.groups
    factor = weight * (variance + how.eps).rsqrt().repeat_interleave(each, 1)
    offset = bias - mean.repeat_interleave(each, 1) * factor
    y = wide * factor[:, :, None, None] + offset[:, :, None, None]
    y = F.silu(y) if how.silu else y
    return (y if keys is None else y * _mask(y, keys, how)).to(x.dtype)


class _Normalise(torch.autograd.Function):
    """`_normalise` for channels-last tensors, where torch's kernel is several times slower than a copy.

    By `native` or, on a GPU, by `kernels` if that is to be had. Else sums over pixels, which are fast, do all the
    work: per sample and channel, out = silu(a x + c), and the gradient is dx = a dz + c1 x + c0 with numbers that come
    from the sums of x, x^2, dz and dz x. Nothing is kept for the backward pass but the input.
    """

    @staticmethod
    def forward(
        x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, how: native.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (fast := native.backend(x)) is not None:
            return fast.forward(x, added, weight, bias, keys, how)
        if added is not None:
            x = x + _pixels(added, x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _group_mean(wide.mean((2, 3)), how.groups)
        squares = wide.square() if wide is x else wide.square_()
        variance = _group_mean(squares.mean((2, 3)), how.groups) - mean.square()
        rstd = (variance.clamp_min(0) + how.eps).rsqrt()
        y = _affine(x, weight, bias, mean, rstd)
        y = F.silu(y) if how.silu else y
        return y if keys is None else y * _mask(y, keys, how), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.how = inputs
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *rest)
        ctx.save_for_forward(*tensors, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, added, weight, bias, keys, mean, rstd = ctx.saved_tensors
        how = ctx.how
        if torch.is_grad_enabled():  # a second derivative is wanted
            project, hat, slope = _linearise(x, added, weight, bias, keys, how)
            grad = grad * slope
            dx = project(grad * weight[:, :, None, None])
            d_added = None if added is None else dx.sum((2, 3))
            return dx.to(x.dtype), d_added, (grad * hat).sum((2, 3)), grad.sum((2, 3)), None, None
        if (fast := native.backend(x)) is not None:
            return *fast.backward(grad, x, added, weight, bias, keys, mean, rstd, how), None, None
        if added is not None:
            x = x + _pixels(added, x)
        if keys is not None:
            grad = grad * _mask(x, keys, how)
        if how.silu:
            grad = torch.ops.aten.silu_backward(grad, _affine(x, weight, bias, mean, rstd))
        sum_grad = grad.sum((2, 3)).to(mean.dtype)  # accumulated wide, rounded once: enough for a gradient
        sum_hat = ((grad * x).sum((2, 3)) - mean * sum_grad) * rstd
        pixels = x.shape[2] * x.shape[3]
        c1 = _group_mean(weight * sum_hat, how.groups) / -pixels * rstd.square()
        c0 = _group_mean(weight * sum_grad, how.groups) / -pixels * rstd - mean * c1
        dx = torch.addcmul(_pixels(c0, x), x, _pixels(c1, x)).addcmul_(grad, _pixels(weight * rstd, x))
        return dx, None if added is None else dx.sum((2, 3)), sum_hat, sum_grad, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        d_added: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        *_: None,
    ) -> Any:
        x, added, weight, bias, keys, mean, rstd = ctx.saved_tensors
        # Under torch.func tensors are wrapped, and only torch's operations know how.
        if torch._C._functorch.peek_interpreter_stack() is None and not torch.is_grad_enabled() and native.usable(x):
            known = (x, added, weight, bias, keys, mean, rstd, ctx.how)
            return native.tangent(dx, *known, d_added, dweight, dbias), None, None
        project, hat, slope = _linearise(x, added, weight, bias, keys, ctx.how)
        change = torch.zeros_like(hat)
        if d_added is not None:
            d_added = d_added[:, :, None, None].expand_as(hat)
            dx = d_added if dx is None else dx + d_added
        if dx is not None:
            change = change + weight[:, :, None, None] * project(dx.to(hat.dtype))
        if dweight is not None:
            change = change + dweight[:, :, None, None] * hat
        if dbias is not None:
            change = change + dbias[:, :, None, None]
        return (change * slope).to(x.dtype), None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    factor = (weight * rstd).to(x.dtype)  # rounded before the mean is taken off: both see the same factor
    return torch.addcmul(_pixels(bias - mean * factor, x), x, _pixels(factor, x))


def _linearise(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, how: native.Shape
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """`_normalise` around x, in operations that can be differentiated again.

    Returns:
        The derivative of the standardised x (a symmetric map), the standardised x, and the slope of what follows.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if added is not None:
        wide = wide + added[:, :, None, None]

    def mean(values: Tensor) -> Tensor:
        return _group_mean(values.mean((2, 3)), how.groups)[:, :, None, None]

    centred = wide - mean(wide)
    rstd = (mean(centred.square()) + how.eps).rsqrt()
    hat = centred * rstd
    y = torch.addcmul(bias[:, :, None, None], hat, weight[:, :, None, None])
    slope = y.sigmoid() * (1 + y * (-y).sigmoid()) if how.silu else torch.ones_like(y)
    if keys is not None:
        slope = slope * _mask(slope, keys, how)
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


class Recomputed(nn.Module):
    """A part of a network that may forget what is inside it, and compute it again when the gradient needs it.

    That is activation checkpointing: a pass more for a fraction of the memory. Set with `networks.recompute`.
    """

    recompute = False

    def __call__(self, *args: Any) -> Any:
        if not self.recompute or not torch.is_grad_enabled():
            return super().__call__(*args)
        from torch.utils.checkpoint import checkpoint

        chance, own = _chance, super().__call__

        def run(*args: Any) -> Any:
            with _all_forgotten(), entered(chance and Chance(chance.seeds, made)):
                out = own(*args)
                return out, _chance.made if _chance else 0

        made = chance.made if chance else 0
        out, after = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=chance is None)
        if chance:
            chance.made = after
        return out


# --- what is made again rather than kept ----------------------------------------------------------------------------

_forgets = True  # whether it is; not inside of a part that forgets everything anyway


def _remade(out: Tensor, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """A norm's output, which the convolution after it shall make again in its gradient rather than keep.

    That is half of what a residual block keeps, for a small part of the time of a convolution in float32. Where
    bfloat16 makes convolutions ten times as fast it would be a larger one.
    """
    if _forgets and x.dtype == torch.float32 and native.usable(x) and not derived():
        x, rest = x.detach(), tuple(one.detach() if isinstance(one, Tensor) else one for one in rest)
        out._made = out._version, lambda: native.forward(x, *rest)[0]  # type: ignore[attr-defined]
    return out


@contextmanager
def _all_forgotten() -> Iterator[None]:
    """Inside, what is kept counts for nothing: it is forgotten all at once."""
    global _forgets
    before, _forgets = _forgets, False
    try:
        yield
    finally:
        _forgets = before


@contextmanager
def _forgetting(x: Tensor) -> Iterator[None]:
    """Autograd keeps how x was made, if that is known and x still the same, where it would keep x."""
    version, make = getattr(x, "_made", (None, None))
    if version is None or version != x._version:
        yield
        return
    place = x.data_ptr(), x.shape, x.stride()  # and no reference to x, which would keep it

    def pack(tensor: Tensor) -> Any:
        return make if (tensor.data_ptr(), tensor.shape, tensor.stride()) == place else tensor

    def unpack(kept: Any) -> Tensor:
        found: Tensor = kept if isinstance(kept, Tensor) else kept()
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# --- chance: which units are dropped --------------------------------------------------------------------------------


class Chance:
    """Where the network's random decisions come from: a seed a sample, and how many decisions were made so far."""

    def __init__(self, seeds: Tensor, made: int = 0) -> None:
        self.seeds, self.made = seeds, made


_chance: Chance | None = None


@contextmanager
def seeded(seeds: Tensor | None) -> Iterator[None]:
    """Let the seeds decide what a network drops: the same seeds, the same units, whatever the batch and the device.

    Two passes under the same seeds share their dropout without a generator's state being copied or waited for.

    Args:
        seeds: int64 [B], one a sample, each at least 0; None leaves it to torch's global generator, as it is without.
    """
    with entered(None if seeds is None else Chance(seeds)):
        yield


def current_chance() -> Chance | None:
    """What `seeded` has set; None outside of it."""
    return _chance


@contextmanager
def entered(chance: Chance | None) -> Iterator[None]:
    """Let random decisions come from there; they are counted there too."""
    global _chance
    before, _chance = _chance, chance
    try:
        yield
    finally:
        _chance = before


def _keys(x: Tensor) -> Tensor:
    """A number below 2^32 for each sample of x and each decision that is made in a pass; int64 [B]."""
    chance = _chance or Chance(torch.randint(2**62, (len(x),), device=x.device))
    chance.made += 1
    # A batch may hold its samples several times over, labelled and unlabelled.
    seeds = chance.seeds.to(x.device).repeat(len(x) // len(chance.seeds))
    return _mixed((seeds + 0x85EBCA6B * chance.made) & _32_BITS, seeds >> 31)


_32_BITS = 2**32 - 1


def _mixed(entry: Tensor, key: Tensor) -> Tensor:
    """A well mixed number below 2^32 from two; int64. `mixed` in native.cpp is the same function."""
    h = ((entry * 0x9E3779B1) & _32_BITS) ^ (key & _32_BITS)
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _32_BITS
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _32_BITS
    return h ^ (h >> 16)


def _threshold(share: float) -> tuple[int, float]:
    """The numbers below which an entry is dropped, and what the others are multiplied with."""
    return round(share * 2**32), 1 / (1 - share)


def _mask(like: Tensor, keys: Tensor, how: native.Shape) -> Tensor:
    """What the entries of a tensor [B, ...] are multiplied with: 0 or 1 / (1 - share)."""
    batch, *rest = like.shape
    entry = torch.arange(like[0].numel(), device=like.device)
    kept = (_mixed(entry, keys[:, None]) >= how.threshold).to(like.dtype) * how.grown
    if not rest[1:]:
        return kept.reshape(batch, *rest)
    # Entries are numbered channel by channel within a pixel, as they lie in memory on a CPU.
    return kept.reshape(batch, *rest[1:], rest[0]).movedim(-1, 1)


def drop(x: Tensor, share: float) -> Tensor:
    """Dropout: a `share` of the entries zero, the others scaled up; which ones, `seeded` decides."""
    if not share:
        return x
    return x * _mask(x, _keys(x), native.Shape(1, 0.0, False, *_threshold(share)))


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
        known = known & (_keys(labels) >= _threshold(hidden)[0])
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
