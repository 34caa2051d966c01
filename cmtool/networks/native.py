"""`native.cpp`: the chain norm, SiLU and dropout in one pass on a CPU.

Compiling it (`cmtool.compiled`) takes a second or two, once. Where it cannot be had everything is computed by torch's
own operations, which is slower and gives the same numbers to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool import compiled

_SOURCE = Path(__file__).with_suffix(".cpp")
_GRID = 65535  # samples that a kernel of a GPU is started for, at most


class Shape(NamedTuple):
    """What the chain does besides its arrays; see `norm_forward` in native.cpp."""

    groups: int
    eps: float
    silu: bool
    threshold: int  # of the entries' numbers below 2^32: those under it are dropped
    grown: float


class Backend(Protocol):
    """Something that computes the chain: this module on a CPU, `kernels` on a GPU."""

    def forward(
        self, x: Tensor, pre: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, shape: Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See this module's."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        pre: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        keys: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """See this module's."""


def backend(x: Tensor) -> Backend | None:
    """What computes the chain on tensors like `x` in one go; None where torch's operations have to."""
    if usable(x):
        return sys.modules[__name__]
    if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < len(x) <= _GRID:
        return kernels()
    return None


@functools.cache
def kernels() -> Backend | None:
    """The module `kernels`; None without Triton, which comes with torch for GPUs on Linux, and where it does not work.

    It compiles what it starts, which takes a C compiler and a GPU that is not too old: so it is tried once.
    """
    if not compiled.enabled("CMTOOL_NATIVE"):
        return None
    try:
        from cmtool.networks import kernels as found

        if torch.cuda.is_available():
            row = torch.ones(1, 4, device="cuda")
            found.forward(torch.ones(1, 4, 2, 2, device="cuda"), None, row, row, None, Shape(1, 1e-5, True, 0, 1.0))
    except Exception:  # whatever it is, torch's operations do the same
        return None
    return found


def usable(x: Tensor) -> bool:
    """Whether the library computes on tensors like `x`: [B, C, H, W] on a CPU, float32 or bfloat16."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    return known and library() is not None


def forward(
    x: Tensor, pre: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain.

    Args:
        x: [B, C, H, W].
        pre, weight, bias: float32 [B, C]; `pre` is added to x first, or None.
        keys: int64 [B], a number below 2^32 a sample, where entries are dropped.
    Returns:
        y like x, channels-last; mean and 1 / deviation, float32 [B, groups].
    """
    x = laid_out(x)
    y = torch.empty_like(x)
    mean = torch.empty(len(x), shape.groups)
    rstd = torch.empty(len(x), shape.groups)
    _call("norm_forward", x, (x, *_rows(pre, weight, bias), words(keys), y, mean, rstd), shape)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    keys: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The gradients of x, pre, weight and bias; arguments as `forward`."""
    x, dy = laid_out(x), laid_out(dy.to(x.dtype))
    dx = torch.empty_like(x)
    dweight, dbias = _new(x), _new(x)
    dpre = None if pre is None else _new(x)
    known = (*_rows(pre, weight, bias), words(keys), mean, rstd)
    _call("norm_backward", x, (dy, x, *known, dx, dpre, dweight, dbias), shape)
    return dx, dpre, dweight, dbias


def tangent(
    dx: Tensor | None,
    x: Tensor,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    keys: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shape: Shape,
    *changes: Tensor | None,
) -> Tensor:
    """The change of the result along dx and `changes` of pre, weight and bias; None for what does not change."""
    x = laid_out(x)
    dx = None if dx is None else laid_out(dx.to(x.dtype))
    dy = torch.empty_like(x)
    known = (*_rows(pre, weight, bias), words(keys), mean, rstd)
    _call("norm_tangent", x, (dx, x, *known, *_rows(*changes), dy), shape)
    return dy


class Hook(NamedTuple):
    """A function of the library, for images that a convolution has in its cache; see `Hook` in winograd.cpp."""

    function: int
    context: ctypes.Structure
    kept: tuple[Tensor | None, ...]  # whose memory the context points to


class Chain(NamedTuple):
    """The chain of float32 images around a convolution; arrays as in `forward`.

    Args:
        x: channels-last.
        weight, bias: [B, C], or [C] for all samples.
        mean, rstd: [B, groups].
    """

    x: Tensor
    pre: Tensor | None
    weight: Tensor
    bias: Tensor
    keys: Tensor | None
    mean: Tensor
    rstd: Tensor
    shape: Shape


def before(chain: Chain, *, known: bool = False) -> Hook:
    """The chain, of a few images at a time, as they are asked for; fills in mean and rstd, unless they are known."""
    return _hook("norm_images", chain, (None,) * 4, known)


def after(chain: Chain) -> tuple[Hook, tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """What `backward` does, of a gradient of which a few images are there at a time.

    Returns:
        The hook, and what it fills in: the gradients of x, and [B, C] of pre, weight and bias.
    """
    x = chain.x
    found = torch.empty_like(x), None if chain.pre is None else _new(x), _new(x), _new(x)
    return _hook("norm_gradients", chain, found, True), found


class _Struct(ctypes.Structure):
    """`Chain` in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("B", "P", "C", "G", "row")),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int),
        ("threshold", ctypes.c_uint32),
        ("grown", ctypes.c_float),
        ("known", ctypes.c_int),
        *((f"array{index}", ctypes.c_void_p) for index in range(11)),
    )


def _hook(name: str, chain: Chain, found: tuple[Tensor | None, ...], known: bool) -> Hook:
    x, pre, weight, bias, keys, mean, rstd, shape = chain
    batch, channels, height, width = x.shape
    row = channels if weight.dim() == 2 else 0
    tensors = (x, *_rows(pre, weight, bias), words(keys), mean, rstd, *found)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (batch, height * width, channels, shape.groups, row)
    context = _Struct(*sizes, shape.eps, shape.silu, shape.threshold, shape.grown, known, *addresses)
    address = ctypes.cast(getattr(library(), name), ctypes.c_void_p).value
    assert address is not None
    return Hook(address, context, tensors)


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2])


def laid_out(x: Tensor) -> Tensor:
    """x as the library wants it: channels-last."""
    return x.contiguous(memory_format=torch.channels_last)


def _rows(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(torch.float32).contiguous() for tensor in tensors)


def words(keys: Tensor | None) -> Tensor | None:
    """The keys as 32 bits each; torch's unsigned type lacks most operations."""
    return None if keys is None else torch.where(keys < 2**31, keys, keys - 2**32).to(torch.int32)


def _call(name: str, x: Tensor, tensors: tuple[Tensor | None, ...], shape: Shape) -> None:
    lib = library()
    assert lib is not None
    batch, channels, height, width = x.shape
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (batch, height * width, channels, shape.groups)
    rest = (shape.eps, shape.silu, shape.threshold, shape.grown, torch.get_num_threads())
    getattr(lib, name)(x.dtype == torch.bfloat16, *pointers, *sizes, *rest)


# --- the library -----------------------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library with the types of its functions; None where there is none to be had."""
    lib = compiled.library(_SOURCE)
    if lib is not None:
        address, number = ctypes.c_void_p, ctypes.c_long
        rest = [*[number] * 4, ctypes.c_float, ctypes.c_int, ctypes.c_uint32, ctypes.c_float, ctypes.c_int]
        for name, count in (("norm_forward", 8), ("norm_backward", 12), ("norm_tangent", 12)):
            function = getattr(lib, name)
            function.argtypes = [ctypes.c_int, *[address] * count, *rest]
            function.restype = None
    return lib
