"""Data sets that stay where they are: images are read and decoded when a batch asks for them.

The memory that takes does not grow with the data. Batches that are known ahead are made ready by worker processes
(torch's DataLoader), or by a thread of this one, while the last one is computed with.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cmtool.errors import DataError
from cmtool.io.ahead import ahead
from cmtool.io.fitting import Plan
from cmtool.io.images import UnreadableImageError
from cmtool.io.sources import Source

PATIENCE = 60.0  # seconds until a batch that does not come is an error
_AHEAD = 2  # batches in the making, a worker


class Failure(NamedTuple):
    """A batch that could not be made, and why: an exception would lose its words between processes."""

    message: str
    hint: str


class Reader(TorchDataset[Any]):
    """Batches out of a source.

    Args:
        chosen: which of its images are used; None is all.
        labels: of those used, int32 [N]: there may be very many.
    """

    def __init__(self, source: Source, plan: Plan, chosen: NDArray[np.int64] | None, labels: Tensor | None) -> None:
        self.source, self.plan, self.chosen, self.labels = source, plan, chosen, labels

    def read(self, number: int) -> NDArray[np.uint8]:
        """Image `number` of those used; uint8 [C, H, H].

        Raises:
            UnreadableImageError: if it cannot be read, or is not what was promised.
        """
        number = number if self.chosen is None else int(self.chosen[number])
        name = self.source.names[number]
        image = self.plan.decoded(self.source.open(number), name)
        misfit = self.plan.misfit(image.size)
        if misfit:
            raise UnreadableImageError(name, f"{misfit}: {image.width}x{image.height}")
        return self.plan.fitted(image)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor | None] | Failure:
        side = self.plan.resolution
        pixels = np.empty((len(indices), self.plan.channels, side, side), np.uint8)
        try:
            for place, number in enumerate(indices.tolist()):
                pixels[place] = self.read(number)
        except UnreadableImageError as error:
            return Failure(f"{error.name} cannot be used any more: {error.reason}", error.hint or "mend or replace it")
        return torch.from_numpy(pixels), None if self.labels is None else self.labels[indices].long()


@dataclass(frozen=True, eq=False)
class StoredDataset:
    """Images on disk, with what `cmtool.io.data.Dataset` says of its own.

    labels: int64 [N] or None; class_names: one name a label, empty without labels; workers: processes that decode, 0
    for a thread of this one.
    """

    reader: Reader
    class_names: tuple[str, ...]
    report: Any
    fingerprint: str
    workers: int = 0
    seeds: None = None

    def __len__(self) -> int:
        chosen = self.reader.chosen
        return len(self.reader.source.names) if chosen is None else len(chosen)

    @property
    def labels(self) -> Tensor | None:
        return None if self.reader.labels is None else self.reader.labels.long()

    @property
    def highest_label(self) -> int | None:
        """None without labels."""
        return None if self.reader.labels is None else int(self.reader.labels.max())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images at `indices` (int64 [B]), uint8 [B, C, H, H], and their labels, int64 [B] or None.

        Raises:
            DataError: if one cannot be read.
        """
        return _good(self.reader[indices])

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same for one batch after another, each made ready before it is asked for.

        Raises:
            DataError: if an image cannot be read, or a batch does not come within `PATIENCE` seconds.
        """
        if self.workers:
            return self._by_processes(batches)
        made = (self.batch(indices) for indices in batches)
        return ahead(made, _AHEAD, patience=PATIENCE, silent=self._stuck)

    def _by_processes(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        loader: Any = DataLoader(
            self.reader,
            batch_size=None,
            sampler=batches,  # every "sample" is the list of a batch
            num_workers=self.workers,
            prefetch_factor=_AHEAD,
            timeout=PATIENCE,
            multiprocessing_context="fork",
            worker_init_fn=_hush,
        )
        try:
            for made in loader:
                yield _good(made)
        except (ConnectionError, EOFError) as error:  # what it had made went with it
            with suppress(RuntimeError):
                time.sleep(1)  # torch's own word on it comes with a signal, and would else come in the middle of others
            raise _dead("what it had made is lost") from error
        except RuntimeError as error:
            if "timed out" in str(error):
                raise self._stuck() from error
            if "exited unexpectedly" in str(error) or "killed by signal" in str(error):
                raise _dead(str(error).splitlines()[0]) from error
            raise

    def _stuck(self) -> DataError:
        return DataError(
            f"no image has come out of {self.reader.source.name!r} for {PATIENCE:.0f} seconds",
            "look at the disk or the network it lies on",
        )

    @property
    def pictures(self) -> Tensor:
        """All of them, as uint8."""
        return self.batch(torch.arange(len(self)))[0]


def _dead(reason: str) -> DataError:
    return DataError(
        f"a process that decodes images has died: {reason}",
        "it may have run out of memory, or of room in /dev/shm: try fewer --workers, or 0",
    )


def default_workers() -> int:
    """Processes that decode: some of the cores, where there are more than two and processes can be forked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(0, cores // 2 - 1)) if "fork" in multiprocessing.get_all_start_methods() else 0


def fingerprint(source: Source, plan: Plan, chosen: NDArray[np.int64] | None, labels: Tensor | None) -> str:
    """16 hexadecimal digits that change with the data as far as it is known without reading it."""
    known = source.fingerprint or "\n".join(source.names)
    digest = hashlib.sha256(f"{known} {plan}".encode())
    if chosen is not None:
        digest.update(chosen.tobytes())
    if labels is not None:
        digest.update(labels.long().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _good(made: tuple[Tensor, Tensor | None] | Failure) -> tuple[Tensor, Tensor | None]:
    if isinstance(made, Failure):
        raise DataError(made.message, made.hint)
    images, labels = made
    return images, labels


def _hush(worker: int) -> None:
    """A process that decodes says nothing: what is wrong with an image is told by the first one."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
