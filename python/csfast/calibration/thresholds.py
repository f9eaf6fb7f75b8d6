"""Thresholds: estimated usages, counted in bins, and the quantiles of the counts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..codes import planes
from ..models import Ffn
from ..plan import LayerPlan, Mode
from ..types import Code

# Of one matrix product, so that Ctrl-C waits for 0.1 s at most on two cores of 50 GFLOP/s each.
STEP_OPERATIONS = 10**10
_COUNT_USAGES = 1 << 22  # counted at a time
_STEP_NEURONS = 1024  # sensed at a time: their levels in float32 have 64 MiB at d = 8192

# A usage is counted by the upper bits of its float32: the exponent and six bits of the mantissa,
# 64 bins an octave. Bins above that of infinity hold what is not a number.
SHIFT = 17
BINS = 255 << (23 - SHIFT)


@dataclasses.dataclass(frozen=True, eq=False)
class Sensor:
    """What sensing one layer takes."""

    plan: LayerPlan
    ffn: Ffn
    offset: Tensor | None  # (n_neurons, 2), float32: from the biases

    def ordered(self, order: Tensor, above: tuple[int, ...]) -> Sensor:
        """The same with the orders ``(n_blocks, n_neurons_max)`` for its blocks."""
        n_neurons = self.ffn.shape.n_neurons
        orders = {n: row[:n_neurons].clone() for n, row in zip(above, order, strict=True)}
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, order=orders))


def usages(
    sensor: Sensor, x: Tensor, modes: list[Mode], *, joint: bool
) -> Iterator[tuple[int, Tensor]]:
    """For some modes their number and the usages ``(n, n_blocks)`` of single positions."""
    some = [(j, s) for j, s in enumerate(modes) if (s.batch > 1) == joint]
    for bits, members in itertools.groupby(some, lambda m: m[1].bits):
        usage = _usage(sensor, x, bits)
        for block, sizes in itertools.groupby(members, lambda m: m[1].block):
            grouped = _grouped(usage, sensor.plan, block)
            for j, _ in sizes:
                yield j, grouped


def _usage(sensor: Sensor, x: Tensor, bits: Code) -> Tensor:
    """The estimated usage of every neuron, ``(n, n_neurons)``, float32."""
    ffn, offset = sensor.ffn, sensor.offset
    d, n_neurons = ffn.shape.d, ffn.shape.n_neurons
    row_scale = sensor.plan.row_scale[bits].to(x.device)
    q, scale = planes.quantize(x, sensor.plan.equal.to(x.device))
    # Integers below 2^24 in float32, or below 2^53 in float64: exact, as the kernels are.
    dtype = torch.float32 if 127 * planes.level_max(bits) * d < 2**24 else torch.float64
    usage = torch.empty(len(x), n_neurons, dtype=torch.float32, device=x.device)
    step = max(1, STEP_OPERATIONS // (4 * d * _STEP_NEURONS))
    for start in range(0, n_neurons, _STEP_NEURONS):
        rows = slice(start, start + _STEP_NEURONS)
        codes = sensor.plan.codes[bits][rows].to(x.device)
        level = planes.levels_of(planes.unpack(codes.flatten(0, 1), bits, d), bits).to(dtype)
        gate, up = level[0::2].T.contiguous(), level[1::2].T.contiguous()
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            t = scale[part, None]
            g = (q[part].to(dtype) @ gate).float().mul_(row_scale[rows, 0]).mul_(t)
            u = (q[part].to(dtype) @ up).float().mul_(row_scale[rows, 1]).mul_(t)
            if offset is not None:
                g.add_(offset[rows, 0])
                u.add_(offset[rows, 1])
            usage[part, rows] = u.mul_(ffn.act(g)).abs_()
    return usage


def _grouped(usage: Tensor, plan: LayerPlan, block: int) -> Tensor:
    """The usage of every block, ``(n, n_blocks)``: the root of its neurons' summed squares."""
    if block == 1:
        return usage
    square = usage[:, plan.order[block].to(usage.device)].square_()
    short = -square.shape[1] % block
    square = nn.functional.pad(square, (0, short)).view(len(square), -1, block)
    return square.sum(dim=2).sqrt_()


def counted(usage: Tensor) -> Tensor:
    """How many usages ``(n, n_blocks)`` are in every bin, on the CPU."""
    count = torch.zeros(BINS, dtype=torch.int64)
    for part in torch.split(usage, max(1, _COUNT_USAGES // usage.shape[1])):
        bins = (part.contiguous().view(torch.int32) >> SHIFT).clamp_(max=BINS - 1).flatten()
        count += torch.bincount(bins, minlength=BINS).cpu()
    return count


def quantiles(histogram: Tensor, densities: tuple[float, ...]) -> Tensor:
    """Quantiles of counted usages.

    Args:
        histogram: ``(n_layers, n_groups, BINS)``, int64.
        densities: Rising; the last is 1.

    Returns:
        ``(n_layers, 1 + n_groups, n_densities)``, float32: pooled, then each group. Linear within
        a bin; 0 at density 1.
    """
    share = histogram.double() / histogram.sum(dim=2, keepdim=True)
    share = torch.cat([share.mean(dim=1, keepdim=True), share], dim=1)
    tail = share.flip(2).cumsum(dim=2).flip(2)  # of the mass: in this bin and above
    above = torch.cat([tail[..., 1:], torch.zeros_like(tail[..., :1])], dim=2)
    edges = (torch.arange(BINS + 1, dtype=torch.int32) << SHIFT).view(torch.float32).double()
    edges[-1] = torch.finfo(torch.float32).max
    columns = []
    for density in densities[:-1]:
        b = ((tail >= density).sum(dim=2, keepdim=True) - 1).clamp(min=0)
        part = (density - above.gather(2, b)) / share.gather(2, b)
        low, high = edges[b], edges[b + 1]
        columns.append(torch.where(b > 0, high - part.clamp(0, 1) * (high - low), 0.0))
    columns.append(torch.zeros_like(tail[..., :1]))
    return torch.cat(columns, dim=2).float()
