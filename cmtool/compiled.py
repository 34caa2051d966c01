"""C++ beside a module, compiled once by the machine's own compiler and kept in cmtool's cache.

A library's name there changes with the source, the compiler, its flags and the processor. Without a compiler (`c++`, or
what $CXX names), or with CMTOOL_NATIVE=0, there is none, and whoever asks for one computes the same by other means.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
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
    with suppress(OSError, RuntimeError, subprocess.SubprocessError):
        return ctypes.CDLL(str(made(source)))
    return None


def made(source: Path) -> Path:
    """The library's file, made if it is not there yet."""
    compiler = os.environ.get("CXX") or "c++"
    told = "\0".join((compiler, *_FLAGS, platform.machine(), _processor()))
    name = f"{source.stem}-{hashlib.sha256(source.read_bytes() + told.encode()).hexdigest()[:16]}.so"
    file = cache.folder("native") / name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes first puts the whole file in its place; two at once make the same one.
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            new = Path(scratch) / name
            command = [*compiler.split(), *_FLAGS, "-o", str(new), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
            new.replace(file)
    return file


def _processor() -> str:
    """What `-march=native` depends on: folders are shared by machines that are not alike."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
