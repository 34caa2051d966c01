"""Pickles of the original networks give back the original numbers."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, BoundaryEDM, Epsilon, LogRatio, VPTime
from cmtool.io.imported import assemble
from cmtool.io.importers import edm
from cmtool.networks import ADMConfig, DDPMppConfig
from tests import pickles
from tests.parity.goldens import meta, tensors

VARIANTS = ["ddpmpp_edm_cond", "ncsnpp_edm_uncond", "adm_edm_cond", "ddpmpp_vp_uncond", "ncsnpp_ve_uncond"]
VP_RANGE = [math.sqrt(math.expm1(19.9 / 2 * t * t + 0.1 * t)) for t in (1e-5, 1.0)]
EXPECTED = {
    "EDMPrecond": (VE(0.002, 80), EDM(0.5, LogRatio(0.25))),
    "VPPrecond": (VE(0.002, 80), Epsilon(time_input=VPTime(19.9, 0.1, 999))),
    "VEPrecond": (VE(0.02, 80), Epsilon(sign=-1, unit_input=False, time_input=LogRatio(1, 2))),
}


def close(found, expected):
    """Equal up to float32 rounding, measured against the largest value."""
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def written(path, content, protocol=4):
    path.write_bytes(pickles.dumps(content, protocol))
    return path


def snapshot(variant, **options):
    return {"ema": pickles.edm(meta("edm")[variant], tensors(f"edm/{variant}.safetensors"), **options)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pickle_is_the_original_function(variant, tmp_path):
    made = meta("edm")[variant]
    told = {"sigma_min": VP_RANGE[0], "sigma_max": VP_RANGE[1], "beta_d": 19.9, "beta_min": 0.1, "M": 1000}
    content = snapshot(variant, **(told if made["precond"] == "VPPrecond" else {}))
    imported = edm.read(written(tmp_path / "edm-one.pkl", content))
    assert (imported.path, imported.parameterization) == EXPECTED[made["precond"]]
    card = imported.card
    assert (card.role, card.resolution, card.channels, card.num_classes) == ("denoiser", 16, 3, made["label_dim"])
    assert card.source == f"NVlabs EDM, edm-one.pkl, {made['precond']}"
    assert (card.grid_points, card.grid_rho, card.licence, card.notes) == (40, 7, "CC-BY-NC-SA-4.0", ())
    check(imported, variant)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_holds_the_same(protocol, tmp_path):
    """Of all that a Python of the last ten years may have written; 2, the first with these instructions, is refused
    where it holds bytes, which it has none of."""
    content = snapshot("ncsnpp_edm_uncond")
    path = written(tmp_path / "edm.pkl", content, protocol)
    if protocol == 2:
        with pytest.raises(CheckpointError, match="asks for __builtin__"):
            edm.read(path)
        return
    state = tensors("edm/ncsnpp_edm_uncond.safetensors")
    for name, tensor in edm.read(path).state.items():
        assert torch.equal(tensor, state[f"model.{name}"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bare_weights_are_the_same_function(variant):
    """Where the pickle is gone, the class around the network has to be told, or is taken to be EDM's."""
    state = tensors(f"edm/{variant}.safetensors")
    precondition = meta("edm")[variant]["precond"]
    imported = edm.read_state(dict(state), "weights.pt", precondition=precondition)
    assert imported.card.notes == ()
    check(imported, variant)
    guessed = edm.read_state(state, "weights.pt")
    assert guessed.parameterization == EDM()
    assert "guess" in guessed.card.notes[-1]


def check(imported, variant):
    """The constructor's arguments are found again, and the numbers."""
    made, io = meta("edm")[variant], tensors(f"edm/{variant}.io.safetensors")
    config = imported.config
    assert isinstance(config, ADMConfig if made["model_type"] == "DhariwalUNet" else DDPMppConfig)
    assert config.resolution == made["img_resolution"]
    assert config.num_classes == made["label_dim"]
    assert config.channels == made["model_channels"]
    assert config.channel_mult == tuple(made["channel_mult"])
    assert config.num_blocks == made["num_blocks"]
    if isinstance(config, DDPMppConfig):
        assert config.augment_dim == made["augment_dim"]
        assert config.attention_resolutions == tuple(made["attn_resolutions"])
        assert config.channel_mult_noise == made.get("channel_mult_noise", 1)
        assert config.embedding == made.get("embedding_type", "positional")
        assert config.encoder == made.get("encoder_type", "standard")
        assert config.resample_filter == tuple(made.get("resample_filter", (1, 1)))
    model = assemble(imported)
    assert not imported.state, "assemble took all"
    labels = io["class_labels"].argmax(dim=1) if config.num_classes else None
    with torch.no_grad():
        close(model.denoised(io["x"], io["sigma"], labels), io["denoised"])
        if config.num_classes:
            close(model.denoised(io["x"], io["sigma"]), io["denoised_no_label"])
        if "augment_labels" in io:
            close(model.denoised(io["x"], io["sigma"], labels, io["augment_labels"]), io["denoised_augment"])


def test_half_precision_is_kept_until_the_model_is_made(tmp_path):
    content = snapshot("ddpmpp_edm_cond")
    content["ema"].half()
    imported = edm.read(written(tmp_path / "half.pkl", content))
    assert {tensor.dtype for tensor in imported.state.values()} == {torch.float16}
    model = assemble(imported)
    state = tensors("edm/ddpmpp_edm_cond.safetensors")
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"].half().float())


def test_a_snapshot_of_ect(tmp_path):
    """Evaluated as its own code does: with the scalings of a consistency function that starts at 0.003."""
    state = tensors("edm/ddpmpp_edm_cond.safetensors")
    made = meta("edm")["ddpmpp_edm_cond"]
    network = pickles.edm(made, state, "ECMPrecond", sigma_min=0.003, sigma_max=float("inf"), sigma_data=0.5)
    content = {"ema": network, "loss_fn": pickles.Loss(), "augment_pipe": None, "dataset_kwargs": {"path": "data.zip"}}
    imported = edm.read(written(tmp_path / "network-snapshot-latest.pkl", content), "consistency")
    assert (imported.path, imported.parameterization) == (VE(0.003, 80), BoundaryEDM(0.5, LogRatio(0.25)))
    assert imported.card.role == "consistency"
    assert imported.card.times == {"2": (80.0, 0.821)}
    assert imported.card.source == "ECT, network-snapshot-latest.pkl, ECMPrecond"
    assert any("trained with the scalings of EDM" in note for note in imported.card.notes)
    model = assemble(imported)
    io = tensors("edm/ddpmpp_edm_cond.io.safetensors")
    x, sigma, labels = io["x"], io["sigma"], io["class_labels"].argmax(dim=1)
    # F from the golden denoiser, then the eval branch of ECT by hand
    t = sigma.reshape(-1, 1, 1, 1)
    root = (t**2 + 0.25).sqrt()
    with torch.no_grad():
        raw = model.raw(x, sigma, None, labels)
        close(0.25 / root**2 * x + 0.5 * t / root * raw, io["denoised"])
        expected = 0.25 / ((t - 0.003) ** 2 + 0.25) * x + (t - 0.003) * 0.5 / root * raw
        close(model.jump(x, sigma, torch.full_like(sigma, 0.003), labels), expected)
        start = torch.full_like(sigma, 0.003)
        assert torch.equal(model.jump(x, start, start, labels), x)
