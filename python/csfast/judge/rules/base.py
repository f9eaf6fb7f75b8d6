"""What rules that choose neurons have in common: scores, thresholds, counting, and fitting.

Execution is masked dense, so rules measure quality and count bytes; they are not fast.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...codes import blocks, planes
from ...judge import BYTES, Recovery, Rule, Sample, Thresholds, Where
from ...models import Ffn
from ...types import Code, LayerShape

INDEX_BYTES = 4  # of the number of one neuron, block or channel that is read
ROWS = 2048  # positions whose scores give a quantile: a density is met to about .001
CLUSTER_ROWS = 4096  # positions that neurons are clustered by
RIDGE = 1e-2  # of linear maps, as a share of the mean second moment of an input

Value = TypeVar("Value")


class NeuronRule(Rule):
    """A rule that keeps the neurons whose score reaches the threshold of the layer."""

    counts: tuple[str, ...] = ("neurons",)

    def __init__(self, name: str, ffns: Sequence[Ffn]) -> None:
        """Take the norms of the down rows."""
        super().__init__(name, ffns)
        self.norm = [ffn.down_norm() for ffn in ffns]
        self._recovery: Recovery | None = None
        self._scored: tuple[Sample, list[Tensor]] | None = None

    @abc.abstractmethod
    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Score the neurons.

        Args:
            layer: Number of the layer.
            x: Inputs, ``(n, d)``.
            gate: The activated gate, ``(n, n_neurons)``; for rules that pay for it.
            a: The intermediate activation, ``(n, n_neurons)``; for rules that pay for it.
            where: Whose the positions are.

        Returns:
            ``(n, n_neurons)``, the larger the more wanted; not-a-number is kept.
        """

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate every layer by itself: a quantile of its scores for each density."""
        layers = [cuts(score, densities) for score in self.sample_scores(sample)]
        return [tuple((of_layer[i],) for of_layer in layers) for i in range(len(densities))]

    def sample_scores(self, sample: Sample) -> list[Tensor]:
        """Give `sample_score` of every layer, kept for the next call with the same sample."""
        if self._scored is None or self._scored[0] is not sample:
            some = sample.some(ROWS)
            scores = [
                self.sample_score(layer, x, some.where) for layer, x in enumerate(some.inputs)
            ]
            self._scored = (sample, scores)
        return self._scored[1]

    def sample_score(self, layer: int, x: Tensor, where: Where) -> Tensor:
        """Give scores whose quantiles are thresholds of one layer, of any shape.

        Args:
            layer: Number of the layer.
            x: Inputs at evenly spaced positions, ``(n, d)``.
            where: Whose they are; neighbours of a position may be missing.
        """
        return self.score(layer, x, *self.ffns[layer].activations(x), where)

    def keep(
        self,
        layer: int,
        x: Tensor,
        gate: Tensor,
        a: Tensor,
        thresholds: tuple[float, ...],
        where: Where,
    ) -> Tensor:
        """Choose neurons, a mask ``(n, n_neurons)``: those whose score is not below."""
        return ~(self.score(layer, x, gate, a, where) < thresholds[0])

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the neurons that `keep` chooses."""
        ffn = self.ffns[layer]
        gate, a = ffn.activations(x)
        keep = self.keep(layer, x, gate, a, thresholds, where)
        if self._recovery is not None:
            self._recovery.add(layer, self.usage(layer, a), keep, where)
        return masked_down(ffn, a, keep), self.counted(layer, keep)

    def counted(self, layer: int, keep: Tensor) -> Tensor:
        """Count what a mask of neurons reads, ``(n, n_counts)``."""
        return keep.sum(dim=1, keepdim=True)

    def usage(self, layer: int, a: Tensor) -> Tensor:
        """Give ``|a| ||w_down||``, float32."""
        return a.float().abs() * self.norm[layer]

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the sensor's bytes and three rows and an index for each neuron."""
        return self.sensor_bytes(shape) + counts[0] * neuron_bytes(shape)

    def recovery(self) -> Recovery | None:
        """Give what can record how well the rule finds the oracle's neurons."""
        return Recovery(len(self.ffns), self.norm[0].device)

    def record(self, recovery: Recovery | None) -> None:
        """Record in `recovery` from now on; None ends it."""
        self._recovery = recovery


@dataclass(frozen=True, eq=False)
class Layout:
    """Neurons of one layer in blocks that are kept or skipped together.

    Attributes:
        block: Neurons of a block; the last may have fewer.
        perm: ``(n_neurons,)`` int64: block ``i`` is ``perm[i * block : (i + 1) * block]``.
        of: ``(n_neurons,)`` int64: the block of every neuron.
    """

    block: int
    perm: Tensor
    of: Tensor

    @classmethod
    def of_order(cls, perm: Tensor, block: int) -> Layout:
        """Cut an order of neurons into blocks."""
        of = torch.empty_like(perm)
        of[perm] = torch.arange(len(perm), device=perm.device) // block
        return cls(block, perm, of)

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return -(-len(self.perm) // self.block)

    def grouped(self, usage: Tensor) -> Tensor:
        """Give the usage ``(n, n_blocks)`` of blocks: the root of the sum of squares."""
        squares = usage.square().index_select(1, self.perm)
        missing = self.n_blocks * self.block - squares.shape[1]
        parts = F.pad(squares, (0, missing)).view(len(usage), self.n_blocks, self.block)
        return parts.sum(dim=2).sqrt()

    def spread(self, values: Tensor) -> Tensor:
        """Give every neuron ``(n, n_neurons)`` what its block has ``(n, n_blocks)``."""
        return values.index_select(1, self.of)


class BlockRule(NeuronRule):
    """A rule that keeps whole blocks of neurons, by a threshold on what it believes of them."""

    counts = ("blocks", "neurons")

    def __init__(self, name: str, ffns: Sequence[Ffn], layouts: Sequence[Layout]) -> None:
        """Take the blocks of every layer."""
        super().__init__(name, ffns)
        self.layouts = layouts

    @abc.abstractmethod
    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Score the blocks, ``(n, n_blocks)``; arguments as of `score`."""

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give every neuron the score of its block."""
        return self.layouts[layer].spread(self.block_score(layer, x, a, where))

    def counted(self, layer: int, keep: Tensor) -> Tensor:
        """Count blocks, by the first neuron of each, and neurons."""
        layout = self.layouts[layer]
        firsts = keep.index_select(1, layout.perm[:: layout.block])
        return torch.stack([firsts.sum(dim=1), keep.sum(dim=1)], dim=1)

    def full(self, shape: LayerShape) -> tuple[float, ...]:
        """Give all blocks and all neurons."""
        return float(-(-shape.n_neurons // self.layouts[0].block)), float(shape.n_neurons)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the sensor's bytes, three rows for each neuron and an index for each block."""
        n_blocks, neurons = counts
        rows = neurons * 3 * shape.d * BYTES
        return self.sensor_bytes(shape) + rows + n_blocks * INDEX_BYTES


class Fit:
    """What rules are fitted to, with what several of them share, made when first asked for."""

    def __init__(
        self, model: nn.Module, ffns: Sequence[Ffn], sample: Sample, *, seed: int = 0
    ) -> None:
        """Keep the model, its layers, the inputs to fit to and the seed of what is drawn."""
        self.model = model
        self.ffns = ffns
        self.sample = sample
        self.seed = seed
        self._made: dict[tuple[object, ...], object] = {}

    def once(self, key: tuple[object, ...], make: Callable[[], Value]) -> Value:
        """Give what `make` gives, made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        found: Value = self._made[key]  # type: ignore[assignment]
        return found

    def generator(self, *salt: int) -> torch.Generator:
        """Give a source of random numbers on the CPU that depends on the seed and the salt."""
        mixed = np.random.SeedSequence([self.seed, *salt]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(mixed[0] >> 1))

    def usage(self, layer: int, *, rows: int | None = None) -> Tensor:
        """Give the true usage ``(n, n_neurons)`` of one layer, of evenly spaced positions."""
        x = (self.sample if rows is None else self.sample.some(rows)).inputs[layer]
        ffn = self.ffns[layer]
        return ffn.activations(x)[1].float().abs() * ffn.down_norm()

    def moment(self, layer: int) -> Tensor:
        """Give the second moment of a layer's inputs, ``(d, d)`` float64."""
        return self.once(("moment", layer), lambda: second_moment(self.sample.inputs[layer]))

    def layouts(self, block: int, *, clustered: bool = True) -> list[Layout]:
        """Give the blocks of every layer, clustered by co-activation or in the model's order."""
        return self.once(
            ("layouts", block, clustered),
            lambda: [self._layout(layer, block, clustered) for layer in range(len(self.ffns))],
        )

    def _layout(self, layer: int, block: int, clustered: bool) -> Layout:
        n_neurons = self.ffns[layer].shape.n_neurons
        if clustered:
            perm = blocks.cluster(self.usage(layer, rows=CLUSTER_ROWS), block, seed=self.seed)
        else:
            perm = torch.arange(n_neurons, device=self.ffns[layer].gate.weight.device)
        return Layout.of_order(perm, block)

    def task_usage(self, layer: int) -> Tensor:
        """Give the root mean square usage of every task, ``(n_tasks, n_neurons)``.

        A task without positions has that of all positions.
        """
        return self.once(("task usage", layer), lambda: self._task_usage(layer))

    def _task_usage(self, layer: int) -> Tensor:
        where = self.sample.where
        square = self.usage(layer).square()
        member = F.one_hot(where.task[where.row], len(where.tasks)).to(square)
        n = member.sum(dim=0)
        by_task = (member.T @ square) / n.clamp_min(1)[:, None]
        return torch.where(n[:, None] > 0, by_task, square.mean(dim=0)).sqrt()

    def ridge(self, layer: int, target: Tensor) -> Tensor:
        """Fit a linear map with a constant from inputs to `target` ``(n, width)``.

        Returns:
            ``(d + 1, width)`` float32, the constant last.
        """
        x = self.sample.inputs[layer].double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        gram = x.T @ x
        # The constant is not held back.
        weight = torch.full_like(gram[0], RIDGE * float(gram.diagonal()[:-1].mean()))
        weight[-1] = 0
        factor = torch.linalg.cholesky(gram + weight.diag())
        return torch.cholesky_solve(x.T @ target.double(), factor).float()

    def right_factors(self, layer: int, *, up: bool) -> tuple[Tensor, Tensor]:
        """Give the activation-aware low-rank factors of the gate or the up matrix, largest first.

        With ``S`` the root of the inputs' second moment and ``V`` the right singular vectors of
        ``W S``, ``W ~ (W S V_r) (V_r' S^-1)``; the first `r` columns and rows are the best of
        rank `r` in mean squared error.

        Returns:
            ``(n_neurons, d)`` and ``(d, d)``, float32.
        """
        return self.once(("factors", layer, up), lambda: self._right_factors(layer, up))

    def _right_factors(self, layer: int, up: bool) -> tuple[Tensor, Tensor]:
        root, inverse = self.once(("root", layer), lambda: _roots(self.moment(layer)))
        linear = self.ffns[layer].up if up else self.ffns[layer].gate
        scaled = linear.weight.detach().double() @ root
        vectors = largest_first(scaled.T @ scaled)
        return (scaled @ vectors).float(), (vectors.T @ inverse).float()


def masked_down(ffn: Ffn, a: Tensor, keep: Tensor) -> Tensor:
    """Project the kept activations down."""
    out: Tensor = ffn.down(torch.where(keep, a, 0.0))
    return out


def neuron_bytes(shape: LayerShape) -> int:
    """Give three rows of one neuron, and its number."""
    return 3 * shape.d * BYTES + INDEX_BYTES


def channel_bytes(shape: LayerShape, counts: Sequence[float]) -> float:
    """Give the bytes of `channels` columns of gate and up and `neurons` rows of down."""
    channels, neurons = counts
    column = 2 * shape.n_neurons * BYTES + INDEX_BYTES
    return channels * column + neurons * (shape.d * BYTES + INDEX_BYTES)


def channel_density(shape: LayerShape, counts: Sequence[float]) -> float:
    """Give the fraction of the weights in `channels` columns and `neurons` rows."""
    channels, neurons = counts
    return (2 * channels / shape.d + neurons / shape.n_neurons) / 3


def planes_bytes(shape: LayerShape, bits: Code, neurons: float) -> float:
    """Give all bytes that the few-bit rule reads of one layer for one position."""
    return planes.n_bytes(shape.n_neurons, shape.d, bits) + neurons * neuron_bytes(shape)


def cuts(score: Tensor, densities: Sequence[float]) -> list[float]:
    """Give the threshold that keeps each fraction of the scores, ties included."""
    flat = score.detach().float().flatten()
    size = flat.numel()
    places = [size - round(density * size) for density in densities]
    inside = sorted({place for place in places if 0 < place < size})
    if flat.is_cuda:
        found = (
            flat.sort().values[torch.tensor(inside, dtype=torch.int64, device=flat.device)].tolist()
        )
    else:
        # Linear in time whatever repeats, unlike torch.kthvalue on the CPU.
        values = flat.numpy()
        found = (np.partition(values, inside)[inside] if inside else values[:0]).tolist()
    edges = {0: float("-inf"), size: float("inf"), **dict(zip(inside, found, strict=True))}
    return [edges[place] for place in places]


def keep_large(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Give a mask of the entries whose magnitude is not below, and them with zeros elsewhere."""
    used = ~(x.float().abs() < threshold)
    return used, torch.where(used, x, 0.0)


def ranks(score: Tensor) -> Tensor:
    """Give the place of every entry in its row, the largest first; ties to the lower index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device, dtype=torch.float32)
    return torch.empty_like(score, dtype=torch.float32).scatter_(1, order, place.expand_as(order))


def second_moment(x: Tensor) -> Tensor:
    """Give ``x' x / n``, float64."""
    xd = x.double()
    return xd.T @ xd / max(1, len(x))


def largest_first(moment: Tensor) -> Tensor:
    """Give the eigenvectors of a symmetric matrix as columns, of the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(1)


def check_rank(method: str, ffns: Iterable[Ffn], rank: int) -> None:
    """Refuse a rank that a layer cannot have, by the method's name."""
    limit = min(ffn.shape.d for ffn in ffns)
    if not 1 <= rank <= limit:
        raise ValueError(f"[ablate] {method}: want a rank from 1 to {limit}.")


def check_block(method: str, ffns: Iterable[Ffn], block: int) -> None:
    """Refuse a block of more neurons than a layer has, by the method's name."""
    limit = min(ffn.shape.n_neurons for ffn in ffns)
    if not 2 <= block <= limit:
        raise ValueError(f"[ablate] {method}: want blocks of 2 to {limit} neurons.")


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a second moment, and its inverse."""
    # A ten-thousandth of the mean keeps directions that the sample never showed invertible.
    ridge = 1e-4 * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eigen, basis = torch.linalg.eigh(moment + ridge * torch.eye(len(moment)).to(moment))
    root = (basis * eigen.clamp_min(0).sqrt()) @ basis.T
    return root, (basis / eigen.clamp_min(ridge).sqrt()) @ basis.T
