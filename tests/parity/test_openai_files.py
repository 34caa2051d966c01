"""OpenAI's files from the shell's point of view: no flags, the right network, the stored outputs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

import cmtool
from cmtool import networks
from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, BoundaryEDM, LogRatio
from cmtool.io import catalogue, loading
from cmtool.io.imported import assemble
from cmtool.io.importers import openai
from cmtool.networks import SIZES
from tests.parity.goldens import golden, meta, tensors

VARIANTS = ["imagenet64_like", "lsun256_like", "conv_resample"]


def close(found, expected, tolerance=5e-6):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("role", ["denoiser", "consistency"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_makes_the_stored_outputs_and_no_argument_is_given(variant, role):
    model = cmtool.load(golden(f"openai/{variant}.pt"), role=role)
    io = tensors(f"openai/{variant}.io.safetensors")
    labels = io["y"] if model.card.num_classes else None
    with torch.no_grad():
        close(model.network(io["x"], io["rescaled_t"], labels), io["network_out"])
        stored = io["denoised_edm" if role == "denoiser" else "denoised_boundary"]
        close(model.denoised(io["x_t"], io["sigma"], labels), stored)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_constructor_arguments_are_inferred(variant, tmp_path):
    made = meta("openai")["unet_variants"][variant]
    file = tmp_path / f"{variant.split('_')[0]}_16x16.pt"  # the size of the images is in no weight, but in the name
    shutil.copy(golden(f"openai/{variant}.pt"), file)
    config, notes = openai.infer(loading.read(file, role="denoiser").state, str(file))
    assert config.resolution == made["image_size"]
    assert config.channels == made["model_channels"]
    assert config.channel_mult == tuple(made["channel_mult"])
    assert config.num_blocks == made["num_res_blocks"]
    assert config.attention_resolutions == tuple(made["image_size"] // at for at in made["attention_resolutions"])
    assert config.num_classes == (made["num_classes"] or 0)
    assert config.scale_shift_norm == made["use_scale_shift_norm"]
    assert config.resblock_updown == made["resblock_updown"]
    heads = made.get("num_heads") or config.channels // made["num_head_channels"]
    assert config.channels // config.head_channels == heads
    assert len(notes) == 1  # that the width of a head is a guess, which these narrow networks need
    assert "head_channels" in notes[0]


def empty(config):
    with torch.device("meta"):
        return networks.build(config).state_dict()


@pytest.mark.parametrize("name", [name for name, entry in catalogue.RELEASED.items() if entry.family == "openai"])
def test_every_released_file_is_known_from_empty_tensors(name):
    entry = catalogue.RELEASED[name]
    size = SIZES["adm-imagenet64" if entry.data == "imagenet64" else "adm-lsun256"]
    config = size(entry.resolution, 3, entry.num_classes)
    imported = openai.read(empty(config), f"/somewhere/{entry.file}")
    assert imported.config == config
    card = imported.card
    assert card.role == entry.role
    assert (card.resolution, card.channels, card.num_classes) == (entry.resolution, 3, entry.num_classes)
    assert card.grid_points == entry.grid_points
    assert card.licence == "MIT"
    assert card.notes == ()
    assert imported.path == VE()
    form = EDM if entry.method == "edm" else BoundaryEDM
    assert imported.parameterization == form(time_input=LogRatio(250.0))
    if entry.times:
        assert card.times == {"2": entry.sigmas()}
    else:
        assert card.times == {}


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("cd_imagenet64_l2", 1.382368), ("ct_imagenet64", 1.912844), ("cd_bedroom256_lpips", 4.365562)],
)
def test_published_times_travel_with_the_model(name, sigma):
    """Two steps are made at the noise levels that the release's own scripts sample at."""
    entry = catalogue.RELEASED[name]
    config = replace(SIZES["adm-imagenet64"](64, 3, 1000), num_classes=entry.num_classes)
    card = openai.read(empty(config), f"a copy of {name} (2).pt").card
    assert card.times["2"] == pytest.approx((80.0, sigma), rel=1e-6)


def test_a_name_that_contradicts_what_is_needed(tmp_path):
    file = tmp_path / "cd_imagenet64_l2.pt"
    shutil.copy(golden("openai/imagenet64_like.pt"), file)
    with pytest.raises(CheckpointError, match=r"a consistency model.*denoiser.*needed"):
        loading.read(file, role="denoiser")


def test_a_name_that_says_nothing_asks_for_the_role():
    with pytest.raises(CheckpointError, match="--role consistency"):
        loading.read(golden("openai/lsun256_like.pt"))
    model = assemble(loading.read(golden("openai/lsun256_like.pt"), assume="denoiser"))
    assert model.card.role == "denoiser"
    assert any("--role" in note for note in model.card.notes)


def drop(state, name):
    del state[name]


DAMAGE = {
    "no middle": lambda state: drop(state, "middle_block.1.qkv.weight"),
    "no embedding": lambda state: drop(state, "time_embed.0.weight"),
    "no output": lambda state: [drop(state, name) for name in list(state) if name.startswith("output_blocks.")],
    "one more": lambda state: state.update({"input_blocks.0.7.weight": torch.zeros(1)}),
    "a number too large": lambda state: state.update({"output_blocks.99999999.0.in_layers.0.weight": torch.zeros(1)}),
    "no number": lambda state: state.update({"output_blocks.x.0.in_layers.0.weight": torch.zeros(1)}),
    "another shape": lambda state: state.update({"middle_block.0.in_layers.2.weight": torch.zeros(3, 3)}),
    "flat": lambda state: state.update({"time_embed.0.weight": torch.zeros(12)}),
    "a variance": lambda state: state.update({"out.2.weight": torch.zeros(6, 32, 3, 3), "out.2.bias": torch.zeros(6)}),
    "not finite": lambda state: state["out.2.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_networks_are_refused(damage, tmp_path):
    state = tensors("openai/lsun256_like.pt")
    damage(state)
    file = tmp_path / "cd_x.pt"
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"cd_x\.pt"):
        cmtool.load(file)
