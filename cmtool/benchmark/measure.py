"""Measuring: the two sides' rounds in turn, the machine's ceiling, and whether both compute the same function."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmtool import networks
from cmtool.benchmark import ours, peer, shared
from cmtool.benchmark.rows import Row
from cmtool.benchmark.shared import Setup
from cmtool.benchmark.workers import Make, Round, Worker
from cmtool.errors import DependencyError, UserError
from cmtool.networks import ADMConfig
from cmtool.networks.configs import level_resolutions

TOLERANCE = 1e-4  # largest difference of the two networks, relative to the largest output
_CEILING_SECONDS = 0.5  # each of its rates is the best within this time
_WARMING = 8  # rounds on an accelerator: until kernels are chosen and graphs recorded, as for whoever goes on


@dataclass(frozen=True)
class Timing:
    """One side of a row.

    Args:
        seconds: of each round of `batch` images.
        memory: the most memory that it took, in bytes: weights, optimizer, activations; None if unknown.
    """

    batch: int
    seconds: tuple[float, ...]
    memory: int | None

    @property
    def rate(self) -> float:
        """Images a second, the median of the rounds."""
        return self.batch / statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median of the rounds' images a second."""
        rates = [self.batch / seconds for seconds in self.seconds]
        return (max(rates) - min(rates)) / statistics.median(rates)


@dataclass(frozen=True)
class Ceiling:
    """What the machine does of the arithmetic that the network is made of by torch's own operations, in FLOP/s.

    Args:
        dtype: of the numbers.
        trains: forward and backward; else forward.
        convolutions: rate of each 3x3 convolution of the network's own shapes, channels-last, by a name of it.
        matmul: rate of the matrix product that the middle level's convolution is, by itself.
        rate: of all these convolutions one after the other.
    """

    dtype: str
    trains: bool
    convolutions: dict[str, float]
    matmul: float
    rate: float

    def or_better(self, other: Ceiling) -> Ceiling:
        """The best of two measurements: whatever else the machine does can only slow them down."""
        return replace(
            self,
            convolutions={name: max(rate, other.convolutions[name]) for name, rate in self.convolutions.items()},
            matmul=max(self.matmul, other.matmul),
            rate=max(self.rate, other.rate),
        )


@dataclass(frozen=True)
class Result:
    """A measured row.

    Args:
        flops: of one network call for one image, forward.
        ceiling: FLOP/s of the machine at this kind of work, in our type.
    """

    row: Row
    flops: int
    ceiling: float
    ours: Timing
    peer: Timing | None

    @property
    def ratio(self) -> float | None:
        """Our images a second over the peer's."""
        return None if self.peer is None else self.ours.rate / self.peer.rate

    @property
    def memory_ratio(self) -> float | None:
        """Our peak memory over the peer's."""
        if self.peer is None or not self.ours.memory or not self.peer.memory:
            return None
        return self.ours.memory / self.peer.memory

    @property
    def share(self) -> float:
        """Our FLOP/s over the ceiling; what counts is in `Calls`. Above 1 where `networks.winograd` multiplies less."""
        return self.row.calls.passes * self.flops * self.ours.rate / self.ceiling


def count_flops(config: ADMConfig) -> int:
    """Floating-point operations of one forward pass for one image: two for each multiply-add."""
    with torch.device("meta"):
        network = networks.build(config)
        x = torch.empty(1, config.in_channels, config.resolution, config.resolution)
        # The fused attention kernels hide their two products from the counter.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            network(x, torch.zeros(1))
    return int(counter.get_total_flops())


def count_parameters(config: ADMConfig) -> int:
    """Parameters of the network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in networks.build(config).parameters())


def require_peer() -> None:
    """Fail early where the peer is not installed.

    Raises:
        DependencyError: there is no diffusers.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise DependencyError(
            "the benchmark compares with diffusers' UNet2DModel, and diffusers is not installed",
            "pip install diffusers, or measure cmtool alone with --no-peer",
        )


# --- the two networks ------------------------------------------------------------------------------------------------


def check(setup: Setup) -> float:
    """The largest difference of the two networks' outputs in float32 on a CPU, relative to the largest output.

    Raises:
        UserError: if they are not the same function.
    """
    with closing(Worker("the check of the networks", _check, setup, threads=setup.threads, returns=True)) as worker:
        difference: float = worker.round().value
    if not difference <= TOLERANCE:
        raise UserError(
            f"the two networks are not the same function: their outputs differ by {difference:.2g} of the largest, "
            f"more than {TOLERANCE:g}",
            "a comparison of speeds would mean nothing: use another version of diffusers, or --no-peer",
        )
    return difference


def _check(setup: Setup) -> Callable[[], float]:
    return lambda: compare(setup)


@torch.no_grad()
def compare(setup: Setup) -> float:
    """See `check`; in this process."""
    here = Setup(setup.config, batch=2)
    config = here.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, config.resolution, config.resolution, generator=generator)
    noise = torch.tensor([-0.7, 1.1])
    expected = peer.unet(here)(x, noise).sample
    found = shared.network(config).eval()(x.contiguous(memory_format=torch.channels_last), noise)
    return float((found - expected).abs().max() / expected.abs().max())


# --- rows ------------------------------------------------------------------------------------------------------------


class Side(Protocol):
    """Something whose rounds are timed."""

    def round(self) -> Round: ...

    def close(self) -> None: ...


class Here:
    """A side in this process, for accelerators: they tell by themselves how much memory was in use.

    What the other side holds meanwhile is taken off, so the sides are made and measured one after the other.
    """

    def __init__(self, make: Make, name: str, setup: Setup) -> None:
        self._device = torch.device(setup.device)
        self._memory: int | None = None
        before = self._allocated()
        self._job: Callable[[], Any] | None = make(name, setup)
        self._reset()
        for _ in range(_WARMING):
            self.round()
        if self._device.type == "cuda":
            self._memory = torch.cuda.max_memory_allocated(self._device) - before

    def round(self) -> Round:
        """Run the job once."""
        assert self._job is not None
        synchronize(self._device)
        start = time.perf_counter()
        self._job()
        synchronize(self._device)
        return Round(time.perf_counter() - start, self._memory)

    def close(self) -> None:
        """Give its memory back."""
        self._job = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(row: Row, setup: Setup, rounds: int, *, flops: int, peer_too: bool = True) -> Result:
    """Measure a row: a round of each side to warm up (more on an accelerator), then `rounds` of each in turn.

    Args:
        flops: see `Result`; its ceiling is not known here.
        peer_too: measure the peer.
    Raises:
        UserError: if a side fails.
    """
    makes = {"cmtool": ours.job, **({"the peer": peer.job} if peer_too else {})}
    found: dict[str, list[Round]] = {title: [] for title in makes}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for title, make in makes.items():
            sides[title] = stack.enter_context(closing(_side(f"row {row.name}, {title}", make, row, setup)))
            sides[title].round()
        for _ in range(rounds):
            for title, side in sides.items():
                found[title].append(side.round())
    timings = [
        Timing(setup.batch, tuple(one.seconds for one in found[title]), found[title][-1].memory) for title in makes
    ]
    return Result(row, flops, math.inf, timings[0], timings[1] if peer_too else None)


def _side(title: str, make: Make, row: Row, setup: Setup) -> Side:
    if setup.device == "cpu":
        return Worker(title, make, row.name, setup, threads=setup.threads)
    return Here(make, row.name, setup)


# --- the ceiling -----------------------------------------------------------------------------------------------------


def ceiling(setup: Setup, *, trains: bool) -> Ceiling:
    """The machine's rates at the network's own convolutions, in `setup.dtype`."""
    if setup.device != "cpu":
        return find_ceiling(setup, trains)
    with closing(Worker("the ceiling", _ceiling, setup, trains, threads=setup.threads, returns=True)) as worker:
        found: Ceiling = worker.round().value
    return found


def _ceiling(setup: Setup, trains: bool) -> Callable[[], Ceiling]:
    return lambda: find_ceiling(setup, trains)


def find_ceiling(setup: Setup, trains: bool) -> Ceiling:
    """See `ceiling`; in this process."""
    config, batch = setup.config, setup.batch
    sides = level_resolutions(config.resolution, config.channel_mult)
    levels = [(mult * config.channels, side) for mult, side in zip(config.channel_mult, sides, strict=True)]
    layout = {"dtype": getattr(torch, setup.dtype), "device": setup.device, "requires_grad": trains}
    passes = 3 if trains else 1
    rates, work, spent = {}, 0.0, 0.0
    for width, side in levels:
        x = torch.rand(batch, width, side, side, **layout).contiguous(memory_format=torch.channels_last)
        weight = torch.rand(width, width, 3, 3, **layout).contiguous(memory_format=torch.channels_last)
        flops = passes * 2 * 9 * width**2 * batch * side**2
        seconds = _fastest(lambda x, weight: F.conv2d(x, weight, padding=1), x, weight, setup.device)
        rates[f"{width}x{width} 3x3 at {side}x{side}"] = flops / seconds
        work, spent = work + flops, spent + seconds
    width, side = levels[len(levels) // 2]
    a = torch.rand(batch * side**2, 9 * width, **layout)
    b = torch.rand(9 * width, width, **layout)
    product = passes * 2 * a.numel() * width / _fastest(torch.matmul, a, b, setup.device)
    return Ceiling(setup.dtype, trains, rates, product, work / spent)


def _fastest(operation: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, device: str) -> float:
    """Seconds of the operation, with its backward pass where the inputs want gradients; the best of many times."""
    repeats = 1 if device == "cpu" else 20  # launches are not to be waited for one by one
    place, best, end = torch.device(device), float("inf"), 0.0
    upstream = torch.rand_like(operation(a, b).detach())  # laid out as the output is
    warm = True
    while warm or time.perf_counter() < end:
        synchronize(place)
        start = time.perf_counter()
        for _ in range(repeats):
            out = operation(a, b)
            if out.requires_grad:
                torch.autograd.grad(out, (a, b), upstream)
        synchronize(place)
        if warm:
            warm, end = False, time.perf_counter() + _CEILING_SECONDS
        else:
            best = min(best, (time.perf_counter() - start) / repeats)
    return best
