"""Presets: one function a method, returning the whole recipe as data.

A docstring's first line is the summary, its body the source, the published values and what we measured; `cmtool presets
show` prints it. Nothing here imports torch until a recipe is made, so that names can be listed and checked at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cmtool.errors import ConfigError, nearest
from cmtool.networks.configs import Config, small

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """What the data (and the teacher, if there is one) fix before a recipe is chosen."""

    resolution: int = 32
    channels: int = 3
    num_classes: int = 0
    network: Config | None = None  # the teacher's: a student starts as its copy

    def small(self) -> Config:
        """The teacher's network, else the small one for these images."""
        return self.network or small(self.resolution, self.channels, self.num_classes)


def edm(shape: Shape) -> Recipe:
    """Denoising diffusion teacher, class-conditional when the data has classes.

    Karras et al. (2022), arXiv:2206.00364: ln sigma ~ N(-1.2, 1.2^2), weight snr + 1 / sigma_data^2, their
    preconditioning. Scaled for minutes on a CPU: small network, large steps that fall to zero along a cosine.
    """
    from cmtool.flow.parameterization import EDM
    from cmtool.training.average import HalfLife
    from cmtool.training.objectives import Denoising
    from cmtool.training.recipe import Optimizer, Recipe

    return Recipe(
        preset="edm",
        role="denoiser",
        objective=Denoising(),
        network=shape.small(),
        parameterization=EDM(),
        optimizer=Optimizer(rule="adam", lr=1e-3, betas=(0.9, 0.99), warmup=10_000, final=0.01),
        averages=(HalfLife(images=20_000, ramp_up=0.1),),
        iterations=1500,
        batch=128,
    )


def cd(shape: Shape) -> Recipe:
    """Consistency distillation from a diffusion teacher, with a Heun step between neighbours.

    Song et al. (2023), arXiv:2303.01469, algorithm 2: N = 18, online target, uniform weight.
    """
    from cmtool.training.average import HalfLife
    from cmtool.training.distances import PseudoHuber
    from cmtool.training.objectives import Consistency
    from cmtool.training.recipe import Optimizer, Recipe

    return Recipe(
        preset="cd",
        role="consistency",
        objective=Consistency(distance=PseudoHuber()),
        network=shape.small(),
        optimizer=Optimizer(rule="radam", lr=5e-4, warmup=10_000, final=0.01),
        averages=(HalfLife(images=20_000, ramp_up=0.1),),
        init_from_teacher=True,
        iterations=2000,
        batch=128,
    )


PRESETS: dict[str, Callable[[Shape], Recipe]] = {f.__name__.replace("_", "-"): f for f in (edm, cd)}


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
