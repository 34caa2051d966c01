"""What the tests of the objectives share: Gaussian data, for which every path has an exact flow map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from cmtool.flow import VE, Linear, Trig
from cmtool.times import Times
from cmtool.training.trajectory import Batch
from tests.oracles import GaussianOracle

PATHS = [VE(), Linear(), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
# Shorter ones, on which a few nodes of a quadrature resolve everything.
SHORT = [VE(0.002, 2.0), Linear(0.0, 0.7), Trig(math.atan(0.002 / 0.5), math.atan(2.0 / 0.5))]
short = pytest.mark.parametrize("path", SHORT, ids=lambda path: path.kind)

MEAN, STD = 0.3, 0.5
GAUSSIAN = [(1.0, MEAN, STD)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def gaussian_batch(n=256, shape=(1, 2, 2)):
    return Batch(MEAN + STD * normal(n, *shape), None, normal(n, *shape, seed=1))


def inside(path, *shares):
    """Times this share of the way from t_min to t_max; float64."""
    return path.t_min + torch.tensor(shares, dtype=torch.float64) * (path.t_max - path.t_min)


@dataclass(frozen=True)
class Exact:
    """A solver without error: the ODE of Gaussian data."""

    kind: ClassVar[str] = "exact"
    order: ClassVar[int] = 99
    calls: ClassVar[int] = 1
    mean: float = MEAN
    std: float = STD

    def step(self, denoise, path, x, t, s):
        return GaussianOracle(path, self.mean, self.std).jump(x, t.double(), s.double())


@dataclass(frozen=True)
class Wide:
    """A sampler's times in float64; what is one tensor stays one."""

    times: object

    def __call__(self, path, n, progress, generator) -> Times:
        times = self.times(path, n, progress, generator)
        made = {id(time): time.double() for time in times}
        return Times(*(made[id(time)] for time in times))


class Shifted(nn.Module):
    """A network plus a tensor of zeros, whose gradient is that of the loss with respect to the output."""

    def __init__(self, network, shape):
        super().__init__()
        self.network, self.config = network, getattr(network, "config", None)
        self.shift = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x, noise, **rest):
        return self.network(x, noise, **rest) + self.shift
