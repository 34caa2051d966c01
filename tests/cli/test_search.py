"""`cmtool search`: the times it finds, and what it writes."""

from __future__ import annotations

import dataclasses
import json

import pytest
from safetensors import safe_open

from cmtool.cli.app import main
from cmtool.io import checkpoint
from tests import team


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("search") / "run"
    small = ("--precision", "fp32", "--batch", "4", "--set", "network.channels=8", "--sample-every", "0")
    ask = ("train", "--data", str(pictures), "--out", str(out), "--preset", "ect", "--iterations", "30", *small)
    assert main([*ask, "-q"]) == 0
    return out


def told(cli, run, pictures, *more):
    result = cli("search", "--model", run, "--data", pictures, "-n", 24, "--precision", "fp32", *more, "--json")
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_best_of_all_points_is_found(cli, run, pictures):
    found = told(cli, run, pictures, "--points", 9, "--scan")
    entry = found["steps"]["2"]
    values = {point["time"]: point["fd_random@24"] for point in entry["tried"]}
    assert len(values) == 8
    before = entry["before"]["fd_random@24"]
    assert entry["fd_random@24"] == min(*values.values(), before)
    assert entry["fd_random@24"] == values.get(entry["times"][1], before)
    assert entry["times"][0] == pytest.approx(80)
    assert {point["scan"] for point in entry["tried"]} == {True, False}
    assert found["written"] is None
    # A number that `evaluate` comes to, too.
    times = ",".join(repr(t) for t in entry["times"])
    ask = ("--model", run, "--data", pictures, "-n", 24, "--precision", "fp32", "--times", times, "--metrics", "fd")
    result = json.loads(cli("evaluate", *ask, "--json").stdout)
    assert result["results"][0]["metrics"]["fd_random@24"] == pytest.approx(entry["fd_random@24"], rel=1e-5)
    narrow = told(cli, run, pictures, "--points", 9)["steps"]["2"]
    assert {point["time"] for point in narrow["tried"]} < values.keys()


def test_times_that_are_good_already_stay(cli, run, pictures):
    """On a grid so coarse that it has nothing better."""
    best = told(cli, run, pictures, "--points", 9, "--scan")["steps"]["2"]
    model = checkpoint.load(run)
    model.card = dataclasses.replace(model.card, times={"2": tuple(best["times"])})
    checkpoint.save(model, run.parent / "good.safetensors")
    found = told(cli, run.parent / "good.safetensors", pictures, "--points", 3)["steps"]["2"]
    assert found["times"] == pytest.approx(best["times"])
    assert found["fd_random@24"] == pytest.approx(best["fd_random@24"])
    assert len(found["tried"]) == 2


def test_times_are_written_and_used(cli, run, pictures, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((run / "model.safetensors").read_bytes())
    before = checkpoint.load(file)
    result = cli(
        *("search", "--model", file, "--data", pictures, "-n", 8, "--steps", "2,3", "--points", 6, "--write"),
        *("--precision", "fp32"),
    )
    assert result.code == 0, result.stderr
    assert "2 calls" in result.stdout.decode()
    after = checkpoint.load(file)
    assert {"2", "3"} <= after.card.times.keys()
    assert all(len(after.card.times[str(count)]) == count for count in (2, 3))
    with safe_open(file, "pt") as new, safe_open(run / "model.safetensors", "pt") as old:
        assert all((new.get_tensor(name) == old.get_tensor(name)).all() for name in old.keys())  # noqa: SIM118
    assert before.card.preset == after.card.preset
    sampled = json.loads(cli("evaluate", "--model", file, "--data", pictures, "-n", 4, "--steps", 3, "--json").stdout)
    assert sampled["results"][0]["nfe"] == 3


def test_processes_share_the_samples(cli, run, pictures):
    ask = ("search", "--model", run, "--data", pictures, "-n", 9, "--points", 4, "--precision", "fp32", "--json")
    alone = json.loads(cli(*ask).stdout)["steps"]["2"]
    first, second = team.cmtool(2, *ask)
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err + second.err
    found = json.loads(first.out)["steps"]["2"]
    assert found["times"] == alone["times"]
    assert found["fd_random@9"] == pytest.approx(alone["fd_random@9"], rel=1e-4)


def test_what_cannot_be_searched(cli, run, pictures, folder, tmp_path):
    ask = ("search", "--model", run, "--data", pictures)
    cli(*ask, "--steps", 1).error(2, "always", "2 or more")
    cli(*ask, "--steps", "2,5", "--points", 4).error(2, "leave no choice for 5 calls")
    cli(*ask, "--metric", "recall").error(2, "there is no 'recall'")
    cli("search", "--model", folder / "teacher.safetensors", "--data", pictures).error(2, "needs a solver")
    cli("search", "--model", tmp_path / "none", "--data", pictures).error(1, "no model at")
    (tmp_path / "other.pt").write_bytes(b"")
    cli("search", "--model", tmp_path / "other.pt", "--data", pictures, "--write").error(2, "cmtool convert")
