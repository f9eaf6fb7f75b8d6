import shutil

import pytest
import torch

from csfast import ops, reference
from csfast.cases import CASES
from numeric import assert_within, execute_tolerance, made, mask_of, middle_threshold, split_tiles


def layer(p, threshold):
    return (p.codes, p.equal, p.row_scale, threshold, p.gate, p.up, p.down_t)


def run(p, threshold, **more):
    return ops.ffn(*layer(p, threshold), p.x, bits=p.bits, **more)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("tile_rows", [1, 3])
def test_equals_select_and_execute(case, tile_rows, dtype, bits, device):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    tiles, _ = ops.select(
        p.codes, p.equal, p.row_scale, threshold, p.x, bits=bits, tile_rows=tile_rows
    )
    want = ops.execute(p.gate, p.up, p.down_t, p.x, tiles)
    assert torch.equal(run(p, threshold, tile_rows=tile_rows), want)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference_on_its_own_support(case, dtype, device):
    p = made(case, dtype, device)
    threshold = middle_threshold(p)
    tiles, _ = ops.select(p.codes, p.equal, p.row_scale, threshold, p.x, bits=2)
    want = reference.execute(
        p.gate, p.up, p.down_t, p.x, split_tiles(tiles.tile, tiles.n_tiles), tile_rows=1
    )
    mask = mask_of(tiles.tile, tiles.n_tiles, 1, case.n_neurons)
    assert_within(run(p, threshold), want, execute_tolerance(p.gate, p.up, p.down_t, p.x, mask))


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
    got = ops.ffn(p.codes, equal, p.row_scale, threshold, gate, up, p.down_t, x, bits=2)
    assert torch.equal(got, run(p, threshold))


@pytest.mark.parametrize("tile_rows", [1, 4])
def test_counts_what_it_executes(tile_rows, device):
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    stats = torch.tensor([100, 1000], dtype=torch.int64, device=device)
    run(p, threshold, tile_rows=tile_rows, stats=stats)
    tiles, _ = ops.select(
        p.codes, p.equal, p.row_scale, threshold, p.x, bits=2, tile_rows=tile_rows
    )
    n = int(mask_of(tiles.tile, tiles.n_tiles, tile_rows, 77).sum())
    assert stats.tolist() == [103, 1000 + n]


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
        got = ops.ffn(p.codes, p.equal, p.row_scale, threshold, gate, p.up, p.down_t, p.x, bits=2)
    assert torch.equal(got, run(p, threshold))
    got = ops.ffn(p.codes, p.equal, p.row_scale, threshold, gate, p.up, p.down_t, p.x, bits=2)
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
    args = (*layer(p, threshold), p.x, 2, 1)
    torch.library.opcheck(torch.ops.csfast.ffn.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.csfast.ffn.counted, (*args, stats), test_utils=checks)
    tiles, _ = ops.select(p.codes, p.equal, p.row_scale, threshold, p.x, bits=2)
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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("counted", [False, True])
def test_compiles_in_one_graph(backend, counted, device):
    if backend == "inductor" and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    stats = torch.zeros(2, dtype=torch.int64, device=device) if counted else None

    def block(x):
        return x + ops.ffn(*layer(p, threshold), x * 2, bits=2, stats=stats)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert torch.equal(compiled(p.x), block(p.x))
    if counted:  # once compiled, once not
        assert stats[0] == 6
        assert stats[1] > 0
        assert stats[1] % 2 == 0
