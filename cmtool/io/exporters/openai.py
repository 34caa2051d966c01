"""OpenAI's format: the plain state dict of an ADM network, as `torch.save` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import FlowMap
from cmtool.flow.parameterization import EDM, BoundaryEDM, LogRatio
from cmtool.flow.path import VE
from cmtool.io.files import write_atomic


def check(model: FlowMap) -> None:
    """Whether OpenAI's code computes this model from its weights.

    Raises:
        CheckpointError: another network, path, parameterization or time input than theirs, saying which.
    """
    config: Any = model.network.config
    wanted = BoundaryEDM if model.card.role == "consistency" else EDM
    form = model.parameterization
    told = getattr(form, "time_input", None)
    problems = {
        f"a network of the kind {config.kind}, not adm": config.kind != "adm",
        "a network of two times": getattr(config, "two_times", False),
        "groups of four channels or more": getattr(config, "group_channels", 1) != 1
        and any(mult * config.channels < 128 for mult in config.channel_mult),
        f"the path {model.path}": not isinstance(model.path, VE),
        f"the parameterization {form}": type(form) is not wanted or form.sigma_data != 0.5,
        f"the time input {told}, not 250 ln sigma": told != LogRatio(250.0),
    }
    for problem, found in problems.items():
        if found:
            raise CheckpointError(
                f"OpenAI's format cannot hold this model: it has {problem}", "convert it --to cmtool or --to onnx"
            )


def write(model: FlowMap, target: Path) -> None:
    """Write the weights of a model, float32, under OpenAI's names; complete or not at all.

    Raises:
        CheckpointError: as `check`, or a place that cannot be written to.
    """
    check(model)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    try:
        write_atomic(target, lambda file: torch.save(state, file))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}", "check the folder and its free space"
        ) from error
