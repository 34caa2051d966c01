"""A small writer of flax's files, for tests of the reader: what `flax.serialization.to_bytes` does, from its format."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def pack(value) -> bytes:
    """The bytes of a tree; tensors without memory (meta) are zeros."""
    return b"".join(piece if isinstance(piece, bytes) else bytes(piece) for piece in _pieces(value))


def write(path: Path, value) -> Path:
    """The same as a file, where tensors without memory are holes that take no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in _pieces(value):
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                file.seek(piece, 1)
        file.truncate()
    return path


def chunked(values: np.ndarray | Tensor, size: int) -> dict:
    """What flax makes of an array that is too large for one piece: pieces of `size` entries."""
    flat = values.reshape(-1)
    chunks = [flat[start : start + size] for start in range(0, len(flat), size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(axis): side for axis, side in enumerate(values.shape)},
        "chunks": {str(index): chunk for index, chunk in enumerate(chunks)},
    }


def extension(code: int, content: bytes, hole: int = 0) -> bytes:
    """The start of an extension, with all of its content but a hole at the end."""
    length = len(content) + hole
    if length in (1, 2, 4, 8, 16):
        return bytes([0xD4 + length.bit_length() - 1, code]) + content
    return _length(length, {1: 0xC7, 2: 0xC8, 4: 0xC9}) + bytes([code]) + content


def _length(length: int, codes: Mapping[int, int], short: tuple[int, int] | None = None) -> bytes:
    """A length in as few bytes as will do; `short` = (code, bits) for one inside of the first byte."""
    if short is not None and length < 1 << short[1]:
        return bytes([short[0] | length])
    size = next(size for size in codes if length < 1 << (8 * size))
    return bytes([codes[size]]) + length.to_bytes(size, "big")


def _pieces(value) -> Iterator[bytes | int]:
    if value is None or isinstance(value, bool):
        yield {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    elif isinstance(value, int):
        yield _integer(value)
    elif isinstance(value, float) and not isinstance(value, np.generic):
        yield b"\xcb" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode()
        yield _length(len(text), {1: 0xD9, 2: 0xDA, 4: 0xDB}, (0xA0, 5)) + text
    elif isinstance(value, bytes):
        yield _length(len(value), {1: 0xC4, 2: 0xC5, 4: 0xC6}) + value
    elif isinstance(value, dict):
        yield _length(len(value), {2: 0xDE, 4: 0xDF}, (0x80, 4))
        for key, entry in value.items():
            yield from _pieces(key)
            yield from _pieces(entry)
    elif isinstance(value, list | tuple):
        yield _length(len(value), {2: 0xDC, 4: 0xDD}, (0x90, 4))
        for entry in value:
            yield from _pieces(entry)
    elif isinstance(value, complex) and not isinstance(value, np.generic):
        yield extension(2, pack([value.real, value.imag]))
    else:
        yield from _array(value)


def _integer(value: int) -> bytes:
    if -32 <= value < 128:
        return struct.pack(">b", value) if value < 0 else bytes([value])
    forms = "BHIQ" if value >= 0 else "bhiq"
    for index, form in enumerate(forms):
        try:
            return bytes([(0xCC if value >= 0 else 0xD0) + index]) + struct.pack(f">{form}", value)
        except struct.error:
            continue
    raise OverflowError(value)


def _array(value) -> Iterator[bytes | int]:
    scalar = isinstance(value, np.generic)
    shape, name = list(value.shape), str(value.dtype).removeprefix("torch.")
    hole = 0
    if isinstance(value, Tensor) and value.is_meta:
        data, hole = b"", prod(shape) * value.element_size()
    elif isinstance(value, Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    else:
        data = np.asarray(value).tobytes("C")
    start = _length(len(data) + hole, {1: 0xC4, 2: 0xC5, 4: 0xC6})
    yield extension(3 if scalar else 1, b"\x93" + pack(shape) + pack(name) + start + data, hole)
    if hole:
        yield hole
