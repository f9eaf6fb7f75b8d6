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

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native as native  # for what is no operation: `session`, `designs`, `bench.reader`
from .._native import BackendError as BackendError
from .._native import NotFiniteError as NotFiniteError
from .._native import cuda_available as cuda_available
from .._native import isa as isa
from ..codes import trellis
from ..codes.levels import Packed
from ..layer import Decision, Layer, Sensor, Weights
from ..layer import Pursuit as Pursuit
from ..layer import PursuitStatus as PursuitStatus
from ..layer import Support as Support
from ..layer import TileList as TileList
from ..types import Code
from . import check as check
from .register import stream as stream
from .table import CALL

__all__ = ["native"]  # besides what is defined here or imported under its own name


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
    """
    y, scale = CALL["sense"](codes, equal, x, bits)
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
    """
    check.integer("nested", "n_levels", len(levels) if n_levels is None else n_levels)
    if n_levels is not None and not 1 <= n_levels <= len(levels):
        raise ValueError(f"[nested] n_levels = {n_levels}: want 1 to the {len(levels)} given.")
    read = levels[:n_levels]
    codes, exponents, tops = (
        [getattr(level, name) for level in read] for name in ("codes", "exponent", "top")
    )
    y, scale = CALL["nested"](codes, exponents, tops, equal, x, [level.bits for level in read])
    return y, scale


def encode(
    w: Tensor,
    feedback: Tensor,
    step: Tensor,
    *,
    bits: int,
    table: Tensor | None = None,
    nu: int = trellis.NU,
) -> tuple[Tensor, Tensor]:
    """Code a matrix by trellises, column by column with error feedback.

    What the codes of a column leave undone moves the columns after it, so that the output on inputs
    of the given second moment changes least. Deterministic; on the CPU the same codes whatever the
    threads and the instruction set.

    Args:
        w: Weights, ``(rows, cols)``, float32, finite: rotated ones, if they are.
        feedback: Upper Cholesky factor of the inverse second moment of the inputs,
            ``(cols, cols)``, float32, as `csfast.codes.feedback.spread` gives it.
        step: What a value of 1 stands for in each row, ``(rows,)``, float32, not negative; a row of
            0 stands for zeros.
        bits: Of a weight, 1 to 4.
        table: Values by index, ``(2^(bits + 1),)``, int8, rising; `csfast.codes.trellis.table`
            where it is left out.
        nu: Memory of the code, 3 to 8; what is not 8 is for studies, since `sketch` reads 8.

    Returns:
        Codes ``(ceil(rows / 64), ceil(cols / 8), bits, 64)``, uint8, as
        `csfast.codes.trellis.pack` lays them out, and the values that they stand for,
        ``(rows, cols)``, int8.

    Raises:
        ValueError: The shapes do not fit together, or something is not finite, or negative.

    Source:
        See `csfast.codes.trellis` and `csfast.codes.feedback`.
    """
    check.integer("encode", "bits", bits)
    if bits not in trellis.BITS:
        raise ValueError(f"[encode] bits = {bits}: want 1 to 4.")
    if table is None:
        table = trellis.table(bits).to(w.device)
    for name, tensor in (("w", w), ("feedback", feedback), ("step", step)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"[encode] {name}: not finite; want finite numbers.")
    if bool((step < 0).any()):
        raise ValueError(f"[encode] step = {float(step.min())}: want none negative.")
    codes, value = CALL["encode"](w, feedback, step, table, bits, nu)
    return codes, value


def sketch(codes: Sequence[Tensor], step: Sequence[Tensor], turn: Tensor, x: Tensor) -> Tensor:
    """Multiply a coded matrix with inputs, which are rotated and rounded to int8.

    Sums are exact integers: a row of the result has the same bits whatever the instruction set, the
    threads, the other rows of the batch, and on CUDA.

    Args:
        codes: Of each level that is read, the first first, 1 to 4 of them:
            ``(ceil(rows / 64), ceil(cols / 8), bits, 64)``, uint8, as `encode` gives them.
        step: Of each level, ``(rows,)``, bfloat16.
        turn: Of the inputs, ``(cols,)``, int32, as `csfast.codes.rotation.Rotation.words` gives it.
        x: Inputs, ``(batch, cols)``, T. A row that is not finite makes its result not-a-number.

    Returns:
        ``(batch, rows)``, float32.

    Raises:
        ValueError: The shapes do not fit together.

    Source:
        `csfast.codes.trellis` and `csfast.codes.rotation`.
    """
    bits = [tensor.shape[2] if tensor.dim() == 4 else 0 for tensor in codes]
    if not 1 <= len(bits) <= 4:
        raise ValueError(f"[sketch] {len(bits)} levels: want 1 to 4.")
    y: Tensor = CALL["sketch"](list(step), list(codes), turn, x, bits)
    return y


def linear(w: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Multiply a matrix as a model holds it with few inputs: ``x @ w.T + bias``, in float32.

    On the CPU the matrix is read from memory once for up to 16 inputs. A row of the result has the
    same bits whatever the threads and the other rows of the batch.

    Args:
        w: Weights, ``(rows, cols)``, float32 or bfloat16.
        x: Inputs, ``(batch, cols)``, float32; rounded to bfloat16 where `w` is bfloat16.
        bias: ``(rows,)``, in the dtype of `w`.

    Returns:
        ``(batch, rows)``, float32.

    Raises:
        TypeError: `w` is neither float32 nor bfloat16, `bias` is of another dtype than `w`.
        ValueError: The shapes do not fit together.
    """
    y: Tensor = CALL["linear"](w, x, bias)
    return y


def recover(
    y: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    *,
    threshold: Tensor | None = None,
    budget: Tensor | None = None,
    offset: Tensor | None = None,
    votes: Tensor | None = None,
    tile_rows: int = 1,
    activation: str = "silu",
) -> Support:
    """Decide from the measurements which neurons matter, by threshold or as the top of a budget.

    A usage or threshold that is not a number keeps the neuron; a scale that is not finite keeps
    every neuron. Ties at the end of a budget go to the lower index, not-a-number ranks with
    infinity.

    With `tile_rows` the decision is on tiles of that many neighbouring neurons, the last perhaps
    shorter, whose usage is the root of the sum of their squared usages. With `votes` it is one
    decision for the whole batch, on the sum of the rows' usages times their votes: a row of 0 votes
    has no say, whatever it holds, a voting row whose scale is not finite keeps everything, and
    nothing is kept if no row votes.

    Args:
        y: Measurements, ``(batch, n_neurons, columns)``, int32 or float32. Two columns are gate and
            up; of one, the magnitude is the usage itself.
        scale: Scale of each row, ``(batch,)``, float32.
        row_scale: Scales of the measurements, ``(n_neurons, columns)``, float32; of two columns the
            second holds the norm of the neuron's down row as well.
        threshold: Usage from which a tile is kept, ``(lists,)``, float32; `lists` is 1 with
            `votes`, otherwise `batch`.
        budget: Tiles to keep, ``(lists,)``, int32, each at most what there are. Exactly one of
            threshold and budget is given.
        offset: Added to the scaled measurements, ``(n_neurons, columns)``, float32: the biases, of
            two columns the second times the norm of the neuron's down row.
        votes: What each row's usage counts in a joint decision, ``(batch,)``, float32, none
            negative.
        tile_rows: Neurons a tile, at least 1.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``; of no account for one
            column.

    Returns:
        The support.

    Raises:
        ValueError: The shapes do not fit together, a budget or vote is out of range, the
            activation is unknown, or not exactly one of threshold and budget is given.
    """
    limit = budget if threshold is None else threshold
    if limit is None or (threshold is not None and budget is not None):
        given = "neither" if limit is None else "both"
        raise ValueError(f"[recover] {given} of threshold and budget: want exactly one.")
    is_top = budget is not None
    index, count, usage, missed = CALL["recover"](
        y, scale, row_scale, limit, is_top, offset, votes, tile_rows, activation
    )
    return Support(index, count, usage, missed, tile_rows)


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
    """
    tiles, n_tiles = CALL["tile"](index, count, tile_rows)
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

    Source:
        Rubinstein, Zibulevsky, Elad, "Efficient implementation of the K-SVD algorithm using batch
        orthogonal matching pursuit", 2008; Wang, Kwon, Shim, "Generalized orthogonal matching
        pursuit", 2012; Eldar, Kuppinger, Bolcskei, "Block-sparse signals", 2010.
    """
    limits = (tolerance, residual_max, correlation_min, gain_min)
    given = (gram, correlation, energy, budget, budget_max, *limits, per_step, group)
    return Pursuit(*CALL["omp"](*given, start, start_count, dictionary, coef, design))


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
    """
    if rows is None:
        rows = phi.shape[0] if isinstance(phi, Tensor) and phi.dim() == 2 else 0
    y: Tensor = CALL["project"](phi, x, rows)
    return y


def execute(
    weights: Weights, tiles: TileList, x: Tensor, *, activation: str = "silu", design: str = ""
) -> Tensor:
    """Run the gated feed-forward layer on the neurons of a tile list.

    Deterministic: equal inputs give equal bits, whatever the number of threads and whatever else is
    in the batch.

    Args:
        weights: What is computed with.
        tiles: What each row reads; a single list is that of every row.
        x: Activations, ``(batch, d)``, T.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
        design: How CUDA goes about it, see `ffn`.

    Returns:
        Output, ``(batch, d)``, T; `down_bias` or zeros where the list is empty.

    Raises:
        ValueError: The shapes do not fit together, the tiles do not ascend within range, or the
            activation or the design is unknown or does not fit.
    """
    w, listed = weights, (tiles.tile, tiles.n_tiles, tiles.tile_rows)
    biases = (w.gate_bias, w.up_bias, w.down_bias)
    out: Tensor = CALL["execute"](w.gate, w.up, w.down_t, x, *listed, *biases, activation, design)
    return out


def select(
    sensor: Sensor, decision: Decision, x: Tensor, *, activation: str = "silu", design: str = ""
) -> tuple[TileList, Tensor]:
    """Sense, then recover by threshold, in one pass over the codes.

    Args:
        sensor: What the neurons are measured by.
        decision: Which of their tiles are kept.
        x: Activations, ``(batch, d)``, T.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
        design: How CUDA goes about it, see `ffn`.

    Returns:
        The tile list, without a cap equal entry for entry to the support of `recover`, and the
        usage missed, ``(lists,)``, float32.

    Raises:
        ValueError: The shapes do not fit together, int32 could overflow, a vote is negative, or the
            activation or the design is unknown.
    """
    s, d = sensor, decision
    given = (s.codes, s.equal, s.row_scale, d.threshold, x, s.bits, d.tile_rows)
    more = (s.offset, d.votes, activation, design, d.cap)
    tiles, n_tiles, missed, *dropped = CALL["select"](*given, *more)
    return TileList(tiles, n_tiles, d.tile_rows, *dropped), missed


def ffn(
    layer: Layer,
    x: Tensor,
    *,
    stats: Tensor | None = None,
    dropped: Tensor | None = None,
    design: str = "",
) -> Tensor:
    """Run a complete feed-forward layer: `select`, then `execute`, bit for bit.

    Args:
        layer: The layer.
        x: Activations, ``(batch, d)``, T.
        stats: Counters to add to, ``(2,)``, int64: rows of the batch, and neurons executed in all
            of them.
        dropped: Counter to add to, ``(1,)``, int64: tiles that only the cap left out.
        design: How CUDA goes about it; empty: as suits the sizes and the machine. Words, each at
            most once: a path, ``general``, ``list``, ``range`` or ``batch``; how weights are
            loaded, ``register`` or ``bulk``; ``blocks=`` and a number; ``portable``, for what
            runs at compute capability 8.0. Another path adds up in another order. Of no account on
            the CPU.

    Returns:
        Output, ``(batch, d)``, T.

    Raises:
        ValueError: The shapes do not fit together, int32 could overflow, a vote is negative, or the
            activation or the design is unknown or does not fit.
    """
    s, w, d = layer.sensor, layer.weights, layer.decision
    if d.cap is not None:
        stats = x.new_zeros(2, dtype=torch.int64) if stats is None else stats
        dropped = x.new_zeros(1, dtype=torch.int64) if dropped is None else dropped
    elif dropped is not None:
        raise ValueError("[ffn] dropped without a cap: want both, or no dropped.")
    given = (s.codes, s.equal, s.row_scale, d.threshold, w.gate, w.up, w.down_t, x, s.bits)
    biases = (s.offset, w.gate_bias, w.up_bias, w.down_bias)
    form = (d.votes, layer.activation, design)
    out: Tensor = CALL["ffn"](*given, d.tile_rows, *biases, *form, stats, d.cap, dropped)
    return out


def backend_info() -> dict[str, str]:
    """Say what this build can run here: its instruction set, and whether there is CUDA."""
    if cuda_available():
        cuda = "available"
    else:
        try:
            native.select_workspace(1, 1, 1, True)
            cuda = "built, but no device was found"
        except BackendError:
            cuda = "not built"
    return {"isa": isa(), "cuda": cuda}
