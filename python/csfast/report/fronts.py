"""The report's section on loss against bytes: families of rules, their fronts, what they find.

Perfect choices (oracles) know for nothing what others pay for: they are shown, never compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import plots, words
from .plots import HALF, NARROW, WIDE, Axis, Draw, Line, Point, mark_of, palette

_COMPRESSED = re.compile(r"(random|innovation|mmse|probe)-\d+")  # the rest of selection is not
_BYTES = "bytes read / dense 16-bit bytes"

# Family: name, class of its colour, mark, dashed. The last is drawn on top.
FAMILIES = {
    "oracle": ("perfect choice", "oracle", "triangle", True),
    "compressed": ("classical compressed sensing", "compressed", "cross", False),
    "selection": ("other rules that skip", "selection", "square", False),
    "quantised": ("quantised, read whole", "quantised", "diamond", True),
    "mixed": ("mixed precision (research)", "mixed", "wedge", False),
    "few-bit": ("csfast", "few-bit", "circle", False),
}
# What the first plot shows: of these the first that are there, so that few lines tell the most.
MAIN = ("few-bit", "quantised", "selection", "mixed", "compressed", "oracle")
MAIN_LINES = 4
MAIN_WIDTH, MAIN_HEIGHT = 880, 440  # pixels; beside it stand the findings

Row = Mapping[str, Any]


def ablation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the plots and tables of an ablation."""
    rows = [row for row in found["rows"] if row.get("structure", "ffn") != "attention"]
    elsewhere = [row for row in found["rows"] if row.get("structure", "ffn") == "attention"]
    if not rows:
        rows, elsewhere = elsewhere, []
    tasks = list(found["dense"])
    best = front(rows, None)
    axes = _loss_axes(rows, None)
    lines = family_lines(rows, None, best)
    shown = main_families(rows)
    few = [row for row in rows if family(row) in shown]
    main = family_lines(few, None, best)
    families = [
        panel
        for name, members in _by_family(rows).items()
        for panel in _methods(title_of(name), members, best, axes)
    ]
    if elsewhere:
        title = "attention: bytes of its linear layers"
        families += _methods(title, elsewhere, [], _loss_axes(elsewhere, None))
    return {
        "plot": plots.figure(
            _loss_chart(_named_once(main), _loss_axes(few, None), MAIN_WIDTH, MAIN_HEIGHT), main
        ),
        "said": told(main),
        "hidden": [title_of(name) for name in _by_family(rows) if name not in shown],
        "has_mixed": any(family(row) == "mixed" for row in few),
        "has_compressed": any(family(row) == "compressed" for row in rows),
        "has_oracle": any(family(row) == "oracle" for row in rows),
        "all_families": plots.figure(_loss_chart(_named_once(lines), axes, WIDE, 520), lines),
        "front": [_named(row) for row in best],
        "tasks": [(task, found["dense"][task], _task_plot(rows, task)) for task in tasks],
        "legend": plots.legend(lines),
        "families": families,
        "best_maps": _best_maps(rows),
        "method_maps": _method_maps(rows, tasks),
        "recovery": _recovery(rows),
        "notes": found["notes"],
        "task_names": tasks,
        "meanings": _meanings(found["rows"]),
        "rows": [
            {
                **row,
                "shown_family": title_of(family(row)),
                "is_front": row in best,
                "recall": row.get("recall"),
                "energy": row.get("energy"),
            }
            for row in sorted(
                found["rows"], key=lambda row: (float(row["bytes_fraction"]), float(row["delta"]))
            )
        ],
        "documents": sum(found["documents"].values()),
        "tokens": sum(found["tokens"].values()),
        "sparse_tokens": sum(found["sparse_tokens"].values()),
        "seed": found["seed"],
        "model_hash": found["model_hash"],
    }


def overview(found: Mapping[str, Any]) -> Markup:
    """Give the first plot of an ablation by itself, as wide as on a desk.

    Args:
        found: The ablation, of feed-forward layers.
    """
    rows = [row for row in found["rows"] if row.get("structure", "ffn") != "attention"]
    shown = main_families(rows)
    few = [row for row in rows if family(row) in shown]
    lines = _named_once(family_lines(few, None, front(rows, None)))
    return _loss_chart(lines, _loss_axes(few, None), MAIN_WIDTH, MAIN_HEIGHT)(MAIN_WIDTH, True)


def main_families(rows: Sequence[Row]) -> list[str]:
    """Give the families that the first plot shows: at most `MAIN_LINES`, by the order of `MAIN`."""
    there = list(_by_family(rows))
    order = [name for name in MAIN if name in there] + [n for n in there if n not in MAIN]
    return order[:MAIN_LINES]


def told(lines: Sequence[Line]) -> list[str]:
    """Give the points of lines in words, a sentence a line, for who does not see the plot."""
    found: dict[str, list[Point]] = {}
    for line in lines:
        found.setdefault(line.name, []).extend(line.points)
    return [
        f"{name}: "
        + ", ".join(
            f"{point.y:+.4f} at {point.x:.2f} ({point.name})"
            for point in sorted(points, key=lambda point: point.x)
        )
        + "."
        for name, points in found.items()
        if points
    ]


def _named_once(lines: Sequence[Line]) -> list[Line]:
    """The lines with a name only where it is another than that of the point before."""
    found = []
    for line in lines:
        points, last = [], ""
        for point in line.points:
            points.append(dataclasses.replace(point, name="" if point.name == last else point.name))
            last = point.name
        found.append(dataclasses.replace(line, points=tuple(points)))
    return found


def _meanings(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the names of the methods mean, family by family."""
    return [
        (title_of(name), [(method, words.plain(method)) for method in dict.fromkeys(methods)])
        for name, members in _by_family(rows).items()
        for methods in [[str(row["method"]) for row in members]]
    ]


def family(row: Row) -> str:
    """Give the family of a row, with compressed sensing apart from other selection."""
    if row["family"] == "selection" and _COMPRESSED.fullmatch(row["method"]):
        return "compressed"
    return str(row["family"])


def front(rows: Sequence[Row], task: str | None) -> list[Row]:
    """Give the rows that no other row beats in bytes and loss at once, by bytes.

    Oracles know for nothing what others pay for, so they are left out.

    Args:
        rows: Of an ablation, all of one structure.
        task: Whose loss to compare; None for the mean.
    """
    return undominated([row for row in rows if family(row) != "oracle"], lambda r: delta(r, task))


def undominated(rows: Sequence[Row], loss: Callable[[Row], float]) -> list[Row]:
    """Give the rows for which no other has fewer bytes and less loss, by bytes."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (float(row["bytes_fraction"]), float(loss(row)))):
        if not found or loss(row) < loss(found[-1]):
            found.append(row)
    return found


def delta(row: Row, task: str | None) -> float:
    """Give the loss over dense of a row, of one task or the mean."""
    return float(row["delta"] if task is None else row["per_task"][task])


def family_lines(rows: Sequence[Row], task: str | None, best: Sequence[Row]) -> list[Line]:
    """Give a line for each family: its rows that were best on the text for choosing, by bytes.

    Args:
        rows: Of an ablation, all of one structure.
        task: Whose loss to show; None for the mean.
        best: Rows that stand out, with their names.
    """
    found = []
    for name, members in _by_family(rows).items():
        chosen = chosen_rows(members)
        title, style, mark, dashed = style_of(name)
        points = tuple(_point(row, task, ring=row in best) for row in chosen)
        found.append(Line(title, style, mark, points, dashed=dashed))
        # What stands out is shown even where another was better on the text for choosing.
        others = [row for row in members if row in best and row not in chosen]
        if others:
            points = tuple(_point(row, task, ring=True) for row in others)
            found.append(Line(title, style, mark, points, joined=False))
    return found


def chosen_rows(rows: Sequence[Row]) -> list[Row]:
    """Give the rows of a family that were best on the text for choosing, by bytes.

    The best at every number of bytes that was asked for, and of rows that nothing was asked of,
    those that no other beats in bytes and loss at once.
    """
    found = undominated([row for row in rows if row["target"] is None], _select_delta)
    for target in {row["target"] for row in rows} - {None}:
        found.append(min((r for r in rows if r["target"] == target), key=_select_delta))
    return sorted(found, key=lambda row: float(row["bytes_fraction"]))


def _select_delta(row: Row) -> float:
    """Loss on the text for choosing; where that is not known, the loss."""
    return float(row.get("select_delta", row["delta"]))


def style_of(name: str) -> tuple[str, str, str, bool]:
    """Give name, class, mark and dashes of a family; an unknown one is plain."""
    return FAMILIES.get(name, (name, "unknown", "wedge", False))


def title_of(name: str) -> str:
    """Give the words for a family."""
    return style_of(name)[0]


def _by_family(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of every family, unknown families first, then in the order of `FAMILIES`."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(family(row), []).append(row)
    order = list(FAMILIES)
    names = sorted(found, key=lambda name: order.index(name) if name in order else -1)
    return {name: found[name] for name in names}


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of every method by bytes; widths of one way of rounding count as one method."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["bytes_fraction"])):
        name = str(row["method"])
        if row["family"] == "quantised":
            name = re.sub(r"-int\d+$", "", name)
        found.setdefault(name, []).append(row)
    return found


def _point(row: Row, task: str | None, *, ring: bool = False, name: bool = True) -> Point:
    """One row in a plot of loss against bytes."""
    y = delta(row, task)
    low, high = row["ci95"] if task is None else row["per_task_ci95"][task]
    title = (
        f"{words.plain(row['method'])}: {y:+.4f} nats ({low:+.4f} to {high:+.4f}) at "
        f"{row['bytes_fraction']:.3f} of the bytes, density {row['density']:.3f}"
    )
    text = words.short(str(row["method"])) if name else ""
    return Point(float(row["bytes_fraction"]), y, low, high, title, text, ring)


def _loss_axes(rows: Sequence[Row], task: str | None) -> tuple[Axis, Axis]:
    """Axes for loss against bytes."""
    points = [_point(row, task) for row in rows]
    # Bands may reach far; what they show above the highest point or much below zero is cut off.
    ys = [y for point in points for y in (point.y, max(point.low, -0.01))]
    return plots.linear(_BYTES, 0.0, max(point.x for point in points)), plots.losses(ys)


def _loss_chart(lines: Sequence[Line], axes: tuple[Axis, Axis], wide: int, height: int) -> Draw:
    """What draws loss against bytes at a width."""

    def draw(width: int, margin: bool) -> Markup:
        return plots.chart(
            lines,
            *axes,
            title="Loss over dense against bytes read",
            width=wide if margin else width,
            height=height if margin else min(height, 360),
            margin=margin,
        )

    return draw


def _task_plot(rows: Sequence[Row], task: str) -> Markup:
    """Loss of one task against bytes, the families as in the plot of the mean."""
    lines = _only_rings(family_lines(rows, task, front(rows, task)))
    title = f"Loss over dense against bytes read, {task}"
    x, y = _loss_axes(rows, task)
    return plots.chart(lines, x, y, title=title, width=NARROW, height=290, margin=False)


def _only_rings(lines: Sequence[Line]) -> list[Line]:
    """The lines with names at points that stand out only."""
    return [
        dataclasses.replace(
            line,
            points=tuple(
                dataclasses.replace(point, name=point.name if point.ring else "")
                for point in line.points
            ),
        )
        for line in lines
    ]


def _methods(
    title: str, rows: Sequence[Row], best: Sequence[Row], axes: tuple[Axis, Axis]
) -> list[tuple[str, Markup]]:
    """Loss against bytes of every method of a family, the front of all behind them."""
    behind = tuple(_point(row, None, name=False) for row in best)
    behind = tuple(dataclasses.replace(point, low=point.y, high=point.y) for point in behind)
    ghost = [Line("front of all", "ghost", "", behind, dashed=True)] if behind else []
    found = []
    for name, methods in _in_parts(title, list(_by_method(rows).items())):
        lines = list(ghost)
        for number, (method, members) in enumerate(methods):
            points = tuple(_point(row, None, ring=row in best, name=False) for row in members)
            lines.append(Line(method, palette(number), mark_of(number), points))
        found.append((name, plots.figure(_loss_chart(lines, axes, HALF, 340), lines)))
    return found


def _in_parts(title: str, members: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
    """Members in runs that one plot can show in colours of their own, each with its title."""
    runs = plots.parts(members)
    if len(runs) == 1:
        return [(title, runs[0])]
    return [(f"{title}, {i} of {len(runs)}", run) for i, run in enumerate(runs, 1)]


def _named(row: Row) -> str:
    return f"{row['method']} ({row['bytes_fraction']:.2f}, {row['delta']:+.4f})"


def _best_maps(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Density of layers and tasks under the best few-bit rule at every number of bytes."""
    members = [row for row in rows if family(row) == "few-bit" and row["target"] is not None]
    return [
        (f"{row['method']} at {row['target']:.2f} of the bytes", density_map(by_task))
        for row in chosen_rows(members)
        if (by_task := row.get("density_per_task_layer"))
    ]


def _method_maps(rows: Sequence[Row], tasks: Sequence[str]) -> list[tuple[str, Markup]]:
    """Density of every layer and of every task under every method, at one number of bytes."""
    known = [row for row in rows if row["target"] is not None and row.get("density_per_layer")]
    at: dict[float, list[Row]] = {}
    for of_family in _by_family(known).values():
        for row in of_family:
            at.setdefault(float(row["target"]), []).append(row)
    if not at:
        return []
    # The one that most of them reach; of several the lowest.
    target = max(at, key=lambda target: (len(at[target]), -target))
    members = at[target]
    names = [str(row["method"]) for row in members]
    title = f"every method at {target:.2f} of the bytes"
    n_layers = max(len(row["density_per_layer"]) for row in members)
    layers = [str(i) for i in range(n_layers)]
    by_layer = [_padded(row["density_per_layer"], n_layers) for row in members]
    found = [(f"{title}, by layer", _map(by_layer, names, layers, "method", "layer", title))]
    if all(row.get("density_per_task") for row in members):
        by_task = [[float(row["density_per_task"][task]) for task in tasks] for row in members]
        drawn = _map(by_task, names, tasks, "method", "task", title)
        found.append((f"{title}, by task", drawn))
    return found


def density_map(by_task: Mapping[str, Sequence[float]]) -> Markup:
    """Give the density of every layer and task as a heat map."""
    layers = [str(i) for i in range(max(len(of) for of in by_task.values()))]
    return _map(list(by_task.values()), list(by_task), layers, "task", "layer", "Density")


def _map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    title: str,
) -> Markup:
    """Densities as a heat map, wide enough for its numbers where that is not too wide."""
    step = plots.LETTER * max(4, *(len(name) for name in columns)) + 6
    left = 20 + plots.LETTER * max(len(name) for name in rows)
    return plots.heat(
        values,
        rows=rows,
        columns=columns,
        row_label=row_label,
        column_label=column_label,
        title=title,
        width=round(min(max(NARROW, left + step * len(columns)), WIDE)),
        cell=20,
        numbers=True,
    )


def _padded(values: Sequence[float], n: int) -> list[float | None]:
    return [*values, *[None] * (n - len(values))]


def _recovery(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Recall and captured energy against density, of all methods by family."""
    found = []
    for key, title in (
        ("recall", "share of a perfect choice's neurons that is kept"),
        ("energy", "share of the squared usage that is kept"),
    ):
        known = [row for row in rows if row.get(key) is not None]
        if not known:
            continue
        x, y = _found_axes(known, key)
        panels = []
        for name, members in _by_family(known).items():
            for part, methods in _in_parts(title_of(name), list(_by_method(members).items())):
                lines = _found_lines(methods, key)
                panels.append((part, plots.figure(_found_chart(lines, x, y, title), lines)))
        found.append((title, panels))
    return found


def _found_lines(methods: Sequence[tuple[str, Sequence[Row]]], key: str) -> list[Line]:
    """What methods find, each as a line in a colour of its own."""
    lines = []
    for number, (name, members) in enumerate(methods):
        points = tuple(
            Point(
                float(row["density"]),
                float(row[key]),
                float(row[key]),
                float(row[key]),
                f"{row['method']}: {row[key]:.3f} at density {row['density']:.3f}",
            )
            for row in sorted(members, key=lambda row: float(row["density"]))
        )
        lines.append(Line(name, palette(number), mark_of(number), points))
    return lines


def _found_axes(rows: Sequence[Row], key: str) -> tuple[Axis, Axis]:
    """Axes for what rows find against density, from 0."""
    most = max(0.1, *(float(row["density"]) for row in rows))
    x = plots.linear("fraction of the neurons executed", 0.0, most)
    return x, plots.linear("share", 0.0, max(0.1, *(float(row[key]) for row in rows)))


def _found_chart(lines: Sequence[Line], x: Axis, y: Axis, title: str) -> Draw:
    def draw(width: int, margin: bool) -> Markup:
        wide = HALF if margin else width
        return plots.chart(lines, x, y, title=title, width=wide, height=340, margin=margin)

    return draw
