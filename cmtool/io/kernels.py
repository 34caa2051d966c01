"""Blur kernels, from a name or a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import DataError, UsageError
from cmtool.io.images import read_bytes, read_image

_LARGEST = 1023  # side
_HINT = "gaussian:1.5, box:3, or a .npy, a .txt or an image of the kernel"


def read_kernel(text: str) -> Tensor:
    """The kernel that is named: `gaussian:SIGMA`, `box:SIDE`, or a file.

    Args:
        text: SIGMA and SIDE in pixels. A file is an `.npy` [h, w], a `.txt` of rows of numbers, or a grey picture.
    Returns:
        float32 [h, w], of sum 1.
    Raises:
        UsageError, DataError: no such name or file, or no kernel.
    """
    name, _, value = text.partition(":")
    if name in ("gaussian", "box"):
        kernel = _named(name, value, text)
    else:
        kernel = _from_file(Path(text))
    if kernel.ndim != 2 or 0 in kernel.shape or max(kernel.shape) > _LARGEST:
        raise DataError(f"--kernel {text} is {tuple(kernel.shape)}, no table of up to {_LARGEST} a side", _HINT)
    total = float(kernel.sum())
    if not (np.isfinite(kernel).all() and math.isfinite(total) and total > 1e-9):
        raise DataError(f"--kernel {text} has a sum of {total:g}", "its numbers are to be finite, of a positive sum")
    return torch.from_numpy((kernel / total).astype(np.float32))


def _named(name: str, value: str, text: str) -> np.ndarray:
    try:
        size = float(value)
    except ValueError:
        size = math.nan
    if not (0 < size <= 100 and (name == "gaussian" or size == int(size))):
        raise UsageError(f"--kernel {text}: expected a size in pixels, up to 100", _HINT)
    if name == "box":
        return np.ones((int(size), int(size)))
    reach = math.ceil(4 * size)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / size) ** 2)
    return np.outer(line, line)


def _from_file(path: Path) -> np.ndarray:
    ending = path.suffix.lower()
    if ending not in (".npy", ".txt"):
        if not path.exists():
            raise UsageError(f"--kernel {path} is no kernel by name and no file", _HINT)
        return read_image(path, 1)[0].numpy().astype(np.float64)
    data = read_bytes(path, str(path))
    try:
        if ending == ".txt":
            return np.array([[float(word) for word in line.split()] for line in data.decode().splitlines() if line])
        from io import BytesIO

        return np.asarray(np.load(BytesIO(data), allow_pickle=False), dtype=np.float64)
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise DataError(f"--kernel {path} is no table of numbers", _HINT) from error
