"""Error feedback: what rounding one column leaves undone moves the columns that come after.

Rounding the weights ``W (n, d)`` of a linear map to ``Q`` changes its output on inputs of second
moment ``M (d, d)`` by ``tr((W - Q) M (W - Q)')`` in the mean square. Column by column, the error of
one is made up for as well as the columns after it can.

Source:
    Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: accurate post-training quantization for generative
    pre-trained transformers", 2022.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMP = 0.01  # of the mean second moment, added to all: what the sample never showed stays bounded
BLOCK = 64  # columns whose errors are spread over the rest at once

Nearest = Callable[[int, Tensor], Tensor]  # column number, column (n,) -> the value it is given


def spread(moment: Tensor, *, overwrite: bool = False) -> Tensor:
    """Give how an error spreads: the upper Cholesky factor of the inverse moment.

    Args:
        moment: Second moment of the inputs, ``(d, d)``, floating; damped by `DAMP` of its mean.
        overwrite: Whether a float64 moment may be overwritten, which saves its size of memory.

    Returns:
        ``(d, d)``, float32, upper triangular: row `i` over its diagonal is what an error of column
        `i` adds to the columns after it.

    Raises:
        ValueError: The moment is not square or not finite.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"[feedback] moment of shape {tuple(moment.shape)}: want (d, d).")
    wide = moment.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("[feedback] moment: not finite; want finite inputs.")
    damp = DAMP * wide.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = wide if overwrite else wide.clone()
    damped.diagonal().add_(damp)
    # One name for all of them, so that no more than two are held at a time.
    part: Tensor = torch.linalg.cholesky(damped)
    del wide, damped
    part = torch.cholesky_inverse(part)
    part = torch.linalg.cholesky(part, upper=True)
    return part.float()


def round_columns(
    weight: Tensor,
    factor: Tensor | None,
    nearest: Nearest,
    *,
    begin: Callable[[int, int, Tensor], None] | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Round a matrix column by column.

    Args:
        weight: ``(n, d)``, float32; it is not changed.
        factor: From `spread`; None rounds every column by itself.
        nearest: Gives the value of a column.
        begin: Called before the columns ``[start, stop)`` of a block with what feedback has made of
            them, ``(n, stop - start)``; to fit steps.
        block: Columns of a block.

    Returns:
        The rounded matrix, ``(n, d)``, float32.
    """
    d = weight.shape[1]
    left = weight.clone()
    rounded = torch.empty_like(left)
    for start in range(0, d, block):
        stop = min(start + block, d)
        # Columns as rows: in a matrix of many columns, each entry of one lies on a page of its own.
        part = left[:, start:stop].T.contiguous()
        if begin is not None:
            begin(start, stop, part.T)
        value, error = torch.empty_like(part), torch.zeros_like(part)
        for i in range(stop - start):
            c = start + i
            value[i] = nearest(c, part[i])
            if factor is None:
                continue
            error[i] = (part[i] - value[i]) / factor[c, c]
            part[i + 1 :] -= error[i] * factor[c, c + 1 : stop, None]
        rounded[:, start:stop] = value.T
        if factor is not None and stop < d:
            left[:, stop:] -= error.T.contiguous() @ factor[start:stop, stop:]
    return rounded
