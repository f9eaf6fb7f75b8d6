"""The operations, one row each: from it come schema, allocation, fake, checks and the call.

An argument is added here, to the native function and to the call that hands it over.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import _native
from ..codes import trellis
from . import check
from .register import Derived, register
from .row import Op, Sizes, arguments


def _n_tiles_max(op: str, s: Sizes) -> int:
    if s["tile_rows"] < 1:
        raise ValueError(f"[{op}] tile_rows = {s['tile_rows']}: want at least 1.")
    tiles: int = -(-s["n_neurons"] // s["tile_rows"])
    return tiles


def _layer_bytes(op: str, s: Sizes) -> int:
    """The workspace of `select`, `execute` and `ffn`."""
    of = getattr(_native, f"{op}_workspace")
    n_bytes: int = of(s["batch"], s["d"], s["n_neurons"], s["is_cuda"])
    return n_bytes


def _omp_bytes(op: str, s: Sizes) -> int:
    sizes = (s["batch"], s["n_atoms"], s["budget_max"])
    return _native.omp_workspace(*sizes, s["design"], s["is_cuda"])


# Sizes that no tensor has.
_DERIVED: dict[str, Derived] = {
    "lists": lambda _, s: s["batch"] if s["votes"] is None else 1,
    "n_tiles_max": _n_tiles_max,
    "q_width": lambda _, s: _native.q_width(s["d"]),
    "n_coefs": lambda _, s: s["budget_max"] if s["coef"] else 0,
    "layer_bytes": _layer_bytes,
    "omp_bytes": _omp_bytes,
    "encode_bytes": lambda _, s: _native.encode_workspace(s["rows"], s["cols"], s["is_cuda"]),
    "linear_width": lambda _, s: _native.linear_width(s["cols"]),
    "sketch_width": lambda _, s: _native.sketch_width(s["cols"]),
    "row_tiles": lambda _, s: -(-s["rows"] // trellis.TILE_ROWS),
    "col_tiles": lambda _, s: -(-s["cols"] // trellis.TILE_COLS),
}


def _few_neurons(op: str, s: Sizes) -> None:
    check.total(op, s["batch"], s["n_neurons"])


def _measured(op: str, s: Sizes) -> None:
    kind = str(s["y"].dtype).removeprefix("torch.")
    if kind not in ("int32", "float32"):
        raise TypeError(f"[{op}] y is {kind}: want int32 or float32.")
    _few_neurons(op, s)


def _few_measurements(op: str, s: Sizes) -> None:
    batch, rows, m = s["batch"], s["rows"], s["m"]
    if not 1 <= rows <= m:
        raise ValueError(f"[{op}] rows = {rows}: want 1 to m = {m}.")
    if batch * rows > check.INT32_MAX:
        raise ValueError(
            f"[{op}] batch = {batch} rows of {rows} measurements: want fewer than 2^31 in all."
        )


def _few_atoms(op: str, s: Sizes) -> None:
    gram, n_atoms, several = s["gram"], s["n_atoms"], s["dictionary"] is not None
    if gram.dim() != 2 + several:
        beside = "beside" if several else "without"
        want = "(n_dictionaries, n_atoms, n_atoms)" if several else "(n_atoms, n_atoms)"
        raise ValueError(f"[{op}] gram has {gram.dim()} axes {beside} dictionary: want {want}.")
    if gram.shape[several:] != (n_atoms, n_atoms):
        raise ValueError(
            f"[{op}] gram has shape {tuple(gram.shape)}: want (n_atoms, n_atoms) = "
            f"({n_atoms}, {n_atoms})."
        )
    if s["start"] is None and s["start_count"] is not None:
        raise ValueError(f"[{op}] start_count without start: want both or neither.")
    if not 1 <= s["budget_max"] <= n_atoms:
        raise ValueError(f"[{op}] budget_max = {s['budget_max']}: want 1 to n_atoms = {n_atoms}.")


def _few_rows(op: str, s: Sizes) -> None:
    check.total(op, s["batch"], s["rows"])


def _few_codes(op: str, s: Sizes) -> None:
    bits, shape = s["bits"], tuple(s["table"].shape)
    if shape != (2 << bits,):
        raise ValueError(f"[{op}] table has shape {shape}: want ({2 << bits},) for {bits} bits.")


def _row(
    name: str,
    args: str,
    outs: str,
    *,
    sized_by: str = "",
    scratch: str = "",
    check: Callable[[str, Sizes], None] = _few_neurons,
    overloads: dict[str, tuple[str, ...]] | None = None,
) -> Op:
    """A row, sized by its activations, if it has any, and its first input."""
    given = arguments(args)
    names = [arg.name for arg in given]
    by = (sized_by,) if sized_by else tuple(dict.fromkeys(["x"] * ("x" in names) + names[:1]))
    return Op(name, given, arguments(outs), by, arguments(scratch), check, overloads or {"": ()})


_X = "T[batch d] x"
_SENSOR = (
    "uint8[n_neurons 2 groups group_bytes] codes, float32[d] equal, float32[n_neurons 2] row_scale"
)
_WEIGHTS = "T[n_neurons d] gate, T[n_neurons d] up, T[n_neurons d] down_t"
_BIASES = "T[n_neurons]? gate_bias, T[n_neurons]? up_bias, T[d]? down_bias"
_OFFSET, _VOTES = "float32[n_neurons 2]? offset", "float32[batch]? votes"
_ACTIVATION, _DESIGN = "activation activation='silu'", "str design=''"
_Q, _WORKSPACE = "int8[batch q_width] q", "uint8[layer_bytes] workspace"

OPS = (
    _row(
        "sense",
        f"uint8[n_neurons 2 groups group_bytes] codes, float32[d] equal, {_X}, code code",
        "int32[batch n_neurons 2] y, float32[batch] scale",
        scratch=_Q,
    ),
    _row(
        "nested",
        "uint8[n_neurons 2 chunks chunk_bytes][] codes, uint8[n_neurons 2 groups][] exponent,"
        f"bfloat16[n_neurons 2][] top, float32[d] equal, {_X}, ints bits",
        "float32[batch n_neurons 2] y, float32[batch] scale",
        scratch=_Q,
    ),
    _row(
        "encode",
        "float32[rows cols] w, float32[cols cols] feedback, float32[rows] step, int8[levels] table,"
        f"int bits, int nu={trellis.NU}",
        "uint8[row_tiles col_tiles bits 64] codes, int8[rows cols] value",
        scratch="uint8[encode_bytes] workspace",
        check=_few_codes,
    ),
    _row(
        "sketch",
        "bfloat16[rows][] step, uint8[row_tiles col_tiles level_bits 64][] codes, int32[cols] turn,"
        f" {_X.replace(' d]', ' cols]')}, ints bits",
        "float32[batch rows] y",
        scratch="float32[batch cols] z, int8[batch sketch_width] q, float32[batch] scale",
        check=_few_rows,
    ),
    _row(
        "linear",
        "float32|bfloat16[rows cols] w, float32[batch cols] x, float32|bfloat16[rows]? bias",
        "float32[batch rows] y",
        scratch="float32[batch linear_width] work",
        check=_few_rows,
    ),
    _row(
        "recover",
        "int32|float32[batch n_neurons columns] y, float32[batch] scale,"
        "float32[n_neurons columns] row_scale, float32|int32[lists] limit, bool top,"
        f"float32[n_neurons columns]? offset, {_VOTES}, int tile_rows=1, {_ACTIVATION}",
        "int32[lists n_tiles_max] index=0, int32[lists] count, float32[lists n_tiles_max] usage,"
        "float32[lists] missed",
        check=_measured,
    ),
    _row(
        "tile",
        "int32[batch n_neurons] index, int32[batch] count, int tile_rows",
        "int32[batch n_tiles_max] tile=0, int32[batch] n_tiles",
    ),
    _row(
        "omp",
        "float32[n_atoms n_atoms] gram, float32[batch n_atoms] correlation, float32[batch] energy,"
        "int32[batch] budget, int budget_max, float tolerance=0.0, float residual_max=0.0,"
        "float correlation_min=0.0, float gain_min=0.0, int per_step=1, int group=1,"
        "int32[batch n_start]? start, int32[batch]? start_count, int32[batch]? dictionary,"
        f"bool coef=True, {_DESIGN}",
        "int32[batch budget_max] index, float32[batch n_coefs] values, int32[batch] count,"
        "float32[batch] residual, int32[batch] status",
        sized_by="correlation",
        scratch="uint8[omp_bytes] workspace",
        check=_few_atoms,
    ),
    _row(
        "project",
        f"T[m d] phi, {_X}, int rows",
        "float32[batch rows] y",
        check=_few_measurements,
    ),
    _row(
        "execute",
        f"{_WEIGHTS}, {_X}, int32[lists n_tiles_max] tile, int32[lists] n_tiles, int tile_rows,"
        f"{_BIASES}, {_ACTIVATION}, {_DESIGN}",
        "T[batch d] out",
        scratch=_WORKSPACE,
    ),
    _row(
        "select",
        f"{_SENSOR}, float32[lists] threshold, {_X}, code code, int tile_rows, {_OFFSET}, {_VOTES},"
        f"{_ACTIVATION}, {_DESIGN}, int32[lists]? cap",
        "int32[lists n_tiles_max] tile, int32[lists] n_tiles, float32[lists] missed,"
        "int32[lists]? dropped",
        scratch=_WORKSPACE,
        overloads={"": (), "capped": ("cap", "dropped")},
    ),
    _row(
        "ffn",
        f"{_SENSOR}, float32[lists] threshold, {_WEIGHTS}, {_X}, code code, int tile_rows,"
        f"{_OFFSET}, {_BIASES}, {_VOTES}, {_ACTIVATION}, {_DESIGN}, int64[2]?! stats,"
        "int32[lists]? cap, int64[1]?! dropped",
        "T[batch d] out",
        scratch=_WORKSPACE,
        overloads={"": (), "counted": ("stats",), "capped": ("stats", "cap", "dropped")},
    ),
)
CALL = {op.name: register(op, _DERIVED) for op in OPS}  # each as its row has it, checked
