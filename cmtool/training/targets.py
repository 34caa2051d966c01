"""Target rules: which weights theta- the target f(x_r, r) of a consistency objective is computed with.

A rule is the decay mu of theta- <- mu theta- + (1 - mu) theta after every optimizer step; mu = 0 is the model itself
without gradient. The target is a part of the method; averages for sampling are in `average`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args


class TargetRule(Protocol):
    """The decay mu at `progress` in [0, 1]; num is the number N of grid points at that time."""

    kind: ClassVar[str]

    def decay(self, progress: float, num: int) -> float: ...


@dataclass(frozen=True)
class Online:
    """mu = 0: theta- = stop_grad(theta). CIFAR-10 CD of Song et al. (2023); iCT, ECT and later methods."""

    kind: ClassVar[str] = "online"

    def decay(self, progress: float, num: int) -> float:
        return 0.0


@dataclass(frozen=True)
class MovingAverage:
    """Constant mu. Song et al. (2023), table 3: 0.95 for CD on ImageNet-64 and LSUN."""

    kind: ClassVar[str] = "moving_average"
    mu: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must be in [0, 1), found {self.mu}")

    def decay(self, progress: float, num: int) -> float:
        return self.mu


@dataclass(frozen=True)
class AdaptiveAverage:
    """mu(k) = exp(s0 ln mu0 / N(k)): the target follows faster while the grid is coarse. Song et al. (2023), app. C.

    Args:
        mu0: the decay at N = s0.
        s0: the first N of the curriculum.
        rule: `paper` divides by N(k); `openai` by N(k) - 1, as the released code does (so mu starts at mu0^2).
    """

    kind: ClassVar[str] = "adaptive_average"
    mu0: float = 0.95
    s0: int = 2
    rule: Literal["paper", "openai"] = "paper"

    def __post_init__(self) -> None:
        if not 0 < self.mu0 < 1:
            raise ValueError(f"mu0 must be in (0, 1), found {self.mu0}")

    def decay(self, progress: float, num: int) -> float:
        return math.exp(self.s0 * math.log(self.mu0) / (num if self.rule == "paper" else num - 1))


@dataclass(frozen=True)
class Truncated:
    """Online for neighbours at noise-to-signal ratios from `at` on; below it a frozen first stage answers.

    So the network need not be a consistency model where it is never asked. Lee et al. (2024), arXiv:2410.14895: at = 1.
    """

    kind: ClassVar[str] = "truncated"
    at: float = 1.0

    def __post_init__(self) -> None:
        if not self.at > 0:
            raise ValueError(f"the truncation lies at a positive noise-to-signal ratio, found at={self.at}")

    def decay(self, progress: float, num: int) -> float:
        return 0.0


AnyTarget = Online | MovingAverage | AdaptiveAverage | Truncated
TARGETS: dict[str, type] = {target.kind: target for target in get_args(AnyTarget)}
