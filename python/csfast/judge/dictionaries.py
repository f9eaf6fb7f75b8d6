"""What theory promises of the dictionaries of every layer: coherence and restricted isometry.

Two kinds: the columns of a random operator that measures groups, and the rows of the gate and up
matrices that few-bit and low-rank sensors stand for, with lengths and angles as the layer's inputs
see them. Equations 21 to 23 and 54 in docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .. import models
from ..codes import planes
from ..judge import Progress
from ..pursuit import operators
from .rules import Fit

DENSITY = 0.25  # of the supports
SUPPORTS = 16  # of each kind: the extremes over more are further apart, slowly
ROWS = 2000  # positions that the mean usage of a group is taken over
RIDGE = 1e-4  # of the inputs' second moment, as a share of its mean: keeps it invertible


@torch.no_grad()
def analyse(
    fit: Fit,
    *,
    n_groups: int = 128,
    ratio: float = 0.5,
    density: float = DENSITY,
    bits: Sequence[int] = (2, 3),
    rank: int | None = None,
    n_supports: int = SUPPORTS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure coherence and empirical restricted isometry of the dictionaries of every layer.

    Supports are those of largest usage of tokens that the model was fitted to, and random ones of
    the same size.

    Args:
        fit: A model with inputs of its layers, see `phase.capture`.
        n_groups: Groups of a layer, at least 2; fewer if blocks of whole neurons come to fewer.
        ratio: Measurements of the random operator over groups, in (0, 1].
        density: Share of the groups or neurons in a support, in (0, 1).
        bits: Few-bit codes to look at.
        rank: Of the low-rank rows; an eighth of the channels if left out.
        n_supports: Supports of each kind, at least 1.
        progress: Called with layers done and their number.

    Returns:
        What ``csfast phase --dictionaries`` writes; docs/schemas.md explains every key.

    Raises:
        ValueError: A number is out of range.
    """
    if n_groups < 2:
        raise ValueError(f"[dictionaries] n_groups = {n_groups}: want at least 2.")
    if not 0 < ratio <= 1:
        raise ValueError(f"[dictionaries] ratio = {ratio}: want one in (0, 1].")
    if not 0 < density < 1:
        raise ValueError(f"[dictionaries] density = {density}: want one in (0, 1).")
    if n_supports < 1:
        raise ValueError(f"[dictionaries] n_supports = {n_supports}: want at least 1.")
    least = min(ffn.shape.d for ffn in fit.ffns)
    rank = max(1, least // 8) if rank is None else rank
    if not 1 <= rank <= least:
        raise ValueError(f"[dictionaries] rank = {rank}: want 1 to {least}.")
    report = progress or (lambda done, total: None)
    layers = []
    for layer in range(len(fit.ffns)):
        layers.append(
            {
                "groups": _groups(fit, layer, n_groups, ratio, density, n_supports),
                "rows": _rows(fit, layer, density, bits, rank, n_supports),
            }
        )
        report(layer + 1, len(fit.ffns))
    return {
        "ratio": ratio,
        "density": density,
        "supports": n_supports,
        "layers": layers,
        "seed": fit.seed,
        "model_hash": models.fingerprint(fit.model).model_hash,
    }


def facts(
    name: str,
    dictionary: Tensor,
    used: Sequence[Tensor],
    drawn: Sequence[Tensor],
    *,
    weighted: bool = False,
) -> dict[str, Any]:
    """Say what is known of one dictionary.

    Args:
        name: What it is.
        dictionary: Atoms as columns, ``(m, n)``, floating. Atoms that are zero are left out.
        used: Supports that occur, ``(k,)`` int64 each, at least one that is not all of zero atoms.
        drawn: Random supports, likewise.
        weighted: Whether the lengths of the atoms count in the restricted isometry: then squared
            singular values are given over the mean squared length of a support's atoms.

    Returns:
        Its sizes, its coherence and the least that there can be, its cumulative coherence over the
        largest support, how many atoms may be combined at will and are recovered for certain
        (eq. 54), and the extreme squared singular values over supports that are used and drawn.
    """
    live = dictionary.square().sum(dim=0) > 0
    number = live.cumsum(dim=0) - 1
    atoms = dictionary[:, live].double()
    m, n = atoms.shape
    found: dict[str, Any] = {
        "name": name,
        "m": m,
        "n": n,
        "k": max(len(support) for support in used),
        "coherence": operators.coherence(atoms),
        "welch": welch(m, n),
        "guaranteed": guaranteed(atoms),
        "weighted": weighted,
    }
    found["babel"] = operators.babel(atoms, min(found["k"], n) - 1)
    for kind, supports in (("used", used), ("drawn", drawn)):
        inside = [number[support[live[support]]] for support in supports]
        inside = [support for support in inside if len(support)]
        isometry = weighted_isometry if weighted else operators.restricted_isometry
        found[kind] = list(isometry(atoms, inside))
    return found


def guaranteed(dictionary: Tensor) -> int:
    """Give how many atoms may be combined at will such that pursuit finds them (eq. 54).

    The largest `k` with ``babel(k) + babel(k - 1) < 1``. It is at least what the coherence ``mu``
    promises by itself, ``k < (1 + 1 / mu) / 2``.

    Args:
        dictionary: Atoms as columns, ``(m, n)``, floating.

    Source:
        Tropp, "Greed is good: algorithmic results for sparse approximation", IEEE Transactions on
        Information Theory 50, 2004.
    """
    m, n = dictionary.shape
    coherence = operators.coherence(dictionary)
    if coherence >= 0.5:
        # babel(2) is no less, so two are too many; parallel atoms cannot be told apart at all.
        return 0 if 1 - coherence <= (m + 2) * torch.finfo(torch.float64).eps else 1
    before = 0.0
    for k in range(1, n):
        now = operators.babel(dictionary, k)
        if before + now >= 1:
            return k - 1
        before = now
    return n if 2 * before < 1 else n - 1


def welch(m: int, n: int) -> float:
    """Give the least coherence that `n` atoms of `m` entries can have.

    Source:
        Welch, "Lower bounds on the maximum cross correlation of signals", IEEE Transactions on
        Information Theory 20, 1974.
    """
    return math.sqrt((n - m) / (m * (n - 1))) if n > m else 0.0


def weighted_isometry(dictionary: Tensor, supports: Sequence[Tensor]) -> tuple[float, float]:
    """Give the extreme squared singular values of atoms as long as they are, over supports.

    They are given over the mean squared length of a support's atoms; for atoms of one length they
    are those of `operators.restricted_isometry`.

    Args:
        dictionary: Atoms as columns, ``(m, n)``, float64, none of them zero.
        supports: Numbers of distinct atoms, ``(k,)`` int64 each; at least one.
    """
    low, high = math.inf, -math.inf
    for support in supports:
        some = dictionary[:, support]
        values = torch.linalg.svdvals(some).square() / some.square().sum(dim=0).mean()
        low = min(low, float(values[-1]) if len(support) <= len(some) else 0.0)
        high = max(high, float(values[0]))
    return low, high


def _groups(
    fit: Fit, layer: int, n_groups: int, ratio: float, density: float, n_supports: int
) -> list[dict[str, Any]]:
    """The random operator of one layer, by itself and weighted by what groups contribute."""
    layout = fit.layouts(-(-fit.ffns[layer].shape.n_neurons // n_groups))[layer]
    n = layout.n_blocks
    draw = fit.generator(layer, 0)
    phi = operators.gaussian(max(1, round(ratio * n)), n, draw).double()
    usage = layout.grouped(fit.usage(layer, rows=n_supports)).cpu()
    weight = layout.grouped(fit.usage(layer, rows=ROWS)).square().mean(dim=0).sqrt().cpu().double()
    k = max(1, round(density * n))
    used, drawn = _largest(usage, k), _drawn(n, k, n_supports, draw)
    return [
        facts("Phi", phi, used, drawn),
        facts("Phi, weighted by usage", phi * weight, used, drawn, weighted=True),
    ]


def _rows(
    fit: Fit, layer: int, density: float, bits: Sequence[int], rank: int, n_supports: int
) -> list[dict[str, Any]]:
    """Gate and up rows of one layer, exact and as the sensors have them."""
    ffn = fit.ffns[layer]
    n = ffn.shape.n_neurons
    moment = fit.moment(layer)
    ridge = RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    # Any root of the second moment gives the lengths and angles that the inputs see.
    root = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment)).to(moment)).T
    equal = planes.equalizer(moment.diagonal()).to(moment.device)
    k = max(1, round(density * n))
    used = [support.to(moment.device) for support in _largest(fit.usage(layer, rows=n_supports), k)]
    drawn = [s.to(moment.device) for s in _drawn(n, k, n_supports, fit.generator(layer, 1))]
    found = []
    for side, linear in (("gate", ffn.gate), ("up", ffn.up)):
        weight = linear.weight.detach()
        kinds = {f"{side}": root @ weight.double().T}
        for b in bits:
            scale = planes.fit_scale(weight, equal, b)
            code = planes.unpack(planes.encode(weight, equal, scale, b), b, weight.shape[1])
            # Lengths do not matter, so neither does the scale of a row.
            kinds[f"{side}, {b} bits"] = root @ (equal * (2 * code.float() - (2**b - 1))).double().T
        left, _ = fit.right_factors(layer, up=side == "up")
        kinds[f"{side}, rank {rank}"] = left[:, :rank].T
        found += [facts(name, atoms, used, drawn) for name, atoms in kinds.items()]
    return found


def _largest(usage: Tensor, k: int) -> list[Tensor]:
    """Supports of the `k` largest of every row; ties to the lower index."""
    return list(usage.argsort(dim=1, descending=True, stable=True)[:, :k])


def _drawn(n: int, k: int, count: int, generator: Generator) -> list[Tensor]:
    """Random supports of `k` of `n`."""
    return [torch.randperm(n, generator=generator)[:k] for _ in range(count)]
