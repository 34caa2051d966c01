"""Things that are made in a thread before they are asked for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
_GLANCE = 1.0  # seconds at most from one look at the clock to the next


class _Last(NamedTuple):
    """What comes when there is nothing more: the reason, if it is one."""

    error: BaseException | None


def ahead(
    items: Iterable[T],
    count: int,
    *,
    patience: float,
    silent: Callable[[], Exception],
    alive: Callable[[], float] = lambda: 0.0,
) -> Iterator[T]:
    """The items, `count` of them made before they are asked for.

    Args:
        items: iterated over in a thread. One that hangs there does not keep the program from ending.
        count: items that are ready or in the making, at least 1.
        patience: seconds without a sign of life until that is an error.
        silent: makes that error.
        alive: when there was one last, by `time.monotonic`, of items that take their time; an item is one, too.
    Raises:
        Exception: what the items raise, in their place.
    """
    made: queue.SimpleQueue[T | _Last] = queue.SimpleQueue()
    room, gone = threading.Semaphore(count), threading.Event()

    def make() -> None:
        source = iter(items)
        try:
            while room.acquire() and not gone.is_set():
                made.put(next(source))
        except StopIteration:
            made.put(_Last(None))
        except BaseException as error:  # whatever it is belongs to whoever waits
            made.put(_Last(error))
        finally:
            if close := getattr(source, "close", None):
                close()

    threading.Thread(target=make, name="ahead", daemon=True).start()
    try:
        while not isinstance(item := _waited_for(made, patience, silent, alive), _Last):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        gone.set()
        room.release()


def _waited_for(
    made: queue.SimpleQueue[T | _Last], patience: float, silent: Callable[[], Exception], alive: Callable[[], float]
) -> T | _Last:
    since = time.monotonic()
    while True:
        try:
            return made.get(timeout=min(patience, _GLANCE))
        except queue.Empty:
            if time.monotonic() - max(since, alive()) >= patience:
                raise silent() from None
