"""Few-bit codes of a weight matrix: how they are fitted, packed and unpacked.

The layout is that of ``cpp/include/csfast/planes.h``. A row of weights ``w`` is divided by the
channel equaliser, then coded: ``w[c] / equal[c] ~ scale * level(u)`` with one scale a row, best in
least squares. Of ``bits`` bits, ``u`` is in ``[0, 2^bits)`` and its level ``2 u - (2^bits - 1)``;
ternary, ``u`` is in ``[0, 2]`` and its level ``u - 1``.

Functions that take ``bits`` take 1 to 4 or ``"ternary"``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import TERNARY, Code
from . import feedback

CHUNK = 128  # channels of planes that are packed together
TRITS = 5  # ternary codes in a byte
GROUP = 16  # bytes of ternary codes that are packed together
BITS = (1, 2, 3, 4)
CODES: tuple[Code, ...] = (*BITS, TERNARY)
_CLIPS = tuple(0.20 + 0.05 * i for i in range(17))  # fractions of the row maximum, tried in turn
_SORT_ROWS = 1024  # sorted at a time: values, places and float64 sums are some 50 bytes a weight


def equalizer(mean_square: Tensor) -> Tensor:
    """Give the factors that even out the channels of an activation.

    Powers of two, so that scaling a channel by a power of two and its weights by the inverse
    changes neither codes nor measurements, bit for bit.

    Args:
        mean_square: Mean of the squared activation of each channel, ``(d,)``.

    Returns:
        ``(d,)``, float32, positive: ``2^-round(log2(rms))``. A channel that was always zero gets
        the factor of the median channel.

    Raises:
        ValueError: A mean square is negative or not finite.
    """
    ms = mean_square.detach().double().cpu()
    if ms.ndim != 1 or not bool(torch.isfinite(ms).all()) or bool((ms < 0).any()):
        raise ValueError("[equalizer] mean_square: want a finite, non-negative vector (d,).")
    live = ms > 0
    typical = ms[live].median() if bool(live.any()) else torch.tensor(1.0, dtype=torch.float64)
    exponent = -torch.round(0.5 * torch.log2(torch.where(live, ms, typical)))
    return torch.exp2(exponent.clamp(-60, 60)).float()


def fit_scale(weight: Tensor, equal: Tensor, bits: Code) -> Tensor:
    """Fit one scale a row: least squared error, of bits over a fixed set of clipping points.

    Ternary, of every scale there is: the zone that goes to zero ends at half the scale, so the
    row's k largest magnitudes have a level of their mean, and the best k is looked up.

    Args:
        weight: ``(n, d)``, floating.
        equal: ``(d,)``, float32.
        bits: Code of a weight.

    Returns:
        ``(n,)``, float32, non-negative: of bits, half the distance of two neighbouring levels;
        ternary, all of it. A row of zeros has scale 0.

    Raises:
        ValueError: There is no such code.
    """
    _check_code(bits)
    w = weight.detach().float() / equal.to(weight.device)
    if isinstance(bits, str):
        starts = range(0, max(len(w), 1), _SORT_ROWS)
        return torch.cat([_fit_ternary(w[start : start + _SORT_ROWS]) for start in starts])
    levels = 2**bits
    peak = w.abs().amax(dim=1)
    best = torch.full_like(peak, float("inf"))
    scale = torch.zeros_like(peak)
    for clip in _CLIPS:
        candidate = peak * clip / levels
        decoded = candidate[:, None] * levels_of(_code(w, candidate, bits), bits)
        error = (decoded - w).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
    return scale


def encode(
    weight: Tensor, equal: Tensor, scale: Tensor, bits: Code, factor: Tensor | None = None
) -> Tensor:
    """Code and pack the rows of one matrix.

    Args:
        weight: ``(n, d)``, floating.
        equal: ``(d,)``, float32.
        scale: ``(n,)``, float32, from `fit_scale`.
        bits: Code of a weight.
        factor: `feedback.spread` of the second moment of the equalised inputs, ``(d, d)``: codes
            then make up for each other's errors. None codes every weight by itself.

    Returns:
        ``(n, groups, group_bytes)``, uint8, contiguous: of bits ``(n, chunks, 16 * bits)``.

    Raises:
        ValueError: There is no such code.
    """
    _check_code(bits)
    w = weight.detach().float() / equal.to(weight.device)
    if factor is None:
        return pack(_code(w, scale, bits), bits)
    codes = torch.empty(w.T.shape, dtype=torch.uint8, device=w.device)

    def nearest(c: int, column: Tensor) -> Tensor:
        codes[c] = _code(column[:, None], scale, bits)[:, 0]
        return scale * levels_of(codes[c], bits)

    feedback.round_columns(w, factor, nearest)
    return pack(codes.T, bits)


def pack(codes: Tensor, bits: Code) -> Tensor:
    """Pack codes ``(n, d)`` to ``(n, groups, group_bytes)`` bytes."""
    _check_code(bits)
    if isinstance(bits, str):
        return _pack_trits(codes)
    n, d = codes.shape
    chunks = -(-d // CHUNK)
    u = torch.zeros(n, chunks * CHUNK, dtype=torch.uint8, device=codes.device)
    u[:, :d] = codes
    u = u.view(n, chunks, CHUNK)
    low = _pack_pairs(u & 3)
    if bits == 1:
        return _pack_bits(u)
    if bits == 2:
        return low
    high = _pack_bits(u >> 2) if bits == 3 else _pack_pairs(u >> 2)
    return torch.cat([low, high], dim=2)


def unpack(packed: Tensor, bits: Code, d: int) -> Tensor:
    """Unpack ``(n, groups, group_bytes)`` bytes to codes ``(n, d)``, uint8."""
    _check_code(bits)
    if isinstance(bits, str):
        return _unpack_trits(packed)[:, :d]
    if bits == 1:
        u = _unpack_bits(packed)
    else:
        u = _unpack_pairs(packed[..., :32])
        if bits > 2:
            high = packed[..., 32:]
            u = u | ((_unpack_bits(high) if bits == 3 else _unpack_pairs(high)) << 2)
    return u.flatten(1)[:, :d]


def levels_of(codes: Tensor, bits: Code) -> Tensor:
    """Give the integers that codes stand for, float32, in the shape of `codes`."""
    _check_code(bits)
    level: Tensor = (
        codes.float() - 1 if isinstance(bits, str) else 2 * codes.float() - level_max(bits)
    )
    return level


def n_codes(bits: Code) -> int:
    """Give how many codes a weight may have."""
    return 3 if isinstance(bits, str) else 2**bits


def level_max(bits: Code) -> int:
    """Give the largest level of a code."""
    return 1 if isinstance(bits, str) else 2**bits - 1


def row_shape(d: int, bits: Code) -> tuple[int, int]:
    """Give ``(groups, group_bytes)`` of one packed row of `d` channels."""
    _check_code(bits)
    if isinstance(bits, str):
        return -(-d // (TRITS * GROUP)), GROUP
    return -(-d // CHUNK), 16 * bits


def n_bytes(n_neurons: int, d: int, bits: Code) -> int:
    """Bytes that sensing one layer reads: codes, two scales a neuron, the equaliser."""
    groups, group_bytes = row_shape(d, bits)
    return n_neurons * 2 * groups * group_bytes + n_neurons * 8 + d * 4


def _check_code(bits: Code) -> None:
    if bits not in CODES:
        raise ValueError(f'[planes] bits = {bits!r}: want 1, 2, 3, 4 or "{TERNARY}".')


def _fit_ternary(w: Tensor) -> Tensor:
    """Best scale of every row ``(n, d)``: keeping k saves (sum of the k largest)^2 / k."""
    total = w.abs().sort(dim=1, descending=True).values.double().cumsum(dim=1)
    count = torch.arange(1, w.shape[1] + 1, device=w.device, dtype=torch.float64)
    best = (total.square() / count).argmax(dim=1, keepdim=True)
    scale: Tensor = (total.gather(1, best) / (best + 1)).squeeze(1).float()
    return scale


def _code(w: Tensor, scale: Tensor, bits: Code) -> Tensor:
    """Nearest level of every weight; rows of scale 0 take the level just above the middle."""
    if isinstance(bits, str):
        half = scale[:, None] / 2
        return (w > half).to(torch.uint8) + (~(w < -half)).to(torch.uint8)
    step = 2 * scale[:, None]
    u: Tensor = torch.floor(w / torch.where(step > 0, step, torch.ones_like(step)))
    u = (u + 2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return u.to(torch.uint8)


def _pack_pairs(u: Tensor) -> Tensor:
    packed = torch.zeros_like(u[:, :, :32])
    for s in range(4):
        packed |= u[:, :, 32 * s : 32 * s + 32] << 2 * s
    return packed


def _unpack_pairs(p: Tensor) -> Tensor:
    return torch.cat([p >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)


def _pack_bits(u: Tensor) -> Tensor:
    packed = torch.zeros_like(u[:, :, :16])
    for i in range(8):
        packed |= u[:, :, i::8] << i
    return packed


def _unpack_bits(p: Tensor) -> Tensor:
    return torch.stack([p >> shift & 1 for shift in range(8)], dim=3).flatten(2)


def _pack_trits(codes: Tensor) -> Tensor:
    """Five codes a byte, ``w`` channels apart in a row of ``w`` bytes."""
    n, d = codes.shape
    groups, _ = row_shape(d, TERNARY)
    u = torch.zeros(n, TRITS * groups * GROUP, dtype=torch.int32, device=codes.device)
    u[:, :d] = codes
    value = torch.zeros(n, groups * GROUP, dtype=torch.int32, device=codes.device)
    for digit in u.chunk(TRITS, dim=1):
        value = 3 * value + digit
    # The fraction value / 3^5, rounded up to a 256th.
    return ((256 * value + 242) // 243).to(torch.uint8).view(n, groups, GROUP)


def _unpack_trits(packed: Tensor) -> Tensor:
    rest = packed.flatten(1).int()
    digits = []
    for _ in range(TRITS):
        digits.append(3 * rest >> 8)
        rest = 3 * rest & 255
    return torch.cat(digits, dim=1).to(torch.uint8)


def quantize(x: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to a byte each, as ``sense.h`` specifies it.

    Args:
        x: Activations, ``(batch, d)``, floating.
        equal: Channel equaliser, ``(d,)``, float32.

    Returns:
        ``q (batch, d)``, int8, and ``scale (batch,)``, float32: not-a-number for a row that is
        not finite.
    """
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
