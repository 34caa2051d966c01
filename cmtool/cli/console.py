"""What a command says: results on stdout, everything else on stderr.

Results are plain lines or one JSON object, never wrapped and never coloured when piped. Notes, progress and errors go
to stderr; `--quiet` silences the first two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress (not results, not errors)."""
    global _quiet
    _quiet = quiet


def emit_json(value: Mapping[str, Any]) -> None:
    """Print one object as the result of a command."""
    print(json.dumps(value, indent=2, allow_nan=False))


def emit_line(text: object) -> None:
    """Print one line of result, exactly as it is."""
    print(text)


def emit_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print aligned `name  value` lines: for people, yet one record a line for grep."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        out.print(Text.assemble((f"{name:<{width}}", "bold"), "  ", _fold(value)), soft_wrap=True)


def note(text: str) -> None:
    """Tell the user something that is no result."""
    if not _quiet:
        err.print(Text(_fold(text)), soft_wrap=True)


def error(message: str, hint: str) -> None:
    """The two lines every error ends in."""
    err.print(Text.assemble(("error:", "bold red"), " ", _fold(message)), soft_wrap=True)
    err.print(Text.assemble(("hint:", "bold"), " ", _fold(hint)), soft_wrap=True)


def _fold(text: str) -> str:
    """One printable line: no line breaks, no control characters that could steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


class Update(Protocol):
    """Called with how much is done so far and a word about it."""

    def __call__(self, done: float, text: str = "") -> None:
        """Show it, if it is time to."""


@contextmanager
def progress(title: str, total: float, *, every: float = 10.0) -> Iterator[Update]:
    """Show how far something has come: a live bar on a terminal, else a plain line every `every` seconds.

    The last call before the end is always shown as a line when stderr is no terminal and any line was shown before.
    """
    if _quiet:
        yield lambda done, text="": None
    elif err.is_terminal and not err.is_dumb_terminal:
        with _live(title, total) as update:
            yield update
    else:
        with _lines(title, total, every) as update:
            yield update


@contextmanager
def _live(title: str, total: float) -> Iterator[Update]:
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
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(title, total=total, text="")
        yield lambda done, text="": bar.update(task, completed=done, text=_fold(text))


@contextmanager
def _lines(title: str, total: float, every: float) -> Iterator[Update]:
    start = shown = time.monotonic()
    last = line = ""

    def update(done: float, text: str = "") -> None:
        nonlocal shown, last, line
        now = time.monotonic()
        left = (now - start) * (total - done) / done if done else 0.0
        line = f"{title} {done:g}/{total:g}" + (f", {clock(left)} left" if done < total else "")
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
