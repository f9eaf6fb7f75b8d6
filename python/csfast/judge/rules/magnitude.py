"""Rules that skip what is small: the gate of a neuron, or entries of a matrix' input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...judge import BYTES, Rule, Sample, Thresholds, Where
from ...models import Ffn
from ...types import LayerShape
from ..rules import (
    INDEX_BYTES,
    ROWS,
    Fit,
    NeuronRule,
    channel_bytes,
    channel_density,
    check_rank,
    cuts,
    keep_large,
    largest_first,
)

GREEDY_STEP = 0.05  # of one matrix' density in the search of `GreedyTeal`
GREEDY_ROWS = 256  # positions that the search looks at


class Cats(NeuronRule):
    """Compute the gate of every neuron, skip up and down rows where it is small.

    Source:
        Lee et al., "CATS: Contextually-aware thresholding for sparsity in large language models",
        2024.
    """

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the magnitude of the activated gate."""
        return gate.float().abs()

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the gate matrix, which is read whole."""
        return float(shape.d * shape.n_neurons * BYTES)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the gate matrix and, for each neuron, its up and down rows and its index."""
        return self.sensor_bytes(shape) + counts[0] * (2 * shape.d * BYTES + INDEX_BYTES)


class Teal(Rule):
    """Skip input channels of gate and up, and neurons of down, by their magnitude alone.

    Densities are uniform over layers and matrices; `GreedyTeal` searches them.

    Source:
        Liu et al., "Training-free activation sparsity in large language models" (TEAL), 2024.
    """

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate the input first, then the intermediate activation that it leaves."""
        some = sample.some(ROWS)
        layers = []
        for layer, x in enumerate(some.inputs):
            found = []
            for density, channel in zip(densities, cuts(x.abs(), densities), strict=True):
                a = self.inner(layer, x, keep_large(x, channel)[1])
                found.append((channel, *cuts(a.abs(), [density])))
            layers.append(found)
        return [tuple(of_layer[i] for of_layer in layers) for i in range(len(densities))]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the channels and the neurons of large magnitude."""
        used, kept_x = keep_large(x, thresholds[0])
        a = self.inner(layer, x, kept_x)
        keep, kept_a = keep_large(a, thresholds[1])
        counts = torch.stack([used.sum(dim=1), keep.sum(dim=1)], dim=1)
        return self.outer(layer, a, kept_a), counts

    def inner(self, layer: int, x: Tensor, kept: Tensor) -> Tensor:
        """Give the intermediate activation of an input of which some channels were kept."""
        return self.ffns[layer].activations(kept)[1]

    def outer(self, layer: int, a: Tensor, kept: Tensor) -> Tensor:
        """Give the output of an intermediate activation of which some neurons were kept."""
        out: Tensor = self.ffns[layer].down(kept)
        return out

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the columns of gate and up, the rows of down and the indices of both."""
        return self.sensor_bytes(shape) + channel_bytes(shape, counts)

    def density(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the fraction of the weights that was read."""
        return channel_density(shape, counts)


class RSparse(Teal):
    """Skip what `Teal` skips, and put a low-rank product in its place.

    ``W x ~ W x_S + W_r (x - x_S)`` with ``x_S`` the large entries and ``W_r`` the best matrix of
    rank `r`, for gate, up and down.

    Source:
        Zhang et al., "R-Sparse: rank-aware activation sparsity for efficient LLM inference", 2025.
    """

    def __init__(self, name: str, fit: Fit, rank: int) -> None:
        """Cut the singular value decomposition of the three matrices of every layer."""
        super().__init__(name, fit.ffns)
        check_rank(name, fit.ffns, rank)
        self.rank = rank
        self._factors = []  # of gate, up and down: (n_out, rank), (rank, n_in)
        every = fit.once(("singular",), lambda: [_singular(ffn) for ffn in fit.ffns])
        for whole in every:
            self._factors.append(
                [(left[:, :rank].contiguous(), right[:rank].contiguous()) for left, right in whole]
            )

    def inner(self, layer: int, x: Tensor, kept: Tensor) -> Tensor:
        """Give the intermediate activation, the skipped channels by low rank."""
        ffn = self.ffns[layer]
        gate, up, _ = self._factors[layer]
        rest = x - kept
        a: Tensor = ffn.up(kept) + _product(rest, up)
        return a * ffn.act(ffn.gate(kept) + _product(rest, gate))

    def outer(self, layer: int, a: Tensor, kept: Tensor) -> Tensor:
        """Give the output, the skipped neurons by low rank."""
        return super().outer(layer, a, kept) + _product(a - kept, self._factors[layer][2])

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give three pairs of factors at 16 bits, which are always read."""
        return 3.0 * self.rank * (shape.d + shape.n_neurons) * BYTES


class MatrixRule(Rule):
    """A rule with a threshold for each of the three matrices on the weighted size of its input."""

    counts = ("gate_channels", "up_channels", "neurons")

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Give what entries of the input of gate, up and down are weighted by; None for 1."""
        return None, None, None

    def split(self, layer: int, density: float) -> tuple[float, float, float]:
        """Give the densities of gate, up and down whose mean is `density`."""
        return density, density, density

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate gate and up first, then the intermediate activation that they leave."""
        some = sample.some(ROWS)
        found: list[list[tuple[float, ...]]] = [[] for _ in densities]
        for layer, x in enumerate(some.inputs):
            ffn = self.ffns[layer]
            by_gate, by_up, by_down = self.weights(layer)
            for i, density in enumerate(densities):
                gate, up, down = self.split(layer, density)
                (gate,) = cuts(_weighted(x, by_gate), [gate])
                (up,) = cuts(_weighted(x, by_up), [up])
                a = ffn.act(ffn.gate(_large(x, by_gate, gate)[1])) * ffn.up(_large(x, by_up, up)[1])
                found[i].append((gate, up, *cuts(_weighted(a, by_down), [down])))
        return [tuple(layers) for layers in found]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the large entries of every input."""
        ffn = self.ffns[layer]
        by_gate, by_up, by_down = self.weights(layer)
        gates, x_gate = _large(x, by_gate, thresholds[0])
        ups, x_up = _large(x, by_up, thresholds[1])
        a = ffn.act(ffn.gate(x_gate)) * ffn.up(x_up)
        neurons, kept = _large(a, by_down, thresholds[2])
        counts = torch.stack([mask.sum(dim=1) for mask in (gates, ups, neurons)], dim=1)
        return ffn.down(kept), counts

    def full(self, shape: LayerShape) -> tuple[float, ...]:
        """Give all channels twice, and all neurons."""
        return float(shape.d), float(shape.d), float(shape.n_neurons)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the columns of gate and of up, the rows of down and the indices of all."""
        gate, up, neurons = counts
        column = shape.n_neurons * BYTES + INDEX_BYTES
        return (gate + up) * column + neurons * (shape.d * BYTES + INDEX_BYTES)

    def density(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the fraction of the weights that was read."""
        gate, up, neurons = counts
        return ((gate + up) / shape.d + neurons / shape.n_neurons) / 3


class Wina(MatrixRule):
    """Skip entries of each matrix' input that are small times the norm of their column.

    Source:
        Chen et al., "WINA: weight informed neuron activation for accelerating large language model
        inference", 2025.
    """

    def __init__(self, name: str, fit: Fit) -> None:
        """Take the norms of the columns of all three matrices."""
        super().__init__(name, fit.ffns)
        self._norms = [
            tuple(m.weight.detach().float().norm(dim=0) for m in (ffn.gate, ffn.up, ffn.down))
            for ffn in fit.ffns
        ]

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Give the norms of the columns."""
        gate, up, down = self._norms[layer]
        return gate, up, down


class GreedyTeal(MatrixRule):
    """`Teal` with densities of the three matrices of a layer searched greedily.

    From all dense, the matrix whose density costs the layer's output least goes down by a step,
    again and again; a density is met by the mean of the three, the same in all layers.

    Source:
        Liu et al., "Training-free activation sparsity in large language models" (TEAL), 2024,
        section on block-wise greedy optimisation.
    """

    def __init__(self, name: str, fit: Fit) -> None:
        """Search a path for every layer."""
        super().__init__(name, fit.ffns)
        some = fit.sample.some(GREEDY_ROWS)
        # Rows of density of gate, up and down, from 1 on, and their mean.
        self._paths = [_greedy(ffn, x) for ffn, x in zip(fit.ffns, some.inputs, strict=True)]

    def split(self, layer: int, density: float) -> tuple[float, float, float]:
        """Give the place on the path, between its steps if need be."""
        path = self._paths[layer]
        mean = path.mean(axis=1)
        gate, up, down = (np.interp(density, mean[::-1], column[::-1]) for column in path.T)
        return float(gate), float(up), float(down)


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """Size of every entry, times the weight of its column, float32."""
    size = x.float().abs()
    return size if weight is None else size * weight


def _large(x: Tensor, weight: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """A mask of the entries whose weighted size is not below, and them with zeros elsewhere."""
    used = ~(_weighted(x, weight) < threshold)
    return used, torch.where(used, x, 0.0)


def _product(x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """A low-rank product, in the dtype of `x`."""
    left, right = factors
    return ((x.float() @ right.T) @ left.T).to(x.dtype)


def _singular(ffn: Ffn) -> list[tuple[Tensor, Tensor]]:
    """Factors of gate, up and down, of the largest singular value first, float32."""
    found = []
    for linear in (ffn.gate, ffn.up):
        w = linear.weight.detach().double()
        vectors = largest_first(w.T @ w)
        found.append(((w @ vectors).float(), vectors.T.float()))
    w = ffn.down.weight.detach().double()
    vectors = largest_first(w @ w.T)
    found.append((vectors.float(), (vectors.T @ w).float()))
    return found


def _greedy(ffn: Ffn, x: Tensor) -> NDArray[np.float64]:
    """Densities of gate, up and down on the way from dense to a step each, ``(n_steps, 3)``."""
    last = round(1 / GREEDY_STEP)
    densities = [i * GREEDY_STEP for i in range(1, last + 1)]
    kept = [keep_large(x, cut)[1] for cut in cuts(x.abs(), densities)]
    gates = [ffn.act(ffn.gate(of)) for of in kept]
    ups = [ffn.up(of) for of in kept]
    dense = ffn.down(gates[-1] * ups[-1])

    def error(at: Sequence[int]) -> float:
        a = gates[at[0]] * ups[at[1]]
        (cut,) = cuts(a.abs(), [densities[at[2]]])
        return float((ffn.down(keep_large(a, cut)[1]) - dense).float().square().sum())

    now = [last - 1] * 3
    path = [now]
    while any(now):
        ways = [[n - (i == j) for j, n in enumerate(now)] for i in range(3) if now[i]]
        now = min(ways, key=error)
        path.append(now)
    return np.array([[densities[n] for n in at] for at in path])
