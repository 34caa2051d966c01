"""Runs that are killed, and what a continued run needs and refuses."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmtool.io import stored
from cmtool.io.shards import Shards
from cmtool.training.trainer import Order

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(cli, pictures, tmp_path):
    """A small run of six steps in `tmp_path / name`."""

    def start(name, *more):
        small = ("--batch", 4, "--iterations", 6, "--sample-every", 0, "--set", "network.channels=8")
        ask = ("train", "--data", pictures, "--preset", "edm", "--precision", "fp32", *small, "--log-every", 1)
        return cli(*ask, "--out", tmp_path / name, *more)

    return start


def test_a_killed_run_comes_to_the_same(tmp_path):
    """The long form is in the log of examples."""
    ask = [
        sys.executable,
        "-m",
        "tests.faults",
        "--kills",
        "2",
        "--presets",
        "ct",
        "--steps",
        "60",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 2


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stops_where_it_is_told_and_goes_on_from_its_folder_alone(start, cli, tmp_path):
    run = tmp_path / "run"
    stopped = start("run", "--stop-after", 2)
    assert stopped.code == 75
    assert f"stopped at step 2 of 6; --resume {run} continues" in stopped.stderr
    again = cli("train", "--resume", run, "--precision", "fp32", "--stop-after", 3)
    assert again.code == 75
    assert "stopped at step 5 of 6" in again.stderr
    assert cli("train", "--resume", run, "--precision", "fp32", "--stop-after", 3, "--log-every", 1).code == 0
    assert steps(run)[-1] == 6


def test_the_run_to_continue_is_named_once(start, cli, tmp_path):
    assert start("run", "--stop-after", 1).code == 75
    cli("train", "--resume", tmp_path / "run", "--out", tmp_path / "other").error(2, "--resume", "--out", "other")
    cli("train", "--preset", "edm", "--data", "digits").error(2, "missing option '--out'")
    cli("train", "--resume", tmp_path / "run", "--stop-after", 0).error(2, "--stop-after")
    assert cli("train", "--resume", tmp_path / "run", "--out", tmp_path / "run", "--precision", "fp32").code == 0


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(start, cli, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start("whole").code == 0
    assert start("run", "--save-every", 2, "--stop-after", 4, "--keep", 3).code == 75
    newest = run / "checkpoints" / "step_0000004.pt"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    result = cli("train", "--resume", run, "--precision", "fp32", "--log-every", 1)
    assert result.code == 0, result.stderr
    assert "step_0000004.pt is damaged and put aside: continuing from step 2" in result.stderr
    assert steps(run) == steps(whole)
    assert (run / "checkpoints" / "step_0000004.damaged").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write to")
def test_a_folder_that_cannot_be_written_to(start):
    start("/proc/run").error(2, "cannot write to /proc/run", "--out")


def test_a_continued_run_goes_about_it_as_before(start, cli, tmp_path):
    """Also in its precision, which is not that of the machine here."""
    run = tmp_path / "run"
    ways = ("--save-every", 2, "--keep", 3, "--micro-batch", "auto", "--checkpoint-activations")
    assert start("run", *ways, "--precision", "bf16", "--stop-after", 1).code == 75
    result = cli("train", "--resume", run)
    assert "bfloat16" in result.stderr
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    kept = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert kept == ["step_0000002.pt", "step_0000004.pt", "step_0000006.pt"]
    assert not (run / "samples").exists()
    config = json.loads((run / "config.json").read_text())
    assert config["ways"] == {
        **{"log_every": 1, "save_every": 2, "keep": 3, "sample_every": 0},
        **{"micro_batch": "auto", "checkpoint_activations": True, "precision": "bf16"},
    }
    assert "float32" in cli("train", "--resume", run, "--precision", "fp32").stderr  # asked for, it is done


@pytest.mark.parametrize("ways", [3, {"keep": 0}, {"sample_every": False}, {"precision": "fp8"}, {"save": 3}], ids=str)
def test_ways_that_are_none(start, cli, tmp_path, ways):
    assert start("run", "--stop-after", 1).code == 75
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ways": ways}))
    cli("train", "--resume", tmp_path / "run").error(2, "section of ways", "save_every")


def test_two_runs_do_not_share_a_folder(start, cli, tmp_path):
    from cmtool.io.run import RunFolder

    assert start("run", "--stop-after", 1).code == 75
    with RunFolder(tmp_path / "run").writing():
        cli("train", "--resume", tmp_path / "run").error(2, "another process writes to")


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    ask = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)]
    try:
        mounted = subprocess.run(ask, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root mounts a disk")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_costs_nothing_that_was_there(start, cli, disk):
    run, filler = disk / "run", disk / "filler"
    assert start(run, "--save-every", 1, "--keep", 1, "--stop-after", 2).code == 75
    kept = {file: file.read_bytes() for file in run.rglob("*.safetensors")} | {
        file: file.read_bytes() for file in run.rglob("*.pt")
    }
    assert len(kept) == 2
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 2**16))
    resume = ("train", "--resume", run, "--precision", "fp32")

    def refused(word):
        result = cli(*resume)
        assert result.code == 1
        error, hint = result.stderr.splitlines()[-2:]
        assert word in error
        assert "earlier checkpoints are intact" in hint

    refused("the checkpoint needs")
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    refused("No space left on device")
    assert all(file.read_bytes() == raw for file, raw in kept.items())
    assert not list(run.rglob(".*.part"))
    filler.unlink()
    assert cli(*resume).code == 0
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_data_that_has_changed_is_not_gone_on_with(cli, pictures, tmp_path):
    """One pixel of one image, under the same name."""
    with np.load(pictures) as arrays:
        held = dict(arrays)
    np.savez(tmp_path / "data.npz", **held)
    small = ("--batch", 4, "--iterations", 6, "--sample-every", 0, "--set", "network.channels=8")
    ask = ("train", "--data", tmp_path / "data.npz", "--preset", "edm", "--precision", "fp32", *small)
    assert cli(*ask, "--out", tmp_path / "run", "--stop-after", 2).code == 75
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*.pt")}
    held["images"][3, 0, 0, 0] ^= 1
    np.savez(tmp_path / "data.npz", **held)
    cli("train", "--resume", tmp_path / "run", "--precision", "fp32").error(2, "data.fingerprint")
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*.pt")} == before
    held["images"][3, 0, 0, 0] ^= 1
    np.savez(tmp_path / "data.npz", **held)
    assert cli("train", "--resume", tmp_path / "run", "--precision", "fp32").code == 0


def test_images_that_stop_coming_cost_no_step(start, cli, tmp_path):
    """What was done by then is saved; with the image mended the run comes to what it would have been."""
    shards = tmp_path / "shards"
    made = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", made)
    assert cli("data", "pack", tmp_path / "images.npy", shards).code == 0
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start("whole", "--data", shards).code == 0

    tar = shards / "00000.tar"
    before = tar.read_bytes()
    place = np.load(shards / "index.npy")[int(Order(24, seed=0).indices(3 * 4, 1))]  # the first of the fourth batch
    tar.write_bytes(before[: place["offset"]] + bytes(place["size"]) + before[place["offset"] + place["size"] :])
    start("run", "--data", shards, "--quiet").error(
        1, "damaged", f"step 3 is saved, and --resume {run} goes on from there"
    )
    tar.write_bytes(before)

    assert cli("train", "--resume", run, "--precision", "fp32", "--log-every", 1).code == 0
    assert steps(run) == steps(whole)
    ends = [load_file(folder / "model.safetensors") for folder in (run, whole)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_stuck_costs_no_step(start, cli, tmp_path, monkeypatch, workers):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8))
    assert cli("data", "pack", tmp_path / "images.npy", tmp_path / "shards").code == 0
    slow, opened = int(Order(24, seed=0).indices(3 * 4, 1)), Shards.open

    def stuck(shards, number):
        time.sleep(4 * (number == slow))
        return opened(shards, number)

    monkeypatch.setattr(stored, "PATIENCE", 1.0)
    monkeypatch.setattr(Shards, "open", stuck)
    run = tmp_path / "run"
    ask = ("--data", tmp_path / "shards", "--workers", workers, "--quiet")
    start("run", *ask).error(1, "no image has come", f"step 3 is saved, and --resume {run} goes on from there")
    monkeypatch.undo()
    assert cli("train", "--resume", run, "--precision", "fp32").code == 0
