"""The trainer: order of the data, a continued run, divergence, and what follows the weights."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmtool.errors import ConfigError, DataError, DivergenceError
from cmtool.flow import EDM, VE, Linear, ModelCard, Trig, Velocity
from cmtool.networks import MLPConfig
from cmtool.times import Adjacent, Constant, Fixed, Halving, LogStudentT, Mapped, NextGrid, Pair, Progressive
from cmtool.training import weights
from cmtool.training.augment import Augment
from cmtool.training.average import Exponential, HalfLife, Power, blend
from cmtool.training.distances import L2, PseudoHuber
from cmtool.training.objectives import Consistency, Denoising, Loss, Mixture, Objective, Part, Tangent
from cmtool.training.recipe import Optimizer, Recipe
from cmtool.training.tangents import Adaptive, Learned, Normalised
from cmtool.training.targets import AdaptiveAverage, MovingAverage, Online, Truncated
from cmtool.training.trainer import Health, Order, Trainer
from cmtool.training.trajectory import Data, Predecessor, Teacher
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


# Small and smooth, for the methods that need no convolution.
PLAIN = MLPConfig(resolution=4, in_channels=3, out_channels=3, num_classes=3, width=16, depth=1, dropout=0.1)
BRIEF = COMMON | {"network": PLAIN, "iterations": 10}
PD_RECIPE = Recipe(
    "pd",
    "flow_map",
    Consistency(Predecessor(), NextGrid(Halving(4)), L2(), weights.TruncatedSNR(), compare_denoised=True),
    parameterization=EDM(),
    init_from_teacher=True,
    **BRIEF,
)
SCD_RECIPE = Recipe(
    "scd",
    "consistency",
    Tangent(Teacher(), limit=Normalised(), warmup=0.5, weight=weights.InverseRatio(), balance=Learned(8)),
    path=Trig(),
    parameterization=EDM(),
    **BRIEF,
)
CUT = Consistency(Data(), Mapped(LogStudentT(low=1.0)), PseudoHuber(), weights.InverseGap(), Truncated())
TCM_RECIPE = Recipe(
    "tcm",
    "consistency",
    Mixture((Part(CUT, 0.75, 1.0), Part(replace(CUT, times=Mapped(Fixed(1.0))), 0.25, 0.1))),
    parameterization=EDM(),
    **BRIEF,
)
MEANFLOW_RECIPE = Recipe(
    "meanflow",
    "flow_map",
    Mixture(
        (
            Part(Denoising(weight=weights.VelocityError(), balance=Adaptive())),
            Part(Tangent(Data(), Pair(), balance=Adaptive())),
        )
    ),
    path=Linear(),
    parameterization=Velocity(),
    **BRIEF | {"network": replace(PLAIN, two_times=True), "averages": (Power(0.1), Power(0.05))},
)
REFLOW_RECIPE = Recipe(
    "reflow",
    "denoiser",
    Denoising(weight=weights.VelocityError()),
    path=Linear(),
    parameterization=Velocity(),
    **BRIEF | {"flip": False},
)
SOLVING_RECIPE = replace(REFLOW_RECIPE, objective=replace(REFLOW_RECIPE.objective, pairs=Teacher(substeps=2)))
QUICK_RECIPE = Recipe("edm", "denoiser", Denoising(), parameterization=EDM(), **BRIEF)
AUGMENTED_RECIPE = Recipe(
    "edm", "denoiser", Denoising(), **BRIEF | {"network": replace(PLAIN, augment_dim=9), "augment": Augment()}
)


class Pairs(Pictures):
    """Images of pairs are floats in [-1, 1], and each has its noise."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.eps = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(5))

    def batch(self, indices):
        images, labels = super().batch(indices)
        return images.float() / 127.5 - 1, labels, self.eps[indices]


def teacher(network=NETWORK):
    return models.model("denoiser", network)


def trainer(recipe, *, data=None, **options) -> Trainer:
    options = {"seed": 3} | options
    network = recipe.network
    if recipe.objective.needs_teacher:
        options = {"teacher": teacher(PLAIN if network.kind == "mlp" else NETWORK)} | options
    if recipe.objective.needs_first:
        options = {"init": models.model("consistency", network, seed=2)} | options
    data = data or (Pairs if recipe is REFLOW_RECIPE else Pictures)(23, network.resolution, classes=3)
    return Trainer(recipe, data, ModelCard(recipe.role, network.resolution, num_classes=3), **options)


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


RUNS = {
    **{recipe.preset: (recipe, (1, 4)) for recipe in (EDM_RECIPE, CT_RECIPE, CD_RECIPE)},
    "pd": (PD_RECIPE, (1, 2, 3, 6)),  # its stages end after 2 and 6 steps
    **{recipe.preset: (recipe, (1, 4)) for recipe in (SCD_RECIPE, TCM_RECIPE, MEANFLOW_RECIPE, REFLOW_RECIPE)},
    "solved pairs": (SOLVING_RECIPE, (4,)),
    "augmented": (AUGMENTED_RECIPE, (4,)),
}


@pytest.mark.parametrize(
    ("recipe", "stop"),
    [pytest.param(recipe, stop, id=f"{name}-{stop}") for name, (recipe, stops) in RUNS.items() for stop in stops],
)
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

    assert [report.step for report in found] == list(range(stop + 1, recipe.iterations + 1))
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


# Pieces of a batch.


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("recipe", [one for one, _ in RUNS.values()], ids=RUNS.keys())
def test_micro_batches_have_the_gradient_of_the_batch(recipe, size):
    """With dropout, labels, targets, teachers, learned weights and several objectives."""
    whole, pieces = trainer(recipe), trainer(recipe, micro_batch=size)
    for made in (whole, pieces):
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():  # the last layers start with zeros, behind which gradients end
            for a, b in zip(made.model.parameters(), made.target.parameters(), strict=True):
                a.add_(torch.randn(a.shape, generator=generator), alpha=0.1)
                b.copy_(a)
    (expected,), (found,) = run(whole, 1), run(pieces, 1)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.t, expected.t)
    torch.testing.assert_close(found.grad_norm, expected.grad_norm, rtol=1e-3, atol=1e-6)
    compared = 0
    for a, b in zip(pieces._trained(), whole._trained(), strict=True):
        if b.grad is not None:
            scale = float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)
            compared += scale > 0
    assert compared > 5


def test_a_micro_batch_holds_an_image():
    with pytest.raises(ConfigError, match="at least 1"):
        trainer(EDM_RECIPE, micro_batch=0)
    assert_same(*(one for one in (trainer(EDM_RECIPE), trainer(EDM_RECIPE, micro_batch=99)) if run(one)))


@pytest.mark.parametrize("recipe", [EDM_RECIPE, CD_RECIPE, MEANFLOW_RECIPE], ids=lambda one: one.preset)
def test_checkpointed_activations_make_the_same_run(recipe):
    plain, again = trainer(recipe), trainer(recipe, checkpoint_activations=True)
    for one, other in zip(run(plain, 2), run(again, 2), strict=True):
        torch.testing.assert_close(one.per_sample, other.per_sample, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.grad_norm, other.grad_norm, rtol=1e-4, atol=1e-6)


def compiler(function):
    """A stand-in for torch.compile's backend."""

    def made(module, *, dynamic):
        assert dynamic is False
        module._compiled_call_impl = lambda *args, **rest: function(module, *args, **rest)

    return made


def test_a_compiled_run_is_the_run(monkeypatch):
    calls = []

    def compiled(module, *args, **rest):
        calls.append(module)
        return module._call_impl(*args, **rest)

    monkeypatch.setattr(torch.nn.Module, "compile", compiler(compiled))
    plain, made = trainer(CD_RECIPE), trainer(CD_RECIPE, compiled=True)
    run(plain), run(made)
    assert made.compiled
    assert {id(made.model.network), id(made.target.network)} < {id(module) for module in calls}
    assert_same(plain, made)


@pytest.mark.parametrize("when", [0, 5])
def test_where_the_compiler_fails_the_networks_run_as_they_are(monkeypatch, when):
    from torch._dynamo.exc import BackendCompilerFailed

    calls = []

    def failing(module, *args, **rest):
        calls.append(module)
        if len(calls) > when:
            raise BackendCompilerFailed(failing, RuntimeError("no compiler"), None)
        return module._call_impl(*args, **rest)

    monkeypatch.setattr(torch.nn.Module, "compile", compiler(failing))
    plain, made = trainer(CD_RECIPE), trainer(CD_RECIPE, compiled=True)
    run(plain), run(made)
    assert not made.compiled
    assert "no compiler" in made.compiler_error
    assert len(calls) == when + 1
    assert_same(plain, made)


def test_other_errors_are_not_the_compilers(monkeypatch):
    def failing(module, *args, **rest):
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch.nn.Module, "compile", compiler(failing))
    with pytest.raises(RuntimeError, match="a bug"):
        run(trainer(CD_RECIPE, compiled=True))


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


class Poisoned(Objective):
    """An objective that is not finite from one step on, in one of its terms or in its gradient alone."""

    def __init__(self, made, step, poison):
        super().__init__()
        self.objective, self.made, self.step, self.poison = made.objective, made, step, poison
        self.stage, self.promote = made.objective.stage, made.objective.promote

    def draw(self, *args):
        drawn = self.objective.draw(*args)
        self.parts = {one.name: one.objective for one in drawn}
        return tuple(one._replace(objective=self) for one in drawn)

    def loss(self, model, target, drawn, progress):
        loss = self.parts[drawn.name].loss(model, target, drawn, progress)
        if self.made.step + 1 < self.step:  # the step in work is not counted yet
            return loss
        if self.poison == "gradient":
            loss.value.register_hook(lambda grad: grad * float("inf"))
            return loss
        terms = {
            name: term * float("nan" if name + drawn.name == self.poison else 1) for name, term in loss.terms.items()
        }
        return Loss(loss.value * float("nan"), loss.per_sample, loss.t, terms)


POISONS = [
    (QUICK_RECIPE, "denoising loss"),
    (QUICK_RECIPE, "gradient"),
    (TCM_RECIPE, "consistency loss of part 1"),
    (MEANFLOW_RECIPE, "tangent loss of part 1"),
    (PD_RECIPE, "gradient"),
]
LOOKS = [(100, 4, 20), (100, 20, 20), (100, 21, 40), (4, 3, 4), (4, 4, 4)]


@pytest.mark.parametrize(("recipe", "poison"), POISONS, ids=lambda value: getattr(value, "preset", value))
@pytest.mark.parametrize(("iterations", "bad", "noticed"), LOOKS)
def test_divergence_is_caught_and_nothing_of_it_can_be_saved(recipe, poison, iterations, bad, noticed):
    """The step and the term that were the first to go wrong are named, though they are looked at later."""
    made = trainer(replace(recipe, iterations=iterations))
    made.objective = Poisoned(made, bad, poison)
    run(made, bad - 1)
    state = made.state_dict()  # so far all is well
    assert all(value.isfinite().all() for _, value in tensors(state) if isinstance(value, torch.Tensor))
    with pytest.raises(DivergenceError, match=f"at step {bad} the {poison} was no longer finite"):
        run(made)
    assert made.step == noticed
    for leave in (made.state_dict, lambda: made.average):
        with pytest.raises(DivergenceError, match=f"at step {bad} the {poison}"):
            leave()


def test_a_divergence_that_was_not_looked_for_yet_is_found_before_anything_is_saved():
    made = trainer(replace(QUICK_RECIPE, iterations=100))
    made.objective = Poisoned(made, 3, "denoising loss")
    run(made, 5)  # no look before step 20
    for leave in (made.state_dict, lambda: made.average):
        with pytest.raises(DivergenceError, match="at step 3 the denoising loss"):
            leave()


def test_a_recipe_made_to_blow_up_stops():
    """Nothing is poisoned here: the step is too large, and the loss of the next is not finite."""
    made = trainer(replace(QUICK_RECIPE, iterations=40, optimizer=Optimizer(rule="adam", lr=1e30)))
    with pytest.raises(DivergenceError, match="at step 2 the denoising loss"):
        run(made)
    assert made.step == 20


def test_the_health_of_a_run_is_the_first_bad_number():
    health = Health(torch.device("cpu"))
    assert health.first() is None
    values = [(1.0, 1.0), (2.0, float("inf")), (float("nan"), 1.0), (1.0, 1.0)]
    for step, (one, other) in enumerate(values, 1):
        health.note(step, {"one": torch.tensor(one), "other": torch.tensor(other)})
    assert health.first() == (2, "other")
    health = Health(torch.device("cpu"))
    health.note(7, {"loss": torch.tensor(float("nan")), "gradient": torch.tensor(float("nan"))})
    assert health.first() == (7, "loss")  # a gradient follows its loss


def test_a_good_state_mends_a_diverged_run():
    made = trainer(replace(EDM_RECIPE, iterations=3))
    good = trainer(replace(EDM_RECIPE, iterations=3)).state_dict()
    made._health.note(1, {"loss": torch.tensor(float("nan"))})
    with pytest.raises(DivergenceError):
        made.state_dict()
    made.load_state_dict(good)
    assert len(run(made)) == 3


def test_the_last_step_is_checked_too():
    made = trainer(EDM_RECIPE)
    made.model.network.map_layer0.weight.data.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="at step 1 the denoising loss"):
        run(made)
    assert made.step == 6


# Students that become teachers.


def weights_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_progressive_distillation_starts_anew_with_every_stage():
    """The student becomes the teacher, and optimizer, averages and learning rate begin again; the weights go on."""
    guide = teacher(PLAIN)
    made = trainer(PD_RECIPE, teacher=guide)
    shares = [0, 1 / 2, 0, 1 / 4, 1 / 2, 3 / 4, 0, 1 / 4, 1 / 2, 3 / 4]  # of three stages
    followed = teaching = ended = began = weights_of(guide.network)
    assert same(weights_of(made.model), began)
    for report, share in zip(made.run(), shares, strict=True):
        trajectory = made.objective.trajectory
        if share == 0:
            assert same(trajectory.teacher.network.parameters(), ended)
            steps = {int(state["step"]) for state in made.optimizer.state.values()}
            assert steps == {1}
            # an average that kept nothing: one blend since the stage began
            for rule, average in made.averages.values():
                decay = rule.decay(report.images, PD_RECIPE.batch)
                for mine, old, new in zip(average.parameters(), began, made.model.parameters(), strict=True):
                    torch.testing.assert_close(mine, torch.lerp(new.detach(), old, decay), rtol=1e-5, atol=1e-7)
        else:
            assert same(trajectory.teacher.network.parameters(), teaching)
        assert report.lr == pytest.approx(PD_RECIPE.optimizer.rate(share, report.images))
        teaching, ended = weights_of(trajectory.teacher.network), weights_of(made.model)
        began = ended
    assert same(guide.network.parameters(), followed)  # the teacher that was given is nobody's to change
    assert not same(ended, followed)


def test_a_teacher_that_stays_is_one_stage():
    recipe = replace(PD_RECIPE, objective=replace(PD_RECIPE.objective, trajectory=Teacher()))
    made = trainer(recipe)
    reports = run(made)
    assert [report.lr for report in reports] == [recipe.optimizer.rate(i / 10, 5 * (i + 1)) for i in range(10)]
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {10}


def test_a_learned_balance_is_trained_and_saved():
    made = trainer(SCD_RECIPE)
    balance = made.objective.balance.out
    assert not balance.weight.any()
    run(made, 3)
    assert bool(balance.weight.any())
    assert bool(balance.bias != 0)
    saved = made.state_dict()["objective"]
    assert torch.equal(saved["balance.out.bias"], balance.bias)
    # it is no part of the model
    assert not any("balance" in name for name in made.average.state_dict())


def test_a_second_stage_starts_from_its_first_and_leaves_it_alone():
    first = models.model("consistency", PLAIN, seed=2)
    made = trainer(TCM_RECIPE, init=first)
    before = weights_of(first.network)
    assert same(made.model.network.parameters(), before)
    run(made, 4)
    assert same(first.network.parameters(), before)
    assert not same(made.model.network.parameters(), before)
    assert not first.training
    with pytest.raises(ConfigError, match="--init"):
        trainer(TCM_RECIPE, init=None)


def test_a_network_of_two_times_starts_as_one_of_one():
    """A flow map distilled from a teacher: at every gap it is the teacher at first, and every weight can move."""
    recipe = replace(MEANFLOW_RECIPE, init_from_teacher=True, flip=False)
    guide = teacher(PLAIN)
    made = trainer(recipe, teacher=guide)
    x, t = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.full((4,), 0.7)
    made.model.eval()
    with torch.no_grad():
        raw = guide.network(x, t, torch.arange(4) % 3)
        for s in (t, t / 2, torch.zeros(4)):
            torch.testing.assert_close(made.model.raw(x, t, s, torch.arange(4) % 3), raw)
    run(made, 2)
    assert all(bool(parameter.any()) for name, parameter in made.model.named_parameters() if "map_gap" in name)


# Pairs, floats, augmentation.


def test_pairs_bring_their_noise():
    data = Pairs(23, 4, classes=3)
    made = trainer(REFLOW_RECIPE, data=data)
    batch = made._batch(torch.Generator().manual_seed(0))
    index = Order(23, 3).indices(0, 5)
    assert torch.equal(batch.eps, data.eps[index])
    torch.testing.assert_close(batch.x0, data.images[index].float() / 127.5 - 1)  # floats are taken as they are
    assert torch.equal(batch.labels, data.labels[index])
    # the loss of the step is that of these pairs
    quiet = replace(REFLOW_RECIPE, network=replace(PLAIN, dropout=0.0))
    made = trainer(quiet, data=data)
    model = trainer(quiet, data=data).model
    (report,) = run(made, 1)
    t = report.t[:, None, None, None]
    with torch.no_grad():
        raw = model.raw((1 - t) * batch.x0 + t * batch.eps, report.t, labels=batch.labels)
    torch.testing.assert_close(report.per_sample, (raw - (batch.eps - batch.x0)).square().mean((1, 2, 3)))


MOVED = {"flip": {"flip": True}, "augment": {"augment": Augment(), "network": replace(PLAIN, augment_dim=9)}}


@pytest.mark.parametrize("change", MOVED.values(), ids=MOVED)
def test_pairs_are_not_to_be_moved(change):
    """A mirrored image has another noise: refused in the first step, before anything is learned."""
    made = trainer(replace(REFLOW_RECIPE, **change), data=Pairs(23, 4, classes=3))
    before = weights_of(made.model)
    with pytest.raises(ConfigError, match="pairs"):
        run(made)
    assert (made.step, same(made.model.parameters(), before)) == (0, True)


def test_augmented_images_come_with_their_labels():
    made = trainer(AUGMENTED_RECIPE)
    batch = made._batch(torch.Generator().manual_seed(0))
    assert batch.augment.shape == (5, 9)
    plain = trainer(replace(AUGMENTED_RECIPE, augment=None))._batch(torch.Generator().manual_seed(0))
    assert plain.augment is None
    with pytest.raises(ConfigError, match="augment_dim=9"):
        trainer(replace(AUGMENTED_RECIPE, network=PLAIN))


def test_too_little_data_is_refused():
    with pytest.raises(DataError, match="4 images"):
        trainer(EDM_RECIPE, data=Pictures(4, classes=3))


def test_a_missing_teacher_is_refused():
    with pytest.raises(ConfigError, match="teacher"):
        trainer(CD_RECIPE, teacher=None)


def test_a_teacher_on_another_path_is_followed():
    """It is read on the student's path; but a student of another path cannot take its place."""
    made = trainer(replace(SCD_RECIPE, path=Linear().like(VE())))
    assert made.objective.trajectory.teacher.path == VE()
    run(made, 2)
    with pytest.raises(ConfigError, match="path"):
        run(trainer(replace(PD_RECIPE, path=VE(t_max=40.0))), 1)


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


WRONG = [
    *({"lr": 0.0}, {"lr": float("inf")}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-8}),
    *({"weight_decay": -0.1}, {"warmup": -5}, {"final": -1.0}, {"clip_norm": 0.0}, {"clip_norm": -1.0}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_optimizer_refuses_what_is_no_setting(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("lr", "learning rate")):
        Optimizer(**wrong)
