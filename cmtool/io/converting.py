"""From any format to any other, with a check in numbers that nothing was lost on the way."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from cmtool import spec
from cmtool.errors import CheckpointError, ConfigError, UsageError, nearest
from cmtool.flow.flow_map import FlowMap, ModelCard, Role
from cmtool.flow.parameterization import PARAMETERIZATIONS, TIME_INPUTS, AnyParameterization
from cmtool.flow.path import PATHS, AnyPath
from cmtool.io import checkpoint, checks, loading
from cmtool.io.imported import assemble
from cmtool.networks import CONFIGS, Config

if TYPE_CHECKING:
    from cmtool.io.imported import Imported

Format = Literal["cmtool", "diffusers", "openai", "onnx"]
ENDINGS: dict[str, Format] = {".safetensors": "cmtool", ".pt": "openai", ".pth": "openai", ".onnx": "onnx"}
_MAX_SIDE = 4096
_PIPELINE = {"model_index.json", "unet", "scheduler", "README.md"}  # all that a written folder holds
TOLERANCE = {"cmtool": 0.0, "openai": 0.0, "diffusers": 0.0, "onnx": 1e-4}  # of the largest value


@dataclass(frozen=True)
class Description:
    """All of a model but its weights, as `--set` names the parts."""

    network: Config
    path: AnyPath
    parameterization: AnyParameterization
    card: ModelCard


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: the largest difference between the outputs of the two models, and the largest output.

    notes: what had to be guessed on the way in, and what the target format cannot say.
    """

    source: str
    target: str
    format: Format
    difference: float
    scale: float
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: Format | None = None,
    *,
    role: Role | None = None,
    resolution: int | None = None,
    settings: Iterable[tuple[str, str]] = (),
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Conversion:
    """Write a model in another format, read it back and compare the two on fixed inputs.

    Args:
        source: as `cmtool.load`.
        target: the file to write, or the folder of a diffusers pipeline.
        format: "cmtool", "diffusers", "openai" or "onnx"; by default what the target's name says.
        role: what to read a file as that does not tell.
        resolution: of the images, where the file does not tell and the guess is wrong.
        settings: (dotted name, text) of what else to set right, such as ("network.head_channels", "32").
        overwrite: replace an existing target.
        progress: told of the bytes of a download.
    Raises:
        CheckpointError: a source that cannot be read, a model that the format cannot hold, outputs that differ.
        UsageError: a target that exists, or whose name says no format. ConfigError: settings that do not fit.
        DependencyError: without the packages of ONNX.
    """
    place = Path(target).expanduser()
    if str(target) == "-":
        raise UsageError("a model is not written to a pipe", "name a file or folder")
    chosen = format or _format_of(place)
    if chosen not in get_args(Format):
        raise UsageError(f"there is no format {chosen!r} to convert to", nearest(chosen, get_args(Format)))
    _check_place(place, chosen, overwrite)
    if chosen == "onnx":
        from cmtool.io.exporters import onnx

        onnx.require()

    imported = _corrected(loading.read(source, role=role, progress=progress), resolution, settings)
    notes = [*imported.card.notes]
    model = assemble(imported)
    asked = checks.questions(model)
    before = checks.answers(model, asked)
    scale = float(before.abs().max())
    if not scale < float("inf"):
        raise CheckpointError(f"{source} makes values that are not finite", "its weights or settings are broken")
    with _staged(place) as staged:
        _write(model, staged, chosen)
        del model  # never two models at once
        after = _read_back(staged, chosen, imported, asked, notes)
        difference = float((after - before).abs().max())
        if not difference <= TOLERANCE[chosen] * scale:
            raise CheckpointError(
                f"as {chosen}, {source} would make other images: they differ by {difference:.1e} of {scale:.1e}",
                "nothing was written; please report this",
            )
    return Conversion(str(source), str(place), chosen, difference, scale, tuple(notes))


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A place beside the target that takes its name if all went well, and is gone otherwise."""
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}", "check the folder and its free space"
        ) from error
    try:
        yield folder / target.name
        if not target.is_dir():
            os.replace(folder / target.name, target)
            return
        os.replace(target, folder / "old")  # a folder does not take the place of another
        try:
            os.replace(folder / target.name, target)
        except OSError:
            os.replace(folder / "old", target)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made if not target.exists() else ():  # those made for nothing; the innermost is the first
            with suppress(OSError):
                parent.rmdir()


def _format_of(target: Path) -> Format:
    if target.suffix.lower() in ENDINGS:
        return ENDINGS[target.suffix.lower()]
    if target.suffix:
        raise UsageError(
            f"the name {target.name} does not say a format to convert to",
            f"end it in {', '.join(ENDINGS)}, name a folder, or add --to",
        )
    return "diffusers"


def _check_place(target: Path, format: str, overwrite: bool) -> None:
    folder = format == "diffusers"
    if target.is_dir() and not folder:
        raise UsageError(f"{target} is a folder, and {format} is one file", "name a file")
    if target.exists() and folder and not target.is_dir():
        raise UsageError(f"{target} is a file, and {format} is a folder", "name a folder")
    filled = target.exists() and not (folder and not any(target.iterdir()))
    if filled and not overwrite:
        raise UsageError(f"{target} exists already", "name another place, or add --overwrite")
    if filled and folder and not {entry.name for entry in target.iterdir()} <= _PIPELINE:
        raise UsageError(
            f"the folder {target} holds more than a pipeline of diffusers, and all of it would go",
            "name another folder",
        )
    above = Path(os.path.abspath(target)).parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"nothing can be written to {above}", "name another place")


def _corrected(imported: Imported, resolution: int | None, settings: Iterable[tuple[str, str]]) -> Imported:
    """The description with what the user knows better."""
    kinds = {**CONFIGS, **PATHS, **PARAMETERIZATIONS, **TIME_INPUTS}
    names = []
    if resolution is not None:
        imported = _at(imported, resolution)
        names.append("resolution")
    whole = Description(imported.config, imported.path, imported.parameterization, imported.card)  # type: ignore[arg-type]
    for name, text in settings:
        whole = spec.replace(whole, name, text, kinds)
        names.append(name)
    imported = replace(
        imported, config=whole.network, path=whole.path, parameterization=whole.parameterization, card=whole.card
    )
    # What was set is no guess any more.
    kept = tuple(note for note in imported.card.notes if not any(_about(note, name) for name in names))
    imported.card = replace(imported.card, notes=kept)
    return imported


def _about(note: str, name: str) -> bool:
    return f"--set {name}" in note or (name == "resolution" and "--resolution" in note)


def _at(imported: Imported, resolution: int) -> Imported:
    """The same convolutional network for images of another size: attention stays on its levels."""
    config: Any = imported.config
    old = config.resolution
    changes: dict[str, Any] = {"resolution": resolution}
    try:
        if resolution < 1:
            raise ValueError(f"a resolution is positive, found {resolution}")
        if resolution > _MAX_SIDE:
            raise ValueError(f"no image is larger than {_MAX_SIDE}x{_MAX_SIDE} here")
        if config.kind in ("ddpmpp", "edm2", "mlp"):
            raise ValueError(f"a network of the kind {config.kind} says its own, {old}")
        if hasattr(config, "attention_resolutions"):
            levels = [(old // at).bit_length() - 1 for at in config.attention_resolutions]
            changes["attention_resolutions"] = tuple(resolution >> level for level in levels)
        config = replace(config, **changes)
    except ValueError as error:
        raise ConfigError(f"--resolution {resolution}: {error}", "give that of the images it was trained on") from error
    return replace(imported, config=config, card=replace(imported.card, resolution=resolution))


def _write(model: FlowMap, target: Path, format: Format) -> None:
    if format == "cmtool":
        checkpoint.save(model, target)
    elif format == "openai":
        from cmtool.io.exporters import openai

        openai.write(model, target)
    elif format == "onnx":
        from cmtool.io.exporters import onnx

        onnx.write(model, target)
    else:
        from cmtool.io.exporters import diffusers

        diffusers.write(model, target)


def _read_back(
    target: Path,
    format: Format,
    was: Imported,
    asked: list[checks.Question],
    notes: list[str],
) -> Tensor:
    """The outputs of what was written, read as anybody would read it."""
    from cmtool.io.importers import openai

    if format == "onnx":
        from cmtool.io.exporters import onnx

        return torch.cat([onnx.run(target, *given) for given in asked])
    found = loading.read(target, role=was.card.role)
    if format == "openai":
        method = openai.METHOD.search(target.name.lower())
        if method is None or (method[1] == "edm") != (was.card.role == "denoiser"):
            begins = "edm_" if was.card.role == "denoiser" else "cd_ or ct_"
            notes.append(
                f"OpenAI's format does not say that this is a {was.card.role}: let its name begin with {begins}, "
                "or tell readers with --role"
            )
        for name in ("resolution", "head_channels", "num_heads"):
            told, true = getattr(found.config, name), getattr(was.config, name)
            if told != true:
                notes.append(f"OpenAI's format does not say {name}: it is {true}, and readers may take it for {told}")
        found = replace(found, config=was.config, card=was.card)
    return checks.answers(assemble(found), asked)
