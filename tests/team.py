"""Several processes at work on one training: a launcher for tests, and what each process then does.

Run as a module it is one of them, and does what it is told: a list of `Case`s one after another.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A training of a recipe of tests/unit/test_trainer.py, by its name there."""

    recipe: str
    options: dict[str, Any] = field(default_factory=dict)  # of the trainer
    changes: dict[str, Any] = field(default_factory=dict)  # of the recipe
    steps: int | None = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, count: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun would set."""
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    given = {name: str(value) for name, value in names.items()}
    return os.environ | given | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def start(count: int, args: list[str], **options: Any) -> list[subprocess.Popen[str]]:
    """`python args` in so many processes that find each other."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *args],
            env=environment(rank, count, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(count)
    ]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


def finish(started: list[subprocess.Popen[str]], timeout: float = 120) -> list[Ended]:
    """Wait for all of them; whoever is late is killed."""
    ended = []
    try:
        for one in started:
            out, err = one.communicate(timeout=timeout)
            ended.append(Ended(one.returncode, out, err))
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
                one.communicate()
    return ended


def cmtool(count: int, *args: Any, timeout: float = 120, **options: Any) -> list[Ended]:
    """A command in so many processes."""
    return finish(start(count, ["-m", "cmtool", *map(str, args)], **options), timeout)


def alone(*args: Any) -> Ended:
    """A command in this process."""
    from cmtool.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, args)))
    return Ended(code, out.getvalue(), err.getvalue())


def trained(count: int, cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """What `results` of the first process says of each case."""
    told, answer = folder / f"cases-{count}", folder / f"results-{count}"
    told.write_bytes(pickle.dumps(cases))
    ended = finish(start(count, ["-m", "tests.team", str(told), str(answer)], cwd=ROOT))
    assert [one.code for one in ended] == [0] * count, "\n".join(one.err for one in ended)
    return pickle.loads(answer.read_bytes())


def results(case: Case, processes: Any = None) -> dict[str, Any]:
    """Losses, norms of the gradients, and all weights at the end."""
    import torch

    from cmtool.processes import ALONE
    from cmtool.training.distributed import whole
    from tests.unit import test_trainer

    team = processes or ALONE
    recipe = replace(getattr(test_trainer, case.recipe), **case.changes)
    data = None
    if "REFLOW" in case.recipe:
        data = test_trainer.Pairs(23, recipe.network.resolution, classes=3)
    made = test_trainer.trainer(recipe, data=data, processes=team, **case.options)
    reports = [report for _, report in zip(range(case.steps or recipe.iterations), made.run(), strict=False)]
    models = {"model": made.model, "target": made.target} | {name: one for name, (_, one) in made.averages.items()}
    weights = {
        name: {key: value.clone() for key, value in whole(model).network.state_dict().items()}
        for name, model in models.items()
    }
    return {
        "losses": [float(team.sum(report.loss)) for report in reports],
        "norms": [float(report.grad_norm) for report in reports],
        "seen": [sorted(map(float, report.t)) for report in reports],
        "weights": weights,
        "learned": {name: value.clone() for name, value in made.objective.named_parameters() if value.requires_grad},
        "held": sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in made.model.parameters()),
        "device": str(torch.device("cpu")),
    }


def main() -> None:
    from cmtool import processes

    team = processes.join()
    told, answer = map(Path, sys.argv[1:])
    done = [results(case, team) for case in pickle.loads(told.read_bytes())]
    if team.first:
        answer.write_bytes(pickle.dumps(done))
    processes.leave()


if __name__ == "__main__":
    main()
