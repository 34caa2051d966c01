"""What cmtool raises when the user, not the program, has to act.

    UserError                 two lines on stderr: `error:` and `hint:`; exit code 1
    ├── UsageError            the command line itself is wrong; exit code 2
    ├── DataError             images, masks or labels that cannot be used
    ├── CheckpointError       a model file or run folder that cannot be read
    ├── ConfigError           a preset, option or `--set` that does not fit
    ├── DependencyError       an optional package or weights file is missing
    ├── ProcessError          another process of the same command has ended, or never came
    └── TrainingError         a run that had to stop
        └── DivergenceError   a loss, gradient or weight is no longer finite

Everything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can mend.

    Args:
        message: what was expected, what was found, and where. One sentence, no full stop needed.
        hint: one thing to try.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_code = 2


class DataError(UserError):
    """Images, masks or labels that cannot be used."""


class CheckpointError(UserError):
    """A model file or run folder that cannot be read."""


class ConfigError(UserError):
    """A preset, an option or a `--set` that does not fit."""

    exit_code = 2


class DependencyError(UserError):
    """An optional package or weights file is missing."""


class ProcessError(UserError):
    """Another process of the same command has ended, or never came."""


class TrainingError(UserError):
    """A run that had to stop."""


class DivergenceError(TrainingError):
    """A loss, a gradient or a weight is no longer finite."""


def nearest(name: str, known: Iterable[str], prefix: str = "did you mean ") -> str:
    """A "did you mean" phrase for an unknown name, or the list of known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return prefix + ", ".join(close) + "?"
    return "known names: " + ", ".join(known)
