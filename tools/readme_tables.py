"""Write the figures of README.md and of pages in docs from bench/results.

    python tools/readme_tables.py [--check | --targets FOLDER]

Every table of figures stands between two markers and is made here, from results that
`csfast bench|ablate|eval --json` and the benchmarks in C++ wrote, so that no figure is typed by
hand. So is docs/loss.svg, the picture of README.md, which is the first one of `csfast report`.
`--check` only says whether pages and picture are up to date, `--targets` shows what is to be
reached beside what the files of one folder say.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
MISSING = "not measured yet"
MOST = 11  # rows of README.md
SKETCH_BITS = 3.3  # at most read of a weight by the sketch that README.md shows of a model
BITS, DENSITY = 3, 0.5  # of the plans that README.md shows
PACKAGE = "orthogonal_matching_pursuit_gpu f32"
PRETRAINED = ("SmolLM2-135M-Instruct", "Gemma 3 270M")  # stand before models of our own
FRACTIONS = (0.25, 0.35, 0.55, 0.75)  # of the dense bytes, for which docs/findings.md has columns


class Target(NamedTuple):
    """A figure that is to be reached on one H200, and where it is found."""

    what: str
    case: str
    variant: str
    key: str  # of the row, or "vs_package"
    wanted: float
    at_most: bool = False  # whether less is better

    def reached(self, value: float) -> bool:
        """Say whether `value` is good enough."""
        return value <= self.wanted if self.at_most else value >= self.wanted


def _targets() -> Iterator[Target]:
    """Yield what is to be reached, in the order of the operations."""
    layer = "ffn d=4096 F=14336 density="
    for density, sigma, fraction in ((".50", 0.98, 0.92), (".25", 0.95, 0.88), (".10", 0.80, 0.76)):
        yield Target("density * dense / time", layer + density, "execute", "sigma", sigma)
        yield Target(
            "of read bandwidth", layer + density, "execute", "fraction_of_read_bandwidth", fraction
        )
    wanted = {
        "ffn d=4096 F=14336": {".50": 1.6, ".25": 2.6, ".10": 4.2},
        "ffn d=8192 F=28672": {".50": 1.55, ".25": 2.6, ".10": 4.4},
        "ffn d=896 F=4864": {".25": 1.5},
    }
    for shape, ratios in wanted.items():
        for density, ratio in ratios.items():
            case = f"{shape} density={density}"
            yield Target("times the best dense", case, "complete", "ratio_vs_dense", ratio)
    for batch, ratio in ((4, 2.4), (16, 1.9)):
        case = f"{layer}.25 batch={batch} joint"
        yield Target("times the best dense", case, "complete", "ratio_vs_dense", ratio)
    yield Target("us", layer + ".25", "select", "median_us", 11.0, at_most=True)
    for case, ratio in (
        ("omp m=256 n=1024 k=32 batch=5000", 5.0),
        ("omp m=512 n=2048 k=64 batch=5000", 5.0),
    ):
        yield Target("times the package", case, "support", "vs_package", ratio)
        yield Target("share of supports as in float64", case, "support", "agreement", 0.999)
    case = "omp m=256 n=1024 k=32 batch=132"
    yield Target("us an atom", case, "pursuit", "us_per_atom", 0.8, at_most=True)


TARGETS = tuple(_targets())


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Read every results file, in the order of their names, each with its own as `file`."""
    return [
        {**json.loads(path.read_text(encoding="utf-8")), "file": path.stem}
        for path in sorted(folder.rglob("*.json"))
    ]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Lay rows out in Markdown; without rows, say that there are none."""
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return MISSING
    return "\n".join(
        f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines)
    )


def place(machine: dict[str, Any]) -> str:
    """Name the machine in a table."""
    isa = f", {machine['isa']}" if machine.get("isa") else ""
    return machine.get("gpu", f"{machine.get('cpu')}, {machine.get('threads')} threads{isa}")


def pick(
    results: list[dict[str, Any]], wanted: Callable[[dict[str, Any], dict[str, Any]], bool]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield machine and row of every row that is wanted."""
    for result in results:
        for row in result.get("rows", ()):
            if "variant" in row and wanted(result["machine"], row):
                yield result["machine"], row


def beside_torch(row: dict[str, Any]) -> bool:
    return any(name.startswith("torch") for name in row["baselines"])


def is_layer(row: dict[str, Any]) -> bool:
    return bool(row["case"].startswith("ffn "))


def on_gpu(machine: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether it is a row of a layer on a GPU that says how it compares with the best dense one."""
    return machine.get("device") == "cuda" and is_layer(row) and "ratio_vs_dense" in row


def best_of(row: dict[str, Any]) -> str:
    return str(min(row["baselines"], key=row["baselines"].__getitem__))


def spread(row: dict[str, Any], digits: int = 1) -> str:
    """The median, and in brackets the tenths."""
    low, high = row["p10_us"], row["p90_us"]
    return f"{row['median_us']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def fraction_of(row: dict[str, Any], digits: int = 2) -> str:
    found = row["fraction_of_read_bandwidth"]
    return "-" if found is None else f"{found:.{digits}f}"


def sigma_of(row: dict[str, Any]) -> str:
    return "-" if row.get("sigma") is None else f"{row['sigma']:.2f}"


def targets(results: list[dict[str, Any]]) -> str:
    """What is to be reached, and what is."""
    rows = []
    for target in TARGETS:
        line = (short(target.case), target.variant, target.what)
        bound = f"{'<=' if target.at_most else '>='} {target.wanted:g}"
        found = [
            (machine, value)
            for machine, row in pick(results, lambda machine, row: machine.get("device") == "cuda")
            if row["case"] == target.case and row["variant"] == target.variant
            for value in [_value(row, target.key)]
            if value is not None
        ]
        for machine, value in found:
            said = "yes" if target.reached(value) else "no"
            rows.append((*line, bound, f"{value:.3g}", said, place(machine)))
        if not found:
            rows.append((*line, bound, MISSING, "-", "-"))
    return table(("case", "variant", "figure", "wanted", "measured", "reached", "machine"), rows)


def _value(row: dict[str, Any], key: str) -> float | None:
    """The figure of a row, none where the row does not say it or stands beside no torch."""
    if key == "vs_package":
        package = row["baselines"].get(PACKAGE)
        return None if package is None else package / row["median_us"]
    value = row.get(key)
    return value if beside_torch(row) and isinstance(value, float) else None


def titled(
    results: list[dict[str, Any]],
    wanted: Callable[[dict[str, Any], dict[str, Any]], bool],
    make: Callable[[dict[str, Any]], tuple[str, ...]],
    head: tuple[str, ...],
    subject: Callable[[dict[str, Any]], str] = lambda row: "",
) -> str:
    """Lay the wanted rows of every file out, a table for each subject.

    A line above each table says what all its rows share: where, from what and when they were
    measured, and their subject, if they have one.
    """
    found = []
    for result in results:
        groups: dict[str, list[tuple[str, ...]]] = {}
        for _, row in pick([result], wanted):
            groups.setdefault(subject(row), []).append(make(row))
        for name, rows in groups.items():
            said = (place(result["machine"]), f"commit {result['commit']}", result["date"])
            title = ", ".join((name, *said) if name else said)
            found.append(f"{title}:\n\n{table(head, rows)}")
    return "\n\n".join(found) or MISSING


def short(case: str) -> str:
    """Give the name of a case as a table has it, such as ``4096 x 14336, .25, 4 rows``."""
    said = re.sub(r"^ffn d=(\d+) F=(\d+) density=(\S+)", r"\1 x \2, \3", case)
    said = re.sub(r" blocks=(\d+)", r", blocks of \1", said)
    said = re.sub(r" batch=(\d+) joint$", r", \1 rows", said)
    return re.sub(r"^omp m=(\d+) n=(\d+) k=(\d+) batch=(\d+)$", r"omp (\1, \2, \3) x \4", said)


def _shape(row: dict[str, Any]) -> str:
    """The channels and neurons of a layer."""
    return short(row["case"]).partition(", ")[0]


def layer_line(row: dict[str, Any], names: dict[str, str] | None = None) -> tuple[str, ...]:
    """Give the line of a row of a layer, whichever benchmark wrote it."""
    best = best_of(row)
    names = OTHERS if names is None else names
    dense = row["ratio_vs_dense"] * row["median_us"]
    return (
        short(row["case"]).partition(", ")[2],
        row["variant"],
        spread(row, 1 if row["median_us"] >= 100 else 2),
        fraction_of(row),
        sigma_of(row),
        f"{dense:.1f}, {row['ratio_vs_dense']:.2f}x",
        f"{names.get(best, best)} {row['baselines'][best]:.1f}, {row['ratio_vs_best']:.2f}x",
    )


LAYER_HEAD = ("density", "variant", "us", "reads", "sigma", "dense", "best other")
OTHERS = {
    "torch bf16": "cuBLAS",
    "torch.compile max-autotune bf16": "compiled",
    "triton TEAL rule": "TEAL",
    "gather + cuBLAS": "gathered",
    "csfast all neurons": "all neurons",
    PACKAGE: "package",
}
ON_A_CPU = {"torch bf16": "torch", "torch.compile bf16": "compiled", "csfast all neurons": "own"}


def layers(results: list[dict[str, Any]]) -> str:
    """Layers on a GPU, beside the best of what was measured with them."""
    return titled(
        results, lambda m, row: on_gpu(m, row) and beside_torch(row), layer_line, LAYER_HEAD, _shape
    )


def native(results: list[dict[str, Any]]) -> str:
    """The same without Python, with more batches."""
    return titled(
        results,
        lambda m, row: on_gpu(m, row) and not beside_torch(row),
        layer_line,
        LAYER_HEAD,
        _shape,
    )


def cpu(results: list[dict[str, Any]]) -> str:
    """Layers on a CPU, those of the benchmark in C++ too: what a decode step calls, and a part."""

    def wanted(machine: dict[str, Any], row: dict[str, Any]) -> bool:
        here = machine.get("device") != "cuda" and is_layer(row)
        return here and row["variant"] in ("complete", "execute")

    return titled(results, wanted, lambda row: layer_line(row, ON_A_CPU), LAYER_HEAD, _shape)


def _generated(results: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """What bench/generate.py wrote, with tokens a second of dense and of csfast."""
    found = []
    for result in results:
        if str(result.get("about", "")).startswith("generate "):
            rates = {row["case"]: float(row["tokens_per_second"]) for row in result["rows"]}
            found.append((result, rates["dense"], rates["csfast"]))
    return found


def _decoder(result: dict[str, Any]) -> str:
    """Name the model of a run of bench/generate.py and how it decodes."""
    name = result["about"].removeprefix("generate ")
    random = f"{name.upper()} shape" if name in ("8b", "1b", ".5b") else name
    return f"{random}, compiled" if "--compiled" in result["command"] else random


def _density(result: dict[str, Any]) -> str:
    """The density that a command asked for."""
    (asked,) = (word[10:] for word in result["command"] if word.startswith("--density="))
    return f"{float(asked):.2f}".lstrip("0")


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1 else f"{value:.1f}"


def generate(results: list[dict[str, Any]]) -> str:
    """Whole models: tokens a second, dense beside csfast, and what csfast costs."""
    rows = []
    for result, dense, ours in _generated(results):
        costs = result["costs"]
        made = costs.get("calibrate_seconds")
        rows.append(
            (
                _decoder(result),
                place(result["machine"]),
                _density(result),
                f"{dense:.1f}",
                f"{ours:.1f}",
                f"{result['ratio']:.2f}x",
                "-" if made is None else _seconds(made),
                _seconds(costs["apply_seconds"]),
                f"{costs['apply_bytes'] / 1e9:.2f}",
                f"{costs['plan_bytes'] / 1e9:.2f}",
            )
        )
    head = ("model", "machine", "density", "dense", "csfast", "ratio")
    return table((*head, "calibrate, s", "apply, s", "apply, GB", "plan, GB"), rows)


def pursuit_line(row: dict[str, Any]) -> tuple[str, ...]:
    """Give the line of a row of a pursuit."""
    best = best_of(row)
    package = _value(row, "vs_package")
    return (
        row["variant"],
        spread(row, 0 if row["median_us"] >= 1000 else 1),
        f"{row['problems_per_second'] / 1e6:.3g}",
        f"{row['us_per_atom']:.2f}",
        f"{row['agreement']:.4f}",
        f"{row['ratio_vs_best']:.1f}x {OTHERS.get(best, best)}",
        "-" if package is None else f"{package:.1f}x",
    )


def pursuits(results: list[dict[str, Any]]) -> str:
    """Orthogonal matching pursuit, beside other ways to run it."""
    head = ("variant", "us", "M problems/s", "us an atom", "agreement", "best other")
    return titled(
        results,
        lambda _, row: "problems_per_second" in row,
        pursuit_line,
        (*head, "package"),
        lambda row: short(row["case"]),
    )


def _loss(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['delta']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _pretrained_first(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order results by whether they are of a pretrained model, otherwise as they stand."""
    return sorted(results, key=lambda result: result.get("about") not in PRETRAINED)


def rules(results: list[dict[str, Any]]) -> str:
    """All rules of every ablation at equal bytes: tables for every model."""
    found = []
    for result in _pretrained_first(results):
        if "best" not in result or "about" not in result:
            continue
        lines: dict[str, dict[float | None, dict[str, Any]]] = {}
        for row in result["rows"]:
            lines.setdefault(row["method"], {})[row["target"]] = row
        targets = [t for t in FRACTIONS if any(t in line for line in lines.values())]
        for pair in (targets[i : i + 2] for i in range(0, len(targets), 2)):
            shares = [f"{target:.2f}".lstrip("0") for target in pair]
            rows = [
                (method, *(_loss(line[t]) if t in line else "-" for t in pair))
                for method, line in lines.items()
                if any(t in line for t in pair)
            ]
            title = f"{result['about']}, {' and '.join(shares)} of the bytes"
            found.append(f"{title}:\n\n{table(('rule', *shares), rows)}")
        whole = [
            (method, f"{line[None]['bytes_fraction']:.3f}", _loss(line[None]))
            for method, line in lines.items()
            if None in line
        ]
        if whole:
            title = f"{result['about']}, weights that are read whole"
            found.append(f"{title}:\n\n{table(('code', 'bytes', 'loss over dense'), whole)}")
    return "\n\n".join(found) or MISSING


def storage(results: list[dict[str, Any]]) -> str:
    """Ways to store few-bit weights, at equal bits read: a table for every model."""
    found = []
    for result in results:
        stored = [row for row in result.get("rows", ()) if "bits_stored" in row]
        if not stored:
            continue
        targets = sorted({row["target"] for row in stored if row["target"] is not None})
        rows = []
        for name in dict.fromkeys(row["name"] for row in stored):
            members = [row for row in stored if row["name"] == name]
            line = {row["target"]: row for row in members}
            cells = [f"{line[t]['delta']:+.4f}" if t in line else "-" for t in targets]
            if None in line:
                cells = [_loss(line[None]), *["-"] * (len(targets) - 1)]
            rows.append((members[0]["kind"], name, f"{members[0]['bits_stored']:.2f}", *cells))
        head = ("kind", "code", "bits stored", *(f"{16 * target:.3g}" for target in targets))
        title = f"{result['about']}, loss over dense by the bits that are read for a weight"
        found.append(f"{title}:\n\n{table(head, rows)}")
    return "\n\n".join(found) or MISSING


def curve(results: list[dict[str, Any]]) -> str:
    """Rules at equal densities, by size of the model and length of its training."""
    rows: list[tuple[str, ...]] = []
    head: tuple[str, ...] = ("rule", "density")
    for result in results:
        if "models" not in result:
            continue
        models = [(model["parameters"], model["tokens"]) for model in result["models"]]
        head += tuple(f"{p / 1e6:.0f}/{t / 1e6:.0f}" for p, t in models)
        of_model: dict[tuple[str, float | None], dict[tuple[int, int], float]] = {}
        for row in result["rows"]:
            found = of_model.setdefault((row["method"], row["density"]), {})
            found[row["params"], row["tokens"]] = row["delta"]
        for (method, density), found in sorted(of_model.items(), key=str):
            cells = [f"{found[m]:.4f}" if m in found else "-" for m in models]
            rows.append((method, "-" if density is None else f"{density:g}", *cells))
    return table(head, rows)


def costs(results: list[dict[str, Any]]) -> str:
    """The same, a table for every plan."""
    found = []
    for result in _pretrained_first(results):
        if "mean_delta" not in result:
            continue
        tasks = result["tasks"]
        whole = {"delta": result["mean_delta"], "ci95": result["mean_ci95"]}
        for key in ("dense_loss", "loss", "kl", "top1_agreement"):
            whole[key] = sum(row[key] for row in tasks.values()) / len(tasks)
        rows = [
            (
                task,
                f"{row['dense_loss']:.3f}",
                f"{row['loss']:.3f}",
                _loss(row),
                f"{row['kl']:.3f}",
                f"{row['top1_agreement']:.3f}",
            )
            for task, row in {"mean": whole, **tasks}.items()
        ]
        about = result.get("about", "demo model")
        title = f"{about}, {result['bits']} bits, {result['density']:.2f} of the neurons run"
        title += f", {result['bytes_fraction']:.3f} of the feed-forward bytes read"
        head = ("task", "dense loss", "csfast loss", "difference, 95 %", "KL", "same top-1")
        found.append(f"{title}:\n\n{table(head, rows)}")
    return "\n\n".join(found) or MISSING


def _sketches(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give what `csfast eval --sketch` wrote, pretrained models first, of each by bits read."""
    found = [r for r in results if "expected_accepted" in r and "bits" in r]
    order = {name: place for place, name in enumerate(PRETRAINED)}
    return sorted(
        found,
        key=lambda r: (order.get(r["about"], len(order)), r["about"], r["bits"]["read"]),
    )


def _followed(result: dict[str, Any], figure: str, digits: int) -> str:
    """Give a figure of a sketch with its interval."""
    low, high = result[f"{figure}_ci95"]
    return f"{result[figure]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _kept(result: dict[str, Any]) -> str:
    """Of four drafts those that a check keeps."""
    value = result["expected_accepted"].get("4")
    return "-" if value is None else f"{value:.2f}"


def _loss_of(result: dict[str, Any]) -> str:
    """Loss of a sketch over dense."""
    return _loss({"delta": result["delta"], "ci95": result["delta_ci95"]})


def sketches(results: list[dict[str, Any]]) -> str:
    """Give what sketches cost: a table for every model and run; nothing where there is none."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for result in _sketches(results):
        said = (result["about"], place(result["machine"]), f"commit {result['commit']}")
        title = f"{', '.join(said)}, {result['date']}"
        groups.setdefault(title, []).append(
            (
                f"{result['bits']['read']:.2f}",
                f"{result['bits']['head']:.2f}",
                f"{result['bits']['stored']:.2f}",
                _followed(result, "kl", 4),
                f"{result['top1']:.3f}",
                _loss_of(result),
                _kept(result),
            )
        )
    if not groups:
        return ""
    lead = """\
Bits are those that are read of a weight, in all and of the head, and those stored. The other
figures are means over tasks along what the dense model goes on with; *kept* says how many of 4
drafts, made on the first level, a check keeps."""
    head = (
        "bits read",
        "head",
        "stored",
        "KL, 95 %",
        "top-1",
        "loss over dense, 95 %",
        "kept of 4",
    )
    return "\n\n".join(
        [lead, *(f"{title}:\n\n{table(head, rows)}" for title, rows in groups.items())]
    )


def _raced(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Give rows by name of what bench/studies/codes.py wrote, pretrained models in their order."""
    raced = [r for r in results if {"about", "new_tokens", "rows"} <= r.keys()]
    found = {r["about"]: r["rows"] for r in raced}
    return {name: {row["name"]: row for row in found[name]} for name in PRETRAINED if name in found}


def _divergence(row: dict[str, Any]) -> str:
    value, low, high = (f"{x:#.3g}".removeprefix("0") for x in (row["kl"], *row["kl_ci95"]))
    return f"{value} [{low}, {high}]"


def codes(results: list[dict[str, Any]], names: Sequence[str]) -> str:
    """Give few-bit codes of whole models, all models in one table."""
    models = _raced(results)
    head = ["code", "bits"]
    for about in models:
        head += [f"{about.removesuffix('-Instruct')}: KL, 95 %", "top-1"]
    rows = []
    for name in names:
        members = [model.get(name) for model in models.values()]
        bits = [f"{row['bits']['read']:.2f}" for row in members if row is not None]
        cells: list[str] = []
        for row in members:
            if row is None:
                cells += ["-", "-"]
            else:
                cells += [_divergence(row), f"{row['top1']:.3f}".removeprefix("0")]
        if bits:
            said = name.replace("blocks, columns scaled", "blocks, scaled")
            rows.append((said, ", ".join(dict.fromkeys(bits)), *cells))
    return table(tuple(head), rows)


def heads(results: list[dict[str, Any]]) -> str:
    """What a coded head adds to the divergence of layers that are coded already."""
    models = _raced(results)
    rows = []
    for name in HEADS:
        cells: list[str] = []
        for model in models.values():
            row, under = model[f"head {name} on {UNDER}"], model[UNDER]
            cells += [f"{row['bits']['head']:.2f}", f"{row['kl'] - under['kl']:+.5f}"]
        if cells:
            rows.append((name, *cells))
    names = [about.removesuffix("-Instruct") for about in models]
    return table(("head", *(cell for name in names for cell in (f"{name}: bits", "KL"))), rows)


def _drafters(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """What README.md shows of sketches, one of every pretrained model.

    It is the one that reads most within `SKETCH_BITS`; where all read more, the one that reads
    least.
    """
    for name in PRETRAINED:
        members = [result for result in _sketches(results) if result["about"] == name]
        within = [r for r in members if r["bits"]["read"] <= SKETCH_BITS]
        for result in within[-1:] or members[:1]:
            also = f"KL {result['kl']:.3f}, {_kept(result)} of 4 kept"
            read = f"{result['bits']['read']:.2f} bits"
            yield (
                f"{name.removesuffix('-Instruct')}, sketch",
                "16 bits",
                read,
                _loss_of(result),
                also,
            )


def _plans(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """What the plans cost that README.md shows, int8 beside them where it was measured."""
    for result in _pretrained_first(results):
        if "mean_delta" not in result or result["bits"] != BITS:
            continue
        if round(result["density"], 1) != DENSITY:  # what ran, beside what was asked for
            continue
        tasks, about = result["tasks"], result.get("about", "demo model")
        dense, ours, divergence, same = (
            sum(row[key] for row in tasks.values()) / len(tasks)
            for key in ("dense_loss", "loss", "kl", "top1_agreement")
        )
        whole = {"delta": result["mean_delta"], "ci95": result["mean_ci95"]}
        also = f"{result['bytes_fraction']:.2f} of bytes, KL {divergence:.2f}, top-1 {same:.2f}"
        name = about.removesuffix("-Instruct")
        yield f"{name}, csfast", f"{dense:.3f}", f"{ours:.3f}", _loss(whole), also
        for other in results if about in PRETRAINED else ():
            if "best" not in other or other.get("about") != about:
                continue
            dense = sum(other["dense"].values()) / len(other["dense"])
            for row in other["rows"]:
                if row["method"] == "rtn-int8":
                    also = f"{row['bytes_fraction']:.2f} of bytes"
                    loss = f"{dense + row['delta']:.3f}"
                    yield f"{name}, int8", f"{dense:.3f}", loss, _loss(row), also


def _briefly(machine: dict[str, Any]) -> str:
    """Name the machine in a row of README.md."""
    if machine.get("device") == "cuda":
        return str(machine["gpu"]).removeprefix("NVIDIA ")
    return f"{machine['threads']} CPU cores"


def _layer_times(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The times of a layer that README.md shows."""
    for device, case, has_torch in (
        ("cpu", "ffn d=2048 F=8192 density=.50", True),
        ("cpu", "ffn d=2048 F=8192 density=.25", False),
        ("cuda", "ffn d=4096 F=14336 density=.50", True),
        ("cuda", "ffn d=4096 F=14336 density=.25", True),
    ):
        for machine, row in pick(results, lambda machine, _: machine.get("isa") != "avx2"):
            if (machine.get("device"), row["case"], row["variant"]) != (device, case, "complete"):
                continue
            if beside_torch(row) != has_torch:
                continue
            best = min((n for n in row["baselines"] if n in DENSE), key=row["baselines"].get)
            dense = row["baselines"][best]
            times = (f"{1e-3 * us:.3g}" for us in (dense, row["median_us"]))
            name = f"layer, {_briefly(machine)}, {case.rpartition('=')[2]}, ms"
            yield name, *times, f"{dense / row['median_us']:.2f}x", f"dense: {DENSE[best]}"


DENSE = {
    "torch bf16": "torch",
    "torch f32": "torch, float32",
    "torch.compile bf16": "compiled",
    "torch.compile max-autotune bf16": "compiled, in a CUDA graph",
    "csfast all neurons": "csfast, all neurons",
}


def _whole_models(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Tokens a second of the largest model of every machine."""
    found = sorted(_generated(results), key=lambda run: -run[0]["costs"]["apply_bytes"])
    largest: dict[str, str] = {}
    for result, dense, ours in found:
        where = place(result["machine"])
        if largest.setdefault(where, result["about"]) != result["about"]:
            continue
        costs = result["costs"]
        made = costs.get("calibrate_seconds")
        also = f"apply {_seconds(costs['apply_seconds'])} s"
        if made is not None:
            also = f"calibrate {_seconds(made)} s, {also}"
        where = _briefly(result["machine"])
        name = f"{_decoder(result)}, {where}, {_density(result)}, tokens/s"
        yield name, f"{dense:.3g}", f"{ours:.3g}", f"{result['ratio']:.2f}x", also


def figures(results: list[dict[str, Any]]) -> str:
    """The few figures of README.md: what plans and sketches cost, times of layers and of models."""
    pretrained = [result for result in results if result.get("about") in PRETRAINED]
    own = [result for result in results if result.get("about") not in PRETRAINED]
    drafters = [*_drafters(results)]
    rows = [*_plans(pretrained), *drafters, *_plans(own)]
    rows += [*_layer_times(results), *_whole_models(results)]
    found = table(("", "dense", "instead", "difference", "beside it"), rows[:MOST])
    return f"{found}\n\n{SKETCH_WORDS}" if drafters else found


def picture(results: list[dict[str, Any]]) -> str:
    """Loss against bytes on a pretrained model, as a file of its own."""
    # Only this needs the package.
    from csfast.report import fronts

    (found,) = (r for r in results if "best" in r and r.get("about") == PRETRAINED[0])
    drawn = str(fronts.overview(found))
    used = set(re.findall(r"[\w-]+", " ".join(re.findall(r'class="([^"]*)"', drawn))))
    width, height = re.findall(r'^<svg viewBox="0 0 (\d+) (\d+)"', drawn)[0]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" fill="var(--card)"/>'
    start, rest = drawn.split(">", 1)
    style = f"<style>\n{_style(used)}</style>"
    drawn = f"{start.replace('<svg', head, 1)}>\n{style}\n{ground}{rest}\n"
    return re.sub(r"(?<=>)(?=<(?:line|text|path|poly|circle))", "\n", drawn)


def _style(used: set[str]) -> str:
    """The style of the report's page, as far as classes of a plot use it."""
    page = (ROOT / "python/csfast/report/page.html").read_text(encoding="utf-8")
    light, dark, rest = re.split(
        r"(@media \(prefers-color-scheme: dark\) \{\n.*?\n\}\n)",
        page[page.index(":root {") : page.index("@media (min-width")],
        flags=re.DOTALL,
    )
    rules = [
        f"{selectors.strip()} {{{body}}}\n"
        for selectors, body in re.findall(r"([^{}\n]+)\{([^{}]*)\}", rest)
        for names in [[re.findall(r"\w[\w-]*", one) for one in selectors.split(",")]]
        if selectors.strip() == "text"
        or ("." in selectors and any(set(one) <= used for one in names))
    ]
    known = set(re.findall(r"--([\w-]+):", light))
    colours = [f".{name} {{ --c: var(--{name}); }}\n" for name in sorted(used & known - {"grid"})]
    return "".join((light, dark, *rules, *colours))


SKETCH_WORDS = """\
A [*sketch*](docs/sketch.md) is the whole model in so many bits of a weight, for drafts that the
dense model checks: beside it stands how many of 4 drafts in a row a check keeps."""
# Rows of bench/studies/codes.py that pages show.
CODES = (
    *("round to nearest 4", "GPTQ 4", "rotated GPTQ 2", "rotated GPTQ 3", "rotated GPTQ 4"),
    *("scalar 3", "E8 3", "trellis 3 columns as they are", "trellis 2", "trellis 3", "trellis 4"),
    *("mix 2.53", "mix 3.25", "trellis 3+3", "rotated GPTQ 6"),
)
RACES = {
    "uniform": (
        *(f"{code} {n}" for code in ("round to nearest", "GPTQ") for n in (3, 4)),
        *(f"rotated GPTQ {n}" for n in (2, 3, 4, 5, 6)),
        *("rotated GPTQ ffn 2 attention 3", "rotated GPTQ ffn 2 attention 4"),
        *(f"{code} {n}" for code in ("scalar", "E8", "trellis") for n in (2, 3, 4)),
        *("scalar 3 groups", "trellis 3 memory 6", "trellis 3 memory 4", "trellis 2 memory 4"),
        *("mix 2.53", "mix 3.25", "mix 4.25"),
    ),
    "rotations": (
        *("trellis 3", "trellis 3 columns as they are", "trellis 3 not dealt"),
        *("trellis 3 full rotation", "trellis 3 not rotated"),
        *("rotated GPTQ 3", "rotated GPTQ 3 in blocks, columns scaled"),
        *("rotated GPTQ 4", "rotated GPTQ 4 in blocks, columns scaled"),
    ),
    "refits": (
        *("trellis 3", "trellis 3 one pass", "trellis 3 three passes"),
        *("trellis 3 fitted to weights", "trellis 3 scales refitted"),
        *("trellis 3 norms refitted", "trellis 3 norms scales refitted"),
    ),
    "levels": (
        *("trellis 2+1", "trellis 2+2", "trellis 4+1", "trellis 2+4", "trellis 3+3"),
        *("mix 2.53+3", "mix 3.25+3", "scalar 3+3", "rotated GPTQ 3+3", "rotated GPTQ 6"),
    ),
    "rules": (
        *("neurons 3+3 0.1", "neurons 3+3 0.1 skip 0.25", "neurons 3+3 0.25 skip 0.25"),
        *("neurons 3+3 0.1 skip 0.5", "neurons 2+2 0.25", "neurons 2+2 0.25 skip 0.25"),
        *("neurons 2+4 0.1", "neurons 2+4 0.25 skip 0.25", "neurons 3 exact 0.02"),
        *("channels 3+3 0.1", "channels 3+3 0.25", "channels 2+2 0.25", "channels 3 exact 0.02"),
        *("channels 3+3 0.1 not rotated", "layers 3+3 0.1", "layers 3+3 0.25", "layers 2+2 0.25"),
    ),
}
UNDER = "trellis 3"  # of the layers whose head is coded
HEADS = (
    *("round to nearest 4", "scalar 3", "scalar 4", "scalar 5", "scalar 6", "scalar 8"),
    *("trellis 3", "trellis 4", "trellis 3+3", "trellis 4+2", "trellis 4+4"),
    *("trellis 3+3 best 64", "trellis 3+3 best 256", "trellis 4+2 best 64"),
    *("trellis 4+2 best 256", "trellis 4+4 best 64", "trellis 3 best 64 exact"),
)
TABLES = {"figures": figures}
SPEED_TABLES = {
    "targets": targets,
    "generate": generate,
    "layers": layers,
    "native": native,
    "cpu": cpu,
    "pursuits": pursuits,
}
FOUND_TABLES = {"quality": costs, "rules": rules, "storage": storage, "curve": curve}
PICTURE = "docs/loss.svg"
QUALITY_TABLES = {"sketches": sketches, "codes": functools.partial(codes, names=CODES)}
RACE_TABLES = {
    **{name: functools.partial(codes, names=names) for name, names in RACES.items()},
    "heads": heads,
}
PAGES = {
    "README.md": TABLES,
    "docs/speed.md": SPEED_TABLES,
    "docs/findings.md": FOUND_TABLES,
    "docs/quality.md": QUALITY_TABLES,
    "docs/decisions/0006-sketches-are-trellis-codes.md": RACE_TABLES,
}


def render(
    page: str,
    results: list[dict[str, Any]],
    tables: dict[str, Callable[[list[dict[str, Any]]], str]] = TABLES,
) -> str:
    """Put every table between its markers."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make(results)
        body += "\n" if body else ""
        page, n = pattern.subn(lambda m, body=body: f"{m[1]}{body}{m[2]}", page)
        if n != 1:
            raise ValueError(f"[readme_tables] marker {name!r} stands {n} times: want once.")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--targets", type=pathlib.Path, metavar="FOLDER")
    asked = parser.parse_args()
    check = asked.check
    if asked.targets is not None:
        print(targets(load(asked.targets)))
        return 0
    results = load(ROOT / "bench" / "results")
    behind = False
    for name in (*PAGES, PICTURE):
        path = ROOT / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = render(old, results, PAGES[name]) if name in PAGES else picture(results)
        if check and old != new:
            sys.stderr.write(f"{name} is behind bench/results: run python tools/readme_tables.py\n")
            behind = True
        if not check:
            path.write_text(new, encoding="utf-8")
    if behind:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
