"""Few-bit codes of a weight matrix: how they are fitted, packed and unpacked.

The layout is that of ``cpp/include/csfast/planes.h``. A row of weights ``w`` is divided by the
channel equaliser, then coded uniformly: ``w[c] / equal[c] ~ scale * (2 u - (2^bits - 1))`` with
``u`` in ``[0, 2^bits)`` and one scale a row, the best of a fixed set in least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128  # channels that are packed together
BITS = (1, 2, 3, 4)
_CLIPS = tuple(0.20 + 0.05 * i for i in range(17))  # fractions of the row maximum, tried in turn


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


def fit_scale(weight: Tensor, equal: Tensor, bits: int) -> Tensor:
    """Fit one scale a row: least squared error over a fixed set of clipping points.

    Args:
        weight: ``(n, d)``, floating.
        equal: ``(d,)``, float32.
        bits: 1 to 4.

    Returns:
        ``(n,)``, float32, non-negative: half the distance of two neighbouring levels. A row of
        zeros has scale 0.
    """
    _check_bits(bits)
    w = weight.detach().float() / equal.to(weight.device)
    levels = 2**bits
    peak = w.abs().amax(dim=1)
    best = torch.full_like(peak, float("inf"))
    scale = torch.zeros_like(peak)
    for clip in _CLIPS:
        candidate = peak * clip / levels
        error = (_decode(_code(w, candidate, bits), candidate, bits) - w).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
    return scale


def encode(weight: Tensor, equal: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Code and pack the rows of one matrix.

    Args:
        weight: ``(n, d)``, floating.
        equal: ``(d,)``, float32.
        scale: ``(n,)``, float32, from `fit_scale`.
        bits: 1 to 4.

    Returns:
        ``(n, chunks, 16 * bits)``, uint8, contiguous.
    """
    _check_bits(bits)
    w = weight.detach().float() / equal.to(weight.device)
    return pack(_code(w, scale, bits), bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``(n, d)`` in ``[0, 2^bits)`` to ``(n, chunks, 16 * bits)`` bytes."""
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


def unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """Unpack ``(n, chunks, 16 * bits)`` bytes to codes ``(n, d)``, uint8."""
    if bits == 1:
        u = _unpack_bits(packed)
    else:
        u = _unpack_pairs(packed[..., :32])
        if bits > 2:
            high = packed[..., 32:]
            u = u | ((_unpack_bits(high) if bits == 3 else _unpack_pairs(high)) << 2)
    return u.flatten(1)[:, :d]


def n_bytes(n_neurons: int, d: int, bits: int) -> int:
    """Bytes that sensing one layer reads: codes, two scales a neuron, the equaliser."""
    return n_neurons * 2 * -(-d // CHUNK) * 16 * bits + n_neurons * 8 + d * 4


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"[planes] bits = {bits}: want 1, 2, 3 or 4.")


def _code(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest level of every weight; rows of scale 0 take the level just above the middle."""
    step = 2 * scale[:, None]
    u: Tensor = torch.floor(w / torch.where(step > 0, step, torch.ones_like(step)))
    u = (u + 2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return u.to(torch.uint8)


def _decode(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    level: Tensor = 2.0 * codes.float() - (2**bits - 1)
    return scale[:, None] * level


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
