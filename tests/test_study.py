"""The study's table comes from the runs that are kept beside it, and the README says what the table says."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

STUDY = Path(__file__).parents[1] / "examples" / "study_cifar10"
KEPT = [STUDY / "kept", STUDY / "kept-32", STUDY / "kept-again"]
RUNS = sorted(file.parent for kept in KEPT for file in kept.glob("*/quality.json"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.name)
def test_the_table_is_made_of_the_runs(tmp_path, kept):
    for run in kept.glob("*/"):
        shutil.copytree(run, tmp_path / run.name)
    command = [sys.executable, STUDY / "study.py", "--out", tmp_path, "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table == (kept / "table.md").read_text()
    assert table in (STUDY / "README.md").read_text()
    for name in ("calls", "seconds", "samples"):
        with Image.open(tmp_path / f"{name}.png") as made, Image.open(kept / f"{name}.png") as known:
            assert made.size == known.size


def test_of_many_seeds_the_table_tells_mean_and_deviation(tmp_path):
    for seed, run in enumerate(("ct-0", "ct-1", "ct-0", "ct-1")):
        shutil.copytree(STUDY / "kept" / run, tmp_path / f"ct-{3 * seed}")
    command = [sys.executable, STUDY / "study.py", "--out", tmp_path, "--table"]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    (row,) = ((tmp_path / "table.md").read_text().splitlines())[2:]
    low, high = sorted(
        row["metrics"]["fd_judge@2000"]
        for run in ("ct-0", "ct-1")
        for row in json.loads((STUDY / "kept" / run / "quality.json").read_text())["results"]
        if row["nfe"] == 1
    )
    assert f"| {(low + high) / 2:.3f} ± {(high - low) / 3**0.5:.3f} (4) |" in row


@pytest.mark.parametrize("name", ["ct", "cd"])
def test_the_first_study_s_runs_lie_where_five_seeds_expect_them(name):
    def distances(kept, seed, calls):
        results = json.loads((STUDY / kept / f"{name}-{seed}" / "quality.json").read_text())["results"]
        return next(row["metrics"]["fd_judge@2000"] for row in results if row["nfe"] == calls)

    cells = []
    for calls in (1, 2, 4):
        five = [distances("kept-again", seed, calls) for seed in range(5)]
        wide = 2.776 * statistics.stdev(five) * (1 + 1 / 5) ** 0.5  # Student's t for 95 %, four degrees of freedom
        first = sorted(distances("kept", seed, calls) for seed in (0, 1))
        low, high = statistics.fmean(five) - wide, statistics.fmean(five) + wide
        assert low < first[0] < first[1] < high
        cells += [f"{low:.2f} to {high:.2f}", f"{first[0]:.3f}, {first[1]:.3f}"]
    assert f"| `{name}` | {' | '.join(cells)} |" in (STUDY / "README.md").read_text()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}/{run.name}")
def test_a_row_is_a_whole_run_of_the_same_study(run):
    config, quality = (json.loads((run / name).read_text()) for name in ("config.json", "quality.json"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    recipe = config["recipe"]
    assert last["step"] == recipe["iterations"] == quality["model"]["iterations"]
    assert last["images"] == recipe["iterations"] * recipe["batch"]
    assert quality["model"]["preset"] == recipe["preset"] == re.sub(r"-\d$", "", run.name)
    edm = json.loads((run.parent / "edm" / "config.json").read_text())
    assert recipe["network"] | {"two_times": False} == edm["recipe"]["network"]
    assert config["data"]["fingerprint"] == edm["data"]["fingerprint"]
    other = json.loads((run.parent / "edm" / "quality.json").read_text())
    assert [quality[part] for part in ("reference", "features")] == [other[part] for part in ("reference", "features")]
    assert quality["samples"]["count"] == other["samples"]["count"]


@pytest.mark.parametrize(
    ("only", "trained"),
    [("ct", {"ct"}), ("tcm,flow-ct", {"tcm", "flow-ct", "ect", "edm"}), ("cd", {"cd", "edm"}), ("edm", {"edm"})],
)
def test_only_some_rows_and_what_they_start_from(monkeypatch, tmp_path, only, trained):
    study = runpy.run_path(str(STUDY / "study.py"), run_name="study")
    (tmp_path / "judge.pt2").touch()
    options = argparse.Namespace(out=tmp_path, seeds="0,1", only=only)
    done = []
    monkeypatch.setattr(study["Study"], "row", lambda self, row, seed: done.append((row.name, seed)))
    study["Study"](options).run()
    assert {name for name, _ in done} == trained
    assert len(done) == sum(1 if name == "edm" else 2 for name in trained)
    for place, (name, seed) in enumerate(done):
        rows = {row.name: row for row in (*study["TEACHERS"], *study["ROWS"])}
        for parent in filter(None, (rows[name].teacher, rows[name].init)):
            assert (parent, 0 if parent == "edm" else seed) in done[:place]


def test_a_row_that_is_not_there(tmp_path):
    command = [sys.executable, STUDY / "study.py", "--out", tmp_path / "new", "--data", tmp_path, "--test", tmp_path]
    done = subprocess.run([*command, "--only", "ct,cdd"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error == "error: there is no row 'cdd'"
    assert hint.startswith("hint: the rows are edm, ct, ")
    assert not (tmp_path / "new").exists()


def test_the_readme_says_what_the_table_says():
    """Some of its columns."""
    table = (KEPT[1] / "table.md").read_text().splitlines()
    page = (STUDY.parents[1] / "README.md").read_text().split("### The methods on CIFAR-10", 1)[1].splitlines()
    head, *short = [line.split("|") for line in page[: page.index("### The whole family, side by side")] if "|" in line]
    columns = [table[0].split("|").index(name) for name in head]
    assert [cells for cells in short if "`" in cells[1]] == [
        [line.split("|")[place] for place in columns] for line in table[2:]
    ]
