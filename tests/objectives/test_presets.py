"""Every preset's objective: finite gradients for every weight, at every stage of the training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmtool.flow import FlowMap
from cmtool.training import presets
from cmtool.training.distances import LPIPS, PseudoHuber
from cmtool.training.recipe import Recipe
from cmtool.training.trajectory import Batch
from tests import models
from tests.models import micro


def without_lpips(recipe: Recipe) -> Recipe:
    """LPIPS needs a pretrained trunk; its gradients are tested by themselves."""
    if isinstance(recipe.objective.distance, LPIPS):
        return replace(recipe, objective=replace(recipe.objective, distance=PseudoHuber()))
    return recipe


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_gradients_are_finite_and_reach_every_weight(name, progress):
    config = micro(num_classes=3)
    recipe = without_lpips(presets.preset(name)(presets.Shape(64, 3, 3)))
    teacher = models.model("denoiser", config, parameterization=None, seed=1)
    objective = recipe.objective.build(teacher if recipe.objective.needs_teacher else None)
    network = models.model(config=config).network
    model = FlowMap(network, recipe.path, recipe.parameterization).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(16, 3, 8, 8, generator=generator) * 2 - 1, torch.arange(16) % 3)
    loss = objective(model, model, batch, progress, generator)
    loss.value.backward()
    assert bool(loss.per_sample.isfinite().all())
    assert float(loss.value.detach()) > 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert bool((parameter.grad != 0).any()), key


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_says_where_it_comes_from(name):
    assert "et al." in (presets.preset(name).__doc__ or "")
    assert presets.summary(name).endswith(".")
