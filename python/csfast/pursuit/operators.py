"""Random sensing matrices by name, and what can be known of a dictionary before it is used.

Constructors draw ``phi (m, n)``, float32, on the device of their generator, scaled so that it keeps
squared norms on average; `csfast.ops.project` applies it. The first rows of one keep ``rows / m``
of the squared norm on average, and but for `sparse_sign` they are a smaller operator of its kind.
Analyses take any floating dictionary of atoms as columns and work in float64. Equations are in
``docs/math.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor

_BLOCK = 1024  # columns of the Gram matrix at a time: 115 MB in float64 beside 14,336 atoms


def gaussian(m: int, n: int, generator: Generator) -> Tensor:
    """Draw a matrix ``(m, n)`` of independent normal entries of variance ``1 / m``.

    Raises:
        ValueError: A size is below 1.

    Source:
        Candes, Tao, "Near-optimal signal recovery from random projections: universal encoding
        strategies?", IEEE Transactions on Information Theory 52, 2006.
    """
    _check_sizes("gaussian", m=m, n=n)
    drawn = torch.randn(m, n, generator=generator, device=generator.device)
    return drawn / math.sqrt(m)


def rademacher(m: int, n: int, generator: Generator) -> Tensor:
    """Draw a matrix ``(m, n)`` of independent entries of ``1 / sqrt(m)`` with random signs.

    Raises:
        ValueError: A size is below 1.

    Source:
        Achlioptas, "Database-friendly random projections: Johnson-Lindenstrauss with binary
        coins", Journal of Computer and System Sciences 66, 2003.
    """
    _check_sizes("rademacher", m=m, n=n)
    return _signs((m, n), generator) / math.sqrt(m)


def sparse_sign(m: int, n: int, s: int, generator: Generator) -> Tensor:
    """Draw a matrix ``(m, n)`` with `s` entries of ``+-1 / sqrt(s)`` a column, elsewhere zero.

    The sparse Johnson-Lindenstrauss transform: a column has its entries at distinct rows, all
    equally likely.

    Raises:
        ValueError: A size is below 1, or ``s > m``.

    Source:
        Kane, Nelson, "Sparser Johnson-Lindenstrauss transforms", Journal of the ACM 61, 2014.
    """
    _check_sizes("sparse_sign", m=m, n=n, s=s)
    if s > m:
        raise ValueError(f"[sparse_sign] s = {s} entries a column: want at most m = {m}.")
    order = torch.rand(m, n, generator=generator, device=generator.device)
    rows = order.argsort(dim=0, stable=True)[:s]
    phi = torch.zeros(m, n, device=generator.device)
    return phi.scatter_(0, rows, _signs((s, n), generator) / math.sqrt(s))


def subsampled_hadamard(m: int, n: int, generator: Generator) -> Tensor:
    """Draw `m` distinct rows of a Hadamard matrix whose columns have random signs, ``(m, n)``.

    The matrix is that of Sylvester, of the power of two ``N >= n``; what exceeds `n` columns is
    left out, as if the signal were padded with zeros. Entries are ``+-1 / sqrt(m)``.

    Raises:
        ValueError: A size is below 1, or ``m > N``.

    Source:
        Tropp, "Improved analysis of the subsampled randomized Hadamard transform", Advances in
        Adaptive Data Analysis 3, 2011.
    """
    _check_sizes("subsampled_hadamard", m=m, n=n)
    order = 1 << (n - 1).bit_length()
    if m > order:
        raise ValueError(
            f"[subsampled_hadamard] m = {m} rows: want at most {order}, the power of two that "
            f"holds n = {n}."
        )
    device = generator.device
    row = torch.randperm(order, generator=generator, device=device)[:m]
    common = row[:, None] & torch.arange(n, device=device)
    for shift in (32, 16, 8, 4, 2, 1):  # the lowest bit becomes the parity of all
        common ^= common >> shift
    return (1 - 2 * (common & 1)) * _signs((n,), generator) / math.sqrt(m)


def coherence(dictionary: Tensor) -> float:
    """Give the largest cosine of the angle between two atoms, at least 0 and at most 1.

    Of one atom alone it is 0. With ``n > m`` atoms it is at least
    ``sqrt((n - m) / (m (n - 1)))`` (Welch).

    Args:
        dictionary: Atoms as columns, ``(m, n)``, floating; their norms do not matter.

    Raises:
        ValueError: An atom is zero or not finite.
        TypeError: The dictionary is no floating matrix.

    Source:
        Donoho, Huo, "Uncertainty principles and ideal atomic decomposition", IEEE Transactions on
        Information Theory 47, 2001.
    """
    atoms = _normalized("coherence", dictionary)
    return max(min(float(block.max()), 1.0) for block in _cosines(atoms))


def babel(dictionary: Tensor, k: int) -> float:
    """Give the cumulative coherence: how much of one atom `k` others may imitate at worst.

    The largest sum of `k` cosines between an atom and others. By Gershgorin's theorem the squared
    singular values of any ``k`` atoms of unit norm lie within ``1 +- babel(dictionary, k - 1)``,
    and orthogonal matching pursuit recovers every combination of `k` atoms if
    ``babel(dictionary, k) + babel(dictionary, k - 1) < 1``.

    Args:
        dictionary: Atoms as columns, ``(m, n)``, floating; their norms do not matter.
        k: How many others, 0 to ``n - 1``.

    Raises:
        ValueError: `k` is out of range, or an atom is zero or not finite.
        TypeError: The dictionary is no floating matrix.

    Source:
        Tropp, "Greed is good: algorithmic results for sparse approximation", IEEE Transactions on
        Information Theory 50, 2004.
    """
    atoms = _normalized("babel", dictionary)
    if not 0 <= k < atoms.shape[1]:
        raise ValueError(f"[babel] k = {k}: want 0 to n - 1 = {atoms.shape[1] - 1}.")
    return max(float(block.topk(k, dim=1).values.sum(dim=1).max()) for block in _cosines(atoms))


def restricted_isometry(dictionary: Tensor, supports: Iterable[Tensor]) -> tuple[float, float]:
    """Give the extreme squared singular values of atoms of unit norm, over the supports given.

    ``max(1 - low, high - 1)`` is what the restricted isometry constant comes to on these supports,
    so a lower bound of it: all supports of a size are too many to try. Where ``low > 0`` the atoms
    of every support are independent.

    Args:
        dictionary: Atoms as columns, ``(m, n)``, floating; their norms do not matter.
        supports: Numbers of distinct atoms, ``(k,)`` int64 each; sizes may differ.

    Returns:
        The least and the largest over all supports; ``low`` is 0 where a support has more than `m`
        atoms.

    Raises:
        ValueError: No supports, an empty one, one with an atom that is not there or there twice, or
            an atom that is zero or not finite.
        TypeError: The dictionary is no floating matrix, or a support no int64 vector.

    Source:
        Candes, Tao, "Decoding by linear programming", IEEE Transactions on Information Theory 51,
        2005.
    """
    op = "restricted_isometry"
    atoms = _normalized(op, dictionary)
    m, n = atoms.shape
    low, high = math.inf, -math.inf
    for number, support in enumerate(supports):
        if support.dtype != torch.int64 or support.dim() != 1:
            raise TypeError(
                f"[{op}] support {number} is {support.dtype} of {support.dim()} axes: want int64 "
                "of one."
            )
        given = support.tolist()
        if not given or len(set(given)) < len(given) or not 0 <= min(given) <= max(given) < n:
            raise ValueError(
                f"[{op}] support {number} of {len(given)} atoms: want distinct ones, 0 to {n - 1}."
            )
        values = torch.linalg.svdvals(atoms[:, support]).square()
        low = min(low, float(values[-1]) if len(given) <= m else 0.0)
        high = max(high, float(values[0]))
    if low > high:
        raise ValueError(f"[{op}] no supports: want at least one.")
    return low, high


def sample_bound(k: int, n: int, c: float) -> float:
    """Give ``c k log(n / k)``: measurements that `k`-sparse signals of length `n` want.

    Args:
        k: Entries that are not zero, 1 to `n`.
        n: Length of the signal.
        c: Constant, positive. The theorems leave it open; measure it with a phase diagram.

    Raises:
        ValueError: An argument is out of range.

    Source:
        Candes, Tao, "Near-optimal signal recovery from random projections: universal encoding
        strategies?", IEEE Transactions on Information Theory 52, 2006; in this form Foucart,
        Rauhut, "A mathematical introduction to compressive sensing", chapter 9, 2013.
    """
    _check_bound("sample_bound", k, n, c)
    return c * k * math.log(n / k)


def block_sample_bound(k: int, n: int, block: int, c: float) -> float:
    """Give ``c (k block + k log(n / k))``: the same for `k` of `n` blocks that are not zero.

    Args:
        k: Blocks that are not zero, 1 to `n`.
        n: Blocks of the signal.
        block: Entries of a block, at least 1.
        c: Constant, positive.

    Raises:
        ValueError: An argument is out of range.

    Source:
        Baraniuk, Cevher, Duarte, Hegde, "Model-based compressive sensing", IEEE Transactions on
        Information Theory 56, 2010.
    """
    _check_bound("block_sample_bound", k, n, c)
    _check_sizes("block_sample_bound", block=block)
    return c * (k * block + k * math.log(n / k))


def _check_sizes(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"[{op}] {name} = {size}: want at least 1.")


def _check_bound(op: str, k: int, n: int, c: float) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"[{op}] k = {k} of n = {n}: want 1 <= k <= n.")
    if not 0 < c < math.inf:
        raise ValueError(f"[{op}] c = {c}: want a positive number.")


def _signs(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Independent signs, -1.0 or 1.0."""
    drawn = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return 2.0 * drawn - 1.0


def _normalized(op: str, dictionary: Tensor) -> Tensor:
    """The atoms in float64, of unit norm."""
    if dictionary.dim() != 2 or not dictionary.is_floating_point():
        raise TypeError(
            f"[{op}] dictionary is {dictionary.dtype} of {dictionary.dim()} axes: want a floating "
            "matrix (m, n)."
        )
    atoms = dictionary.detach().double()
    # Twice, by the largest entry first: squares neither overflow nor vanish.
    peak = atoms.abs().amax(dim=0) if atoms.shape[0] else atoms.new_zeros(atoms.shape[1])
    bad = ~((peak > 0) & peak.isfinite())
    if not atoms.shape[1] or bool(bad.any()):
        given = f"atom {int(bad.nonzero()[0])} is zero or not finite" if len(bad) else "no atoms"
        raise ValueError(f"[{op}] {given}: want atoms that have a direction.")
    atoms = atoms / peak
    unit: Tensor = atoms / torch.linalg.vector_norm(atoms, dim=0)
    return unit


def _cosines(atoms: Tensor) -> Iterator[Tensor]:
    """Magnitudes of the Gram matrix but for its diagonal, which is 0, some rows at a time."""
    for start in range(0, atoms.shape[1], _BLOCK):
        rows = (atoms[:, start : start + _BLOCK].T @ atoms).abs()
        rows.diagonal(start).zero_()
        yield rows
