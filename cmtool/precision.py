"""Precision is a policy: float32 everywhere, bfloat16 inside the network where the hardware is fast at it."""

from __future__ import annotations

from typing import Literal

import torch

from cmtool import memory, processes
from cmtool.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]


def device(name: str) -> torch.device:
    """The device of `--device auto|cpu|cuda[:N]|mps`; several processes take a GPU each.

    A process that is to compute on a CPU keeps its memory from now on, see `memory.keep`.

    Raises:
        UsageError: for a device this machine does not have.
    """
    chosen = _named(name)
    if chosen.type == "cpu":
        memory.keep()
    return chosen


def _named(name: str) -> torch.device:
    own = processes.device(name)
    if own is not None:
        return own
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", "auto, cpu, cuda, cuda:1 or mps") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < max(torch.cuda.device_count(), 1),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(chosen.type, False):
        raise UsageError(f"this machine has no device {name!r}", "--device auto takes what there is")
    return chosen


def compute_dtype(precision: Precision, on: torch.device) -> torch.dtype | None:
    """The type to compute in inside the network; None is float32.

    `auto` is bfloat16 on CUDA devices with bfloat16 tensor cores and on CPUs with AMX tiles, float32 elsewhere.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if on.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(on) >= (8, 0) else None
    if on.type == "cpu" and _has_amx():
        return torch.bfloat16
    return None


def tune(on: torch.device) -> None:
    """Let the device's libraries try their ways once: of use where batches keep one shape. For the process."""
    if on.type == "cuda":
        torch.backends.cudnn.benchmark = True


def _has_amx() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(check and check())
