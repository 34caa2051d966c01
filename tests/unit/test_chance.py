"""Dropout by seeds, parameters cast once, and blocks computed again: chance and shortcuts change no numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from cmtool import networks
from cmtool.networks import ADMConfig, EDM2Config, MLPConfig, UNet2DConfig
from cmtool.networks.casting import cast
from cmtool.networks.chance import drop, mixed, seeded
from cmtool.networks.layers import look_up
from tests.models import micro

CONFIGS = [
    pytest.param(micro(dropout=0.3, num_classes=3, label_dropout=0.5), id="ddpmpp"),
    pytest.param(
        ADMConfig(8, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), dropout=0.3), id="adm"
    ),
    pytest.param(
        EDM2Config(8, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), dropout=0.3),
        id="edm2",
    ),
    pytest.param(
        UNet2DConfig(
            8,
            widths=(8, 16),
            num_blocks=1,
            down_blocks=("DownBlock2D", "AttnDownBlock2D"),
            up_blocks=("AttnUpBlock2D", "UpBlock2D"),
            groups=4,
            middle_groups=4,
            dropout=0.3,
        ),
        id="unet2d",
    ),
    pytest.param(MLPConfig(4, in_channels=3, out_channels=3, width=16, depth=2, dropout=0.3), id="mlp"),
]


def network(config, seed=0):
    torch.manual_seed(seed)
    made = networks.build(config)
    with torch.no_grad():
        for parameter in made.parameters():  # large enough to matter, also where they start small
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return made.train()


def batch(config, count=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, config.in_channels, config.resolution, config.resolution, generator=generator)
    labels = torch.arange(count) % config.num_classes if config.num_classes else None
    return x, torch.linspace(-1, 1, count), labels


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_seeds_drop_the_same_units(config):
    made, (x, noise, labels) = network(config), batch(config)
    seeds = torch.arange(6) + 10**17

    def out(part=slice(None), seeds=seeds):
        with seeded(seeds[part]), torch.no_grad():
            return made(x[part], noise[part], None if labels is None else labels[part])

    whole = out()
    torch.manual_seed(99)  # the global generator has no say
    torch.testing.assert_close(out(), whole)  # EDM2 normalises its weights anew
    parts = torch.cat([out(slice(0, 1)), out(slice(1, 4)), out(slice(4, 6))])  # nor has the batch
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    other = out(seeds=seeds + 1)
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(other, whole, strict=True))
    with torch.no_grad():
        free = made(x, noise, labels)
    assert not torch.allclose(free, whole, rtol=1e-3)
    made.eval()
    torch.testing.assert_close(out(), out(seeds=seeds + 1), rtol=0, atol=0)


def test_without_seeds_the_global_generator_decides():
    x = torch.ones(4, 100)
    torch.manual_seed(3)
    one = drop(x, 0.5)
    assert not torch.equal(one, drop(x, 0.5))
    torch.manual_seed(3)
    assert torch.equal(one, drop(x, 0.5))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_and_the_mean_are_right(share):
    x = torch.ones(64, 8, 16, 16)
    with seeded(torch.arange(64)):
        one, two = drop(x, share), drop(x, share)
    for out in (one, two):
        dropped = (out == 0).double()
        deviation = (share * (1 - share) / x.numel()) ** 0.5
        assert abs(float(dropped.mean()) - share) < 4 * deviation
        assert torch.equal(out[out != 0].unique(), torch.tensor([1 / (1 - share)]))
        # No sample, channel or pixel is luckier than chance allows: chi square of each margin.
        for axes in ((1, 2, 3), (0, 2, 3), (0, 1)):
            means = dropped.mean(axes)
            each = share * (1 - share) * means.numel() / x.numel()
            chi = float(((means - share) ** 2).sum() / each)
            assert abs(chi - means.numel()) < 5 * (2 * means.numel()) ** 0.5, axes
    # Decisions of one pass, of neighbouring samples and of neighbouring entries are independent.
    a, b = (one == 0).double() - share, (two == 0).double() - share
    for left, right in ((a, b), (a[1:], a[:-1]), (a[..., 1:], a[..., :-1]), (a[:, 1:], a[:, :-1])):
        correlation = float((left * right).mean()) / (share * (1 - share))
        assert abs(correlation) < 5 / left.numel() ** 0.5


def test_mixing_is_a_permutation_of_32_bits():
    entries = torch.arange(2**16) * 65537 % 2**32
    assert len(mixed(entries, torch.tensor(12345)).unique()) == len(entries)
    bits = torch.stack([(mixed(entries, torch.tensor(7)) >> bit) & 1 for bit in range(32)]).double().mean(1)
    assert (bits - 0.5).abs().max() < 4 * 0.5 / 2**8


def test_labels_are_hidden_by_seed():
    table, labels = torch.ones(2, 1), torch.zeros(1000, dtype=torch.int64)
    with seeded(torch.arange(1000)):
        one = look_up(table, labels, 1000, hidden=0.2)
    with seeded(torch.arange(1000)):
        assert torch.equal(one, look_up(table, labels, 1000, hidden=0.2))
    assert abs(float((one == 0).double().mean()) - 0.2) < 4 * (0.16 / 1000) ** 0.5


def test_a_batch_that_holds_its_samples_twice_drops_the_same_in_both():
    with seeded(torch.arange(3)):
        out = drop(torch.ones(6, 50), 0.5)
    assert torch.equal(out[:3], out[3:])


# --- parameters in another type --------------------------------------------------------------------------------------


def test_a_parameter_is_cast_once_until_it_changes():
    parameter = torch.nn.Parameter(torch.randn(5, 5))
    one, two = (cast(parameter, torch.bfloat16) for _ in range(2))
    assert one.data_ptr() == two.data_ptr()
    with torch.no_grad():
        parameter.add_(1)
    three = cast(parameter, torch.bfloat16)
    torch.testing.assert_close(three, parameter.detach().bfloat16(), rtol=0, atol=0)
    assert not torch.equal(three, one)
    parameter.data = torch.zeros(5, 5)
    assert not cast(parameter, torch.bfloat16).any()
    torch.testing.assert_close(cast(parameter, torch.float32, 3.0), parameter.detach() * 3)
    assert cast(parameter, torch.float32) is parameter


@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {}])
@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_every_optimizer_step_is_seen(rule, way):
    parameter = torch.nn.Parameter(torch.randn(5, 5))
    optimizer = rule([parameter], lr=0.1, **way)
    for _ in range(3):
        cast(parameter, torch.float32, 0.5).sum().backward()
        optimizer.step()
        assert torch.equal(cast(parameter, torch.float32, 0.5), parameter * 0.5)


def test_the_gradient_of_a_cast_comes_back_in_the_parameters_type():
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    for _ in range(2):
        cast(parameter, torch.bfloat16, 2.0).float().sum().backward()
    assert parameter.grad.dtype == torch.float32
    assert torch.equal(parameter.grad, torch.full((4, 3), 4.0))
    with torch.inference_mode():
        cast(parameter, torch.bfloat16)
    cast(parameter, torch.bfloat16).float().square().sum().backward()  # made in inference, but no inference tensor


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_kept_is_no_part_of_the_network(config):
    made, (x, noise, labels) = network(config).eval(), batch(config)
    keys = set(made.state_dict())
    low = made(x.bfloat16(), noise, labels)
    assert set(made.state_dict()) == keys
    other = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(other(x.bfloat16(), noise, labels), low)
    assert torch.equal(made(x.bfloat16(), noise, labels), low)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x.bfloat16(), noise, labels), other(x.bfloat16(), noise, labels))


# --- computed again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("by_seed", [True, False])
def test_computing_again_changes_no_gradient(config, by_seed):
    made, (x, noise, labels) = network(config), batch(config)
    seeds = torch.arange(6) if by_seed else None
    made(x, noise, labels)  # EDM2 normalises its weights
    kept = []

    def gradients(recompute):
        networks.recompute(made, recompute)
        made.zero_grad()
        torch.manual_seed(5)
        held = []
        with (
            seeded(seeds),
            torch.autograd.graph.saved_tensors_hooks(lambda one: held.append(one) or one, lambda one: one),
        ):
            out = made(x, noise, labels)
        kept.append(sum(tensor.numel() for tensor in held))
        out.square().sum().backward()
        return [
            out.detach(),
            *(parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None),
        ]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kept[1] < kept[0]
    networks.recompute(made, False)
