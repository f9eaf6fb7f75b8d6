import dataclasses
import shutil

import pytest
import torch

from axes import DTYPES, HALF, inside, name_of, on_gpu, pairwise
from csfast import ops, reference
from csfast.bench.cases import CASES, Case
from csfast.codes import planes
from csfast.layer import Weights
from numeric import (
    assert_within,
    execute_tolerance,
    ffn_path,
    layer_of,
    made,
    mask_of,
    middle_threshold,
    split_tiles,
)


def run(p, threshold, x=None, *, stats=None, dropped=None, design="", **parts):
    layer = layer_of(p, threshold, **parts)
    return ops.ffn(layer, p.x if x is None else x, stats=stats, dropped=dropped, design=design)


def select(p, threshold, **parts):
    layer = layer_of(p, threshold, **parts)
    return ops.select(layer.sensor, layer.decision, p.x, activation=layer.activation)[0]


def execute(p, tiles, *, activation="silu", design="", **biases):
    weights = Weights(p.gate, p.up, p.down_t, **biases)
    return ops.execute(weights, tiles, p.x, activation=activation, design=design)


@pairwise(case=CASES, tile_rows=[1, 3], dtype=DTYPES, bits=planes.CODES)
def test_equals_select_and_execute(case, tile_rows, dtype, bits, device):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    tiles = select(p, threshold, tile_rows=tile_rows)
    want = execute(p, tiles, design=ffn_path(p.x, case.n_neurons))
    assert torch.equal(run(p, threshold, tile_rows=tile_rows), want)


@pairwise(case=CASES, tile_rows=[1, 16], is_joint=[False, True], dtype=DTYPES)
def test_equals_select_and_execute_in_every_form(case, tile_rows, is_joint, dtype, device):
    p = made(case, dtype, device)
    activation = "gelu_tanh"
    biases = case.make_biases(p)
    votes = torch.linspace(0, 1, case.batch).to(device) if is_joint else None
    told = {"activation": activation, "votes": votes, "tile_rows": tile_rows}
    threshold = middle_threshold(p, biases=biases, **told)
    tiles = select(p, threshold, offset=biases.offset, **told)
    more = {"activation": activation, "design": ffn_path(p.x, case.n_neurons, is_joint=is_joint)}
    want = execute(p, tiles, **more, **biases.of_execute())
    got = run(p, threshold, offset=biases.offset, **biases.of_execute(), **told)
    assert torch.equal(got, want)


# Widths that CUDA has more paths for: 16-bit rows at multiples of 16 bytes.
WIDTHS = (
    Case("one_warp", batch=1, d=8, n_neurons=41),
    Case("off_group", batch=3, d=200, n_neurons=301),
    Case("demo", batch=1, d=384, n_neurons=1152),
    Case("two_loads", batch=1, d=4104, n_neurons=75),
    Case("batch", batch=9, d=264, n_neurons=150),
)


@on_gpu
@inside(path=["list", "range", "batch"], dtype=HALF)
@pytest.mark.parametrize("case", WIDTHS, ids=name_of)
@pytest.mark.parametrize("form", ["plain", "biased", "tiles", "joint", "few_blocks", "all"])
def test_equals_select_and_execute_in_every_design(case, form, path, dtype, device):
    """And counts as much; and all designs of one path are equal, bit for bit."""
    p = made(case, dtype, device)
    tile_rows = 5 if form == "tiles" else 1
    is_joint = form == "joint" or path == "batch"
    votes = torch.linspace(0.5, 1, case.batch).to(device) if is_joint else None
    told = {"tile_rows": tile_rows, "votes": votes}
    biases = case.make_biases(p).of_execute() if form == "biased" else {}
    threshold = middle_threshold(p, **told)
    threshold = torch.zeros_like(threshold) if form == "all" else threshold
    blocks = " blocks=3" if form == "few_blocks" else ""
    tiles = select(p, threshold, **told)
    want = execute(p, tiles, design=path + blocks, **biases)
    mask = mask_of(tiles.tile, tiles.n_tiles, tile_rows, case.n_neurons)
    executed = int(mask.sum()) * (case.batch if is_joint else 1)
    for more in ("", " register", " bulk", " portable"):
        if more == " bulk" and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue  # refused
        stats = torch.zeros(2, dtype=torch.int64, device=device)
        got = run(p, threshold, stats=stats, design=path + blocks + more, **biases, **told)
        assert torch.equal(got, want), more
        assert stats.tolist() == [case.batch, executed]


@on_gpu
@pytest.mark.parametrize("code", planes.CODES)
def test_one_kernel_senses_and_executes_every_code(code, device):
    p = made(WIDTHS[2], torch.bfloat16, device, bits=code)
    threshold = middle_threshold(p)
    got = run(p, threshold, design="range")
    tiles = select(p, threshold)
    want = execute(p, tiles, design="range")
    assert torch.equal(got, want)


@pairwise(case=WIDTHS, is_joint=[False, True], dtype=DTYPES)
def test_caps_what_it_executes_and_counts_the_rest(case, is_joint, dtype, device):
    p = made(case, dtype, device)
    votes = torch.linspace(0.5, 1, case.batch).to(device) if is_joint else None
    threshold = middle_threshold(p, votes=votes)
    lists = 1 if is_joint else case.batch
    cap = (torch.arange(lists, dtype=torch.int32) * 100 + 7).to(device)
    tiles = select(p, threshold, votes=votes, cap=cap)
    assert tiles.dropped.sum() > 0
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    dropped = torch.full((1,), 100, dtype=torch.int64, device=device)
    got = run(p, threshold, votes=votes, cap=cap, stats=stats, dropped=dropped)
    path = ffn_path(p.x, case.n_neurons, is_joint=is_joint)
    assert torch.equal(got, execute(p, tiles, design=path))
    assert torch.equal(got, run(p, threshold, votes=votes, cap=cap))
    assert int(dropped) == 100 + int(tiles.dropped.sum())
    executed = int(tiles.n_tiles.sum()) * (case.batch if is_joint else 1)
    assert stats.tolist() == [case.batch, executed]


def test_refuses_to_count_what_no_cap_drops():
    p = made(CASES[2], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"\[ffn\] dropped without a cap: want both"):
        run(p, torch.zeros(3), dropped=torch.zeros(1, dtype=torch.int64))


@inside(dtype=DTYPES)
def test_is_the_bias_if_no_row_votes(dtype, device):
    case = CASES[2]
    p = made(case, dtype, device)
    down_bias = case.make_biases(p).down
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    votes = torch.zeros(3, device=device)
    threshold = torch.zeros(1, device=device)
    got = run(p, threshold, votes=votes, down_bias=down_bias, stats=stats)
    assert torch.equal(got, down_bias.expand(3, -1))
    assert stats.tolist() == [3, 0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference_on_its_own_support(case, dtype, device):
    p = made(case, dtype, device)
    threshold = middle_threshold(p)
    tiles = select(p, threshold)
    want = reference.execute(
        p.gate, p.up, p.down_t, p.x, split_tiles(tiles.tile, tiles.n_tiles), tile_rows=1
    )
    mask = mask_of(tiles.tile, tiles.n_tiles, 1, case.n_neurons)
    assert_within(run(p, threshold), want, execute_tolerance(p.gate, p.up, p.down_t, p.x, mask))


@inside(dtype=DTYPES)
def test_threshold_that_keeps_everything_is_the_dense_layer(dtype, device):
    case = CASES[2]
    p = case.make_exact(dtype, device)
    xd = p.x.double()
    dense = torch.relu(xd @ p.gate.double().T) * (xd @ p.up.double().T) @ p.down_t.double()
    got = run(p, torch.full((3,), -1.0, device=device))
    assert torch.equal(got, dense.float().to(dtype))


def test_massive_channels_do_not_change_the_output(device):
    """Norm gain x 64 on four channels, their weights / 64: exact in float32, so nothing moves."""
    p = made(CASES[2], torch.float32, device)
    threshold = middle_threshold(p)
    at = torch.tensor([3, 64, 127, 199], device=device)
    x, gate, up, equal = (t.clone() for t in (p.x, p.gate, p.up, p.equal))
    x[:, at] *= 64
    gate[:, at] /= 64
    up[:, at] /= 64
    equal[at] /= 64  # what planes.equalizer gives for channels 64 times as large
    moved = dataclasses.replace(p, equal=equal, gate=gate, up=up, x=x)
    got = run(moved, threshold)
    assert torch.equal(got, run(p, threshold))


@inside(tile_rows=[1, 4])
def test_counts_what_it_executes(tile_rows, device):
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    stats = torch.tensor([100, 1000], dtype=torch.int64, device=device)
    run(p, threshold, tile_rows=tile_rows, stats=stats)
    tiles = select(p, threshold, tile_rows=tile_rows)
    n = int(mask_of(tiles.tile, tiles.n_tiles, tile_rows, 77).sum())
    assert stats.tolist() == [103, 1000 + n]


@inside(tile_rows=[1, 4, 76, 77, 100], quantile=[0.6, None], is_joint=[False, True])
def test_counts_the_last_tile_as_long_as_it_is(tile_rows, quantile, is_joint, device):
    """A shared list counts for every row that executes it."""
    p = made(CASES[2], torch.bfloat16, device)
    told = {"tile_rows": tile_rows, "votes": torch.ones(3, device=device) if is_joint else None}
    threshold = middle_threshold(p, quantile or 0.5, **told)
    threshold = threshold if quantile else torch.zeros_like(threshold)
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    run(p, threshold, stats=stats, **told)
    tiles = select(p, threshold, **told)
    n = int(mask_of(tiles.tile, tiles.n_tiles, tile_rows, 77).sum())
    assert stats.tolist() == [3, 3 * n if is_joint else n]
    assert quantile or stats[1] == 3 * 77


def test_empty_batch_counts_nothing(device):
    p = made(CASES[3], torch.bfloat16, device)
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    out = run(p, torch.zeros(0, device=device), stats=stats)
    assert out.shape == (0, 64)
    assert stats.tolist() == [0, 0]


def test_gradients_are_no_obstacle(device):
    """Weights of a model want gradients; the operation gives none and says so by its output."""
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    gate = torch.nn.Parameter(p.gate)
    with torch.no_grad():
        got = run(dataclasses.replace(p, gate=gate), threshold)
    assert torch.equal(got, run(p, threshold))
    got = run(dataclasses.replace(p, gate=gate), threshold)
    assert torch.equal(got.detach(), run(p, threshold))


def test_two_hundred_runs_are_equal(dtype, device):
    p = made(CASES[4], dtype, device)
    threshold = middle_threshold(p)
    first = run(p, threshold)
    for _ in range(200):
        assert torch.equal(run(p, threshold), first)


def test_is_registered_with_torch(device):
    """Schema, fake kernel and functionalisation, as torch itself checks them."""
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    layer = (p.codes, p.equal, p.row_scale, threshold, p.gate, p.up, p.down_t)
    args = (*layer, p.x, 2, 1)
    torch.library.opcheck(torch.ops.csfast.ffn.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.csfast.ffn.counted, (*args, stats), test_utils=checks)
    tiles = select(p, threshold)
    torch.library.opcheck(
        torch.ops.csfast.execute.default,
        (p.gate, p.up, p.down_t, p.x, tiles.tile, tiles.n_tiles, 1),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.csfast.select.default,
        (p.codes, p.equal, p.row_scale, threshold, p.x, 2, 1),
        test_utils=checks,
    )
    biases = CASES[2].make_biases(p)
    votes, one = torch.ones(3, device=device), threshold[:1]
    recovery = {"offset": biases.offset, "votes": votes, "activation": "gelu_tanh"}
    torch.library.opcheck(
        torch.ops.csfast.ffn.default,
        (p.codes, p.equal, p.row_scale, one, p.gate, p.up, p.down_t, p.x, 2, 4),
        {**recovery, **biases.of_execute()},
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.csfast.ffn.counted,
        (p.codes, p.equal, p.row_scale, one, p.gate, p.up, p.down_t, p.x, 2, 4, stats),
        {**recovery, **biases.of_execute()},
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.csfast.execute.default,
        (p.gate, p.up, p.down_t, p.x, tiles.tile, tiles.n_tiles, 1),
        {**biases.of_execute(), "activation": "gelu_tanh"},
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.csfast.select.default,
        (p.codes, p.equal, p.row_scale, one, p.x, 2, 4),
        recovery,
        test_utils=checks,
    )
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=2)
    torch.library.opcheck(
        torch.ops.csfast.recover.default,
        (y, scale, p.row_scale, one, False),
        {**recovery, "tile_rows": 4},
        test_utils=checks,
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_compiles_in_one_graph(backend, biased, counted, device):
    if backend == "inductor" and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    stats = torch.zeros(2, dtype=torch.int64, device=device) if counted else None

    biases = CASES[2].make_biases(p)
    more = {"offset": biases.offset, **biases.of_execute(), "tile_rows": 4} if biased else {}

    def block(x):
        return x + run(p, threshold, x * 2, stats=stats, **more)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert torch.equal(compiled(p.x), block(p.x))
    if counted:  # once compiled, once not
        assert stats[0] == 6
        assert stats[1] > 0
        assert stats[1] % 2 == 0
