"""Convolutions as torch's, as fast as they can be had: by `winograd` on CPUs, and under forward-mode derivatives.

A norm that comes before one may be taken along (`norms.Pending`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks import native, winograd
from cmtool.networks.casting import cast
from cmtool.networks.modes import derived, plain, prompt
from cmtool.networks.norms import GroupNorm, Pending
from cmtool.networks.recomputed import forgetting


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


@prompt
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


def _along(x: Pending, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether `winograd` convolves, and takes the norm with it: a thread does so with whole images."""
    images, threads = len(x.x), torch.get_num_threads()
    shared = images % threads == 0 or images >= 8 * threads
    return shared and not derived() and winograd.usable(x.x, weight, stride, padding) and native.usable(x.x)


def _normed_and_convolved(norm: Pending, kernel: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, and the norm's mean and 1 / deviation."""
    mean, rstd = (torch.empty(len(norm.x), norm.how.groups) for _ in range(2))
    chain = _chain(norm, mean, rstd)
    return winograd.forward(chain.x, kernel, bias, native.before(chain)), mean, rstd


def _chain(norm: Pending, mean: Tensor, rstd: Tensor) -> native.Chain:
    x, added, weight, bias, keys, how = norm
    return native.Chain(native.laid_out(x), added, weight, bias, keys, mean, rstd, how)


class _ConvolveNormed(torch.autograd.Function):
    """A norm and a convolution of it by `winograd`, in one pass over memory: the norm's result lies nowhere.

    A few images at a time are in a thread's cache, normed and convolved there; in the gradient the other way around.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, bias: Tensor | None, *norm: Any) -> Tensor:
        *given, ctx.how = norm
        out, *statistics = _normed_and_convolved(Pending(*norm), kernel, bias)
        ctx.save_for_backward(kernel, *given, *statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, *given, mean, rstd = ctx.saved_tensors
        norm, wanted = Pending._make((*given, ctx.how)), ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is wanted
            return _differentiable(grad, kernel, norm, wanted)
        chain = _chain(norm, mean, rstd)
        d_kernel: Tensor | None = None
        d_norm: tuple[Tensor | None, ...] = (None,) * 4  # of rows that all samples share autograd takes the sum
        if wanted[0]:
            d_kernel = winograd.weight_gradient(chain.x, grad, kernel, native.before(chain, known=True))
        if any(wanted[2:]):
            used, d_norm = native.after(chain)
            winograd.use_input_gradient(grad, kernel, used)
        return d_kernel, grad.sum((0, 2, 3)) if wanted[1] else None, *d_norm, None, None


def _differentiable(grad: Tensor, kernel: Tensor, norm: Pending, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of `_ConvolveNormed`, in operations that can be differentiated again."""
    # With respect to these alone, also where one is made of another: each gets a name of its own.
    named: list[Any] = [one.view_as(one) if isinstance(one, Tensor) else one for one in (kernel, None, *norm)]
    out = F.conv2d(Pending(*named[2:]).tensor(), named[0], padding=1)
    asked = [place for place, needed in enumerate(wanted) if needed and named[place] is not None]
    found = torch.autograd.grad(out, [named[place] for place in asked], grad, create_graph=True)
    changes: list[Tensor | None] = [None] * len(named)
    for place, change in zip(asked, found, strict=True):
        changes[place] = change
    changes[1] = grad.sum((0, 2, 3)) if wanted[1] else None
    return tuple(changes)


def convolve(
    x: Tensor | Pending,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """A convolution as torch's, as fast as it can be had: on CPUs, and under forward-mode derivatives, too.

    Of a norm that is still to be taken it takes it along, where that saves the way through memory.
    """
    if isinstance(x, Pending):
        if not _traced() and _along(x, weight, stride, padding):
            if plain():
                return _normed_and_convolved(x, weight, bias)[0]
            made: Tensor = _ConvolveNormed.apply(weight, bias, *x)
            return made
        x = x.tensor()
    if _traced():
        return F.conv2d(x, weight, bias, stride, padding)
    if plain():
        return _convolved(x, weight, bias, stride, padding)
    with forgetting(x):
        if derived() or winograd.usable(x, weight, stride, padding):
            made = _Convolve.apply(x, weight, bias, stride, padding)
            return made
        return F.conv2d(x, weight, bias, stride, padding)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


class Conv2d(nn.Conv2d):
    """A convolution that computes in the type of its input and keeps the resolution (at stride 1)."""

    keeps_casts = True

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)

    def forward(self, x: Tensor | Pending, gain: float = 1.0, *, biased: bool = True) -> Tensor:
        """The convolution, times `gain` (applied to the weights: far fewer numbers than the output has)."""
        values = x.x if isinstance(x, Pending) else x
        weight = cast(self.weight, values.dtype, gain, keep=self.keeps_casts)
        bias = self.bias_as(values, gain) if biased else None
        return convolve(x, weight, bias, self.stride, self.padding)  # type: ignore[arg-type]

    def bias_as(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The bias, times `gain`, in the type of x; [out_channels]."""
        assert self.bias is not None
        return cast(self.bias, x.dtype, gain, keep=self.keeps_casts)


def normed(norm: GroupNorm, conv: Conv2d, x: Tensor | Pending, added: Tensor | None = None, **how: Any) -> Pending:
    """The norm of a convolution (plus `added`, [B, C]), for the next one; `how` as for the norm.

    If the norm adds something anyway, it adds the convolution's bias, too, for whose gradient there is no pass over
    memory then. On a GPU it always does: cuDNN takes a pass for a bias as well.
    """
    values = x.x if isinstance(x, Pending) else x
    biased = not values.is_cuda and (added is None or _traced())
    if not biased:
        bias = conv.bias_as(values)
        added = bias.expand(len(values), -1) if added is None else added + bias
    return norm.pending(conv(x, biased=biased), added=added, **how)
