"""What the operating system says of the machine and of the memory of this process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# The files of a control group that hold its limit and its use, and the share of that use (in its memory.stat) which is
# only a cache of files and is given up when memory is needed; of version 2 and of version 1.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

# What decides how fast networks are on a CPU.
_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimddp", "sve", "sve2", "bf16", "i8mm", "sme"),
)


class CPU(NamedTuple):
    """The processor: its name, the instruction sets that matter, and the cores that this process may use."""

    name: str
    flags: tuple[str, ...]
    cores: int


def cpu() -> CPU:
    """The processor, as far as it is known."""
    found = _fields(_PROC / "cpuinfo")
    name = found.get("model name") or found.get("Hardware") or platform.processor() or platform.machine()
    known = set((found.get("flags") or found.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return CPU(name, tuple(flag for flag in _FLAGS if flag in known), cores)


def free_memory() -> int | None:
    """Bytes of main memory that can be used without swapping, under the limits that a container sets, too.

    All that the machine has where Linux does not tell; None where nothing is known.
    """
    left = [_free_on_the_machine(), *_left_in_groups()]
    return min((size for size in left if size is not None), default=None)


def memory() -> int:
    """Resident memory of this process in bytes, without the files that are mapped into it (programs, libraries)."""
    status = _fields(_PROC / "self" / "status")
    if "VmRSS" in status:
        return _bytes(status, "VmRSS") - _bytes(status, "RssFile")
    return _largest()


def peak_memory() -> int:
    """The most that `memory` has been since `reset_peak`; where the peak cannot be reset, since the process began.

    Linux counts the peak with the mapped files: those that are resident now are taken off.
    """
    status = _fields(_PROC / "self" / "status")
    if "VmHWM" in status:
        return _bytes(status, "VmHWM") - _bytes(status, "RssFile")
    return _largest()


def reset_peak() -> None:
    """Let the peak be what is resident now, where the system can do that."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:  # no Linux, or a sandbox
        return


def _fields(path: Path) -> dict[str, str]:
    """The first value of every `name: value` line; empty where there is no such file."""
    found: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _bytes(status: dict[str, str], name: str) -> int:
    return int(status.get(name, "0 kB").split()[0]) * 1024


def _largest() -> int:
    """The largest resident size so far, mapped files included; 0 where even that is unknown."""
    try:
        import resource
    except ImportError:
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if platform.system() == "Darwin" else size * 1024


def _free_on_the_machine() -> int | None:
    known = _fields(_PROC / "meminfo")
    if "MemAvailable" in known:
        return _bytes(known, "MemAvailable")
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such call (Windows), or no such number
        return None


def _left_in_groups() -> Iterator[int]:
    """What the control groups of this process leave it, each limit by itself: a parent's counts too."""
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, files = _CGROUPS / "memory", _VERSION_1
        elif not controllers:
            root, files = _CGROUPS, _VERSION_2
        else:
            continue
        # In a container its own group may be mounted as the root, whatever it is called outside.
        group = root / name.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                limit, used = (_read(folder / file).strip() for file in files[:2])
                if limit.isdecimal() and used.isdecimal():
                    yield max(0, int(limit) - int(used) + _cached(folder, files[2]))


def _cached(folder: Path, name: str) -> int:
    for line in _read(folder / "memory.stat").splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
