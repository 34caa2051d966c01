"""The trainer: order of the data, a continued run, divergence, and what follows the weights."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmtool.errors import ConfigError, DataError, DivergenceError
from cmtool.flow import EDM, VE, ModelCard
from cmtool.times import Adjacent, Constant, Progressive
from cmtool.training.average import Exponential, HalfLife, blend
from cmtool.training.distances import PseudoHuber
from cmtool.training.objectives import Consistency, Denoising
from cmtool.training.recipe import Optimizer, Recipe
from cmtool.training.targets import AdaptiveAverage, MovingAverage, Online
from cmtool.training.trainer import Order, Trainer
from cmtool.training.trajectory import Data, Teacher
from tests import models
from tests.models import Pictures, micro

NETWORK = micro(num_classes=3, dropout=0.1)
COMMON = {
    "network": NETWORK,
    "optimizer": Optimizer(lr=1e-3, warmup=20, final=0.1, clip_norm=1.0),
    "averages": (HalfLife(100, 0.1), Exponential(0.9)),
    "iterations": 6,
    "batch": 5,
    "flip": True,
}
EDM_RECIPE = Recipe("edm", "denoiser", Denoising(), parameterization=EDM(), **COMMON)
CT_RECIPE = Recipe(
    "ct",
    "consistency",
    Consistency(Data(), Adjacent(curriculum=Progressive(2, 9)), PseudoHuber(), target=AdaptiveAverage(0.9)),
    **COMMON,
)
CD_RECIPE = Recipe(
    "cd",
    "consistency",
    Consistency(Teacher(), Adjacent(curriculum=Constant(6)), target=MovingAverage(0.5)),
    init_from_teacher=True,
    **COMMON,
)


def teacher():
    return models.model("denoiser", NETWORK)


def trainer(recipe, *, data=None, **options) -> Trainer:
    options = {"seed": 3} | options
    if recipe.objective.needs_teacher:
        options = {"teacher": teacher()} | options
    return Trainer(recipe, data or Pictures(23, classes=3), ModelCard(recipe.role, 8, num_classes=3), **options)


def run(to: Trainer, steps: int | None = None) -> list:
    reports = []
    for report in to.run():
        reports.append(report)
        if len(reports) == steps:
            break
    return reports


def tensors(state, prefix=""):
    """(name, value) of everything in a nested state."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{prefix}{key}.")
    elif isinstance(state, (list, tuple)):
        for key, value in enumerate(state):
            yield from tensors(value, f"{prefix}{key}.")
    else:
        yield prefix, state


def assert_same(one: Trainer, other: Trainer) -> None:
    a, b = dict(tensors(one.state_dict())), dict(tensors(other.state_dict()))
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


# The order of the data.


@given(size=st.integers(1, 12), seed=st.integers(0, 5), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_order_is_a_function_of_the_position(size, seed, cuts):
    whole = Order(size, seed).indices(0, sum(cuts))
    order, position = Order(size, seed), 0
    for count in cuts:
        assert torch.equal(order.indices(position, count), whole[position : position + count])
        position += count
    assert torch.equal(Order(size, seed).indices(sum(cuts) - cuts[-1], cuts[-1]), whole[sum(cuts) - cuts[-1] :])


def test_every_epoch_is_a_new_permutation():
    epochs = Order(50, 0).indices(0, 500).view(10, 50)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(50).expand(10, 50))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 10
    assert not torch.equal(epochs, Order(50, 1).indices(0, 500).view(10, 50))
    assert epochs.dtype == torch.int64


# A continued run.


@pytest.mark.parametrize("recipe", [EDM_RECIPE, CT_RECIPE, CD_RECIPE], ids=lambda recipe: recipe.preset)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_continued_run_is_the_run(recipe, stop):
    straight = trainer(recipe)
    expected = run(straight)

    first = trainer(recipe)
    run(first, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    torch.manual_seed(999)  # nothing may depend on the global generator
    second = trainer(recipe, seed=3)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same(first, second)
    torch.rand(7)
    found = run(second)

    assert [report.step for report in found] == list(range(stop + 1, 7))
    for one, other in zip(expected[stop:], found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert_same(straight, second)
    assert run(second) == []


def test_another_seed_is_another_run():
    one, other = trainer(EDM_RECIPE, seed=0), trainer(EDM_RECIPE, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert not torch.equal(run(one, 1)[0].t, run(other, 1)[0].t)


def test_making_a_trainer_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    run(trainer(CT_RECIPE), 1)
    assert torch.equal(torch.get_rng_state(), state)


# A step.


def test_reports_count_steps_and_images():
    reports = run(trainer(EDM_RECIPE))
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [report.images for report in reports] == [5, 10, 15, 20, 25, 30]
    assert [report.progress for report in reports] == pytest.approx([i / 6 for i in range(1, 7)])
    times = torch.cat([report.t for report in reports])
    assert len(times.unique()) == 30  # every step draws its own
    for i, report in enumerate(reports):
        assert report.lr == EDM_RECIPE.optimizer.rate(i / 6, 5 * (i + 1))
        assert report.per_sample.shape == report.t.shape == (5,)
        assert float(report.loss) == pytest.approx(float(report.per_sample.mean()), rel=1e-6)


def test_a_step_is_the_optimizers_step_on_the_loss():
    """One step of plain Adam has |change| = lr wherever the gradient is not small: the trainer adds nothing to it."""
    recipe = replace(EDM_RECIPE, optimizer=Optimizer(rule="adam", lr=1e-3, eps=1e-20), flip=False)
    made = trainer(recipe)
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    run(made, 1)
    grads = [parameter.grad for parameter in made.model.parameters()]
    lr = recipe.optimizer.rate(0.0, 5)
    for old, new, grad in zip(before, made.model.parameters(), grads, strict=True):
        large = grad.abs() > 1e-12
        torch.testing.assert_close((new.detach() - old)[large], (-lr * grad.sign())[large], rtol=0, atol=1e-6)
    assert sum(int((grad.abs() > 1e-12).sum()) for grad in grads) > 1000


def test_gradients_are_clipped_and_their_norm_reported():
    made = trainer(replace(EDM_RECIPE, optimizer=Optimizer(lr=1e-6, clip_norm=1e-3)))
    (report,) = run(made, 1)
    assert float(report.grad_norm) > 1e-3
    norm = torch.stack([parameter.grad.norm() for parameter in made.model.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-4)
    free = trainer(replace(EDM_RECIPE, optimizer=Optimizer(lr=1e-6)))
    (other,) = run(free, 1)
    torch.testing.assert_close(other.grad_norm, report.grad_norm)
    norm = torch.stack([parameter.grad.norm() for parameter in free.model.parameters()]).norm()
    torch.testing.assert_close(norm, other.grad_norm)


def test_steps_go_through_the_data_in_order():
    data, asked = Pictures(23, classes=3), []
    fetch = data.batch
    data.batch = lambda indices: asked.append(indices) or fetch(indices)
    run(trainer(EDM_RECIPE, data=data))
    assert torch.equal(torch.cat(asked), Order(23, 3).indices(0, 30))


def test_what_a_batch_is_made_of():
    data = Pictures(23, classes=3)
    made = trainer(replace(EDM_RECIPE, flip=False, batch=23), data=data)
    batch = made._batch(torch.Generator().manual_seed(0))
    index = Order(23, 3).indices(0, 23)
    torch.testing.assert_close(batch.x0, data.images[index].float() / 127.5 - 1)
    assert torch.equal(batch.labels, data.labels[index])
    flipped = trainer(replace(EDM_RECIPE, batch=23), data=data)._batch(torch.Generator().manual_seed(0)).x0
    mirrored = [bool((a != b).any()) for a, b in zip(flipped, batch.x0, strict=True)]
    assert 4 < sum(mirrored) < 19
    for a, b, swapped in zip(flipped, batch.x0, mirrored, strict=True):
        assert torch.equal(a, b.flip(-1) if swapped else b)


def test_labels_are_left_out_where_the_network_knows_none():
    made = Trainer(replace(EDM_RECIPE, network=micro()), Pictures(23, classes=3), ModelCard("denoiser", 8))
    assert made._batch(torch.Generator()).labels is None


# What follows the weights.


def test_the_averages_and_the_target_follow():
    made = trainer(CT_RECIPE)
    expected = {name: trainer(CT_RECIPE).model for name in ("half-life-100", "exponential-0.9", "target")}
    for step, _ in enumerate(made.run()):
        progress, images = step / 6, 5 * (step + 1)
        decays = {
            "half-life-100": HalfLife(100, 0.1).decay(images, 5),
            "exponential-0.9": 0.9,
            "target": AdaptiveAverage(0.9).decay(progress, Progressive(2, 9)(progress)),
        }
        for name, model in expected.items():
            blend(model, made.model, decays[name])
    found = {name: model for name, (_, model) in made.averages.items()} | {"target": made.target}
    assert found.keys() == expected.keys()
    for name, model in expected.items():
        for a, b in zip(model.parameters(), found[name].parameters(), strict=True):
            assert torch.equal(a, b), name
            assert not b.requires_grad
        # ... and has left where it began
        begin = trainer(CT_RECIPE).model.parameters()
        assert any(not torch.equal(a, b) for a, b in zip(begin, found[name].parameters(), strict=True))


def test_averages_are_for_sampling_and_the_target_trains_along():
    made = trainer(CT_RECIPE)
    run(made, 1)
    assert made.model.training
    assert made.target.training  # its dropout is the model's
    assert not made.average.training
    assert made.average.card.average == "half-life-100"
    assert made.average.card.iterations == 1
    assert made.average.card.role == "consistency"
    assert made.average.card.grid_points == 10  # the last N of the curriculum
    assert trainer(replace(CT_RECIPE, two_step=0.8)).average.card.times == {"2": (80.0, 0.8)}


def test_an_online_target_is_the_model():
    made = trainer(replace(CD_RECIPE, objective=replace(CD_RECIPE.objective, target=Online())))
    assert made.target is made.model
    assert made.state_dict()["target"] is None


def test_a_student_starts_as_its_teacher():
    guide = teacher()
    made = trainer(CD_RECIPE, teacher=guide)
    for a, b in zip(made.model.network.parameters(), guide.network.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    before = [parameter.clone() for parameter in guide.parameters()]
    run(made, 2)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))
    assert not guide.training


def test_a_run_can_start_from_other_weights():
    other = models.model("denoiser", NETWORK, seed=7)
    made = trainer(CD_RECIPE, init=other)
    assert all(
        torch.equal(a, b) for a, b in zip(made.model.network.parameters(), other.network.parameters(), strict=True)
    )


# Refusals.


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(("iterations", "noticed"), [(100, 20), (4, 4)])
def test_divergence_is_caught_and_nothing_of_it_can_be_saved(poison, iterations, noticed):
    made = trainer(replace(EDM_RECIPE, iterations=iterations))

    class Poisoned(torch.nn.Module):
        def __init__(self, objective):
            super().__init__()
            self.objective = objective

        def forward(self, *args):
            loss = self.objective(*args)
            bad = made.step == 3
            if poison == "loss":
                return loss._replace(value=loss.value * float("nan") if bad else loss.value)
            value = loss.value
            if bad:
                value.register_hook(lambda grad: grad * float("inf"))
            return loss

    made.objective = Poisoned(made.objective)
    run(made, 3)
    made.state_dict()  # so far all is well
    with pytest.raises(DivergenceError, match=f"step {noticed}"):
        run(made)
    assert made.step == noticed
    for leave in (made.state_dict, lambda: made.average):
        with pytest.raises(DivergenceError):
            leave()


def test_a_good_state_mends_a_diverged_run():
    made = trainer(replace(EDM_RECIPE, iterations=3))
    good = trainer(replace(EDM_RECIPE, iterations=3)).state_dict()
    made._finite.fill_(False)
    made.load_state_dict(good)
    assert len(run(made)) == 3


def test_the_last_step_is_checked_too():
    made = trainer(EDM_RECIPE)
    made.model.network.map_layer0.weight.data.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="step 6"):
        run(made)


def test_too_little_data_is_refused():
    with pytest.raises(DataError, match="4 images"):
        trainer(EDM_RECIPE, data=Pictures(4, classes=3))


def test_a_missing_teacher_is_refused():
    with pytest.raises(ConfigError, match="teacher"):
        trainer(CD_RECIPE, teacher=None)


def test_a_teacher_on_another_path_is_refused():
    """Its estimates would be read at the wrong noise level, without a word."""
    made = trainer(replace(CD_RECIPE, path=VE(t_max=40.0)))
    with pytest.raises(ConfigError, match="path"):
        run(made, 1)


# Training does what it is for.


@pytest.mark.slow
def test_a_denoiser_learns():
    recipe = replace(
        EDM_RECIPE, optimizer=Optimizer(rule="adam", lr=3e-3, warmup=320), iterations=60, batch=16, network=micro()
    )
    data = Pictures(64)
    made = Trainer(recipe, data, ModelCard("denoiser", 8), seed=0)
    first = [float(report.loss) for report in run(made)]
    assert sum(first[-10:]) < 0.6 * sum(first[:10])
