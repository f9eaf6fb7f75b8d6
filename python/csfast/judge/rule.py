"""What a rule is: one way to run a model on part of its weights, with what it costs."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Ffn, is_patched
from ..types import LayerShape
from .batch import Batch, Where

BYTES = 2  # of a dense weight

Thresholds = tuple[tuple[float, ...], ...]  # of every layer
Note = Callable[[int, Tensor], None]  # layer, counts (n, n_counts) int64 of its positions


class Rule(abc.ABC):
    """One way to run a model on part of its weights, with what it costs.

    A rule owns the operators that it was fitted with. Thresholds are given to every call, so one
    rule serves many densities.

    Attributes:
        counts: Names of what `run` counts.
        structure: What `dense_bytes` refers to: ``"ffn"``, ``"layer"`` or ``"attention"``.
        observes: Whether the rule wants to see prompts.
    """

    counts: tuple[str, ...] = ("channels", "neurons")
    structure: str = "ffn"
    observes: bool = False

    def __init__(self, name: str, ffns: Sequence[Ffn]) -> None:
        """Keep the layers that the rule runs."""
        self.name = name
        self.ffns = ffns

    @abc.abstractmethod
    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Find the thresholds of some densities.

        Args:
            sample: Inputs of the layers at positions that would run sparse.
            densities: Fractions to keep on average, each in (0, 1].

        Returns:
            For each density the thresholds of every layer.
        """

    @abc.abstractmethod
    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the sparse positions of a batch; nothing here waits for the device.

        Args:
            layer: Number of the layer.
            x: Inputs, ``(n, d)``, in the dtype of the weights.
            thresholds: Of this layer, from `calibrate`.
            where: Whose the positions are.

        Returns:
            The output ``(n, d)``, and what each position read, ``(n, n_counts)`` int64, in the
            order of `counts`.
        """

    @abc.abstractmethod
    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give all bytes that one position reads of one layer, what choosing costs included.

        Args:
            shape: Sizes of the layer.
            counts: What is read, in the order of `counts`; means may be fractional.
        """

    def full(self, shape: LayerShape) -> tuple[float, ...]:
        """Give the counts of a layer that is read whole."""
        whole = {"channels": shape.d, "neurons": shape.n_neurons}
        return tuple(float(whole[name]) for name in self.counts)

    def dense_bytes(self, shape: LayerShape) -> float:
        """Give the bytes that the dense structure reads, at 16 bits a weight."""
        return dense_bytes(shape)

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes that choosing costs before anything can be skipped."""
        return 0.0

    def density(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the fraction of the layer that was executed, in the rule's own unit."""
        return counts[-1] / self.full(shape)[-1]

    def observe(self, layer: int, x: Tensor, where: Where) -> None:  # noqa: B027 (for few)
        """Look at the inputs ``(m, d)`` of one layer at the prompt positions, if `observes`.

        It is called for every layer of a batch of documents before any `run` on that batch.
        """

    def recovery(self) -> Recovery | None:
        """Give what can record how well the rule finds the oracle's neurons, if it keeps any."""
        return None

    def record(self, recovery: Recovery | None) -> None:  # noqa: B027 (for those with a recovery)
        """Record in `recovery` from now on; None ends it."""

    @contextlib.contextmanager
    def patched(self, thresholds: Thresholds, batch: Batch, note: Note) -> Iterator[None]:
        """Let the model run by this rule within the block.

        The default replaces the forward of every feed-forward layer by `run`. Rules on other
        structures hook other modules.

        Args:
            thresholds: Of every layer.
            batch: What runs within the block, once.
            note: To be called once a layer with what its positions read.
        """

        def forward(layer: int, x: Tensor) -> Tensor:
            out, counts = self.run(layer, batch.gather(x), thresholds[layer], batch.where)
            note(layer, counts)
            return batch.scatter(out)

        with replaced(self.ffns, forward):
            yield


@dataclass(frozen=True, eq=False)
class Setting:
    """A rule at one density.

    Attributes:
        rule: The rule.
        target: Fraction of the dense bytes that was asked for; None for a rule without a dial.
        density: What its thresholds were calibrated for.
        thresholds: Those of every layer.
    """

    rule: Rule
    target: float | None
    density: float
    thresholds: Thresholds


class Recovery:
    """How many of the oracle's neurons a rule keeps, and how much of the usage they carry.

    The oracle keeps as many neurons as the rule, those of largest true usage on the same inputs.
    Evenly spaced positions of every batch are looked at; sums stay on the device until `means`.
    """

    POSITIONS = 128  # of one batch: a share is known to 1 / sqrt(128 * 1000) for 1000 neurons

    def __init__(self, n_layers: int, device: torch.device) -> None:
        """Start without a position."""
        # Positions, recall, energy.
        self._sums = torch.zeros(n_layers, 0, 3, dtype=torch.float64, device=device)
        self._n_mean = 0

    def add(self, layer: int, usage: Tensor, keep: Tensor, where: Where) -> None:
        """Look at one layer of one batch: true usage and what was kept, ``(n, n_neurons)``."""
        step = -(-len(usage) // self.POSITIONS)
        usage, keep = usage[::step].double(), keep[::step]
        row = where.row[::step]
        n_kept = keep.sum(dim=1, keepdim=True)
        order = usage.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(usage.shape[1], device=order.device).expand_as(order))
        found = (keep & (rank < n_kept)).sum(dim=1) / n_kept.clamp_min(1).squeeze(1)
        energy = usage.square()
        share = torch.where(keep, energy, torch.zeros_like(energy)).sum(dim=1)
        share = share / energy.sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        # A token that keeps nothing has no recall.
        counted = (n_kept > 0).double().squeeze(1)
        values = torch.stack([counted, found * counted, share * counted], dim=1)
        task = F.one_hot(where.task[row], len(where.tasks)).double()
        if not self._n_mean:
            self._sums = self._sums.new_zeros(len(self._sums), len(where.tasks), 3)
            self._n_mean = where.n_mean
        self._sums[layer] += task.T @ values

    def means(self) -> tuple[float | None, float | None]:
        """Give recall and share of the energy: mean over positions, tasks, then layers."""
        sums = self._sums[:, : self._n_mean].cpu()
        seen = sums[..., 0] > 0
        if not bool(seen.any(dim=1).all()):
            return None, None
        means = torch.where(seen[..., None], sums[..., 1:] / sums[..., :1], 0.0)
        recall, energy = (means.sum(dim=1) / seen.sum(dim=1)[:, None]).mean(dim=0).tolist()
        return float(recall), float(energy)


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs of the layers at positions that would run sparse, every task with equal weight.

    A task with fewer positions than the largest has its own repeated in order.

    Attributes:
        inputs: Of each layer, ``(n, d)``.
        where: Whose the positions are.
        watched: Inputs of other modules at the same positions, by the names they were asked for.
    """

    inputs: list[Tensor]
    where: Where
    watched: Mapping[str, list[Tensor]]

    def some(self, n_max: int) -> Sample:
        """Give evenly spaced positions, at most so many."""
        step = max(1, -(-len(self.where.row) // n_max))
        if step == 1:
            return self
        where = self.where
        return Sample(
            [x[::step] for x in self.inputs],
            Where(
                where.n_rows,
                where.n_columns,
                where.row[::step],
                where.position[::step],
                where.prompt_row,
                where.task,
                where.tasks,
                where.n_mean,
            ),
            {name: [x[::step] for x in members] for name, members in self.watched.items()},
        )


def dense_bytes(shape: LayerShape) -> float:
    """Give the bytes of one feed-forward layer's three matrices at 16 bits a weight."""
    return 3.0 * shape.d * shape.n_neurons * BYTES


def densities(rule: Rule, read: Tensor) -> list[float]:
    """Give the density of every layer from what a token reads, ``(n_layers, n_counts)``."""
    return [
        rule.density(ffn.shape, counts)
        for ffn, counts in zip(rule.ffns, read.tolist(), strict=True)
    ]


def spent(rule: Rule, read: Tensor) -> float:
    """Give the fraction of the dense bytes that a token reads, from ``(n_layers, n_counts)``."""
    total = sum(
        rule.n_bytes(ffn.shape, counts)
        for ffn, counts in zip(rule.ffns, read.tolist(), strict=True)
    )
    return total / sum(rule.dense_bytes(ffn.shape) for ffn in rule.ffns)


@contextlib.contextmanager
def replaced(ffns: Sequence[Ffn], forward: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Run every layer by ``forward(layer, x (n_rows, n, d))``; restore the modules at the end."""
    for ffn in ffns:
        if "forward" in vars(ffn.module) or is_patched(ffn.module):
            raise ValueError(
                f"[judge] {ffn.name} has its forward replaced: want the model as it was "
                "loaded; call csfast.remove first."
            )

    def replacement(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda x: forward(layer, x)

    try:
        for layer, ffn in enumerate(ffns):
            vars(ffn.module)["forward"] = replacement(layer)
        yield
    finally:
        for ffn in ffns:
            vars(ffn.module).pop("forward", None)
