"""Record what commands wrote: the files that tables and pages are made from.

    python bench/record.py FILE ... --to bench/results/h200 [--as NAME] [--about TEXT]
                           [--commit HASH] [--note TEXT ...] [--without KEY ...]

A recorded file has the head of `csfast.bench.head`, numbers of five digits and a row a line; what
no table or page reads of a row is left out. A file without a whole head is refused, and so is one
that would make all results larger than `MOST_BYTES`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from csfast.bench import head
from csfast.files import write_atomic

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
MOST_BYTES = 500_000  # of all files: what a clone has to carry
# Kinds of rows, by a key that no other kind has, and what is left out of them, a key of an object
# behind a point: half of an ablation are densities of each layer for each task, of studies losses
# of each task.
UNREAD = {
    "structure": ("density_per_task_layer",),
    "bits_stored": ("density", "per_task", "select_delta"),
    "params": (
        *("density_met", "energy", "family", "per_task", "recall", "select_delta"),
        *("sensor_fraction", "structure", "target", "target_density"),
    ),
    "relative_error": ("bits.attention", "bits.ffn", "relative_error", "seconds", "tasks"),
}
# Places behind the point for what stands many times in a row: tables and pages show four at most.
SHORT = ("density_per_layer", "density_per_task", "per_task", "per_task_ci95")
PLACES = 4


def recorded(document: dict[str, Any], *, without: Sequence[str] = (), **about: Any) -> str:
    """Give the text of a recorded file.

    Args:
        document: What a command wrote.
        without: More keys that are left out of the rows.
        about: Keys that are put in or replaced where they are not None.

    Raises:
        ValueError: The head is not whole, or a judgement of a sketch does not say of which model.
    """
    found = {**document, **{key: value for key, value in about.items() if value is not None}}
    faults = head.faults(found)
    if faults:
        raise ValueError(f"[record] {'; '.join(faults)}: want the head of csfast.bench.head.")
    if is_of_a_sketch(found) and not found.get("about"):
        raise ValueError("[record] 'about' is missing: want the model of the sketch, --about TEXT.")
    if "rows" in found:
        found["rows"] = [_row(row, without) for row in found["rows"]]
    return head.text_of(found)


def is_of_a_sketch(document: dict[str, Any]) -> bool:
    """Say whether a document is what ``csfast eval --sketch`` writes."""
    return "expected_accepted" in document and "bits" in document


def _row(row: dict[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """Give what is kept of a row."""
    unread = {key for kind, keys in UNREAD.items() if kind in row for key in keys} | {*without}
    return {
        key: _short(value) if key in SHORT else _without(value, key, unread)
        for key, value in row.items()
        if key not in unread
    }


def _without(value: Any, name: str, unread: set[str]) -> Any:
    """Give a value of a row; of an object what is read of it."""
    if not isinstance(value, dict):
        return value
    return {key: member for key, member in value.items() if f"{name}.{key}" not in unread}


def _short(value: Any) -> Any:
    """Give numbers with `PLACES` places, in lists and objects as deep as they go."""
    if isinstance(value, dict):
        return {key: _short(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_short(member) for member in value]
    return round(value, PLACES)


def write(text: str, path: pathlib.Path, results: pathlib.Path = RESULTS) -> None:
    """Write a recorded file.

    Raises:
        ValueError: All results would be larger than `MOST_BYTES`.
    """
    others = sum(p.stat().st_size for p in results.rglob("*.json") if p != path.resolve())
    if others + len(text.encode()) > MOST_BYTES:
        raise ValueError(
            f"[record] {path.name} of {len(text.encode())} bytes beside {others} of others: want "
            f"at most {MOST_BYTES} in all."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--to", type=pathlib.Path, required=True, help="folder of the device")
    parser.add_argument("--as", dest="name", help="name of the only file, without .json")
    parser.add_argument("--about", help="what was measured, for tables that show several")
    parser.add_argument("--commit", help="what it was made from")
    parser.add_argument("--note", action="append", help="whatever the head does not say")
    parser.add_argument("--without", nargs="+", default=(), help="keys left out of the rows")
    asked = parser.parse_args(arguments)
    if asked.name is not None and len(asked.files) > 1:
        parser.error(f"--as {asked.name} of {len(asked.files)} files: want one file.")
    for file in asked.files:
        path = asked.to / f"{asked.name or file.stem}.json"
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            about = {"commit": asked.commit, "about": asked.about, "remarks": asked.note}
            text = recorded(document, without=asked.without, **about)
            write(text, path)
        except (OSError, ValueError) as error:
            sys.stderr.write(f"record: {file.name}: {error}\n")
            return 1
        said = f"{path.parent.name}/{path.name}: {len(text)} bytes"
        if is_of_a_sketch(document):
            said += f", a sketch of {json.loads(text)['about']}"
            said += f", {document['bits']['read']:.2f} bits read of a weight"
        print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
