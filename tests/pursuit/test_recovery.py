"""Recovery from few measurements: what theory and simulation promise of it, and of its limits."""

import pytest
import torch

from csfast import ops, pursuit
from csfast.ops import PursuitStatus
from numeric import EPS_F32

GROUPS = 112  # of 128 neurons: a layer of 14336
NAN = float("nan")


def gaussian(m, n, seed):
    """A sensing matrix with entries of variance 1 / m."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=g, dtype=torch.float64) / m**0.5


def budget_of(batch, atoms, device="cpu"):
    return torch.full((batch,), atoms, dtype=torch.int32, device=device)


def top(values, count):
    """A mask of the `count` largest of every row."""
    mask = torch.zeros(values.shape, dtype=torch.bool)
    return mask.scatter_(1, values.topk(count, dim=1).indices.cpu(), True)


def recall(estimate, usage, count):
    """Share of the `count` largest usages that are among the `count` largest estimates."""
    return float((top(estimate, count) & top(usage, count)).sum() / (len(usage) * count))


def changed(trials, share, seed):
    """A log-normal prior of every trial, and a usage in which a share of the groups is redrawn."""
    g = torch.Generator().manual_seed(seed)
    prior = torch.randn(trials, GROUPS, generator=g, dtype=torch.float64).exp()
    fresh = torch.randn(trials, GROUPS, generator=g, dtype=torch.float64).exp()
    order = torch.rand(trials, GROUPS, generator=g).argsort(dim=1)
    usage = torch.where(order < round(share * GROUPS), fresh, prior)
    return prior, usage


def test_measures_in_float64_and_rounds_once(device):
    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(40, 70, generator=g).to(device)
    y = torch.randn(3, 40, generator=g).to(device)
    got = pursuit.measure(atoms, y)
    a, s = atoms.double(), y.double()
    for name, want in (("gram", a.T @ a), ("correlation", s @ a), ("energy", (s * s).sum(dim=1))):
        value = getattr(got, name)
        assert value.dtype == torch.float32
        # Half a distance for the rounding, and what 40 roundings of float64 may add to it.
        assert ((value.double() - want).abs() <= EPS_F32 / 2 * want.abs() + 1e-13).all(), name


def test_measures_half_precision_exactly():
    atoms = torch.tensor([[1.0, 2], [-3, 0.5]], dtype=torch.bfloat16)
    got = pursuit.measure(atoms, torch.tensor([[4.0, -2]], dtype=torch.float16))
    assert got.gram.tolist() == [[10.0, 0.5], [0.5, 4.25]]
    assert got.correlation.tolist() == [[10.0, 7.0]] and got.energy.tolist() == [20.0]


def test_recovers_what_is_exactly_sparse(device):
    """Four of 112 unknowns from 56 measurements: many more than OMP needs for so few."""
    trials, sparsity = 60, 4
    phi = gaussian(56, GROUPS, seed=1).to(device)
    g = torch.Generator().manual_seed(2)
    support = torch.rand(trials, GROUPS, generator=g).argsort(dim=1)[:, :sparsity]
    x = torch.zeros(trials, GROUPS, dtype=torch.float64)
    x.scatter_(1, support, 1 + torch.rand(trials, sparsity, generator=g, dtype=torch.float64))
    y = x.to(device) @ phi.T
    got, found = pursuit.innovation(
        phi,
        y,
        torch.zeros(GROUPS, device=device),
        budget_of(trials, sparsity, device),
        budget_max=8,
    )
    error = (got.cpu().double() - x).norm(dim=1) / x.norm(dim=1)
    # float32 data and a support that is conditioned well: 2^-24 times some tens.
    assert (error < 64 * EPS_F32).all()
    assert recall(got, x, sparsity) == 1
    assert found.count.tolist() == [sparsity] * trials


def test_few_changed_groups_are_found_from_an_eighth_of_measurements(device):
    """A prior and 5 % of the groups redrawn: the innovation is sparse, and OMP finds it."""
    prior, usage = changed(200, 0.05, seed=3)
    phi = gaussian(14, GROUPS, seed=4).to(device)
    got, _ = pursuit.innovation(
        phi, (usage.to(device) @ phi.T), prior.to(device), budget_of(200, 6, device), budget_max=6
    )
    found = recall(got, usage, 56)
    assert found >= 0.95
    assert found > recall(prior, usage, 56)
    index = got.topk(56, dim=1).indices.int()
    kept = pursuit.support_energy(usage.to(device), index, budget_of(200, 56, device))
    best = pursuit.support_energy(usage, usage.topk(56, dim=1).indices.int(), budget_of(200, 56))
    assert kept.mean() >= 0.98 * best.mean()


def test_half_of_the_groups_cannot_be_found_from_half_of_measurements(device):
    """A raw usage is not sparse: OMP on it is near chance, one look at the correlations is not."""
    trials, half = 60, GROUPS // 2
    g = torch.Generator().manual_seed(5)
    order = torch.rand(trials, GROUPS, generator=g).argsort(dim=1)
    usage = torch.where(
        order < half, 1 + torch.rand(trials, GROUPS, generator=g, dtype=torch.float64), 0.0
    )
    phi = gaussian(half, GROUPS, seed=6).to(device)
    y = usage.to(device) @ phi.T
    got, _ = pursuit.innovation(
        phi, y, torch.zeros(GROUPS, device=device), budget_of(trials, half, device), budget_max=half
    )
    assert 0.45 <= recall(got.abs(), usage, half) <= 0.62  # chance is .50
    assert recall(y @ phi, usage, half) >= 0.65


def test_a_prior_that_is_right_leaves_nothing_to_find(device):
    prior, _ = changed(5, 0.0, seed=7)
    phi = gaussian(14, GROUPS, seed=8).to(device)
    y = prior.to(device) @ phi.T
    got, found = pursuit.innovation(
        phi, y, prior.to(device), budget_of(5, 6, device), budget_max=6, residual_max=1e-9
    )
    assert not found.count.any()
    assert torch.equal(got.cpu(), prior.float())


def test_one_prior_serves_all_rows(device):
    prior, usage = changed(4, 0.05, seed=9)
    phi = gaussian(20, GROUPS, seed=10).to(device)
    y = usage.to(device) @ phi.T
    one = pursuit.innovation(
        phi, y, prior[0].to(device), budget_of(4, 6, device), budget_max=6, per_step=2
    )
    many = pursuit.innovation(
        phi,
        y,
        prior[:1].expand(4, -1).to(device),
        budget_of(4, 6, device),
        budget_max=6,
        per_step=2,
    )
    assert torch.equal(one[1].index, many[1].index)
    assert torch.equal(one[0], many[0])


def test_a_signal_that_is_not_finite_is_estimated_by_the_prior(device):
    prior, usage = changed(2, 0.05, seed=11)
    phi = gaussian(14, GROUPS, seed=12).to(device)
    y = usage.to(device) @ phi.T
    y[0, 3] = NAN
    got, found = pursuit.innovation(phi, y, prior.to(device), budget_of(2, 6, device), budget_max=6)
    assert int(found.status[0]) == PursuitStatus.NOT_FINITE
    assert torch.equal(got[0].cpu(), prior[0].float())
    assert int(found.status[1]) != PursuitStatus.NOT_FINITE and int(found.count[1]) > 0


def test_spreads_coefficients_over_their_atoms():
    found = ops.omp(
        torch.eye(4), torch.tensor([[0.0, 3, 0, -4]]), torch.tensor([25.0]),
        budget_of(1, 3), budget_max=3,
    )  # fmt: skip
    assert pursuit.dense(found, 4).tolist() == [[0.0, 3.0, 0.0, -4.0]]


def test_refuses_to_spread_what_is_not_there():
    found = ops.omp(
        torch.eye(4), torch.ones(1, 4), torch.ones(1), budget_of(1, 3), budget_max=3, coef=False
    )
    with pytest.raises(ValueError, match=r"^\[pursuit\] a pursuit without coefficients: want coef"):
        pursuit.dense(found, 4)


def test_mmse_of_as_many_measurements_as_unknowns_is_their_solution():
    phi = gaussian(20, 20, seed=13)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    got = pursuit.mmse(phi, x @ phi.T, torch.zeros(20), torch.ones(20), noise=0.0)
    # Rounded once, after a float64 solution whose condition is some 10^5 at most.
    assert ((got.double() - x).abs() <= EPS_F32 * x.abs() + 1e-9).all()


def test_mmse_without_variance_or_with_all_the_noise_is_the_mean():
    phi = gaussian(8, 30, seed=15)
    mean = torch.randn(30, generator=torch.Generator().manual_seed(16))
    y = torch.ones(2, 8)
    assert torch.equal(pursuit.mmse(phi, y, mean, torch.zeros(30), noise=0.1), mean.expand(2, -1))
    far = pursuit.mmse(phi, y, mean, torch.ones(30), noise=1e30)
    assert torch.equal(far, mean.expand(2, -1))


def test_mmse_meets_the_normal_equations():
    """Its error is uncorrelated with every measurement: A' (A C A' + s I)^-1 as written out."""
    phi = gaussian(15, 40, seed=17)
    g = torch.Generator().manual_seed(18)
    mean, spread = (
        torch.randn(2, 40, generator=g, dtype=torch.float64),
        torch.rand(2, 40, generator=g),
    )
    y = torch.randn(2, 15, generator=g, dtype=torch.float64)
    got = pursuit.mmse(phi, y, mean, spread, noise=0.3)
    for row in range(2):
        c = torch.diag(spread[row].double())
        inverse = torch.linalg.inv(phi @ c @ phi.T + 0.3 * torch.eye(15, dtype=torch.float64))
        want = mean[row] + c @ phi.T @ inverse @ (y[row] - phi @ mean[row])
        assert ((got[row].double() - want).abs() <= EPS_F32 * want.abs() + 1e-12).all()


def test_mmse_beats_prior_and_unweighted_estimate_where_all_groups_drift():
    """Every group changes by a factor exp(.7 N): nothing sparse for OMP to find."""
    g = torch.Generator().manual_seed(19)
    prior = torch.randn(200, GROUPS, generator=g, dtype=torch.float64).exp()
    usage = prior * (0.7 * torch.randn(200, GROUPS, generator=g, dtype=torch.float64)).exp()
    phi = gaussian(84, GROUPS, seed=20)
    y = usage @ phi.T
    weighted = pursuit.mmse(phi, y, prior, prior.square(), noise=0.0)
    plain = pursuit.mmse(phi, y, prior, torch.ones_like(prior), noise=0.0)
    found = recall(weighted, usage, 56)
    assert found > recall(prior, usage, 56) and found > recall(plain, usage, 56)

    def error(estimate):
        return float((estimate.double() - usage).norm(dim=1).mean())

    assert error(weighted) < error(plain) < error(prior)


def test_support_energy_is_the_share_of_the_squares():
    value = torch.tensor([[1.0, -2, 2, 4], [3.0, 0, 0, 0], [0.0, 0, 0, 0]])
    index = torch.tensor([[3, 1, 0], [1, 0, 0], [0, 1, 2]], dtype=torch.int32)
    count = torch.tensor([2, 1, 3], dtype=torch.int32)
    assert pursuit.support_energy(value, index, count).tolist() == [0.8, 0.0, 1.0]


def good():
    return {
        "dictionary": torch.ones(3, 5),
        "y": torch.ones(2, 3),
        "prior": torch.zeros(5),
        "budget": budget_of(2, 1),
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "dictionary",
            torch.ones(3, 5).int(),
            TypeError,
            "dictionary is torch.int32: want a float",
        ),
        ("dictionary", torch.ones(4, 5), ValueError, r"dictionary \(4, 5\) and y \(2, 3\): want"),
        ("dictionary", torch.ones(3), ValueError, r"dictionary \(3,\) and y \(2, 3\): want"),
        (
            "dictionary",
            torch.ones(3, 5, device="meta"),
            ValueError,
            "on meta and y on cpu: want one",
        ),
        ("y", torch.ones(3), ValueError, r"and y \(3,\): want \(m, n_atoms\) and \(batch, m\)"),
        ("y", torch.ones(2, 3).bool(), TypeError, "y is torch.bool: want a float type"),
        (
            "prior",
            torch.zeros(4),
            ValueError,
            r"prior has shape \(4,\): want \(n_atoms,\) = \(5,\)",
        ),
        ("prior", torch.zeros(3, 5), ValueError, r"or \(batch, n_atoms\) = \(2, 5\)"),
        ("prior", torch.zeros(5).long(), TypeError, "prior is torch.int64: want a float type"),
    ],
)
def test_refuses(name, value, error, message):
    pursuit.innovation(**good(), budget_max=1)
    with pytest.raises(error, match=r"^\[pursuit\] .*" + message):
        pursuit.innovation(**(good() | {name: value}), budget_max=1)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("mean", torch.zeros(6), ValueError, r"mean has shape \(6,\): want"),
        ("variance", torch.ones(1, 5), ValueError, r"variance has shape \(1, 5\): want"),
        ("variance", -torch.ones(5), ValueError, "variance has an entry below 0 or not finite"),
        ("variance", torch.full((5,), NAN), ValueError, "variance has an entry below 0 or not fin"),
        ("noise", -1.0, ValueError, "noise = -1.0: want a finite variance of at least 0"),
        ("noise", NAN, ValueError, "noise = nan: want a finite variance"),
    ],
)
def test_mmse_refuses(name, value, error, message):
    arguments = {
        "dictionary": torch.ones(3, 5),
        "y": torch.ones(2, 3),
        "mean": torch.zeros(5),
        "variance": torch.ones(5),
        "noise": 0.1,
    }
    pursuit.mmse(**arguments)
    with pytest.raises(error, match=r"^\[pursuit\] " + message):
        pursuit.mmse(**(arguments | {name: value}))


def test_support_energy_refuses_shapes_that_do_not_fit():
    index, count = torch.zeros(2, 3, dtype=torch.int32), budget_of(2, 1)
    for value, i, c in ((torch.ones(5), index, count), (torch.ones(2, 5), index[:1], count),
                        (torch.ones(2, 5), index, count[:1])):  # fmt: skip
        with pytest.raises(ValueError, match=r"^\[pursuit\] value .*: want \(batch, n_atoms\)"):
            pursuit.support_energy(value, i, c)
