"""Every preset: finite gradients for every weight at every stage, a source, constants to set, a start that fits."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from cmtool import networks, spec
from cmtool.cli import options
from cmtool.errors import ConfigError
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, Linear, LogRatio, PathTime, Trig, Velocity, on_path
from cmtool.training import presets
from cmtool.training.distances import LPIPS, PseudoHuber
from cmtool.training.objectives import Mixture
from cmtool.training.presets import Shape
from cmtool.training.recipe import KINDS, Recipe
from cmtool.training.trajectory import Batch
from tests import models
from tests.models import micro
from tests.objectives.gaussian import generator, normal

names = pytest.mark.parametrize("name", presets.PRESETS)
# What the presets are asked with. A teacher of each kind is where a student starts.
TEACHERS = {
    "edm": (VE(), EDM()),
    "openai": (VE(), EDM(time_input=LogRatio(250.0))),
    "velocity": (Linear(), Velocity()),
    "trig": (Trig(), EDM()),
    "trigflow": (Trig(), EDM(time_input=PathTime())),
}
SHAPES = {
    "nothing": Shape(32, 3, 10),
    "large": Shape(64, 1, 0),
    "pairs": Shape(32, 3, 10, distils=True, paired=True),
    **{
        name: Shape(32, 3, 10, networks.SIZES["small"](32, 3, 10), path, parameterization, distils=True)
        for name, (path, parameterization) in TEACHERS.items()
    },
}


def made(name, shape) -> Recipe:
    return presets.preset(name)(shape)


def refused(name, shape) -> bool:
    try:
        made(name, shape)
    except ConfigError:
        return True
    return False


DATA = ("cifar10", "vp", "fast", "imagenet64", "lsun256")
asked = pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, id=f"{name}-{key}")
        for name in presets.PRESETS
        for key, shape in SHAPES.items()
        # (those that bear the name of their data share the code of the others)
        if not refused(name, shape) and (key in ("nothing", "velocity") or name.split("-")[-1] not in DATA)
    ],
)


def without_lpips(objective):
    """LPIPS needs a pretrained trunk; its gradients are tested by themselves."""
    if isinstance(objective, Mixture):
        parts = (replace(part, objective=without_lpips(part.objective)) for part in objective.parts)
        return replace(objective, parts=tuple(parts))
    if isinstance(getattr(objective, "distance", None), LPIPS):
        return replace(objective, distance=PseudoHuber())
    return objective


def check_gradients(recipe, progress, path=None, parameterization=None):
    """Of a small network in place of the recipe's; along a teacher of this kind."""
    augment_dim = getattr(recipe.network, "augment_dim", 0)
    config = micro(num_classes=3, two_times=recipe.network.two_times, augment_dim=augment_dim)
    teacher = models.model("denoiser", micro(num_classes=3), path, parameterization, seed=1)
    first = models.model("consistency", micro(num_classes=3), recipe.path, recipe.parameterization, seed=2)
    objective = without_lpips(recipe.objective).build(
        teacher if recipe.objective.needs_teacher else None, first=first if recipe.objective.needs_first else None
    )
    model = FlowMap(models.model(config=config).network, recipe.path, recipe.parameterization)
    model = model.train().requires_grad_(True)
    images = torch.rand(16, 3, 8, 8, generator=generator()) * 2 - 1
    batch = Batch(images, torch.arange(16) % 3, None, torch.ones(16, 9) if augment_dim else None)
    loss = objective(model, model, batch, progress, generator())
    loss.value.backward()
    assert bool(loss.per_sample.isfinite().all())
    assert float(loss.per_sample.abs().max()) > 0
    for key, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert bool(parameter.grad.isfinite().all()), key
            assert bool((parameter.grad != 0).any()), key


@names
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_gradients_are_finite_and_reach_every_weight(name, progress):
    check_gradients(made(name, Shape(64, 3, 3)), progress)


@pytest.mark.parametrize("kind", ["velocity", "trigflow"])
@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name.split("-")[-1] not in DATA])
def test_gradients_are_finite_also_along_teachers_of_other_kinds(name, kind):
    if not refused(name, SHAPES[kind]):
        check_gradients(made(name, SHAPES[kind]), 0.7, *TEACHERS[kind])


@names
def test_a_preset_says_where_it_comes_from(name):
    text = inspect.getdoc(presets.preset(name)) or ""
    assert re.search(r"arXiv:\d{4}\.\d{5}", text), text
    assert presets.summary(name).endswith(".")
    assert "\n" not in presets.summary(name)
    assert made(name, SHAPES["nothing"]).preset == name


# Constants.


def constants(component, prefix=""):
    """(dotted name, value) of everything in a recipe that is no component."""
    if is_dataclass(component):
        for field in fields(component):
            yield from constants(getattr(component, field.name), f"{prefix}{field.name}.")
    elif isinstance(component, tuple) and any(map(is_dataclass, component)):
        for i, item in enumerate(component):
            yield from constants(item, f"{prefix}{i}.")
    else:
        yield prefix.rstrip("."), component


def reach(component, path):
    for name in path.split("."):
        component = component[int(name)] if name.isdigit() else getattr(component, name)
    return component


@asked
def test_every_constant_is_shown_and_can_be_set(name, shape):
    """`presets show` prints each by the name that --set takes; set to what is printed, the recipe stays the same."""
    recipe = made(name, shape)
    shown = dict(options.settings(spec.to_dict(recipe)))
    for path, value in constants(recipe):
        assert path in shown, path
        same = spec.replace(recipe, path, shown[path], KINDS)
        assert same == recipe, path
        assert type(reach(same, path)) is type(value), path
    for path in shown.keys() - dict(constants(recipe)).keys():  # the rest are kinds
        assert shown[path] == reach(recipe, path).kind
        try:
            found = reach(spec.replace(recipe, path, shown[path], KINDS), path)
        except ConfigError as error:  # its defaults may not fit in: a mixture of nothing, two averages of one name
            said = str(error)
        else:
            assert type(found) is type(reach(recipe, path))
            continue
        assert "no kind" not in said


@names
def test_a_changed_constant_is_another_recipe_and_survives_its_file(name):
    recipe = made(name, SHAPES["pairs"])
    assert spec.from_dict(spec.to_dict(recipe), Recipe, KINDS) == recipe
    for path, value in constants(recipe):
        if isinstance(value, float) and 0 < value < 1 and not path.endswith(("share", "mu", "mu0", "beta", "t_max")):
            other = spec.replace(recipe, path, str(value * 0.75), KINDS)
            assert reach(other, path) == value * 0.75
            assert spec.from_dict(spec.to_dict(other), Recipe, KINDS) == other != recipe


def test_who_is_refused():
    """A network that predicts the velocity of one path means nothing to a method of another."""
    found = {(name, key) for name in presets.PRESETS for key, shape in SHAPES.items() if refused(name, shape)}
    assert {key for _, key in found} == {"velocity"}
    assert {name.removesuffix("-cifar10") for name, _ in found} == {"sct"}


# Starts.


def started(recipe, teacher):
    """The student of a recipe, with the teacher's weights."""
    network = networks.build(replace(micro(num_classes=3), two_times=recipe.network.two_times))
    networks.load_start(network, teacher.network.state_dict())
    return FlowMap(network, recipe.path, recipe.parameterization).eval()


def copies(name, kind) -> bool:
    """Whether a student of this preset starts as a copy of this teacher, told the time in terms it can know."""
    shape, (path, parameterization) = SHAPES[kind], TEACHERS[kind]
    if refused(name, shape) or not made(name, shape).init_from_teacher:
        return False
    # what is told the time of one path is a little off on another
    return not isinstance(parameterization.time_input, PathTime) or made(name, shape).path.kind == path.kind


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in presets.PRESETS for kind in TEACHERS if copies(name, kind)]
)
def test_a_student_starts_as_its_teacher(name, kind):
    """The weights it copies mean to it what they meant to the teacher: path, time input and scalings fit."""
    path, parameterization = TEACHERS[kind]
    teacher = models.model("denoiser", micro(num_classes=3), path, parameterization)
    recipe = made(name, replace(SHAPES[kind], network=micro(num_classes=3)))
    student, seen = started(recipe, teacher), on_path(teacher, recipe.path)
    t = recipe.path.time(torch.tensor([0.2, 1.0, 4.0, 30.0]))
    x, labels = recipe.path.mix(0.5 * normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), t).float(), torch.arange(4) % 3
    with torch.no_grad():
        found, expected = student.denoised(x, t, labels), seen.denoised(x, t, labels)
    # the boundary condition moves BoundaryEDM's scalings by t_min
    tolerance = 0.015 if isinstance(recipe.parameterization, BoundaryEDM) else 5e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert float((found - x).abs().mean()) > 0.05


def test_some_students_start_as_their_teachers():
    starts = {name for name in presets.PRESETS if made(name, SHAPES["edm"]).init_from_teacher}
    assert {"cd", "direct", "pd", "scd", "cd-continuous", "flow-cd", "reflow", "meanflow"} <= starts
    assert not starts & {"edm", "flow", "ct", "ict", "ect", "sct", "flow-ct", "shortcut"}


# What is recommended.


@asked
def test_the_second_time_point_lies_on_the_path(name, shape):
    recipe = made(name, shape)
    if recipe.two_step is not None:
        assert recipe.path.t_min < recipe.two_step < recipe.path.t_max
        ratio = float(recipe.path.ratio(torch.tensor(recipe.two_step, dtype=torch.float64)))
        assert 0.3 < ratio < 6  # between content and texture, in whatever time it is written


def test_the_published_second_time_points():
    """In the noise level of VE, methods of several papers: index 22 of 40; 0.821; tan(1.1) / 2."""
    assert made("scd", SHAPES["nothing"]).two_step == 1.1
    trig = Trig()
    for t, ratio in ((1.1, 0.98238), (1.3, 1.80105)):
        assert float(trig.ratio(torch.tensor(t, dtype=torch.float64))) == pytest.approx(ratio, abs=5e-6)
    assert made("ect", SHAPES["nothing"]).two_step == pytest.approx(0.821)
    assert made("cd-imagenet64", Shape(64, 3, 1000)).two_step == pytest.approx(1.382368)
    linear = made("ect", SHAPES["velocity"])
    assert linear.path == Linear()
    assert linear.two_step == pytest.approx(0.821 / 1.821)
