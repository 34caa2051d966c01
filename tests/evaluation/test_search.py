"""The search for time points on scores whose least is known."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.evaluation.search import search

GRID = torch.linspace(80, 1, 40)


def valley(*least):
    """A score that is least at these times; the grid index counts, so that it is a valley in one, then in the other."""
    return lambda times: sum((at - want) ** 2 for at, want in zip(times[1:], least, strict=False))


@pytest.mark.parametrize("count", [4, 5, 17, 40])
def test_every_least_of_a_valley_is_found(count):
    """Also at both ends of the interval."""
    grid = torch.linspace(80, 1, count)
    for place in range(1, count):
        (found,) = search(valley(float(grid[place])), grid, 2)
        assert found.times == (80.0, float(grid[place]))
        assert found.value == 0
        assert len(found.tried) <= 2 * math.log(count, 1.5) + 3
        assert [one.place for one in found.tried] == sorted(one.place for one in found.tried)


def test_times_are_added_one_after_another():
    asked = []

    def score(times):
        asked.append(times)
        return valley(float(GRID[10]), float(GRID[25]), float(GRID[30]))(times)

    found = list(search(score, GRID, 4))
    assert [len(one.times) for one in found] == [2, 3, 4]
    assert found[2].times == tuple(float(GRID[place]) for place in (0, 10, 25, 30))
    assert found[1].times == found[2].times[:3]
    assert len(asked) == len(set(asked))  # nothing twice
    assert all(list(times) == sorted(times, reverse=True) for times in asked)


def test_points_are_left_for_the_calls_to_come():
    grid = torch.tensor([80.0, 10.0, 5.0, 1.0])
    found = list(search(valley(1.0, 1.0, 1.0), grid, 4))
    assert found[-1].times == (80.0, 10.0, 5.0, 1.0)
    with pytest.raises(ValueError, match="leave no choice"):
        list(search(valley(1.0), grid, 4 + 1))


def test_the_best_that_was_measured_is_taken_even_where_there_is_no_valley():
    """Noise sends a ternary search astray; its own measurements still count, and a scan misses nothing."""
    value = {float(t): v for t, v in zip(GRID, torch.rand(40, generator=torch.Generator().manual_seed(3)), strict=True)}

    def score(times):
        return float(value[times[-1]])

    (found,) = search(score, GRID, 2)
    assert found.value == min(one.value for one in found.tried)
    told = []
    (scanned,) = search(score, GRID, 2, scan=True, tell=told.append)
    assert scanned.value == min(float(v) for t, v in value.items() if t < 80)
    assert len(scanned.tried) == len(told) == 39
    assert {one.place for one in scanned.tried if not one.scanned} == {one.place for one in found.tried}
