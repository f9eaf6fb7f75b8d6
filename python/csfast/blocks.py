"""Blocks of neurons that fire together, so that a block is wanted or not as a whole.

Large tiles are what tensor cores read well, and what selection loses by: most of a block's neurons
are read for the sake of a few. Putting neurons together that are active on the same tokens lowers
that loss. The order is csfast's own; the user's weights stay where they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 8  # of the power iteration: the split need not be exact, it is refined
_PASSES = 60  # of swaps at most; most layers settle in half as many
_GAIN = 1e-4  # of the objective: a pass that gains less is the last


def cluster(usage: Tensor, block: int, seed: int = 0) -> Tensor:
    """Order neurons so that neighbours are used by the same tokens.

    The root of the usage, standardised for every neuron, is what neurons are compared by. They are
    split in two along the principal direction, again and again, down to blocks; then pairs of
    neurons change places as long as that raises the sum of correlations within blocks.

    Takes memory for a few matrices ``(n_neurons, n_neurons)`` in float32.

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
    of = torch.empty(len(feature), dtype=torch.int64, device=usage.device)
    for number, members in enumerate(_halved(feature, block, draw)):
        of[members] = number
    if 1 < block < len(feature):
        _swap(feature @ feature.T / feature.shape[1], of)
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
        direction = torch.randn(len(z), generator=draw).to(z)
        for _ in range(_STEPS):
            direction = F.normalize(z @ (z.T @ direction), dim=0)
        order = members[direction.argsort(stable=True)]
        half = (n_blocks + 1) // 2 * block
        todo += [order[half:], order[:half]]
    return found


def _swap(correlation: Tensor, of: Tensor) -> None:
    """Exchange neurons between blocks, in place, while the sum within blocks grows.

    With ``S[i, b]`` the correlation of neuron ``i`` with the members of block ``b``, exchanging
    ``i`` of block ``a`` and ``j`` of block ``b`` gains
    ``S[i, b] - S[i, a] + S[j, a] - S[j, b] + C[i, i] + C[j, j] - 2 C[i, j]``.
    A pass takes the best exchange of every neuron, and each block takes part in one.
    """
    n_blocks = int(of.max()) + 1
    own = correlation.diagonal()
    for _ in range(_PASSES):
        total = correlation @ F.one_hot(of, n_blocks).to(correlation)
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
