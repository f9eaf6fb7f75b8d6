"""Rules that never look at the token itself: by the text, the task, the place or the one before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...judge import Sample, Thresholds, Where
from ..rules import Fit, NeuronRule, ranks

NOISE_ROWS = 251  # positions after which `Random` repeats itself: a prime, unlike any period


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
