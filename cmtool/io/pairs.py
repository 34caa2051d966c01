"""Pairs (x0, eps) in one file: images that a model's ODE leads to, and the noise that each started from.

ReFlow trains on such pairs (Liu et al. 2022, arXiv:2209.03003). The noise is a function of its seed (`rng.noise`), so
a file holds eight bytes of it an image. It is an .npz with the entries

    images    float16 [N, C, H, H] in [-1, 1]; its rounding is a sixteenth of that of 8-bit pixels
    seeds     int64 [N]; eps = rng.noise(seeds, (C, H, H))
    labels    int64 [N]; only of a model that knows classes
    about     text: JSON with format, version, teacher, solver, steps, guidance, class_names, licence, noise

`noise` holds the first values of the first seed: a numpy that draws other numbers must not go unnoticed.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool import rng
from cmtool.errors import DataError
from cmtool.io.files import write_atomic
from cmtool.io.sources import MAX_CLASSES, check_unpacked, describe, undamaged

FORMAT = "cmtool.pairs"
VERSION = 1
_PROBE = 8  # values of noise kept for comparison
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same pairs are the same file
_HINT = "make the file again with cmtool pairs"


@dataclass(frozen=True)
class About:
    """How pairs were made.

    solver: of the ODE, or "jump" for the model's own jumps; guidance: the scale of classifier-free guidance, 1 for
    none; class_names: one name a label, empty without labels; licence: that of the teacher, which may bind what is
    trained on its images.
    """

    teacher: str
    solver: str
    steps: int
    guidance: float = 1.0
    class_names: tuple[str, ...] = ()
    licence: str = ""

    def summary(self) -> str:
        """A few words for people."""
        steps = f"{self.steps} step" + ("s" if self.steps > 1 else "")
        guidance = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        return f"solved from {self.teacher} by {self.solver}, {steps}{guidance}"


@dataclass(frozen=True, eq=False)
class Pairs:
    """What a file of pairs holds: images float16 [N, C, H, H], seeds int64 [N], labels int64 [N] or None."""

    images: NDArray[np.float16]
    seeds: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    about: About


def write_pairs(
    target: str | Path, count: int, batches: Iterable[tuple[Sequence[int], Tensor | None, Tensor]], about: About
) -> None:
    """Write pairs as they are made; the file appears complete or not at all. No more than a batch is in memory.

    Args:
        target: the file; parent folders are made.
        count: how many images there will be.
        batches: (seeds, labels int64 [B] or None, images float [B, C, H, H] in [-1, 1]) of each batch.
    Raises:
        DataError: images that are not finite, a place that cannot be written to.
    """
    batches = iter(batches)
    first = next(batches)  # before any file is made: most of what can be wrong shows here

    def write(file: IO[bytes]) -> None:
        shape = tuple(first[2].shape[1:])
        seeds: list[int] = []
        labels: list[int] = []
        with zipfile.ZipFile(file, "w") as archive:
            with _member(archive, "images") as member:
                header = {"descr": "<f2", "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for some_seeds, some_labels, images in _chain(first, batches):
                    _check_finite(images, some_seeds)
                    member.write(images.to(torch.float16).contiguous().cpu().numpy().tobytes())
                    seeds += some_seeds
                    labels += [] if some_labels is None else some_labels.tolist()
            if len(seeds) != count:
                raise ValueError(f"{count} pairs were promised, {len(seeds)} came")
            text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(about), "noise": _probe(seeds[0], shape)})
            entries = {"seeds": np.array(seeds, np.int64), "about": np.array(text)}
            entries |= {"labels": np.array(labels, np.int64)} if labels else {}
            for name, array in entries.items():
                with _member(archive, name) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    path = Path(target)
    try:
        write_atomic(Path(os.path.realpath(path)), write)  # a link stays a link
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = "name a file, not a folder" if path.is_dir() else "check the folder, its permissions and the space left"
        raise DataError(f"cannot write {str(path)!r}: {(error.strerror or str(error)).lower()}", hint) from None


def read_pairs(name: str) -> Pairs | None:
    """The pairs in a file, or None if it is something else (an `about` makes an .npz one of pairs).

    Raises:
        DataError: a file of pairs that is damaged, incomplete, of another version, or holds what cannot be.
    """
    path = Path(name)
    if path.suffix.lower() not in (".npz", ".npy") or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if "about.npy" not in archive.namelist():
                return None
    except Exception:  # whoever reads it as images says what is wrong
        return None
    with undamaged(name), open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
        check_unpacked(content.zip, name)
        entries = {key: content[key] for key in ("about", "images", "seeds", "labels") if key in content}
    described = _parse(entries["about"], name)
    about = _about(described, name)
    images, shape = _images(entries.get("images"), name)
    seeds = _whole_numbers(entries.get("seeds"), "seeds", len(images), name)
    if seeds.min() < 0:
        raise DataError(f"expected seeds from 0 to 2^63 - 1 in {name!r}, found others", _HINT)
    labels = None
    if about.class_names or "labels" in entries:
        labels = _whole_numbers(entries.get("labels"), "labels", len(images), name)
        if labels.min() < 0 or labels.max() >= len(about.class_names):
            found = f"labels from {labels.min()} to {labels.max()}, and {len(about.class_names)} class names"
            raise DataError(f"the pairs in {name!r} have {found}", _HINT)
    _check_noise(described.get("noise"), int(seeds[0]), shape, name)
    return Pairs(images, seeds, labels, about)


# Writing.


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    info.external_attr = 0o644 << 16
    return archive.open(info, "w", force_zip64=True)


def _chain(first: Any, rest: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from rest


def _check_finite(images: Tensor, seeds: Sequence[int]) -> None:
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        seed = seeds[int(finite.int().argmin())]
        raise DataError(f"the image of seed {seed} has values that are not finite", "try --precision fp32")


def _probe(seed: int, shape: Sequence[int]) -> list[float]:
    return [round(value, 6) for value in rng.noise([seed], shape).flatten()[:_PROBE].tolist()]


# Reading: whatever the file holds, pairs or a DataError.


def _parse(entry: Any, name: str) -> dict[str, Any]:
    """The JSON of `about`, of a format and version that is known."""
    found: Any = None
    if isinstance(entry, np.ndarray) and entry.ndim == 0 and entry.dtype.kind == "U":
        try:
            found = json.loads(str(entry))
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        hint = f"{_HINT}; an .npz of images has no entry of that name"
        raise DataError(f"the entry 'about' of {name!r} does not describe pairs", hint)
    version = found.get("version")
    if version != VERSION or isinstance(version, bool):
        message = f"the pairs in {name!r} have format {version!r}; this cmtool reads format {VERSION}"
        raise DataError(message, "use the version of cmtool that wrote them, or a newer one")
    return found


def _about(found: dict[str, Any], name: str) -> About:
    known = {key: found.get(key) for key in ("teacher", "solver", "steps", "guidance", "class_names", "licence")}
    names = known["class_names"]
    if (
        not all(isinstance(known[key], str) for key in ("teacher", "solver", "licence"))
        or not (_is_number(known["steps"]) and isinstance(known["steps"], int) and known["steps"] >= 1)
        or not _is_number(known["guidance"])
        or not (isinstance(names, list) and len(names) <= MAX_CLASSES and all(isinstance(text, str) for text in names))
    ):
        raise DataError(f"the entry 'about' of {name!r} is incomplete", _HINT)
    return About(**known | {"class_names": tuple(names)})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _images(entry: Any, name: str) -> tuple[NDArray[np.float16], tuple[int, ...]]:
    found = f"in {name!r}, found {describe(entry)}"
    if not isinstance(entry, np.ndarray) or entry.dtype != np.float16 or entry.ndim != 4:
        raise DataError(f"expected the images of pairs, float16 [N, C, H, H], {found}", _HINT)
    shape = entry.shape[1:]
    if 0 in entry.shape or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise DataError(f"expected square images of 1 or 3 channels {found}", _HINT)
    images = np.ascontiguousarray(entry)
    low, high = torch.from_numpy(images).aminmax()
    if not (low >= -1 and high <= 1):  # so that NaN does not pass
        raise DataError(f"expected the images of pairs in [-1, 1], found {low:g} to {high:g} in {name!r}", _HINT)
    return images, shape


def _whole_numbers(entry: Any, key: str, count: int, name: str) -> NDArray[np.int64]:
    if not isinstance(entry, np.ndarray) or entry.dtype.kind not in "iu" or entry.shape != (count,):
        raise DataError(f"expected {count:,} {key}, whole numbers, in {name!r}, found {describe(entry)}", _HINT)
    return entry.astype(np.int64)  # what is too large for it turns negative, and is refused for that


def _check_noise(found: Any, seed: int, shape: Sequence[int], name: str) -> None:
    expected = _probe(seed, shape)
    if not (isinstance(found, list) and len(found) == len(expected) and all(_is_number(value) for value in found)):
        raise DataError(f"the entry 'about' of {name!r} is incomplete", _HINT)
    if any(not abs(value - true) < 1e-3 for value, true in zip(found, expected, strict=True)):
        message = f"seed {seed} no longer gives the noise that the pairs in {name!r} were made from"
        raise DataError(message, "use the version of numpy that made them, or make them again with cmtool pairs")
