"""Trellis codes: what they lose, how they are packed, and that paths are the best there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from csfast.codes import trellis

# Of the variance of normal draws. Over ten seeds of 4,096 draws the means were .286, .0815, .0227
# and .0071, and the largest 6 % above its mean.
LOSS = {1: 0.283, 2: 0.0800, 3: 0.0226, 4: 0.0070}


def _columns(rows: int, cols: int, bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    levels = trellis.table(bits) * trellis.UNIT[bits]
    coded = [trellis.encode(draws[:, c], levels) for c in range(cols)]
    return torch.stack([i for i, _ in coded], 1), torch.stack([u for _, u in coded], 1)


def test_loses_what_a_trellis_loses():
    draws = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    for bits in trellis.BITS:
        levels = trellis.table(bits) * trellis.UNIT[bits]
        index, _ = trellis.encode(draws, levels)
        loss = (draws - levels[index.int()]).square().mean() / draws.square().mean()
        assert loss < 1.06 * LOSS[bits]
        # Longer memory is worth more, and three steps already more than fitted levels alone.
        short, _ = trellis.encode(draws, levels, nu=3)
        assert loss < (draws - levels[short.int()]).square().mean() / draws.square().mean()


def test_takes_the_best_of_all_paths():
    # Every path of four steps, by brute force, for rows that share a lane.
    bits, nu = 1, 3
    levels = trellis.table(bits).double()
    h0, h1 = trellis.POLYNOMIALS[nu]
    target = torch.zeros(4 * trellis.LANES, dtype=torch.float64)
    target[:: trellis.LANES] = torch.tensor([40.0, -20.0, 5.0, 61.0])
    weight = torch.ones_like(target)
    weight[trellis.LANES] = 3.0
    index, u = trellis.encode(target, levels, weight=weight, nu=nu)
    costs = {}
    for path in itertools.product((0, 1), repeat=4):
        cost = 0.0
        for t in range(4):
            z1 = sum(path[t - i] for i in range(t + 1) if h0 >> i & 1) % 2
            z0 = sum(path[t - i] for i in range(t + 1) if h1 >> i & 1) % 2
            row = t * trellis.LANES
            cost += float(weight[row] * (target[row] - levels[2 * z1 + z0]) ** 2)
        costs[path] = cost
    chosen = tuple(u[:: trellis.LANES].tolist())
    assert costs[chosen] == min(costs.values())
    error = (target - levels[index.int()])[:: trellis.LANES]
    assert costs[chosen] == pytest.approx(float((weight[:: trellis.LANES] * error**2).sum()))


def test_unpacks_what_it_packs_at_every_size():
    for bits, (rows, cols) in itertools.product(
        trellis.BITS, ((1, 1), (130, 6), (257, 3), (48, 8))
    ):
        index, u = _columns(rows, cols, bits)
        codes = trellis.pack(index, u, bits)
        assert codes.shape == (-(-rows // 64), -(-cols // 8), bits, 64)
        assert torch.equal(trellis.indices(codes, rows, cols), index)
        levels = trellis.table(bits)
        assert torch.equal(levels, -levels.flip(0)) and int(levels.max()) == trellis.LARGEST
        assert bool((levels.diff() > 0).all())
        assert torch.equal(trellis.values(codes, rows, cols), levels[index.int()])


def test_refuses_what_is_no_code():
    index, u = _columns(40, 4, 3)
    with pytest.raises(ValueError, match=r"\[trellis\] bits = 5: want 1 to 4"):
        trellis.pack(index, u, 5)
    with pytest.raises(ValueError, match="lowest two bits follow from u"):
        trellis.pack(index ^ 1, u, 3)
    with pytest.raises(ValueError, match=r"for 400 rows of 4, bits 1 to 4"):
        trellis.indices(trellis.pack(index, u, 3), 400, 4)
    with pytest.raises(ValueError, match=r"\[trellis\] nu = 2: want 3 to 8"):
        trellis.encode(torch.zeros(4), trellis.table(1), nu=2)
