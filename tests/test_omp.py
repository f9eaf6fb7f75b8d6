import warnings

import pytest
import torch

from csfast import ops, reference
from csfast.cases import PURSUITS, PursuitCase
from csfast.ops import PursuitStatus
from numeric import EPS_F32, assert_within

INF, NAN = float("inf"), float("nan")
MARGIN = 1e-5  # two scores that are nearer than this, relatively, float32 may confuse
STANDARD = PURSUITS[-1]
SMALL = PursuitCase("small", batch=20, m=64, n_atoms=128, n_nonzero=4)


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


def omp_tolerance(problem, row, chosen):
    """Bounds on the errors of coef ``(len(chosen),)`` and of the squared residual, float64.

    What omp solves differs from the problem by the rounding of gram and correlation and of one
    subtraction a step, n + 2 roundings of numbers of at most |c| + |G| |x|; solving magnifies that
    by |inverse of G| (Higham, Accuracy and Stability of Numerical Algorithms, 2002, theorem 7.2).
    The energy explained, c' x, feels it once by c and once by x, and energy itself rounds once.
    """
    gram = problem.gram[chosen][:, chosen]
    c = problem.correlation[row, chosen]
    x = torch.linalg.solve(gram, c)
    inverse = torch.linalg.matrix_norm(torch.linalg.inv(gram), 2)
    data = (len(chosen) + 2) * EPS_F32 * (c.norm() + torch.linalg.matrix_norm(gram, 2) * x.norm())
    coef = inverse * data
    square = 2 * (coef * c.norm() + data * x.norm()) + EPS_F32 * problem.energy[row]
    return coef.expand(len(chosen)), square


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("case", PURSUITS, ids=lambda c: c.name)
def test_matches_reference(case, tolerance, device):
    problem = case.make()
    budget = case.n_nonzero
    got = run(problem, device, budget, budget_max=budget, tolerance=tolerance)
    rejected = 0
    for row in range(case.batch):
        want = reference.omp(
            problem.gram,
            problem.correlation[row],
            float(problem.energy[row]),
            budget,
            tolerance=tolerance,
        )
        near_end = any(
            abs(e / want.energies[0] - tolerance) < MARGIN for e in want.energies if tolerance
        )
        if want.margin < MARGIN or near_end:
            rejected += 1
            continue
        assert atoms_of(got, row) == want.index, row
        count = len(want.index)
        coef, square = omp_tolerance(problem, row, want.index)
        assert_within(got.coef[row, :count].cpu(), want.coef, coef)
        residual = got.residual[row].cpu().double()
        assert_within(residual.square(), torch.tensor(want.energies[-1]).double(), square)
        # A residual of nothing but rounding ends by chance within the tolerance or not.
        if case.name != "smallest":
            assert PursuitStatus(int(got.status[row])).name.lower() == want.status, row
        assert not got.index[row, count:].any() and not got.coef[row, count:].any()
    assert rejected <= 0.05 * case.batch


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
        tolerance, _ = omp_tolerance(problem, row, chosen)
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


@pytest.mark.parametrize("exponent", [-40, -1, 1, 40])
def test_scaling_by_a_power_of_two_scales_every_bit(exponent, device):
    problem = STANDARD.make()
    want = run(problem, device, 32, budget_max=32)
    got = run(problem, device, 32, scale=2.0**exponent, budget_max=32)
    for name in ("index", "count", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.coef, want.coef * 2.0**exponent)
    assert torch.equal(got.residual, want.residual * 2.0**exponent)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
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


def test_permuting_the_batch_permutes_the_result(device):
    problem = STANDARD.make()
    gram, correlation, energy = given(problem, device)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3)).to(device)
    budget = filled(200, 32, device)
    got = ops.omp(gram, correlation, energy, budget, budget_max=32)
    permuted = ops.omp(gram, correlation[order], energy[order], budget, budget_max=32)
    for name in ("index", "coef", "count", "residual", "status"):
        assert torch.equal(getattr(got, name)[order], getattr(permuted, name))


def test_two_runs_agree_bit_for_bit(device):
    problem = STANDARD.make(seed=2)
    assert_equal(run(problem, device, 32, budget_max=32), run(problem, device, 32, budget_max=32))


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
        tolerance, _ = omp_tolerance(problem, row, chosen)
        assert_within(got.coef[row].cpu(), want[row, chosen], tolerance)


def test_is_registered_with_torch(device):
    """Schema, fake kernel and functionalisation, as torch itself checks them."""
    tensors = (*given(SMALL.make(), device), filled(SMALL.batch, 4, device))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.csfast.omp.default, (*tensors, 4, 0.0), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_replays_follow_signal_and_budget():
    problem = SMALL.make()
    gram, correlation, energy = given(problem, "cuda")
    budget = filled(SMALL.batch, 4, "cuda")
    ops.omp(gram, correlation, energy, budget, budget_max=16)  # kernels load at their first run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.omp(gram, correlation, energy, budget, budget_max=16)
    for seed, atoms in ((1, 16), (2, 0), (3, 9)):
        _, c, e = given(SMALL.make(seed=seed), "cuda")
        correlation.copy_(c)
        energy.copy_(e)
        budget.fill_(atoms)
        graph.replay()
        assert_equal(got, ops.omp(gram, correlation, energy, budget, budget_max=16))


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
        ("gram", torch.ones(4), ValueError, r"gram has shape \(4,\): want"),
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
    ],
)
def test_refuses(name, value, error, message):
    with pytest.raises(error, match=r"\[omp\] " + message):
        ops.omp(**(arguments() | {name: value}))


def test_refuses_tensors_of_several_devices():
    with pytest.raises(ValueError, match=r"\[omp\] energy is on meta: want cpu or cuda"):
        ops.omp(**(arguments() | {"energy": torch.ones(2, device="meta")}))


def test_refuses_a_dictionary_without_atoms():
    empty = {"gram": torch.eye(0), "correlation": torch.ones(2, 0)}
    with pytest.raises(ValueError, match=r"\[omp\] budget_max = 2: want 1 to n_atoms = 0"):
        ops.omp(**(arguments() | empty))
