"""`cmtool info` and `cmtool presets`."""

from __future__ import annotations

import json
import re

import pytest

from cmtool.cli.presets import BOTH, COMMANDS, DISTIL, INIT, TRAIN
from cmtool.training.presets import PRESETS, Shape, preset


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
    assert "guidance" not in rows


def test_info_of_nothing(cli, tmp_path):
    cli("info", tmp_path / "x").error(1, "no model")
    cli("info", tmp_path, "--json").error(1, "no run")


def test_presets_are_listed(cli):
    told = json.loads(cli("presets", "ls", "--json").stdout)["presets"]
    assert {entry["name"]: entry["command"] for entry in told} == COMMANDS
    assert all(entry["summary"] for entry in told)
    rows = [re.split(r" {2,}", line, maxsplit=2) for line in cli("presets", "ls").lines]
    assert rows == [list(entry.values()) for entry in told]
    assert [row[0] for row in rows][:2] == ["edm", "flow"]
    # Those for minutes on a CPU come first; in each half what is asked for the same way stands together.
    published = [row[0].endswith(("-cifar10", "-vp", "-fast", "-imagenet64", "-lsun256")) for row in rows]
    assert published == sorted(published)
    for half in (False, True):
        commands = [row[1] for row, late in zip(rows, published, strict=True) if late is half]
        assert commands == sorted(commands, key=[TRAIN, INIT, BOTH, DISTIL].index)


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_command_of_a_preset_is_the_one_that_takes_it(name):
    def follows(distils: bool) -> bool:
        recipe = preset(name)(Shape(64, distils=distils))
        return recipe.objective.needs_teacher or recipe.init_from_teacher

    trains, distils = not follows(False), follows(True)
    command = {(True, False): TRAIN, (True, True): BOTH, (False, True): DISTIL}[trains, distils]
    assert COMMANDS[name] in (command, f"{command} --init")
    if preset(name)(Shape(64)).objective.needs_first:
        assert COMMANDS[name] == INIT
    if COMMANDS[name] == INIT:  # it says from what
        text = preset(name).__doc__ or ""
        assert "Start it from" in text or "--init" in text or "from `" in text


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_shown(cli, name):
    text = cli("presets", "show", name).stdout.decode()
    assert "arXiv" in text or "Song et al." in text or "Karras et al." in text
    assert "\n    " not in text  # the docstring's indentation is gone
    for command in COMMANDS[name].split(", "):
        assert f"\ncmtool {command}" in text
    assert text.count(f"--data SOURCE --preset {name} --out RUN") == len(COMMANDS[name].split(", "))
    assert ("--teacher TEACHER" in text) == (DISTIL in COMMANDS[name])


def test_the_recipe_is_left_out_on_request(cli):
    whole, text = (cli("presets", "show", "edm", *more).stdout for more in ([], ["--no-recipe"]))
    assert whole.startswith(text)
    assert b"optimizer.lr" in whole
    assert b"optimizer.lr" not in text
    assert "recipe" not in json.loads(cli("presets", "show", "edm", "--no-recipe", "--json").stdout)


def test_a_size_that_no_network_of_the_preset_has(cli):
    cli("presets", "show", "edm-lsun256", "--resolution", "20").error(2, "20x20", "--resolution")


def test_every_setting_of_a_recipe_is_listed(cli):
    lines = cli("presets", "show", "cd", "--resolution", "16").lines
    rows = dict(line.split(maxsplit=1) for line in lines if len(line.split()) == 2)
    recipe = PRESETS["cd"](Shape(16))
    assert rows["objective.trajectory"] == "teacher"
    assert rows["objective.trajectory.solver"] == "heun"
    assert rows["optimizer.lr"] == str(recipe.optimizer.lr)
    assert rows["network.resolution"] == "16"
    assert rows["averages.0.images"] == str(recipe.averages[0].images)
    told = json.loads(cli("presets", "show", "cd", "--json").stdout)
    assert told["recipe"]["objective"]["times"]["curriculum"]["num"] == recipe.objective.times.curriculum.num


def test_unknown_presets_are_answered_with_the_nearest(cli):
    cli("presets", "show", "cd-cifar").error(2, "cd-cifar", "did you mean", "cd-cifar10")
