"""Snapshots of EDM, EDM2 and ECT: what is worked out, what is refused, and that damage is only ever one error."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool import networks
from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, CosineStep, Epsilon
from cmtool.io import loading
from cmtool.io.imported import assemble, blank, check_fit
from cmtool.io.importers import edm
from cmtool.networks import SIZES, ADMConfig, DDPMppConfig, EDM2Config
from cmtool.networks.adm import ResBlock
from tests import models, pickles


def theirs(config, **changes):
    """The state dict of EDM's network of this configuration, with random weights: our DDPM++ has its names."""
    network = models.model(config=config).network
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    return state | filters(config) | changes


def filters(config):
    taps = torch.tensor(getattr(config, "resample_filter", (1, 1)), dtype=torch.float32)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    names = [f"{r}x{r}" for r in networks.configs.level_resolutions(config.resolution, config.channel_mult)]
    blocks = [f"enc.{name}_down" for name in names[1:]] + [f"dec.{name}_up" for name in names[:-1]]
    found = {f"model.{block}.{part}.resample_filter": kernel for block in blocks for part in ("conv0", "skip")}
    if getattr(config, "encoder", "") == "residual":
        found |= {f"model.enc.{name}_aux_residual.resample_filter": kernel for name in names[1:]}
    return found


def written(path, state, name="EDMPrecond", constructed=None, protocol=4, around=None, **told):
    network = pickles.network(state, name, constructed=constructed or {}, **told)
    path.write_bytes(pickles.dumps({"ema": network, **(around or {})}, protocol))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network-snapshot-000100.pkl"


MICRO = models.micro(num_classes=3)
TOLD = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "sigma_min": 0,
    "sigma_max": math.inf,
    "sigma_data": 0.5,
}


build = functools.cache(functools.partial(blank, file="", entries=1000))


def fit(found):
    """The weights are named and shaped as the network wants them, else the one error."""
    check_fit(build(found.config), found.state, found.file)


def same(found, state):
    """The weights are those of the file."""
    fit(found)
    for name, tensor in found.state.items():
        assert torch.equal(tensor, state[f"model.{name}"])


# What is worked out.


@pytest.mark.parametrize(
    "config",
    [
        MICRO,
        models.micro(num_classes=0, augment_dim=9, embedding="fourier", channel_mult_noise=2),
        models.micro(encoder="residual", resample_filter=(1, 3, 3, 1), in_channels=1, out_channels=1),
        models.micro(attention_resolutions=(), channel_mult=(1, 2, 2), num_blocks=2, channel_mult_emb=2),
        models.micro(channel_mult=(1,), attention_resolutions=(8,)),
    ],
)
def test_the_network_follows_from_names_and_shapes(config, file):
    state = theirs(config)
    found = edm.read(written(file, state))
    assert found.config == config
    assert found.format == "edm"
    same(found, state)


@pytest.mark.parametrize("size", ["ddpmpp-cifar10", "ncsnpp-cifar10", "ddpmpp-ffhq64", "ncsnpp-ffhq64"])
def test_released_sizes(size):
    config = replace(SIZES[size](num_classes=10), dropout=0.0)
    with torch.device("meta"):
        state = {f"model.{name}": tensor for name, tensor in networks.build(config).state_dict().items()}
    found = edm.read_state(state | filters(config), "weights.safetensors")
    assert found.config == config
    fit(found)


def test_dropout_is_what_the_training_used(file):
    constructed = {"dropout": 0.13, "label_dropout": 0.1, "model_type": "SongUNet", "channel_mult": [1, 2]}
    config = edm.read(written(file, theirs(MICRO), constructed=constructed, **TOLD)).config
    assert (config.dropout, config.label_dropout) == (0.13, 0.1)


def test_the_loader_knows_the_format(file):
    model = loading.load(written(file, theirs(MICRO), **TOLD), role="denoiser")
    assert model.card.role == "denoiser"
    told, imported = loading.describe(file)
    assert told["format"] == imported.format == "edm"


def test_the_card(file):
    config = models.micro(resolution=32, num_classes=10, attention_resolutions=(16,))
    card = edm.read(written(file, theirs(config))).card
    assert (card.role, card.resolution, card.channels, card.num_classes) == ("denoiser", 32, 3, 10)
    assert (card.grid_points, card.grid_rho, card.times, card.notes) == (18, 7.0, {}, ())
    assert card.licence == "CC-BY-NC-SA-4.0"
    assert card.source == "NVlabs EDM, network-snapshot-000100.pkl, EDMPrecond"


def test_the_attributes_of_the_preconditioning(file):
    told = TOLD | {"sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 50}
    found = edm.read(written(file, theirs(MICRO), **told))
    assert (found.path, found.parameterization) == (VE(0.01, 50), EDM(0.7))
    # they win over the arguments, which may have been changed afterwards, and are there where those are not
    found = edm.read(written(file, theirs(MICRO), constructed={"sigma_data": 0.6}, **TOLD))
    assert found.parameterization == EDM(0.5)
    assert edm.read(written(file, theirs(MICRO), constructed={"sigma_data": 0.6})).parameterization == EDM(0.6)


def test_a_network_on_its_own_and_under_another_name(file):
    network = pickles.network(theirs(MICRO), "EDMPrecond", constructed={})
    for content in (network, {"net": network}, {"ema": None, "net": network}):
        file.write_bytes(pickles.dumps(content))
        assert edm.read(file).config == MICRO


# The preconditionings: what a network is told, and what is made of its answer.


def test_variance_preserving_times(file):
    """The time told at sigma(t) is 999 t."""
    imported = edm.read(written(file, theirs(MICRO), "VPPrecond", beta_d=19.9, beta_min=0.1, M=1000))
    t = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    sigma = (torch.exp(19.9 / 2 * t**2 + 0.1 * t) - 1).sqrt()
    torch.testing.assert_close(imported.parameterization.noise(imported.path, sigma), 999 * t)
    assert imported.path == VE(0.002, 80)  # within sigma(1e-5) = 0.001 and sigma(1) = 152
    other = edm.read(written(file, theirs(MICRO), "VPPrecond", beta_d=5.0, beta_min=0.2, M=101, epsilon_t=0.1))
    sigma = (torch.exp(5 / 2 * t**2 + 0.2 * t) - 1).sqrt()
    torch.testing.assert_close(other.parameterization.noise(other.path, sigma), 100 * t)
    assert other.path.t_min == pytest.approx(math.sqrt(math.exp(0.045) - 1))
    assert other.path.t_max == pytest.approx(math.sqrt(math.exp(2.7) - 1))


def test_variance_exploding_times(file):
    imported = edm.read(written(file, theirs(MICRO), "VEPrecond", sigma_min=0.02, sigma_max=100))
    sigma = torch.tensor([0.02, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(imported.parameterization.noise(imported.path, sigma), (sigma / 2).log())
    assert imported.path == VE(0.02, 80)
    assert edm.read(written(file, theirs(MICRO), "VEPrecond")).path == VE(0.02, 80)


@functools.cache
def cosine_levels(steps=1000, c1=0.001, c2=0.008):
    """u_0 to u_M as their code computes them, in float32: table 1 of the EDM paper, last column."""
    u = torch.zeros(steps + 1)
    bar = torch.sin(torch.arange(steps + 1) * (0.5 * math.pi / steps / (c2 + 1))) ** 2
    for j in range(steps, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (bar[j - 1] / bar[j]).clip(min=c1) - 1).sqrt()
    return u


@pytest.mark.parametrize("form", ["pickle", "state"])
def test_iddpm(form, file):
    """Twice the channels, of which the first half are the noise; told the nearest step of a table."""
    config = models.micro(out_channels=6)
    state = theirs(config, u=cosine_levels())
    if form == "pickle":
        imported = edm.read(written(file, state, "iDDPMPrecond", M=1000, C_1=0.001, C_2=0.008))
    else:
        imported = edm.read_state(dict(state), "weights.pt")
    assert imported.parameterization == Epsilon(time_input=CosineStep(1000, 0.001, 0.008))
    assert imported.path.t_min == pytest.approx(float(cosine_levels()[-2]), rel=0.01)
    assert imported.path.t_max == 80
    assert imported.config == models.micro()
    assert imported.card.channels == 3
    model = assemble(imported)
    network = models.model(config=config).network  # with all six channels
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0.013, 0.5, 7.0, 79.0])
    step = 999 - (cosine_levels()[None] - sigma[:, None]).abs().argmin(1).float()
    t = sigma[:, None, None, None]
    with torch.no_grad():
        expected = x - t * network(x / (t**2 + 1).sqrt(), step)[:, :3]
        torch.testing.assert_close(model.denoised(x, sigma), expected, rtol=1e-5, atol=1e-5)


def test_iddpm_with_other_levels_or_channels(file):
    state = theirs(models.micro(out_channels=6), u=cosine_levels())
    with pytest.raises(CheckpointError, match="not those of the cosine schedule"):
        edm.read(written(file, state | {"u": cosine_levels() * 1.1}, "iDDPMPrecond"))
    with pytest.raises(CheckpointError, match="not those of the cosine schedule"):
        edm.read(written(file, state, "iDDPMPrecond", M=500))
    with pytest.raises(CheckpointError, match="3 output channels for 3 of input"):
        edm.read(written(file, theirs(MICRO, u=cosine_levels()), "iDDPMPrecond"))
    del state["u"]
    with pytest.raises(CheckpointError, match="6 output channels for 3 of input"):
        edm.read(written(file, state, "EDMPrecond"))


# ADM: other names, other layouts.


def adm_shapes(config):
    """Names and shapes of EDM's ADM, module by module in the order of its constructor."""
    emb, found = 4 * config.channels, {}

    def layer(name, *shape, bias=True):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def block(name, width, out, attention=False, resampled=False):
        layer(f"{name}.norm0", width)
        layer(f"{name}.conv0", out, width, 3, 3)
        layer(f"{name}.affine", 2 * out, emb)
        layer(f"{name}.norm1", out)
        layer(f"{name}.conv1", out, out, 3, 3)
        if width != out:
            layer(f"{name}.skip", out, width, 1, 1)
        if attention and out >= 64:
            layer(f"{name}.norm2", out)
            layer(f"{name}.qkv", 3 * out, out, 1, 1)
            layer(f"{name}.proj", out, out, 1, 1)

    layer("model.map_layer0", emb, config.channels)
    layer("model.map_layer1", emb, emb)
    if config.num_classes:
        layer("model.map_label", emb, config.num_classes, bias=False)
    skips, width = [], config.in_channels
    for level, mult in enumerate(config.channel_mult):
        side, out = config.resolution >> level, config.channels * mult
        if level == 0:
            layer(f"model.enc.{side}x{side}_conv", out, width, 3, 3)
            width = out
        else:
            block(f"model.enc.{side}x{side}_down", width, width)
        skips.append(width)
        for index in range(config.num_blocks):
            block(f"model.enc.{side}x{side}_block{index}", width, out, side in config.attention_resolutions)
            width = out
            skips.append(width)
    for level in reversed(range(len(config.channel_mult))):
        side, out = config.resolution >> level, config.channels * config.channel_mult[level]
        if level == len(config.channel_mult) - 1:
            block(f"model.dec.{side}x{side}_in0", width, width, True)
            block(f"model.dec.{side}x{side}_in1", width, width)
        else:
            block(f"model.dec.{side}x{side}_up", width, width)
        for index in range(config.num_blocks + 1):
            wide = width + skips.pop()
            block(f"model.dec.{side}x{side}_block{index}", wide, out, side in config.attention_resolutions)
            width = out
    layer("model.out_norm", width)
    layer("model.out_conv", config.out_channels, width, 3, 3)
    return found


ADM = {
    "imagenet64": ADMConfig(num_classes=1000, group_channels=4),
    "two_heads": ADMConfig(
        resolution=16, num_classes=3, channels=64, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,),
        group_channels=4,
    ),
    "no_attention_but_in_the_middle": ADMConfig(
        resolution=16, channels=64, channel_mult=(1, 1, 2), num_blocks=2, attention_resolutions=(), group_channels=4
    ),
    "one_wide_head": ADMConfig(
        resolution=8, channels=48, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), group_channels=4,
        head_channels=0, num_heads=1,
    ),
    "none_at_all": ADMConfig(
        resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(), group_channels=4,
        head_channels=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", ADM.values(), ids=ADM.keys())
def test_adm_follows_from_names_and_shapes(config):
    state = {name: torch.empty(shape, device="meta") for name, shape in adm_shapes(config).items()}
    found = edm.read_state(state | filters(config), "weights.pt")
    assert found.config == config
    fit(found)


def test_adm_modules_do_the_same_under_both_names():
    """Each of their resampling blocks is a resampling block of ours, and blocks come in the same order."""
    config = ADM["two_heads"]
    with torch.device("meta"):
        network = networks.build(config)
    names = dict(edm._modules(config))
    assert len(set(names.values())) == len(names)
    ours = {name.rsplit(".in_layers", 1)[0]: theirs for theirs, name in names.items() if name.endswith("in_layers.0")}
    for name, module in network.named_modules():
        if isinstance(module, ResBlock):
            assert name in ours
            direction = None if module.resample is None else "up" if module.resample.up else "down"
            assert direction == next((way for way in ("up", "down") if ours[name].endswith(f"_{way}.norm0")), None)
    order = [theirs for name, module in network.named_modules() if (theirs := ours.get(name))]
    blocks = [name.removeprefix("model.").removesuffix(".weight") for name in adm_shapes(config)]
    assert order == [name for name in blocks if name.endswith(".norm0")]


def test_adm_weights_in_their_layout():
    """Rows of q, k and v that alternate there are blocks here; the table of labels is transposed."""
    config = ADM["two_heads"]
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in adm_shapes(config).items()}
    kept = dict(state)
    found = edm.read_state(state | filters(config), "weights.pt").state
    assert torch.equal(found["label_emb.weight"], kept["model.map_label.weight"].t())
    for part in ("weight", "bias"):
        rows = kept[f"model.dec.8x8_in0.qkv.{part}"]
        assert torch.equal(found[f"middle_block.1.qkv.{part}"], torch.cat([rows[0::3], rows[1::3], rows[2::3]]))
    assert torch.equal(found["out.2.weight"], kept["model.out_conv.weight"])


def test_adm_variants_that_are_not_known():
    config = ADM["two_heads"]
    state = {name: torch.zeros(shape) for name, shape in adm_shapes(config).items()}
    with pytest.raises(CheckpointError, match="augmentation labels"):
        edm.read_state(state | {"model.map_augment.weight": torch.zeros(64, 9)}, "weights.pt")
    odd = ADMConfig(
        resolution=8, channels=48, channel_mult=(2, 3), num_blocks=1, attention_resolutions=(8,), head_channels=0
    )
    state = {name: torch.zeros(shape) for name, shape in adm_shapes(odd).items()}
    with pytest.raises(CheckpointError, match="heads of 64"):
        edm.read_state(state, "weights.pt")  # 96 channels in one head, 144 in two


# EDM2 and ECT.

SECOND = EDM2Config(
    resolution=8, in_channels=4, out_channels=4, num_classes=3, channels=64, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), res_balance=0.25,
)  # fmt: skip


def second(config=SECOND, head=True):
    network = models.model(config=config).network
    state = {f"unet.{name}": tensor for name, tensor in network.state_dict().items()}
    if head:
        state |= {"logvar_fourier.freqs": torch.ones(4), "logvar_fourier.phases": torch.ones(4)}
        state |= {"logvar_linear.weight": torch.ones(1, 4)}
    return state


SECOND_TOLD = {"img_resolution": 8, "img_channels": 4, "label_dim": 3, "sigma_data": 0.6}
SECOND_MADE = {"model_channels": 64, "channel_mult": [1, 2], "res_balance": 0.25, "dropout": 0.1}


def test_edm2(file):
    state = second()
    network = pickles.network(state, "Precond", constructed=SECOND_MADE, **SECOND_TOLD).half()
    file.write_bytes(pickles.dumps(pickles.EasyDict(encoder=pickles.Encoder(), ema=network)))
    found = edm.read(file, "denoiser")
    assert found.format == "edm2"
    assert (found.config.res_balance, found.config.dropout, found.config.channels) == (0.25, 0.1, 64)
    assert (found.path, found.parameterization) == (VE(0.002, 80), EDM(0.6))
    assert (found.card.role, found.card.channels, found.card.grid_points) == ("denoiser", 4, 32)
    assert found.card.source == "NVlabs EDM2, network-snapshot-000100.pkl, Precond"
    assert any(note.startswith("latents of an autoencoder, not pixels") for note in found.card.notes)
    assert all(torch.equal(tensor, state[f"unet.{name}"].half()) for name, tensor in found.state.items())
    assemble(found)


def test_ect_on_edm2(file):
    """The loss beside it tells: the network's class is that of EDM2 itself."""
    options = {"constructed": SECOND_MADE, **SECOND_TOLD}
    written(file, second(head=False), "Precond", around={"loss_fn": pickles.Loss()}, **options)
    found = edm.read(file)
    assert (found.card.role, found.card.times) == ("consistency", {"2": (80.0, 1.526)})
    assert found.parameterization == EDM(0.6)
    with pytest.raises(CheckpointError, match="is a consistency model, and a denoiser"):
        edm.read(file, "denoiser")


def test_bare_weights_of_edm2():
    assert edm.read_state(second(), "weights.pt").card.role == "denoiser"
    assert edm.read_state(second(head=False), "weights.pt", "consistency").card.role == "consistency"
    with pytest.raises(CheckpointError, match="is a denoiser"):
        edm.read_state(second(), "weights.pt", "consistency")


# What is refused.


@pytest.mark.parametrize(("name", "role"), [("EDMPrecond", "consistency"), ("ECMPrecond", "denoiser")])
def test_another_role(name, role, file):
    for wanted in (role, "flow_map"):
        with pytest.raises(CheckpointError, match="is needed"):
            edm.read(written(file, theirs(MICRO), name), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [("img_resolution", 16), ("img_channels", 1), ("label_dim", 0), ("model_channels", 12), ("img_resolution", [8])],
)
def test_what_the_pickle_says_is_not_what_it_holds(name, value, file):
    told = {**TOLD, name: value} if name in TOLD else TOLD
    constructed = {} if name in TOLD else {name: value}
    with pytest.raises(CheckpointError, match=f"says {name} is"):
        edm.read(written(file, theirs(MICRO), constructed=constructed, **told))


NAN = math.nan


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"sigma_data": 0.0}, "sigma_data is 0"),
        ({"sigma_data": NAN}, "sigma_data is no number"),
        ({"sigma_data": "0.5"}, "sigma_data is no number"),
        ({"sigma_data": None}, "sigma_data is no number"),
        ({"sigma_min": 100.0}, "t_min < t_max"),
        ({"sigma_min": NAN}, "sigma_min is no number"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_attributes_that_make_no_sense(told, match, file):
    with pytest.raises(CheckpointError, match=match):
        edm.read(written(file, theirs(MICRO), **told))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("VPPrecond", {"beta_d": -1.0}),
        ("VPPrecond", {"beta_d": 1e9}),
        ("iDDPMPrecond", {"M": 1e12}),
        ("iDDPMPrecond", {"M": 10.5}),
    ],
)
def test_schedules_that_make_no_sense(name, told, file):
    with pytest.raises(CheckpointError, match=f"does not fit {name}"):
        edm.read(written(file, theirs(models.micro(out_channels=6)), name, **told))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "something else than a network"),
        (pickles.EasyDict(G_ema=1, D=2), "it holds G_ema, D"),
        ({"ema": {"weight": 1}}, "without a network of EDM's under ema or net"),
        ({"ema": pickles.Module("SynthesisNetwork")}, "of the class SynthesisNetwork, which cmtool does not know"),
        ({"ema": torch.nn.ModuleDict()}, "of the class ModuleDict"),
        ({"ema": pickles.Loss()}, "of the class ECMLoss"),
        ({"ema": pickles.Module("a\x1b[2Jb")}, r"of the class a\\x1b\[2Jb"),
    ],
)
def test_pickles_of_something_else(content, match, file):
    file.write_bytes(pickles.dumps(content))
    with pytest.raises(CheckpointError, match=match):
        edm.read(file)


@pytest.mark.parametrize("part", ["_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"])
def test_a_network_that_is_no_module(part, file):
    network = pickles.network(theirs(MICRO), "EDMPrecond", constructed={})
    for value in ([1], {"weight": 3}):
        network.__dict__[part] = value
        file.write_bytes(pickles.dumps({"ema": network}))
        with pytest.raises(CheckpointError, match="no module of torch's"):
            edm.read(file)


def test_a_network_within_itself(file):
    network = pickles.network(theirs(MICRO), "EDMPrecond", constructed={})
    loop = torch.nn.ModuleDict()
    loop._modules["again"] = loop
    network._modules["loop"] = loop
    file.write_bytes(pickles.dumps({"ema": network}))
    with pytest.raises(CheckpointError, match="no module of torch's"):
        edm.read(file)


def test_a_network_of_too_many_parts(file):
    """Two children that are the same one, over and over: thousands of parts in a few objects."""
    child = torch.nn.ModuleDict()
    for _ in range(15):
        parent = torch.nn.ModuleDict()
        parent._modules.update({str(index): child for index in range(4)})
        child = parent
    network = pickles.Module("EDMPrecond")
    network._modules["model"] = child
    file.write_bytes(pickles.dumps({"ema": network}))
    with pytest.raises(CheckpointError, match="no module of torch's"):
        edm.read(file)


VARIANTS = {
    "skip_encoder": (
        {"model.enc.4x4_aux_skip.weight": torch.ones(8, 3, 1, 1)},
        "enc.4x4_aux_skip.weight belongs to a variant",
    ),
    "skip_decoder": (
        {"model.dec.8x8_aux_up.resample_filter": torch.ones(1, 1, 2, 2) / 4},
        "dec.8x8_aux_up.resample_filter belongs to a variant",
    ),
    "second_stem": ({"model.enc.16x16_conv.weight": torch.ones(8, 3, 3, 3)}, "no single first convolution"),
    "odd_level": ({"model.enc.5x5_block0.norm0.weight": torch.ones(8)}, "do not halve the resolution 8"),
    "filter": ({"model.enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)}, "resampling filter"),
    "long_filter": (
        {"model.enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 40, 40)},
        "no size that goes together",
    ),
    "one_other_filter": ({"model.dec.8x8_up.skip.resample_filter": torch.ones(1, 1, 4, 4) / 16}, "resampling filter"),
    "integers": (
        {"model.map_layer0.weight": torch.ones(32, 8, dtype=torch.int64)},
        "no array of real numbers but torch",
    ),
    "booleans": ({"model.map_layer0.weight": torch.ones(32, 8, dtype=torch.bool)}, "torch.bool"),
    "flat": ({"model.map_layer0.weight": torch.ones(256)}, "map_layer0.weight has shape"),
    "other_width": ({"model.map_layer0.weight": torch.ones(33, 8)}, "33 channels is no multiple of 8"),
    "empty": ({"model.map_layer0.weight": torch.ones(0, 8)}, "map_layer0.weight has shape"),
    "edm2_inside": ({"model.emb_fourier.phases": torch.ones(4)}, "emb_fourier.phases belongs to a variant"),
}


@pytest.mark.parametrize(("tensors", "match"), VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_that_are_not_known(tensors, match, file):
    with pytest.raises(CheckpointError, match=match):
        assemble(edm.read(written(file, theirs(MICRO) | tensors)))


@pytest.mark.parametrize("config", [MICRO, models.micro(embedding="fourier", encoder="residual")], ids=["pp", "ncsn"])
def test_each_tensor_that_is_missing(config):
    """Whatever is taken away, the model is not made; a whole part that has a switch may be left out."""
    state = theirs(config)
    for name in state:
        if name.endswith(("resample_filter", "freqs")) or "map_label" in name:
            continue  # copies of a constant, and switches of the architecture
        rest = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(CheckpointError):
            fit(edm.read_state(rest, "weights.pt"))


def test_tensors_that_are_extra_or_not_finite(file):
    state = theirs(MICRO)
    with pytest.raises(CheckpointError, match=r"extra.weight is not part of the network"):
        assemble(edm.read(written(file, state | {"model.extra.weight": torch.ones(2)})))
    state["model.map_layer1.weight"] = torch.full((32, 32), math.nan)
    with pytest.raises(CheckpointError, match=r"not finite, in map_layer1.weight"):
        assemble(edm.read(written(file, state)))


# Damage.


@functools.cache
def genuine():
    """A whole snapshot in few bytes, and which of them are instructions rather than weights."""
    config = DDPMppConfig(
        resolution=4, channels=4, channel_mult=(1, 1), num_blocks=1, attention_resolutions=(), channel_mult_emb=1
    )
    made = {"model_type": "SongUNet", "channel_mult": [1, 1], "dropout": 0.1}
    told = {"img_resolution": 4, "img_channels": 3, "label_dim": 0, "sigma_min": 0, "sigma_max": math.inf}
    network = pickles.network(theirs(config), "EDMPrecond", constructed=made, sigma_data=0.5, **told)
    for module in network.modules():
        if isinstance(module, pickles.Module):
            module.source = "import torch"
    data = pickles.dumps({"ema": network, "loss_fn": pickles.Loss()})
    return config, data


def outcome(path, data):
    """None for the one error that damage may cause, else the model."""
    path.write_bytes(data)
    try:
        return assemble(edm.read(path))
    except CheckpointError:
        return None


def test_the_snapshot_that_is_damaged_below(file):
    config, data = genuine()
    model = outcome(file, data)
    assert model.network.config == networks.configs.DDPMppConfig(**{**vars(config), "dropout": 0.1})


@settings(max_examples=50)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_beginning_is_an_error(share, tmp_path_factory):
    _, data = genuine()
    assert outcome(tmp_path_factory.getbasetemp() / "cut.pkl", data[: int(share * len(data))]) is None


@settings(max_examples=100)
@given(where=st.integers(0), flip=st.integers(1, 255))
def test_any_changed_byte_is_an_error_or_a_model(where, flip, tmp_path_factory):
    """Never another exception; and a model that is made has tensors of the shapes that it declares."""
    _, data = genuine()
    where %= len(data)
    path = tmp_path_factory.getbasetemp() / "flipped.pkl"
    model = outcome(path, data[:where] + bytes([data[where] ^ flip]) + data[where + 1 :])
    if model is not None:
        expected = networks.build(model.network.config).state_dict()
        assert {name: tensor.shape for name, tensor in model.network.state_dict().items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
