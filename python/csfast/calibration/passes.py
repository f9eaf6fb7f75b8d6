"""Calibration: the passes over the samples.

Passes over samples, each batch by batch. The first finds the mean square of every channel of every
layer's input, hence the equaliser, and with feedback its second moment, hence the codes; second
moments are large, so it is made for as many layers at a time as fit. For blocks, the next takes the
true usages of a bounded number of positions and puts neurons together that are used together, a few
layers at a time. The last senses the inputs with those very codes and counts the estimated usages
in a histogram per layer, task and mode; thresholds are quantiles of it. All look only at
positions that would run sparse.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import models
from ..codes import blocks as blocks_
from ..codes import planes
from ..files import FILE_BYTES_MAX
from ..models import Ffn
from ..plan import BLOCK_MAX, JOINT, LayerPlan, Mode, Plan
from ..types import POOLED, TERNARY, Code
from .resume import State, bytes_max, keep_state, key_of, start
from .samples import Batch, Sample, batches_of, draw, listed, n_tokens_of, positions, sorted_samples
from .thresholds import STEP_OPERATIONS, Sensor, counted, quantiles, usages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DENSITIES = tuple(i / 100 for i in range(1, 101))
TOKENS_MAX = 32_768  # run through the model in the second pass: 12 s of the demo model on one core
# Without feedback the first pass, a mean over channels, takes one token in so many; second moments
# want all of them (docs/decisions/0003-plans-hold-codes.md).
_SCALE_SHARE = 4
# Positions for each channel that feedback gains by; with two it gained nothing (docs/api.md).
_FEEDBACK_MIN = 7
_POSITIONS_MIN = 16  # of a task: below that, a quantile of 1 % of the neurons is a guess
_SQUARE_ROWS = 512  # tokens squared at a time in float64, at most
_MOMENT_BYTES = 1 << 32  # of second moments at a time: 32 layers at d = 4096
# Positions whose usages order the neurons of a layer: 235 MB of float32 at 28,672 neurons.
_ORDER_POSITIONS = 2048
_MIXTURES = 4  # of the positions of a task to batches
_ORDER_BYTES = 1 << 30  # of their inputs at a time

_log = logging.getLogger("csfast")
Progress = Callable[[int, int], None]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave aside what a program may have set for all of torch: a plan does not depend on it.

    Defaults of the dtype are left aside by naming dtypes. All of these are the thread's own.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@undisturbed()
def calibrate(
    model: nn.Module,
    samples: Sample | Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    bits: Sequence[Code] = (2, 3),
    blocks: Sequence[int] = (1,),
    joint: bool = False,
    feedback: bool = True,
    densities: Sequence[float] = DENSITIES,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    max_tokens: int = TOKENS_MAX,
) -> Plan:
    """Calibrate few-bit sensing for a model.

    Every task gets the same share of ``max_tokens`` and the same weight in the pooled thresholds.
    The model is left as it was. Equal arguments on one machine give equal plans, byte for byte.
    `docs/advanced.md` says what memory that takes besides the model.

    Args:
        model: A causal language model as `models.find_ffns` wants it, without csfast applied.
        samples: Documents, strings (plain texts of the task ``"text"``) or token ids ``(1, T)``,
            int64 (likewise); or one of these.
        tokenizer: Of the model; needed unless all samples are token ids.
        bits: Codes of the sensor to fit: 1 to 4 bits a weight, ``"ternary"``.
        blocks: Sizes of block to order the neurons for, 1 to 128; 1 is single neurons.
        joint: Find thresholds for batches that share one support as well.
        feedback: Fit the codes to the inputs, so that they make up for each other's errors (eq.
            42). False codes every weight by itself: for texts too few to stand for what the model
            will see.
        densities: Fractions to find thresholds for, rising; 1 is added if it is missing.
        resume: File that keeps what has been counted after every batch. If it exists, counting goes
            on from there. It is not removed at the end.
        progress: Called after every batch and every fitted layer with tokens done and tokens in
            all; what is fitted counts as much as what it is fitted to.
        seed: Of the draw of samples.
        max_tokens: Most tokens of a pass; the first takes a quarter as many without feedback.

    Returns:
        The plan.

    Raises:
        ValueError: A sample is empty or malformed, there are too few, an activation is not finite,
            or an option is out of range.
        TypeError: A sample is of another type, or token ids are not int64.
        UnsupportedModelError: csfast does not run on the model.
        PlanError: The resume file is damaged or belongs to other arguments.
        KeyboardInterrupt: At once on Ctrl-C, but for a few operations of ``d^3`` that factorise a
            second moment; the resume file holds all whole batches.
    """
    bits, blocks = _bits(bits), _block_sizes(blocks)
    if not isinstance(joint, bool):
        raise TypeError(f"[calibrate] joint = {joint!r}: want True or False.")
    if not isinstance(feedback, bool):
        raise TypeError(f"[calibrate] feedback = {feedback!r}: want True or False.")
    if type(max_tokens) is not int:
        raise TypeError(f"[calibrate] max_tokens = {max_tokens!r}: want a whole number.")
    batches = (1, *JOINT) if joint else (1,)
    modes = [Mode(*s) for s in itertools.product(bits, blocks, batches)]
    grid = _grid(densities)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"[calibrate] seed = {seed!r}: want a whole number from 0 to 2^63 - 1.")
    groups = sorted_samples(samples)
    fingerprint = models.fingerprint(model)
    ffns = models.find_ffns(model)
    if any(models.is_patched(ffn.module) for ffn in ffns):
        raise ValueError("[calibrate] a model that csfast is applied to: call csfast.remove first.")

    for ffn in ffns:
        for linear in ffn.linears:
            for tensor in linear.parameters():
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"[calibrate] weights of {ffn.name}: want them finite.")

    chosen = batches_of(draw(groups, model, tokenizer, max_tokens, seed))
    first = chosen
    if not feedback:
        first = batches_of(draw(groups, model, tokenizer, max_tokens // _SCALE_SHARE, seed))
    counts = list(positions(groups, first, least=1).values())
    n_tokens = positions(groups, chosen, least=_POSITIONS_MIN)
    d, n_seen = max(ffn.shape.d for ffn in ffns), sum(counts)
    if feedback and n_seen < _FEEDBACK_MIN * d:
        _log.warning(
            "[calibrate] %d positions for codes with feedback of %d channels: want %d or more, by "
            "more text or tokens (max_tokens, --tokens), or no fitting (feedback=False, "
            "--no-feedback).",
            *(n_seen, d, _FEEDBACK_MIN * d),
        )
    above = tuple(n for n in blocks if n > 1)
    sums = _rounds([8 * ffn.shape.d**2 if feedback else 0 for ffn in ffns], _MOMENT_BYTES)
    orders = _rounds([_input_bytes(ffn) for ffn in ffns], _ORDER_BYTES) if above or joint else []
    total = 2 * len(sums) * n_tokens_of(first) + (len(orders) + 1) * n_tokens_of(chosen)

    key = key_of(
        fingerprint.model_hash, groups, [*first, *chosen], (modes, feedback, seed, max_tokens)
    )
    keep = None if resume is None else pathlib.Path(resume)
    empty = State.empty(ffns, len(groups), len(above), len(modes))
    n_bytes = bytes_max(empty, ffns, bits, sums if feedback else [])
    if keep is not None and n_bytes > FILE_BYTES_MAX:
        raise ValueError(
            f"[calibrate] resume: a file of {n_bytes} bytes: want at most {FILE_BYTES_MAX}; "
            "take fewer bits, blocks or tasks, or do without it."
        )
    state = start(keep, key, empty, ffns, bits)

    def told(n_done: int) -> None:
        if keep is not None:
            keep_state(keep, key, state)
        if progress is not None:
            progress(n_done, total)

    for i, layers in enumerate(sums):
        before = 2 * i * n_tokens_of(first)
        todo = [layer for layer in layers if layer >= len(state.fitted)]
        for j in range(state.n_summed if todo else len(first), len(first)):
            share = 1 / (counts[first[j].task] * len(groups)) if feedback else None
            _run(model, ffns, first[j], _add_squares(state, first[j], todo, share))
            state.n_summed = j + 1
            told(before + n_tokens_of(first[: j + 1]))
        for layer in todo:
            state.fitted.append(_fitted(state, layer, ffns[layer], counts, bits))
            if layer == layers[-1]:
                state.n_summed = 0
            part = (layer - layers[0] + 1) / len(layers)
            told(before + int(n_tokens_of(first) * (1 + part)))
    before = 2 * len(sums) * n_tokens_of(first)
    sensors = [
        Sensor(plan, ffn, ffn.offset()) for plan, ffn in zip(state.fitted, ffns, strict=True)
    ]
    thinned = _thinned(chosen, len(groups))
    for i, layers in enumerate(orders):
        todo = [layer for layer in layers if layer >= state.n_ordered]
        inputs = _inputs(model, ffns, thinned, todo)
        for layer in todo:
            xs = inputs.pop(layer)
            _order(state, layer, xs, ffns[layer], above, seed)
            sensors[layer] = sensors[layer].ordered(state.order[:, layer], above)
            _add_joint_usages(state, layer, xs, sensors[layer], modes, seed)
            state.n_ordered = layer + 1
            part = (layer - layers[0] + 1) / len(layers)
            told(before + int(n_tokens_of(chosen) * (i + part)))
    for layer, sensor in enumerate(sensors):
        sensors[layer] = sensor.ordered(state.order[:, layer], above)
    for i in range(state.n_counted, len(chosen)):
        watch = _add_usages(state, chosen[i], sensors, modes)
        _run(model, ffns, chosen[i], watch)
        state.n_counted = i + 1
        told(total - n_tokens_of(chosen[i + 1 :]))

    thresholds = {s: quantiles(state.histogram[j], grid) for j, s in enumerate(modes)}
    return Plan(
        model=fingerprint,
        bits=bits,
        blocks=blocks,
        batches=batches,
        tasks=(POOLED, *groups),
        densities=grid,
        layers=tuple(sensor.plan for sensor in sensors),
        thresholds=thresholds,
        n_tokens=n_tokens,
        feedback=feedback,
        seed=seed,
    )


Watch = Callable[[int, Tensor], None]  # number of the layer, its input at the sparse positions


def _run(model: nn.Module, ffns: list[Ffn], batch: Batch, watch: Watch) -> None:
    """Run a batch under the eyes of `watch`."""
    with _watching(ffns, batch, watch):
        models.hidden_states(model, batch.ids.to(ffns[0].gate.weight.device))


@contextlib.contextmanager
def _watching(ffns: list[Ffn], batch: Batch, watch: Watch) -> Iterator[None]:
    """Call `watch` with every layer's input while the block runs."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][batch.sparse.to(inputs[0].device)]
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"[calibrate] input of {ffns[layer].name}: not finite; want a sound model."
                )
            watch(layer, x)

        return see

    handles = []
    try:
        for layer, ffn in enumerate(ffns):
            handles.append(ffn.module.register_forward_pre_hook(hook(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_squares(state: State, batch: Batch, layers: Sequence[int], share: float | None) -> Watch:
    """Add up squares of some layers' inputs, and if positions have a share, second moments."""

    def watch(layer: int, x: Tensor) -> None:
        if layer not in layers:
            return
        d = x.shape[1]
        total = state.square[layer, batch.task]
        if share is not None and layer not in state.moment:
            state.moment[layer] = torch.zeros(d, d, dtype=torch.float64, device=x.device)
        # Products in float64 take twice as long as those of `STEP_OPERATIONS`.
        for part in torch.split(x, max(1, min(_SQUARE_ROWS, STEP_OPERATIONS // (4 * d * d)))):
            wide = part.double()
            total[:d] += wide.square().sum(dim=0).cpu()
            if share is not None:
                state.moment[layer].addmm_(wide.T, wide, alpha=share)

    return watch


def _fitted(
    state: State, layer: int, ffn: Ffn, counts: list[int], bits: tuple[Code, ...]
) -> LayerPlan:
    """Fit a layer to what has been added up, each task weighted equally; its moment is spent."""
    square = state.square[layer, :, : ffn.shape.d]
    mean = (square / torch.tensor(counts, dtype=torch.float64)[:, None]).mean(dim=0)
    moment = state.moment.pop(layer, None)
    return LayerPlan.fit(*ffn.weights, planes.equalizer(mean), bits, moment)


def _rounds(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Layers in parts that take at most so many bytes together, or are one layer."""
    rounds: list[list[int]] = []
    left = 0
    for layer, size in enumerate(sizes):
        if not rounds or size > left:
            rounds.append([])
            left = most
        rounds[-1].append(layer)
        left -= size
    return rounds


def _input_bytes(ffn: Ffn) -> int:
    """Bytes of the inputs that order the neurons of a layer."""
    return _ORDER_POSITIONS * ffn.shape.d * ffn.gate.weight.element_size()


def _thinned(batches: list[Batch], n_tasks: int) -> list[Batch]:
    """The batches with few of their sparse positions, evenly spaced, of every task as many."""
    # Twice what a joint support takes: every second position is enough, whatever the tasks.
    share = max(_ORDER_POSITIONS // n_tasks, 2 * JOINT[-1])
    found = []
    for task in range(n_tasks):
        members = [b for b in batches if b.task == task]
        step = max(1, -(-sum(int(b.sparse.sum()) for b in members) // share))
        seen = 0
        for batch in members:
            sparse = torch.zeros_like(batch.sparse)
            row, column = batch.sparse.nonzero().T
            kept = (torch.arange(len(row)) + seen) % step == 0
            sparse[row[kept], column[kept]] = True
            seen += len(row)
            found.append(Batch(task, batch.ids, sparse))
    return found


def _inputs(
    model: nn.Module, ffns: list[Ffn], batches: list[Batch], layers: list[int]
) -> dict[int, list[Tensor]]:
    """Inputs of some layers at the sparse positions, ``(n, d)`` for each task, on the CPU."""
    n_tasks = 1 + max(batch.task for batch in batches)
    seen: dict[int, list[list[Tensor]]] = {layer: [[] for _ in range(n_tasks)] for layer in layers}
    for batch in batches if layers else ():

        def watch(layer: int, x: Tensor, task: int = batch.task) -> None:
            if layer in seen:
                seen[layer][task].append(x.cpu())

        _run(model, ffns, batch, watch)
    return {layer: [torch.cat(parts) for parts in tasks] for layer, tasks in seen.items()}


def _order(
    state: State, layer: int, inputs: list[Tensor], ffn: Ffn, above: tuple[int, ...], seed: int
) -> None:
    """Put neurons together that are used together, for every size of block."""
    if not above:
        return
    _, a = ffn.activations(torch.cat(inputs).to(ffn.gate.weight.device))
    usage = a.float().abs_().mul_(ffn.down_norm())
    for j, block in enumerate(above):
        state.order[j, layer, : ffn.shape.n_neurons] = blocks_.cluster(usage, block, seed).cpu()


def _add_usages(state: State, batch: Batch, sensors: list[Sensor], modes: list[Mode]) -> Watch:
    """Count the usages of every position."""

    def watch(layer: int, x: Tensor) -> None:
        sensor = sensors[layer]
        for j, usage in usages(sensor, x, modes, joint=False):
            state.histogram[j, layer, batch.task] += counted(usage)

    return watch


def _add_joint_usages(
    state: State,
    layer: int,
    inputs: list[Tensor],
    sensor: Sensor,
    modes: list[Mode],
    seed: int,
) -> None:
    """Count the usages of positions that stand for the sequences of a batch.

    Sequences of a batch have less in common than positions of one document, so those of all
    documents of a task are mixed, several times over.
    """
    for task, x in enumerate(inputs):
        draw = torch.Generator().manual_seed(seed)
        x = x.to(sensor.ffn.gate.weight.device)
        for j, usage in usages(sensor, x, modes, joint=True):
            size = modes[j].batch
            n = len(x) // size * size
            for _ in range(_MIXTURES):
                mixed = torch.randperm(len(x), generator=draw)[:n].to(x.device)
                mean = usage[mixed].view(-1, size, usage.shape[1]).mean(dim=1)
                state.histogram[j, layer, task] += counted(mean)


def _bits(bits: Sequence[Code]) -> tuple[Code, ...]:
    codes = listed("bits", bits)
    known = all(type(b) in (int, str) and b in planes.CODES for b in codes)
    if not codes or not known or len(set(codes)) != len(codes):
        raise ValueError(
            f'[calibrate] bits = {codes}: want some of 1, 2, 3, 4 and "{TERNARY}", each once.'
        )
    return tuple(sorted(codes, key=planes.CODES.index))


def _block_sizes(blocks: Sequence[int]) -> tuple[int, ...]:
    sizes = listed("blocks", blocks)
    fit = all(type(n) is int and 1 <= n <= BLOCK_MAX for n in sizes)
    if not sizes or not fit or len(set(sizes)) != len(sizes):
        raise ValueError(
            f"[calibrate] blocks = {sizes}: want sizes from 1 to {BLOCK_MAX}, each once."
        )
    return tuple(sorted(sizes))


def _grid(densities: Sequence[float]) -> tuple[float, ...]:
    given = listed("densities", densities)
    if not all(isinstance(rho, (int, float)) for rho in given):
        raise TypeError(f"[calibrate] densities = {given}: want numbers.")
    grid = tuple(float(rho) for rho in given)
    grid += () if grid[-1:] == (1.0,) else (1.0,)
    rising = all(a < b for a, b in itertools.pairwise(grid))
    if not given or not rising or not 0 < grid[0] <= 1:
        raise ValueError(f"[calibrate] densities = {given}: want rising fractions in (0, 1].")
    return grid
