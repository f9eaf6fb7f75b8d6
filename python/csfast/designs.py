"""How CUDA would go about an operation: pure, printable, for machines that need not be there."""

from __future__ import annotations

import torch

from .ops import check, native


def omp_plan(
    batch: int,
    n_atoms: int,
    budget_max: int,
    *,
    single: bool = True,
    processors: int = 132,
    registers: int = 65536,
    threads: int = 2048,
    shared_per_block: int = 232448,
    shared_per_processor: int = 233472,
    design: str = "",
) -> str:
    """Say how `omp` is launched on a CUDA device, without one.

    Args:
        batch: Signals.
        n_atoms: Atoms of the dictionary.
        budget_max: Atoms to make room for.
        single: Whether a step takes one atom, as with ``per_step = group = 1``, and `gram` and
            `correlation` begin at multiples of 16 bytes. Of no account beside a design.
        processors: Streaming multiprocessors of the device; what follows is of each. Left out, all
            are those of Hopper.
        registers: Of four bytes.
        threads: That can be at work.
        shared_per_block: Bytes of shared memory that one block may ask for.
        shared_per_processor: Bytes of shared memory.
        design: See `omp`.

    Raises:
        ValueError: A size is out of range, or the design is unknown or does not fit.
        TypeError: A size is not an int, or `single` not a bool.
    """
    sizes = (batch, n_atoms, budget_max)
    machine = (processors, registers, threads, shared_per_block, shared_per_processor)
    names = "batch n_atoms budget_max processors registers threads".split()
    names += ["shared_per_block", "shared_per_processor"]
    check.integers("omp", **dict(zip(names, (*sizes, *machine), strict=True)))
    check.of_type("omp", "single", single, bool, "a bool")
    return native.omp_plan(*sizes, single, *machine, design)


def choose(
    batch: int,
    d: int,
    n_neurons: int,
    *,
    tile_rows: int = 1,
    shared: bool = False,
    senses: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    design: str = "",
    capability: int = 90,
    n_processors: int = 132,
    shared_bytes: int = 227 << 10,
) -> str:
    """Tell how CUDA executes a layer of these sizes; pure, for machines that need not be there.

    Args:
        batch: Rows.
        d: Width of a row.
        n_neurons: Neurons of the layer.
        tile_rows: Neurons a tile.
        shared: Whether all rows have one list.
        senses: Whether the list is still to be made, as `ffn` does.
        dtype: T, of tensors that begin at multiples of 16 bytes.
        design: What is asked for, see `ffn`.
        capability: Compute capability of the machine, times ten.
        n_processors: Its streaming multiprocessors.
        shared_bytes: Shared memory that a block may have.

    Returns:
        For example ``list register overlapping blocks=132 group_threads=512 vectors=1``.

    Raises:
        ValueError: The design is unknown or does not fit.
    """
    sizes = (batch, d, n_neurons, tile_rows)
    check.integers("execute", batch=batch, d=d, n_neurons=n_neurons, tile_rows=tile_rows)
    if min(d, n_neurons, tile_rows) < 1:
        raise ValueError(
            f"[execute] d = {d}, n_neurons = {n_neurons}, tile_rows = {tile_rows}: want 1 at least."
        )
    kind = (shared, senses, dtype.itemsize, design)
    return native.choose(*sizes, *kind, capability, n_processors, shared_bytes)
