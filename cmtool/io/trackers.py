"""Where metrics go besides metrics.jsonl: TensorBoard's event files, and Weights & Biases.

Both write into the run folder. Neither asks anything or needs a network: W&B stays offline unless WANDB_MODE says
online, and `wandb sync` uploads later.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cmtool.errors import DependencyError, UsageError


class Tracker(Protocol):
    """A place for the numbers and pictures of a run."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a step; numbers by name in turn are taken as name/name."""
        ...

    def picture(self, step: int, image: Tensor) -> None:
        """A sample grid, uint8 [C, H, W]."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int) -> list[Tracker]:
    """The trackers of these names, for a run that goes on after `step`.

    Raises:
        DependencyError: without the package of one. UsageError: if W&B is to be online and would ask for a key.
    """
    opened: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    return [opened[name](folder, config, step) for name in names]


def check_trackers(names: Sequence[str]) -> None:
    """Whether they can be opened, before anything is begun; errors as `open_trackers`."""
    for name in names:
        if name == "wandb":
            _import_wandb()
            _mode()
        else:
            _import_tensorboard()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    return SummaryWriter


def _import_wandb() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    return wandb


def _missing(name: str) -> DependencyError:
    return DependencyError(
        f"--track {name} needs the package {name}, which is not installed", f"pip install 'cmtool[{name}]'"
    )


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        # What was written after the checkpoint that the run goes on from no longer counts.
        self._writer = _import_tensorboard()(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _flat(values):
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: Tensor) -> None:
        self._writer.add_image("samples", image, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._wandb = _import_wandb()
        self._run = self._wandb.init(
            project="cmtool",
            name=folder.resolve().name,
            id=_identity(folder),
            resume="allow",
            dir=str(folder),
            mode=_mode(),
            config=dict(config),
            settings=self._wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(_flat(values)), step=step)

    def picture(self, step: int, image: Tensor) -> None:
        self._run.log({"samples": self._wandb.Image(image.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        self._run.finish()


def _mode() -> str:
    """online, offline or disabled, as WANDB_MODE says; offline if it says nothing."""
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode not in ("online", "offline", "disabled"):
        raise UsageError(f"WANDB_MODE is {mode!r}", "set it to online, offline or disabled, or leave it out")
    if mode == "online" and not os.environ.get("WANDB_API_KEY") and not _logged_in():
        raise UsageError(
            "WANDB_MODE is online, and there is no key", "run wandb login first, or leave out WANDB_MODE and sync later"
        )
    return mode


def _logged_in() -> bool:
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _identity(folder: Path) -> str:
    """The name W&B knows a run by, also when it goes on: kept in its folder."""
    for made in (folder / "wandb").glob("*run-*-*"):
        return made.name.rsplit("-", 1)[-1]
    return os.urandom(4).hex()
