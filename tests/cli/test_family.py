"""Every method from the command line: presets, teachers of both kinds, guidance, pairs, compositions."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli.presets import COMMANDS, DISTIL, INIT, TRAIN
from cmtool.flow import Linear, Velocity
from cmtool.io import checkpoint
from tests.models import Pictures, micro, model

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("--batch", 8, "--iterations", 2, "--sample-every", 0, "--precision", "fp32")
PUBLISHED = {name for name in COMMANDS if name.split("-")[-1] in ("cifar10", "vp", "fast", "imagenet64", "lsun256")}
LPIPS = {"cd", "ct", "cd-continuous", "ct-continuous"}  # what compares by it at its published scale


@pytest.fixture(scope="session")
def starts(tmp_path_factory) -> Path:
    """What a training may start from: edm, flow and first.safetensors (a consistency model), of one network."""
    folder = tmp_path_factory.mktemp("starts")
    same = {"config": micro(num_classes=3, label_dropout=0.1), "class_names": ("0", "1", "2"), "grid_points": 4}
    checkpoint.save(model("denoiser", **same), folder / "edm.safetensors")
    flow = model("denoiser", path=Linear(), parameterization=Velocity(), seed=1, **same)
    checkpoint.save(flow, folder / "flow.safetensors")
    checkpoint.save(model(seed=2, **same), folder / "first.safetensors")
    return folder


@pytest.fixture
def make(cli, pictures, starts, tmp_path):
    """`make("distill", "cd", "edm", *flags, out=...)`: a short run, from this teacher or (`train`) these weights."""

    def call(command, preset, start="", *more, out="run", data=pictures):
        option = "--teacher" if command == "distill" else "--init"
        given = (option, starts / f"{start}.safetensors") if start else ()
        return cli(command, "--preset", preset, *given, "--data", data, "--out", tmp_path / out, *SHORT, *more)

    return call


def recipe(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["recipe"]


def weights(source: Path) -> dict[str, torch.Tensor]:
    """Of a model file; of a run those that are trained, not their average, which hardly moves at first."""
    if source.is_dir():
        state = torch.load(source / "checkpoints" / "step_0000002.pt", weights_only=True)["model"]
        return {name.removeprefix("network."): tensor for name, tensor in state.items()}
    return checkpoint.load(source).network.state_dict()


def moved(source: Path, start: Path) -> float:
    """The largest difference of a weight that both models have."""
    one, other = weights(source), weights(start)
    return max(float((one[name] - other[name]).abs().max()) for name in one.keys() & other.keys())


def runs() -> list[tuple[str, str, str]]:
    """(command, preset, start) of all that can be asked for."""
    found = []
    for name, commands in COMMANDS.items():
        for command in commands.split(", "):
            kinds = [""] if command == TRAIN else ["first"] if name.startswith("tcm") else ["edm", "flow"]
            found += [(command.split()[0], name, kind) for kind in (kinds[:1] if name in PUBLISHED else kinds)]
    return found


@pytest.mark.parametrize(("command", "preset", "start"), runs())
def test_every_preset_trains_and_its_model_samples(make, cli, starts, tmp_path, command, preset, start):
    changes = [] if start else ["--network", "tiny"]
    if preset in PUBLISHED and preset.rsplit("-", 1)[0] in LPIPS:
        changes += ["--set", "objective.distance=l2"]
    result = make(command, preset, start, *changes)
    assert result.code == 0, result.stderr
    run = tmp_path / "run"
    card = checkpoint.header(run)["card"]
    assert (card["preset"], card["iterations"], card["num_classes"]) == (preset, 2, 3)
    told = recipe(run)
    assert told["role"] == card["role"]
    if start and (command == "train" or told["init_from_teacher"]):  # (scd, of a flow teacher, starts from nothing)
        assert 0 < moved(run, starts / f"{start}.safetensors") < 0.1
    how = ("--solver", "heun") if card["role"] == "denoiser" else ()
    for steps in (1, 2):
        result = cli("sample", "--model", run, "--seeds", "0-1", "--out", tmp_path / "out", "--steps", steps, *how)
        assert result.code == 0, result.stderr
        one, other = (np.asarray(Image.open(path)) for path in result.lines)
        assert one.std() > 0
        assert (one != other).any()


def test_meanflow_follows_the_data_or_a_teacher(make, tmp_path):
    assert make("train", "meanflow", "", "--network", "tiny", out="trained").code == 0
    assert make("distill", "meanflow", "flow", out="distilled").code == 0
    for run, kind in (("trained", "data"), ("distilled", "teacher")):
        told = recipe(tmp_path / run)
        assert told["objective"]["parts"][1]["objective"]["trajectory"]["kind"] == kind
        assert told["init_from_teacher"] is (kind == "teacher")
        assert told["network"]["two_times"]


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "path"), [("cd", ()), ("meanflow", ("parts", 1, "objective")), ("reflow", ())])
def test_guidance_is_recorded_and_changes_the_student(make, cli, tmp_path, preset, path):
    assert make("distill", preset, "edm", out="plain").code == 0
    assert make("distill", preset, "edm", "--guidance", 2.5, out="guided").code == 0
    objective = recipe(tmp_path / "guided")["objective"]
    for name in path:
        objective = objective[name]
    assert objective["pairs" if preset == "reflow" else "trajectory"]["guidance"] == 2.5
    assert json.loads(cli("info", tmp_path / "guided", "--json").stdout)["guidance"] == 2.5
    shown = [
        [line.split() for line in cli("info", tmp_path / run).lines if line.startswith("guidance")]
        for run in ("guided", "plain")
    ]
    assert shown == [[["guidance", "2.5"]], []]
    assert moved(tmp_path / "guided", tmp_path / "plain") > 0


def test_guidance_is_said_last(make):
    """`--set` may choose another trajectory: the flag is of whatever it leaves."""
    told = make("distill", "cd", "edm", "--guidance", 2, "--set", "objective.trajectory=teacher", "--dry-run", "--json")
    assert json.loads(told.stdout)["recipe"]["objective"]["trajectory"]["guidance"] == 2


def test_guidance_needs_dropped_labels(make, cli, plain, teacher, pictures, tmp_path):
    for source, words in ((teacher, ("label_dropout=0.1",)), (plain, ("is a consistency model",))):
        ask = ("distill", "--preset", "cd", "--teacher", source, "--data", pictures, "--out", tmp_path / "x")
        result = cli(*ask, *SHORT, "--guidance", 2)
        result.error(result.code, *words)
    make("distill", "cd", "edm", "--guidance", "nan").error(2, "--guidance nan")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "run").exists()


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(cli, starts, tmp_path) -> Path:
    ask = ("pairs", "--model", starts / "edm.safetensors", "-n", 24, "--steps", 2, "--out", tmp_path / "pairs.npz")
    assert cli(*ask).code == 0
    return tmp_path / "pairs.npz"


def test_pairs_are_trained_on(make, starts, tmp_path, pairs):
    result = make("distill", "reflow", "edm", data=pairs)
    assert result.code == 0, result.stderr
    assert "24 pairs" in result.stderr
    told = recipe(tmp_path / "run")
    assert told["objective"]["pairs"] is None
    assert 0 < moved(tmp_path / "run", starts / "edm.safetensors") < 0.1
    assert make("train", "flow", "", "--network", "tiny", data=pairs, out="flow").code == 0  # without a teacher


def test_the_noise_of_the_pairs_is_used(make, starts, tmp_path, pairs):
    """The same images without their noise teach something else."""
    from cmtool.io.data import open_data

    data = open_data(pairs)
    images = data.images.float().permute(0, 2, 3, 1)
    np.savez(tmp_path / "alone.npz", images=data.pictures.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy())
    alone = open_data(tmp_path / "alone.npz")
    assert (alone.images / 127.5 - 1 - images.permute(0, 3, 1, 2)).abs().max() < 0.01
    changed = {}
    for name, source in (("alone", tmp_path / "alone.npz"), ("paired", pairs)):
        assert make("train", "flow", "edm", "--lr", "1e-2", data=source, out=name).code == 0
        changed[name] = weights(tmp_path / name)
    assert any(not torch.equal(changed["alone"][key], changed["paired"][key]) for key in changed["alone"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--set", "flip=true"], ["another noise", "--set flip=false"]),
        (["--set", "augment=augment"], ["another noise", "--set augment=none"]),
        (["--set", "objective.pairs=teacher"], ["holds pairs already", "objective.pairs=none"]),
        (["--guidance", "2"], ["follows none"]),
    ],
)
def test_what_does_not_go_with_pairs(make, tmp_path, pairs, changes, words):
    make("distill", "reflow", "edm", *changes, data=pairs).error(2, *words)
    assert not (tmp_path / "run").exists()


# --- compositions ----------------------------------------------------------------------------------------------------


def test_a_teacher_is_read_on_another_path(make, cli, tmp_path):
    assert make("distill", "cd", "edm", "--set", "path=trig").code == 0
    described = checkpoint.header(tmp_path / "run")
    assert (described["path"]["kind"], described["parameterization"]["kind"]) == ("trig", "boundary_edm")
    assert cli("sample", "--model", tmp_path / "run", "--out", tmp_path / "x.png", "--steps", 2).code == 0


def test_weights_that_mean_something_else_are_told(make):
    said = "only a rough start"
    assert said not in make("distill", "cd", "edm", "--set", "path=trig").stderr  # the same function there
    assert said not in make("distill", "cd", "flow", out="b").stderr
    assert said in make("distill", "cd", "flow", "--set", "path=trig", out="c").stderr
    assert said in make("train", "flow", "edm", out="d").stderr


COMPOSED = ("path=trig", "objective.target=truncated", "objective.distance=pseudo_huber")


def test_a_composition_nobody_published(make, cli, starts, tmp_path):
    changes = [word for change in COMPOSED for word in ("--set", change)]
    make("distill", "cd", "edm", *changes).error(2, "second stage", "--init")
    result = make("distill", "cd", "edm", "--init", starts / "first.safetensors", *changes)
    assert result.code == 0, result.stderr
    told = recipe(tmp_path / "run")
    assert (told["path"]["kind"], told["objective"]["target"]["kind"]) == ("trig", "truncated")
    assert told["objective"]["distance"]["kind"] == "pseudo_huber"
    assert moved(tmp_path / "run", starts / "first.safetensors") < moved(tmp_path / "run", starts / "edm.safetensors")
    assert cli("sample", "--model", tmp_path / "run", "--out", tmp_path / "x.png", "--steps", 2).code == 0


def test_the_example_of_a_composition_runs(starts, tmp_path, monkeypatch, capsys):
    made = Pictures(count=64, classes=3)
    np.savez(tmp_path / "data.npz", images=made.images.permute(0, 2, 3, 1).numpy(), labels=made.labels.numpy())
    models = ("--teacher", starts / "edm.safetensors", "--first", starts / "first.safetensors")
    argv = ["composition.py", *models, "--data", tmp_path / "data.npz", "--iterations", 2, "--out", tmp_path / "n.st"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    runpy.run_path(str(EXAMPLES / "composition.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "n.st")
    described = checkpoint.header(tmp_path / "n.st")
    assert (described["path"]["kind"], described["card"]["role"]) == ("trig", "consistency")
    assert 0 < moved(tmp_path / "n.st", starts / "first.safetensors") < 0.1


def test_the_commands_are_those_of_the_documentation():
    """README's table of methods names the same command for each preset."""
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    text = text.split("## Methods")[1].split("## Measured")[0]
    table = text.split("| preset | command | method | source |\n")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[1:]]
    told = {name.strip(" `"): command.replace("`", "").strip() for name, command in rows}
    assert told == {name: command for name, command in COMMANDS.items() if name not in PUBLISHED}


def test_the_kinds_of_command_are_all_tried():
    assert {command for command, _, _ in runs()} == {"train", DISTIL}
    assert any(command == INIT for command in COMMANDS.values())
