"""Where on the path: grids for solving, curricula for how fine they are, and samplers of training times.

A grid is a coordinate u on the path, 0 at t_max and 1 at t_min: spacing, index and sub-step are all the same map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool.flow.path import Path

# --- grids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Karras:
    """t(u) = (t_max^(1/rho) + u (t_min^(1/rho) - t_max^(1/rho)))^rho. Karras et al. (2022), eq. 5.

    rho = 7 is the published grid; rho = 1 is uniform in t; large rho tends to uniform in ln t.
    """

    kind: ClassVar[str] = "karras"
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, found {self.rho}")

    def at(self, path: Path, u: Tensor) -> Tensor:
        """Times at the grid coordinates u in [0, 1]; float32, computed in float64."""
        top, bottom = path.t_max ** (1 / self.rho), path.t_min ** (1 / self.rho)
        t = (top + u.double() * (bottom - top)) ** self.rho
        # The ends are the path's own to the last bit: f(x, t_min) = x must not miss by a rounding.
        t = torch.where(u <= 0, path.t_max, torch.where(u >= 1, path.t_min, t))
        return t.to(torch.float32)

    def locate(self, path: Path, t: Tensor) -> Tensor:
        """The coordinate u of the times t: the inverse of `at`; float64."""
        top, bottom = path.t_max ** (1 / self.rho), path.t_min ** (1 / self.rho)
        return (t.double() ** (1 / self.rho) - top) / (bottom - top)

    def between(self, path: Path, t: Tensor, r: Tensor, share: float) -> Tensor:
        """The times that lie this share of the way from t to r in the coordinate; float32."""
        start, end = self.locate(path, t), self.locate(path, r)
        return self.at(path, start + (end - start) * share)

    def times(self, path: Path, num: int) -> Tensor:
        """`num` decreasing times from t_max to t_min, both included; float32 [num]."""
        if num < 2:
            raise ValueError(f"a grid needs at least 2 points, found {num}")
        return self.at(path, torch.linspace(0, 1, num, dtype=torch.float64))


# --- curricula: the number of grid points as a pure function of progress ---------------------------------------------


class Curriculum(Protocol):
    """Number of grid points N at `progress` in [0, 1] of the training."""

    kind: ClassVar[str]

    def __call__(self, progress: float) -> int: ...


@dataclass(frozen=True)
class Constant:
    """The same N throughout: consistency distillation (18 on CIFAR-10, 40 on ImageNet-64 and LSUN)."""

    kind: ClassVar[str] = "constant"
    num: int = 18

    def __post_init__(self) -> None:
        if self.num < 2:
            raise ValueError(f"a grid needs at least 2 points, found num={self.num}")

    def __call__(self, progress: float) -> int:
        return self.num


@dataclass(frozen=True)
class Progressive:
    """N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1. Song et al. (2023), appendix C.

    Progress is held at 1, so N never grows past s1 + 1.
    """

    kind: ClassVar[str] = "progressive"
    s0: int = 2
    s1: int = 150

    def __post_init__(self) -> None:
        if not 2 <= self.s0 <= self.s1:
            raise ValueError(f"the curriculum needs 2 <= s0 <= s1, found s0={self.s0}, s1={self.s1}")

    def __call__(self, progress: float) -> int:
        share = min(max(progress, 0.0), 1.0)
        scales = math.ceil(math.sqrt(share * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1)
        return max(scales, 1) + 1


# --- samplers of training times --------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Start t, neighbour r and landing s of every sample of a batch, t >= r >= s; float32 [B] each."""

    t: Tensor
    r: Tensor
    s: Tensor


class TimeSampler(Protocol):
    """Draws the times of a batch."""

    kind: ClassVar[str]

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times: ...


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) ~ N(mean, std^2), on the diagonal t = r = s. EDM: -1.2 and 1.2.

    One rule for all paths: on `Linear` it is flow matching's logit-normal t, on `Trig` sCM's proposal.
    """

    kind: ClassVar[str] = "log_normal"
    mean: float = -1.2
    std: float = 1.2

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        gauss = torch.randn(n, generator=generator, device=generator.device)
        t = path.time((self.mean + self.std * gauss).exp())
        return Times(t, t, t)


@dataclass(frozen=True)
class Adjacent:
    """Neighbours on a grid, landing at t_min: i ~ U{0..N-2}, t = t_i, r = t_{i+1}. Song et al. (2023), alg. 2 and 3."""

    kind: ClassVar[str] = "adjacent"
    grid: Karras = field(default_factory=Karras)
    curriculum: Constant | Progressive = field(default_factory=Constant)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        num = self.curriculum(progress)
        index = torch.randint(num - 1, (n,), generator=generator, device=generator.device)
        return self.neighbours(path, index, num)

    def neighbours(self, path: Path, index: Tensor, num: int) -> Times:
        """The times of given grid indices (0 is t_max) on a grid of `num` points."""
        grid = self.grid.times(path, num).to(index.device)
        t = grid[index]
        return Times(t, grid[index + 1], torch.full_like(t, path.t_min))


GRIDS: dict[str, type] = {"karras": Karras}
CURRICULA: dict[str, type] = {"constant": Constant, "progressive": Progressive}
TIME_SAMPLERS: dict[str, type] = {"log_normal": LogNormal, "adjacent": Adjacent}
