"""Write the figures of the README from the files in bench/results.

    python tools/readme_tables.py [--check]

Every table of figures in README.md stands between two markers and is made here, from results that
`csfast bench|ablate|eval --json` wrote, so that no figure is typed by hand. `--check` only says
whether the README is up to date.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
MISSING = "not measured yet"


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Read every results file, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Lay rows out in Markdown; without rows, say that there are none."""
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return MISSING
    return "\n".join(
        f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines)
    )


def speed(results: list[dict[str, Any]]) -> str:
    """Times of a layer, dense beside ours: what a decode step calls, and execution alone."""
    rows = []
    for result in results:
        for row in result.get("rows", ()):
            if row.get("variant") not in ("complete", "execute"):
                continue
            machine = result["machine"]
            best = min(row["baselines"], key=row["baselines"].__getitem__)
            rows.append(
                (
                    machine.get("gpu", f"{machine.get('cpu')}, {machine.get('threads')} threads"),
                    row["case"],
                    row["variant"],
                    f"{row['baselines'][best]:.0f} ({best})",
                    f"{row['median_us']:.0f}",
                    f"{row['ratio_vs_best']:.2f}x",
                    f"{row['fraction_of_read_bandwidth']:.2f}",
                )
            )
    head = ("machine", "case", "variant", "best dense, us", "csfast, us", "against dense")
    return table((*head, "of read bandwidth"), rows)


def selection(results: list[dict[str, Any]]) -> str:
    """Loss over dense at equal bytes: few-bit selection beside the best other rule."""
    rows = []
    for result in results:
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
    """Plain round-to-nearest weights, on the same axes as the selection rules."""
    rows = [
        (row["method"], f"{row['bytes_fraction']:.3f}", f"{row['delta']:+.4f}")
        for result in results
        for row in result.get("rows", ())
        if str(row.get("method", "")).startswith("rtn-")
    ]
    return table(("method", "FFN bytes, of dense", "loss over dense"), rows)


def quality(results: list[dict[str, Any]]) -> str:
    """The evaluation of a plan, by task."""
    rows = []
    for result in results:
        if "mean_delta" not in result:
            continue
        for task, row in result["tasks"].items():
            low, high = row["ci95"]
            rows.append(
                (
                    f"{result['bits']}",
                    f"{result['density']:.2f}",
                    f"{result['bytes_fraction']:.3f}",
                    task,
                    f"{row['dense_loss']:.3f}",
                    f"{row['loss']:.3f}",
                    f"{row['delta']:+.4f} [{low:+.4f}, {high:+.4f}]",
                    f"{row['top1_agreement']:.3f}",
                )
            )
    head = ("bits", "density", "FFN bytes", "task", "dense loss", "csfast loss", "difference, 95 %")
    return table((*head, "same top-1"), rows)


TABLES = {"speed": speed, "selection": selection, "quantised": quantised, "quality": quality}


def render(readme: str, results: list[dict[str, Any]]) -> str:
    """Put every table between its markers."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make(results)
        readme, n = pattern.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", readme)
        if n != 1:
            raise ValueError(f"[readme_tables] marker {name!r} stands {n} times: want once.")
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old, load(ROOT / "bench" / "results"))
    if check and old != new:
        sys.stderr.write("README.md is behind bench/results: run python tools/readme_tables.py\n")
        return 1
    if not check:
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
