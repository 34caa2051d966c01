"""The networks reproduce the outputs of the original implementations from the original weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmtool.io.importers.edm import openai_names, qkv_blocks, take_filters
from cmtool.networks import ADMConfig, DDPMppConfig, build
from cmtool.networks.adm import Attention
from tests.parity.goldens import meta, tensors

Coefficients = tuple[Tensor | float, Tensor | float, Tensor | float, Tensor]  # skip, out, in, noise


def edm(sigma: Tensor) -> Coefficients:
    """Karras et al. (2022), table 1, with sigma_data 0.5."""
    total = (sigma**2 + 0.25).sqrt()
    return 0.25 / total**2, 0.5 * sigma / total, 1 / total, sigma.log() / 4


def vp(sigma: Tensor) -> Coefficients:
    beta_d, beta_min, steps = 19.9, 0.1, 1000
    time = ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d
    return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (steps - 1) * time


def ve(sigma: Tensor) -> Coefficients:
    return 1, sigma, 1, (sigma / 2).log()


def close(found: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    """Equal up to float32 rounding, measured against the largest value."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("variant", ["imagenet64_like", "lsun256_like", "conv_resample"])
def test_openai_networks(variant):
    made = meta("openai")["unet_variants"][variant]
    config = ADMConfig(
        resolution=made["image_size"],
        num_classes=made["num_classes"] or 0,
        channels=made["model_channels"],
        channel_mult=tuple(made["channel_mult"]),
        num_blocks=made["num_res_blocks"],
        attention_resolutions=tuple(made["image_size"] // factor for factor in made["attention_resolutions"]),
        head_channels=made.get("num_head_channels", 0),
        num_heads=made.get("num_heads", 1),
        scale_shift_norm=made["use_scale_shift_norm"],
        resblock_updown=made["resblock_updown"],
    )
    network = build(config).eval()
    weights = tensors(f"openai/{variant}.pt")
    assert list(network.state_dict()) == list(weights), "names and their order"
    network.load_state_dict(weights)
    io = tensors(f"openai/{variant}.io.safetensors")
    with torch.no_grad():
        out = network(io["x"], io["rescaled_t"], io["y"] if config.num_classes else None)
    close(out, io["network_out"])


@pytest.mark.parametrize(
    ("variant", "precondition"),
    [
        ("ddpmpp_edm_cond", edm),
        ("ncsnpp_edm_uncond", edm),
        ("adm_edm_cond", edm),
        ("ddpmpp_vp_uncond", vp),
        ("ncsnpp_ve_uncond", ve),
    ],
)
def test_edm_networks(variant: str, precondition: Callable[[Tensor], Coefficients]):
    made = meta("edm")[variant]
    weights = {key.removeprefix("model."): value for key, value in tensors(f"edm/{variant}.safetensors").items()}
    if made["model_type"] == "DhariwalUNet":
        # 32 channels are half a head of 64 there: no attention at all, and groups of 4 channels
        config = ADMConfig(
            resolution=made["img_resolution"],
            num_classes=made["label_dim"],
            channels=made["model_channels"],
            channel_mult=tuple(made["channel_mult"]),
            num_blocks=made["num_blocks"],
            attention_resolutions=(),
            head_channels=0,
            group_channels=4,
        )
        assert take_filters(weights) == (1, 1)
        weights = openai_names(weights, config)
    else:
        config = DDPMppConfig(
            resolution=made["img_resolution"],
            num_classes=made["label_dim"],
            augment_dim=made["augment_dim"],
            channels=made["model_channels"],
            channel_mult=tuple(made["channel_mult"]),
            channel_mult_noise=made.get("channel_mult_noise", 1),
            num_blocks=made["num_blocks"],
            attention_resolutions=tuple(made["attn_resolutions"]),
            embedding=made.get("embedding_type", "positional"),
            encoder=made.get("encoder_type", "standard"),
            resample_filter=tuple(made.get("resample_filter", (1, 1))),
        )
    network = build(config).eval()
    network.load_state_dict(weights)
    io = tensors(f"edm/{variant}.io.safetensors")
    x, labels = io["x"], io["class_labels"].argmax(dim=1) if config.num_classes else None
    skip, out, scale, noise = precondition(io["sigma"].reshape(-1, 1, 1, 1))

    def close_to(name: str, labels: Tensor | None = None, augment: Tensor | None = None) -> None:
        with torch.no_grad():
            raw = network(scale * x, noise.flatten(), labels, augment)
        # what the network itself has to have said: sharper than comparing sums in which it is a small term
        close(raw, (io[name] - skip * x) / out, tolerance=1e-4)
        close(skip * x + out * raw, io[name])

    close_to("denoised", labels)
    if config.num_classes:
        close_to("denoised_no_label")
    if "augment_labels" in io:
        close_to("denoised_augment", labels, io["augment_labels"])


def test_edm_attention_rows():
    """Attention with several heads, as the EDM release lays out its rows: head, channel, then q, k, v."""
    width, heads, batch, side = 32, 4, 2, 3
    config = ADMConfig(resolution=side, channels=width, channel_mult=(1,), attention_resolutions=(), head_channels=8)
    layer = Attention(config, width).double()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * width, width, 1, 1, generator=generator, dtype=torch.float64) / math.sqrt(width)
    bias = torch.randn(3 * width, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, width, side, side, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.qkv.weight.copy_(qkv_blocks(weight))
        layer.qkv.bias.copy_(qkv_blocks(bias))
        layer.proj_out.weight.copy_(torch.eye(width)[:, :, None, None])
        found = layer(x) - x
        rows = torch.nn.functional.conv2d(layer.norm(x), weight, bias)
    q, k, v = rows.reshape(batch * heads, width // heads, 3, side**2).unbind(2)
    shares = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(width // heads)).softmax(dim=2)
    torch.testing.assert_close(found, torch.einsum("nqk,nck->ncq", shares, v).reshape(x.shape))
