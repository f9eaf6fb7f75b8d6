"""Every operation once more, in plain torch and float64. Tests take their truth from here.

What the specification rounds (the quantised activation) is rounded here in the same precision, so
that integers agree exactly; everything else is float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .codes import planes, trellis
from .codes.levels import GROUP, Packed, factor, unpack
from .codes.rotation import Rotation, butterflies
from .types import Code

NOTHING = 2.0**-36  # share of the energy that an atom must explain to be taken, see omp.h
# Share of an atom that is not in the span of those taken, times the least such share of these, that
# an atom must exceed to be taken, see omp.h.
PIVOT = 2.0**-18


def code_with_feedback(
    weight: Tensor, scale: Tensor, bits: Code, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Give codes ``(n, d)`` that make up for each other's errors, and what each was rounded from.

    Column by column: the error of one moves those after it to where the mean squared error of the
    output is least (eq. 42, without the factorisation that spares inverting a matrix a column).

    Args:
        weight: ``(n, d)``, divided by the equaliser.
        scale: ``(n,)``.
        bits: Code of a weight.
        moment: Second moment of the equalised inputs, ``(d, d)``, positive definite.
    """
    left, h, m = weight.double().clone(), scale.double()[:, None], moment.double()
    levels = planes.levels_of(torch.arange(planes.n_codes(bits)), bits).double()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for c in range(weight.shape[1]):
        codes[:, c] = (left[:, c, None] - h * levels).abs().argmin(dim=1).to(torch.uint8)
        error = left[:, c] - h[:, 0] * levels[codes[:, c].long()]
        rest = torch.linalg.inv(m[c:, c:])[0]
        left[:, c + 1 :] -= error[:, None] * rest[1:] / rest[0]
    return codes, left


def sense(codes: Tensor, equal: Tensor, x: Tensor, *, bits: Code) -> tuple[Tensor, Tensor]:
    """Give ``y (batch, n_neurons, 2)`` int32 and ``scale (batch,)`` float32."""
    n_neurons, d = codes.shape[0], x.shape[1]
    q, scale = planes.quantize(x, equal)
    value = planes.levels_of(planes.unpack(codes.flatten(0, 1), bits, d), bits).double()
    y = q.double() @ value.T
    return y.to(torch.int32).view(-1, n_neurons, 2), scale


def nested(levels: Sequence[Packed], equal: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``y (batch, n_neurons, 2)`` float64 and ``scale (batch,)`` float32."""
    n_neurons, d = levels[0].codes.shape[0], x.shape[1]
    q, scale = planes.quantize(x, equal)
    y = torch.zeros(len(q), 2 * n_neurons, dtype=torch.float64, device=x.device)
    for packed in levels:
        level = unpack(packed, d)
        fraction = factor(level.exponent).double().repeat_interleave(GROUP, dim=1)[:, :d]
        value = planes.levels_of(level.codes, level.bits).double() * fraction
        y += q.double() @ value.T * level.top.double() / 2
    return y.view(-1, n_neurons, 2), scale


def encode(
    w: Tensor, feedback: Tensor, step: Tensor, *, bits: int, nu: int = trellis.NU
) -> tuple[Tensor, Tensor]:
    """Give the indices of levels and the bits u, both ``(rows, cols)`` uint8, in float64."""
    left, factor = w.double().clone(), feedback.double()
    levels = trellis.table(bits)
    index = torch.zeros(w.shape, dtype=torch.uint8)
    u = torch.zeros_like(index)
    for c in range(w.shape[1]):
        target = torch.where(step > 0, left[:, c] / step.double(), 0.0)
        index[:, c], u[:, c] = trellis.encode(target, levels, weight=step.double().square(), nu=nu)
        error = left[:, c] - step.double() * levels[index[:, c].int()].double()
        left[:, c + 1 :] -= error[:, None] / factor[c, c] * factor[c, c + 1 :]
    return index, u


def sketch(codes: Sequence[Tensor], step: Sequence[Tensor], turn: Tensor, x: Tensor) -> Tensor:
    """Give ``y (batch, rows)``: float64, but for the rounding of inputs to int8, in float32."""
    rows, cols = len(step[0]), len(turn)
    there = Rotation.of(turn)
    z = butterflies(x.float()[:, there.perm.long()] * there.scale, there.block)
    most = z.abs().amax(1, keepdim=True)
    q = torch.where(most > 0, torch.round(z * (127 / most)), 0.0).double()
    y = torch.zeros(len(x), rows, dtype=torch.float64)
    for level, steps in zip(codes, step, strict=True):
        y += q @ trellis.values(level, rows, cols).double().T * steps.double()
    scale: Tensor = most / 127 * math.sqrt(1 / there.block)
    return y * scale.double()


def linear(w: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Give ``y (batch, rows)``: float64, of inputs that are rounded to the dtype of `w`."""
    y = x.to(w.dtype).double() @ w.double().T
    return y if bias is None else y + bias.double()


def project(phi: Tensor, x: Tensor, *, rows: int | None = None) -> Tensor:
    """Give the measurements ``(batch, rows)`` by the first rows of `phi`, float64."""
    return x.double() @ phi[:rows].double().T


def activate(z: Tensor, activation: str = "silu") -> Tensor:
    """Give what the gate goes through: ``silu`` or ``gelu_tanh``."""
    if activation == "silu":
        return torch.nn.functional.silu(z)
    # 0.5 (1 + tanh(t)) as 1 / (1 + exp(-2 t)), which keeps its digits where 1 + tanh loses them.
    return z * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))


def usage(
    y: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    offset: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Give the usage ``(batch, n_neurons)`` that measurements of one or two columns promise."""
    v = scale.double()[:, None, None] * row_scale.double() * y.double()
    if offset is not None:
        v = v + offset.double()
    if v.shape[2] == 1:
        return v[..., 0].abs()
    return (activate(v[..., 0], activation) * v[..., 1]).abs()


def group(usage: Tensor, group_rows: int) -> Tensor:
    """Give the usage ``(batch, n_groups)`` of groups of neighbouring neurons, float64."""
    padded = torch.nn.functional.pad(usage.double(), (0, -usage.shape[1] % group_rows))
    n_groups = padded.shape[1] // group_rows
    return padded.view(usage.shape[0], n_groups, group_rows).square().sum(dim=2).sqrt()


def joint(usage: Tensor, weight: Tensor) -> Tensor:
    """Give the usage ``(1, n_groups)`` of a batch that decides together, float64."""
    votes = weight != 0
    return (weight[votes].double()[:, None] * usage[votes].double()).sum(dim=0, keepdim=True)


def keep_threshold(
    usage: Tensor,
    threshold: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    cap: Tensor | None = None,
) -> Tensor:
    """Give the mask ``(lists, n_groups)`` of what the threshold keeps; NaN keeps.

    With weights, usage is that of `joint`. With a cap ``(lists,)``, no list keeps more than the
    largest so many.
    """
    keep = ~(usage < threshold.double()[:, None])
    if cap is not None:
        keep = keep & _is_top(usage, cap)
    return _overruled(keep, scale, weight)


def _overruled(keep: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    """What a scale that is not finite, or the want of any vote, makes of a decision."""
    if weight is None:
        return keep | ~torch.isfinite(scale)[:, None]
    votes = weight != 0
    if not votes.any():
        return torch.zeros_like(keep)
    return keep | ~torch.isfinite(scale[votes]).all()


def keep_top(usage: Tensor, budget: Tensor, scale: Tensor, weight: Tensor | None = None) -> Tensor:
    """Give the mask ``(lists, n_groups)`` of the largest usages; ties go to the lower index."""
    return _overruled(_is_top(usage, budget), scale, weight)


def _is_top(usage: Tensor, budget: Tensor) -> Tensor:
    """Whether a usage is one of its row's ``budget (lists,)`` largest; NaN ranks as infinity."""
    ranked = torch.where(torch.isnan(usage), torch.full_like(usage, float("inf")), usage)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return rank < budget.long()[:, None]


def missed(usage: Tensor, keep: Tensor) -> Tensor:
    """Give the sum of squared usage over what was not kept, ``(batch,)`` float64."""
    return torch.where(keep, torch.zeros_like(usage), usage.square()).sum(dim=1)


def tile(keep: Tensor, *, tile_rows: int) -> list[Tensor]:
    """Give, for every row of the batch, the ascending tiles that hold a kept neuron."""
    return [torch.unique(row.nonzero().flatten() // tile_rows) for row in keep]


def execute(
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    x: Tensor,
    tiles: list[Tensor],
    *,
    tile_rows: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Give the output ``(batch, d)`` of the layer on the neurons of the tiles, float64.

    A single list of tiles is that of every row of the batch.
    """
    n_neurons = gate.shape[0]
    xd = x.double()

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        return xd @ weight.double().T + (0 if bias is None else bias.double())

    a = activate(project(gate, gate_bias), activation) * project(up, up_bias)
    mask = torch.zeros(len(tiles), n_neurons, dtype=torch.bool, device=x.device)
    for row, chosen in enumerate(tiles):
        for t in chosen.tolist():
            mask[row, t * tile_rows : (t + 1) * tile_rows] = True
    out = torch.where(mask, a, torch.zeros_like(a)) @ down_t.double()
    return out if down_bias is None else out + down_bias.double()


@dataclasses.dataclass(frozen=True)
class Pursuit:
    """What `omp` does to one signal."""

    index: list[int]  # atoms in the order taken
    coef: Tensor  # (len(index),) float64
    energies: list[float]  # squared norm of the residual before every atom and after the last
    margin: float  # least relative distance of two scores, or a score and its limit, that decided
    slack: float  # least distance, as a share of the energy, of a residual or gain and its limit
    status: str  # enumerator of OmpStatus, in lower case and without its k


def omp(
    gram: Tensor,
    correlation: Tensor,
    energy: float,
    budget: int,
    *,
    tolerance: float = 0.0,
    residual_max: float = 0.0,
    correlation_min: float = 0.0,
    gain_min: float = 0.0,
    per_step: int = 1,
    group: int = 1,
    start: Sequence[int] = (),
) -> Pursuit:
    """Run orthogonal matching pursuit on one signal, solving for all atoms anew at every one.

    Args:
        gram: Gram matrix of the dictionary, ``(n_atoms, n_atoms)``, of any dtype.
        correlation: Correlation of signal and atoms, ``(n_atoms,)``.
        energy: Squared norm of the signal.
        budget: Atoms to take at most.
        tolerance: Share of the energy at which to stop.
        residual_max: Norm of the residual at which to stop.
        correlation_min: Score, as a share of the signal's norm, at which to stop.
        gain_min: Share of the energy; a step that explains less is the last.
        per_step: Atoms, or groups, to take before scores are looked at again.
        group: Neighbouring atoms that are scored by the norm of their scores and taken together.
        start: Atoms to take before any score is looked at.
    """
    gram, correlation = gram.double(), correlation.double()
    norm = gram.diagonal().sqrt()
    weight = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    chosen: list[int] = []
    coef = correlation[:0]
    energies = [energy]
    margin = slack = float("inf")
    least = 1.0

    def ended(status: str) -> Pursuit:
        return Pursuit(chosen, coef, energies, margin, slack, status)

    def take(atom: int) -> bool:
        """Take an atom and refit, or pass it over for good; refuse what is not finite."""
        nonlocal coef, least
        if weight[atom] == 0:
            return False
        weight[atom] = 0
        row = gram[chosen, atom]
        if not row.isfinite().all():
            raise FloatingPointError
        inside = gram[chosen][:, chosen]
        pivot = gram[atom, atom]
        if chosen:
            pivot = pivot - row @ torch.linalg.solve(inside, row)
        share = float(pivot / gram[atom, atom])
        if not share * least > PIVOT:
            return False
        least = min(least, share)
        chosen.append(atom)
        inside = gram[chosen][:, chosen]
        coef = torch.linalg.solve(inside, correlation[chosen])
        energies.append(max(energy - float(correlation[chosen] @ coef), 0.0))
        return True

    finite = correlation.isfinite().all() and norm.isfinite().all()
    if not (finite and 0 <= energy < float("inf")):
        return ended("not_finite")
    if energy == 0:
        return ended("zero")
    limit = max(NOTHING**0.5, correlation_min) * energy**0.5
    last = max(tolerance * energy, residual_max**2)
    gained = float("inf")
    try:
        for atom in start:
            if len(chosen) < budget:
                take(atom)
        while True:
            if last > 0:
                slack = min(slack, abs(energies[-1] - last) / energy)
            if energies[-1] <= last:
                return ended("converged")
            if gain_min > 0:
                slack = min(slack, abs(gained / energy - gain_min))
            if gained < gain_min * energy:
                return ended("no_gain")
            room = min(per_step, (budget - len(chosen)) // group)
            if room == 0:
                return ended("budget")
            score = (correlation - coef @ gram[chosen]) * weight
            score = score.view(-1, group).norm(dim=1)
            if not score.isfinite().all():
                return ended("not_finite")
            order = score.sort(descending=True, stable=True)
            ranked, best = order.values.tolist(), order.indices.tolist()
            if ranked[0] <= limit:
                margin = min(margin, 1 - ranked[0] / limit)
                return ended("converged")
            taken = len(chosen)
            for rank in range(min(room, len(best))):
                margin = min(margin, abs(ranked[rank] / limit - 1))
                if ranked[rank] <= limit:
                    break
                if rank + 1 < len(best):
                    margin = min(margin, 1 - ranked[rank + 1] / ranked[rank])
                for atom in range(best[rank] * group, (best[rank] + 1) * group):
                    take(atom)
            if len(chosen) == taken:
                return ended("dependent")
            gained = energies[taken] - energies[-1]
    except FloatingPointError:
        return ended("not_finite")


def omp_supports(gram: Tensor, correlation: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Run plain orthogonal matching pursuit on many signals at once, by its progressive form.

    Args:
        gram: Gram matrix of the dictionary, ``(n_atoms, n_atoms)``, positive definite on what is
            taken.
        correlation: Correlation of signals and atoms, ``(batch, n_atoms)``.
        count: Atoms to take, of every signal.

    Returns:
        ``(batch, count)`` int64, the atoms in the order taken, and ``(batch,)`` float64, the least
        relative distance of the best and the second best score of any step.
    """
    gram, left = gram.double(), correlation.double()
    batch, n_atoms = left.shape
    weight = gram.diagonal().rsqrt().expand(batch, n_atoms).clone()
    direction = left.new_zeros(batch, count, n_atoms)
    index = torch.zeros(batch, count, dtype=torch.int64, device=left.device)
    margin = left.new_full((batch,), float("inf"))
    rows = torch.arange(batch, device=left.device)
    for i in range(count):
        score = (left * weight).abs()
        atom = score.argmax(dim=1)
        best = score[rows, atom]
        score[rows, atom] = 0
        margin = torch.minimum(margin, 1 - score.amax(dim=1) / best)
        weight[rows, atom] = 0
        index[:, i] = atom
        known = direction[:, :i]
        inside = known[rows, :, atom]
        fresh = gram[atom] - (inside[:, None] @ known)[:, 0]
        fresh /= fresh[rows, atom].sqrt()[:, None]
        direction[:, i] = fresh
        left = left - (left[rows, atom] / fresh[rows, atom])[:, None] * fresh
    return index, margin
