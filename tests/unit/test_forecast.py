"""What a run will take, told before it is started."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cmtool.errors import ConfigError
from cmtool.training import forecast as f
from cmtool.training.forecast import fitting_micro_batch, forecast, weights_bytes
from tests.models import micro
from tests.unit.test_trainer import CD_RECIPE, EDM_RECIPE, MEANFLOW_RECIPE, SCD_RECIPE, assert_same, run, trainer

MIB = 2**20


def test_memory_is_followed_tensor_by_tensor():
    x = torch.zeros(4, 64, 32, 32)  # 1 MiB
    with f._Alive() as alive:
        y = x + 1
        assert alive.now == MIB
        z = y * 2
        y.add_(1)  # in place
        view = z[1:].transpose(1, 2)
        assert alive.now == 2 * MIB
        del y
        assert alive.now == MIB
        del z
        assert alive.now == MIB  # the view holds it
        del view
        assert alive.now == 0
        assert alive.peak == 2 * MIB


def test_activations_live_until_the_backward_pass():
    network = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Conv2d(16, 16, 1), nn.Tanh())])
    x = torch.zeros(
        16, 16, 32, 32
    )  # 1 MiB; what is kept is the output of Tanh, for its own gradient and the next convolution's
    with torch.no_grad(), f._Alive() as alive:
        network(x)
    assert alive.peak == pytest.approx(2 * MIB, rel=0.01)
    with f._Alive() as alive:
        out = network(x)
        assert alive.now == pytest.approx(5 * MIB, rel=0.01)
        out.sum().backward()
        del out
    assert 6 * MIB < alive.peak < 9 * MIB
    assert alive.now < 0.1 * MIB  # gradients


def test_the_memory_grows_with_the_images():
    made = trainer(replace(EDM_RECIPE, batch=20))
    room = f.gradient_room(made)
    for count in (4, 16, 20):
        made.rehearse(count)
        found = f._SCRATCH * f._peak(partial(made.rehearse, count), made.device)
        assert found == pytest.approx(room.of(count), rel=0.05)


def test_a_batch_that_is_smaller_than_what_is_measured():
    made = trainer(replace(EDM_RECIPE, batch=2))
    room = f.gradient_room(made)
    assert room.of(2) == pytest.approx(f._SCRATCH * f._peak(partial(made.rehearse, 2), made.device), rel=0.01)
    assert not room.fixed


def test_weights_are_counted_once():
    made = trainer(CD_RECIPE)  # a model, a moving target, a teacher, two averages; Adam's two moments, a gradient
    size = sum(p.numel() * 4 for p in made.model.parameters())
    assert weights_bytes(made) == (5 + 3) * size
    low = trainer(CD_RECIPE, compute_dtype=torch.bfloat16)
    assert weights_bytes(low) == (5 + 3 + 5 / 2) * size


@pytest.mark.parametrize("recipe", [EDM_RECIPE, CD_RECIPE, SCD_RECIPE, MEANFLOW_RECIPE], ids=lambda one: one.preset)
def test_a_forecast(recipe):
    found = forecast(trainer(recipe, micro_batch=2))
    assert found.parameters == sum(p.numel() for p in trainer(recipe).model.parameters())
    assert found.micro_batch == 2
    assert found.memory_bytes == found.weights_bytes + found.scratch_bytes + 2 * found.bytes_per_image
    assert found.bytes_per_image > 4 * 3 * recipe.network.resolution**2
    assert found.seconds == pytest.approx(recipe.iterations * recipe.batch / found.images_per_second)


def test_the_time_is_a_line_through_two_numbers_of_images():
    assert f.fitted((0, 0.0), (1, 3.0)) == (0, 3)
    assert f.fitted((4, 5.0), (16, 17.0)) == (1, 1)
    assert f.fitted((4, 5.0), (16, 4.0)) == (4, 0)  # something else was going on
    assert f.fitted((4, 1.0), (16, 17.0)) == (0, 17 / 16)
    assert f.fitted((4, 5.0), (4, 6.0)) == (0, 1.5)


@pytest.mark.parametrize(("batch", "most"), [(2, 2), (20, 20), (20, 16), (20, 40)])
def test_what_a_step_takes_once_is_told_from_what_an_image_takes(monkeypatch, batch, most):
    made, counts = trainer(replace(EDM_RECIPE, batch=batch)), []
    monkeypatch.setattr(made, "rehearse", counts.append)
    monkeypatch.setattr(f, "_seconds", lambda run, _: (run(), 0.5 + 0.25 * counts[-1])[1])
    once, each = f._pace(made, most)
    assert (once, each) == pytest.approx((0.5, 0.25))
    assert max(counts) == min(batch, most)
    assert sorted(counts) == counts


def test_what_is_done_takes_no_more_time():
    made = trainer(EDM_RECIPE)
    run(made, 3)
    found = forecast(made)
    assert found.seconds == pytest.approx(3 * 5 / found.images_per_second)


def test_a_rehearsal_changes_no_run():
    plain, rehearsed = trainer(CD_RECIPE), trainer(CD_RECIPE)
    fitting_micro_batch(rehearsed, 2**40)
    run(plain), run(rehearsed)
    assert_same(plain, rehearsed)


def test_the_largest_even_piece_that_fits():
    made = trainer(replace(EDM_RECIPE, batch=20))
    room = f.gradient_room(made)
    extra = weights_bytes(made) - f._held(made.networks) + room.fixed
    assert fitting_micro_batch(made, 2**40) is None
    for most in (1, 3, 7, 12, 19):
        free = math.ceil((extra + (most + 0.5) * room.per_image) / f._SHARE)
        found = fitting_micro_batch(made, free)
        pieces = math.ceil(20 / most)
        assert found == math.ceil(20 / pieces) <= most
    with pytest.raises(ConfigError, match="not even one image fits"):
        fitting_micro_batch(made, extra)


def test_recomputing_takes_less_memory():
    network = micro(32, num_blocks=3, num_classes=3, attention_resolutions=())
    recipe = replace(EDM_RECIPE, network=network)
    plain = f.gradient_room(trainer(recipe)).of(5)
    less = f.gradient_room(trainer(recipe, checkpoint_activations=True)).of(5)
    assert less < 0.8 * plain
