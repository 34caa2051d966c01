"""The files of flax, JAX's network library: msgpack with arrays inside.

Read is what `flax.serialization.to_bytes` writes and nothing else: maps with text as keys, lists, text, bytes, numbers,
None, and the three extension types of flax,

    1   array           msgpack of [shape, name of the numpy type, bytes in row-major order]
    2   complex number  msgpack of [real part, imaginary part]
    3   numpy scalar    as 1, with an empty shape

where an array of more than 1 GiB is a map {"__msgpack_chunked_array__": true, "shape": {"0": ...}, "chunks": {"0": flat
array, ...}}. Nothing in a file is executed. An array is only pointed at, in the mapped file: what is not asked for is
never in memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

MAX_VALUES = 10**6  # of all sorts; the largest released state of a training run has some twenty thousand
MAX_DEPTH = 32
MAX_TEXT = 2**16  # bytes
MAX_DIMENSIONS = 32
CHUNKED = "__msgpack_chunked_array__"

# Name in the file -> what numpy calls it; the number is its bytes. JAX's bfloat16 is no type of numpy: its bits are.
DTYPES = {
    **{"int8": "|i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "bool": "|b1"},
    **{"uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8"},
    **{"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"},
    **{"complex64": "<c8", "complex128": "<c16"},
}

# First byte of a value -> struct format of the number, or of the length of what follows.
NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
LISTS = {0xDC: ">H", 0xDD: ">I"}
MAPS = {0xDE: ">H", 0xDF: ">I"}


@dataclass(frozen=True)
class Array:
    """An array in a file: its type by name, its shape, and where its bytes lie, in one or several pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[memoryview, ...]

    def numpy(self) -> np.ndarray:
        """The values: a read-only view of the file where that is possible; bfloat16 as float32, which is exact."""
        import numpy as np

        kind = DTYPES[self.dtype]
        parts = [np.frombuffer(piece, kind) for piece in self.pieces if len(piece)] or [np.empty(0, kind)]
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.dtype == "bfloat16":
            flat = (flat.astype("<u4") << 16).view("<f4")
        return flat.reshape(self.shape)


def read(path: Path) -> dict[str, Any]:
    """The tree of a file: dictionaries down to numbers, text, lists and `Array`s.

    The arrays stay in the file, which is kept open as long as one of them is in use, and must not be changed meanwhile.

    Raises:
        CheckpointError: a file that cannot be read, is damaged, or holds what flax does not write.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", "name a file that flax wrote")
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise CheckpointError(f"{path} is empty", "get the file again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error
    return parse(data, str(path))


def parse(data: bytes | memoryview, file: str) -> dict[str, Any]:
    """`read` from memory; `file` is for messages."""
    reader = _Reader(memoryview(data), file)
    tree = reader.value(0)
    if not isinstance(tree, dict):
        raise reader.error("it does not begin with a map")
    if reader.at != reader.end:
        raise reader.error(f"{reader.end - reader.at} bytes follow after the end")
    return tree


class _Reader:
    """A place in the bytes; every length is held against what is left before anything is made of it."""

    def __init__(self, data: memoryview, file: str) -> None:
        self.data, self.file = data, file
        self.at, self.end = 0, len(data)
        self.values = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file} is damaged at byte {self.at}: {problem}", "get the file again")

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if count > self.end - self.at:
            raise self.error(f"{count} bytes should follow, and {self.end - self.at} do")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        """Whatever comes next, `depth` levels down."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.error(f"it holds more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise self.error(f"it is more than {MAX_DEPTH} levels deep")
        first = self.take(1)[0]
        if first < 0x80:
            return first
        if first < 0x90:
            return self.mapping(first & 0x0F, depth)
        if first < 0xA0:
            return self.sequence(first & 0x0F, depth)
        if first < 0xC0:
            return self.text(first & 0x1F)
        if first >= 0xE0:
            return first - 0x100
        if first in NUMBERS:
            return self.number(NUMBERS[first])
        if first in BYTES:
            return self.take(self.number(BYTES[first]))
        if first in TEXTS:
            return self.text(self.number(TEXTS[first]))
        if first in LISTS:
            return self.sequence(self.number(LISTS[first]), depth)
        if first in MAPS:
            return self.mapping(self.number(MAPS[first]), depth)
        if first in EXTENSIONS:
            return self.extension(self.number(EXTENSIONS[first]), depth)
        if 0xD4 <= first <= 0xD8:
            return self.extension(1 << (first - 0xD4), depth)
        if first == 0xC1:
            raise self.error("the byte 0xc1 begins no value")
        return {0xC0: None, 0xC2: False, 0xC3: True}[first]

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise self.error(f"a text is {length} bytes long")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a text is not UTF-8") from error

    def sequence(self, length: int, depth: int) -> list[Any]:
        if length > self.end - self.at:
            raise self.error(f"a list of {length} values in {self.end - self.at} bytes")
        return [self.value(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[str, Any] | Array:
        if 2 * length > self.end - self.at:
            raise self.error(f"a map of {length} entries in {self.end - self.at} bytes")
        entries: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.error(f"a key of a map is no text but {type(key).__name__}")
            if key in entries:
                raise self.error(f"a map has two entries {key!r}")
            entries[key] = self.value(depth + 1)
        return self.joined(entries) if CHUNKED in entries else entries

    def extension(self, length: int, depth: int) -> Any:
        code = self.number(">b")
        if code not in (1, 2, 3):
            raise self.error(f"extension type {code} is none of flax's")
        if length > self.end - self.at:
            raise self.error(f"{length} bytes should follow, and {self.end - self.at} do")
        outer, self.end = self.end, self.at + length
        content = self.value(depth + 1)
        if self.at != self.end:
            raise self.error("an extension is longer than its content")
        self.end = outer
        if not isinstance(content, list) or len(content) != (2 if code == 2 else 3):
            raise self.error(f"extension type {code} holds something else")
        if code == 2:
            if not all(isinstance(part, (int, float)) for part in content):
                raise self.error("a complex number is not made of numbers")
            return complex(*content)
        array = self.array(*content)
        if code == 1:
            return array
        if array.shape:
            raise self.error(f"a scalar has the shape {array.shape}")
        return array.numpy()[()]

    def array(self, shape: Any, dtype: Any, data: Any) -> Array:
        if not isinstance(data, memoryview) or not isinstance(dtype, str) or not isinstance(shape, list):
            raise self.error("an array is not made of a shape, a type and bytes")
        if dtype not in DTYPES:
            raise self.error(f"an array has the unknown type {dtype[:40]!r}")
        self.check(shape, dtype, len(data))
        return Array(dtype, tuple(shape), (data,))

    def check(self, shape: list[Any], dtype: str, length: int) -> None:
        """Whether an array has as many bytes as its shape says."""
        if len(shape) > MAX_DIMENSIONS or not all(type(side) is int and 0 <= side < 2**32 for side in shape):
            raise self.error(f"an array has the shape {str(shape)[:80]}")
        if math.prod(shape) * int(DTYPES[dtype][2:]) != length or math.prod(side or 1 for side in shape) > 2**48:
            raise self.error(f"an array {dtype} {shape} of {length} bytes")

    def joined(self, entries: dict[str, Any]) -> Array:
        """The array that was stored in chunks."""
        shape, chunks = (self.in_order(entries.get(name)) for name in ("shape", "chunks"))
        if len(entries) != 3 or not chunks:
            raise self.error("an array in chunks is not made of a shape and chunks")
        for chunk in chunks:
            if not isinstance(chunk, Array) or len(chunk.shape) != 1 or chunk.dtype != chunks[0].dtype:
                raise self.error("a chunk of an array is no flat array of the type of the others")
        pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
        self.check(shape, chunks[0].dtype, sum(map(len, pieces)))
        return Array(chunks[0].dtype, tuple(shape), pieces)

    def in_order(self, entries: Any) -> list[Any]:
        """The values of a map {"0": ..., "1": ...}, which is how flax writes a tuple."""
        if not isinstance(entries, dict) or entries.keys() != {str(index) for index in range(len(entries))}:
            raise self.error("an array in chunks is not made of a shape and chunks")
        return [entries[str(index)] for index in range(len(entries))]
