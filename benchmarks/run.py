"""Benchmarks: numbers of this machine, in one run. Prints tables; never fails on a slow machine.

start-up    what a person waits for before anything happens: help, version, a usage error, completion, and the first
            image of a model; beside them the time of `import torch`, which only the image pays
bench       `cmtool bench`: training and sampling beside plain PyTorch; --quick does a few rows, once
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS, QUICK = 7, 1
CMTOOL = [sys.executable, "-m", "cmtool"]


def seconds(argv: list[str], runs: int, env: dict[str, str] | None = None) -> list[float]:
    """Wall-clock seconds of a command, run a few times after one run to warm the disk cache."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(argv, capture_output=True, env={**os.environ, **(env or {})}, check=False)
        times.append(time.perf_counter() - start)
    return times[1:]


def startup(runs: int, folder: Path) -> list[tuple[str, list[float]]]:
    """Start-up times by command."""
    complete = {"_CMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": "cmtool sam", "COMP_CWORD": "1"}
    model = folder / "model.safetensors"
    make_model(model)
    sample = [*CMTOOL, "sample", "--model", str(model), "-n", "1", "--out", str(folder / "one.png")]
    subprocess.run(sample, check=True, capture_output=True)
    return [
        ("python -c pass", seconds([sys.executable, "-c", "pass"], runs)),
        ("cmtool --help", seconds([*CMTOOL, "--help"], runs)),
        ("cmtool --version", seconds([*CMTOOL, "--version"], runs)),
        ("cmtool sample --help", seconds([*CMTOOL, "sample", "--help"], runs)),
        ("cmtool sample --stepz (usage error)", seconds([*CMTOOL, "sample", "--stepz", "1"], runs)),
        ("completion of `cmtool sam`", seconds(CMTOOL, runs, complete)),
        ("python -c 'import torch'", seconds([sys.executable, "-c", "import torch"], runs)),
        ("cmtool sample -n 1", seconds(sample, runs)),
    ]


def make_model(file: Path) -> None:
    """A consistency model of the demo's size, untrained."""
    from cmtool import networks
    from cmtool.flow import VE, BoundaryEDM, FlowMap, ModelCard
    from cmtool.io import checkpoint
    from cmtool.networks.configs import small

    card = ModelCard("consistency", 16, 3, num_classes=10)
    checkpoint.save(FlowMap(networks.build(small(16, 3, 10)), VE(), BoundaryEDM(), card), file)


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of each: does it run?")
    quick = parser.parse_args().quick
    runs = QUICK if quick else RUNS
    with tempfile.TemporaryDirectory() as folder:
        rows = startup(runs, Path(folder))
    width = max(len(name) for name, _ in rows)
    print(f"{'start-up':{width}}  median   min     max     (s, {runs} run(s))")
    for name, times in rows:
        print(f"{name:{width}}  {statistics.median(times):.3f}   {min(times):.3f}   {max(times):.3f}")
    print(flush=True)
    sys.exit(subprocess.run([*CMTOOL, "bench", *(["--quick"] if quick else [])], check=False).returncode)


if __name__ == "__main__":
    main()
