"""What is timed: one list for `csfast bench`, `bench_ffn`, `bench_ffn_cuda` and `bench_sketch`.

`tools/bench_cases.py` writes it down for the benchmarks in C++, as `bench/cases.inc`. A name stands
in the results for good: a case that measures something else has another.
"""

from __future__ import annotations

import dataclasses

import torch

from ..types import Code


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One problem: a layer's sizes and the density that is executed."""

    d: int  # channels of the activation
    n_neurons: int  # rows of the gate and of the up projection
    density: float  # fraction of the neurons, in (0, 1]
    bits: Code = 2  # of a weight
    tile_rows: int = 1  # neurons that are kept and read as one
    batch: int = 1  # rows; more than one share a support

    @property
    def name(self) -> str:
        """Its name in the results, for example ``ffn d=2048 F=8192 density=.25``."""
        density = f"{self.density:.2f}".removeprefix("0")
        bits = "" if self.bits == 2 else f" bits={self.bits}"
        blocks = "" if self.tile_rows == 1 else f" blocks={self.tile_rows}"
        rows = "" if self.batch == 1 else f" batch={self.batch} joint"
        return f"ffn d={self.d} F={self.n_neurons} density={density}{bits}{blocks}{rows}"


# Layers to rotate over, so that no cache holds them. On the CPU 600 MB of bf16 weights at d = 2048,
# F = 8192; on a GPU at least 32, more of the small layers, whose codes alone have to exceed an L2
# of 60 MB several times, and fewer where one layer is 1.4 GB.
_N_LAYERS = {"cpu": 6, "cuda": 32}
_N_LAYERS_OF = {("cuda", 896, 4864): 128, ("cuda", 8192, 28672): 8}

CUDA_SHAPES = ((896, 4864), (4096, 14336), (8192, 28672))
DENSITIES = (0.5, 0.25, 0.1)
BATCHES = (1, 4, 16)
# By device, in the order of their measurement: neighbours of one shape share their weights.
CASES = {
    "cpu": (
        *(LayerCase(2048, 8192, density) for density in DENSITIES),
        *(LayerCase(2048, 8192, density, tile_rows=16) for density in DENSITIES[1:]),
    ),
    "cuda": tuple(
        LayerCase(d, n_neurons, density, batch=batch)
        for d, n_neurons in CUDA_SHAPES
        for batch in BATCHES
        for density in DENSITIES
    ),
}
# Those of them beside torch. Neighbours share what torch.compile found, too; that search may stop
# before the last shape, where cuBLAS alone reads as fast as the memory can.
BESIDE_TORCH = {
    "cpu": CASES["cpu"],
    "cuda": (
        *(LayerCase(4096, 14336, density) for density in DENSITIES),
        *(LayerCase(4096, 14336, 0.25, batch=batch) for batch in BATCHES[1:]),
        *(LayerCase(896, 4864, density) for density in DENSITIES),
        *(LayerCase(8192, 28672, density) for density in DENSITIES),
    ),
}
QUICK = LayerCase(512, 1024, 0.25)  # to see that everything runs: caches hold it


def n_layers_of(case: LayerCase, device: torch.device) -> int:
    """Give how many layers of this size rotate, so that no cache holds them."""
    shape = (device.type, case.d, case.n_neurons)
    return _N_LAYERS_OF.get(shape, _N_LAYERS[device.type])


@dataclasses.dataclass(frozen=True)
class MatrixCase:
    """One matrix on a few rows: its codes, or itself in bfloat16."""

    rows: int
    cols: int
    bits: tuple[int, ...] = ()  # of each level that is read; none: the matrix itself
    batch: int = 1

    @property
    def name(self) -> str:
        """Its name in the results, for example ``sketch rows=2048 cols=8192 bits=3+3``."""
        kind, bits = ("sketch", f" bits={_sum_of(self.bits)}") if self.bits else ("linear", "")
        batch = "" if self.batch == 1 else f" batch={self.batch}"
        return f"{kind} rows={self.rows} cols={self.cols}{bits}{batch}"


@dataclasses.dataclass(frozen=True)
class PassCase:
    """All linear maps of a model and its head, in the order in which a token needs them."""

    bits: tuple[tuple[int, ...], ...] = ()  # of each of `PASS`; none: the matrices themselves
    batch: int = 1

    @property
    def name(self) -> str:
        """Its name in the results, with the bits of the first map and of those that differ."""
        batch = "" if self.batch == 1 else f" batch={self.batch}"
        if not self.bits:
            return f"linear {PASS_MODEL}{batch}"
        of = dict(zip(PASS, self.bits, strict=True))
        first = self.bits[0]
        words = [_sum_of(first), *(f"{n}={_sum_of(b)}" for n, b in of.items() if b != first)]
        return f"sketch {PASS_MODEL} bits={','.join(words)}{batch}"


def _sum_of(bits: tuple[int, ...]) -> str:
    return "+".join(map(str, bits))


# Matrices of one shape are neighbours. The last of 16 rows are checks of drafts.
MATRICES = tuple(
    MatrixCase(rows, cols, bits, batch)
    for rows, cols in ((8192, 2048), (2048, 8192))
    for bits, batch in (
        *(((), batch) for batch in (1, 6, 16)),
        *(((bits,), 1) for bits in (2, 3, 4)),
        *(((3, 3), batch) for batch in (1, 16)),
    )
)
# SmolLM2-135M: rows and columns of the maps of a layer, fused as they are coded, and of the head.
PASS_MODEL, PASS_LAYERS = "SmolLM2-135M", 30
PASS = {
    "qkv": (960, 576),
    "o": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
PASSES = (
    *(PassCase(batch=batch) for batch in (1, 6, 16)),
    PassCase(((3,), (3,), (2,), (3,), (4,))),
    PassCase(((3,), (3,), (3,), (3,), (4,))),
    PassCase(((3, 3), (3, 3), (3, 3), (3, 3), (4, 2))),
)
QUICK_MATRICES = (MatrixCase(512, 256), MatrixCase(512, 256, (3,)), MatrixCase(512, 256, (3, 3), 6))
ENCODED = MatrixCase(960, 576, (3,))  # what `encode` codes
