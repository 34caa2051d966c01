"""Where on the path: grids for solving, curricula for how fine they are, and samplers of training times.

A grid is a coordinate u on the path, 0 at t_max and 1 at t_min: spacing, index and sub-step are all the same map.
Samplers of times come in two sorts. A *start* is a law of t alone, on the diagonal t = r = s; a *pairing* adds the
neighbour r and the landing s, and keeps every time within the path. Laws are laws of the noise-to-signal ratio
sigma / alpha (EDM's sigma), which the path turns into its own time: one law serves all paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool.flow.path import Path


def _wide(device: torch.device) -> torch.dtype:
    """The widest floating type of a device: float64 but on Apple's, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


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
        t = (top + u.to(_wide(u.device)) * (bottom - top)) ** self.rho
        # The ends are the path's own to the last bit: f(x, t_min) = x must not miss by a rounding.
        t = torch.where(u <= 0, path.t_max, torch.where(u >= 1, path.t_min, t))
        return t.to(torch.float32)

    def locate(self, path: Path, t: Tensor) -> Tensor:
        """The coordinate u of the times t: the inverse of `at`; float64."""
        top, bottom = path.t_max ** (1 / self.rho), path.t_min ** (1 / self.rho)
        return (t.to(_wide(t.device)) ** (1 / self.rho) - top) / (bottom - top)

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


def _done(progress: float, parts: float) -> float:
    """How many of `parts` equal parts are done; an end reached but for the rounding of step / K counts as reached."""
    done = min(max(progress, 0.0), 1.0) * parts
    return float(round(done)) if abs(done - round(done)) < 1e-9 else done


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


@dataclass(frozen=True)
class Doubling:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1 with K' = K / (log2 floor(s1/s0) + 1).

    Song and Dhariwal (2023), arXiv:2310.14189, iCT: s0 = 10, s1 = 1280, so 11, 21, 41, ..., 1281, an eighth of the
    training each.
    """

    kind: ClassVar[str] = "doubling"
    s0: int = 10
    s1: int = 1280

    def __post_init__(self) -> None:
        if not 1 <= self.s0 <= self.s1:
            raise ValueError(f"the curriculum needs 1 <= s0 <= s1, found s0={self.s0}, s1={self.s1}")

    def __call__(self, progress: float) -> int:
        stages = math.log2(self.s1 // self.s0) + 1
        return min(self.s0 * 2 ** math.floor(_done(progress, stages)), self.s1) + 1


@dataclass(frozen=True)
class Halving:
    """Stages of start, start / 2, ..., end sampling steps (one grid point more); 2 and 1 steps last twice as long.

    Progressive distillation, Salimans and Ho (2022), arXiv:2202.00512, with the lengths of OpenAI's consistency_models:
    from 4096 steps, 50,000 iterations a stage and 100,000 for each of the last two, 750,000 in all.
    """

    kind: ClassVar[str] = "halving"
    start: int = 4096
    end: int = 1

    def __post_init__(self) -> None:
        for steps in (self.start, self.end):
            if steps < 1 or steps & (steps - 1):
                raise ValueError(f"halving goes from one power of two to another, found {self.start} to {self.end}")
        if self.end > self.start:
            raise ValueError(f"halving goes down, found start={self.start}, end={self.end}")

    def stage(self, progress: float) -> tuple[int, float]:
        """Index of the stage, 0 at first, and the share of it that is done, in [0, 1]."""
        count = (self.start // self.end).bit_length()
        lengths = [2 if self.start >> index <= 2 else 1 for index in range(count)]
        done = _done(progress, sum(lengths))
        for index, length in enumerate(lengths[:-1]):
            if done < length:
                return index, done / length
            done -= length
        return count - 1, done / lengths[-1]

    def __call__(self, progress: float) -> int:
        return (self.start >> self.stage(progress)[0]) + 1


AnyCurriculum = Constant | Progressive | Doubling | Halving


# --- index laws: which pair of neighbours on a grid -------------------------------------------------------------------


class IndexLaw(Protocol):
    """Draws indices i in 0..N-2 of a decreasing grid `points` [N]; int64 [n]."""

    kind: ClassVar[str]

    def __call__(self, path: Path, points: Tensor, n: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class UniformIndex:
    """Every pair equally often. Song et al. (2023), algorithms 2 and 3."""

    kind: ClassVar[str] = "uniform_index"

    def __call__(self, path: Path, points: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(points) - 1, (n,), generator=generator, device=generator.device)


@dataclass(frozen=True)
class LogNormalIndex:
    """A pair as often as a log-normal noise-to-signal ratio falls between its two points.

    p(i) ~ erf((ln t_i - mean) / (sqrt2 std)) - erf((ln t_{i+1} - mean) / (sqrt2 std)). Song and Dhariwal (2023),
    arXiv:2310.14189, iCT: mean -1.1, std 2.0.
    """

    kind: ClassVar[str] = "log_normal_index"
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        _check_spread(self.mean, self.std)

    def probabilities(self, path: Path, points: Tensor) -> Tensor:
        """p(i) of i = 0..N-2, which sum to 1; float64 [N-1].

        Raises:
            ValueError: where the law has nothing between the ends of the grid.
        """
        log = _ratios(path, points).log()  # -inf and inf at the ends of `Linear`: the error function takes them
        below = torch.special.erf((log - self.mean) / (math.sqrt(2) * self.std))
        mass = below[:-1] - below[1:]
        if not mass.sum() > 0:
            raise ValueError(f"a log-normal of mean={self.mean}, std={self.std} never falls on this path")
        return mass / mass.sum()

    def __call__(self, path: Path, points: Tensor, n: int, generator: torch.Generator) -> Tensor:
        u = _uniform(n, generator)
        heap = self.probabilities(path, points).cumsum(0).to(u)
        return torch.searchsorted(heap, u, right=True).clamp(max=len(points) - 2)


AnyIndex = UniformIndex | LogNormalIndex


# --- samplers of training times --------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Start t, neighbour r and landing s of every sample of a batch, t >= r >= s; float32 [B] each."""

    t: Tensor
    r: Tensor
    s: Tensor


class TimeSampler(Protocol):
    """Draws the times of a batch, float32 [n] on the generator's device."""

    kind: ClassVar[str]

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times: ...


# Ratios beyond 1 / _FINEST cannot be told from infinity by a float32 time of `Linear`, whose ratio has no other bound.
_FINEST = 2.0**-24
# The least distance from t_min, relative, of a time that must be above it: (x_t - x_s) / (t - s) keeps a few digits.
_MARGIN = 2.0**-8


def _check_spread(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"a log-normal needs a finite mean and a positive std, found mean={mean}, std={std}")


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    """U[0, 1), float64 where there is such; [n]."""
    return torch.rand(n, generator=generator, device=generator.device, dtype=_wide(generator.device))


def _ratios(path: Path, t: Tensor) -> Tensor:
    """Noise-to-signal ratios of float32 times, which may lie past an end by their rounding (pi / 2 on `Trig` does)."""
    return path.ratio(t.to(_wide(t.device)).clamp(path.t_min, path.t_max))


def _ratio(path: Path, t: float) -> float:
    return float(path.ratio(torch.tensor(t, dtype=torch.float64)))


def _time(path: Path, ratio: float) -> float:
    return float(path.time(torch.tensor(ratio, dtype=torch.float64)))


def _above_t_min(path: Path, t: Tensor) -> Tensor:
    """`t` held within the path and truly above t_min, for a start that must have somewhere to go."""
    return t.clamp(_time(path, max(_ratio(path, path.t_min) * (1 + _MARGIN), _FINEST)), path.t_max)


# Starts: t = r = s.


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) ~ N(mean, std^2), on the diagonal t = r = s. EDM: -1.2 and 1.2.

    One rule for all paths: on `Linear` it is flow matching's logit-normal t, on `Trig` sCM's proposal. As published it
    is not cut at the ends of the path; pairings cut it.
    """

    kind: ClassVar[str] = "log_normal"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_spread(self.mean, self.std)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        gauss = torch.randn(n, generator=generator, device=generator.device)
        t = path.time((self.mean + self.std * gauss).exp())
        return Times(t, t, t)


@dataclass(frozen=True)
class RhoUniform:
    """t^(1/rho) uniform between the ends, on the diagonal t = r = s. Song et al. (2023), appendix B as released.

    The theorems there ask for t uniform, which is Karras(rho=1); the released code draws with rho = 7.
    """

    kind: ClassVar[str] = "rho_uniform"
    grid: Karras = field(default_factory=Karras)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        t = self.grid.at(path, _uniform(n, generator))
        return Times(t, t, t)


@dataclass(frozen=True)
class LogStudentT:
    """ln(sigma / alpha) ~ loc + scale StudentT(df), cut to [low, the path's largest], on the diagonal t = r = s.

    Truncated consistency models, Lee et al. (2024), arXiv:2410.14895: df 0.01, loc 0, scale 0.2 and low 1, the ratio
    where the second stage takes over. `low` None is the path's smallest ratio. On `Linear`, whose ratios run from 0 to
    infinity, the cuts are where float32 times end.
    """

    kind: ClassVar[str] = "log_student_t"
    df: float = 0.01
    loc: float = 0.0
    scale: float = 0.2
    low: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.df < math.inf and math.isfinite(self.loc) and 0 < self.scale < math.inf):
            raise ValueError(f"df and scale must be positive, found df={self.df}, loc={self.loc}, scale={self.scale}")
        if self.low is not None and not 0 < self.low < math.inf:
            raise ValueError(f"the lower end of the ratio must be positive, found low={self.low}")

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        low, high = max(_ratio(path, path.t_min), _FINEST), min(_ratio(path, path.t_max), 1 / _FINEST)
        low = max(low, self.low or 0.0)
        if not low < high:
            raise ValueError(f"the path ends at the ratio {high:g}, not above low={self.low}")
        width = self.scale * math.sqrt(self.df)
        ends = [math.asinh((math.log(ratio) - self.loc) / width) for ratio in (low, high)]
        u = _uniform(n, generator)
        nodes, heap = (table.to(u) for table in _student_t(self.df, *ends))
        above = torch.searchsorted(heap, u, right=True).clamp(1, len(heap) - 1)
        share = (u - heap[above - 1]) / (heap[above] - heap[above - 1])
        v = torch.lerp(nodes[above - 1], nodes[above], share)
        t = path.time((self.loc + width * v.sinh()).exp()).to(torch.float32)
        return Times(t, t, t)


@lru_cache(maxsize=8)
def _student_t(df: float, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Nodes v and the distribution function of Student's t there, cut to [start, end]; z = sqrt(df) sinh(v).

    In v the density is cosh(v)^-df: smooth, and without overflow however heavy the tails are (df = 0.01 draws values
    of 1e100 and more where nothing cuts them).
    """
    v = torch.linspace(start, end, 2**14 + 1, dtype=torch.float64)
    size = v.abs()
    log = -df * (size + torch.log1p((-2 * size).exp()))  # log cosh, but for a constant
    density = (log - log.max()).exp()
    heap = torch.cat([torch.zeros(1, dtype=torch.float64), (density[1:] + density[:-1]).cumsum(0)])
    return v, heap / heap[-1]


@dataclass(frozen=True)
class Fixed:
    """Every t at one noise-to-signal ratio, on the diagonal t = r = s."""

    kind: ClassVar[str] = "fixed"
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"the ratio must be positive, found {self.ratio}")

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        t = torch.full((n,), _time(path, self.ratio), dtype=torch.float32, device=generator.device)
        return Times(t, t, t)


@dataclass(frozen=True)
class OnGrid:
    """The points of a grid but the last, t_min; on the diagonal t = r = s."""

    kind: ClassVar[str] = "on_grid"
    grid: Karras = field(default_factory=Karras)
    curriculum: AnyCurriculum = field(default_factory=Constant)
    index: AnyIndex = field(default_factory=UniformIndex)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        points = self.grid.times(path, self.curriculum(progress))
        t = points.to(generator.device)[self.index(path, points, n, generator)]
        return Times(t, t, t)


AnyStart = LogNormal | RhoUniform | LogStudentT | Fixed | OnGrid


# Pairings: t >= r >= s within the path. Times that are one by definition are one tensor, so that `is` tells.


@dataclass(frozen=True)
class Adjacent:
    """Neighbours on a grid, landing at t_min: t = t_i, r = t_{i+1}. Song et al. (2023), algorithms 2 and 3.

    `index` draws i: evenly, or as iCT does (`LogNormalIndex`).
    """

    kind: ClassVar[str] = "adjacent"
    grid: Karras = field(default_factory=Karras)
    curriculum: AnyCurriculum = field(default_factory=Constant)
    index: AnyIndex = field(default_factory=UniformIndex)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        num = self.curriculum(progress)
        index = self.index(path, self.grid.times(path, num), n, generator)
        return self.neighbours(path, index, num)

    def neighbours(self, path: Path, index: Tensor, num: int) -> Times:
        """The times of given grid indices (0 is t_max) on a grid of `num` points."""
        grid = self.grid.times(path, num).to(index.device)
        t = grid[index]
        return Times(t, grid[index + 1], torch.full_like(t, path.t_min))


@dataclass(frozen=True)
class Landing:
    """From a start straight to the data: r = s = t_min. Direct consistency models, arXiv:2411.08954."""

    kind: ClassVar[str] = "landing"
    start: AnyStart = field(default_factory=OnGrid)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        t = _above_t_min(path, self.start(path, n, progress, generator).t)
        s = torch.full_like(t, path.t_min)
        return Times(t, s, s)


@dataclass(frozen=True)
class Tangential:
    """The neighbour in the limit, r = t, landing at t_min: sCM and the continuous-time forms of CD and CT.

    sCM, Lu and Song (2024), arXiv:2410.11081, on CIFAR-10: LogNormal(-1.0, 1.4).
    """

    kind: ClassVar[str] = "tangential"
    start: AnyStart = field(default_factory=lambda: LogNormal(-1.0, 1.4))

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        t = _above_t_min(path, self.start(path, n, progress, generator).t)
        return Times(t, t, torch.full_like(t, path.t_min))


@dataclass(frozen=True)
class Mapped:
    """A neighbour that closes in on t by stages: r = t (1 - q^-(stage+1) (1 + k sigmoid(-b t))), landing at t_min.

    Easy consistency tuning, Geng et al. (2024), arXiv:2406.14548, with t the noise-to-signal ratio: LogNormal(-1.1,
    2.0), q = 2, k = 8, b = 1 and 8 stages of equal length, or q = 256 with one stage. r is held at t_min or above and
    always below t.
    """

    kind: ClassVar[str] = "mapped"
    start: AnyStart = field(default_factory=lambda: LogNormal(-1.1, 2.0))
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 8

    def __post_init__(self) -> None:
        if not (1 < self.q < math.inf and 0 <= self.k < math.inf and 0 <= self.b < math.inf and self.stages >= 1):
            found = f"q={self.q}, k={self.k}, b={self.b}, stages={self.stages}"
            raise ValueError(f"the mapping needs q > 1, k >= 0, b >= 0 and stages >= 1, found {found}")

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        t = _above_t_min(path, self.start(path, n, progress, generator).t)
        return Times(t, self.neighbour(path, t, progress), torch.full_like(t, path.t_min))

    def neighbour(self, path: Path, t: Tensor, progress: float) -> Tensor:
        """r of the times t > t_min; float32, the shape of `t`."""
        stage = min(math.floor(_done(progress, self.stages)), self.stages - 1)
        ratio = _ratios(path, t).clamp(max=1 / _FINEST)
        step = self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * ratio))
        r = path.time((ratio * (1 - step)).clamp_min(0)).to(torch.float32)
        # below t after rounding too; t_min is below every t
        return torch.minimum(r, t.nextafter(torch.full_like(t, -math.inf))).clamp_min(path.t_min)


@dataclass(frozen=True)
class NextGrid:
    """From a point of a grid to the next and no further, r = s: progressive distillation.

    The grid has the curriculum's sampling steps and one point more. Salimans and Ho (2022), arXiv:2202.00512.
    """

    kind: ClassVar[str] = "next_grid"
    curriculum: AnyCurriculum = field(default_factory=Halving)
    grid: Karras = field(default_factory=Karras)

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        points = self.grid.times(path, self.curriculum(progress))
        index = UniformIndex()(path, points, n, generator)
        points = points.to(generator.device)
        s = points[index + 1]
        return Times(points[index], s, s)


@dataclass(frozen=True)
class Dyadic:
    """Jumps of 2^-k of the way from t_max to t_min, k uniform in 0..levels-1, between multiples; r is half-way.

    Shortcut models, Frans et al. (2024), arXiv:2410.12557: 128 = 2^7 smallest steps are 7 levels, whose halves they
    are.
    """

    kind: ClassVar[str] = "dyadic"
    levels: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 16:
            raise ValueError(f"levels must be from 1 to 16, found {self.levels}")

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        level = torch.randint(self.levels, (n,), generator=generator, device=generator.device)
        size = 0.5 ** level.to(_wide(level.device))
        u = (_uniform(n, generator) / size).floor() * size  # a multiple of the jump: exact, as all dyadic numbers are
        line = Karras(1.0)
        return Times(line.at(path, u), line.at(path, u + size / 2), line.at(path, u + size))


@dataclass(frozen=True)
class Pair:
    """Two draws, t the larger and s the smaller, r = t; the first round(diagonal n) samples have s = t.

    MeanFlow, Geng et al. (2025), arXiv:2505.13447: logit-normal(-0.4, 1.0) on `Linear`, diagonal 0.75 in the released
    code.
    """

    kind: ClassVar[str] = "pair"
    first: AnyStart = field(default_factory=lambda: LogNormal(-0.4, 1.0))
    second: AnyStart = field(default_factory=lambda: LogNormal(-0.4, 1.0))
    diagonal: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.diagonal <= 1:
            raise ValueError(f"the share of the diagonal is from 0 to 1, found {self.diagonal}")

    def __call__(self, path: Path, n: int, progress: float, generator: torch.Generator) -> Times:
        first, second = (start(path, n, progress, generator).t for start in (self.first, self.second))
        t = _above_t_min(path, torch.maximum(first, second))
        s = torch.minimum(first, second).clamp(path.t_min, path.t_max)
        same = torch.arange(n, device=t.device) < round(self.diagonal * n)
        return Times(t, t, torch.where(same, t, s))


GRIDS: dict[str, type] = {"karras": Karras}
CURRICULA: dict[str, type] = {
    "constant": Constant,
    "progressive": Progressive,
    "doubling": Doubling,
    "halving": Halving,
}
INDEX_LAWS: dict[str, type] = {"uniform_index": UniformIndex, "log_normal_index": LogNormalIndex}
TIME_SAMPLERS: dict[str, type] = {
    "log_normal": LogNormal,
    "rho_uniform": RhoUniform,
    "log_student_t": LogStudentT,
    "fixed": Fixed,
    "on_grid": OnGrid,
    "adjacent": Adjacent,
    "landing": Landing,
    "tangential": Tangential,
    "mapped": Mapped,
    "next_grid": NextGrid,
    "dyadic": Dyadic,
    "pair": Pair,
}
