"""Presets: one function a method, returning the whole recipe as data.

A docstring's first line is the summary, its body the source, the published values and what we measured; `cmtool presets
show` prints it. Nothing here imports torch until a recipe is made, so that names can be listed and checked at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from cmtool.errors import ConfigError, nearest
from cmtool.training.presets import consistency, continuous, diffusion, flows, published
from cmtool.training.presets.shape import Shape

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe

__all__ = ["DEFAULTS", "PRESETS", "Shape", "preset", "summary"]

# What is used where no preset is named, by what there is to start from.
DEFAULTS = {"teacher": "flow-cd", "init": "ect", "nothing": "ict"}

PRESETS: dict[str, Callable[[Shape], Recipe]] = {
    "edm": diffusion.edm,
    "flow": diffusion.flow,
    "cd": consistency.cd,
    "ct": consistency.ct,
    "ict": consistency.ict,
    "ect": consistency.ect,
    "tcm": consistency.tcm,
    "direct": consistency.direct,
    "pd": consistency.pd,
    "scd": continuous.scd,
    "sct": continuous.sct,
    "cd-continuous": continuous.cd_continuous,
    "ct-continuous": continuous.ct_continuous,
    "flow-cd": flows.flow_cd,
    "flow-ct": flows.flow_ct,
    "reflow": flows.reflow,
    "meanflow": flows.meanflow,
    "shortcut": flows.shortcut,
    "edm-cifar10": published.edm_cifar10,
    "edm-cifar10-vp": published.edm_cifar10_vp,
    "edm-imagenet64": published.edm_imagenet64,
    "edm-lsun256": published.edm_lsun256,
    "cd-cifar10": published.cd_cifar10,
    "cd-imagenet64": published.cd_imagenet64,
    "cd-lsun256": published.cd_lsun256,
    "ct-cifar10": published.ct_cifar10,
    "ct-imagenet64": published.ct_imagenet64,
    "ct-lsun256": published.ct_lsun256,
    "ict-cifar10": published.ict_cifar10,
    "ict-imagenet64": published.ict_imagenet64,
    "ect-cifar10": published.ect_cifar10,
    "ect-cifar10-fast": published.ect_cifar10_fast,
    "tcm-cifar10": published.tcm_cifar10,
    "pd-cifar10": published.pd_cifar10,
    "scd-cifar10": published.scd_cifar10,
    "sct-cifar10": published.sct_cifar10,
    "cd-continuous-cifar10": published.cd_continuous_cifar10,
    "ct-continuous-cifar10": published.ct_continuous_cifar10,
    "meanflow-cifar10": published.meanflow_cifar10,
}


def preset(name: str) -> Callable[[Shape], Recipe]:
    """The preset of this name.

    Raises:
        ConfigError: unknown names, with the nearest ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}", nearest(name, PRESETS))
    return PRESETS[name]


def summary(name: str) -> str:
    """The first line of a preset's docstring."""
    return (inspect.getdoc(preset(name)) or "").splitlines()[0]
