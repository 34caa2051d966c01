"""Training states of which every process has a part: folders in the format of torch.distributed.checkpoint.

    .metadata, __RANK_N.distcp   the tensors, by torch
    rest.pt                      what is no tensor, where in the state each tensor belongs, a checksum of each file

A state is read back by any number of processes, each of which gets the parts it asks for. The metadata is a pickle:
only the few names that it needs are looked up.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.io import files
from cmtool.processes import Processes

_REST = "rest.pt"
_METADATA = ".metadata"
_NAMES = ("torch.distributed.checkpoint.", "torch.distributed.tensor.")
_OTHER_NAMES = {
    *(("torch", name) for name in ("Size", "device")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath")),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_get_layout"),
    ("collections", "OrderedDict"),
}

Like = Callable[[tuple[Any, ...], torch.Size, torch.dtype], Tensor]


def save(target: Path, state: dict[str, Any], processes: Processes) -> None:
    """Write a state of which every process has its parts; the folder is complete or absent. All call together.

    Raises:
        OSError: if it cannot be written.
    """
    import torch.distributed.checkpoint as dcp

    temporary = Path(processes.told(_temporary(target) if processes.first else ""))
    try:
        tensors = dict(_tensors(state))
        keys = {_key(path): path for path in tensors}
        dcp.save(
            {_key(path): tensor for path, tensor in tensors.items()},
            storage_writer=dcp.FileSystemWriter(temporary),
            process_group=getattr(processes, "control", None),
        )
        own = processes.gathered({file.name: _sum(file) for file in temporary.glob(f"__{processes.rank}_*")})
        if processes.first:
            sums = {name: value for part in own for name, value in part.items()}
            sums[_METADATA] = _sum(temporary / _METADATA)
            rest = {"keys": keys, "rest": _without_tensors(state), "sums": sums}
            files.write_atomic(temporary / _REST, lambda file: torch.save(rest, file))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            files.settle(target.parent)
    except BaseException:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    processes.wait()


def _temporary(target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)


def intact(folder: Path) -> bool:
    """Whether every byte of a stored state is as it was written."""
    try:
        sums: dict[str, int] = _rest(folder)["sums"]
        return all(_sum(folder / name) == value for name, value in sums.items())
    except Exception:  # torch.load fails on damaged files in many ways
        return False


def load(folder: Path, like: Like, processes: Processes) -> dict[str, Any]:
    """A stored state. All processes call together.

    Args:
        like: (where in the state, size, type) -> a tensor to fill: a whole one, or one spread over the processes.
    Raises:
        CheckpointError: if it cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    try:
        stored = _rest(folder)
        reader = _reader(folder)
        sizes = reader.read_metadata().state_dict_metadata
        wanted = {
            key: like(tuple(path), sizes[key].size, sizes[key].properties.dtype) for key, path in stored["keys"].items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a single process: that it is single
            dcp.load(wanted, storage_reader=reader, process_group=getattr(processes, "control", None))
    except (OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", "continue from another checkpoint") from error
    state: dict[str, Any] = stored["rest"]
    for key, path in stored["keys"].items():
        inside = state
        for name in path[:-1]:
            inside = inside[name]
        inside[path[-1]] = wanted[key]
    return state


def _rest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / _REST, map_location="cpu", weights_only=True)
    return found


def _tensors(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """All tensors of nested dictionaries, with the keys that lead to them."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for name, value in state.items():
            yield from _tensors(value, (*path, name))


def _without_tensors(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {name: _without_tensors(value) for name, value in state.items() if not isinstance(value, Tensor)}


def _key(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _sum(file: Path) -> int:
    found = 0
    with file.open("rb") as source:
        while chunk := source.read(2**22):
            found = zlib.crc32(chunk, found)
    return found


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / _METADATA).open("rb") as file:
                metadata = _Unpickler(file).load()
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


class _Unpickler(pickle.Unpickler):
    """Looks up the names of torch's metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.".startswith(_NAMES) and not name.startswith("_load")
        if (
            known
            or (module, name) in _OTHER_NAMES
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        ):
            found = super().find_class(module, name)
            if isinstance(found, type) or (module, name) in _OTHER_NAMES or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"the metadata asks for {module}.{name}")
