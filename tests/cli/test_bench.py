"""`cmtool bench`: what it prints, and what it refuses. Its numbers are of the machine and prove nothing here."""

from __future__ import annotations

import json

import pytest
import torch

from cmtool import precision
from cmtool.benchmark import measure, profile, rows
from cmtool.benchmark.measure import Ceiling, Result, Timing
from cmtool.benchmark.rows import ROWS
from cmtool.benchmark.shared import NETWORK
from cmtool.errors import UserError


@pytest.fixture
def measured(monkeypatch):
    """Numbers without measuring; returns what was asked for."""
    asked = []
    shapes = {"64x64 3x3 at 32x32": 2e11, "128x128 3x3 at 16x16": 1e11}

    def found(row, setup, rounds, *, flops, peer_too):
        asked.append((row.name, setup, rounds))
        ours = Timing(setup.batch, (1.0,) * rounds, 50 * 2**20)
        return Result(row, flops, 1.0, ours, Timing(setup.batch, (4.0,) * rounds, None) if peer_too else None)

    monkeypatch.setattr(measure, "check", lambda setup: 1e-6)
    monkeypatch.setattr(measure, "ceiling", lambda setup, trains: Ceiling(setup.dtype, trains, shapes, 3e11, 1.5e11))
    monkeypatch.setattr(measure, "measure", found)
    return asked


def test_a_table(cli, measured):
    result = cli("bench", "--batch", 6, "--precision", "fp32")
    assert result.code == 0, result.stderr
    assert [name for name, *_ in measured] == [*ROWS]
    assert {(setup.batch, rounds) for _, setup, rounds in measured} == {(6, 5)}
    lines = result.lines
    (cd,) = (line.split() for line in lines if line.startswith("cd-heun"))
    flops = measure.count_flops(NETWORK)
    assert cd == ["cd-heun", "6", "±0%", "1.5", "±0%", "4.00", f"{6 * flops * 6 / 1.5e11:.0%}", "50", "MiB", "-"]
    assert sum("ceiling, float32" in line for line in lines) == 2
    assert "7,660,931 parameters" in result.stderr
    assert "torch" in result.stderr


def test_json(cli, measured):
    told = json.loads(cli("bench", "--rows", "ect,sample-1", "--rounds", 2, "--precision", "bf16", "--json").stdout)
    assert told["dtype"] == "bfloat16"
    assert told["network"]["parameters"] == 7_660_931
    assert [row["name"] for row in told["rows"]] == ["ect", "sample-1"]
    assert told["rows"][0]["cmtool"] == {
        "images_per_second": 32.0,
        "spread": 0.0,
        "seconds": [1.0, 1.0],
        "memory": 50 * 2**20,
    }
    assert told["rows"][0]["ratio"] == 4.0
    assert told["rows"][0]["memory_ratio"] is None
    assert {ceiling["trains"] for ceiling in told["ceilings"]} == {True, False}
    assert told["machine"]["torch"]


def test_alone(cli, measured, monkeypatch):
    monkeypatch.setattr(measure, "require_peer", lambda: pytest.fail("nobody asked for it"))
    told = json.loads(cli("bench", "--no-peer", "--rows", "edm", "--json").stdout)
    assert told["rows"][0]["peer"] is None
    assert told["difference"] is None
    assert cli("bench", "--no-peer", "--rows", "edm").code == 0


def test_where_the_time_goes(cli, measured, monkeypatch):
    known = {"convolutions": 0.75, "Python": 0.25}
    monkeypatch.setattr(profile, "shares", lambda row, setup: known)
    result = cli("bench", "--rows", "edm,sample-1", "--profile")
    assert result.code == 0, result.stderr
    assert [line.split() for line in result.lines[-3:]] == [
        ["of", "the", "time", "edm", "sample-1"],
        ["convolutions", "75%", "75%"],
        ["Python", "25%", "25%"],
    ]
    told = json.loads(cli("bench", "--rows", "edm", "--profile", "--json").stdout)
    assert told["rows"][0]["profile"] == known
    assert json.loads(cli("bench", "--rows", "edm", "--json").stdout)["rows"][0]["profile"] is None
    monkeypatch.setattr(precision, "device", lambda _: torch.device("mps"))
    cli("bench", "--rows", "edm", "--profile").error(2, "this is mps", "--device cpu")


def test_quick(cli, measured):
    assert cli("bench", "--quick").code == 0
    assert [name for name, *_ in measured] == [*rows.QUICK]
    assert {rounds for *_, rounds in measured} == {1}
    assert cli("bench", "--quick", "--threads", 1, "--batch", 2).code == 0
    assert measured[-1][1].threads == 1


def test_what_is_refused(cli, measured, monkeypatch):
    cli("bench", "--rows", "cd").error(2, "no row 'cd'")
    cli("bench", "--rows", "").error(2, "no row ''")
    cli("bench", "--quick", "--rows", "edm").error(2, "--quick and --rows")
    cli("bench", "--batch", 0).error(2, "--batch")
    cli("bench", "--device", "cuda:77").error(2, "cuda:77")
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    cli("bench").error(1, "diffusers is not installed", "--no-peer")


def test_an_error_of_a_worker_is_the_users(cli, measured, monkeypatch):
    def failing(*args, **rest):
        raise UserError("row edm, cmtool: the process ended unexpectedly (killed by signal 9)", "try a smaller --batch")

    monkeypatch.setattr(measure, "measure", failing)
    result = cli("bench", "--rows", "edm")
    assert result.code == 1
    *_, error, hint = result.stderr.splitlines()
    assert "killed by signal 9" in error
    assert "--batch" in hint
