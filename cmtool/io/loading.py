"""Any model file as a `FlowMap`: where it comes from, what it is, and who reads it.

A file is known by what is in it, not by its ending: each format begins in its own way and has its own names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.errors import CheckpointError, UsageError
from cmtool.io import checkpoint

if TYPE_CHECKING:
    import torch

    from cmtool.flow.flow_map import FlowMap, Role
    from cmtool.io.imported import Imported

ROLES = ("denoiser", "consistency", "flow_map")
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how torch's files began before they were archives
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # as safetensors writes them
FORMATS = {
    "cmtool": "cmtool",
    "openai": "OpenAI consistency models, PyTorch",
    "edm": "NVlabs EDM, pickle",
    "edm2": "NVlabs EDM2, pickle",
    "diffusers": "diffusers",
    "jax": "OpenAI consistency models for CIFAR-10, JAX",
}


def load(
    source: str | os.PathLike[str],
    *,
    role: Role | None = None,
    device: str | torch.device = "cpu",
    assume: Role | None = None,
) -> FlowMap:
    """Load a model of any known format, in evaluation mode, with float32 weights.

    Args:
        source: a file or folder (a run of cmtool's, OpenAI's `.pt` and JAX files, NVlabs' `.pkl` of EDM, EDM2 and ECT,
            a diffusers folder), an https address, `hf:owner/name[@revision][:file]`, or the name of a released model.
        role: refuse a model that is something else. A file that does not tell is read as this.
        device: where to put it.
        assume: what to read a file as that does not tell, where any role will do.
    Raises:
        CheckpointError: missing, damaged or unknown files, weights that do not fit or are not finite, another role.
    """
    from cmtool.io.imported import assemble

    return assemble(read(source, role=role, assume=assume)).to(device)


def read(
    source: str | os.PathLike[str],
    *,
    role: Role | None = None,
    assume: Role | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Imported:
    """What `load` makes a model of: the network, the path, the parameterization, the card and the weights.

    Arguments and errors as `load`.

    Args:
        progress: told the bytes so far and in all (if known) while a file is fetched.
    """
    from cmtool.io import origins

    for asked in (role, assume):
        if asked not in (None, *ROLES):
            raise UsageError(f"there is no role {asked!r}", f"one of {', '.join(ROLES)}")
    located = origins.resolve(source, progress=progress)
    imported = _read(located.path, role, assume)
    return imported if located.released is None else _as_released(imported, located)


def _read(path: Path, role: Role | None, assume: Role | None) -> Imported:
    kind = sniff(path)
    if kind == "cmtool":
        return checkpoint.read(path, role)
    if kind == "diffusers":
        from cmtool.io.importers import diffusers

        return diffusers.read(path, role, assume)
    if kind == "pickle":
        from cmtool.io.importers import edm

        return edm.read(path, role)
    if kind == "jax":
        from cmtool.io.importers import jax

        return jax.read(path, role, assume)
    if kind == "safetensors":
        return _from_state(checkpoint.read_tensors(path), path, role, assume)
    from cmtool.io import torchfile

    return _from_state(torchfile.read(path), path, role, assume)


def _from_state(state: dict[str, Any], path: Path, role: Role | None, assume: Role | None) -> Imported:
    """The model of a bare state dict, known by its names."""
    from cmtool.io.importers import edm2, openai

    if openai.MARK in state:
        return openai.read(state, str(path), role, assume)
    bare = {name.removeprefix("model.").removeprefix(edm2.PREFIX) for name in state}
    if {"map_layer0.weight", edm2.MARK} & bare:
        from cmtool.io.importers import edm

        return edm.read_state(state, str(path), role)
    if any(name.startswith(("down_blocks.", "mid_block.")) for name in state):
        raise CheckpointError(
            f"{path} holds the weights of a diffusers model without its config", "name the folder that it came in"
        )
    some = ", ".join(sorted(state)[:3])
    raise CheckpointError(
        f"{path} holds the tensors of a network that cmtool does not know: {some}, ...",
        "known are ADM, DDPM++, NCSN++, EDM2 and diffusers' UNet2DModel",
    )


def sniff(path: Path) -> str:
    """What a file or folder is: cmtool, safetensors, torch, pickle, jax or diffusers.

    Raises:
        CheckpointError: nothing that is known, or nothing at all.
    """
    if path.is_dir():
        if not (path / checkpoint.MODEL_FILE).is_file():
            from cmtool.io.importers import diffusers

            if diffusers.looks_like(path):
                return "diffusers"
        checkpoint.locate(path)  # or says what is missing
        return "cmtool"
    checkpoint.locate(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder", "name a run folder or a file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    if start.startswith((b"PK\x03\x04", _LEGACY)):
        return "torch"
    if len(start) > 1 and start[0] == 0x80 and start[1] <= 5:
        return "pickle"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**40:
        return "cmtool" if _is_own(path) else "safetensors"
    # A map of a few entries, or of some more, whose first key is a short text: nothing else begins like this.
    if len(start) > 1 and ((0x81 <= start[0] <= 0x8F and 0xA1 <= start[1] <= 0xBF) or start[0] in (0xDE, 0xDF)):
        return "jax"
    raise _unknown(path, start)


def _is_own(path: Path) -> bool:
    raw, _ = checkpoint.read_header(path)
    metadata = raw.get("__metadata__")
    return isinstance(metadata, Mapping) and ("cmtool.model" in metadata or "cmtool.format" in metadata)


def _unknown(path: Path, start: bytes) -> CheckpointError:
    text = start.lstrip().lower()
    known = (
        (b"\x89hdf", "an HDF5 file, which cmtool does not read", "export it as safetensors"),
        (b"\x1f\x8b", "a gzip archive", "unpack it and name what is inside"),
        (b"gguf", "a GGUF file, which cmtool does not read", "export it as safetensors"),
    )
    for mark, what, hint in known:
        if text.startswith(mark):
            return CheckpointError(f"{path} is {what}", hint)
    if not start:
        return CheckpointError(f"{path} is empty", "get the file again")
    return CheckpointError(
        f"{path} is no file of weights that cmtool knows",
        "known are cmtool's and other .safetensors, torch's .pt, NVlabs' .pkl, flax's msgpack and diffusers folders",
    )


def describe(
    source: str | os.PathLike[str],
    *,
    role: Role | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[dict[str, Any], Imported | None]:
    """What a model file says of itself, as plain values; cmtool's own without reading weights or importing torch.

    Returns:
        `{"file", "format", "version", "network", "path", "parameterization", "card", "parameters", "bytes", "dtypes"}`,
        and what was read for it, of a format that does not say all of itself.
    Raises:
        CheckpointError: as `load`.
    """
    from cmtool.io import origins

    located = origins.resolve(source, progress=progress)
    if sniff(located.path) == "cmtool":
        told = checkpoint.header(located.path)
        return told | {"format": "cmtool", "dtypes": [_DTYPES.get(name, name) for name in told["dtypes"]]}, None

    from cmtool import spec

    imported = read(source, role=role, assume="denoiser")
    tensors = list(imported.state.values())
    told = {
        "file": str(located.path),
        "format": imported.format,
        "version": "",
        "network": spec.to_dict(imported.config),
        "path": spec.to_dict(imported.path),
        "parameterization": spec.to_dict(imported.parameterization),
        "card": spec.to_dict(imported.card),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "bytes": _size(located.path),
    }
    return told, imported


def time_input(parameterization: Mapping[str, Any]) -> str:
    """What a network is told of the time, in words, from the plain form of its parameterization."""
    told = parameterization.get("time_input") or {}
    scale, unit = told.get("scale", 1.0), told.get("unit", 1.0)
    if told.get("kind") == "log_ratio":
        who = {0.25: " (EDM)", 250.0: " (OpenAI, diffusers)"}.get(scale, "")
        ratio = "sigma" if unit == 1 else f"(sigma / {unit:g})"
        return ("" if scale == 1 else f"{scale:g} ") + f"ln {ratio}{who}"
    words = {
        "path_time": "the path's own time",
        "vp_time": "the time of the variance-preserving SDE",
        "cosine_step": "the nearest step of the cosine schedule",
    }
    said = words.get(told.get("kind", ""), str(told.get("kind", "")))
    return said if scale == 1 else f"{said}, times {scale:g}"


def _size(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _as_released(imported: Imported, located: Any) -> Imported:
    """With what is known of a released model and does not stand in its file."""
    from dataclasses import replace

    released = located.released
    card = imported.card
    imported.card = replace(
        card,
        licence=card.licence or released.licence,
        data=card.data or released.data,
        grid_points=released.grid_points,
        times=card.times or ({str(len(released.times)): released.sigmas()} if released.times else {}),
    )
    return imported
