"""The models that come with the package: there, small, said, and good for every command without a network."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import cmtool
from cmtool.io import box, checkpoint

LIMITS = {"digits-small": 2 * 2**20, "cifar10-small": 8 * 2**20}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A new user's machine: no cache, no network."""
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))


def width(file):
    with Image.open(file) as image:
        return image.width


@pytest.mark.parametrize("name", box.BOXED)
def test_a_model_of_the_box_is_small_and_says_what_it_is(name):
    known = checkpoint.header(box.BOXED[name].file)
    assert known["bytes"] <= LIMITS[name]
    assert known["dtypes"] == ["BF16"]
    card = known["card"]
    assert card["role"] == "consistency"
    assert card["licence"] == "Apache-2.0"
    assert len(card["class_names"]) == card["num_classes"] == 10
    assert set(card["times"]) >= {"2", "3", "4"}
    assert "/" not in card["data"] + card["teacher"] + card["source"]


@pytest.mark.parametrize("name", box.BOXED)
def test_its_images_are_as_varied_as_images_are(name):
    images = cmtool.sample(cmtool.load(name), 40)
    assert images.shape[0] == 40
    assert 0.2 < float(images.std(0).mean()) < 1  # neither one image nor noise
    apart = (images[:, :, 1:] - images[:, :, :-1]).square().mean().sqrt()
    assert float(apart) < 0.6 * 2**0.5 * float(images.std())  # neighbouring pixels are alike, as noise is not


def test_without_a_model_the_box_is_used_and_said(cli, tmp_path):
    done = cli("sample", "-n", "2", "--grid", str(tmp_path / "grid.png"))
    assert done.code == 0, done.stderr
    assert "no --model: cifar10-small" in done.stderr
    assert done.lines == [str(tmp_path / "grid.png")]
    assert width(tmp_path / "grid.png") > 64


def test_a_bare_command_shows_what_it_can(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("samples.png", "samples-2.png"):
        done = cli("sample")
        assert done.code == 0, done.stderr
        assert "4 network calls an image" in done.stderr
        assert done.lines == [name]
    assert width("samples.png") > 250
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "samples-2.png").read_bytes()


def test_edits_take_the_box_too(cli, tmp_path):
    assert cli("sample", "--out", str(tmp_path / "one.png"), "--labels", "horse").code == 0
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image, out = str(tmp_path / "one.png"), str(tmp_path / "new.png")
    for command in (("inpaint", "--mask", str(tmp_path / "mask.png")), ("colorize",), ("stroke",)):
        done = cli(*command, "--image", image, "--out", out, "--json")
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["model"] == "cifar10-small"
    assert cli("inpaint", "--mask", str(tmp_path / "mask.png"), "--image", image, "--out", out).code == 0
    with Image.open(image) as before, Image.open(out) as after:
        same = (np.asarray(before) == np.asarray(after)).all(-1)
    assert same[mask == 0].all()
    assert not same[mask > 0].all()


def test_the_box_is_listed_as_here(cli):
    found = {row["name"]: row for row in json.loads(cli("models", "ls", "--json").stdout)["models"]}
    for name in box.BOXED:
        assert found[name]["path"] == str(box.BOXED[name].file)
        assert found[name]["licence"] == "Apache-2.0"
        assert len(found[name]["sha256"]) == 64


def test_a_wrong_name_finds_the_right_one(cli):
    done = cli("sample", "--model", "cifar10-smal", "--grid", "-")
    assert done.code == 1
    assert "did you mean cifar10-small" in done.stderr
