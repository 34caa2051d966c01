"""Expectations without sampling: batches whose samples are quadrature nodes, and times that are given.

An objective takes the mean over its batch; with the nodes of a Gauss-Hermite rule as data and noise, and the rule's
weights as the objective's weighting, that mean is an expectation under the data and the noise, exact to many digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmtool.times import Times
from cmtool.training.trajectory import Batch


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(z), z ~ N(0, 1), for smooth f; float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the integral over [0, 1] of smooth f; float64."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@dataclass(frozen=True)
class Given:
    """A time sampler that returns the times it was made with."""

    t: Tensor
    r: Tensor
    s: Tensor

    def __call__(self, path, n, progress, generator) -> Times:
        assert n == len(self.t)
        return Times(self.t, self.r, self.s)


@dataclass(frozen=True)
class Rule:
    """A weighting that turns the mean over the batch into the sum of a quadrature rule, on top of another one."""

    shares: Tensor
    weight: object = None

    def __call__(self, path, times: Times) -> Tensor:
        shares = self.shares * len(self.shares)
        return shares if self.weight is None else shares * self.weight(path, times)


def expectation(path, data, t, r=None, n=40, s=None, shares=None, weight=None) -> tuple[Batch, Given, Rule]:
    """Batch, times and weights for E over the data, the noise and the times (t, r, s).

    Args:
        data: [(share, mean, std)] of a mixture of Gaussians; one component for a Gaussian.
        t, r, s: times, float64 [k]; r defaults to t, s to t_min.
        shares: how much each of the k counts; all alike by default.
        weight: a weighting to go with it.
    """
    z, w = hermite(n)
    x0 = torch.cat([mean + std * z for _, mean, std in data])
    wx = torch.cat([share * w for share, _, _ in data])
    pairs = torch.arange(len(t))
    pair, i, j = (
        index.flatten() for index in torch.meshgrid(pairs, torch.arange(len(x0)), torch.arange(n), indexing="ij")
    )
    batch = Batch(x0[i][:, None, None, None], None, z[j][:, None, None, None])
    r = t if r is None else r
    s = torch.full_like(t, path.t_min) if s is None else s
    times = Given(t[pair], r[pair], s[pair])
    shares = torch.full_like(t, 1 / len(t)) if shares is None else shares
    return batch, times, Rule(shares[pair] * wx[i] * w[j], weight)
