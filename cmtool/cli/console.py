"""What a command says: results on stdout, everything else on stderr.

Results are plain lines or one JSON object, never wrapped and never coloured when piped. Notes, progress and errors go
to stderr; `--quiet` silences the first two. rich is loaded where there is a terminal to paint on, and only then.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TextIO

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress (not results, not errors)."""
    global _quiet
    _quiet = quiet


def emit_json(value: Mapping[str, Any]) -> None:
    """Print one object as the result of a command."""
    print(json.dumps(value, indent=2, allow_nan=False))


def finite(value: float | None) -> float | None:
    """A number for `emit_json`; JSON has no word for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def emit_line(text: object, *, at_once: bool = False) -> None:
    """Print one line of result, exactly as it is; `at_once` where somebody waits for it."""
    print(text, flush=at_once)


def emit_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned `name  value  ...` lines: for people, yet one record a line for grep."""
    widths = [*(max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]), 0]
    for row in rows:
        name, *rest = (f"{_fold(text):<{width}}" for text, width in zip(row, widths, strict=True))
        _paint(sys.stdout, (name, "bold"), "  ", "  ".join(rest).rstrip())


def note(text: str) -> None:
    """Tell the user something that is no result."""
    if not _quiet:
        _paint(sys.stderr, _fold(text))


def error(message: str, hint: str) -> None:
    """The two lines every error ends in."""
    _paint(sys.stderr, ("error:", "bold red"), " ", _fold(message))
    _paint(sys.stderr, ("hint:", "bold"), " ", _fold(hint))


def _paint(stream: TextIO, *parts: str | tuple[str, str]) -> None:
    """Print one line of text and (text, style) parts; never wrapped, styled on a terminal."""
    if stream.isatty() or "FORCE_COLOR" in os.environ:
        from rich.console import Console
        from rich.text import Text

        Console(file=stream, highlight=False).print(Text.assemble(*parts), soft_wrap=True)
    else:
        print("".join(part if isinstance(part, str) else part[0] for part in parts), file=stream)


def _fold(text: str) -> str:
    """One printable line: no line breaks, no control characters that could steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


class Update(Protocol):
    """Called with how much is done so far and a word about it."""

    def __call__(self, done: int, text: str = "") -> None:
        """Show it, if it is time to."""


@contextmanager
def progress(title: str, total: int, *, done: int = 0, every: float = 10.0) -> Iterator[Update]:
    """Show how far something has come: a live bar on a terminal, else a plain line every `every` seconds.

    A total of 0 is one that nobody knows.

    The last call before the end is always shown as a line when stderr is no terminal and any line was shown before.
    """
    if _quiet:
        yield lambda done, text="": None
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with _live(title, total, done) as update:
            yield update
    else:
        with _lines(title, total, done, every) as update:
            yield update


@contextmanager
def _live(title: str, total: int, first: int) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    # rich would take stdout's lines above the bar, on stderr: right on a terminal, a loss in a pipe.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(title, total=total or None, completed=first, text="")
        yield lambda done, text="": bar.update(task, completed=done, text=_fold(text))


@contextmanager
def _lines(title: str, total: int, first: int, every: float) -> Iterator[Update]:
    start = shown = time.monotonic()
    last = line = ""

    def update(done: int, text: str = "") -> None:
        nonlocal shown, last, line
        now = time.monotonic()
        line = f"{title} {done:,}" + (f"/{total:,}" if total else "")
        line += f", {clock((now - start) * (total - done) / (done - first))} left" if first < done < total else ""
        line += f", {text}" if text else ""
        if now - shown >= every:
            shown, last = now, line
            note(line)

    yield update
    if last and line != last:
        note(line)


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes as `1,055 MiB` or `2.6 MiB`."""
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.2g} MiB"


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something has come whose size is known with the first call."""
    with ExitStack() as stack:
        shown: list[Update] = []

        def update(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(progress(title, total)))
            shown[0](done)

        yield update


@contextmanager
def fetching(source: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show how far a download has come, from the first call on: a source that is here already needs no bar."""
    with counting(f"fetch {source} (MB)") as update:
        yield lambda done, total: update(_megabytes(done), _megabytes(total or 0))


def _megabytes(count: int) -> int:
    return -(-count // 10**6)
