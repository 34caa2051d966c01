"""OpenAI's JAX models: the network against its description in flax's own names and layouts, and what the card says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmtool import networks
from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, BoundaryEDM, LogRatio
from cmtool.io import msgpack
from cmtool.io.imported import assemble
from cmtool.io.importers import jax
from tests.flaxfile import chunked, write

CD = "cd-l2/checkpoints/checkpoint_80"
NCSNPP = replace(networks.SIZES["ncsnpp-cifar10"](32, 3, 0), augment_dim=0, dropout=0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are far slower on several threads where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class NCSNpp:
    """NCSN++ of Song et al. (2021), arXiv:2011.13456, from its description: a function of images [B, H, W, C].

    Parameters are drawn when they are first asked for, under the names that flax gives them: a module is named by its
    class and how many of the class came before it in the same module. On the meta device there are only shapes.
    """

    def __init__(self, channels, mult, blocks, attention, image_channels=3, device="cpu") -> None:
        self.channels, self.mult, self.blocks, self.attention = channels, mult, blocks, attention
        self.image_channels, self.device = image_channels, device
        self.generator = torch.Generator().manual_seed(0)
        self.params: dict = {}

    @contextmanager
    def module(self, kind: str) -> Iterator[None]:
        number = self.counts[-1][kind]
        self.counts[-1][kind] += 1
        outer = self.scope
        self.scope = outer.setdefault(f"{kind}_{number}", {})
        self.counts.append(Counter())
        yield
        self.counts.pop()
        self.scope = outer

    def param(self, name: str, *shape: int) -> Tensor:
        if name not in self.scope:
            values = torch.empty(shape, device="meta")
            if self.device != "meta":
                values = torch.randn(shape, generator=self.generator)
                if name == "scale":
                    values = 1 + 0.3 * values
                elif len(shape) == 1:
                    values = values * (16 if name == "W" else 0.2)
                else:
                    values = values / math.sqrt(math.prod(shape[:-1]))
            self.scope[name] = values
        return self.scope[name].double()

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        self.scope, self.counts = self.params, [Counter()]
        with self.module("GaussianFourierProjection"):
            angles = noise[:, None] * self.param("W", self.channels) * 2 * math.pi
        emb = self.dense(torch.cat([angles.sin(), angles.cos()], dim=-1), 4 * self.channels)
        emb = self.dense(swish(emb), 4 * self.channels)
        pyramid, skips = x, [self.conv(x, self.channels, 3)]
        for level, mult in enumerate(self.mult):
            for _ in range(self.blocks):
                h = self.block(skips[-1], emb, mult * self.channels)
                skips.append(self.attend(h) if h.shape[1] in self.attention else h)
            if level < len(self.mult) - 1:
                h = self.block(skips[-1], emb, resample=down)
                with self.module("Downsample"), self.module("Conv2d"):
                    kernel = self.param("weight", 3, 3, pyramid.shape[-1], h.shape[-1])
                    bias = self.param("bias", h.shape[-1])
                    smooth = correlate_taps(pad(pyramid, 2))
                    pyramid = (correlate(smooth, kernel, stride=2) + bias + h) / math.sqrt(2)
                skips.append(pyramid)
        h = self.block(skips[-1], emb)
        h = self.block(self.attend(h), emb)
        for level, mult in reversed(list(enumerate(self.mult))):
            for _ in range(self.blocks + 1):
                h = self.block(torch.cat([h, skips.pop()], dim=-1), emb, mult * self.channels)
            if h.shape[1] in self.attention:
                h = self.attend(h)
            if level:
                h = self.block(h, emb, resample=up)
        assert not skips
        return self.conv(swish(self.norm(h)), self.image_channels, 3)

    def dense(self, x: Tensor, out: int) -> Tensor:
        with self.module("Dense"):
            return x @ self.param("kernel", x.shape[-1], out) + self.param("bias", out)

    def conv(self, x: Tensor, out: int, side: int) -> Tensor:
        with self.module("Conv"):
            kernel = self.param("kernel", side, side, x.shape[-1], out)
            return correlate(pad(x, side // 2), kernel) + self.param("bias", out)

    def norm(self, x: Tensor) -> Tensor:
        with self.module("GroupNorm"):
            groups = x.unflatten(-1, (min(x.shape[-1] // 4, 32), -1))
            mean = groups.mean((1, 2, 4), keepdim=True)
            variance = (groups - mean).square().mean((1, 2, 4), keepdim=True)
            standard = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(-2)
            return standard * self.param("scale", x.shape[-1]) + self.param("bias", x.shape[-1])

    def attend(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape

        def per_pixel(h: Tensor) -> Tensor:
            with self.module("NIN"):
                return h @ self.param("W", channels, channels) + self.param("b", channels)

        with self.module("AttnBlockpp"):
            h = self.norm(x)
            q, k, v = (per_pixel(h).reshape(batch, height * width, channels) for _ in range(3))
            share = (q @ k.transpose(1, 2) / math.sqrt(channels)).softmax(-1)
            return (x + per_pixel((share @ v).reshape(x.shape))) / math.sqrt(2)

    def block(self, x: Tensor, emb: Tensor, out: int | None = None, resample=None) -> Tensor:
        out = out or x.shape[-1]
        with self.module("ResnetBlockBigGANpp"):
            h = swish(self.norm(x))
            if resample is not None:
                h, x = resample(h), resample(x)
            h = self.conv(h, out, 3) + self.dense(swish(emb), out)[:, None, None]
            h = self.conv(swish(self.norm(h)), out, 3)
            if resample is not None or x.shape[-1] != out:
                x = self.conv(x, out, 1)
            return (x + h) / math.sqrt(2)


TAPS = [1 / 8, 3 / 8, 3 / 8, 1 / 8]


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def pad(x: Tensor, by: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, by, by, by, by))


def correlate(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """x [B, H, W, I] with a kernel [h, w, I, O], without padding."""
    side = kernel.shape[0]
    height, width = (size - side + 1 for size in x.shape[1:3])
    return sum(
        x[:, i : i + height : stride, j : j + width : stride] @ kernel[i, j] for i in range(side) for j in range(side)
    )


def correlate_taps(x: Tensor) -> Tensor:
    """With the filter 1, 3, 3, 1 along both axes, without padding."""
    for axis in (1, 2):
        length = x.shape[axis] - 3
        x = sum(tap * x.narrow(axis, start, length) for start, tap in enumerate(TAPS))
    return x


def down(x: Tensor) -> Tensor:
    """Half the resolution: pixel i is the filter's value between the pixels 2 i and 2 i + 1."""
    return correlate_taps(pad(x, 1))[:, ::2, ::2]


def up(x: Tensor) -> Tensor:
    """Twice the resolution: zeros after every pixel, then the filter times 2 along each axis."""
    batch, height, width, channels = x.shape
    spread = x.new_zeros(batch, height, 2, width, 2, channels)
    spread[:, :, 0, :, 0] = x
    return 4 * correlate_taps(pad(spread.reshape(batch, 2 * height, 2 * width, channels), 2)[:, :-1, :-1])


def reference(channels=8, mult=(1, 2), blocks=1, attention=(8,), size=16, **options) -> NCSNpp:
    network = NCSNpp(channels, mult, blocks, attention, **options)
    device = network.device
    network(
        torch.zeros(1, size, size, network.image_channels, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.float64, device=device),
    )
    return network


@cache
def _params() -> dict:
    return reference().params


def parameters() -> dict:
    """Those of the default reference, to be changed at will."""
    return copied(_params())


def copied(tree: dict) -> dict:
    return {name: copied(value) if isinstance(value, dict) else value for name, value in tree.items()}


def state(average: dict, **changes) -> dict:
    """The state of a training run, with other weights where those of the average do not belong."""
    other = {"Conv_0": {"kernel": torch.full((3, 3, 3, 4), math.nan)}}
    return {
        "step": np.array(400_000, np.int32),
        "lr": 4e-4,
        "ema_rate": 0.9999,
        "params": other,
        "target_params": other,
        "params_ema": average,
        "model_state": {},
        "opt_state": {"0": {"count": np.int32(7), "mu": other, "nu": other}, "1": {}, "2": None},
        "rng_state": {"0": np.array([1, 2], np.uint32), "1": {"0": np.array([3, 4], np.uint32)}},
        **changes,
    }


def saved(folder: Path, average: dict, name: str = CD, **changes) -> Path:
    return write(folder / name, state(average, **changes))


# The network.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blocks": 2}, {"channel_mult": (1, 2), "attention_resolutions": (16,)}),
        ({"attention": (16,), "channels": 16}, {"channel_mult": (1, 2), "attention_resolutions": (32,)}),
        ({"attention": (16, 8)}, {"attention_resolutions": (32, 16)}),
        ({"attention": ()}, {"attention_resolutions": ()}),
        ({"mult": (2, 2, 2), "blocks": 2}, {"channel_mult": (2, 2, 2), "attention_resolutions": (16,)}),
        ({"mult": (2, 1, 3), "attention": (16, 4)}, {"channel_mult": (2, 1, 3), "attention_resolutions": (32, 8)}),
        ({"image_channels": 1}, {"in_channels": 1, "out_channels": 1}),
    ],
)
def test_the_network_is_the_one_described(tmp_path, options, expected):
    original = reference(**options)
    imported = jax.read(saved(tmp_path, original.params))
    config = imported.config
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.channels, config.num_blocks) == (original.channels, original.blocks)
    # The numbers in the file are float32; what is compared here is the arithmetic, in float64 throughout.
    model = assemble(imported).double()
    model.network.map_noise.freqs = model.network.map_noise.freqs.double()

    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0.01, 0.7, 60.0], dtype=torch.float64)
    x = (
        torch.randn(3, 16, 16, original.image_channels, generator=generator, dtype=torch.float64)
        * (0.5 + t)[:, None, None, None]
    )
    at = t[:, None, None, None]
    raw = original(x / (at**2 + 0.25).sqrt(), 0.25 * t.log())
    estimate = 0.25 / ((at - 0.002) ** 2 + 0.25) * x + 0.5 * (at - 0.002) / (at**2 + 0.25).sqrt() * raw
    images = x.permute(0, 3, 1, 2)
    for found, wanted in ((model.raw(images, t), raw), (model.denoised(images, t), estimate)):
        wanted = wanted.permute(0, 3, 1, 2)
        assert float(wanted.std()) > 0.1
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-10


def test_a_denoiser_has_the_form_of_edm(tmp_path):
    original = reference()
    model = assemble(jax.read(saved(tmp_path, original.params, "edm_cifar10_ema")))
    assert model.parameterization == EDM(time_input=LogRatio(0.25))
    assert model.path == VE(0.002, 80.0)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0.1, 3.0])
    at = t[:, None, None, None]
    raw = original((x / (at**2 + 0.25).sqrt()).permute(0, 2, 3, 1).double(), 0.25 * t.double().log())
    wanted = 0.25 / (at**2 + 0.25) * x + 0.5 * at / (at**2 + 0.25).sqrt() * raw.permute(0, 3, 1, 2)
    assert torch.allclose(model.denoised(x, t).double(), wanted, rtol=1e-3, atol=1e-4)


def test_the_released_size(tmp_path):
    """From shapes alone; the file is as large as a released one, and none of it but the average is looked at."""
    params = reference(128, (2, 2, 2), 4, (16,), size=32, device="meta").params
    path = saved(tmp_path, params, params=params, opt_state={"0": {"mu": params, "nu": params}})
    imported = jax.read(path)
    assert imported.config == NCSNPP
    assert imported.card.notes == ()
    assert imported.card.data == "CIFAR-10"
    model = assemble(imported)
    count = sum(parameter.numel() for parameter in model.network.parameters())
    assert count == sum(array.numel() for array in leaves(params)) - 128  # frequencies are no parameters
    assert round(count / 1e6, 1) == 56.4


def leaves(tree: dict) -> Iterator[Tensor]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def test_only_the_average_is_read(tmp_path, monkeypatch):
    params = parameters()
    path = saved(tmp_path, params)
    shapes = []
    original = msgpack.Array.numpy
    monkeypatch.setattr(msgpack.Array, "numpy", lambda array: shapes.append(array.shape) or original(array))
    jax.read(path)
    assert len([shape for shape in shapes if shape]) == len(list(leaves(params)))
    assert sum(map(math.prod, shapes)) == sum(array.numel() for array in leaves(params)) + 2  # and two scalars


def test_weights_outlive_the_file(tmp_path):
    params = parameters()
    path = saved(tmp_path, params)
    model = assemble(jax.read(path))
    with path.open("r+b") as file:
        file.truncate(10)
    assert torch.equal(model.network.dec["32x32_aux_norm"].bias, params["GroupNorm_0"]["bias"])
    assert all(bool(parameter.isfinite().all()) for parameter in model.network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types(tmp_path, dtype):
    params = parameters()
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].to(dtype)
    params["Dense_1"]["kernel"] = chunked(params["Dense_1"]["kernel"].to(dtype), 100)
    state = jax.read(saved(tmp_path, params)).state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["map_layer0.weight"], params["Dense_0"]["kernel"].float().T)
    assert torch.equal(state["map_layer1.weight"], parameters()["Dense_1"]["kernel"].to(dtype).float().T)


# The card.


@pytest.mark.parametrize(
    ("name", "role", "two_steps"),
    [
        ("edm_cifar10_ema", "denoiser", False),
        ("jcm_checkpoints/edm_cifar10_ema", "denoiser", False),
        ("cd-l1/checkpoints/checkpoint_80", "consistency", True),
        ("CD-LPIPS/checkpoints/checkpoint_80", "consistency", True),
        ("cd-l2/checkpoint_80", "consistency", True),
        ("cd-l2", "consistency", True),
        ("ct-lpips/checkpoints/checkpoint_74", "consistency", False),
        ("cifar10-continuous-cd-l2-stopgrad/checkpoints/checkpoint_40", "consistency", False),
        ("continuous-ct-lpips/checkpoints/checkpoint_40", "consistency", False),
        ("cd-l2/checkpoints/edm_cifar10_ema", "denoiser", False),  # the nearest name counts
        ("edm/cd-l2/checkpoints/checkpoint_80", "consistency", True),
    ],
)
def test_names_tell_the_role(tmp_path, monkeypatch, name, role, two_steps):
    path = saved(tmp_path, parameters(), name)
    card = jax.read(path).card
    assert card.role == role
    assert ("2" in card.times) is two_steps
    monkeypatch.chdir(path.parent)
    assert jax.read(Path(path.name)).card == card
    other = "consistency" if role == "denoiser" else "denoiser"
    assert jax.read(path, role).card == jax.read(path, assume=other).card == card
    what = {"denoiser": "a denoiser", "consistency": "a consistency model"}
    with pytest.raises(CheckpointError, match=f"is {what[role]}.*, and {what[other]}.* is needed"):
        jax.read(path, other)
    with pytest.raises(CheckpointError, match="a two-time model is needed"):
        jax.read(path, "flow_map")


@pytest.mark.parametrize(
    "name",
    ["run/checkpoints/checkpoint_80", "edmund/edmond-cdrom/checkpoint_80", "edm/a/b/checkpoint_80", "cd-from-edm/x"],
)
def test_names_that_do_not_tell_the_role(tmp_path, name):
    path = saved(tmp_path, parameters(), name)
    with pytest.raises(CheckpointError, match="does not tell whether") as caught:
        jax.read(path)
    assert caught.value.hint == "add --role denoiser or --role consistency"
    for role, form in (("denoiser", EDM), ("consistency", BoundaryEDM)):
        for imported in (jax.read(path, role), jax.read(path, assume=role)):
            assert imported.card.role == role
            assert type(imported.parameterization) is form
            assert imported.parameterization.time_input == LogRatio(0.25)
            assert imported.card.times == {}
    with pytest.raises(CheckpointError, match="a two-time model is needed"):
        jax.read(path, "flow_map")


def test_the_card(tmp_path):
    imported = jax.read(saved(tmp_path, parameters()))
    card = imported.card
    assert imported.format == "jax"
    assert (card.role, card.image_shape, card.num_classes) == ("consistency", (3, 32, 32), 0)
    assert (card.grid_points, card.grid_rho, card.iterations) == (18, 7.0, 400_000)
    assert card.average == "params_ema (0.9999)"
    assert card.licence == "Apache-2.0"
    assert card.source == "OpenAI consistency models for CIFAR-10 (JAX), checkpoint_80"
    assert "resolution 32 is a guess" in card.notes[0]
    first, second = card.times["2"]
    assert first == 80
    assert second == pytest.approx(0.585348, abs=5e-7)  # the published point, index 11 of 18
    assert model_is_the_identity_at_t_min(imported)


def model_is_the_identity_at_t_min(imported) -> bool:
    model = assemble(imported)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return torch.equal(model.denoised(x, torch.full((2,), 0.002)), x)


@pytest.mark.parametrize(
    ("changes", "iterations", "average"),
    [
        ({"step": 5, "ema_rate": np.float32(0.5)}, 5, "params_ema (0.5)"),
        ({"step": np.int64(6), "ema_rate": np.array(0.25)}, 6, "params_ema (0.25)"),
        ({"step": np.array([1, 2]), "ema_rate": None}, 0, "params_ema"),
        ({"step": "many", "ema_rate": math.nan}, 0, "params_ema"),
        ({"step": -3, "ema_rate": -0.5}, 0, "params_ema"),
        ({"step": 2**53, "ema_rate": 1.5}, 0, "params_ema"),
        ({"step": 2**64 - 1, "ema_rate": 1j}, 0, "params_ema"),
        ({"step": np.array(1j), "ema_rate": np.complex64(1)}, 0, "params_ema"),
        ({"step": np.array(math.inf), "ema_rate": {}}, 0, "params_ema"),
    ],
)
def test_odd_numbers_beside_the_weights(tmp_path, changes, iterations, average):
    card = jax.read(saved(tmp_path, parameters(), **changes)).card
    assert (card.iterations, card.average) == (iterations, average)


# Other networks and damage.


def test_other_files_of_flax(tmp_path):
    path = write(tmp_path / "params", {"params": {"Dense_0": {"kernel": np.zeros((2, 2))}}})
    with pytest.raises(CheckpointError, match="holds no averaged weights params_ema but params"):
        jax.read(path)
    for tree, problem in (
        ({}, "params_ema but nothing"),
        ({"params_ema": None}, "no averaged weights"),
        ({"params_ema": {}}, "Conv_0/kernel is missing"),
        ({"params_ema": {"a": 3}}, "the parameter a is int"),
        ({"params_ema": {"a": {"b": [1]}}}, "the parameter a/b is list"),
        ({"params_ema": {"a": np.zeros(3, np.int32)}}, "the parameter a is int32"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            jax.read(write(tmp_path / "state", tree))


def block(tree: dict, number: int) -> dict:
    return tree[f"ResnetBlockBigGANpp_{number}"]


def ddpmpp(tree: dict) -> None:
    """As the positional variant of the original would be: no Fourier features, no pyramid."""
    tree.pop("GaussianFourierProjection_0")
    tree.pop("Downsample_0")


DAMAGE = {
    "a missing layer": (lambda tree: tree.pop("Conv_1"), "Conv_1/kernel is missing"),
    "a missing bias": (lambda tree: block(tree, 3)["Conv_0"].pop("bias"), "BigGANpp_3/Conv_0/bias is missing"),
    "a missing block": (lambda tree: tree.pop("ResnetBlockBigGANpp_9"), "9 residual blocks on 2 levels"),
    "a missing attention": (lambda tree: tree.pop("AttnBlockpp_2"), "it has 2 attention blocks"),
    "no attention": (lambda tree: [tree.pop(f"AttnBlockpp_{i}") for i in range(3)], "it has 0 attention blocks"),
    "an extra layer": (lambda tree: tree.update(Dense_7=tree["Dense_1"]), r"Dense_7/bias is not part of it \(and 1"),
    "an extra weight": (lambda tree: tree["Dense_0"].update(w=torch.ones(2)), r"Dense_0/w is not part of it \(known"),
    "another variant": (ddpmpp, "GaussianFourierProjection_0/W is missing"),
    "no pyramid": (lambda tree: tree.pop("Downsample_0"), "residual blocks on 1 levels"),
    "two heads": (
        lambda tree: tree["Conv_1"].update(kernel=torch.ones(3, 3, 8, 6)),
        "6 channels come out of it, and 3 go in",
    ),
    "a flat kernel": (lambda tree: tree["Conv_0"].update(kernel=torch.ones(27, 8)), r"Conv_0/kernel has shape \(27, 8"),
    "an empty kernel": (lambda tree: tree["Conv_0"].update(kernel=torch.ones(3, 3, 0, 8)), "has shape"),
    "odd widths": (lambda tree: tree["Dense_0"].update(kernel=torch.ones(16, 33)), "are no multiples of 8"),
    "odd frequencies": (
        lambda tree: tree["GaussianFourierProjection_0"].update(W=torch.ones(9)),
        "are no multiples of 8",
    ),
    "keys unlike queries": (
        lambda tree: tree["AttnBlockpp_1"]["NIN_1"].update(W=torch.ones(16, 8)),
        "AttnBlockpp_1/NIN_0/W and those after it differ in shape",
    ),
    "other widths of attention": (
        lambda tree: tree["AttnBlockpp_0"]["NIN_0"].update(W=torch.ones(8, 8)),
        r"3 attention blocks, of the widths \[8, 16, 16\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_networks_that_are_not_it(tmp_path, damage):
    change, problem = DAMAGE[damage]
    params = parameters()
    change(params)
    with pytest.raises(CheckpointError, match=problem) as caught:
        jax.read(saved(tmp_path, params))
    assert "openai/consistency_models_cifar10" in caught.value.hint


def test_shapes_that_do_not_tell_where_attention_is(tmp_path):
    """Of three levels of one width, one with attention is taken to be the released one; of two nothing is known."""
    params = reference(mult=(2, 2, 2), attention=(16, 4)).params
    with pytest.raises(CheckpointError, match="do not tell which 2 of its levels have attention"):
        jax.read(saved(tmp_path, params))


def test_weights_that_are_not_finite(tmp_path):
    for value in (math.nan, math.inf, 1e300):
        params = parameters()
        params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].double()
        params["Dense_0"]["kernel"][0, 0] = value  # in the copy that double() made
        with pytest.raises(CheckpointError, match=r"not finite, in map_layer0\.weight"):
            assemble(jax.read(saved(tmp_path, params)))


def test_very_many_levels_and_blocks(tmp_path):
    """Counts that a small file can claim, but has no weights for."""
    for kind, count in (("Downsample", 500), ("ResnetBlockBigGANpp", 902), ("AttnBlockpp", 2000)):
        params = parameters()
        params |= {f"{kind}_{number}": {"x": torch.ones(1)} for number in range(2, count)}
        with pytest.raises(CheckpointError):
            jax.read(saved(tmp_path, params))


NAMES = [f"{outer}/{inner}" for outer, layers in parameters().items() for inner in layers]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 24]), max_size=5), st.booleans())
def test_any_shape_anywhere(tmp_path, name, shape, nested):
    params = parameters()
    outer, inner = name.split("/")
    target = params[outer]
    if isinstance(target[inner], dict) and nested:
        target = target[inner]
        inner = sorted(target)[0]
    target[inner] = torch.ones(shape)
    path = saved(tmp_path, params)
    with suppress(CheckpointError):
        assert assemble(jax.read(path)).card.role == "consistency"
