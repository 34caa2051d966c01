"""`cmtool average`: what a run has kept, one of them as a model, and widths chosen afterwards."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from cmtool import spec
from cmtool.io import checkpoint
from cmtool.io.run import RunFolder
from cmtool.training.average import Exponential, Power
from cmtool.training.recipe import Optimizer
from tests.cli.test_app import python
from tests.unit.test_trainer import EDM_RECIPE, trainer

STEPS, EVERY = 24, 3
RECIPE = replace(
    EDM_RECIPE,
    averages=(Power(0.05), Power(0.2), Exponential(0.5), Power(0.11)),
    optimizer=Optimizer(lr=0.02),
    iterations=STEPS,
)


def make(path, recipe, every=EVERY):
    """A run folder as `cmtool train` leaves it; returns the trainer at its end."""
    folder = RunFolder(path)
    folder.prepare({"recipe": spec.to_dict(recipe)})
    made = trainer(recipe)
    for report in made.run():
        if report.step % every == 0:
            folder.save(made)
    return made


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(folder, trainer): a run whose config tells of two power averages; the trainer has a third, of width 0.11.

    The third's snapshots are gone, so that it can be made again and be compared.
    """
    path = tmp_path_factory.mktemp("runs") / "run"
    end = make(path, RECIPE)
    for file in (path / "averages" / "power-0.11").iterdir():
        file.unlink()
    return path, end


@pytest.fixture
def run(made):
    return made[0]


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """A run with one average."""
    path = tmp_path_factory.mktemp("runs") / "single"
    make(path, replace(RECIPE, averages=(Power(0.1),), iterations=2), every=1)
    return path


def weights(source):
    return torch.cat([parameter.flatten() for parameter in checkpoint.load(source).parameters()])


def test_what_there_is(cli, run):
    told = json.loads(cli("average", run, "--json").stdout)
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert told == {
        "run": str(run),
        "averages": [
            {"name": "exponential-0.5", "steps": [STEPS]},
            {"name": "power-0.05", "steps": steps},
            {"name": "power-0.2", "steps": steps},
        ],
    }
    rows = dict(line.split() for line in cli("average", run).lines)
    assert rows["power-0.05"] == "3,6,9,12,15,18,21,24"
    assert rows["exponential-0.5"] == "24"


def test_one_average_is_all_there_is(cli, single):
    assert json.loads(cli("average", single, "--json").stdout)["averages"] == [{"name": "power-0.1", "steps": [2]}]
    for choice in (("--name", "power-0.1"), ("--sigma-rel", 0.1)):
        cli("average", single, *choice, "--out", single / "x.safetensors").error(
            1, "one average", str(single / "model.safetensors")
        )


def test_an_average_by_name(cli, run, tmp_path):
    out = tmp_path / "new" / "x.safetensors"
    result = cli("average", run, "--name", "power-0.2", "--out", out)
    assert (result.code, result.lines, result.stderr) == (0, [str(out)], "")
    assert torch.equal(weights(out), weights(run / "averages" / "power-0.2" / "step_0000024.safetensors"))
    rows = dict(line.split(maxsplit=1) for line in cli("info", out).lines)
    assert (rows["average"], rows["iterations"]) == ("power-0.2", "24")

    told = json.loads(cli("average", run, "--name", "power-0.2", "--step", 9, "--out", out, "--json").stdout)
    assert told == {"run": str(run), "model": str(out), "average": "power-0.2", "step": 9}
    assert torch.equal(weights(out), weights(run / "averages" / "power-0.2" / "step_0000009.safetensors"))
    assert json.loads(cli("info", out, "--json").stdout)["iterations"] == 9


def test_snapshots_are_models(cli, run, tmp_path):
    file = run / "averages" / "power-0.05" / "step_0000012.safetensors"
    sampled = cli("sample", "--model", file, "--solver", "euler", "--steps", 2, "--out", tmp_path / "x.png")
    assert sampled.code == 0, sampled.stderr
    told = json.loads(cli("info", file, "--json").stdout)
    assert (told["average"], told["iterations"]) == ("power-0.05", 12)


def test_a_width_chosen_afterwards(cli, made, tmp_path):
    """Close to the average that the trainer has maintained, and much closer than those kept."""
    run, end = made
    _, kept = end.averages["power-0.11"]
    expected = torch.cat([parameter.flatten() for parameter in kept.parameters()])
    out = tmp_path / "x.safetensors"
    result = cli("average", run, "--sigma-rel", 0.11, "--out", out)
    assert (result.code, result.lines, result.stderr) == (0, [str(out)], "")
    error = (weights(out) - expected).norm()
    others = [weights(files[STEPS]) for files in RunFolder(run).averages().values()]
    assert error < 0.06 * min((other - expected).norm() for other in others)
    card = checkpoint.load(out).card
    assert card == replace(end.average.card, average="power-0.11 (post-hoc)", iterations=STEPS)
    rows = dict(line.split(maxsplit=1) for line in cli("info", out).lines)
    assert rows["average"] == "power-0.11 (post-hoc)"
    assert cli("sample", "--model", out, "--solver", "euler", "--out", tmp_path / "x.png").code == 0


@pytest.mark.parametrize("step", [6, 24])
def test_a_width_that_was_kept_is_found_again(cli, run, tmp_path, step):
    out = tmp_path / "x.safetensors"
    assert cli("average", run, "--sigma-rel", 0.05, "--step", step, "--out", out).code == 0
    torch.testing.assert_close(
        weights(out), weights(run / "averages" / "power-0.05" / f"step_{step:07d}.safetensors"), rtol=1e-6, atol=1e-7
    )
    assert json.loads(cli("info", out, "--json").stdout)["iterations"] == step


def test_an_earlier_average_does_not_know_what_came_later(cli, run, tmp_path):
    """It is what it would have been, had the training ended there."""
    import shutil

    early = tmp_path / "early"
    shutil.copytree(run, early)
    RunFolder(early).rewind(12)
    for path, step, out in ((run, ("--step", 12), "one"), (early, (), "other")):
        assert cli("average", path, "--sigma-rel", 0.15, *step, "--out", tmp_path / f"{out}.safetensors").code == 0
    assert torch.equal(weights(tmp_path / "one.safetensors"), weights(tmp_path / "other.safetensors"))


def test_a_width_out_of_reach_is_made_with_a_warning(cli, run, tmp_path):
    out = tmp_path / "x.safetensors"
    result = cli("average", run, "--sigma-rel", 0.005, "--out", out)
    assert (result.code, result.lines) == (0, [str(out)])
    assert "do not resolve power-0.005" in result.stderr
    assert cli("average", run, "--sigma-rel", 0.005, "--out", out, "-q").stderr == ""


def test_a_file_is_replaced(cli, run, tmp_path):
    out = tmp_path / "x.safetensors"
    out.write_text("old")
    assert cli("average", run, "--name", "power-0.2", "--out", out).code == 0
    assert checkpoint.load(out).card.average == "power-0.2"


def test_the_snapshots_are_never_replaced(cli, run):
    own = run / "averages" / "power-0.05" / ".." / "power-0.05" / "step_0000003.safetensors"
    before = own.read_bytes()
    cli("average", run, "--name", "power-0.2", "--out", own).error(2, "own snapshots")
    assert own.read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--name", "power-0.05", "--sigma-rel", "0.1", "--out", "x.safetensors"], ["--name and --sigma-rel"]),
        (["--name", "power-0.05"], ["missing option '--out'"]),
        (["--sigma-rel", "0.1"], ["missing option '--out'"]),
        (["--out", "x.safetensors"], ["--out", "--name or --sigma-rel"]),
        (["--step", "3"], ["--step", "--name or --sigma-rel"]),
        (["--name", "power-0.05", "--out", "x.pt"], ["--out x.pt", "ends in .safetensors", "--out x.safetensors"]),
        (["--name", "power-0.05", "--out", "-"], ["ends in .safetensors"]),
        (["--name", "power-005", "--out", "x.safetensors"], ["'power-005'", "did you mean", "power-0.05"]),
        (["--name", "power-0.05", "--step", "4", "--out", "x.safetensors"], ["--step 4", "power-0.05", "3, 6, 9"]),
        (["--name", "exponential-0.5", "--step", "3", "--out", "x.safetensors"], ["--step 3", "there is 24"]),
        (["--sigma-rel", "0.1", "--step", "25", "--out", "x.safetensors"], ["--step 25", "18, 21, 24"]),
        (["--sigma-rel", "0.1", "--step", "0", "--out", "x.safetensors"], ["--step", "1"]),
        (["--sigma-rel", "0.3", "--out", "x.safetensors"], ["--sigma-rel", "0.2887, found 0.3"]),
        (["--sigma-rel", "0", "--out", "x.safetensors"], ["--sigma-rel", "0.2887, found 0"]),
        (["--sigma-rel", "nan", "--out", "x.safetensors"], ["--sigma-rel", "found nan"]),
        (["--sigma-rel", "wide", "--out", "x.safetensors"], ["--sigma-rel", "number"]),
    ],
)
def test_wrong_options(cli, run, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    cli("average", run, *argv).error(2, *words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("choice", [(), ("--name", "power-0.1", "--out", "x.safetensors")])
def test_no_run_there(cli, tmp_path, choice, run):
    for path in (tmp_path, tmp_path / "nothing", run / "model.safetensors"):
        cli("average", path, *choice).error(1, f"no run in {path}")


def test_a_run_that_has_saved_nothing_yet(cli, tmp_path):
    RunFolder(tmp_path).prepare({"recipe": spec.to_dict(RECIPE)})
    cli("average", tmp_path).error(1, "no model.safetensors yet")


def test_too_few_snapshots(cli, tmp_path):
    run, out = tmp_path / "run", tmp_path / "x.safetensors"
    make(run, replace(RECIPE, averages=(Exponential(0.5), Exponential(0.9)), iterations=1), every=1)
    cli("average", run, "--sigma-rel", 0.1, "--out", out).error(1, "two snapshots", "has 0", "power")
    make(tmp_path / "other", replace(RECIPE, averages=(Exponential(0.5), Power(0.1)), iterations=2), every=1)
    cli("average", tmp_path / "other", "--sigma-rel", 0.1, "--step", 1, "--out", out).error(1, "has 1 up to step 1")
    assert not out.exists()


def test_a_damaged_snapshot_is_named(cli, run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "averages" / "power-0.2" / "step_0000009.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    cli("average", copy, "--sigma-rel", 0.1, "--out", tmp_path / "x.safetensors").error(1, str(file))
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["average", "--help"],
        ["average"],
        ["average", "x", "--sigma-rel", "0.3", "--out", "x.safetensors"],
        ["average", "x", "--sigma-rel", "0.1"],
        ["average", "x", "--name", "y", "--out", "x.pt"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_options_need_no_torch(argv):
    done = python(
        "import sys\n"
        "from cmtool.cli.app import main\n"
        "assert main(sys.argv[1:]) in (0, 2)\n"
        "heavy = {'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n",
        *argv,
    )
    assert done.returncode == 0, done.stderr


def test_listing_needs_no_torch(run):
    done = python(
        "import sys\nfrom cmtool.cli.app import main\n"
        "assert main(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules",
        "average",
        str(run),
    )
    assert done.returncode == 0, done.stderr
