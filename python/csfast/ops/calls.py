"""The kernels, as functions of torch tensors.

Each function here is one C++ operation of the same name, which is also registered with torch as
``torch.ops.csfast.<name>``, so that it works under ``torch.compile``. The only logic is to allocate
what an operation writes and to hand over the current stream; C++ checks types, shapes and devices.

All tensors of a call are contiguous and on one device, the CPU or CUDA. T is one of float32,
float16 and bfloat16, the same for every tensor of a call that has it. A tensor that does not fit
raises ``TypeError`` for its dtype or layout and ``ValueError`` for its shape, device or values; a
device without a backend raises `BackendError`. On CUDA the calls are asynchronous, and values
inside tensors (indices, budgets) are not checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import BackendError, cuda_available, isa
from ..codes.levels import Packed
from ..types import TERNARY, Code

__all__ = [
    "BackendError",
    "Pursuit",
    "PursuitStatus",
    "Session",
    "Support",
    "TileList",
    "backend_info",
    "cuda_available",
    "execute",
    "ffn",
    "ffn_workspace",
    "isa",
    "nested",
    "omp",
    "omp_plan",
    "project",
    "recover",
    "select",
    "sense",
    "tile",
]

_INT32_MAX = 2**31 - 1
_CODES: dict[Code, int] = {1: 1, 2: 2, 3: 3, 4: 4, TERNARY: 5}  # as csfast::Code numbers them
# May be None.
_OPTIONAL = {"offset", "gate_bias", "up_bias", "down_bias", "weight", "stats", "cap", "dropped"}


@dataclasses.dataclass(frozen=True)
class Support:
    """Which groups of neurons matter to each row of a batch, or to all together: from `recover`.

    With weights there is one list, otherwise one for each row of the batch.
    """

    index: Tensor  # (lists, n_groups) int32, ascending up to count, 0 beyond
    count: Tensor  # (lists,) int32
    usage: Tensor  # (lists, n_groups) float32: what the measurements promise
    missed: Tensor  # (lists,) float32: sum of usage^2 over the groups that are not in it
    group_rows: int = 1  # group t is neurons t * group_rows .. (t + 1) * group_rows - 1


@dataclasses.dataclass(frozen=True)
class TileList:
    """Which blocks of neurons each row of a batch reads, from `tile` or `select`.

    One list for each row, or one for all of them.
    """

    tile: Tensor  # (lists, n_tiles_max) int32, ascending up to n_tiles, 0 beyond
    n_tiles: Tensor  # (lists,) int32
    tile_rows: int  # tile t is neurons t * tile_rows .. (t + 1) * tile_rows - 1
    dropped: Tensor | None = None  # (lists,) int32: tiles that only a cap left out, if there is one


class PursuitStatus(enum.IntEnum):
    """Why `omp` took no further atom."""

    CONVERGED = 0  # what is left is within the tolerance, or no atom explains any of it
    BUDGET = 1  # the budget is spent
    ZERO = 2  # the signal has no energy
    DEPENDENT = 3  # the next atom lies in the span of those taken, up to rounding
    NOT_FINITE = 4  # something is not finite, or an energy is negative: nothing is kept
    NO_GAIN = 5  # the last step explained too little


@dataclasses.dataclass(frozen=True)
class Pursuit:
    """Which atoms explain each signal of a batch, from `omp`."""

    index: Tensor  # (batch, budget_max) int32, in the order taken, 0 beyond count
    # Their least-squares coefficients, 0 beyond count; without columns if they were not asked for.
    coef: Tensor  # (batch, budget_max) float32
    count: Tensor  # (batch,) int32
    residual: Tensor  # (batch,) float32: norm of what they leave unexplained
    status: Tensor  # (batch,) int32: a `PursuitStatus`


def sense(codes: Tensor, equal: Tensor, x: Tensor, *, bits: Code) -> tuple[Tensor, Tensor]:
    """Measure every neuron's gate and up row by few-bit codes, exactly in integers.

    Args:
        codes: Packed codes, ``(n_neurons, 2, groups, group_bytes)``, uint8, see `planes.pack`.
        equal: Channel equaliser, ``(d,)``, float32.
        x: Activations, ``(batch, d)``, T.
        bits: Code of a weight: 1 to 4 bits, or ``"ternary"``.

    Returns:
        Measurements ``(batch, n_neurons, 2)``, int32, gate then up, and the scale of each row,
        ``(batch,)``, float32: 0 for a row of zeros, not-a-number for one that is not finite.

    Raises:
        ValueError: The shapes do not fit together, or int32 could overflow.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_tensors("sense", codes=codes, equal=equal, x=x)
    y, scale = torch.ops.csfast.sense.default(codes, equal, x, _code("sense", bits))
    return y, scale


def nested(
    levels: Sequence[Packed], equal: Tensor, x: Tensor, *, n_levels: int | None = None
) -> tuple[Tensor, Tensor]:
    """Measure every neuron's gate and up row by the first levels of a nested code.

    Integers within a group of 64 channels, summed over groups and levels in float32.
    Deterministic: a measurement depends on its neuron's code and its activation alone, and one by
    fewer levels is what more of them add to. `recover` takes it with row scales of 1, and of the
    norm of the neuron's down row.

    Args:
        levels: Packed levels of the rows of gate and up, the coarse one first, 1 to 4 of them, see
            `csfast.nested`: codes ``(n_neurons, 2, chunks, 16 * bits)`` and exponents
            ``(n_neurons, 2, 2 * chunks)``, uint8, tops ``(n_neurons, 2)``, bfloat16.
        equal: Channel equaliser, ``(d,)``, float32.
        x: Activations, ``(batch, d)``, T.
        n_levels: Levels that are read, the first; all if left out.

    Returns:
        Measurements ``(batch, n_neurons, 2)``, float32, gate then up, and the scale of each row,
        ``(batch,)``, float32, as `sense` gives it. Their product estimates the row's product with
        the activation.

    Raises:
        ValueError: The shapes do not fit together, or a level has other than 1 to 4 bits.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    if n_levels is None:
        n_levels = len(levels)
    _check_ints("nested", n_levels=n_levels)
    if not 1 <= n_levels <= len(levels):
        raise ValueError(f"[nested] n_levels = {n_levels}: want 1 to the {len(levels)} given.")
    codes = [level.codes for level in levels[:n_levels]]
    exponents = [level.exponent for level in levels[:n_levels]]
    tops = [level.top for level in levels[:n_levels]]
    bits = [level.bits for level in levels[:n_levels]]
    named = {"codes": codes, "exponent": exponents, "top": tops}
    _check_tensors(
        "nested",
        **{f"{name}[{i}]": t for name, some in named.items() for i, t in enumerate(some)},
        equal=equal,
        x=x,
    )
    _check_ints("nested", **{f"bits[{i}]": width for i, width in enumerate(bits)})
    y, scale = torch.ops.csfast.nested.default(codes, exponents, tops, equal, x, bits)
    return y, scale


def recover(
    y: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    *,
    threshold: Tensor | None = None,
    budget: Tensor | None = None,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    group_rows: int = 1,
    activation: str = "silu",
) -> Support:
    """Decide from the measurements which neurons matter, by threshold or as the top of a budget.

    A usage or threshold that is not a number keeps the neuron; a scale that is not finite keeps
    every neuron. Ties at the end of a budget go to the lower index, not-a-number ranks with
    infinity.

    With `group_rows` the decision is on groups of that many neighbouring neurons, the last perhaps
    shorter, whose usage is the root of the sum of their squared usages. With `weight` it is one
    decision for the whole batch, on the weighted sum of the rows' usages: a row of weight 0 has no
    vote, whatever it holds, a voting row whose scale is not finite keeps everything, and nothing is
    kept if no row votes.

    Args:
        y: Measurements, ``(batch, n_neurons, columns)``, int32 or float32. Two columns are gate and
            up; of one, the magnitude is the usage itself.
        scale: Scale of each row, ``(batch,)``, float32.
        row_scale: Scales of the measurements, ``(n_neurons, columns)``, float32; of two columns the
            second holds the norm of the neuron's down row as well.
        threshold: Usage from which a group is kept, ``(lists,)``, float32; `lists` is 1 with
            `weight`, otherwise `batch`.
        budget: Groups to keep, ``(lists,)``, int32, each in ``[0, n_groups]``. Exactly one of
            threshold and budget is given.
        offset: Added to the scaled measurements, ``(n_neurons, columns)``, float32: the biases, of
            two columns the second times the norm of the neuron's down row.
        weight: What each row's usage counts in a joint decision, ``(batch,)``, float32, none
            negative.
        group_rows: Neurons a group, at least 1.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``; of no account for one
            column.

    Returns:
        The support.

    Raises:
        ValueError: The shapes do not fit together, a budget or weight is out of range, the
            activation is unknown, or not exactly one of threshold and budget is given.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    limit = budget if threshold is None else threshold
    if limit is None or (threshold is not None and budget is not None):
        given = "neither" if limit is None else "both"
        raise ValueError(f"[recover] {given} of threshold and budget: want exactly one.")
    _check_tensors(
        "recover", y=y, scale=scale, row_scale=row_scale, limit=limit, offset=offset, weight=weight
    )
    _check_ints("recover", group_rows=group_rows)
    _check_activation("recover", activation)
    index, count, usage, missed = torch.ops.csfast.recover.default(
        y, scale, row_scale, limit, budget is not None, offset, weight, group_rows, activation
    )
    return Support(index, count, usage, missed, group_rows)


def tile(index: Tensor, count: Tensor, *, tile_rows: int = 1) -> TileList:
    """Turn a support of neurons into the blocks of weights that hold them.

    Args:
        index: Neurons, ``(batch, n_neurons)``, int32, ascending up to `count`.
        count: Neurons of each row, ``(batch,)``, int32.
        tile_rows: Neurons a tile, at least 1.

    Returns:
        The tile list.

    Raises:
        ValueError: The shapes do not fit together, or the indices do not ascend within range.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_tensors("tile", index=index, count=count)
    _check_ints("tile", tile_rows=tile_rows)
    tiles, n_tiles = torch.ops.csfast.tile.default(index, count, tile_rows)
    return TileList(tiles, n_tiles, tile_rows)


def omp(
    gram: Tensor,
    correlation: Tensor,
    energy: Tensor,
    budget: Tensor,
    *,
    budget_max: int,
    tolerance: float = 0.0,
    residual_max: float = 0.0,
    correlation_min: float = 0.0,
    gain_min: float = 0.0,
    per_step: int = 1,
    group: int = 1,
    start: Tensor | None = None,
    start_count: Tensor | None = None,
    dictionary: Tensor | None = None,
    coef: bool = True,
    design: str = "",
) -> Pursuit:
    """Explain each signal by few atoms of a dictionary, chosen greedily.

    Orthogonal matching pursuit: take the atom that explains most of what is left, refit all taken
    atoms, repeat until the budget is spent or nothing is left to explain. Ties go to the lower
    index, so equal inputs give equal supports. Atoms need not be of unit norm; one of norm 0 is
    never taken. Multiplying a signal by a power of two multiplies coefficients and residual by it
    and changes nothing else (unless `residual_max` is given, which is in the signals' unit).

    With `per_step` several atoms are taken before scores are looked at again (generalised OMP);
    with `group` neighbouring atoms are scored by the norm of their scores and taken together
    (block OMP). An atom in the span of those taken is passed over; a step that finds no other ends
    the pursuit.

    Args:
        gram: Gram matrix of the dictionary, ``A.T @ A``, ``(n_atoms, n_atoms)``, float32; or those
            of several dictionaries, ``(n_dictionaries, n_atoms, n_atoms)``.
        correlation: Correlation of each signal with the atoms, ``y @ A``, ``(batch, n_atoms)``,
            float32.
        energy: Squared norm of each signal, ``(batch,)``, float32.
        budget: Atoms allowed for each signal, ``(batch,)``, int32, each in ``[0, budget_max]``.
        budget_max: Atoms to make room for, 1 to `n_atoms`.
        tolerance: Stop when the squared norm of what is left is at most this share of the energy,
            0 to 1. Shares below 2^-24 are noise of the float32 energy.
        residual_max: Stop when the norm of what is left is at most this, at least 0.
        correlation_min: Stop when no atom has ``|<atom, what is left>| / |atom|`` above this share
            of the signal's norm, 0 to 1. For a group, the norm of those.
        gain_min: Stop after a step that lowered the squared norm of what is left by less than this
            share of the energy, 0 to 1.
        per_step: Atoms, or groups, that a step takes, at least 1.
        group: Atoms a group: a divisor of `n_atoms` of at most `budget_max`. The budget counts
            atoms; a group that does not fit into it whole is not taken.
        start: Atoms to take and fit before the first step, ``(batch, n_start)``, int32, as far as
            the budget goes.
        start_count: How many of them for each signal, ``(batch,)``, int32; all if left out.
        dictionary: Which of several dictionaries, ``(batch,)``, int32. Given exactly if `gram` has
            three axes.
        coef: Whether coefficients are wanted. Without them it is faster.
        design: Which of its kernels CUDA uses; empty: as suits the sizes and the machine. One of
            general, flat, deep, wide and quad, see docs/kernels.md; quad takes one atom a step,
            budgets up to 32, up to 1024 atoms, a multiple of 4, and `gram` and `correlation` at
            multiples of 16 bytes. On the CPU of no account.

    Returns:
        The pursuit, with the reason for its end. A signal that is not finite has count 0 and a
        residual that is not a number.

    Raises:
        ValueError: The shapes do not fit together, or a budget, an atom to start with, a dictionary
            or an option is out of range, or the design is unknown or does not fit.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.

    Source:
        Rubinstein, Zibulevsky, Elad, "Efficient implementation of the K-SVD algorithm using batch
        orthogonal matching pursuit", Technion, 2008; Wang, Kwon, Shim, "Generalized orthogonal
        matching pursuit", 2012; Eldar, Kuppinger, Bolcskei, "Block-sparse signals: uncertainty
        relations and efficient recovery", 2010.
    """
    optional = {"start": start, "start_count": start_count, "dictionary": dictionary}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check_tensors("omp", gram=gram, correlation=correlation, energy=energy, budget=budget, **given)
    _check_ints("omp", budget_max=budget_max, per_step=per_step, group=group)
    limits = {
        "tolerance": tolerance,
        "residual_max": residual_max,
        "correlation_min": correlation_min,
        "gain_min": gain_min,
    }
    for name, value in limits.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"[omp] {name} is a {type(value).__name__}: want a float.")
    if not isinstance(coef, bool):
        raise TypeError(f"[omp] coef is a {type(coef).__name__}: want a bool.")
    if not isinstance(design, str):
        raise TypeError(f"[omp] design is a {type(design).__name__}: want a str.")
    return Pursuit(
        *torch.ops.csfast.omp.default(
            gram,
            correlation,
            energy,
            budget,
            budget_max,
            *limits.values(),
            per_step,
            group,
            start,
            start_count,
            dictionary,
            coef,
            design,
        )
    )


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
    sizes = {
        "batch": batch,
        "n_atoms": n_atoms,
        "budget_max": budget_max,
        "processors": processors,
        "registers": registers,
        "threads": threads,
        "shared_per_block": shared_per_block,
        "shared_per_processor": shared_per_processor,
    }
    _check_ints("omp", **sizes)
    if not isinstance(single, bool):
        raise TypeError(f"[omp] single is a {type(single).__name__}: want a bool.")
    return _native.omp_plan(
        batch,
        n_atoms,
        budget_max,
        single,
        processors,
        registers,
        threads,
        shared_per_block,
        shared_per_processor,
        design,
    )


def project(phi: Tensor, x: Tensor, *, rows: int | None = None) -> Tensor:
    """Measure activations by the rows of a dense matrix: ``x @ phi[:rows].T``, summed in float32.

    For random operators (`csfast.operators`), composed ones, and those of low rank, which are two
    in a row. Deterministic: a measurement depends on its row of `phi` and its activation alone, so
    fewer rows give a prefix of the measurements of more, bit for bit.

    Args:
        phi: Sensing matrix, ``(m, d)``, T.
        x: Activations, ``(batch, d)``, T.
        rows: Rows of `phi` that measure, the first, 1 to `m`; all if left out.

    Returns:
        Measurements ``(batch, rows)``, float32.

    Raises:
        ValueError: The shapes do not fit together, or `rows` is out of range.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_tensors("project", phi=phi, x=x)
    if rows is None:
        rows = phi.shape[0] if phi.dim() == 2 else 0
    _check_ints("project", rows=rows)
    y: Tensor = torch.ops.csfast.project.default(phi, x, rows)
    return y


def execute(
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    tiles: TileList,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> Tensor:
    """Run the gated feed-forward layer on the neurons of a tile list.

    Deterministic: equal inputs give equal bits, whatever the number of threads and whatever else is
    in the batch.

    Args:
        gate: Gate projection, ``(n_neurons, d)``, T.
        up: Up projection, ``(n_neurons, d)``, T.
        down_t: Transposed down projection, ``(n_neurons, d)``, T.
        x: Activations, ``(batch, d)``, T.
        tiles: What each row reads; a single list is that of every row.
        gate_bias: Bias of the gate projection, ``(n_neurons,)``, T.
        up_bias: Bias of the up projection, ``(n_neurons,)``, T.
        down_bias: Bias of the down projection, ``(d,)``, T.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
        design: How CUDA goes about it, see `ffn`.

    Returns:
        Output, ``(batch, d)``, T; `down_bias` or zeros where the list is empty.

    Raises:
        ValueError: The shapes do not fit together, the tiles do not ascend within range, or the
            activation or the design is unknown or does not fit.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_tensors(
        "execute",
        gate=gate,
        up=up,
        down_t=down_t,
        x=x,
        tile=tiles.tile,
        n_tiles=tiles.n_tiles,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
    )
    _check_ints("execute", tile_rows=tiles.tile_rows)
    _check_activation("execute", activation)
    out: Tensor = torch.ops.csfast.execute.default(
        gate,
        up,
        down_t,
        x,
        tiles.tile,
        tiles.n_tiles,
        tiles.tile_rows,
        gate_bias,
        up_bias,
        down_bias,
        activation,
        design,
    )
    return out


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
    _check_ints("execute", batch=batch, d=d, n_neurons=n_neurons, tile_rows=tile_rows)
    if min(d, n_neurons, tile_rows) < 1:
        raise ValueError(
            f"[execute] d = {d}, n_neurons = {n_neurons}, tile_rows = {tile_rows}: want 1 at least."
        )
    return _native.choose(
        batch,
        d,
        n_neurons,
        tile_rows,
        shared,
        senses,
        dtype.itemsize,
        design,
        capability,
        n_processors,
        shared_bytes,
    )


def select(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    x: Tensor,
    *,
    bits: Code,
    tile_rows: int = 1,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    cap: Tensor | None = None,
    design: str = "",
) -> tuple[TileList, Tensor]:
    """Sense, then recover by threshold with the tiles as groups, in one pass over the codes.

    Args:
        codes: Packed codes, ``(n_neurons, 2, groups, group_bytes)``, uint8.
        equal: Channel equaliser, ``(d,)``, float32.
        row_scale: Scales of the rows' codes, ``(n_neurons, 2)``, float32, see `recover`.
        threshold: Usage from which a tile is kept, ``(lists,)``, float32; `lists` is 1 with
            `weight`, otherwise `batch`.
        x: Activations, ``(batch, d)``, T.
        bits: Code of a weight: 1 to 4 bits, or ``"ternary"``.
        tile_rows: Neurons a tile, at least 1.
        offset: The biases as `recover` takes them, ``(n_neurons, 2)``, float32.
        weight: What each row counts in a joint decision, ``(batch,)``, float32, see `recover`.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
        cap: The most tiles that each list keeps, ``(lists,)``, int32: of a longer one the largest
            usages, ties going to the lower index and NaN ranking as infinity. A scale that is not
            finite keeps everything nevertheless.
        design: How CUDA goes about it, see `ffn`.

    Returns:
        The tile list, without a cap equal entry for entry to the support of `recover` with
        ``group_rows`` of `tile_rows`, and the usage missed, ``(lists,)``, float32.

    Raises:
        ValueError: The shapes do not fit together, int32 could overflow, a weight is negative, or
            the activation or the design is unknown.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_tensors(
        "select",
        codes=codes,
        equal=equal,
        row_scale=row_scale,
        threshold=threshold,
        x=x,
        offset=offset,
        weight=weight,
        cap=cap,
    )
    code = _code("select", bits)
    _check_ints("select", tile_rows=tile_rows)
    _check_activation("select", activation)
    given = (codes, equal, row_scale, threshold, x, code, tile_rows)
    more = (offset, weight, activation, design)
    if cap is None:
        tiles, n_tiles, missed = torch.ops.csfast.select.default(*given, *more)
        return TileList(tiles, n_tiles, tile_rows), missed
    capped = torch.ops.csfast.select.capped(*given, cap, *more)
    tiles, n_tiles, missed, dropped = capped
    return TileList(tiles, n_tiles, tile_rows, dropped), missed


def ffn(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    *,
    bits: Code,
    tile_rows: int = 1,
    offset: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
    stats: Tensor | None = None,
    cap: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """Run a complete feed-forward layer: `select`, then `execute`, bit for bit.

    Args:
        codes: Packed codes, ``(n_neurons, 2, groups, group_bytes)``, uint8.
        equal: Channel equaliser, ``(d,)``, float32.
        row_scale: Scales of the rows' codes, ``(n_neurons, 2)``, float32, see `recover`.
        threshold: Usage from which a tile is kept, ``(lists,)``, float32; `lists` is 1 with
            `weight`, otherwise `batch`.
        gate: Gate projection, ``(n_neurons, d)``, T.
        up: Up projection, ``(n_neurons, d)``, T.
        down_t: Transposed down projection, ``(n_neurons, d)``, T.
        x: Activations, ``(batch, d)``, T.
        bits: Code of a weight: 1 to 4 bits, or ``"ternary"``.
        tile_rows: Neurons a tile, at least 1.
        offset: The biases as `recover` takes them, ``(n_neurons, 2)``, float32.
        gate_bias: Bias of the gate projection, ``(n_neurons,)``, T.
        up_bias: Bias of the up projection, ``(n_neurons,)``, T.
        down_bias: Bias of the down projection, ``(d,)``, T.
        weight: What each row counts in a joint decision, ``(batch,)``, float32, see `recover`.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
        design: How CUDA goes about it; empty: as suits the sizes and the machine. Words, each at
            most once: a path, ``general``, ``list``, ``range`` or ``batch``; how weights are
            loaded, ``register`` or ``bulk``; ``blocks=`` and a number; ``portable``, for what
            runs at compute capability 8.0. Another path adds up in another order. Of no account on
            the CPU.
        cap: The most tiles that each list keeps, ``(lists,)``, int32, see `select`.
        dropped: Counter to add to, ``(1,)``, int64: tiles that only the cap left out.
        stats: Counters to add to, ``(2,)``, int64: rows of the batch, and neurons executed in all
            of them.

    Returns:
        Output, ``(batch, d)``, T.

    Raises:
        ValueError: The shapes do not fit together, int32 could overflow, a weight is negative, or
            the activation or the design is unknown or does not fit.
        TypeError: A tensor has another dtype or is not contiguous.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_tensors(
        "ffn",
        codes=codes,
        equal=equal,
        row_scale=row_scale,
        threshold=threshold,
        gate=gate,
        up=up,
        down_t=down_t,
        x=x,
        offset=offset,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        weight=weight,
        stats=stats,
        cap=cap,
        dropped=dropped,
    )
    code = _code("ffn", bits)
    _check_ints("ffn", tile_rows=tile_rows)
    _check_activation("ffn", activation)
    layer = (codes, equal, row_scale, threshold, gate, up, down_t)
    biases = (offset, gate_bias, up_bias, down_bias)
    out: Tensor
    if cap is not None or dropped is not None:
        stats = x.new_zeros(2, dtype=torch.int64) if stats is None else stats
        dropped = x.new_zeros(1, dtype=torch.int64) if dropped is None else dropped
        if cap is None:
            raise ValueError("[ffn] dropped without a cap: want both, or no dropped.")
        out = torch.ops.csfast.ffn.capped(
            *layer, x, code, tile_rows, stats, cap, dropped, *biases, weight, activation, design
        )
        return out
    if stats is None:
        out = torch.ops.csfast.ffn.default(
            *layer, x, code, tile_rows, *biases, weight, activation, design
        )
    else:
        out = torch.ops.csfast.ffn.counted(
            *layer, x, code, tile_rows, stats, *biases, weight, activation, design
        )
    return out


class Session:
    """The layers of a model, bound once, so that a token costs one call of plain addresses.

    Keeps what is bound alive, and one workspace for each size of layer. Calls of one session must
    not overlap: they share that workspace.
    """

    def __init__(self, device: torch.device) -> None:
        """Open a session for tensors on `device`, the CPU or one CUDA device.

        Raises:
            ValueError: The device is of another kind.
        """
        self._device = torch.device(device)
        if self._device.type not in ("cpu", "cuda"):
            raise ValueError(f"[session] device = {device}: want cpu or cuda.")
        self._cuda = self._device.type == "cuda"
        self._native = _native.Session(self._cuda)
        self._bound: list[tuple[Tensor | None, ...]] = []
        self._rows: list[tuple[torch.dtype, int]] = []  # of each layer: T and d
        self._workspaces: dict[int, Tensor] = {}
        self._place: torch.device | None = None  # of what is bound
        # Made once: a step of decoding enters it for every layer.
        self._current: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def bind(
        self,
        *,
        codes: Tensor,
        equal: Tensor,
        row_scale: Tensor,
        threshold: Tensor,
        gate: Tensor,
        up: Tensor,
        down_t: Tensor,
        bits: Code,
        max_batch: int,
        tile_rows: int = 1,
        offset: Tensor | None = None,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        weight: Tensor | None = None,
        activation: str = "silu",
        stats: Tensor | None = None,
    ) -> int:
        """Check the tensors of one layer and take them over.

        Args:
            codes: Packed codes, ``(n_neurons, 2, groups, group_bytes)``, uint8.
            equal: Channel equaliser, ``(d,)``, float32.
            row_scale: Scales of the rows' codes, ``(n_neurons, 2)``, float32.
            threshold: Usage from which a tile is kept, ``(max_batch,)``, float32; with `weight`
                the first entry is that of the joint decision. Read at every call, so writing to it
                changes what later calls keep.
            gate: Gate projection, ``(n_neurons, d)``, T.
            up: Up projection, ``(n_neurons, d)``, T.
            down_t: Transposed down projection, ``(n_neurons, d)``, T.
            bits: Code of a weight: 1 to 4 bits, or ``"ternary"``.
            max_batch: The most rows that a call may bring.
            tile_rows: Neurons a tile, at least 1.
            offset: The biases as `recover` takes them, ``(n_neurons, 2)``, float32.
            gate_bias: Bias of the gate projection, ``(n_neurons,)``, T.
            up_bias: Bias of the up projection, ``(n_neurons,)``, T.
            down_bias: Bias of the down projection, ``(d,)``, T.
            weight: What each row counts in a joint decision, ``(max_batch,)``, float32, see
                `recover`; read at every call, as far as its batch goes. Without it every row has a
                support of its own.
            activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
            stats: Counters to add to, ``(2,)``, int64: rows of the batch, and neurons executed in
                all of them.

        Returns:
            The number of the layer.

        Raises:
            ValueError: The shapes do not fit together, a tensor is on another device, or the
                activation is unknown.
            TypeError: A tensor has another dtype or is not contiguous.
            BackendError: The device has no csfast backend.
        """
        _check_tensors(
            "session",
            codes=codes,
            equal=equal,
            row_scale=row_scale,
            threshold=threshold,
            gate=gate,
            up=up,
            down_t=down_t,
            offset=offset,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
            weight=weight,
            stats=stats,
        )
        code = _code("session", bits)
        _check_ints("session", tile_rows=tile_rows, max_batch=max_batch)
        _check_activation("session", activation)
        if gate.device.type != self._device.type or self._place not in (None, gate.device):
            raise ValueError(
                f"[session] gate is on {gate.device}: want {self._place or self._device}."
            )
        if gate.dim() != 2 or threshold.shape != (max_batch,):
            raise ValueError(
                f"[session] gate {tuple(gate.shape)}, threshold {tuple(threshold.shape)}: want "
                f"(n_neurons, d) and (max_batch = {max_batch},)."
            )
        _check_total("session", max_batch, gate.shape[0])
        n_bytes = ffn_workspace(max_batch, gate.shape[1], gate.shape[0], gate.device)
        workspace = self._workspaces.get(n_bytes)
        if workspace is None:
            workspace = torch.empty(n_bytes, dtype=torch.uint8, device=gate.device)
        layer = self._native.bind(
            codes.detach(),
            equal.detach(),
            row_scale.detach(),
            threshold.detach(),
            gate.detach(),
            up.detach(),
            down_t.detach(),
            code,
            tile_rows,
            _plain(offset),
            _plain(gate_bias),
            _plain(up_bias),
            _plain(down_bias),
            _plain(weight),
            activation,
            stats,
            workspace,
            self._cuda,
        )
        self._workspaces[n_bytes] = workspace
        self._place = gate.device
        if self._cuda:
            self._current = torch.cuda.device(gate.device)
        layer_tensors = (codes, equal, row_scale, threshold, gate, up, down_t, stats)
        self._bound.append((*layer_tensors, offset, gate_bias, up_bias, down_bias, weight))
        self._rows.append((gate.dtype, gate.shape[1]))
        return layer

    def ffn(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Run one bound layer: x ``(batch, d)`` to out ``(batch, d)``, both T and contiguous.

        Raises:
            ValueError: No such layer, another shape or device, or more rows than it was bound for.
            TypeError: Another dtype, or not contiguous.
            BackendError: The device failed.
        """
        if not 0 <= layer < len(self._rows):
            raise ValueError(f"[session] layer = {layer}: want one of {len(self._rows)} bound.")
        dtype, d = self._rows[layer]
        batch = x.shape[0]
        if x.shape != (batch, d) or out.shape != x.shape:
            raise ValueError(
                f"[session] x {tuple(x.shape)}, out {tuple(out.shape)}: want (batch, d = {d})."
            )
        if x.dtype is not dtype or out.dtype is not dtype:
            raise TypeError(f"[session] x {x.dtype}, out {out.dtype}: want {dtype}.")
        if not (x.is_contiguous() and out.is_contiguous()):
            raise TypeError("[session] x or out has other strides: want contiguous tensors.")
        if x.device != self._place or out.device != x.device:
            raise ValueError(f"[session] x on {x.device}, out on {out.device}: want {self._place}.")
        if not self._cuda:
            self._native.ffn(layer, x.data_ptr(), out.data_ptr(), batch, 0)
            return
        with self._current:
            self._native.ffn(layer, x.data_ptr(), out.data_ptr(), batch, _stream(x))


def ffn_workspace(max_batch: int, d: int, n_neurons: int, device: torch.device) -> int:
    """Give the bytes of workspace that a `Session` keeps for layers of one size.

    Raises:
        ValueError: The device is neither the CPU nor CUDA, or a size is out of range.
        BackendError: There are no kernels for the device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"[session] device = {device}: want cpu or cuda.")
    return _native.ffn_workspace(max_batch, d, n_neurons, device.type == "cuda")


def backend_info() -> dict[str, str]:
    """Say what this build can run here: its instruction set, and whether there is CUDA."""
    if cuda_available():
        cuda = "available"
    else:
        try:
            _native.select_workspace(1, 1, 1, True)
            cuda = "built, but no device was found"
        except BackendError:
            cuda = "not built"
    return {"isa": isa(), "cuda": cuda}


def _check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Refuse what torch could not even dispatch: no tensor, no plain memory, several devices."""
    first: torch.device | None = None
    for name, value in tensors.items():
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"[{op}] {name} is a {type(value).__name__}: want a torch.Tensor.")
        if value.layout != torch.strided:
            raise TypeError(f"[{op}] {name} is {value.layout}: want a strided tensor.")
        if value.device.type not in ("cpu", "cuda"):
            raise ValueError(f"[{op}] {name} is on {value.device}: want cpu or cuda.")
        first = first or value.device
        if value.device != first:
            raise ValueError(
                f"[{op}] {name} is on {value.device}, the tensors before it on {first}: want all "
                "tensors of a call on one device."
            )


def _code(op: str, bits: Code) -> int:
    """The number of a code, `csfast::Code`."""
    if not isinstance(bits, (int, str)):
        raise TypeError(f'[{op}] bits is a {type(bits).__name__}: want an int or "{TERNARY}".')
    code = _CODES.get(bits)
    if code is None:
        raise ValueError(f'[{op}] bits = {bits!r}: want 1 to 4 or "{TERNARY}".')
    return code


def _check_ints(op: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"[{op}] {name} is a {type(value).__name__}: want an int.")
        if not 0 <= value <= _INT32_MAX:
            raise ValueError(f"[{op}] {name} = {value}: want 0 to 2^31 - 1.")


def _check_activation(op: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"[{op}] activation is a {type(name).__name__}: want a str.")
    if name not in ("silu", "gelu_tanh"):
        raise ValueError(f"[{op}] activation = {name}: want silu or gelu_tanh.")


def _sizes(op: str, rows: Tensor, neurons: Tensor, n_axes: int) -> tuple[int, int, int]:
    """Sizes (batch, d, n_neurons) of what an operation will allocate, refused where absurd."""
    if rows.dim() != 2 or neurons.dim() != n_axes:
        raise ValueError(
            f"[{op}] tensors of {rows.dim()} and {neurons.dim()} axes: want 2 for x and {n_axes} "
            "for what has a row a neuron."
        )
    batch, d, n_neurons = rows.shape[0], rows.shape[1], neurons.shape[0]
    _check_total(op, batch, n_neurons)
    return batch, d, n_neurons


def _check_total(op: str, batch: int, n_neurons: int) -> None:
    if batch > 65535 or n_neurons * max(batch, 1) > _INT32_MAX:
        raise ValueError(
            f"[{op}] batch = {batch} rows of {n_neurons} neurons: want at most 65535 rows and "
            "fewer than 2^31 neurons in all."
        )


def _n_tiles_max(op: str, n_neurons: int, tile_rows: int, name: str = "tile_rows") -> int:
    if tile_rows < 1:
        raise ValueError(f"[{op}] {name} = {tile_rows}: want at least 1.")
    return -(-n_neurons // tile_rows)


def _stream(x: Tensor) -> int:
    """The current CUDA stream of the tensor's device, or 0 on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _sense(codes: Tensor, equal: Tensor, x: Tensor, code: int) -> tuple[Tensor, Tensor]:
    batch, d, _ = _sizes("sense", x, codes, 4)
    y, scale = _fake_sense(codes, equal, x, code)
    q = x.new_empty((batch, _native.q_width(d)), dtype=torch.int8)
    _native.sense(codes.detach(), equal.detach(), x.detach(), code, q, y, scale, _stream(x))
    return y, scale


def _fake_sense(codes: Tensor, equal: Tensor, x: Tensor, code: int) -> tuple[Tensor, Tensor]:
    batch, _, n_neurons = _sizes("sense", x, codes, 4)
    y = x.new_empty((batch, n_neurons, 2), dtype=torch.int32)
    return y, x.new_empty((batch,), dtype=torch.float32)


def _nested(
    codes: list[Tensor],
    exponent: list[Tensor],
    top: list[Tensor],
    equal: Tensor,
    x: Tensor,
    bits: list[int],
) -> tuple[Tensor, Tensor]:
    y, scale = _fake_nested(codes, exponent, top, equal, x, bits)
    q = x.new_empty((x.shape[0], _native.q_width(x.shape[1])), dtype=torch.int8)
    _native.nested(
        [t.detach() for t in codes],
        [t.detach() for t in exponent],
        [t.detach() for t in top],
        equal.detach(),
        x.detach(),
        list(bits),
        q,
        y,
        scale,
        _stream(x),
    )
    return y, scale


def _fake_nested(
    codes: list[Tensor],
    exponent: list[Tensor],
    top: list[Tensor],
    equal: Tensor,
    x: Tensor,
    bits: list[int],
) -> tuple[Tensor, Tensor]:
    if not codes:
        raise ValueError("[nested] no level: want at least one.")
    batch, _, n_neurons = _sizes("nested", x, codes[0], 4)
    y = x.new_empty((batch, n_neurons, 2), dtype=torch.float32)
    return y, x.new_empty((batch,), dtype=torch.float32)


def _recover(
    y: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    limit: Tensor,
    top: bool,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    group_rows: int = 1,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _fake_recover(y, scale, row_scale, limit, top, offset, weight, group_rows, activation)
    index, count, usage, missed = made
    _native.recover(
        y.detach(),
        scale.detach(),
        row_scale.detach(),
        limit.detach(),
        top,
        _plain(offset),
        _plain(weight),
        y.dtype == torch.float32,
        group_rows,
        activation,
        usage,
        index,
        count,
        missed,
        _stream(y),
    )
    return made


def _fake_recover(
    y: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    limit: Tensor,
    top: bool,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    group_rows: int = 1,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if y.dim() != 3:
        raise ValueError(f"[recover] y has {y.dim()} axes: want (batch, n_neurons, 1 or 2).")
    if y.dtype not in (torch.int32, torch.float32):
        kind = str(y.dtype).removeprefix("torch.")
        raise TypeError(f"[recover] y is {kind}: want int32 or float32.")
    batch, n_neurons = y.shape[0], y.shape[1]
    _check_total("recover", batch, n_neurons)
    lists = batch if weight is None else 1
    n_groups = _n_tiles_max("recover", n_neurons, group_rows, "group_rows")
    return (
        y.new_zeros((lists, n_groups), dtype=torch.int32),
        y.new_empty((lists,), dtype=torch.int32),
        y.new_empty((lists, n_groups), dtype=torch.float32),
        y.new_empty((lists,), dtype=torch.float32),
    )


def _tile(index: Tensor, count: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    tiles, n_tiles = _fake_tile(index, count, tile_rows)
    _native.tile(index, count, tile_rows, tiles, n_tiles, _stream(index))
    return tiles, n_tiles


def _fake_tile(index: Tensor, count: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    if index.dim() != 2:
        raise ValueError(f"[tile] index has {index.dim()} axes: want (batch, n_neurons).")
    batch, n_neurons = index.shape
    _check_total("tile", batch, n_neurons)
    width = _n_tiles_max("tile", n_neurons, tile_rows)
    return (
        index.new_zeros((batch, width), dtype=torch.int32),
        index.new_empty((batch,), dtype=torch.int32),
    )


def _omp(
    gram: Tensor,
    correlation: Tensor,
    energy: Tensor,
    budget: Tensor,
    budget_max: int,
    tolerance: float = 0.0,
    residual_max: float = 0.0,
    correlation_min: float = 0.0,
    gain_min: float = 0.0,
    per_step: int = 1,
    group: int = 1,
    start: Tensor | None = None,
    start_count: Tensor | None = None,
    dictionary: Tensor | None = None,
    coef: bool = True,
    design: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    limits = (tolerance, residual_max, correlation_min, gain_min)
    optional = (start, start_count, dictionary)
    made = _fake_omp(
        gram, correlation, energy, budget, budget_max, *limits, per_step, group, *optional, coef
    )
    gram, correlation, energy = (t.detach() for t in (gram, correlation, energy))
    batch, n_atoms = correlation.shape
    n_bytes = _native.omp_workspace(batch, n_atoms, budget_max, design, gram.is_cuda)
    index, values, count, residual, status = made
    _native.omp(
        gram,
        correlation,
        energy,
        budget,
        budget_max,
        *limits,
        per_step,
        group,
        *optional,
        design,
        _workspace(n_bytes, gram),
        index,
        values if coef else None,
        count,
        residual,
        status,
        _stream(gram),
    )
    return made


def _fake_omp(
    gram: Tensor,
    correlation: Tensor,
    energy: Tensor,
    budget: Tensor,
    budget_max: int,
    tolerance: float = 0.0,
    residual_max: float = 0.0,
    correlation_min: float = 0.0,
    gain_min: float = 0.0,
    per_step: int = 1,
    group: int = 1,
    start: Tensor | None = None,
    start_count: Tensor | None = None,
    dictionary: Tensor | None = None,
    coef: bool = True,
    design: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if correlation.dim() != 2:
        raise ValueError(f"[omp] correlation has {correlation.dim()} axes: want (batch, n_atoms).")
    batch, n_atoms = correlation.shape
    if dictionary is not None and gram.dim() != 3:
        raise ValueError(
            f"[omp] gram has {gram.dim()} axes beside dictionary: want (n_dictionaries, n_atoms, "
            "n_atoms)."
        )
    if dictionary is None and gram.dim() == 3:
        raise ValueError("[omp] gram has 3 axes without dictionary: want (n_atoms, n_atoms).")
    if gram.shape[dictionary is not None :] != (n_atoms, n_atoms):
        raise ValueError(
            f"[omp] gram has shape {tuple(gram.shape)}: want (n_atoms, n_atoms) = "
            f"({n_atoms}, {n_atoms})."
        )
    if start is None and start_count is not None:
        raise ValueError("[omp] start_count without start: want both or neither.")
    if not 1 <= budget_max <= n_atoms:
        raise ValueError(f"[omp] budget_max = {budget_max}: want 1 to n_atoms = {n_atoms}.")
    return (
        correlation.new_empty((batch, budget_max), dtype=torch.int32),
        correlation.new_empty((batch, budget_max if coef else 0), dtype=torch.float32),
        correlation.new_empty((batch,), dtype=torch.int32),
        correlation.new_empty((batch,), dtype=torch.float32),
        correlation.new_empty((batch,), dtype=torch.int32),
    )


def _project(phi: Tensor, x: Tensor, rows: int) -> Tensor:
    y = _fake_project(phi, x, rows)
    phi, x = phi.detach(), x.detach()
    _native.project(phi, x, y, _stream(x))
    return y


def _fake_project(phi: Tensor, x: Tensor, rows: int) -> Tensor:
    if phi.dim() != 2 or x.dim() != 2:
        raise ValueError(
            f"[project] phi of {phi.dim()} axes and x of {x.dim()}: want (m, d) and (batch, d)."
        )
    m, batch = phi.shape[0], x.shape[0]
    if not 1 <= rows <= m:
        raise ValueError(f"[project] rows = {rows}: want 1 to m = {m}.")
    if batch * rows > _INT32_MAX:
        raise ValueError(
            f"[project] batch = {batch} rows of {rows} measurements: want fewer than 2^31 in all."
        )
    return x.new_empty((batch, rows), dtype=torch.float32)


def _execute(
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    tiles: Tensor,
    n_tiles: Tensor,
    tile_rows: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> Tensor:
    batch, d, n_neurons = _sizes("execute", x, gate, 2)
    workspace = _workspace(_native.execute_workspace(batch, d, n_neurons, x.is_cuda), x)
    out = x.new_empty((batch, d))
    _native.execute(
        gate.detach(),
        up.detach(),
        down_t.detach(),
        x.detach(),
        tiles,
        n_tiles,
        tile_rows,
        _plain(gate_bias),
        _plain(up_bias),
        _plain(down_bias),
        activation,
        design,
        workspace,
        out,
        _stream(x),
    )
    return out


def _fake_execute(
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    tiles: Tensor,
    n_tiles: Tensor,
    tile_rows: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> Tensor:
    batch, d, _ = _sizes("execute", x, gate, 2)
    return x.new_empty((batch, d))


def _select(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    options = (offset, weight, activation, design)
    made = _fake_select(codes, equal, row_scale, threshold, x, code, tile_rows, *options)
    _run_select(codes, equal, row_scale, threshold, x, code, tile_rows, *options, made, None, None)
    return made


def _select_capped(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    cap: Tensor,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (offset, weight, activation, design)
    rows = (codes, equal, row_scale, threshold, x, code, tile_rows)
    tile, n_tiles, missed, dropped = _fake_select_capped(*rows, cap, *options)
    _run_select(*rows, *options, (tile, n_tiles, missed), cap, dropped)
    return tile, n_tiles, missed, dropped


def _run_select(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    offset: Tensor | None,
    weight: Tensor | None,
    activation: str,
    design: str,
    made: tuple[Tensor, ...],
    cap: Tensor | None,
    dropped: Tensor | None,
) -> None:
    batch, d, n_neurons = _sizes("select", x, codes, 4)
    workspace = _workspace(_native.select_workspace(batch, d, n_neurons, x.is_cuda), x)
    tile, n_tiles, missed = made
    _native.select(
        codes.detach(),
        equal.detach(),
        row_scale.detach(),
        threshold.detach(),
        x.detach(),
        code,
        tile_rows,
        _plain(offset),
        _plain(weight),
        activation,
        design,
        workspace,
        tile,
        n_tiles,
        missed,
        cap,
        dropped,
        _stream(x),
    )


def _fake_select_capped(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    cap: Tensor,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _fake_select(codes, equal, row_scale, threshold, x, code, tile_rows, offset, weight)
    return *made, made[1].new_empty(made[1].shape)


def _fake_select(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, n_neurons = _sizes("select", x, codes, 4)
    lists = batch if weight is None else 1
    width = _n_tiles_max("select", n_neurons, tile_rows)
    return (
        x.new_empty((lists, width), dtype=torch.int32),
        x.new_empty((lists,), dtype=torch.int32),
        x.new_empty((lists,), dtype=torch.float32),
    )


def _ffn(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    offset: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
    stats: Tensor | None = None,
    cap: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    batch, d, n_neurons = _sizes("ffn", x, codes, 4)
    workspace = _workspace(_native.ffn_workspace(batch, d, n_neurons, x.is_cuda), x)
    out = x.new_empty((batch, d))
    _native.ffn(
        codes.detach(),
        equal.detach(),
        row_scale.detach(),
        threshold.detach(),
        gate.detach(),
        up.detach(),
        down_t.detach(),
        x.detach(),
        code,
        tile_rows,
        _plain(offset),
        _plain(gate_bias),
        _plain(up_bias),
        _plain(down_bias),
        _plain(weight),
        activation,
        design,
        stats,
        cap,
        dropped,
        workspace,
        out,
        _stream(x),
    )
    return out


def _ffn_counted(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    stats: Tensor,
    offset: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> Tensor:
    layer = (codes, equal, row_scale, threshold, gate, up, down_t)
    biases = (offset, gate_bias, up_bias, down_bias)
    return _ffn(*layer, x, code, tile_rows, *biases, weight, activation, design, stats)


def _ffn_capped(
    codes: Tensor,
    equal: Tensor,
    row_scale: Tensor,
    threshold: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    code: int,
    tile_rows: int,
    stats: Tensor,
    cap: Tensor,
    dropped: Tensor,
    offset: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight: Tensor | None = None,
    activation: str = "silu",
    design: str = "",
) -> Tensor:
    layer = (codes, equal, row_scale, threshold, gate, up, down_t)
    biases = (offset, gate_bias, up_bias, down_bias)
    counters = (stats, cap, dropped)
    return _ffn(*layer, x, code, tile_rows, *biases, weight, activation, design, *counters)


def _fake_ffn(codes: Tensor, *others: Any) -> Tensor:
    x: Tensor = others[6]
    batch, d, _ = _sizes("ffn", x, codes, 4)
    return x.new_empty((batch, d))


def _plain(tensor: Tensor | None) -> Tensor | None:
    """Without autograd, which refuses to show its tensors to other libraries."""
    return None if tensor is None else tensor.detach()


def _workspace(n_bytes: int, like: Tensor) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device=like.device)


# Lives as long as the module: torch forgets the operations of a library that is collected.
_LIBRARY = torch.library.Library("csfast", "DEF")  # type: ignore[no-untyped-call]


def _on_its_device(run: Callable[..., object]) -> Callable[..., object]:
    """The same with the CUDA device of the first tensor made current: kernels start on that one."""

    def guarded(first: Tensor | list[Tensor], *rest: object) -> object:
        with torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device):
            return run(first, *rest)

    return guarded


def _register(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for key, implementation in (("CPU", run), ("CUDA", _on_its_device(run))):
        _LIBRARY.impl(name, implementation, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"csfast::{name}", fake, lib=_LIBRARY)


_register(
    "sense(Tensor codes, Tensor equal, Tensor x, int code) -> (Tensor, Tensor)", _sense, _fake_sense
)
_register(
    "nested(Tensor[] codes, Tensor[] exponent, Tensor[] top, Tensor equal, Tensor x, int[] bits)"
    " -> (Tensor, Tensor)",
    _nested,
    _fake_nested,
)
_register(
    "recover(Tensor y, Tensor scale, Tensor row_scale, Tensor limit, bool top, Tensor? offset=None,"
    " Tensor? weight=None, int group_rows=1, str activation='silu')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _recover,
    _fake_recover,
)
_register("tile(Tensor index, Tensor count, int tile_rows) -> (Tensor, Tensor)", _tile, _fake_tile)
_register(
    "omp(Tensor gram, Tensor correlation, Tensor energy, Tensor budget, int budget_max,"
    " float tolerance=0.0, float residual_max=0.0, float correlation_min=0.0, float gain_min=0.0,"
    " int per_step=1, int group=1, Tensor? start=None, Tensor? start_count=None,"
    " Tensor? dictionary=None, bool coef=True, str design='')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _omp,
    _fake_omp,
)
_register("project(Tensor phi, Tensor x, int rows) -> Tensor", _project, _fake_project)
_register(
    "execute(Tensor gate, Tensor up, Tensor down_t, Tensor x, Tensor tiles, Tensor n_tiles,"
    " int tile_rows, Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None,"
    " str activation='silu', str design='') -> Tensor",
    _execute,
    _fake_execute,
)
_register(
    "select(Tensor codes, Tensor equal, Tensor row_scale, Tensor threshold, Tensor x, int code,"
    " int tile_rows, Tensor? offset=None, Tensor? weight=None, str activation='silu',"
    " str design='') -> (Tensor, Tensor, Tensor)",
    _select,
    _fake_select,
)
_register(
    "select.capped(Tensor codes, Tensor equal, Tensor row_scale, Tensor threshold, Tensor x,"
    " int code, int tile_rows, Tensor cap, Tensor? offset=None, Tensor? weight=None,"
    " str activation='silu', str design='') -> (Tensor, Tensor, Tensor, Tensor)",
    _select_capped,
    _fake_select_capped,
)
# Overloads: inductor 2.13 cannot lower an operation whose mutable argument is None.
for _name, _stats, _run in (
    ("ffn", "", _ffn),
    ("ffn.counted", " Tensor(a!) stats,", _ffn_counted),
    ("ffn.capped", " Tensor(a!) stats, Tensor cap, Tensor(b!) dropped,", _ffn_capped),
):
    _register(
        f"{_name}(Tensor codes, Tensor equal, Tensor row_scale, Tensor threshold, Tensor gate,"
        f" Tensor up, Tensor down_t, Tensor x, int code, int tile_rows,{_stats}"
        " Tensor? offset=None, Tensor? gate_bias=None, Tensor? up_bias=None,"
        " Tensor? down_bias=None, Tensor? weight=None, str activation='silu', str design='')"
        " -> Tensor",
        _run,
        _fake_ffn,
    )
