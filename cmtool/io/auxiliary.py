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
from cmtool.io.files import sha256_of

# As torchvision and torch-fidelity name them: the last eight digits are the first of their SHA-256.
FILES = {
    "lpips-vgg": "vgg16-397923af.pth",
    "lpips-alex": "alexnet-owt-7be5be79.pth",
    "inception": "weights-inception-2015-12-05-6726825d.pth",
}
_TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"


def address(name: str) -> str:
    """Where these weights are downloaded from; of a trunk of LPIPS torchvision knows it.

    Raises:
        DependencyError: a torchvision that cannot be imported.
    """
    if name == "inception":
        return f"{_TORCH_FIDELITY}{FILES[name]}"
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

    shared = Path(torch.hub.get_dir(), "checkpoints", FILES[name])
    own = origins.folder() / FILES[name]
    return own if own.is_file() and not shared.is_file() else shared


def promised(file: Path) -> str:
    """How a file's SHA-256 starts, by its name; empty where the name does not tell."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", file.name)
    return found[1] if found else ""


def fetch(name: str, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """See to it that the weights are on this machine, and return their file.

    Args:
        name: of `FILES`.
        progress: called with the bytes there so far and those in all (None if nobody knows).
    Raises:
        CheckpointError: if they cannot be had, or are not what their name promises.
        DependencyError: see `address`.
    """
    file = find(name)
    if not file.is_file():
        file = origins.folder() / FILES[name]
        origins.bring(address(name), file, name, progress=progress)
    if not sha256_of(file).startswith(promised(file)):
        raise CheckpointError(
            f"{file} is damaged: its SHA-256 does not start with {promised(file)}", "delete it, and fetch it again"
        )
    return file
