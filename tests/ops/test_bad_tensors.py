"""What the operations refuse, as one table: every row is a call that differs from a good one.

A refusal names the operation, what was given and what was wanted, and is typed: ``TypeError`` for
dtype and layout, ``ValueError`` for shape, value and device.
"""

import re

import numpy as np
import pytest
import torch

from csfast import _native, ops
from csfast.bench.cases import Case
from csfast.codes import rotation, trellis
from csfast.codes.levels import Packed
from csfast.layer import Decision, Layer, Sensor, Weights
from csfast.ops import table
from csfast.session import Session

BATCH, D, N = 2, 200, 77
INF = float("inf")


@pytest.fixture(scope="module")
def good():
    """The arguments of a good call to every operation, by name."""
    p = Case("good", batch=BATCH, d=D, n_neurons=N).make(torch.bfloat16, "cpu")
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=2)
    level = Case("good", batch=BATCH, d=D, n_neurons=N).make_nested(torch.bfloat16, "cpu").levels[1]
    every = torch.arange(N, dtype=torch.int32).repeat(BATCH, 1)
    return dict(
        codes=p.codes,
        equal=p.equal,
        row_scale=p.row_scale,
        gate=p.gate,
        up=p.up,
        down_t=p.down_t,
        x=p.x,
        y=y,
        scale=scale,
        threshold=torch.ones(BATCH),
        budget=torch.full((BATCH,), 3, dtype=torch.int32),
        index=every,
        count=torch.full((BATCH,), N, dtype=torch.int32),
        tile=every,
        n_tiles=torch.full((BATCH,), N, dtype=torch.int32),
        bits=2,
        level_codes=level.codes,
        level_exponent=level.exponent,
        level_top=level.top,
        level_bits=level.bits,
        tile_rows=1,
        stats=torch.zeros(2, dtype=torch.int64),
        max_batch=BATCH,
        phi=p.gate[:9],
        rows=5,
        activation="silu",
        votes=torch.ones(BATCH),
        offset=torch.zeros(N, 2),
        gate_bias=torch.zeros(N, dtype=torch.bfloat16),
        up_bias=torch.zeros(N, dtype=torch.bfloat16),
        down_bias=torch.zeros(D, dtype=torch.bfloat16),
    )


def layer_of(a, *, is_joint):
    """The layer of some arguments, by name."""
    sensor = Sensor(*(a[name] for name in ("codes", "equal", "row_scale", "bits", "offset")))
    names = ("gate", "up", "down_t", "gate_bias", "up_bias", "down_bias")
    weights = Weights(*(a[name] for name in names))
    decision = Decision(a["threshold"], a["tile_rows"], a["votes"] if is_joint else None)
    return Layer(sensor, weights, decision, a["activation"])


def call(op, a):
    """Run an operation; "top" asks for a budget, "joint" for one decision of the batch."""
    op, _, how = op.partition(" ")
    form = {"activation": a["activation"]}
    a = {**a, "threshold": a["threshold"][:1]} if how == "joint" and op != "session" else a
    if op == "sense":
        return ops.sense(a["codes"], a["equal"], a["x"], bits=a["bits"])
    if op == "nested":
        coarse = Packed(2, a["codes"], a["level_exponent"], a["level_top"].clone())
        parts = (a[f"level_{name}"] for name in ("bits", "codes", "exponent", "top"))
        return ops.nested([coarse, Packed(*parts)], a["equal"], a["x"])
    if op == "project":
        return ops.project(a["phi"], a["x"], rows=a["rows"])
    if op == "recover":
        limit = "budget" if how == "top" else "threshold"
        votes = a["votes"] if how == "joint" else None
        options = {**form, "offset": a["offset"], "votes": votes, "tile_rows": a["tile_rows"]}
        return ops.recover(a["y"], a["scale"], a["row_scale"], **options, **{limit: a[limit]})
    if op == "tile":
        return ops.tile(a["index"], a["count"], tile_rows=a["tile_rows"])
    layer = layer_of(a, is_joint=how == "joint")
    if op == "execute":
        tiles = ops.TileList(a["tile"], a["n_tiles"], a["tile_rows"])
        return ops.execute(layer.weights, tiles, a["x"], **form)
    if op == "select":
        return ops.select(layer.sensor, layer.decision, a["x"], **form)
    if op == "ffn":
        return ops.ffn(layer, a["x"], stats=a["stats"])
    assert op == "session"
    session = Session(torch.device("cpu"))
    return session.bind(layer, max_batch=a["max_batch"], stats=a["stats"])


def huge(*shape, dtype=torch.bfloat16):
    """A tensor of absurd size that takes no memory."""
    return torch.zeros(1, dtype=dtype).expand(shape)


class NoTensor:
    """Has a shape, but nothing behind it."""

    shape = (BATCH, D)


# Operation, argument, what it is replaced by (a function of the good one), error, message.
ROWS = [
    # Not a tensor, or not one with plain memory
    ("sense", "x", lambda t: None, TypeError, "x is a NoneType: want a torch.Tensor"),
    ("sense", "x", lambda t: t.tolist(), TypeError, "x is a list: want a torch.Tensor"),
    ("ffn", "gate", lambda t: t.float().numpy(), TypeError, "gate is a ndarray: want"),
    ("select", "x", lambda t: NoTensor(), TypeError, "x is a NoTensor: want a torch.Tensor"),
    ("execute", "gate", lambda t: t.float().to_sparse(), TypeError, "gate is torch.sparse_coo"),
    ("ffn", "up", lambda t: t.float().to_sparse_csr(), TypeError, "up is torch.sparse_csr"),
    ("session", "down_t", lambda t: t.to("meta"), ValueError, "down_t is on meta: want cpu or"),
    ("ffn", "x", lambda t: t.to("meta"), ValueError, "x is on meta: want cpu or cuda"),
    ("recover", "offset", lambda t: t.tolist(), TypeError, "offset is a list: want a torch.Tens"),
    ("ffn joint", "votes", lambda t: t.to("meta"), ValueError, "votes is on meta: want cpu or"),
    ("execute", "down_bias", lambda t: 0.5, TypeError, "down_bias is a float: want a torch.Tens"),
    ("execute", "tile", lambda t: t.to("meta"), ValueError, "tile is on meta: want cpu or cuda"),
    ("project", "phi", lambda t: t.tolist(), TypeError, "phi is a list: want a torch.Tensor"),
    ("project", "phi", lambda t: t.to("meta"), ValueError, "phi is on meta: want cpu or cuda"),
    # Dtype
    ("sense", "codes", lambda t: t.char(), TypeError, "codes is int8: want uint8"),
    ("sense", "equal", lambda t: t.double(), TypeError, "equal is float64: want float32"),
    ("sense", "x", lambda t: t.double(), TypeError, "x is float64: want float32, float16 or"),
    ("sense", "x", lambda t: t.to(torch.complex64), TypeError, "x is complex64: want"),
    ("sense", "x", lambda t: t > 0, TypeError, "x is bool: want"),
    ("recover", "y", lambda t: t.double(), TypeError, "y is float64: want int32 or float32"),
    ("recover", "y", lambda t: t.bfloat16(), TypeError, "y is bfloat16: want int32 or float32"),
    ("recover", "offset", lambda t: t.half(), TypeError, "offset is float16: want float32"),
    ("recover joint", "votes", lambda t: t.double(), TypeError, "votes is float64: want"),
    ("select", "offset", lambda t: t.bfloat16(), TypeError, "offset is bfloat16: want float32"),
    ("select joint", "votes", lambda t: t > 0, TypeError, "votes is bool: want float32"),
    ("execute", "gate_bias", lambda t: t.float(), TypeError, "gate_bias is float32: want bfl"),
    ("ffn", "up_bias", lambda t: t.half(), TypeError, "up_bias is float16: want bfloat16"),
    ("session", "down_bias", lambda t: t.float(), TypeError, "down_bias is float32: want bfl"),
    ("recover", "threshold", lambda t: t.half(), TypeError, "threshold is float16: want float32"),
    ("recover top", "budget", lambda t: t.long(), TypeError, "budget is int64: want int32"),
    ("tile", "index", lambda t: t.long(), TypeError, "index is int64: want int32"),
    ("execute", "up", lambda t: t.half(), TypeError, "up is float16: want bfloat16"),
    ("execute", "tile", lambda t: t.long(), TypeError, "tile is int64: want int32"),
    ("ffn", "down_t", lambda t: t.float(), TypeError, "down_t is float32: want bfloat16"),
    ("ffn", "stats", lambda t: t.int(), TypeError, "stats is int32: want int64"),
    ("session", "row_scale", lambda t: t.bfloat16(), TypeError, "row_scale is bfloat16: want"),
    ("project", "phi", lambda t: t.double(), TypeError, "phi is float64: want float32, float16 or"),
    ("project", "phi", lambda t: t.float(), TypeError, "x is bfloat16: want float32"),
    ("project", "x", lambda t: t.half(), TypeError, "x is float16: want bfloat16"),
    ("nested", "level_codes", lambda t: t.char(), TypeError, r"codes\[1\] is int8: want uint8"),
    ("nested", "level_exponent", lambda t: t.int(), TypeError, r"exponent\[0\] is int32: want"),
    ("nested", "level_top", lambda t: t.float(), TypeError, r"top\[0\] is float32: want bfloat16"),
    ("nested", "level_top", lambda t: t.half(), TypeError, r"top\[0\] is float16: want bfloat16"),
    ("nested", "level_codes", lambda t: None, TypeError, r"codes\[1\] is a NoneType: want a torch"),
    ("nested", "equal", lambda t: t.double(), TypeError, "equal is float64: want float32"),
    ("nested", "x", lambda t: t.double(), TypeError, "x is float64: want float32, float16 or"),
    ("nested", "level_bits", lambda v: 3.0, TypeError, r"bits\[1\] is a float: want an int"),
    # Strides
    ("nested", "level_codes", lambda t: t.mT.contiguous().mT, TypeError, r"codes\[1\] of shape"),
    ("nested", "level_exponent", lambda t: t[..., :1].expand(t.shape), TypeError, "exponent"),
    ("project", "phi", lambda t: t.T.contiguous().T, TypeError, r"phi of shape \(9, 200\)"),
    ("project", "x", lambda t: torch.cat([t, t], dim=1)[:, :D], TypeError, "x of shape"),
    ("recover", "offset", lambda t: t.T.contiguous().T, TypeError, "offset of shape"),
    ("ffn", "down_bias", lambda t: t[:1].expand(D), TypeError, "down_bias of shape"),
    ("sense", "codes", lambda t: t.mT.contiguous().mT, TypeError, "other strides"),
    ("sense", "x", lambda t: t.T.contiguous().T, TypeError, r"x of shape \(2, 200\) has other"),
    ("execute", "down_t", lambda t: t.T.contiguous().T, TypeError, "want a contiguous tensor"),
    ("ffn", "gate", lambda t: torch.cat([t, t], dim=1)[:, :D], TypeError, "gate of shape"),
    ("select", "threshold", lambda t: t[:1].expand(BATCH), TypeError, "threshold of shape"),
    # Shape
    ("sense", "x", lambda t: t[0], ValueError, r"x has 1 axes: want \(batch, d\)"),
    ("sense", "codes", lambda t: t[:, 0], ValueError, r"codes has 3 axes: want \(n_neurons, 2"),
    ("sense", "codes", lambda t: t[:, :, :1].contiguous(), ValueError, r"chunks = 2, 16"),
    ("sense", "codes", lambda t: t[:, :1].contiguous(), ValueError, "codes has shape"),
    ("sense", "equal", lambda t: t[:-1], ValueError, r"shape \(199,\): want \(d = 200,\)"),
    ("nested", "level_codes", lambda t: t[:-1], ValueError, r"codes\[1\] has shape \(76, 2, 2"),
    ("nested", "level_codes", lambda t: t[:, :, :1].clone(), ValueError, "chunks = 2, 16"),
    ("nested", "level_exponent", lambda t: t[:, :, :3].clone(), ValueError, r"2 \* chunks = 4\)"),
    ("nested", "level_top", lambda t: t[:-1], ValueError, r"top\[0\] has shape \(76, 2\): want"),
    ("nested", "codes", lambda t: t[:, 0], ValueError, r"codes has 3 axes: want \(n_neurons, 2"),
    ("nested", "x", lambda t: t[0], ValueError, r"x has 1 axes: want \(batch, d\)"),
    ("nested", "equal", lambda t: t[:-1], ValueError, r"shape \(199,\): want \(d = 200,\)"),
    ("select", "row_scale", lambda t: t[:-1], ValueError, r"want \(n_neurons = 77, 2\)"),
    ("select", "threshold", lambda t: t[:1], ValueError, r"want \(batch = 2,\)"),
    ("recover", "scale", lambda t: t[:1], ValueError, "scale has shape"),
    ("recover", "y", lambda t: t[..., 0].contiguous(), ValueError, "y has 2 axes"),
    ("tile", "count", lambda t: t[:1], ValueError, "count has shape"),
    ("tile", "index", lambda t: t[0], ValueError, "index has 1 axes"),
    ("execute", "gate", lambda t: t[:, :-1].contiguous(), ValueError, "gate has shape"),
    ("execute", "up", lambda t: t[:-1], ValueError, "up has shape"),
    ("execute", "down_t", lambda t: t.T.contiguous(), ValueError, r"want \(n_neurons = 77, d"),
    ("execute", "tile", lambda t: t[:, :-1].contiguous(), ValueError, "tile has shape"),
    ("execute", "n_tiles", lambda t: t[:1], ValueError, "n_tiles has shape"),
    ("ffn", "stats", lambda t: t[:1], ValueError, "stats has shape"),
    ("session", "threshold", lambda t: t[:1], ValueError, "max_batch = 2"),
    ("session", "gate", lambda t: t[0], ValueError, "gate"),
    ("project", "phi", lambda t: t[0], ValueError, r"phi has 1 axes: want \(m, d\)"),
    ("project", "x", lambda t: t[None], ValueError, r"x has 3 axes: want \(batch, d\)"),
    ("project", "x", lambda t: t[:, :-1].contiguous(), ValueError, r"x has shape \(2, 199\): want"),
    ("recover", "y", lambda t: t[..., :1].contiguous(), ValueError, r"want \(n_neurons = 77, col"),
    ("recover", "y", lambda t: t[..., :0], ValueError, "want|columns"),
    ("recover", "offset", lambda t: t[:, :1].contiguous(), ValueError, "offset has shape"),
    ("recover", "offset", lambda t: t[:-1], ValueError, r"offset has shape \(76, 2\): want"),
    ("recover joint", "votes", lambda t: t[:1], ValueError, r"votes has shape \(1,\): want"),
    ("recover", "threshold", lambda t: t[:1], ValueError, r"want \(batch = 2,\)"),
    ("recover joint", "threshold", lambda t: torch.ones(0), ValueError, r"\(0,\): want \(1,\)"),
    ("select", "offset", lambda t: t[0], ValueError, "offset has shape"),
    ("select joint", "votes", lambda t: t[None], ValueError, "votes has shape"),
    ("execute", "gate_bias", lambda t: t[:-1], ValueError, r"gate_bias has shape \(76,\): want"),
    ("execute", "up_bias", lambda t: t[None], ValueError, r"up_bias has shape \(1, 77\): want"),
    ("execute", "down_bias", lambda t: t[:N], ValueError, r"down_bias has shape .* \(d = 200,\)"),
    ("ffn", "offset", lambda t: t[:-1], ValueError, "offset has shape"),
    ("ffn joint", "votes", lambda t: t[:1], ValueError, r"votes has shape .* \(batch = 2,\)"),
    ("session joint", "votes", lambda t: t[:1], ValueError, "votes has shape"),
    ("session", "gate_bias", lambda t: t[:-1], ValueError, "gate_bias has shape"),
    # Nothing there
    ("project", "phi", lambda t: t[:0], ValueError, "rows = 5: want 1 to m = 0"),
    ("sense", "x", lambda t: t[:, :0], ValueError, "d = 0|chunks = 0"),
    ("execute", "gate", lambda t: t[:0], ValueError, "n_neurons = 0|up has shape"),
    ("recover", "y", lambda t: t[:, :0], ValueError, "n_neurons = 0|row_scale has shape"),
    ("tile", "index", lambda t: t[:, :0], ValueError, "n_neurons = 0"),
    # Absurd sizes, refused before any memory is touched
    ("project", "x", lambda t: huge(1 << 40, D), ValueError, "batch = 1099511627776 rows of 5"),
    ("sense", "x", lambda t: huge(1 << 40, D), ValueError, "batch = 1099511627776 rows"),
    ("nested", "x", lambda t: huge(1 << 40, D), ValueError, "batch = 1099511627776 rows"),
    ("execute", "x", lambda t: huge(1 << 40, D), ValueError, "batch = 1099511627776 rows"),
    ("ffn", "x", lambda t: huge(65536, D), ValueError, "batch = 65536 rows"),
    ("sense", "x", lambda t: t.new_zeros(1 << 40, 0), ValueError, "batch = 1099511627776 rows"),
    ("tile", "index", lambda t: huge(60000, 60000, dtype=torch.int32), ValueError, "fewer than 2"),
    ("recover", "y", lambda t: huge(2, 1 << 31, 2, dtype=torch.int32), ValueError, "fewer than 2"),
    ("execute", "gate", lambda t: huge(1 << 40, D), ValueError, "1099511627776 neurons"),
    ("session", "gate", lambda t: huge(1 << 40, D), ValueError, "1099511627776 neurons|n_neurons"),
    # Values
    ("sense", "bits", lambda v: 0, ValueError, "codes has shape|bits = 0"),
    ("sense", "bits", lambda v: 3, ValueError, r"codes has shape .* 16 \* bits = 48"),
    ("sense", "bits", lambda v: -1, ValueError, "bits = -1"),
    ("sense", "bits", lambda v: 1 << 40, ValueError, "bits = 1099511627776"),
    ("sense", "bits", lambda v: "2", ValueError, "bits = '2': want 1 to 4 or \"ternary\""),
    ("nested", "level_bits", lambda v: 2, ValueError, r"codes\[1\] has shape .* 16 \* bits = 32"),
    ("nested", "level_bits", lambda v: -1, ValueError, r"bits\[1\] = -1: want 0 to 2"),
    ("nested", "level_bits", lambda v: 1 << 40, ValueError, r"bits\[1\] = 1099511627776: want"),
    ("ffn", "bits", lambda v: 2.0, TypeError, "bits is a float: want an int or \"ternary\""),
    ("session", "bits", lambda v: [2], TypeError, "bits is a list: want an int or"),
    ("session", "bits", lambda v: 5, ValueError, "bits = 5: want 1 to 4 or"),
    ("select", "bits", lambda v: "ternary", ValueError, r"want .* groups = 3, 16\)"),
    ("project", "rows", lambda v: 0, ValueError, "rows = 0: want 1 to m = 9"),
    ("project", "rows", lambda v: 10, ValueError, "rows = 10: want 1 to m = 9"),
    ("project", "rows", lambda v: -1, ValueError, "rows = -1: want"),
    ("project", "rows", lambda v: 2.0, TypeError, "rows is a float: want an int"),
    ("tile", "tile_rows", lambda v: 0, ValueError, "tile_rows = 0: want at least 1"),
    ("select", "tile_rows", lambda v: -3, ValueError, "tile_rows = -3"),
    ("execute", "tile_rows", lambda v: 0, ValueError, "tile_rows = 0|tile has shape"),
    ("execute", "tile_rows", lambda v: 2, ValueError, r"tile has shape \(2, 77\): want .* 39"),
    ("ffn", "tile_rows", lambda v: 1 << 31, ValueError, "tile_rows = 2147483648"),
    ("session", "max_batch", lambda v: 65536, ValueError, "max_batch = 65536"),
    ("recover", "tile_rows", lambda v: 0, ValueError, "tile_rows = 0: want at least 1"),
    ("recover", "tile_rows", lambda v: -1, ValueError, "tile_rows = -1"),
    ("recover", "tile_rows", lambda v: 1.0, TypeError, "tile_rows is a float: want an int"),
    ("recover", "activation", lambda v: "relu", ValueError, "activation = relu: want silu or gel"),
    ("select", "activation", lambda v: "SiLU", ValueError, "activation = SiLU: want silu or gel"),
    ("execute", "activation", lambda v: "gelu", ValueError, "activation = gelu: want silu or gel"),
    ("ffn", "activation", lambda v: "", ValueError, "activation = : want silu or gelu_tanh"),
    ("session", "activation", lambda v: None, TypeError, "activation is a NoneType: want a str"),
    ("recover joint", "votes", lambda t: -t, ValueError, r"votes\[0\] = -1.0+: want at least 0"),
    ("select joint", "votes", lambda t: t - 2, ValueError, r"votes\[0\] = -1.0+: want"),
    ("ffn joint", "votes", lambda t: t * -INF, ValueError, r"votes\[0\] = -inf: want"),
    ("execute", "tile", lambda t: t + 1, ValueError, r"tile\[0, 76\] = 77: want"),
    ("execute", "tile", lambda t: t - 1, ValueError, r"tile\[0, 0\] = -1: want"),
    ("execute", "tile", lambda t: t.flip(1), ValueError, r"tile\[0, 1\] = 75: want ascending"),
    ("execute", "n_tiles", lambda t: t + 1, ValueError, "78 entries of tile in row 0"),
    ("execute", "n_tiles", lambda t: -t, ValueError, "-77 entries of tile in row 0"),
    ("tile", "index", lambda t: t + 1, ValueError, r"index\[0, 76\] = 77: want"),
    ("tile", "count", lambda t: t * 1000, ValueError, "77000 entries of index in row 0"),
    ("recover top", "budget", lambda t: t - 4, ValueError, r"budget\[0\] = -1: want 0 to"),
    ("recover top", "budget", lambda t: t + N, ValueError, r"budget\[0\] = 80: want 0 to"),
]  # fmt: skip


@pytest.mark.parametrize("op", sorted({row[0] for row in ROWS}))
def test_refuses(good, op):
    for i, (_, name, change, error, message) in enumerate(row for row in ROWS if row[0] == op):
        refuses(good, op, name, change, error, message, f"{op}-{name}-{i}")


def refuses(good, op, name, change, error, message, row):
    with pytest.raises(error) as caught:
        call(op, {**good, name: change(good[name])})
        pytest.fail(f"{row} was taken")
    text = str(caught.value)
    assert text.startswith(f"[{op.split()[0]}] "), row
    assert text.endswith("."), row
    assert re.search(message, text), (row, text)


def arguments_of(op, good):
    """Good arguments of an operation, in the order of its row."""
    n = 4
    values = {
        **good,
        **{"code": 2, "top": False, "design": "", "cap": None, "dropped": None},
        **{"tile_rows": 1, "limit": good["threshold"], "votes": None},
        **{"gram": torch.eye(n), "correlation": torch.ones(2, n), "energy": torch.ones(2) * n},
        **{"budget_max": 2, "start": torch.zeros(2, 1, dtype=torch.int32), "dictionary": None},
        **{
            "start_count": torch.ones(2, dtype=torch.int32),
            "coef": True,
            "per_step": 1,
            "group": 1,
        },
        **dict.fromkeys(("tolerance", "residual_max", "correlation_min", "gain_min"), 0.0),
    }
    if op.name == "omp":
        values["budget"] = torch.ones(2, dtype=torch.int32)
    if op.name == "nested":
        values.update({name: [good[f"level_{name}"]] for name in ("codes", "exponent", "top")})
        values["bits"] = [good["level_bits"]]
    if op.name == "encode":
        values.update(w=torch.ones(9, n), feedback=torch.eye(n), step=torch.ones(9), nu=8)
        values["table"] = trellis.table(values["bits"])
    if op.name == "linear":
        values.update(w=torch.ones(9, n), x=torch.ones(2, n), bias=torch.ones(9))
    if op.name == "sketch":
        code = torch.zeros(1, 1, 2, 64, dtype=torch.uint8)
        values.update(codes=[code], step=[torch.ones(9, dtype=torch.bfloat16)], bits=[2])
        values["turn"] = rotation.fit(torch.ones(n)).words()
        values["x"] = torch.ones(2, n)
    if op.name in ("select", "ffn"):
        values["cap"] = torch.full((BATCH,), 5, dtype=torch.int32)
        values["dropped"] = torch.zeros(1, dtype=torch.int64)
    return [values[arg.name] for arg in op.args]


# What no tensor of any operation may be.
NEVER = (
    (lambda t: t.tolist(), TypeError, "is a list|is a int|is a float"),
    (lambda t: t.to("meta"), ValueError, "is on meta: want cpu or cuda"),
    (lambda t: t.float().to_sparse(), TypeError, "is torch.sparse_coo: want a strided"),
    (lambda t: t.to(torch.complex64), TypeError, "is complex64: want"),
    (lambda t: torch.stack([t, t], dim=-1)[..., 0], TypeError, "has other strides: want a"),
    (lambda t: t[None], ValueError, "axes|has shape"),
)


@pytest.mark.parametrize("op", table.OPS, ids=lambda op: op.name)
def test_refuses_of_every_tensor_what_no_tensor_may_be(good, op):
    """By the table, so that an argument that is added to it is among them."""
    given = arguments_of(op, good)
    table.CALL[op.name](*given)
    for place, arg in enumerate(op.args):
        if not arg.shape or given[place] is None:
            continue
        tensor = given[place][0] if arg.many else given[place]
        changes = [*NEVER, *[(lambda t: None, TypeError, "is a NoneType")] * (not arg.optional)]
        for change, error, message in changes:
            if "strides" in message and tensor.numel() == 1:
                continue  # it has none
            bad = list(given)
            bad[place] = [change(tensor)] if arg.many else change(tensor)
            with pytest.raises(error, match=rf"\[{op.name}\] .*({message})"):
                table.CALL[op.name](*bad)
                pytest.fail(f"{arg.name}: {message}")


OPS = (
    "sense",
    "nested",
    "project",
    "recover",
    "recover top",
    "recover joint",
    "tile",
    "execute",
    "select",
)
OPS += ("select joint", "ffn", "ffn joint", "session", "session joint")


@pytest.mark.parametrize("op", OPS)
def test_the_good_call_is_good(good, op):
    call(op, good)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("sense", "equal"),
        ("nested", "level_top"),
        ("recover", "scale"),
        ("execute", "tile"),
        ("ffn", "x"),
        ("tile", "count"),
    ],
)
def test_refuses_several_devices(good, op, name):
    if not ops.cuda_available():
        pytest.skip("needs a CUDA device and a build with CUDA")
    with pytest.raises(ValueError, match="want all tensors of a call on one device"):
        call(op, {**good, name: good[name].cuda()})


def native_tile(index, count, tile, n_tiles):
    _native.tile(index, count, 1, tile, n_tiles, 0)


def arrays():
    """Arguments of a good call below torch, where numpy can say what torch cannot: read-only."""
    index = np.arange(5, dtype=np.int32)[None].copy()
    count = np.array([5], dtype=np.int32)
    return dict(index=index, count=count, tile=np.zeros_like(index), n_tiles=np.zeros_like(count))


@pytest.mark.parametrize("name", ["tile", "n_tiles"])
def test_refuses_read_only_outputs(name):
    given = arrays()
    given[name].flags.writeable = False
    with pytest.raises(TypeError, match=rf"\[tile\] {name} is read-only: want a tensor to write"):
        native_tile(**given)


@pytest.mark.parametrize("name", ["index", "count"])
def test_reads_read_only_inputs(name):
    given = arrays()
    given[name].flags.writeable = False
    native_tile(**given)
    assert given["tile"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    "value", [3, "tile", object(), [1, 2]], ids=lambda value: type(value).__name__
)
def test_refuses_outputs_that_are_no_tensors(value):
    with pytest.raises(TypeError, match=r"\[tile\] tile is a .* without dense memory"):
        native_tile(**{**arrays(), "tile": value})


def test_refuses_outputs_of_another_shape():
    with pytest.raises(
        ValueError, match=r"\[tile\] tile has shape \(1, 4\): want \(batch = 1, n_t"
    ):
        native_tile(**{**arrays(), "tile": np.zeros((1, 4), dtype=np.int32)})


def test_refuses_a_workspace_that_is_too_small(good):
    a = good
    small = torch.empty(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[execute\] workspace of 64 bytes: want \d+"):
        _native.execute(
            a["gate"], a["up"], a["down_t"], a["x"], a["tile"], a["n_tiles"], 1, None, None, None,
            "silu", "", small, torch.empty_like(a["x"]), 0,
        )  # fmt: skip


@pytest.mark.parametrize("op", ["execute", "select", "ffn"])
@pytest.mark.parametrize(
    ("design", "word"),
    [
        ("warp", "warp"),
        ("list range", "range"),
        ("bulk list bulk", "bulk"),
        ("blocks=0", "blocks=0"),
        ("blocks=161", "blocks=161"),
        ("blocks=3x", "blocks=3x"),
        ("blocks=3 blocks=4", "blocks=4"),
        ("portable portable", "portable"),
        ("auto", "auto"),
        ("list  bulk", ""),
    ],
)
def test_refuses_an_unknown_design(good, op, design, word):
    layer, x = layer_of(good, is_joint=False), good["x"]
    tiles = ops.TileList(good["tile"], good["n_tiles"], 1)
    calls = {
        "execute": lambda: ops.execute(layer.weights, tiles, x, design=design),
        "select": lambda: ops.select(layer.sensor, layer.decision, x, design=design),
        "ffn": lambda: ops.ffn(layer, x, design=design),
    }
    with pytest.raises(ValueError, match=rf"\[{op}\] design has {word}: want general, list"):
        calls[op]()


@pytest.mark.parametrize("op", ["recover", "execute", "select", "ffn"])
def test_the_registered_operations_refuse_an_unknown_activation(good, op):
    """They may be called without `ops`, by a graph that torch.compile made."""
    a = good
    layer = (a["codes"], a["equal"], a["row_scale"], a["threshold"])
    given = {
        "recover": (a["y"], a["scale"], a["row_scale"], a["threshold"], False),
        "execute": (a["gate"], a["up"], a["down_t"], a["x"], a["tile"], a["n_tiles"], 1),
        "select": (*layer, a["x"], 2, 1),
        "ffn": (*layer, a["gate"], a["up"], a["down_t"], a["x"], 2, 1),
    }[op]
    with pytest.raises(ValueError, match=rf"\[{op}\] activation = relu: want silu or gelu_tanh"):
        getattr(torch.ops.csfast, op).default(*given, activation="relu")


def test_a_cuda_call_without_cuda_says_so():
    if ops.backend_info()["cuda"] != "not built":
        pytest.skip("this build has CUDA")
    with pytest.raises(ops.BackendError, match=r"\[select\] csfast was built without CUDA\."):
        _native.select_workspace(1, 1, 1, True)
