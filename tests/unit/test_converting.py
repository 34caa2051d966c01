"""Conversions: exact where a format holds the same numbers, close where another program computes, refused else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import cmtool
from cmtool.errors import CheckpointError, ConfigError, UsageError
from cmtool.flow import EDM, VE, VP, BoundaryEDM, Epsilon, Linear, LogRatio, Velocity
from cmtool.io import checkpoint, checks, converting
from cmtool.io.exporters import onnx, openai
from cmtool.networks import ADMConfig, DDPMppConfig, MLPConfig
from tests import models

ADM = ADMConfig(
    resolution=8,
    channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=16,
    num_classes=3,
)
TOLD = LogRatio(250.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A consistency model as OpenAI's, in cmtool's own file."""
    file = tmp_path_factory.mktemp("models") / "student.safetensors"
    made = models.model(config=ADM, parameterization=BoundaryEDM(time_input=TOLD), licence="MIT", grid_points=5)
    checkpoint.save(made, file)
    return file


def same_weights(one, other) -> bool:
    one, other = one.network.state_dict(), other.network.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_round_trip_through_openai_and_diffusers_is_exact(student, tmp_path):
    """cmtool -> openai -> cmtool -> diffusers -> cmtool -> openai: not a bit is lost."""
    first = cmtool.convert(student, tmp_path / "cd_8x8.pt")
    assert (first.format, first.difference) == ("openai", 0)
    settings = [("network.head_channels", "16"), ("card.licence", "MIT"), ("card.grid_points", "5")]  # not in the file
    cmtool.convert(tmp_path / "cd_8x8.pt", tmp_path / "b.safetensors", settings=settings)
    assert cmtool.convert(tmp_path / "b.safetensors", tmp_path / "c").format == "diffusers"
    cmtool.convert(tmp_path / "c", tmp_path / "d.safetensors")
    last = cmtool.convert(tmp_path / "d.safetensors", tmp_path / "cd_again_8x8.pt")
    assert last.difference == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("cd_8x8.pt", "cd_again_8x8.pt"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    origin, back = cmtool.load(student), cmtool.load(tmp_path / "d.safetensors")
    assert same_weights(origin, back)
    assert back.network.config == origin.network.config
    assert (back.path, back.parameterization) == (origin.path, origin.parameterization)
    assert (back.card.num_classes, back.card.grid_points, back.card.licence) == (3, 5, "MIT")


def test_a_run_or_file_of_ours_is_copied_with_its_card(student, tmp_path):
    done = cmtool.convert(student, tmp_path / "copy.safetensors")
    assert (done.format, done.difference, done.notes) == ("cmtool", 0, ())
    origin, copy = cmtool.load(student), cmtool.load(tmp_path / "copy.safetensors")
    assert same_weights(origin, copy)
    assert copy.card == origin.card


@pytest.mark.parametrize(
    ("config", "role", "path", "form"),
    [
        (models.micro(num_classes=3), "consistency", VE(), BoundaryEDM()),
        (MLPConfig(two_times=True), "flow_map", Linear(), Velocity()),
    ],
    ids=["ddpmpp", "two times"],
)
def test_onnx_is_the_same_map_for_any_batch(config, role, path, form, tmp_path):
    pytest.importorskip("onnxruntime")
    made = models.model(role, config, path, form, licence="MIT", times={"2": (80.0, 0.5)})
    checkpoint.save(made, tmp_path / "m.safetensors")
    done = cmtool.convert(tmp_path / "m.safetensors", tmp_path / "m.onnx")
    assert done.format == "onnx"
    assert done.difference <= 1e-5 * done.scale
    for batch in (1, 3):
        x = torch.randn(batch, *made.card.image_shape, generator=torch.Generator().manual_seed(batch))
        t = torch.linspace(path.t_max, path.t_max / 100, batch)
        labels = torch.arange(batch) % 3 if config.num_classes else None
        with torch.no_grad():
            expected = made.jump(x, t, torch.full_like(t, path.t_min), labels)
        torch.testing.assert_close(onnx.run(tmp_path / "m.onnx", x, t, labels), expected, rtol=1e-4, atol=1e-5)
    import onnx as package

    told = {entry.key: entry.value for entry in package.load(str(tmp_path / "m.onnx")).metadata_props}
    assert told["cmtool.role"] == role
    assert float(told["cmtool.t_max"]) == path.t_max
    assert json.loads(told["cmtool.times"]) == {"2": [80.0, 0.5]}
    assert told["cmtool.licence"] == "MIT"


def test_onnx_of_discrete_steps(tmp_path):
    """alpha is 0.006 at the last step of DDPM: a runtime's sigmoid is not exact enough for it."""
    pytest.importorskip("onnxruntime")
    made = models.model("denoiser", MLPConfig(), VP(), Epsilon(time_input=LogRatio()))
    checkpoint.save(made, tmp_path / "m.safetensors")
    done = cmtool.convert(tmp_path / "m.safetensors", tmp_path / "m.onnx")
    assert done.difference <= 2e-5 * done.scale


def test_onnx_knows_labels_only_where_the_model_does(tmp_path):
    """A session is asked by names: those of the documentation."""
    pytest.importorskip("onnxruntime")
    import onnxruntime

    checkpoint.save(models.model(config=MLPConfig(num_classes=2)), tmp_path / "m.safetensors")
    cmtool.convert(tmp_path / "m.safetensors", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["x", "t", "labels"]
    assert [entry.name for entry in session.get_outputs()] == ["image"]
    x, t = np.zeros((2, 2, 1, 1), np.float32), np.full(2, 80, np.float32)
    out = session.run(None, {"x": x, "t": t, "labels": np.array([0, 1])})[0]
    assert out.shape == x.shape
    assert (out[0] != out[1]).any()  # the label matters


# What a format cannot hold.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": models.micro()}, "ddpmpp"),
        ({"config": replace(ADM, two_times=True)}, "two times"),
        ({"config": replace(ADM, group_channels=4)}, "groups"),
        ({"path": VE(), "parameterization": BoundaryEDM()}, "250 ln sigma"),
        ({"path": Linear(), "parameterization": Velocity()}, "linear|Linear"),
        ({"parameterization": EDM(time_input=TOLD)}, "EDM"),
        ({"parameterization": BoundaryEDM(0.7, TOLD)}, "sigma_data"),
    ],
)
def test_openai_cannot_hold_everything(changes, words):
    options = {"config": ADM, "parameterization": BoundaryEDM(time_input=TOLD)} | changes
    with pytest.raises(CheckpointError, match=words):
        openai.check(models.model(**options))


def test_a_network_that_diffusers_does_not_have(tmp_path):
    checkpoint.save(models.model(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="diffusers"):
        cmtool.convert(tmp_path / "m.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


# What can be set right, and places.


def test_a_guess_can_be_set_right(student, tmp_path):
    cmtool.convert(student, tmp_path / "x.pt")
    wrong = cmtool.convert(tmp_path / "x.pt", tmp_path / "a.safetensors", role="consistency", resolution=8)
    assert any("network.head_channels" in note for note in wrong.notes)
    assert not any("resolution" in note for note in wrong.notes)
    right = cmtool.convert(
        tmp_path / "x.pt",
        tmp_path / "b.safetensors",
        role="consistency",
        resolution=8,
        settings=[("network.head_channels", "16"), ("card.licence", "MIT"), ("path.t_max", "60")],
    )
    assert right.notes == ()
    model = cmtool.load(tmp_path / "b.safetensors")
    assert model.network.config == ADM
    assert model.card.resolution == 8
    assert model.card.licence == "MIT"
    assert model.path == VE(0.002, 60.0)


def test_a_part_can_be_exchanged_whole(student, tmp_path):
    cmtool.convert(student, tmp_path / "x.safetensors", settings=[("parameterization", "edm"), ("path", "trig")])
    model = cmtool.load(tmp_path / "x.safetensors")
    assert model.parameterization == EDM()
    assert model.path.kind == "trig"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([("network.chanels", "3")], "channels"),
        ([("weights", "3")], "weights"),
        ([("network.channels", "many")], "many"),
        ([("network.head_channels", "7")], "heads of 7"),
    ],
)
def test_settings_that_do_not_fit(settings, words, student, tmp_path):
    with pytest.raises(ConfigError, match=words):
        cmtool.convert(student, tmp_path / "x.safetensors", settings=settings)
    assert not any(tmp_path.iterdir())


def test_a_resolution_that_the_network_cannot_have(student, tmp_path):
    with pytest.raises(ConfigError, match="--resolution 7"):
        cmtool.convert(student, tmp_path / "x.safetensors", resolution=7)


@pytest.mark.parametrize("name", ["x.ckpt", "x.zip"])
def test_a_name_that_says_no_format(name, student, tmp_path):
    with pytest.raises(UsageError, match="does not say a format"):
        cmtool.convert(student, tmp_path / name)


def test_nothing_is_replaced_unasked(student, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        cmtool.convert(student, target)
    assert target.read_bytes() == b"precious"
    cmtool.convert(student, target, overwrite=True)
    assert cmtool.load(target).card.grid_points == 5
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "keep.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        cmtool.convert(student, folder, "diffusers")
    with pytest.raises(UsageError, match="more than a pipeline"):  # a folder may hold anything: a run, a thesis
        cmtool.convert(student, folder, "diffusers", overwrite=True)
    (folder / "keep.txt").unlink()
    cmtool.convert(student, folder, "diffusers")
    (folder / "README.md").write_text("old")
    cmtool.convert(student, folder, "diffusers", overwrite=True)
    assert (folder / "model_index.json").exists()
    assert (folder / "README.md").read_text() != "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.safetensors"]


def test_a_conversion_that_comes_out_otherwise_leaves_nothing(student, tmp_path, monkeypatch):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"precious")
    real, count = checks.answers, iter(range(9))
    monkeypatch.setattr(checks, "answers", lambda *given: real(*given) + next(count) * 1e-6)
    with pytest.raises(CheckpointError, match="would make other images"):
        cmtool.convert(student, target, overwrite=True)
    assert target.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_place_that_cannot_be_written_to(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="nothing can be written"):
        cmtool.convert(student, tmp_path / "file" / "x.safetensors")


# The questions.


def test_the_questions_are_always_the_same_and_cover_the_path():
    model = models.model(config=DDPMppConfig(**vars(models.micro(num_classes=2))))
    one, other = checks.questions(model), checks.questions(model)
    assert [float(t) for _, t, _ in one] == pytest.approx([80, (80 * 0.002) ** 0.5, 0.002])
    for (x, t, labels), (y, u, again) in zip(one, other, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(t, u)
        assert torch.equal(labels, again)


def test_examining_finds_the_boundary_and_what_is_loud():
    sound = checks.examine(models.model())
    assert sound.boundary == 0
    made = models.model()
    with torch.no_grad():
        made.network.dec["8x8_aux_conv"].weight.mul_(1000)
    loud = checks.examine(made)
    assert loud.boundary == 0
    assert any("far outside" in doubt for doubt in loud.doubts)
    assert checks.examine(models.model("denoiser")).boundary is None


def test_examining_finds_a_function_that_is_not_x_at_t_min():
    class Shifted(BoundaryEDM):
        def jump(self, path, t, s):
            skip, out, inp = super().jump(path, t, s)
            return type(super().jump(path, t, s))(skip * 0.9, out, inp)

    findings = checks.examine(models.model(parameterization=Shifted()))
    assert findings.boundary > 0.01
    assert any("f(x, t_min) is not x" in doubt for doubt in findings.doubts)


def test_formats_are_those_of_the_command_line():
    from typing import get_args

    from cmtool.cli.convert import FORMATS

    assert get_args(converting.Format) == FORMATS
