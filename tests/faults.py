"""A fault campaign: a small run is killed again and again, and must come to what an undisturbed one comes to.

    python -m tests.faults --kills 200 --out FOLDER

Kills come at random moments, every third one while a file is written. After each kill every file that is there must be
whole; each restart is the same command, `cmtool train --resume`. At the end weights, averages, optimizer and log
are compared with those of a run that nobody killed.

Runs are forked from this process, which has imported everything and computed nothing: that takes a tenth of a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import numpy as np
import torch
import torch._dynamo

from cmtool.cli.app import main
from cmtool.io import checkpoint, data, images, loading, run
from cmtool.training import presets, trainer
from tests.models import Pictures

SMALL = ["--set", "network.channels=8", "--set", "network.channel_mult=1,1", "--set", "network.num_blocks=1"]
IMPORTED = (torch._dynamo, data, images, loading, presets, run, trainer)  # what a run needs
PRESETS = {"ct": 200, "scd": 100, "pd": 200}  # and how many steps a run has


def start(argv: list[str]) -> int:
    """Run a command in a process of its own; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    code = 70
    try:
        code = main([*argv, "--quiet"])
    finally:
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None if the process still runs after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)


def kill(pid: int, folder: Path, chance: random.Random, *, writing: bool) -> bool:
    """Kill the run at a random moment; False if it was over before."""
    code = ended(pid, chance.uniform(0.0, 1.5))
    while code is None and writing and not any(folder.rglob(".*.part")):
        code = ended(pid, 0.0)
    if code is not None:
        if code:
            raise SystemExit(f"a run ended with exit code {code}")
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def check(folder: Path) -> None:
    """Every file that is there is whole."""
    for file in (folder / "checkpoints").glob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None, file
        torch.load(file, weights_only=True)
    for file in folder.rglob("*.safetensors"):
        if not file.name.startswith("."):
            checkpoint.load(file)
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_text())


def digest(value: object, into: Any = None) -> str:
    """Of all tensors and plain values in nested dictionaries and lists."""
    into = into or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        into.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for name, part in value.items():
            into.update(repr(name).encode())
            digest(part, into)
    elif isinstance(value, list | tuple):
        for part in value:
            digest(part, into)
    else:
        into.update(repr(value).encode())
    return into.hexdigest()


def outcome(folder: Path) -> dict[str, object]:
    """What a finished run has come to."""
    newest = max((folder / "checkpoints").glob("*.pt"), key=lambda file: file.name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": digest(torch.load(newest, weights_only=True)),
        "model": digest(checkpoint.load(folder).network.state_dict()),
        "card": checkpoint.load(folder).card,
        "log": [[line[name] for name in ("step", "loss", "grad_norm", "lr")] for line in lines],
    }


def command(preset: str, out: Path, resume: Path, seed: int) -> list[str]:
    """The command of a run; it starts it where there is none yet."""
    given = ["--teacher", str(out / "teacher")] if preset in ("scd", "pd") else SMALL
    return [
        *("distill" if preset in ("scd", "pd") else "train", "--resume", str(resume), "--data", str(out / "data.npz")),
        *("--preset", preset, "--iterations", str(PRESETS[preset]), "--batch", "4", "--seed", str(seed), *given),
        *("--save-every", "10", "--log-every", "1", "--sample-every", "0", "--precision", "fp32", "--device", "cpu"),
    ]


def campaign(out: Path, kills: int, seed: int, presets: list[str]) -> dict[str, int]:
    """Kill so many times; how many runs were finished by it, and how many kills met a file being written."""
    chance, done, met, runs = random.Random(seed), 0, 0, 0
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "data.npz", images=Pictures(24).images.permute(0, 2, 3, 1).numpy())
    teacher = ["train", "--out", str(out / "teacher"), "--data", str(out / "data.npz"), "--preset", "edm"]
    brief = ["--iterations", "5", "--batch", "4", "--sample-every", "0", *SMALL]
    assert ended(start([*teacher, *brief, "--precision", "fp32"]), 120) == 0
    while done < kills:
        preset = presets[runs % len(presets)]
        whole, parts = out / f"whole-{runs}", out / f"parts-{runs}"
        assert ended(start(command(preset, out, whole, runs)), 600) == 0
        while True:
            writing = done % 3 == 2
            pid = start(command(preset, out, parts, runs))
            if done >= kills:
                assert ended(pid, 600) == 0
                break
            if not kill(pid, parts, chance, writing=writing):
                break
            met += any(parts.rglob(".*.part"))
            done += 1
            check(parts)
        expected, found = outcome(whole), outcome(parts)
        assert found == expected, f"{preset}: the killed run came to something else"
        runs += 1
        print(f"{done} kills, {met} while a file was written, {runs} runs the same bit for bit", flush=True)
    return {"kills": done, "writing": met, "runs": runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    began = time.monotonic()
    found = campaign(options.out, options.kills, options.seed, options.presets.split(","))
    print(json.dumps({**found, "seconds": round(time.monotonic() - began)}))
