"""Parameters in the type computed in, cast once for as long as they do not change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from cmtool.networks.modes import plain, prompt


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


@prompt
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
    if plain():
        return _kept(parameter, dtype, gain)
    if parameter.dtype == dtype:  # autograd's own way around a product is the shorter one
        return parameter * gain
    made: Tensor = _Cast.apply(parameter, dtype, gain)
    return made


def _recording(parameter: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: what it replays has to see the parameter's later values."""
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()
