"""Blocks of neurons that fire together, so that a block is wanted or not as a whole.

Large tiles are what tensor cores read well, and what selection loses by: most of a block's neurons
are read for the sake of a few. Putting neurons together that are active on the same tokens lowers
that loss. The order is csfast's own; the user's weights stay where they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 4096  # neurons that change places among each other: their correlations have 64 MiB
_STEPS = 8  # of the power iteration: the split need not be exact, it is refined
_PASSES = 60  # of swaps at most; most layers settle in half as many
_GAIN = 1e-4  # of the objective: a pass that gains less is the last


def cluster(usage: Tensor, block: int, seed: int = 0) -> Tensor:
    """Order neurons so that neighbours are used by the same tokens.

    The root of the usage, standardised for every neuron, is what neurons are compared by. They are
    split in two along the principal direction, again and again, down to blocks; then pairs of
    neurons change places as long as that raises the sum of correlations within blocks.

    Takes memory for the usage twice in float32, and for seven matrices of float32 of every pair of
    neurons, 0.5 GB at the most: more than `PART` neurons are split into parts for good.

    Args:
        usage: ``(n_tokens, n_neurons)``, floating, finite and not negative; a thousand tokens or
            more.
        block: Neurons of a block, at least 1.
        seed: Of the start of the power iterations.

    Returns:
        ``(n_neurons,)`` int64, on the device of `usage`: block ``i`` is
        ``perm[i * block : (i + 1) * block]``, ascending; the last block may be short.

    Raises:
        ValueError: The usage is not as above, or the block has no neurons.

    Source:
        Swaps by their gain: Kernighan, Lin, "An efficient heuristic procedure for partitioning
        graphs", Bell System Technical Journal, 1970.
    """
    if usage.ndim != 2 or usage.shape[0] < 1 or usage.shape[1] < 1:
        raise ValueError(
            f"[cluster] usage of shape {tuple(usage.shape)}: want (n_tokens, n_neurons)."
        )
    if block < 1:
        raise ValueError(f"[cluster] block = {block}: want at least 1.")
    if not bool((torch.isfinite(usage) & (usage >= 0)).all()):
        raise ValueError("[cluster] usage: want it finite and not negative.")
    root = usage.detach().float().sqrt()
    root = root - root.mean(dim=0)
    spread = root.square().mean(dim=0).sqrt()
    # A neuron that never changes correlates with nothing.
    feature = torch.where(spread > 0, root / spread, 0.0).T.contiguous()
    draw = torch.Generator().manual_seed(seed)
    whole = max(PART // block, 1) * block
    return torch.cat(
        [part[_ordered(feature[part], block, draw)] for part in _halved(feature, whole, draw)]
    )


def _ordered(feature: Tensor, block: int, draw: torch.Generator) -> Tensor:
    """Order of some neurons, of which ``feature (n, n_tokens)`` is what they are compared by."""
    of = torch.empty(len(feature), dtype=torch.int64, device=feature.device)
    for number, members in enumerate(_halved(feature, block, draw)):
        of[members] = number
    if 1 < block < len(feature):
        _swap(feature @ feature.T / feature.shape[1], of, block)
    return of.argsort(stable=True)


def _halved(feature: Tensor, block: int, draw: torch.Generator) -> list[Tensor]:
    """Blocks by recursive bisection; all but the last are full."""
    todo = [torch.arange(len(feature), device=feature.device)]
    found = []
    while todo:
        members = todo.pop()
        n_blocks = -(-len(members) // block)
        if n_blocks <= 1:
            found.append(members)
            continue
        z = feature[members]
        z = z - z.mean(dim=0)
        direction = torch.randn(len(z), generator=draw, dtype=torch.float32, device="cpu").to(z)
        for _ in range(_STEPS):
            direction = F.normalize(z @ (z.T @ direction), dim=0)
        order = members[direction.argsort(stable=True)]
        half = (n_blocks + 1) // 2 * block
        todo += [order[half:], order[:half]]
    return found


def _swap(correlation: Tensor, of: Tensor, block: int) -> None:
    """Exchange neurons between blocks, in place, while the sum within blocks grows.

    All blocks but the last are full.

    With ``S[i, b]`` the correlation of neuron ``i`` with the members of block ``b``, exchanging
    ``i`` of block ``a`` and ``j`` of block ``b`` gains
    ``S[i, b] - S[i, a] + S[j, a] - S[j, b] + C[i, i] + C[j, j] - 2 C[i, j]``.
    A pass takes the best exchange of every neuron, and each block takes part in one.
    """
    short = -len(of) % block
    own = correlation.diagonal()
    for _ in range(_PASSES):
        beside = F.pad(correlation[:, of.argsort(stable=True)], (0, short))
        total = beside.view(len(of), -1, block).sum(dim=2)
        inside = total.gather(1, of[:, None])
        move = total - inside + own[:, None]  # (n_neurons, n_blocks): half of the gain
        gain = move[:, of]
        gain = gain + gain.T - 2 * correlation
        gain[of[:, None] == of] = 0
        best, partner = gain.max(dim=1)
        order = best.argsort(descending=True, stable=True).tolist()
        gains, partners, blocks = best.tolist(), partner.tolist(), of.tolist()
        busy = set()
        pairs = []
        gained = 0.0
        for i in order:
            j = partners[i]
            if gains[i] <= 0:
                break
            if blocks[i] not in busy and blocks[j] not in busy:
                busy |= {blocks[i], blocks[j]}
                pairs.append((i, j))
                gained += gains[i]
        if gained <= _GAIN * float(inside.sum()):
            return
        left, right = torch.tensor(pairs, device=of.device).T
        of[left], of[right] = of[right], of[left]
