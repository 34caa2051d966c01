"""Benchmarks: numbers of this machine, in one run. Prints a table; never fails on a slow machine.

start-up    what a person waits for before anything happens: help, version, a usage error, completion, and beside
            them the time of `import torch`, which none of them pays
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

RUNS = 7


def seconds(argv: list[str], env: dict[str, str] | None = None) -> list[float]:
    """Wall-clock seconds of a command, run a few times after one run to warm the disk cache."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(argv, capture_output=True, env={**os.environ, **(env or {})}, check=False)
        times.append(time.perf_counter() - start)
    return times[1:]


def startup() -> list[tuple[str, list[float]]]:
    """Start-up times by command."""
    cmtool = [sys.executable, "-m", "cmtool"]
    complete = {"_CMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": "cmtool sam", "COMP_CWORD": "1"}
    return [
        ("python -c pass", seconds([sys.executable, "-c", "pass"])),
        ("cmtool --help", seconds([*cmtool, "--help"])),
        ("cmtool --version", seconds([*cmtool, "--version"])),
        ("cmtool sample --help", seconds([*cmtool, "sample", "--help"])),
        ("cmtool sample --stepz (usage error)", seconds([*cmtool, "sample", "--stepz", "1"])),
        ("completion of `cmtool sam`", seconds([*cmtool], complete)),
        ("python -c 'import torch'", seconds([sys.executable, "-c", "import torch"])),
    ]


def main() -> None:
    """Run everything and print the table."""
    rows = startup()
    width = max(len(name) for name, _ in rows)
    print(f"{'start-up':{width}}  median   min     max     (s, {RUNS} runs)")
    for name, times in rows:
        print(f"{name:{width}}  {statistics.median(times):.3f}   {min(times):.3f}   {max(times):.3f}")


if __name__ == "__main__":
    main()
