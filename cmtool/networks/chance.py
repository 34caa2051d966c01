"""Which units a network drops: decided by seeds, one a sample, so that passes can share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cmtool.networks import native


class Chance:
    """Where the network's random decisions come from: a seed a sample, and how many decisions were made so far."""

    def __init__(self, seeds: Tensor, made: int = 0) -> None:
        self.seeds, self.made = seeds, made


_chance: Chance | None = None


@contextmanager
def seeded(seeds: Tensor | None) -> Iterator[None]:
    """Let the seeds decide what a network drops: the same seeds, the same units, whatever the batch and the device.

    Two passes under the same seeds share their dropout without a generator's state being copied or waited for.

    Args:
        seeds: int64 [B], one a sample, each at least 0; None leaves it to torch's global generator, as it is without.
    """
    with entered(None if seeds is None else Chance(seeds)):
        yield


def current_chance() -> Chance | None:
    """What `seeded` has set; None outside of it."""
    return _chance


@contextmanager
def entered(chance: Chance | None) -> Iterator[None]:
    """Let random decisions come from there; they are counted there too."""
    global _chance
    before, _chance = _chance, chance
    try:
        yield
    finally:
        _chance = before


def keys(x: Tensor) -> Tensor:
    """A number below 2^32 for each sample of x and each decision that is made in a pass; int64 [B]."""
    chance = _chance or Chance(torch.randint(2**62, (len(x),), device=x.device))
    chance.made += 1
    # A batch may hold its samples several times over, labelled and unlabelled.
    seeds = chance.seeds.to(x.device).repeat(len(x) // len(chance.seeds))
    return mixed((seeds + 0x85EBCA6B * chance.made) & _32_BITS, seeds >> 31)


_32_BITS = 2**32 - 1


def mixed(entry: Tensor, key: Tensor) -> Tensor:
    """A well mixed number below 2^32 from two; int64. `mixed` in native.cpp is the same function."""
    h = ((entry * 0x9E3779B1) & _32_BITS) ^ (key & _32_BITS)
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _32_BITS
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _32_BITS
    return h ^ (h >> 16)


def threshold(share: float) -> tuple[int, float]:
    """The numbers below which an entry is dropped, and what the others are multiplied with."""
    return round(share * 2**32), 1 / (1 - share)


def mask(like: Tensor, keys: Tensor, how: native.Shape) -> Tensor:
    """What the entries of a tensor [B, ...] are multiplied with: 0 or 1 / (1 - share)."""
    batch, *rest = like.shape
    entry = torch.arange(like[0].numel(), device=like.device)
    kept = (mixed(entry, keys[:, None]) >= how.threshold).to(like.dtype) * how.grown
    if not rest[1:]:
        return kept.reshape(batch, *rest)
    # Entries are numbered channel by channel within a pixel, as they lie in memory on a CPU.
    return kept.reshape(batch, *rest[1:], rest[0]).movedim(-1, 1)


def drop(x: Tensor, share: float) -> Tensor:
    """Dropout: a `share` of the entries zero, the others scaled up; which ones, `seeded` decides."""
    if not share:
        return x
    return x * mask(x, keys(x), native.Shape(1, 0.0, False, *threshold(share)))
