"""`cmtool convert` and `cmtool info` on files of others, and that every command takes any source."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from cmtool.flow import EDM, BoundaryEDM, LogRatio
from cmtool.networks import ADMConfig
from tests import models

ADM = ADMConfig(
    resolution=8, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), head_channels=32
)


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """A teacher, a student and one whose name tells nothing, as OpenAI's files."""
    folder = tmp_path_factory.mktemp("openai")
    form = {"denoiser": EDM, "consistency": BoundaryEDM}
    for name, role in (("edm_8x8.pt", "denoiser"), ("cd_8x8.pt", "consistency"), ("mine_8x8.pt", "consistency")):
        made = models.model(role, ADM, parameterization=form[role](time_input=LogRatio(250.0)))
        torch.save(made.network.state_dict(), folder / name)
    return folder


def test_a_foreign_file_is_converted_and_the_difference_told(cli, openai, tmp_path):
    done = cli("convert", openai / "cd_8x8.pt", tmp_path / "x.safetensors")
    assert done.code == 0
    assert done.lines == [str(tmp_path / "x.safetensors")]
    assert "largest difference on fixed inputs: 0," in done.stderr
    assert "note: attention heads of 32 channels are a guess" in done.stderr
    told = json.loads(cli("convert", tmp_path / "x.safetensors", tmp_path / "y.pt", "--json").stdout)
    assert told["format"] == "openai"
    assert told["difference"] == 0


def test_settings_from_the_shell(cli, openai, tmp_path):
    done = cli(
        *("convert", openai / "mine_8x8.pt", tmp_path / "x.safetensors", "--role", "consistency"),
        *("--set", "network.head_channels=32", "--set", "card.licence=MIT"),
    )
    assert done.code == 0
    assert "guess" not in done.stderr
    told = json.loads(cli("info", tmp_path / "x.safetensors", "--json").stdout)
    assert (told["role"], told["licence"], told["notes"]) == ("consistency", "MIT", [])


def test_convert_refuses_in_two_lines(cli, openai, student, tmp_path):
    source, target = openai / "cd_8x8.pt", tmp_path / "x.safetensors"
    cli("convert", openai / "mine_8x8.pt", target).error(1, "--role")
    shutil.copy(source, tmp_path / "cd_imagenet64_l2.pt")  # a released name is not contradicted
    named = tmp_path / "cd_imagenet64_l2.pt"
    cli("convert", named, target, "--role", "denoiser").error(1, "a consistency model", "a denoiser")
    named.unlink()
    cli("convert", source, "-", "--to", "cmtool").error(2, "pipe")
    cli("convert", source, target, "--resolution", "1000000").error(2, "4096")
    cli("convert", source, target, "--set", "card.num_classes=5").error(1, "classes 5")
    cli("convert", source, target, "--set", "parameterization.sigma_data=nan").error(1, "not finite")
    cli("convert", student, tmp_path / "new" / "sub" / "a.pt").error(1, "OpenAI")
    cli("convert", source, tmp_path / "x.ckpt").error(2, "does not say a format")
    cli("convert", source, tmp_path / "x.ckpt", "--to", "cmtol").error(2, "--to", "cmtool")
    cli("convert", source, target, "--set", "network").error(2, "NAME=VALUE")
    cli("convert", source, target, "--set", "network.chanels=3").error(2, "channels")
    cli("convert", source, target, "--resolution", "7").error(2, "--resolution 7")
    cli("convert", tmp_path / "none.pt", target).error(1, "no model")
    cli("convert", student, tmp_path / "folder").error(1, "diffusers")
    cli("convert", source).error(2, "DST")
    assert not any(tmp_path.iterdir())


# info.


def test_info_of_a_foreign_file(cli, openai):
    rows = dict(line.split(maxsplit=1) for line in cli("info", openai / "cd_8x8.pt").lines if line.split()[0] != "time")
    assert rows["format"] == "OpenAI consistency models, PyTorch"
    assert rows["role"] == "consistency"
    assert rows["network"].startswith("adm (resolution=8")
    assert rows["boundary"] == "max |f(x, t_min) - x| = 0"
    assert "guess" in cli("info", openai / "cd_8x8.pt").stdout.decode()
    told = json.loads(cli("info", openai / "cd_8x8.pt", "--json", "--no-check").stdout)
    assert told["format"] == "openai"
    assert "boundary" not in told
    assert told["parameters"] == sum(p.numel() for p in models.model(config=ADM).network.parameters())


def test_info_says_what_the_network_is_told_of_the_time(cli, openai, student):
    for source, words in ((openai / "edm_8x8.pt", "250 ln sigma (OpenAI"), (student, "0.25 ln sigma (EDM)")):
        assert f"time input        {words}" in cli("info", source).stdout.decode()


def test_info_of_a_file_that_does_not_tell_what_it_is(cli, openai):
    text = cli("info", openai / "mine_8x8.pt").stdout.decode()
    assert "that it is a denoiser is a guess" in text
    text = cli("info", openai / "mine_8x8.pt", "--role", "consistency").stdout.decode()
    assert "that it is" not in text
    assert "boundary" in text


def test_info_warns_of_what_is_out_of_range(cli, tmp_path):
    made = models.model(config=ADM, parameterization=BoundaryEDM(time_input=LogRatio(250.0)))
    state = made.network.state_dict()
    state["out.2.weight"] = state["out.2.weight"] * 1000
    torch.save(state, tmp_path / "cd_8x8.pt")
    assert "far outside [-1, 1]" in cli("info", tmp_path / "cd_8x8.pt").stdout.decode()


# Every command takes them.


def test_sampling_and_editing_with_a_foreign_model(cli, openai, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / "photo.png")
    Image.new("RGB", (4, 4), (200, 30, 90)).save(tmp_path / "small.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    model = openai / "cd_8x8.pt"
    steps = ("--steps", 2)
    assert cli("sample", "--model", model, "--steps", 2, "--out", tmp_path / "a.png").code == 0
    assert cli(
        "sample", "--model", openai / "edm_8x8.pt", "--solver", "heun", "--steps", 2, "--out", tmp_path / "b.png"
    )
    edits = (
        ("inpaint", "photo.png", "--mask", tmp_path / "mask.png"),
        ("colorize", "photo.png"),
        ("superres", "small.png", "--factor", 2),
    )
    for command, image, *rest in edits:
        out = tmp_path / f"{command}.png"
        done = cli(command, "--model", model, "--image", tmp_path / image, *rest, "--out", out, *steps)
        assert done.code == 0, done.stderr
        with Image.open(out) as made:
            assert made.size == (8, 8)


def test_the_role_is_said_where_the_file_does_not(cli, openai, tmp_path):
    model, out = openai / "mine_8x8.pt", tmp_path / "a.png"
    cli("sample", "--model", model, "--out", out).error(1, "--role consistency")
    assert cli("sample", "--model", model, "--role", "consistency", "--out", out).code == 0
    shutil.copy(openai / "edm_8x8.pt", tmp_path / "edm_bedroom256_ema_8x8.pt")
    cli("sample", "--model", tmp_path / "edm_bedroom256_ema_8x8.pt", "--role", "consistency", "--out", out).error(
        1, "needed"
    )


@pytest.mark.parametrize("preset", ["cd", "scd", "direct", "pd"])
def test_a_foreign_teacher_is_distilled(cli, openai, pictures, tmp_path, preset):
    done = cli(
        *("distill", "--teacher", openai / "edm_8x8.pt", "--data", pictures, "--preset", preset, "--batch", 4),
        *("--iterations", 2, "--sample-every", 0, "--out", tmp_path / "run"),
    )
    assert done.code == 0, done.stderr
    told = json.loads(cli("info", tmp_path / "run", "--json").stdout)
    assert told["role"] == ("flow_map" if preset == "pd" else "consistency")
    assert told["teacher"] == str(openai / "edm_8x8.pt")


def test_a_student_inherits_the_licence_it_starts_from(cli, pictures, tmp_path):
    config = replace(ADM, num_classes=0)
    made = models.model("denoiser", config, parameterization=EDM(time_input=LogRatio(250.0)))
    torch.save(made.network.state_dict(), tmp_path / "edm_bedroom256_ema_8x8.pt")  # a name under MIT
    done = cli(
        *("train", "--init", tmp_path / "edm_bedroom256_ema_8x8.pt", "--data", pictures, "--preset", "ect"),
        *("--iterations", 1, "--batch", 4, "--sample-every", 0, "--out", tmp_path / "run"),
    )
    assert done.code == 0, done.stderr
    assert json.loads(cli("info", tmp_path / "run", "--json").stdout)["licence"] == "MIT"
