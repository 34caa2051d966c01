"""What is written down of a training: losses by noise level, the quality of the average, the best model, trackers."""

from __future__ import annotations

import json
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmtool.cli import logbook
from cmtool.cli.logbook import Checkpoints, Levels, Rhythm
from cmtool.evaluation.proxy import Proxy
from cmtool.flow.path import VE, Trig
from cmtool.io import checkpoint, data
from cmtool.processes import ALONE
from cmtool.training.trainer import Report

SMALL = ["--preset", "ect", "--precision", "fp32", "--batch", 4, "--set", "network.channels=8", "--sample-every", 0]


@pytest.fixture
def train(cli, pictures, tmp_path):
    def train(name, *more, iterations=6):
        return cli("train", "--data", pictures, "--out", tmp_path / name, *SMALL, "--iterations", iterations, *more)

    return train


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(t, losses):
    nothing = torch.zeros(())
    return Report(1, 1, 0.5, nothing, torch.tensor(losses), torch.tensor(t), nothing, 0.1)


@pytest.mark.parametrize(("pace", "after"), [(0.01, 180_000), (100.0, 18), (1000.0, 1), (5000.0, 1)])
def test_a_checkpoint_is_overdue_after_half_an_hour(monkeypatch, pace, after):
    """Also where the first step takes long."""
    now = 0.0
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now)
    made = Checkpoints(SimpleNamespace(processes=ALONE, step=40), every=7)
    for _ in range(2):
        start = made._last
        for step in range(start + 1, start + 200_000):
            now += pace + (step == 41) * 10 * pace * (pace < 100)
            if made.overdue(step):
                break
        assert step - start == pytest.approx(after, rel=1e-3)
        made.made(step)
    assert [step for step in range(1, 22) if made.planned(step)] == [7, 14, 21]


def test_a_slow_run_saves_more_often_and_comes_to_the_same(train, tmp_path, monkeypatch):
    """Only its series of averages has no more than it would have."""
    averages = ["--set", "averages.1=power", "--save-every", 4, "--keep", 9]
    assert train("planned", *averages).code == 0
    monkeypatch.setattr(logbook.Checkpoints.__init__, "__defaults__", (1e-9,))
    assert train("slow", *averages).code == 0
    states, series = (
        {name: sorted(file.name for file in (tmp_path / name).glob(pattern)) for name in ("planned", "slow")}
        for pattern in ("checkpoints/*", "averages/*/*")
    )
    assert states["planned"] == ["step_0000004.pt", "step_0000006.pt"]
    assert states["slow"] == [f"step_000000{step}.pt" for step in range(1, 7)]
    assert series["slow"] == series["planned"]
    assert series["slow"]
    found = [torch.load(tmp_path / name / "checkpoints" / "step_0000006.pt") for name in ("planned", "slow")]
    assert all(torch.equal(tensor, found[1]["model"][name]) for name, tensor in found[0]["model"].items())


def test_losses_are_sorted_by_the_decade_of_the_noise():
    levels = Levels(VE(), torch.device("cpu"))
    levels.add(report([0.15, 0.9, 1.5, 70.0], [1.0, 2.0, 5.0, 7.0]))
    levels.add(report([0.011, 2.5], [11.0, 6.0]))
    assert levels.means(ALONE) == {"0.01": 11.0, "0.1": 1.5, "1": 5.5, "10": 7.0}
    assert levels.means(ALONE) == {}
    trig = Levels(Trig(), torch.device("cpu"))  # t is an angle: half its tangent is the ratio, or has no end
    trig.add(report([torch.pi / 4 + 0.01, torch.pi / 2], [3.0, float("nan")]))
    assert trig.means(ALONE) == {"0.1": 3.0, "1000": None}


def test_a_run_is_judged_by_itself_where_it_is_long():
    def every(total, **asked):
        return Rhythm(total, **{"log": None, "save": None, "sample": None, "judge": None} | asked)

    assert (every(999).judge, every(1000).judge, every(1000, judge=7).judge, every(5000, judge=0).judge) == (
        0,
        100,
        7,
        0,
    )
    assert (every(5000).log, every(5000).save, every(5000).sample) == (100, 1000, 500)


def test_the_best_average_is_kept(train, cli, tmp_path, pictures):
    assert train("run", "--judge-every", 2, "--log-every", 3).code == 0
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [2, 3, 4, 6]
    judged = {line["step"]: line["fd_random@24"] for line in found if "fd_random@24" in line}
    assert list(judged) == [2, 4, 6]
    best = checkpoint.load(tmp_path / "run" / "best.safetensors")
    assert judged[best.card.iterations] == min(judged.values())
    again = Proxy(data.open_data(str(pictures), resolution=8))(best)
    assert again == pytest.approx(min(judged.values()), rel=1e-5)
    assert found[-1]["seconds_left"] == 0
    assert found[0]["seconds_left"] > 0
    assert all(line["loss_by_noise"] for line in found)


def test_a_continued_run_knows_the_best_one(train, cli, tmp_path):
    ways = ("--judge-every", 1, "--log-every", 1)
    assert train("whole", *ways).code == 0
    assert train("run", *ways, "--stop-after", 3).code == 75
    assert cli("train", "--resume", tmp_path / "run", "--precision", "fp32").code == 0

    def judged(name):
        return [line["fd_random@24"] for line in lines(tmp_path / name)]

    assert judged("run") == judged("whole")
    whole, run = (checkpoint.load(tmp_path / name / "best.safetensors") for name in ("whole", "run"))
    assert run.card.iterations == whole.card.iterations == 1 + judged("whole").index(min(judged("whole")))
    file = tmp_path / "run" / "best.safetensors"
    before = file.stat().st_mtime_ns
    assert train("run", "--overwrite").code == 0
    assert not file.exists()
    assert before


def test_trackers_get_what_the_log_gets(train, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ways = ("--judge-every", 2, "--log-every", 1, "--track", "tensorboard,wandb", "--sample-every", 2)
    assert train("run", *ways, "--stop-after", 3).code == 75
    assert cli("train", "--resume", tmp_path / "run", "--precision", "fp32").code == 0
    found = lines(tmp_path / "run")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    loss = {event.step: event.value for event in events.Scalars("loss")}
    assert loss == pytest.approx({line["step"]: line["loss"] for line in found}, rel=1e-6)
    assert [event.step for event in events.Scalars("fd_random@24")] == [2, 4, 6]
    assert any(tag.startswith("loss_by_noise/") for tag in events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]

    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({run.name.rsplit("-", 1)[-1] for run in runs}) == 1  # one run to W&B
    assert wandb_losses(runs) == pytest.approx({line["step"]: line["loss"] for line in found})


def records(raw):
    """Of a log in LevelDB's format: blocks of 32 KiB of chunks, each after its checksum, length and kind."""
    at, parts = 7, []
    while at + 7 <= len(raw):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        parts.append(raw[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield b"".join(parts)
            parts = []


def wandb_losses(runs):
    """Step -> loss in W&B's own files."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for run in runs:
        for raw in records(next(run.glob("*.wandb")).read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            if "loss" in values:
                found[int(values["_step"])] = float(values["loss"])
    return found


def test_trackers_that_are_not_there(train, monkeypatch, tmp_path):
    train("run", "--track", "mlflow").error(2, "no tracker 'mlflow'", "--track tensorboard")
    train("run", "--track", "wandb,").error(2, "an entry is empty")
    monkeypatch.setitem(sys.modules, "wandb", None)
    train("run", "--track", "wandb").error(1, "needs the package wandb", "pip install 'cmtool[wandb]'")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    train("run", "--track", "tensorboard").error(1, "needs the package tensorboard", "pip install")
    assert not (tmp_path / "run").exists()


def test_nobody_is_asked_for_a_key(train, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    train("run", "--track", "wandb").error(2, "there is no key", "wandb login")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    train("run", "--track", "wandb").error(2, "WANDB_MODE is 'sometimes'", "offline")


def test_a_picture_too_small_to_tell_is_not_judged(train, cli, tmp_path):
    np.savez(tmp_path / "small.npz", images=np.zeros((8, 4, 4, 3), np.uint8))
    result = cli(
        *("train", "--data", tmp_path / "small.npz", "--out", tmp_path / "run", *SMALL, "--iterations", 2),
        *("--judge-every", 1, "--set", "network.channel_mult=1"),
    )
    assert result.code == 0, result.stderr
    assert not (tmp_path / "run" / "best.safetensors").exists()
