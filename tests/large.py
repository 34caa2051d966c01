"""How memory and speed depend on the size of a data set and on where it lies; the numbers of examples/LOG.md.

    python -m tests.large --counts 1000,100000,1000000

It writes sets of synthetic 32x32 images with 10 classes (a thousand different ones, again and again), opens each in a
process of its own and draws shuffled batches from it. A short form is in the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE, DIFFERENT, BATCH = 32, 1000, 256


def write(folder: Path, count: int, kind: str) -> Path:
    """A set of so many images, of one of the kinds that are compared."""
    import numpy as np

    from cmtool.io.shards import Writer, encode

    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (DIFFERENT, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    pictures = smooth // 2 + random.integers(0, 32, smooth.shape, dtype=np.uint8)
    encoded = [encode(picture) for picture in pictures]
    target = folder / f"{kind}-{count}"
    if kind == "folder":
        for number in range(count):
            place = target / str(number % 10)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:07d}.png").write_bytes(encoded[number % DIFFERENT])
    elif kind == "npy":
        target = target.with_suffix(".npy")
        file = np.lib.format.open_memmap(target, "w+", np.uint8, (count, SIDE, SIDE, 3))
        for first in range(0, count, DIFFERENT):
            part = pictures[: count - first].transpose(0, 2, 3, 1)
            file[first : first + len(part)] = part
    elif kind == "parquet":
        import datasets

        target = target.with_suffix(".parquet")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        cells = [{"bytes": encoded[number % DIFFERENT], "path": None} for number in range(count)]
        labels = [number % 10 for number in range(count)]
        datasets.Dataset.from_dict({"image": cells, "label": labels}, features).to_parquet(target)
    else:
        with Writer(target) as out:
            for number in range(count):
                out.add(encoded[number % DIFFERENT], b"", number % 10)
            names = [str(label) for label in range(10)]
            manifest = {"source": "synthetic", "count": count, "resolution": SIDE, "channels": 3, "crop": "center"}
            out.finish(manifest | {"resize": "box", "class_names": names, "fingerprint": "0" * 16})
        if kind == "tar":
            (target / "manifest.json").unlink()
            (target / "index.npy").unlink()
    return target


def read(place: str, workers: int, seconds: float) -> dict[str, float]:
    """Open a set in this process, draw batches for a while, and say what it took."""
    import torch

    from cmtool.io.data import open_data
    from cmtool.training.trainer import Order

    torch.set_num_threads(1)
    before, mapped_before = peak_memory(), status("RssFile")
    start = time.perf_counter()
    data = open_data(place, workers=workers)
    opened = time.perf_counter() - start
    order, batch = Order(len(data), 0), min(BATCH, len(data))
    batches = (order.indices(step * batch, batch) for step in range(10**9))
    made = data.stream(batches) if hasattr(data, "stream") else (data.batch(indices) for indices in batches)
    next(made)
    start, drawn = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        drawn += len(next(made)[0])
    speed = drawn / (time.perf_counter() - start)
    peak, mapped = peak_memory(), status("RssFile")
    made.close()
    return {
        "images": len(data),
        "workers": workers,
        "open_s": round(opened, 2),
        "images_per_s": round(speed),
        "memory_mib": round((peak - before) / 2**20, 1),
        "of_that_mapped_mib": round(
            (mapped - mapped_before) / 2**20, 1
        ),  # files that the system may drop and read again
    }


def peak_memory() -> int:
    """The most memory this process has had so far, in bytes. (`getrusage` counts that of its parent, too.)"""
    return status("VmHWM")


def status(name: str) -> int:
    """A number of bytes that the system keeps about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def measured(place: Path, workers: int, seconds: float) -> dict[str, float]:
    """`read` in a process of its own."""
    args = [sys.executable, "-m", "tests.large", "--read", str(place), "--workers", str(workers)]
    done = subprocess.run([*args, "--seconds", str(seconds)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1000,100000,1000000")
    parser.add_argument("--kinds", default="packed,tar,parquet,folder,npy")
    parser.add_argument("--most", default="folder=100000,parquet=100000", help="the largest set of a kind")
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--read", help="only read this place, and print what it took")
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, int(options.workers), options.seconds)))
        return
    most = {kind: int(count) for kind, count in (part.split("=") for part in options.most.split(",") if part)}
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_HOME"] = str(Path(root) / "hf")
        for kind in options.kinds.split(","):
            for count in map(int, options.counts.split(",")):
                if count > most.get(kind, count):
                    continue
                start = time.perf_counter()
                place = write(Path(root), count, kind)
                wrote = time.perf_counter() - start
                for workers in map(int, options.workers.split(",")):
                    row = {"kind": kind, "write_s": round(wrote, 1)} | measured(place, workers, options.seconds)
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                    if kind == "npy":
                        break
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink()


if __name__ == "__main__":
    main()
