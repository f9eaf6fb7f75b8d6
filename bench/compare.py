"""Compare the times of two files of results, row by row: is what is measured now as fast as before?

    python bench/compare.py OLD NEW [--tolerance .03] [--only TEXT]

For every case and variant of OLD: both medians in microseconds, and the new over the old. Rows that
only NEW has are named and decide nothing. The exit status is 1 if a row of OLD is missing in NEW or
is slower there by more than the tolerance, and 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

from csfast.bench import head

Name = tuple[str, str]  # of the case and of the variant


class Ratio(NamedTuple):
    """A row of OLD beside that of NEW."""

    name: Name
    old: float  # us
    new: float | None  # us; none if NEW lacks the row

    def exceeds(self, tolerance: float) -> bool:
        """Whether it is missing, or slower by more than `tolerance`."""
        return self.new is None or self.new > (1 + tolerance) * self.old


def medians(document: dict[str, Any], name: str) -> dict[Name, float]:
    """Give the medians of a file, in microseconds.

    Raises:
        ValueError: It has no head, no timings, or a row twice.
    """
    faults = head.faults(document)
    if faults:
        raise ValueError(f"[compare] {name}: {'; '.join(faults)}.")
    found: dict[Name, float] = {}
    for row in document.get("rows", ()):
        if "median_us" not in row:
            continue
        key = (row["case"], row["variant"])
        if key in found:
            raise ValueError(f"[compare] {name}: {' '.join(key)} stands twice: want each row once.")
        if not row["median_us"] > 0:
            raise ValueError(f"[compare] {name}: {' '.join(key)} takes {row['median_us']} us.")
        found[key] = float(row["median_us"])
    if not found:
        raise ValueError(f"[compare] {name}: no row has a median_us: want timings.")
    return found


def compare(old: dict[Name, float], new: dict[Name, float], only: str = "") -> list[Ratio]:
    """Give a ratio for every row of `old` whose case and variant contain `only`.

    Raises:
        ValueError: No row is left.
    """
    found = [Ratio(key, us, new.get(key)) for key, us in old.items() if only in " ".join(key)]
    if not found:
        raise ValueError(f"[compare] --only {only}: want a part of a case and its variant.")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=0.03, help="of a time, .03 if left out")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains it")
    asked = parser.parse_args(arguments)
    if not asked.tolerance >= 0:
        parser.error(f"--tolerance {asked.tolerance}: want a fraction of 0 or more.")
    try:
        old, new = (
            medians(json.loads(path.read_text(encoding="utf-8")), path.name)
            for path in (asked.old, asked.new)
        )
        ratios = compare(old, new, asked.only)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"compare: {error}\n")
        return 2
    width = max(len(" ".join(ratio.name)) for ratio in ratios)
    for ratio in ratios:
        said = "missing" if ratio.new is None else f"{ratio.new:10.2f} {ratio.new / ratio.old:7.3f}"
        mark = "  !" if ratio.exceeds(asked.tolerance) else ""
        print(f"{' '.join(ratio.name):{width}} {ratio.old:10.2f} {said}{mark}")
    for key in new:
        if key not in old and asked.only in " ".join(key):
            print(f"{' '.join(key)}: only in {asked.new.name}")
    logs = [math.log(ratio.new / ratio.old) for ratio in ratios if ratio.new is not None]
    if logs:
        print(f"{len(logs)} rows, geometric mean {math.exp(sum(logs) / len(logs)):.3f}")
    slower = sum(ratio.exceeds(asked.tolerance) for ratio in ratios)
    if slower:
        print(f"{slower} of {len(ratios)} missing or slower by more than {asked.tolerance:.1%}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
