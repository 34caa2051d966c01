"""C++ beside a module, compiled once by the machine's own compiler and kept in cmtool's cache.

A library's name there changes with the source, the compiler, its flags and the processor, and with torch where the
source includes its headers. Without a compiler (`c++`, or what $CXX names), or with CMTOOL_NATIVE=0, there is none, and
whoever asks for one computes the same by other means.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cmtool import cache

_FLAGS = ("-O2", "-march=native", "-fopenmp", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SECONDS = 120  # a compiler that has not come back by then does not


def enabled(name: str) -> bool:
    """Whether the environment variable, on where it is not set, leaves something on."""
    return os.environ.get(name, "1").strip().lower() not in ("0", "false", "no", "off")


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a source file; None where there is none to be had."""
    if not enabled("CMTOOL_NATIVE"):
        return None
    with suppress(*_FAILURES):
        return ctypes.CDLL(str(made(source)))
    return None


_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)


def problem(source: Path) -> str:
    """Why `library` has none, in a few words; empty where it has one."""
    if not enabled("CMTOOL_NATIVE"):
        return "CMTOOL_NATIVE turns it off"
    try:
        ctypes.CDLL(str(made(source)))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").splitlines()
        return "the compiler fails: " + next((line for line in said if "error" in line), "".join(said[:1]))
    except OSError as error:
        if error.filename == _compiler()[0]:
            return f"there is no compiler {error.filename!r}"
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    except _FAILURES as error:
        return str(error)
    return ""


def made(source: Path) -> Path:
    """The library's file, made if it is not there yet."""
    file, command = _plan(source)
    if not file.exists():
        _making(file, command).result()
    return file


def begin() -> None:
    """Start to make all of the package's libraries that are not there yet: two cores make two at once."""
    if not enabled("CMTOOL_NATIVE"):
        return
    with suppress(OSError):  # a cache nobody may look into: whoever asks for a library is told that there is none
        for source in sorted(Path(__file__).parent.rglob("*.cpp")):
            file, command = _plan(source)
            if not file.exists():
                _making(file, command)


_made: dict[Path, Future[None]] = {}


def _making(file: Path, command: list[str]) -> Future[None]:
    """The making of a file, begun by whoever asks first."""
    if file not in _made or _made[file].done():
        _made[file] = _compilers().submit(_make, file, command)
    return _made[file]


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _make(file: Path, command: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whoever comes first puts the whole file in its place; two at once make the same one.
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        new = Path(scratch) / file.name
        subprocess.run(
            [*command, "-o", str(new)], check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
        new.replace(file)


def _plan(source: Path) -> tuple[Path, list[str]]:
    """Where a source's library lies, and the command that makes it, but for `-o`."""
    text = source.read_bytes()
    told = [" ".join(_compiler()), *_FLAGS, platform.machine(), _processor()]
    command = [*_compiler(), *_FLAGS, str(source)]
    if b"#include <c10/" in text:
        import torch

        home = Path(torch.__file__).parent
        told += [torch.__version__, str(home)]
        command += ["-std=c++20", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
    name = f"{source.stem}-{hashlib.sha256(text + chr(0).join(told).encode()).hexdigest()[:16]}.so"
    return cache.folder("native") / name, command


def _compiler() -> list[str]:
    """The compiler and what it is always told."""
    return os.environ.get("CXX", "").split() or ["c++"]


def _processor() -> str:
    """What `-march=native` depends on: folders are shared by machines that are not alike."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
