"""Rotation of the inputs of a linear map, so that no channel stands out before it is coded.

A block Hadamard transform: channels are dealt out over blocks by their energy and get random signs,
then every block of the largest power of two that divides the width, at most `BLOCK_MAX`, is
transformed. With ``x' = (sign * x[perm]) H`` and ``W' = (sign * W[:, perm]) H`` products stay, as H
is orthogonal. Sums and differences alone: every instruction set gives the same bits.

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


def block_of(width: int) -> int:
    """Give the largest power of two that divides a width, at most `BLOCK_MAX`."""
    return min(width & -width, BLOCK_MAX)


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of inputs of one width.

    Attributes:
        perm: Channel that stands at each place, ``(cols,)``, int32, a permutation.
        sign: ``(cols,)``, int8, 1 or -1, by place.
    """

    perm: Tensor
    sign: Tensor

    @property
    def block(self) -> int:
        """Channels that are transformed together, a power of two."""
        return block_of(len(self.perm))

    def inputs(self, x: Tensor) -> Tensor:
        """Rotate inputs ``(..., cols)``, in their dtype."""
        dealt: Tensor = x[..., self.perm.long()] * self.sign.to(x.dtype)
        rotated = butterflies(dealt, self.block) * math.sqrt(1 / self.block)
        return rotated

    def weight(self, weight: Tensor) -> Tensor:
        """Rotate a weight ``(rows, cols)`` so that it takes rotated inputs: the same operation."""
        return self.inputs(weight)

    def undo(self, rotated: Tensor) -> Tensor:
        """Give back what `inputs` or `weight` rotated, ``(..., cols)``, but for rounding."""
        dealt = (
            butterflies(rotated, self.block)
            * math.sqrt(1 / self.block)
            * self.sign.to(rotated.dtype)
        )
        back = torch.empty_like(dealt)
        back[..., self.perm.long()] = dealt
        return back


def fit(energy: Tensor, *, seed: int = 0) -> Rotation:
    """Choose a rotation: the j-th strongest channel goes to block ``j % n``, place ``j // n``.

    Args:
        energy: Of each channel, its mean square, ``(cols,)``, finite.
        seed: Of the signs.

    Raises:
        ValueError: The energies are not finite, or there is none.
    """
    if energy.dim() != 1 or len(energy) == 0 or not bool(torch.isfinite(energy).all()):
        raise ValueError("[rotation] energy: want (cols,) finite numbers, at least one.")
    cols = len(energy)
    block = block_of(cols)
    order = torch.argsort(energy.double().cpu(), descending=True, stable=True)
    perm = order.reshape(block, cols // block).T.reshape(-1)
    draws = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (cols,), generator=draws, device="cpu") * 2 - 1
    return Rotation(perm.to(torch.int32), sign.to(torch.int8))


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
