"""Files that are complete or absent: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` with an open binary file that becomes `target` only if all went well.

    The temporary file lies beside the target, so that the rename is atomic; it is removed on any error.

    Raises:
        OSError: if the folder cannot be written to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            told = _Telling(file)
            try:
                write(told)  # type: ignore[arg-type]
            except Exception as error:
                raise told.error or error from error
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, target)
        settle(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Telling:
    """A file that remembers why it could not be written: torch's writer makes an error without a reason of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def settle(folder: Path) -> None:
    """Let the new names in a folder survive a loss of power; where folders cannot be opened, nothing."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def settle_all(folder: Path) -> None:
    """Let all files in a folder, and it, survive a loss of power."""
    for file in folder.iterdir():
        settle(file)
    settle(folder)


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder and below it. None may be writing there."""
    for left in folder.rglob(".*.part"):
        remove(left)


def remove(entry: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


class Locked(Exception):
    """Somebody else holds the lock."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock as long as the block lasts; the system lets go of it when the process ends, however it ends.

    Where the system or the file system has no such locks, there is none.

    Raises:
        Locked: if another holds it.
        OSError: if the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Locked from error
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


_held: set[int] = set()


def _let_go() -> None:
    """A forked process has the locks of its parent, and could hold them for longer than that one lives."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
