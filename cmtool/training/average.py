"""Averages of the weights for sampling. What the target of a method does is in `targets`, and is another thing.

`blend` keeps an average during the training. The power-function kind can also be chosen afterwards: `fit` says with
which coefficients stored snapshots add up to an average of another width, `combine` adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDEST = 12**-0.5  # relative width of the power function t^0, the plain mean of all weights so far
_NARROWEST = 1e-6  # such an average is the last weights themselves


class AverageRule(Protocol):
    """The decay beta of avg <- beta avg + (1 - beta) weights, after the step that ends at `images` seen images."""

    kind: ClassVar[str]
    post_hoc: ClassVar[bool]  # whether other averages can be made of its snapshots: then a run keeps all of them

    @property
    def name(self) -> str: ...

    def decay(self, images: int, batch: int) -> float: ...


@dataclass(frozen=True)
class Exponential:
    """Constant decay a step. Song et al. (2023): 0.9999 on CIFAR-10, 0.999943 on ImageNet-64 and LSUN."""

    kind: ClassVar[str] = "exponential"
    post_hoc: ClassVar[bool] = False
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
    post_hoc: ClassVar[bool] = False
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


@dataclass(frozen=True)
class Power:
    """Weights in proportion to t^gamma, t the training so far. Karras et al. (2023), arXiv:2312.02696, section 3.1.

    It grows with the training, so one number suits every length, and forgets the first weights altogether. The decay
    (1 - b/t)^(gamma + 1) makes it exactly: at T, the step from t - b to t has got (t^(gamma + 1) -
    (t - b)^(gamma + 1)) / T^(gamma + 1), its share of the profile.

    Args:
        sigma_rel: standard deviation of the profile over its length, sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2);
            at most 12^(-1/2), where gamma = 0. 0.05 is gamma = 16.97, 0.1 is 6.94.
    """

    kind: ClassVar[str] = "power"
    post_hoc: ClassVar[bool] = True
    sigma_rel: float = 0.1

    def __post_init__(self) -> None:
        if not _NARROWEST <= self.sigma_rel <= WIDEST:
            raise ValueError(
                f"sigma_rel must be from {_NARROWEST:g} to 12^(-1/2) = {WIDEST:.4f}, found {self.sigma_rel:g}"
            )

    @property
    def name(self) -> str:
        return f"power-{self.sigma_rel:g}"

    @property
    def gamma(self) -> float:
        """The exponent: the largest root of u^3 + u^2 - k u + k = 0, u = gamma + 2 and k = sigma_rel^-2.

        All three roots are real, hence the cosine form of the cubic formula.
        """
        k = self.sigma_rel**-2
        p, q = k + 1 / 3, 2 / 27 + 4 * k / 3  # v^3 - p v + q = 0, v = u + 1/3
        angle = math.acos(-1.5 * q / p * math.sqrt(3 / p)) / 3
        return max(0.0, 2 * math.sqrt(p / 3) * math.cos(angle) - 7 / 3)

    def decay(self, images: int, batch: int) -> float:
        return float((1 - batch / images) ** (self.gamma + 1))


Average = Exponential | HalfLife | Power
AVERAGES: dict[str, type] = {"exponential": Exponential, "half_life": HalfLife, "power": Power}


def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, in place; buffers are copied.

    A decay of 0 copies exactly.
    """
    import torch

    ours, theirs = _parameters(average), _parameters(model)
    if decay == 0:
        torch._foreach_copy_(ours, theirs)
    else:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
    for mine, other in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(other.detach())


def _parameters(module: nn.Module) -> list[Tensor]:
    """Of modules that are spread over processes in the same way, what is here of them."""
    from cmtool.training.distributed import local

    return [local(parameter.detach()) for parameter in module.parameters()]


# Choosing afterwards.


class Profile(NamedTuple):
    """How much the weights of each moment t count in a power-function average: (gamma + 1) t^gamma / end^(gamma + 1).

    Zero after `end`; its integral is one. Steps or images are alike as a unit.
    """

    end: float
    gamma: float


class Fit(NamedTuple):
    """What `fit` found."""

    coefficients: tuple[float, ...]  # one a snapshot; their sum is one
    error: float  # L2 distance of the profile made to the one wanted, over the norm of the latter
    gain: float  # by how much independent errors of the snapshots grow: root of the sum of squared coefficients


def inner(one: Profile, other: Profile) -> float:
    """The integral over t of the product of two profiles, in 1 / (unit of t)."""
    short, long = sorted((one, other))
    exponents = (one.gamma + 1) * (other.gamma + 1) / (one.gamma + other.gamma + 1)
    return exponents * (short.end / long.end) ** long.gamma / long.end


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """The coefficients with which stored averages come closest to the wanted one.

    Least squares of the profiles, Karras et al. (2023), arXiv:2312.02696, section 3.2, under one more condition: the
    coefficients sum to one. Without it few snapshots shrink or blow up all weights, by 2 % for two widths, five
    snapshots of each and a target of 0.15; with it a weight that never moves is reproduced whatever the error.

    Args:
        stored: profiles of the snapshots, in any order.
        wanted: profile to come close to.
    Raises:
        ValueError: if there is nothing stored, or a profile that is none.
    """
    import torch

    if not stored or not all(profile.end > 0 and profile.gamma >= 0 for profile in (*stored, wanted)):
        raise ValueError(f"expected one or more profiles with end > 0 and gamma >= 0, found {[*stored, wanted]}")
    profiles = [Profile(profile.end / wanted.end, profile.gamma) for profile in (*stored, wanted)]
    gram = torch.tensor([[inner(a, b) for b in profiles] for a in profiles], dtype=torch.float64)
    scale = gram.diagonal().rsqrt()  # to unit norm, for the condition of the system
    gram *= scale[:, None] * scale
    square, right = gram[:-1, :-1], gram[:-1, -1:]
    # The minimum under the condition: [square scale; scale' 0] [x; multiplier] = [right; scale of the wanted one].
    border = scale[:-1, None]
    system = torch.cat([torch.cat([square, border], 1), torch.cat([border.T, border.new_zeros(1, 1)], 1)])
    solution = torch.linalg.lstsq(system, torch.cat([right, scale[-1:, None]]), driver="gelsd").solution
    x = solution[:-1]
    error = float(1 - 2 * x.T @ right + x.T @ square @ x)
    coefficients = (x * border / scale[-1]).flatten()
    return Fit(tuple(coefficients.tolist()), math.sqrt(max(0.0, error)), float(coefficients.norm()))


def combine(into: nn.Module, parts: Iterable[tuple[float, nn.Module]]) -> None:
    """into <- sum of coefficient * module over `parts`, parameter by parameter, summed in float64; buffers stay.

    The parts are asked for one by one, so they need not be in memory together.
    """
    import torch

    targets = _parameters(into)
    sums = [torch.zeros_like(target, dtype=torch.float64) for target in targets]
    for coefficient, module in parts:
        for total, tensor in zip(sums, _parameters(module), strict=True):
            total.add_(tensor.to(total), alpha=coefficient)
    for target, total in zip(targets, sums, strict=True):
        target.copy_(total)
