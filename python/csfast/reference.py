"""Every operation once more, in plain torch and float64. Tests take their truth from here.

What the specification rounds (the quantised activation) is rounded here in the same precision, so
that integers agree exactly; everything else is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import planes


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


def sense(codes: Tensor, equal: Tensor, x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Give ``y (batch, n_neurons, 2)`` int32 and ``scale (batch,)`` float32."""
    n_neurons, d = codes.shape[0], x.shape[1]
    q, scale = quantize(x, equal)
    value = 2 * planes.unpack(codes.flatten(0, 1), bits, d).double() - (2**bits - 1)
    y = q.double() @ value.T
    return y.to(torch.int32).view(-1, n_neurons, 2), scale


def usage(y: Tensor, scale: Tensor, row_scale: Tensor) -> Tensor:
    """Give the usage ``(batch, n_neurons)`` that the measurements promise, float64."""
    z = scale.double()[:, None, None] * row_scale.double() * y.double()
    return (torch.nn.functional.silu(z[..., 0]) * z[..., 1]).abs()


def keep_threshold(usage: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    """Give the mask ``(batch, n_neurons)`` of what the threshold keeps; NaN keeps."""
    return ~(usage < threshold.double()[:, None]) | ~torch.isfinite(scale)[:, None]


def keep_top(usage: Tensor, budget: Tensor, scale: Tensor) -> Tensor:
    """Give the mask ``(batch, n_neurons)`` of the largest usages; ties go to the lower index."""
    ranked = torch.where(torch.isnan(usage), torch.full_like(usage, float("inf")), usage)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (rank < budget.long()[:, None]) | ~torch.isfinite(scale)[:, None]


def missed(usage: Tensor, keep: Tensor) -> Tensor:
    """Give the sum of squared usage over what was not kept, ``(batch,)`` float64."""
    return torch.where(keep, torch.zeros_like(usage), usage.square()).sum(dim=1)


def tile(keep: Tensor, *, tile_rows: int) -> list[Tensor]:
    """Give, for every row of the batch, the ascending tiles that hold a kept neuron."""
    return [torch.unique(row.nonzero().flatten() // tile_rows) for row in keep]


def execute(
    gate: Tensor, up: Tensor, down_t: Tensor, x: Tensor, tiles: list[Tensor], *, tile_rows: int
) -> Tensor:
    """Give the output ``(batch, d)`` of the layer on the neurons of the tiles, float64."""
    n_neurons = gate.shape[0]
    xd = x.double()
    a = torch.nn.functional.silu(xd @ gate.double().T) * (xd @ up.double().T)
    mask = torch.zeros(x.shape[0], n_neurons, dtype=torch.bool, device=x.device)
    for row, chosen in enumerate(tiles):
        for t in chosen.tolist():
            mask[row, t * tile_rows : (t + 1) * tile_rows] = True
    return torch.where(mask, a, torch.zeros_like(a)) @ down_t.double()
