"""Write the figures of README.md, docs/speed.md and docs/findings.md from bench/results.

    python tools/readme_tables.py [--check | --targets FOLDER]

Every table of figures stands between two markers and is made here, from results that
`csfast bench|ablate|eval --json` and the benchmarks in C++ wrote, so that no figure is typed by
hand. `--check` only says whether the pages are up to date, `--targets` shows what is to be reached
beside what the files of one folder say.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
MISSING = "not measured yet"
SHOWN = "ablate-demo"  # the ablation that README.md shows; docs/findings.md has all
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


def speed(results: list[dict[str, Any]]) -> str:
    """Times of a layer, dense beside ours: what a decode step calls, and execution alone."""

    def wanted(machine: dict[str, Any], row: dict[str, Any]) -> bool:
        here = is_layer(row) and row["variant"] in ("complete", "execute")
        # What a GPU takes without torch is in docs/speed.md.
        return here and (machine.get("device") != "cuda" or beside_torch(row))

    picked = list(pick(results, wanted))
    has_sigma = any("sigma" in row for _, row in picked)
    rows = []
    for machine, row in picked:
        best = best_of(row)
        line = (
            place(machine),
            row["case"],
            row["variant"],
            f"{row['baselines'][best]:.0f} ({best})",
            f"{row['median_us']:.0f}",
            f"{row['ratio_vs_best']:.2f}x",
            fraction_of(row),
        )
        rows.append((*line, sigma_of(row)) if has_sigma else line)
    best = "best other, us" if has_sigma else "best dense, us"
    against = "against it" if has_sigma else "against dense"
    head = ("machine", "case", "variant", best, "csfast, us", against, "of read bandwidth")
    return table((*head, "sigma") if has_sigma else head, rows)


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


def layer_line(row: dict[str, Any]) -> tuple[str, ...]:
    """Give the line of a row of a layer, whichever benchmark wrote it."""
    best = best_of(row)
    dense = row["ratio_vs_dense"] * row["median_us"]
    return (
        short(row["case"]).partition(", ")[2],
        row["variant"],
        spread(row, 1 if row["median_us"] >= 100 else 2),
        fraction_of(row),
        sigma_of(row),
        f"{dense:.1f}, {row['ratio_vs_dense']:.2f}x",
        f"{OTHERS.get(best, best)} {row['baselines'][best]:.1f}, {row['ratio_vs_best']:.2f}x",
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


def selection(results: list[dict[str, Any]]) -> str:
    """Loss over dense at equal bytes: few-bit selection beside the best other rule."""
    rows = []
    for result in results:
        if result.get("file", SHOWN) != SHOWN:
            continue
        for best in result.get("best", ()):
            if best["other"] is None:
                continue
            for row in result["rows"]:
                if row["family"] != "few-bit" or row["target"] != best["target"]:
                    continue
                low, high = row["ci95"]
                rows.append(
                    (
                        f"{best['target']:g}",
                        row["method"] + (" (chosen)" if row["method"] == best["few_bit"] else ""),
                        f"{row['delta']:+.4f} [{low:+.4f}, {high:+.4f}]",
                        f"{best['other_delta']:+.4f} ({best['other']})",
                        f"{row['delta'] / best['other_delta']:.2f}",
                    )
                )
    head = ("FFN bytes, of dense", "few-bit selection", "loss over dense, 95 %")
    return table((*head, "best other selection", "ratio"), rows)


def quantised(results: list[dict[str, Any]]) -> str:
    """Quantised weights, read whole or as the support says, on the axes of the selection rules."""
    rows = [
        (row["method"], f"{row['bytes_fraction']:.3f}", f"{row['delta']:+.4f}")
        for result in results
        if result.get("file", SHOWN) == SHOWN
        for row in result.get("rows", ())
        if row.get("family") in ("quantised", "mixed") and _is_first(result, row)
    ]
    return table(
        ("method", "FFN bytes, of dense", "loss over dense"), sorted(rows, key=lambda r: r[1])
    )


def _is_first(result: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether no row before has the method and as many bytes."""
    same = [
        other
        for other in result["rows"]
        if other["method"] == row["method"]
        and round(other["bytes_fraction"], 3) == round(row["bytes_fraction"], 3)
    ]
    return same[0] is row


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


def quality(results: list[dict[str, Any]]) -> str:
    """The evaluation of a plan: the mean over tasks, then each task."""
    rows = []
    for result in _pretrained_first(results):
        if "mean_delta" not in result:
            continue
        tasks = result["tasks"]
        whole = {"delta": result["mean_delta"], "ci95": result["mean_ci95"]}
        for key in ("dense_loss", "loss", "kl", "top1_agreement"):
            whole[key] = sum(row[key] for row in tasks.values()) / len(tasks)
        for task, row in {"mean": whole, **tasks}.items():
            rows.append(
                (
                    result.get("about", "demo model"),
                    f"{result['bits']}",
                    f"{result['density']:.2f}",
                    f"{result['bytes_fraction']:.3f}",
                    task,
                    f"{row['dense_loss']:.3f}",
                    f"{row['loss']:.3f}",
                    _loss(row),
                    f"{row['kl']:.3f}",
                    f"{row['top1_agreement']:.3f}",
                )
            )
    head = ("model", "bits", "density", "FFN bytes", "task", "dense loss", "csfast loss")
    return table((*head, "difference, 95 %", "KL", "same top-1"), rows)


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


TABLES = {"speed": speed, "selection": selection, "quantised": quantised, "quality": quality}
SPEED_TABLES = {"targets": targets, "layers": layers, "native": native, "pursuits": pursuits}
FOUND_TABLES = {"quality": costs, "rules": rules, "storage": storage, "curve": curve}
PAGES = {"README.md": TABLES, "docs/speed.md": SPEED_TABLES, "docs/findings.md": FOUND_TABLES}


def render(
    page: str,
    results: list[dict[str, Any]],
    tables: dict[str, Callable[[list[dict[str, Any]]], str]] = TABLES,
) -> str:
    """Put every table between its markers."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make(results)
        page, n = pattern.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", page)
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
    for name, tables in PAGES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = render(old, results, tables)
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
