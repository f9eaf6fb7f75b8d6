"""What the report's sections show: results turned into plots, tables and sentences.

Each function takes results of one kind, checked by `results.check`, and gives what the template
asks for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import plots
from .plots import Axis, Line, Point

NARROW, WIDE = plots.NARROW, plots.WIDE
HALF = 640  # width of a plot that shares its row, pixels
LEVELS = 10  # of effort, in the colour of a token
WORSE = 0.5  # nats over dense from which a token is underlined
PROMPT = 600  # letters of a prompt that are shown, its last ones
_COMPRESSED = re.compile(r"(random|innovation|mmse|probe)-\d+")  # the rest of selection is not
PALETTE = 10  # classes s0 .. s9
_BYTES = "bytes read / dense 16-bit bytes"
_DELTA = "loss over dense, nats"

# Family: name, class of its colour, mark, dashed. The last is drawn on top.
FAMILIES = {
    "oracle": ("oracles", "oracle", "triangle", True),
    "quantised": ("quantised, all read", "quantised", "diamond", True),
    "selection": ("other selection", "selection", "square", False),
    "compressed": ("compressed sensing", "compressed", "cross", False),
    "mixed": ("mixed precision", "mixed", "wedge", False),
    "few-bit": ("few-bit selection", "few-bit", "circle", False),
}

Row = Mapping[str, Any]
Draw = Callable[[int, bool], Markup]  # (width, whether names stand at the right)


# Ablation


def ablation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the plots and tables of an ablation."""
    rows = [row for row in found["rows"] if row.get("structure", "ffn") != "attention"]
    elsewhere = [row for row in found["rows"] if row.get("structure", "ffn") == "attention"]
    tasks = list(found["dense"])
    best = front(rows, None)
    axes = _loss_axes(rows, None)
    lines = family_lines(rows, None, best)
    families = [
        (title_of(name), _methods(members, best, axes))
        for name, members in _by_family(rows).items()
    ]
    if elsewhere:
        title = "attention: bytes of its linear layers"
        families.append((title, _methods(elsewhere, [], _loss_axes(elsewhere, None))))
    chosen = {str(row["method"]) for of in _by_family(rows).values() for row in chosen_rows(of)}
    return {
        "plot": plots.figure(_loss_chart(lines, axes, WIDE, 520), lines),
        "front": [_named(row) for row in best],
        "tasks": [(task, found["dense"][task], _task_plot(rows, task)) for task in tasks],
        "legend": plots.legend(lines),
        "families": families,
        "best_maps": _best_maps(rows),
        "method_maps": _method_maps(rows, tasks),
        "recovery": _recovery(rows, chosen),
        "notes": found["notes"],
        "task_names": tasks,
        "rows": [
            {
                **row,
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
        f"{row['method']}: {y:+.4f} nats ({low:+.4f} to {high:+.4f}) at "
        f"{row['bytes_fraction']:.3f} of the bytes, density {row['density']:.3f}"
    )
    text = str(row["method"]) if name else ""
    return Point(float(row["bytes_fraction"]), y, low, high, title, text, ring)


def _loss_axes(rows: Sequence[Row], task: str | None) -> tuple[Axis, Axis]:
    """Axes for loss against bytes."""
    points = [_point(row, task) for row in rows]
    # Bands may reach far; what they show above the highest point or much below zero is cut off.
    ys = [y for point in points for y in (point.y, max(point.low, -0.01))]
    return plots.linear(_BYTES, 0.0, max(point.x for point in points)), plots.losses(_DELTA, ys)


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


def _methods(rows: Sequence[Row], best: Sequence[Row], axes: tuple[Axis, Axis]) -> Markup:
    """Loss against bytes of every method of a family, the front of all behind them."""
    behind = tuple(_point(row, None, name=False) for row in best)
    behind = tuple(dataclasses.replace(point, low=point.y, high=point.y) for point in behind)
    lines = [Line("front of all", "ghost", "", behind, dashed=True)] if behind else []
    for number, (name, members) in enumerate(_by_method(rows).items()):
        points = tuple(_point(row, None, ring=row in best, name=False) for row in members)
        lines.append(Line(name, _palette(number), _mark(number), points))
    return plots.figure(_loss_chart(lines, axes, HALF, 340), lines)


def _palette(number: int) -> str:
    return f"s{number % PALETTE}"


def _mark(number: int) -> str:
    # Another mark for every colour, and another pairing in the next round.
    names = list(plots.MARKS)
    return names[(number + number // PALETTE) % len(names)]


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


def _recovery(
    rows: Sequence[Row], chosen: set[str]
) -> list[tuple[str, Markup, list[tuple[str, Markup]]]]:
    """Recall and captured energy against density: of chosen methods, and of all by family."""
    found = []
    for key, title in (
        ("recall", "share of the oracle's neurons that is kept"),
        ("energy", "share of the squared usage that is kept"),
    ):
        known = [row for row in rows if row.get(key) is not None]
        if not known:
            continue
        few = [row for row in known if row["method"] in chosen] or known
        by_family = {
            name: _found_lines(members, key, own=True)
            for name, members in _by_family(known).items()
        }
        x, y = _found_axes(known, key)
        panels = [
            (title_of(name), plots.figure(_found_chart(lines, x, y, title), lines))
            for name, lines in by_family.items()
        ]
        lines = _found_lines(few, key, own=False)
        found.append((title, plots.figure(_found_chart(lines, x, y, title), lines), panels))
    return found


def _found_lines(rows: Sequence[Row], key: str, *, own: bool) -> list[Line]:
    """What methods find, as lines in colours of their own or of their families."""
    lines = []
    for number, (name, members) in enumerate(_by_method(rows).items()):
        _, style, mark, dashed = style_of(family(members[0]))
        if own:
            style, mark, dashed = _palette(number), _mark(number), False
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
        lines.append(Line(name, style, mark, points, dashed=dashed))
    return lines


def _found_axes(rows: Sequence[Row], key: str) -> tuple[Axis, Axis]:
    """Axes for what rows find against density, from 0."""
    x = plots.linear("density", 0.0, max(0.1, *(float(row["density"]) for row in rows)))
    return x, plots.linear("share", 0.0, max(0.1, *(float(row[key]) for row in rows)))


def _found_chart(lines: Sequence[Line], x: Axis, y: Axis, title: str) -> Draw:
    def draw(width: int, margin: bool) -> Markup:
        wide = HALF if margin else width
        return plots.chart(lines, x, y, title=title, width=wide, height=340, margin=margin)

    return draw


# Evaluation


def evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the table and the charts of an evaluation."""
    entries = found["tasks"].values()
    by_task = found.get("density_per_task_layer")
    layers = found["density_per_layer"]
    return {
        **found,
        "chart": Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
            *(
                plots.bars(layers, label="layer", title="Density of every layer", width=width)
                for width in (HALF, NARROW)
            )
        ),
        "map": density_map(by_task) if by_task else None,
        "total_tokens": sum(entry["tokens"] for entry in entries),
        "total_sparse": sum(entry["sparse_tokens"] for entry in entries),
    }


# Phase diagrams

_KINDS = {
    "synthetic": "Made signals of k normal entries: what theory is about.",
    "usage": "The model's own usage of groups of neurons, measured as it is; wanted are the k "
    "groups of largest usage.",
    "innovation": "The usage less its mean over the task; wanted are the k groups where they "
    "differ most.",
    "choice": "The k groups of largest usage, found by way of the innovation: the task's mean is "
    "known, pursuit takes one atom for every four measurements.",
}
_METHODS = {"omp": "pursuit", "matched": "largest correlations", "prior": "task mean alone"}


def phase(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the heat maps and sentences of phase diagrams."""
    n = found["n_groups"]
    curve = _theory(found) if found["constant"] is not None else []
    diagrams = []
    for diagram in found["diagrams"]:
        maps = []
        for method, tables in diagram["methods"].items():
            figures = ("exact", "recall") if method == "omp" else ("recall",)
            for figure in figures:
                what = "all wanted found" if figure == "exact" else "share of wanted found"
                title = f"{_METHODS.get(method, method)}: {what}"
                line = curve if method == "omp" else []
                maps.append((title, _phase_map(found, tables[figure], title, line)))
        about = _KINDS.get(diagram["name"], "")
        diagrams.append({"name": diagram["name"], "about": about, "maps": maps})
    layers = found["layers"]
    lines = [
        _per_layer(title, f"s{number}", mark, [layer[key] for layer in layers])
        for number, (key, title, mark) in enumerate(
            (
                ("usage_share", "groups holding 90 % of the usage's energy", "square"),
                ("innovation_share", "the same of the innovation", "circle"),
                ("innovation_energy", "energy of the innovation / of the usage", "triangle"),
            )
        )
    ]
    return {
        "diagrams": diagrams,
        "scale": plots.scale(0, 1, "share of signals, or of what is wanted"),
        "layers": plots.figure(_layer_chart(lines, "share", "How sparse the signals are"), lines),
        "findings": phase_findings(found),
        "n_groups": n,
        "group_neurons": found["group_neurons"],
        "trials": found["trials"],
        "seed": found["seed"],
        "model_hash": found["model_hash"],
    }


def phase_findings(found: Mapping[str, Any]) -> list[str]:
    """Say in sentences what phase diagrams show, failures included."""
    n, constant = found["n_groups"], found["constant"]
    said = []
    if constant is None:
        said.append("On this grid pursuit recovers half of the made signals nowhere.")
    else:
        said.append(
            f"Half of the made signals are recovered wholly at M = {constant:.2f} k log(G / k): "
            "the line in the maps."
        )
    for key, name in (("usage_share", "usage"), ("innovation_share", "innovation")):
        share = sum(layer[key] for layer in found["layers"]) / len(found["layers"])
        k = min(max(share * n, 1.0), n - 1e-9)
        sentence = f"90 % of the energy of the {name} is held by {k:.0f} of {n} groups, {share:.0%}"
        if constant is not None:
            m = constant * k * math.log(n / k)
            sentence += (
                f": made signals as sparse want {m:.0f} measurements, {m / n:.0%} of the groups, "
                "and have nothing else in them"
            )
        said.append(f"{sentence}.")
    for diagram in found["diagrams"]:
        if diagram["name"] != "synthetic" and "omp" in diagram["methods"]:
            said.append(_reach(found, diagram))
    return said


def _reach(found: Mapping[str, Any], diagram: Mapping[str, Any]) -> str:
    """How pursuit compares with the floor at a quarter of the groups as measurements."""
    i = min(
        range(len(found["measurements"])),
        key=lambda i: abs(found["measurements"][i] - found["n_groups"] / 4),
    )
    j = min(
        range(len(found["sparsity"])),
        key=lambda j: abs(found["sparsity"][j] - found["n_groups"] / 4),
    )
    shares = [
        f"{_METHODS.get(method, method)} {tables['recall'][i][j]:.2f}"
        for method, tables in diagram["methods"].items()
    ]
    exact = diagram["methods"]["omp"]["exact"][i][j]
    return (
        f"{diagram['name'].capitalize()}, {found['measurements'][i]} measurements for "
        f"{found['sparsity'][j]} of {found['n_groups']} groups: of what is wanted is found by "
        f"{', '.join(shares)} (chance {found['sparsity'][j] / found['n_groups']:.2f}); all of it "
        f"by pursuit in {exact:.0%} of the signals."
    )


def _theory(found: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The line M = C k log(G / k) in cells, the most measurements at the top."""
    n, ks, ms = found["n_groups"], found["sparsity"], found["measurements"]
    points = []
    for step in range(8 * (len(ks) - 1) + 1):
        j, part = divmod(step / 8, 1)
        k = ks[int(j)] + (part * (ks[int(j) + 1] - ks[int(j)]) if part else 0.0)
        if not 0 < k < n:
            continue
        m = found["constant"] * k * math.log(n / k)
        row = _place(m, ms)
        if row is not None:
            points.append((step / 8 + 0.5, len(ms) - row - 0.5))
    return points


def _place(value: float, values: Sequence[float]) -> float | None:
    """Where a value stands among rising ones, as a fractional index; None outside."""
    for i in range(len(values) - 1):
        low, high = values[i], values[i + 1]
        if low <= value <= high and low < high:
            return i + (value - low) / (high - low)
    return None


def _phase_map(
    found: Mapping[str, Any],
    table: Sequence[Sequence[float]],
    title: str,
    curve: Sequence[tuple[float, float]],
) -> Markup:
    n = found["n_groups"]
    return plots.heat(
        table[::-1],
        rows=[f"{m / n:.2f}" for m in reversed(found["measurements"])],
        columns=[f"{k / n:.2f}" for k in found["sparsity"]],
        row_label="M / G",
        column_label="k / G",
        title=title,
        width=NARROW,
        cell=20,
        curve=curve,
    )


# Dictionaries


def dictionaries(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the plots, tables and sentences of coherence and restricted isometry."""
    layers = found["layers"]
    coherences, isometries, tables = [], [], []
    for key, title in (("groups", "random operator"), ("rows", "rows of the sensors")):
        if not layers[0][key]:
            continue
        members = [[layer[key][i] for layer in layers] for i in range(len(layers[0][key]))]
        lines = [
            _per_layer(
                of_layers[0]["name"], _palette(i), _mark(i), [d["coherence"] for d in of_layers]
            )
            for i, of_layers in enumerate(members)
            if not of_layers[0]["weighted"]
        ]
        lines.append(
            _per_layer(
                "least possible",
                "oracle",
                "",
                [of[0]["welch"] for of in zip(*members, strict=True)],
                dashed=True,
            )
        )
        chart = _layer_chart(lines, "coherence", f"Coherence, {title}", low=0.0, high=1.0)
        coherences.append((title, plots.figure(chart, lines)))
        isometries += [(of_layers[0]["name"], _isometry(of_layers)) for of_layers in members]
        tables.append((title, [_summary(of_layers) for of_layers in members]))
    return {
        **found,
        "coherences": coherences,
        "isometries": isometries,
        "tables": tables,
        "findings": dictionary_findings(found),
        "every_layer": [
            (number, d)
            for number, layer in enumerate(layers)
            for d in layer["groups"] + layer["rows"]
        ],
    }


def dictionary_findings(found: Mapping[str, Any]) -> list[str]:
    """Say what coherence guarantees, with the numbers; mostly that it guarantees nothing."""
    said = []
    for key, what, atoms in (
        ("groups", "The random operator", "groups"),
        ("rows", "The rows that sensors stand for", "neurons"),
    ):
        members = [d for layer in found["layers"] for d in layer[key] if not d["weighted"]]
        if not members:
            continue
        least, most = (f(d["coherence"] for d in members) for f in (min, max))
        sure = max(d["guaranteed"] for d in members)
        by_coherence = max(_sure(d["coherence"]) for d in members)
        k = min(d["k"] for d in members)
        text = (
            f"{what}: coherence {least:.2f} to {most:.2f}. Pursuit is certain to find k {atoms} if "
            f"mu < 1 / (2 k - 1), so for k = {by_coherence} at most (k = {sure} by the cumulative "
            f"coherence); a token's support at density {found['density']:g} has {k}."
        )
        if sure < k:
            text += " So nothing that decoding needs is guaranteed; what works, works on average."
        lows = [d["used"][0] for d in members]
        text += (
            " Over the supports in use the squared singular values of atoms of unit norm go down "
            f"to {min(lows):.2g}"
        )
        text += "." if min(lows) > 0 else ": some supports are not even independent."
        said.append(text)
    return said


def _sure(coherence: float) -> int:
    """The largest k with coherence < 1 / (2 k - 1)."""
    return math.ceil((1 + 1 / coherence) / 2) - 1 if coherence > 0 else 10**9


def _isometry(of_layers: Sequence[Mapping[str, Any]]) -> Markup:
    """Extreme squared singular values of one dictionary over the layers."""
    floor = 1e-4
    lines = []
    for kind, title, style, mark in (
        ("drawn", "random supports", "ghost", ""),
        ("used", "supports in use", "few-bit", "circle"),
    ):
        for end in (0, 1):
            points = tuple(
                Point(
                    float(number),
                    max(d[kind][end], floor),
                    max(d[kind][end], floor),
                    max(d[kind][1], floor),
                    f"layer {number}, {title}: {d[kind][0]:.3g} to {d[kind][1]:.3g}",
                )
                for number, d in enumerate(of_layers)
            )
            lines.append(Line(title, style, mark, points, dashed=kind == "drawn"))
    x = _layer_axis(len(of_layers))
    values = [point.y for line in lines for point in line.points]
    y = plots.logarithmic("squared singular values", min(*values, 0.5), max(*values, 2.0))
    return plots.chart(
        lines,
        x,
        y,
        title=f"Restricted isometry, {of_layers[0]['name']}",
        width=NARROW,
        height=230,
        margin=False,
    )


def _summary(of_layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One dictionary over all layers."""
    first = of_layers[0]
    return {
        "name": first["name"],
        "m": first["m"],
        "n": first["n"],
        "k": first["k"],
        "coherence": [f(d["coherence"] for d in of_layers) for f in (min, max)],
        "welch": first["welch"],
        "guaranteed": [f(d["guaranteed"] for d in of_layers) for f in (min, max)],
        "used": [min(d["used"][0] for d in of_layers), max(d["used"][1] for d in of_layers)],
        "drawn": [min(d["drawn"][0] for d in of_layers), max(d["drawn"][1] for d in of_layers)],
        "weighted": first["weighted"],
    }


def _per_layer(
    name: str, style: str, mark: str, values: Sequence[float], *, dashed: bool = False
) -> Line:
    """Values of the layers as a line."""
    points = tuple(
        Point(float(number), value, value, value, f"{name}, layer {number}: {value:.3f}")
        for number, value in enumerate(values)
    )
    return Line(name, style, mark, points, dashed=dashed, band=False)


def _layer_axis(n: int) -> Axis:
    return plots.linear("layer", -0.3, n - 0.7, whole=True)


def _layer_chart(
    lines: Sequence[Line],
    label: str,
    title: str,
    *,
    low: float = 0.0,
    high: float | None = None,
) -> Draw:
    points = [point for line in lines for point in line.points]
    x = _layer_axis(len(lines[0].points))
    top = max(point.y for point in points) if high is None else high
    y = plots.linear(label, low, max(top, low + 0.1))

    def draw(width: int, margin: bool) -> Markup:
        wide = HALF if margin else width
        return plots.chart(lines, x, y, title=title, width=wide, height=300, margin=margin)

    return draw


# Effort


def effort(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the texts, token by token, in classes of effort."""
    tokens = [token for example in found["examples"] for token in example["tokens"]]
    efforts = [_mean(token["density"]) for token in tokens]
    low = math.floor(20 * min(efforts, default=0.0)) / 20
    high = max(low + 0.05, math.ceil(20 * max(efforts, default=1.0)) / 20)
    of_layers = [density for token in tokens for density in token["density"]]
    least, most = min(of_layers, default=0.0), max(of_layers, default=1.0)
    ends = least, max(most, least + 0.05)
    return {
        **found,
        "low": low,
        "high": high,
        "levels": list(range(LEVELS)),
        "worse": WORSE,
        "scale": plots.scale(
            round(ends[0], 2), round(ends[1], 2), "of the neurons of a layer, in the strips"
        ),
        "texts": [_text(example, (low, high), ends) for example in found["examples"]],
    }


def _text(
    example: Mapping[str, Any], of_token: tuple[float, float], of_layer: tuple[float, float]
) -> dict[str, Any]:
    """One text: its spans, means, and a strip of layers by tokens; colours within two ranges."""
    low, high = of_token
    spans = []
    for token in example["tokens"]:
        mean = _mean(token["density"])
        part = (mean - low) / (high - low)
        spans.append(
            {
                "text": token["text"].replace("\n", "↵\n"),
                "level": min(LEVELS - 1, max(0, int(LEVELS * part))),
                "worse": token["loss"] - token["dense_loss"] > WORSE,
                "title": (
                    f"effort {mean:.2f}; loss {token['loss']:.2f}, dense "
                    f"{token['dense_loss']:.2f}; entropy {token['entropy']:.2f}; layers "
                    + " ".join(f"{d:.2f}".replace("0.", ".") for d in token["density"])
                ),
            }
        )
    tokens = example["tokens"]
    n_layers = len(tokens[0]["density"])
    prompt = example["prompt"]
    strips = [
        plots.strip(
            [[token["density"][layer] for token in tokens] for layer in range(n_layers)],
            low=of_layer[0],
            high=of_layer[1],
            title="Density of every layer for every token",
            width=width,
        )
        for width in (WIDE, NARROW)
    ]
    return {
        "task": example["task"],
        "prompt": prompt if len(prompt) <= PROMPT else f"… {prompt[-PROMPT:]}",
        "first": example["first"],
        "spans": spans,
        "strip": Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(*strips),
        "effort": _mean([_mean(token["density"]) for token in tokens]),
        "loss": _mean([token["loss"] for token in tokens]),
        "dense_loss": _mean([token["dense_loss"] for token in tokens]),
        "n_worse": sum(span["worse"] for span in spans),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def demo(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a demo made, with nothing for what it left out."""
    keys = ("calibration", "seconds", "slower", "generation", "bench", "machine")
    return {key: found.get(key) for key in keys}


# Studies


def size_curve(rows: Sequence[Row]) -> dict[str, Any]:
    """Give loss against the size of models and against the length of their training.

    Rows without a density stand in every plot.
    """
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    densities = sorted({float(row["density"]) for row in rows if row["density"] is not None})
    longest: dict[float, float] = {}
    for row in rows:
        longest[row["params"]] = max(longest.get(row["params"], 0.0), row["tokens"])
    groups = []
    wanted: list[float | None] = [*densities]
    for density in wanted or [None]:
        of_density = [row for row in rows if row["density"] is None or row["density"] == density]
        plotted = []
        some = [row for row in of_density if row["tokens"] == longest[row["params"]]]
        if len({row["params"] for row in some}) > 1:
            plotted.append(("longest training", _study(some, methods, "params", "parameters")))
        for params in sorted(longest):
            some = [row for row in of_density if row["params"] == params]
            if len({row["tokens"] for row in some}) > 1:
                title = f"{plots.short(params)} parameters"
                plotted.append((title, _study(some, methods, "tokens", "tokens of training")))
        if plotted:
            groups.append((density, plotted))
    lines = [Line(name, _palette(i), _mark(i), ()) for i, name in enumerate(methods)]
    return {"groups": groups, "legend": plots.legend(lines), "rows": rows}


def _study(rows: Sequence[Row], methods: Sequence[str], key: str, label: str) -> Markup:
    """Loss of every method against one number of the models, logarithmic."""
    lines = []
    for i, name in enumerate(methods):
        members = sorted((r for r in rows if r["method"] == name), key=lambda r: float(r[key]))
        points = tuple(
            Point(
                float(row[key]),
                float(row["delta"]),
                float(row["ci95"][0]),
                float(row["ci95"][1]),
                f"{name}: {row['delta']:+.4f} nats at {plots.short(row[key])} {label}",
            )
            for row in members
        )
        if points:
            lines.append(Line(name, _palette(i), _mark(i), points))
    points = tuple(point for line in lines for point in line.points)
    x = plots.logarithmic(label, min(p.x for p in points), max(p.x for p in points))
    y = plots.losses(_DELTA, [v for p in points for v in (p.y, max(p.low, -0.01))])
    return plots.chart(
        lines,
        x,
        y,
        title=f"Loss over dense against {label}",
        width=NARROW,
        height=280,
        margin=False,
    )


def storage(rows: Sequence[Row]) -> dict[str, Any]:
    """Give loss against the bits that are read and the bits that are stored."""
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    plotted = []
    for key, label in (
        ("bits_read", "bits read for a weight, on average"),
        ("bits_stored", "bits stored for a weight"),
    ):
        best = _cheapest(rows, key)
        lines = []
        for i, kind in enumerate(kinds):
            members = sorted((r for r in rows if r["kind"] == kind), key=lambda r: float(r[key]))
            points = tuple(
                Point(
                    float(row[key]),
                    float(row["delta"]),
                    float(row["ci95"][0]),
                    float(row["ci95"][1]),
                    f"{row['name']}: {row['delta']:+.4f} nats; {row['bits_read']:.2f} bits read, "
                    f"{row['bits_stored']:.2f} stored",
                    str(row["name"]),
                    row in best,
                )
                for row in members
            )
            lines.append(Line(kind, _palette(i), _mark(i), points, joined=False))
        key = plots.legend(lines)
        figure = plots.figure(_bits_chart(lines, label), lines, key=False)
        plotted.append((label, key + figure))
    return {"plots": plotted, "rows": sorted(rows, key=lambda row: float(row["bits_read"]))}


def _cheapest(rows: Sequence[Row], key: str) -> list[Row]:
    """Rows for which no other has fewer bits and less loss."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (float(row[key]), float(row["delta"]))):
        if not found or row["delta"] < found[-1]["delta"]:
            found.append(row)
    return found


def _bits_chart(lines: Sequence[Line], label: str) -> Draw:
    points = [point for line in lines for point in line.points]
    x = plots.linear(label, min(p.x for p in points), max(p.x for p in points))
    y = plots.losses(_DELTA, [v for p in points for v in (p.y, max(p.low, -0.01))])

    def draw(width: int, margin: bool) -> Markup:
        return plots.chart(
            lines,
            x,
            y,
            title=f"Loss over dense against {label}",
            width=width,
            height=460 if margin else 360,
            margin=False,
        )

    return draw
