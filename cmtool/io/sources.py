"""Where the images of a data set lie: each source as a list of named images with labels, none decoded yet."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtool.errors import DataError, nearest
from cmtool.io import shards, tables
from cmtool.io.digits import CLASS_NAMES, PARTS, RESOLUTION, digits
from cmtool.io.images import MAX_BYTES, SUFFIXES, UnreadableImageError, read_bytes
from cmtool.io.images import open_image as open_encoded

EMBEDDED = {"digits" if part == "all" else f"digits:{part}": part for part in PARTS}
MAX_CLASSES = 100_000
_PIECE = 2**16  # labels that are looked at at once
_IMAGE_KEYS, _LABEL_KEYS = ("images", "x", "arr_0", "data"), ("labels", "y", "arr_1")
_LABELS_FILE = "dataset.json"
_LABELS_HINT = 'the form is {"labels": [["folder/image.png", 0], ...]}, or null for no labels'
_STREAMED = 1024  # rows of a stream at once
_COPY_HINT = "copy or download it again"
_PLACES_HINT = "name a folder, a zip, an .npz or .npy file, tar shards, a parquet file, or digits"
_SAVE_HINT = "save it with numpy.save or numpy.savez as uint8"


@dataclass(frozen=True)
class Source:
    """The images of one place, in order.

    Args:
        name: the place as the user wrote it; kind: folder, zip, npz, npy, digits, shards, tar or table.
        names: one a image, for messages.
        open: gives image k with its header read (Pillow's size, mode, format); `images.load` decodes it. Safe to call
            from several threads; raises UnreadableImageError.
        labels: one a image, or None.
        class_names: one a label; empty without labels.
        ignored: files that are no images by their name.
        lasting: whether images can still be opened after the source is closed, and in forked processes.
        large: whether it is meant to stay where it is instead of being read into memory.
        packed: the manifest of shards that `cmtool data pack` wrote; all their images are alike.
        fingerprint: of `large` ones, what is known of the content without reading it.
    """

    name: str
    kind: str
    names: Sequence[str]
    open: Callable[[int], Image.Image]
    labels: Sequence[int] | NDArray[Any] | None = None
    class_names: tuple[str, ...] = ()
    ignored: int = 0
    lasting: bool = False
    large: bool = False
    packed: Mapping[str, Any] | None = None
    fingerprint: str = ""

    def evenly(self, limit: int | None) -> Sequence[int]:
        """The indices of all images, or of `limit` of them spread evenly."""
        count = len(self.names)
        return range(count) if limit is None or limit >= count else [k * count // limit for k in range(limit)]

    def count_classes(self, kept: Sequence[int]) -> dict[str, int]:
        """How many of the images `kept` each class has."""
        if self.labels is None:
            return {}
        labels = np.asarray(self.labels)
        chosen = labels if len(kept) == len(labels) else labels[kept]
        counts = np.zeros(len(self.class_names), np.int64)
        for first in range(0, len(chosen), _PIECE):  # numpy counts a copy
            counts += np.bincount(chosen[first : first + _PIECE], minlength=len(counts))
        return {name: int(counts[label]) for label, name in enumerate(self.class_names)}


@contextlib.contextmanager
def open_source(name: str, resolution: int | None = None) -> Iterator[Source]:
    """List the images of a place; `open_data` says which places there are.

    Args:
        resolution: what the digits are drawn at; the others are as they are.
    Raises:
        DataError: the place cannot be read, holds no images, or its labels make no sense.
        DependencyError: the digits without scikit-learn.
    """
    if name in EMBEDDED:
        images, labels = digits(EMBEDDED[name], resolution or RESOLUTION)
        yield _from_array(name, "digits", images, labels.tolist(), CLASS_NAMES)
        return
    if not name:  # a Path would take it for the current folder
        raise DataError("expected image data, found an empty name", _PLACES_HINT)
    if name.startswith(tables.HUB):
        yield _from_table(name)
        return
    path = Path(name)
    tars = shards.expand(name)
    if len(tars) > 1 or (path.suffix.lower() == ".tar" and path.is_file()):
        yield _from_tars(name, tars)
        return
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        close = nearest(name, EMBEDDED)
        hint = close if close.startswith("did") else _PLACES_HINT
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise DataError(f"expected image data in {name!r}, found: {reason}", hint) from None
    if is_folder and shards.is_packed(path):
        yield _from_packed(name, path)
    elif tables.is_table(path):
        yield _from_table(name)
    elif is_folder and (tars := sorted(path.glob("*.tar"))):
        yield _from_tars(name, tars)
    elif is_folder:
        yield _from_folder(name, path)
    elif path.suffix.lower() in (".npz", ".npy"):
        yield _from_arrays_file(name, path)
    elif path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        with undamaged(name):
            archive = zipfile.ZipFile(path)
        with archive:
            yield _from_zip(name, archive)
    else:
        raise DataError(
            f"expected a folder, a zip, an .npz, an .npy, a .tar or a .parquet file, found {name!r}",
            _other_file_hint(path),
        )


def memory_limit() -> int:
    """Bytes that a data set may take: four fifths of the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 4 // 5
    except (AttributeError, ValueError, OSError):  # not every system tells
        return 2**63 - 1


def _other_file_hint(path: Path) -> str:
    if ".tar" in path.suffixes or path.suffix in (".tgz", ".txz"):
        return f"only plain tar files can be read in any order: unpack it first, tar -xf {path}"
    if path.suffix.lower() in SUFFIXES:
        return f"name the folder of the images: {path.parent}"
    return "put the images into a folder or a zip"


# Folders and zips.


def _from_folder(source: str, root: Path) -> Source:
    names: list[str] = []
    ignored = 0
    visited = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename!r}: {error.strerror}", "check its permissions") from None

    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link back up
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
        inside = Path(folder).relative_to(root)
        images = [name for name in files if _is_image(name)]
        names += [(inside / name).as_posix() for name in images]
        ignored += sum(not _hidden(name) for name in files) - len(images)
    names.sort()

    def read(name: str) -> bytes:
        return read_bytes(root / name, name)

    return _labelled(source, "folder", names, read, lambda name: (root / name).is_file(), ignored, lasting=True)


def _from_zip(source: str, archive: zipfile.ZipFile) -> Source:
    members = {info.filename.replace("\\", "/"): info for info in archive.infolist() if not info.is_dir()}
    visible = [name for name in members if not any(_hidden(part) for part in name.split("/"))]
    names = sorted(name for name in visible if _is_image(name))

    def read(name: str) -> bytes:
        info = members[name]
        if info.flag_bits & 1:
            raise UnreadableImageError(name, "encrypted", "unpack the zip with its password")
        if info.file_size > MAX_BYTES:
            raise UnreadableImageError(name, f"more than {MAX_BYTES >> 20} MiB", "leave it out")
        try:
            with archive.open(info) as file:
                return file.read()  # zipfile stops at the declared size, then compares the checksum
        except Exception as error:  # of a dozen kinds, one for each way to be broken
            raise UnreadableImageError(name, "damaged in the zip", _COPY_HINT) from error

    return _labelled(source, "zip", names, read, members.__contains__, len(visible) - len(names))


def _labelled(
    source: str,
    kind: str,
    names: list[str],
    read: Callable[[str], bytes],
    exists: Callable[[str], bool],
    ignored: int,
    *,
    lasting: bool = False,
) -> Source:
    """Images by name, with labels from `dataset.json`, else from the top-level folders."""
    if not names:
        found = f"{ignored:,} other files" if ignored else "nothing"
        raise DataError(f"expected images in {source!r}, found {found}", f"images end in {', '.join(sorted(SUFFIXES))}")

    def open_image(index: int) -> Image.Image:
        return open_encoded(read(names[index]), names[index])

    root = _wrapper(names, exists)
    if exists(root + _LABELS_FILE):
        where = f"{root}{_LABELS_FILE} in {source!r}"
        try:
            content = read(root + _LABELS_FILE)
        except UnreadableImageError as error:
            raise DataError(f"cannot read {where}: {error.reason}", error.hint) from None
        labels, class_names = _labels_from_json(content, [name[len(root) :] for name in names], where)
        return Source(source, kind, names, open_image, labels, class_names, ignored - 1, lasting)

    tops = [name[len(root) :].rpartition("/")[0].partition("/")[0] for name in names]
    folders = set(tops) - {""}
    if not folders:
        return Source(source, kind, names, open_image, ignored=ignored, lasting=lasting)
    if "" in tops:
        loose = names[tops.index("")]
        message = f"{source!r} has {len(folders)} class folders, and images beside them (first {loose!r})"
        raise DataError(message, "move them into a class folder, or put all images into one folder for no classes")
    numbers = all(folder.isascii() and folder.isdigit() for folder in folders)
    class_names = tuple(sorted(folders, key=lambda name: (int(name) if numbers else 0, name)))
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = [label_of[top] for top in tops]
    return Source(source, kind, names, open_image, labels, class_names, ignored, lasting)


def _wrapper(names: list[str], exists: Callable[[str], bool]) -> str:
    """The folder ("a/b/", or "") that holds everything: an only folder is a wrapper, not a class."""
    root = ""
    while not exists(root + _LABELS_FILE):
        top, slash, _ = names[0][len(root) :].partition("/")
        if not slash or not all(name.startswith(f"{root}{top}/") for name in names):
            break
        root += top + "/"
    return root


def _labels_from_json(content: bytes, names: list[str], where: str) -> tuple[list[int] | None, tuple[str, ...]]:
    try:
        entries = json.loads(content)["labels"]
        of_name = None if entries is None else {str(name).replace("\\", "/"): label for name, label in entries}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{where} holds no labels", _LABELS_HINT) from None
    if of_name is None:
        return None, ()
    missing = [name for name in names if name not in of_name]
    if missing:
        found = f"{len(missing):,} of {len(names):,} images, first {missing[0]!r}"
        raise DataError(f"{where} has no label for {found}", _LABELS_HINT)
    labels = [of_name[name] for name in names]
    for name, label in zip(names, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"{where}: the label of {name!r} is {label!r}, not a whole number", _LABELS_HINT)
    return labels, _numbered_classes(labels, where)


def _numbered_classes(labels: Sequence[int] | NDArray[Any], where: str) -> tuple[str, ...]:
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= MAX_CLASSES:
        hint = f"count the classes from 0, at most {MAX_CLASSES:,} of them"
        raise DataError(f"{where} has labels from {low} to {high}", hint)
    return tuple(str(label) for label in range(high + 1))


def _is_image(name: str) -> bool:
    return not _hidden(name.rpartition("/")[2]) and os.path.splitext(name)[1].lower() in SUFFIXES


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


# Large ones.


def _from_packed(source: str, folder: Path) -> Source:
    manifest, images = shards.read_packed(folder)
    names = tuple(str(name) for name in manifest["class_names"])
    labels = images.labels
    if labels is not None and int(labels.max()) >= len(names):
        raise DataError(f"{source!r} has label {int(labels.max())} and {len(names)} classes", "pack the data again")
    return Source(
        source,
        "shards",
        images.names,
        images.open,
        labels,
        names if labels is not None else (),
        lasting=True,
        large=True,
        packed=manifest,
        fingerprint=manifest["fingerprint"],
    )


def _from_tars(source: str, paths: Sequence[Path]) -> Source:
    images, ignored = shards.read_tars(paths, source)
    labels = images.labels
    names = () if labels is None else _numbered_classes(labels, repr(source))
    return Source(
        source, "tar", images.names, images.open, labels, names, ignored, True, True, fingerprint=images.fingerprint
    )


def _from_table(source: str) -> Source:
    table = tables.Table(source)
    labels = table.labels
    names = table.class_names or (() if labels is None else _numbered_classes(labels, repr(source)))
    return Source(source, "table", table.names, table.open, labels, names, 0, True, True, fingerprint=table.fingerprint)


class Streamed:
    """A table that is read once, as sources of a few hundred rows.

    Raises:
        DataError: as `tables.Stream`.
    """

    def __init__(self, name: str) -> None:
        self.name, self._stream = name, tables.Stream(name)
        self._labels = array("q")
        self._count = 0

    def parts(self) -> Iterator[Source]:
        """One part after another; only the newest can be opened."""
        rows = iter(self._stream)
        while part := list(islice(rows, _STREAMED)):
            labels = [row.label for row in part if row.label is not None] if self._stream.labelled else None
            self._labels.extend(labels or ())
            self._count += len(part)
            yield self._source([row.name for row in part], partial(_open_row, part), labels)

    def whole(self) -> Source:
        """All that came, without the images."""
        labels = np.frombuffer(self._labels, np.int64) if self._stream.labelled else None
        return self._source(range(self._count), _gone, labels)  # type: ignore[arg-type]

    def _source(self, names: Sequence[str], opener: Callable[[int], Image.Image], labels: Any) -> Source:
        known = self._stream.class_names
        if labels is not None and not known:
            known = _numbered_classes(self._labels or [0], repr(self.name))
        return Source(self.name, "table", names, opener, labels, known)


def _open_row(rows: Sequence[tables.Row], number: int) -> Image.Image:
    return rows[number].open()


def _gone(number: int) -> Image.Image:
    raise AssertionError("the images of a stream are read once")


# Arrays.


def _from_array(
    source: str, kind: str, array: NDArray[np.uint8], labels: list[int] | None, class_names: tuple[str, ...]
) -> Source:
    names = [f"image {index}" for index in range(len(array))]
    lasting = kind == "npy"  # it is mapped from the disk
    return Source(source, kind, names, lambda index: Image.fromarray(array[index]), labels, class_names, 0, lasting)


def _from_arrays_file(source: str, path: Path) -> Source:
    images: Any
    labels: Any = None
    with undamaged(source), open(path, "rb") as file:  # numpy forgets to close a damaged .npz that it opened itself
        start = file.read(6)
        file.seek(0)
        if not start:
            raise DataError(f"expected arrays in {source!r}, found an empty file", _COPY_HINT)
        if start[:2] != b"PK" and start != b"\x93NUMPY":
            raise DataError(f"expected arrays in {source!r}, found neither an .npz nor an .npy file", _SAVE_HINT)
        if start[:2] != b"PK":
            kind, images = "npy", np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(file, allow_pickle=False) as content:
                check_unpacked(content.zip, source)
                image_key = next((key for key in _IMAGE_KEYS if key in content), None)
                label_key = next((key for key in _LABEL_KEYS if key in content), None)
                if image_key is None:
                    found = f"expected images in {source!r}, found {', '.join(content) or 'nothing'}"
                    raise DataError(found, f"name one {', '.join(_IMAGE_KEYS[:-1])} or {_IMAGE_KEYS[-1]}")
                kind, images = "npz", content[image_key]
                labels = content[label_key] if label_key else None
    images = _channels_last(images, source)
    if labels is None:
        return _from_array(source, kind, images, None, ())
    if getattr(labels, "shape", None) == (len(images), 1):
        labels = labels[:, 0]
    if getattr(labels, "shape", None) != (len(images),) or labels.dtype.kind not in "iu":
        message = f"expected {len(images):,} whole numbers as labels in {source!r}, found {describe(labels)}"
        raise DataError(message, "for one-hot labels save labels.argmax(1)")
    labels = labels.tolist()
    return _from_array(source, kind, images, labels, _numbered_classes(labels, repr(source)))


def _channels_last(images: Any, source: str) -> NDArray[np.uint8]:
    """Images as [N, H, W] or [N, H, W, 3], whichever way round they were stored."""
    found = f"in {source!r}, found {describe(images)}"
    if not isinstance(images, np.ndarray):
        raise DataError(f"expected images {found}", _SAVE_HINT)
    if images.dtype != np.uint8:
        hint = "for values from 0 to 1 save (255 * x).round().astype('uint8')"
        raise DataError(f"expected uint8 images {found}", hint)
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"expected images [N, H, W], [N, H, W, C] or [N, C, H, W] {found}", "reshape the array")
    if images.ndim == 3:
        return images
    last, first = images.shape[3] in (1, 3), images.shape[1] in (1, 3)
    if last and first:
        raise DataError(f"cannot tell which axis holds the colours {found}", "save larger images, as [N, H, W, C]")
    if not last and not first:
        raise DataError(f"expected an axis of 1 or 3 colours {found}", "save [N, H, W, 3]")
    images = images if last else np.moveaxis(images, 1, -1)
    return images[..., 0] if images.shape[-1] == 1 else images


def check_unpacked(archive: zipfile.ZipFile, source: str) -> None:
    """Refuse an archive of arrays that does not fit into memory.

    Raises:
        DataError: its members add up to more than `memory_limit`.
    """
    size = sum(info.file_size for info in archive.infolist())
    if size > memory_limit():
        raise DataError(f"{source!r} unpacks to {size / 2**30:.1f} GiB", "split it")


def describe(value: Any) -> str:
    """What an entry of an .npz is, in a few words; None is one that is not there."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "none" if value is None else "bytes that are no array"


@contextlib.contextmanager
def undamaged(source: str) -> Iterator[None]:
    """Turn what goes wrong inside into a DataError about `source`.

    zipfile and numpy answer bad bytes with a dozen kinds of exception; only calls to them belong inside.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if "pickle" in str(error).lower() or "Python objects" in str(error):  # numpy takes unknown bytes for a pickle
            message = f"expected plain arrays in {source!r}, found pickled objects or none at all"
            raise DataError(message, _SAVE_HINT) from error
        reason = str(error) or type(error).__name__
        if reason[1:2].islower():  # a sentence, not EOF
            reason = reason[0].lower() + reason[1:]
        message = f"{source!r} is damaged or cut off: {reason}"
        raise DataError(message, _COPY_HINT) from error
