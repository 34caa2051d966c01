from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtool.networks import (
    SIZES,
    ADMConfig,
    DDPMppConfig,
    MLPConfig,
    build,
    chance,
    convolution,
    load_start,
    native,
    norms,
    record,
    recorded,
)
from cmtool.networks.chance import drop
from cmtool.networks.layers import Resample, attend, look_up, noise_features, unit_features
from cmtool.networks.norms import GroupNorm, _Normalise, _normalise

DDPMPP = DDPMppConfig(
    resolution=8,
    num_classes=4,
    augment_dim=3,
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
)
NCSNPP = replace(DDPMPP, embedding="fourier", encoder="residual", resample_filter=(1, 3, 3, 1), channel_mult_noise=2)
ADM = ADMConfig(
    resolution=8,
    num_classes=4,
    channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=16,
)
ADM_PLAIN = replace(ADM, scale_shift_norm=False, resblock_updown=False, head_channels=0, num_heads=2)
MLP = MLPConfig(resolution=2, in_channels=3, out_channels=3, num_classes=4, augment_dim=3, width=32, depth=2)
CONFIGS = {"ddpmpp": DDPMPP, "ncsnpp": NCSNPP, "adm": ADM, "adm_plain": ADM_PLAIN, "mlp": MLP}
GAPS = torch.tensor([0.0, 1 / 128, 1.5])
# the first forward-mode derivative loads parts of torch that still use a deprecated compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
every_network = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def network_and_inputs(config, dtype=torch.float32):
    """A network all of whose layers matter (fresh ones end in zeros), and inputs."""
    torch.manual_seed(0)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_().div_(parameter[0].numel() ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(3, config.in_channels, config.resolution, config.resolution, dtype=dtype)
    return network, x, torch.tensor([-1.0, 0.1, 0.9]), torch.tensor([2, 0, 3])


def distance(found, expected):
    """The norm of the difference, relative."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@every_network
def test_low_precision_is_close(config):
    network, x, noise, labels = network_and_inputs(config)
    full = network(x, noise, labels)
    full_grads = torch.autograd.grad(full.square().mean(), list(network.parameters()), allow_unused=True)
    half = network(x.bfloat16(), noise, labels)
    half_grads = torch.autograd.grad(half.float().square().mean(), list(network.parameters()), allow_unused=True)
    assert half.dtype == torch.bfloat16
    assert distance(half, full) < 0.02
    for (name, _), found, expected in zip(network.named_parameters(), half_grads, full_grads, strict=True):
        assert (found is None) == (expected is None) == (name == "map_augment.weight"), name
        if expected is not None and expected.norm() > 1e-6:
            assert found.dtype == torch.float32
            assert distance(found, expected) < 0.1, name


@every_network
def test_parameters_may_be_stored_in_low_precision(config):
    network, x, noise, labels = network_and_inputs(config)
    expected = network(x.bfloat16(), noise, labels)
    found = network.bfloat16()(x.bfloat16(), noise, labels)
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) < 0.03


@every_network
def test_noise_is_embedded_in_full_precision(config):
    """Two noises that are one number in bfloat16 still differ."""
    network, x, _, labels = network_and_inputs(config, torch.bfloat16)
    one, two = torch.full((3,), 1000.0), torch.full((3,), 1001.5)
    assert torch.equal(one.bfloat16(), two.bfloat16())
    exact = distance(network(x.float(), one, labels), network(x.float(), two, labels))
    assert distance(network(x, one, labels), network(x, two, labels)) > 0.5 * exact > 0


@every_network
def test_no_label(config):
    network, x, noise, labels = network_and_inputs(config)
    none = network(x, noise)
    assert torch.equal(network(x, noise, torch.full_like(labels, -1)), none)
    some = network(x, noise, torch.tensor([2, -1, 3]))
    full = network(x, noise, labels)
    torch.testing.assert_close(some[[0, 2]], full[[0, 2]])
    torch.testing.assert_close(some[1], none[1])
    assert distance(full, none) > 0.01
    with pytest.raises(IndexError):
        network(x, noise, torch.tensor([0, 1, config.num_classes]))


@every_network
def test_hidden_labels(config):
    network, x, noise, labels = network_and_inputs(replace(config, label_dropout=0.5))
    kept, none = network(x, noise, labels), network(x, noise)
    assert distance(kept, none) > 0.01, "nothing is hidden in evaluation"
    network.train()
    seen = [network(x, noise, labels) for _ in range(12)]
    for sample in range(3):
        is_kept = [torch.allclose(out[sample], kept[sample], atol=1e-5) for out in seen]
        is_none = [torch.allclose(out[sample], none[sample], atol=1e-5) for out in seen]
        assert [not value for value in is_kept] == is_none
        assert 0 < sum(is_kept) < 12


@every_network
def test_dropout_only_in_training(config):
    network, x, noise, labels = network_and_inputs(replace(config, dropout=0.3))
    plain, *_ = network_and_inputs(config)
    expected = plain(x, noise, labels)
    assert torch.equal(network(x, noise, labels), expected)
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        dropped = network(x, noise, labels)
        torch.manual_seed(5)
        assert torch.equal(network(x, noise, labels), dropped)
    assert distance(dropped, expected) > 0.05
    assert torch.equal(plain.train()(x, noise, labels), expected)


@every_network
def test_memory_layout_changes_nothing(config):
    network, x, noise, labels = network_and_inputs(config)
    expected = network(x, noise, labels)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(channels_last, noise, labels), expected)
    torch.testing.assert_close(network(x.mT.contiguous().mT, noise, labels), expected)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(x, noise, labels), expected)
    assert expected.is_contiguous()


@every_network
def test_samples_do_not_mix(config):
    network, x, noise, labels = network_and_inputs(config)
    alone = network(x[1:2], noise[1:2], labels[1:2])
    torch.testing.assert_close(network(x, noise, labels)[1:2], alone)


@pytest.fixture
def math_attention():
    """Other kernels have no forward-mode derivative; this is all that a caller needs to do about it."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def line(config, *, dtype=torch.float64, training=False):
    """A two-time network, a function of (x, noise, gap) that always draws the same random numbers, inputs, directions.

    In training, dropout and hidden labels are on.
    """
    noisy = {"dropout": 0.3, "label_dropout": 0.5} if training else {}
    network, x, noise, labels = network_and_inputs(replace(config, two_times=True, **noisy), dtype)
    network.to(dtype).train(training)
    inputs = (x, noise.to(dtype), GAPS.to(dtype))
    directions = tuple(torch.randn_like(value) for value in inputs)

    def run(x, noise, gap):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return network(x, noise, labels, gap=gap)

    return network, run, inputs, directions


def moved(values, directions, step):
    return tuple(value + step * direction for value, direction in zip(values, directions, strict=True))


@every_network
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=["all", "x", "noise", "gap"])
def test_forward_mode_derivative(config, training, which, math_attention):
    """Along x, the noise and the gap, together and alone, against central differences."""
    _, run, inputs, directions = line(config, training=training)
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


@every_network
def test_forward_mode_derivative_in_single_precision(config, math_attention):
    _, run, inputs, directions = line(config)
    _, exact = torch.func.jvp(run, inputs, directions)
    _, run, _, _ = line(config, dtype=torch.float32)
    single = [tuple(value.float() for value in values) for values in (inputs, directions)]
    _, found = torch.func.jvp(run, *single)
    assert found.dtype == torch.float32
    assert distance(found, exact) < 1e-5


@every_network
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,)], ids=["all", "x", "noise"])
def test_forward_mode_derivative_and_nothing_more(monkeypatch, config, training, which):
    """Without a gradient other ways are faster, and need no care about attention: the numbers are the same."""
    _, run, inputs, directions = line(config, training=training)
    with sdpa_kernel(SDPBackend.MATH):
        out, expected = torch.func.jvp(
            run, inputs, tuple(d if i in which else torch.zeros_like(d) for i, d in enumerate(directions))
        )
    _, run, _, _ = line(config, training=training, dtype=torch.float32)
    calls, convolve = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **how: (calls.append(args), convolve(*args, **how))[1])
    with torch.no_grad():
        run(*(value.float() for value in inputs))
    alone = len(calls)
    with torch.no_grad(), forward_ad.dual_level():
        moved = [
            forward_ad.make_dual(value.float(), d.float()) if i in which else value.float()
            for i, (value, d) in enumerate(zip(inputs, directions, strict=True))
        ]
        found = forward_ad.unpack_dual(run(*moved))
    assert distance(found.primal, out) < 1e-5
    assert distance(found.tangent, expected) < 1e-5
    assert len(calls) - alone <= 2 * alone  # one for the values, one for their change


def test_attention_and_its_change():
    torch.manual_seed(0)
    qkv, change = torch.randn(2, 24, 3, 2, dtype=torch.float64), torch.randn(2, 24, 3, 2, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        out, expected = torch.func.jvp(lambda x: attend(x, 2), (qkv,), (change,))
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(attend(forward_ad.make_dual(qkv, change), 2))
    torch.testing.assert_close(found.primal, out)
    torch.testing.assert_close(found.tangent, expected)


@pytest.mark.parametrize(("stride", "padding", "biased"), [((1, 1), (1, 1), True), ((2, 2), (0, 0), False)])
def test_convolutions_and_their_derivatives(stride, padding, biased):
    """Both ways, along any of the inputs, and twice."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(size, dtype=torch.float64).requires_grad_() for size in [(2, 3, 5, 4), (4, 3, 3, 3), (4,)]
    )
    run = lambda x, weight, *bias: convolution._Convolve.apply(x, weight, *bias or (None,), stride, padding)  # noqa: E731
    inputs = (x, weight, bias) if biased else (x, weight)
    torch.testing.assert_close(run(*inputs), F.conv2d(*inputs, stride=stride, padding=padding))
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    directions = [torch.randn_like(value) for value in inputs]
    for which in range(1, 2 ** len(inputs)):
        given = tuple(d if which >> i & 1 else torch.zeros_like(d) for i, d in enumerate(directions))
        _, expected = torch.func.jvp(lambda *a: F.conv2d(*a, stride=stride, padding=padding), inputs, given)
        with torch.no_grad(), forward_ad.dual_level():
            moved = [
                forward_ad.make_dual(value.detach(), d) if which >> i & 1 else value
                for i, (value, d) in enumerate(zip(inputs, directions, strict=True))
            ]
            torch.testing.assert_close(forward_ad.unpack_dual(run(*moved)).tangent, expected)


@every_network
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradient_of_a_forward_mode_derivative(config, training, math_attention):
    """Reverse over forward, of the inputs and of every parameter, against a difference of two tangents."""
    network, run, inputs, directions = line(config, training=training)
    variables = (*inputs, *network.parameters())
    steps = tuple(torch.randn_like(value) for value in variables)

    def energy():
        out, change = torch.func.jvp(run, inputs, directions)
        return (change + 0.5 * out).square().sum()

    for value in inputs:
        value.requires_grad_()
    grads = torch.autograd.grad(energy(), variables, allow_unused=True)
    names = ["x", "noise", "gap", *(name for name, _ in network.named_parameters())]
    assert {name for name, grad in zip(names, grads, strict=True) if grad is None} <= {"map_augment.weight"}
    slope = sum((grad * step).sum() for grad, step in zip(grads, steps, strict=True) if grad is not None)

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


@every_network
def test_forward_mode_derivative_of_a_half_precision_network(config, math_attention):
    network, x, noise, labels = network_and_inputs(config)
    with torch.no_grad():
        _, expected = torch.func.jvp(lambda x: network(x, noise, labels), (x,), (torch.ones_like(x),))
        half = x.bfloat16()
        _, found = torch.func.jvp(lambda x: network(x, noise, labels), (half,), (torch.ones_like(half),))
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) < 0.05


# Two times


@every_network
def test_a_second_time_says_nothing_at_first(config):
    torch.manual_seed(0)
    plain = build(config)
    torch.manual_seed(0)
    network = build(replace(config, two_times=True))
    state = network.state_dict()
    assert not state.pop("map_gap.weight").any()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


@every_network
def test_gaps(config):
    network, x, noise, labels = network_and_inputs(replace(config, two_times=True))
    outs = {gap: network(x, noise, labels, gap=torch.full((3,), gap)) for gap in (0.0, 1 / 128, 1.0, 1 + 1 / 128)}
    assert torch.equal(network(x, noise, labels), outs[0.0]), "None means zeros"
    assert distance(outs[1.0], outs[0.0]) > 0.1
    for near, far in ((1 / 128, 0.0), (1 + 1 / 128, 1.0)):
        assert 1e-3 < distance(outs[near], outs[far]) < 0.1, "a small step is told, and is small"
    each = network(x, noise, labels, gap=torch.tensor([1.0, 0.0, 1 / 128]))
    expected = torch.stack([outs[1.0][0], outs[0.0][1], outs[1 / 128][2]])
    torch.testing.assert_close(each, expected)


@every_network
def test_gaps_are_embedded_in_full_precision(config):
    """Two gaps that are one number in bfloat16 still differ."""
    network, x, noise, labels = network_and_inputs(replace(config, two_times=True), torch.bfloat16)
    one, two = torch.full((3,), 2.0), torch.full((3,), 2.007)
    assert torch.equal(one.bfloat16(), two.bfloat16())
    exact = distance(network(x.float(), noise, labels, gap=one), network(x.float(), noise, labels, gap=two))
    assert distance(network(x, noise, labels, gap=one), network(x, noise, labels, gap=two)) > 0.5 * exact > 0


@every_network
def test_wrong_gaps(config):
    network, x, noise, labels = network_and_inputs(replace(config, two_times=True))
    for gap in (torch.zeros(1), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(ValueError, match="gap has shape"):
            network(x, noise, labels, gap=gap)
    network, x, noise, labels = network_and_inputs(config)
    with pytest.raises(ValueError, match="a network without two_times"):
        network(x, noise, labels, gap=torch.zeros(3))


@every_network
def test_starting_from_another_network(config):
    """A two-time network that was something else becomes the one-time network, at every gap and for every vector."""
    plain = replace(config, augment_dim=0) if hasattr(config, "augment_dim") else config
    start, x, noise, labels = network_and_inputs(plain)
    network = build(replace(config, two_times=True)).eval()
    augment = torch.ones(3, 3) if plain != config else None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    state = start.state_dict()
    names = list(state)
    load_start(network, state)
    assert list(state) == names, "the caller's state is left alone"
    assert torch.equal(network(x, noise, labels, augment, GAPS), start(x, noise, labels))

    two_times, *_ = network_and_inputs(replace(config, two_times=True))
    load_start(network, two_times.state_dict())
    expected = two_times(x, noise, labels, augment, GAPS)
    assert torch.equal(network(x, noise, labels, augment, GAPS), expected)
    assert distance(expected, two_times(x, noise, labels)) > 0.01


def test_a_start_that_does_not_fit():
    network, plain = build(replace(DDPMPP, two_times=True)), build(DDPMPP).state_dict()
    del plain["map_layer0.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"map_layer0.bias"'):
        load_start(network, plain)
    with pytest.raises(RuntimeError, match=r"size mismatch for map_layer1\.weight"):
        load_start(network, build(replace(DDPMPP, channel_mult_emb=2)).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for map_augment\.weight"):
        load_start(network, build(replace(DDPMPP, augment_dim=2)).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"map_gap.weight"'):
        load_start(build(DDPMPP), network.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"map_augment.weight"'):
        load_start(build(replace(DDPMPP, augment_dim=0)), build(DDPMPP).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"map_label.weight"'):
        load_start(network, build(replace(DDPMPP, num_classes=0)).state_dict())


def test_augmentation_vector():
    network, x, noise, labels = network_and_inputs(DDPMPP)
    expected = network(x, noise, labels)
    assert torch.equal(network(x, noise, labels, torch.zeros(3, 3)), expected)
    assert distance(network(x, noise, labels, torch.ones(3, 3)), expected) > 0.01


@every_network
@pytest.mark.parametrize(
    ("noise", "labels", "augment", "message"),
    [
        (torch.zeros(1), None, None, "noise has shape"),
        (torch.zeros(3, 1), None, None, "noise has shape"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), None, "labels are"),
        (torch.zeros(3), torch.zeros(3), None, "labels are torch.float32"),
        (torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64), None, "labels are"),
        (torch.zeros(3), None, torch.zeros(3, 5), "augment has shape"),
    ],
)
def test_wrong_inputs(config, noise, labels, augment, message):
    network, x, *_ = network_and_inputs(config)
    with pytest.raises(ValueError, match=message):
        network(x, noise, labels, augment)


def test_inputs_for_another_network():
    network, x, noise, labels = network_and_inputs(replace(ADM, num_classes=0))
    with pytest.raises(ValueError, match="without labels"):
        network(x, noise, labels)
    with pytest.raises(ValueError, match="no entries"):
        network(x, noise, None, torch.zeros(3, 3))


@pytest.mark.parametrize("config", [DDPMPP, ADM, MLP], ids=["ddpmpp", "adm", "mlp"])
def test_fresh_networks_say_nothing(config):
    """The last layer starts (close to) zero, every block close to its shortcut; nothing else is."""
    torch.manual_seed(0)
    network = build(config)
    x = torch.randn(2, 3, config.resolution, config.resolution)
    assert network(x, torch.zeros(2)).abs().max() < 1e-3
    small = {name for name, value in network.named_parameters() if value.dim() > 1 and value.abs().max() < 1e-4}
    ends = ("conv1.weight", "proj.weight", "aux_conv.weight", "out_layers.3.weight", "proj_out.weight", "out.2.weight")
    ends += ("leave.weight",)
    assert small == {name for name, _ in network.named_parameters() if name.endswith(ends)}


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("ddpmpp-cifar10", 0, 55.7),
        ("ddpmpp-cifar10", 10, 55.7),
        ("ncsnpp-cifar10", 0, 56.4),
        ("ddpmpp-ffhq64", 0, 61.8),
        ("ncsnpp-ffhq64", 0, 62.8),
        ("adm-imagenet64", 1000, 295.9),
        ("adm-lsun256", 0, 526.3),
    ],
)
def test_published_sizes(name, classes, millions):
    with torch.device("meta"):
        network = build(SIZES[name](256 if name == "adm-lsun256" else 64 if "64" in name else 32, 3, classes))
    assert round(sum(value.numel() for value in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", SIZES)
def test_sizes_fit_their_images(name):
    resolution = 64 if name.startswith("adm") else 16
    config = SIZES[name](resolution, 1, 7)
    assert (config.resolution, config.in_channels, config.out_channels, config.num_classes) == (resolution, 1, 1, 7)


@pytest.mark.parametrize(("name", "resolution", "most"), [("tiny", 16, 0.5), ("small", 16, 1.5), ("small", 32, 3.0)])
def test_small_sizes_are_small(name, resolution, most):
    network = build(SIZES[name](resolution, 3, 10))
    assert 0.6 * most < sum(value.numel() for value in network.parameters()) / 1e6 < most
    assert network(torch.zeros(1, 3, resolution, resolution), torch.zeros(1)).shape == (1, 3, resolution, resolution)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DDPMPP, {"attention_resolutions": (16,)}, "attention resolution 16 is never reached: the levels work at 8, 4"),
        (ADM, {"attention_resolutions": (4, 3)}, "attention resolution 3 is never reached"),
        (DDPMPP, {"resolution": 9, "attention_resolutions": ()}, "resolution 9 cannot be halved 1 times"),
        (ADM, {"resolution": 12, "channel_mult": (1, 1, 1, 1)}, "resolution 12 cannot be halved 3 times"),
        (DDPMPP, {"channel_mult": ()}, "channel_mult"),
        (DDPMPP, {"channel_mult": (1, 0)}, "channel_mult"),
        (DDPMPP, {"channels": 18}, "multiple of 4"),
        (DDPMPP, {"channels": 0}, "channels is 0: it must be at least 1"),
        (DDPMPP, {"num_blocks": 0}, "num_blocks"),
        (DDPMPP, {"num_classes": -1}, "num_classes"),
        (DDPMPP, {"augment_dim": -1}, "augment_dim"),
        (DDPMPP, {"dropout": 1.0}, "dropout is 1.0"),
        (ADM, {"label_dropout": -0.1}, "label_dropout is -0.1"),
        (ADM, {"label_dropout": 0.1, "num_classes": 0}, "label_dropout needs labels"),
        (DDPMPP, {"embedding": "sine"}, "embedding is 'sine', not one of 'positional', 'fourier'"),
        (DDPMPP, {"encoder": "skip"}, "encoder is 'skip'"),
        (DDPMPP, {"decoder": "skip"}, "decoder is 'skip'"),
        (DDPMPP, {"resample_filter": (1, 2, 1)}, "resample_filter"),
        (DDPMPP, {"resample_filter": (1, 2, 3, 4)}, "resample_filter"),
        (DDPMPP, {"channel_mult_emb": 0}, "channel_mult_emb"),
        (ADM, {"head_channels": 24}, "64 channels at resolution 4 do not split into heads of 24"),
        (ADM, {"head_channels": 0, "num_heads": 3}, "64 channels at resolution 4 do not split into 3 heads"),
        (ADM, {"head_channels": 0, "num_heads": 0}, "attention needs"),
        (ADM, {"group_channels": 0}, "group_channels"),
        (MLP, {"resolution": 0}, "resolution is 0"),
        (MLP, {"width": 30}, "width is 30: it must be a multiple of 4"),
        (MLP, {"width": 0}, "width is 0: it must be at least 1"),
        (MLP, {"depth": 0}, "depth is 0"),
        (MLP, {"augment_dim": -1}, "augment_dim"),
        (MLP, {"dropout": 1.0}, "dropout is 1.0"),
        (MLP, {"label_dropout": 0.1, "num_classes": 0}, "label_dropout needs labels"),
    ],
)
def test_configurations_that_cannot_be_built(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_building_something_else():
    with pytest.raises(ValueError, match="none of the networks ddpmpp, adm, unet2d, edm2, mlp"):
        build("ddpmpp")


def test_configurations_need_no_torch():
    code = "import sys, cmtool.networks as n; n.SIZES['small'](32, 3, 10); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stored_filters_are_checked_and_dropped():
    network = build(NCSNPP)
    state = network.state_dict()
    assert not any("filter" in key for key in state)
    assert "map_noise.freqs" in state
    right, wrong = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, torch.tensor([1.0, 1.0]) / 2
    key = "enc.4x4_down.conv0.resample_filter"
    network.load_state_dict({**state, key: torch.outer(right, right)[None, None]})
    with pytest.raises(ValueError, match="is not the filter"):
        network.load_state_dict({**state, key: torch.outer(wrong, wrong)[None, None]})


# Layers


@pytest.mark.parametrize("silu", [False, True])
def test_norm_on_a_cpu_equals_torch(silu):
    torch.manual_seed(0)
    x = torch.randn(3, 12, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    how = native.Shape(4, 1e-5, silu, 0, 1.0)

    def run(x, weight, bias):
        return _Normalise.apply(x, None, weight, bias, None, how)[0]

    expected = F.group_norm(x.contiguous(), 4, eps=1e-5) * weight[:, :, None, None] + bias[:, :, None, None]
    torch.testing.assert_close(run(x, weight, bias), F.silu(expected) if silu else expected)
    torch.testing.assert_close(_normalise(x, None, weight, bias, None, how), run(x, weight, bias))
    assert run(x, weight, bias).is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradcheck(run, (x, weight, bias), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight, bias), fast_mode=True)


def test_norm_without_gradient_for_some_inputs():
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    leaf, how = x.clone().requires_grad_(), native.Shape(2, 1e-5, True, 0, 1.0)
    _Normalise.apply(leaf, None, weight, bias, None, how)[0].square().sum().backward()
    other = x.clone().requires_grad_()
    _normalise(other, None, weight, bias, None, how).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    with forward_ad.dual_level():
        how = native.Shape(2, 1e-5, False, 0, 1.0)
        moved = forward_ad.make_dual(weight, torch.ones_like(weight))
        dual = _Normalise.apply(x, None, moved, bias, None, how)[0]
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, F.group_norm(x, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_norm_of_values_far_from_zero(dtype, tolerance):
    """Statistics are wide: an offset of 16 standard deviations costs about what rounding the input costs."""
    torch.manual_seed(0)
    x = (16 + torch.randn(4, 32, 16, 16)).to(dtype).contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(32, eps=1e-6, group_channels=4)
    assert distance(norm(x), F.group_norm(x.double(), 8)) < tolerance


def test_norm_of_a_constant():
    out = GroupNorm(8, eps=1e-5, group_channels=4)(torch.full((1, 8, 4, 4), 3.0))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    ("channels", "least", "groups"), [(128, 4, 32), (48, 4, 12), (32, 1, 32), (4, 4, 1), (144, 4, 24), (2, 4, 1)]
)
def test_norm_groups(channels, least, groups):
    assert GroupNorm(channels, eps=1e-5, group_channels=least).num_groups == groups


def test_norm_scale_and_shift():
    torch.manual_seed(0)
    norm, x = GroupNorm(8, eps=1e-5, group_channels=4), torch.randn(2, 8, 4, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    scale, shift = torch.randn(2, 8), torch.randn(2, 8)
    expected = norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, (scale, shift)), expected)
    torch.testing.assert_close(norm(x, (scale, shift), silu=True), F.silu(expected))


def test_box_resampling():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Resample((1, 1), up=False)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    doubled = Resample((1, 1), up=True)(x)
    assert torch.equal(doubled, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_wide_resampling():
    """Along a line: halving weighs 1, 3, 3, 1 around each new pixel, doubling interpolates 3 : 1; zeros outside."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    line = F.pad(x, (1, 1, 1, 1))
    rows = sum(taps[k] * line[:, :, k : k + 6 : 2] for k in range(4))
    expected = sum(taps[k] * rows[..., k : k + 6 : 2] for k in range(4))
    down, up = Resample((1, 3, 3, 1), up=False), Resample((1, 3, 3, 1), up=True)
    torch.testing.assert_close(down(x), expected)
    torch.testing.assert_close(
        up(x)[:, :, 2, 2], ((x[:, :, 1, 1] * 3 + x[:, :, 0, 1]) * 3 + x[:, :, 1, 0] * 3 + x[:, :, 0, 0]) / 16
    )
    y = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close((up(x) * y).sum(), 4 * (x * down(y)).sum())  # adjoint, but for the sum of the taps
    torch.testing.assert_close(up(torch.ones_like(x))[..., 1:-1, 1:-1], torch.ones(2, 3, 10, 10, dtype=torch.float64))


def test_attention_by_hand():
    torch.manual_seed(0)
    qkv = torch.randn(2, 3 * 8, 3, 2, dtype=torch.float64)
    found = attend(qkv, 2)
    for head in range(2):
        q, k, v = (part.flatten(2)[:, 4 * head : 4 * head + 4] for part in qkv.chunk(3, dim=1))
        shares = (q.mT @ k / 2).softmax(dim=-1)
        torch.testing.assert_close(found[:, 4 * head : 4 * head + 4].flatten(2), (shares @ v.mT).mT)


def test_noise_features():
    noise = torch.tensor([0.0, 2.0], dtype=torch.float64)
    for endpoint, last in ((True, 1e-4), (False, 1e-4 ** (3 / 4))):
        features = noise_features(noise, 8, endpoint=endpoint)
        assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        torch.testing.assert_close(features[1, 0], torch.tensor(2.0, dtype=torch.float64).cos())
        torch.testing.assert_close(features[1, 7], torch.tensor(2 * last, dtype=torch.float64).sin(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout(layout):
    """A quarter of the entries, the mean kept; the same ones with and without a derivative, in either direction."""
    x = (1 + torch.rand(8, 16, 16, 16)).contiguous(memory_format=layout)
    assert drop(x, 0.0) is x

    def run(x):
        torch.manual_seed(1)
        return drop(x, 0.25)

    with torch.random.fork_rng():
        out = run(x)
        kept = out != 0
        assert abs(kept.float().mean() - 0.75) < 0.01
        torch.testing.assert_close(out[kept], x[kept] / 0.75)
        primal, tangent = torch.func.jvp(run, (x,), (x,))
        assert torch.equal(primal, out)
        assert torch.equal(tangent, out)
        with forward_ad.dual_level():
            dual = run(forward_ad.make_dual(x, x.clone()))
            assert torch.equal(forward_ad.unpack_dual(dual).primal, out)
        assert torch.equal(torch.func.grad(lambda x: run(x).sum())(x) != 0, kept)


def test_unit_features():
    """Frequencies 1/4, 1, 4 and 16; no step is too small to see and no slope larger than the highest frequency."""
    value = torch.tensor([0.0, 0.5], dtype=torch.float64)
    features = unit_features(value, 8)
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = torch.tensor([0.125, 0.5, 2.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(features[1], torch.cat([angles.cos(), angles.sin()]))
    many = unit_features(torch.arange(0, 3, 1 / 128, dtype=torch.float64), 64) / 32**0.5  # of length 1
    steps = (many[1:] - many[:-1]).norm(dim=1) * 128
    assert 4 < steps.min() <= steps.max() < 8  # the root mean square of the frequencies
    assert torch.pdist(many).min() * 128 > 4, "no two numbers look the same"


def test_look_up():
    table = torch.arange(6.0).reshape(3, 2)
    assert look_up(table, torch.tensor([2, -1, 0]), 3).tolist() == [[4, 5], [0, 0], [0, 1]]
    assert look_up(table, None, 2).tolist() == [[0, 0], [0, 0]]


# --- other ways to call a network --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("pushed", [False, True])
def test_the_norm_for_the_compiler_is_the_norm(share, pushed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 5, 4, dtype=torch.float64, generator=generator)
    added, weight, bias = torch.randn(3, 3, 12, dtype=torch.float64, generator=generator)
    keys = torch.tensor([5, 2**31, 77]) if share else None
    how = native.Shape(4, 1e-5, True, *chance.threshold(share))
    given = (x.requires_grad_(), added if pushed else None, weight.requires_grad_(), bias.requires_grad_(), keys, how)
    found, expected = norms._fusible(*given), norms._normalise(*given)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    for one, other in zip(
        *(torch.autograd.grad(out, (x, weight, bias), upstream) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_off_a_gpu_nothing_is_recorded(monkeypatch):
    network = build(MLPConfig(resolution=1, in_channels=2, out_channels=2, num_classes=3)).requires_grad_(True)
    x, noise, labels = torch.randn(4, 2, 1, 1), torch.zeros(4), torch.tensor([0, 1, 2, 0])
    expected = network(x, noise, labels=labels)
    with recorded(network):
        assert network._compiled_call_impl is None
    record(network)
    for _ in range(3):
        assert torch.equal(network(x, noise, labels=labels), expected)
    assert network._compiled_call_impl._recorded == {}
    network(x, noise).sum().backward()
    monkeypatch.setenv("CMTOOL_GRAPHS", "0")
    other = build(network.config)
    record(other)
    assert other._compiled_call_impl is None


# --- weights in other forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_changed_parameters_are_seen(grad):
    conv = convolution.Conv2d(4, 4, 3)
    x = torch.randn(1, 4, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters(), fused=True)
    with torch.set_grad_enabled(grad):
        before = conv(x).detach()
        with torch.no_grad():
            conv.weight.mul_(2)
            conv.bias.mul_(2)
        torch.testing.assert_close(conv(x).detach(), 2 * before)
        conv.weight.grad, conv.bias.grad = torch.ones_like(conv.weight), torch.ones_like(conv.bias)
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.step()
        assert not torch.equal(conv(x).detach(), 2 * before)
        conv.weight.data = torch.zeros_like(conv.weight)
        conv.bias.data = torch.zeros_like(conv.bias)
        assert not conv(x).detach().any()


def test_what_was_made_of_parameters_is_not_saved(tmp_path):
    conv = convolution.Conv2d(64, 64, 3)
    x = torch.randn(1, 64, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    torch.save(conv, tmp_path / "before.pt")
    with torch.no_grad():
        expected = conv(x)
    conv(x).sum().backward()
    conv.zero_grad()
    torch.save(conv, tmp_path / "after.pt")
    assert (tmp_path / "after.pt").stat().st_size < 1.1 * (tmp_path / "before.pt").stat().st_size
    loaded = torch.load(tmp_path / "after.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(conv)):
        with torch.no_grad():
            assert torch.equal(other(x), expected)
