"""The report's section on sketches: how closely few-bit codes of a whole model follow it.

Takes what `csfast eval --sketch` found of one sketch or of several, checked by `results.check`, and
gives what the template asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import plots
from .plots import HALF, Draw, Line, Point, Side, mark_of, palette

KL = "divergence from dense (KL), nats a token"
LEAST = 1e-6  # nats: a smaller divergence is drawn there; float32 tells no more of one
DENSE_BITS = 16.0  # of a weight that is not coded
SHOWN = 4  # drafts of which sentences and tables say how many a check keeps
MAIN_WIDTH, MAIN_HEIGHT = 880, 400  # pixels; beside it stand the words

Row = Mapping[str, Any]


def sketches(found: Sequence[Row]) -> dict[str, Any]:
    """Give the plots, the table and the sentences of sketches, those that read the least first."""
    judged = sorted(found, key=lambda one: float(one["bits"]["read"]))
    models = _models(judged)
    names = _names(judged)
    rows = [
        {**one, "name": name, "model": models[one["model_hash"]], "kept": _kept(one, SHOWN)}
        for one, name in zip(judged, names, strict=True)
    ]
    costs = _costs(rows)
    return {
        "verdict": verdict(rows),
        "plot": _figure(_cost_chart(costs), costs) if len(rows) > 1 else None,
        "said": told(costs),
        "drafts": [_figure(_draft_chart(run), run) for run in plots.parts(_drafts(rows))],
        "draft_sentences": [_kept_sentence(row) for row in rows if row["expected_accepted"]],
        "shown": SHOWN,
        "rows": rows,
        "each": [_one(row) for row in rows],
    }


def verdict(rows: Sequence[Row]) -> str:
    """Say in a sentence what sketches read and how closely they follow."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) > 1:
        parts = (_ends_of([row for row in rows if row["model"] == name]) for name in models)
        return f"Divergence from the dense model, nats a token: {'; '.join(parts)}."
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        text = (
            f"A sketch that reads {bits(first['bits']['read'])} of a weight instead of "
            f"{DENSE_BITS:.0f} is {divergence(first['kl'])} nats a token away from the dense model "
            f"and finds the same token likeliest {first['top1']:.1%} of the time"
        )
        if first["kept"] is None:
            return f"{text}."
        return f"{text}; of {SHOWN} tokens that it drafts a check keeps {first['kept']:.1f}."
    return (
        f"From {bits(first['bits']['read'])} of a weight to {last['bits']['read']:.2f}, instead of "
        f"{DENSE_BITS:.0f}, the divergence from the dense model goes from "
        f"{divergence(first['kl'])} nats a token to {divergence(last['kl'])}, and the share of "
        f"tokens that both find likeliest from {first['top1']:.1%} to {last['top1']:.1%}."
    )


def _ends_of(rows: Sequence[Row]) -> str:
    """Divergence of the sketches of one model that read the least and the most."""
    first, last = rows[0], rows[-1]
    said = (
        f"{first['model']} {divergence(first['kl'])} at {bits(first['bits']['read'])} of a weight"
    )
    if len(rows) > 1:
        said += f", {divergence(last['kl'])} at {last['bits']['read']:.2f}"
    return said


def bits(value: float) -> str:
    """Give bits of a weight with their unit."""
    return f"{value:.2f} bits"


def divergence(value: float) -> str:
    """Give a divergence in as many digits as tell something."""
    return f"{value:.3f}" if value >= 0.0095 else f"{value:.4f}"


def told(lines: Sequence[Line]) -> list[str]:
    """Give the points of lines in words, a sentence a model, for who does not see the plot."""
    found: dict[str, list[Point]] = {}
    for line in lines:
        found.setdefault(line.name, []).extend(line.points)
    return [
        f"{name}: "
        + ", ".join(
            f"{divergence(point.y)} at {bits(point.x)}"
            for point in sorted(points, key=lambda point: point.x)
        )
        + "."
        for name, points in found.items()
    ]


def _kept(one: Row, n: int) -> float | None:
    """Drafts of `n` that a check keeps; none where nothing was rolled out."""
    value = one["expected_accepted"].get(f"{n}")
    return None if value is None else float(value)


# Names


def _models(judged: Sequence[Row]) -> dict[str, str]:
    """Names of the models by their hashes, no two alike."""
    names: dict[str, str] = {}
    for one in judged:
        name = one.get("about") or _word_after(one, "eval") or "model"
        names.setdefault(one["model_hash"], str(name))
    taken = list(names.values())
    return {of: f"{name} {of[:8]}" if taken.count(name) > 1 else name for of, name in names.items()}


def _names(judged: Sequence[Row]) -> list[str]:
    """Names of the sketches: their folders where the files know them, and the levels read.

    Two sketches of one model have different names.
    """
    found: list[str] = []
    for one in judged:
        folder = _word_after(one, "--sketch") or "sketch"
        levels = f"{one['levels']} level{'' if one['levels'] == 1 else 's'}"
        name = f"{folder}, {levels}"
        before = sum(
            other.startswith(name) and of["model_hash"] == one["model_hash"]
            for other, of in zip(found, judged, strict=False)
        )
        found.append(f"{name} ({before + 1})" if before else name)
    return found


def _word_after(one: Row, word: str) -> str | None:
    """The word behind another one in the command that made a file, if the file has it."""
    words = [part for whole in one.get("command", ()) for part in whole.split("=", 1)]
    place = words.index(word) + 1 if word in words else len(words)
    found = words[place] if place < len(words) else "-"
    return None if found.startswith("-") else found


# All together


def _costs(rows: Sequence[Row]) -> list[Line]:
    """Divergence by bits read, for every model a line through what no other sketch of it beats."""
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(row["model"], []).append(row)
    lines = []
    for number, (name, of_model) in enumerate(members.items()):
        style = "few-bit" if len(members) == 1 else palette(number)
        best: list[Row] = []
        for row in of_model:  # by bits, so what reads more has to follow more closely
            if not best or row["kl"] < best[-1]["kl"]:
                best.append(row)
        lines.append(Line(name, style, mark_of(number), tuple(_cost(row) for row in best)))
        others = tuple(_cost(row) for row in of_model if row not in best)
        if others:
            lines.append(Line(name, style, mark_of(number), others, joined=False))
    return lines


def _cost(row: Row) -> Point:
    """What one sketch costs, within what a logarithmic axis has."""
    kl, low, high = (max(float(value), LEAST) for value in (row["kl"], *row["kl_ci95"]))
    read = float(row["bits"]["read"])
    title = (
        f"{row['model']}, {row['name']}: KL {row['kl']:.4f} ({row['kl_ci95'][0]:.4f} to "
        f"{row['kl_ci95'][1]:.4f}) at {bits(read)} read, {row['bits']['stored']:.2f} stored"
    )
    return Point(read, kl, low, high, title, divergence(kl))


def _cost_chart(lines: Sequence[Line]) -> Draw:
    """What draws divergence against bits, both of the whole model."""
    points = [point for line in lines for point in line.points]
    x = plots.linear("bits read of a weight", *_ends([point.x for point in points]))
    ends = [value for point in points for value in (point.y, point.low, point.high)]
    y = plots.logarithmic(KL, *_ends(ends))

    def draw(width: int, margin: bool) -> Markup:
        return plots.chart(
            lines,
            x,
            y,
            title="Divergence from the dense model against bits read of a weight",
            width=MAIN_WIDTH if margin else width,
            height=MAIN_HEIGHT if margin else 340,
            margin=margin and _n_names(lines) > 1,
        )

    return draw


def _drafts(rows: Sequence[Row]) -> list[Line]:
    """Drafts that a check keeps, by how many are made: a line for every sketch."""
    several = len({row["model"] for row in rows}) > 1
    lines: list[Line] = []
    for row in rows:
        name = f"{row['model']}, {row['name']}" if several else row["name"]
        points = tuple(
            Point(float(n), kept, kept, kept, f"{name}: of {n} drafts {kept:.2f} are kept")
            for n, kept in sorted((int(n), float(v)) for n, v in row["expected_accepted"].items())
        )
        number = len(lines) % plots.LINES
        if points:
            lines.append(Line(name, palette(number), mark_of(number), points, band=False))
    if len(lines) == 1:
        lines = [dataclasses.replace(lines[0], style="few-bit")]
    return lines


def _draft_chart(lines: Sequence[Line]) -> Draw:
    points = [point for line in lines for point in line.points]
    x = plots.linear("tokens drafted", 0.0, max(point.x for point in points), whole=True)
    y = plots.linear("drafts kept", 0.0, max(1.0, *(point.y for point in points)))

    def draw(width: int, margin: bool) -> Markup:
        return plots.chart(
            lines,
            x,
            y,
            title="Drafts that a check keeps, by how many are made",
            width=HALF if margin else width,
            height=300,
            margin=margin and _n_names(lines) > 1,
        )

    return draw


def _figure(draw: Draw, lines: Sequence[Line]) -> Markup:
    """A plot for wide windows and one for narrow ones, with a key where there is a choice."""
    return plots.figure(draw, lines, key=_n_names(lines) > 1)


def _n_names(lines: Sequence[Line]) -> int:
    return len({line.name for line in lines})


def _kept_sentence(row: Row) -> str:
    """The drafts of a sketch in words."""
    kept = sorted((int(n), float(value)) for n, value in row["expected_accepted"].items())
    return (
        f"{row['model']}, {row['name']}: "
        + ", ".join(f"of {n} drafts {value:.2f} are kept" for n, value in kept)
        + "."
    )


# One by one


def _one(row: Row) -> dict[str, Any]:
    """Plots and rows of one sketch."""
    outside = [task for task in row["tasks"] if task in row["outside"]]
    inside = [task for task in row["tasks"] if task not in outside]
    own, text = row["tasks"], row["text"]["tasks"]
    entries = [(task, own[task], text[task]) for task in inside]
    below = [(task, own[task], text[task]) for task in outside]
    order = [*entries, ("mean", row, row["text"]), *below]
    return {
        "name": row["name"],
        "model": row["model"],
        "read": float(row["bits"]["read"]),
        "kl_plot": _intervals(order, "kl", KL),
        "top1_plot": _intervals(order, "top1", "share of tokens with the same likeliest one"),
        "bits_plot": _bits_plot(row["bits"]),
        "inside": entries,
        "mean": (row, row["text"]),
        "outside": below,
        "tokens": sum(entry["tokens"] for entry in own.values()),
        "documents": sum(entry["documents"] for entry in own.values()),
        **{key: row[key] for key in ("new_tokens", "rollouts", "seed", "model_hash")},
    }


def _intervals(rows: Sequence[tuple[str, Row, Row]], key: str, label: str) -> Markup:
    """One figure of every task and the mean, with intervals."""
    points = [_interval(name, row, key) for name, row, _ in rows]
    ends = [value for point in points for value in (point.x, point.low, point.high)]
    axis = plots.linear(label, min(0.0, *ends) if key == "kl" else min(ends), max(ends))
    title = "; ".join(point.title for point in points)
    return plots.both(lambda width: plots.differences(points, axis, title=title, width=width))


def _interval(name: str, row: Row, key: str) -> Point:
    value, (low, high) = float(row[key]), (float(end) for end in row[f"{key}_ci95"])
    return Point(value, 0.0, low, high, f"{name}: {value:.4f} ({low:.4f} to {high:.4f})", name)


def _bits_plot(of: Row) -> Markup:
    """Bits of a weight by part, beside those of a weight that is not coded."""
    shown = [Side("dense", "ghost", DENSE_BITS, bits(DENSE_BITS))]
    for name, key in (
        ("all, stored", "stored"),
        ("all, read", "read"),
        ("feed-forward", "ffn"),
        ("attention", "attention"),
        ("head", "head"),
    ):
        style = "quantised" if key == "stored" else "few-bit"
        shown.append(Side(name, style, float(of[key]), bits(of[key])))
    parts = "; ".join(f"{side.name} {side.text}" for side in shown)
    title = f"Bits of a weight: {parts}"
    return plots.both(lambda width: plots.sides(shown, title=title, width=width))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
