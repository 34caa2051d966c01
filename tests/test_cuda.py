"""On a GPU: the same numbers as on a CPU, and the ways of training that only pay there."""

from __future__ import annotations

import pytest
import torch

from cmtool import networks, rng
from cmtool.flow import ModelCard
from cmtool.generate import automatic_batch, generate, inpaint, sample
from cmtool.networks import ADMConfig, DDPMppConfig, EDM2Config
from cmtool.networks.chance import seeded
from cmtool.training.forecast import forecast
from cmtool.training.trainer import Trainer
from tests import models
from tests.models import Pictures
from tests.unit.test_trainer import CD_RECIPE, CT_RECIPE, EDM_RECIPE, SCD_RECIPE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CONFIGS = (
    DDPMppConfig(
        resolution=16, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,), dropout=0.2
    ),
    ADMConfig(resolution=16, channels=64, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,), dropout=0.2),
    EDM2Config(resolution=16, channels=64, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,), dropout=0.2),
)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products in float32, not in TF32: torch's convolutions round their factors to 10 bits otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trainer(recipe, **options):
    given = {"teacher": models.model("denoiser", recipe.network)} if recipe.objective.needs_teacher else {}
    card = ModelCard(recipe.role, recipe.network.resolution, 3, recipe.network.num_classes)
    data = Pictures(24, recipe.network.resolution, classes=recipe.network.num_classes)
    return Trainer(recipe, data, card, device="cuda", **given, **options)


def through(network, x, noise, seeds):
    """Output and gradient of a network."""
    network.zero_grad()
    with seeded(seeds):
        out = network(x, noise)
    out.square().mean().backward()
    return out.detach().cpu(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).cpu()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.kind)
def test_a_network_is_the_same_function_with_the_same_dropout(config):
    network = models.model(config=config).network.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(4, 3, 16, 16, generator=generator), torch.randn(4, generator=generator)
    seeds = torch.randint(2**62, (4,), generator=generator)
    here = through(network, x, noise, seeds)
    there = through(network.to("cuda", memory_format=torch.channels_last), x.cuda(), noise.cuda(), seeds.cuda())
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("role", ["consistency", "denoiser"])
def test_the_same_seeds_are_the_same_images(role):
    model = models.model(role, CONFIGS[1])
    options = {"steps": 2} if role == "consistency" else {"steps": 5, "solver": "heun"}
    here = torch.cat([chunk.images for chunk in generate(model, range(5), batch=5, **options)])
    there = torch.cat([chunk.images for chunk in generate(model.cuda(), range(5), batch=2, **options)])
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=2e-3)


def test_known_pixels_are_exact():
    model = models.model(config=CONFIGS[1]).cuda()
    images = rng.noise([1, 2], (3, 16, 16)).clamp(-1, 1)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 4:9, 4:9] = True
    made = inpaint(model, images, mask, seeds=[3, 4], steps=3).cpu()
    assert torch.equal(made.where(~mask, 0), images.where(~mask, 0))
    assert not torch.equal(made, images)


@pytest.mark.parametrize("recipe", [EDM_RECIPE, CT_RECIPE, CD_RECIPE, SCD_RECIPE], ids=lambda one: one.preset)
@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"checkpoint_activations": True}], ids=str)
def test_a_step_by_pieces_is_the_step(recipe, options):
    for one, other in zip(trainer(recipe).run(), trainer(recipe, **options).run(), strict=True):
        torch.testing.assert_close(other.per_sample, one.per_sample, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(other.grad_norm, one.grad_norm, rtol=1e-2, atol=1e-4)


def graphs(network):
    """The recordings of a network."""
    return [one for one in network._compiled_call_impl._recorded.values() if one is not None]


@pytest.mark.parametrize("recipe", [EDM_RECIPE, CT_RECIPE, CD_RECIPE, SCD_RECIPE], ids=lambda one: one.preset)
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"compute_dtype": torch.bfloat16}], ids=str)
def test_a_recorded_step_is_the_step(recipe, options, monkeypatch):
    made = trainer(recipe, **options)
    found = list(made.run())
    assert graphs(made.model.network)
    assert not made.model.network._compiled_call_impl._refused
    monkeypatch.setenv("CMTOOL_GRAPHS", "0")
    plain = trainer(recipe, **options)
    assert plain.model.network._compiled_call_impl is None
    tolerance = {"rtol": 5e-2, "atol": 1e-2} if "compute_dtype" in options else {"rtol": 1e-2, "atol": 1e-4}
    for one, other in zip(plain.run(), found, strict=True):
        torch.testing.assert_close(other.per_sample, one.per_sample, **tolerance)
        torch.testing.assert_close(other.grad_norm, one.grad_norm, **tolerance)


def test_a_recorded_network_may_be_asked_twice_before_a_gradient():
    network = models.model(config=CONFIGS[0]).network.requires_grad_(True).cuda().eval()
    x, noise = torch.randn(3, 4, 3, 16, 16, device="cuda"), torch.zeros(4, device="cuda")
    expected = [through(network, part, noise, None) for part in x]
    networks.record(network)
    for _ in range(3):
        for part, (out, gradient) in zip(x, expected, strict=True):
            for one, other in zip((out, gradient), through(network, part, noise, None), strict=True):
                torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
    assert graphs(network)
    network.zero_grad()
    sum(network(part, noise).square().mean() for part in x).backward()
    together = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).cpu()
    whole = sum(gradient for _, gradient in expected)
    torch.testing.assert_close(together, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_recordings_see_new_weights():
    model = models.model(config=CONFIGS[0]).cuda()
    x, noise = torch.randn(4, 3, 16, 16, device="cuda"), torch.zeros(4, device="cuda")
    with networks.recorded(model.network), torch.no_grad():
        before = [model.network(x, noise) for _ in range(10)]
        assert graphs(model.network)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        after = model.network(x, noise)
    assert model.network._compiled_call_impl is None
    assert all(torch.equal(one, before[7]) for one in before[8:])  # a recording, and told apart from other weights
    torch.testing.assert_close(after, model.network(x, noise).detach(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(after, before[0], rtol=1e-2)


def test_single_batches_are_recorded_too():
    model = models.model("consistency", CONFIGS[1]).cuda()

    def made():
        return sample(model, seeds=range(3), batch=3)

    def recordings():
        return [one for one in kept[model.network][1]._recorded.values() if not isinstance(one, int)]

    kept = networks.graphs._kept
    first = made()
    assert not recordings()
    assert all(torch.allclose(made(), first, atol=2e-3) for _ in range(8))
    (recording,) = recordings()
    made()
    assert recordings() == [recording]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = made()
    assert recordings() == [recording]
    networks.forget(model.network)
    assert model.network not in kept
    torch.testing.assert_close(changed, made(), rtol=0, atol=2e-3)
    assert not torch.allclose(changed, first, atol=2e-2)
    for parameter in model.parameters():  # elsewhere in memory: what was recorded would read what is no more
        parameter.data = parameter.data.clone()
    assert made() is not None
    assert not recordings()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of this and that, and an error stops it
@pytest.mark.parametrize("recipe", [EDM_RECIPE, CD_RECIPE], ids=lambda one: one.preset)
def test_a_compiled_step_is_the_step(recipe):
    made = trainer(recipe, compiled=True)
    for one, other in zip(trainer(recipe).run(), made.run(), strict=True):
        torch.testing.assert_close(other.per_sample, one.per_sample, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(other.grad_norm, one.grad_norm, rtol=1e-2, atol=1e-4)
    assert made.compiled, made.compiler_error


@pytest.mark.parametrize("recipe", [EDM_RECIPE, CD_RECIPE, SCD_RECIPE], ids=lambda one: one.preset)
def test_low_precision_is_near(recipe):
    for one, other in zip(trainer(recipe).run(), trainer(recipe, compute_dtype=torch.bfloat16).run(), strict=True):
        torch.testing.assert_close(other.loss, one.loss, rtol=0.1, atol=1e-3)


def test_a_continued_run_goes_on():
    whole, first, second = (trainer(CD_RECIPE) for _ in range(3))
    expected = list(whole.run())
    for _, _ in zip(range(3), first.run(), strict=False):
        pass
    second.load_state_dict(first.state_dict())
    for one, other in zip(expected[3:], second.run(), strict=True):
        torch.testing.assert_close(other.per_sample, one.per_sample, rtol=1e-3, atol=1e-5)


def test_memory_is_told():
    found = forecast(trainer(EDM_RECIPE))
    assert found.memory_bytes > 0
    assert found.images_per_second > 0
    assert automatic_batch(models.model(config=CONFIGS[0]).cuda()) >= 1
