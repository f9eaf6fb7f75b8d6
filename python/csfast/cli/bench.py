"""The command that times."""

from __future__ import annotations

import pathlib
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .. import files
from ..bench import layers as bench_
from ..bench import pursuits as bench_omp_
from ..bench import timed
from ..report import tables
from .app import (
    Json,
    Threads,
    Where,
    app,
    check_outputs,
    command,
    notes,
    place,
    write_json,
)


class Operation(StrEnum):
    """What to measure."""

    FFN = "ffn"
    EXECUTE = "execute"
    SELECT = "select"
    SENSE = "sense"
    NESTED = "nested"
    OMP = "omp"


@app.command()
def bench(
    operation: Annotated[Operation | None, typer.Argument(help="All but omp if left out.")] = None,
    device: Where = None,
    threads: Threads = None,
    json_file: Json = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small case, few runs.")] = False,
    commit: Annotated[str | None, typer.Option(help="Written beside the results.")] = None,
) -> None:
    """Time the operations of a layer beside the dense layer in torch, omp beside other pursuits."""
    check_outputs(json_file)
    where = place(device, threads)
    if operation is Operation.OMP:
        _bench_omp(where, json_file, quick, commit)
        return
    names = {None: bench_.VARIANTS, Operation.FFN: ("complete",)}
    with notes().status("bench") as status:
        results = bench_.run(
            (timed.QUICK,) if quick else timed.BESIDE_TORCH[where.type],
            device=where,
            runs=5 if quick else 40,
            variants=names[operation] if operation in names else (str(operation),),
            compiled=not quick,
            progress=status.update,
            found=lambda results: _write_so_far(json_file, results, commit),
        )
    _write_bench(json_file, results, commit)
    Console().print(tables.speed(results))
    # A quick run reads from caches, with few measurements: its fractions say nothing.
    mistakes = [] if quick else bench_.too_fast(results["rows"])
    for mistake in mistakes:
        typer.echo(f"csfast: [bench] {mistake}", err=True)
    if mistakes:
        raise typer.Exit(1)


def _write_bench(
    json_file: pathlib.Path | None, results: dict[str, Any], commit: str | None
) -> None:
    """Write what was measured."""
    results |= {"command": command(), "commit": commit}
    write_json(json_file, results)


def _write_so_far(
    json_file: pathlib.Path | None, results: dict[str, Any], commit: str | None
) -> None:
    """Write what was measured so far, where the rest can take its place: not into a pipe."""
    if json_file is not None and files.partial_of(json_file) is not None:
        _write_bench(json_file, results, commit)


def _bench_omp(
    where: torch.device, json_file: pathlib.Path | None, quick: bool, commit: str | None
) -> None:
    """Time orthogonal matching pursuit."""
    with notes().status("bench") as status:
        results = bench_omp_.run(
            bench_omp_.QUICK if quick else None,
            device=where,
            runs=3 if quick else 20,
            progress=status.update,
            found=lambda results: _write_so_far(json_file, results, commit),
        )
    _write_bench(json_file, results, commit)
    Console().print(tables.pursuits(results))
