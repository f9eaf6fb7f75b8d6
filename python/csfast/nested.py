"""Nested codes: a few bits for every weight, and more bits for the neurons that matter.

A row of weights is coded in levels. The first is a code of its own; each further one codes what the
levels before it leave. Reading one level more costs its bits alone, so the planes that sensing has
read are the first planes of execution. Rows are neuron-major in all three matrices, and 64
neighbouring weights of a row share a step:

    w[c] ~ sum over levels l of  step_l[c / 64] * (u_l[c] - (2^bits_l - 1) / 2)
    u_l in [0, 2^bits_l),  step_l[g] = top_l * 2^(-exponent_l[g] / 16),  exponent_l[g] in [0, 255]

with one `top` a row, rounded to bfloat16. Codes are fitted with error feedback: what rounding one
column (of gate and up) or one neuron (of down) leaves undone moves those that come after, so
that the layer's output on the calibration inputs changes least.

Source:
    Error feedback is that of Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: accurate post-training
    quantization for generative pre-trained transformers", 2022; nesting by coding the residual is
    multi-stage quantisation, Juang and Gray, "Multiple stage vector quantization for speech
    coding", 1982.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # weights of a row that share a step
OCTAVE = 16  # steps of the exponent that halve: neighbours differ by 4.4 %, half of it is lost
DAMP = 0.01  # of the mean second moment, added to all: what the sample never showed stays bounded
_CLIPS = tuple(0.30 + 0.05 * i for i in range(15))  # fractions of a group's maximum, tried in turn
_BLOCK = 64  # columns whose errors are spread over the rest at once


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level of the code of a matrix.

    Attributes:
        bits: Width of a code.
        codes: ``(n, d)``, uint8, below ``2^bits``.
        exponent: ``(n, groups)``, uint8: steps below the largest of the row.
        top: ``(n,)``, float32 with the digits of bfloat16, positive: the largest step of each row.
        group: Weights of a row that share a step.
    """

    bits: int
    codes: Tensor
    exponent: Tensor
    top: Tensor
    group: int

    def steps(self) -> Tensor:
        """Give the step of every group, ``(n, groups)``, float32."""
        return self.top[:, None] * torch.exp2(-self.exponent.float() / OCTAVE)

    def decode(self) -> Tensor:
        """Give what the level stands for, ``(n, d)``, float32."""
        step = self.steps().repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        return step * (self.codes.float() - (2.0**self.bits - 1) / 2)

    def row_bytes(self) -> float:
        """Give the bytes of one row: codes, exponents and top."""
        return self.codes.shape[1] * self.bits / 8 + self.exponent.shape[1] + 2.0


def decode(levels: Sequence[Level]) -> Tensor:
    """Give the sum of some levels, ``(n, d)``, float32."""
    return torch.stack([level.decode() for level in levels]).sum(dim=0)


def fit_rows(
    weight: Tensor,
    moment: Tensor | None,
    bits: Sequence[int],
    *,
    group: int = GROUP,
) -> tuple[Level, ...]:
    """Code rows whose columns meet the inputs: the gate or the up projection.

    Args:
        weight: ``(n, d)``, floating.
        moment: Second moment of the inputs, ``(d, d)``; None rounds without error feedback.
        bits: Of every level, each 1 to 8.
        group: Weights that share a step.

    Returns:
        The levels, the coarse one first.

    Raises:
        ValueError: A width is out of range, or the shapes do not fit together.
    """
    _check(bits, weight, moment, weight.shape[1])
    spread = None if moment is None else _spread(moment)
    left = weight.detach().float()
    levels = []
    for width in bits:
        levels.append(_code_columns(left, spread, width, group))
        left = left - levels[-1].decode()
    return tuple(levels)


def fit_neurons(
    down_t: Tensor,
    moment: Tensor | None,
    bits: Sequence[int],
    *,
    weight: Tensor | None = None,
    group: int = GROUP,
) -> tuple[Level, ...]:
    """Code rows that are added up by activations: the transposed down projection.

    Args:
        down_t: ``(n_neurons, d)``, floating.
        moment: Second moment of the activations, ``(n_neurons, n_neurons)``; None rounds without
            error feedback.
        bits: Of every level, each 1 to 8.
        weight: Importance of the columns in the choice of steps, ``(d,)``; all alike if None.
        group: Weights that share a step.

    Returns:
        The levels, the coarse one first.

    Raises:
        ValueError: A width is out of range, or the shapes do not fit together.
    """
    _check(bits, down_t, moment, down_t.shape[0])
    spread = None if moment is None else _spread(moment)
    left = down_t.detach().float()
    levels = []
    for width in bits:
        levels.append(_code_neurons(left, spread, width, group, weight))
        left = left - levels[-1].decode()
    return tuple(levels)


def output_scale(down_t: Tensor) -> Tensor:
    """Give the root mean square of every output channel, ``(d,)``, float32, positive.

    Divided by it, the columns of the transposed down projection are alike, and the weights of a
    group need no steps of their own; the output is multiplied by it once.
    """
    scale = down_t.detach().float().square().mean(dim=0).sqrt()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _check(bits: Sequence[int], weight: Tensor, moment: Tensor | None, size: int) -> None:
    for width in bits:
        if not 1 <= width <= 8:
            raise ValueError(f"[nested] {width} bits: want 1 to 8 in each level.")
    if not bits or weight.dim() != 2:
        raise ValueError(f"[nested] {len(bits)} levels of {weight.dim()} axes: want some of two.")
    if moment is not None and moment.shape != (size, size):
        raise ValueError(f"[nested] moment of shape {tuple(moment.shape)}: want ({size}, {size}).")


def _spread(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, float32: row `i` says how an error spreads."""
    wide = moment.double()
    damp = DAMP * wide.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = wide + damp * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _grid(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes of the nearest levels; a step of zero takes the level above the middle."""
    half: int = 2 ** (bits - 1)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return (torch.floor(w / safe) + half).clamp_(0, 2 * half - 1)


def _value(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    return step * (codes - (2.0**bits - 1) / 2)


def _fit_steps(parts: Tensor, bits: int, weight: Tensor | None) -> Tensor:
    """The step of least squared error of a fixed set, ``(..., group)`` to ``(...)``."""
    peak = parts.abs().amax(dim=-1, keepdim=True)
    best = torch.zeros_like(peak)
    least = torch.full_like(peak, float("inf"))
    for clip in _CLIPS:
        step = peak * (clip * 2 / 2**bits)
        error = (_value(_grid(parts, step, bits), step, bits) - parts).square()
        if weight is not None:
            error = error * weight
        total = error.sum(dim=-1, keepdim=True)
        better = total < least
        best, least = torch.where(better, step, best), torch.where(better, total, least)
    return best[..., 0]


def _as_exponents(step: Tensor, top: Tensor) -> Tensor:
    """Steps below `top` as uint8, ``(n, ...)`` beside ``(n,)``."""
    over = top[:, None] / step.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(OCTAVE * torch.log2(over)).clamp(0, 255).to(torch.uint8)


def _parts(w: Tensor, group: int) -> Tensor:
    """Rows cut into groups, ``(n, groups, group)``; what is missing at the end is zero."""
    n, d = w.shape
    return F.pad(w, (0, -d % group)).view(n, -1, group)


def _tops(w: Tensor, bits: int, group: int, weight: Tensor | None) -> Tensor:
    """The largest step of every row, a little above so that feedback has room, ``(n,)``."""
    steps = _fit_steps(_parts(w, group), bits, weight).amax(dim=1) * 2 ** (4 / OCTAVE)
    return torch.where(steps > 0, steps, torch.ones_like(steps)).bfloat16().float()


def _code_columns(w: Tensor, spread: Tensor | None, bits: int, group: int) -> Level:
    n, d = w.shape
    top = _tops(w, bits, group, None)
    codes = torch.zeros(n, d, device=w.device)
    exponent = torch.zeros(n, -(-d // group), dtype=torch.uint8, device=w.device)
    left = w.clone()
    for start in range(0, d, group):
        stop = min(start + group, d)
        at = start // group
        # The steps of a group are fitted to what feedback has made of it.
        exponent[:, at] = _as_exponents(_fit_steps(left[:, start:stop], bits, None)[:, None], top)[
            :, 0
        ]
        step = top * torch.exp2(-exponent[:, at].float() / OCTAVE)
        if spread is None:
            codes[:, start:stop] = _grid(left[:, start:stop], step[:, None], bits)
            continue
        error = torch.empty(n, stop - start, device=w.device)
        for c in range(start, stop):
            codes[:, c] = _grid(left[:, c], step, bits)
            lost = left[:, c] - _value(codes[:, c], step, bits)
            error[:, c - start] = lost / spread[c, c]
            left[:, c + 1 : stop] -= error[:, c - start, None] * spread[c, c + 1 : stop]
        left[:, stop:] -= error @ spread[start:stop, stop:]
    return Level(bits, codes.to(torch.uint8), exponent, top, group)


def _code_neurons(
    w: Tensor, spread: Tensor | None, bits: int, group: int, weight: Tensor | None
) -> Level:
    n, d = w.shape
    importance = None
    if weight is not None:
        importance = _parts(weight.float()[None], group)[0]
    top = _tops(w, bits, group, importance)
    steps = _fit_steps(_parts(w, group), bits, importance)
    exponent = _as_exponents(steps, top)
    step = (top[:, None] * torch.exp2(-exponent.float() / OCTAVE)).repeat_interleave(group, dim=1)
    step = step[:, :d]
    if spread is None:
        return Level(bits, _grid(w, step, bits).to(torch.uint8), exponent, top, group)
    codes = torch.zeros(n, d, device=w.device)
    left = w.clone()
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        error = torch.empty(stop - start, d, device=w.device)
        for j in range(start, stop):
            codes[j] = _grid(left[j], step[j], bits)
            error[j - start] = (left[j] - _value(codes[j], step[j], bits)) / spread[j, j]
            left[j + 1 : stop] -= spread[j, j + 1 : stop, None] * error[j - start]
        left[stop:] -= spread[start:stop, stop:].T @ error
    return Level(bits, codes.to(torch.uint8), exponent, top, group)
