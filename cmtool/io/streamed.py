"""Data sets that are read as they arrive: tables on the hub or on disk, of which nothing is stored.

There is one way through such a table, and nobody knows beforehand how much it holds. So an image is asked for by its
position in the training, not by its number: the rows of one epoch follow those of the last. Each epoch takes the parts
of the table in an order of its own and mixes some thousand rows at a time, both from (seed, epoch) alone, so that any
number of processes sees the same order, and a run that is continued goes on where it stopped.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool import rng
from cmtool.errors import DataError
from cmtool.io.ahead import ahead
from cmtool.io.fitting import Plan, check_options
from cmtool.io.images import UnreadableImageError
from cmtool.io.tables import Row, Stream

T = TypeVar("T")
PATIENCE = 60.0  # seconds without a new row until that is an error
ROWS, BYTES = 8192, 2**28  # a block ends with either
_AHEAD = 2  # batches in the making
_THREADS = 4  # that decode


class Mark(NamedTuple):
    """Where a block of rows begins.

    position: of its first image; epoch; place: of the part in the epoch's order; row: in that part.
    """

    position: int = 0
    epoch: int = 0
    place: int = 0
    row: int = 0


class Block(NamedTuple):
    """Rows in the order in which they are used."""

    mark: Mark
    rows: list[Row]


@dataclass(frozen=True)
class StreamReport:
    """What is known of images that have not come yet; `cmtool.io.data.Report` has the meaning of the names."""

    source: str
    resolution: int
    channels: int
    crop: str
    resize: str
    classes: tuple[str, ...]
    pairs: None = None

    def summary(self) -> str:
        """One line for people."""
        colours = "RGB" if self.channels == 3 else "grey"
        classes = f"; {len(self.classes)} classes" if self.classes else ""
        return f"images as they arrive, {self.resolution}x{self.resolution} {colours}{classes}"


@dataclass(frozen=True, eq=False)
class Head:
    """Some images in memory; uint8 [N, C, H, H], labels int64 [N] or None."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those at `indices`."""
        return self.images[indices], None if self.labels is None else self.labels[indices]


@dataclass(eq=False)
class StreamedDataset:
    """Images as they arrive, by position.

    Args:
        table: what is read. plan: what each image becomes. seed: of the order.
    Attributes:
        dropped: how many rows could not be read, by reason; others of their block took their places.
        first_bad: the first of them.
    """

    table: Stream
    plan: Plan
    report: StreamReport
    fingerprint: str
    seed: int
    endless: bool = True
    seeds: None = None
    dropped: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    _start: Mark = field(default_factory=Mark)
    _marks: deque[Mark] = field(default_factory=deque)
    _alive: float = 0.0  # when something came last

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.report.classes

    def head(self, count: int) -> Head:
        """Its first `count` images, in memory; fewer where a block is smaller."""
        block = next(self._ahead(self._blocks(Mark()), 1))
        places = range(min(count, len(block.rows)))
        with ThreadPoolExecutor(_THREADS, "decoder") as pool:
            return Head(*self._stacked(list(pool.map(self._made, [block] * len(places), places))))

    @property
    def highest_label(self) -> int | None:
        """None without labels."""
        return len(self.class_names) - 1 if self.class_names else None

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images at rising positions (int64 [B]), uint8 [B, C, H, H], and their labels, int64 [B] or None.

        It reads the table up to there, from its beginning or from where the run was continued.

        Raises:
            DataError: if that cannot be read.
        """
        start = self._start if len(positions) and int(positions[0]) >= self._start.position else Mark()
        return next(self._batches([positions], start))

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same for one batch after another, each made ready before it is asked for.

        Raises:
            DataError: if the table cannot be read, or no row of it comes within `PATIENCE` seconds.
        """
        self._marks.clear()
        return self._ahead(self._batches(batches, self._start, self._marks), _AHEAD)

    def state_dict(self, position: int) -> dict[str, list[int]]:
        """What `load_state_dict` needs to go on with this position."""
        while len(self._marks) > 1 and self._marks[1].position <= position:
            self._marks.popleft()
        known = [mark for mark in list(self._marks)[:1] if mark.position <= position]
        return {"mark": list(known[0] if known else self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin at the block that held a position."""
        self._start = Mark(*state["mark"])

    # --- from rows to batches -----------------------------------------------------------------------------------------

    def _batches(
        self, batches: Iterable[Tensor], start: Mark, marks: deque[Mark] | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        blocks = self._ahead(self._blocks(start), 1)
        block = Block(start, [])
        with ThreadPoolExecutor(_THREADS, "decoder") as pool:
            for positions in batches:
                made: list[tuple[NDArray[np.uint8], int | None]] = []
                # A batch that two blocks share: what is left of the first is decoded before the second is waited for.
                here: list[int] = []
                for position in positions.tolist():
                    while position >= block.mark.position + len(block.rows):
                        made += pool.map(self._made, [block] * len(here), here)
                        here, block = [], next(blocks)
                        if marks is not None:
                            marks.append(block.mark)
                    here.append(position - block.mark.position)
                made += pool.map(self._made, [block] * len(here), here)
                yield self._stacked(made)

    def _stacked(self, made: list[tuple[NDArray[np.uint8], int | None]]) -> tuple[Tensor, Tensor | None]:
        pixels = np.empty((len(made), self.plan.channels, *[self.plan.resolution] * 2), np.uint8)
        for place, (image, _) in enumerate(made):
            pixels[place] = image
        labels = torch.tensor([label for _, label in made], dtype=torch.int64) if self.class_names else None
        return torch.from_numpy(pixels), labels

    def _made(self, block: Block, number: int) -> tuple[NDArray[np.uint8], int | None]:
        """A row's image and label; of one that cannot be read, the next that can."""
        for row in chain(block.rows[number:], block.rows[:number]):
            try:
                image = self.plan.decoded(row.open(), row.name)
            except UnreadableImageError as error:
                if row is block.rows[number]:
                    self.dropped[error.reason] += 1
                    self.first_bad = self.first_bad or f"{error.name}: {error.reason}"
                continue
            misfit = self.plan.misfit(image.size)
            if misfit:
                raise _misfit(row.name, image.size, misfit, self.plan)
            if row.label is not None and self.class_names and row.label >= len(self.class_names):
                raise DataError(
                    f"{row.name} has the label {row.label}, and there are {len(self.class_names)} classes",
                    "mend the table",
                )
            self._alive = time.monotonic()
            return self.plan.fitted(image), row.label
        raise DataError(f"no image of {self.report.source!r} can be read: {self.first_bad}", "is it the right column?")

    # --- from the table to rows ---------------------------------------------------------------------------------------

    def _blocks(self, start: Mark) -> Iterator[Block]:
        """Without end."""
        position, epoch, first, row = start
        while True:
            seen = position
            order = np.random.default_rng(rng.derive(self.seed, 3, epoch)).permutation(self.table.shards)
            mark, rows, size = Mark(position, epoch, first, row), [], 0
            for place in range(first, len(order)):
                for number, one in enumerate(self.table.shard(int(order[place]), row), row):
                    self._alive = time.monotonic()
                    rows.append(one)
                    size += len(one.encoded or b"")
                    if len(rows) == ROWS or size >= BYTES:
                        yield self._mixed(mark, rows)
                        position += len(rows)
                        mark, rows, size = Mark(position, epoch, place, number + 1), [], 0
                row = 0
            if rows:
                yield self._mixed(mark, rows)
                position += len(rows)
            if position == seen and not (first or start.row):
                raise DataError(f"{self.report.source!r} holds no rows", "name a split that does")
            epoch, first, row = epoch + 1, 0, 0

    def _mixed(self, mark: Mark, rows: list[Row]) -> Block:
        order = np.random.default_rng(rng.derive(self.seed, 4, mark.epoch, mark.place, mark.row)).permutation(len(rows))
        return Block(mark, [rows[k] for k in order])

    def _ahead(self, items: Iterator[T], count: int) -> Iterator[T]:
        """The items, `count` of them made before they are asked for, however long that takes while rows come."""
        return ahead(items, count, patience=PATIENCE, silent=self._stuck, alive=lambda: self._alive)

    def _stuck(self) -> DataError:
        return DataError(
            f"no row has come from {self.report.source!r} for {PATIENCE:.0f} seconds",
            "look at the connection",
        )


def open_stream(
    source: str,
    *,
    resolution: int | None = None,
    crop: str = "center",
    resize: str = "box",
    upscale: bool = False,
    channels: int | None = None,
    seed: int = 0,
) -> StreamedDataset:
    """A table as a data set; the arguments are those of `cmtool.io.data.open_data`, and the seed of the order.

    Raises:
        UsageError: an option that is none.
        DataError: no table, one without a readable image, or one with labels whose number nobody tells.
    """
    check_options(resolution, crop, resize, channels)
    channels = channels or 3
    table = Stream(source)
    if table.labelled and not table.class_names:
        raise DataError(
            f"{source!r} numbers its classes without saying how many there are",
            "pack it first: cmtool data pack --stream",
        )
    plan = Plan(resolution or _first_side(table), crop, resize, upscale, channels, resolution is None)
    _check_first(table, plan)
    report = StreamReport(source, plan.resolution, channels, crop, resize, table.class_names)
    return StreamedDataset(table, plan, report, table.fingerprint, seed)


def _first_side(table: Stream) -> int:
    """The shorter side of the first readable image."""
    reason = "it holds no rows"
    for row in table:
        try:
            return min(row.open().size)
        except UnreadableImageError as error:
            reason = f"{error.name}: {error.reason}"
    raise DataError(f"no image in {table.name!r} can be read, {reason}", "is it the right table?")


def _check_first(table: Stream, plan: Plan) -> None:
    """Refuse at once what the first row tells already."""
    with suppress(UnreadableImageError):
        for row in islice(table, 1):
            size = row.open().size
            misfit = plan.misfit(size)
            if misfit:
                raise _misfit(row.name, size, misfit, plan)


def _misfit(name: str, size: tuple[int, int], reason: str, plan: Plan) -> DataError:
    """What is done about images that do not fit can only be said when one comes."""
    wanted = f"{plan.resolution}x{plan.resolution}"
    hint = {
        "too small": f"use --resolution {min(size)} or less" + ("" if plan.resize == "none" else ", or --upscale"),
        "not square": "cut out the middle with --crop center",
    }.get(reason, f"--resolution {min(size)} crops and resizes all images to one size")
    return DataError(f"{name} is {reason} for {wanted}: {size[0]}x{size[1]}", hint)
