"""Devices and compute types by name."""

from __future__ import annotations

import pytest
import torch

from cmtool import precision
from cmtool.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_devices_by_name():
    assert precision.device("cpu") == CPU
    assert precision.device("auto").type in ("cpu", "cuda", "mps")


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision.device("auto") == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert precision.device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert precision.device("auto") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "cuda:99", "mps", "meta", "xpu"])
def test_devices_that_are_not_there(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name.startswith("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=repr(name)) as caught:
        precision.device(name)
    assert "cpu" in caught.value.hint or "auto" in caught.value.hint


def test_a_device_of_several(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert precision.device("cuda:1") == torch.device("cuda:1")


def test_types_asked_for():
    for on in (CPU, CUDA):
        assert precision.compute_dtype("fp32", on) is None
        assert precision.compute_dtype("bf16", on) is torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_auto_is_bfloat16_where_the_hardware_has_it(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on: capability)
    assert precision.compute_dtype("auto", CUDA) is dtype
    for amx in (True, False):
        monkeypatch.setattr(precision, "_has_amx", lambda amx=amx: amx)
        assert precision.compute_dtype("auto", CPU) is (torch.bfloat16 if amx else None)
    assert precision.compute_dtype("auto", torch.device("mps")) is None
