"""Rotation of the inputs of a linear map, so that no channel stands out before it is coded.

A block Hadamard transform: channels are scaled so that all columns of the weight are of one size,
get random signs and are dealt out over blocks by their energy, then every block of the largest
power of two that divides the width, at most `BLOCK_MAX`, is transformed. Products stay with
``x' = (scale * x[perm]) H`` and ``W' = (W[:, perm] / scale) H``, as H is orthogonal. Sums and
differences alone: every instruction set gives the same bits.

Columns of one size, because with error feedback what a code leaves of a matrix grows with the mean
of their squares over the geometric mean: the scale of a channel moves the determinant of the
moment, which feedback works against. Gains of norms that are folded in make that ratio 2.0 in the
mean of SmolLM2's projections before attention, and 7 in that of Gemma 3's.

Source:
    Ashkboos et al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024; Tseng et al.,
    "QuIP#: even better LLM quantization with Hadamard incoherence and lattice codebooks", 2024.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

BLOCK_MAX = 128
COLS_MAX = 1 << 16  # so that a channel and its scale are one word
COLUMN_LEAST = 2.0**-40  # of the mean square of a column


def block_of(width: int) -> int:
    """Give the largest power of two that divides a width, at most `BLOCK_MAX`."""
    return min(width & -width, BLOCK_MAX)


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of inputs of one width.

    Attributes:
        perm: Channel that stands at each place, ``(cols,)``, int32, a permutation.
        scale: What a channel is multiplied by, with a random sign, by place: ``(cols,)``, float32
            of bfloat16's digits, not 0.
    """

    perm: Tensor
    scale: Tensor

    @classmethod
    def of(cls, words: Tensor) -> Rotation:
        """Read what `words` gives."""
        return cls(words & 0xFFFF, (words & -0x10000).view(torch.float32))

    def words(self) -> Tensor:
        """Give permutation and scales as kernels read them, ``(cols,)``, int32.

        Below the channel, above the scale as bfloat16.
        """
        return self.scale.view(torch.int32) | self.perm

    def to(self, device: torch.device) -> Rotation:
        """Give it on a device."""
        return Rotation(self.perm.to(device), self.scale.to(device))

    @property
    def block(self) -> int:
        """Channels that are transformed together, a power of two."""
        return block_of(len(self.perm))

    def inputs(self, x: Tensor) -> Tensor:
        """Rotate inputs ``(..., cols)``, in their dtype."""
        return self._turned(x[..., self.perm.long()] * self.scale.to(x.dtype))

    def weight(self, weight: Tensor) -> Tensor:
        """Rotate a weight ``(rows, cols)`` so that it takes rotated inputs, in its dtype."""
        return self._turned(weight[..., self.perm.long()] / self.scale.to(weight.dtype))

    def undo(self, rotated: Tensor) -> Tensor:
        """Give back the weight that `weight` rotated, ``(..., cols)``, but for rounding."""
        dealt = self._turned(rotated) * self.scale.to(rotated.dtype)
        back = torch.empty_like(dealt)
        back[..., self.perm.long()] = dealt
        return back

    def _turned(self, dealt: Tensor) -> Tensor:
        rotated: Tensor = butterflies(dealt, self.block) * math.sqrt(1 / self.block)
        return rotated


def fit(energy: Tensor, *, column: Tensor | None = None, seed: int = 0) -> Rotation:
    """Choose a rotation: the j-th strongest channel goes to block ``j % n``, place ``j // n``.

    Args:
        energy: Of each channel, its mean square, ``(cols,)``, finite.
        column: Of each column of the weight, its mean square, ``(cols,)``, finite; alike if left
            out. One that is nearly 0 counts as `COLUMN_LEAST` of the mean.
        seed: Of the signs.

    Raises:
        ValueError: Energies or mean squares are not finite, or there is none, or there are more
            than `COLS_MAX`.
    """
    squares = torch.ones_like(energy) if column is None else column
    for name, each in (("energy", energy), ("column", squares)):
        if each.dim() != 1 or len(each) == 0 or not bool(torch.isfinite(each).all()):
            raise ValueError(f"[rotation] {name}: want (cols,) finite numbers, at least one.")
    cols = len(energy)
    if len(squares) != cols or cols > COLS_MAX:
        raise ValueError(
            f"[rotation] {cols} channels, {len(squares)} columns: want as many, at most {COLS_MAX}."
        )
    squares = squares.double().cpu()
    mean = squares.mean() if bool(squares.any()) else torch.ones((), dtype=torch.float64)
    size = (squares / mean).clamp_min(COLUMN_LEAST).sqrt().bfloat16()
    block = block_of(cols)
    strength = energy.double().cpu() * size.double().square()
    order = torch.argsort(strength, descending=True, stable=True)
    perm = order.reshape(block, cols // block).T.reshape(-1)
    draws = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (cols,), generator=draws, device="cpu") * 2 - 1
    return Rotation(perm.to(torch.int32), size[perm].float() * sign)


def butterflies(x: Tensor, block: int) -> Tensor:
    """Transform neighbouring ``block`` entries of ``(..., cols)``, not normalised.

    Strides 1, 2, 4, ... in turn, each from (a, b) to (a + b, a - b).
    """
    shape = x.shape
    stride = 1
    while stride < block:
        pairs = x.reshape(*shape[:-1], -1, 2, stride)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([first + second, first - second], dim=-2).reshape(shape)
        stride *= 2
    return x
