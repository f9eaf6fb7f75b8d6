"""Rules that choose what a layer reads: ours, and published ones to compare with.

Every rule is written here again from its publication, for comparison only, and gets the same
treatment as ours: thresholds per layer are quantiles of the rule's own score over the same
calibration positions, and all that it has to read is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...codes import feedback, planes
from ...judge import BYTES, Rule, Sample, Thresholds, Where
from ...models import Ffn
from ...types import TERNARY, Code, LayerShape
from .. import quantize
from ..rules import (
    INDEX_BYTES,
    ROWS,
    BlockRule,
    Fit,
    NeuronRule,
    channel_bytes,
    channel_density,
    cuts,
    keep_large,
    largest_first,
    ranks,
    second_moment,
)
from . import compressed, mixed, oracles

GREEDY_STEP = 0.05  # of one matrix' density in the search of `GreedyTeal`
GREEDY_ROWS = 256  # positions that the search looks at
NOISE_ROWS = 251  # positions after which `Random` repeats itself: a prime, unlike any period
TRAIN_STEPS = 400  # of `DejaVu`; twice as many gain nothing on the demo model
TRAIN_ROWS = 512  # positions of one step
TOP = 0.25  # share of the neurons that `DejaVu` learns to tell from the others


class Planes(NeuronRule):
    """The rule of csfast: usage estimated from few-bit codes of the neurons' own rows.

    The arithmetic of `csfast.sense` and `csfast.recover` in float32 matrix products, whose
    integers are exact below 2^24.
    """

    def __init__(self, name: str, fit: Fit, bits: Code, *, has_feedback: bool = True) -> None:
        """Code the rows of every layer, with the channels evened out over the sample."""
        super().__init__(name, fit.ffns)
        self.bits = bits
        for ffn in fit.ffns:
            if 127 * planes.level_max(bits) * ffn.shape.d >= 2**24:
                raise ValueError(
                    f"[ablate] {name} with d = {ffn.shape.d}: sums of float32 are exact "
                    f"below 2^24 only, want fewer bits."
                )
        self._codes = fit.once(
            ("planes", bits, has_feedback),
            lambda: [_coded(fit, layer, bits, has_feedback) for layer in range(len(fit.ffns))],
        )

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimated usage; a scale that is not finite makes all of it not-a-number."""
        codes = self._codes[layer]
        q, scale = planes.quantize(x, codes.equal)
        y = (q.float() @ codes.value.T).view(len(x), 2, -1)
        z = scale[:, None, None] * codes.row_scale.T * y
        if codes.offset is not None:
            z = z + codes.offset.T
        usage: Tensor = (self.ffns[layer].act(z[:, 0]) * z[:, 1]).abs()
        return usage

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the codes, their scales and the equaliser."""
        return float(planes.n_bytes(shape.n_neurons, shape.d, self.bits))


class BlockPlanes(BlockRule):
    """The rule of csfast for blocks: the root of the sum of squared estimates, for large tiles."""

    def __init__(self, name: str, fit: Fit, bits: int, block: int) -> None:
        """Code the rows and cluster the neurons."""
        _check_block(name, fit.ffns, block)
        super().__init__(name, fit.ffns, fit.layouts(block))
        self._planes = Planes(name, fit, bits)

    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimated usage of every block."""
        return self.layouts[layer].grouped(self._planes.score(layer, x, a, a, where))

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the codes, their scales and the equaliser."""
        return self._planes.sensor_bytes(shape)


class JointPlanes(Planes):
    """The rule of csfast for batches that share a support: mean estimate of some requests.

    Documents that run together are requests: in every step the positions of equal number vote,
    those of finished ones do not. Every request counts the bytes of the joint support as if it ran
    alone, so that a row shows what sharing costs; what a step of the batch reads is the same once.
    """

    def __init__(self, name: str, fit: Fit, bits: int, requests: int) -> None:
        """Code the rows; a support is shared by at most so many requests."""
        super().__init__(name, fit, bits)
        if not 2 <= requests <= 256:
            raise ValueError(f"[ablate] {name}: want 2 to 256 requests.")
        self._requests = requests

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate one threshold for each number of voters: the fewer, the more their means vary.

        Voters are positions far apart, of all tasks.
        """
        found: list[list[tuple[float, ...]]] = [[] for _ in densities]
        for score in self.sample_scores(sample):
            by_voters = []
            for voters in range(1, self._requests + 1):
                n = max(1, len(score) // voters)
                parts = score[: n * voters].view(-1, n, score.shape[1])
                by_voters.append(cuts(parts.mean(dim=0), densities))
            for i, thresholds in enumerate(zip(*by_voters, strict=True)):
                found[i].append(thresholds)
        return [tuple(layers) for layers in found]

    def keep(
        self,
        layer: int,
        x: Tensor,
        gate: Tensor,
        a: Tensor,
        thresholds: tuple[float, ...],
        where: Where,
    ) -> Tensor:
        """Choose for every position what the mean over its requests' estimates wants."""
        score = self.score(layer, x, gate, a, where)
        groups = -(-where.n_rows // self._requests)
        # Document r is request r // groups of group r % groups: long beside short.
        voted = torch.cat([score, torch.ones_like(score[:, :1])], dim=1)
        places = self._requests * groups * where.n_columns
        table = score.new_zeros(places, voted.shape[1])
        table.index_copy_(0, where.row * where.n_columns + where.position, voted)
        total = table.view(self._requests, groups * where.n_columns, -1).sum(dim=0)
        voters = total[:, -1].clamp_min(1)
        least = torch.tensor(thresholds, device=x.device).index_select(0, voters.long() - 1)
        keep = ~(total[:, :-1] / voters[:, None] < least[:, None])
        return keep.index_select(0, where.row % groups * where.n_columns + where.position)


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


class LowRank(NeuronRule):
    """Estimate usage from gate and up matrices of low rank, the best for the calibration inputs.

    ``W S = U s V'`` with ``S`` the square root of the inputs' second moment; the estimate is
    ``U_r s_r (V_r' S^-1 x)``, which is the rank-r matrix of least mean squared error.

    Source:
        Yuan et al., "ASVD: activation-aware singular value decomposition", 2023; the exact
        whitening is Wang et al., "SVD-LLM", 2024.
    """

    def __init__(self, name: str, fit: Fit, rank: int) -> None:
        """Cut the factors of every layer to `rank`."""
        super().__init__(name, fit.ffns)
        _check_rank(name, fit.ffns, rank)
        self.rank = rank
        self._factors = []
        for layer in range(len(fit.ffns)):
            pair = [fit.right_factors(layer, up=up) for up in (False, True)]
            self._factors.append(
                [(left[:, :rank].contiguous(), right[:rank].contiguous()) for left, right in pair]
            )

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the usage of the low-rank estimate."""
        xf = x.float()
        ffn = self.ffns[layer]
        z_gate, z_up = (
            F.linear(xf @ right.T, left, None if bias is None else bias.float())
            for (left, right), bias in zip(
                self._factors[layer], (ffn.gate.bias, ffn.up.bias), strict=True
            )
        )
        return (ffn.act(z_gate) * z_up).abs() * self.norm[layer]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give two pairs of factors at 16 bits."""
        return 2.0 * self.rank * (shape.d + shape.n_neurons) * BYTES


class Static(NeuronRule):
    """Keep the same neurons for every token: those used most over the calibration positions."""

    def __init__(self, name: str, fit: Fit) -> None:
        """Average the usage over the sample."""
        super().__init__(name, fit.ffns)
        self._usage = [
            fit.usage(layer).square().mean(dim=0).sqrt() for layer in range(len(fit.ffns))
        ]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the mean usage, whatever the token."""
        return self._usage[layer].expand(len(x), -1)


class Random(NeuronRule):
    """Keep random neurons, others at every position: what a rule must beat to say anything."""

    def __init__(self, name: str, fit: Fit) -> None:
        """Draw a table of uniform numbers for every layer."""
        super().__init__(name, fit.ffns)
        self._noise = [
            torch.rand(NOISE_ROWS, ffn.shape.n_neurons, generator=fit.generator(layer)).to(
                ffn.gate.weight.device
            )
            for layer, ffn in enumerate(fit.ffns)
        ]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the row of the table that the position's number points at."""
        return self._noise[layer].index_select(0, where.position % NOISE_ROWS)

    def sample_score(self, layer: int, x: Tensor, where: Where) -> Tensor:
        """Give the table."""
        return self._noise[layer]


class Previous(NeuronRule):
    """Keep what the position before would have wanted, by its true usage; the first runs dense.

    A limit of rules that wait for nothing: decoding would know only what it executed itself.
    """

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the usage of the position before, infinity at the first of a document."""
        before = self.usage(layer, a).roll(1, dims=0)
        return torch.where((where.position == 0)[:, None], float("inf"), before)

    def sample_score(self, layer: int, x: Tensor, where: Where) -> Tensor:
        """Give the usage of the positions themselves: evenly spaced, they have no neighbours."""
        return self.usage(layer, self.ffns[layer].activations(x)[1])


class Linear(NeuronRule):
    """Estimate the usage of every neuron by a linear map of the input, fitted by least squares."""

    def __init__(self, name: str, fit: Fit) -> None:
        """Fit the map of every layer, with a little ridge."""
        super().__init__(name, fit.ffns)
        self._map = [fit.ridge(layer, fit.usage(layer)) for layer in range(len(fit.ffns))]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimate, which may be negative."""
        return x.float() @ self._map[layer][:-1] + self._map[layer][-1]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the map with its constants at 16 bits."""
        return float((shape.d + 1) * shape.n_neurons * BYTES)


class DejaVu(NeuronRule):
    """Predict by a small network which neurons are among the most used quarter.

    Two matrices with a rectifier between (the publication's are for layers whose activation is
    one), trained by binary cross entropy on the calibration positions.

    Source:
        Liu et al., "Deja Vu: contextual sparsity for efficient LLMs at inference time", 2023.
    """

    def __init__(self, name: str, fit: Fit, width: int) -> None:
        """Train a predictor with `width` hidden units for every layer."""
        super().__init__(name, fit.ffns)
        _check_rank(name, fit.ffns, width)
        self.width = width
        self._nets = []
        for layer, x in enumerate(fit.sample.inputs):
            usage = fit.usage(layer)
            n_top = max(1, round(TOP * usage.shape[1]))
            least = usage.topk(n_top, dim=1).values[:, -1:]
            draw = fit.generator(layer, width)
            self._nets.append(_trained(x.float(), usage >= least, width, draw))

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the logit of every neuron."""
        inner, outer, bias = self._nets[layer]
        return F.linear(F.relu(F.linear(x.float(), inner)), outer, bias)

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give both matrices and the constants at 16 bits."""
        return float((self.width * (shape.d + shape.n_neurons) + shape.n_neurons) * BYTES)


class RankedRule(NeuronRule):
    """A rule that ranks the neurons for whole documents: each keeps the same number of them."""

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Give the least score of the first neurons; nothing to calibrate."""
        return [
            tuple((1.0 - round(density * ffn.shape.n_neurons),) for ffn in self.ffns)
            for density in densities
        ]


class TaskStatic(RankedRule):
    """Keep the same neurons for every token of a task: those used most over its positions."""

    def __init__(self, name: str, fit: Fit) -> None:
        """Rank the neurons of every layer for every task."""
        super().__init__(name, fit.ffns)
        self._rank = [ranks(fit.task_usage(layer)) for layer in range(len(fit.ffns))]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the negative rank of each neuron for the task."""
        return -self._rank[layer].index_select(0, where.task.index_select(0, where.row))


class Griffin(RankedRule):
    """Keep for the whole response the neurons that the prompt used most.

    The neurons are ranked by the norm over the prompt of their activation relative to the token's;
    the threshold is on the rank, so each prompt keeps the same number.

    Source:
        Dong, Chen, Chi, "Prompt-prompted adaptive structured pruning for efficient LLM
        generation" (GRIFFIN), 2024.
    """

    observes = True

    def __init__(self, name: str, fit: Fit) -> None:
        """Start without a prompt."""
        super().__init__(name, fit.ffns)
        self._rank: list[Tensor | None] = [None] * len(fit.ffns)

    def observe(self, layer: int, x: Tensor, where: Where) -> None:
        """Rank the neurons of one layer by what every prompt did with them."""
        _, a = self.ffns[layer].activations(x)
        a = a.float()
        tiny = torch.finfo(torch.float32).tiny
        square = (a / a.norm(dim=1, keepdim=True).clamp_min(tiny)).square()
        # Segments are summed in a fixed order, which adding floats at indices does not promise.
        # Their lengths are integers; checking them would wait for the device.
        length = torch.zeros(where.n_rows, dtype=torch.int64, device=x.device)
        length.index_add_(0, where.prompt_row, torch.ones_like(where.prompt_row))
        sums = torch.segment_reduce(square, "sum", lengths=length, unsafe=True)
        self._rank[layer] = ranks(sums)

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the negative rank of each neuron on the prompt."""
        rank = self._rank[layer]
        assert rank is not None, "observe comes first"
        return -rank.index_select(0, where.row)


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
        _check_rank(name, fit.ffns, rank)
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


class Rounded(Rule):
    """Read everything, at fewer bits: plain round-to-nearest."""

    counts = ("neurons",)

    def __init__(self, name: str, fit: Fit, bits: int) -> None:
        """Round all three matrices of every layer."""
        super().__init__(name, fit.ffns)
        self._weights: list[list[Tensor]] = []
        self._n_bytes: dict[LayerShape, list[float]] = {}
        for layer, ffn in enumerate(fit.ffns):
            pairs = self.rounded(fit, layer, bits)
            self._weights.append([weight for weight, _ in pairs])
            n_bytes = sum(n_bytes for _, n_bytes in pairs)
            self._n_bytes.setdefault(ffn.shape, []).append(n_bytes)

    def rounded(self, fit: Fit, layer: int, bits: int) -> list[tuple[Tensor, float]]:
        """Give gate, up and down of one layer, rounded, each with its bytes."""
        ffn = fit.ffns[layer]
        return [quantize.round_to_nearest(m.weight, bits) for m in (ffn.gate, ffn.up, ffn.down)]

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Give no thresholds: there is nothing to choose."""
        return [((),) * len(self.ffns) for _ in densities]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run the whole layer with rounded weights."""
        gate, up, down = self._weights[layer]
        ffn = self.ffns[layer]
        a = ffn.act(F.linear(x, gate, ffn.gate.bias)) * F.linear(x, up, ffn.up.bias)
        out = F.linear(a, down, ffn.down.bias)
        return out, where.row.new_full((len(x), 1), ffn.shape.n_neurons)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the bytes of all codes and scales, the mean over layers of this size."""
        members = self._n_bytes[shape]
        return sum(members) / len(members)


class Calibrated(Rounded):
    """Read everything, at fewer bits, rounded with feedback on the calibration inputs.

    The down projection is fitted to what the rounded gate and up projections give it.
    """

    def rounded(self, fit: Fit, layer: int, bits: int) -> list[tuple[Tensor, float]]:
        """Give gate, up and down of one layer, each with its bytes."""
        ffn = fit.ffns[layer]
        x = fit.sample.inputs[layer]
        gate, up = (quantize.gptq(m.weight, fit.moment(layer), bits) for m in (ffn.gate, ffn.up))
        a = ffn.act(F.linear(x, gate[0], ffn.gate.bias))
        a = a * F.linear(x, up[0], ffn.up.bias)
        return [gate, up, quantize.gptq(ffn.down.weight, second_moment(a), bits)]


def build(method: str, fit: Fit) -> Rule:
    """Fit the named rule to a model.

    Args:
        method: A name, see `default_methods`.
        fit: The model's layers, and the inputs to fit to.

    Raises:
        ValueError: The name is unknown, or its number is out of range.
    """
    storage = mixed.Storage.parse(method)
    with torch.no_grad():
        if storage is not None:
            return mixed.Mixed(method, fit, storage)
        kind, numbers = _parse(method)
        return _makers(method, numbers, fit)[kind]()


def _makers(method: str, numbers: Sequence[int], fit: Fit) -> dict[str, Callable[[], Rule]]:
    """What makes a rule of each kind."""
    ffns, watched = fit.ffns, fit.sample.watched
    return {
        "oracle-neuron": lambda: oracles.Oracle(method, ffns),
        "oracle-block": lambda: _block_oracle(method, fit, *numbers, clustered=True),
        "oracle-block-original": lambda: _block_oracle(method, fit, *numbers, clustered=False),
        "oracle-channel": lambda: oracles.ChannelOracle(method, ffns),
        "oracle-head": lambda: oracles.HeadOracle(
            method, ffns, oracles.find_attention(fit.model, ffns)
        ),
        "oracle-layer": lambda: oracles.LayerOracle(method, ffns, watched[oracles.STREAM]),
        "planes": lambda: Planes(method, fit, *numbers),
        "planes-plain": lambda: Planes(method, fit, *numbers, has_feedback=False),
        "ternary": lambda: Planes(method, fit, TERNARY),
        "ternary-plain": lambda: Planes(method, fit, TERNARY, has_feedback=False),
        "planes-block": lambda: BlockPlanes(method, fit, *numbers),
        "planes-joint": lambda: JointPlanes(method, fit, *numbers),
        "teal": lambda: Teal(method, ffns),
        "teal-greedy": lambda: GreedyTeal(method, fit),
        "wina": lambda: Wina(method, fit),
        "rsparse": lambda: RSparse(method, fit, *numbers),
        "cats": lambda: Cats(method, ffns),
        "lowrank": lambda: LowRank(method, fit, *numbers),
        "linear": lambda: Linear(method, fit),
        "dejavu": lambda: DejaVu(method, fit, *numbers),
        "griffin": lambda: Griffin(method, fit),
        "static": lambda: Static(method, fit),
        "static-task": lambda: TaskStatic(method, fit),
        "previous": lambda: Previous(method, ffns),
        "random": lambda: Random(method, fit),
        "random-pursuit": lambda: compressed.RawPursuit(method, fit, *numbers),
        "innovation": lambda: compressed.InnovationPursuit(method, fit, *numbers),
        "mmse": lambda: compressed.Mmse(method, fit, *numbers),
        "probe": lambda: compressed.Probe(method, fit, *numbers),
        "rtn": lambda: Rounded(method, fit, *numbers),
        "gptq": lambda: Calibrated(method, fit, *numbers),
    }


def default_methods(shape: LayerShape) -> tuple[str, ...]:
    """Name the rules that an ablation of layers of this size compares."""
    d, n_blocks = shape.d, -(-shape.n_neurons // compressed.BLOCK)

    def parts(whole: int, *divisors: int) -> list[int]:
        return sorted({max(1, whole // divisor) for divisor in divisors})

    sizes = (4, 8, 16, 32, 64, 128)
    return (
        "oracle-neuron",
        *(f"oracle-block-{size}" for size in sizes),
        *(f"oracle-block-{size}-original" for size in sizes),
        "oracle-channel",
        "oracle-head",
        "oracle-layer",
        *(f"planes-b{bits}" for bits in planes.BITS),
        "ternary",
        "planes-b2-plain",
        "planes-b3-plain",
        *(f"planes-b2-block-{size}" for size in (4, 16, 64)),
        *(f"planes-b2-joint-{requests}" for requests in (2, 4, 16)),
        "teal",
        "teal-greedy",
        "wina",
        *(f"rsparse-{rank}" for rank in parts(d, 16, 8)),
        "cats",
        *(f"lowrank-{rank}" for rank in parts(d, 16, 8, 4)),
        "linear",
        *(f"dejavu-{width}" for width in parts(d, 8, 4)),
        "griffin",
        "static",
        "static-task",
        "previous",
        "random",
        *(f"random-{n}" for n in parts(n_blocks, 2)),
        *(f"innovation-{n}" for n in parts(n_blocks, 8, 4)),
        *(f"mmse-{n}" for n in parts(n_blocks, 8, 4, 2)),
        f"probe-{max(compressed.SPARSITY, shape.n_neurons // 16)}",
        "mixed-3+3",
        *(f"rtn-int{bits}" for bits in (8, 4, 3, 2)),
        *(f"gptq-int{bits}" for bits in (8, 4, 3, 2)),
    )


def quick_methods(shape: LayerShape) -> tuple[str, ...]:
    """Name a few rules that already tell the story."""
    ranks = sorted({max(1, shape.d // part) for part in (16, 8, 4)})
    return (
        "oracle-neuron",
        "ternary",
        "planes-b2",
        "planes-b3",
        "planes-b4",
        "teal",
        "cats",
        *(f"lowrank-{rank}" for rank in ranks),
        "griffin",
        "static",
        *(f"rtn-int{bits}" for bits in (8, 4, 3, 2)),
    )


def family(method: str) -> str:
    """Say what a method is: ``oracle``, ``few-bit``, ``selection``, ``quantised`` or ``mixed``."""
    if mixed.Storage.parse(method) is not None:
        return "mixed"
    kind, _ = _parse(method)
    for start, name in (("oracle", "oracle"), ("planes", "few-bit"), ("ternary", "few-bit")):
        if kind.startswith(start):
            return name
    return "quantised" if kind in ("rtn", "gptq") else "selection"


# What each kind is called; <name> stands for a whole number of at most five digits.
_NAMES = {
    "oracle-neuron": "oracle-neuron",
    "oracle-block": "oracle-block-<size>",
    "oracle-block-original": "oracle-block-<size>-original",
    "oracle-channel": "oracle-channel",
    "oracle-head": "oracle-head",
    "oracle-layer": "oracle-layer",
    "planes": "planes-b<bits>",
    "planes-plain": "planes-b<bits>-plain",
    "ternary": "ternary",
    "ternary-plain": "ternary-plain",
    "planes-block": "planes-b<bits>-block-<size>",
    "planes-joint": "planes-b<bits>-joint-<requests>",
    "teal": "teal",
    "teal-greedy": "teal-greedy",
    "wina": "wina",
    "rsparse": "rsparse-<rank>",
    "cats": "cats",
    "lowrank": "lowrank-<rank>",
    "linear": "linear",
    "dejavu": "dejavu-<width>",
    "griffin": "griffin",
    "static": "static",
    "static-task": "static-task",
    "previous": "previous",
    "random": "random",
    "random-pursuit": "random-<measurements>",
    "innovation": "innovation-<measurements>",
    "mmse": "mmse-<measurements>",
    "probe": "probe-<neurons>",
    "rtn": "rtn-int<bits>",
    "gptq": "gptq-int<bits>",
}


def _parse(method: str) -> tuple[str, tuple[int, ...]]:
    """Split a method's name in its kind and its numbers."""
    for kind, name in _NAMES.items():
        found = re.fullmatch(re.sub(r"<\w+>", r"(\\d{1,5})", name), method, re.ASCII)
        if found:
            return kind, tuple(int(number) for number in found.groups())
    names = (*_NAMES.values(), mixed.NAMES)
    raise ValueError(f"[ablate] method {method!r}: want one of {', '.join(names)}.")


def _check_rank(method: str, ffns: Iterable[Ffn], rank: int) -> None:
    limit = min(ffn.shape.d for ffn in ffns)
    if not 1 <= rank <= limit:
        raise ValueError(f"[ablate] {method}: want a rank from 1 to {limit}.")


def _check_block(method: str, ffns: Iterable[Ffn], block: int) -> None:
    limit = min(ffn.shape.n_neurons for ffn in ffns)
    if not 2 <= block <= limit:
        raise ValueError(f"[ablate] {method}: want blocks of 2 to {limit} neurons.")


def _block_oracle(method: str, fit: Fit, block: int, *, clustered: bool) -> Rule:
    _check_block(method, fit.ffns, block)
    return oracles.BlockOracle(method, fit.ffns, fit.layouts(block, clustered=clustered))


@dataclass(frozen=True, eq=False)
class _Codes:
    """Few-bit codes of one layer as numbers."""

    equal: Tensor  # (d,)
    value: Tensor  # (2 n_neurons, d): levels of the gate rows, then of the up rows
    row_scale: Tensor  # (n_neurons, 2)
    offset: Tensor | None  # (n_neurons, 2): from the biases


def _coded(fit: Fit, layer: int, bits: Code, has_feedback: bool) -> _Codes:
    ffn, x = fit.ffns[layer], fit.sample.inputs[layer]
    equal = planes.equalizer(x.float().square().mean(dim=0)).to(x.device)
    factor = None
    if has_feedback:
        wide = equal.double()
        factor = feedback.spread(fit.moment(layer) * wide[:, None] * wide)
    levels, scales = [], []
    for weight in ffn.weights[:2]:
        scales.append(planes.fit_scale(weight, equal, bits))
        packed = planes.encode(weight, equal, scales[-1], bits, factor)
        levels.append(planes.levels_of(planes.unpack(packed, bits, ffn.shape.d), bits))
    row_scale = torch.stack([scales[0], scales[1] * ffn.down_norm()], dim=1)
    return _Codes(equal, torch.cat(levels), row_scale, ffn.offset())


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


def _trained(
    x: Tensor, label: Tensor, width: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Train ``outer relu(inner x) + bias`` to tell labels ``(n, n_neurons)``."""
    d, n_neurons = x.shape[1], label.shape[1]
    scale = x.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    inner = (torch.randn(width, d, generator=draw) / d**0.5).to(x.device)
    outer = (torch.randn(n_neurons, width, generator=draw) / width**0.5).to(x.device)
    share = label.float().mean(dim=0).clamp(1e-3, 1 - 1e-3)
    weights = [inner, outer, torch.logit(share)]
    rows = torch.randint(len(x), (TRAIN_STEPS, TRAIN_ROWS), generator=draw).to(x.device)
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr=3e-3)
        for step in range(TRAIN_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / TRAIN_STEPS)
            some = x.index_select(0, rows[step]) / scale
            logit = F.linear(F.relu(F.linear(some, inner)), outer, weights[2])
            wanted = label.index_select(0, rows[step]).float()
            loss = F.binary_cross_entropy_with_logits(logit, wanted)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
    return (inner / scale).detach(), outer.detach(), weights[2].detach()
