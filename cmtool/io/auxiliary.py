"""Weights of others that distances and measures are made of: their names, where they lie, and how they are fetched.

Nothing here is downloaded unasked: `cmtool fetch NAME` does it ahead of time, into cmtool's cache. What torch.hub has
downloaded for other programs is found where it keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cmtool.compat import repair_torchvision
from cmtool.errors import CheckpointError, DependencyError
from cmtool.io import origins
from cmtool.io.catalogue import WEIGHTS
from cmtool.io.files import sha256_of

_TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"


def address(name: str) -> str:
    """Where these weights are downloaded from; of a trunk of LPIPS torchvision knows it.

    Raises:
        DependencyError: a torchvision that cannot be imported.
    """
    if name == "inception":
        return f"{_TORCH_FIDELITY}{WEIGHTS[name]}"
    repair_torchvision()
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"torchvision knows where {name} lies, and cannot be imported: {error}",
            "install a torchvision built for your torch",
        ) from error
    weights = {"lpips-vgg": models.VGG16_Weights, "lpips-alex": models.AlexNet_Weights}[name]
    return str(weights.IMAGENET1K_V1.url)


def find(name: str) -> Path:
    """The file of the weights: where torch.hub keeps its downloads, or in cmtool's cache; it need not exist."""
    import torch

    shared = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS[name])
    own = origins.folder() / WEIGHTS[name]
    return own if own.is_file() and not shared.is_file() else shared


def damage(file: Path, sha256: str | None = None) -> str:
    """What is wrong with a file whose name tells how its SHA-256 starts, in a few words; empty where nothing is.

    Args:
        sha256: the file's, where somebody knows it.
    """
    start = _promised(file)
    if not start or (sha256 or sha256_of(file)).startswith(start):
        return ""
    return f"{file} is damaged: its SHA-256 does not start with {start}"


def _promised(file: Path) -> str:
    found = re.search(r"-([0-9a-f]{8})\.pth$", file.name)
    return found[1] if found else ""


def fetch(name: str, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """See to it that the weights are on this machine, and return their file.

    Args:
        name: of `catalogue.WEIGHTS`.
        progress: called with the bytes there so far and those in all (None if nobody knows).
    Raises:
        CheckpointError: if they cannot be had, or are not what their name promises.
        DependencyError: see `address`.
    """
    file, own = find(name), origins.folder() / WEIGHTS[name]
    if file == own or not file.is_file():
        origins.bring(address(name), own, name, _promised(own), progress=progress)
        return own
    if said := damage(file):
        raise CheckpointError(said, "delete it, and fetch it again")
    return file
