"""`.pt`, `.pth` and `.bin` files: plain tensors out of torch's own format, and nothing else.

Only `torch.load(weights_only=True)` reads them, after the container itself has been looked at: a zip whose entries are
not compressed cannot unpack to more than it is.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtool.errors import CheckpointError

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how torch's files began before they were zips
_HINT = "it may be cut off or hold something else: get it again"


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, mapped into memory where the format allows.

    Raises:
        CheckpointError: anything that is no plain state dict: damage, objects, nested dictionaries.
    """
    content = load(path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds {_what(content)}, not the tensors of a network", _HINT)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            inside = f"{name}: {_what(value)}" if isinstance(name, str) else _what(name)
            raise CheckpointError(
                f"{path} is no plain state dict: it holds {inside[:80]}",
                "name the file of the network's weights; training states and whole pipelines are not read",
            )
    state = dict(content)
    check_honest(state, path.stat().st_size, str(path))
    return state


def load(path: Path) -> Any:
    """What a file holds, by torch's reader for plain values.

    Raises:
        CheckpointError: a file that it does not read.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages of an older kind, and the like
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # bytes that are no weights make torch's reader fail in a dozen ways
        found = str(error)
        if "Unsupported global" in found or "Unsupported operand" in found or "weights_only" in found.lower():
            raise CheckpointError(
                f"{path} holds Python objects, which could run code; only plain tensors are read",
                "ask for the state dict, or a .safetensors file",
            ) from error
        raise CheckpointError(f"{path} cannot be read as weights", _HINT) from error


def check_zip(path: Path) -> None:
    """Refuse archives that are compressed, or claim to hold more than the file is long.

    Raises:
        CheckpointError: those, and archives that torch did not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        names = [entry.filename for entry in entries]
        size = path.stat().st_size
        if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
            raise CheckpointError(f"{path} is an archive, but not of torch's: it has no data.pkl", _HINT)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{path} is a compressed archive; torch's are not", _HINT)
        if sum(entry.file_size for entry in entries) > size or len(set(names)) < len(names):
            raise CheckpointError(f"{path} claims to hold more than it does", _HINT)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path} is a damaged archive", _HINT) from error


def check_honest(state: Mapping[str, Tensor], size: int, file: str) -> None:
    """Refuse tensors that are no plain arrays of numbers, or that together are larger than their file.

    A tensor can be a few bytes that are read over and over: a copy of it would need any amount of memory.

    Raises:
        CheckpointError: those.
    """
    total = 0
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
        if not plain or tensor.dtype == torch.bool:
            raise CheckpointError(f"{file}: {name} is no array of real numbers but {tensor.dtype}", _HINT)
        count = tensor.numel() * tensor.element_size()
        if count > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{file}: {name} claims more numbers than are there", _HINT)
        total += count
    if total > 4 * size:  # shared weights may be counted more than once
        raise CheckpointError(f"{file} claims to hold {total:,} bytes of tensors and has {size:,}", _HINT)


def _what(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary of {', '.join(map(str, list(value)[:4]))}"
    return type(value).__name__
