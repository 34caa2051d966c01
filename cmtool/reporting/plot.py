"""A scatter and line plot with nothing but Pillow: axes, ticks, a legend, labels that keep out of each other's way.

picture = plot([Series("cd", [(0.1, 0.05), (0.2, 0.09)], labels=["N = 10", "N = 18"])], Axis("error"), Axis("distance"))
picture.save("plot.png")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from cmtool.reporting.chart import Chart

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers differ besides.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#444444")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring")
INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"
FINE = 3  # drawn this much larger, then reduced: smooth edges


@dataclass(frozen=True)
class Axis:
    """What an axis shows; `low` and `high` widen it, never cut it."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one kind.

    Args:
        name: for the legend; an empty one stays out of it.
        labels: written beside the points, one each.
        cloud: the single runs behind the points, drawn small.
        line: join the points, in order.
        colour: of `COLOURS`, or any other; None takes the next one.
        marker: of `MARKERS`; None takes the next one, an empty one draws none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    cloud: Sequence[tuple[float, float]] = ()
    line: bool = False
    colour: str | None = None
    marker: str | None = None


Box = tuple[float, float, float, float]


class Scale:
    """Where a value lies between 0 and 1, and which values get a tick."""

    def __init__(self, axis: Axis, values: Sequence[float]) -> None:
        extra = [end for end in (axis.low, axis.high) if end is not None]
        values = [*values, *extra]
        if not values:
            raise ValueError("there is nothing to plot")
        if not all(map(math.isfinite, values)) or (axis.log and min(values) <= 0):
            raise ValueError(f"{axis.label}: a plot needs finite numbers, and positive ones for a logarithmic axis")
        self.log = axis.log
        low, high = self._of(min(values)), self._of(max(values))
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        self.low, self.high = low - room, high + room
        if not axis.log and low >= 0:
            self.low = 0.0 if low < 0.4 * high else max(self.low, 0.0)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return (self._of(value) - self.low) / (self.high - self.low)

    def ticks(self, most: int = 7) -> dict[float, str]:
        """Value to text."""
        values = self._decades(most) if self.log else self._even(most)
        return {value: _text(value) for value in values}

    def _even(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _decades(self, most: int) -> list[float]:
        """As many digits of each decade as fit; of a short span, even steps."""
        for digits in (range(1, 10), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            values = [digit * 10.0**power for power in decades for digit in digits]
            inside = [value for value in values if self.low <= math.log10(value) <= self.high]
            if len(inside) <= most:
                break
        if len(inside) >= 3:
            return inside
        plain = Scale(Axis(""), [10**self.low, 10**self.high])
        plain.low, plain.high = 10**self.low, 10**self.high
        return plain._even(most)


def _text(value: float) -> str:
    return f"{value:.6g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.0e}"


class Sheet:
    """The drawing, in the pixels of the finished picture; it is `FINE` times as large."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        font = ImageFont.load_default(size=size * FINE)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("plots need a Pillow built with FreeType")
        return font

    def measure(self, text: str, size: float) -> tuple[float, float]:
        """Width of the text and height of a line, whatever letters it has."""
        font = self.font(size)
        return font.getlength(text) / FINE, sum(font.getmetrics()) / FINE

    def text(self, at: tuple[float, float], text: str, size: float, colour: str = INK, anchor: str = "mm") -> None:
        self.draw.text((at[0] * FINE, at[1] * FINE), text, colour, self.font(size), anchor)

    def upright(self, at: tuple[float, float], text: str, size: float) -> None:
        """Text from bottom to top, centred."""
        width, height = (math.ceil(side * FINE) for side in self.measure(text, size))
        flat = Image.new("RGB", (width, height), PAPER)
        ImageDraw.Draw(flat).text((width / 2, height / 2), text, INK, self.font(size), "mm")
        turned = flat.rotate(90, expand=True)
        self.image.paste(turned, (round(at[0] * FINE - height / 2), round(at[1] * FINE - width / 2)))

    def line(self, a: tuple[float, float], b: tuple[float, float], colour: str, width: float = 1.0) -> None:
        self.draw.line([(x * FINE, y * FINE) for x, y in (a, b)], colour, round(width * FINE))

    def marker(self, at: tuple[float, float], marker: str, colour: str, radius: float) -> None:
        x, y, r = at[0] * FINE, at[1] * FINE, radius * FINE
        box = (x - r, y - r, x + r, y + r)
        if marker == "circle":
            self.draw.ellipse(box, colour)
        elif marker == "ring":
            self.draw.ellipse(box, None, colour, round(0.4 * r))
        elif marker == "square":
            self.draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), colour)
        elif marker == "triangle":
            self.draw.polygon([(x, y - 1.15 * r), (x - r, y + 0.75 * r), (x + r, y + 0.75 * r)], colour)
        elif marker == "diamond":
            self.draw.polygon([(x, y - 1.2 * r), (x + r, y), (x, y + 1.2 * r), (x - r, y)], colour)
        elif marker == "cross":
            for side in (-1, 1):
                ends = [(x - 0.8 * r, y - 0.8 * r * side), (x + 0.8 * r, y + 0.8 * r * side)]
                self.draw.line(ends, colour, round(0.5 * r))
        else:
            raise ValueError(f"there is no marker {marker!r}: one of {', '.join(MARKERS)}")

    def finished(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def picture(chart: Chart) -> Image.Image:
    """A report's chart."""
    lines = [
        Series(line.name, line.points, line=True, marker=None if chart.dots or len(line.points) == 1 else "")
        for line in chart.drawn()
    ]
    return plot(lines, Axis(chart.x, log=chart.log_x), Axis(chart.y, log=chart.log_y), title=chart.title)


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    title: str = "",
    size: tuple[int, int] = (900, 600),
) -> Image.Image:
    """The picture.

    Raises:
        ValueError: nothing to plot, numbers that are not finite, or none above 0 on a logarithmic axis.
    """
    every = [point for one in series for point in (*one.points, *one.cloud)]
    across = Scale(x, [point[0] for point in every])
    up = Scale(y, [point[1] for point in every])
    series = [one for one in _styled(series) if one.points or one.cloud]
    sheet = Sheet(size)

    top = 12.0
    if title:
        sheet.text((size[0] / 2, top + 10), title, 17)
        top += 30
    top = _legend(sheet, series, top) + 10
    left = 26 + max(sheet.measure(text, 13)[0] for text in up.ticks().values()) + 12
    frame = (left, top, size[0] - 20, size[1] - 56)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (
            frame[0] + across(point[0]) * (frame[2] - frame[0]),
            frame[3] - up(point[1]) * (frame[3] - frame[1]),
        )

    _axes(sheet, frame, across, up, x, y)
    taken: list[Box] = []  # what labels are to keep clear of
    for one in series:
        for a, b in pairwise(map(place, one.points if one.line else ())):
            sheet.line(a, b, one.colour or INK, 1.3)
            taken += _along(a, b)
    for one in series:
        for point in one.cloud:
            sheet.marker(place(point), "circle", _pale(one.colour or INK), 2.6)
    for one in series:
        for spot in map(place, one.points if one.marker else ()):
            sheet.marker(spot, one.marker or "", one.colour or INK, 6)
            taken.append(_around(spot, 12, 12))
    for one in series:
        for point, label in zip(one.points, one.labels, strict=False):
            taken.append(_label(sheet, frame, place(point), label, one.colour or INK, taken))
    return sheet.finished()


def _styled(series: Sequence[Series]) -> Iterator[Series]:
    """The series with their colours and markers."""
    for i, one in enumerate(series):
        colour = one.colour if one.colour is not None else COLOURS[i % len(COLOURS)]
        marker = one.marker if one.marker is not None else MARKERS[i % len(MARKERS)]
        yield Series(one.name, one.points, one.labels, one.cloud, one.line, colour, marker)


def _pale(colour: str) -> str:
    """Half-way to white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(channel + 255) // 2:02x}" for channel in channels)


def _legend(sheet: Sheet, series: Sequence[Series], top: float) -> float:
    """Names over the frame, where no point can be; returns where they end."""
    named = [one for one in series if one.name]
    rows: list[list[Series]] = []
    used = math.inf
    for one in named:
        width = 24 + sheet.measure(one.name, 14)[0] + 20
        if used + width > sheet.size[0] - 40:
            rows.append([])
            used = 0
        rows[-1].append(one)
        used += width
    for row in rows:
        at = (sheet.size[0] - sum(44 + sheet.measure(one.name, 14)[0] for one in row) + 20) / 2
        for one in row:
            if one.line:
                sheet.line((at - 3, top + 10), (at + 19, top + 10), one.colour or INK, 1.3)
            if one.marker:
                sheet.marker((at + 8, top + 10), one.marker, one.colour or INK, 6)
            sheet.text((at + 24, top + 10), one.name, 14, anchor="lm")
            at += 44 + sheet.measure(one.name, 14)[0]
        top += 22
    return top


def _axes(sheet: Sheet, frame: Box, across: Scale, up: Scale, x: Axis, y: Axis) -> None:
    left, top, right, bottom = frame
    for value, text in across.ticks().items():
        at = left + across(value) * (right - left)
        sheet.line((at, top), (at, bottom), FAINT)
        sheet.line((at, bottom), (at, bottom + 5), INK)
        sheet.text((at, bottom + 8), text, 13, anchor="ma")
    for value, text in up.ticks().items():
        at = bottom - up(value) * (bottom - top)
        sheet.line((left, at), (right, at), FAINT)
        sheet.line((left - 5, at), (left, at), INK)
        sheet.text((left - 8, at), text, 13, anchor="rm")
    for a, b in (((left, top), (left, bottom)), ((left, bottom), (right, bottom))):
        sheet.line(a, b, INK, 1.3)
    middle = ((left + right) / 2, (top + bottom) / 2)
    sheet.text((middle[0], sheet.size[1] - 18), x.label + (" (log)" if x.log else ""), 15)
    sheet.upright((16, middle[1]), y.label + (" (log)" if y.log else ""), 15)


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[Box]:
    """Small boxes that cover a line."""
    count = int(math.dist(a, b) / 4) + 1
    return [
        _around((a[0] + (b[0] - a[0]) * i / count, a[1] + (b[1] - a[1]) * i / count), 4, 4) for i in range(count + 1)
    ]


def _label(sheet: Sheet, frame: Box, spot: tuple[float, float], label: str, colour: str, taken: Sequence[Box]) -> Box:
    """Write a label where it covers least, nearest first; returns the room it takes."""
    width, height = sheet.measure(label, 12)
    best, least = (spot[0], spot[1]), math.inf
    for distance in (10, 15, 22, 30):
        for angle in (0, 180, 45, 315, 135, 225, 90, 270):
            dx, dy = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
            centre = (spot[0] + dx * (distance + width / 2), spot[1] + dy * (distance + height / 2 - 4))
            box = _around(centre, width, height)
            outside = _area(box) - _overlap(box, frame)
            cost = 4 * outside + sum(_overlap(box, other) for other in taken) + 2 * (distance - 10)
            if cost < least:
                best, least = centre, cost
    if math.dist(best, spot) > 14 + width / 2 + 6:
        sheet.line(spot, best, _pale(colour), 0.7)
    sheet.text(best, label, 12, colour)
    return _around(best, width, height)


def _around(centre: tuple[float, float], width: float, height: float) -> Box:
    return (centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
