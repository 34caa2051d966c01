"""The network of diffusers' folders by itself; its numbers are compared in tests/parity/test_diffusers.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from cmtool import networks, spec
from cmtool.networks import UNet2DConfig, build, restore_constants


def plain(**changes) -> UNet2DConfig:
    options = {
        "resolution": 8,
        "widths": (8, 16),
        "num_blocks": 1,
        "down_blocks": ("DownBlock2D", "AttnDownBlock2D"),
        "up_blocks": ("AttnUpBlock2D", "UpBlock2D"),
        "groups": 4,
        "middle_groups": 4,
    }
    return UNet2DConfig(**(options | changes))


def skip(**changes) -> UNet2DConfig:
    options = {
        "widths": (32, 32),
        "down_blocks": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_blocks": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "groups": 0,
        "embedding": "fourier",
        "middle_scale": math.sqrt(2),
    }
    return plain(**(options | changes))


CONFIGS = {
    "plain": plain(),
    "ddpm": plain(downsample_padding=0, freq_shift=1, cosines_first=False, eps=1e-6),
    "film": plain(scale_shift_norm=True, middle_groups=0, downsample="resnet", upsample="resnet"),
    "skip": skip(),
    "labels, two times": plain(num_classes=3, two_times=True, label_dropout=0.2, dropout=0.1),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks are faster on one thread than on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: UNet2DConfig, seed: int = 0) -> torch.nn.Module:
    """With random weights everywhere: the initial ones make the output zero."""
    torch.manual_seed(seed)
    made = build(config)
    with torch.no_grad():
        for parameter in made.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
            parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5)
    return made.eval()


def inputs(config: UNet2DConfig, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, config.in_channels, config.resolution, config.resolution, generator=generator)
    return x.to(dtype), torch.tensor([0.3, -1.2]), torch.tensor([2, -1]) if config.num_classes else None


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_as_json(name):
    config = CONFIGS[name]
    assert spec.from_dict(spec.to_dict(config), networks.Config, networks.CONFIGS) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_new_networks_are_silent_and_learn(name):
    """The output starts at zero, and every weight gets a gradient once the zero layers have moved."""
    config = CONFIGS[name]
    x, t, labels = inputs(config)
    torch.manual_seed(0)
    assert not build(config)(x, t, labels).any()
    made = network(config)
    extra = {"gap": torch.tensor([0.5, 0.1])} if config.two_times else {}
    made(x, t, labels, **extra).square().sum().backward()
    still = [key for key, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()]
    # the softmax over keys does not see a constant added to all of them
    assert [key for key in still if not key.endswith("to_k.bias")] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives(name):
    """Forward mode against central differences, in float64, in the input and the noise together."""
    config = CONFIGS[name]
    made = network(config).double()
    x, t, labels = inputs(config, torch.float64)
    t = t.double()
    gap = torch.tensor([0.5, 0.1], dtype=torch.float64) if config.two_times else None
    dx, dt = torch.randn_like(x), torch.tensor([0.7, -0.4], dtype=torch.float64)

    def run(x: Tensor, t: Tensor) -> Tensor:
        return made(x, t, labels, gap=gap)

    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, found = jvp(run, (x, t), (dx, dt))
        h = 1e-6
        expected = (run(x + h * dx, t + h * dt) - run(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_types_and_the_meta_device(name):
    config = CONFIGS[name]
    made = network(config)
    x, t, labels = inputs(config)
    with torch.no_grad():
        expected = made(x, t, labels)
        low = made(x.bfloat16(), t, labels)
        assert low.dtype == torch.bfloat16
        assert (low - expected).abs().max() < 0.06 * expected.abs().max()
        with torch.device("meta"):
            copy = build(config).eval()
        copy.load_state_dict(made.state_dict(), assign=True)
        restore_constants(copy)
        assert torch.equal(copy(x, t, labels), expected)


def test_labels_and_gaps_are_heard():
    made = network(CONFIGS["labels, two times"])
    x, t, _ = inputs(made.config)
    with torch.no_grad():
        none = made(x, t)
        assert torch.equal(none, made(x, t, torch.tensor([-1, -1])))
        assert torch.equal(none, made(x, t, gap=torch.zeros(2)))
        assert not torch.equal(none, made(x, t, torch.tensor([1, 1])))
        assert not torch.equal(none, made(x, t, gap=torch.ones(2)))


def test_half_of_a_shifted_image():
    """Padding 0 looks right and down only: each output pixel sees 3x3 inputs that start at its own corner."""
    made = network(plain(downsample_padding=0))
    down = made.down_blocks[0].downsamplers[0]
    x = torch.zeros(1, 8, 8, 8)
    x[:, :, 4, 4] = 1
    with torch.no_grad():
        seen = (down(x, x) - down(torch.zeros_like(x), x)).abs().sum((0, 1)) > 0
    assert seen.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8,)}, "1 widths, 2 down_blocks"),
        ({"widths": ()}, "0 widths"),
        ({"widths": (8, 2)}, "at least 4"),
        ({"resolution": 9}, "cannot be halved"),
        ({"resolution": 0}, "resolution is 0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"down_blocks": ("DownBlock2D", "Cross")}, "'Cross', not one of"),
        ({"down_blocks": ("SkipDownBlock2D", "DownBlock2D")}, "beside others"),
        ({"down_blocks": ("SkipDownBlock2D",) * 2, "in_channels": 1}, "3 channels"),
        ({"downsample": "kaiser"}, "'kaiser', not one of"),
        ({"embedding": "learned"}, "'learned', not one of"),
        ({"downsample_padding": 2}, "not 0 or 1"),
        ({"groups": -1}, "not negative"),
        ({"eps": 0.0}, "positive"),
        ({"middle_scale": math.nan}, "positive"),
        ({"head_channels": 5}, "heads of 5"),
        ({"label_dropout": 0.1}, "needs labels"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        plain(**changes)


@pytest.mark.parametrize("changes", [{"groups": 3}, {"middle_groups": 5}])
def test_groups_that_do_not_divide(changes):
    with pytest.raises(ValueError, match="divisible"):
        build(plain(**changes))
