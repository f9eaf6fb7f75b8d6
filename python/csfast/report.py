"""One self-contained HTML page: what selection and quantisation cost, and what they save.

Plots are drawn here as SVG; the page needs no script, no font and no network. Every text that
comes from outside is escaped.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from ._version import __version__
from .plan import write_atomic
from .types import TASKS

LINEAR = 0.002  # nats: below it the scale of losses is linear, as differences there are noise
_TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LABEL_HEIGHT = 14  # of one line of text in a plot, pixels
_COLOURS = 10  # classes s0 .. s9 of the page; further series repeat them
_FEW_BIT = ("ours-a", "ours-b", "ours-c", "ours-d")
_DASHED = {"oracle": True, "quantised": True}


@dataclass(frozen=True)
class Point:
    """One row of an ablation in a plot."""

    x: float  # fraction of the dense bytes
    y: float  # loss over dense, nats
    low: float  # of the 95 % interval; equal to y where there is none
    high: float
    title: str  # shown when pointed at


@dataclass(frozen=True)
class Series:
    """The rows of one method in a plot, by bytes."""

    name: str
    style: str  # class of its colour
    dashed: bool
    points: tuple[Point, ...]


def write_report(
    path: str | os.PathLike[str],
    *,
    ablation: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    demo: Mapping[str, Any] | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: Where to; replaced if it exists.
        ablation: What `evaluate.ablate` gives.
        evaluation: What `evaluate.evaluate` gives.
        demo: What `demo.run` gives.

    Raises:
        ValueError: There is nothing to show.
        OSError: The file cannot be written.
    """
    text = render(ablation=ablation, evaluation=evaluation, demo=demo)
    write_atomic(pathlib.Path(path), text.encode())


def render(
    *,
    ablation: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    demo: Mapping[str, Any] | None = None,
) -> str:
    """Give the page as text; the arguments are those of `write_report`."""
    if ablation is None and evaluation is None and demo is None:
        raise ValueError("[report] nothing to show: want an ablation, an evaluation or a demo.")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(signed=_signed, fixed=_fixed, share=_share, interval=_interval)
    template = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    given = {"ablation": None, "evaluation": None, "demo": demo, "version": __version__}
    if ablation is not None:
        given["ablation"] = _ablation(ablation)
    if evaluation is not None:
        given["evaluation"] = _evaluation(evaluation)
    return environment.from_string(template).render(given)


def findings(ablation: Mapping[str, Any]) -> list[str]:
    """Say in sentences what an ablation found, losses included.

    Args:
        ablation: What `evaluate.ablate` gives.

    Returns:
        One sentence for each number of bytes that was asked for, then one for each quantised row,
        then a count of which won.
    """
    said = [_selection_sentence(best) for best in ablation["best"]]
    rows = ablation["rows"]
    verdicts = [
        _quantised_sentence(row, rows)
        for row in sorted(rows, key=lambda row: float(row["bytes_fraction"]))
        if row["family"] == "quantised"
    ]
    said += [sentence for sentence, _ in verdicts]
    if verdicts:
        wins = sum(verdict == "quantisation" for _, verdict in verdicts)
        losses = sum(verdict == "selection" for _, verdict in verdicts)
        said.append(
            f"Of {len(verdicts)} quantised rows {wins} beat selecting 16-bit neurons by few bits "
            f"within their bytes, {losses} lose to it, and {len(verdicts) - wins - losses} cannot "
            "be told apart or have no rival."
        )
    return said


# What the template shows


def _ablation(ablation: Mapping[str, Any]) -> dict[str, Any]:
    """The plots, sentences and table of an ablation."""
    rows = ablation["rows"]
    series = _series(rows, None)
    tasks = [task for task in TASKS if task in ablation["dense"]]
    return {
        "plot": _plot(series, width=820, height=460, labels=True),
        "legend": [(s.name, s.style, s.dashed) for s in series],
        "tasks": [
            (
                task,
                ablation["dense"][task],
                _plot(_series(rows, task), width=300, height=230, labels=False),
            )
            for task in tasks
        ],
        "findings": findings(ablation),
        "notes": ablation["notes"],
        "task_names": tasks,
        "rows": sorted(rows, key=lambda row: (float(row["bytes_fraction"]), float(row["delta"]))),
        "documents": sum(ablation["documents"].values()),
        "tokens": sum(ablation["tokens"].values()),
        "sparse_tokens": sum(ablation["sparse_tokens"].values()),
        "seed": ablation["seed"],
        "model_hash": ablation["model_hash"],
    }


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The table and the chart of an evaluation."""
    entries = evaluation["tasks"].values()
    return {
        **evaluation,
        "chart": _bars(evaluation["density_per_layer"]),
        "total_tokens": sum(entry["tokens"] for entry in entries),
        "total_sparse": sum(entry["sparse_tokens"] for entry in entries),
    }


def _selection_sentence(best: Mapping[str, Any]) -> str:
    """How the few-bit rule compares with the best other rule at one number of bytes."""
    target = f"At {best['target']:.2f} of the dense bytes"
    if best["few_bit"] is None or best["other"] is None:
        lacking = "few-bit rule" if best["few_bit"] is None else "other rule"
        return f"{target} no {lacking} can be compared."
    pair = (
        f"{target} {best['few_bit']} loses {_signed(best['few_bit_delta'])} nats a token and the "
        f"best other rule, {best['other']}, {_signed(best['other_delta'])}"
    )
    if best["ratio"] is None:
        return f"{pair}."
    if best["ratio"] > 1:
        return f"{pair}: the other rule is better."
    return f"{pair}: {max(0.0, best['ratio']):.0%} of it."


def _quantised_sentence(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """How a quantised row compares with few-bit selection within its bytes, and who wins."""
    read = f"{row['method']} reads {row['bytes_fraction']:.2f} and loses {_signed(row['delta'])}"
    few_bit = [other for other in rows if other["family"] == "few-bit"]
    rivals = [
        other
        for other in few_bit
        # A hundredth more is the same number of bytes: selection meets its target to about that.
        if other["bytes_fraction"] <= row["bytes_fraction"] + 0.01
    ]
    if not rivals:
        beaten = [other for other in few_bit if row["ci95"][1] < other["ci95"][0]]
        if beaten:
            worse = max(beaten, key=lambda other: float(other["bytes_fraction"]))
            return (
                f"{read}; {worse['method']} reads more, {worse['bytes_fraction']:.2f}, and loses "
                f"more, {_signed(worse['delta'])}: quantisation wins."
            ), "quantisation"
        return f"{read}; no few-bit selection of 16-bit neurons gets by with so little.", "none"
    rival = min(rivals, key=lambda other: float(other["delta"]))
    against = (
        f"{read}; {rival['method']} at {rival['bytes_fraction']:.2f} loses "
        f"{_signed(rival['delta'])}"
    )
    if row["ci95"][1] < rival["ci95"][0]:
        return f"{against}: quantisation wins.", "quantisation"
    if rival["ci95"][1] < row["ci95"][0]:
        return f"{against}: selection wins.", "selection"
    return f"{against}: their intervals overlap.", "none"


def _series(rows: Sequence[Mapping[str, Any]], task: str | None) -> list[Series]:
    """The rows as lines, for the mean over tasks or for one task, in order of first mention."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        # All widths of plain rounding are one line.
        name = "round to nearest" if row["family"] == "quantised" else row["method"]
        by_method.setdefault(name, []).append(row)
    found = []
    n_ours = n_others = 0
    for name, members in by_method.items():
        family = members[0]["family"]
        if family == "few-bit":
            style = _FEW_BIT[n_ours % len(_FEW_BIT)]
            n_ours += 1
        elif family in _DASHED:
            style = family
        else:
            style = f"s{n_others % _COLOURS}"
            n_others += 1
        points = [_point(row, task) for row in members]
        points.sort(key=lambda point: point.x)
        found.append(Series(name, style, family in _DASHED, tuple(points)))
    return found


def _point(row: Mapping[str, Any], task: str | None) -> Point:
    """One row, for the mean or for one task."""
    y = row["delta"] if task is None else row["per_task"][task]
    low, high = row["ci95"] if task is None else row["per_task_ci95"][task]
    title = (
        f"{row['method']}: {_signed(y)} nats at {row['bytes_fraction']:.3f} of the bytes, "
        f"density {row['density']:.3f}"
    )
    return Point(row["bytes_fraction"], y, low, high, title)


# Drawing


def _plot(series: Sequence[Series], *, width: int, height: int, labels: bool) -> Markup:
    """Loss against bytes, the loss on a scale that is linear near zero and logarithmic above."""
    points = [point for s in series for point in s.points]
    left, right, top, bottom = (58, 150 if labels else 10, 20, 40)
    # Intervals below zero are cut off at the linear range: the scale is for losses.
    highest = max([point.y for point in points] + [LINEAR]) * 1.15
    lowest = min([point.y for point in points] + [0.0]) * 1.15
    x_low = math.floor(min(point.x for point in points) * 10) / 10
    x_high = max(x_low + 0.1, math.ceil(max(point.x for point in points) * 10) / 10)

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y: float) -> float:
        y = min(max(y, lowest), highest)
        part = (_bent(y) - _bent(lowest)) / (_bent(highest) - _bent(lowest))
        return height - bottom - part * (height - top - bottom)

    drawn = [_axes(at_x, at_y, x_low, x_high, lowest, highest, width - right, height - bottom)]
    for s in series:
        path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in s.points)
        drawn.append(
            Markup('<polyline class="line {}{}" points="{}"/>').format(
                s.style, " dashed" if s.dashed else "", path
            )
        )
        for point in s.points:
            x, y = at_x(point.x), at_y(point.y)
            if labels:
                whisker = Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
                ends = f"{at_y(point.low):.1f}", f"{at_y(point.high):.1f}"
                drawn.append(whisker.format(s.style, f"{x:.1f}", f"{x:.1f}", *ends))
            shape = _diamond(x, y, s.style) if s.style == "quantised" else _dot(x, y, s.style)
            drawn.append(Markup("<g>{}<title>{}</title></g>").format(shape, point.title))
    if labels:
        drawn.append(_labels(series, at_x, at_y, width - right + 12))
    return _svg(width, height, "Loss over dense against bytes read", drawn)


def _axes(
    at_x: Any,
    at_y: Any,
    x_low: float,
    x_high: float,
    lowest: float,
    highest: float,
    x_end: float,
    y_end: float,
) -> Markup:
    """Grid, ticks and titles of the axes."""
    drawn = []
    ticks = [0.0, *(t for t in _TICKS if t <= highest), *(-t for t in _TICKS if -t >= lowest)]
    last = math.inf
    for tick in sorted(ticks):
        y = at_y(tick)
        drawn.append(
            Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                "zero" if tick == 0 else "grid", f"{at_x(x_low):.1f}", x_end, f"{y:.1f}", f"{y:.1f}"
            )
        )
        if last - y >= _LABEL_HEIGHT:
            text = f"{tick:+g}" if tick else "0"
            drawn.append(_text(at_x(x_low) - 6, y + 4, text, "tick end"))
            last = y
    for tenth in range(round(x_low * 10), round(x_high * 10) + 1):
        x = at_x(tenth / 10)
        drawn.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                f"{x:.1f}", f"{x:.1f}", y_end, y_end + 4
            )
        )
        drawn.append(_text(x, y_end + 17, f"{tenth / 10:.1f}", "tick middle"))
    middle = (at_x(x_low) + x_end) / 2
    drawn.append(_text(middle, y_end + 34, "bytes read / dense 16-bit bytes", "axis middle"))
    drawn.append(_text(at_x(x_low) - 50, 10, "nats", "axis"))
    return Markup("").join(drawn)


def _labels(series: Sequence[Series], at_x: Any, at_y: Any, x: float) -> Markup:
    """Names beside the last point of every line, moved apart, each with a line to its point."""
    named = [(at_y(s.points[-1].y), s) for s in series if s.style != "quantised"]
    wanted = sorted(named, key=lambda pair: float(pair[0]))
    drawn = []
    places: list[float] = []
    for y, _ in wanted:
        places.append(max(y, places[-1] + _LABEL_HEIGHT) if places else y)
    # What was pushed below the last tick moves back up as one.
    overflow = max(0.0, places[-1] - at_y(-math.inf)) if places else 0.0
    for i in range(len(places) - 1, -1, -1):
        limit = places[i + 1] - _LABEL_HEIGHT if i + 1 < len(places) else places[i] - overflow
        places[i] = min(places[i], limit)
    for place, (y, s) in zip(places, wanted, strict=True):
        start = at_x(s.points[-1].x)
        drawn.append(
            Markup('<line class="leader {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                s.style, f"{start + 5:.1f}", f"{x - 3:.1f}", f"{y:.1f}", f"{place:.1f}"
            )
        )
        drawn.append(_text(x, place + 4, s.name, f"label {s.style}"))
    for s in series:
        if s.style == "quantised":
            for point in s.points:
                name = point.title.split(":", 1)[0].removeprefix("rtn-")
                where = at_x(point.x) + 8, at_y(point.y) - 5
                drawn.append(_text(*where, name, "label quantised"))
    return Markup("").join(drawn)


def _bars(densities: Sequence[float]) -> Markup:
    """Density of every layer as bars."""
    width, height, left, bottom, top = 820, 200, 40, 34, 10
    step = (width - left - 10) / len(densities)

    def at_y(density: float) -> float:
        return top + (1 - density) * (height - top - bottom)

    drawn = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at_y(tick)
        drawn.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                left, width - 10, f"{y:.1f}", f"{y:.1f}"
            )
        )
        drawn.append(_text(left - 6, y + 4, f"{tick:g}", "tick end"))
    every = -(-len(densities) // 32)  # labels that fit beside each other
    for layer, density in enumerate(densities):
        x = left + step * layer
        drawn.append(
            Markup(
                '<g><rect class="bar" x="{}" y="{}" width="{}" height="{}"/>'
                "<title>layer {}: {}</title></g>"
            ).format(
                f"{x + 0.1 * step:.1f}",
                f"{at_y(density):.1f}",
                f"{0.8 * step:.1f}",
                f"{at_y(0) - at_y(density):.1f}",
                layer,
                f"{density:.3f}",
            )
        )
        if layer % every == 0:
            drawn.append(_text(x + step / 2, height - bottom + 15, str(layer), "tick middle"))
    drawn.append(_text((left + width) / 2, height - 3, "layer", "axis middle"))
    return _svg(width, height, "Density of every layer", drawn)


def _svg(width: int, height: int, title: str, drawn: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("").join(drawn)
    )


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", style, text
    )


def _dot(x: float, y: float, style: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.5"/>').format(
        style, f"{x:.1f}", f"{y:.1f}"
    )


def _diamond(x: float, y: float, style: str) -> Markup:
    corners = f"{x:.1f},{y - 5:.1f} {x + 5:.1f},{y:.1f} {x:.1f},{y + 5:.1f} {x - 5:.1f},{y:.1f}"
    return Markup('<polygon class="dot {}" points="{}"/>').format(style, corners)


def _bent(y: float) -> float:
    """The scale of losses: linear within `LINEAR`, logarithmic beyond."""
    return math.copysign(math.log10(1 + abs(y) / LINEAR), y)


# Numbers


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(value: Sequence[float]) -> str:
    return f"{value[0]:+.4f} … {value[1]:+.4f}"
