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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool import __version__, spec
from cmtool.errors import CheckpointError, ConfigError, UserError
from cmtool.io.files import write_atomic

if TYPE_CHECKING:
    import torch

    from cmtool.flow.flow_map import FlowMap, Role

FORMAT = 1
MODEL_FILE = "model.safetensors"
_PARTS = ("network", "path", "parameterization", "card")
_MAX_HEADER = 64 * 2**20  # bytes; the largest published networks need well under one


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
    data = safetensors.torch.save(tensors, metadata)
    try:
        write_atomic(Path(target), lambda file: file.write(data))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}", "check the folder and its free space"
        ) from error


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
    raw, size = _read_header(path)
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


def load(source: str | os.PathLike[str], *, role: Role | None = None, device: str | torch.device = "cpu") -> FlowMap:
    """Load a model in evaluation mode, float32 weights.

    Args:
        source: a run folder or a `.safetensors` file.
        role: refuse a model that is something else.
        device: where to put it.
    Raises:
        CheckpointError: missing, damaged or foreign files, weights that do not fit or are not finite, another role.
    """
    described = header(source)
    path = Path(described["file"])
    found = described["card"].get("role")
    if role is not None and found != role:
        what = {
            "denoiser": "a denoiser (a diffusion teacher)",
            "consistency": "a consistency model",
            "flow_map": "a two-time model",
        }
        raise CheckpointError(
            f"{path} is {what.get(found, found)}, and {what[role]} is needed",
            "a teacher is trained with `cmtool train --preset edm`"
            if role == "denoiser"
            else "a consistency model is trained with `cmtool distill`",
        )

    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    from cmtool import networks
    from cmtool.flow.flow_map import FlowMap, ModelCard
    from cmtool.flow.parameterization import EDM, PARAMETERIZATIONS, TIME_INPUTS, BoundaryEDM, Piecewise, Velocity
    from cmtool.flow.path import PATHS, VE, Linear, Trig

    kinds = {**networks.CONFIGS, **PATHS, **PARAMETERIZATIONS, **TIME_INPUTS}
    try:
        config = spec.from_dict(described["network"], networks.Config, kinds, "network")
        noising = spec.from_dict(described["path"], VE | Linear | Trig, kinds, "path")
        parameterization = spec.from_dict(
            described["parameterization"], EDM | BoundaryEDM | Piecewise | Velocity, kinds, "parameterization"
        )
        card = spec.from_dict(described["card"], ModelCard, kinds, "card")
    except ConfigError as error:
        raise CheckpointError(
            f"{path} describes a model this cmtool does not know: {error.message}",
            f"it was written by cmtool {described['version'] or '?'}",
        ) from error
    try:
        state = safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "get the file again") from error
    try:
        if getattr(config, "num_blocks", getattr(config, "depth", 0)) > len(
            state
        ):  # each block has weights: do not even try
            raise ValueError("too many blocks")
        with torch.device("meta"):
            expected = networks.build(config).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} describes a network that cannot be built", "get the file again") from error
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if missing or extra or wrong:
        name = sorted(missing or extra or wrong)[0]
        problem = "is missing" if missing else "is not part of the network" if extra else "has another shape"
        raise CheckpointError(f"{path} does not fit its own description: {name} {problem}", "get the file again")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path} holds weights that are not finite, in {name}", "use an earlier checkpoint")
    network = networks.build(config)
    network.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    model = FlowMap(network, noising, parameterization, card)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.requires_grad_(False).eval()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
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
        end = max((entry["data_offsets"][1] for name, entry in raw.items() if name != "__metadata__"), default=0)
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


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
