import pytest
import torch

from axes import inside
from csfast import ops, reference


def support(masks, device):
    """Index and count of boolean masks ``(batch, n_neurons)``."""
    index = torch.full(masks.shape, -7, dtype=torch.int32)
    for row, mask in enumerate(masks):
        chosen = mask.nonzero().flatten().to(torch.int32)
        index[row, : len(chosen)] = chosen
    return index.to(device), masks.sum(dim=1).to(torch.int32).to(device)


@inside(tile_rows=[1, 2, 4, 7, 77, 1000], density=[0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("n_neurons", [1, 77, 1152])
def test_equals_reference(tile_rows, density, n_neurons, device):
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(3, n_neurons, generator=g) < density
    got = ops.tile(*support(masks, device), tile_rows=tile_rows)
    want = reference.tile(masks, tile_rows=tile_rows)
    assert got.tile.shape == (3, -(-n_neurons // tile_rows))
    assert got.n_tiles.tolist() == [len(row) for row in want]
    for row, count in enumerate(got.n_tiles.tolist()):
        assert got.tile[row, :count].tolist() == want[row].tolist()


def test_empty_batch(device):
    got = ops.tile(*support(torch.zeros(0, 9, dtype=torch.bool), device), tile_rows=2)
    assert got.tile.shape == (0, 5)
    assert got.n_tiles.shape == (0,)


def test_rows_of_one_neuron_give_the_support_itself(device):
    masks = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.4
    index, count = support(masks, device)
    got = ops.tile(index, count)
    for row in range(2):
        assert torch.equal(got.tile[row, : count[row]], index[row, : count[row]])


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        ([[0, 9]], [2], r"index\[0, 1\] = 9: want ascending and distinct, 0 to 1"),
        ([[-1, 1]], [2], r"index\[0, 0\] = -1: want"),
        ([[1, 0]], [2], r"index\[0, 1\] = 0: want"),
        ([[1, 1]], [2], r"index\[0, 1\] = 1: want"),
        ([[0, 1]], [3], r"3 entries of index in row 0: want 0 to 2"),
        ([[0, 1]], [-1], r"-1 entries of index in row 0: want 0 to 2"),
    ],
)
def test_refuses_what_is_no_support(index, count, message):
    with pytest.raises(ValueError, match=r"\[tile\] " + message):
        ops.tile(torch.tensor(index, dtype=torch.int32), torch.tensor(count, dtype=torch.int32))


def test_refuses_no_rows():
    index, count = support(torch.ones(1, 4, dtype=torch.bool), "cpu")
    with pytest.raises(ValueError, match=r"\[tile\] tile_rows = 0: want at least 1"):
        ops.tile(index, count, tile_rows=0)
