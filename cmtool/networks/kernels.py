"""Group norm with what stands around it, in a few passes over memory: Triton kernels for GPUs.

The counterpart of `native.cpp`, for channels-last tensors: torch's own norm there works channel by channel, so each
convolution after it has its input laid out anew. Per sample and channel it is out = silu(a x + c) with numbers from
the group's mean and deviation, and the gradient is dx = a dz + c1 x + c0; nothing is kept for the backward pass but the
input and the statistics. A pass reads tiles of some pixels with all their channels; a small kernel in between makes one
sample's and group's numbers from those of the tiles. Statistics of tiles are joined by their means and squared
deviations (Chan et al., 1979), so that a large mean costs no digits.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmtool.networks.native import Shape, words

Out = TypeVar("Out")

_TILE = 4096  # entries of a tile
_MEASURED = 16384  # where nothing else is asked of a tile but sums: of few entries they are as slow as of many
_WARPS = 4


@triton.jit
def _entries(x_at, pre_at, sample, tile, pixels, channels, P: tl.constexpr, C: tl.constexpr, PRE: tl.constexpr):
    """A tile [P, C] of x plus what is added to it, its offsets within the sample, and which of it there are."""
    at = tile * P + tl.arange(0, P)
    c = tl.arange(0, C)
    there = (at < pixels)[:, None] & (c < channels)[None, :]
    offset = at[:, None] * channels + c[None, :]
    x = tl.load(x_at + sample.to(tl.int64) * pixels * channels + offset, mask=there, other=0.0).to(tl.float32)
    if PRE:
        x += tl.load(pre_at + sample * channels + c, mask=c < channels, other=0.0)[None, :]
    return x, offset, there, c


@triton.jit
def _grown(offset, key, threshold, grown):
    """What an entry is multiplied with: 0 or `grown`. `mixed` in chance.py is the same function."""
    h = (offset.to(tl.uint32) * 0x9E3779B1) ^ key
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return tl.where(h >= threshold, grown, 0.0)


@triton.jit
def _slope(
    dy_at, keys_at, x, offset, there, sample, pixels, channels, a, c, threshold, grown,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The gradient of a x + c from that of the output."""
    dz = tl.load(dy_at + sample.to(tl.int64) * pixels * channels + offset, mask=there, other=0.0).to(tl.float32)
    if DROP:
        dz *= _grown(offset, tl.load(keys_at + sample).to(tl.uint32, bitcast=True), threshold, grown)
    if SILU:
        z = x * a[None, :] + c[None, :]
        s = 1 / (1 + tl.exp(-z))
        dz *= s * (1 + z * (1 - s))
    return dz


@triton.jit
def _measure(
    x_at, pre_at, part_at, pixels, channels, tiles,
    P: tl.constexpr, C: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Of each tile and channel: the mean, and the sum of squared deviations from it."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    x, _, there, c = _entries(x_at, pre_at, sample, tile, pixels, channels, P, C, PRE)
    count = tl.minimum(pixels - tile * P, P).to(tl.float32)
    mean = tl.sum(tl.where(there, x, 0.0), 0) / count
    off = tl.where(there, x - mean[None, :], 0.0)
    out = part_at + (sample * tiles + tile) * 2 * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + channels, tl.sum(off * off, 0), mask=c < channels)


@triton.jit
def _standardise(
    part_at, weight_at, bias_at, a_at, c_at, mean_at, rstd_at,
    weight_row, bias_row, pixels, channels, tiles, each, eps,
    P: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The numbers a and c of a group's channels, from the statistics of all tiles; its mean and 1 / deviation."""
    group, sample = tl.program_id(0), tl.program_id(1)
    tile, e = tl.arange(0, T), tl.arange(0, E)
    c = group * each + e
    there = (tile < tiles)[:, None] & (e < each)[None, :]
    part = part_at + (sample * tiles + tile)[:, None] * 2 * channels + c[None, :]
    means = tl.load(part, mask=there, other=0.0)
    squares = tl.load(part + channels, mask=there, other=0.0)
    count = tl.where(there, tl.minimum(pixels - tile * P, P)[:, None].to(tl.float32), 0.0)
    total = pixels * each
    mean = tl.sum(tl.sum(means * count, 1), 0) / total
    off = means - mean
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(squares + count * off * off, 1), 0) / total + eps)
    weight = tl.load(weight_at + sample * weight_row + c, mask=e < each, other=0.0)
    bias = tl.load(bias_at + sample * bias_row + c, mask=e < each, other=0.0)
    a = weight * rstd
    tl.store(a_at + sample * channels + c, a, mask=e < each)
    tl.store(c_at + sample * channels + c, bias - mean * a, mask=e < each)
    groups = tl.num_programs(0)
    tl.store(mean_at + sample * groups + group, mean)
    tl.store(rstd_at + sample * groups + group, rstd)


@triton.jit
def _apply(
    x_at, pre_at, a_at, c_at, keys_at, y_at, pixels, channels, threshold, grown,
    P: tl.constexpr, C: tl.constexpr, PRE: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The output."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    x, offset, there, ch = _entries(x_at, pre_at, sample, tile, pixels, channels, P, C, PRE)
    a = tl.load(a_at + sample * channels + ch, mask=ch < channels, other=0.0)
    c = tl.load(c_at + sample * channels + ch, mask=ch < channels, other=0.0)
    y = x * a[None, :] + c[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    if DROP:
        y *= _grown(offset, tl.load(keys_at + sample).to(tl.uint32, bitcast=True), threshold, grown)
    out = y_at + sample.to(tl.int64) * pixels * channels + offset
    tl.store(out, y.to(y_at.dtype.element_ty), mask=there)


@triton.jit
def _gather(
    dy_at, x_at, pre_at, a_at, c_at, keys_at, part_at, pixels, channels, tiles, threshold, grown,
    P: tl.constexpr, C: tl.constexpr, PRE: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Of each tile and channel: the sums of dz, of dz x, and of x."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    x, offset, there, ch = _entries(x_at, pre_at, sample, tile, pixels, channels, P, C, PRE)
    a = tl.load(a_at + sample * channels + ch, mask=ch < channels, other=0.0)
    c = tl.load(c_at + sample * channels + ch, mask=ch < channels, other=0.0)
    dz = _slope(dy_at, keys_at, x, offset, there, sample, pixels, channels, a, c, threshold, grown, SILU, DROP)
    out = part_at + (sample * tiles + tile) * 3 * channels + ch
    tl.store(out, tl.sum(dz, 0), mask=ch < channels)
    tl.store(out + channels, tl.sum(dz * x, 0), mask=ch < channels)
    tl.store(out + 2 * channels, tl.sum(tl.where(there, x, 0.0), 0), mask=ch < channels)


@triton.jit
def _differentiate(
    part_at, weight_at, a_at, mean_at, rstd_at, c1_at, c0_at, dweight_at, dbias_at, dpre_at,
    weight_row, pixels, channels, tiles, each,
    T: tl.constexpr, E: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """The gradients of a group's weight, bias and what was added; the numbers c1 and c0 of its channels."""
    group, sample = tl.program_id(0), tl.program_id(1)
    tile, e = tl.arange(0, T), tl.arange(0, E)
    c = group * each + e
    there = (tile < tiles)[:, None] & (e < each)[None, :]
    part = part_at + (sample * tiles + tile)[:, None] * 3 * channels + c[None, :]
    sum_dz = tl.sum(tl.load(part, mask=there, other=0.0), 0)
    sum_dzx = tl.sum(tl.load(part + channels, mask=there, other=0.0), 0)
    groups = tl.num_programs(0)
    mean = tl.load(mean_at + sample * groups + group)
    rstd = tl.load(rstd_at + sample * groups + group)
    sum_hat = (sum_dzx - mean * sum_dz) * rstd
    weight = tl.load(weight_at + sample * weight_row + c, mask=e < each, other=0.0)
    total = pixels * each
    c1 = -tl.sum(weight * sum_hat, 0) / total * rstd * rstd
    c0 = -tl.sum(weight * sum_dz, 0) / total * rstd - mean * c1
    row = sample * channels + c
    tl.store(c1_at + row, tl.zeros([E], tl.float32) + c1, mask=e < each)
    tl.store(c0_at + row, tl.zeros([E], tl.float32) + c0, mask=e < each)
    tl.store(dweight_at + row, sum_hat, mask=e < each)
    tl.store(dbias_at + row, sum_dz, mask=e < each)
    if PRE:
        sum_x = tl.sum(tl.load(part + 2 * channels, mask=there, other=0.0), 0)
        a = tl.load(a_at + row, mask=e < each, other=0.0)
        tl.store(dpre_at + row, a * sum_dz + c1 * sum_x + c0 * pixels, mask=e < each)


@triton.jit
def _return(
    dy_at, x_at, pre_at, a_at, c_at, c1_at, c0_at, keys_at, dx_at, pixels, channels, threshold, grown,
    P: tl.constexpr, C: tl.constexpr, PRE: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The gradient of the input."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    x, offset, there, ch = _entries(x_at, pre_at, sample, tile, pixels, channels, P, C, PRE)
    a = tl.load(a_at + sample * channels + ch, mask=ch < channels, other=0.0)
    c = tl.load(c_at + sample * channels + ch, mask=ch < channels, other=0.0)
    c1 = tl.load(c1_at + sample * channels + ch, mask=ch < channels, other=0.0)
    c0 = tl.load(c0_at + sample * channels + ch, mask=ch < channels, other=0.0)
    dz = _slope(dy_at, keys_at, x, offset, there, sample, pixels, channels, a, c, threshold, grown, SILU, DROP)
    dx = dz * a[None, :] + x * c1[None, :] + c0[None, :]
    out = dx_at + sample.to(tl.int64) * pixels * channels + offset
    tl.store(out, dx.to(dx_at.dtype.element_ty), mask=there)


def _on_its_device(function: Callable[..., Out]) -> Callable[..., Out]:
    """Triton starts kernels on the current device, whatever tensors they are given."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Out:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return run


@_on_its_device
def forward(
    x: Tensor, pre: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """`native.forward` on a GPU: y like x, channels-last; mean and 1 / deviation, float32 [B, groups]."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    weight, bias = _rows(weight), _rows(bias)
    pre = None if pre is None else _rows(pre).contiguous()
    mean, rstd, a, c = _statistics(x, pre, weight, bias, shape)
    tiles, pixels, channels, size = _tiles(x, _TILE)
    _apply[(tiles, len(x))](
        x, _or(pre, x), a, c, _or(words(keys), x), y, pixels, channels, shape.threshold, shape.grown,
        **size, PRE=pre is not None, SILU=shape.silu, DROP=keys is not None, num_warps=_WARPS,
    )  # fmt: skip
    return y, mean, rstd


@_on_its_device
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
    """`native.backward` on a GPU: the gradients of x, pre, weight and bias."""
    x = x.contiguous(memory_format=torch.channels_last)
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = _rows(weight), _rows(bias)
    pre = None if pre is None else _rows(pre).contiguous()
    tiles, pixels, channels, size = _tiles(x, _TILE)
    each = channels // shape.groups
    a = weight * rstd.repeat_interleave(each, 1)
    c = bias - mean.repeat_interleave(each, 1) * a
    part = torch.empty(len(x), tiles, 3, channels, device=x.device)
    dx = torch.empty_like(x)
    c1, c0, dweight, dbias = torch.empty(4, len(x), channels, device=x.device)
    dpre = None if pre is None else torch.empty_like(dbias)
    kinds: dict[str, Any] = {"PRE": pre is not None, "SILU": shape.silu, "DROP": keys is not None}
    word, chance = _or(words(keys), x), (shape.threshold, shape.grown)
    _gather[(tiles, len(x))](
        dy, x, _or(pre, x), a, c, word, part, pixels, channels, tiles, *chance, **size, **kinds, num_warps=_WARPS
    )
    _differentiate[(shape.groups, len(x))](
        part, weight, a, mean, rstd, c1, c0, dweight, dbias, _or(dpre, x),
        weight.stride(0), pixels, channels, tiles, each,
        T=_power(tiles), E=_power(each), PRE=pre is not None, num_warps=1,
    )  # fmt: skip
    _return[(tiles, len(x))](
        dy, x, _or(pre, x), a, c, c1, c0, word, dx, pixels, channels, *chance, **size, **kinds, num_warps=_WARPS
    )
    return dx, dpre, dweight, dbias


def _statistics(
    x: Tensor, pre: Tensor | None, weight: Tensor, bias: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and 1 / deviation of the groups, and the numbers a and c of the channels."""
    tiles, pixels, channels, size = _tiles(x, _MEASURED)
    each = channels // shape.groups
    part = torch.empty(len(x), tiles, 2, channels, device=x.device)
    mean, rstd = torch.empty(2, len(x), shape.groups, device=x.device)
    a, c = torch.empty(2, len(x), channels, device=x.device)
    _measure[(tiles, len(x))](
        x, _or(pre, x), part, pixels, channels, tiles, **size, PRE=pre is not None, num_warps=_WARPS
    )
    _standardise[(shape.groups, len(x))](
        part, weight, bias, a, c, mean, rstd,
        weight.stride(0), bias.stride(0), pixels, channels, tiles, each, shape.eps,
        P=size["P"], T=_power(tiles), E=_power(each), num_warps=1,
    )  # fmt: skip
    return mean, rstd, a, c


def _tiles(x: Tensor, entries: int) -> tuple[int, int, int, dict[str, int]]:
    """How many tiles a sample has; its pixels and channels; a tile's size, as the kernels take it."""
    _, channels, height, width = x.shape
    padded, pixels = _power(channels), height * width
    each = max(1, min(_power(pixels), entries // padded))
    return -(-pixels // each), pixels, channels, {"P": each, "C": padded}


def _power(number: int) -> int:
    """The power of two that is not below: kernels count in them."""
    return 1 << (number - 1).bit_length()


def _rows(rows: Tensor) -> Tensor:
    """Values [B, C] in float32, each row in one piece; all rows may be the same memory."""
    rows = rows.to(torch.float32)
    return rows if rows.stride(1) == 1 and rows.stride(0) == 0 else rows.contiguous()


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """A kernel that does not look at an argument is still to be given one."""
    return other if given is None else given
