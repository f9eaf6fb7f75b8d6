import pytest
import torch

from csfast import ops, reference
from csfast.cases import CASES
from numeric import assert_same_support, made, mask_of, middle_threshold, usage_tolerance

INF, NAN = float("inf"), float("nan")


def select(p, threshold, x=None, tile_rows=1):
    return ops.select(
        p.codes,
        p.equal,
        p.row_scale,
        threshold,
        p.x if x is None else x,
        bits=p.bits,
        tile_rows=tile_rows,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, bits, device):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    got, _ = select(p, threshold)
    y, scale = reference.sense(p.codes, p.equal, p.x, bits=bits)
    usage = reference.usage(y, scale, p.row_scale)
    distance = (usage - threshold.double()[:, None]).abs()
    assert_same_support(
        mask_of(got.tile, got.n_tiles, 1, case.n_neurons),
        reference.keep_threshold(usage, threshold, scale),
        distance,
        usage_tolerance(y, scale, p.row_scale),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("tile_rows", [1, 3, 16])
def test_equals_the_three_operations(case, tile_rows, dtype, bits, device):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    got, missed = select(p, threshold, tile_rows=tile_rows)
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=bits)
    support = ops.recover(y, scale, p.row_scale, threshold=threshold)
    want = ops.tile(support.index, support.count, tile_rows=tile_rows)
    assert torch.equal(got.n_tiles, want.n_tiles)
    assert torch.equal(got.tile, want.tile)
    assert torch.equal(missed, support.missed)


@pytest.mark.parametrize(("threshold", "kept"), [(NAN, 77), (-1.0, 77), (0.0, 77), (INF, 0)])
def test_extreme_thresholds(threshold, kept, device):
    p = made(CASES[2], torch.bfloat16, device)
    got, _ = select(p, torch.full((3,), threshold, device=device))
    assert got.n_tiles.tolist() == [kept] * 3


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_activation_that_is_not_finite_keeps_everything(value, dtype, device):
    p = made(CASES[2], dtype, device)
    x = p.x.clone()
    x[1, 8] = value
    got, missed = select(p, torch.full((3,), INF, device=device), x)
    assert got.n_tiles.tolist() == [0, 77, 0]
    assert missed[1] == 0


def test_zero_activation_keeps_nothing(dtype, device):
    p = made(CASES[2], dtype, device)
    got, missed = select(p, torch.full((3,), 0.1, device=device), torch.zeros_like(p.x))
    assert got.n_tiles.tolist() == [0] * 3
    assert not missed.any()


def test_a_row_does_not_depend_on_its_batch(dtype, device):
    p = made(CASES[5], dtype, device)
    threshold = middle_threshold(p)
    got, missed = select(p, threshold)
    for row in (0, 9, 15):
        alone, missed_alone = select(p, threshold[row : row + 1], p.x[row : row + 1])
        assert torch.equal(got.tile[row : row + 1], alone.tile)
        assert torch.equal(missed[row : row + 1], missed_alone)


def test_two_hundred_runs_are_equal(device):
    p = made(CASES[4], torch.bfloat16, device)
    threshold = middle_threshold(p)
    first, missed = select(p, threshold)
    for _ in range(200):
        again, missed_again = select(p, threshold)
        assert torch.equal(again.tile, first.tile)
        assert torch.equal(missed_again, missed)


def test_threads_change_nothing():
    p = made(CASES[5], torch.bfloat16, "cpu")
    threshold = middle_threshold(p)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, missed_one = select(p, threshold)
        torch.set_num_threads(2)
        two, missed_two = select(p, threshold)
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(one.tile, two.tile)
    assert torch.equal(missed_one, missed_two)


@pytest.mark.parametrize("bits", [0, 5, "trits"])
def test_refuses_bits_out_of_range(bits):
    p = made(CASES[2], torch.float32, "cpu")
    codes = torch.zeros(77, 2, 2, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"\[select\] bits = {bits!r}: want 1 to 4 or \"tern"):
        ops.select(codes, p.equal, p.row_scale, torch.zeros(3), p.x, bits=bits)
