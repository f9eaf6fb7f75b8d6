import pytest
import torch

from csfast import designs, ops
from csfast.layer import Weights

HOPPER = {"capability": 90, "n_processors": 132, "shared_bytes": 227 << 10}
AMPERE = {"capability": 80, "n_processors": 108, "shared_bytes": 163 << 10}


@pytest.mark.parametrize(
    ("sizes", "asked", "want"),
    [
        ((1, 4096, 14336), {}, "list register overlapping blocks=132 group_threads=512 vectors=1"),
        ((3, 4096, 14336), {}, "list register overlapping blocks=132 group_threads=512 vectors=1"),
        ((1, 8192, 28672), {}, "list register overlapping blocks=132 group_threads=512 vectors=2"),
        (
            (1, 4096, 14336),
            {"senses": True},
            "range register overlapping blocks=132 group_threads=512 vectors=1",
        ),
        (
            (1, 8192, 28672),
            {"senses": True},
            "list register overlapping blocks=132 group_threads=512 vectors=2",
        ),
        (
            (4, 4096, 14336),
            {"senses": True, "shared": True},
            "batch bulk overlapping blocks=132 shares=16",
        ),
        (
            (4, 4096, 14336),
            {"senses": True},
            "range register overlapping blocks=132 group_threads=512 vectors=1",
        ),
        (
            (16, 4096, 14336),
            {"senses": True, "shared": True},
            "batch bulk overlapping blocks=132 shares=16",
        ),
        ((1, 8200, 28672), {"senses": True}, "general overlapping"),
        (
            (1, 64, 40_000_000),
            {"senses": True, "n_processors": 160},
            "general overlapping",
        ),
        ((1, 896, 4864), {}, "list register overlapping blocks=132 group_threads=128 vectors=1"),
        ((1, 8, 7), {}, "list register overlapping blocks=1 group_threads=32 vectors=1"),
        ((1, 4096, 14336), {"dtype": torch.float32}, "general overlapping"),
        ((1, 4100, 14336), {}, "general overlapping"),
        ((1, 8200, 28672), {}, "general overlapping"),
        ((1, 64, 40_000_000), {}, "general overlapping"),
        ((4, 4096, 14336), {"shared": True}, "batch bulk overlapping blocks=132 shares=16"),
        ((16, 8192, 28672), {"shared": True}, "batch bulk overlapping blocks=132 shares=8"),
        ((4, 16384, 53248), {"shared": True}, "batch bulk overlapping blocks=132 shares=4"),
        ((4, 64, 20), {"shared": True}, "batch bulk overlapping blocks=3 shares=2"),
        (
            (4, 4096, 14336),
            {"shared": True, "design": "batch register blocks=20"},
            "batch register overlapping blocks=20 shares=2",
        ),
        (
            (4, 4096, 14336),
            {"shared": True, "design": "portable"},
            "batch register blocks=132 shares=16",
        ),
        ((4, 4096, 14336), {"shared": True, **AMPERE}, "batch register blocks=108 shares=13"),
        (
            (4, 4096, 14336),
            {"shared": True, "capability": 120, "shared_bytes": 99 << 10},
            "batch register overlapping blocks=132 shares=16",
        ),
        (
            (1, 4096, 14336),
            {"shared": True, **AMPERE},
            "list register blocks=108 group_threads=512 vectors=1",
        ),
        (
            (1, 4096, 14336),
            {"design": "list bulk blocks=64"},
            "list bulk overlapping blocks=64 group_threads=512 vectors=1",
        ),
        (
            (1, 896, 4864),
            {"design": "range portable"},
            "range register blocks=132 group_threads=128 vectors=1",
        ),
        (
            (1, 896, 80),
            {"design": "range", "tile_rows": 16},
            "range register overlapping blocks=5 group_threads=128 vectors=1",
        ),
        ((1, 4096, 14336), {"design": "general"}, "general overlapping"),
        ((0, 4096, 14336), {}, "list register overlapping blocks=132 group_threads=512 vectors=1"),
    ],
)
def test_chooses(sizes, asked, want):
    assert designs.choose(*sizes, **{**HOPPER, **asked}) == want


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        (
            (1, 4096, 14336),
            {"design": "bulk", **AMPERE},
            "has bulk loads at capability 80: want 90",
        ),
        (
            (1, 4096, 14336),
            {"design": "bulk portable"},
            "has bulk loads at capability 90, portable",
        ),
        ((1, 4100, 14336), {"design": "list"}, "is list register .*: want 16-bit elements"),
        ((1, 8200, 14336), {"design": "range"}, "is range register .*: want 16-bit elements"),
        ((1, 4096, 14336), {"design": "list", "dtype": torch.float32}, "is list .*: want 16-bit"),
        ((1, 4096, 14336), {"design": "batch"}, "is batch bulk .*whose rows share a list"),
        (
            (4, 4096, 14336),
            {"shared": True, "design": "batch bulk", "shared_bytes": 99 << 10},
            "is batch bulk .*lists that fit in shared memory",
        ),
        (
            (1, 64, 500_000),
            {"design": "list blocks=1"},
            "is list .*blocks for lists that fit in shared",
        ),
        ((1, 64, 64), {"design": "wide"}, "has wide: want general, list, range or batch"),
    ],
)
def test_refuses_designs_that_do_not_fit(sizes, asked, message):
    with pytest.raises(ValueError, match=r"\[execute\] design " + message):
        designs.choose(*sizes, **{**HOPPER, **asked})


def test_refuses_sizes_of_nothing():
    with pytest.raises(
        ValueError, match=r"\[execute\] d = 0, n_neurons = 4, tile_rows = 1: want 1"
    ):
        designs.choose(1, 0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device and a build with CUDA")
def test_a_device_refuses_what_choose_refuses():
    weights = torch.zeros(8, 12, dtype=torch.bfloat16, device="cuda")
    tiles = ops.TileList(
        *(torch.zeros(n, dtype=torch.int32, device="cuda") for n in ((1, 8), 1)), 1
    )
    with pytest.raises(ValueError, match=r"\[execute\] design is list register"):
        ops.execute(Weights(weights, weights, weights), tiles, weights[:1], design="list")
