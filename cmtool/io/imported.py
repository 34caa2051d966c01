"""What a file of weights is, in cmtool's own terms, before it becomes a model: the one shape all importers return.

An importer reads a file or folder, works out the network from the names and shapes of its tensors, renames them to
ours, and says what it had to guess. `assemble` checks that all of it fits and makes the `FlowMap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmtool import networks
from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import FlowMap, ModelCard
from cmtool.flow.parameterization import Parameterization
from cmtool.flow.path import Path as NoisePath

if TYPE_CHECKING:
    from cmtool.flow.flow_map import Role

MAX_PARAMETERS = 20 * 10**9  # more than any image model: beyond it a file lies about itself


@dataclass
class Imported:
    """A model as its file describes it.

    Args:
        config: the network, worked out from names and shapes.
        path, parameterization, card: as in `FlowMap`; the card's `notes` say what was guessed and what looks wrong.
        state: the weights under the names of `networks.build(config)`; `assemble` empties it as it goes, so that a
            model is never in memory twice. Tensors on the meta device will do to look at a file without reading it.
        format: "cmtool", "openai", "edm", "edm2", "diffusers" or "jax".
        file: where it came from, for messages.
    """

    config: networks.Config
    path: NoisePath
    parameterization: Parameterization
    card: ModelCard
    state: dict[str, Tensor]
    format: str
    file: str


def other_role(file: str, found: Role, wanted: Role) -> CheckpointError:
    """The error of a model that is something else than what is needed."""
    what = {
        "denoiser": "a denoiser (a diffusion teacher)",
        "consistency": "a consistency model",
        "flow_map": "a two-time model",
    }
    return CheckpointError(
        f"{file} is {what.get(found, found)}, and {what[wanted]} is needed",
        "a teacher is trained with `cmtool train --preset edm`"
        if wanted == "denoiser"
        else "a consistency model is trained with `cmtool distill`",
    )


def assemble(imported: Imported) -> FlowMap:
    """The model, in evaluation mode with float32 weights; `imported.state` is empty afterwards.

    The network is built without memory of its own and takes the tensors as they are: what is read is all that is used.

    Raises:
        CheckpointError: names or shapes that do not fit the network, weights that are not finite.
    """
    check_card(imported)
    network = blank(imported.config, imported.file, len(imported.state))
    check_fit(network, imported.state, imported.file)
    expected = list(network.state_dict())
    weights: dict[str, Tensor] = {}
    for name in expected:
        tensor = imported.state.pop(name)
        # Its own memory: the tensor may be a window on a file that somebody will change.
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        tensor = tensor.to(
            torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True, memory_format=layout
        )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{imported.file} holds weights that are not finite, in {name}", "use an earlier checkpoint"
            )
        weights[name] = tensor
    network.load_state_dict(weights, assign=True)
    networks.restore_constants(network)
    model = FlowMap(network, imported.path, imported.parameterization, imported.card)
    return model.requires_grad_(False).eval()


def check_card(imported: Imported) -> None:
    """Whether the card speaks of the network that is there.

    Raises:
        CheckpointError: images of another size or number of channels, another number of classes.
    """
    card, config = imported.card, imported.config
    for said, field, found in (
        (card.resolution, "resolution", config.resolution),
        (card.channels, "channels", config.in_channels),
        (card.num_classes, "classes", config.num_classes),
    ):
        if said != found:
            raise CheckpointError(
                f"{imported.file} says {field} {said}, and its network has {found}", "get the file again"
            )


def blank(config: networks.Config, file: str, entries: int) -> nn.Module:
    """The network without memory, on the meta device.

    Raises:
        CheckpointError: a network that cannot be built, or that is far larger than `entries` tensors.
    """
    try:
        levels = len(getattr(config, "channel_mult", ()) or getattr(config, "widths", ()) or (1,))
        if getattr(config, "num_blocks", 0) * levels > entries:  # each block has weights: do not even try
            raise ValueError("too many blocks")
        with torch.device("meta"):
            network = networks.build(config)
        if sum(parameter.numel() for parameter in network.parameters()) > MAX_PARAMETERS:
            raise ValueError("too many parameters")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{file} describes a network that cannot be built", "get the file again") from error
    return network


def check_fit(network: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Whether the tensors are those of the network.

    Raises:
        CheckpointError: the first entry that is missing, is extra or has another shape, and how many more there are.
    """
    expected = network.state_dict()
    odd = sorted(name for name, tensor in state.items() if not tensor.is_floating_point())
    if odd:
        raise CheckpointError(f"{file} holds {odd[0]} as {state[odd[0]].dtype}, no real numbers", "get the file again")
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    for names, problem in ((missing, "is missing"), (extra, "is not part of the network"), (wrong, "")):
        if names:
            if not problem:
                found, wanted = (tuple(tensors[names[0]].shape) for tensors in (state, expected))
                problem = f"has shape {found}, not {wanted}"
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{file} does not fit its own description: {names[0]} {problem}{more}", "get the file again"
            )
