"""The study's table comes from the runs that are kept beside it, and the README says what the table says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

STUDY = Path(__file__).parents[1] / "examples" / "study_cifar10"
KEPT = STUDY / "kept"
RUNS = sorted(file.parent for file in KEPT.glob("*/quality.json"))


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table's lines that begin with a method."""
    lines = re.findall(r"^\| `([\w-]+)`[^|]*\|(.*)\|$", text, re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def test_the_table_is_made_of_the_runs(tmp_path):
    for run in RUNS:
        shutil.copytree(run, tmp_path / run.name)
    command = [sys.executable, STUDY / "study.py", "--out", tmp_path, "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() == (KEPT / "table.md").read_text()
    for name in ("calls", "seconds", "samples"):
        with Image.open(tmp_path / f"{name}.png") as made, Image.open(KEPT / f"{name}.png") as kept:
            assert made.size == kept.size


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_row_is_a_whole_run_of_the_same_study(run):
    config, quality = (json.loads((run / name).read_text()) for name in ("config.json", "quality.json"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    recipe = config["recipe"]
    assert last["step"] == recipe["iterations"] == quality["model"]["iterations"]
    assert last["images"] == recipe["iterations"] * recipe["batch"]
    assert quality["model"]["preset"] == recipe["preset"] == re.sub(r"-\d$", "", run.name)
    edm = json.loads((KEPT / "edm" / "config.json").read_text())
    assert recipe["network"] | {"two_times": False} == edm["recipe"]["network"]
    assert config["data"]["fingerprint"] == edm["data"]["fingerprint"]
    other = json.loads((KEPT / "edm" / "quality.json").read_text())
    assert [quality[part] for part in ("reference", "features")] == [other[part] for part in ("reference", "features")]
    assert quality["samples"]["count"] == other["samples"]["count"]


def test_what_is_said_elsewhere_is_in_the_table():
    table = rows((KEPT / "table.md").read_text())
    page = rows((STUDY / "README.md").read_text())
    assert {name: cells for name, cells in page.items() if name in table} == table
