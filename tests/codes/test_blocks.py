"""Blocks: orders that put together what fires together, and only reorder."""

import math

import pytest
import torch

from axes import inside
from csfast.codes import blocks


def make_usage(groups, *, n_tokens=1500, noise=0.2, seed=0):
    """Usage of neurons whose group is active or not as a whole, with noise of their own."""
    draw = torch.Generator().manual_seed(seed)
    n_groups = int(groups.max()) + 1
    active = (torch.rand(n_tokens, n_groups, generator=draw) < 0.25).float()
    own = torch.rand(n_tokens, len(groups), generator=draw)
    return active[:, groups] * (1 + own) + noise * own


def within(usage, perm, block):
    """Sum of correlations within blocks, the objective."""
    root = usage.double().sqrt()
    c = torch.nan_to_num(torch.corrcoef(root.T))
    return sum(float(c[part][:, part].sum()) for part in perm.split(block))


@inside(n_neurons=[1, 2, 37, 96, 130], block=[1, 2, 3, 16, 37, 128, 200])
def test_every_neuron_has_one_place(n_neurons, block):
    usage = torch.rand(50, n_neurons, generator=torch.Generator().manual_seed(0))
    perm = blocks.cluster(usage, block)
    assert perm.dtype == torch.int64
    assert torch.equal(perm.sort().values, torch.arange(n_neurons))
    for part in perm.split(block):
        assert torch.equal(part, part.sort().values)


@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_groups_that_fire_together_are_found(block):
    draw = torch.Generator().manual_seed(1)
    groups = torch.arange(96 // block).repeat_interleave(block)
    groups = groups[torch.randperm(96, generator=draw)]
    perm = blocks.cluster(make_usage(groups), block)
    found = groups[perm].view(-1, block)
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_a_short_last_block_is_last():
    groups = torch.arange(10).repeat_interleave(8)
    perm = blocks.cluster(make_usage(groups)[:, :77], 8)
    parts = perm.split(8)
    assert [len(part) for part in parts] == [8] * 9 + [5]


@pytest.mark.parametrize("block", [4, 16, 50])
def test_swaps_only_improve_on_bisection(block, monkeypatch):
    draw = torch.Generator().manual_seed(2)
    mix = torch.randn(12, 200, generator=draw)
    usage = (torch.randn(1000, 12, generator=draw) @ mix).abs()
    refined = within(usage, blocks.cluster(usage, block), block)
    monkeypatch.setattr(blocks, "_swap", lambda correlation, of, block: None)
    split = within(usage, blocks.cluster(usage, block), block)
    order = within(usage, torch.arange(200), block)
    assert order < split < refined


@pytest.mark.parametrize("block", [4, 48])
def test_many_neurons_are_ordered_in_parts(block, monkeypatch):
    """No matrix of all pairs; what fires together is together still."""
    draw = torch.Generator().manual_seed(4)
    mix = torch.randn(12, 400, generator=draw)
    usage = (torch.randn(1000, 12, generator=draw) @ mix).abs()
    whole = within(usage, blocks.cluster(usage, block), block)
    sizes = []
    swap = blocks._swap

    def watched(correlation, of, block):
        sizes.append(len(correlation))
        swap(correlation, of, block)

    monkeypatch.setattr(blocks, "PART", 100)
    monkeypatch.setattr(blocks, "_swap", watched)
    perm = blocks.cluster(usage, block)
    assert torch.equal(perm.sort().values, torch.arange(400))
    assert max(sizes) <= 100 and sum(sizes) >= 400 - block
    split = within(usage, perm, block)
    order = within(usage, torch.arange(400), block)
    assert order < split and split - order > 0.5 * (whole - order)


def test_clustered_blocks_hold_more_of_the_energy_of_other_tokens():
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(20, 256, generator=draw)
    usage = (torch.randn(3000, 20, generator=draw) @ mix).clamp_min(0)
    perm = blocks.cluster(usage[:1500], 16)

    def captured(order):
        energy = usage[1500:, order].square().view(1500, 16, 16).sum(dim=2)
        return float(energy.topk(4, dim=1).values.sum() / energy.sum())

    assert captured(perm) > captured(torch.arange(256)) + 0.05


def test_equal_arguments_give_equal_orders():
    usage = make_usage(torch.arange(64) // 4, noise=1.0)
    first = blocks.cluster(usage, 8, seed=1)
    assert torch.equal(blocks.cluster(usage, 8, seed=1), first)
    # Scaling a neuron's usage changes nothing: what counts is when it fires.
    scale = torch.exp2(torch.arange(64) % 7 - 3.0) ** 2
    assert torch.equal(blocks.cluster(usage * scale, 8, seed=1), first)


def test_silent_and_equal_neurons_are_placed():
    usage = make_usage(torch.arange(32) // 4)
    usage[:, 5] = 0
    usage[:, 9] = 2.5
    usage[:, 20] = usage[:, 21]
    perm = blocks.cluster(usage, 4)
    assert torch.equal(perm.sort().values, torch.arange(32))
    together = [set(part.tolist()) for part in perm.split(4)]
    assert any({20, 21} <= part for part in together)


@pytest.mark.parametrize(
    ("usage", "block", "message"),
    [
        (torch.ones(3), 4, r"usage of shape \(3,\): want \(n_tokens, n_neurons\)"),
        (torch.ones(3, 0), 4, r"usage of shape \(3, 0\): want"),
        (torch.ones(0, 3), 4, r"usage of shape \(0, 3\): want"),
        (torch.ones(3, 4), 0, r"block = 0: want at least 1"),
        (torch.tensor([[1.0, math.nan]]), 2, "usage: want it finite and not negative"),
        (torch.tensor([[1.0, math.inf]]), 2, "usage: want it finite and not negative"),
        (torch.tensor([[1.0, -1.0]]), 2, "usage: want it finite and not negative"),
    ],
)
def test_what_cannot_be_clustered_is_refused(usage, block, message):
    with pytest.raises(ValueError, match=rf"^\[cluster\] {message}"):
        blocks.cluster(usage, block)
