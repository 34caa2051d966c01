"""Repairs of other packages' installations; each checks first and does nothing on a healthy one."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

_keep: list[Any] = []  # operator definitions live as long as this reference


@functools.cache
def repair_torchvision() -> None:
    """Make `import torchvision` work where its compiled operators do not load.

    A CPU build of torch next to a CUDA build of torchvision cannot load `torchvision/_C`, and the import then fails on
    an operator it only declares ("operator torchvision::nms does not exist"). Declaring the operators lets the import
    pass; calling them still fails, and nothing here calls them. With a healthy build the real operators load and
    nothing is declared, since a second declaration would be an error.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    library = next(Path(spec.submodule_search_locations[0]).glob("_C*"), None)
    if library is None:
        return
    try:
        torch.ops.load_library(str(library))
    except (OSError, ImportError, RuntimeError):
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(declared)
