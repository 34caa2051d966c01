"""Components as data: every one of them goes to JSON and back, and a mistake is answered by name."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmtool import spec
from cmtool.errors import ConfigError
from cmtool.flow import ModelCard
from cmtool.networks import configs
from cmtool.training import presets
from cmtool.training.distances import PseudoHuber
from cmtool.training.objectives import Denoising, Mixture, Part
from cmtool.training.recipe import KINDS, Recipe


def leaves(component, prefix=""):
    """(dotted name, value) of every constant: what `--set` can reach."""
    if dataclasses.is_dataclass(component):
        for field in dataclasses.fields(component):
            yield from leaves(getattr(component, field.name), f"{prefix}{field.name}.")
    elif isinstance(component, tuple) and any(dataclasses.is_dataclass(item) for item in component):
        for i, item in enumerate(component):
            yield from leaves(item, f"{prefix}{i}.")
    else:
        yield prefix.rstrip("."), component


def recipe(name="cd", **shape) -> Recipe:
    """A preset's recipe; `cd` with a distance that has a constant."""
    made = presets.preset(name)(presets.Shape(32, 3, 10, **shape))
    if name != "cd":
        return made
    return dataclasses.replace(made, objective=dataclasses.replace(made.objective, distance=PseudoHuber()))


def through_json(component, hint):
    return spec.from_dict(json.loads(json.dumps(spec.to_dict(component))), hint, KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_component_goes_to_json_and_back(kind):
    component = Mixture((Part(Denoising(), 0.3), Part(Denoising(), 0.7))) if kind == "mixture" else KINDS[kind]()
    data = spec.to_dict(component)
    assert data["kind"] == kind
    assert through_json(component, object) == component
    for field in dataclasses.fields(component):  # and with each of its numbers changed
        value = getattr(component, field.name)
        if isinstance(value, float) and not isinstance(value, bool) and 0 < value < 1:
            changed = dataclasses.replace(component, **{field.name: value * 0.75})
            assert through_json(changed, object) == changed
            assert through_json(changed, object) != component


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize(("resolution", "channels", "classes"), [(32, 3, 10), (32, 1, 0), (64, 3, 1000), (256, 3, 0)])
def test_every_preset_goes_to_json_and_back(name, resolution, channels, classes):
    made = presets.preset(name)(presets.Shape(resolution, channels, classes))
    assert through_json(made, Recipe) == made
    assert made.preset == name
    assert (made.network.in_channels, made.network.resolution) == (channels, resolution)
    assert presets.summary(name)


def test_a_preset_takes_the_teachers_network():
    network = configs.tiny(32, 3, 10)
    assert recipe("cd", network=network).network == network


def test_a_card_goes_to_json_and_back():
    card = ModelCard("consistency", 32, class_names=("a", "b"), times={"2": (80.0, 0.8), "3": (80.0, 2.0, 0.5)})
    assert through_json(card, ModelCard) == card


@pytest.mark.parametrize("name", presets.PRESETS)
def test_everything_in_a_recipe_can_be_set(name):
    made = recipe(name)
    for path, value in leaves(made):
        text = (
            ",".join(map(str, value))
            if isinstance(value, tuple)
            else str(value).lower()
            if value is None
            else str(value)
        )
        assert spec.replace(made, path, text, KINDS) == made, path


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("iterations", "1000", 1000),
        ("iterations", "1e6", 1_000_000),
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "1", 1.0),
        ("optimizer.rule", "adamw", "adamw"),
        ("optimizer.betas", "0.5, 0.9", (0.5, 0.9)),
        ("optimizer.clip_norm", "1.5", 1.5),
        ("optimizer.clip_norm", "none", None),
        ("flip", "true", True),
        ("flip", "no", False),
        ("network.channel_mult", "1,2,4", (1, 2, 4)),
        ("network.attention_resolutions", "", ()),
        ("objective.distance.c", "0.03", 0.03),
        ("objective.distance", "l2", KINDS["l2"]()),
        ("objective.weight", "inverse_gap", KINDS["inverse_gap"]()),
        ("objective.times.curriculum", "progressive", KINDS["progressive"]()),
        ("objective.trajectory.solver", "euler", KINDS["euler"]()),
        ("objective.target", "moving_average", KINDS["moving_average"]()),
        ("averages", "half_life,exponential", (KINDS["half_life"](), KINDS["exponential"]())),
        ("averages.0.images", "7", 7),
        ("path", "trig", KINDS["trig"]()),
        ("path.t_max", "40", 40.0),
    ],
)
def test_set(path, text, value):
    made = spec.replace(recipe(), path, text, KINDS)
    found = made
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    rest = dict(leaves(made))
    changed = {name for name, old in leaves(recipe()) if name in rest and rest[name] != old}
    assert all(name.startswith(path) for name in changed)  # and nothing else
    assert through_json(made, Recipe) == made


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("iteration", "5", ["Recipe", "'iteration'", "did you mean iterations"]),
        ("objective.distnace", "l2", ["Consistency", "did you mean distance?"]),
        ("objective.distance.c.d", "1", ["'d'", "not a part"]),
        ("optimizer.lr", "fast", ["a number", "'fast'"]),
        ("optimizer.lr", "-1", ["positive", "-1"]),
        ("optimizer.lr", "nan", ["positive"]),
        ("optimizer.rule", "sgd", ["'sgd'", "'radam'"]),
        ("optimizer.betas", "0.9", ["2 values", "found 1"]),
        ("optimizer.betas", "0.9,0.99,0.999", ["2 values", "found 3"]),
        ("optimizer.betas", "0.9,x", ["a number", "'x'"]),
        ("iterations", "1.5", ["a whole number"]),
        ("iterations", "0", ["at least 1"]),
        ("iterations", "inf", ["a whole number"]),
        ("flip", "maybe", ["true or false", "'maybe'"]),
        ("objective.distance", "pseudohuber", ["'pseudohuber'", "did you mean pseudo_huber?"]),
        ("objective.distance", "heun", ["'heun'", "l1, l2, lpips, pseudo_huber"]),
        ("objective.weight", "karras", ["did you mean karras_weight?"]),
        ("path", "l2", ["'l2'", "linear, trig, ve"]),
        ("network", "edm", ["'edm'", "adm"]),
        ("averages", "half_life,adm", ["'adm'"]),
        ("averages.2.images", "7", ["'2'", "0 to 0"]),
        ("averages.x.images", "7", ["'x'"]),
        ("averages.0", "7", ["half_life"]),
        ("network.channel_mult", "1,2,0", ["channel_mult"]),
        ("path.t_max", "0.001", ["t_min"]),
        ("", "1", ["''"]),
        ("..", "1", ["''"]),
    ],
)
def test_a_wrong_set_says_what_is_wrong(path, text, words):
    with pytest.raises(ConfigError) as caught:
        spec.replace(recipe(), path, text, KINDS)
    said = f"{caught.value.message} {caught.value.hint}"
    assert "--set" in said
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": {"kind": "consistancy"}}, ["config.objective", "did you mean consistency?"]),
        ({"objective": {"kind": "edm"}}, ["config.objective", "'edm'"]),
        ({"objective": {"kind": ["consistency"]}}, ["config.objective"]),
        ({"objective": {"kind": "consistency", "disance": {"kind": "l2"}}}, ["Consistency", "did you mean distance?"]),
        ({"objective": {"kind": "consistency", "distance": {"kind": "l2", "resize": "32"}}}, ["resize", "'32'"]),
        ({"objective": 3}, ["config.objective", "3"]),
        ({"batch": "512"}, ["config.batch", "'512'"]),
        ({"batch": True}, ["config.batch", "True"]),
        ({"batch": 1.5}, ["config.batch"]),
        ({"averages": {}}, ["config.averages", "list"]),
        ({"averages": []}, ["at least one average"]),
        ({"role": "teacher"}, ["config.role", "'denoiser'"]),
        ({"optimizer": {"betas": [0.9]}}, ["config.optimizer.betas", "2 values"]),
        ({"surprise": 1}, ["'surprise'"]),
    ],
)
def test_a_wrong_config_says_where(change, words):
    with pytest.raises(ConfigError) as caught:
        spec.from_dict(spec.to_dict(recipe()) | change, Recipe, KINDS)
    for word in words:
        assert word in str(caught.value)


def test_missing_fields_are_named():
    data = spec.to_dict(recipe())
    del data["network"]
    with pytest.raises(ConfigError, match="network"):
        spec.from_dict(data, Recipe, KINDS)


def test_only_what_is_in_the_table_is_built():
    with pytest.raises(ConfigError, match="no kind 'Path'"):
        spec.from_dict({"kind": "Path"}, object, KINDS)
    with pytest.raises(ConfigError, match="no kind 'l2'"):
        spec.from_dict({"kind": "l2"}, object, {})
    with pytest.raises(TypeError, match="component"):
        spec.to_dict(object())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(sorted(KINDS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "distance", "times", "grid", "rho", "c", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    name=st.sampled_from([field.name for field in dataclasses.fields(Recipe)]),
    value=json_values,
)
def test_a_config_is_built_or_refused_but_never_breaks(name, value):
    try:
        made = spec.from_dict(spec.to_dict(recipe()) | {name: value}, Recipe, KINDS)
    except ConfigError:
        return
    assert through_json(made, Recipe) == made or any(isinstance(v, float) and math.isnan(v) for _, v in leaves(made))


@given(path=st.sampled_from([path for path, _ in leaves(recipe())]), text=st.text(max_size=8))
def test_set_is_taken_or_refused_but_never_breaks(path, text):
    try:
        made = spec.replace(recipe(), path, text, KINDS)
    except ConfigError:
        return
    assert isinstance(made, Recipe)
