"""`cmtool doctor`: what it finds on a machine that is well, and on machines that are not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys

import pytest
import torch

from cmtool import doctor, memory
from cmtool.errors import DependencyError
from cmtool.io import box, catalogue, machine
from cmtool.networks import native, winograd


@pytest.fixture
def findings(cli):
    """The findings by name, of a call that ends with this code."""

    def run(code=0):
        result = cli("doctor", "--device", "cpu", "--json")
        assert result.code == code, result.stderr
        told = json.loads(result.stdout)
        assert told["broken"] == [finding["name"] for finding in told["findings"] if finding["broken"]]
        assert bool(told["broken"]) == bool(code)
        return {finding["name"]: finding for finding in told["findings"]}

    return run


@pytest.fixture
def briefly(monkeypatch):
    """Without the slowest of the checks."""
    monkeypatch.setattr(doctor, "_numbers", lambda *_: [])


def test_a_machine_that_is_well(findings):
    found = findings()
    assert found["cmtool"]["says"].startswith("0.1")
    assert found["torch"]["says"].startswith(torch.__version__)
    assert str(machine.cpu().name) in found["device"]["says"]
    assert float(found["images"]["says"].split()[0]) < 1e-4
    assert 0 < float(found["gradients"]["says"].split()[0]) < 1e-4
    assert f"torch {torch.__version__}" in found["packages"]["says"]
    assert found["lpips"]["says"] == "loads"
    assert "versions" not in found  # none is too old
    assert not any(name in ("extra test", "extra dev") for name in found)


def test_for_people(cli, briefly, monkeypatch):
    monkeypatch.setenv("CMTOOL_NATIVE", "0")
    result = cli("doctor", "--device", "cpu")
    assert result.code == 0
    assert result.lines[0].startswith("cmtool  ")
    at = result.lines[0].index("0.1")
    hints = [line for line in result.lines if line.lstrip().startswith("hint: ")]
    assert len(hints) == 3
    assert all(line.index("hint") == at for line in hints)
    assert not any(line[at - 1].strip() for line in result.lines)  # one column of names, one of findings


def test_weights_of_others(findings, briefly, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "own"))
    assert findings()["weights lpips-vgg"]["says"] == "not here: cmtool fetch lpips-vgg"
    content = b"weights"
    name = f"alexnet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setitem(catalogue.WEIGHTS, "lpips-alex", name)
    for folder in (tmp_path / "own" / "models", tmp_path / "hub" / "checkpoints"):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        assert findings()["weights lpips-alex"]["says"] == str(folder / name)
    (folder / name).write_bytes(content[1:])
    damaged = findings()["weights lpips-alex"]
    assert "damaged" in damaged["says"]
    assert damaged["hint"]


def test_wrong_numbers_are_found(cli, findings, monkeypatch):
    if winograd.library() is None:
        pytest.skip("no compiler on this machine")
    own = winograd.forward
    monkeypatch.setattr(winograd, "forward", lambda *args: own(*args) * 1.1)
    found = findings(1)
    assert found["images"]["broken"]
    assert "CMTOOL_NATIVE=0" in found["images"]["hint"]
    told = cli("doctor", "--device", "cpu").stderr.splitlines()
    assert told[0] == "error: broken here: images, gradients"
    assert told[1].startswith("hint: ")
    assert len(told) == 2


def test_wrong_gradients_are_found(findings, monkeypatch):
    if winograd.library() is None:
        pytest.skip("no compiler on this machine")
    own = winograd.weight_gradient
    monkeypatch.setattr(winograd, "weight_gradient", lambda *args: own(*args) * 0.9)
    found = findings(1)
    assert not found["images"]["broken"]
    assert found["gradients"]["broken"]


def test_numbers_that_are_none_are_found(findings, monkeypatch):
    if native.library() is None:
        pytest.skip("no compiler on this machine")
    own = native.forward

    def spoilt(*args):
        out, *rest = own(*args)
        return out * torch.nan, *rest

    monkeypatch.setattr(native, "forward", spoilt)
    assert findings(1)["images"]["broken"]


def test_a_damaged_installation(findings, monkeypatch, tmp_path):
    class Lost(box.Boxed):
        file = tmp_path / "none.safetensors"

    given = box.BOXED[box.DEFAULT]
    monkeypatch.setitem(box.BOXED, box.DEFAULT, Lost(given.name, given.title, given.data))
    found = findings(1)["images"]
    assert found["broken"]
    assert "none.safetensors" in found["says"]


def test_lpips_that_does_not_load(findings, briefly, monkeypatch):
    def fails():
        raise DependencyError("it does not load", "install it")

    monkeypatch.setattr("cmtool.training.distances.import_lpips", fails)
    found = findings(1)["lpips"]
    assert found["says"] == "it does not load"
    assert found["hint"] == "install it"


def test_native_code_turned_off(findings, monkeypatch):
    monkeypatch.setenv("CMTOOL_NATIVE", "0")
    found = findings()
    for name in ("fast noise", "fast norms", "fast convolutions"):
        assert "CMTOOL_NATIVE" in found[name]["says"]
        assert found[name]["hint"]
    assert found["environment"]["says"].count("CMTOOL_NATIVE=0") == 1


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("/nowhere/c++", "there is no compiler '/nowhere/c++'"),
        ("nothing-at-all -O1", "there is no compiler 'nothing-at-all'"),
        ("c++ --no-such-flag-at-all", "the compiler fails: "),
        ("false", "the compiler fails"),
        (f"{sys.executable} -c pass", ""),
    ],
)
def test_a_compiler_that_makes_nothing(compiler, says, findings, briefly, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path))
    found = findings()["fast norms"]
    assert says in found["says"]
    assert found["says"] != "compiled"
    assert "slower" in found["hint"]
    assert ("CXX" in found["hint"]) == ("compiler" in found["says"])


def test_a_blank_compiler_is_the_usual_one(findings, briefly, monkeypatch):
    monkeypatch.setenv("CXX", "  ")
    assert findings()["fast norms"]["says"] == (
        "there is no compiler 'c++'" if native.library() is None else "compiled"
    )


def test_a_cache_that_is_a_file(findings, briefly, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    found = findings()
    assert found["fast norms"]["says"] != "compiled"
    assert "CMTOOL_CACHE" in found["cache"]["hint"]


def test_a_cache_nobody_may_write_to(findings, briefly, monkeypatch, tmp_path):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "CMTOOL_CACHE" in findings()["cache"]["hint"]


def test_packages_that_are_missing_or_old(findings, briefly, monkeypatch):
    def version(name):
        if name == "onnx":
            raise importlib.metadata.PackageNotFoundError
        return {"numpy": "1.20.3", "torch": "2.13.0+cpu"}.get(name, "99")

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = findings()
    assert found["extra onnx"]["says"] == "not installed: pip install 'cmtool[onnx]'"
    assert found["extra digits"]["says"] == "scikit-learn 99"
    assert found["versions"]["says"] == "numpy is 1.20.3, and 1.26 is asked for"


def test_a_package_that_is_only_found(findings, briefly, monkeypatch):
    def requires(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert "not installed" in findings()["packages"]["says"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torch>=2.7", ("torch", "2.7", "")),
        ("scikit-learn>=1.3; extra == 'digits'", ("scikit-learn", "1.3", "digits")),
        ('triton>=3.2; (sys_platform == "linux") and extra == "test"', ("triton", "3.2", "test")),
        ("plain", ("plain", "", "")),
    ],
)
def test_requirements_are_read(text, found):
    assert doctor._requirement(text) == found


def test_threads_for_more_cores_than_there_are(findings, briefly, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert "OMP_NUM_THREADS" in findings()["torch"]["hint"]


def test_a_gpu_that_torch_does_not_find(findings, briefly, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA 12.8" in findings()["torch"]["hint"]
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_GPU", tmp_path)
    assert "without CUDA" in findings()["torch"]["hint"]
    monkeypatch.setattr(doctor, "_GPU", tmp_path / "none")
    assert not findings()["torch"]["hint"]


def test_a_device_that_is_not_there(cli):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    cli("doctor", "--device", "cuda").error(2, "cuda")
    cli("doctor", "--device", "tpu").error(2, "tpu")


def test_where_bfloat16_is_fast_it_is_what_is_tried(findings, monkeypatch):
    monkeypatch.setattr("cmtool.precision._has_amx", lambda: True)
    found = findings()
    assert found["precision"]["says"].startswith("bfloat16")
    assert 1e-4 < float(found["images"]["says"].split()[0]) < 0.1


def test_how_memory_is_kept_is_told(findings, briefly, monkeypatch):
    memory.keep.cache_clear()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    try:
        assert "environment" in findings()["memory"]["says"]
    finally:
        memory.keep.cache_clear()
