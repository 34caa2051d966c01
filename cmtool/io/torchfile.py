"""`.pt`, `.pth` and `.bin` files: plain tensors out of torch's own formats, and nothing else.

torch's reader for plain values runs no code, but it can be brought down by data alone, as Python's can (`unpickle`
tells how), and its archive reader unpacks what Python's does not see. So the pickle goes through our own machine, the
archive's entries are taken as they lie in the file, and what is compressed is refused.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.io.unpickle import (
    DAMAGE,
    PLAIN_TENSORS,
    STORAGE_TYPES,
    TORCH_MAGIC,
    TORCH_VERSION,
    Machine,
    Source,
    Storage,
)

ZIP = b"PK\x03\x04"
_HINT = "it may be cut off or hold something else: get it again"


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a file.

    Raises:
        CheckpointError: anything that is no plain state dict: damage, objects, nested dictionaries.
    """
    content = load(path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds {_what(content)}, not the tensors of a network", _HINT)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            inside = f"{name[:60]}: {_what(value)}" if isinstance(name, str) else f"a name that is {_what(name)}"
            raise CheckpointError(
                f"{path} is no plain state dict: it holds {inside}",
                "name the file of the network's weights; training states and whole pipelines are not read",
            )
    state = dict(content)
    check_honest(state, path.stat().st_size, str(path))
    return state


def load(path: Path) -> Any:
    """What a file holds: dictionaries, lists, numbers, text and tensors.

    Raises:
        CheckpointError: a file that is damaged, or that holds objects.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            source = Source(str(path), file, data, len(data))
            return _zipped(source) if data[: len(ZIP)] == ZIP else _legacy(source)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    except (*DAMAGE, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as weights", _HINT) from error


def _zipped(source: Source) -> Any:
    """An archive with a pickle, and one entry a storage."""
    with zipfile.ZipFile(source.handle) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{source.file} is an archive, but not of torch's: it has no data.pkl", _HINT)
    root = pickles[0].removesuffix("data.pkl")

    def place(name: str) -> tuple[int, int]:
        """Where an entry's bytes lie in the file, and how many they are."""
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{source.file} is a compressed archive; torch's are not", _HINT)
        start = entry.header_offset
        if source.data[start : start + 4] != ZIP:
            raise ValueError("there is no entry here")
        name_length, extra_length = struct.unpack("<HH", source.data[start + 26 : start + 30])
        start += 30 + name_length + extra_length
        if start + entry.file_size > source.size:
            raise ValueError("an entry reaches beyond the file")
        return start, entry.file_size

    if f"{root}byteorder" in entries:
        start, length = place(f"{root}byteorder")
        if source.data[start : start + length] != b"little":
            raise CheckpointError(f"{source.file} was written on a machine with another order of bytes", _HINT)
    found: dict[str, Tensor] = {}

    def numbers(storage: Storage) -> Tensor:
        if storage.key not in found:
            start, length = place(f"{root}data/{storage.key}")
            if storage.count * storage.dtype.itemsize > length:
                raise ValueError("a storage is shorter than it says")
            found[storage.key] = source.numbers(start, storage.count, storage.dtype)
        return _as(found[storage.key], storage)

    start, length = place(pickles[0])
    return Machine(source, start, start + length, PLAIN_TENSORS, numbers).run()


def _legacy(source: Source) -> Any:
    """The format before it was an archive: four pickles, the storages' names, and their numbers one after the other.

    The object comes before the numbers. It is read twice: first for the sizes of its storages, then with their places.
    """
    wanted: dict[str, Storage] = {}

    def size(storage: Storage) -> Tensor:
        wanted.setdefault(storage.key, storage)
        return torch.empty(storage.count, dtype=storage.dtype, device="meta")

    machine = Machine(source, 0, source.size, STORAGE_TYPES)
    magic, version, system = machine.run(), machine.run(), machine.run()
    if (magic, version) != (TORCH_MAGIC, TORCH_VERSION) or system["little_endian"] is not True:
        raise ValueError("this is not torch's")
    start = machine.at
    whole = Machine(source, start, source.size, PLAIN_TENSORS, size)
    whole.run()
    after = Machine(source, whole.at, source.size, STORAGE_TYPES)
    keys = after.run()
    found: dict[str, Tensor] = {}
    for key in keys:
        storage = wanted[key]
        if after.whole(8) != storage.count or key in found:
            raise ValueError("a storage is not as long as it says")
        found[key] = source.numbers(after.skip(storage.count * storage.dtype.itemsize), storage.count, storage.dtype)
    numbers: Callable[[Storage], Tensor] = lambda storage: _as(found[storage.key], storage)  # noqa: E731
    return Machine(source, start, source.size, PLAIN_TENSORS, numbers).run()


def _as(numbers: Tensor, storage: Storage) -> Tensor:
    """The numbers, if another name for them says the same of them."""
    if (numbers.dtype, numbers.numel()) != (storage.dtype, storage.count):
        raise ValueError("a storage has two types or lengths")
    return numbers


def check_honest(state: Mapping[str, Tensor], size: int, file: str) -> None:
    """Refuse tensors that are no plain arrays of numbers, or that together are larger than their file.

    A tensor can be a few bytes that are read over and over: a copy of it would need any amount of memory.

    Raises:
        CheckpointError: those.
    """
    total = 0
    for name, tensor in state.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise CheckpointError(f"{file}: {name[:60]} is no array of real numbers but {tensor.dtype}", _HINT)
        total += tensor.numel() * tensor.element_size()
    if total > 4 * size:  # shared weights may be counted more than once
        raise CheckpointError(f"{file} claims to hold {total:,} bytes of tensors and has {size:,}", _HINT)


def _what(value: object) -> str:
    names: dict[type, str] = {dict: "a dictionary", list: "a list", str: "text"}
    return names.get(type(value), type(value).__name__)
