import dataclasses

import pytest
import torch

from axes import DTYPES, inside, name_of, on_gpu, pairwise
from csfast import ops, reference
from csfast.bench.cases import CASES, Case
from csfast.codes import planes
from numeric import (
    UNIT,
    assert_same_support,
    assert_within,
    layer_of,
    made,
    mask_of,
    middle_threshold,
    missed_tolerance,
    usage_of,
)

INF, NAN = float("inf"), float("nan")


# Biased, joint, and what the gate goes through.
FORMS = {
    "plain": (False, False, "silu"),
    "joint": (False, True, "silu"),
    "biased": (True, False, "gelu_tanh"),
    "biased_joint": (True, True, "gelu_tanh"),
}


def select(p, threshold, x=None, *, design="", **parts):
    of, x = layer_of(p, threshold, **parts), p.x if x is None else x
    return ops.select(of.sensor, of.decision, x, activation=of.activation, design=design)


def options_of(p, case, form):
    """The options of `select` for one of the forms, and those of `usage_of`."""
    is_biased, is_joint, activation = FORMS[form]
    biases = case.make_biases(p) if is_biased else None
    votes = torch.tensor([1.0, 0.0, 0.5] * 6)[: case.batch].to(p.x.device) if is_joint else None
    told = {"biases": biases, "activation": activation, "votes": votes}
    offset = biases.offset if is_biased else None
    return {"offset": offset, "activation": activation, "votes": votes}, told


@pairwise(case=CASES, form=FORMS, tile_rows=[1, 8])
def test_every_form_matches_reference(case, form, tile_rows, device):
    p = made(case, torch.bfloat16, device)
    options, told = options_of(p, case, form)
    threshold = middle_threshold(p, tile_rows=tile_rows, **told)
    got, _ = select(p, threshold, tile_rows=tile_rows, **options)
    usage, margin, scale = usage_of(p, tile_rows=tile_rows, **told)
    assert_same_support(
        mask_of(got.tile, got.n_tiles, 1, usage.shape[1]),
        reference.keep_threshold(usage, threshold, scale, options["votes"]),
        (usage - threshold.double()[:, None]).abs(),
        margin,
    )


@pairwise(case=CASES, dtype=DTYPES, bits=planes.CODES)
def test_matches_reference(case, dtype, bits, device):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    got, _ = select(p, threshold)
    usage, margin, scale = usage_of(p)
    assert_same_support(
        mask_of(got.tile, got.n_tiles, 1, case.n_neurons),
        reference.keep_threshold(usage, threshold, scale),
        (usage - threshold.double()[:, None]).abs(),
        margin,
    )


@pairwise(case=CASES, tile_rows=[1, 3, 16], dtype=DTYPES, bits=planes.CODES)
def test_equals_sense_and_recover(case, tile_rows, dtype, bits, device):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p, tile_rows=tile_rows)
    got, missed = select(p, threshold, tile_rows=tile_rows)
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=bits)
    want = ops.recover(y, scale, p.row_scale, threshold=threshold, tile_rows=tile_rows)
    assert torch.equal(got.n_tiles, want.count)
    assert torch.equal(got.tile, want.index)
    assert_within(missed, want.missed.double(), missed_tolerance(want.missed, want.usage))


@inside(form=FORMS)
@pytest.mark.parametrize(
    ("case", "tile_rows"),
    [(CASES[5], rows) for rows in (1, 2, 4, 8, 16, 32, 64, 65, 100, 128, 2000)]
    + [(case, rows) for case in CASES[:4] for rows in (1, 16, 100)],
    ids=name_of,
)
def test_equals_sense_and_recover_in_every_form(case, form, tile_rows, device):
    p = made(case, torch.bfloat16, device)
    options, told = options_of(p, case, form)
    threshold = middle_threshold(p, tile_rows=tile_rows, **told)
    got, missed = select(p, threshold, tile_rows=tile_rows, **options)
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=2)
    want = ops.recover(y, scale, p.row_scale, threshold=threshold, tile_rows=tile_rows, **options)
    assert torch.equal(got.n_tiles, want.count)
    assert torch.equal(got.tile, want.index)
    assert_within(missed, want.missed.double(), missed_tolerance(want.missed, want.usage))


def test_tiles_of_one_hold_the_neurons_of_the_support(device):
    """As `tile` would list them."""
    p = made(CASES[5], torch.bfloat16, device)
    threshold = middle_threshold(p)
    got, _ = select(p, threshold)
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=2)
    support = ops.recover(y, scale, p.row_scale, threshold=threshold)
    want = ops.tile(support.index, support.count)
    assert torch.equal(got.tile, want.tile) and torch.equal(got.n_tiles, want.n_tiles)


@inside(tile_rows=[1, 16], value=[NAN, INF, -INF])
def test_a_joint_decision_counts_only_rows_that_vote(tile_rows, value, device):
    """Row 1 is not finite: without a vote it is not heard, with one it keeps everything."""
    case = CASES[2]
    p = made(case, torch.bfloat16, device)
    x = p.x.clone()
    x[1, 8] = value
    votes = torch.tensor([1.0, 0.0, 1.0], device=device)
    threshold = middle_threshold(p, tile_rows=tile_rows, votes=votes)
    got, missed = select(p, threshold, x, tile_rows=tile_rows, votes=votes)
    want, want_missed = select(p, threshold, tile_rows=tile_rows, votes=votes)
    assert torch.equal(got.tile, want.tile) and torch.equal(missed, want_missed)
    assert 0 < int(got.n_tiles) < got.tile.shape[1]
    votes[1] = 1e-30
    got, missed = select(p, threshold, x, tile_rows=tile_rows, votes=votes)
    assert got.n_tiles.tolist() == [got.tile.shape[1]]
    assert missed.tolist() == [0.0]


@inside(batch=[0, 3], tile_rows=[1, 16])
def test_nothing_is_selected_if_no_row_votes(batch, tile_rows, device):
    p = made(CASES[2], torch.bfloat16, device)
    votes = torch.zeros(batch, device=device)
    threshold = torch.full((1,), NAN, device=device)
    got, missed = select(p, threshold, p.x[:batch], tile_rows=tile_rows, votes=votes)
    assert got.n_tiles.tolist() == [0]
    assert missed.tolist() == [0.0]


@pytest.mark.parametrize(("threshold", "kept"), [(NAN, 77), (-1.0, 77), (0.0, 77), (INF, 0)])
def test_extreme_thresholds(threshold, kept, device):
    p = made(CASES[2], torch.bfloat16, device)
    got, _ = select(p, torch.full((3,), threshold, device=device))
    assert got.n_tiles.tolist() == [kept] * 3


@inside(value=[NAN, INF, -INF], dtype=DTYPES)
def test_activation_that_is_not_finite_keeps_everything(value, dtype, device):
    p = made(CASES[2], dtype, device)
    x = p.x.clone()
    x[1, 8] = value
    got, missed = select(p, torch.full((3,), INF, device=device), x)
    assert got.n_tiles.tolist() == [0, 77, 0]
    assert missed[1] == 0


@inside(dtype=DTYPES)
def test_zero_activation_keeps_nothing(dtype, device):
    p = made(CASES[2], dtype, device)
    got, missed = select(p, torch.full((3,), 0.1, device=device), torch.zeros_like(p.x))
    assert got.n_tiles.tolist() == [0] * 3
    assert not missed.any()


@inside(dtype=DTYPES)
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


@pytest.mark.parametrize("is_joint", [False, True], ids=["own", "joint"])
def test_threads_change_nothing_for_groups(is_joint):
    p = made(CASES[5], torch.bfloat16, "cpu")
    votes = torch.linspace(0, 1, 16) if is_joint else None
    threshold = middle_threshold(p, tile_rows=3, votes=votes)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, missed_one = select(p, threshold, tile_rows=3, votes=votes)
        torch.set_num_threads(2)
        two, missed_two = select(p, threshold, tile_rows=3, votes=votes)
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(one.tile, two.tile)
    assert torch.equal(missed_one, missed_two)


@on_gpu
@inside(form=FORMS, tile_rows=[1, 5])
@pytest.mark.parametrize(
    "case", [*CASES[2:], Case("wide", 1, 4104, 50), Case("wider", 2, 8256, 20)], ids=name_of
)
def test_every_design_selects_alike(case, form, tile_rows, device):
    p = made(case, torch.bfloat16, device)
    options, told = options_of(p, case, form)
    threshold = middle_threshold(p, tile_rows=tile_rows, **told)
    options["tile_rows"] = tile_rows
    want, missed = select(p, threshold, **options)
    for design in ("portable", "general", "blocks=3", "blocks=70"):
        got, missed_so = select(p, threshold, design=design, **options)
        assert torch.equal(got.n_tiles, want.n_tiles) and torch.equal(got.tile, want.tile), design
        allowed = 2.5 * case.n_neurons * UNIT * missed.double() + 2.0**-120
        assert_within(missed_so, missed.double(), allowed)


@on_gpu
@inside(dtype=DTYPES, bits=planes.CODES)
@pytest.mark.parametrize("d", [384, 8192, 8256])
def test_one_pass_selects_as_several_for_every_code_and_dtype(d, dtype, bits, device):
    p = made(Case("one_row", 1, d, 24), dtype, device, bits=bits)
    threshold = middle_threshold(p)
    for x in (p.x, torch.zeros_like(p.x), p.x * NAN, p.x * 1e-38):
        want, missed = select(p, threshold, x)
        got, missed_so = select(p, threshold, x, design="general")
        assert torch.equal(got.n_tiles, want.n_tiles) and torch.equal(got.tile, want.tile)
        allowed = 2.5 * 24 * UNIT * missed.double() + 2.0**-120
        assert_within(missed_so, missed.double(), allowed)


@pairwise(case=[*CASES, Case("aligned", 17, 64, 90)], tile_rows=[1, 5], form=FORMS)
def test_a_cap_keeps_the_largest(case, form, tile_rows, device):
    """As top-k would, where the threshold keeps more than that."""
    p = made(case, torch.bfloat16, device)
    options, told = options_of(p, case, form)
    threshold = middle_threshold(p, tile_rows=tile_rows, **told)
    free, _ = select(p, threshold, tile_rows=tile_rows, **options)
    caps = torch.tensor([3, 0, 10**6, -5, 1, 17], dtype=torch.int32).repeat(4).to(device)
    for shift in range(6):
        cap = caps[shift:][: len(free.n_tiles)].contiguous()
        got, missed = select(p, threshold, tile_rows=tile_rows, cap=cap, **options)
        budget = torch.minimum(free.n_tiles, cap.clamp(min=0))
        y, scale = ops.sense(p.codes, p.equal, p.x, bits=2)
        want = ops.recover(y, scale, p.row_scale, budget=budget, tile_rows=tile_rows, **options)
        assert torch.equal(got.n_tiles, budget) and torch.equal(got.tile, want.index)
        assert torch.equal(got.dropped, free.n_tiles - budget)
        assert_within(missed, want.missed.double(), missed_tolerance(want.missed, want.usage))
        usage, margin, scale = usage_of(p, tile_rows=tile_rows, **told)
        # A list ends at its threshold, or at the usage that the cap ends with, if that is larger.
        last = usage.sort(dim=1, descending=True).values
        last = last.gather(1, (cap.long() - 1).clamp(0, usage.shape[1] - 1)[:, None])
        end = torch.where(cap[:, None] > usage.shape[1], 0.0, last).maximum(threshold[:, None])
        assert_same_support(
            mask_of(got.tile, got.n_tiles, 1, usage.shape[1]),
            reference.keep_threshold(usage, threshold, scale, options["votes"], cap),
            torch.where(cap[:, None] > 0, (usage - end).abs(), INF),
            2 * margin.amax(dim=1, keepdim=True),
        )


def test_a_cap_breaks_ties_by_index_and_yields_to_what_is_not_finite(device):
    p = made(CASES[2], torch.bfloat16, device)
    x = p.x.clone()
    x[0] = 0.0  # all usages are 0, and kept
    x[1, 8] = NAN
    cap = torch.tensor([5, 0, 0], dtype=torch.int32, device=device)
    got, _ = select(p, torch.zeros(3, device=device), x, cap=cap)
    assert got.n_tiles.tolist() == [5, 77, 0]
    assert got.tile[0].tolist() == [0, 1, 2, 3, 4] + [0] * 72
    assert got.dropped.tolist() == [72, 0, 77]


def test_refuses_a_cap_of_another_type_or_shape():
    p = made(CASES[2], torch.float32, "cpu")
    with pytest.raises(TypeError, match=r"\[select\] cap is int64: want int32"):
        select(p, torch.zeros(3), cap=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[select\] cap"):
        select(p, torch.zeros(3), cap=torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("bits", [0, 5, "trits"])
def test_refuses_bits_out_of_range(bits):
    p = made(CASES[2], torch.float32, "cpu")
    codes = torch.zeros(77, 2, 2, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"\[select\] bits = {bits!r}: want 1 to 4 or \"tern"):
        select(dataclasses.replace(p, codes=codes, bits=bits), torch.zeros(3))
