"""Plots as SVG within a page: axes, lines with bands, bars, intervals and heat maps.

Pure functions from numbers to markup. Colours are classes of the page, so that a plot follows light
and dark; what a mark means is said in its title. Every text is escaped. Texts are placed by an
estimate of their width, wide enough for common fonts, and none covers another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

T = TypeVar("T")

LETTER = 7.0  # width of a letter of 12 pixels, pixels: the mean of a wide sans serif is 6.9
LINE = 15  # height of a line of such text
LINEAR = 0.002  # nats: below it a scale of losses is linear, as differences there are noise
WIDE, NARROW = 980, 336  # of a plot on a desk and on a telephone, pixels
HALF = 640  # of one that shares its row
DELTA = "loss over dense, nats"  # what axes of `losses` are labelled by
PALETTE = 10  # classes s0 .. s9 of the page
LINES = 8  # of a chart that shows all there are; more are hard to tell apart

_LOSSES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_MARK = 4.5  # half the size of a mark


Draw = Callable[[int, bool], Markup]  # (width, whether names stand at the right)


def parts(members: Sequence[T], most: int = LINES) -> list[Sequence[T]]:
    """Cut a sequence into as few runs of at most `most` as it takes, of about one length."""
    n = -(-len(members) // most)
    ends = [len(members) * i // n for i in range(n + 1)] if n else []
    return [members[start:end] for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels; `y` points down."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Say whether the two have a point in common that is on no edge."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Say whether the other one lies inside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to the length of an axis.

    Attributes:
        label: What is on it.
        low: Number at its start; smaller ones are drawn there.
        high: Number at its end, above `low`; larger ones are drawn there.
        kind: ``"linear"``; ``"log"``; or ``"bent"``: linear within `LINEAR`, logarithmic beyond.
        ticks: Numbers to mark, rising, with what is written there.
    """

    label: str
    low: float
    high: float
    kind: str
    ticks: tuple[tuple[float, str], ...]

    def part(self, value: float) -> float:
        """Give the place of a number: 0 at the start, 1 at the end."""
        start, end = self._bent(self.low), self._bent(self.high)
        if not end > start:  # nearer than numbers can tell
            return 0.5
        return (self._bent(min(max(value, self.low), self.high)) - start) / (end - start)

    def _bent(self, value: float) -> float:
        if self.kind == "log":
            return math.log(value)
        if self.kind == "bent":
            return math.copysign(math.log1p(abs(value) / LINEAR), value)
        return value


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Attributes:
        x: Where it is.
        y: Where it is.
        low: Of its interval; equal to `y` where there is none.
        high: Of its interval.
        title: Shown when pointed at.
        name: Written beside it, where there is room; may be empty.
        ring: Whether it stands out.
    """

    x: float
    y: float
    low: float
    high: float
    title: str
    name: str = ""
    ring: bool = False


@dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        name: What they are.
        style: Class of their colour.
        mark: Shape of their marks, a key of `MARKS`; ``""`` for none.
        points: In the order they are joined.
        dashed: Whether the line is.
        joined: Whether there is one.
        band: Whether intervals are joined to a band. Where not, each is a bar.
    """

    name: str
    style: str
    mark: str
    points: tuple[Point, ...]
    dashed: bool = False
    joined: bool = True
    band: bool = True


# Axes


def linear(label: str, low: float, high: float, *, whole: bool = False) -> Axis:
    """Give an axis from a round number to a round number; at `whole`, with ticks at whole ones."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # nothing that ticks could tell apart
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1.0, 2.0, 2.5, 5.0, 10.0) if f * unit >= raw * (1 - 1e-9))
    if whole:
        step = 1.0 if high - low <= 12 else max(1.0, float(math.ceil(step)))
        start, end = math.ceil(low), math.floor(high)
        ticks = [float(v) for v in range(start, end + 1, int(step))]
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [i * step for i in range(first, last + 1)]
        low, high = ticks[0], ticks[-1]
    return Axis(label, low, high, "linear", tuple((t, f"{t:.6g}") for t in ticks))


def logarithmic(label: str, low: float, high: float) -> Axis:
    """Give a logarithmic axis over positive numbers, a little longer than they reach."""
    if not high > low:
        low, high = low / 2, high * 2
    low, high = low / 1.15, high * 1.15
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    ticks = [d * 10.0**e for e in range(first, last + 1) for d in digits]
    kept = tuple((t, short(t)) for t in ticks if low <= t <= high)
    return Axis(label, low, high, "log", kept)


def losses(values: Iterable[float], label: str = DELTA) -> Axis:
    """Give an axis for differences of losses, from the least, or zero, to the largest."""
    members = [0.0, LINEAR, *values]
    low, high = min(members) * 1.15, max(members) * 1.15
    ticks = sorted([0.0, *(t for t in _LOSSES if t <= high), *(-t for t in _LOSSES if -t >= low)])
    return Axis(label, low, high, "bent", tuple((t, f"{t:+g}" if t else "0") for t in ticks))


def short(value: float) -> str:
    """Give a positive number in few letters: 17M for 17,000,000."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit * (1 - 1e-9):
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


# Charts


def chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    title: str,
    width: int,
    height: int,
    margin: bool,
) -> Markup:
    """Draw lines with their bands, marks and names.

    Args:
        lines: What to draw, the last on top.
        x: The axis along.
        y: The axis up.
        title: What a reader who cannot see it is told.
        width: In pixels.
        height: In pixels, at least; names at the right may need more.
        margin: Whether names of lines stand at the right of their last points.
    """
    named = list(_by_name(line for line in lines if line.points and margin))
    right = 14.0
    if named:
        # Names of models have more wide letters and digits than words: an eighth is added for them.
        right = 22 + 1.125 * LETTER * max(len(line.name) for line in named)
        height = max(height, LINE * len(named) + 70)
    left = 14 + LETTER * max([len(text) for _, text in y.ticks] + [2])
    area = Box(left, 24, width - right, height - 46)

    def at(point_x: float, point_y: float) -> tuple[float, float]:
        across = area.left + x.part(point_x) * (area.right - area.left)
        return across, area.bottom - y.part(point_y) * (area.bottom - area.top)

    drawn, taken = _frame(x, y, area, width)
    for line in lines:
        drawn.append(_band(line, at))
    for line in lines:
        if line.joined and len(line.points) > 1:
            drawn.append(_path(line, at))
    for line in lines:
        for point in line.points:
            drawn.append(_marked(line, point, at))
            across, up = at(point.x, point.y)
            taken.append(Box(across - _MARK, up - _MARK, across + _MARK, up + _MARK))
    drawn += _names(lines, at, area, taken, list(_along(lines, at)))
    drawn += _margin(named, at, area)
    return svg(width, height, title, drawn)


def figure(
    draw: Callable[[int, bool], Markup], lines: Sequence[Line], *, key: bool = True
) -> Markup:
    """Give a plot for wide windows and one for narrow ones, of which the page shows one.

    Args:
        draw: Gives the plot of a width, with or without names at the right.
        lines: What the key of the narrow plot names.
        key: Whether the narrow plot has one.
    """
    return Markup('<div class="wide">{}</div><div class="narrow">{}{}</div>').format(
        draw(WIDE, True), draw(NARROW, False), legend(lines) if key else ""
    )


def both(draw: Callable[[int], Markup]) -> Markup:
    """Give a plot that shares its row for wide windows, and one for narrow ones."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        draw(HALF), draw(NARROW)
    )


def legend(lines: Sequence[Line]) -> Markup:
    """Give the key of lines, once for every name."""
    entries = []
    for line in _by_name(lines):
        stroke = Markup('<line class="line {}" x1="0" x2="28" y1="7" y2="7"/>').format(
            classes(line.style, "dashed" if line.dashed else "")
        )
        entries.append(
            Markup('<span><svg viewBox="0 0 28 14" aria-hidden="true">{}{}</svg>{}</span>').format(
                stroke if line.joined else "", shape(line.mark, 14, 7, line.style), line.name
            )
        )
    return Markup('<div class="legend">{}</div>').format(Markup("").join(entries))


def heat(
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    title: str,
    width: int,
    low: float = 0.0,
    high: float = 1.0,
    cell: int = 22,
    numbers: bool = False,
    curve: Sequence[tuple[float, float]] = (),
) -> Markup:
    """Draw a table as a heat map, the first row at the top; the darker or brighter, the more.

    Args:
        values: A sequence for each row; None is left empty.
        rows: Names of the rows.
        columns: Names of the columns; where they do not fit, some are left out.
        row_label: What the rows are.
        column_label: What the columns are.
        title: What a reader who cannot see it is told.
        width: In pixels.
        low: Value of the faintest cell.
        high: Value of the strongest cell, above `low`.
        cell: Height of a row, pixels.
        numbers: Whether values are written in the cells, where they fit.
        curve: Points of a line on top, in columns from the left and rows from the top; a cell's
            middle is at a half. What lies outside is cut off.
    """
    shown = [clipped(name, round(0.5 * width / LETTER)) for name in rows]
    left = 12 + LETTER * max(len(name) for name in shown)
    area = Box(left, 22, width - 8, 22 + cell * len(rows))
    height = area.bottom + 40
    step = (area.right - area.left) / len(columns)
    written = numbers and step >= 4 * LETTER
    drawn = [_text(2, 13, row_label, "axis")]
    for i, row in enumerate(values):
        y = area.top + cell * i
        for j, value in enumerate(row):
            if value is None:
                continue
            strength = min(max((value - low) / (high - low), 0.0), 1.0)
            drawn.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" '
                    'fill-opacity="{:.2f}"><title>{}, {}: {:.3f}</title></rect>'
                ).format(
                    "veil" if written else "heat",
                    area.left + step * j,
                    y,
                    step - 0.5,
                    cell - 0.5,
                    strength * (0.5 if written else 1),
                    rows[i],
                    columns[j],
                    value,
                )
            )
            if written:
                text = f"{value:.2f}".replace("0.", ".")
                drawn.append(
                    _text(area.left + step * (j + 0.5), y + cell / 2 + 4, text, "number middle")
                )
        drawn.append(_text(left - 6, y + cell / 2 + 4, shown[i], "tick end"))
    last = -math.inf
    for j, name in enumerate(columns):
        middle, half = area.left + step * (j + 0.5), LETTER * len(name) / 2
        if middle - half > last + 4 and middle + half <= width:
            drawn.append(_text(middle, area.bottom + 15, name, "tick middle"))
            last = middle + half
    drawn.append(_text((area.left + area.right) / 2, height - 8, column_label, "axis middle"))
    drawn.append(
        Markup('<rect class="frame" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            area.left - 0.5, area.top - 0.5, area.right - area.left + 0.5, cell * len(rows) + 0.5
        )
    )
    inside = [
        (area.left + step * across, area.top + cell * down)
        for across, down in curve
        if 0 <= across <= len(columns) and 0 <= down <= len(rows)
    ]
    if len(inside) > 1:
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in inside)
        drawn.append(Markup('<polyline class="under" points="{}"/>').format(path))
        drawn.append(Markup('<polyline class="over" points="{}"/>').format(path))
    return svg(width, height, title, drawn)


def bars(values: Sequence[float], *, label: str, title: str, width: int) -> Markup:
    """Draw fractions from 0 to 1 as bars, numbered from 0."""
    axis = linear("", 0.0, 1.0)
    area = Box(38, 12, width - 8, 168)
    step = (area.right - area.left) / len(values)

    def up(value: float) -> float:
        return area.bottom - axis.part(value) * (area.bottom - area.top)

    drawn = []
    for tick, text in axis.ticks:
        drawn.append(_rule("grid", area.left, area.right, up(tick), up(tick)))
        drawn.append(_text(area.left - 6, up(tick) + 4, text, "tick end"))
    last = -math.inf
    for number, value in enumerate(values):
        start = area.left + step * number
        drawn.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                "<title>{} {}: {:.3f}</title></rect>"
            ).format(
                start + 0.1 * step, up(value), 0.8 * step, up(0) - up(value), label, number, value
            )
        )
        half = LETTER * len(str(number)) / 2
        if start + step / 2 - half > last + 4:
            drawn.append(_text(start + step / 2, area.bottom + 15, str(number), "tick middle"))
            last = start + step / 2 + half
    drawn.append(_text((area.left + area.right) / 2, area.bottom + 31, label, "axis middle"))
    return svg(width, area.bottom + 36, title, drawn)


@dataclass(frozen=True)
class Side:
    """One of two things that are compared.

    Attributes:
        name: What it is.
        style: Class of its colour.
        value: Its size, not negative.
        text: Its size in words.
    """

    name: str
    style: str
    value: float
    text: str


def sides(shown: Sequence[Side], *, title: str, width: int) -> Markup:
    """Draw sizes from 0 as bars that lie beneath each other, names at the left, words behind."""
    left = 12 + LETTER * max(len(side.name) for side in shown)
    right = width - 12 - LETTER * max(len(side.text) for side in shown)
    most = max([side.value for side in shown] + [1e-300])
    drawn = []
    for number, side in enumerate(shown):
        y = 4 + 32 * number
        length = max(side.value, 0.0) / most * (right - left)
        drawn.append(_text(left - 6, y + 17, side.name, "number end"))
        drawn.append(
            Markup(
                '<rect class="side {}" x="{:.1f}" y="{}" width="{:.1f}" height="24">'
                "<title>{}: {}</title></rect>"
            ).format(side.style, left, y, length, side.name, side.text)
        )
        drawn.append(_text(left + length + 6, y + 17, side.text, "number"))
    return svg(width, 32 * len(shown) + 4, title, drawn)


def differences(shown: Sequence[Point], axis: Axis, *, title: str, width: int) -> Markup:
    """Draw numbers with their intervals beneath each other, named at the left.

    Args:
        shown: What to draw, the first on top: `x` is the number, `low` to `high` its interval.
        axis: The scale along; a rule stands at zero if it is on it.
        title: What a reader who cannot see it is told.
        width: In pixels.
    """
    names = [clipped(point.name, round(0.4 * width / LETTER)) for point in shown]
    ends = LETTER * max(len(text) for _, text in axis.ticks) / 2
    area = Box(14 + LETTER * max(map(len, names)), 4, width - 4 - ends, 4 + 24 * len(shown))

    def across(value: float) -> float:
        return area.left + axis.part(value) * (area.right - area.left)

    drawn = []
    last = -math.inf
    for tick, text in axis.ticks:
        x, half = across(tick), LETTER * len(text) / 2
        drawn.append(_rule("zero" if tick == 0 else "grid", x, x, area.top, area.bottom))
        if x - half > last + 4:
            drawn.append(_text(x, area.bottom + 15, text, "tick middle"))
            last = x + half
    for number, (point, name) in enumerate(zip(shown, names, strict=True)):
        y = area.top + 24 * number + 12
        drawn.append(_text(area.left - 8, y + 4, name, "number end"))
        drawn.append(_rule("interval few-bit", across(point.low), across(point.high), y, y))
        drawn.append(shape("circle", across(point.x), y, "few-bit", point.title))
    drawn.append(_text((area.left + area.right) / 2, area.bottom + 33, axis.label, "axis middle"))
    return svg(width, area.bottom + 40, title, drawn)


def strip(
    values: Sequence[Sequence[float]],
    *,
    low: float,
    high: float,
    title: str,
    width: int,
    cell: int = 9,
) -> Markup:
    """Draw a heat map of many columns without texts, a sequence a row.

    Cells of one strength, a tenth, are one path, so that thousands take little room.

    Args:
        values: A sequence for each row.
        low: Value of the faintest cell.
        high: Value of the strongest cell, above `low`.
        title: What a reader who cannot see it is told.
        width: In pixels.
        cell: Height of a row, pixels.
    """
    step = width / max(len(row) for row in values)
    levels: dict[int, list[str]] = {}
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            level = round(10 * min(max((value - low) / (high - low), 0.0), 1.0))
            corner = f"M{step * j:.1f},{cell * i}h{step:.1f}v{cell - 1}h-{step:.1f}z"
            levels.setdefault(level, []).append(corner)
    drawn = [
        Markup('<path class="heat" fill-opacity="{:.1f}" d="{}"/>').format(
            level / 10, "".join(corners)
        )
        for level, corners in sorted(levels.items())
    ]
    return svg(width, cell * len(values), title, drawn)


def scale(low: float, high: float, label: str) -> Markup:
    """Give the key of a heat map: ten steps from the least to the most."""
    cells = Markup("").join(
        Markup('<rect class="heat" x="{}" y="0" width="16" height="12" fill-opacity="{}"/>').format(
            16 * i, f"{(i + 0.5) / 10:.2f}"
        )
        for i in range(10)
    )
    return Markup(
        '<div class="key"><span>{:g}</span><svg viewBox="0 0 160 12" aria-hidden="true">{}</svg>'
        "<span>{:g}</span> {}</div>"
    ).format(low, cells, high, label)


# Text


def clipped(text: str, most: int) -> str:
    """Give a text, or its start and dots where it has more than `most` letters."""
    return text if len(text) <= most else f"{text[: max(most - 1, 1)]}…"


def text_box(x: float, y: float, text: str, style: str) -> Box:
    """Estimate what a line of text covers; `style` holds its anchor among its classes."""
    width = LETTER * len(text)
    named = style.split()
    left = x - width if "end" in named else x - width / 2 if "middle" in named else x
    return Box(left, y - 11, left + width, y + 3)


def classes(*names: str) -> str:
    """Join names of classes, but for empty ones."""
    return " ".join(name for name in names if name)


def svg(width: float, height: float, title: str, drawn: Sequence[Markup]) -> Markup:
    """Wrap what was drawn; it grows with the page, but not much beyond its size."""
    frame = Markup(
        '<svg viewBox="0 0 {:g} {:g}" style="max-width:{:.0f}px" role="img" aria-label="{}">'
        "{}</svg>"
    )
    return frame.format(width, height, 1.25 * width, title, Markup("").join(drawn))


# Marks


def _circle(x: float, y: float) -> str:
    return f"M{x - 4:.1f},{y:.1f}a4,4 0 1 0 8,0a4,4 0 1 0 -8,0z"


def _square(x: float, y: float) -> str:
    return f"M{x - 3.6:.1f},{y - 3.6:.1f}h7.2v7.2h-7.2z"


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z"


def _triangle(x: float, y: float) -> str:
    return f"M{x:.1f},{y - 4.6:.1f}l4.6,8h-9.2z"


def _wedge(x: float, y: float) -> str:
    return f"M{x:.1f},{y + 4.6:.1f}l4.6,-8h-9.2z"


def _cross(x: float, y: float) -> str:
    return f"M{x - 1.6:.1f},{y - 4.6:.1f}h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z"


MARKS: dict[str, Callable[[float, float], str]] = {
    "circle": _circle,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "wedge": _wedge,
    "cross": _cross,
}


def palette(number: int) -> str:
    """Give the class of the colour of a line by its number; they repeat."""
    return f"s{number % PALETTE}"


def mark_of(number: int) -> str:
    """Give the mark of a line by its number, another pairing with colours in every round."""
    names = list(MARKS)
    return names[(number + number // PALETTE) % len(names)]


def shape(mark: str, x: float, y: float, style: str, title: str = "") -> Markup:
    """Draw a mark; one without a shape is drawn as nothing that can still be pointed at."""
    told = Markup("<title>{}</title>").format(title) if title else Markup("")
    if not mark:
        if not title:
            return Markup("")
        return Markup('<circle class="unseen" cx="{:.1f}" cy="{:.1f}" r="6">{}</circle>').format(
            x, y, told
        )
    return Markup('<path class="dot {}" d="{}">{}</path>').format(style, MARKS[mark](x, y), told)


# Parts of a chart

_At = Callable[[float, float], tuple[float, float]]


def _frame(x: Axis, y: Axis, area: Box, width: float) -> tuple[list[Markup], list[Box]]:
    """Grid, ticks and labels, and what the texts cover."""
    drawn: list[Markup] = []
    taken: list[Box] = []

    def write(across: float, down: float, text: str, style: str) -> None:
        drawn.append(_text(across, down, text, style))
        taken.append(text_box(across, down, text, style))

    write(2, 13, y.label, "axis")
    last = math.inf
    for tick, text in y.ticks:
        up = area.bottom - y.part(tick) * (area.bottom - area.top)
        style = "zero" if tick == 0 and y.kind == "bent" else "grid"
        drawn.append(_rule(style, area.left, area.right, up, up))
        if last - up >= LINE:
            write(area.left - 6, up + 4, text, "tick end")
            last = up
    right = -math.inf
    for tick, text in x.ticks:
        across = area.left + x.part(tick) * (area.right - area.left)
        drawn.append(_rule("grid", across, across, area.bottom, area.bottom + 4))
        half = LETTER * len(text) / 2
        if across - half > right + 4 and across + half <= width:
            write(across, area.bottom + 19, text, "tick middle")
            right = across + half
    write((area.left + area.right) / 2, area.bottom + 38, x.label, "axis middle")
    return drawn, taken


def _band(line: Line, at: _At) -> Markup:
    """The intervals of a line: a band, or a bar each."""
    with_interval = [p for p in line.points if p.low < p.high]
    if line.band and line.joined and len(line.points) > 1:
        if not with_interval:
            return Markup("")
        corners = [at(p.x, p.high) for p in line.points]
        corners += [at(p.x, p.low) for p in reversed(line.points)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in corners)
        return Markup('<polygon class="band {}" points="{}"/>').format(line.style, path)
    found = []
    for point in with_interval:
        (across, top), (_, bottom) = at(point.x, point.high), at(point.x, point.low)
        found.append(_rule(f"whisker {line.style}", across, across, top, bottom))
    return Markup("").join(found)


def _path(line: Line, at: _At) -> Markup:
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(p.x, p.y) for p in line.points))
    return Markup('<polyline class="line {}" points="{}"/>').format(
        classes(line.style, "dashed" if line.dashed else ""), corners
    )


def _marked(line: Line, point: Point, at: _At) -> Markup:
    across, down = at(point.x, point.y)
    found = shape(line.mark, across, down, line.style, point.title)
    if point.ring:
        ring = Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="7.5"/>')
        found = ring.format(across, down) + found
    return found


# Where a name may stand, from its point: pixels across and down, and its anchor.
_BESIDE = (
    (9, -6, ""),
    (-9, -6, "end"),
    (9, 14, ""),
    (-9, 14, "end"),
    (0, -11, "middle"),
    (0, 20, "middle"),
    (9, -20, ""),
    (-9, -20, "end"),
    (9, 28, ""),
    (-9, 28, "end"),
)


def _names(
    lines: Sequence[Line], at: _At, area: Box, taken: list[Box], strokes: Sequence[Box]
) -> list[Markup]:
    """Names of points, each where it covers nothing; those without room are left out.

    Points that stand out come first. A name covers a line only where it has no other place.
    """
    drawn = []
    wanted = [(line, point) for line in lines for point in line.points if point.name]
    for line, point in sorted(wanted, key=lambda pair: not pair[1].ring):
        across, down = at(point.x, point.y)
        places = []
        for dx, dy, anchor in _BESIDE:
            style = classes("label", line.style, anchor)
            text = text_box(across + dx, down + dy, point.name, style)
            box = Box(text.left - 1, text.top - 1, text.right + 1, text.bottom + 1)
            if area.holds(box) and not any(box.meets(other) for other in taken):
                places.append((sum(box.meets(stroke) for stroke in strokes), dx, dy, style, box))
        if places:
            _, dx, dy, style, box = min(places, key=lambda place: place[0])
            drawn.append(_text(across + dx, down + dy, point.name, style))
            taken.append(box)
    return drawn


def _along(lines: Iterable[Line], at: _At) -> Iterator[Box]:
    """Small boxes along the lines, for names to keep clear of."""
    for line in lines:
        if not line.joined:
            continue
        corners = [at(point.x, point.y) for point in line.points]
        for (x1, y1), (x2, y2) in itertools.pairwise(corners):
            n = max(1, round(math.hypot(x2 - x1, y2 - y1) / 6))
            for i in range(n + 1):
                x, y = x1 + (x2 - x1) * i / n, y1 + (y2 - y1) * i / n
                yield Box(x - 1, y - 1, x + 1, y + 1)


def _by_name(lines: Iterable[Line]) -> Iterable[Line]:
    """The first line of every name."""
    found: dict[str, Line] = {}
    for line in lines:
        found.setdefault(line.name, line)
    return found.values()


def _margin(lines: Sequence[Line], at: _At, area: Box) -> list[Markup]:
    """Names at the right of the last points, moved apart, each with a rule to its point."""
    ends = sorted(((*at(s.points[-1].x, s.points[-1].y), s) for s in lines), key=lambda e: e[1])
    places: list[float] = []
    for _, down, _ in ends:
        places.append(max(down, places[-1] + LINE) if places else max(down, area.top))
    # What was pushed below the axis moves back up, as one.
    limit = area.bottom
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], limit)
        limit = places[i] - LINE
    drawn = []
    x = area.right + 16
    for place, (across, down, line) in zip(places, ends, strict=True):
        drawn.append(_rule(f"leader {line.style}", across + 6, x - 4, down, place))
        drawn.append(_text(x, place + 4, line.name, f"label {line.style}"))
    return drawn


def _rule(style: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        style, x1, x2, y1, y2
    )


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, style, text)
