"""Random sensing matrices and what is known of a dictionary: laws, and the theorems about them."""

import itertools
import math

import pytest
import torch

from csfast import ops
from csfast.pursuit import operators

DRAWS = {
    "gaussian": operators.gaussian,
    "rademacher": operators.rademacher,
    "sparse_sign": lambda m, n, generator: operators.sparse_sign(m, n, min(4, m), generator),
    "subsampled_hadamard": operators.subsampled_hadamard,
}
# Rounding of a float64 product of unit vectors of up to 100 entries, see numeric.dot_tolerance.
ROUNDING = 102 * 2.0**-52


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hadamard(n):
    """Sylvester's matrix, of entries +-1."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < n:
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    return made


def two_bases(m):
    """Identity and Hadamard: coherence 1 / sqrt(m), the least that two bases can have."""
    return torch.cat([torch.eye(m, dtype=torch.float64), hadamard(m) / math.sqrt(m)], dim=1)


def random_dictionary(m, n, seed=0):
    return torch.randn(m, n, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (16, 16), (40, 100), (64, 33)])
def test_constructors_give_what_they_say(name, m, n):
    phi = DRAWS[name](m, n, seeded())
    assert phi.shape == (m, n) and phi.dtype == torch.float32 and phi.is_contiguous()
    assert phi.isfinite().all()
    assert torch.equal(phi, DRAWS[name](m, n, seeded()))
    if m * n > 1:
        assert not torch.equal(phi, DRAWS[name](m, n, seeded(1)))


@pytest.mark.parametrize("name", ["rademacher", "sparse_sign", "subsampled_hadamard"])
def test_columns_of_signs_have_unit_norm(name):
    phi = DRAWS[name](40, 100, seeded()).double()
    # Up to 40 squares of a number that was rounded twice, to 2^-24 each.
    assert (phi.square().sum(dim=0) - 1).abs().max() <= 5 * 2.0**-24
    assert phi.abs().unique().numel() <= 2  # one magnitude, and zero


def test_gaussian_entries_have_the_moments_of_their_law():
    m, n = 100, 400
    phi = operators.gaussian(m, n, seeded()).double() * math.sqrt(m)
    count = m * n
    assert abs(phi.mean()) < 5 / math.sqrt(count)
    assert abs(phi.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(phi.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    # Columns are independent: no correlation of 100 entries beyond six standard deviations.
    assert operators.coherence(phi[:, :50]) < 6 / math.sqrt(m)


@pytest.mark.parametrize("name", DRAWS)
def test_operators_keep_squared_norms_on_average(name):
    """Johnson-Lindenstrauss: a relative standard deviation of at most sqrt(2 / m) for each vector.

    Those of 50 vectors by 64 operators are averaged; the vectors of one share its draw, so only the
    operators count as independent.
    """
    x = torch.randn(96, 50, generator=seeded(9), dtype=torch.float64)
    kept = [
        ((DRAWS[name](32, 96, seeded(s)).double() @ x).norm(dim=0) / x.norm(dim=0)).square().mean()
        for s in range(64)
    ]
    assert abs(torch.stack(kept).mean() - 1) < 5 * math.sqrt(2 / 32 / 64)


@pytest.mark.parametrize("s", [1, 3, 8])
def test_sparse_columns_have_so_many_entries_and_no_favourite_rows(s):
    m, n = 8, 4000
    phi = operators.sparse_sign(m, n, s, seeded())
    assert torch.equal((phi != 0).sum(dim=0), torch.full((n,), s))
    share, spread = s / m, math.sqrt(s / m * (1 - s / m) / n)
    assert ((phi != 0).double().mean(dim=1) - share).abs().max() <= 5 * spread
    positive = (phi > 0).sum() / (phi != 0).sum()
    assert abs(positive - 0.5) < 5 * 0.5 / math.sqrt(s * n)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_a_whole_hadamard_transform_is_orthonormal(n):
    phi = operators.subsampled_hadamard(n, n, seeded()).double()
    # Entries were rounded to 2^-24, twice.
    assert (phi @ phi.T - torch.eye(n)).abs().max() <= 2.0**-22
    assert (phi.T @ phi - torch.eye(n)).abs().max() <= 2.0**-22


def test_hadamard_rows_are_rows_of_the_hadamard_matrix():
    """Up to the signs of the columns, which two rows share: products of rows are rows again."""
    phi = operators.subsampled_hadamard(10, 12, seeded()).double().sign()
    rows = {tuple(row[:12].tolist()) for row in hadamard(16)}
    for one, other in itertools.combinations(phi, 2):
        assert tuple((one * other).tolist()) in rows
        assert not torch.equal(one, other)


def test_hadamard_columns_beyond_a_power_of_two_are_left_out():
    """Signs are drawn after the rows, so fewer columns see the same of both."""
    wide = operators.subsampled_hadamard(7, 16, seeded()).sign()
    narrow = operators.subsampled_hadamard(7, 11, seeded()).sign()
    assert torch.equal(narrow, wide[:, :11])


@pytest.mark.parametrize("name", DRAWS)
def test_first_rows_keep_their_share_of_squared_norms(name):
    """An eighth of the rows, of vectors that no draw knows; bound as in the test above."""
    x = torch.randn(96, 50, generator=seeded(9), dtype=torch.float64)
    kept = [
        ((DRAWS[name](32, 96, seeded(s))[:4].double() @ x).norm(dim=0) / x.norm(dim=0)).square()
        for s in range(64)
    ]
    assert abs(8 * torch.stack(kept).mean() - 1) < 5 * math.sqrt(2 / 4 / 64)


def test_coherence_of_what_is_known():
    assert operators.coherence(torch.eye(5)) == 0
    assert operators.coherence(hadamard(64)) == 0
    assert operators.coherence(torch.ones(3, 1)) == 0
    assert operators.coherence(torch.ones(3, 2)) == pytest.approx(1, abs=ROUNDING)
    assert operators.coherence(two_bases(64)) == pytest.approx(1 / 8, abs=ROUNDING)
    leaning = torch.tensor([[1.0, math.cos(0.3)], [0.0, math.sin(0.3)]], dtype=torch.float64)
    assert operators.coherence(leaning) == pytest.approx(math.cos(0.3), abs=ROUNDING)


def test_coherence_is_that_of_all_pairs():
    atoms = random_dictionary(20, 50)
    unit = atoms / atoms.norm(dim=0)
    pairs = itertools.combinations(unit.T, 2)
    want = max(abs(float(a @ b)) for a, b in pairs)
    assert operators.coherence(atoms) == pytest.approx(want, abs=ROUNDING)
    assert want >= math.sqrt((50 - 20) / (20 * 49))  # Welch


def test_duplicate_and_opposite_atoms_are_coherent():
    atoms = random_dictionary(20, 50)
    atoms[:, 33] = -3 * atoms[:, 7]
    assert operators.coherence(atoms) == pytest.approx(1, abs=ROUNDING)
    assert operators.coherence(atoms) <= 1
    low, high = operators.restricted_isometry(atoms, [torch.tensor([7, 33])])
    assert low == pytest.approx(0, abs=ROUNDING) and high == pytest.approx(2, abs=2 * ROUNDING)


@pytest.mark.parametrize("block", [1, 7, 50])
def test_cosines_in_blocks_are_the_same(block, monkeypatch):
    atoms = random_dictionary(20, 50)
    want = operators.coherence(atoms), operators.babel(atoms, 5)
    monkeypatch.setattr(operators, "_BLOCK", block)
    got = operators.coherence(atoms), operators.babel(atoms, 5)
    assert got == pytest.approx(want, abs=6 * ROUNDING)


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**500])
def test_norms_of_atoms_do_not_matter(scale):
    atoms = random_dictionary(20, 30)
    support = [torch.arange(6)]
    want = (
        operators.coherence(atoms),
        operators.babel(atoms, 4),
        operators.restricted_isometry(atoms, support),
    )
    scaled = atoms.clone()
    scaled[:, ::2] *= scale
    assert operators.coherence(scaled) == want[0]
    assert operators.babel(scaled, 4) == want[1]
    assert operators.restricted_isometry(scaled, support) == want[2]


def test_babel_of_what_is_known():
    atoms = random_dictionary(20, 50)
    assert operators.babel(atoms, 0) == 0
    assert operators.babel(atoms, 1) == operators.coherence(atoms)
    assert operators.babel(torch.eye(6), 5) == 0
    # An atom of one basis leans on eight of the other, by 1 / 8 each.
    assert operators.babel(two_bases(64), 8) == pytest.approx(1, abs=8 * ROUNDING)
    assert operators.babel(torch.ones(4, 6), 5) == pytest.approx(5, abs=5 * ROUNDING)


def test_babel_grows_and_is_subadditive():
    """What j + k others imitate, the j nearest and the k nearest do together at least."""
    atoms = random_dictionary(20, 50)
    values = [operators.babel(atoms, k) for k in range(50)]
    slack = 50 * ROUNDING
    assert all(later >= earlier for earlier, later in itertools.pairwise(values))
    for j, k in itertools.product(range(1, 25), repeat=2):
        assert values[j + k] <= values[j] + values[k] + slack


def test_restricted_isometry_of_what_is_known():
    every = [torch.tensor(pair) for pair in itertools.combinations(range(8), 3)]
    low, high = operators.restricted_isometry(hadamard(8), every)
    assert low == pytest.approx(1, abs=4 * ROUNDING) and high == pytest.approx(1, abs=4 * ROUNDING)
    single = operators.restricted_isometry(random_dictionary(9, 20), [torch.tensor([4])])
    assert single == pytest.approx((1, 1), abs=ROUNDING)
    leaning = torch.tensor([[1.0, math.cos(0.3)], [0.0, math.sin(0.3)]], dtype=torch.float64)
    pair = operators.restricted_isometry(leaning, [torch.arange(2)])
    assert pair == pytest.approx((1 - math.cos(0.3), 1 + math.cos(0.3)), abs=4 * ROUNDING)
    low, high = operators.restricted_isometry(random_dictionary(3, 9), [torch.arange(5)])
    assert low == 0 and high >= 5 / 3 - ROUNDING  # of five unit vectors in three dimensions


def test_restricted_isometry_widens_with_the_supports():
    atoms = random_dictionary(30, 60)
    draw = seeded(2)
    supports = [torch.randperm(60, generator=draw)[:8] for _ in range(30)]
    few = operators.restricted_isometry(atoms, supports[:10])
    many = operators.restricted_isometry(atoms, iter(supports))
    more = operators.restricted_isometry(atoms, [torch.cat([s, s.new_tensor([a])])
        for s in supports for a in range(60) if a not in s])  # fmt: skip
    assert more[0] <= many[0] <= few[0] < 1 < few[1] <= many[1] <= more[1]


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_gershgorin_bounds_the_isometry(k):
    atoms = torch.cat([two_bases(64), random_dictionary(64, 20) * 0.01], dim=1)
    draw = seeded(k)
    supports = [torch.randperm(148, generator=draw)[:k] for _ in range(50)]
    low, high = operators.restricted_isometry(atoms, supports)
    radius = operators.babel(atoms, k - 1)
    assert 1 - radius - k * ROUNDING <= low <= high <= 1 + radius + k * ROUNDING


def test_pursuit_recovers_what_the_cumulative_coherence_promises(device):
    """Two bases of 64: babel(4) + babel(3) = 7 / 8 < 1, so every four atoms are found."""
    atoms = two_bases(64)
    k = 4
    assert operators.babel(atoms, k) + operators.babel(atoms, k - 1) < 1
    assert operators.babel(atoms, k + 1) + operators.babel(atoms, k) >= 1
    draw = seeded(5)
    supports = torch.rand(300, 128, generator=draw).argsort(dim=1)[:, :k].sort(dim=1).values
    coef = torch.zeros(300, 128, dtype=torch.float64)
    size = torch.exp2(3 * torch.rand(300, k, generator=draw).double())
    coef.scatter_(1, supports, size * torch.randint(0, 2, (300, k), generator=draw).mul(2).sub(1))
    signal = coef @ atoms.T
    found = ops.omp(
        (atoms.T @ atoms).float().to(device),
        (signal @ atoms).float().to(device),
        signal.square().sum(dim=1).float().to(device),
        torch.full((300,), k, dtype=torch.int32, device=device),
        budget_max=k,
    )
    assert torch.equal(found.index.sort(dim=1).values.long().cpu(), supports)


@pytest.mark.parametrize("name", DRAWS)
def test_enough_measurements_recover_what_is_sparse(name, device):
    """Five of 256 entries from 160 measurements, through `ops.project`."""
    k, n, m = 5, 256, 160
    assert m > operators.sample_bound(k, n, 5.0)
    phi = DRAWS[name](m, n, seeded(3)).to(device)
    draw = seeded(4)
    supports = torch.rand(40, n, generator=draw).argsort(dim=1)[:, :k].sort(dim=1).values
    signs = 2.0 * torch.randint(0, 2, (40, k), generator=draw) - 1
    x = torch.zeros(40, n).scatter_(1, supports, signs).to(device)
    y = ops.project(phi, x)
    found = ops.omp(
        phi.T @ phi,
        ops.project(phi.T.contiguous(), y),
        y.square().sum(dim=1),
        torch.full((40,), k, dtype=torch.int32, device=device),
        budget_max=k,
    )
    assert torch.equal(found.index.sort(dim=1).values.long().cpu(), supports)


def test_sample_bounds():
    assert operators.sample_bound(1, math.e.__ceil__(), 1.0) == pytest.approx(math.log(3))
    assert operators.sample_bound(8, 1024, 2.0) == 16 * math.log(128)
    assert operators.sample_bound(7, 7, 3.0) == 0
    assert operators.block_sample_bound(8, 1024, 16, 2.0) == 2 * (128 + 8 * math.log(128))
    # Blocks of one: k more, as every entry has a value besides a place.
    one = operators.block_sample_bound(8, 1024, 1, 2.0)
    assert one == pytest.approx(operators.sample_bound(8, 1024, 2.0) + 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: operators.gaussian(0, 5, g), ValueError, r"\[gaussian\] m = 0: want at least 1"),
        (lambda g: operators.gaussian(5, -1, g), ValueError, r"\[gaussian\] n = -1: want"),
        (lambda g: operators.rademacher(5, 0, g), ValueError, r"\[rademacher\] n = 0: want"),
        (lambda g: operators.sparse_sign(5, 5, 0, g), ValueError, r"\[sparse_sign\] s = 0: want"),
        (lambda g: operators.sparse_sign(5, 9, 6, g), ValueError, r"s = 6 .*: want at most m = 5"),
        (lambda g: operators.subsampled_hadamard(0, 9, g), ValueError, "m = 0: want at least 1"),
        (lambda g: operators.subsampled_hadamard(17, 9, g), ValueError, "m = 17 .* at most 16"),
        (lambda g: operators.coherence(torch.ones(3)), TypeError, "of 1 axes: want a floating"),
        (lambda g: operators.coherence(torch.ones(3, 3).long()), TypeError, "is torch.int64"),
        (lambda g: operators.coherence(torch.ones(3, 0)), ValueError, r"\[coherence\] no atoms"),
        (lambda g: operators.coherence(torch.ones(0, 3)), ValueError, "atom 0 is zero"),
        (lambda g: operators.babel(torch.eye(3), 3), ValueError, r"k = 3: want 0 to n - 1 = 2"),
        (lambda g: operators.babel(torch.eye(3), -1), ValueError, r"\[babel\] k = -1: want"),
        (lambda g: operators.babel(torch.zeros(3, 3), 1), ValueError, r"\[babel\] atom 0 is zero"),
        (lambda g: operators.sample_bound(0, 5, 1.0), ValueError, "k = 0 of n = 5: want 1 <= k"),
        (lambda g: operators.sample_bound(6, 5, 1.0), ValueError, "k = 6 of n = 5: want"),
        (lambda g: operators.sample_bound(2, 5, 0.0), ValueError, "c = 0.0: want a positive"),
        (lambda g: operators.sample_bound(2, 5, math.nan), ValueError, "c = nan: want a positive"),
        (lambda g: operators.sample_bound(2, 5, math.inf), ValueError, "c = inf: want a positive"),
        (lambda g: operators.block_sample_bound(2, 5, 0, 1.0), ValueError, "block = 0: want at"),
        (lambda g: operators.block_sample_bound(9, 5, 1, 1.0), ValueError, "k = 9 of n = 5: want"),
    ],
)  # fmt: skip
def test_refuses(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(seeded())
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_refuses_an_atom_without_a_direction(value):
    atoms = random_dictionary(5, 6)
    atoms[:, 4] = value
    with pytest.raises(ValueError, match=r"\[restricted_isometry\] atom 4 is zero or not finite"):
        operators.restricted_isometry(atoms, [torch.arange(2)])


@pytest.mark.parametrize(
    ("supports", "error", "message"),
    [
        ([], ValueError, "no supports: want at least one"),
        ([[0, 1], []], ValueError, "support 1 of 0 atoms: want distinct ones, 0 to 5"),
        ([[0, 0]], ValueError, "support 0 of 2 atoms: want distinct"),
        ([[0, 6]], ValueError, "support 0 of 2 atoms: want distinct"),
        ([[-1, 2]], ValueError, "support 0 of 2 atoms: want distinct"),
        ([[[0, 1]]], TypeError, "support 0 is torch.int64 of 2 axes: want int64 of one"),
    ],
)
def test_refuses_supports_that_are_none(supports, error, message):
    given = [torch.tensor(s, dtype=torch.int64) for s in supports]
    with pytest.raises(error, match=rf"^\[restricted_isometry\] {message}"):
        operators.restricted_isometry(random_dictionary(5, 6), given)


def test_refuses_supports_of_another_type():
    with pytest.raises(TypeError, match=r"support 0 is torch\.int32 of 1 axes: want int64 of one"):
        operators.restricted_isometry(torch.eye(4), [torch.arange(2, dtype=torch.int32)])
