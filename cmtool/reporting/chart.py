"""Line charts as SVG text: no library, no script, readable on any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 40
# Colours that the colour-blind can tell apart: Okabe and Ito (2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


class Line(NamedTuple):
    """One line of a chart: points in rising order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over common axes.

    Args:
        title: above the chart. x, y: what the axes are.
        log_x, log_y: logarithmic axes; points that are not positive are left out.
        dots: mark the points.
    """

    lines: Sequence[Line]
    title: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    dots: bool = False

    def drawn(self) -> list[Line]:
        """What of the lines can be drawn."""
        able = [
            Line(one.name, [(a, b) for a, b in one.points if _drawable(a, self.log_x) and _drawable(b, self.log_y)])
            for one in self.lines
        ]
        return [line for line in able if line.points]


def svg(chart: Chart) -> str:
    """The chart as an SVG in a figure, with its legend."""
    title, drawn = chart.title, chart.drawn()
    if not drawn:
        return f'<p class="none">{escape(title)}: nothing to draw.</p>'
    across = _Axis([a for line in drawn for a, _ in line.points], chart.log_x, _LEFT, WIDTH - _RIGHT)
    up = _Axis([b for line in drawn for _, b in line.points], chart.log_y, HEIGHT - _BOTTOM, _TOP)
    parts: list[str] = []
    for value, place in up.ticks(5):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value, place in across.ticks(6):
        parts.append(f'<line class="grid" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" x1="{place:.1f}" x2="{place:.1f}"/>')
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>')
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x)}</text>')
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(chart.y)}</text>')
    for index, line in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        at = [(across.place(a), up.place(b)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        if chart.dots or len(at) == 1:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{colour}"/>' for a, b in at]
    legend = "".join(
        f'<span><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{escape(line.name)}</span>'
        for index, line in enumerate(drawn)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><h3>{escape(title)}</h3>{picture}<figcaption>{legend}</figcaption></figure>"


def _drawable(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


class _Axis:
    """From numbers to places between two ends of the picture."""

    def __init__(self, values: Sequence[float], logarithmic: bool, begin: float, end: float) -> None:
        self.logarithmic, self.begin, self.end = logarithmic, begin, end
        low, high = self._scale(min(values)), self._scale(max(values))
        room = 0.04 * (high - low) or 0.5 * (abs(low) or 1.0)
        self.low, self.high = low - room, high + room

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def place(self, value: float) -> float:
        return self.begin + (self._scale(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self, most: int) -> list[tuple[float, float]]:
        """Round numbers and their places."""
        values = self._decades(most) if self.logarithmic else _multiples(self.low, self.high, most)
        return [(value, self.place(value)) for value in values]

    def _decades(self, most: int) -> list[float]:
        """Powers of ten; over a short range 1, 2 and 5 times them, or round numbers if that is too few."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        every = max(1, math.ceil((self.high - self.low) / most))
        factors = (1, 2, 5) if self.high - self.low < most / 2.5 else (1,)
        found = [10.0**decade * factor for decade in decades if decade % every == 0 for factor in factors]
        found = [value for value in found if self.low <= math.log10(value) <= self.high]
        return found if len(found) > 1 else _multiples(10**self.low, 10**self.high, most)


def _multiples(low: float, high: float, most: int) -> list[float]:
    step = _round_step((high - low) / most)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_step(raw: float) -> float:
    """1, 2 or 5 times a power of ten, no less than `raw`."""
    power = 10 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))


def _number(value: float) -> str:
    """Short: 20k, 0.05, 1e-04."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.3g}"
