"""Run folders: what a training leaves on disk.

config.json          the resolved recipe, data and options; `--config` reads it back
metrics.jsonl        one line a report
samples/NNNNNNN.png  a grid from the average, always from the same seeds
checkpoints/         step_NNNNNNN.pt, the states to continue from, the newest few; step_NNNNNNN.dcp where processes
                     hold a part of the weights each (`cmtool.io.sharded`)
model.safetensors    the average weights
best.safetensors     those of the step at which a measure of their samples was best, where a run is judged
tensorboard/, wandb/ what these were given, where a run is tracked
averages/NAME/       where a run keeps several averages: step_NNNNNNN.safetensors, ordinary model files; of the kinds
                     that others can be made of later, all of the stage and in float16, of the others the newest
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cmtool.errors import CheckpointError, UsageError
from cmtool.io import checkpoint, files
from cmtool.io.files import write_atomic
from cmtool.processes import ALONE, Processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmtool.flow.flow_map import FlowMap
    from cmtool.io.sharded import Like
    from cmtool.training.trainer import Trainer

KEEP = 2  # training states kept; each holds the model several times over
_WHOLE, _SHARDED = ".pt", ".dcp"
_BEST = "best.safetensors"
_MARGIN = 1.02  # what files take, over the numbers in them
_INTACT = "make room, then continue with --resume; earlier checkpoints are intact"


class RunFolder:
    """One training's folder.

    Args:
        path: where it is.
        keep: how many training states stay.
        processes: those that train; all of them call its methods, and only the first writes.
    """

    def __init__(self, path: str | Path, *, keep: int = KEEP, processes: Processes = ALONE) -> None:
        self.path, self.keep, self.processes = Path(path), keep, processes
        self._known = False  # that there is a run

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def holds_something(self) -> bool:
        """Whether anything was begun here; what is left of a run that was killed before it began does not count."""
        return self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one that writes here, for as long as the block lasts or the process lives.

        Raises:
            UsageError: if another process does, or nothing can be written here.
        """
        if not self.processes.first:
            yield
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.path))
                files.remove_parts(self.path)
            except files.Locked as error:
                raise UsageError(
                    f"another process writes to {self.path}", "wait for it or stop it, or name another folder"
                ) from error
            except OSError as error:
                raise _unwritable(self.path, error) from error
            try:
                yield
            finally:
                with suppress(OSError):  # made for nothing; one that holds anything stays
                    self.path.rmdir()

    def check(self, *, overwrite: bool = False) -> None:
        """Whether a new run may be made here; asked before anything large is read.

        Raises:
            UsageError: if the folder holds something already and `overwrite` is false, or holds no run at all.
        """
        if not self.processes.first or not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file, not a folder", "name a new folder")
        if not self.holds_something:
            return
        if not overwrite:
            raise UsageError(
                f"the folder {self.path} is not empty",
                f"continue it with --resume {self.path}, or replace it with --overwrite",
            )
        if not self.config_file.is_file():
            raise UsageError(
                f"the folder {self.path} holds something that is no run",
                "name another folder; --overwrite replaces runs only",
            )

    def prepare(self, config: dict[str, Any], *, overwrite: bool = False) -> None:
        """Make the folder, empty of any earlier run, and write its config; errors as `check`."""
        if not self.processes.first:
            return
        self.check(overwrite=overwrite)
        try:
            for name in ("averages", "checkpoints", "samples", "tensorboard", "wandb"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("config.json", "metrics.jsonl", checkpoint.MODEL_FILE, _BEST):
                (self.path / name).unlink(missing_ok=True)
            text = json.dumps(config, indent=2) + "\n"
            write_atomic(self.config_file, lambda file: file.write(text.encode()))
            self._known = True
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def config(self) -> dict[str, Any]:
        """The config of an existing run.

        Raises:
            CheckpointError: if there is none or it cannot be read.
        """
        found = read_config(self.config_file)
        self._known = True
        return found

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            CheckpointError: if it cannot be written.
        """
        if not self.processes.first:
            return
        try:
            self._append(line)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.path}: {error.strerror or error}", _INTACT) from error

    def _append(self, line: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`, lines of metrics.jsonl and averages: a continued run writes it again."""
        if not self.processes.first:
            return
        try:
            self._rewind(step)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.path}: {error.strerror or error}", _INTACT) from error

    def _rewind(self, step: int) -> None:
        for series in self.averages().values():
            for made, old in series.items():
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

    def write_samples(self, step: int, image: Tensor) -> None:
        """The sample grid of a step, uint8 [C, H, W]."""
        from cmtool.io.images import write_image

        write_image(self.path / "samples" / f"{step:07d}.png", image)

    def best(self, name: str) -> float | None:
        """The least value of a measure in the log, if the best model was kept; the same in all processes."""
        return self.processes.told(self._best(name) if self.processes.first else None)

    def _best(self, name: str) -> float | None:
        file = self.path / "metrics.jsonl"
        if not file.is_file() or not (self.path / _BEST).is_file():
            return None
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        return min((line[name] for line in lines if name in line), default=None)

    def save_best(self, model: FlowMap) -> None:
        """Keep a model as the best so far; errors as `save`."""
        if not self.processes.first:
            return
        try:
            checkpoint.save(model, self.path / _BEST)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path / _BEST}: {error.strerror or error}", _INTACT) from error

    def averages(self) -> dict[str, dict[int, Path]]:
        """The stored averages, name -> step -> model file, in rising order; none where a run keeps one average only."""
        found: dict[str, dict[int, Path]] = {}
        for file in (self.path / "averages").glob("*/step_*.safetensors"):
            if made := re.fullmatch(r"step_(\d+)", file.stem):
                found.setdefault(file.parent.name, {})[int(made[1])] = file
        return {name: dict(sorted(files.items())) for name, files in sorted(found.items())}

    def save(self, trainer: Trainer, *, series: bool = True) -> None:
        """Write the average weights, then the training state; what is outdated goes when the new is complete.

        Args:
            trainer: what to save.
            series: whether averages that are kept as a series get one more of it.
        Raises:
            CheckpointError: too little space, or the folder cannot be written to; earlier checkpoints are intact.
        """
        state = trainer.state_dict()
        first = trainer.average
        rules = [
            (rule, model)
            for rule, model in trainer.averages.values()
            if len(trainer.averages) > 1 and (series or not rule.post_hoc)
        ]
        try:
            if self.processes.first:
                self._check_space(state, [first, *(model for _, model in rules)])
                checkpoint.save(first, self.path / checkpoint.MODEL_FILE)
            for rule, average in rules:
                model = trainer.whole(average)
                if self.processes.first:
                    model.card = replace(first.card, average=rule.name)
                    file = self.path / "averages" / rule.name / f"step_{trainer.step:07d}.safetensors"
                    checkpoint.save(model, file, dtype=_storage(model) if rule.post_hoc else None)
            self._save_state(trainer.step, state, sharded=trainer.sharded)
            if self.processes.first:
                self._prune_averages(trainer)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint of step {trainer.step:,} to {self.path}: {error.strerror or error}",
                _INTACT,
            ) from error

    def _save_state(self, step: int, state: dict[str, Any], *, sharded: bool) -> None:
        """Write a training state; older ones, and the same one in another form, then go."""
        import torch

        target = self.path / "checkpoints" / f"step_{step:07d}{_SHARDED if sharded else _WHOLE}"
        if sharded:
            from cmtool.io import sharded as parts

            parts.save(target, state, self.processes)
        elif self.processes.first:
            write_atomic(target, lambda file: torch.save(state, file))
        if self.processes.first:
            others = [old for old in self._states() if old != target]
            twice = [old for old in others if _step(old) == step]
            older = [old for old in others if old not in twice]
            for old in [*twice, *older[: max(0, len(older) - self.keep + 1)]]:
                files.remove(old)

    def _check_space(self, state: Any, models: Iterable[FlowMap]) -> None:
        """Before anything is written: a disk that fills up on the way may not even have room to say so."""
        if self._known and not self.config_file.is_file():
            raise CheckpointError(
                f"the run folder {self.path} has vanished: it has no config.json any more",
                "bring it back and continue with --resume, or start again",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        needed = _MARGIN * (_size(state) + sum(_size(dict(model.state_dict())) for model in models))
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"the checkpoint needs {needed / 2**20:,.0f} MiB and {self.path} has {free / 2**20:,.0f} MiB left",
                _INTACT,
            )

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
        found = (self.path / "checkpoints").glob("step_*")
        states = (file for file in found if re.fullmatch(rf"step_\d+({_WHOLE}|{_SHARDED})", file.name))
        return sorted(states, key=_step)

    def saved(self) -> int:
        """The step of the newest training state; 0 if there is none."""
        states = self._states()
        return _step(states[-1]) if states else 0

    def latest(self, like: Like | None = None) -> Latest:
        """The newest training state that is whole; those after it are damaged.

        Args:
            like: for states that processes have written a part of each, see `cmtool.io.sharded.load`; None reads
                whole tensors.
        Raises:
            CheckpointError: if there are some and none can be read.
        """
        file, damaged = self.processes.told(self._intact() if self.processes.first else (None, ()))
        if file is None:
            return Latest(None, ())
        if file.suffix == _WHOLE:
            return Latest(_read_state(file), damaged)
        from cmtool.io import sharded

        return Latest(sharded.load(file, like or _plain, self.processes), damaged)

    def _intact(self) -> tuple[Path | None, tuple[Path, ...]]:
        """The newest state that is whole, or None; the newer ones."""
        from cmtool.io import sharded

        damaged: list[Path] = []
        for file in reversed(self._states()):
            if sharded.intact(file) if file.suffix == _SHARDED else _is_whole(file):
                return file, tuple(damaged)
            damaged.append(file)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.path / 'checkpoints'} can be read, not even {damaged[-1].name}",
                "begin anew with --overwrite, or with --config and another --out",
            )
        return None, ()

    def put_aside(self, damaged: Iterable[Path]) -> None:
        """Let checkpoints no longer count."""
        for file in damaged:
            if self.processes.first:
                files.remove(file.with_suffix(".damaged"))
                file.replace(file.with_suffix(".damaged"))


class Latest(NamedTuple):
    """What a run goes on from: a training state or None, and the newer ones that are damaged."""

    state: dict[str, Any] | None
    damaged: tuple[Path, ...]


def _is_whole(file: Path) -> bool:
    """Whether a training state can be read. Every byte is compared with its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                return False
        _read_state(file)
    except Exception:  # torch.load fails on damaged files in many ways
        return False
    return True


def _read_state(file: Path) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _plain(path: tuple[Any, ...], size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.empty(size, dtype=dtype)


def _step(state: Path) -> int:
    """The step that a training state is of."""
    return int(state.stem.removeprefix("step_"))


def _size(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if hasattr(state, "element_size"):
        return int(state.numel() * state.element_size())
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(_size(part) for part in parts)


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write to {path}: {error.strerror or error}", "name another folder with --out")


def _storage(model: FlowMap) -> torch.dtype | None:
    """How snapshots that are all kept are stored: float16 wherever its range is enough, else as they are.

    Its rounding errors, 2^-11 of a weight, are an eighth of bfloat16's, and sums of snapshots magnify them.
    """
    import torch

    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    return torch.float16 if largest <= torch.finfo(torch.float16).max else None


def read_report(
    folder: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[int, bytes]], list[dict[str, Any]]]:
    """Config, lines of metrics, sample grids by step, and results of evaluations in a run's folder.

    Raises:
        CheckpointError: if it is no run.
    """
    config = read_config(folder / "config.json")
    grids = sorted((folder / "samples").glob("*.png"))
    results = [found for file in sorted(folder.glob("*.json")) if (found := _result(file)) is not None]
    return config, _lines(folder / "metrics.jsonl"), [(int(f.stem), f.read_bytes()) for f in grids], results


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the last may be in the making."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "step" in line]


def _result(file: Path) -> dict[str, Any] | None:
    """What `cmtool evaluate` wrote; None for any other file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and "computed" in found and isinstance(found.get("results"), list)
    return found if known else None


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
