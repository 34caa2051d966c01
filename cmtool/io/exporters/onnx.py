"""ONNX of the one-step map, for deployment without torch.

The graph is f(x, t) for a consistency or two-time model and D(x, t) for a denoiser: x float32 [batch, C, H, W] at time
t float32 [batch], and labels int64 [batch] where the model knows classes, to `image` float32 [batch, C, H, W], not
clipped. One step is f(sigma_max z, t_max) for standard normal z; more steps renoise in between. The file's metadata
say the numbers: role, path, t_max, times, licence.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from cmtool import spec
from cmtool.errors import CheckpointError, DependencyError
from cmtool.flow.flow_map import FlowMap
from cmtool.io.checks import OneStep
from cmtool.io.files import write_atomic

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31 - 2**20  # of one file: the limit of protocol buffers
OPSET = 18


def require() -> None:
    """Import what writing and checking needs.

    Raises:
        DependencyError: packages that are missing.
    """
    import importlib.util

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"ONNX needs the packages {', '.join(missing)}", "pip install 'cmtool[onnx]'")


def write(model: FlowMap, target: Path) -> None:
    """Write the one-step map of a model as one ONNX file, complete or not at all.

    Args:
        model: in float32, on the CPU.
        target: the `.onnx` file.
    Raises:
        DependencyError: without onnx, onnxscript and onnxruntime.
        CheckpointError: a model that is too large for one file, or a place that cannot be written to.
    """
    require()
    import onnx

    size = sum(4 * parameter.numel() for parameter in model.parameters())
    if size > MAX_BYTES:
        raise CheckpointError(
            f"the model has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2.1 GB", "convert it --to cmtool"
        )
    card = model.card
    x = torch.zeros(2, *card.image_shape)
    t = torch.full((2,), model.path.t_max)
    given, names, shapes = [x, t], ["x", "t"], [{0: "batch"}, {0: "batch"}]
    if card.num_classes:
        given, names, shapes = [*given, torch.zeros(2, dtype=torch.int64)], [*names, "labels"], [*shapes, {0: "batch"}]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(
                OneStep(model).eval(),
                tuple(given),
                input_names=names,
                output_names=["image"],
                dynamic_shapes=tuple(shapes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    made = program.model_proto
    told = {
        "cmtool.role": card.role,
        "cmtool.path": json.dumps(spec.to_dict(model.path)),
        "cmtool.t_max": repr(model.path.t_max),
        "cmtool.sigma_max": repr(float(model.path.sigma(torch.tensor(model.path.t_max, dtype=torch.float64)))),
        "cmtool.times": json.dumps(spec.to_dict(card.times)),
        "cmtool.num_classes": str(card.num_classes),
        "cmtool.class_names": json.dumps(card.class_names),
        "cmtool.licence": card.licence,
        "cmtool.source": card.source,
    }
    onnx.helper.set_model_props(made, told)
    try:
        write_atomic(target, lambda file: file.write(made.SerializeToString()))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}", "check the folder and its free space"
        ) from error


def run(file: Path, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """What onnxruntime makes of the inputs, on the CPU; shapes as in the module's description."""
    require()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy(), "t": t.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    return torch.from_numpy(session.run(None, given)[0])
