"""Run folders: what may be overwritten, what is kept, and states that cannot be read."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from cmtool.errors import CheckpointError, UsageError
from cmtool.io import checkpoint
from cmtool.io.files import locked
from cmtool.io.run import RunFolder, read_config
from cmtool.training.average import Exponential, Power
from cmtool.training.recipe import Optimizer
from tests.unit.test_trainer import CT_RECIPE, EDM_RECIPE, assert_same, run, trainer

CONFIG = {"recipe": {"preset": "edm"}, "data": {"source": "digits"}}


def snapshot(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_folder_gets_its_config(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    folder.prepare(CONFIG)
    assert folder.config() == CONFIG
    assert read_config(folder.path) == read_config(folder.config_file) == CONFIG


def test_an_empty_folder_will_do(tmp_path):
    RunFolder(tmp_path).prepare(CONFIG)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("content", ["config.json", "photo.png"])
def test_a_folder_in_use_is_refused_and_untouched(tmp_path, content):
    (tmp_path / content).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="not empty") as caught:
        RunFolder(tmp_path).prepare(CONFIG)
    assert "--resume" in caught.value.hint
    assert "--overwrite" in caught.value.hint
    assert snapshot(tmp_path) == before


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare(CONFIG)
    for name in (
        "model.safetensors",
        "metrics.jsonl",
        "averages/power-0.1/step_0000001.safetensors",
        "checkpoints/step_0000001.pt",
        "samples/0000001.png",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    folder.prepare({"recipe": {"preset": "ct"}}, overwrite=True)
    assert snapshot(tmp_path).keys() == {"config.json", "notes.txt"}
    assert folder.config() == {"recipe": {"preset": "ct"}}


def test_overwriting_replaces_runs_only(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no run"):
        RunFolder(tmp_path).prepare(CONFIG, overwrite=True)
    assert snapshot(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a file"):
            RunFolder(tmp_path / "x").prepare(CONFIG, overwrite=overwrite)
    with pytest.raises(UsageError, match="cannot write"):
        RunFolder(tmp_path / "x" / "y").prepare(CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"data": {}}', "\xff"])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RunFolder(tmp_path).config()


def test_a_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match="there is no"):
        RunFolder(tmp_path).config()


def test_the_log_is_one_object_a_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare(CONFIG)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    for line in lines:
        folder.log(line)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines


def test_rewinding_drops_what_will_be_written_again(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare(CONFIG)
    folder.rewind(3)  # nothing there yet
    for step in range(1, 6):
        folder.log({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # stopped in the middle of a line
    folder.rewind(3)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    folder.log({"step": 4})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[-1] == '{"step": 4}'


def test_a_run_goes_on_from_its_folder(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare(CONFIG)
    assert folder.latest() == (None, ())
    first = trainer(CT_RECIPE)
    for _ in first.run():
        folder.save(first)
        if first.step == 4:
            break
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_0000003.pt", "step_0000004.pt"]
    second = trainer(CT_RECIPE)
    second.load_state_dict(folder.latest().state)
    assert_same(first, second)
    straight = trainer(CT_RECIPE)
    run(straight)
    run(second)
    assert_same(straight, second)
    exported = checkpoint.load(tmp_path)
    assert exported.card == first.average.card
    for name, value in first.average.network.state_dict().items():
        assert torch.equal(exported.network.state_dict()[name], value)


def test_a_damaged_state_is_named_wherever_it_is_cut(tmp_path):
    folder = RunFolder(tmp_path)
    made = trainer(EDM_RECIPE)
    run(made, 1)
    folder.save(made)
    (file,) = (tmp_path / "checkpoints").iterdir()
    raw = file.read_bytes()
    for cut in (0, 1, 10, 100, 1000, len(raw) // 3, len(raw) // 2, len(raw) - 100, len(raw) - 1):
        file.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError, match=file.name):
            folder.latest()
    for position in (0, 2, 30, 60, 200, len(raw) - 30):
        file.write_bytes(raw[:position] + b"\xff" * 20 + raw[position + 20 :])
        with suppress(CheckpointError):  # not every byte matters
            folder.latest()


def test_a_changed_number_is_seen_and_the_state_before_is_taken(tmp_path):
    folder = RunFolder(tmp_path, keep=3)
    folder.prepare(CONFIG)
    made = trainer(EDM_RECIPE)
    for _ in range(3):
        run(made, 1)
        folder.save(made)
    for newest, number in ((3, 2), (2, 1)):
        file = tmp_path / "checkpoints" / f"step_000000{newest}.pt"
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1  # a weight: nothing but a checksum tells
        file.write_bytes(raw)
        state, damaged = folder.latest()
        assert state is not None
        assert (state["step"], damaged) == (number, (file,))
        folder.put_aside(damaged)
        assert folder.saved() == number
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step_0000001.pt",
        "step_0000002.damaged",
        "step_0000003.damaged",
    ]


@pytest.mark.parametrize("keep", [1, 2, 4, 5, 9])
def test_as_many_states_stay_as_asked_for(tmp_path, keep):
    folder = RunFolder(tmp_path, keep=keep)
    made = trainer(EDM_RECIPE)
    for step in range(1, 7):
        run(made, 1)
        folder.save(made)
        kept = [f"step_{number:07d}.pt" for number in range(max(1, step - keep + 1), step + 1)]
        assert sorted(os.listdir(tmp_path / "checkpoints")) == kept


def test_one_writer_a_folder(tmp_path):
    path = tmp_path / "run"
    with (
        RunFolder(path).writing(),
        pytest.raises(UsageError, match="another process writes to"),
        RunFolder(path).writing(),
    ):
        pytest.fail("two at once")
    assert not path.exists()  # nothing was made of it
    with RunFolder(path).writing():
        RunFolder(path).prepare(CONFIG)
    assert os.listdir(path) == ["config.json"]


def test_a_writer_removes_what_killed_ones_left(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare(CONFIG)
    for name in (".config.json.x.part", "checkpoints/.step_0000001.pt.y.part", "mine.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with folder.writing():
        assert sorted(path.name for path in tmp_path.rglob("*.part")) == ["mine.part"]


@pytest.fixture
def begun(tmp_path):
    """A folder with a checkpoint, and its trainer a step later."""
    folder, made = RunFolder(tmp_path / "run"), trainer(EDM_RECIPE)
    folder.prepare(CONFIG)
    saved(folder, made, 1)
    run(made, 1)
    return folder, made


def test_a_disk_too_small_is_seen_before_anything_is_written(begun, monkeypatch):
    folder, made = begun
    before = snapshot(folder.path)
    usage = shutil.disk_usage(folder.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs . MiB and .* has 0 MiB left"):
        folder.save(made)
    assert snapshot(folder.path) == before


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoints/step_0000001.pt"])
def test_a_disk_that_fills_up_keeps_what_was_there(begun, file):
    """A limit on the size of files, which no check of ours foresees, stands in for the disk."""
    folder, made = begun
    most = (folder.path / file).stat().st_size // 2
    before = snapshot(folder.path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write.*File too large"):
            folder.save(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    if file != checkpoint.MODEL_FILE:
        folder.rewind(1)  # averages that were done in time: a continued run makes them again
    after = snapshot(folder.path)
    if file != checkpoint.MODEL_FILE:  # which is complete, and the next step's
        assert checkpoint.load(folder.path).card.iterations == 2
        before[checkpoint.MODEL_FILE] = after[checkpoint.MODEL_FILE]
    assert after == before
    assert folder.latest().state is not None


def test_a_vanished_folder_is_not_made_anew(begun):
    folder, made = begun
    shutil.rmtree(folder.path)
    with pytest.raises(CheckpointError, match="vanished"):
        folder.save(made)
    with pytest.raises(CheckpointError, match="cannot write"):
        folder.log({"step": 1})
    assert not folder.path.exists()


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    made = trainer(EDM_RECIPE)
    run(made, 1)
    folder.save(made)
    before = snapshot(tmp_path / "checkpoints")
    run(made, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.save(made)
    assert snapshot(tmp_path / "checkpoints") == before


# Several averages.

POWERS = replace(EDM_RECIPE, averages=(Exponential(0.5), Power(0.05), Power(0.2)), optimizer=Optimizer(lr=0.05))


def stored(folder: RunFolder) -> dict[str, list[int]]:
    return {name: list(files) for name, files in folder.averages().items()}


def saved(folder: RunFolder, made, steps: int) -> None:
    for _ in range(steps):
        run(made, 1)
        folder.save(made)


def test_one_average_is_the_model_and_is_not_written_twice(tmp_path):
    folder = RunFolder(tmp_path)
    saved(folder, trainer(replace(EDM_RECIPE, averages=(Power(0.1),))), 1)
    assert set(os.listdir(tmp_path)) == {"checkpoints", "model.safetensors"}
    assert folder.averages() == {}


def test_every_average_is_a_model_file_of_its_own(tmp_path):
    folder = RunFolder(tmp_path)
    made = trainer(POWERS)
    expected = {}
    for step in range(1, 4):
        saved(folder, made, 1)
        for name, (_, model) in made.averages.items():
            expected[name, step] = {key: value.clone() for key, value in model.network.state_dict().items()}
    # all of those that others can be made of, the newest of the others
    assert stored(folder) == {"exponential-0.5": [3], "power-0.05": [1, 2, 3], "power-0.2": [1, 2, 3]}
    names = {str(file.relative_to(tmp_path)) for files in folder.averages().values() for file in files.values()}
    assert "averages/power-0.05/step_0000002.safetensors" in names
    for name, files in folder.averages().items():
        for step, file in files.items():
            model = checkpoint.load(file)
            assert model.card == replace(made.average.card, average=name, iterations=step)
            half = name.startswith("power")
            assert checkpoint.header(file)["dtypes"] == (["F16"] if half else ["F32"])
            for key, value in expected[name, step].items():
                torch.testing.assert_close(
                    model.network.state_dict()[key], value, rtol=2**-11 if half else 0, atol=1e-7 if half else 0
                )
    # they are different weights, and the model is the first
    loaded = [checkpoint.load(files[3]).network.state_dict() for files in folder.averages().values()]
    for one, other in itertools.pairwise(loaded):
        assert any((one[key] - other[key]).abs().max() > 1e-3 for key in one)
    for key, value in checkpoint.load(tmp_path).network.state_dict().items():
        assert torch.equal(value, loaded[0][key])
    assert checkpoint.load(tmp_path).card.average == "exponential-0.5"


def test_weights_that_half_precision_cannot_hold_are_kept_as_they_are(tmp_path):
    folder = RunFolder(tmp_path)
    made = trainer(POWERS)
    run(made, 1)
    _, large = made.averages["power-0.2"]
    next(large.parameters()).view(-1)[0] = 1e5
    folder.save(made)
    files = {name: file for name, made in folder.averages().items() for file in made.values()}
    assert checkpoint.header(files["power-0.2"])["dtypes"] == ["F32"]
    assert checkpoint.header(files["power-0.05"])["dtypes"] == ["F16"]
    assert next(checkpoint.load(files["power-0.2"]).parameters()).view(-1)[0] == 1e5


def test_rewinding_drops_averages_that_will_be_made_again(tmp_path):
    folder = RunFolder(tmp_path)
    saved(folder, trainer(POWERS), 4)
    (tmp_path / "averages" / "power-0.05" / "notes.txt").write_text("mine")
    folder.rewind(2)
    assert stored(folder) == {"power-0.05": [1, 2], "power-0.2": [1, 2]}
    assert (tmp_path / "averages" / "power-0.05" / "notes.txt").exists()
    folder.rewind(0)
    assert folder.averages() == {}


def test_a_continued_run_leaves_the_same_averages(tmp_path):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    saved(whole, trainer(POWERS), 5)
    first = trainer(POWERS)
    saved(parts, first, 3)
    run(first, 1)
    second = trainer(POWERS)
    second.load_state_dict(parts.latest().state)
    parts.rewind(second.step)
    saved(parts, second, 2)
    assert stored(parts) == stored(whole)
    for name, files in whole.averages().items():
        for step, file in files.items():
            one, other = checkpoint.load(file), checkpoint.load(parts.averages()[name][step])
            assert one.card == other.card
            for key, value in one.network.state_dict().items():
                assert torch.equal(other.network.state_dict()[key], value)


def test_a_failed_save_keeps_the_averages_that_were_there(tmp_path, monkeypatch):
    """A run stopped here continues from step 2: what it had then must still be there."""
    folder = RunFolder(tmp_path)
    made = trainer(POWERS)
    saved(folder, made, 2)
    before = snapshot(tmp_path / "averages")
    run(made, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.save(made)
    folder.rewind(folder.saved())
    assert snapshot(tmp_path / "averages") == before


def test_a_series_begins_anew_with_a_stage(tmp_path):
    """Averages are restarted where a student becomes the teacher; older snapshots are averages of something else."""
    folder = RunFolder(tmp_path)
    made = trainer(POWERS)
    made.objective.stage = lambda progress: (int(progress >= 0.5), progress)  # from the fourth step of six
    saved(folder, made, 3)
    assert stored(folder)["power-0.2"] == [1, 2, 3]
    saved(folder, made, 2)
    assert stored(folder) == {"exponential-0.5": [5], "power-0.05": [4, 5], "power-0.2": [4, 5]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """A process that decodes images may outlive one that was killed."""
    (begun, begin), (wait, leave) = os.pipe(), os.pipe()
    with locked(tmp_path / "run"):
        child = os.fork()
        if not child:
            os.close(leave)
            os.write(begin, b"x")
            os.read(wait, 1)  # until the parent closes its end
            os._exit(0)
        os.read(begun, 1)
    try:
        with locked(tmp_path / "run"):
            pass
    finally:
        os.close(leave)
        os.waitpid(child, 0)
        for end in (begun, begin, wait):
            os.close(end)
