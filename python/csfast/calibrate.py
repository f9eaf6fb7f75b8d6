"""Calibration: from a model and sample texts to a plan.

Two passes over samples, each batch by batch. The first finds the mean square of every channel of
every layer's input, hence the equaliser and the codes. The second senses the inputs with those very
codes and counts the estimated usages in a histogram per layer, task and number of bits; thresholds
are quantiles of it. Both look only at positions that would run sparse.
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
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import models, planes, reference
from .models import Encoded, Ffn
from .plan import LayerPlan, Plan, pack, read_bounded, unpack, write_atomic
from .types import POOLED, Document, LayerShape, PlanError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DENSITIES = tuple(i / 100 for i in range(1, 101))
TOKENS_MAX = 32_768  # run through the model in the second pass: 12 s of the demo model on one core
FORMAT = "csfast-calibration-1"  # of a resume file
PLAIN = "text"  # the task of samples that name none
_SCALE_SHARE = 4  # the first pass, a mean over channels, takes one token in so many
_DOCUMENT_TOKENS_MAX = 1024  # of one sample: twenty samples a pass at the least
_POSITIONS_MIN = 16  # of a task: below that, a quantile of 1 % of the neurons is a guess
_BATCH_TOKENS = 2048
_SQUARE_ROWS = 512  # tokens squared at a time in float64
# Of one matrix product, so that Ctrl-C waits for 0.1 s at most on two cores of 50 GFLOP/s each.
_STEP_OPERATIONS = 10**10

# A usage is counted by the upper bits of its float32: the exponent and six bits of the mantissa,
# 64 bins an octave. Bins above that of infinity hold what is not a number.
_SHIFT = 17
_BINS = 255 << (23 - _SHIFT)

Progress = Callable[[int, int], None]
Sample = Document | str | Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences of one task that run through the model together."""

    task: int
    ids: Tensor  # (batch, n_tokens), padded at the end
    sparse: Tensor  # (batch, n_tokens), bool: the positions that would run sparse


@dataclasses.dataclass
class _State:
    """What has been counted so far; the whole of a resume file."""

    done: int  # batches, of both passes together
    square: Tensor  # (n_layers, n_tasks, d_max), float64: sums of squares
    histogram: Tensor  # (n_bits, n_layers, n_tasks, _BINS), int64


def calibrate(
    model: nn.Module,
    samples: Sample | Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    bits: Sequence[int] = (2, 3),
    densities: Sequence[float] = DENSITIES,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    max_tokens: int = TOKENS_MAX,
) -> Plan:
    """Calibrate few-bit sensing for a model.

    Every task gets the same share of ``max_tokens`` and the same weight in the pooled thresholds.
    The model is left as it was. Equal arguments on one machine give equal plans, byte for byte.

    Args:
        model: A causal language model as `models.find_ffns` wants it, without csfast applied.
        samples: Documents, strings (plain texts of the task ``"text"``) or token ids ``(1, T)``,
            int64 (likewise); or one of these.
        tokenizer: Of the model; needed unless all samples are token ids.
        bits: Settings of the sensor to fit.
        densities: Fractions to find thresholds for, rising; 1 is added if it is missing.
        resume: File that keeps what has been counted after every batch. If it exists, counting goes
            on from there. It is not removed at the end.
        progress: Called after every batch with tokens done and tokens in all.
        seed: Of the draw of samples.
        max_tokens: Most tokens of the second pass; the first takes a quarter as many.

    Returns:
        The plan.

    Raises:
        ValueError: A sample is empty or malformed, there are too few, an activation is not finite,
            or an option is out of range.
        TypeError: A sample is of another type, or token ids are not int64.
        UnsupportedModelError: csfast does not run on the model.
        PlanError: The resume file is damaged or belongs to other arguments.
        KeyboardInterrupt: At once on Ctrl-C; the resume file holds all whole batches.
    """
    settings = _bits(bits)
    grid = _grid(densities)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"[calibrate] seed = {seed!r}: want a whole number from 0 to 2^63 - 1.")
    groups = _sorted_samples(samples)
    fingerprint = models.fingerprint(model)
    ffns = models.find_ffns(model)
    if fingerprint.activation != "silu" or any(ffn.offset() is not None for ffn in ffns):
        raise UnsupportedModelError(
            "[calibrate] a model with biases or without SiLU: the kernels do not run it."
        )
    if any(hasattr(type(ffn.module), "dense_forward") for ffn in ffns):
        raise ValueError("[calibrate] a model that csfast is applied to: call csfast.remove first.")

    few = _draw(groups, model, tokenizer, max_tokens // _SCALE_SHARE, seed)
    chosen = _draw(groups, model, tokenizer, max_tokens, seed)
    n_scale = len(_batches(few))
    batches = [*_batches(few), *_batches(chosen)]
    counts = list(_positions(groups, batches[:n_scale], least=1).values())
    n_tokens = _positions(groups, batches[n_scale:], least=_POSITIONS_MIN)

    key = _key(fingerprint.model_hash, groups, batches, (settings, seed, max_tokens))
    keep = None if resume is None else pathlib.Path(resume)
    d_max = max(f.shape.d for f in ffns)
    empty = _State(
        done=0,
        square=torch.zeros(len(ffns), len(groups), d_max, dtype=torch.float64),
        histogram=torch.zeros(len(settings), len(ffns), len(groups), _BINS, dtype=torch.int64),
    )
    state = _start(keep, key, empty)
    sizes = [b.ids.numel() for b in batches]
    sensors: list[_Sensor] = []
    with torch.no_grad():
        for i in range(state.done, len(batches)):
            if i < n_scale:
                watch = _add_squares(state, batches[i])
            else:
                sensors = sensors or _sensors(ffns, state, counts, settings)
                watch = _add_usages(state, batches[i], sensors, settings)
            with _watching(ffns, batches[i], watch):
                models.hidden_states(model, batches[i].ids.to(ffns[0].gate.weight.device))
            state.done = i + 1
            if keep is not None:
                _keep(keep, key, state)
            if progress is not None:
                progress(sum(sizes[: i + 1]), sum(sizes))
        sensors = sensors or _sensors(ffns, state, counts, settings)

    return Plan(
        model=fingerprint,
        bits=settings,
        tasks=(POOLED, *groups),
        densities=grid,
        layers=tuple(sensor.plan for sensor in sensors),
        thresholds={b: _thresholds(state.histogram[j], grid) for j, b in enumerate(settings)},
        n_tokens=n_tokens,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Sensor:
    """What sensing one layer takes."""

    plan: LayerPlan
    codes: tuple[Tensor, ...]  # one a setting, (n_neurons, 2, chunks, 16 * bits)
    ffn: Ffn
    offset: Tensor | None  # (n_neurons, 2), from the biases


Watch = Callable[[int, Tensor], None]  # number of the layer, its input at the sparse positions


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


def _add_squares(state: _State, batch: _Batch) -> Watch:
    def watch(layer: int, x: Tensor) -> None:
        total = state.square[layer, batch.task]
        for part in torch.split(x, _SQUARE_ROWS):
            total[: x.shape[1]] += part.double().square().sum(dim=0).cpu()

    return watch


def _sensors(
    ffns: list[Ffn], state: _State, counts: list[int], bits: tuple[int, ...]
) -> list[_Sensor]:
    """Fit every layer to the mean squares, each task weighted equally."""
    sensors = []
    for layer, ffn in enumerate(ffns):
        square = state.square[layer, :, : ffn.shape.d]
        mean = (square / torch.tensor(counts, dtype=torch.float64)[:, None]).mean(dim=0)
        plan = LayerPlan.fit(*ffn.weights, planes.equalizer(mean), bits)
        codes = tuple(plan.encode(*ffn.weights, bits=b) for b in bits)
        sensors.append(_Sensor(plan, codes, ffn, ffn.offset()))
    return sensors


def _add_usages(
    state: _State, batch: _Batch, sensors: list[_Sensor], bits: tuple[int, ...]
) -> Watch:
    def watch(layer: int, x: Tensor) -> None:
        sensor = sensors[layer]
        equal = sensor.plan.equal.to(x.device)
        ffn, offset = sensor.ffn, sensor.offset
        rows = _rows(ffn.shape)
        for j, b in enumerate(bits):
            row_scale = sensor.plan.row_scale[b].to(x.device)
            u = planes.unpack(sensor.codes[j].flatten(0, 1), b, ffn.shape.d)
            # Integers below 2^24 in float32: exact, as the kernels are.
            value = 2.0 * u.float() - (2**b - 1)
            gate, up = value[0::2].T.contiguous(), value[1::2].T.contiguous()
            for part in torch.split(x, rows):
                q, scale = reference.quantize(part, equal)
                g = (q.float() @ gate).mul_(row_scale[:, 0]).mul_(scale[:, None])
                usage = (q.float() @ up).mul_(row_scale[:, 1]).mul_(scale[:, None])
                if offset is not None:
                    g.add_(offset[:, 0])
                    usage.add_(offset[:, 1])
                usage = usage.mul_(ffn.act(g)).abs_()
                bins = (usage.view(torch.int32) >> _SHIFT).clamp_(max=_BINS - 1).flatten()
                count = torch.bincount(bins, minlength=_BINS).cpu()
                state.histogram[j, layer, batch.task] += count

    return watch


def _rows(shape: LayerShape) -> int:
    """Tokens to sense at a time."""
    return max(1, min(_BATCH_TOKENS, _STEP_OPERATIONS // (4 * shape.d * shape.n_neurons)))


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


def _bits(bits: Sequence[int]) -> tuple[int, ...]:
    if not bits or len(set(bits)) != len(bits) or any(b not in planes.BITS for b in bits):
        raise ValueError(f"[calibrate] bits = {tuple(bits)}: want some of 1, 2, 3, 4, each once.")
    return tuple(sorted(bits))


def _grid(densities: Sequence[float]) -> tuple[float, ...]:
    grid = tuple(float(rho) for rho in densities)
    grid += () if grid[-1:] == (1.0,) else (1.0,)
    rising = all(a < b for a, b in itertools.pairwise(grid))
    if not rising or not 0 < grid[0] <= 1 or not densities:
        raise ValueError(f"[calibrate] densities = {densities}: want rising fractions in (0, 1].")
    return grid


def _sorted_samples(samples: Sample | Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples by task, each checked as far as that goes without a tokenizer."""
    listed = [samples] if isinstance(samples, (str, Document, Tensor)) else list(samples)
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


def _key(model_hash: str, names: Iterable[str], batches: list[_Batch], settings: object) -> str:
    """SHA-256 over everything that the counts depend on."""
    head = [FORMAT, model_hash, *names, repr(settings), torch.__version__]
    digest = hashlib.sha256(json.dumps(head).encode())
    for batch in batches:
        digest.update(json.dumps([batch.task, *batch.ids.shape]).encode())
        digest.update(batch.ids.numpy().tobytes())
        digest.update(batch.sparse.numpy().tobytes())
    return digest.hexdigest()


def _start(resume: pathlib.Path | None, key: str, empty: _State) -> _State:
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
    return _State(int(fields["done"]), tensors["square"], tensors["histogram"])


def _keep(resume: pathlib.Path, key: str, state: _State) -> None:
    """Write the state, whole or not at all."""
    tensors = {"square": state.square, "histogram": state.histogram}
    write_atomic(resume, pack(tensors, {"format": FORMAT, "key": key, "done": str(state.done)}))
