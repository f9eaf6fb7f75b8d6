"""Few-bit weights that replace the model's own, to compare with: rounded, and calibrated.

In both, 64 neighbouring weights of a row share a scale, and two usual codes are tried: symmetric,
with levels at odd multiples of half a step (one 16-bit scale a group), and from a minimum on (a
16-bit scale and a 16-bit minimum).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codes import feedback

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


def gptq(weight: Tensor, moment: Tensor, bits: int) -> tuple[Tensor, float]:
    """Round a matrix to few bits column by column, making up for the errors in later columns.

    The error of a column moves what is left of its row so that the product with the calibration
    inputs changes least. Both codes are tried, each with columns in their order, where a group's
    scale is fitted when its first column is reached, and with columns of large inputs first, where
    scales are fitted beforehand; the clipping point of every group is the best of six. The variant
    of least error is taken.

    Args:
        weight: ``(n, d)``, floating.
        moment: Second moment of the inputs, ``(d, d)``, float64.
        bits: 2 to 8.

    Returns:
        The rounded matrix in the shape and dtype of `weight`, and its size in bytes.

    Raises:
        ValueError: `bits` is out of range.

    Source:
        Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: accurate post-training quantization for
        generative pre-trained transformers", 2022.
    """
    _check_bits("gptq", bits)
    n, d = weight.shape
    w = weight.detach().float()
    diagonal = moment.diagonal()
    damp = feedback.DAMP * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    importance = (diagonal + damp).float()
    orders = [torch.arange(d, device=w.device), importance.argsort(descending=True, stable=True)]
    # Everything below is for all variants at once: (n_orders, n_codes, n, columns).
    factor = torch.stack([feedback.spread(moment[order][:, order]) for order in orders])
    grids = [_fit_grid(w, importance, bits, affine=affine) for affine in (False, True)]
    low = torch.stack([torch.stack([g[0][:, o] for g in grids]) for o in orders])
    step = torch.stack([torch.stack([g[1][:, o] for g in grids]) for o in orders])
    left = torch.stack([w[:, order].expand(2, n, d) for order in orders]).contiguous()
    rounded = torch.empty_like(left)
    for start in range(0, d, GROUP):
        stop = min(start + GROUP, d)
        for code, affine in enumerate((False, True)):
            now = left[0, code, :, start:stop]
            fitted = _fit_grid(now, importance[start:stop], bits, affine=affine)
            low[0, code, :, start:stop], step[0, code, :, start:stop] = fitted
        error = torch.empty_like(left[..., start:stop])
        for i in range(start, stop):
            column = left[..., i]
            rounded[..., i] = _on_grid(column, low[..., i], step[..., i], bits)
            error[..., i - start] = (column - rounded[..., i]) / factor[:, None, None, i, i]
            row = factor[:, None, None, i, i + 1 : stop]
            left[..., i + 1 : stop] -= error[..., i - start, None] * row
        left[..., stop:] -= error @ factor[:, None, start:stop, stop:]
    best, least, scales = w, float("inf"), 0
    for order, of_order in zip(orders, rounded, strict=True):
        for code, found in enumerate(of_order):
            back = torch.empty_like(w)
            back[:, order] = found
            total = moment_error(back - w, moment)
            if total < least:
                best, least, scales = back, total, code + 1
    return best.to(weight.dtype).contiguous(), n_bytes(n, d, bits, scales)


def moment_error(difference: Tensor, moment: Tensor) -> float:
    """Give the mean squared error of a product whose weights differ: ``tr(D M D')``."""
    wide = difference.double()
    return float(((wide @ moment) * wide).sum())


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


def _fit_grid(w: Tensor, importance: Tensor, bits: int, *, affine: bool) -> tuple[Tensor, Tensor]:
    """Lowest level and step of every weight ``(n, d)``, the best of six clipping points a group.

    The error counts by the importance ``(d,)`` of its column.
    """
    n, d = w.shape
    groups = -(-d // GROUP)
    missing = groups * GROUP - d
    # What is missing at the end repeats the last column and counts for nothing.
    parts = F.pad(w, (0, missing), mode="replicate").view(n, groups, GROUP)
    weight = F.pad(importance, (0, missing)).view(groups, GROUP)
    levels = 2**bits
    if affine:
        bottom, top = parts.amin(dim=2, keepdim=True), parts.amax(dim=2, keepdim=True)
    else:
        peak = parts.abs().amax(dim=2, keepdim=True)
        bottom, top = -peak, peak
    best_low, best_step = torch.zeros_like(bottom), torch.zeros_like(bottom)
    least = torch.full_like(bottom, float("inf"))
    for clip in _CLIPS:
        if affine:
            low = (bottom * clip).half().float()
            step = ((top - bottom) * clip / (levels - 1)).half().float()
        else:
            step = (top * clip * 2 / levels).half().float()
            low = step * (0.5 - levels / 2)
        error = (_on_grid(parts, low, step, bits) - parts).square() * weight
        total = error.sum(dim=2, keepdim=True)
        better = total < least
        best_low = torch.where(better, low, best_low)
        best_step = torch.where(better, step, best_step)
        least = torch.where(better, total, least)
    return (
        best_low.expand(n, groups, GROUP).flatten(1)[:, :d],
        best_step.expand(n, groups, GROUP).flatten(1)[:, :d],
    )


def _on_grid(w: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest of the levels ``low + q step``."""
    code = torch.round((w - low) / torch.where(step > 0, step, torch.ones_like(step)))
    rounded: Tensor = code.clamp(0, 2**bits - 1) * step + low
    return rounded
