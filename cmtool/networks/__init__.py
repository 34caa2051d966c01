"""Network architectures: plain functions of (x, noise, labels, augment) that know nothing of diffusion.

`NETWORKS` names every architecture by the `kind` of its config; `build` makes the module. Importing this package does
not import torch: only `build` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cmtool.networks.configs import SIZES, ADMConfig, Config, DDPMppConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CONFIGS", "NETWORKS", "SIZES", "ADMConfig", "Config", "DDPMppConfig", "build"]

# kind -> (config class, module and class that read it)
NETWORKS: dict[str, tuple[type, str, str]] = {
    "ddpmpp": (DDPMppConfig, "ddpmpp", "DDPMpp"),
    "adm": (ADMConfig, "adm", "ADM"),
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
