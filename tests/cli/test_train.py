"""`cmtool train` and `cmtool distill`: run folders, precedence, resuming, refusing; on a few 8x8 pictures."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from cmtool import spec
from cmtool.cli import presets, training
from cmtool.flow import EDM, VE, VP, Epsilon, Linear, Velocity, VPrediction
from cmtool.io import checkpoint, streamed
from cmtool.io.run import RunFolder
from cmtool.io.shards import encode
from cmtool.networks import configs
from cmtool.training.presets import DEFAULTS, PRESETS, Shape
from cmtool.training.trainer import Trainer
from tests.models import Pictures, micro, model

TINY = [
    *("--batch", "4", "--precision", "fp32", "--set", "network.attention_resolutions=", "--set", "network.channels=8"),
    *("--set", "network.channel_mult=1", "--set", "network.num_blocks=1"),
]


@pytest.fixture
def train(cli, pictures, tmp_path):
    """`train("name", *flags)`: a short training into tmp_path/name."""

    def call(out, *more, iterations=4, preset="edm"):
        where = ("--data", pictures, "--out", tmp_path / out, "--preset", preset)
        return cli("train", *where, "--iterations", iterations, *TINY, *more)

    return call


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).network.state_dict()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_a_run_leaves_what_it_promises(train, cli, tmp_path, pictures):
    result = train("run", "--log-every", 2, "--sample-every", 4)
    assert result.code == 0, result.stderr
    run = tmp_path / "run"
    assert result.lines == [str(run / "model.safetensors")]
    assert {entry.name for entry in run.iterdir()} == {
        *("config.json", "metrics.jsonl", "samples", "checkpoints", "model.safetensors")
    }
    assert os.listdir(run / "samples") == ["0000004.png"]
    assert [line["step"] for line in metrics(run)] == [2, 4]
    assert metrics(run)[-1]["images"] == 16
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["batch"] == 4
    assert config["recipe"]["network"]["channels"] == 8
    assert config["data"]["source"] == str(pictures)
    assert config["data"]["resolution"] == 8
    told = json.loads(cli("info", run, "--json").stdout)
    assert (told["role"], told["num_classes"], told["iterations"]) == ("denoiser", 3, 4)
    assert told["class_names"] == ["0", "1", "2"]


def test_json_is_one_object(train, tmp_path):
    told = json.loads(train("run", "--json").stdout)
    assert told["model"] == str(tmp_path / "run" / "model.safetensors")
    assert (told["iterations"], told["images"], told["finished"]) == (4, 16, True)
    assert told["loss"] > 0


def test_teach_distil_and_train_without_a_teacher(train, cli, pictures, tmp_path):
    assert train("teacher").code == 0
    common = ("--data", pictures, "--iterations", 2, "--batch", 4, "--precision", "fp32")
    distil = ("distill", "--teacher", tmp_path / "teacher", "--preset", "cd", "--out", tmp_path / "student")
    result = cli(*distil, *common)
    assert result.code == 0, result.stderr
    told = json.loads(cli("info", tmp_path / "student", "--json").stdout)
    assert told["role"] == "consistency"
    assert told["teacher"] == str(tmp_path / "teacher")
    assert told["network"]["channels"] == 8  # the teacher's
    assert told["grid_points"] == PRESETS["cd"](Shape(8)).objective.times.curriculum.num
    assert train("ct", preset="ct").code == 0
    for name in ("student", "ct"):
        assert cli("sample", "--model", tmp_path / name, "--out", tmp_path / "x.png").code == 0


def test_the_preset_where_none_is_named(train, cli, pictures, tmp_path):
    assert train("teacher").code == 0
    ask = ("--data", pictures, "--out", tmp_path / "x", "--batch", 4, "--dry-run", "--json")
    for argv, expected in (
        (("train", "--network", "tiny"), DEFAULTS["nothing"]),
        (("train", "--init", tmp_path / "teacher"), DEFAULTS["init"]),
        (("distill", "--teacher", tmp_path / "teacher"), DEFAULTS["teacher"]),
        (("train", "--config", tmp_path / "teacher"), "edm"),  # the run's own
    ):
        result = cli(*argv, *ask)
        assert json.loads(result.stdout)["recipe"]["preset"] == expected
        assert ("no --preset is named" in result.stderr) == ("--config" not in argv)
    (tmp_path / "config.json").write_text('{"recipe": {"batch": 4}}')
    cli("train", "--config", tmp_path / "config.json", *ask).error(2, "does not tell its preset")


@pytest.mark.parametrize(
    ("path", "form"),
    [(VE(), EDM()), (VP(), Epsilon()), (Linear(), Velocity()), (VP(zero_snr=True), VPrediction())],
    ids=["edm", "ddpm", "flow", "v"],
)
def test_any_teacher_is_distilled_without_a_word_into_what_samples_and_edits(cli, pictures, tmp_path, path, form):
    checkpoint.save(model("denoiser", micro(num_classes=3), path, form), tmp_path / "teacher.safetensors")
    ask = ("--data", pictures, "--iterations", 2, "--batch", 4, "--out", tmp_path / "run")
    assert cli("distill", "--teacher", tmp_path / "teacher.safetensors", *ask).code == 0
    for steps in (1, 2):
        made = cli("sample", "--model", tmp_path / "run", "--steps", steps, "--out", tmp_path / "made.png")
        assert made.code == 0, made.stderr
    for edit in (("colorize",), ("superres", "--factor", 2)):
        given = ("--image", tmp_path / "made.png", "--out", tmp_path / "edited.png")
        result = cli(*edit, "--model", tmp_path / "run", *given)
        assert result.code == 0, result.stderr


def test_the_default_presets_are_told(cli):
    assert all(
        presets.COMMANDS[DEFAULTS[start]] == command
        for start, command in (("nothing", presets.TRAIN), ("init", presets.INIT), ("teacher", presets.DISTIL))
    )
    text = " ".join(cli("train", "--help").stdout.decode().replace("\u2502", " ").split())
    assert (
        f"[default: {DEFAULTS['teacher']} from a teacher, {DEFAULTS['init']} with --init, else {DEFAULTS['nothing']}]"
        in text
    )


def test_a_dry_run_checks_everything_and_writes_nothing(train, tmp_path):
    result = train("run", "--dry-run", "--lr", "3e-3")
    rows = dict(line.split(maxsplit=1) for line in result.lines if len(line.split()) == 2)
    assert rows["optimizer.lr"] == "0.003"
    assert rows["iterations"] == "4"
    assert rows["network.num_classes"] == "3"
    assert not (tmp_path / "run").exists()
    (speed,) = (line for line in result.lines if line.startswith("speed"))
    assert float(speed.split()[1]) > 0
    assert speed.endswith("images/s on cpu")
    assert {"parameters", "memory", "time"} <= {line.split()[0] for line in result.lines}
    told = json.loads(train("run", "--dry-run", "--json").stdout)
    assert told["recipe"]["iterations"] == 4
    train("run", "--dry-run", "--set", "optimizer.lrr=1").error(2, "lrr", "did you mean lr?")


def test_a_dry_run_can_be_the_config(train, cli, tmp_path):
    (tmp_path / "plan.json").write_bytes(train("run", "--dry-run", "--json").stdout)
    assert cli("train", "--config", tmp_path / "plan.json", "--out", tmp_path / "run", "--sample-every", 0).code == 0


def test_micro_batches_make_the_same_run(train, tmp_path):
    assert train("whole").code == 0
    assert train("pieces", "--micro-batch", 3, "--checkpoint-activations").code == 0
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "pieces"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for bad in ("0", "x", "-1", "1.5", ""):
        train("x", "--micro-batch", bad).error(2, "--micro-batch", "auto")


def test_a_micro_batch_that_fits(train, tmp_path, monkeypatch):
    result = train("roomy", "--micro-batch", "auto")
    assert result.code == 0
    assert "micro-batch" not in result.stderr
    monkeypatch.setattr("cmtool.generate.free_memory", lambda device: None)
    train("x", "--micro-batch", "auto").error(2, "nobody knows", "give a number")
    monkeypatch.setattr("cmtool.training.forecast.fitting_micro_batch", lambda trainer, free: 2)
    monkeypatch.setattr("cmtool.generate.free_memory", lambda device: 10**6)
    cramped = train("cramped", "--micro-batch", "auto")
    assert "micro-batches of 2" in cramped.stderr
    assert metrics(tmp_path / "cramped")[-1]["loss"] == pytest.approx(metrics(tmp_path / "roomy")[-1]["loss"], rel=1e-4)
    told = json.loads(train("x", "--micro-batch", "auto", "--dry-run", "--json").stdout)
    assert told["forecast"]["micro_batch"] == 2
    monkeypatch.undo()
    monkeypatch.setattr("cmtool.generate.free_memory", lambda device: 10**4)
    train("x", "--micro-batch", "auto").error(2, "not even one image fits", "--checkpoint-activations")


def test_a_compiler_that_fails_is_told(train, tmp_path, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    def failing(module, *, dynamic):
        def call(*args, **rest):
            raise BackendCompilerFailed(failing, RuntimeError("none"), None)

        module._compiled_call_impl = call

    assert train("plain").code == 0
    monkeypatch.setattr(torch.nn.Module, "compile", failing)
    result = train("compiled", "--compile")
    assert result.code == 0
    assert "torch.compile failed" in result.stderr
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))


def test_precedence_defaults_preset_config_flags(train, cli, tmp_path):
    assert train("run", "--set", "optimizer.lr=1e-4", "--seed", 5).code == 0
    ways = ("--precision", "fp32")  # a new run computes as its machine likes, and the fixture in float32
    again = ("train", "--config", tmp_path / "run", "--dry-run", "--json", "--out", tmp_path / "x", *ways)
    plain = json.loads(cli(*again).stdout)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert plain.pop("forecast")["images_per_second"] > 0
    assert plain == stored
    changed = json.loads(cli(*again, "--seed", 6, "--batch", 8, "--set", "batch=2", "--set", "flip=true").stdout)
    assert changed["seed"] == 6
    assert changed["recipe"] == stored["recipe"] | {"batch": 8, "flip": True}
    (tmp_path / "part.json").write_text(json.dumps({"recipe": {"optimizer": {"lr": 0.5}}}))
    part = ("train", "--config", tmp_path / "part.json", "--dry-run", "--json", "--batch", 4, "--out", tmp_path / "x")
    told = json.loads(cli(*part, "--preset", "edm", "--data", stored["data"]["source"]).stdout)["recipe"]
    assert told["optimizer"]["lr"] == 0.5
    assert told["optimizer"]["rule"] == "adam"  # the preset's; the class's own default is another


def test_the_same_config_makes_the_same_weights(train, cli, tmp_path):
    train("a")
    assert (
        cli("train", "--config", tmp_path / "a/config.json", "--out", tmp_path / "b", "--precision", "fp32").code == 0
    )
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    train("c", "--seed", 1)
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_network_is_chosen_by_size(cli, pictures, tmp_path):
    ask = ("train", "--data", pictures, "--preset", "edm", "--out", tmp_path / "x", "--dry-run", "--json", "--batch", 4)
    chosen = json.loads(cli(*ask, "--network", "tiny").stdout)["recipe"]["network"]
    assert chosen == spec.to_dict(configs.tiny(chosen["resolution"], 3, 3))
    changed = cli(*ask, "--network", "tiny", "--set", "network.dropout=0.5")
    assert json.loads(changed.stdout)["recipe"]["network"] == chosen | {"dropout": 0.5}
    cli(*ask, "--network", "tinny").error(2, "tinny", "did you mean tiny?")


def test_a_resolution_no_network_can_halve(cli, pictures, tmp_path):
    ask = ("train", "--data", pictures, "--resolution", 7, "--out", tmp_path / "x", "--dry-run", "--preset", "edm")
    cli(*ask).error(2, "7x7", "cannot be halved", "--resolution")
    cli(*ask, "--network", "adm-lsun256").error(2, "resolution 7", "--network adm-lsun256", "--resolution")


def test_a_network_is_fitted_to_its_method(cli, pictures, tmp_path):
    """A named size is the body; a second time, an augmentation vector and dropout are the method's."""
    ask = ("train", "--data", pictures, "--out", tmp_path / "x", "--dry-run", "--json", "--batch", 8)
    ask = (*ask, "--network", "tiny", "--preset")
    base = spec.to_dict(configs.tiny(8, 3, 3))
    for preset, changes in {
        "meanflow": {"two_times": True},
        "meanflow-cifar10": {"two_times": True, "augment_dim": 9, "dropout": 0.2},
        "ict-imagenet64": {"dropout": 0.2},
        "edm-lsun256": {"dropout": 0.1},  # whose own network makes no 8x8 images
    }.items():
        assert json.loads(cli(*ask, preset).stdout)["recipe"]["network"] == base | changes


def test_a_student_has_its_teachers_network(train, cli, pictures, tmp_path):
    assert train("teacher").code == 0
    ask = ("distill", "--teacher", tmp_path / "teacher", "--data", pictures, "--preset", "cd", "--out", tmp_path / "x")
    ask = (*ask, "--batch", 4)
    cli(*ask, "--dry-run", "--network", "tiny").error(2, "has a network already", "init_from_teacher=false")
    cli(*ask, "--dry-run", "--set", "network.channels=16").error(2, "another network", "--set network")
    assert cli(*ask, "--dry-run", "--set", "network.dropout=0.1").code == 0
    fresh = cli(*ask, "--dry-run", "--json", "--network", "tiny", "--set", "init_from_teacher=false")
    assert json.loads(fresh.stdout)["recipe"]["network"]["channels"] == configs.tiny().channels


def test_a_student_may_start_from_another_model_than_its_teacher(train, cli, pictures, tmp_path):
    """And then has the network of that one."""
    assert train("teacher").code == 0
    assert train("other", "--set", "network.channels=12", preset="ct").code == 0
    ask = ("distill", "--teacher", tmp_path / "teacher", "--data", pictures, "--preset", "cd", "--out", tmp_path / "x")
    more = ("--init", tmp_path / "other", "--batch", 4, "--iterations", 1, "--sample-every", 0)
    assert cli(*ask, *more).code == 0
    assert checkpoint.header(tmp_path / "x")["network"]["channels"] == 12


def test_train_and_distill_do_not_do_each_others_work(train, cli, tmp_path):
    assert train("teacher").code == 0
    again = ("--config", tmp_path / "teacher", "--out", tmp_path / "x", "--dry-run")
    cli("distill", *again).error(2, "follows no teacher", "cmtool train")
    cli("train", *again, "--teacher", tmp_path / "teacher").error(2, "--teacher", "cmtool distill --teacher")
    cli("train", *again, "--guidance", 2).error(2, "--guidance", "cmtool distill --teacher")


def test_duration_is_in_images(train, cli, pictures, tmp_path):
    ask = ("train", "--data", pictures, "--preset", "edm", "--out", tmp_path / "x", "--dry-run", "--json", "--batch", 7)
    assert json.loads(cli(*ask, "--duration", "0.1k").stdout)["recipe"]["iterations"] == 15
    cli(*ask, "--duration", "1k", "--iterations", "3").error(2, "--iterations and --duration")


def test_an_existing_folder_is_refused(train, tmp_path):
    assert train("run").code == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    train("run", iterations=2).error(2, "not empty", "--resume", "--overwrite")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert train("run", "--overwrite", iterations=2).code == 0
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 2
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints"))[-1] == "step_0000002.pt"
    (tmp_path / "file").touch()
    train("file/run").error(2, "--out", "is a file")
    train("file/run", "--dry-run").error(2, "--out", "is a file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    train("mine", "--overwrite").error(2, "no run")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


class Killed(BaseException):
    """Not even `except Exception` sees it."""


def interrupt(monkeypatch, step: int, number: int | None) -> None:
    """At `step`, get the signal; or, without a number, die at once."""
    run = Trainer.run

    def stopping(self):
        for report in run(self):
            if report.step == step:
                if number is None:
                    raise Killed
                signal.raise_signal(number)
            yield report

    monkeypatch.setattr(Trainer, "run", stopping)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(train, cli, tmp_path, number, code):
    before = signal.getsignal(number)
    train("whole", iterations=6)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3, number)
        stopped = train("parts", iterations=6)
    assert stopped.code == code
    assert "stopped at step 3 of 6" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert signal.getsignal(number) == before
    assert checkpoint.load(tmp_path / "parts").card.iterations == 3

    result = cli("train", "--resume", tmp_path / "parts", "--precision", "fp32")
    assert result.code == 0, result.stderr
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    last, other = metrics(tmp_path / "parts")[-1], metrics(tmp_path / "whole")[-1]
    assert (last["step"], last["lr"], last["grad_norm"]) == (6, other["lr"], other["grad_norm"])


def test_a_killed_run_goes_on_from_its_last_checkpoint(train, tmp_path):
    train("whole", iterations=6)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 5, None)
        with pytest.raises(Killed):
            train("parts", "--save-every", 2, iterations=6)
    result = train("parts", "--resume", tmp_path / "parts", iterations=6)  # the same command line, with --resume
    assert "from step 4" in result.stderr
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_finished_run_has_nothing_left(train, tmp_path):
    train("run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    result = train("run", "--resume", tmp_path / "run")
    assert result.code == 0
    assert "nothing left to do" in result.stderr
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_continued_run_stays_the_same_run(train, cli, pictures, tmp_path):
    train("run")
    train("run", "--resume", tmp_path / "run", "--lr", "1").error(2, "optimizer.lr", "1.0")
    train("run", "--resume", tmp_path / "run", iterations=9).error(
        2, "iterations = 4, not 9", f"--init {tmp_path / 'run'}"
    )
    train("run", "--resume", tmp_path / "run", "--seed", 3).error(2, "seed = 0, not 3")
    train("run", "--resume", tmp_path / "run", preset="ct").error(2, "--preset ct contradicts")
    np.savez(pictures.parent / "other.npz", images=Pictures(seed=1).images.permute(0, 2, 3, 1).numpy())
    cli("train", "--resume", tmp_path / "run", "--data", pictures.parent / "other.npz").error(1, "no labels")


def test_resuming_nothing(train, cli, tmp_path):
    cli("train", "--resume", tmp_path / "none").error(2, "no run", "none")
    assert train("fresh", "--resume", tmp_path / "fresh").code == 0  # a job that is always started with --resume
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    train("mine", "--resume", tmp_path / "mine").error(1, "no", "config.json")


# --- divergence ------------------------------------------------------------------------------------------------------


def hashes(run) -> dict[str, str]:
    """Of all that a run leaves but its metrics."""
    files = (file for file in run.rglob("*") if file.is_file() and file.name != "metrics.jsonl")
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def kept(monkeypatch) -> list[dict[str, str]]:
    """The hashes of a run's files after each of its checkpoints."""
    save, seen = RunFolder.save, []

    def saving(self, trainer, **how):
        save(self, trainer, **how)
        seen.append(hashes(self.path))

    monkeypatch.setattr(RunFolder, "save", saving)
    return seen


def strict(text: str) -> dict:
    """A line of JSON, in which NaN is no number."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("preset", "term"),
    [("edm", "denoising loss"), ("ct", "consistency loss"), ("meanflow", r"(denoising|tangent) loss of part \d")],
)
def test_a_diverging_run_names_step_term_and_checkpoint_and_overwrites_nothing(train, tmp_path, kept, preset, term):
    # A decay of 101 at a rate of 1 multiplies every weight by -100, step by step.
    grows = ["rule=adamw", "weight_decay=101", "warmup=0", "final=1"]
    rising = ("--lr", "1", *(word for setting in grows for word in ("--set", f"optimizer.{setting}")))
    often = ("--save-every", 2, "--log-every", 1, "--sample-every", 0)
    result = train("run", "-q", *rising, *often, preset=preset, iterations=60)
    text = result.error(1, "--lr", "--overwrite", "--precision fp32")
    told = re.search(rf"at step (\d+) the ({term}|gradient) was no longer .*; the checkpoint of step (\d+) is", text)
    assert told, text
    step, last = int(told[1]), int(told[told.lastindex])
    assert last == 2 * ((step - 1) // 2) == 2 * len(kept) > 0
    run = tmp_path / "run"
    assert hashes(run) == kept[-1]
    assert checkpoint.load(run).card.iterations == last
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:step]] == list(range(1, step + 1))
    assert all(line["loss"] is not None for line in lines[: step - 1])
    assert None in (lines[step - 1]["loss"], lines[step - 1]["grad_norm"])

    again = train("run", "-q", *rising, *often, "--resume", tmp_path / "run", preset=preset, iterations=60)
    assert again.error(1) == text
    assert hashes(run) == kept[-1]


def test_divergence_before_the_first_checkpoint(train, tmp_path):
    train("run", "--lr", "1e30", "-q", iterations=40).error(1, "no checkpoint was made", "--overwrite")
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- going on, for every method with something to remember -----------------------------------------------------------


def state(run) -> dict:
    """The newest training state."""
    return torch.load(max((run / "checkpoints").glob("*.pt")), weights_only=True)


def identical(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


@pytest.fixture
def models(tmp_path):
    """A teacher and a first stage, with weights large enough to matter."""
    config = micro(num_classes=3, label_dropout=0.1)
    for name, role in (("edm", "denoiser"), ("first", "consistency")):
        checkpoint.save(model(role, config, class_names=("0", "1", "2")), tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "stops"),
    [
        # The stages of 8, 4, 2 and 1 steps begin after steps 1, 2 and 4.
        (["distill", "--preset", "pd", "--teacher", "edm", "--guidance", "2"], [1, 2, 3, 4, 5]),
        (["distill", "--preset", "meanflow", "--teacher", "edm"], [3]),
        (["distill", "--preset", "cd", "--teacher", "edm", "--set", "objective.target=moving_average"], [3]),
        (["train", "--preset", "tcm", "--init", "first"], [3]),
        (["train", "--preset", "meanflow", "--network", "tiny"], [3]),
        (["train", "--preset", "shortcut", "--network", "tiny"], [3]),
        (["train", "--preset", "sct", "--network", "tiny"], [3]),  # with a learned weight
        (["train", "--preset", "ct", "--network", "tiny", "--set", "network.dropout=0.5"], [3]),
        (["train", "--preset", "edm", "--network", "tiny", "--set", "augment=augment"], [3]),
        (["train", "--preset", "edm", "--network", "tiny", "--set", "averages.1=power"], [3]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value[0], str) else "",
)
def test_whatever_a_method_remembers_it_goes_on_with(cli, pictures, models, argv, stops):
    files = {"edm": models / "edm.safetensors", "first": models / "first.safetensors"}
    argv = [
        files.get(word, word) if before in ("--teacher", "--init") else word for before, word in pairwise(["", *argv])
    ]
    shared = ("--data", pictures, "--batch", 8, "--iterations", 6, "--sample-every", 0, "--precision", "fp32")
    rates = ("--set", "optimizer.warmup=0")  # large steps, so that a difference shows
    assert cli(*argv, *shared, *rates, "--log-every", 1, "--out", models / "whole").code == 0
    resume: tuple = ()
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, stop, signal.SIGTERM)
            stopped = cli(*argv, *shared, *rates, "--log-every", 1, "--out", models / "parts", *resume)
        assert stopped.code == 75, stopped.stderr
        resume = ("--resume", models / "parts")
    result = cli(argv[0], "--resume", models / "parts", "--precision", "fp32", "--log-every", 1)
    assert result.code == 0, result.stderr
    assert same(weights(models / "whole"), weights(models / "parts"))
    assert identical(state(models / "whole"), state(models / "parts"))
    one, other = (
        [{**line, "images_per_second": 0, "seconds_left": 0} for line in metrics(models / name)]
        for name in ("whole", "parts")
    )
    assert one == other


@pytest.fixture
def rows(tmp_path):
    """Twenty pictures of 8x8 in a table of two files."""
    datasets = pytest.importorskip("datasets")
    made = Pictures(classes=3)
    cells = [{"bytes": encode(image.numpy()), "path": None} for image in made.images[:20]]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    table = datasets.Dataset.from_dict({"image": cells, "label": made.labels[:20].tolist()}, kinds)
    (tmp_path / "rows").mkdir()
    for part in range(2):
        table.shard(2, part, contiguous=True).to_parquet(tmp_path / "rows" / f"{part}.parquet")
    return tmp_path / "rows"


def test_a_stream_goes_on_where_it_was(cli, rows, tmp_path, monkeypatch):
    """Data that is stored nowhere, in blocks that end in the middle of batches."""
    monkeypatch.setattr(streamed, "ROWS", 7)
    ask = ("train", "--data", rows, "--stream", "--preset", "edm", "--iterations", 12, *TINY, "--save-every", 1)
    whole = cli(*ask, "--out", tmp_path / "whole", "--judge-every", 6)
    assert whole.code == 0, whole.stderr
    assert "images as they arrive, 8x8 RGB; 3 classes" in whole.stderr
    assert cli("info", tmp_path / "whole", "--json").code == 0
    for stop in (1, 4, 7):
        run = tmp_path / f"part-{stop}"
        assert cli(*ask, "--out", run, "--stop-after", stop).code == training.STOPPED
        assert cli("train", "--resume", run).code == 0
        assert same(weights(run), weights(tmp_path / "whole"))
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["data"]["stream"] is True


def test_streams_that_cannot_be(cli, rows, pictures, tmp_path):
    ask = ("train", "--preset", "edm", "--stream", "--out", tmp_path / "x", *TINY)
    cli(*ask, "--data", pictures).error(1, "only tables are streamed")
    cli(*ask, "--data", rows, "--workers", 2).error(2, "--workers")
    cli(*ask, "--data", rows, "--resolution", 16).error(1, "too small for 16x16", "--upscale")
    assert not (tmp_path / "x").exists()
    result = cli(*ask, "--data", rows, "--dry-run", "--json")
    assert json.loads(result.stdout)["data"]["stream"] is True


def test_augmentation_is_told_to_the_network(train, cli, tmp_path):
    assert train("run", "--set", "augment=augment").code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["augment"]["kind"] == "augment"
    assert config["recipe"]["network"]["augment_dim"] == 9
    again = cli(
        "train", "--config", tmp_path / "run", "--out", tmp_path / "x", *("--dry-run", "--json", "--precision", "fp32")
    )
    told = json.loads(again.stdout)
    assert told.pop("forecast")
    assert told == config
    made = cli("sample", "--model", tmp_path / "run", "--out", tmp_path / "x.png", "--solver", "heun", "--steps", 2)
    assert made.code == 0, made.stderr  # which is told nothing
    train("y", "--set", "augment=augment", "--set", "network.augment_dim=4").error(2, "augment_dim=9")


def test_several_averages_are_kept(train, cli, tmp_path):
    assert train("run", "--set", "averages.1=power", "--set", "averages.1.sigma_rel=0.2").code == 0
    told = json.loads(cli("average", tmp_path / "run", "--json").stdout)["averages"]
    assert [(entry["name"], entry["steps"]) for entry in told] == [("half-life-20000", [4]), ("power-0.2", [4])]
    assert json.loads(cli("info", tmp_path / "run", "--json").stdout)["average"] == "half-life-20000"
    ask = ("average", tmp_path / "run", "--name", "power-0.2", "--out", tmp_path / "p.safetensors")
    assert cli(*ask).code == 0
    assert checkpoint.load(tmp_path / "p.safetensors").card.average == "power-0.2"
    assert not same(weights(tmp_path / "p.safetensors"), weights(tmp_path / "run"))
    train("x", "--set", "averages.2=power").error(2, "averages.2")
    train("x", "--set", "averages.1=half_life", "--set", "averages.1.images=20000").error(2, "same name")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["train", "--preset", "emd"], 2, ["emd", "did you mean edm"]),
        (["distill"], 2, ["follows a teacher", "--teacher"]),
        (["train", "--preset", "cd"], 2, ["follows a teacher", "cmtool distill"]),
        (["distill", "--preset", "cd"], 2, ["follows a teacher", "--teacher"]),
        (["distill", "--preset", "ct", "--teacher", "TEACHER"], 2, ["would ignore --teacher", "cmtool train"]),
        (["distill", "--preset", "edm", "--teacher", "TEACHER"], 2, ["would ignore --teacher"]),
        (["train", "--preset", "ct", "--lpips-backbone", "x"], 2, ["would ignore --lpips-backbone"]),
        (["distill", "--preset", "cd", "--teacher", "STUDENT"], 1, ["is a consistency model", "denoiser"]),
        (["distill", "--preset", "cd", "--teacher", "nowhere"], 1, ["no model", "nowhere"]),
        (
            ["distill", "--preset", "cd", "--teacher", "TEACHER", "--resolution", "4"],
            1,
            ["8x8", "4x4", "--resolution 8"],
        ),
        (["train", "--preset", "edm", "--set", "preset=ct"], 2, ["--set preset=ct", "--preset ct"]),
        (["train", "--preset", "edm", "--set", "network=mlp"], 2, ["takes 1x1 images with 2", "8x8 with 3"]),
        (["train", "--preset", "edm", "--set", "network.out_channels=1"], 2, ["and makes 1", "--set network"]),
        (["train", "--preset", "ct", "--init", "TEACHER", "--resolution", "4"], 2, ["8x8", "4x4", "--resolution 8"]),
        (["train", "--preset", "edm", "--batch", "25"], 1, ["24 images", "--batch"]),
        (["train", "--preset", "edm", "--lr", "0"], 2, ["--lr"]),
        (["train", "--preset", "edm", "--lr", "nan"], 2, ["--lr"]),
        (["train", "--preset", "edm", "--iterations", "some"], 2, ["--iterations some"]),
        (["train", "--preset", "edm", "--iterations", "0"], 2, ["--iterations 0"]),
        (["train", "--preset", "edm", "--set", "batch"], 2, ["NAME=VALUE"]),
        (["train", "--preset", "edm", "--set", "batch=many"], 2, ["batch", "many"]),
        (["train", "--preset", "edm", "--set", "network.chanels=8"], 2, ["did you mean channels"]),
        (["train", "--preset", "edm", "--config", "nowhere"], 1, ["--config nowhere: there is no such run"]),
        (["train", "--preset", "edm", "--config", "."], 1, ["no config.json"]),
        (["train", "--preset", "tcm"], 2, ["second stage", "--init"]),
        (["train", "--preset", "tcm", "--init", "TEACHER"], 1, ["a denoiser", "consistency model is needed"]),
        (["distill", "--preset", "cd", "--teacher", "TEACHER", "--guidance", "2"], 2, ["dropped", "label_dropout"]),
        (["distill", "--preset", "cd", "--teacher", "TEACHER", "--guidance", "-1"], 2, ["--guidance -1"]),
        (["train", "--preset", "edm", "--network", "adm-imagenet64", "--set", "augment=augment"], 2, ["kind adm"]),
        (["train", "--preset", "edm", "--config", "STUDENT"], 1, ["JSON"]),
        (["train", "--preset", "edm", "--init", "TEACHER", "--set", "network.channels=16"], 2, ["do not fit"]),
        (["train", "--preset", "edm", "--resume", "x", "--overwrite"], 2, ["do not go together"]),
        (["train", "--preset", "edm", "--device", "cuda:77"], 2, ["cuda:77"]),
    ],
)
def test_mistakes(cli, folder, pictures, tmp_path, argv, code, words):
    models = {name.upper(): folder / f"{name}.safetensors" for name in ("teacher", "student")}
    more = () if "--batch" in argv else ("--batch", 4)
    result = cli(*(models.get(arg, arg) for arg in argv), "--data", pictures, "--out", tmp_path / "run", *more)
    result.error(code, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", ["nowhere", "found: no such file"]),
        ("empty", ["empty"]),
        ("mixed", ["--resolution"]),
    ],
)
def test_data_that_cannot_be_used(cli, tmp_path, source, words):
    from PIL import Image

    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(tmp_path / "mixed" / f"{side}.png")
    ask = ("train", "--preset", "edm", "--out", tmp_path / "run", "--data", tmp_path / source)
    cli(*ask, "--batch", 1).error(1, *words)
    assert not (tmp_path / "run").exists()


def test_data_is_required(cli, tmp_path):
    cli("train", "--preset", "edm", "--out", tmp_path / "run").error(2, "--data")


def test_training_works_outside_the_main_thread(train):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train("run", iterations=1).code))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_second_interrupt_is_immediate():
    with training._stop_signal() as stopped:
        assert stopped() == 0
        signal.raise_signal(signal.SIGINT)
        assert stopped() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
