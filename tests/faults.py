"""A fault campaign: a small run is killed again and again, and must come to what an undisturbed one comes to.

    python -m tests.faults --kills 200 --out FOLDER

Kills come at random moments, every third one while a file is written. After each kill every file that is there must be
whole; each restart is the same command, `cmtool train --resume`. At the end weights, averages, optimizer and log
are compared with those of a run that nobody killed. Of several processes (`--processes 2`, `--shard`) one is killed,
and the others have to end by themselves.

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

from cmtool import processes as team
from cmtool.cli import logbook
from cmtool.cli.app import main
from cmtool.evaluation import proxy
from cmtool.io import checkpoint, data, images, loading, run, sharded, trackers
from cmtool.training import presets, trainer
from tests.models import Pictures
from tests.team import environment, free_port

SMALL = ["--set", "network.channels=8", "--set", "network.channel_mult=1,1", "--set", "network.num_blocks=1"]
IMPORTED = (torch._dynamo, data, images, loading, logbook, presets, proxy, run, trackers, trainer)  # what a run needs
PRESETS = {"ct": 200, "scd": 100, "pd": 200, "reflow": 100}  # and how many steps a run has
DISTILS = ("scd", "pd", "reflow")
PATIENCE = 30.0  # seconds in which a process that has lost another one must end


class Job:
    """A command in a process of its own, or in several that work together."""

    def __init__(self, argv: list[str], processes: int = 1) -> None:
        sys.stdout.flush()
        port = free_port() if processes > 1 else 0
        self._met, self._tell = os.pipe()
        os.set_blocking(self._met, False)
        self.running = [self._fork(argv, rank, processes, port) for rank in range(processes)]
        os.close(self._tell)
        self.codes: list[int] = []

    def _fork(self, argv: list[str], rank: int, processes: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 70
        try:
            if processes > 1:
                os.environ.update(environment(rank, processes, port))
                os.dup2(null, 2)
                self._tell_of_meeting()
            code = main([*argv, "--quiet"])
        finally:
            os._exit(code)

    def _tell_of_meeting(self) -> None:
        join = team.join

        def joined() -> team.Processes:
            found = join()
            os.write(self._tell, b".")
            return found

        team.join = joined

    def _have_met(self, count: int) -> bool:
        try:
            return len(os.read(self._met, count)) == count
        except BlockingIOError:
            return False

    def ended(self, seconds: float) -> int | None:
        """The exit code, the worst of several, negative for a signal; None if some still run after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            for pid in list(self.running):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.running.remove(pid)
                    self.codes.append(os.waitstatus_to_exitcode(status))
            if not self.running:
                return max(self.codes, key=abs)
            if time.monotonic() >= until:
                return None
            time.sleep(0.001)

    def kill(self, folder: Path, chance: random.Random, within: float, *, writing: bool) -> bool:
        """Kill one process at a random moment, and see the others end; False if the run was over before."""
        several = len(self.running)
        code = self.ended(chance.uniform(0.0, within))
        while code is None and writing and not any(folder.rglob(".*.part")):
            code = self.ended(0.0)
        if code is not None:
            if code:
                raise SystemExit(f"a run ended with exit code {code}")
            return False
        os.kill(chance.choice(self.running), signal.SIGKILL)
        if several > 1 and not self._have_met(several):  # the others wait for it, and a launcher ends them
            for pid in self.running:
                os.kill(pid, signal.SIGKILL)
        if self.ended(PATIENCE) is None:
            raise SystemExit("a process still runs that has lost another one")
        assert several > 1 or self.codes == [-signal.SIGKILL]
        assert all(self.codes) or over(folder), "a process that has lost another one took it for success"
        return True


def over(folder: Path) -> bool:
    """Whether a run has made its last step but one: a process may be done before the other one is killed."""
    total = json.loads((folder / "config.json").read_text())["recipe"]["iterations"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return bool(lines) and json.loads(lines[-1])["step"] >= total - 1


def check(folder: Path) -> None:
    """Every file that is there is whole."""
    for file in (folder / "checkpoints").glob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None, file
        torch.load(file, weights_only=True)
    for file in (folder / "checkpoints").glob("*.dcp"):
        assert sharded.intact(file), file
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
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": digest(run.RunFolder(folder).latest().state),
        "model": digest(checkpoint.load(folder).network.state_dict()),
        "card": checkpoint.load(folder).card,
        "log": [[line[name] for name in ("step", "loss", "grad_norm", "lr")] for line in lines],
    }


def command(preset: str, out: Path, resume: Path, seed: int, steps: int | None, *more: str) -> list[str]:
    """The command of a run; it starts it where there is none yet."""
    given = ["--teacher", str(out / "teacher")] if preset in DISTILS else SMALL
    return [
        *("distill" if preset in DISTILS else "train", "--resume", str(resume), "--data", str(out / "data.npz")),
        *(
            "--preset",
            preset,
            "--iterations",
            str(steps or PRESETS[preset]),
            "--batch",
            "4",
            "--seed",
            str(seed),
            *given,
        ),
        *("--save-every", "10", "--log-every", "1", "--sample-every", "0", "--precision", "fp32", "--device", "cpu"),
        *more,
    ]


def campaign(
    out: Path, kills: int, seed: int, presets: list[str], *, steps: int | None, processes: int, shard: bool
) -> dict[str, int]:
    """Kill so many times; how many runs were finished by it, and how many kills met a file being written."""
    more = ["--shard"] if shard else []
    chance, done, met, runs = random.Random(seed), 0, 0, 0
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "data.npz", images=Pictures(24).images.permute(0, 2, 3, 1).numpy())
    teacher = ["train", "--out", str(out / "teacher"), "--data", str(out / "data.npz"), "--preset", "edm"]
    brief = ["--iterations", "5", "--batch", "4", "--sample-every", "0", *SMALL]
    assert Job([*teacher, *brief, "--precision", "fp32"]).ended(120) == 0
    while done < kills:
        preset = presets[runs % len(presets)]
        whole, parts = out / f"whole-{runs}", out / f"parts-{runs}"
        began = time.monotonic()
        assert Job(command(preset, out, whole, runs, steps, *more), processes).ended(600) == 0
        within = 0.5 * (time.monotonic() - began)  # many get past the start, and a few to the end
        while True:
            job = Job(command(preset, out, parts, runs, steps, *more), processes)
            if done >= kills:
                assert job.ended(600) == 0
                break
            if not job.kill(parts, chance, within, writing=done % 3 == 2):
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
    parser.add_argument("--steps", type=int, help="of each run; by default as many as suit it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    began = time.monotonic()
    found = campaign(
        options.out,
        options.kills,
        options.seed,
        options.presets.split(","),
        steps=options.steps,
        processes=options.processes,
        shard=options.shard,
    )
    print(json.dumps({**found, "seconds": round(time.monotonic() - began)}))
