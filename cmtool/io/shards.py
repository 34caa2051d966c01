"""Tar shards: many images in few files, any of which can be read without the others.

A folder that `pack` wrote:

    manifest.json         what was done to the images, how many there are, and a SHA-256 of what they were before
    index.npy             where each image lies, its checksum and its label
    NNNNN.tar             WebDataset's form: KKKKKKKKKK.png, and KKKKKKKKKK.cls where there are labels

Shards of others have no index: it is made of their headers each time and held in memory, 24 bytes an image. Of one's
own only the labels are, 4 bytes each: an entry is read when its image is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtool.errors import DataError, UsageError
from cmtool.io import files
from cmtool.io.images import MAX_BYTES, SUFFIXES, UnreadableImageError, open_image

FORMAT, VERSION = "cmtool-shards", 1
MANIFEST, INDEX = "manifest.json", "index.npy"
INDEX_TYPE = np.dtype([("shard", "<u4"), ("label", "<i4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
SHARD_IMAGES = 10_000
_BLOCK = 512  # bytes: members of a tar begin on multiples of it
_HINT = "make it again with cmtool data pack"
_PIECE = 2**16  # entries of an index that are read at once
_LABEL_LIMIT = 4096  # bytes of a member that gives a label


class Index:
    """The entries of an `index.npy`, of INDEX_TYPE, which stay in the file. Safe in threads and in forked processes.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(mapped, np.memmap) or mapped.dtype != INDEX_TYPE or mapped.ndim != 1:
            raise ValueError(f"{path.name} is no index")
        self._start, self._count = mapped.offset, len(mapped)
        self._handle = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._read(number, 1)[0]

    def pieces(self) -> Iterator[NDArray[Any]]:
        """All entries, some at a time."""
        for first in range(0, self._count, _PIECE):
            yield self._read(first, min(_PIECE, self._count - first))

    def _read(self, first: int, count: int) -> NDArray[Any]:
        size = INDEX_TYPE.itemsize
        found = os.pread(self._handle, count * size, self._start + first * size)
        if len(found) < count * size:
            raise OSError(f"the index ends before entry {first + count:,}")
        return np.frombuffer(found, INDEX_TYPE)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


class Shards:
    """Encoded images by number, out of tar files. Safe in threads and in forked processes.

    Args:
        paths: the tar files. index: of INDEX_TYPE, one entry an image. checked: the entries have checksums.
    """

    labels: NDArray[np.int32] | None
    """One an image, or None."""

    def __init__(self, paths: Sequence[Path], index: NDArray[Any] | Index, *, checked: bool) -> None:
        self.paths, self.index, self.checked = tuple(paths), index, checked
        self._handles: dict[int, int] = {}
        self.labels = np.empty(len(index), np.int32) if len(index) and index[0]["label"] >= 0 else None
        if self.labels is not None:
            for number, piece in enumerate(self._pieces()):
                self.labels[number * _PIECE : number * _PIECE + len(piece)] = piece["label"]

    def _pieces(self) -> Iterator[NDArray[Any]]:
        return self.index.pieces() if isinstance(self.index, Index) else iter([self.index])

    def __len__(self) -> int:
        return len(self.index)

    def open(self, number: int) -> Image.Image:
        """An image with its header read.

        Raises:
            UnreadableImageError: if it is no image, or no longer what it was.
        """
        entry = self._entry(number)
        name = self._called(number, entry)
        return open_image(self._bytes(entry, name), name)

    def name(self, number: int) -> str:
        """What to call an image in messages."""
        return self._called(number, self._entry(number))

    def _called(self, number: int, entry: Any) -> str:
        return f"{self.paths[entry['shard']].name}, image {number:,}"

    def _entry(self, number: int) -> Any:
        try:
            return self.index[number]
        except OSError as error:
            raise UnreadableImageError(f"image {number:,}", "its index is cut off", _HINT) from error

    def _bytes(self, entry: Any, name: str) -> bytes:
        shard, size = int(entry["shard"]), int(entry["size"])
        if size > MAX_BYTES:
            raise UnreadableImageError(name, f"more than {MAX_BYTES >> 20} MiB", "leave it out")
        try:
            if shard not in self._handles:
                self._handles[shard] = os.open(self.paths[shard], os.O_RDONLY)
            data = os.pread(self._handles[shard], size, int(entry["offset"]))
        except OSError as error:
            raise UnreadableImageError(name, (error.strerror or "unreadable").lower()) from error
        if len(data) < size or (self.checked and zlib.crc32(data) != entry["crc"]):
            raise UnreadableImageError(name, "cut off" if len(data) < size else "damaged", _HINT)
        return data

    def close(self) -> None:
        """Let go of the files; they are opened again when needed."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    __del__ = close

    @property
    def names(self) -> Sequence[str]:
        """`name` of all of them, made when asked for: a million of them would fill the memory."""
        return _Names(self)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what is known without reading the images: their number, places, sizes and labels."""
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece.tobytes())
        return digest.hexdigest()[:16]


class _Names(Sequence[str]):
    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: Any) -> Any:
        return self._shards.name(number)


# Reading.


def is_packed(folder: Path) -> bool:
    """Whether `pack` wrote this folder."""
    return (folder / MANIFEST).is_file() and (folder / INDEX).is_file()


def read_packed(folder: Path) -> tuple[dict[str, Any], Shards]:
    """The manifest of a packed folder, and its images.

    Raises:
        DataError: if anything is missing or not as it was.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        index = Index(folder / INDEX)
        stored = manifest["shards"]
        paths = [folder / Path(shard["file"]).name for shard in stored]
        sizes = [int(shard["bytes"]) for shard in stored]
        fine = (
            manifest["format"] == FORMAT
            and manifest["version"] == VERSION
            and len(index) == manifest["count"] > 0
            and max(int(piece["shard"].max()) for piece in index.pieces()) < len(paths)
            and isinstance(manifest["fingerprint"], str)
            and isinstance(manifest["class_names"], list)
            and all(type(manifest[name]) is int and manifest[name] > 0 for name in ("resolution", "channels"))
            and all(isinstance(manifest[name], str) for name in ("source", "crop", "resize"))
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the manifest or the index in {str(folder)!r} is damaged", _HINT) from error
    if not fine:
        raise DataError(f"the manifest and the index in {str(folder)!r} do not fit together", _HINT)
    for path, size in zip(paths, sizes, strict=True):
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "missing" if found is None else f"of {found:,} bytes instead of {size:,}"
            raise DataError(f"{path.name} in {str(folder)!r} is {what}", "copy or download it again, or " + _HINT)
    return manifest, Shards(paths, index, checked=True)


def expand(pattern: str) -> list[Path]:
    """The tar files that a name means: one file, or all of `data-{000..041}.tar`."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if not found:
        return [Path(pattern)]
    before, first, last, after = found.groups()
    return [Path(f"{before}{number:0{len(first)}}{after}") for number in range(int(first), int(last) + 1)]


def read_tars(paths: Sequence[Path], name: str) -> tuple[Shards, int]:
    """Shards of others, and how many of their members are neither images nor labels.

    An image is labelled by the member of the same name that ends in .cls (a whole number as text) or .json (with a
    whole number under "label").

    Raises:
        DataError: if a file is no tar, none holds an image, or only some have labels.
    """
    entries: list[tuple[int, int, int, int, int]] = []
    ignored = 0
    for shard, path in enumerate(paths):
        for image, label, others in _samples(path):
            ignored += others
            if image is not None:
                entries.append((shard, -1 if label is None else label, *image, 0))
    if not entries:
        raise DataError(f"expected images in {name!r}, found {ignored:,} other files", "see cmtool data inspect --help")
    index = np.array(entries, INDEX_TYPE)
    labelled = int((index["label"] >= 0).sum())
    if labelled not in (0, len(index)):
        message = f"{labelled:,} of {len(index):,} images in {name!r} have a label"
        raise DataError(message, "give all of them one, or none")
    return Shards(paths, index, checked=False), ignored


def _samples(path: Path) -> Iterator[tuple[tuple[int, int] | None, int | None, int]]:
    """(offset and size of the image, label, number of other members) of each name in a tar file, as they follow."""
    key: str | None = None
    image: tuple[int, int] | None = None
    label: int | None = None
    others = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not member.isreg() or not stem:
                    continue
                if f"{folder}/{stem}" != key:
                    if key is not None:
                        yield image, label, others
                    key, image, label, others = f"{folder}/{stem}", None, None, 0
                suffix = os.path.splitext(base.lower())[1]
                if suffix in SUFFIXES and image is None:
                    image = member.offset_data, member.size
                elif ending.lower() in ("cls", "json") and member.size <= _LABEL_LIMIT:
                    content = os.pread(file.fileno(), member.size, member.offset_data)
                    label = _label(content, ending.lower(), label, f"{member.name} in {path.name}")
                else:
                    others += 1
            if key is not None:
                yield image, label, others
    except tarfile.TarError as error:
        raise DataError(
            f"{path.name} is no plain tar file, or damaged: {error}", "unpack a .tar.gz once: gunzip"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}", "check the name") from error


def _label(content: bytes, kind: str, before: int | None, where: str) -> int | None:
    try:
        value = int(content) if kind == "cls" else json.loads(content).get("label")
    except (ValueError, AttributeError) as error:
        raise DataError(f"the label {where} is no whole number", "write 0, 1, 2, ... as text") from error
    if value is None or isinstance(value, bool) or not isinstance(value, int):
        return before
    if not 0 <= value < 2**31:
        raise DataError(f"the label {where} is {value}", "count the classes from 0")
    return value


# Writing.


class Writer:
    """Writes a packed folder, image after image; the folder is complete or absent.

    Raises:
        UsageError: if the folder is there already and holds something.
        OSError: if it cannot be written.
    """

    def __init__(self, target: Path, *, shard_images: int = SHARD_IMAGES) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target} is there already", "name a new folder")
        self._target, self._shard_images = target, shard_images
        above = Path(os.path.abspath(target)).parent
        above.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=above))
        self._tar: tarfile.TarFile | None = None
        self._shards: list[dict[str, Any]] = []
        self._index = (self._folder / "entries").open("wb")
        self._pixels = hashlib.sha256()
        self.count = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._index.close()
        if self._tar is not None:
            self._tar.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # nothing is left of it when all went well

    def add(self, encoded: bytes, pixels: bytes, label: int | None) -> None:
        """The next image: as a PNG, and its pixels for the fingerprint."""
        if self._tar is None or self._shards[-1]["count"] == self._shard_images:
            self._begin_shard()
        assert self._tar is not None
        offset = self._member(f"{self.count:010d}.png", encoded)
        if label is not None:
            self._member(f"{self.count:010d}.cls", str(label).encode())
        place = len(self._shards) - 1, -1 if label is None else label, offset, len(encoded), zlib.crc32(encoded)
        self._index.write(np.array([place], INDEX_TYPE).tobytes())
        self._pixels.update(pixels)
        self._shards[-1]["count"] += 1
        self.count += 1

    def _begin_shard(self) -> None:
        self._end_shard()
        free, needed = shutil.disk_usage(self._folder).free, self._shards[-1]["bytes"] if self._shards else 0
        if free < needed:
            raise DataError(
                f"the next shard needs about {needed / 2**20:,.0f} MiB, and {self._target.parent} has "
                f"{free / 2**20:,.0f} MiB left",
                "make room, or name a folder on another disk",
            )
        name = f"{len(self._shards):05d}.tar"
        self._tar = tarfile.open(self._folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._shards.append({"file": name, "count": 0, "bytes": 0})

    def _end_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._shards[-1]["bytes"] = (self._folder / self._shards[-1]["file"]).stat().st_size

    def _member(self, name: str, data: bytes) -> int:
        assert self._tar is not None
        begin: int = self._tar.offset
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return begin + _BLOCK

    @property
    def pixels(self) -> bytes:
        """The SHA-256 of all pixels so far."""
        return self._pixels.digest()

    def finish(self, manifest: dict[str, Any]) -> None:
        """Close the last shard, write index and manifest, and put the folder in its place."""
        self._end_shard()
        self._tar = None
        self._index.close()
        entries = np.memmap(self._folder / "entries", INDEX_TYPE, "r") if self.count else np.zeros(0, INDEX_TYPE)
        files.write_atomic(self._folder / INDEX, lambda file: np.save(file, entries))
        (self._folder / "entries").unlink()
        text = json.dumps({"format": FORMAT, "version": VERSION, **manifest, "shards": self._shards}, indent=2) + "\n"
        files.write_atomic(self._folder / MANIFEST, lambda file: file.write(text.encode()))
        files.settle_all(self._folder)
        self._folder.chmod(0o777 & ~files.umask())
        os.replace(self._folder, self._target)
        files.settle(Path(os.path.abspath(self._target)).parent)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [C, H, W] as a PNG."""
    out = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.save(out, "PNG", compress_level=3)
    return out.getvalue()


def total(shards: Iterable[dict[str, Any]]) -> int:
    """Bytes of all shards of a manifest."""
    return sum(int(shard["bytes"]) for shard in shards)
