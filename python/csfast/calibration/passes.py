"""Calibration: from a model and sample texts to a plan.

Passes over samples, each batch by batch. The first finds the mean square of every channel of every
layer's input, hence the equaliser, and with feedback its second moment, hence the codes; second
moments are large, so it is made for as many layers at a time as fit. For blocks, the next takes the
true usages of a bounded number of positions and puts neurons together that are used together, a few
layers at a time. The last senses the inputs with those very codes and counts the estimated usages
in a histogram per layer, task and setting; thresholds are quantiles of it. All look only at
positions that would run sparse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .. import models
from ..codes import blocks as blocks_
from ..codes import planes
from ..container import laid_out, unpack
from ..files import FILE_BYTES_MAX, read_bounded, write_atomic
from ..models import Encoded, Ffn
from ..plan import BLOCK_MAX, JOINT, NAME, LayerPlan, Plan, Setting, layer_of, layer_tensors
from ..types import POOLED, TERNARY, Code, Document, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DENSITIES = tuple(i / 100 for i in range(1, 101))
TOKENS_MAX = 32_768  # run through the model in the second pass: 12 s of the demo model on one core
FORMAT = "csfast-calibration-3"  # of a resume file
PLAIN = "text"  # the task of samples that name none
# Without feedback the first pass, a mean over channels, takes one token in so many; second moments
# want all of them (docs/decisions/0003-plans-hold-codes.md).
_SCALE_SHARE = 4
_DOCUMENT_TOKENS_MAX = 1024  # of one sample: twenty samples a pass at the least
_POSITIONS_MIN = 16  # of a task: below that, a quantile of 1 % of the neurons is a guess
_BATCH_TOKENS = 2048
_SQUARE_ROWS = 512  # tokens squared at a time in float64, at most
_MOMENT_BYTES = 1 << 32  # of second moments at a time: 32 layers at d = 4096
# Of one matrix product, so that Ctrl-C waits for 0.1 s at most on two cores of 50 GFLOP/s each.
_STEP_OPERATIONS = 10**10
_COUNT_USAGES = 1 << 22  # counted at a time
_STEP_NEURONS = 1024  # sensed at a time: their levels in float32 have 64 MiB at d = 8192
# Positions whose usages order the neurons of a layer: 235 MB of float32 at 28,672 neurons.
_ORDER_POSITIONS = 2048
_MIXTURES = 4  # of the positions of a task to batches
_ORDER_BYTES = 1 << 30  # of their inputs at a time

# A usage is counted by the upper bits of its float32: the exponent and six bits of the mantissa,
# 64 bins an octave. Bins above that of infinity hold what is not a number.
_SHIFT = 17
_BINS = 255 << (23 - _SHIFT)

Progress = Callable[[int, int], None]
Sample = Document | str | Tensor
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences of one task that run through the model together."""

    task: int
    ids: Tensor  # (batch, n_tokens), padded at the end
    sparse: Tensor  # (batch, n_tokens), bool: the positions that would run sparse


@dataclasses.dataclass
class _State:
    """What has been counted and fitted so far; the whole of a resume file."""

    fitted: list[LayerPlan]  # of the first layers, without orders
    n_summed: int  # batches that the squares of the layers in hand, the next ones, have seen
    n_ordered: int  # layers that have orders and joint usages
    n_counted: int  # batches of the last pass
    square: Tensor  # (n_layers, n_tasks, d_max), float64: sums of squares
    moment: dict[int, Tensor]  # of layers in hand, (d, d), float64, where their weights are
    order: Tensor  # (n_blocks, n_layers, n_neurons_max), int64
    histogram: Tensor  # (n_settings, n_layers, n_tasks, _BINS), int64

    @staticmethod
    def empty(ffns: list[Ffn], n_tasks: int, n_blocks: int, n_settings: int) -> _State:
        """Nothing counted."""
        d_max = max(ffn.shape.d for ffn in ffns)
        n_neurons_max = max(ffn.shape.n_neurons for ffn in ffns)
        return _State(
            fitted=[],
            n_summed=0,
            n_ordered=0,
            n_counted=0,
            square=torch.zeros(len(ffns), n_tasks, d_max, dtype=torch.float64),
            moment={},
            order=torch.zeros(n_blocks, len(ffns), n_neurons_max, dtype=torch.int64),
            histogram=torch.zeros(n_settings, len(ffns), n_tasks, _BINS, dtype=torch.int64),
        )


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
    `docs/api.md` says what memory that takes besides the model.

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
    settings = [Setting(*s) for s in itertools.product(bits, blocks, batches)]
    grid = _grid(densities)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"[calibrate] seed = {seed!r}: want a whole number from 0 to 2^63 - 1.")
    groups = _sorted_samples(samples)
    fingerprint = models.fingerprint(model)
    ffns = models.find_ffns(model)
    if any(hasattr(type(ffn.module), "dense_forward") for ffn in ffns):
        raise ValueError("[calibrate] a model that csfast is applied to: call csfast.remove first.")

    for ffn in ffns:
        for linear in ffn.linears:
            for tensor in linear.parameters():
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"[calibrate] weights of {ffn.name}: want them finite.")

    chosen = _batches(_draw(groups, model, tokenizer, max_tokens, seed))
    first = chosen
    if not feedback:
        first = _batches(_draw(groups, model, tokenizer, max_tokens // _SCALE_SHARE, seed))
    counts = list(_positions(groups, first, least=1).values())
    n_tokens = _positions(groups, chosen, least=_POSITIONS_MIN)
    above = tuple(n for n in blocks if n > 1)
    sums = _rounds([8 * ffn.shape.d**2 if feedback else 0 for ffn in ffns], _MOMENT_BYTES)
    orders = _rounds([_input_bytes(ffn) for ffn in ffns], _ORDER_BYTES) if above or joint else []
    total = 2 * len(sums) * _n_tokens(first) + (len(orders) + 1) * _n_tokens(chosen)

    key = _key(
        fingerprint.model_hash, groups, [*first, *chosen], (settings, feedback, seed, max_tokens)
    )
    keep = None if resume is None else pathlib.Path(resume)
    empty = _State.empty(ffns, len(groups), len(above), len(settings))
    n_bytes = _bytes_max(empty, ffns, bits, sums if feedback else [])
    if keep is not None and n_bytes > FILE_BYTES_MAX:
        raise ValueError(
            f"[calibrate] resume: a file of {n_bytes} bytes: want at most {FILE_BYTES_MAX}; "
            "take fewer bits, blocks or tasks, or do without it."
        )
    state = _start(keep, key, empty, ffns, bits)

    def told(n_done: int) -> None:
        if keep is not None:
            _keep(keep, key, state)
        if progress is not None:
            progress(n_done, total)

    with torch.no_grad():
        for i, layers in enumerate(sums):
            before = 2 * i * _n_tokens(first)
            todo = [layer for layer in layers if layer >= len(state.fitted)]
            for j in range(state.n_summed if todo else len(first), len(first)):
                share = 1 / (counts[first[j].task] * len(groups)) if feedback else None
                _run(model, ffns, first[j], _add_squares(state, first[j], todo, share))
                state.n_summed = j + 1
                told(before + _n_tokens(first[: j + 1]))
            for layer in todo:
                state.fitted.append(_fitted(state, layer, ffns[layer], counts, bits))
                if layer == layers[-1]:
                    state.n_summed = 0
                part = (layer - layers[0] + 1) / len(layers)
                told(before + int(_n_tokens(first) * (1 + part)))
        before = 2 * len(sums) * _n_tokens(first)
        sensors = [
            _Sensor(plan, ffn, ffn.offset()) for plan, ffn in zip(state.fitted, ffns, strict=True)
        ]
        thinned = _thinned(chosen, len(groups))
        for i, layers in enumerate(orders):
            todo = [layer for layer in layers if layer >= state.n_ordered]
            inputs = _inputs(model, ffns, thinned, todo)
            for layer in todo:
                xs = inputs.pop(layer)
                _order(state, layer, xs, ffns[layer], above, seed)
                sensors[layer] = sensors[layer].ordered(state.order[:, layer], above)
                _add_joint_usages(state, layer, xs, sensors[layer], settings, seed)
                state.n_ordered = layer + 1
                part = (layer - layers[0] + 1) / len(layers)
                told(before + int(_n_tokens(chosen) * (i + part)))
        for layer, sensor in enumerate(sensors):
            sensors[layer] = sensor.ordered(state.order[:, layer], above)
        for i in range(state.n_counted, len(chosen)):
            watch = _add_usages(state, chosen[i], sensors, settings)
            _run(model, ffns, chosen[i], watch)
            state.n_counted = i + 1
            told(total - _n_tokens(chosen[i + 1 :]))

    thresholds = {s: _thresholds(state.histogram[j], grid) for j, s in enumerate(settings)}
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Sensor:
    """What sensing one layer takes."""

    plan: LayerPlan
    ffn: Ffn
    offset: Tensor | None  # (n_neurons, 2), float32: from the biases

    def ordered(self, order: Tensor, above: tuple[int, ...]) -> _Sensor:
        """The same with the orders ``(n_blocks, n_neurons_max)`` for its blocks."""
        n_neurons = self.ffn.shape.n_neurons
        orders = {n: row[:n_neurons].clone() for n, row in zip(above, order, strict=True)}
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, order=orders))


Watch = Callable[[int, Tensor], None]  # number of the layer, its input at the sparse positions


def _run(model: nn.Module, ffns: list[Ffn], batch: _Batch, watch: Watch) -> None:
    """Run a batch under the eyes of `watch`."""
    with _watching(ffns, batch, watch):
        models.hidden_states(model, batch.ids.to(ffns[0].gate.weight.device))


@contextlib.contextmanager
def _watching(ffns: list[Ffn], batch: _Batch, watch: Watch) -> Iterator[None]:
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


def _add_squares(state: _State, batch: _Batch, layers: Sequence[int], share: float | None) -> Watch:
    """Add up squares of some layers' inputs, and if positions have a share, second moments."""

    def watch(layer: int, x: Tensor) -> None:
        if layer not in layers:
            return
        d = x.shape[1]
        total = state.square[layer, batch.task]
        if share is not None and layer not in state.moment:
            state.moment[layer] = torch.zeros(d, d, dtype=torch.float64, device=x.device)
        # Products in float64 take twice as long as those of `_STEP_OPERATIONS`.
        for part in torch.split(x, max(1, min(_SQUARE_ROWS, _STEP_OPERATIONS // (4 * d * d)))):
            wide = part.double()
            total[:d] += wide.square().sum(dim=0).cpu()
            if share is not None:
                state.moment[layer].addmm_(wide.T, wide, alpha=share)

    return watch


def _fitted(
    state: _State, layer: int, ffn: Ffn, counts: list[int], bits: tuple[Code, ...]
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


def _thinned(batches: list[_Batch], n_tasks: int) -> list[_Batch]:
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
            found.append(_Batch(task, batch.ids, sparse))
    return found


def _inputs(
    model: nn.Module, ffns: list[Ffn], batches: list[_Batch], layers: list[int]
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
    state: _State, layer: int, inputs: list[Tensor], ffn: Ffn, above: tuple[int, ...], seed: int
) -> None:
    """Put neurons together that are used together, for every size of block."""
    if not above:
        return
    _, a = ffn.activations(torch.cat(inputs).to(ffn.gate.weight.device))
    usage = a.float().abs_().mul_(ffn.down_norm())
    for j, block in enumerate(above):
        state.order[j, layer, : ffn.shape.n_neurons] = blocks_.cluster(usage, block, seed).cpu()


def _add_usages(
    state: _State, batch: _Batch, sensors: list[_Sensor], settings: list[Setting]
) -> Watch:
    """Count the usages of every position."""

    def watch(layer: int, x: Tensor) -> None:
        sensor = sensors[layer]
        for j, usage in _usages(sensor, x, settings, joint=False):
            state.histogram[j, layer, batch.task] += _counted(usage)

    return watch


def _add_joint_usages(
    state: _State,
    layer: int,
    inputs: list[Tensor],
    sensor: _Sensor,
    settings: list[Setting],
    seed: int,
) -> None:
    """Count the usages of positions that stand for the sequences of a batch.

    Sequences of a batch have less in common than positions of one document, so those of all
    documents of a task are mixed, several times over.
    """
    for task, x in enumerate(inputs):
        draw = torch.Generator().manual_seed(seed)
        x = x.to(sensor.ffn.gate.weight.device)
        for j, usage in _usages(sensor, x, settings, joint=True):
            size = settings[j].batch
            n = len(x) // size * size
            for _ in range(_MIXTURES):
                mixed = torch.randperm(len(x), generator=draw)[:n].to(x.device)
                mean = usage[mixed].view(-1, size, usage.shape[1]).mean(dim=1)
                state.histogram[j, layer, task] += _counted(mean)


def _usages(
    sensor: _Sensor, x: Tensor, settings: list[Setting], *, joint: bool
) -> Iterator[tuple[int, Tensor]]:
    """For some settings their number and the usages ``(n, n_blocks)`` of single positions."""
    some = [(j, s) for j, s in enumerate(settings) if (s.batch > 1) == joint]
    for bits, members in itertools.groupby(some, lambda m: m[1].bits):
        usage = _usage(sensor, x, bits)
        for block, sizes in itertools.groupby(members, lambda m: m[1].block):
            grouped = _grouped(usage, sensor.plan, block)
            for j, _ in sizes:
                yield j, grouped


def _usage(sensor: _Sensor, x: Tensor, bits: Code) -> Tensor:
    """The estimated usage of every neuron, ``(n, n_neurons)``, float32."""
    ffn, offset = sensor.ffn, sensor.offset
    d, n_neurons = ffn.shape.d, ffn.shape.n_neurons
    row_scale = sensor.plan.row_scale[bits].to(x.device)
    q, scale = planes.quantize(x, sensor.plan.equal.to(x.device))
    # Integers below 2^24 in float32, or below 2^53 in float64: exact, as the kernels are.
    dtype = torch.float32 if 127 * planes.level_max(bits) * d < 2**24 else torch.float64
    usage = torch.empty(len(x), n_neurons, device=x.device)
    step = max(1, _STEP_OPERATIONS // (4 * d * _STEP_NEURONS))
    for start in range(0, n_neurons, _STEP_NEURONS):
        rows = slice(start, start + _STEP_NEURONS)
        codes = sensor.plan.codes[bits][rows].to(x.device)
        level = planes.levels_of(planes.unpack(codes.flatten(0, 1), bits, d), bits).to(dtype)
        gate, up = level[0::2].T.contiguous(), level[1::2].T.contiguous()
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            t = scale[part, None]
            g = (q[part].to(dtype) @ gate).float().mul_(row_scale[rows, 0]).mul_(t)
            u = (q[part].to(dtype) @ up).float().mul_(row_scale[rows, 1]).mul_(t)
            if offset is not None:
                g.add_(offset[rows, 0])
                u.add_(offset[rows, 1])
            usage[part, rows] = u.mul_(ffn.act(g)).abs_()
    return usage


def _grouped(usage: Tensor, plan: LayerPlan, block: int) -> Tensor:
    """The usage of every block, ``(n, n_blocks)``: the root of its neurons' summed squares."""
    if block == 1:
        return usage
    square = usage[:, plan.order[block].to(usage.device)].square_()
    short = -square.shape[1] % block
    square = nn.functional.pad(square, (0, short)).view(len(square), -1, block)
    return square.sum(dim=2).sqrt_()


def _counted(usage: Tensor) -> Tensor:
    """How many usages ``(n, n_blocks)`` are in every bin, on the CPU."""
    count = torch.zeros(_BINS, dtype=torch.int64)
    for part in torch.split(usage, max(1, _COUNT_USAGES // usage.shape[1])):
        bins = (part.contiguous().view(torch.int32) >> _SHIFT).clamp_(max=_BINS - 1).flatten()
        count += torch.bincount(bins, minlength=_BINS).cpu()
    return count


def _thresholds(histogram: Tensor, densities: tuple[float, ...]) -> Tensor:
    """Quantiles of counted usages.

    Args:
        histogram: ``(n_layers, n_groups, _BINS)``, int64.
        densities: Rising; the last is 1.

    Returns:
        ``(n_layers, 1 + n_groups, n_densities)``, float32: pooled, then each group. Linear within
        a bin; 0 at density 1.
    """
    share = histogram.double() / histogram.sum(dim=2, keepdim=True)
    share = torch.cat([share.mean(dim=1, keepdim=True), share], dim=1)
    tail = share.flip(2).cumsum(dim=2).flip(2)  # of the mass: in this bin and above
    above = torch.cat([tail[..., 1:], torch.zeros_like(tail[..., :1])], dim=2)
    edges = (torch.arange(_BINS + 1, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    edges[-1] = torch.finfo(torch.float32).max
    columns = []
    for density in densities[:-1]:
        b = ((tail >= density).sum(dim=2, keepdim=True) - 1).clamp(min=0)
        part = (density - above.gather(2, b)) / share.gather(2, b)
        low, high = edges[b], edges[b + 1]
        columns.append(torch.where(b > 0, high - part.clamp(0, 1) * (high - low), 0.0))
    columns.append(torch.zeros_like(tail[..., :1]))
    return torch.cat(columns, dim=2).float()


def _bits(bits: Sequence[Code]) -> tuple[Code, ...]:
    settings = _listed("bits", bits)
    known = all(type(b) in (int, str) and b in planes.CODES for b in settings)
    if not settings or not known or len(set(settings)) != len(settings):
        raise ValueError(
            f'[calibrate] bits = {settings}: want some of 1, 2, 3, 4 and "{TERNARY}", each once.'
        )
    return tuple(sorted(settings, key=planes.CODES.index))


def _listed(name: str, values: Iterable[T]) -> tuple[T, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"[calibrate] {name} = {values!r}: want a sequence.")
    return tuple(values)


def _block_sizes(blocks: Sequence[int]) -> tuple[int, ...]:
    sizes = _listed("blocks", blocks)
    fit = all(type(n) is int and 1 <= n <= BLOCK_MAX for n in sizes)
    if not sizes or not fit or len(set(sizes)) != len(sizes):
        raise ValueError(
            f"[calibrate] blocks = {sizes}: want sizes from 1 to {BLOCK_MAX}, each once."
        )
    return tuple(sorted(sizes))


def _grid(densities: Sequence[float]) -> tuple[float, ...]:
    given = _listed("densities", densities)
    if not all(isinstance(rho, (int, float)) for rho in given):
        raise TypeError(f"[calibrate] densities = {given}: want numbers.")
    grid = tuple(float(rho) for rho in given)
    grid += () if grid[-1:] == (1.0,) else (1.0,)
    rising = all(a < b for a, b in itertools.pairwise(grid))
    if not given or not rising or not 0 < grid[0] <= 1:
        raise ValueError(f"[calibrate] densities = {given}: want rising fractions in (0, 1].")
    return grid


def _sorted_samples(samples: Sample | Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples by task, each checked as far as that goes without a tokenizer."""
    if isinstance(samples, (str, Document, Tensor)):
        samples = [samples]
    listed = _listed("samples", samples)
    if not listed:
        raise ValueError("[calibrate] no samples: want at least one.")
    groups: dict[str, list[Sample]] = {}
    for i, sample in enumerate(listed):
        where = f"[calibrate] samples[{i}]"
        if isinstance(sample, Tensor):
            if sample.dtype != torch.int64:
                raise TypeError(f"{where}: token ids of {sample.dtype}; want torch.int64.")
            if sample.ndim != 2 or sample.shape[0] != 1 or sample.shape[1] < 1:
                raise ValueError(f"{where} of shape {tuple(sample.shape)}: want (1, n_tokens).")
        elif isinstance(sample, str):
            if not sample:
                raise ValueError(f"{where}: an empty string; want text.")
        elif not isinstance(sample, Document):
            raise TypeError(
                f"{where} of type {type(sample).__name__}: want a string, a Document or token ids."
            )
        group = sample.group if isinstance(sample, Document) else PLAIN
        if group == POOLED:
            raise ValueError(f"{where}: task {group!r} is taken; want another name.")
        if not NAME.fullmatch(group):
            raise ValueError(f"{where}: task {group[:80]!r}; want letters, digits and any of _.-")
        groups.setdefault(group, []).append(sample)
    return dict(sorted(groups.items()))


def _draw(
    groups: dict[str, list[Sample]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
    seed: int,
) -> list[list[Encoded]]:
    """Samples of each task in random order until its share of the tokens is full.

    A sample that does not fit into what is left of the share is passed over.
    """
    share = max_tokens // len(groups)
    length = models.context_length(model) or _DOCUMENT_TOKENS_MAX
    drawn = []
    for name, samples in groups.items():
        order = random.Random(f"{seed} {name}").sample(range(len(samples)), len(samples))
        taken: list[Encoded] = []
        left = share
        for i in order:
            if left <= models.N_DENSE:
                break
            encoded = _encode(samples[i], tokenizer, model, min(length, left))
            if encoded is not None:
                taken.append(encoded)
                left -= encoded.ids.shape[1]
        drawn.append(taken)
    return drawn


def _encode(
    sample: Sample, tokenizer: PreTrainedTokenizerBase | None, model: nn.Module, length: int
) -> Encoded | None:
    """The sample in at most `length` tokens; nothing if its prompt does not fit."""
    most = min(length, _DOCUMENT_TOKENS_MAX)
    if isinstance(sample, Tensor):
        n_words = getattr(getattr(model, "config", None), "vocab_size", None)
        low, high = int(sample.min()), int(sample.max())
        if low < 0 or (n_words is not None and high >= n_words):
            raise ValueError(
                f"[calibrate] token ids from {low} to {high}: want 0 to {n_words} exclusive."
            )
        ids = sample[:, :most].cpu()
        return Encoded(ids, min(models.N_DENSE, ids.shape[1]))
    if tokenizer is None:
        raise ValueError("[calibrate] text samples and no tokenizer: want one, or token ids.")
    document = Document(PLAIN, "", sample) if isinstance(sample, str) else sample
    if not document.prompt:
        return models.encode(tokenizer, document, max_tokens=most)
    encoded = models.encode(tokenizer, document, max_tokens=sys.maxsize)
    if encoded.n_prompt >= length:
        return None
    return Encoded(encoded.ids[:, :length], encoded.n_prompt)


def _batches(drawn: list[list[Encoded]]) -> list[_Batch]:
    """Samples of similar length together, so that little is padded."""
    batches = []
    for task, taken in enumerate(drawn):
        rest = sorted(taken, key=lambda e: e.ids.shape[1], reverse=True)
        while rest:
            n_tokens = rest[0].ids.shape[1]
            n = max(1, _BATCH_TOKENS // n_tokens)
            part, rest = rest[:n], rest[n:]
            ids = torch.zeros(len(part), n_tokens, dtype=torch.int64)
            sparse = torch.zeros_like(ids, dtype=torch.bool)
            for row, encoded in enumerate(part):
                ids[row, : encoded.ids.shape[1]] = encoded.ids[0]
                sparse[row, encoded.n_prompt : encoded.ids.shape[1]] = True
            batches.append(_Batch(task, ids, sparse))
    return batches


def _positions(names: Iterable[str], batches: list[_Batch], *, least: int) -> dict[str, int]:
    """Sparse positions of each task, after refusing a task with too few."""
    counts = {}
    for task, name in enumerate(names):
        counts[name] = sum(int(b.sparse.sum()) for b in batches if b.task == task)
        if counts[name] < least:
            raise ValueError(
                f"[calibrate] task {name!r} has {counts[name]} positions that would run sparse: "
                f"want at least {least}; a plain text counts from token "
                f"{models.N_DENSE + 1} on. Give more or shorter samples, or raise max_tokens."
            )
    return counts


def _n_tokens(batches: list[_Batch]) -> int:
    return sum(b.ids.numel() for b in batches)


def _key(model_hash: str, names: Iterable[str], batches: list[_Batch], settings: object) -> str:
    """SHA-256 over everything that the counts depend on."""
    head = [FORMAT, model_hash, *names, repr(settings), torch.__version__]
    digest = hashlib.sha256(json.dumps(head).encode())
    for batch in batches:
        digest.update(json.dumps([batch.task, *batch.ids.shape]).encode())
        digest.update(batch.ids.numpy().tobytes())
        digest.update(batch.sparse.numpy().tobytes())
    return digest.hexdigest()


def _bytes_max(
    empty: _State, ffns: list[Ffn], bits: tuple[Code, ...], sums: list[list[int]]
) -> int:
    """Most bytes that a state grows to: counts, what is fitted, second moments of one round."""
    counts = empty.square.nbytes + empty.order.nbytes + empty.histogram.nbytes
    shapes = [ffn.shape for ffn in ffns]
    fitted = sum(planes.n_bytes(s.n_neurons, s.d, b) for s in shapes for b in bits)
    return counts + fitted + max((sum(8 * shapes[i].d ** 2 for i in of) for of in sums), default=0)


def _start(
    resume: pathlib.Path | None,
    key: str,
    empty: _State,
    ffns: list[Ffn],
    bits: tuple[Code, ...],
) -> _State:
    """The state in the resume file, or an empty one if there is no file yet."""
    if resume is None or not resume.exists():
        return empty
    tensors, fields = unpack(read_bounded(resume))
    if fields.get("format") != FORMAT:
        raise PlanError(f"[calibrate] {resume.name}: want a file of calibrate's option resume.")
    if fields.get("key") != key:
        raise PlanError(
            f"[calibrate] {resume.name}: was begun with another model, samples or options; "
            "want the same, or another file."
        )
    return _State(
        fitted=[layer_of(i, tensors, bits) for i in range(int(fields["n_fitted"]))],
        n_summed=int(fields["n_summed"]),
        n_ordered=int(fields["n_ordered"]),
        n_counted=int(fields["n_counted"]),
        square=tensors["square"],
        moment={
            layer: tensors[f"layers.{layer}.moment"].to(ffn.gate.weight.device)
            for layer, ffn in enumerate(ffns)
            if f"layers.{layer}.moment" in tensors
        },
        order=tensors["order"],
        histogram=tensors["histogram"],
    )


def _keep(resume: pathlib.Path, key: str, state: _State) -> None:
    """Write the state, whole or not at all."""
    tensors = {"square": state.square, "order": state.order, "histogram": state.histogram}
    tensors |= {f"layers.{i}.moment": moment.cpu() for i, moment in state.moment.items()}
    for i, layer in enumerate(state.fitted):
        tensors |= layer_tensors(i, layer)
    counts = {
        "n_fitted": len(state.fitted),
        "n_summed": state.n_summed,
        "n_ordered": state.n_ordered,
        "n_counted": state.n_counted,
    }
    fields = {name: str(count) for name, count in counts.items()}
    write_atomic(resume, laid_out(tensors, {"format": FORMAT, "key": key, **fields}))
