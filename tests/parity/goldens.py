"""Where the numbers of the original implementations lie: beside the repository, in `shared/goldens`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3] / "shared" / "goldens"


def golden(name: str) -> Path:
    """The path of one golden file; skips the calling test where the file is missing."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"needs ../shared/goldens/{name}")
    return path


def tensors(name: str) -> dict[str, Tensor]:
    """The tensors of one golden file, a `.safetensors` or a plain `.pt` state dict."""
    path = golden(name)
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)


def meta(folder: str) -> dict[str, Any]:
    """The `meta.json` of one folder of goldens."""
    return json.loads(golden(f"{folder}/meta.json").read_text())
