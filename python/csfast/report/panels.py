"""What the other sections of the report show: results turned into plots and sentences.

Each function takes results of one kind, checked by `results.check`, and gives what the template
asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import plots, words
from .findings import nats
from .fronts import density_map
from .plots import HALF, NARROW, PALETTE, WIDE, Axis, Draw, Line, Point, Side, mark_of, palette

LEVELS = 10  # of effort, in the colour of a token
WORSE = 0.5  # nats over dense from which a token is underlined
PROMPT = 600  # letters of a prompt that are shown, its last ones

Row = Mapping[str, Any]


# Evaluation


def evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the verdict, the table and the charts of an evaluation."""
    entries = found["tasks"].values()
    by_task = found.get("density_per_task_layer")
    layers = found["density_per_layer"]
    outside = [name for name in found["tasks"] if name in found.get("outside", ())]
    inside = [name for name in found["tasks"] if name not in outside]
    points = [_difference(name, found["tasks"][name]) for name in inside]
    points.append(_difference("mean", {"delta": found["mean_delta"], "ci95": found["mean_ci95"]}))
    points += [_difference(name, found["tasks"][name]) for name in outside]
    ends = [0.0] + [value for point in points for value in (point.x, point.low, point.high)]
    axis = plots.linear(plots.DELTA, min(ends), max(ends))
    return {
        **found,
        "inside": [(name, found["tasks"][name]) for name in inside],
        "outside": [(name, found["tasks"][name]) for name in outside],
        "verdict": quality_verdict(found),
        "code": words.code(found["bits"]),
        "thresholds": words.thresholds(found["task"]),
        "differences": plots.both(
            lambda width: plots.differences(
                points, axis, title="; ".join(point.title for point in points), width=width
            )
        ),
        "chart": plots.both(
            lambda width: plots.bars(
                layers, label="layer", title="Density of every layer", width=width
            )
        ),
        "map": density_map(by_task) if by_task else None,
        "total_tokens": sum(entry["tokens"] for entry in entries),
        "total_sparse": sum(entry["sparse_tokens"] for entry in entries),
    }


def _difference(name: str, row: Row) -> Point:
    """A loss over dense with its interval, along."""
    delta, (low, high) = float(row["delta"]), (float(end) for end in row["ci95"])
    return Point(delta, 0.0, low, high, f"{name}: {delta:+.4f} ({low:+.4f} to {high:+.4f})", name)


def quality_verdict(found: Mapping[str, Any]) -> str:
    """Say in a sentence what is read and what it costs."""
    low, high = found["mean_ci95"]
    return (
        f"csfast reads {found['bytes_fraction']:.0%} of the bytes of the feed-forward layers and "
        f"loses {nats(found['mean_delta'])} nats a token against dense "
        f"({nats(low)} to {nats(high)})."
    )


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
        least = _per_layer(
            "least possible",
            "oracle",
            "",
            [of[0]["welch"] for of in zip(*members, strict=True)],
            dashed=True,
        )
        for run in plots.parts([of for of in members if not of[0]["weighted"]]):
            lines = [
                _per_layer(of[0]["name"], palette(i), mark_of(i), [d["coherence"] for d in of])
                for i, of in enumerate(run)
            ]
            lines.append(least)
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
    """Least squared singular values of one dictionary over the layers, bands up to the largest."""
    floor = 1e-4
    lines = []
    for kind, title, style, mark in (
        ("drawn", "random supports", "ghost", ""),
        ("used", "supports in use", "s0", "circle"),
    ):
        points = tuple(
            Point(
                float(number),
                max(d[kind][0], floor),
                max(d[kind][0], floor),
                max(d[kind][1], floor),
                f"layer {number}, {title}: {d[kind][0]:.3g} to {d[kind][1]:.3g}",
            )
            for number, d in enumerate(of_layers)
        )
        lines.append(Line(title, style, mark, points, dashed=kind == "drawn"))
    x = _layer_axis(len(of_layers))
    values = [value for line in lines for point in line.points for value in (point.y, point.high)]
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
        "code": words.code(found["bits"]),
        "thresholds": words.thresholds(found["task"]),
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


# Demo


def demo(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the verdict and two bars of a demo, and what they come from."""
    generation = found.get("generation") or []
    times = [_milliseconds(generation, side) for side in ("dense", "csfast")]
    return {
        "verdict": demo_verdict(found),
        "sides": _two_bars(found, times),
        "samples": found.get("samples"),
        "generation": [_sample(row) for row in generation],
        "bench": [_timed(row) for row in found.get("bench") or []],
        "slower": found.get("slower") or [],
        "calibration": found.get("calibration"),
        "seconds": found.get("seconds"),
        "machine": list(machine(found.get("machine") or {})),
    }


def demo_verdict(found: Mapping[str, Any]) -> str:
    """Say in one sentence what csfast cost and gained against dense on this machine."""
    dense, ours = (_milliseconds(found.get("generation") or [], s) for s in ("dense", "csfast"))
    parts = []
    if dense is not None and ours is not None:
        parts.append(
            f"generated a token in {ours:.1f} ms where dense took {dense:.1f} ms, "
            f"{words.ratio(dense / ours)}"
        )
    quality = found.get("evaluation")
    if quality is not None:
        parts.append(
            f"read {quality['bytes_fraction']:.0%} of the bytes of the feed-forward layers"
        )
        more = math.expm1(min(quality["mean_delta"], 9.0))
        parts.append(
            f"lost {nats(quality['mean_delta'])} nats a token on text it had not seen "
            f"({more:+.1%} perplexity)"
        )
    if not parts:
        return "csfast was run beside dense; neither speed nor quality was measured."
    joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"On this machine csfast {joined}."


def _milliseconds(generation: Sequence[Row], side: str) -> float | None:
    """Time of a token over all samples that are long enough on both sides; None if none is."""
    timed = [
        (row[side]["seconds"], row[side]["tokens_per_second"])
        for row in generation
        if all(row[name]["tokens_per_second"] for name in ("dense", "csfast"))
    ]
    tokens = math.fsum(seconds * rate for seconds, rate in timed)
    return 1000 * math.fsum(seconds for seconds, _ in timed) / tokens if timed else None


def _two_bars(found: Mapping[str, Any], times: Sequence[float | None]) -> dict[str, Any] | None:
    """Two bars: the time of a token, or where that is not known what is read for one."""
    dense, ours = times
    quality = found.get("evaluation")
    if dense is not None and ours is not None:
        title, values = "Time of a generated token", [dense, ours]
        texts = [f"{value:.1f} ms" for value in values]
    elif quality is not None:
        title, values = "Bytes that the feed-forward layers read", [1.0, quality["bytes_fraction"]]
        texts = [f"{value:.0%}" for value in values]
    else:
        return None
    shown = [
        Side(name, style, value, text)
        for name, style, value, text in zip(
            ("dense", "csfast"), ("ghost", "few-bit"), values, texts, strict=True
        )
    ]
    told = f"{title}: {', '.join(f'{side.name} {side.text}' for side in shown)}"
    return {
        "title": title,
        "plot": plots.both(lambda width: plots.sides(shown, title=told, width=width)),
    }


def _sample(row: Row) -> dict[str, Any]:
    """One text, dense beside csfast."""
    prompt = row["prompt"]
    sides = []
    for name in ("dense", "csfast"):
        rate = row[name]["tokens_per_second"]
        time = "too short to time" if not rate else f"{1000 / rate:.1f} ms a token"
        sides.append({"name": name, "text": row[name]["text"], "time": time})
    return {
        "task": row["task"],
        "prompt": prompt if len(prompt) <= PROMPT else f"… {prompt[-PROMPT:]}",
        "sides": sides,
        "same": row["dense"]["text"] == row["csfast"]["text"],
    }


def _timed(row: Row) -> dict[str, Any]:
    """One row of a benchmark in milliseconds, beside dense."""
    ours = row["median_us"] / 1000
    return {
        "case": words.case(row["case"]),
        "dense": ours * row["ratio_vs_dense"],
        "csfast": ours,
        "verdict": words.ratio(row["ratio_vs_dense"]),
        "is_slower": row["ratio_vs_dense"] < 1,
    }


_MACHINE = {
    "gpu": "GPU",
    "cpu": "processor",
    "cores": "cores",
    "threads": "threads",
    "isa": "instruction set",
    "driver": "driver",
    "platform": "system",
    "torch": "torch",
    "csfast": "csfast",
}


def machine(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give what is known of a machine, in words; what is no text or number is left out."""
    for key, name in _MACHINE.items():
        if isinstance(found.get(key), str | int | float):
            yield name, str(found[key])


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
        for run in plots.parts(methods, PALETTE):
            plotted = _studies([r for r in of_density if r["method"] in run], run, longest)
            if plotted:
                lines = [Line(name, palette(i), mark_of(i), ()) for i, name in enumerate(run)]
                groups.append((density, plots.legend(lines), plotted))
    return {"groups": groups, "rows": rows}


def _studies(
    rows: Sequence[Row], methods: Sequence[str], longest: Mapping[float, float]
) -> list[tuple[str, Markup]]:
    """Loss against size after the longest training, and against training for every size."""
    plotted = []
    some = [row for row in rows if row["tokens"] == longest[row["params"]]]
    if len({row["params"] for row in some}) > 1:
        plotted.append(("longest training", _study(some, methods, "params", "parameters")))
    for params in sorted(longest):
        some = [row for row in rows if row["params"] == params]
        if len({row["tokens"] for row in some}) > 1:
            title = f"{plots.short(params)} parameters"
            plotted.append((title, _study(some, methods, "tokens", "tokens of training")))
    return plotted


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
            lines.append(Line(name, palette(i), mark_of(i), points))
    points = tuple(point for line in lines for point in line.points)
    x = plots.logarithmic(label, min(p.x for p in points), max(p.x for p in points))
    y = plots.losses([v for p in points for v in (p.y, max(p.low, -0.01))])
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
        for run in plots.parts(kinds, PALETTE):
            lines = [_stored(rows, kind, i, key, best) for i, kind in enumerate(run)]
            figure = plots.figure(_bits_chart(lines, label), lines, key=False)
            plotted.append((label, plots.legend(lines) + figure))
    return {"plots": plotted, "rows": sorted(rows, key=lambda row: float(row["bits_read"]))}


def _stored(rows: Sequence[Row], kind: str, number: int, key: str, best: Sequence[Row]) -> Line:
    """The rows of one kind as points; those that no other beats stand out."""
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
    return Line(kind, palette(number), mark_of(number), points, joined=False)


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
    y = plots.losses([v for p in points for v in (p.y, max(p.low, -0.01))])

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
