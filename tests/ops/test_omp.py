import math
import random
import re
import warnings

import pytest
import torch

from axes import inside, on_gpu
from csfast import designs, ops, reference
from csfast.bench.cases import PURSUITS, PursuitCase
from csfast.ops import PursuitStatus
from numeric import EPS_F32, assert_within

INF, NAN = float("inf"), float("nan")
MARGIN = 1e-5  # two scores that are nearer than this, relatively, float32 may confuse
CASES = {case.name: case for case in PURSUITS}
STANDARD = CASES["standard"]
SMALL = PursuitCase("small", batch=20, m=64, n_atoms=128, n_nonzero=4)
RULES = {
    "plain": {},
    "tolerance": {"tolerance": 0.05},
    "residual": {"residual_max": 0.5},
    "correlation": {"correlation_min": 0.2},
    "gain": {"gain_min": 0.02},
    "three_a_step": {"per_step": 3},
    "all_at_once": {"per_step": 1000, "correlation_min": 0.1},
    "start": {"start": 3},
    "pairs": {"group": 2},
    "pairs_from_start": {"group": 2, "per_step": 2, "start": 3, "tolerance": 0.02},
    "blocks": {"group": 6},
    "blocks_three_a_step": {"group": 6, "per_step": 3, "gain_min": 0.01},
}
DESIGNS = ("general", "flat", "deep", "wide", "quad")  # kernels on CUDA
# The large case with what it is for; the others with whatever fits.
GIVEN = [
    (case, rule)
    for case in PURSUITS
    for rule, options in RULES.items()
    if case.n_atoms % options.get("group", 1) == 0
    and options.get("group", 1) <= case.n_nonzero
    and options.get("start", 0) <= case.n_nonzero
    and (case is not STANDARD or rule in ("plain", "tolerance", "three_a_step"))
]


def given(problem, device, scale=1.0):
    """The float32 tensors of a problem, its signals times `scale`."""
    return (
        problem.gram.float().to(device),
        (scale * problem.correlation).float().to(device),
        (scale**2 * problem.energy).float().to(device),
    )


def filled(batch, budget, device):
    return torch.full((batch,), budget, dtype=torch.int32, device=device)


def run(problem, device, budget, scale=1.0, **options):
    tensors = given(problem, device, scale)
    return ops.omp(*tensors, filled(len(problem.energy), budget, device), **options)


def atoms_of(pursuit, row):
    return pursuit.index[row, : pursuit.count[row]].tolist()


def assert_equal(got, want):
    for name in ("index", "coef", "count", "residual", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def name_of(pursuit, row):
    return PursuitStatus(int(pursuit.status[row])).name.lower()


def omp_tolerance(problem, row, chosen, device):
    """Bounds on the errors of coef ``(len(chosen),)`` and of the squared residual, float64.

    What omp solves differs from the problem by the rounding of gram and correlation and of one
    subtraction a step, n + 2 roundings of numbers of at most |c| + |G| |x|; solving magnifies that
    by |inverse of G| (Higham, Accuracy and Stability of Numerical Algorithms, 2002, theorem 7.2).
    On CUDA the factor R of G, a float32 one, makes G off by n + 3 roundings of |R'| |R| (theorem
    10.3), whose norm is at most the trace of G. The energy explained, c' x, feels all this once by
    c and once by x, and energy itself rounds once, there at every step.
    """
    gram = problem.gram[chosen][:, chosen]
    c = problem.correlation[row, chosen]
    x = torch.linalg.solve(gram, c)
    inverse = torch.linalg.matrix_norm(torch.linalg.inv(gram), 2)
    n = len(chosen)
    size = torch.linalg.matrix_norm(gram, 2) if device == "cpu" else gram.trace()
    data = (n + 3) * EPS_F32 * (c.norm() + size * x.norm())
    coef = inverse * data
    energy = EPS_F32 * problem.energy[row] * (1 if device == "cpu" else n + 1)
    return coef.expand(n), 2 * (coef * c.norm() + data * x.norm()) + energy


@inside(rule=RULES)
@pytest.mark.parametrize("case", PURSUITS, ids=lambda case: case.name)
def test_matches_reference(case, rule, device):
    if (case, rule) in GIVEN:
        check_reference(case, rule, device)


@on_gpu
@inside(rule=["plain", "tolerance", "residual", "correlation", "gain", "start"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", ["blocks", "standard"])
def test_designs_match_reference(name, rule, design, device):
    check_reference(CASES[name], rule, device, design=design)


def check_reference(case, rule, device, **more):
    problem = case.make()
    budget = case.n_nonzero
    options = dict(RULES[rule])
    # Atoms of the signal in descending order, and one that is not among them.
    start = problem.support.flip(1)[:, : options.pop("start", 0)].clone()
    start[:, :1] = 0
    given_start = {"start": start.int().to(device)} if start.shape[1] else {}
    got = run(problem, device, budget, budget_max=budget, **options, **given_start, **more)
    rejected = 0
    for row in range(case.batch):
        want = reference.omp(
            problem.gram,
            problem.correlation[row],
            float(problem.energy[row]),
            budget,
            **options,
            start=start[row].tolist(),
        )
        if want.margin < MARGIN or want.slack < MARGIN:
            rejected += 1
            continue
        assert atoms_of(got, row) == want.index, row
        count = len(want.index)
        coef, square = omp_tolerance(problem, row, want.index, device)
        assert_within(got.coef[row, :count].cpu(), want.coef, coef)
        residual = got.residual[row].cpu().double()
        assert_within(residual.square(), torch.tensor(want.energies[-1]).double(), square)
        # A residual of nothing but rounding ends by chance within the tolerance or not.
        if case.name != "smallest":
            assert name_of(got, row) == want.status, row
        assert not got.index[row, count:].any() and not got.coef[row, count:].any()
    assert rejected <= max(0.05 * case.batch, case.batch > 1)


@pytest.mark.slow
def test_supports_of_ten_thousand_equal_those_of_float64(device):
    """At least 99.9 % of the problems whose decisions float32 can tell apart."""
    case = PursuitCase("sparse", batch=1000, m=256, n_atoms=1024, n_nonzero=32)
    differ = accepted = 0
    for seed in range(10):
        problem = case.make(seed=seed)
        want, margin = reference.omp_supports(problem.gram, problem.correlation, 32)
        got = run(problem, device, 32, budget_max=32, coef=False).index.cpu()
        clear = margin > MARGIN
        same = (got.sort(dim=1).values == want.sort(dim=1).values).all(dim=1)
        accepted += int(clear.sum())
        differ += int((clear & ~same).sum())
    assert accepted >= 9500
    assert differ <= 0.001 * accepted


def test_many_supports_at_once_are_those_of_one_by_one():
    problem = SMALL.make()
    index, margin = reference.omp_supports(problem.gram, problem.correlation, 12)
    for row in range(SMALL.batch):
        want = reference.omp(problem.gram, problem.correlation[row], float(problem.energy[row]), 12)
        assert index[row].tolist() == want.index
        assert margin[row] == pytest.approx(want.margin, rel=1e-6)


def test_agrees_with_scikit_learn(device):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    problem = STANDARD.make(seed=1)
    got = run(problem, device, 32, budget_max=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it stops early
        theirs = linear_model.orthogonal_mp_gram(
            problem.gram.numpy(), problem.correlation.T.numpy(), n_nonzero_coefs=32
        )
    differ = 0
    for row, coef in enumerate(torch.from_numpy(theirs).T):
        chosen = sorted(atoms_of(got, row))
        if coef.nonzero().flatten().tolist() != chosen:
            differ += 1
            continue
        order = got.index[row].argsort()
        tolerance, _ = omp_tolerance(problem, row, chosen, device)
        assert_within(got.coef[row, order].cpu(), coef[chosen], tolerance)
    # The bound on disagreement of the seed's 200 problems, 32 close decisions each.
    assert differ <= 0.001 * STANDARD.batch


def test_is_exact_on_integers(device):
    """Atoms (2, 0) and (1, 2) of pivots 4 and 4: every step is a small binary fraction."""
    gram = torch.tensor([[4.0, 2], [2, 5]], device=device)
    correlation = torch.tensor([[34.0, 21], [17, 10.5]], device=device)
    energy = torch.tensor([293.0, 89.25], device=device)
    got = ops.omp(gram, correlation, energy, filled(2, 2, device), budget_max=2)
    assert got.index.tolist() == [[0, 1], [0, 1]]
    assert got.coef.tolist() == [[8.0, 1.0], [4.0, 0.5]]
    assert got.residual.tolist() == [0.0, 4.0]  # the second has 16 outside the span
    assert got.status.tolist() == [PursuitStatus.CONVERGED, PursuitStatus.BUDGET]
    got = ops.omp(gram, correlation, energy, filled(2, 1, device), budget_max=1)
    assert got.coef.tolist() == [[8.5], [4.25]]
    assert torch.equal(got.residual.cpu(), torch.tensor([2.0, 17.0**0.5]))


def test_ties_go_to_the_lower_index(device):
    """Seven hundred orthonormal atoms, more than a block has threads, and signs of both kinds."""
    n = 700
    correlation = torch.ones(1, n, device=device)
    correlation[0, ::3] = -1
    correlation[0, 650] = 2
    energy = torch.tensor([n + 3.0], device=device)
    budget = filled(1, 40, device)
    got = ops.omp(torch.eye(n, device=device), correlation, energy, budget, budget_max=40)
    assert got.index[0].tolist() == [650, *range(39)]
    assert torch.equal(got.coef[0], correlation[0, got.index[0].long()])


def test_recovers_what_is_sparse(device):
    problem = SMALL.make(noise_db=-300.0)
    got = run(problem, device, 10, budget_max=10)
    for row in range(SMALL.batch):
        assert sorted(atoms_of(got, row)[:4]) == problem.support[row].tolist()
    # sqrt(2^-24), the noise of a float32 energy, for each of ten atoms.
    assert (got.residual.cpu() < 10 * 2.0**-12 * problem.energy.sqrt()).all()


def test_more_budget_goes_on_where_less_ended(device):
    problem = SMALL.make()
    last = None
    for budget in range(25):
        got = run(problem, device, budget, budget_max=25)
        assert got.count.tolist() == [budget] * SMALL.batch
        if last is not None:
            assert torch.equal(got.index[:, : budget - 1], last.index[:, : budget - 1])
            assert (got.residual <= last.residual).all()
        last = got


def test_budgets_are_those_of_each_signal(device):
    problem = SMALL.make()
    budget = torch.arange(SMALL.batch, dtype=torch.int32, device=device)
    got = ops.omp(*given(problem, device), budget, budget_max=32)
    alone = run(problem, device, 7, budget_max=32)
    assert torch.equal(got.count, budget)
    assert torch.equal(got.coef[7], alone.coef[7]) and torch.equal(got.index[7], alone.index[7])


def test_tolerance_is_a_share_of_the_energy(device):
    problem = SMALL.make()
    got = run(problem, device, 60, budget_max=60, tolerance=0.1)
    assert (got.status == PursuitStatus.CONVERGED).all()
    assert (got.residual.cpu().double().square() <= 0.1 * problem.energy).all()
    before = ops.omp(*given(problem, device), got.count - 1, budget_max=60)
    assert (before.residual.cpu().double().square() > 0.1 * problem.energy).all()


@inside(exponent=[-40, -1, 1, 40])
@pytest.mark.parametrize("options", [{}, {"per_step": 3, "group": 2}], ids=["plain", "pairs"])
def test_scaling_by_a_power_of_two_scales_every_bit(exponent, options, device):
    problem = STANDARD.make()
    want = run(problem, device, 32, budget_max=32, **options)
    got = run(problem, device, 32, scale=2.0**exponent, budget_max=32, **options)
    for name in ("index", "count", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.coef, want.coef * 2.0**exponent)
    assert torch.equal(got.residual, want.residual * 2.0**exponent)


@inside(scale=[1e-12, 1e-6, 1e6, 1e12])
def test_scaling_leaves_the_support(scale, device):
    problem = SMALL.make()
    want = run(problem, device, 8, budget_max=8)
    got = run(problem, device, 8, scale=scale, budget_max=8)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.status, want.status)


def test_atoms_of_any_norm_give_the_same(device):
    problem = SMALL.make()
    gram, correlation, energy = given(problem, device)
    norm = 2.0 ** torch.arange(-64, 64, device=device).div(4).floor()
    budget = filled(SMALL.batch, 8, device)
    want = ops.omp(gram, correlation, energy, budget, budget_max=8)
    got = ops.omp(gram * norm * norm[:, None], correlation * norm, energy, budget, budget_max=8)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.residual, want.residual)
    assert torch.equal(got.coef * norm[got.index.long()], want.coef)


def test_residual_max_is_a_norm(device):
    problem = SMALL.make()
    got = run(problem, device, 60, budget_max=60, residual_max=0.25)
    assert (got.status == PursuitStatus.CONVERGED).all()
    assert (got.residual <= 0.25).all()
    before = ops.omp(*given(problem, device), got.count - 1, budget_max=60)
    assert (before.residual > 0.25).all()
    scaled = run(problem, device, 60, scale=8.0, budget_max=60, residual_max=2.0)
    assert torch.equal(scaled.index, got.index) and torch.equal(scaled.coef, 8 * got.coef)


def test_correlation_min_leaves_nothing_above_it(device):
    problem = SMALL.make()
    got = run(problem, device, 60, budget_max=60, correlation_min=0.15)
    assert (got.status == PursuitStatus.CONVERGED).all()
    for row in range(SMALL.batch):
        coef = torch.zeros(SMALL.n_atoms, dtype=torch.float64)
        coef[atoms_of(got, row)] = got.coef[row, : got.count[row]].cpu().double()
        score = (problem.correlation[row] - problem.gram @ coef).abs()
        # Some 60 roundings of numbers of the signal's size.
        assert score.max() <= (0.15 + 60 * EPS_F32) * problem.energy[row].sqrt()
    least = run(problem, device, 60, budget_max=60, correlation_min=1.0)
    assert not least.count.any() and (least.status == PursuitStatus.CONVERGED).all()


def test_gain_min_ends_after_a_step_that_gained_too_little(device):
    problem = SMALL.make()
    got = run(problem, device, 60, budget_max=60, gain_min=0.02)
    assert (got.status == PursuitStatus.NO_GAIN).all()
    energy = problem.energy

    def residual(count):
        return ops.omp(*given(problem, device), count, budget_max=60).residual.cpu().double()

    after, before, earlier = (residual(got.count - less).square() for less in (0, 1, 2))
    assert (before - after < 0.02 * energy).all()
    assert (earlier - before >= 0.02 * energy)[got.count.cpu() >= 2].all()


@inside(per_step=[2, 7, 40, 1000])
def test_steps_do_not_matter_where_atoms_are_orthonormal(per_step, device):
    n = 300
    correlation = torch.randn(3, n, generator=torch.Generator().manual_seed(5)).to(device)
    given_all = (torch.eye(n, device=device), correlation, correlation.square().sum(dim=1))
    budget = torch.tensor([40, 1, 17], dtype=torch.int32, device=device)
    want = ops.omp(*given_all, budget, budget_max=40)
    got = ops.omp(*given_all, budget, budget_max=40, per_step=per_step)
    for name in ("index", "coef", "count", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    # The kernels of one atom a step keep the energy in float32: it is rounded once an atom.
    off = (got.residual.double().square() - want.residual.double().square()).abs()
    assert (off <= 42 * 2.0**-24 * given_all[2].double()).all()
    top = correlation.abs().topk(40, dim=1).indices
    assert torch.equal(want.index[0].long(), top[0])


@inside(per_step=[1, 2, 5], group=[1, 3, 5])
def test_groups_come_by_their_norm_and_ties_by_the_lower_index(group, per_step, device):
    """Orthonormal atoms of small integers: every score is exact, and many are equal."""
    n = 600
    c = torch.randint(-3, 4, (1, n), generator=torch.Generator().manual_seed(6)).float()
    score = c.view(-1, group).square().sum(dim=1)
    got = ops.omp(
        torch.eye(n, device=device),
        c.to(device),
        c.square().sum(dim=1).to(device),
        filled(1, 62, device),
        budget_max=62,
        group=group,
        per_step=per_step,
    )
    room = 62 // group * group  # a group that does not fit whole is not taken
    order = score.sort(descending=True, stable=True).indices[: 62 // group]
    want = (order[:, None] * group + torch.arange(group)).flatten()
    assert got.index[0, :room].tolist() == want.tolist()
    assert got.count.item() == room and name_of(got, 0) == "budget"
    assert torch.equal(got.coef[0, :room].cpu(), c[0, want])


def test_a_whole_group_is_recovered_where_single_atoms_fail(device):
    """Two groups of eight beyond what 40 measurements of 160 atoms allow atom by atom."""
    case = PursuitCase("groups", batch=40, m=40, n_atoms=160, n_nonzero=16, group=8)
    problem = case.make(noise_db=-30.0)

    def found(**options):
        got = run(problem, device, 16, budget_max=16, **options).index.cpu().long()
        return (got.sort(dim=1).values == problem.support).all(dim=1).double().mean()

    assert found(group=8) >= 0.95
    assert found() <= 0.75


@inside(options=[{}, {"per_step": 2}, {"group": 2}])
def test_a_warm_start_goes_on_where_it_ended(options, device):
    problem = CASES["blocks"].make()
    want = run(problem, device, 24, budget_max=24, **options)
    first = run(problem, device, 10, budget_max=10, **options)
    got = run(problem, device, 24, budget_max=24, start=first.index, **options)
    for row in range(20):
        seen = reference.omp(
            problem.gram, problem.correlation[row], float(problem.energy[row]), 24, **options
        )
        if seen.margin > MARGIN:
            assert atoms_of(got, row) == atoms_of(want, row)
            tolerance, _ = omp_tolerance(problem, row, atoms_of(want, row), device)
            assert_within(got.coef[row].cpu(), want.coef[row].cpu().double(), 2 * tolerance)


def test_a_start_is_cut_off_by_count_and_budget(device):
    problem = SMALL.make()
    start = problem.support.int().to(device)
    budget = torch.arange(SMALL.batch, dtype=torch.int32, device=device) % 8
    count = torch.arange(SMALL.batch, dtype=torch.int32, device=device) % 5
    got = ops.omp(*given(problem, device), budget, budget_max=8, start=start, start_count=count)
    for row in range(SMALL.batch):
        taken = min(int(count[row]), int(budget[row]))
        assert atoms_of(got, row)[:taken] == start[row, :taken].tolist()
    assert torch.equal(got.count, budget)
    none = ops.omp(
        *given(problem, device), budget, budget_max=8, start=start, start_count=0 * count
    )
    assert_equal(none, ops.omp(*given(problem, device), budget, budget_max=8))
    nothing = ops.omp(*given(problem, device), budget, budget_max=8, start=start[:, :0])
    assert_equal(nothing, none)


def test_dictionaries_are_those_of_each_signal(device):
    cases = [PursuitCase("own", batch=9, m=60, n_atoms=130, n_nonzero=6) for _ in range(3)]
    problems = [case.make(seed=seed) for seed, case in enumerate(cases)]
    dictionary = torch.tensor([2, 0, 1, 1, 2, 2, 0, 0, 1], dtype=torch.int32)
    gram = torch.stack([p.gram for p in problems]).float().to(device)
    rows = [(problems[d], row) for row, d in enumerate(dictionary.tolist())]
    correlation = torch.stack([p.correlation[row] for p, row in rows]).float().to(device)
    energy = torch.stack([p.energy[row] for p, row in rows]).float().to(device)
    got = ops.omp(
        gram,
        correlation,
        energy,
        filled(9, 6, device),
        budget_max=6,
        dictionary=dictionary.to(device),
    )
    for row, d in enumerate(dictionary.tolist()):
        alone = run(problems[d], device, 6, budget_max=6)
        for name in ("index", "coef", "count", "residual", "status"):
            assert torch.equal(getattr(got, name)[row], getattr(alone, name)[row]), name


@inside(options=[{}, {"per_step": 4}, {"group": 4}])
def test_coefficients_are_optional(options, device):
    problem = SMALL.make()
    want = run(problem, device, 12, budget_max=12, **options)
    got = run(problem, device, 12, budget_max=12, coef=False, **options)
    assert got.coef.shape == (SMALL.batch, 0)
    for name in ("index", "count", "residual", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_permuting_the_batch_permutes_the_result(device):
    problem = STANDARD.make()
    gram, correlation, energy = given(problem, device)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3)).to(device)
    budget = filled(200, 32, device)
    got = ops.omp(gram, correlation, energy, budget, budget_max=32)
    permuted = ops.omp(gram, correlation[order], energy[order], budget, budget_max=32)
    for name in ("index", "coef", "count", "residual", "status"):
        assert torch.equal(getattr(got, name)[order], getattr(permuted, name))


@pytest.mark.parametrize(
    "options",
    [{}, {"per_step": 3}, {"group": 4}, {"design": "flat"}, {"design": "deep"}],
    ids=str,
)
def test_two_hundred_runs_agree_bit_for_bit(options, device):
    """On the CPU five: there only the threads could make a difference."""
    problem = STANDARD.make(seed=2)
    want = run(problem, device, 32, budget_max=32, **options)
    for _ in range(200 if device == "cuda" else 5):
        assert_equal(run(problem, device, 32, budget_max=32, **options), want)


def spoilt(seed, n_atoms):
    """A batch with everything that ends a pursuit: twins, norms of all sizes, 0, NaN, infinity."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.randn(2, 24, n_atoms, generator=g, dtype=torch.float64)
    atoms[0, :, 3] = atoms[0, :, 1]
    atoms[0, :, 2] = 0
    atoms[1] *= torch.exp(2 * torch.randn(n_atoms, generator=g, dtype=torch.float64))
    dictionary = torch.arange(12) % 2
    chosen = (torch.rand(12, n_atoms, 1, generator=g) < 0.1).double()
    chosen *= torch.randn(12, n_atoms, 1, generator=g, dtype=torch.float64)
    y = (atoms[dictionary] @ chosen)[..., 0]
    y[2:] += 0.1 * torch.randn(10, 24, generator=g, dtype=torch.float64)
    y[4] = 0
    gram = (atoms.mT @ atoms).float()
    gram[1, 5, 7] = gram[1, 7, 5] = NAN
    correlation = (y[:, None] @ atoms[dictionary])[:, 0].float()
    correlation[5, 0] = INF
    correlation[2, 3] += 40  # which no signal has beside its twin
    energy = y.square().sum(dim=1).float()
    energy[6] = -1
    start = torch.randint(0, n_atoms, (12, 3), generator=g, dtype=torch.int32)
    counts = torch.randint(0, 4, (12,), generator=g, dtype=torch.int32)
    budget = torch.randint(20, 33, (12,), generator=g, dtype=torch.int32)
    budget[8], budget[9] = 0, 1
    return gram, correlation, energy, budget, dictionary.int(), start, counts


@on_gpu
@inside(n_atoms=[36, 260, 512, 1024], begins=[False, True])
def test_quad_gives_the_bits_of_flat(begins, n_atoms, device):
    """Whatever ends a pursuit; on the CPU because a design is of no account there."""
    seen = set()
    for seed in range(8):
        given = [t.to(device) for t in spoilt(seed, n_atoms)]
        options = {"budget_max": 32, "dictionary": given[4], "coef": True}
        if begins:
            options |= {"start": given[5], "start_count": given[6]}
        for rule in ({}, {"tolerance": 0.02}, {"gain_min": 0.01}, {"residual_max": 0.5}):
            want = ops.omp(*given[:4], **options, **rule, design="flat")
            got = ops.omp(*given[:4], **options, **rule, design="quad")
            for name in ("index", "coef", "count", "residual", "status"):
                a, b = getattr(got, name), getattr(want, name)
                assert torch.equal(a.view(torch.int32), b.view(torch.int32)), (seed, name)
            seen |= {name_of(got, row) for row in range(12)}
    if not begins:
        assert seen == {status.name.lower() for status in PursuitStatus}


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_quad_takes_one_problem_after_another():
    """More problems than blocks, with and without coefficients."""
    case = PursuitCase("many", batch=2000, m=48, n_atoms=128, n_nonzero=12)
    problem = case.make(seed=4)
    for coef in (True, False):
        want = run(problem, "cuda", 12, budget_max=12, coef=coef, design="flat")
        got = run(problem, "cuda", 12, budget_max=12, coef=coef, design="quad")
        assert_equal(got, want)


# Atoms 0 and 1 are one and the same, atom 2 has norm 2.
TWINS = ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 4.0))


@pytest.mark.parametrize(
    ("correlation", "energy", "budget", "status", "index", "residual"),
    [
        ((0, 0, 0), 0.0, 3, "ZERO", [], 0.0),
        ((1, 0, 0), 0.0, 3, "ZERO", [], 0.0),
        ((0, 0, 0), 0.0, 0, "ZERO", [], 0.0),
        ((0, 0, 0), 4.0, 3, "CONVERGED", [], 2.0),
        ((3, 3, 0), 9.0, 3, "CONVERGED", [0], 0.0),
        ((3, 3, 2), 26.0, 3, "CONVERGED", [0, 2], 4.0),
        ((3, 3, 2), 26.0, 2, "BUDGET", [0, 2], 4.0),
        ((3, 3, 2), 26.0, 1, "BUDGET", [0], 17**0.5),
        ((3, 3, 2), 25.0, 0, "BUDGET", [], 5.0),
        ((2, 1, 0), 8.0, 3, "DEPENDENT", [0], 2.0),  # no signal correlates so with twins
        ((NAN, 0, 0), 1.0, 3, "NOT_FINITE", [], NAN),
        ((0, -INF, 0), 1.0, 3, "NOT_FINITE", [], NAN),
        ((0, 0, INF), 0.0, 0, "NOT_FINITE", [], NAN),
        ((1, 0, 0), NAN, 3, "NOT_FINITE", [], NAN),
        ((1, 0, 0), INF, 3, "NOT_FINITE", [], NAN),
        ((1, 0, 0), -1.0, 3, "NOT_FINITE", [], NAN),
    ],
)
def test_degenerate_signals_end_as_typed(
    correlation, energy, budget, status, index, residual, device
):
    c = torch.tensor([correlation, (0.0, 0.0, 2.0)], device=device)
    got = ops.omp(
        torch.tensor(TWINS, device=device),
        c,
        torch.tensor([energy, 1.0], device=device),
        torch.tensor([budget, 3], dtype=torch.int32, device=device),
        budget_max=3,
    )
    assert PursuitStatus(int(got.status[0])).name == status
    assert atoms_of(got, 0) == index
    assert got.residual[0].item() == pytest.approx(residual, rel=2.0**-23, nan_ok=True)
    assert not got.index[0, len(index) :].any() and not got.coef[0, len(index) :].any()
    want = reference.omp(torch.tensor(TWINS), c[0].cpu(), energy, budget)
    assert (want.status, want.index) == (status.lower(), index)
    # The signal beside it is none the worse.
    assert (atoms_of(got, 1), got.coef[1, 0].item()) == ([2], 0.5)


@pytest.mark.parametrize(
    ("at", "value", "status", "index"),
    [
        ((2, 2), 0.0, "CONVERGED", [0]),  # no norm: never taken
        ((2, 2), NAN, "NOT_FINITE", []),
        ((2, 2), INF, "NOT_FINITE", []),
        ((2, 2), -1.0, "NOT_FINITE", []),
        ((0, 2), NAN, "NOT_FINITE", []),  # in the row of an atom that is taken
        ((0, 2), INF, "NOT_FINITE", []),
    ],
)
def test_degenerate_dictionaries_end_as_typed(at, value, status, index, device):
    gram = torch.tensor(TWINS, device=device)
    gram[at] = value
    gram[at[::-1]] = value
    c = torch.tensor([[3.0, 3.0, 2.0]], device=device)
    energy = torch.tensor([26.0], device=device)
    got = ops.omp(gram, c, energy, filled(1, 3, device), budget_max=3)
    assert (PursuitStatus(int(got.status[0])).name, atoms_of(got, 0)) == (status, index)


@pytest.mark.parametrize(
    ("options", "status", "index"),
    [
        ({"per_step": 3}, "CONVERGED", [0, 2]),  # the twin is passed over
        ({"per_step": 2}, "CONVERGED", [0, 2]),
        ({"start": [1, 0]}, "CONVERGED", [1, 2]),
        ({"start": [2, 2, 2]}, "CONVERGED", [2, 0]),
        ({"start": [0, 1, 2], "per_step": 3}, "CONVERGED", [0, 2]),
        ({"group": 3}, "BUDGET", [0, 2]),  # no whole group fits any more
        ({"start": [1], "group": 3}, "BUDGET", [1]),
    ],
    ids=str,
)
def test_dependent_atoms_among_others_are_passed_over(options, status, index, device):
    start = torch.tensor([options.get("start", [])], dtype=torch.int32, device=device)
    got = ops.omp(
        torch.tensor(TWINS, device=device),
        torch.tensor([[3.0, 3.0, 2.0]], device=device),
        torch.tensor([26.0], device=device),
        filled(1, 3, device),
        budget_max=3,
        **(options | {"start": start}),
    )
    assert (PursuitStatus(int(got.status[0])).name, atoms_of(got, 0)) == (status, index)
    want = reference.omp(torch.tensor(TWINS), torch.tensor([3.0, 3.0, 2.0]), 26.0, 3, **options)
    assert (want.status, want.index) == (status.lower(), index)


def test_a_step_of_dependent_atoms_alone_ends(device):
    """No signal correlates so with three of a kind: all but the first have nothing to add."""
    gram = torch.ones(3, 3, device=device)
    c, energy = torch.tensor([[3.0, 2, 1]], device=device), torch.tensor([20.0], device=device)
    for per_step, status in ((1, "dependent"), (2, "dependent"), (3, "converged")):
        got = ops.omp(gram, c, energy, filled(1, 3, device), budget_max=3, per_step=per_step)
        assert (name_of(got, 0), atoms_of(got, 0)) == (status, [0]), per_step


def test_what_a_start_meets_that_is_not_finite_ends_it(device):
    gram = torch.tensor(TWINS, device=device)
    gram[0, 2] = gram[2, 0] = NAN
    got = ops.omp(
        gram,
        torch.tensor([[3.0, 3.0, 2.0]] * 2, device=device),
        torch.tensor([26.0] * 2, device=device),
        filled(2, 3, device),
        budget_max=3,
        start=torch.tensor([[0, 2], [1, 1]], dtype=torch.int32, device=device),
    )
    assert (name_of(got, 0), atoms_of(got, 0)) == ("not_finite", [])
    assert math.isnan(got.residual[0])
    # The second met nothing bad at the start, and takes atom 2, whose row is bad, after it.
    assert (name_of(got, 1), atoms_of(got, 1)) == ("not_finite", [])


def test_groups_hold_atoms_without_norm(device):
    gram = torch.diag(torch.tensor([1.0, 0, 4, 0, 0, 0])).to(device)
    c = torch.tensor([[1.0, 0, 6, 0, 0, 0]], device=device)
    energy = torch.tensor([10.0], device=device)
    got = ops.omp(gram, c, energy, filled(1, 6, device), budget_max=6, group=2)
    assert (name_of(got, 0), atoms_of(got, 0)) == ("converged", [2, 0])
    assert got.coef[0, :2].tolist() == [1.5, 1.0] and got.residual.item() == 0


def test_more_atoms_than_rows_end_at_the_rows(device):
    """A signal of 8 entries is explained by 8 atoms; the other 24 have nothing to add."""
    problem = PursuitCase("wide", batch=10, m=8, n_atoms=32, n_nonzero=8).make()
    got = run(problem, device, 32, budget_max=32)
    ends = {int(PursuitStatus.CONVERGED), int(PursuitStatus.DEPENDENT)}
    assert set(got.status.tolist()) <= ends
    assert (got.count <= 8).all() and (got.count >= 1).all()
    assert (got.residual.cpu() < 2.0**-8 * problem.energy.sqrt()).all()


def test_full_budget_solves_the_whole_system(device):
    """As many atoms as rows, all taken: the solution of the square system."""
    problem = PursuitCase("tall", batch=4, m=60, n_atoms=12, n_nonzero=12).make()
    got = run(problem, device, 12, budget_max=12)
    want = torch.linalg.solve(problem.gram, problem.correlation.T).T
    for row in range(4):
        assert sorted(atoms_of(got, row)) == list(range(12))
        chosen = got.index[row].long().cpu()
        tolerance, _ = omp_tolerance(problem, row, chosen, device)
        assert_within(got.coef[row].cpu(), want[row, chosen], tolerance)


def test_is_registered_with_torch(device):
    """Schema, fake kernel and functionalisation, as torch itself checks them."""
    tensors = (*given(SMALL.make(), device), filled(SMALL.batch, 4, device))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.csfast.omp.default
    torch.library.opcheck(op, (*tensors, 4), test_utils=checks)
    start = tensors[3][:, None].contiguous()
    options = {"per_step": 2, "start": start, "start_count": 0 * tensors[3], "coef": False}
    torch.library.opcheck(op, (*tensors, 4, 0.1), options, test_utils=checks)
    several = {"dictionary": 0 * tensors[3], "group": 2}
    torch.library.opcheck(op, (tensors[0][None], *tensors[1:], 4), several, test_utils=checks)


@pytest.mark.parametrize(
    ("sizes", "device", "plan"),
    [
        (
            (5000, 1024, 32),
            {},
            "quad: 132 blocks of 256 threads, 1 .* 32 in registers, 0 in shared",
        ),
        (
            (5000, 1024, 32),
            {"single": False},
            "deep: 264 blocks of 128 threads, 2 .* 16 in registers, 16 in shared",
        ),
        (
            (5000, 2048, 64),
            {},
            "deep: 132 blocks of 256 threads, 1 .* 25 in shared memory, 23 in the",
        ),
        (
            (132, 1024, 32),
            {},
            "quad: 132 .* all once more in shared memory; 136320 bytes .* 0 bytes",
        ),
        (
            (132, 1024, 32),
            {"single": False},
            "flat: 132 blocks of 256 threads, .* 12 in registers, 20 in shared",
        ),
        (
            (5000, 1024, 64),
            {},
            "flat: 132 blocks of 256 .* 52 in shared memory, 0 in the workspace",
        ),
        ((4096, 512, 16), {}, "quad: 264 blocks of 128 threads, 2 a processor"),
        (
            (4096, 512, 16),
            {"single": False},
            "wide: 660 blocks of 64 threads, 5 .* 0 in registers, 16 in shared",
        ),
        ((32, 448, 16), {}, "quad: 32 blocks of 128 threads, 2 a processor"),
        (
            (32, 448, 16),
            {"single": False},
            "flat: 32 blocks of 128 threads, 4 .* 12 in registers, 4 in shared",
        ),
        ((4096, 128, 8), {}, "quad: 1056 blocks of 32 threads, 8 a processor"),
        (
            (4096, 128, 8),
            {"single": False},
            "flat: 2112 blocks of 32 threads, 16 .* 12 in registers, 0 in shared",
        ),
        ((7, 1, 1), {}, "flat: 7 blocks of 32 threads"),
        ((7, 4, 4), {}, "quad: 7 blocks of 32 threads"),
        ((0, 1024, 32), {}, "quad: 0 blocks"),
        # Off what quad takes by one: atoms, their multiple, the budget.
        ((132, 1028, 32), {}, "flat: 132 blocks of 288 threads"),
        ((132, 1022, 32), {}, "flat: 132 blocks of 256 threads"),
        ((132, 1024, 33), {}, "flat: 132 blocks of 256 threads"),
        # A processor of capability 8.0, then of 8.6.
        ((132, 1024, 32), {"shared_per_block": 163 << 10}, "quad: 132 blocks of 256 threads, 1 a"),
        ((132, 640, 32), {"shared_per_block": 99 << 10}, "quad: 132 blocks of 160 threads, 1 a"),
        ((132, 644, 32), {"shared_per_block": 99 << 10}, "flat: 132 blocks of 192 threads"),
        ((4, 2048, 100), {}, "deep: 4 blocks of 256 .* 59 in the workspace; R in the workspace"),
        (
            (4, 2049, 8),
            {},
            "wide: 4 blocks of 288 threads, 1 .* 0 in registers, 8 in shared memory",
        ),
        ((4, 4096, 4096), {}, "wide: 4 blocks of 512 .* 0 in registers, .* R in the workspace"),
        ((4, 4097, 8), {}, "general: 4 blocks of 256 threads, 8 a processor"),
        ((5000, 4097, 8), {}, "general: 1056 blocks of 256 threads, 8 a processor"),
        (
            (5000, 1024, 32),
            {"shared_per_block": 49152},
            "deep: .* 9 in shared memory, 7 in the work",
        ),
        ((5000, 1024, 32), {"shared_per_block": 1024}, "general: 1056 blocks"),
        ((5000, 2048, 64), {"registers": 32768}, "wide: 132 blocks of 256 threads"),
        ((5000, 2048, 64), {"registers": 16384}, "general: 1056 blocks"),
        ((5000, 1024, 32), {"registers": 32768}, "flat: 132 blocks of 256 threads, 1 a processor"),
        ((132, 1024, 32), {"design": "quad"}, "quad: 132 blocks of 256 threads, 1 .* once more in"),
        ((132, 1024, 32), {"design": "quad", "single": False}, "quad: 132 blocks of 256 threads"),
        ((132, 1024, 32), {"design": "flat"}, "flat: 132 blocks of 256 threads"),
        ((132, 1024, 32), {"design": "deep"}, "deep: 132 blocks of 128 threads"),
        ((132, 1024, 32), {"design": "wide"}, "wide: 132 blocks of 128 threads"),
        ((132, 1024, 32), {"design": "general"}, "general: 132 blocks of 256 threads"),
    ],
)
def test_plans_are_those_of_the_sizes(sizes, device, plan):
    assert re.search("^" + plan, designs.omp_plan(*sizes, **device))


def test_plans_fit_the_device():
    """What a block asks for is there, and what is resident fits together."""
    rng = random.Random(8)
    kernels = {
        "flat": (4, 128, 512),
        "deep": (8, 255, 256),
        "wide": (8, 128, 512),
        "quad": (4, 255, 256),
    }
    seen = set()
    for _ in range(3000):
        n_atoms = rng.choice([rng.randint(1, 300), rng.randint(1, 6000)])
        budget_max = rng.randint(1, min(n_atoms, rng.choice([8, 100, 6000])))
        block = rng.choice([48 << 10, 99 << 10, 163 << 10, 232448])
        sizes = (rng.randint(1, 9999), n_atoms, budget_max)
        plan = designs.omp_plan(*sizes, shared_per_block=block)
        kernel, _, rest = plan.partition(":")
        seen.add(kernel)
        several = designs.omp_plan(*sizes, shared_per_block=block, single=False)
        assert several == plan if kernel != "quad" else not several.startswith("quad")
        if kernel == "general":
            continue
        atoms, registers, threads_max = kernels[kernel]
        numbers = [int(number) for number in re.findall(r"\d+", rest)]
        blocks, threads, resident, held, in_shared, spilled, shared, workspace = numbers
        assert 1 <= blocks <= resident * 132
        assert atoms * threads >= n_atoms and threads % 32 == 0 and threads <= threads_max
        assert held + in_shared + spilled >= budget_max
        assert shared <= block and resident * (shared + 1024) <= 233472
        assert resident * threads * registers <= 65536
        assert workspace >= blocks * spilled * 4 * atoms * threads
    assert seen == {*kernels, "general"}


@pytest.mark.parametrize(
    ("sizes", "device", "message"),
    [
        ((-1, 8, 2), {}, "batch = -1: want 0 to 2"),
        ((1, 0, 1), {}, "n_atoms = 0: want 1 to 2"),
        ((1, 8, 9), {}, "budget_max = 9: want 1 to n_atoms = 8"),
        ((1, 8, 2), {"processors": 0}, "a device of 0 processors of 2048 threads: want at least"),
        ((1, 8, 2), {"threads": 128}, "a device of 132 processors of 128 threads: want at least"),
        ((1, 8, 2), {"design": "tall"}, "design 'tall': want general, flat, deep, wide, quad"),
        ((1, 1028, 2), {"design": "quad"}, "design quad for 1028 atoms .* of at most 1024 atoms"),
        ((1, 66, 2), {"design": "quad"}, "design quad for 66 atoms .*: want a multiple of 4"),
        ((1, 64, 33), {"design": "quad"}, "design quad .* = 33: want .* a budget of at most 32"),
        ((1, 1024, 8), {"design": "quad", "shared_per_block": 99 << 10}, "design quad .* room for"),
        ((1, 4096, 8), {"design": "flat"}, "design flat for 4096 atoms .*: want what fits"),
    ],
)
def test_refuses_to_plan(sizes, device, message):
    with pytest.raises(ValueError, match=r"\[omp\] " + message):
        designs.omp_plan(*sizes, **device)


def test_refuses_to_plan_for_steps_of_no_bool():
    with pytest.raises(TypeError, match=r"\[omp\] single is a int: want a bool"):
        designs.omp_plan(1, 8, 2, single=1)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [{}, {"per_step": 3}, {"group": 2}, *({"design": design} for design in DESIGNS)],
    ids=str,
)
def test_replays_follow_signal_and_budget(options):
    problem = SMALL.make()
    gram, correlation, energy = given(problem, "cuda")
    budget = filled(SMALL.batch, 4, "cuda")
    ops.omp(
        gram, correlation, energy, budget, budget_max=16, **options
    )  # kernels load at their first run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.omp(gram, correlation, energy, budget, budget_max=16, **options)
    for seed, atoms in ((1, 16), (2, 0), (3, 9)):
        _, c, e = given(SMALL.make(seed=seed), "cuda")
        correlation.copy_(c)
        energy.copy_(e)
        budget.fill_(atoms)
        graph.replay()
        assert_equal(got, ops.omp(gram, correlation, energy, budget, budget_max=16, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_atoms", [128, 2600, 4100], ids=["registers", "shared", "memory"])
def test_what_is_out_of_range_on_cuda_does_no_harm(n_atoms):
    """Values are not looked at before a kernel is: it clamps, passes over or gives up."""
    case = PursuitCase("range", batch=6, m=64, n_atoms=n_atoms, n_nonzero=4)
    problem = case.make()
    gram, correlation, energy = given(problem, "cuda")
    budget = torch.tensor([-3, 99, 8, 8, 8, 8], dtype=torch.int32, device="cuda")
    start = torch.tensor([-1, n_atoms, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(6, 1).cuda()
    count = torch.tensor([-5, 99, 4, 4, 0, 4], dtype=torch.int32, device="cuda")
    got = ops.omp(gram, correlation, energy, budget, budget_max=8, start=start, start_count=count)
    want = ops.omp(gram, correlation, energy, budget.clamp(0, 8), budget_max=8)
    assert_equal(got, want)
    dictionary = torch.tensor([0, 1, -1, 0, 2**31 - 1, 0], dtype=torch.int32, device="cuda")
    got = ops.omp(gram[None], correlation, energy, budget, budget_max=8, dictionary=dictionary)
    wrong = torch.tensor([1, 2, 4], device="cuda")
    assert (got.status[wrong] == PursuitStatus.NOT_FINITE).all() and not got.count[wrong].any()
    assert got.residual[wrong].isnan().all()
    right = torch.tensor([0, 3, 5], device="cuda")
    assert torch.equal(got.coef[right], want.coef[right])


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_quad_refuses_unaligned_tensors():
    gram, correlation, energy = given(SMALL.make(), "cuda")
    shifted = torch.empty(correlation.numel() + 1, device="cuda")[1:].view_as(correlation)
    shifted.copy_(correlation)
    budget = filled(SMALL.batch, 4, "cuda")
    with pytest.raises(
        ValueError, match=r"\[omp\] correlation begins 4 bytes past a multiple of 16"
    ):
        ops.omp(gram, shifted, energy, budget, budget_max=4, design="quad")


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_unaligned_tensors_give_the_same():
    case = PursuitCase("shifted", batch=3, m=64, n_atoms=512, n_nonzero=6)
    tensors = given(case.make(), "cuda")
    want = ops.omp(*tensors, filled(3, 6, "cuda"), budget_max=6)
    for which in (0, 1):
        shifted = list(tensors)
        room = torch.empty(tensors[which].numel() + 1, device="cuda")[1:]
        shifted[which] = room.view(tensors[which].shape).copy_(tensors[which])
        assert shifted[which].data_ptr() % 16 != 0
        assert_equal(ops.omp(*shifted, filled(3, 6, "cuda"), budget_max=6), want)


def arguments(device="cpu"):
    return {
        "gram": torch.eye(4, device=device),
        "correlation": torch.ones(2, 4, device=device),
        "energy": torch.full((2,), 4.0, device=device),
        "budget": torch.tensor([1, 2], dtype=torch.int32, device=device),
        "budget_max": 2,
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("gram", torch.eye(5), ValueError, r"gram has shape \(5, 5\): want \(n_atoms, n_atoms\)"),
        ("gram", torch.ones(4), ValueError, "gram has 1 axes without dictionary: want"),
        ("gram", torch.eye(4).double(), TypeError, "gram is float64: want float32"),
        ("gram", torch.ones(4, 8)[:, ::2], TypeError, "gram of shape .* other strides"),
        ("gram", torch.eye(4).to_sparse(), TypeError, "gram is torch.sparse_coo: want a strided"),
        ("gram", None, TypeError, "gram is a NoneType: want a torch.Tensor"),
        (
            "correlation",
            torch.ones(4),
            ValueError,
            r"correlation has 1 axes: want \(batch, n_atoms",
        ),
        ("correlation", torch.ones(2, 4).half(), TypeError, "correlation is float16: want float32"),
        ("energy", torch.ones(3), ValueError, r"energy has shape \(3,\): want \(batch = 2,\)"),
        ("energy", torch.ones(2).long(), TypeError, "energy is int64: want float32"),
        ("budget", torch.ones(2).long(), TypeError, "budget is int64: want int32"),
        ("budget", torch.ones(1).int(), ValueError, r"budget has shape \(1,\): want \(batch = 2"),
        (
            "budget",
            torch.tensor([1, 3]).int(),
            ValueError,
            r"budget\[1\] = 3: want 0 to budget_max",
        ),
        ("budget", torch.tensor([-1, 1]).int(), ValueError, r"budget\[0\] = -1: want 0 to"),
        ("budget_max", 5, ValueError, "budget_max = 5: want 1 to n_atoms = 4"),
        ("budget_max", 0, ValueError, "budget_max = 0: want 1 to n_atoms = 4"),
        ("budget_max", -1, ValueError, "budget_max = -1: want 0 to"),
        ("budget_max", 1.5, TypeError, "budget_max is a float: want an int"),
        ("tolerance", -0.1, ValueError, "tolerance = -0.1.*: want 0 to 1"),
        ("tolerance", 1.5, ValueError, "tolerance = 1.5.*: want 0 to 1"),
        ("tolerance", NAN, ValueError, "tolerance = nan: want 0 to 1"),
        ("tolerance", "0.1", TypeError, "tolerance is a str: want a float"),
        ("residual_max", -1.0, ValueError, "residual_max = -1.0.*: want a finite norm"),
        ("residual_max", INF, ValueError, "residual_max = inf: want a finite norm"),
        ("residual_max", NAN, ValueError, "residual_max = nan: want a finite norm"),
        ("residual_max", None, TypeError, "residual_max is a NoneType: want a float"),
        ("correlation_min", 1.01, ValueError, "correlation_min = 1.01.*: want 0 to 1"),
        ("correlation_min", -0.01, ValueError, "correlation_min = -0.01.*: want 0 to 1"),
        ("gain_min", 2, ValueError, "gain_min = 2.0.*: want 0 to 1"),
        ("gain_min", [0.1], TypeError, "gain_min is a list: want a float"),
        ("per_step", 0, ValueError, "per_step = 0: want at least 1"),
        ("per_step", 1.0, TypeError, "per_step is a float: want an int"),
        ("group", 0, ValueError, "group = 0: want a divisor of n_atoms = 4"),
        ("group", 3, ValueError, "group = 3: want a divisor of n_atoms = 4"),
        ("group", 4, ValueError, "group = 4: want .* of at most budget_max = 2"),
        ("coef", 1, TypeError, "coef is a int: want a bool"),
        (
            "design",
            "tall",
            ValueError,
            "design 'tall': want general, flat, deep, wide, quad or nothing",
        ),
        ("design", None, TypeError, "design is a NoneType: want a str"),
        ("start", torch.ones(2, 1), TypeError, "start is float32: want int32"),
        ("start", torch.ones(1, 2).int(), ValueError, r"start has shape \(1, 2\): want \(batch"),
        ("start", torch.ones(2).int(), ValueError, r"start has shape \(2,\): want \(batch"),
        ("start", torch.tensor([[0], [4]]).int(), ValueError, r"start\[1, 0\] = 4: want an atom"),
        ("start", torch.tensor([[-1], [0]]).int(), ValueError, r"start\[0, 0\] = -1: want an at"),
        ("start_count", torch.ones(2).int(), ValueError, "start_count without start: want both"),
        ("dictionary", torch.zeros(2).int(), ValueError, "gram has 2 axes beside dictionary"),
        ("dictionary", 0, TypeError, "dictionary is a int: want a torch.Tensor"),
        ("gram", torch.eye(4)[None], ValueError, "gram has 3 axes without dictionary"),
    ],
)
def test_refuses(name, value, error, message):
    with pytest.raises(error, match=r"\[omp\] " + message):
        ops.omp(**(arguments() | {name: value}))


@pytest.mark.parametrize("options", [{"per_step": 2}, {"group": 2}], ids=str)
def test_refuses_several_atoms_a_step_by_quad(options):
    with pytest.raises(ValueError, match=r"\[omp\] design quad with .*: want one atom a step"):
        ops.omp(**(arguments() | options), design="quad")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("start_count", torch.tensor([0, 3]).int(), ValueError, r"start_count\[1\] = 3: want 0 to"),
        ("start_count", torch.tensor([-1, 0]).int(), ValueError, r"start_count\[0\] = -1: want"),
        ("start_count", torch.ones(3).int(), ValueError, r"start_count has shape \(3,\): want"),
        ("start_count", torch.ones(2), TypeError, "start_count is float32: want int32"),
        ("dictionary", torch.tensor([0, 2]).int(), ValueError, r"dictionary\[1\] = 2: want 0 to 1"),
        ("dictionary", torch.tensor([-1, 0]).int(), ValueError, r"dictionary\[0\] = -1: want 0"),
        ("dictionary", torch.zeros(3).int(), ValueError, r"dictionary has shape \(3,\): want"),
        ("dictionary", torch.zeros(2), TypeError, "dictionary is float32: want int32"),
        ("gram", torch.zeros(0, 4, 4), ValueError, "n_dictionaries = 0: want at least 1"),
        ("gram", torch.zeros(2, 4, 5), ValueError, r"gram has shape \(2, 4, 5\): want"),
    ],
)
def test_refuses_beside_several_dictionaries_and_a_start(name, value, error, message):
    good = arguments() | {
        "gram": torch.eye(4).repeat(2, 1, 1),
        "dictionary": torch.tensor([0, 1], dtype=torch.int32),
        "start": torch.zeros(2, 2, dtype=torch.int32),
        "start_count": torch.ones(2, dtype=torch.int32),
    }
    ops.omp(**good)
    with pytest.raises(error, match=r"\[omp\] " + message):
        ops.omp(**(good | {name: value}))


def test_refuses_tensors_of_several_devices():
    with pytest.raises(ValueError, match=r"\[omp\] energy is on meta: want cpu or cuda"):
        ops.omp(**(arguments() | {"energy": torch.ones(2, device="meta")}))


def test_refuses_a_dictionary_without_atoms():
    empty = {"gram": torch.eye(0), "correlation": torch.ones(2, 0)}
    with pytest.raises(ValueError, match=r"\[omp\] budget_max = 2: want 1 to n_atoms = 0"):
        ops.omp(**(arguments() | empty))
