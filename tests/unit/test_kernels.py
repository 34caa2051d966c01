"""The GPU's kernels against torch's operations in float64, on a CPU by Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmtool.networks import native

pytest.importorskip("triton")


def test_the_kernels_are_the_norm_and_its_gradient():
    command = [sys.executable, "-W", "ignore", "-m", "tests.interpreted"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 5
    assert all(error < (1e-2 if name == "bfloat16" else 1e-4) for name, error in errors.items()), errors


def test_tensors_on_a_cpu_are_not_for_the_kernels():
    assert native.kernels() is not None
    found = native.backend(torch.zeros(1, 4, 2, 2))
    assert found is None or found is native
    assert native.backend(torch.zeros(1, 4, 2, 2, dtype=torch.float64)) is None


def test_a_gpu_on_which_they_do_not_work_is_done_without(monkeypatch):
    """Here: there is none, though torch says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    native.kernels.cache_clear()
    assert native.kernels() is None
    native.kernels.cache_clear()


def test_kernels_may_be_left_out(monkeypatch):
    monkeypatch.setenv("CMTOOL_NATIVE", "0")
    native.kernels.cache_clear()
    assert native.kernels() is None
    native.kernels.cache_clear()
