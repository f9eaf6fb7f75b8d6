"""Rules of compressed sensing: few linear measurements of the usage, and what recovers it.

The unknown is the usage of blocks of four neurons. It is not linear in the input, so what is
measured is a linear map of the input that was fitted to it, ``P x``, through random rows ``Phi``.
What a rule reads is the product of both, and what its recovery needs.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops, pursuit
from ...judge import BYTES, Sample, Thresholds, Where
from ...types import LayerShape
from ..rules import BlockRule, Fit, ranks

BLOCK = 4  # neurons of a block: the largest that costs little quality
ATOMS = 256  # of the dictionary of typical usages
SPARSITY = 8  # atoms that explain one usage
FIT_ROWS = 4096  # positions that probes and atoms are chosen by
ITERATIONS = 15  # of the clustering that makes the atoms
NOISE = 1e-3  # variance of a measurement's error, as a share of the mean variance measured


class Measured(BlockRule):
    """A rule that measures ``Phi (P x)`` and recovers the usage of blocks from it.

    One operator ``Phi`` with Gaussian entries of variance ``1 / n_rows`` serves all layers of a
    size.
    """

    def __init__(self, name: str, fit: Fit, n_rows: int) -> None:
        """Fit the map of every layer and draw the operator."""
        super().__init__(name, fit.ffns, fit.layouts(BLOCK))
        most = min(layout.n_blocks for layout in self.layouts)
        if not 1 <= n_rows <= most:
            raise ValueError(f"[ablate] {name}: want 1 to {most} measurements.")
        self.n_rows = n_rows
        self.phi: list[Tensor] = []  # (n_rows, n_blocks)
        self._map: list[Tensor] = []  # (d + 1, n_rows): the measured map, the constant last
        for layer, layout in enumerate(self.layouts):
            fitted = _usage_map(fit, layer)
            draw = torch.randn(n_rows, layout.n_blocks, generator=fit.generator(layout.n_blocks))
            self.phi.append((draw / n_rows**0.5).to(fitted.device))
            self._map.append(fitted @ self.phi[layer].T)

    def measure(self, layer: int, x: Tensor) -> Tensor:
        """Measure inputs ``(n, d)``; gives ``(n, n_rows)`` float32."""
        return x.float() @ self._map[layer][:-1] + self._map[layer][-1]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the measured map with its constant, and the operator, at 16 bits."""
        return float(self.n_rows * (shape.d + 1 + _n_blocks(shape)) * BYTES)


class RawPursuit(Measured):
    """Keep blocks in the order in which matching pursuit on the measurements takes them.

    Blocks that it does not take, because measurements ran out or explained nothing more, follow by
    their correlation with the measurements. The threshold is the number of blocks.

    Source:
        Tropp, Gilbert, "Signal recovery from random measurements via orthogonal matching pursuit",
        2007.
    """

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Give numbers of blocks; nothing to calibrate."""
        return [
            tuple((float(round(density * layout.n_blocks)),) for layout in self.layouts)
            for density in densities
        ]

    def keep(
        self,
        layer: int,
        x: Tensor,
        gate: Tensor,
        a: Tensor,
        thresholds: tuple[float, ...],
        where: Where,
    ) -> Tensor:
        """Choose as many blocks for every position."""
        n_kept = int(thresholds[0])
        y, phi = self.measure(layer, x), self.phi[layer]
        _, taken = pursue(phi, y, max(1, min(n_kept, self.n_rows)))
        match = (y @ phi).abs() / phi.norm(dim=0)
        kept = ranks(torch.where(taken, float("inf"), match)) < n_kept
        return self.layouts[layer].spread(kept)

    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the correlation of every block with the measurements."""
        return (self.measure(layer, x) @ self.phi[layer]).abs()


class PriorRule(Measured):
    """A rule that knows the task's mean usage and recovers how this token differs."""

    def __init__(self, name: str, fit: Fit, n_rows: int) -> None:
        """Take mean and variance of the usage of every task."""
        super().__init__(name, fit, n_rows)
        self.mean: list[Tensor] = []  # (n_tasks, n_blocks)
        self.variance: list[Tensor] = []
        for layer in range(len(fit.ffns)):
            mean, variance = _prior(fit, layer)
            self.mean.append(mean)
            self.variance.append(variance)

    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the prior mean plus what the measurements say of the difference."""
        task = where.task.index_select(0, where.row)
        mean = self.mean[layer]
        innovation = self.measure(layer, x) - (mean @ self.phi[layer].T).index_select(0, task)
        return mean.index_select(0, task) + self.difference(layer, innovation, task)

    @abc.abstractmethod
    def difference(self, layer: int, innovation: Tensor, task: Tensor) -> Tensor:
        """Recover the difference ``(n, n_blocks)`` from the measurements' ``(n, n_rows)``.

        Args:
            layer: Number of the layer.
            innovation: Measurements less those of the prior mean.
            task: ``(n,)`` int64.
        """

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give map, operator and prior mean; its measurements come with the operator."""
        return super().sensor_bytes(shape) + float((_n_blocks(shape) + self.n_rows) * BYTES)


class InnovationPursuit(PriorRule):
    """Recover a sparse difference from the task's mean usage by matching pursuit.

    As many blocks as a quarter of the measurements may differ, about what Gaussian measurements
    can recover.
    """

    def difference(self, layer: int, innovation: Tensor, task: Tensor) -> Tensor:
        """Give the coefficients of the pursuit."""
        return pursue(self.phi[layer], innovation, max(1, self.n_rows // 4))[0]


class Mmse(PriorRule):
    """Recover a dense difference from the task's mean usage by prior-weighted least squares.

    With the task's variances ``C`` on the diagonal, ``C Phi' (Phi C Phi' + s I)^-1`` of the
    innovation: the linear estimate of least mean squared error.

    Source:
        Kay, "Fundamentals of statistical signal processing: estimation theory", 1993, chapter 12.
    """

    def __init__(self, name: str, fit: Fit, n_rows: int) -> None:
        """Invert once for every layer and task."""
        super().__init__(name, fit, n_rows)
        self._gain: list[Tensor] = []  # (n_tasks, n_rows, n_blocks)
        for phi, variance in zip(self.phi, self.variance, strict=True):
            weighted = phi.double() * variance.double()[:, None]  # Phi C of every task
            inner = weighted @ phi.double().T
            noise = NOISE * inner.diagonal(dim1=1, dim2=2).mean(dim=1)
            floor = torch.finfo(torch.float32).tiny
            inner = inner + noise.clamp_min(floor)[:, None, None] * torch.eye(n_rows).to(inner)
            self._gain.append(torch.linalg.solve(inner, weighted).float())

    def difference(self, layer: int, innovation: Tensor, task: Tensor) -> Tensor:
        """Give the weighted least squares estimate, each position by its task."""
        found = torch.zeros_like(innovation[:, :1])
        for number, gain in enumerate(self._gain[layer]):
            found = torch.where((task == number)[:, None], innovation @ gain, found)
        return found


class Probe(BlockRule):
    """Compute few neurons exactly and infer the usage of all blocks from them.

    Probes are the neurons whose usages together say most: the pivots of a Cholesky factorisation
    of their covariance. What they show is explained by eight typical usages (centres of a
    clustering, as seen by the probes), found by matching pursuit.
    """

    def __init__(self, name: str, fit: Fit, n_probes: int) -> None:
        """Choose probes and atoms for every layer."""
        super().__init__(name, fit.ffns, fit.layouts(BLOCK))
        most = min(ffn.shape.n_neurons for ffn in fit.ffns)
        if not SPARSITY <= n_probes <= most:
            raise ValueError(f"[ablate] {name}: want {SPARSITY} to {most} probes.")
        self.n_probes = n_probes
        self._rows = []  # gate and up rows of the probes, and the norms of their down rows
        self._mean = []  # of probes, of blocks
        # As the probes see them (n_probes, n_atoms), as usage (n_atoms, n_blocks).
        self._atoms: list[tuple[Tensor, Tensor]] = []
        for layer in range(len(fit.ffns)):
            neurons = fit.usage(layer, rows=FIT_ROWS)
            usage = self.layouts[layer].grouped(neurons)
            probe = _pivots(neurons, n_probes)
            seen = neurons[:, probe]
            self._rows.append((probe, self.norm[layer][probe]))
            self._mean.append((seen.mean(dim=0), usage.mean(dim=0)))
            centred = usage - usage.mean(dim=0)
            atoms = _centres(centred, ATOMS, fit.generator(layer, n_probes))
            atoms = F.normalize(atoms, dim=1)
            # How the probes answer to a usage, fitted: they see it through all other neurons.
            moment = centred.double().T @ centred.double()
            ridge = NOISE * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
            cross = centred.double().T @ (seen - seen.mean(dim=0)).double()
            answer = torch.linalg.solve(moment + ridge, cross).float()
            shown = (atoms @ answer).T
            scale = shown.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
            self._atoms.append((shown / scale, atoms / scale[:, None]))

    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the usage that the probes speak for."""
        probe, norm = self._rows[layer]
        seen_mean, mean = self._mean[layer]
        shown, atoms = self._atoms[layer]
        seen = a.float().index_select(1, probe).abs() * norm
        coef, _ = pursue(shown, seen - seen_mean, SPARSITY)
        return mean + coef @ atoms

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give two rows a probe, what the probes see of all atoms, eight atoms and the means."""
        n_atoms, n_blocks = self._atoms[0][1].shape
        read = self.n_probes * (2 * shape.d + n_atoms + 2) + (SPARSITY + 1) * n_blocks
        return float(read * BYTES)


def pursue(dictionary: Tensor, y: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Explain measurements by few columns of a dictionary, by `ops.omp`.

    Args:
        dictionary: ``(n_rows, n_columns)`` float32.
        y: ``(n, n_rows)`` float32.
        n_atoms: Columns to take at most.

    Returns:
        Coefficients ``(n, n_columns)``, zero where nothing was taken, and a mask of the columns
        that were taken.
    """
    n, n_columns = len(y), dictionary.shape[1]
    measured = pursuit.measure(dictionary, y)
    budget = torch.full((n,), n_atoms, dtype=torch.int32, device=y.device)
    found = ops.omp(
        measured.gram, measured.correlation, measured.energy, budget, budget_max=n_atoms
    )
    # What lies beyond the count goes to a column that is cut off.
    place = torch.arange(n_atoms, device=y.device)
    column = torch.where(place < found.count[:, None], found.index.long(), n_columns)
    taken = torch.zeros(n, n_columns + 1, dtype=torch.bool, device=y.device)
    taken.scatter_(1, column, True)
    return pursuit.dense(found, n_columns), taken[:, :n_columns]


def _n_blocks(shape: LayerShape) -> int:
    return -(-shape.n_neurons // BLOCK)


def _block_usage(fit: Fit, layer: int) -> Tensor:
    """The true usage of blocks at all positions of the sample, ``(n, n_blocks)``."""
    return fit.layouts(BLOCK)[layer].grouped(fit.usage(layer))


def _usage_map(fit: Fit, layer: int) -> Tensor:
    """The linear map from inputs to the usage of blocks, ``(d + 1, n_blocks)``."""
    return fit.once(("block map", layer), lambda: fit.ridge(layer, _block_usage(fit, layer)))


def _prior(fit: Fit, layer: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the usage of blocks for every task, ``(n_tasks, n_blocks)`` each.

    A task without positions has those of all.
    """
    return fit.once(("block prior", layer), lambda: _moments_by_task(fit, layer))


def _moments_by_task(fit: Fit, layer: int) -> tuple[Tensor, Tensor]:
    usage, where = _block_usage(fit, layer), fit.sample.where
    member = F.one_hot(where.task[where.row], len(where.tasks)).to(usage)
    n = member.sum(dim=0)[:, None]
    mean = torch.where(n > 0, member.T @ usage / n.clamp_min(1), usage.mean(dim=0))
    square = torch.where(n > 0, member.T @ usage.square() / n.clamp_min(1), usage.square().mean(0))
    return mean, (square - mean.square()).clamp_min(0)


def _pivots(usage: Tensor, n: int) -> Tensor:
    """Neurons ``(n,)`` that leave least of the others' variance unexplained, one by one."""
    centred = (usage - usage.mean(dim=0)).double()
    covariance = centred.T @ centred
    left = covariance.diagonal().clone()
    chosen = torch.zeros(n, dtype=torch.int64, device=usage.device)
    columns = torch.zeros(n, len(left), dtype=torch.float64, device=usage.device)
    for i in range(n):
        chosen[i] = left.argmax()
        pivot = left.gather(0, chosen[i : i + 1]).clamp_min(torch.finfo(torch.float64).tiny)
        row = covariance.index_select(0, chosen[i : i + 1])[0]
        row = row - columns[:i].index_select(1, chosen[i : i + 1])[:, 0] @ columns[:i]
        columns[i] = row / pivot.sqrt()
        left -= columns[i].square()
        left.index_fill_(0, chosen[: i + 1], -1.0)
    return chosen


def _centres(usage: Tensor, n: int, draw: torch.Generator) -> Tensor:
    """Centres of a clustering of usages ``(n_tokens, width)``; as many, at most one a token."""
    start = torch.randperm(len(usage), generator=draw)[:n].to(usage.device)
    centres = usage[start]
    for _ in range(ITERATIONS):
        nearest = (usage @ centres.T - centres.square().sum(dim=1) / 2).argmax(dim=1)
        member = F.one_hot(nearest, len(centres)).to(usage)
        count = member.sum(dim=0)[:, None]
        centres = torch.where(count > 0, member.T @ usage / count.clamp_min(1), centres)
    return centres
