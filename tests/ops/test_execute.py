import dataclasses

import pytest
import torch

from axes import DTYPES, HALF, inside, on_gpu, pairwise
from csfast import ops, reference
from csfast.bench.cases import CASES, LARGE, Case
from csfast.layer import Weights
from numeric import assert_within, execute_tolerance, made, mask_of, split_tiles

# What CUDA has besides its general path, for 16-bit rows at multiples of 16 bytes.
WIDTHS = {
    "one_warp": Case("one_warp", batch=2, d=8, n_neurons=41),
    "off_group": Case("off_group", batch=3, d=200, n_neurons=301),
    "demo": CASES[4],
    "one_group": Case("one_group", batch=2, d=2056, n_neurons=150),
    "two_loads": Case("two_loads", batch=2, d=4104, n_neurons=75),
}


def tiles_of(batch, n_neurons, device, *, density=0.4, tile_rows=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    width = -(-n_neurons // tile_rows)
    masks = torch.rand(batch, width, generator=g) < density
    tile = torch.full((batch, width), -7, dtype=torch.int32)
    for row, mask in enumerate(masks):
        chosen = mask.nonzero().flatten().to(torch.int32)
        tile[row, : len(chosen)] = chosen
    return ops.TileList(tile.to(device), masks.sum(dim=1).to(torch.int32).to(device), tile_rows)


def execute(p, x, tiles, *, activation="silu", design="", **biases):
    weights = Weights(p.gate, p.up, p.down_t, **biases)
    return ops.execute(weights, tiles, x, activation=activation, design=design)


def check(p, tiles, design="", **more):
    got = execute(p, p.x, tiles, design=design, **more)
    want = reference.execute(
        p.gate,
        p.up,
        p.down_t,
        p.x,
        split_tiles(tiles.tile, tiles.n_tiles),
        tile_rows=tiles.tile_rows,
        **more,
    )
    mask = mask_of(tiles.tile, tiles.n_tiles, tiles.tile_rows, p.gate.shape[0])
    mask = mask.expand(len(p.x), -1)
    assert got.dtype == p.x.dtype
    assert_within(got, want, execute_tolerance(p.gate, p.up, p.down_t, p.x, mask, **more))


@pairwise(case=CASES, tile_rows=[1, 3, 16], dtype=DTYPES)
def test_matches_reference(case, tile_rows, dtype, device):
    p = made(case, dtype, device)
    check(p, tiles_of(case.batch, case.n_neurons, device, tile_rows=tile_rows))


@pairwise(case=CASES, activation=["silu", "gelu_tanh"], dtype=DTYPES)
def test_matches_reference_with_biases(case, activation, dtype, device):
    p = made(case, dtype, device)
    tiles = tiles_of(case.batch, case.n_neurons, device, tile_rows=4)
    check(p, tiles, activation=activation, **case.make_biases(p).of_execute())


@inside(which=["gate_bias", "up_bias", "down_bias"], dtype=DTYPES)
def test_matches_reference_with_one_bias(which, dtype, device):
    case = CASES[2]
    p = made(case, dtype, device)
    check(p, tiles_of(3, 77, device), **{which: case.make_biases(p).of_execute()[which]})


@pairwise(case=CASES, tile_rows=[1, 16], dtype=DTYPES)
def test_a_shared_list_is_that_of_every_row(case, tile_rows, dtype, device):
    """Bit for bit what each row gives with a list of its own, on the same path."""
    p = made(case, dtype, device)
    more = case.make_biases(p).of_execute()
    shared = tiles_of(1, case.n_neurons, device, tile_rows=tile_rows)
    repeated = ops.TileList(
        shared.tile.repeat(case.batch, 1), shared.n_tiles.repeat(case.batch), tile_rows
    )
    path = {"design": "general" if dtype == torch.float32 or case.d % 8 > 0 else "list"}
    got = execute(p, p.x, shared, **path, **more)
    assert torch.equal(got, execute(p, p.x, repeated, **path, **more))
    check(p, shared, **more)


@inside(batch=range(1, 10), path=["list", "batch"])
def test_a_shared_list_for_every_number_of_rows(path, batch, dtype, device):
    """And by default a single row goes by lists, more by tensor cores."""
    p = made(CASES[5], dtype, device)
    tiles = tiles_of(1, 1152, device)
    design = "general" if dtype == torch.float32 else path
    want = execute(p, p.x, tiles, design=design)
    got = execute(p, p.x[:batch], tiles, design=design)
    assert torch.equal(got, want[:batch])
    if path == ("list" if batch == 1 else "batch"):
        assert torch.equal(execute(p, p.x[:batch], tiles), got)


@on_gpu
@inside(batch=[5, 9, 35], dtype=HALF)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", ["plain", "biased", "tiles", "full", "empty", "one_block"])
def test_rows_that_share_a_list_match_reference(width, form, batch, dtype, device):
    """Whatever their number; none depends on the others, nor any on how weights are loaded."""
    case = dataclasses.replace(WIDTHS[width], batch=batch)
    p = made(case, dtype, device)
    biases = case.make_biases(p).of_execute() if form == "biased" else {}
    density = {"full": 2.0, "one_block": 0.9, "empty": 0.0}.get(form, 0.4)
    tile_rows = 5 if form == "tiles" else 1
    tiles = tiles_of(1, case.n_neurons, device, density=density, tile_rows=tile_rows)
    design = "batch blocks=1" if form == "one_block" else "batch"
    check(p, tiles, design=design, **biases)
    got = execute(p, p.x, tiles, design=design, **biases)
    for loads in (" register", " bulk", " portable"):
        if loads == " bulk" and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue  # refused, see test_design.py
        assert torch.equal(execute(p, p.x, tiles, design=design + loads, **biases), got)
    last = execute(p, p.x[-1:], tiles, design=design, **biases)
    assert torch.equal(got[-1:], last)
    x = p.x.clone()
    x[0] = float("nan")
    poisoned = execute(p, x, tiles, design=design, **biases)
    assert torch.equal(poisoned[1:], got[1:])


def test_matches_reference_on_a_large_layer(device):
    g = torch.Generator().manual_seed(0)
    gate, up, down_t = (
        (torch.randn(LARGE.n_neurons, LARGE.d, generator=g) / LARGE.d**0.5).to(
            device, torch.bfloat16
        )
        for _ in range(3)
    )
    x = torch.randn(1, LARGE.d, generator=g).to(device, torch.bfloat16)
    tiles = tiles_of(1, LARGE.n_neurons, device, density=0.25)
    got = ops.execute(Weights(gate, up, down_t), tiles, x)
    chosen = split_tiles(tiles.tile, tiles.n_tiles)[0]
    gate, up, down_t = gate[chosen], up[chosen], down_t[chosen]
    everything = torch.arange(len(chosen), device=device)
    want = reference.execute(gate, up, down_t, x, [everything], tile_rows=1)
    mask = torch.ones(1, len(chosen), dtype=torch.bool, device=device)
    assert_within(got, want, execute_tolerance(gate, up, down_t, x, mask))


@on_gpu
@inside(path=["list", "range"], dtype=HALF)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", ["plain", "biased", "tiles", "full", "shared", "few_blocks"])
def test_every_design_matches_reference(width, form, path, dtype, device):
    """And all designs of one path are equal, bit for bit."""
    case = WIDTHS[width]
    p = made(case, dtype, device)
    biases = case.make_biases(p).of_execute() if form == "biased" else {}
    tiles = tiles_of(
        1 if form == "shared" else case.batch,
        case.n_neurons,
        device,
        density=2.0 if form == "full" else 0.4,
        tile_rows=5 if form == "tiles" else 1,
    )
    blocks = " blocks=3" if form == "few_blocks" else ""
    check(p, tiles, design=f"{path}{blocks}", **biases)
    want = execute(p, p.x, tiles, design=f"{path} register{blocks}", **biases)
    for loads in ("bulk", "register portable"):
        if loads == "bulk" and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue  # refused, see test_design.py
        got = execute(p, p.x, tiles, design=f"{path} {loads}{blocks}", **biases)
        assert torch.equal(got, want)


@pairwise(case=CASES, density=[0.4, 1.0], dtype=DTYPES)
def test_is_exact_on_integers(case, density, dtype, device):
    """Rounding excuses no lost term: gates are so large that silu only passes or blocks."""
    p = case.make_exact(dtype, device)
    tiles = tiles_of(case.batch, case.n_neurons, device, density=density)
    mask = mask_of(tiles.tile, tiles.n_tiles, 1, case.n_neurons)
    xd, gate, up, down = (t.double() for t in (p.x, p.gate, p.up, p.down_t))
    a = torch.relu(xd @ gate.T) * (xd @ up.T) * mask
    want = a @ down
    assert (a.abs() @ down.abs() < 2**24).all()
    got = execute(p, p.x, tiles)
    assert torch.equal(got, want.float().to(dtype))


@pairwise(case=CASES, activation=["silu", "gelu_tanh"], is_shared=[False, True], dtype=DTYPES)
def test_is_exact_on_integers_with_biases(case, is_shared, activation, dtype, device):
    p = case.make_exact(dtype, device)
    biases = case.make_biases(p, exact=True)
    tiles = tiles_of(1 if is_shared else case.batch, case.n_neurons, device)
    mask = mask_of(tiles.tile, tiles.n_tiles, 1, case.n_neurons)
    xd, gate, up, down = (t.double() for t in (p.x, p.gate, p.up, p.down_t))
    a = torch.relu(xd @ gate.T + biases.gate) * (xd @ up.T + biases.up) * mask
    want = a @ down + biases.down
    assert (a.abs() @ down.abs() < 2**24).all()
    got = execute(p, p.x, tiles, activation=activation, **biases.of_execute())
    assert torch.equal(got, want.float().to(dtype))


@inside(dtype=DTYPES)
def test_biases_of_zero_change_nothing(dtype, device):
    case = CASES[5]
    p = made(case, dtype, device)
    tiles = tiles_of(16, case.n_neurons, device)
    zeros = {name: torch.zeros_like(t) for name, t in case.make_biases(p).of_execute().items()}
    got = execute(p, p.x, tiles, **zeros)
    assert torch.equal(got, execute(p, p.x, tiles))


def test_full_support_is_the_dense_layer(dtype, device):
    case = CASES[5]
    p = made(case, dtype, device)
    tiles = tiles_of(case.batch, case.n_neurons, device, density=2.0)
    xd = p.x.double()
    a = torch.nn.functional.silu(xd @ p.gate.double().T) * (xd @ p.up.double().T)
    mask = torch.ones(case.batch, case.n_neurons, dtype=torch.bool, device=device)
    got = execute(p, p.x, tiles)
    assert_within(got, a @ p.down_t.double(), execute_tolerance(p.gate, p.up, p.down_t, p.x, mask))


def test_is_linear_in_the_down_projection(device):
    """Powers of two and signs commute with every rounding, so this holds bit for bit."""
    case = CASES[2]
    p = made(case, torch.float32, device)
    tiles = tiles_of(3, case.n_neurons, device)
    out = execute(p, p.x, tiles)
    assert torch.equal(ops.execute(Weights(p.gate, p.up, -4 * p.down_t), tiles, p.x), -4 * out)
    assert torch.equal(ops.execute(Weights(p.gate, -0.5 * p.up, p.down_t), tiles, p.x), -0.5 * out)


def test_a_support_in_two_parts_adds_up(device):
    case = CASES[4]
    p = made(case, torch.float32, device)
    whole = tiles_of(1, case.n_neurons, device, density=0.5)
    chosen = whole.tile[0, : whole.n_tiles[0]]
    parts = []
    for part in (chosen[::2], chosen[1::2]):
        tile = torch.zeros_like(whole.tile)
        tile[0, : len(part)] = part
        count = torch.tensor([len(part)], dtype=torch.int32, device=device)
        parts.append(execute(p, p.x, ops.TileList(tile, count, 1)))
    got = execute(p, p.x, whole)
    mask = mask_of(whole.tile, whole.n_tiles, 1, case.n_neurons)
    tolerance = 3 * execute_tolerance(p.gate, p.up, p.down_t, p.x, mask)
    assert_within(parts[0] + parts[1], got.double(), tolerance)


@inside(dtype=DTYPES)
def test_permuting_the_batch_permutes_the_result(dtype, device):
    case = CASES[5]
    p = made(case, dtype, device)
    tiles = tiles_of(16, case.n_neurons, device)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).to(device)
    out = execute(p, p.x, tiles)
    permuted = execute(
        p,
        p.x[order].contiguous(),
        ops.TileList(tiles.tile[order].contiguous(), tiles.n_tiles[order].contiguous(), 1),
    )
    assert torch.equal(out[order], permuted)


@inside(dtype=DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype, device):
    case = CASES[5]
    p = made(case, dtype, device)
    tiles = tiles_of(16, case.n_neurons, device)
    out = execute(p, p.x, tiles)
    alone = execute(p, p.x[4:5], ops.TileList(tiles.tile[4:5], tiles.n_tiles[4:5], 1))
    assert torch.equal(out[4:5], alone)


@inside(dtype=DTYPES)
def test_empty_support_gives_zeros(dtype, device):
    p = made(CASES[2], dtype, device)
    tiles = tiles_of(3, 77, device, density=0.0)
    assert torch.equal(execute(p, p.x, tiles), torch.zeros_like(p.x))


@inside(lists=[1, 3], dtype=DTYPES)
def test_empty_support_gives_the_bias(lists, dtype, device):
    case = CASES[2]
    p = made(case, dtype, device)
    biases = case.make_biases(p)
    tiles = tiles_of(lists, 77, device, density=0.0)
    got = execute(p, p.x, tiles, **biases.of_execute())
    assert torch.equal(got, biases.down.expand(3, -1))


@inside(dtype=DTYPES)
def test_zero_activation_gives_zeros(dtype, device):
    p = made(CASES[2], dtype, device)
    tiles = tiles_of(3, 77, device)
    out = execute(p, torch.zeros_like(p.x), tiles)
    assert not out.any()


@inside(dtype=DTYPES)
def test_not_a_number_passes_through(dtype, device):
    p = made(CASES[2], dtype, device)
    tiles = tiles_of(3, 77, device)
    x = p.x.clone()
    x[1, 5] = float("nan")
    out = execute(p, x, tiles)
    assert out[1].isnan().all()
    assert torch.equal(out[0], execute(p, p.x, tiles)[0])


def test_two_hundred_runs_are_equal(dtype, device):
    case = CASES[4]
    p = made(case, dtype, device)
    tiles = tiles_of(1, case.n_neurons, device)
    first = execute(p, p.x, tiles)
    for _ in range(200):
        assert torch.equal(execute(p, p.x, tiles), first)


@inside(dtype=DTYPES)
def test_threads_change_nothing(dtype):
    case = CASES[5]
    p = made(case, dtype, "cpu")
    tiles = tiles_of(16, case.n_neurons, "cpu")
    shared = tiles_of(1, case.n_neurons, "cpu", tile_rows=16)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = execute(p, p.x, tiles)
        shared_one = execute(p, p.x, shared)
        for several in (2, 3):
            torch.set_num_threads(several)
            assert torch.equal(execute(p, p.x, tiles), one)
            assert torch.equal(execute(p, p.x, shared), shared_one)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize(
    ("tile", "n_tiles", "message"),
    [
        ([0, 7], 2, r"tile\[0, 1\] = 7: want ascending and distinct, 0 to 6"),
        ([-1, 3], 2, r"tile\[0, 0\] = -1: want"),
        ([2, 2], 2, r"tile\[0, 1\] = 2: want"),
        ([0, 1], 8, r"8 entries of tile in row 0: want 0 to 7"),
        ([0, 1], -1, r"-1 entries of tile in row 0: want 0 to 7"),
    ],
)
def test_refuses_tiles_out_of_range(tile, n_tiles, message):
    p = made(CASES[1], torch.float32, "cpu")
    tiles = torch.zeros(3, 7, dtype=torch.int32)
    tiles[0, :2] = torch.tensor(tile)
    counts = torch.tensor([n_tiles, 0, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[execute\] " + message):
        execute(p, p.x, ops.TileList(tiles, counts, 1))


@pytest.mark.parametrize("lists", [2, 4])
def test_refuses_lists_that_are_neither_one_nor_one_a_row(lists):
    p = made(CASES[1], torch.float32, "cpu")
    tiles = tiles_of(lists, 7, "cpu")
    with pytest.raises(
        ValueError, match=rf"\[execute\] tile has {lists} rows: want 1, or batch = 3"
    ):
        execute(p, p.x, tiles)
