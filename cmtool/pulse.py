"""Whether the other processes of a command are still there, also where a network fails without a word.

A process that ends closes its connections, which the others notice at once. One whose machine or cable has gone says
nothing, and whoever waits for it would wait as long as for a slow one. So each shows every few seconds, by a thread of
its own, that it is alive: a number that grows, in the store where the processes met.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

from cmtool.errors import ProcessError, UsageError

_SECONDS = 180.0  # longer than Python is kept from other threads by anything but a stopped machine
_BEATS = 12  # signs of life in that time


class Board(Protocol):
    """Where signs of life are left: torch's store."""

    def set(self, key: str, value: str) -> None:
        """Leave a value."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of these keys, which are there."""


def patience() -> float:
    """Seconds without a sign of life until a process counts as gone: $CMTOOL_PATIENCE, or 180.

    Raises:
        UsageError: for what is no number above 0.
    """
    text = os.environ.get("CMTOOL_PATIENCE", "").strip() or str(_SECONDS)
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise UsageError(f"CMTOOL_PATIENCE is {text!r}: expected a number of seconds", "leave it unset for 180")


def board(seconds: float) -> Board:
    """A connection of one's own to the store: on the one that all share, a sign of life would wait for other questions.

    Args:
        seconds: until a question counts as unanswered.
    Raises:
        RuntimeError: if it cannot be reached.
    """
    import torch.distributed as dist

    found: Board = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )
    return found


class Pulse:
    """The signs of life of one process, and its watch over others.

    The first process watches all, and all watch the first: where it goes, so does the command.

    Args:
        board: where the signs are left.
        rank, count: this process, and how many there are.
        seconds: without a sign of another process until it counts as gone.
        silent: called once, in a thread, with the error to report; what the main thread waits for may never come.
    """

    def __init__(
        self, board: Board, rank: int, count: int, seconds: float, silent: Callable[[ProcessError], None]
    ) -> None:
        self._board, self._rank, self._count, self._seconds, self._silent = board, rank, count, seconds, silent
        self._watched = range(1, count) if rank == 0 else range(1)
        self._every = seconds / _BEATS
        self._over = threading.Event()
        self._heard: dict[int, float] = {}
        self._threads = [threading.Thread(target=job, daemon=True) for job in (self._beat, self._watch)]
        self._show(0)

    def start(self) -> None:
        """Watch from now on; the others have made their `Pulse`s."""
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more of it: the processes part."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _show(self, beat: int) -> None:
        self._board.set(_key(self._rank), str(beat))

    def _beat(self) -> None:
        """Show this process's sign and look for others'; a store out of reach may hold this thread for long."""
        beat, known = 0, [b""] * len(self._watched)
        while not self._over.wait(self._every):
            beat += 1
            with suppress(RuntimeError):
                self._show(beat)
                found = self._board.multi_get([_key(rank) for rank in self._watched])
                now = time.monotonic()
                self._heard.update(
                    (rank, now) for rank, new, old in zip(self._watched, found, known, strict=True) if new != old
                )
                known = found

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._every):
            now = time.monotonic()
            if now - last > 3 * self._every:  # this process itself was held up, perhaps the others with it
                self._heard = dict.fromkeys(self._watched, now)
            last = now
            gone = [rank for rank, heard in list(self._heard.items()) if now - heard > self._seconds]
            if gone:
                self._over.set()
                self._silent(ProcessError(_names(gone, self._count, self._seconds), _HINT))


_HINT = "its machine or the network between may be down"


def _key(rank: int) -> str:
    return f"pulse/{rank}"


def _names(gone: Sequence[int], count: int, seconds: float) -> str:
    who = f"process {gone[0]}" if len(gone) == 1 else f"{len(gone)} processes (the first is {gone[0]})"
    verb = "has" if len(gone) == 1 else "have"
    return f"{who} of {count} {verb} given no sign of life for {seconds:g} s"
