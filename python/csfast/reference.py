"""Every operation once more, in plain torch and float64. Tests take their truth from here.

What the specification rounds (the quantised activation) is rounded here in the same precision, so
that integers agree exactly; everything else is float64.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from . import planes
from .types import Code

NOTHING = 2.0**-36  # share of the energy that an atom must explain to be taken, see omp.h
PIVOT = (
    2.0**-18
)  # share of an atom that may not lie in the span of those taken before it, see omp.h


def quantize(x: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``q (batch, d)`` int8 and ``scale (batch,)`` float32 as ``sense.h`` specifies them."""
    e = x.float() * equal
    peak = e.abs().amax(dim=1) if e.shape[1] else e.new_zeros(e.shape[0])
    finite = torch.isfinite(e).all(dim=1)
    # Divided tensor by tensor: with a plain number torch multiplies by a rounded reciprocal.
    most = torch.full_like(peak, 127.0)
    inverse = torch.where(peak > 0, most / peak, torch.zeros_like(peak))
    q = torch.round(e * inverse[:, None]).clamp(-127, 127)
    q = torch.where(finite[:, None], q, torch.zeros_like(q)).to(torch.int8)
    scale = torch.where(finite, peak / most, torch.full_like(peak, float("nan")))
    return q, scale


def sense(codes: Tensor, equal: Tensor, x: Tensor, *, bits: Code) -> tuple[Tensor, Tensor]:
    """Give ``y (batch, n_neurons, 2)`` int32 and ``scale (batch,)`` float32."""
    n_neurons, d = codes.shape[0], x.shape[1]
    q, scale = quantize(x, equal)
    value = planes.levels_of(planes.unpack(codes.flatten(0, 1), bits, d), bits).double()
    y = q.double() @ value.T
    return y.to(torch.int32).view(-1, n_neurons, 2), scale


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
    margin: float  # least relative distance of the best and the second best score of any step
    status: str  # enumerator of OmpStatus, in lower case and without its k


def omp(
    gram: Tensor, correlation: Tensor, energy: float, budget: int, *, tolerance: float = 0.0
) -> Pursuit:
    """Run orthogonal matching pursuit on one signal, solving for all atoms anew at every step.

    Args:
        gram: Gram matrix of the dictionary, ``(n_atoms, n_atoms)``, of any dtype.
        correlation: Correlation of signal and atoms, ``(n_atoms,)``.
        energy: Squared norm of the signal.
        budget: Atoms to take at most.
        tolerance: Share of the energy at which to stop.
    """
    gram, correlation = gram.double(), correlation.double()
    norm = gram.diagonal().sqrt()
    weight = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    chosen: list[int] = []
    coef = correlation[:0]
    energies = [energy]
    margin = float("inf")

    def ended(status: str) -> Pursuit:
        return Pursuit(chosen, coef, energies, margin, status)

    finite = correlation.isfinite().all() and norm.isfinite().all()
    if not (finite and 0 <= energy < float("inf")):
        return ended("not_finite")
    if energy == 0:
        return ended("zero")
    while True:
        if energies[-1] <= tolerance * energy:
            return ended("converged")
        if len(chosen) == budget:
            return ended("budget")
        score = (correlation - gram[:, chosen] @ coef).abs() * weight
        score[chosen] = 0
        if not score.isfinite().all():
            return ended("not_finite")
        best = score.max()
        if best.square() <= NOTHING * energy:
            return ended("converged")
        atom = int((score == best).nonzero()[0])
        inside = gram[chosen][:, chosen]
        pivot = gram[atom, atom]
        if chosen:
            row = gram[chosen, atom]
            pivot = pivot - row @ torch.linalg.lstsq(inside, row[:, None]).solution[:, 0]
        if not pivot > PIVOT * gram[atom, atom]:
            return ended("dependent")
        score[atom] = 0
        margin = min(margin, 1 - float(score.max() / best))
        chosen.append(atom)
        inside = gram[chosen][:, chosen]
        coef = torch.linalg.lstsq(inside, correlation[chosen][:, None]).solution[:, 0]
        energies.append(max(energy - float(correlation[chosen] @ coef), 0.0))
