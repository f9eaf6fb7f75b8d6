"""Phase diagrams: how many measurements recover how many groups, of made and of real signals.

A signal has `n_atoms` entries, of which `k` are wanted. A random Gaussian operator measures it,
``y = Phi v``, and orthogonal matching pursuit finds the entries again; the largest correlations
alone are the floor. Real signals are what groups of neurons contribute to a layer's output for one
token. Equations 50 to 53 in docs/math.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .. import judge, models, ops
from ..files import check_writable, read_bounded, write_atomic
from ..judge import Judge, Progress, Sample
from ..pursuit import operators
from ..types import Document, PlanError
from .rules import Fit

FORMAT = "csfast-phase-1"  # of a resume file
N_GROUPS = 128
STEPS = 12  # values of either axis
TRIALS = 200  # signals of a cell: a rate is known to .035
DRAWS = 4  # operators of a cell, each for its share of the signals
SPARSEST, DENSEST = 1 / 24, 1 / 2  # of k over n_atoms; beyond, it is what is left out that is few
SHARE = 4  # measurements for each atom of an innovation that the usage is estimated by
ENERGY = 0.9  # of a signal, for the count of entries that hold it
POSITIONS = 2000  # of a sample that signals come from, at most

Table = list[list[float]]  # rows: measurements; columns: wanted entries


@dataclass(frozen=True, eq=False)
class Signals:
    """Signals to measure.

    Attributes:
        value: What is measured, ``(n, n_atoms)`` float64.
        known: What is known beforehand, the same shape: the largest entries of ``known + value``
            are wanted. None where it is those of ``|value|``.
    """

    value: Tensor
    known: Tensor | None = None


def capture(
    model: nn.Module,
    tokenizer: Any,
    documents_select: Sequence[Document],
    documents_report: Sequence[Document],
    *,
    tokens: int = 400,
    response_tokens: int = 256,
    max_tokens: int = 2048,
    retrieval_prompts: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Fit, Sample]:
    """Collect what the layers of the dense model are given at positions that would run sparse.

    Args:
        model: A causal language model in evaluation mode, without csfast applied.
        tokenizer: Its tokenizer.
        documents_select: What is fitted to.
        documents_report: What is shown.
        tokens: Tokens of each task to take in each part, a document more or less.
        response_tokens: Tokens of one document to take at most.
        max_tokens: Tokens of one document at most, its prompt included.
        retrieval_prompts: Retrieval prompts to make for each part that holds none.
        seed: Of the choice of documents, and what `Fit` draws with.
        progress: Called with batches done and their number.

    Returns:
        The first part, with what can be fitted to it, and the second.

    Raises:
        ValueError: A number is out of range, or nothing would run sparse.
    """
    ffns = models.find_ffns(model)
    parts = []
    for part, documents in (("select", documents_select), ("report", documents_report)):
        with_retrieval = judge.with_retrieval(
            model,
            tokenizer,
            documents,
            n=retrieval_prompts,
            max_tokens=max_tokens,
            seed=f"{seed}/{part}",
        )
        pieces = judge.choose(
            "phase",
            model,
            tokenizer,
            with_retrieval,
            tokens=tokens,
            response_tokens=response_tokens,
            max_tokens=max_tokens,
            seed=seed,
        )
        parts.append(pieces)
    among = [piece for pieces in parts for piece in pieces]
    judges = [Judge(model, ffns, pieces, cache_bytes=0, among=among) for pieces in parts]
    report = progress or (lambda done, total: None)
    first, second = (len(of.batches) for of in judges)
    fitted = judges[0].capture({}, lambda n: report(n, first + second))
    shown = judges[1].capture({}, lambda n: report(first + n, first + second))
    return Fit(model, ffns, fitted, seed=seed), shown


@torch.no_grad()
def diagrams(
    fit: Fit,
    shown: Sample,
    *,
    n_groups: int = N_GROUPS,
    steps: int = STEPS,
    trials: int = TRIALS,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure how often pursuit recovers made signals and those of a model.

    Four kinds: ``synthetic`` signals of `k` normal entries; the ``usage`` of the groups of a layer
    for a token; its ``innovation``, the usage less the mean usage of the task; and the ``choice``
    of the groups of largest usage by way of the innovation. Only the first is sparse by making.
    Groups are clustered by co-activation and means are taken on what was fitted to; signals are of
    other documents.

    Args:
        fit: From `capture`; its seed is that of signals and operators.
        shown: From `capture`.
        n_groups: Groups of a layer, at least 2. Groups are blocks of whole neurons, so there may be
            fewer.
        steps: Values of either axis, 2 to the number of groups.
        trials: Signals of a cell.
        resume: File that keeps the rows that are done. If it exists, the run goes on from there. It
            is not removed at the end.
        progress: Called with cells done and their number.

    Returns:
        What ``csfast phase --json`` writes; docs/schemas.md explains every key.

    Raises:
        ValueError: A number is out of range, the layers differ in size, or a usage is not finite.
        PlanError: The resume file is damaged or belongs to other arguments.
        KeyboardInterrupt: On Ctrl-C; the resume file holds all rows that were done.
    """
    if n_groups < 2:
        raise ValueError(f"[phase] n_groups = {n_groups}: want at least 2.")
    if trials < 1:
        raise ValueError(f"[phase] trials = {trials}: want at least 1.")
    usage, mean = usages(fit, shown, n_groups)
    n_layers, _, n_atoms = usage.shape
    measurements, sparsity = axes(n_atoms, steps)
    innovation = usage - mean
    kinds: dict[str, Signals | None] = {
        "synthetic": None,
        "usage": Signals(usage.flatten(0, 1)),
        "innovation": Signals(innovation.flatten(0, 1)),
        "choice": Signals(innovation.flatten(0, 1), mean.flatten(0, 1)),
    }
    model_hash = models.fingerprint(fit.model).model_hash
    digest = hashlib.sha256(usage.numpy().tobytes() + mean.numpy().tobytes()).hexdigest()
    settings = [model_hash, digest, steps, trials, fit.seed, torch.__version__]
    keep = None if resume is None else pathlib.Path(resume)
    state = _start(keep, settings)

    report = progress or (lambda done, total: None)
    total = len(kinds) * steps * steps
    for place, (name, signals) in enumerate(kinds.items()):
        rows = state.rows.setdefault(name, [])
        for i in range(len(rows), steps):
            row = []
            for j, k in enumerate(sparsity):
                draw = fit.generator(place, i, j)
                if signals is None:
                    some = synthetic(k, n_atoms, trials, draw)
                else:
                    some = _some(signals, trials, draw)
                row.append(recovered(some, measurements[i], k, draw))
                report((place * steps + i) * steps + j + 1, total)
            rows.append(row)
            if keep is not None:
                _keep(keep, state)
    found = [{"name": name, "methods": _tables(state.rows[name])} for name in kinds]
    return {
        "n_groups": n_atoms,
        "group_neurons": fit.layouts(-(-fit.ffns[0].shape.n_neurons // n_groups))[0].block,
        "measurements": measurements,
        "sparsity": sparsity,
        "trials": trials,
        "constant": constant(
            _tables(state.rows["synthetic"])["omp"]["exact"], measurements, sparsity, n_atoms
        ),
        "diagrams": found,
        "layers": [_layer(usage[layer], innovation[layer]) for layer in range(n_layers)],
        "seed": fit.seed,
        "model_hash": model_hash,
    }


def axes(n_atoms: int, steps: int) -> tuple[list[int], list[int]]:
    """Give the measurements and the wanted entries of a diagram, both rising.

    Args:
        n_atoms: Entries of a signal.
        steps: Values of either axis, at least 2 and few enough to differ.

    Raises:
        ValueError: `steps` is out of range.
    """
    most = 1 + int(n_atoms * (DENSEST - SPARSEST))
    if not 2 <= steps <= most:
        raise ValueError(f"[phase] steps = {steps}: want 2 to {most} for {n_atoms} groups.")
    parts = [i / (steps - 1) for i in range(steps)]
    measurements = [max(1, round(n_atoms * (i + 1) / steps)) for i in range(steps)]
    sparsity = [max(1, round(n_atoms * (SPARSEST + p * (DENSEST - SPARSEST)))) for p in parts]
    return measurements, sparsity


def synthetic(k: int, n_atoms: int, n: int, generator: Generator) -> Signals:
    """Draw signals ``(n, n_atoms)`` of `k` normal entries at places that are all equally likely."""
    place = torch.rand(n, n_atoms, generator=generator).argsort(dim=1, stable=True)[:, :k]
    entry = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return Signals(torch.zeros(n, n_atoms, dtype=torch.float64).scatter_(1, place, entry))


@torch.no_grad()
def usages(fit: Fit, shown: Sample, n_groups: int) -> tuple[Tensor, Tensor]:
    """Give the usage of the groups of all layers, and its mean over the task of each position.

    Args:
        fit: What groups are clustered and means taken on.
        shown: Whose usage to give.
        n_groups: Groups of a layer, at most.

    Returns:
        Both ``(n_layers, n, n_groups)``, float64, on the CPU.

    Raises:
        ValueError: The layers differ in size, or a usage is not finite.
    """
    shapes = {ffn.shape for ffn in fit.ffns}
    if len(shapes) > 1:
        raise ValueError(f"[phase] layers of {len(shapes)} sizes: want all of one size.")
    block = -(-fit.ffns[0].shape.n_neurons // n_groups)
    layouts = fit.layouts(block)
    before, after = fit.sample.some(POSITIONS), shown.some(POSITIONS)
    task = after.where.task[after.where.row].cpu()
    usage, mean = [], []
    for layer, (ffn, layout) in enumerate(zip(fit.ffns, layouts, strict=True)):
        known, of_layer = (
            layout.grouped(ffn.activations(x)[1].float().abs() * ffn.down_norm()).double().cpu()
            for x in (before.inputs[layer], after.inputs[layer])
        )
        usage.append(of_layer)
        of_known = before.where.task[before.where.row].cpu()
        mean.append(_task_means(known, of_known, len(before.where.tasks))[task])
    found = torch.stack(usage), torch.stack(mean)
    if not all(bool(values.isfinite().all()) for values in found):
        raise ValueError("[phase] usage: want it finite for every token.")
    return found


@torch.no_grad()
def recovered(
    signals: Signals, n_measurements: int, k: int, generator: Generator
) -> dict[str, dict[str, float]]:
    """Measure signals by random operators, recover them, and say how much was found.

    Args:
        signals: What to measure.
        n_measurements: Measurements of each.
        k: Entries of each that are wanted, and that each method may name.
        generator: Of the operators.

    Returns:
        For each method the share of signals of which all wanted entries were found (``exact``), the
        mean share of the wanted entries that was found (``recall``), and the mean share of their
        squares (``energy``).
    """
    n, n_atoms = signals.value.shape
    masks: dict[str, list[Tensor]] = {}
    before = torch.zeros_like(signals.value) if signals.known is None else signals.known
    for value, known in zip(
        signals.value.chunk(min(DRAWS, n)), before.chunk(min(DRAWS, n)), strict=True
    ):
        phi = operators.gaussian(n_measurements, n_atoms, generator).double()
        y = value @ phi.T
        back = y @ phi
        if signals.known is None:
            _, taken = pursue(phi, y, k)
            length = torch.linalg.vector_norm(phi, dim=0)
            names = {"omp": taken, "matched": top(back.abs() / length, k)}
        else:
            estimate, _ = pursue(phi, y, max(1, n_measurements // SHARE))
            names = {
                "omp": top(known + estimate, k),
                "matched": top(known + back, k),
                "prior": top(known, k),
            }
        for name, mask in names.items():
            masks.setdefault(name, []).append(mask)
    whole = signals.value.abs() if signals.known is None else before + signals.value
    wanted = top(whole, k)
    energy = whole.square()
    of_wanted = (energy * wanted).sum(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    found = {}
    for name, parts in masks.items():
        mask = torch.cat(parts)
        share = (energy * mask).sum(dim=1) / of_wanted.clamp_min(tiny)
        found[name] = {
            "exact": float((mask & wanted).sum(dim=1).eq(k).double().mean()),
            "recall": float((mask & wanted).sum(dim=1).double().mean() / k),
            "energy": float(share.mean()),
        }
    return found


def pursue(phi: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Recover signals by orthogonal matching pursuit of at most `k` atoms.

    Products are taken in float64, the pursuit is that of `ops.omp` in float32.

    Args:
        phi: Operator, ``(m, n_atoms)`` float64.
        y: Measurements, ``(n, m)`` float64.
        k: Atoms to take at most, 1 to `n_atoms`.

    Returns:
        The estimate ``(n, n_atoms)`` float64, and a mask of the atoms taken.
    """
    n, n_atoms = len(y), phi.shape[1]
    found = ops.omp(
        (phi.T @ phi).float(),
        (y @ phi).float(),
        y.square().sum(dim=1).float(),
        torch.full((n,), k, dtype=torch.int32),
        budget_max=k,
    )
    valid = torch.arange(k) < found.count[:, None]
    # What is not valid is undefined: it goes to a column that is cut off.
    column = torch.where(valid, found.index.long(), n_atoms)
    mask = torch.zeros(n, n_atoms + 1, dtype=torch.bool).scatter_(1, column, True)
    estimate = torch.zeros(n, n_atoms + 1, dtype=torch.float64)
    estimate.scatter_(1, column, found.coef.double())
    return estimate[:, :n_atoms], mask[:, :n_atoms]


def top(values: Tensor, k: int) -> Tensor:
    """Give a mask of the `k` largest of every row ``(n, n_atoms)``; ties to the lower index."""
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)


def constant(
    rate: Table, measurements: Sequence[int], sparsity: Sequence[int], n_atoms: int
) -> float | None:
    """Fit the constant of ``m = C k log(n / k)`` to where half of the signals are recovered.

    Args:
        rate: Share of signals that were recovered, ``(measurements, sparsity)``.
        measurements: Rising.
        sparsity: Wanted entries of the columns, below `n_atoms`.
        n_atoms: Entries of a signal.

    Returns:
        The median over the columns that pass one half; None if none does.
    """
    found = []
    for j, k in enumerate(sparsity):
        for i in range(1, len(measurements)):
            below, above = rate[i - 1][j], rate[i][j]
            if below < 0.5 <= above:
                part = (0.5 - below) / (above - below)
                m = measurements[i - 1] + part * (measurements[i] - measurements[i - 1])
                found.append(m / operators.sample_bound(k, n_atoms, 1.0))
                break
    return statistics.median(found) if found else None


def _some(signals: Signals, n: int, generator: Generator) -> Signals:
    """Draw `n` of the signals, with replacement."""
    pick = torch.randint(0, len(signals.value), (n,), generator=generator)
    known = None if signals.known is None else signals.known[pick]
    return Signals(signals.value[pick], known)


def _task_means(usage: Tensor, task: Tensor, n_tasks: int) -> Tensor:
    """Mean usage of every task ``(n_tasks, n_groups)``; that of all for a task without any."""
    member = F.one_hot(task, n_tasks).double()
    n = member.sum(dim=0)
    mean = (member.T @ usage) / n.clamp_min(1)[:, None]
    return torch.where(n[:, None] > 0, mean, usage.mean(dim=0))


def _layer(usage: Tensor, innovation: Tensor) -> dict[str, float]:
    """How sparse the signals ``(n, n_groups)`` of one layer are."""
    return {
        "usage_share": _share_of(usage),
        "innovation_share": _share_of(innovation),
        "innovation_energy": float(innovation.square().sum() / usage.square().sum()),
    }


def _share_of(value: Tensor) -> float:
    """Mean share of the entries that hold `ENERGY` of a signal's."""
    square = value.square().sort(dim=1, descending=True).values.cumsum(dim=1)
    n = (square < ENERGY * square[:, -1:]).sum(dim=1) + 1
    return float(n.double().mean() / value.shape[1])


def _tables(rows: Sequence[Sequence[dict[str, dict[str, float]]]]) -> dict[str, dict[str, Table]]:
    """The cells, method by method and figure by figure."""
    first = rows[0][0]
    return {
        method: {
            figure: [[cell[method][figure] for cell in row] for row in rows] for figure in figures
        }
        for method, figures in first.items()
    }


@dataclasses.dataclass
class _State:
    """What is done so far; the whole of a resume file."""

    settings: list[Any]
    rows: dict[str, list[list[dict[str, dict[str, float]]]]]  # of every kind


def _start(resume: pathlib.Path | None, settings: list[Any]) -> _State:
    """The state in the resume file, or an empty one if there is no file yet."""
    if resume is None:
        return _State(settings, {})
    if not resume.exists():
        check_writable(resume)
        return _State(settings, {})
    try:
        found = json.loads(read_bounded(resume))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"[phase] {resume.name}: want a whole JSON file ({error}).") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise PlanError(f"[phase] {resume.name}: want a file of the option --resume.")
    if found.get("settings") != settings:
        raise PlanError(
            f"[phase] {resume.name}: was begun with another model, documents or options; want the "
            "same, or another file."
        )
    return _State(settings, found["rows"])


def _keep(resume: pathlib.Path, state: _State) -> None:
    """Write the state, whole or not at all."""
    whole = {"format": FORMAT, **dataclasses.asdict(state)}
    write_atomic(resume, (json.dumps(whole, allow_nan=False) + "\n").encode())
