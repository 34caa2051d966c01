"""Network architectures: plain functions of (x, noise, labels, augment, gap) that know nothing of diffusion.

`NETWORKS` names every architecture by the `kind` of its config; `build` makes the module and `load_start` gives it the
weights of another to start from. Importing this package does not import torch: only `build` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from cmtool.networks.configs import SIZES, ADMConfig, Config, DDPMppConfig, EDM2Config, MLPConfig, UNet2DConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "CONFIGS",
    "NETWORKS",
    "SIZES",
    "ADMConfig",
    "Config",
    "DDPMppConfig",
    "EDM2Config",
    "MLPConfig",
    "UNet2DConfig",
    "blocks",
    "build",
    "compile_",
    "forget",
    "forget_casts",
    "load_start",
    "recompute",
    "record",
    "recorded",
    "restore_constants",
]

# kind -> (config class, module and class that read it)
NETWORKS: dict[str, tuple[type, str, str]] = {
    "ddpmpp": (DDPMppConfig, "ddpmpp", "DDPMpp"),
    "adm": (ADMConfig, "adm", "ADM"),
    "unet2d": (UNet2DConfig, "unet2d", "UNet2D"),
    "edm2": (EDM2Config, "edm2", "EDM2"),
    "mlp": (MLPConfig, "mlp", "MLP"),
}
CONFIGS: dict[str, type] = {kind: entry[0] for kind, entry in NETWORKS.items()}


def build(config: Config) -> nn.Module:
    """A new network with its initial weights (global random state, current default device).

    Raises:
        ValueError: `config` is of no known kind.
    """
    if getattr(config, "kind", None) not in NETWORKS:
        raise ValueError(f"{config!r} configures none of the networks {', '.join(NETWORKS)}")
    _, module, name = NETWORKS[config.kind]
    network: nn.Module = getattr(importlib.import_module(f"{__name__}.{module}"), name)(config)
    return network


def recompute(network: nn.Module, wanted: bool = True) -> nn.Module:
    """Let the blocks of a network compute their inside again for the gradient instead of keeping it; returns it.

    Activation checkpointing: the outputs of the blocks are kept, and the backward pass costs one more forward pass.
    """
    for block in blocks(network):
        block.recompute = wanted  # type: ignore[assignment]
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that hold most of its weights and are called one after another."""
    from cmtool.networks.recomputed import Recomputed

    return [module for module in network.modules() if isinstance(module, Recomputed)]


def forget_casts(network: nn.Module) -> None:
    """Let the network cast its weights at every call: they may be elsewhere at the next one."""
    for module in network.modules():
        if getattr(module, "keeps_casts", False):
            module.keeps_casts = False  # type: ignore[assignment]


def compile_(network: nn.Module) -> None:
    """Let torch.compile work on a network, from its next call on; in place."""
    network.compile(dynamic=False)


def record(network: nn.Module) -> None:
    """Let the calls of a network on a GPU be recorded as CUDA graphs from now on; see `cmtool.networks.graphs`."""
    from cmtool.networks import graphs

    graphs.record(network)


def recorded(network: nn.Module) -> AbstractContextManager[None]:
    """`record` for a while, unless the network is recorded or compiled already; graphs are kept for the next time."""
    from cmtool.networks import graphs

    return graphs.recorded(network)


def forget(network: nn.Module) -> None:
    """Give back the memory of a network's recordings; it may be recorded anew."""
    from cmtool.networks import graphs

    graphs.forget(network)


def restore_constants(network: nn.Module) -> None:
    """Give a network that was built on the meta device the constants that are no part of its state dict.

    Raises:
        ValueError: if anything else is still without memory: its weights come from `load_state_dict(assign=True)`.
    """
    for module in network.modules():
        restore = getattr(module, "restore_constants", None)
        if restore is not None:
            restore()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{name} has no values")


def load_start(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the weights of another network that this one starts as.

    The layers of the gap and of the augmentation vector may be missing in `state`: they become zero, so that the
    network is the other one at every gap and for every vector. Everything else must fit.

    Args:
        network: one that `build` made; changed in place.
        state: the other network's state dict, with or without two times.
    Raises:
        RuntimeError: entries that are missing, have another shape or are not part of the network.
    """
    own = network.state_dict()
    extra = [name for name in own if name.startswith(("map_gap.", "map_augment.")) and name not in state]
    network.load_state_dict({**state, **{name: own[name].new_zeros(own[name].shape) for name in extra}})
