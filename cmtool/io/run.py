"""Run folders: what a training leaves on disk.

config.json          the resolved recipe, data and options; `--config` reads it back
metrics.jsonl        one line a report
samples/NNNNNNN.png  a grid from the average, always from the same seeds
checkpoints/         step_NNNNNNN.pt, the state to continue from
model.safetensors    the average weights
averages/NAME/       where a run keeps several averages: step_NNNNNNN.safetensors, ordinary model files; of the kinds
                     that others can be made of later, all of the stage and in float16, of the others the newest
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.errors import CheckpointError, UsageError
from cmtool.io import checkpoint
from cmtool.io.files import write_atomic

if TYPE_CHECKING:
    import torch

    from cmtool.flow.flow_map import FlowMap
    from cmtool.training.trainer import Trainer

_KEEP = 2  # training states kept; each holds the model several times over


class RunFolder:
    """One training's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    def check(self, *, overwrite: bool = False) -> None:
        """Whether a new run may be made here; asked before anything large is read.

        Raises:
            UsageError: if the folder holds something already and `overwrite` is false, or holds no run at all.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file, not a folder", "name a new folder")
        if not any(self.path.iterdir()):
            return
        if not overwrite:
            raise UsageError(
                f"the folder {self.path} is not empty", "continue it with --resume, or replace it with --overwrite"
            )
        if not self.config_file.is_file():
            raise UsageError(
                f"the folder {self.path} holds something that is no run",
                "name another folder; --overwrite replaces runs only",
            )

    def prepare(self, config: dict[str, Any], *, overwrite: bool = False) -> None:
        """Make the folder, empty of any earlier run, and write its config; errors as `check`."""
        self.check(overwrite=overwrite)
        try:
            for name in ("averages", "checkpoints", "samples"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("config.json", "metrics.jsonl", checkpoint.MODEL_FILE):
                (self.path / name).unlink(missing_ok=True)
            text = json.dumps(config, indent=2) + "\n"
            write_atomic(self.config_file, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path}: {error.strerror or error}", "name another folder with --out"
            ) from error

    def config(self) -> dict[str, Any]:
        """The config of an existing run.

        Raises:
            CheckpointError: if there is none or it cannot be read.
        """
        return read_config(self.config_file)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`, lines of metrics.jsonl and averages: a continued run writes it again."""
        for files in self.averages().values():
            for made, old in files.items():
                if made > step:
                    old.unlink()
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line the last run was stopped in the middle of
        write_atomic(file, lambda out: out.write("".join(kept).encode()))

    def sample_file(self, step: int) -> Path:
        """Where the sample grid of a step goes."""
        return self.path / "samples" / f"{step:07d}.png"

    def averages(self) -> dict[str, dict[int, Path]]:
        """The stored averages, name -> step -> model file, in rising order; none where a run keeps one average only."""
        found: dict[str, dict[int, Path]] = {}
        for file in (self.path / "averages").glob("*/step_*.safetensors"):
            if made := re.fullmatch(r"step_(\d+)", file.stem):
                found.setdefault(file.parent.name, {})[int(made[1])] = file
        return {name: dict(sorted(files.items())) for name, files in sorted(found.items())}

    def save(self, trainer: Trainer) -> None:
        """Write the average weights, then the training state; what is outdated goes when the new is complete."""
        import torch

        first = trainer.average
        checkpoint.save(first, self.path / checkpoint.MODEL_FILE)
        if len(trainer.averages) > 1:
            for name, (rule, model) in trainer.averages.items():
                model.card = replace(first.card, average=name)
                file = self.path / "averages" / name / f"step_{trainer.step:07d}.safetensors"
                checkpoint.save(model, file, dtype=_storage(model) if rule.post_hoc else None)
        folder = self.path / "checkpoints"
        try:
            write_atomic(folder / f"step_{trainer.step:07d}.pt", lambda file: torch.save(trainer.state_dict(), file))
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint of step {trainer.step}: {error.strerror or error}",
                "free some space; earlier checkpoints are intact",
            ) from error
        for old in self._states()[:-_KEEP]:
            old.unlink(missing_ok=True)
        self._prune_averages(trainer)

    def _prune_averages(self, trainer: Trainer) -> None:
        """Keep the newest file of each average, and its whole series where others can be made of it later.

        An average begins anew with each stage of a training, so a series does, too.
        """

        def stage(step: int) -> int:
            return trainer.objective.stage((step - 1) / trainer.recipe.iterations)[0]

        stored = self.averages()
        for name, (rule, _) in trainer.averages.items():
            for step, old in stored.get(name, {}).items():
                in_series = rule.post_hoc and stage(step) == stage(trainer.step)
                if step != trainer.step and not in_series:
                    old.unlink(missing_ok=True)

    def _states(self) -> list[Path]:
        """The training states, the oldest first."""
        found = (self.path / "checkpoints").glob("step_*.pt")
        return sorted(found, key=lambda file: (len(file.name), file.name))

    def saved(self) -> int:
        """The step of the newest training state; 0 if there is none."""
        states = self._states()
        return int(states[-1].stem.removeprefix("step_")) if states else 0

    def latest(self) -> dict[str, Any] | None:
        """The newest training state, or None if there is none yet.

        Raises:
            CheckpointError: if it cannot be read.
        """
        import torch

        states = self._states()
        if not states:
            return None
        try:
            state: dict[str, Any] = torch.load(states[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails on damaged files in many ways
            raise CheckpointError(
                f"the checkpoint {states[-1]} cannot be read", "delete it to continue from the one before"
            ) from error
        return state


def _storage(model: FlowMap) -> torch.dtype | None:
    """How snapshots that are all kept are stored: float16 wherever its range is enough, else as they are.

    Its rounding errors, 2^-11 of a weight, are an eighth of bfloat16's, and sums of snapshots magnify them.
    """
    import torch

    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    return torch.float16 if largest <= torch.finfo(torch.float16).max else None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as plain values.

    Raises:
        CheckpointError: if there is none or it cannot be read.
    """
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path}", "name the config.json of a run") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON", "name the config.json of a run") from error
    if not isinstance(config, dict) or "recipe" not in config:
        raise CheckpointError(f"{path} is no config of a run: it has no recipe", "name the config.json of a run")
    return config
