"""`winograd.cpp`: convolutions of 3x3 pixels in float32 on a CPU, with a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3), after Lavin and Gray 2016 (arXiv:1509.09308). Its rounding errors are two to
four times those of torch's direct sums: 8e-7 of the values instead of 4e-7 over 128 channels, in gradients of weights
5e-7 to 8e-7 instead of 1e-7 to 6e-7. Where the library cannot be had, or does not gain, torch computes the same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmtool import compiled
from cmtool.networks.native import Hook, laid_out

_SOURCE = Path(__file__).with_suffix(".cpp")
_FILLED = 0.6  # of the tiles' pixels, at least, are the image's: where fewer are, too much is computed for nothing
_FEWEST = 48  # tiles: for fewer, the weights' 36 points are not worth computing
_CACHED = 512 << 10  # bytes of images that a thread takes through a hook and a convolution at a time
_TILES = 32  # at once in a gradient of weights: more are no faster, and longer sums less exact


def usable(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether the library convolves tensors like `x` [B, C, H, W] with `weight`, and faster than torch does."""
    if (
        weight.shape[2:] != (3, 3)
        or (*stride, *padding) != (1, 1, 1, 1)
        or (x.device.type, x.dtype, weight.dtype) != ("cpu", torch.float32, torch.float32)
        or type(x) is not Tensor
        or type(weight) not in (Tensor, nn.Parameter)
    ):
        return False
    height, width = x.shape[2:]
    each = _each(height, width)
    if len(x) * each < _FEWEST or height * width < _FILLED * 16 * each:
        return False
    lib = library()
    return lib is not None and not any(channels % lib.channels() for channels in weight.shape[:2])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Hook | None = None) -> Tensor:
    """The convolution.

    Args:
        x: [B, C, H, W].
        weight: [outputs, C, 3, 3].
        bias: [outputs], or None.
        before: what makes of x what is convolved.
    Returns:
        [B, outputs, H, W], channels-last.
    """
    y = torch.empty(len(x), len(weight), *x.shape[2:], memory_format=torch.channels_last)
    _convolve(x, weight.data_ptr(), weight.stride(), len(weight), bias, y, before, None)
    return y


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `forward`'s x, channels-last; dy: [B, outputs, H, W]."""
    dx = torch.empty(len(dy), weight.shape[1], *dy.shape[2:], memory_format=torch.channels_last)
    _input_gradient(dy, weight, dx, None)
    return dx


def use_input_gradient(dy: Tensor, weight: Tensor, after: Hook) -> None:
    """`input_gradient` for somebody who uses it a few images at a time, so that it need not lie in memory."""
    _input_gradient(dy, weight, None, after)


def _input_gradient(dy: Tensor, weight: Tensor, dx: Tensor | None, after: Hook | None) -> None:
    output, channel, down, across = weight.stride()  # turned around, the weights make the gradient a convolution
    last = weight.data_ptr() + 2 * (down + across) * weight.element_size()
    _convolve(dy, last, (channel, output, -down, -across), weight.shape[1], None, dx, None, after)


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, before: Hook | None = None) -> Tensor:
    """The gradient of `forward`'s weight; x: [B, C, H, W], dy: [B, outputs, H, W], `before` as there.

    The order of its sums, hence the last digits, follow from the number of threads.
    """
    lib, threads = _library(), torch.get_num_threads()
    x, (dy, step) = laid_out(x), _pixels(dy)
    batch, channels, height, width = x.shape
    outputs = dy.shape[1]
    gradient = torch.empty_like(weight)
    group = _group(x, _TILES, channels)
    made = 0 if before is None else group * height * width * channels
    scratch = torch.empty(threads, lib.room(_TILES, channels, outputs) + made)
    sums = torch.empty(lib.parts(channels, outputs, threads), 36, outputs, channels)
    into, *rest = (tensor.data_ptr() for tensor in (gradient, scratch, sums))
    sizes = (batch, height, width, channels, outputs)
    given = (x.data_ptr(), dy.data_ptr(), step, into, *rest)
    lib.weight_gradient(*given, _four(gradient.stride()), *sizes, _TILES, group, _given(before), threads)
    return gradient


def _convolve(
    x: Tensor,
    address: int,
    strides: tuple[int, ...],
    outputs: int,
    bias: Tensor | None,
    y: Tensor | None,
    before: Hook | None,
    after: Hook | None,
) -> None:
    """`forward` with the weights at an address, whose strides may be negative."""
    lib, threads = _library(), torch.get_num_threads()
    x, step = _pixels(x) if before is None else (laid_out(x), x.shape[1])
    batch, channels, height, width = x.shape
    at_once = lib.tiles_at_once(batch, height, width, threads)
    points = torch.empty(36, outputs, channels)
    lib.weights(address, _four(strides), points.data_ptr(), channels, outputs, threads)
    group = _group(x, 3 * at_once, max(channels, outputs))
    made = group * height * width * ((before is not None) * channels + (after is not None) * outputs)
    scratch = torch.empty(threads, lib.room(at_once, channels, outputs) + made)
    addresses = [None if one is None else one.data_ptr() for one in (points, bias, y, scratch)]
    sizes = (batch, height, width, channels, outputs, at_once, group)
    lib.forward(x.data_ptr(), step, *addresses, *sizes, _given(before), _given(after), threads)


def _group(x: Tensor, tiles: int, channels: int) -> int:
    """Images that a thread takes at a time where there are hooks: of so many tiles, if they stay in its cache."""
    height, width = x.shape[2:]
    return max(1, min(-(-tiles // _each(height, width)), _CACHED // (4 * height * width * channels)))


def _each(height: int, width: int) -> int:
    return -(-height // 4) * -(-width // 4)


class _Hook(ctypes.Structure):
    """`Hook` in winograd.cpp."""

    _fields_ = (("run", ctypes.c_void_p), ("context", ctypes.c_void_p))


def _given(hook: Hook | None) -> Any:
    if hook is None:
        return None
    return ctypes.byref(_Hook(hook.function, ctypes.addressof(hook.context)))


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """x with its channels side by side, and how far a pixel is from the next: further in a slice of more channels."""
    _, channels, height, width = x.shape
    step = x.stride(3)
    if step >= channels and x.stride() == (height * width * step, 1, width * step, step):
        return x, step
    return laid_out(x), channels


def _four(strides: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    return (ctypes.c_long * 4)(*strides)


# --- the library -----------------------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    return lib


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library with the types of its functions; None where there is none to be had or to gain from."""
    lib = compiled.library(_SOURCE)
    if lib is None:
        return None
    address, number, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    strides = ctypes.POINTER(number)
    for name, takes, gives in (
        ("channels", [], number),
        ("tiles_at_once", [*[number] * 3, threads], number),
        ("room", [number] * 3, number),
        ("parts", [number, number, threads], number),
        ("weights", [address, strides, address, number, number, threads], None),
        ("forward", [address, number, *[address] * 4, *[number] * 7, address, address, threads], None),
        ("weight_gradient", [address, address, number, *[address] * 3, strides, *[number] * 7, address, threads], None),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = takes, gives
    return lib if lib.channels() else None
