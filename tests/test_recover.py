import pytest
import torch

from csfast import ops, reference
from csfast.cases import CASES
from numeric import assert_same_support, assert_within, made, middle_threshold, usage_tolerance

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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
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


@pytest.mark.parametrize("threshold", [NAN, -1.0, 0.0, -INF])
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


@pytest.mark.parametrize("scale_value", [NAN, INF, -INF])
@pytest.mark.parametrize("rule", ["threshold", "budget"])
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
