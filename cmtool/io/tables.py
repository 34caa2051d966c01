"""Images in the tables of Hugging Face `datasets`: parquet and arrow files, saved data sets, the hub.

The library makes arrow files of what is none (in its own cache folder) and maps them from the disk, so that any row can
be read and none is held in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cmtool.errors import DataError, DependencyError
from cmtool.io import hub_tables
from cmtool.io.images import UnreadableImageError, open_image

HUB = hub_tables.MARK
FILES = (".parquet", ".arrow")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_IMAGES, _LABELS = ("image", "img", "images", "jpg", "png", "webp"), ("label", "labels", "cls", "class", "fine_label")


def is_table(path: Path) -> bool:
    """Whether a file or folder holds such tables, by its names."""
    if path.is_dir():
        return any((path / name).is_file() for name in _SAVED) or bool(_files(path))
    return path.suffix.lower() in FILES


def _files(folder: Path) -> list[str]:
    return sorted(str(file) for ending in FILES for file in folder.glob(f"*{ending}"))


class Table:
    """The images of a table.

    Raises:
        DataError: if it cannot be read or has no column of images. DependencyError: without `datasets`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows = _opened(name)
        features = self._rows.features
        self._column = _image_column(features, name)
        label = next((column for column in _LABELS if _is_label(features.get(column))), None)
        self.labels = None if label is None else np.asarray(self._rows.with_format("numpy")[label][:], np.int64)
        self.class_names = tuple(getattr(features[label], "names", None) or ()) if label else ()
        if self.labels is not None:
            _check_labels(self.labels.min(initial=0), self.labels.max(initial=0), self.class_names, name)
        self._rows = self._rows.select_columns([self._column]).with_format("arrow")
        self.ignored = 0

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, number: int) -> Image.Image:
        """An image with its header read.

        Raises:
            UnreadableImageError: if it is none.
        """
        cell = self._rows[number][self._column][0].as_py()
        if isinstance(cell, dict):
            cell = cell.get("bytes") or _from_file(cell.get("path"), self.row(number))
        return open_image(cell or b"", self.row(number))

    def row(self, number: int) -> str:
        """What to call an image in messages."""
        return f"row {number:,} of {self.name}"

    @property
    def names(self) -> Sequence[str]:
        """`row` of all of them, made when asked for."""
        return _Rows(self)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the number of rows and the size of each image."""
        import pyarrow.compute as pc

        column = self._rows.data.column(self._column)
        cells = pc.struct_field(column, "bytes") if column.type.num_fields else column
        sizes = np.asarray(pc.fill_null(pc.binary_length(cells), -1), np.int64)
        return hashlib.sha256(np.int64(len(self)).tobytes() + sizes.tobytes()).hexdigest()[:16]


class Row(NamedTuple):
    """A row of a `Stream`."""

    name: str
    encoded: bytes | None  # None for a cell with nothing in it
    label: int | None

    def open(self) -> Image.Image:
        """The image with its header read.

        Raises:
            UnreadableImageError: if it is none.
        """
        if self.encoded is None:
            raise UnreadableImageError(self.name, "an empty cell")
        return open_image(self.encoded, self.name)


class Stream:
    """The images of a table one after another, as they arrive, with nothing stored.

    Args:
        name: as of a `Table`.
    Raises:
        DataError: as `Table`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if not name.startswith(HUB) and not is_table(Path(name)):
            raise DataError(f"{name!r} is no table, and only tables are streamed", "leave out --stream")
        self._rows = _opened(name, stream=True)
        features = self._rows.features
        if features is None:  # the files do not say: the first row does
            self._rows = self._rows._resolve_features()
            features = self._rows.features
        self._column = _image_column(features, name)
        self._label = next((column for column in _LABELS if _is_label(features.get(column))), None)
        self.labelled = self._label is not None
        self.class_names = tuple(getattr(features[self._label], "names", None) or ()) if self._label else ()
        if type(features[self._column]).__name__ == "Image":
            self._rows = self._rows.cast_column(self._column, _undecoded())

    def __iter__(self) -> Iterator[Row]:
        return self._read(self._rows, self.name, 0)

    @property
    def shards(self) -> int:
        """The parts it lies in; each can be read by itself."""
        return int(self._rows.num_shards)

    def shard(self, number: int, first: int = 0) -> Iterator[Row]:
        """The rows of a part from its row `first` on."""
        if self.shards == 1:
            return self._read(self._rows.skip(first), self.name, first)
        rows = self._rows.shard(self.shards, number).skip(first)
        return self._read(rows, f"part {number + 1} of {self.name}", first)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what is known without reading it: names, columns, and counts where they are told."""
        about = self._rows.info
        known = (self.name, str(self._rows.features), str(about.splits), str(about.version), self.shards)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def _read(self, rows: Any, place: str, first: int) -> Iterator[Row]:
        try:
            for number, row in enumerate(rows, first):
                name = f"row {number:,} of {place}"
                cell = row[self._column]
                if isinstance(cell, dict):
                    cell = cell.get("bytes") or (_from_file(cell["path"], name) if _is_file(cell.get("path")) else None)
                label = None if self._label is None else int(row[self._label])
                if label is not None:
                    _check_labels(label, label, self.class_names, self.name)
                yield Row(name, cell, label)
        except (DataError, GeneratorExit):
            raise
        except Exception as error:
            raise _unreadable(self.name, error) from error


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)


def _is_file(path: str | None) -> bool:
    return bool(path) and os.path.isfile(path or "")


class _Rows(Sequence[str]):
    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: Any) -> Any:
        return self._table.row(number)


def _opened(name: str, *, stream: bool = False) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            f"{name!r} is read with the package datasets, which is not installed", "pip install 'cmtool[hf]'"
        ) from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, by us
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return _first_part(_read(datasets, name, stream), name)
    except DataError:
        raise
    except Exception as error:  # of many kinds: arrow's, fsspec's, the hub's
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    hint = "check the name, and the connection" if name.startswith(HUB) else "copy or download it again"
    return DataError(f"cannot read {name!r}: {reason[:200]}", hint)


def _read(datasets: Any, name: str, stream: bool) -> Any:
    if name.startswith(HUB):
        return hub_tables.load(datasets, name, stream=stream)
    path = Path(name)
    saved = path.is_dir() and any((path / file).is_file() for file in _SAVED)
    files = _files(path) if path.is_dir() else [name]
    if stream and not saved and all(file.lower().endswith(".parquet") for file in files):
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if stream:  # arrow files are mapped from the disk: there is nothing to spare
        return _first_part(_read(datasets, name, False), name).to_iterable_dataset()
    if saved:
        return datasets.load_from_disk(name)
    if all(file.lower().endswith(".arrow") for file in files):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    return datasets.load_dataset("parquet", data_files=files, split="train")


def _first_part(found: Any, name: str) -> Any:
    """A saved dictionary of splits: its train split."""
    if isinstance(found, dict):
        if "train" not in found:
            raise DataError(f"{name!r} has the splits {', '.join(found)} and none is train", f"name one: {name}/SPLIT")
        return found["train"]
    return found


def _image_column(features: Any, name: str) -> str:
    likely = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    likely += [column for column in _IMAGES if column in features and _holds_bytes(features[column])]
    if not likely:
        raise DataError(f"{name!r} has no column of images, only {', '.join(features)}", "call it image")
    return str(likely[0])


def _holds_bytes(kind: Any) -> bool:
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _check_labels(lowest: int, highest: int, class_names: Sequence[str], name: str) -> None:
    """Refuse labels that are no classes."""
    if lowest < 0:
        raise DataError(f"{name!r} has rows without a label (-1)", "name a split that has labels")
    if class_names and highest >= len(class_names):
        message = f"{name!r} has label {highest} and {len(class_names)} classes"
        raise DataError(message, "mend its labels, or the names of its classes")


def _is_label(kind: Any) -> bool:
    return type(kind).__name__ == "ClassLabel" or getattr(kind, "dtype", "") in (
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
    )


def _from_file(path: str | None, row: str) -> bytes:
    if not path or not os.path.isfile(path):
        raise UnreadableImageError(row, "an empty cell")
    with open(path, "rb") as file:
        return file.read()
