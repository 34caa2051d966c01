"""Group norm and what stands around it (a scale and shift, SiLU, dropout), in as few passes over memory as can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks import chance, native
from cmtool.networks.modes import plain, prompt
from cmtool.networks.recomputed import remade


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the type of its input, with statistics in float32 or better.

    As many groups as possible up to 32, each of the same size and of at least `group_channels` channels.
    """

    def __init__(self, channels: int, *, eps: float, group_channels: int) -> None:
        most = max(1, min(32, channels // group_channels))
        groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor, *given: Any, **how: Any) -> Tensor:  # type: ignore[override]
        """The norm of x, and what usually stands around it, in as few passes over memory as the device allows.

        Arguments as `pending`.
        """
        return self.pending(x, *given, **how).tensor()

    def pending(
        self,
        x: Tensor,
        film: tuple[Tensor, Tensor] | None = None,
        *,
        added: Tensor | None = None,
        silu: bool = False,
        dropout: float = 0.0,
    ) -> Pending:
        """The norm of x for a convolution, which may take it along the way.

        Args:
            x: [B, C, H, W].
            film: (scale, shift) [B, C] each: the norm times 1 + scale plus shift.
            added: [B, C], added to x before.
            silu: SiLU after all this.
            dropout: the share of entries to drop at the end; see `drop`.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if film is not None:
            scale, shift = film
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        keys = chance.keys(x) if dropout else None
        how = native.Shape(self.num_groups, self.eps, silu, *chance.threshold(dropout))
        return Pending(x, added, weight, bias, keys, how)


class Pending(NamedTuple):
    """A norm and what stands around it, still to be taken.

    Args:
        x: [B, C, H, W].
        added: [B, C], or None.
        weight, bias: [C], or [B, C] for each sample its own.
        keys: int64 [B] where entries are dropped, see `chance`; or None.
    """

    x: Tensor
    added: Tensor | None
    weight: Tensor
    bias: Tensor
    keys: Tensor | None
    how: native.Shape

    def tensor(self) -> Tensor:
        """The norm, [B, C, H, W] in the type of x."""
        x, added, weight, bias, keys, how = self
        weight, bias = weight.expand(x.shape[:2]), bias.expand(x.shape[:2])
        direct = not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if direct and (x.device.type == "cpu" or (x.is_cuda and native.kernels() is not None)):
            if plain():
                return _Normalise.forward(x, added, weight, bias, keys, how)[0]
            out: Tensor = _Normalise.apply(x, added, weight, bias, keys, how)[0]
            return remade(out, x, (added, weight, bias, keys, how))
        return _normalise(x, added, weight, bias, keys, how)


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
    return y if keys is None else y * chance.mask(y, keys, how)


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
    return (y if keys is None else y * chance.mask(y, keys, how)).to(x.dtype)


@prompt
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
        return y if keys is None else y * chance.mask(y, keys, how), mean, rstd

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
            grad = grad * chance.mask(x, keys, how)
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
        slope = slope * chance.mask(slope, keys, how)
    return lambda change: rstd * (change - mean(change) - hat * mean(hat * change)), hat, slope


def _group_mean(channels: Tensor, groups: int) -> Tensor:
    """Each channel's value replaced by the mean of its group: [B, C] to [B, C]."""
    grouped = channels.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _pixels(channels: Tensor, like: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, 1] in the type of `like`."""
    return channels.to(like.dtype)[:, :, None, None]
