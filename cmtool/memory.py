"""Memory of tensors on a CPU: kept, when one is freed, for the next one."""

from __future__ import annotations

import ctypes
import functools
import os
from contextlib import suppress
from pathlib import Path

from cmtool import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
_LARGE = 2**31 - 1


@functools.cache
def keep() -> str:
    """Keep freed memory for the next tensor in place of giving it back; for the process.

    A tensor of some MiB otherwise comes in new pages every time, and each page is a fault and has to be zeroed: of a
    sample of 32 images on two cores a tenth of the time. `memory.cpp` keeps it, glibc where that is not to be had, at
    the price of a third more memory. Does nothing where neither can, or where somebody has chosen how memory is to be
    had: by variables of the C library's own, or by another library in its place.

    Returns:
        What keeps it from now on, in a few words.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "by the C library, as the environment says"
    compiled.begin()  # the first of all commands is to wait for its compilers once
    lib = compiled.library(SOURCE)
    if lib is not None and lib.keep():
        return "in a region of cmtool's own"
    with suppress(AttributeError, OSError, TypeError):  # no such function, no such library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)
        return "by glibc"
    return "by the C library, as it does"
