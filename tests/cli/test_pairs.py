"""`cmtool pairs`, and the other commands on what it makes."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool import generate as generating
from cmtool import rng
from cmtool.cli import pairs as command
from cmtool.generate import sample
from cmtool.io import checkpoint
from cmtool.io.data import inspect_data, open_data
from cmtool.solvers import Euler, Heun, solve
from cmtool.times import Karras
from tests import models

HALF = 2.0**-12 + 1e-7  # half a float16 step below 1


def test_solving_again_from_eps_gives_the_image(cli, teacher, tmp_path):
    """What ReFlow relies on: x0 is the ODE's end from sigma(t_max) eps, of this pair's own eps and label."""
    out = tmp_path / "new" / "pairs.npz"
    result = cli("pairs", "--model", teacher, "--out", out, "--seeds", "0-4,2000", "--steps", 4, "--precision", "fp32")
    assert (result.code, result.lines) == (0, [str(out)]), result.stderr
    assert f"6 pairs solved from {teacher} by heun, 4 steps" in result.stderr

    model, data = checkpoint.load(teacher), open_data(out)
    images, labels, eps = data.batch(torch.tensor([5, 0, 3]))
    assert (images.dtype, eps.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
    assert torch.equal(eps, rng.noise([2000, 0, 3], (3, 8, 8)))
    times = torch.cat([Karras(model.card.grid_rho).times(model.path, 4), torch.zeros(1)])
    states = solve(
        Heun(),
        lambda x, t: model.denoised(x, t, labels).clamp(-1, 1),
        model.path,
        model.path.sigma(times[0]) * eps,
        times,
        noise=lambda stream: pytest.fail("an ODE takes no noise on the way"),
    )
    *_, last = states
    assert (last.x.clamp(-1, 1) - images).abs().max() < HALF + 1e-4
    *_, other = solve(
        Euler(), lambda x, t: model.denoised(x, t, labels), model.path, 80 * eps.flip(0), times, noise=lambda k: eps
    )
    assert (other.x.clamp(-1, 1) - images).abs().max() > 0.1  # the bound says something


def test_the_image_is_that_of_sample_finer_than_a_file_of_8_bits(cli, teacher, tmp_path):
    out = tmp_path / "pairs.npz"
    options = ("--solver", "dpm2", "--steps", 3, "--labels", "cow,ant", "--precision", "fp32")
    assert cli("pairs", "--model", teacher, "--out", out, "-n", 5, *options).code == 0
    data = open_data(out)
    made = sample(checkpoint.load(teacher), seeds=range(5), steps=3, solver="dpm2", labels=[2, 0])
    assert (data.batch(torch.arange(5))[0] - made).abs().max() < HALF + 1e-5
    assert data.labels.tolist() == [2, 0, 2, 0, 2]
    assert data.seeds.tolist() == [0, 1, 2, 3, 4]
    assert data.class_names == ("ant", "bee", "cow")
    assert data.report.classes == {"ant": 2, "bee": 0, "cow": 3}


def test_parts_make_the_whole_whatever_the_batch(cli, teacher, tmp_path):
    def make(name, seeds, batch):
        ask = ("pairs", "--model", teacher, "--out", tmp_path / name, "--steps", 3, "--precision", "fp32")
        assert cli(*ask, "--seeds", seeds, "--batch", batch).code == 0
        return open_data(tmp_path / name)

    whole, first, second = make("a.npz", "0-10", 11), make("b.npz", "0-5", 4), make("c.npz", "6-10", 1)
    assert torch.equal(torch.cat([first.seeds, second.seeds]), whole.seeds)
    assert torch.equal(torch.cat([first.labels, second.labels]), whole.labels)
    joined = torch.cat([first.images, second.images]).float()
    assert (joined - whole.images.float()).abs().max() < 2 * HALF
    assert torch.equal(second.batch(torch.arange(5))[2], whole.batch(torch.arange(6, 11))[2])


def test_the_same_command_writes_the_same_bytes(cli, teacher, tmp_path):
    for name in ("a.npz", "b.npz"):
        assert cli("pairs", "--model", teacher, "--out", tmp_path / name, "-n", 3, "--steps", 2).code == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert oct((tmp_path / "a.npz").stat().st_mode & 0o600) == "0o600"


def test_a_consistency_model_jumps(cli, plain, student, tmp_path):
    out = tmp_path / "pairs.npz"
    result = cli("pairs", "--model", plain, "--out", out, "-n", 4, "--precision", "fp32", "--json")
    assert json.loads(result.stdout) == {
        "pairs": str(out),
        "count": 4,
        "shape": [3, 8, 8],
        "teacher": str(plain),
        "solver": "jump",
        "steps": 1,
        "guidance": 1.0,
        "class_names": [],
        "licence": "",
    }
    data = open_data(out)
    assert (data.labels, data.class_names) == (None, ())
    images, labels, eps = data.batch(torch.arange(4))
    assert labels is None
    model = checkpoint.load(plain)
    t = torch.full((4,), model.path.t_max)
    jumped = model.jump(model.path.t_max * eps, t, torch.full((4,), model.path.t_min)).clamp(-1, 1)
    assert (jumped - images).abs().max() < HALF + 1e-5


def test_a_two_time_model_jumps_on_without_noise(cli, tmp_path):
    """Algorithm 1 renoises, and its image belongs to all of that noise; pairs go on from where a jump lands."""
    model = models.model("flow_map")
    checkpoint.save(model, tmp_path / "m.safetensors")
    options = ("--steps", 3, "--precision", "fp32")
    assert cli("pairs", "--model", tmp_path / "m.safetensors", "--out", tmp_path / "a.npz", "-n", 3, *options).code == 0
    images = open_data(tmp_path / "a.npz").batch(torch.arange(3))[0]
    assert (images - sample(model, 3, steps=3)).abs().max() < HALF + 1e-5
    assert (images - sample(model, 3, steps=3, landing="t_min")).abs().max() > 0.05


@pytest.mark.parametrize("options", [("--steps", 3), ("--solver", "heun")])
def test_a_consistency_model_takes_one_jump_only(cli, plain, tmp_path, options):
    cli("pairs", "--model", plain, "--out", tmp_path / "a.npz", "-n", 3, *options).error(2, "one jump", "leave out")


def test_guidance(cli, tmp_path):
    from tests.models import micro, model

    made = model("denoiser", config=micro(num_classes=3, label_dropout=0.1))
    checkpoint.save(made, tmp_path / "m.safetensors")
    ask = ("pairs", "--model", tmp_path / "m.safetensors", "--out", tmp_path / "p.npz", "-n", 3, "--steps", 2)
    result = cli(*ask, "--guidance", 2.5, "--precision", "fp32")
    assert "guidance 2.5" in result.stderr
    data = open_data(tmp_path / "p.npz")
    assert data.report.pairs.guidance == 2.5
    strong = sample(checkpoint.load(tmp_path / "m.safetensors"), 3, steps=2, solver="heun", guidance=2.5)
    assert (data.batch(torch.arange(3))[0] - strong).abs().max() < HALF + 1e-4
    assert (strong - sample(made, 3, steps=2, solver="heun")).abs().max() > 0.01


def test_classes_without_names_are_numbered(cli, tmp_path):
    from tests.models import micro, model

    checkpoint.save(model("denoiser", config=micro(num_classes=4)), tmp_path / "m.safetensors")
    out = tmp_path / "p.npz"
    assert cli("pairs", "--model", tmp_path / "m.safetensors", "--out", out, "-n", 2, "--steps", 1).code == 0
    assert open_data(out).class_names == ("0", "1", "2", "3")


def test_grey_pairs(cli, tmp_path):
    from tests.models import micro, model

    checkpoint.save(model("denoiser", config=micro(in_channels=1, out_channels=1)), tmp_path / "m.safetensors")
    out, ask = tmp_path / "p.npz", ("data", "preview", tmp_path / "p.npz", "--out")
    assert cli("pairs", "--model", tmp_path / "m.safetensors", "--out", out, "-n", 2, "--steps", 1).code == 0
    assert open_data(out).report.channels == 1
    assert open_data(out, channels=1).images.shape == (2, 1, 8, 8)
    assert inspect_data(out).modes == {"L": 2}
    assert cli(*ask, tmp_path / "a.png").code == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L"
    cli(*ask, tmp_path / "b.png", "--channels", 3).error(1, "channels 1", "leave out --channels")


def test_ten_thousand_by_default(cli, teacher, tmp_path, monkeypatch):
    assert command.SEEDS == "0-9999"
    monkeypatch.setattr(command, "SEEDS", "0-1")
    assert cli("pairs", "--model", teacher, "--out", tmp_path / "p.npz", "--steps", 1).code == 0
    assert open_data(tmp_path / "p.npz").seeds.tolist() == [0, 1]


class TestLookingAtThem:
    @pytest.fixture
    def made(self, cli, teacher, tmp_path):
        assert cli("pairs", "--model", teacher, "--out", tmp_path / "p.npz", "-n", 6, "--steps", 2).code == 0
        return tmp_path / "p.npz"

    def test_inspect(self, cli, made, teacher):
        told = json.loads(cli("data", "inspect", made, "--json").stdout)
        assert (told["kind"], told["count"], told["sizes"], told["resolution"]) == ("pairs", 6, {"8x8": 6}, 8)
        assert (told["pairs"]["teacher"], told["pairs"]["solver"], told["pairs"]["steps"]) == (str(teacher), "heun", 2)
        assert sum(told["classes"].values()) == 6
        result = cli("data", "inspect", made)
        assert f"pairs        solved from {teacher} by heun, 2 steps" in result.lines

    def test_preview(self, cli, made, tmp_path):
        result = cli("data", "preview", made, "-n", 3, "--out", tmp_path / "out", "--json")
        told = json.loads(result.stdout)
        assert "3 pairs, 8x8 RGB; 3 classes; solved from" in result.stderr
        data = open_data(made)
        assert told["labels"] == [data.class_names[data.labels[k]] for k in (0, 2, 4)]
        assert told["report"]["pairs"]["solver"] == "heun"
        for path, index in zip(told["images"], (0, 2, 4), strict=True):
            shown = np.asarray(Image.open(path)).transpose(2, 0, 1) / 127.5 - 1
            assert np.abs(shown - data.images[index].numpy()).max() < 1 / 127
        assert cli("data", "preview", made, "--out", tmp_path / "grid.png", "--scale", 2).code == 0

    def test_another_size_is_refused(self, cli, made, tmp_path):
        ask = ("data", "preview", made, "--out", tmp_path / "a.png", "--resolution")
        cli(*ask, 4).error(1, "resolution 8", "belongs to its noise", "leave out --resolution")
        assert cli(*ask, 8).code == 0


@pytest.mark.parametrize(
    ("model", "argv", "words"),
    [
        ("teacher", ["--out", "p.npz", "--seeds", "5-3"], ["range 5-3 is empty"]),
        ("teacher", ["--out", "p.npz", "--seeds", "0-3", "-n", "4"], ["twice"]),
        ("teacher", ["--out", "p.npz", "-n", "0"], ["--count"]),
        ("teacher", ["--out", "p.npz", "-n", "1000001"], ["1000001 seeds"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--steps", "0"], ["--steps"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--batch", "0"], ["--batch"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--solver", "huen"], ["did you mean heun"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--solver", "ancestral"], ["adds noise on the way", "heun"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--labels", "dog"], ["no class 'dog'"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--labels", "3"], ["no class 3"]),
        ("plain", ["--out", "p.npz", "-n", "2", "--labels", "0"], ["knows no classes"]),
        ("plain", ["--out", "p.npz", "-n", "2", "--solver", "ancestral"], ["adds noise on the way"]),
        ("plain", ["--out", "p.npz", "-n", "2", "--guidance", "2"], ["model with classes"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--guidance", "2"], ["labels dropped"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--guidance", "nan"], ["--guidance nan"]),
        ("teacher", ["-n", "2"], ["--out"]),
        ("teacher", ["--out", "-", "-n", "2"], ["pipe"]),
        ("teacher", ["--out", "p.npy", "-n", "2"], [".npz"]),
        ("teacher", ["--out", "pairs", "-n", "2"], [".npz"]),
        ("teacher", ["--out", "d.npz", "-n", "2"], ["is a folder"]),
        ("teacher", ["--out", "p.npz", "-n", "2", "--device", "cuda:99"], ["cuda:99"]),
        ("nowhere", ["--out", "p.npz", "-n", "2"], ["no model"]),
    ],
)
def test_mistakes(cli, folder, tmp_path, monkeypatch, model, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.npz").mkdir()
    result = cli("pairs", "--model", folder / f"{model}.safetensors", *argv)
    assert result.code in (1, 2)
    result.error(result.code, *words)
    assert os.listdir(tmp_path) == ["d.npz"]


def test_a_place_that_cannot_be_written_to(cli, teacher, tmp_path):
    (tmp_path / "file").write_text("x")
    ask = ("pairs", "--model", teacher, "-n", 2, "--steps", 1, "--out")
    cli(*ask, tmp_path / "file" / "p.npz").error(1, "cannot write", "check the folder")
    assert (tmp_path / "file").read_text() == "x"


class TestInterrupted:
    """After its first batch; what stood there before still stands."""

    @pytest.fixture
    def ask(self, cli, teacher, tmp_path, monkeypatch):
        place = tmp_path / "out" / "p.npz"
        place.parent.mkdir()
        place.write_bytes(b"earlier")
        real = generating.generate

        def run(stop):
            def made(*args, **kwargs):
                for index, part in enumerate(real(*args, **kwargs)):
                    yield stop(part) if index == 1 else part

            with monkeypatch.context() as patch:
                patch.setattr(generating, "generate", made)
                result = cli("pairs", "--model", teacher, "--out", place, "-n", 4, "--batch", 2, "--steps", 1)
            assert os.listdir(place.parent) == ["p.npz"]
            assert place.read_bytes() == b"earlier"
            return result

        return run

    def test_by_the_keyboard(self, ask):
        def stop(part):
            raise KeyboardInterrupt

        assert ask(stop).code == 130

    def test_by_a_signal(self, ask):
        before = signal.getsignal(signal.SIGTERM)
        assert ask(lambda part: os.kill(os.getpid(), signal.SIGTERM)).code == 130
        assert signal.getsignal(signal.SIGTERM) is before

    def test_by_a_model_that_breaks(self, ask):
        def stop(part):
            part.images[1, 0, 3, 3] = float("nan")
            return part

        ask(stop).error(1, "image of seed 3", "not finite", "fp32")

    def test_by_a_full_disk(self, ask):
        def stop(part):
            raise OSError(28, "No space left on device")

        ask(stop).error(1, "cannot write", "no space left")
