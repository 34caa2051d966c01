"""`cmtool info` and `cmtool presets`."""

from __future__ import annotations

import json

import pytest

from cmtool.training.presets import PRESETS, Shape


def test_info_as_json(cli, student):
    told = json.loads(cli("info", student, "--json").stdout)
    assert told["role"] == "consistency"
    assert told["resolution"] == 8
    assert told["class_names"] == ["ant", "bee", "cow"]
    assert told["network"]["kind"] == "ddpmpp"
    assert told["network"]["channels"] == 8
    assert told["parameters"] > 1000
    assert told["file"] == str(student)


def test_info_for_people(cli, teacher):
    rows = dict(line.split(maxsplit=1) for line in cli("info", teacher).lines)
    assert rows["role"] == "denoiser"
    assert rows["images"] == "8x8, 3 channels"
    assert rows["classes"] == "3: ant, bee, cow"
    assert rows["path"].startswith("ve (")
    assert "licence" not in rows  # what is not known takes no line


def test_info_of_nothing(cli, tmp_path):
    cli("info", tmp_path / "x").error(1, "no model")
    cli("info", tmp_path, "--json").error(1, "no run")


def test_presets_are_listed(cli):
    told = json.loads(cli("presets", "ls", "--json").stdout)["presets"]
    assert [entry["name"] for entry in told] == list(PRESETS)
    assert all(entry["summary"] for entry in told)
    lines = cli("presets", "ls").lines
    assert len(lines) == len(PRESETS)
    assert lines[0].split()[0] == "edm"


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_shown(cli, name):
    text = cli("presets", "show", name).stdout.decode()
    assert "arXiv" in text or "Song et al." in text or "Karras et al." in text
    assert "\n    " not in text  # the docstring's indentation is gone


def test_every_setting_of_a_recipe_is_listed(cli):
    lines = cli("presets", "show", "cd", "--recipe", "--resolution", "16").lines
    rows = dict(line.split(maxsplit=1) for line in lines[lines.index("") :] if len(line.split()) == 2)
    recipe = PRESETS["cd"](Shape(16))
    assert rows["objective.trajectory"] == "teacher"
    assert rows["objective.trajectory.solver"] == "heun"
    assert rows["optimizer.lr"] == str(recipe.optimizer.lr)
    assert rows["network.resolution"] == "16"
    assert rows["averages.0.images"] == str(recipe.averages[0].images)
    told = json.loads(cli("presets", "show", "cd", "--recipe", "--json").stdout)
    assert told["recipe"]["objective"]["times"]["curriculum"]["num"] == 10


def test_unknown_presets_are_answered_with_the_nearest(cli):
    cli("presets", "show", "cd-cifar").error(2, "cd-cifar", "did you mean", "cd-cifar10")
