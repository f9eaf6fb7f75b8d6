"""The head of every file of results: what was run, on what, when, and with which versions.

`csfast bench`, `eval`, `ablate`, `phase` and `tokens` put it on what they write, `bench_ffn`,
`bench_ffn_cuda` and `bench_sketch` print the same keys, and `bench/record.py` refuses to record a
file without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import doctor
from . import timing

FORMAT = "csfast results 1"
KEYS = ("format", "command", "commit", "date", "machine", "versions")
_VERSIONS = ("csfast", "torch", "cuda", "driver")  # of what `doctor.machine` says


def of(
    device: torch.device, *, command: Sequence[str] = (), commit: str | None = None
) -> dict[str, Any]:
    """Give the head of results that are made now, in the order of `KEYS`.

    Args:
        device: Where they are made.
        command: What makes them, without the folders of one machine.
        commit: What it is made from, as the caller says; None if it is not said.

    Returns:
        ``machine`` says the device and what it consists of, ``versions`` those of csfast, torch
        and, on a GPU, CUDA and the driver; ``date`` is a day in UTC such as ``2026-01-31``.
    """
    machine = doctor.machine(device)
    versions = {name: machine.pop(name) for name in _VERSIONS if name in machine}
    values = (FORMAT, list(command), commit, timing.today(), machine, versions)
    return dict(zip(KEYS, values, strict=True))


def faults(document: Any) -> list[str]:
    """Name what is wrong with the head of a document; nothing if it is whole.

    Args:
        document: What `json` reads from a file of results.
    """
    if not isinstance(document, Mapping):
        return [f"{type(document).__name__} instead of an object"]
    found = [f"{key!r} is missing" for key in KEYS if key not in document]
    if document.get("format", FORMAT) != FORMAT:
        found.append(f"format = {document['format']!r}: want {FORMAT!r}")
    kinds = {"command": list, "date": str, "machine": dict, "versions": dict}
    for key, kind in kinds.items():
        if key in document and not isinstance(document[key], kind):
            found.append(f"{key!r} is no {kind.__name__}")
    machine = document.get("machine")
    if isinstance(machine, Mapping) and machine.get("device") not in ("cpu", "cuda"):
        found.append(f"machine.device = {machine.get('device')!r}: want 'cpu' or 'cuda'")
    return found


def text_of(document: Mapping[str, Any], *, digits: int = 5) -> str:
    """Give a document as JSON, the head first and a line for each of its keys and rows.

    Args:
        document: Finite numbers only; its ``rows``, if it has any, stand last.
        digits: To keep of a number that is not whole; five are a tenth of what a median is sure of.

    Raises:
        ValueError: A number is not finite.
    """
    rest = [key for key in document if key not in (*KEYS, "rows")]
    ordered = [*(key for key in KEYS if key in document), *rest]
    lines = [f"{json.dumps(key)}: {_line(document[key], digits)}" for key in ordered]
    if "rows" in document:
        rows = ",\n".join(_line(row, digits) for row in document["rows"])
        lines.append(f'"rows": [\n{rows}\n]' if rows else '"rows": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any, digits: int) -> str:
    """Write a value on one line."""
    return json.dumps(_rounded(value, digits), allow_nan=False, separators=(",", ":"))


def _rounded(value: Any, digits: int) -> Any:
    """Give the value with that many digits of every number in it that is not whole."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(member, digits) for key, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(member, digits) for member in value]
    return value
