import numpy as np
import pytest
import torch

from axes import inside, name_of, pairwise
from csfast import ops, reference
from csfast.bench.cases import CASES
from numeric import (
    assert_same_support,
    assert_within,
    group_tolerance,
    joint_tolerance,
    made,
    middle_threshold,
    usage_tolerance,
)

INF, NAN = float("inf"), float("nan")


def measured(case, device, bits=2):
    p = made(case, torch.bfloat16, device, bits=bits)
    return p, *reference.sense(p.codes, p.equal, p.x, bits=bits)


def mask_of(support):
    mask = torch.zeros_like(support.usage, dtype=torch.bool)
    for row, count in enumerate(support.count.tolist()):
        chosen = support.index[row, :count].long()
        assert (chosen.diff() > 0).all()
        mask[row, chosen] = True
    return mask


def filled(batch, value, device, dtype=torch.float32):
    return torch.full((batch,), value, device=device, dtype=dtype)


def given(usage, device):
    """Measurements whose usage is exactly `usage`: g = 64, so that silu(g) = g in float32."""
    n = len(usage)
    y = torch.stack([torch.full((n,), 64), torch.ones(n)], dim=1).to(torch.int32)[None]
    row_scale = torch.stack([torch.ones(n), torch.tensor(usage) / 64], dim=1)
    return y.to(device), torch.ones(1, device=device), row_scale.to(device)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, bits, device):
    p, y, scale = measured(case, device, bits)
    threshold = middle_threshold(p)
    got = ops.recover(y, scale, p.row_scale, threshold=threshold)
    usage = reference.usage(y, scale, p.row_scale)
    margin = usage_tolerance(y, scale, p.row_scale)
    assert_within(got.usage, usage, margin)
    keep = reference.keep_threshold(usage, threshold, scale)
    distance = (usage - threshold.double()[:, None]).abs()
    assert_same_support(mask_of(got), keep, distance, margin)
    missed = reference.missed(usage, mask_of(got))
    n = case.n_neurons
    slack = 2 * (usage * margin).sum(dim=1) + n * 2.0**-23 * missed + 2.0**-120
    assert_within(got.missed, missed, slack)


def test_usage_is_right_for_gates_of_every_size(device):
    """g from -120 to 120 and around the ends of exp: the bound of `usage_tolerance` holds."""
    n = 100_001
    y = torch.empty(1, n, 2, dtype=torch.int32)
    y[0, :, 0] = torch.arange(n) - n // 2
    y[0, :, 1] = 7
    row_scale = torch.tensor([120 / (n // 2), 0.3]).repeat(n, 1)
    y, row_scale, scale = y.to(device), row_scale.to(device), torch.ones(1, device=device)
    got = ops.recover(y, scale, row_scale, threshold=filled(1, 0.0, device))
    assert_within(
        got.usage, reference.usage(y, scale, row_scale), usage_tolerance(y, scale, row_scale)
    )


# What measurements may be: columns, whether of float32, whether there is an offset, activation.
FORMS = {
    "gelu_tanh": (2, False, False, "gelu_tanh"),
    "biased": (2, False, True, "silu"),
    "floats": (2, True, True, "gelu_tanh"),
    "one_column": (1, False, False, "silu"),
    "one_column_of_floats": (1, True, True, "silu"),
}
WEIGHT = [0.5, 0.0, 2.0, 1.0, 0.25, 0.0, 1.0, 3.0]


def weight_of(batch, device):
    return torch.tensor(WEIGHT * 2)[:batch].to(device)


def measured_as(case, form, device):
    """y, scale, row_scale and the options of `recover` for one of the forms."""
    columns, is_float, has_offset, activation = FORMS[form]
    p, y, scale = measured(case, device)
    y = y[..., :columns].contiguous()
    y = y * 0.37 if is_float else y
    row_scale = p.row_scale[:, :columns].contiguous()
    offset = case.make_biases(p).offset[:, :columns].contiguous() if has_offset else None
    return (y, scale, row_scale), {"offset": offset, "activation": activation}


def between(usage, quantile=0.6):
    """Midway between two usages of each row, ``(lists,)``."""
    ranked = usage.sort(dim=1).values
    at = int(quantile * (usage.shape[1] - 1))
    return ranked[:, at : at + 2].mean(dim=1).float()


@pairwise(case=CASES, form=FORMS, tile_rows=[1, 7, 100], is_joint=[False, True])
def test_every_form_matches_reference(case, form, tile_rows, is_joint, device):
    given, options = measured_as(case, form, device)
    votes = weight_of(case.batch, device) if is_joint else None
    extra = (options["offset"], options["activation"])
    neurons = reference.usage(*given, *extra)
    margin = group_tolerance(neurons, usage_tolerance(*given, *extra), tile_rows)
    usage = reference.group(neurons, tile_rows)
    if is_joint:
        margin = joint_tolerance(usage, margin, votes)
        usage = reference.joint(usage, votes)
    threshold = between(usage)
    got = ops.recover(*given, threshold=threshold, votes=votes, tile_rows=tile_rows, **options)
    assert got.tile_rows == tile_rows
    assert_within(got.usage, usage, margin)
    keep = reference.keep_threshold(usage, threshold, given[1], votes)
    distance = (usage - threshold.double()[:, None]).abs()
    assert_same_support(mask_of(got), keep, distance, margin)
    missed = reference.missed(usage, mask_of(got))
    slack = 2 * (usage * margin).sum(dim=1) + usage.shape[1] * 2.0**-23 * missed + 2.0**-120
    assert_within(got.missed, missed, slack)


@inside(activation=["silu", "gelu_tanh"], shift=[0.0, 0.3])
def test_biased_usage_is_right_for_gates_of_every_size(activation, shift, device):
    n = 100_001
    y = torch.empty(1, n, 2, dtype=torch.int32)
    y[0, :, 0] = torch.arange(n) - n // 2
    y[0, :, 1] = 7
    row_scale = torch.tensor([120 / (n // 2), 0.3]).repeat(n, 1)
    offset = torch.tensor([shift, -2 * shift]).repeat(n, 1).to(device) if shift else None
    given = y.to(device), torch.ones(1, device=device), row_scale.to(device)
    got = ops.recover(
        *given, threshold=filled(1, 0.0, device), offset=offset, activation=activation
    )
    want = reference.usage(*given, offset, activation)
    assert_within(got.usage, want, usage_tolerance(*given, offset, activation))


def test_gelu_tanh_is_that_of_torch(device):
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    want = torch.nn.functional.gelu(z, approximate="tanh")
    got = reference.activate(z, "gelu_tanh")
    assert_within(got, want, z.abs() * 2.0**-51 + 2.0**-1000)
    # And the tanh of the float32 kernels: usage of an up of 1.
    y = torch.stack([z, torch.ones_like(z)], dim=1).float()[None].to(device)
    ones = torch.ones(len(z), 2, device=device)
    scale = filled(1, 1.0, device)
    kernel = ops.recover(
        y, scale, ones, threshold=filled(1, 0.0, device), activation="gelu_tanh"
    ).usage
    tolerance = usage_tolerance(y, scale, ones, None, "gelu_tanh")
    exact = torch.nn.functional.gelu(y[..., 0].double(), approximate="tanh").abs()
    assert_within(kernel, exact, tolerance + z.abs().to(device) * 2.0**-51)


@inside(tile_rows=[2, 4, 7, 16, 64, 65, 128, 5000])
def test_groups_add_squares_in_order(tile_rows, device):
    """Bit for bit: every square, sum and root is rounded, one neuron after the other."""
    p, y, scale = measured(CASES[5], device)
    threshold = filled(16, 0.1, device)
    neurons = ops.recover(y, scale, p.row_scale, threshold=threshold).usage.cpu().numpy()
    want = []
    for first in range(0, neurons.shape[1], tile_rows):
        total = np.zeros(16, dtype=np.float32)
        for column in neurons[:, first : first + tile_rows].T:
            total = total + column * column
        want.append(np.sqrt(total))  # torch's root may be off by an ulp
    got = ops.recover(y, scale, p.row_scale, threshold=threshold, tile_rows=tile_rows)
    assert np.array_equal(got.usage.cpu().numpy(), np.stack(want, axis=1))
    assert torch.equal(mask_of(got), got.usage >= 0.1)


@inside(tile_rows=[1, 3])
def test_the_batch_adds_up_in_order(tile_rows, device):
    p, y, scale = measured(CASES[5], device)
    votes = weight_of(16, device)
    own = ops.recover(y, scale, p.row_scale, threshold=filled(16, 0.1, device), tile_rows=tile_rows)
    want = torch.zeros_like(own.usage[0])
    for row, value in zip(own.usage, votes, strict=True):
        if value != 0:
            want = want + value * row
    got = ops.recover(
        y,
        scale,
        p.row_scale,
        threshold=filled(1, 1.0, device),
        votes=votes,
        tile_rows=tile_rows,
    )
    assert torch.equal(got.usage[0], want)
    assert torch.equal(mask_of(got)[0], want >= 1.0)


def test_a_group_of_one_and_a_batch_of_one_change_nothing(device):
    p, y, scale = measured(CASES[4], device)
    threshold = middle_threshold(p)
    own = ops.recover(y, scale, p.row_scale, threshold=threshold)
    votes = filled(1, 1.0, device)
    joint = ops.recover(y, scale, p.row_scale, threshold=threshold, votes=votes, tile_rows=1)
    for name in ("usage", "index", "count", "missed"):
        assert torch.equal(getattr(own, name), getattr(joint, name)), name


def test_groups_of_exact_usages(device):
    """3 and 4 make 5, and the last group is a short one."""
    given_ = given([3.0, 4.0, 0.0, 1.0, 2.0], device)
    got = ops.recover(*given_, threshold=filled(1, 2.0, device), tile_rows=2)
    assert got.usage.tolist() == [[5.0, 1.0, 2.0]]
    assert got.index[0, : got.count[0]].tolist() == [0, 2]
    assert got.missed.item() == 1.0
    top = ops.recover(*given_, budget=filled(1, 1, device, torch.int32), tile_rows=2)
    assert top.index[0, : top.count[0]].tolist() == [0]
    assert top.missed.item() == 5.0


@inside(tile_rows=[5, 6, 2**31 - 1])
def test_a_group_of_all(tile_rows, device):
    got = ops.recover(
        *given([1.0, 1.0, 1.0, 1.0, 0.0], device),
        threshold=filled(1, 2.5, device),
        tile_rows=tile_rows,
    )
    assert got.usage.tolist() == [[2.0]]
    assert got.count.tolist() == [0]


@inside(value=[NAN, INF])
def test_a_group_with_a_usage_that_is_not_finite_is_kept(value, device):
    got = ops.recover(
        *given([1.0, 2.0, 1.0, value, 1.0, 1.0], device),
        threshold=filled(1, 9.0, device),
        tile_rows=2,
    )
    assert got.index[0, : got.count[0]].tolist() == [1]


def rows_of(usages, device):
    """Measurements of a batch whose usages are exactly these."""
    y = torch.tensor(usages)[..., None]
    n = y.shape[1]
    return y.to(device), torch.ones(len(y), device=device), torch.ones(n, 1, device=device)


def test_a_joint_decision_on_exact_usages(device):
    y, scale, row_scale = rows_of([[1.0, 4.0, 0.0], [8.0, 8.0, 8.0], [2.0, 0.0, 1.0]], device)
    votes = torch.tensor([1.0, 0.0, 2.0], device=device)
    got = ops.recover(y, scale, row_scale, threshold=filled(1, 4.0, device), votes=votes)
    assert got.usage.tolist() == [[5.0, 4.0, 2.0]]
    assert got.index[0, : got.count[0]].tolist() == [0, 1]
    assert got.missed.tolist() == [4.0]
    budget = filled(1, 1, device, torch.int32)
    top = ops.recover(y, scale, row_scale, budget=budget, votes=votes)
    assert top.index[0, : top.count[0]].tolist() == [0]
    assert top.missed.tolist() == [20.0]


@inside(noise=[NAN, INF, 1e30], rule=["threshold", "budget"])
def test_a_row_without_weight_has_no_vote(noise, rule, device):
    y, scale, row_scale = rows_of([[1.0, 4.0, 0.0], [0.0, 0.0, 9.0], [2.0, 0.0, 1.0]], device)
    limit = (
        {"threshold": filled(1, 3.0, device)}
        if rule == "threshold"
        else {"budget": filled(1, 2, device, torch.int32)}
    )
    votes = torch.tensor([1.0, -0.0, 1.0], device=device)
    y[1, 1] = noise
    scale[1] = noise
    got = ops.recover(y, scale, row_scale, votes=votes, **limit)
    assert got.index[0, : got.count[0]].tolist() == [0, 1]
    assert got.usage.tolist() == [[3.0, 4.0, 1.0]]


@inside(value=[NAN, INF, -INF], rule=["threshold", "budget"])
def test_a_voting_row_that_is_not_finite_keeps_everything(value, rule, device):
    y, scale, row_scale = rows_of([[1.0, 4.0, 0.0], [2.0, 0.0, 1.0]], device)
    limit = (
        {"threshold": filled(1, INF, device)}
        if rule == "threshold"
        else {"budget": filled(1, 0, device, torch.int32)}
    )
    scale[1] = value
    got = ops.recover(y, scale, row_scale, votes=torch.ones(2, device=device), **limit)
    assert got.index.tolist() == [[0, 1, 2]]
    assert got.count.tolist() == [3] and got.missed.tolist() == [0.0]


@inside(place=["measurement", "votes", "offset"])
def test_not_a_number_in_a_joint_decision_keeps(place, device):
    y, scale, row_scale = rows_of([[1.0, 4.0, 0.0], [2.0, 0.0, 1.0]], device)
    votes, offset = torch.ones(2, device=device), torch.zeros(3, 1, device=device)
    want = [2]
    if place == "measurement":
        y[1, 2] = NAN
    elif place == "offset":
        offset[2] = NAN
    else:
        votes[0] = NAN
        want = [0, 1, 2]
    limit = filled(1, 9.0, device)
    got = ops.recover(y, scale, row_scale, threshold=limit, votes=votes, offset=offset)
    assert got.index[0, : got.count[0]].tolist() == want


@inside(limit=[NAN, -1.0, 0.0, "budget"], batch=[0, 3])
def test_nothing_is_kept_if_no_row_votes(limit, batch, device):
    y, scale, row_scale = rows_of([[1.0, NAN, 0.0]] * 3, device)
    scale[0] = NAN
    limits = (
        {"budget": filled(1, 3, device, torch.int32)}
        if limit == "budget"
        else {"threshold": filled(1, limit, device)}
    )
    votes = torch.zeros(batch, device=device)
    got = ops.recover(y[:batch], scale[:batch], row_scale, votes=votes, **limits)
    assert got.count.tolist() == [0] and got.missed.tolist() == [0.0]
    assert got.usage.tolist() == [[0.0] * 3]


@inside(value=[0.0, -0.0])
def test_a_measurement_that_is_not_a_number_keeps(value, device):
    y, scale, row_scale = rows_of([[value, NAN, 1.0]], device)
    got = ops.recover(y, scale, row_scale, threshold=filled(1, 5.0, device))
    assert got.index[0, : got.count[0]].tolist() == [1]
    assert got.usage[0, 0] == 0


def test_floats_that_are_integers_give_what_the_integers_give(device):
    p, y, scale = measured(CASES[5], device)
    threshold = middle_threshold(p)
    one = ops.recover(y, scale, p.row_scale, threshold=threshold)
    other = ops.recover(y.float(), scale, p.row_scale, threshold=threshold)
    for name in ("usage", "index", "count", "missed"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_an_offset_of_zero_changes_nothing(device):
    p, y, scale = measured(CASES[5], device)
    threshold = middle_threshold(p)
    none = ops.recover(y, scale, p.row_scale, threshold=threshold)
    offset = torch.zeros_like(p.row_scale)
    zero = ops.recover(y, scale, p.row_scale, threshold=threshold, offset=offset)
    assert torch.equal(none.usage, zero.usage)
    assert torch.equal(none.index, zero.index)


@inside(fraction=[0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_top_keeps_the_largest(case, fraction, device):
    p, y, scale = measured(case, device)
    budget = filled(case.batch, int(fraction * case.n_neurons), device, torch.int32)
    got = ops.recover(y, scale, p.row_scale, budget=budget)
    # Ranked by the float32 usage itself, so that the order is exact.
    keep = reference.keep_top(got.usage.double(), budget, scale)
    assert torch.equal(mask_of(got), keep)
    assert torch.equal(got.count, budget)
    missed = reference.missed(got.usage.double(), keep)
    assert_within(got.missed, missed, case.n_neurons * 2.0**-23 * missed)


def test_equal_decisions_on_exact_usages(device):
    usage = [4.0, 1.0, 2.0, 3.0, 2.0, 2.0, 0.5]
    y, scale, row_scale = given(usage, device)
    got = ops.recover(y, scale, row_scale, threshold=filled(1, 2.0, device))
    assert got.usage[0].tolist() == usage
    assert got.index[0, : got.count[0]].tolist() == [0, 2, 3, 4, 5]
    assert got.missed.item() == 1.25


@pytest.mark.parametrize(
    ("budget", "want"), [(0, []), (1, [0]), (3, [0, 2, 3]), (4, [0, 2, 3, 4]), (7, list(range(7)))]
)
def test_ties_go_to_the_lower_index(budget, want, device):
    y, scale, row_scale = given([4.0, 1.0, 2.0, 3.0, 2.0, 2.0, 0.5], device)
    got = ops.recover(y, scale, row_scale, budget=filled(1, budget, device, torch.int32))
    assert got.index[0, : got.count[0]].tolist() == want


@inside(threshold=[NAN, -1.0, 0.0, -INF])
def test_thresholds_that_keep_everything(threshold, device):
    p, y, scale = measured(CASES[2], device)
    got = ops.recover(y, scale, p.row_scale, threshold=filled(3, threshold, device))
    assert got.count.tolist() == [77] * 3
    assert got.missed.tolist() == [0.0] * 3


def test_infinite_threshold_keeps_nothing(device):
    p, y, scale = measured(CASES[2], device)
    got = ops.recover(y, scale, p.row_scale, threshold=filled(3, INF, device))
    assert got.count.tolist() == [0] * 3
    assert (got.missed > 0).all()


@inside(scale_value=[NAN, INF, -INF], rule=["threshold", "budget"])
def test_scale_that_is_not_finite_keeps_everything(scale_value, rule, device):
    p, y, scale = measured(CASES[2], device)
    scale = scale.clone()
    scale[1] = scale_value
    limit = (
        {"threshold": filled(3, INF, device)}
        if rule == "threshold"
        else {"budget": filled(3, 0, device, torch.int32)}
    )
    got = ops.recover(y, scale, p.row_scale, **limit)
    assert got.count.tolist() == [0, 77, 0]
    assert got.index[1].tolist() == list(range(77))
    assert got.missed[1] == 0


def test_usage_that_is_not_a_number_is_kept(device):
    y, scale, row_scale = given([4.0, 1.0, NAN, 3.0], device)
    got = ops.recover(y, scale, row_scale, threshold=filled(1, 3.5, device))
    assert got.index[0, : got.count[0]].tolist() == [0, 2]
    assert got.missed.item() == 10.0
    got = ops.recover(y, scale, row_scale, budget=filled(1, 1, device, torch.int32))
    assert got.index[0, : got.count[0]].tolist() == [2]


def test_zero_activation(device):
    p, y, scale = measured(CASES[2], device)
    got = ops.recover(
        torch.zeros_like(y), torch.zeros_like(scale), p.row_scale, threshold=filled(3, 0.1, device)
    )
    assert got.count.tolist() == [0] * 3
    assert not got.usage.any()


def test_permuting_the_batch_permutes_the_result(device):
    p, y, scale = measured(CASES[5], device)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).to(device)
    threshold = middle_threshold(p)
    got = ops.recover(y, scale, p.row_scale, threshold=threshold)
    permuted = ops.recover(
        y[order].contiguous(), scale[order], p.row_scale, threshold=threshold[order]
    )
    assert torch.equal(mask_of(got)[order], mask_of(permuted))
    assert torch.equal(got.missed[order], permuted.missed)


@pytest.mark.parametrize("limits", [{}, {"threshold": 1.0, "budget": 1}])
def test_wants_exactly_one_limit(limits):
    p, y, scale = measured(CASES[2], "cpu")
    given = {
        name: torch.full((3,), value, dtype=torch.int32 if name == "budget" else torch.float32)
        for name, value in limits.items()
    }
    with pytest.raises(ValueError, match=r"\[recover\] (neither|both) of threshold and budget"):
        ops.recover(y, scale, p.row_scale, **given)


@pytest.mark.parametrize("budget", [-1, 78])
def test_budget_out_of_range(budget):
    p, y, scale = measured(CASES[2], "cpu")
    with pytest.raises(ValueError, match=rf"\[recover\] budget\[0\] = {budget}: want 0 to"):
        ops.recover(y, scale, p.row_scale, budget=filled(3, budget, "cpu", torch.int32))


@pytest.mark.parametrize(("tile_rows", "budget", "most"), [(4, 21, 20), (100, 2, 1)])
def test_budget_of_more_groups_than_there_are(tile_rows, budget, most):
    p, y, scale = measured(CASES[2], "cpu")
    with pytest.raises(
        ValueError, match=rf"\[recover\] budget\[0\] = {budget}: want 0 to n_gro.* {most}\."
    ):
        ops.recover(
            y,
            scale,
            p.row_scale,
            budget=filled(3, budget, "cpu", torch.int32),
            tile_rows=tile_rows,
        )


def test_more_columns_than_gate_and_up():
    y = torch.zeros(1, 4, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[recover\] y of 3 columns: want 1, or 2 for gate"):
        ops.recover(y, torch.ones(1), torch.ones(4, 3), threshold=torch.ones(1))
