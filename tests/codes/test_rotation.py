"""Rotations of inputs: products stay, strong channels are dealt out."""

from __future__ import annotations

import pytest
import torch

from csfast.codes import rotation


def test_keeps_products_and_comes_back():
    draws = torch.Generator().manual_seed(0)
    for cols in (1, 6, 48, 576, 1536):
        column = torch.rand(cols, generator=draws)
        turn = rotation.fit(torch.rand(cols, generator=draws), column=column, seed=3)
        assert sorted(turn.perm.tolist()) == list(range(cols))
        x = torch.randn(3, cols, generator=draws, dtype=torch.float64)
        w = torch.randn(5, cols, generator=draws, dtype=torch.float64)
        # A sum of `cols` products of unit variance in float64.
        assert torch.allclose(turn.weight(w) @ turn.inputs(x).T, w @ x.T, rtol=0, atol=1e-11)
        assert torch.allclose(turn.undo(turn.weight(w)), w, rtol=0, atol=1e-13)
        read = rotation.Rotation.of(turn.words())
        assert torch.equal(read.perm, turn.perm) and torch.equal(read.scale, turn.scale)


def test_is_the_hadamard_transform_of_its_blocks():
    turn = rotation.fit(torch.ones(24))
    assert turn.block == 8
    rows = turn.inputs(torch.eye(24, dtype=torch.float64))
    blocks = rows[turn.perm.long()].reshape(3, 8, 3, 8)
    for i in range(3):
        assert torch.allclose(blocks[i, :, i].abs(), torch.full((8, 8), 8**-0.5).double())
        assert not bool(blocks[i, :, (i + 1) % 3].any())


def test_deals_strong_channels_out():
    energy = torch.ones(256)
    energy[[3, 70]] = 1e4
    turn = rotation.fit(energy)
    place = {int(channel): i for i, channel in enumerate(turn.perm)}
    assert place[3] // 128 != place[70] // 128
    for bad in (torch.tensor([1.0, float("nan")]), torch.ones(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"\[rotation\] energy: want"):
            rotation.fit(bad)


def test_makes_columns_of_one_size():
    draws = torch.Generator().manual_seed(1)
    w = torch.randn(64, 96, generator=draws) * torch.logspace(-3, 3, 96)
    w[:, 7] = 0
    turn = rotation.fit(torch.ones(96), column=w.square().mean(0))
    square = (w[:, turn.perm.long()] / turn.scale).square().mean(0)
    others = square[turn.perm != 7]
    # Scales have eight digits: 2^-8 of the scale is 2^-7 of its square.
    assert float(others.max() / others.min()) < (1 + 2**-8) ** 4
    assert float(square[turn.perm == 7]) == 0
    for column, message in ((torch.ones(3), "want as many"), (torch.ones(96) / 0, "column: want")):
        with pytest.raises(ValueError, match=rf"\[rotation\] .*{message}"):
            rotation.fit(torch.ones(96), column=column)
