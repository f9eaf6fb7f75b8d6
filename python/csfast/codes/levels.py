"""Nested codes: a few bits for every weight, and more bits for the neurons that matter.

A row of weights is divided by the channel equaliser, then coded in levels. The first is a code of
its own; each further one codes what the levels before it leave. Reading one level more costs its
bits alone, so what sensing has read is the first part of what execution reads. 64 neighbouring
weights of a row share a step::

    w[c] / equal[c] ~ sum over levels l of step_l[c // 64] * (u_l[c] - (2^bits_l - 1) / 2)
    step_l[g] = top_l * 2^(-exponent_l[g] / 16),   u_l in [0, 2^bits_l),   exponent_l in [0, 255]

with one ``top`` a row, rounded to bfloat16. The packed layout is that of
``cpp/include/csfast/nested.h``. Codes are fitted with error feedback: what rounding one column (of
gate and up) or one neuron (of down) leaves undone moves the columns or neurons that come after it,
so that the layer's output on the calibration inputs changes least.

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
from torch import Tensor
from torch.nn import functional

from . import feedback, planes

GROUP = 64  # weights of a row that share a step
OCTAVE = 16  # exponents by which a step halves: neighbours differ by 4.4 %
BITS_MAX = 8  # of a level that is fitted; those that are packed have 1 to 4
# By exponent, see `factor`. Products with powers of two are exact.
_FACTORS = torch.cat(
    [
        # Said, since who imports this may have set other defaults.
        torch.tensor(
            [2.0 ** (-i / OCTAVE) for i in range(OCTAVE)], dtype=torch.float32, device="cpu"
        )
        * 2.0**-octave
        for octave in range(256 // OCTAVE)
    ]
)
# Exponents that are tried, from that of the step whose outermost code is a group's maximum down to
# .14 of that step, and then those beside the best. One bit wants the smallest: twice the mean
# magnitude, which is .2 of twice the maximum of 64 weights of a Laplacian.
_TRIED = range(0, 48, 3)
_LARGEST = 2.0**120  # of a weight: tops and steps stay finite in bfloat16


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level of the code of a matrix.

    Attributes:
        bits: Width of a code.
        codes: ``(n, d)``, uint8, below ``2^bits``.
        exponent: ``(n, ceil(d / group))``, uint8: sixteenths of an octave below the largest step.
        top: ``(n,)``, float32 with the digits of bfloat16: the largest step of each row; 0 if the
            row is nothing but zeros.
        group: Weights of a row that share a step.
    """

    bits: int
    codes: Tensor
    exponent: Tensor
    top: Tensor
    group: int = GROUP

    def steps(self) -> Tensor:
        """Give the step of every group, ``(n, groups)``, float32."""
        return self.top[:, None] * factor(self.exponent)

    def decode(self) -> Tensor:
        """Give what the level stands for, ``(n, d)``, float32."""
        step = self.steps().repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        return _value(self.codes, step, self.bits)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """One level as the kernels read it: of the rows of a matrix, or of the pairs of two.

    ``rows`` stands for ``n`` after `pack`, and for ``n_neurons, 2`` after `pair`.

    Attributes:
        bits: Width of a code, 1 to 4.
        codes: ``(rows, chunks, 16 * bits)``, uint8, see `planes.pack`.
        exponent: ``(rows, 2 * chunks)``, uint8; 255 beyond the last group.
        top: ``(rows)``, bfloat16.
    """

    bits: int
    codes: Tensor
    exponent: Tensor
    top: Tensor


def factor(exponent: Tensor) -> Tensor:
    """Give ``2^(-exponent / 16)``, float32, as ``nested.h`` rounds it."""
    return _FACTORS.to(exponent.device)[exponent.long()]


def decode(levels: Sequence[Level]) -> Tensor:
    """Give the sum of some levels, ``(n, d)``, float32, added in their order."""
    total = torch.zeros_like(levels[0].codes, dtype=torch.float32)
    for level in levels:
        total += level.decode()
    return total


def fit_rows(
    weight: Tensor,
    moment: Tensor | None,
    bits: Sequence[int],
    *,
    equal: Tensor | None = None,
    group: int = GROUP,
) -> tuple[Level, ...]:
    """Code rows whose columns meet the inputs: the gate or the up projection.

    A prefix of the levels is what fewer bits would have given. Scaling a row by a power of two
    scales its tops and changes nothing else.

    Args:
        weight: ``(n, d)``, floating.
        moment: Second moment of the inputs, ``(d, d)``, of ``x`` even if `equal` is given; None
            rounds every weight to its nearest code.
        bits: Of every level, each 1 to 8.
        equal: Channel equaliser, ``(d,)``, float32, positive: the levels are those of
            ``weight / equal``, which meets ``x * equal``. Left out, those of `weight`.
        group: Weights that share a step.

    Returns:
        The levels, the coarse one first.

    Raises:
        ValueError: A width or the group is out of range, the shapes do not fit together, something
            is not finite, or the moment is that of no inputs.
    """
    _check_widths(bits, group)
    _check_matrix("weight", weight)
    left = weight.detach().float()
    if moment is not None:
        _check_moment(moment, left.shape[1])
    if equal is not None:
        _check_vector("equal", equal, left.shape[1], torch.finfo(torch.float32).tiny)
        left = left / equal.to(left.device)
        _check_matrix("weight / equal", left)
        if moment is not None:
            wide = equal.double().to(moment.device)
            moment = moment.double() * wide * wide[:, None]
    spread = _spread(moment, left.device)
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
        down_t: ``(n_neurons, d)``, floating; best divided by `output_scale`.
        moment: Second moment of the activations, ``(n_neurons, n_neurons)``; None rounds every
            weight to its nearest code.
        bits: Of every level, each 1 to 8.
        weight: Importance of the columns in the choice of steps, ``(d,)``, not negative; all
            alike if left out.
        group: Weights that share a step.

    Returns:
        The levels, the coarse one first.

    Raises:
        ValueError: A width or the group is out of range, the shapes do not fit together, something
            is not finite, or the moment is that of no activations.
    """
    _check_widths(bits, group)
    _check_matrix("down_t", down_t)
    left = down_t.detach().float()
    if weight is not None:
        _check_vector("weight", weight, left.shape[1], 0.0)
        weight = weight.to(left.device, torch.float32)
    if moment is not None:
        _check_moment(moment, left.shape[0])
    spread = _spread(moment, left.device)
    levels = []
    for width in bits:
        levels.append(_code_neurons(left, spread, width, group, weight))
        left = left - levels[-1].decode()
    return tuple(levels)


def output_scale(down_t: Tensor) -> Tensor:
    """Give the root mean square of every output channel, ``(d,)``, float32, positive.

    Divided by it, the columns of the transposed down projection are alike, and the weights of a
    group need no steps of their own; the output is multiplied by it once. A channel of zeros has
    scale 1.
    """
    scale = down_t.detach().float().square().mean(dim=0).sqrt()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def pack(level: Level) -> Packed:
    """Pack a level as ``nested.h`` lays it out, contiguous.

    Raises:
        ValueError: Its codes have more than 4 bits, or another number than 64 share a step.
    """
    _check_packs([level.bits])
    if level.group != GROUP:
        raise ValueError(f"[nested] group = {level.group}: want {GROUP} to pack.")
    d = level.codes.shape[1]
    groups = 2 * -(-d // planes.CHUNK)
    exponent = functional.pad(level.exponent, (0, groups - level.exponent.shape[1]), value=255)
    return Packed(
        level.bits,
        planes.pack(level.codes, level.bits),
        exponent.contiguous(),
        level.top.bfloat16().contiguous(),
    )


def unpack(packed: Packed, d: int) -> Level:
    """Unpack a level of `d` channels; the rows of pairs alternate, gate and up."""
    codes = planes.unpack(packed.codes.flatten(0, -3), packed.bits, d)
    exponent = packed.exponent.flatten(0, -2)[:, : -(-d // GROUP)]
    return Level(packed.bits, codes, exponent, packed.top.flatten().float())


def pair(gate: Packed, up: Packed) -> Packed:
    """Lay the gate and the up row of every neuron side by side, as `ops.nested` reads them.

    Raises:
        ValueError: They differ in bits or shape.
    """
    if gate.bits != up.bits or gate.codes.shape != up.codes.shape or gate.codes.dim() != 3:
        raise ValueError(
            f"[nested] gate of {gate.bits} bits {tuple(gate.codes.shape)}, up of {up.bits} bits "
            f"{tuple(up.codes.shape)}: want the same (n_neurons, chunks, 16 * bits)."
        )
    return Packed(
        gate.bits,
        torch.stack([gate.codes, up.codes], dim=1),
        torch.stack([gate.exponent, up.exponent], dim=1),
        torch.stack([gate.top, up.top], dim=1),
    )


def n_bytes(n_neurons: int, d: int, bits: Sequence[int], n_levels: int | None = None) -> int:
    """Bytes that measuring one layer reads: codes, exponents and tops, and the equaliser.

    Args:
        n_neurons: Neurons, of two rows each.
        d: Channels.
        bits: Of every level, each 1 to 4.
        n_levels: Levels that are read, the first; all if left out.

    Raises:
        ValueError: A width or the number of levels is out of range.
    """
    _check_packs(bits)
    if n_levels is None:
        n_levels = len(bits)
    if not 1 <= n_levels <= len(bits):
        raise ValueError(f"[nested] n_levels = {n_levels}: want 1 to {len(bits)}.")
    chunks = -(-d // planes.CHUNK)
    row = sum(chunks * 16 * width + 2 * chunks + 2 for width in bits[:n_levels])
    return n_neurons * 2 * row + d * 4


def _check_packs(bits: Sequence[int]) -> None:
    """Widths that can be packed."""
    for width in bits:
        if width not in planes.BITS:
            raise ValueError(f"[nested] bits = {width!r}: want 1 to 4 to pack.")
    if not bits:
        raise ValueError("[nested] bits of no level: want 1 to 4 of each.")


def _check_widths(bits: Sequence[int], group: int) -> None:
    """Widths that can be fitted, and the group."""
    for width in bits:
        if not 1 <= width <= BITS_MAX:
            raise ValueError(f"[nested] bits = {width!r}: want 1 to {BITS_MAX} of each level.")
    if not bits:
        raise ValueError(f"[nested] bits of no level: want 1 to {BITS_MAX} of each.")
    if group < 1:
        raise ValueError(f"[nested] group = {group}: want at least 1 weight.")


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ValueError(
            f"[nested] {name} {tuple(matrix.shape)} of {matrix.dtype}: want floating (n, d)."
        )
    if not bool((matrix.detach().abs() < _LARGEST).all()):
        raise ValueError(f"[nested] {name}: want finite weights of magnitude below 2^120.")


def _check_vector(name: str, vector: Tensor, d: int, least: float) -> None:
    """Finite and at least `least`."""
    if vector.shape != (d,):
        raise ValueError(f"[nested] {name} {tuple(vector.shape)}: want ({d},).")
    if not bool((torch.isfinite(vector) & (vector >= least)).all()):
        raise ValueError(f"[nested] {name}: want finite numbers, none below {least:g}.")


def _check_moment(moment: Tensor, size: int) -> None:
    if moment.shape != (size, size):
        raise ValueError(f"[nested] moment {tuple(moment.shape)}: want ({size}, {size}).")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("[nested] moment: want finite numbers.")


def _spread(moment: Tensor | None, device: torch.device) -> Tensor | None:
    """How an error spreads, of a moment whose scale, which changes nothing, is that of one."""
    if moment is None:
        return None
    mean = float(moment.double().diagonal().mean())
    if not mean > 0:
        raise ValueError(f"[nested] moment of trace {mean * len(moment):g}: want above 0.")
    try:
        return feedback.spread(moment.double() / mean).to(device)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError("[nested] moment: want a positive semi-definite matrix.") from error


def _nearest(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """Nearest codes, float32; a step of zero takes the one above the middle."""
    half = 2 ** (bits - 1)
    u = torch.floor(w / torch.where(step > 0, step, torch.ones_like(step)))
    return u.add_(half).clamp_(0, 2 * half - 1)


def _value(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    return step * (codes - (2.0**bits - 1) / 2)


def _unit(w: Tensor) -> Tensor:
    """The power of two that every row's maximum is 1 to 2 times of; 1 for rows of zeros.

    Divided by it, no row is too large or too small for its squares to be summed in float32.
    """
    peak = w.abs().amax(dim=1)
    unit = peak / (2 * torch.frexp(peak).mantissa)
    return torch.where(peak > 0, unit, torch.ones_like(unit))


def _tops(w: Tensor, bits: int) -> Tensor:
    """An octave above the step whose outermost code is the row's maximum, float32.

    What feedback adds to a group has room there. Rounded to bfloat16.
    """
    reach: Tensor = 2 * w.abs().amax(dim=1) / (2**bits - 1)
    return 2 * reach.bfloat16().float()


def _fit_exponents(parts: Tensor, top: Tensor, bits: int, weight: Tensor | None) -> Tensor:
    """Exponents of least squared error, of groups ``(..., width)`` below ``top (...)``, uint8."""
    tiny = torch.finfo(torch.float32).tiny
    reach = 2 * parts.abs().amax(dim=-1) / (2**bits - 1)
    first = torch.round(OCTAVE * torch.log2(top.clamp_min(tiny) / reach.clamp_min(tiny)))
    best = torch.zeros_like(reach)
    least = torch.full_like(reach, float("inf"))

    def best_with(exponent: Tensor) -> tuple[Tensor, Tensor]:
        exponent = exponent.clamp(0, 255)
        step = (top * factor(exponent))[..., None]
        error = (_value(_nearest(parts, step, bits), step, bits) - parts).square_()
        if weight is not None:
            error *= weight
        total = error.sum(dim=-1)
        better = total < least
        return torch.where(better, exponent, best), torch.where(better, total, least)

    for below in _TRIED:
        best, least = best_with(first + below)
    middle = best
    for beside in (-1, 1):
        best, least = best_with(middle + beside)
    return best.to(torch.uint8)


def _code_columns(w: Tensor, spread: Tensor | None, bits: int, group: int) -> Level:
    """One level of rows ``(n, d)``; errors go from column to column."""
    n, d = w.shape
    unit = _unit(w)
    evened = w / unit[:, None]
    top = _tops(evened, bits)
    codes = torch.empty(n, d, dtype=torch.uint8, device=w.device)
    exponent = torch.empty(n, -(-d // group), dtype=torch.uint8, device=w.device)

    step = torch.empty_like(top)  # of the group at hand

    def begin(start: int, stop: int, block: Tensor) -> None:
        # Fitted to what feedback has made of the group.
        fitted = _fit_exponents(block, top, bits, None)
        exponent[:, start // group] = fitted
        step.copy_(top * factor(fitted))

    def nearest(c: int, column: Tensor) -> Tensor:
        code = _nearest(column, step, bits)
        codes[:, c] = code
        return _value(code, step, bits)

    feedback.round_columns(evened, spread, nearest, begin=begin, block=group)
    return Level(bits, codes, exponent, top * unit, group)


def _code_neurons(
    w: Tensor, spread: Tensor | None, bits: int, group: int, weight: Tensor | None
) -> Level:
    """One level of rows ``(n, d)``; errors go from row to row, whose steps stay what they were."""
    n, d = w.shape
    pad = -d % group
    unit = _unit(w)
    evened = w / unit[:, None]
    top = _tops(evened, bits)
    parts = functional.pad(evened, (0, pad)).view(n, -1, group)
    # Padding weighs nothing: no level is zero.
    importance = w.new_ones(d, dtype=torch.float32) if weight is None else weight
    importance = functional.pad(importance, (0, pad)).view(-1, group)
    exponent = _fit_exponents(parts, top[:, None], bits, importance)
    codes = torch.empty(n, d, dtype=torch.uint8, device=w.device)
    level = Level(bits, codes, exponent, top * unit, group)
    steps = level.steps()

    def nearest(j: int, row: Tensor) -> Tensor:
        step = steps[j].repeat_interleave(group)[:d]
        code = _nearest(row, step, bits)
        codes[j] = code
        return _value(code, step, bits)

    feedback.round_columns(w.T, spread, nearest)
    return level
