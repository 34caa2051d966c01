"""Convolutions as torch's, as fast as they can be had: by `winograd` on CPUs, and under forward-mode derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks import winograd
from cmtool.networks.casting import cast
from cmtool.networks.modes import derived, plain
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
    if plain():
        return _convolved(x, weight, bias, stride, padding)
    with forgetting(x):
        if derived() or winograd.usable(x, weight, stride, padding):
            made: Tensor = _Convolve.apply(x, weight, bias, stride, padding)
            return made
        return F.conv2d(x, weight, bias, stride, padding)


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
