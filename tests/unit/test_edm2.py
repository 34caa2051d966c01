"""The magnitude-preserving network of Karras et al. (2023) and the release's state dicts of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtool import spec
from cmtool.errors import CheckpointError
from cmtool.io.importers import edm2
from cmtool.networks import CONFIGS, SIZES, EDM2Config, build, load_start, restore_constants
from cmtool.networks.edm2 import MPConv, balance, concat, magnitude, normalise

CONFIG = EDM2Config(
    resolution=8,
    num_classes=4,
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=16,
)
ODD = (
    EDM2Config(  # nothing at its default, attention at the finest level, heads of 10, 8 and 8 channels, limits reached
        resolution=8,
        in_channels=2,
        out_channels=5,
        num_classes=3,
        channels=4,
        channel_mult=(5, 3, 6),
        noise_channels=7,
        emb_channels=9,
        num_blocks=2,
        attention_resolutions=(8, 2),
        head_channels=8,
        label_balance=0.3,
        concat_balance=0.6,
        res_balance=0.4,
        attn_balance=0.2,
        clip_act=1.5,
    )
)
WITHOUT_LABELS = replace(CONFIG, num_classes=0)
GAPS = torch.tensor([0.0, 1 / 128, 1.5])
# the first forward-mode derivative loads parts of torch that still use a deprecated compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def network_and_inputs(config, dtype=torch.float32):
    """A network whose gains are not zero, as those of fresh ones are, and inputs."""
    torch.manual_seed(0)
    network = build(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.5, 1)
            elif name == "map_gap.weight":
                parameter.normal_().div_(parameter.shape[1] ** 0.5)
            else:
                parameter.mul_(torch.empty(len(parameter), *(1,) * (parameter.ndim - 1)).uniform_(0.2, 5))
    x = torch.randn(3, config.in_channels, config.resolution, config.resolution, dtype=dtype)
    labels = torch.tensor([2, 0, config.num_classes - 1]) if config.num_classes else None
    return network, x, torch.tensor([-1.0, 0.1, 0.9]), labels


def distance(found, expected):
    """The norm of the difference, relative."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# The equations, in float64, from a state dict and nothing else but the numbers of the configuration.


def unit(x, dims):
    return x / (1e-4 + x.pow(2).mean(dims, keepdim=True).sqrt())


def layer(state, name, x):
    """A convolution as a product of matrices: all patches times all weights."""
    weight = state[f"{name}.weight"]
    weight = unit(weight, tuple(range(1, weight.ndim))) / math.sqrt(weight[0].numel())
    if weight.ndim == 2:
        return torch.einsum("oi,bi->bo", weight, x)
    size = weight.shape[-1]
    patches = F.unfold(x, size, padding=size // 2)
    return torch.einsum("oi,bip->bop", weight.flatten(1), patches).unflatten(2, x.shape[2:])


def silu(x):
    return x / (1 + torch.exp(-x)) / 0.596


def mix(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def join(a, b, t):
    wide = a.shape[1] + b.shape[1]
    root = math.sqrt(wide / ((1 - t) ** 2 + t**2))
    return torch.cat([a * root / math.sqrt(a.shape[1]) * (1 - t), b * root / math.sqrt(b.shape[1]) * t], 1)


def attention(state, name, x, heads):
    batch, channels, height, width = x.shape
    rows = layer(state, f"{name}.attn_qkv", x)
    out = torch.zeros_like(x)
    size = channels // heads
    for head in range(heads):
        own = range(head * size, (head + 1) * size)
        q, k, v = (
            unit(torch.stack([rows[:, 3 * c + part] for c in own], 1).reshape(batch, size, -1), 1) for part in range(3)
        )
        shares = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(size), 2)
        out[:, list(own)] = torch.einsum("bqk,bck->bcq", shares, v).reshape(batch, size, height, width)
    return layer(state, f"{name}.attn_proj", out)


def block(state, name, x, emb, config, side):
    if name.endswith("_down"):
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    if name.endswith("_up"):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    skip = f"{name}.conv_skip.weight" in state
    if side == "enc":
        x = unit(layer(state, f"{name}.conv_skip", x) if skip else x, 1)
    y = layer(state, f"{name}.conv_res0", silu(x))
    c = state[f"{name}.emb_gain"] * layer(state, f"{name}.emb_linear", emb) + 1
    y = layer(state, f"{name}.conv_res1", silu(y * c[:, :, None, None]))
    if side == "dec" and skip:
        x = layer(state, f"{name}.conv_skip", x)
    x = mix(x, y, config.res_balance)
    if f"{name}.attn_qkv.weight" in state:
        y = attention(state, name, x, x.shape[1] // config.head_channels)
        x = mix(x, y, config.attn_balance)
    return torch.minimum(torch.maximum(x, -torch.tensor(config.clip_act)), torch.tensor(config.clip_act))


def reference(state, config, x, noise, labels):
    state = {name: value.double() for name, value in state.items()}
    features = math.sqrt(2) * torch.cos(torch.outer(noise, state["emb_fourier.freqs"]) + state["emb_fourier.phases"])
    emb = layer(state, "emb_noise", features)
    if config.num_classes:
        one_hot = torch.zeros(len(x), config.num_classes, dtype=torch.float64)
        for row, label in zip(one_hot, labels, strict=True):
            if label >= 0:
                row[label] = math.sqrt(config.num_classes)
        emb = mix(emb, layer(state, "emb_label", one_hot), config.label_balance)
    emb = silu(emb)
    sides = [config.resolution // 2**level for level in range(len(config.channel_mult))]
    x = layer(state, f"enc.{sides[0]}x{sides[0]}_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1))
    seen = [x]
    for side in sides:
        own = [f"enc.{side}x{side}_block{i}" for i in range(config.num_blocks)]
        for name in own if side == sides[0] else [f"enc.{side}x{side}_down", *own]:
            x = block(state, name, x, emb, config, "enc")
            seen.append(x)
    for side in sides[::-1]:
        for begin in ("in0", "in1") if side == sides[-1] else ("up",):
            x = block(state, f"dec.{side}x{side}_{begin}", x, emb, config, "dec")
        for i in range(config.num_blocks + 1):
            x = join(x, seen.pop(), config.concat_balance)
            x = block(state, f"dec.{side}x{side}_block{i}", x, emb, config, "dec")
    assert not seen
    return state["out_gain"] * layer(state, "out_conv", x)


@pytest.mark.parametrize("config", [CONFIG, ODD, WITHOUT_LABELS], ids=["plain", "odd", "without labels"])
def test_equations(config):
    network, x, noise, labels = network_and_inputs(config, torch.float64)
    noise = noise.double()
    if labels is not None:
        labels[1] = -1
    expected = reference(network.state_dict(), config, x, noise, labels)
    found = network.double()(x, noise, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert 0.3 < expected.square().mean().sqrt() < 1.5
    unlimited = build(replace(config, clip_act=0.0)).double()
    unlimited.load_state_dict(network.state_dict())
    assert (distance(unlimited(x, noise, labels), found) > 1e-3) == (config == ODD), (
        "the limit is reached where it is low"
    )
    assert torch.equal(network(x, noise, None if labels is None else labels.new_full((3,), -1)), network(x, noise))


def test_names_and_shapes():
    """Those of the release, for a small network."""
    shapes = {name: tuple(value.shape) for name, value in build(CONFIG).state_dict().items()}
    expected = {
        "emb_fourier.freqs": (16,),
        "emb_fourier.phases": (16,),
        "emb_noise.weight": (32, 16),
        "emb_label.weight": (32, 4),
        "out_gain": (),
        "enc.8x8_conv.weight": (16, 4, 3, 3),
        "out_conv.weight": (3, 16, 3, 3),
    }

    def add(name, inputs, out, first, *, attention=False):
        expected[f"{name}.emb_gain"] = ()
        expected[f"{name}.conv_res0.weight"] = (out, first, 3, 3)
        expected[f"{name}.emb_linear.weight"] = (out, 32)
        expected[f"{name}.conv_res1.weight"] = (out, out, 3, 3)
        if inputs != out:
            expected[f"{name}.conv_skip.weight"] = (out, inputs, 1, 1)
        if attention:
            expected[f"{name}.attn_qkv.weight"] = (3 * out, out, 1, 1)
            expected[f"{name}.attn_proj.weight"] = (out, out, 1, 1)

    add("enc.8x8_block0", 16, 16, 16)
    add("enc.4x4_down", 16, 16, 16)
    add("enc.4x4_block0", 16, 32, 32, attention=True)
    add("dec.4x4_in0", 32, 32, 32, attention=True)
    add("dec.4x4_in1", 32, 32, 32)
    add("dec.4x4_block0", 64, 32, 64, attention=True)
    add("dec.4x4_block1", 48, 32, 48, attention=True)
    add("dec.8x8_up", 32, 32, 32)
    add("dec.8x8_block0", 48, 16, 48)
    add("dec.8x8_block1", 32, 16, 32)
    assert shapes == expected


# Magnitudes


def test_magnitudes_are_preserved():
    """At the start, whatever the embedding does, all layers keep unit variance; the output is silent."""
    torch.manual_seed(0)
    network = build(replace(CONFIG, resolution=16, channels=64, num_blocks=2, attention_resolutions=(8,))).eval()
    x, noise, labels = torch.randn(8, 3, 16, 16), torch.randn(8), torch.arange(8) % 4
    assert not network(x, noise, labels).any()
    sizes = {}
    for name, module in network.named_modules():
        if name.startswith(("enc.", "dec.")) and name.count(".") == 1:
            module.register_forward_hook(
                lambda _, inputs, out, name=name: sizes.update({name: out.square().mean().sqrt().item()})
            )
    with torch.no_grad():
        network.out_gain.fill_(1)
        out = network(x, noise, labels)
        emb = network.embed(noise, labels, torch.zeros(8))
    assert len(sizes) == len(network.enc) + len(network.dec)
    assert all(0.8 < size < 1.1 for size in sizes.values()), sizes
    assert 0.7 < out.square().mean().sqrt() < 1.1  # zeros around the image make it a little smaller
    assert 0.9 < emb.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_sums_and_concatenations_keep_magnitudes(share):
    torch.manual_seed(0)
    x, y = torch.randn(4, 48, 32, 32), torch.randn(4, 16, 32, 32)
    keep, factor = balance(share)
    assert keep**2 + factor**2 == pytest.approx(1)
    out = concat(x, y, share)
    assert out.square().mean().item() == pytest.approx(1, abs=0.02)
    parts = [part.square().sum().item() / x[:, :1].numel() / 64 for part in out.split([48, 16], 1)]
    assert parts == pytest.approx([keep**2, factor**2], abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_magnitudes_are_measured_in_full_precision(dtype):
    x = (torch.randn(2, 512, 4, 4) * 200).to(dtype)
    expected = x.double().square().mean(1, keepdim=True).sqrt()
    found = magnitude(x, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
    out = normalise(x, 1)
    assert out.dtype == dtype
    assert distance(out, x / expected) < 0.004


def test_zeros_are_kept():
    """What has no magnitude stays zero, with a gradient."""
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    out = normalise(x, 1)
    assert not out.any()
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 1e4))


def test_only_directions_of_weights_count():
    """Weights of any length make one network, but for the 1e-4 that keeps zeros from being divided by zero."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    expected = network(x, noise, labels)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, MPConv):
                module.weight.mul_(torch.empty(len(module.weight), *(1,) * (module.weight.ndim - 1)).uniform_(1, 9))
    assert distance(network(x, noise, labels), expected) < 2e-3


# Training


def lengths(network):
    return [
        module.weight.square().mean(tuple(range(1, module.weight.ndim))).sqrt()
        for module in network.modules()
        if isinstance(module, MPConv)
    ]


def test_forced_normalisation():
    """Training rewrites the weights to length 1 and only to that; evaluation and frozen weights stay."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    before = copy.deepcopy(network.state_dict())
    expected = network(x, noise, labels)

    def same(state):
        return all(torch.equal(value, before[name]) for name, value in state.items())

    assert same(network.state_dict())
    frozen = copy.deepcopy(network).requires_grad_(False).train()
    assert torch.equal(frozen(x, noise, labels), expected)
    assert same(frozen.state_dict())
    network.train()
    with torch.no_grad():
        found = network(x, noise, labels)
    assert distance(found, expected) < 1e-3
    after = network.state_dict()
    for name, value in after.items():
        dims = tuple(range(1, value.ndim))
        if value.ndim < 2:
            assert torch.equal(value, before[name]), name
        else:
            length = before[name].square().mean(dims, keepdim=True).sqrt()
            torch.testing.assert_close(value, before[name] / (length + 1e-4), rtol=1e-5, atol=1e-7)
    assert all((length - 1).abs().max() < 1e-3 for length in lengths(network))
    again = network(x, noise, labels)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.eval()(x, noise, labels), found, rtol=1e-5, atol=1e-6)


def test_two_passes_before_a_gradient():
    """The second pass writes into the weights that the gradient of the first is of."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    network.train()
    network(x, noise, labels)
    alone = torch.autograd.grad(network(x, noise, labels).square().sum(), list(network.parameters()))
    first = network(x, noise, labels)
    network(-x, noise, labels)
    with torch.no_grad():
        network(-x, noise, labels)
    grads = torch.autograd.grad(first.square().sum(), list(network.parameters()))
    for found, expected in zip(grads, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_training_steps():
    """Weights stay of length 1 between steps of an optimizer that lets them grow; the loss falls."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    target = torch.randn(x.shape)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (network(x, noise, labels) - target).square().mean()
        assert all((length - 1).abs().max() < 1e-3 for length in lengths(network))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert max((length - 1).abs().max() for length in lengths(network)) > 1e-3, "the last step is not undone yet"


def test_a_gradient_of_unit_weights_does_not_change_their_length():
    """What the forced normalisation relies on: the gradient has no part along the weights."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    network.train()
    network(x, noise, labels).square().sum().backward()
    for module in network.modules():
        if isinstance(module, MPConv):
            weight, grad = module.weight.flatten(1), module.weight.grad.flatten(1)
            along = (weight * grad).sum(1) / (weight.norm(dim=1) * grad.norm(dim=1)).clamp_min(1e-6)
            assert along.abs().max() < 2e-3


# What every network does: precision, labels, layouts, derivatives


def test_low_precision_is_close():
    network, x, noise, labels = network_and_inputs(CONFIG)
    full = network(x, noise, labels)
    parameters = list(network.parameters())
    full_grads = torch.autograd.grad(full.square().mean(), parameters)
    embedded = []
    network.out_conv.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0].dtype))
    network.dec["8x8_up"].register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[1].dtype))
    half = network(x.bfloat16(), noise, labels)
    assert embedded == [torch.float32, torch.bfloat16], "the embedding stays as exact as it was made"
    half_grads = torch.autograd.grad(half.float().square().mean(), parameters)
    assert half.dtype == torch.bfloat16
    assert distance(half, full) < 0.02
    for (name, _), found, expected in zip(network.named_parameters(), half_grads, full_grads, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.1 * expected.norm() + 1e-4, name
    assert network.half()(x.bfloat16(), noise, labels).dtype == torch.bfloat16


def test_parameters_may_be_stored_in_low_precision():
    """All but the frequencies and phases, which stay exact."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    expected = network(x.bfloat16(), noise, labels)
    exact = network.emb_fourier.freqs.clone()
    found = network.bfloat16()(x.bfloat16(), noise, labels)
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) < 0.03
    assert network.out_conv.weight.dtype == torch.bfloat16
    assert torch.equal(network.emb_fourier.freqs, exact)
    network.train()(x, noise, labels)
    assert all((length - 1).abs().max() < 0.01 for length in lengths(network))


def test_noise_and_gap_are_embedded_in_full_precision():
    """Two numbers that are one in bfloat16 still differ."""
    network, x, _, labels = network_and_inputs(replace(CONFIG, two_times=True), torch.bfloat16)
    one, two, zero = torch.full((3,), 2.0), torch.full((3,), 2.007), torch.zeros(3)
    assert torch.equal(one.bfloat16(), two.bfloat16())
    for pairs in (((one, zero), (two, zero)), ((zero, one), (zero, two))):
        wide, narrow = ([network(value, n, labels, gap=g) for n, g in pairs] for value in (x.float(), x))
        assert distance(*narrow) > 0.5 * distance(*wide) > 0


def test_labels():
    network, x, noise, labels = network_and_inputs(CONFIG)
    none = network(x, noise)
    some = network(x, noise, torch.tensor([2, -1, 3]))
    full = network(x, noise, labels)
    torch.testing.assert_close(some[[0, 2]], full[[0, 2]])
    torch.testing.assert_close(some[1], none[1])
    assert distance(full, none) > 0.01
    with pytest.raises(IndexError):
        network(x, noise, torch.tensor([0, 1, 4]))


def test_hidden_labels():
    network, x, noise, labels = network_and_inputs(replace(CONFIG, label_dropout=0.5))
    kept, none = network(x, noise, labels), network(x, noise)
    assert distance(kept, none) > 0.01, "nothing is hidden in evaluation"
    network.train()
    seen = [network(x, noise, labels) for _ in range(12)]
    for sample in range(3):
        is_kept = [distance(out[sample], kept[sample]) < 1e-3 for out in seen]
        is_none = [distance(out[sample], none[sample]) < 1e-3 for out in seen]
        assert [not value for value in is_kept] == is_none
        assert 0 < sum(is_kept) < 12


def test_dropout_only_in_training():
    network, x, noise, labels = network_and_inputs(replace(CONFIG, dropout=0.3))
    plain, *_ = network_and_inputs(CONFIG)
    expected = plain(x, noise, labels)
    assert torch.equal(network(x, noise, labels), expected)
    network.requires_grad_(False).train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        dropped = network(x, noise, labels)
        torch.manual_seed(5)
        assert torch.equal(network(x, noise, labels), dropped)
    assert distance(dropped, expected) > 0.05


def test_memory_layout_changes_nothing():
    network, x, noise, labels = network_and_inputs(CONFIG)
    expected = network(x, noise, labels)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(channels_last, noise, labels), expected)
    torch.testing.assert_close(network(x.mT.contiguous().mT, noise, labels), expected)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(x, noise, labels), expected)
    assert expected.is_contiguous()
    layouts = []
    for module in [*network.enc.values(), *network.dec.values()]:
        module.register_forward_hook(
            lambda _, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    network(x, noise, labels)
    assert layouts == [True] * (len(network.enc) + len(network.dec))


def test_samples_do_not_mix():
    network, x, noise, labels = network_and_inputs(CONFIG)
    alone = network(x[1:2], noise[1:2], labels[1:2])
    torch.testing.assert_close(network(x, noise, labels)[1:2], alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": torch.zeros(1)}, "noise has shape"),
        ({"labels": torch.zeros(3)}, "labels are torch.float32"),
        ({"labels": torch.zeros(3, 4, dtype=torch.int64)}, "labels are"),
        ({"augment": torch.zeros(3, 5)}, "no entries"),
        ({"gap": torch.zeros(3)}, "a network without two_times"),
    ],
)
def test_wrong_inputs(arguments, message):
    network, x, noise, _ = network_and_inputs(CONFIG)
    with pytest.raises(ValueError, match=message):
        network(x, **{"noise": noise, **arguments})


@pytest.fixture
def math_attention():
    """Other kernels have no forward-mode derivative; this is all that a caller needs to do about it."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def line(*, dtype=torch.float64, training=False):
    """A two-time network, a function of (x, noise, gap) that always draws the same random numbers, inputs, directions.

    In training, dropout and hidden labels are on, and the weights have been normalised as far as they go.
    """
    noisy = {"dropout": 0.3, "label_dropout": 0.5} if training else {}
    network, x, noise, labels = network_and_inputs(replace(CONFIG, two_times=True, **noisy), dtype)
    network.to(dtype).train(training)
    inputs = (x, noise.to(dtype), GAPS.to(dtype))
    directions = tuple(torch.randn_like(value) for value in inputs)

    def run(x, noise, gap):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return network(x, noise, labels, gap=gap)

    for _ in range(5 if training else 0):
        run(*inputs)
    return network, run, inputs, directions


def moved(values, directions, step):
    return tuple(value + step * direction for value, direction in zip(values, directions, strict=True))


@pytest.mark.parametrize(
    ("which", "training"),
    [((0, 1, 2), False), ((0,), False), ((1,), False), ((2,), False), ((0, 1, 2), True)],
    ids=["all", "x", "noise", "gap", "all in training"],
)
def test_forward_mode_derivative(which, training, math_attention):
    """Along x, the noise and the gap, together and alone, against central differences."""
    _, run, inputs, directions = line(training=training)
    directions = tuple(value if i in which else torch.zeros_like(value) for i, value in enumerate(directions))
    step = 1e-6
    difference = (run(*moved(inputs, directions, step)) - run(*moved(inputs, directions, -step))) / (2 * step)
    out, change = torch.func.jvp(run, inputs, directions)
    torch.testing.assert_close(out, run(*inputs))
    torch.testing.assert_close(change, difference, rtol=1e-5, atol=1e-6)
    assert change.norm() > 1e-3
    with forward_ad.dual_level():  # the other interface, which also leaves out the inputs that do not move
        duals = [forward_ad.make_dual(inputs[i], directions[i]) if i in which else inputs[i] for i in range(3)]
        torch.testing.assert_close(forward_ad.unpack_dual(run(*duals)).tangent, change)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_forward_mode_derivative_in_lower_precision(dtype, most, math_attention):
    _, run, inputs, directions = line()
    _, exact = torch.func.jvp(run, inputs, directions)
    _, run, _, _ = line(dtype=torch.float32)
    (x, *rest), (dx, *others) = ([value.float() for value in values] for values in (inputs, directions))
    _, found = torch.func.jvp(run, (x.to(dtype), *rest), (dx.to(dtype), *others))
    assert found.dtype == dtype
    assert distance(found, exact) < most


def test_a_derivative_writes_no_weights(math_attention):
    """torch.func lets nothing be written; the derivative is that of the normalised weights all the same."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    before = copy.deepcopy(network.state_dict())
    expected = torch.func.jvp(lambda x: network(x, noise, labels), (x,), (torch.ones_like(x),))
    found = torch.func.jvp(lambda x: network.train()(x, noise, labels), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    slope = torch.func.grad(lambda x: network(x, noise, labels).sum())(x)
    torch.testing.assert_close((slope * torch.ones_like(x)).sum(), expected[1].sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradient_of_a_forward_mode_derivative(training, math_attention):
    """Reverse over forward, of the inputs and of every parameter, against a difference of two tangents."""
    network, run, inputs, directions = line(training=training)
    variables = (*inputs, *network.parameters())
    steps = tuple(torch.randn_like(value) for value in variables)

    def energy():
        out, change = torch.func.jvp(run, inputs, directions)
        return (change + 0.5 * out).square().sum()

    for value in inputs:
        value.requires_grad_()
    grads = torch.autograd.grad(energy(), variables)
    slope = sum((grad * step).sum() for grad, step in zip(grads, steps, strict=True))

    def shifted(size):
        with torch.no_grad():
            for value, step in zip(variables, steps, strict=True):
                value.add_(step, alpha=size)
            found = energy()
            for value, step in zip(variables, steps, strict=True):
                value.sub_(step, alpha=size)
        return found

    size = 1e-6
    torch.testing.assert_close(slope, (shifted(size) - shifted(-size)) / (2 * size), rtol=2e-5, atol=1e-5)


# Two times


def test_a_second_time_says_nothing_at_first():
    torch.manual_seed(0)
    plain = build(CONFIG)
    torch.manual_seed(0)
    network = build(replace(CONFIG, two_times=True))
    state = network.state_dict()
    assert not state.pop("map_gap.weight").any()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_gaps():
    network, x, noise, labels = network_and_inputs(replace(CONFIG, two_times=True))
    outs = {gap: network(x, noise, labels, gap=torch.full((3,), gap)) for gap in (0.0, 1 / 128, 1.0, 1 + 1 / 128)}
    assert torch.equal(network(x, noise, labels), outs[0.0]), "None means zeros"
    assert distance(outs[1.0], outs[0.0]) > 0.1
    for near, far in ((1 / 128, 0.0), (1 + 1 / 128, 1.0)):
        assert 1e-3 < distance(outs[near], outs[far]) < 0.1, "a small step is told, and is small"
    for gap in (torch.zeros(1), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(ValueError, match="gap has shape"):
            network(x, noise, labels, gap=gap)


def test_starting_from_another_network():
    start, x, noise, labels = network_and_inputs(CONFIG)
    network, *_ = network_and_inputs(replace(CONFIG, two_times=True))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    load_start(network, start.state_dict())
    assert torch.equal(network(x, noise, labels, gap=GAPS), start(x, noise, labels))
    network.train()
    network(x, noise, labels, gap=GAPS).square().sum().backward()
    assert network.map_gap.weight.grad.norm() > 1e-3, "it can learn"
    assert not network.map_gap.weight.any(), "and is not normalised"
    with pytest.raises(RuntimeError, match=r'Missing key.*"emb_label.weight"'):
        load_start(network, build(WITHOUT_LABELS).state_dict())


# Configurations


def test_building_without_memory():
    """As a file is loaded: nothing but the state dict is needed."""
    network, x, noise, labels = network_and_inputs(CONFIG)
    other = blank(CONFIG)
    other.load_state_dict(network.state_dict(), assign=True)
    restore_constants(other)
    assert torch.equal(other.eval()(x, noise, labels), network(x, noise, labels))


@pytest.mark.parametrize("config", [CONFIG, ODD, SIZES["edm2-img512-xxl"](64, 4, 1000)], ids=["plain", "odd", "xxl"])
def test_configurations_are_data(config):
    assert spec.from_dict(spec.to_dict(config), EDM2Config, CONFIGS) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_resolutions": (16,)}, "attention resolution 16 is never reached"),
        ({"resolution": 9}, "resolution 9 cannot be halved 1 times"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channels": 18}, "multiple of 4"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_classes": -1}, "num_classes"),
        ({"noise_channels": -1}, "noise_channels and emb_channels are not negative"),
        ({"head_channels": 0}, "head_channels is 0"),
        ({"head_channels": 64}, "32 channels at resolution 4 do not split into 0 heads of 64 or more"),
        ({"head_channels": 9}, "32 channels at resolution 4 do not split into 3 heads of 9 or more"),
        ({"label_balance": 1.5}, "label_balance is 1.5"),
        ({"res_balance": float("nan")}, "res_balance is nan"),
        ({"clip_act": -1.0}, "clip_act is -1.0"),
        ({"clip_act": float("inf")}, "clip_act is inf"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"label_dropout": 0.1, "num_classes": 0}, "label_dropout needs labels"),
    ],
)
def test_configurations_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


# The release's state dicts


def blank(config):
    with torch.device("meta"):
        return build(config)


def released(network):
    """A state dict as the release's preconditioned network has it."""
    state = {f"unet.{name}": value for name, value in network.state_dict().items()}
    head = {"logvar_fourier.freqs": (128,), "logvar_fourier.phases": (128,), "logvar_linear.weight": (1, 128)}
    return state | {name: torch.empty(shape, device="meta") for name, shape in head.items()}


# millions of parameters; xxs is not in the paper
PUBLISHED = {"xxs": 31, "xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119, "xxl": 1523}


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("edm2-")])
def test_released_sizes(name):
    """They have as many parameters as Karras et al. (2023) say, table 2, and are recognised."""
    config = SIZES[name](64, 4 if "512" in name else 3, 1000)
    network = blank(config)
    assert round(sum(value.numel() for value in network.parameters()) / 1e6) == PUBLISHED[name.split("-")[-1]]
    state = released(network)
    found, weights = edm2.read_state(state, "edm2.pkl")
    assert found == edm2.infer(state) == replace(config, dropout=0.0), "dropout is not told"
    assert len(weights) == len(state) - 3
    assert all(value is state[f"unet.{name}"] for name, value in weights.items())


def test_weights_are_taken_as_they_are():
    network, x, noise, labels = network_and_inputs(CONFIG)
    options = {"channels_per_head": 16, "model_channels": 16, "img_resolution": 8, "use_fp16": True}
    plain = {name: value.half() for name, value in network.state_dict().items()}
    state = {f"unet.{name}": value for name, value in plain.items()} | {"logvar_linear.weight": torch.ones(1, 128)}
    for given in (state, plain):  # the prefix may be gone
        names = list(given)
        config, weights = edm2.read_state(given, "edm2.pkl", options)
        assert list(given) == names
        assert config == CONFIG
        again = build(config).eval()
        again.load_state_dict(weights)
        assert distance(again(x, noise, labels), network(x, noise, labels)) < 0.01


def test_networks_without_labels_are_recognised():
    assert edm2.infer(released(blank(WITHOUT_LABELS)), {"channels_per_head": 16}) == WITHOUT_LABELS


def test_odd_networks_are_recognised():
    """Multiples of the width are told by their largest common factor; the rest by the release's own arguments."""
    options = {
        "channels_per_head": 8,
        "label_balance": 0.3,
        "concat_balance": 0.6,
        "res_balance": 0.4,
        "attn_balance": 0.2,
        "clip_act": 1.5,
        "dropout": 0.1,
        "resample_filter": [1, 1],
    }
    found, _ = edm2.read_state(released(blank(ODD)), "edm2.pkl", options)
    assert found == replace(ODD, dropout=0.1)
    found, _ = edm2.read_state(released(blank(ODD)), "edm2.pkl", {**options, "clip_act": None, "dropout": 0})
    assert found == replace(ODD, clip_act=0.0)


PLAIN = released(blank(CONFIG))


def without(part):
    return {name: value for name, value in PLAIN.items() if part not in name}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({}, {}, "emb_fourier.phases is missing"),
        ({"enc.8x8_conv.weight": torch.empty(4, 4, 3, 3)}, {}, "emb_fourier.phases is missing"),
        (without("block0.conv_res1"), {}, "its levels work at no resolution at all"),
        (without("out_conv"), {}, "out_conv.weight is missing"),
        (without("enc.8x8_conv"), {}, "enc.8x8_conv.weight is missing"),
        (without("emb_noise"), {}, "emb_noise.weight is missing"),
        ({**PLAIN, "unet.out_conv.weight": torch.empty(3)}, {}, r"out_conv.weight has shape \(3,\)"),
        (
            {**PLAIN, "unet.enc.4x4_block0.conv_res1.weight": torch.empty(0, 32, 3, 3)},
            {},
            "enc.4x4_block0.conv_res1.weight has shape",
        ),
        (
            {**PLAIN, "unet.enc.3x3_block0.conv_res1.weight": torch.empty(4, 4, 3, 3)},
            {},
            "its levels work at 8, 4, 3",
        ),
        (PLAIN, {}, "32 channels at resolution 4 do not split into 0 heads of 64"),
        (PLAIN, {"channels_per_head": True}, "its channels_per_head is True"),
        (PLAIN, {"channels_per_head": 16.5}, "its channels_per_head is 16.5"),
        (PLAIN, {"channels_per_head": -16}, "head_channels is -16"),
        (PLAIN, {"channels_per_head": 16, "dropout": "a"}, "its dropout is 'a'"),
        (PLAIN, {"channels_per_head": 16, "res_balance": 10**400}, "res_balance"),
        (PLAIN, {"channels_per_head": 16, "res_balance": float("nan")}, "its res_balance is nan"),
        (PLAIN, {"channels_per_head": 16, "res_balance": 2}, "res_balance is 2.0: it must lie in"),
        (PLAIN, {"resample_filter": [1, 3, 3, 1]}, "its resample_filter is"),
        (PLAIN, {"resample_filter": 5}, "its resample_filter is 5"),
        (PLAIN, {"resample_filter": [torch.ones(2), 1]}, "its resample_filter is"),
    ],
)
def test_other_state_dicts_are_refused(state, options, message):
    with pytest.raises(CheckpointError, match=f"other.pkl holds no EDM2 network: .*{message}"):
        edm2.read_state(state, "other.pkl", options)
