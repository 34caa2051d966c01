"""Model files: exact round trips, no torch for the header, complete or absent, and damage that is always named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cmtool import networks
from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, Linear, LogRatio, PathTime, Trig, Velocity
from cmtool.io import checkpoint, files
from tests import models
from tests.models import micro


def small(**options) -> FlowMap:
    return models.model("consistency", micro(num_classes=2), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    checkpoint.save(small(), path)
    return path


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy whose JSON header went through `change`; the model's own description is decoded for it."""
    raw = source.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["cmtool.model"] = json.loads(header["__metadata__"]["cmtool.model"])
    change(header)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "cmtool.model" in metadata:
        metadata["cmtool.model"] = json.dumps(metadata["cmtool.model"])
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return target


# Round trips.


@pytest.mark.parametrize(
    ("path", "parameterization"),
    [
        (VE(), BoundaryEDM()),
        (VE(0.01, 40.0), BoundaryEDM(0.7, LogRatio(250.0))),
        (Trig(), EDM(time_input=PathTime(2.0))),
        (Linear(), Velocity()),
    ],
    ids=lambda part: part.kind,
)
def test_a_model_comes_back_as_it_was(tmp_path, path, parameterization):
    card = {
        "class_names": ("cat", "dög"),
        "grid_points": 40,
        "times": {"2": (80.0, 0.8), "3": (80.0, 5.0, 0.8)},
        "preset": "cd",
        "iterations": 17,
        "average": "exponential-0.999",
        "teacher": "runs/teacher",
        "data": "digits",
        "licence": "CC0",
    }
    model = small(path=path, parameterization=parameterization, **card)
    file = tmp_path / "deep" / "model.safetensors"
    checkpoint.save(model, file)
    found = checkpoint.load(file, role="consistency")
    assert found.card == model.card
    assert found.path == path
    assert found.parameterization == parameterization
    assert found.network.config == model.network.config
    state, expected = found.network.state_dict(), model.network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.full((2,), 0.7 * path.t_max), torch.tensor([0, 1])
    assert torch.equal(found.denoised(x, t, labels), model.denoised(x, t, labels))


@pytest.mark.parametrize("size", [size for size in networks.SIZES if size in ("tiny", "small")])
def test_named_sizes_come_back(tmp_path, size):
    config = networks.SIZES[size](16, 1, 4)
    checkpoint.save(models.model("denoiser", config), tmp_path / "m.safetensors")
    assert checkpoint.load(tmp_path / "m.safetensors").network.config == config


def test_half_of_the_bytes(tmp_path, saved):
    model = small()
    checkpoint.save(model, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    found = checkpoint.load(tmp_path / "half.safetensors")
    for name, value in model.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value.bfloat16().float())
    described = checkpoint.header(tmp_path / "half.safetensors")
    assert described["dtypes"] == ["BF16"]
    assert described["bytes"] < 0.75 * checkpoint.header(saved)["bytes"]


def test_a_run_folder_is_its_model(tmp_path, saved):
    assert checkpoint.locate(saved.parent) == saved
    assert checkpoint.header(saved.parent) == checkpoint.header(saved)


def test_the_header_says_what_is_in_the_file(saved):
    described = checkpoint.header(saved)
    model = small()
    assert described["card"]["role"] == "consistency"
    assert described["network"]["kind"] == "ddpmpp"
    assert described["path"] == {"kind": "ve", "t_min": 0.002, "t_max": 80.0}
    assert described["parameterization"]["kind"] == "boundary_edm"
    assert described["parameters"] == sum(p.numel() for p in model.network.state_dict().values())
    assert described["bytes"] == saved.stat().st_size
    assert described["dtypes"] == ["F32"]
    json.dumps(described)


def test_the_header_needs_no_torch(saved):
    code = (
        "import sys; from cmtool.io import checkpoint; print(checkpoint.header(sys.argv[1])['parameters']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'safetensors')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == checkpoint.header(saved)["parameters"]


# Writing.


def test_saving_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "model.safetensors"
    checkpoint.save(small(seed=1), file)
    checkpoint.save(small(seed=2), file)
    weights = checkpoint.load(file).network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in small(seed=2).network.state_dict().items())
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, fails):
    file = tmp_path / "model.safetensors"
    checkpoint.save(small(seed=1), file)
    before = file.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    if fails == "write":
        write = files.write_atomic

        def half(target, fill):
            return write(target, lambda out: (out.write(b"half"), full()))

        monkeypatch.setattr(checkpoint, "write_atomic", half)
    else:
        monkeypatch.setattr(files.os, fails, full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(small(seed=2), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.bin"
    files.write_atomic(file, lambda out: out.write(b"old"))

    def interrupted(out):
        out.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(file, interrupted)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_files_get_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "a.bin", lambda out: out.write(b"x"))
    finally:
        os.umask(old)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.save(small(), tmp_path / "file" / "model.safetensors")


# Refusals.


def assert_refused(path: Path, *words: str) -> None:
    for read in (checkpoint.header, checkpoint.load):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert caught.value.hint
        for word in words:
            assert word in str(caught.value)


def assert_refused_or_loaded(path: Path) -> None:
    """Anything may be wrong with the file: no other error than ours."""
    refused = None
    try:
        model = checkpoint.load(path)
    except CheckpointError as error:
        refused = error
    assert refused.hint if refused else isinstance(model, FlowMap)


def test_missing_files(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "no model at", "none.safetensors")
    assert_refused(tmp_path, "no run")
    (tmp_path / "config.json").write_text("{}")
    assert_refused(tmp_path, "no model.safetensors yet", "--resume")


def test_a_role_is_refused_by_name(tmp_path, saved):
    assert checkpoint.load(saved, role="consistency").card.role == "consistency"
    with pytest.raises(CheckpointError, match="is a consistency model, and a denoiser"):
        checkpoint.load(saved, role="denoiser")
    checkpoint.save(models.model("denoiser"), tmp_path / "teacher.safetensors")
    with pytest.raises(CheckpointError, match=r"is a denoiser .*cmtool distill"):
        checkpoint.load(tmp_path / "teacher.safetensors", role="consistency")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 100, b"PK\3\4 a zip", b"\xff" * 64, b"{}", b"text " * 50])
def test_other_files(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert_refused(tmp_path / "x.safetensors", "safetensors file")


def test_a_foreign_safetensors(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", "not one of cmtool's")
    save_file({"a": torch.zeros(2)}, tmp_path / "y.safetensors", {"format": "pt", "cmtool.format": "1"})
    assert_refused(tmp_path / "y.safetensors", "not one of cmtool's")


def test_another_version_is_never_guessed(tmp_path, saved):
    def newer(header):
        header["__metadata__"] |= {"cmtool.format": "2", "cmtool.version": "7.0"}

    assert_refused(rewritten(saved, tmp_path / "x.safetensors", newer), "format 2", "reads format 1", "cmtool 7.0")


def test_every_truncation_is_found(tmp_path, saved):
    raw = saved.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    cuts = {0, 1, 7, 8, 9, 8 + length // 2, 7 + length, 8 + length, 9 + length, len(raw) - 1}
    cuts |= set(range(0, len(raw), len(raw) // 97))
    for cut in sorted(cuts):
        (tmp_path / "x.safetensors").write_bytes(raw[:cut])
        assert_refused(tmp_path / "x.safetensors", "not a complete safetensors file")
    (tmp_path / "x.safetensors").write_bytes(raw + b"\0")
    assert_refused(tmp_path / "x.safetensors", "not a complete safetensors file")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless_but_never_a_crash(tmp_path, saved, data):
    raw = bytearray(saved.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    edits = st.tuples(st.integers(0, 8 + length - 1) | st.integers(0, len(raw) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(edits, min_size=1, max_size=4)):
        raw[position] = value
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw)
    assert_refused_or_loaded(file)


SUBSTITUTES = [None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "kind", [], {}, [[]], {"kind": "ve"}]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), substitute=st.sampled_from(SUBSTITUTES))
def test_wrong_values_in_the_header_are_refused_or_harmless(tmp_path, saved, data, substitute):
    def places(value, path=()):
        yield path
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from places(inner, (*path, key))
        elif isinstance(value, list):
            for key, inner in enumerate(value):
                yield from places(inner, (*path, key))

    def change(header):
        model = list(places(header["__metadata__"]["cmtool.model"], ("__metadata__", "cmtool.model")))
        tensor = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
        place = data.draw(st.sampled_from([*model, *places(header[tensor], (tensor,)), ("__metadata__",)]))
        for key in place[:-1]:
            header = header[key]
        header[place[-1]] = substitute

    file = rewritten(saved, tmp_path / "x.safetensors", change)
    assert_refused_or_loaded(file)


def test_weights_that_do_not_fit_are_named(tmp_path, saved):
    def wider(header):
        header["__metadata__"]["cmtool.model"]["network"]["channels"] = 16

    with pytest.raises(CheckpointError, match="has shape"):
        checkpoint.load(rewritten(saved, tmp_path / "a.safetensors", wider))

    def deeper(header):
        header["__metadata__"]["cmtool.model"]["network"]["num_blocks"] = 2

    with pytest.raises(CheckpointError, match=r"block2\S* is missing"):
        checkpoint.load(rewritten(saved, tmp_path / "b.safetensors", deeper))

    def unlabelled(header):
        header["__metadata__"]["cmtool.model"]["network"]["num_classes"] = 0
        header["__metadata__"]["cmtool.model"]["card"]["num_classes"] = 0

    with pytest.raises(CheckpointError, match=r"map_label\S* is not part"):
        checkpoint.load(rewritten(saved, tmp_path / "c.safetensors", unlabelled))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("resolution", 16, "resolution 16"),
        ("channels", 1, "channels 1"),
        ("num_classes", 5, "classes 5"),
        ("grid_points", -5, "no grid"),
        ("grid_points", 10**12, "no grid"),
        ("times", {"2": [0.8, 80.0]}, "falling"),
        ("times", {"1": []}, "falling"),
        ("times", {"3": [80.0, 1.0]}, "falling"),
    ],
)
def test_a_card_that_does_not_fit_its_network(tmp_path, saved, field, value, words):
    def lie(header):
        header["__metadata__"]["cmtool.model"]["card"][field] = value

    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(rewritten(saved, tmp_path / "a.safetensors", lie))


def test_whole_numbers_are_no_weights(tmp_path, saved):
    from safetensors.torch import load_file

    state = load_file(saved)
    state["map_layer0.bias"] = state["map_layer0.bias"].to(torch.int32)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"map_layer0\.bias as torch\.int32"):
        checkpoint.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "shape", ['["aaaaaaaaaa", 300000000]', "[1e9]", "[-1]", f"[{10**400}, {10**400}]", "[1" + ",1" * 99 + "]"]
)
def test_a_shape_may_be_any_text(tmp_path, shape):
    """Multiplied as it stands, the first would be three gigabytes of letters."""
    text = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        checkpoint.read_header(tmp_path / "a.safetensors")


def test_unknown_components_are_named(tmp_path, saved):
    def later(header):
        header["__metadata__"]["cmtool.model"]["path"] = {"kind": "spiral"}

    with pytest.raises(CheckpointError, match="spiral"):
        checkpoint.load(rewritten(saved, tmp_path / "x.safetensors", later))

    def confused(header):
        header["__metadata__"]["cmtool.model"]["path"] = {"kind": "edm"}

    with pytest.raises(CheckpointError, match="edm"):
        checkpoint.load(rewritten(saved, tmp_path / "x.safetensors", confused))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, poison):
    model = small()
    model.network.map_layer0.weight[0, 0] = poison
    checkpoint.save(model, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite, in map_layer0\.weight"):
        checkpoint.load(tmp_path / "x.safetensors")
