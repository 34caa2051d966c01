"""The right time points for a few network calls.

The greedy ternary search of Song et al. (2023), arXiv:2303.01469, section 3. The first call is at the largest time.
Then one time is added after the others, the one with the least distance of the samples from the data, found by ternary
search on a grid: each round compares two points and drops the third of the interval beyond the worse one. That assumes
a single valley; a measured distance has noise besides, so the answer is the best of all points that were tried, and a
dense scan can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

Score = Callable[[tuple[float, ...]], float]


class Tried(NamedTuple):
    """One measurement."""

    times: tuple[float, ...]  # of all calls
    place: int  # of the last time on the grid
    value: float
    scanned: bool  # by the dense scan, not by the search


class Found(NamedTuple):
    """The times for one number of calls."""

    times: tuple[float, ...]
    value: float
    tried: list[Tried]  # by place


def search(
    score: Score, grid: Tensor, steps: int, *, scan: bool = False, tell: Callable[[Tried], None] = lambda one: None
) -> Iterator[Found]:
    """The best times for 2, 3, ... `steps` calls; those for one more begin with those before.

    Args:
        score: what is to be small, of decreasing times; always the same for the same times.
        grid: decreasing times, the first that of the first call.
        scan: measure all points of the grid, too. The best of all is taken.
        tell: of each measurement as it is made.
    Raises:
        ValueError: for a grid with too few points.
    """
    points = [float(t) for t in grid]
    if len(points) < steps:
        raise ValueError(f"{len(points)} points leave no choice for {steps} calls")
    best = Tried((points[0],), 0, float("nan"), False)
    for later in range(steps - 2, -1, -1):
        added = _Added(score, points, best.times, tell)
        left, right = best.place + 1, len(points) - 1 - later  # there are points left for the later calls
        added.narrow(left, right)
        for place in range(left, right + 1) if scan else ():
            added.value(place, scanned=True)
        best = min(added.tried.values(), key=lambda one: one.value)
        yield Found(best.times, best.value, [added.tried[place] for place in sorted(added.tried)])


class _Added:
    """The search for one more time."""

    def __init__(
        self, score: Score, points: list[float], before: tuple[float, ...], tell: Callable[[Tried], None]
    ) -> None:
        self.score, self.points, self.before, self.tell = score, points, before, tell
        self.tried: dict[int, Tried] = {}

    def value(self, place: int, *, scanned: bool = False) -> float:
        """The score with this time added, measured once."""
        if place not in self.tried:
            times = (*self.before, self.points[place])
            self.tried[place] = Tried(times, place, self.score(times), scanned)
            self.tell(self.tried[place])
        return self.tried[place].value

    def narrow(self, left: int, right: int) -> None:
        """Ternary search from `left` to `right`, both included."""
        while right - left >= 3:
            third = (right - left) // 3
            one, other = left + third, right - third
            if self.value(one) < self.value(other):
                right = other
            else:
                left = one
        for place in range(left, right + 1):
            self.value(place)
