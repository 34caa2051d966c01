"""Model files: one `model.safetensors` with a JSON header that says everything else.

The header (safetensors metadata is text to text) holds

    format            "pt"
    cmtool.format     version of this layout, a whole number
    cmtool.version    version of cmtool that wrote the file
    cmtool.model      JSON: network, path, parameterization, card

Nothing in a file is ever executed: components are looked up by `kind` in a table, weights are plain tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool import __version__, spec
from cmtool.errors import CheckpointError, ConfigError, UserError
from cmtool.io.files import write_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmtool.flow.flow_map import FlowMap, Role
    from cmtool.io.imported import Imported

FORMAT = 1
MODEL_FILE = "model.safetensors"
_PARTS = ("network", "path", "parameterization", "card")
_MAX_DIMENSIONS = 16
_MAX_HEADER = 8 * 2**20  # bytes; the largest published networks need well under one


def save(model: FlowMap, target: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a model to one safetensors file, complete or not at all.

    Args:
        model: its card is the header.
        target: the file; parent folders are made.
        dtype: store the parameters in this type (bfloat16 halves the file); None keeps theirs. Buffers are not weights:
            the frequencies of a Fourier embedding, rounded, would tell the network another time.
    Raises:
        CheckpointError: if the file cannot be written.
        ValueError: for a view (`on_path`, `guided`), whose file would be that of the model seen.
    """
    import safetensors.torch

    if hasattr(model, "seen"):
        raise ValueError("a model seen on another path or under guidance cannot be saved; save the model itself")
    weights = {name for name, _ in model.network.named_parameters()}
    tensors = {
        name: (tensor.to(dtype) if dtype and name in weights else tensor).detach().cpu().contiguous()
        for name, tensor in model.network.state_dict().items()
    }
    described = {
        "network": spec.to_dict(model.network.config),
        "path": spec.to_dict(model.path),
        "parameterization": spec.to_dict(model.parameterization),
        "card": spec.to_dict(model.card),
    }
    metadata = {
        "format": "pt",
        "cmtool.format": str(FORMAT),
        "cmtool.version": __version__,
        "cmtool.model": json.dumps(described),
    }
    _write(Path(target), safetensors.torch.save(tensors, metadata))


def _write(target: Path, data: bytes) -> None:
    try:
        write_atomic(target, lambda file: file.write(data))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}", "check the folder and its free space"
        ) from error


def set_times(source: str | os.PathLike[str], times: Mapping[str, Sequence[float]]) -> Path:
    """Recommend times for numbers of network calls in a model file; its weights stay bit for bit. The file.

    Raises:
        CheckpointError: for anything that is not a complete cmtool model file, or cannot be written.
    """
    import safetensors
    import safetensors.torch

    path = locate(source)
    header(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    described = json.loads(metadata["cmtool.model"])
    described["card"]["times"] = {**described["card"].get("times", {}), **{n: list(t) for n, t in times.items()}}
    _write(path, safetensors.torch.save(tensors, {**metadata, "cmtool.model": json.dumps(described)}))
    return path


def locate(source: str | os.PathLike[str]) -> Path:
    """The model file of a source: a file itself, or `model.safetensors` in a run folder.

    Raises:
        CheckpointError: if there is none, saying what is missing.
    """
    path = Path(source)
    if path.is_dir():
        inside = path / MODEL_FILE
        if inside.is_file():
            return inside
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"the run {path} has no {MODEL_FILE} yet", "let it reach a checkpoint: --resume continues it"
            )
        raise CheckpointError(
            f"the folder {path} is no run: it has no {MODEL_FILE}", "name a run folder or a .safetensors file"
        )
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}", "name a run folder or a .safetensors file")
    return path


def header(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model file says of itself, without reading weights or importing torch.

    Returns:
        `{"format", "version", "network", "path", "parameterization", "card", "parameters", "bytes", "file", "dtypes"}`.
    Raises:
        CheckpointError: for anything that is not a complete cmtool model file.
    """
    path = locate(source)
    raw, size = read_header(path)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or "cmtool.model" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of cmtool's", "name a model that cmtool wrote"
        )
    version = metadata.get("cmtool.format", "")
    if version != str(FORMAT):
        raise CheckpointError(
            f"{path} has format {version or 'unknown'}; this cmtool reads format {FORMAT}",
            f"it was written by cmtool {metadata.get('cmtool.version', '?')}; use that version or a newer one",
        )
    try:
        described = json.loads(metadata["cmtool.model"])
        count = sum(_numel(entry["shape"]) for entry in raw.values())
        dtypes = sorted({str(entry["dtype"]) for entry in raw.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header", "get the file again") from error
    if not isinstance(described, dict) or not all(isinstance(described.get(part), dict) for part in _PARTS):
        raise CheckpointError(f"{path} has an incomplete header", "get the file again")
    return {
        "file": str(path),
        "format": FORMAT,
        "version": metadata.get("cmtool.version", ""),
        **{part: described[part] for part in _PARTS},
        "parameters": count,
        "dtypes": dtypes,
        "bytes": size,
    }


def read(source: str | os.PathLike[str], role: Role | None = None) -> Imported:
    """A model file of cmtool's, of this version or an earlier one, as `Imported`.

    Raises:
        CheckpointError: missing, damaged or foreign files, another role than the one asked for.
    """
    described = header(source)
    path = Path(described["file"])

    from cmtool import networks
    from cmtool.flow.flow_map import ModelCard
    from cmtool.flow.parameterization import PARAMETERIZATIONS, TIME_INPUTS, AnyParameterization
    from cmtool.flow.path import PATHS, AnyPath
    from cmtool.io.imported import Imported, other_role

    found = described["card"].get("role")
    if role is not None and found != role:
        raise other_role(str(path), found, role)
    kinds = {**networks.CONFIGS, **PATHS, **PARAMETERIZATIONS, **TIME_INPUTS}
    try:
        config = spec.from_dict(described["network"], networks.Config, kinds, "network")
        noising = spec.from_dict(described["path"], AnyPath, kinds, "path")
        parameterization = spec.from_dict(described["parameterization"], AnyParameterization, kinds, "parameterization")
        card = spec.from_dict(described["card"], ModelCard, kinds, "card")
    except ConfigError as error:
        raise CheckpointError(
            f"{path} describes a model this cmtool does not know: {error.message}",
            f"it was written by cmtool {described['version'] or '?'}",
        ) from error
    return Imported(config, noising, parameterization, card, read_tensors(path), "cmtool", str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, whose claims are checked first.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    read_header(path)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "get the file again") from error


def load(source: str | os.PathLike[str], *, role: Role | None = None, device: str | torch.device = "cpu") -> FlowMap:
    """Load a model that cmtool wrote, in evaluation mode, with float32 weights; `cmtool.load` reads all kinds.

    Args:
        source: a run folder or a `.safetensors` file.
        role: refuse a model that is something else.
        device: where to put it.
    Raises:
        CheckpointError: missing, damaged or foreign files, weights that do not fit or are not finite, another role.
    """
    from cmtool.io.imported import assemble

    return assemble(read(source, role)).to(device)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the file's size, each claim checked against the file."""
    broken = CheckpointError(
        f"{path} is not a complete safetensors file", "it may be cut off or another format: get it again"
    )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise broken
            (length,) = struct.unpack("<Q", start)
            if length > min(_MAX_HEADER, size - 8):
                raise broken
            raw = json.loads(file.read(length))
        if not isinstance(raw, dict):
            raise broken
        entries = [entry for name, entry in raw.items() if name != "__metadata__"]
        if not all(_is_honest(entry, size) for entry in entries):
            raise broken
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if size != 8 + length + end:
            raise broken
    except UserError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise broken from error
    return raw, size


def _is_honest(entry: Mapping[str, Any], size: int) -> bool:
    """Whether a tensor's shape is one, and no larger than the file: the numbers in a header may be any text at all."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    plain = len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and 0 <= n <= 2**40 for n in (*shape, *offsets))
    return plain and isinstance(entry["dtype"], str) and _numel(shape) <= 8 * size


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
