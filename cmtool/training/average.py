"""Averages of the weights for sampling. What the target of a method does is in `targets`, and is another thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


class AverageRule(Protocol):
    """The decay beta of avg <- beta avg + (1 - beta) weights, after the step that ends at `images` seen images."""

    kind: ClassVar[str]

    @property
    def name(self) -> str: ...

    def decay(self, images: int, batch: int) -> float: ...


@dataclass(frozen=True)
class Exponential:
    """Constant decay a step. Song et al. (2023): 0.9999 on CIFAR-10, 0.999943 on ImageNet-64 and LSUN."""

    kind: ClassVar[str] = "exponential"
    beta: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), found {self.beta}")

    @property
    def name(self) -> str:
        return f"exponential-{self.beta:g}"

    def decay(self, images: int, batch: int) -> float:
        return self.beta


@dataclass(frozen=True)
class HalfLife:
    """Decay by half in so many images, less at the start. Karras et al. (2022), appendix F.6.

    Args:
        images: the half-life, in images.
        ramp_up: at any time the half-life is at most this share of the images seen so far, so that the first, random
            weights are forgotten.
    """

    kind: ClassVar[str] = "half_life"
    images: int = 500_000
    ramp_up: float = 0.05

    def __post_init__(self) -> None:
        if self.images <= 0 or not self.ramp_up > 0:
            raise ValueError(f"the half-life and its ramp-up must be positive, found {self.images}, {self.ramp_up}")

    @property
    def name(self) -> str:
        return f"half-life-{self.images}"

    def decay(self, images: int, batch: int) -> float:
        return float(0.5 ** (batch / max(min(self.images, images * self.ramp_up), 1e-8)))


AVERAGES: dict[str, type] = {"exponential": Exponential, "half_life": HalfLife}


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, in place; buffers are copied.

    A decay of 0 copies exactly.
    """
    ours, theirs = list(average.parameters()), list(model.parameters())
    if decay == 0:
        torch._foreach_copy_(_tensors(ours), _tensors(theirs))
    else:
        torch._foreach_lerp_(_tensors(ours), _tensors(theirs), 1 - decay)
    for mine, other in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(other)


def _tensors(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach() for p in parameters]
