"""Pretrained trunks of LPIPS: found on this machine, checked, read; never downloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cmtool.errors import DependencyError
from cmtool.io import auxiliary, catalogue

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "CMTOOL_LPIPS_BACKBONE"
FILES = {net: catalogue.WEIGHTS[f"lpips-{net}"] for net in ("vgg", "alex")}  # torchvision's names


def read_backbone(net: str, given: str | os.PathLike[str] | None = None) -> Mapping[str, Tensor]:
    """The weights of a trunk, as torchvision names them (`features.N.weight`, ...).

    Looked for in `given`, else in the file that $CMTOOL_LPIPS_BACKBONE names, else where torch.hub
    keeps its downloads and in cmtool's cache.

    Args:
        net: "vgg" or "alex".
    Raises:
        DependencyError: a file that is missing, damaged (its name tells how its SHA-256 starts) or of another network.
    """
    import torch
    from safetensors.torch import load_file

    named = given or os.environ.get(VARIABLE)
    path = Path(named) if named else auxiliary.find(f"lpips-{net}")
    hint = (
        f"cmtool fetch lpips-{net}, or put torchvision's {FILES[net]} there, or name it with --lpips-backbone; "
        "--set objective.distance=l2 needs none"
    )
    if not path.is_file():
        raise DependencyError(f"LPIPS needs the weights of its {net} trunk, and there is no {path}", hint)
    try:
        if said := auxiliary.damage(path):
            raise DependencyError(said, hint)
        if path.suffix == ".safetensors":
            state: Mapping[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        features = {name: state[name] for name in state if name.startswith("features.")}
    except DependencyError:
        raise
    except Exception as error:  # bytes that are no weights make torch's reader fail in a dozen ways
        raise DependencyError(f"{path} cannot be read as weights", hint) from error
    if "features.0.weight" not in features:
        raise DependencyError(f"{path} holds the weights of something else: no features.0.weight", hint)
    return features
