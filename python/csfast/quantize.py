"""Few-bit weights that replace the model's own, to compare with: rounded, and calibrated.

In both, 64 neighbouring weights of a row share a scale, and two usual codes are tried: symmetric,
with levels at odd multiples of half a step (one 16-bit scale a group), and from a minimum on (a
16-bit scale and a 16-bit minimum).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # weights of a row that share a scale
_CLIPS = (0.45, 0.55, 0.65, 0.75, 0.85, 1.0)  # fractions of a group's maximum, tried in turn


def round_to_nearest(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    """Round a matrix to few bits.

    The better code (least squared error over the matrix) is taken: symmetric with the best of six
    clipping points, or from minimum to maximum.

    Args:
        weight: ``(n, d)``, floating.
        bits: 2 to 8.

    Returns:
        The rounded matrix in the shape and dtype of `weight`, and its size in bytes.

    Raises:
        ValueError: `bits` is out of range.
    """
    _check_bits("rtn", bits)
    n, d = weight.shape
    groups = -(-d // GROUP)
    w = F.pad(weight.detach().float(), (0, groups * GROUP - d), mode="replicate")
    w = w.view(n, groups, GROUP)
    symmetric, affine = _symmetric(w, bits), _affine(w, bits)
    error = [(rounded - w).square().sum().item() for rounded in (symmetric, affine)]
    best, scales = (symmetric, 1) if error[0] <= error[1] else (affine, 2)
    rounded = best.flatten(1)[:, :d].to(weight.dtype).contiguous()
    return rounded, n_bytes(n, d, bits, scales)


def n_bytes(n: int, d: int, bits: int, scales: int) -> float:
    """Give the bytes of ``(n, d)`` codes with so many 16-bit numbers a group."""
    return n * d * bits / 8 + n * -(-d // GROUP) * 2.0 * scales


def _check_bits(kind: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"[ablate] {kind}-int{bits}: want 2 to 8 bits.")


def _symmetric(w: Tensor, bits: int) -> Tensor:
    """Levels at odd multiples of half a step, so that none is wasted on a zero."""
    half = 2 ** (bits - 1)
    peak = w.abs().amax(dim=-1, keepdim=True)
    best = torch.zeros_like(w)
    least = torch.full_like(peak, float("inf"))
    for clip in _CLIPS:
        step = (peak * clip / half).half().float()
        code = torch.floor(w / torch.where(step > 0, step, torch.ones_like(step)))
        rounded = (code.clamp(-half, half - 1) + 0.5) * step
        error = (rounded - w).square().sum(dim=-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, rounded, best), torch.where(better, error, least)
    return best


def _affine(w: Tensor, bits: int) -> Tensor:
    """Levels from the group's minimum to its maximum."""
    low, high = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)
    low = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float()
    code = torch.round((w - low) / torch.where(step > 0, step, torch.ones_like(step)))
    rounded: Tensor = code.clamp(0, 2**bits - 1) * step + low
    return rounded
