"""Which few-bit code of a whole model loses least? A race on a pretrained model, in one table.

    python bench/studies/codes.py MODEL DATA --device cuda --json codes-smollm2.json
    python bench/studies/codes.py MODEL DATA --list

Every row replaces weights of the model and reads the dense model's own greedy continuations of
prompts from one half of DATA; codes are fitted to texts of the other. A row is written as soon as
it is there, and rows that are there are not run again. Everything is float32.

Bits are of all linear maps but the head, with steps, permutations, column scales and the 16 bits of
every norm; those of the head stand apart. The rotated GPTQ rows are the opponent: random orthogonal
inputs, groups of 64 with a searched step of 16 bits, damped by .01. Rotations that follow from a
seed cost nothing. Rules that follow the token count what they read as if rows and columns could be
read one by one, and the estimate of the rule by layer is the error itself: both favour them. The
points of the E8 lattice within a ball are counted, and the ball is the largest that its bits name;
above 2 bits no table of them fits a machine. Continuations are held on the device: of 175 prompts
3.3 GB for 49,152 words, 17.6 GB for 262,144; on a CPU in half of that, as float16.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csfast import documents, judge, models, ops, sketches
from csfast.bench import head as record_head
from csfast.calibration import sketching
from csfast.calibration.passes import undisturbed
from csfast.calibration.samples import draw, sorted_samples
from csfast.codes import feedback, rotation, trellis
from csfast.files import write_atomic
from csfast.judge import agreement
from csfast.models import Stacked

GROUP = 64  # columns with one step, and columns whose errors are spread at once
SEARCH = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest weight: steps that GPTQ tries
SPREADS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of the root mean square: steps of fitted levels
HEADS = ((4, 4), (4, 2), (3, 3))  # levels of trellis codes of the head
JOBS = 8  # searches of paths side by side on a GPU, as many as it has queues by default
LOGIT_BYTES = 2 << 30  # of the prompts that are read at a time
RULE_TOKENS = 2048  # of calibration text that the threshold of a rule by layer is found on
DEMANDED = 0.85  # of the best uniform code's divergence, for a rule that follows the token
WIDTHS = ((2.6, "read"), (3.3, "read"), (4.3, "read"), (6.6, "stored"))

Bits = dict[str, float]  # by name of matrix, of all its weights together


@dataclasses.dataclass
class Made:
    """What a row replaces.

    Attributes:
        weights: By name of matrix, as the model has it, ``(rows, cols)``.
        stored: Bits of each of these.
        read: Bits of each that a token reads.
        patch: Replaces what modules of the copy compute, while it is entered.
        spent: Gives what was read, if only running it says so.
    """

    weights: dict[str, Tensor]
    stored: Bits
    read: Bits
    patch: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    spent: Callable[[], Bits] | None = None

    def beside(self, other: Made) -> Made:
        """Give both, which replace different matrices."""
        assert self.patch is None or other.patch is None
        return Made(
            {**self.weights, **other.weights},
            {**self.stored, **other.stored},
            {**self.read, **other.read},
            self.patch or other.patch,
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: Of the code.
        kind: What it is compared with.
        make: Codes the model.
        seconds: A guess of what it takes on an H200, for SmolLM2-135M.
    """

    name: str
    kind: str
    make: Callable[[Study], Made]
    seconds: float


# Rotations


class Turn(Protocol):
    """A rotation of the inputs of a matrix, in their dtype."""

    def inputs(self, x: Tensor) -> Tensor:
        """Rotate ``(..., cols)``."""

    def undo(self, rotated: Tensor) -> Tensor:
        """Give back what was rotated."""


class Unturned:
    """No rotation."""

    def inputs(self, x: Tensor) -> Tensor:
        """Give the inputs as they are."""
        return x

    undo = inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A rotation by a matrix ``(cols, cols)``, float64."""

    by: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        """Rotate ``(..., cols)``."""
        return (x.double() @ self.by).to(x.dtype)

    def undo(self, rotated: Tensor) -> Tensor:
        """Give back what was rotated."""
        return (rotated.double() @ self.by.T).to(rotated.dtype)


@functools.cache
def orthogonal(cols: int) -> Tensor:
    """A random orthogonal matrix, ``(cols, cols)``, float64, on the CPU."""
    draws = torch.Generator().manual_seed(cols)
    normal = torch.randn(cols, cols, generator=draws, dtype=torch.float64)
    found: Tensor = torch.linalg.qr(normal)[0]
    return found


def turn_of(name: str, moment: Tensor, seed: int) -> tuple[Turn, int]:
    """Give a rotation by its name, and the bits that it takes."""
    cols, device = len(moment), moment.device
    if name == "none":
        return Unturned(), 0
    if name == "full":
        return Whole(orthogonal(cols).to(device)), 0
    energy = moment.diagonal() if name == "dealt" else torch.ones(cols)
    turn = rotation.fit(energy, seed=seed)
    n_bits = 8 * sketches.turned(turn).nbytes
    if name == "block":  # signs follow from the seed
        turn = rotation.Rotation(torch.arange(cols, dtype=torch.int32), turn.sign)
        n_bits = 0
    elif name != "dealt":
        raise ValueError(f"[codes] rotation {name!r}: want none, full, block or dealt.")
    return rotation.Rotation(turn.perm.to(device), turn.sign.to(device)), n_bits


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Matrices of one size, rotated, with how errors spread; one of each layer.

    Attributes:
        stacks: The matrices.
        turns: Rotations of their inputs.
        left: ``(layers, rows, cols)``, float32.
        moment: Of their inputs, ``(layers, cols, cols)``, float32.
        factor: ``(layers, cols, cols)``, float32, from `feedback.spread`.
        gains: What is folded in.
        own: Bits of the rotation of each.
    """

    stacks: list[Stacked]
    turns: list[Turn]
    left: Tensor
    moment: Tensor
    factor: Tensor
    gains: list[Tensor | None]
    own: list[int]

    @property
    def size(self) -> int:
        """Weights of a matrix."""
        return self.left[0].numel()

    def back(self, value: Tensor) -> dict[str, Tensor]:
        """Give matrices as the model has them, from ``(layers, rows, cols)``, by name."""
        return {
            stack.name: unfolded(turn.undo(v), gain)
            for stack, turn, gain, v in zip(self.stacks, self.turns, self.gains, value, strict=True)
        }

    def made(self, value: Tensor, n_bits: float) -> Made:
        """Give what replaces the matrices, at so many bits of each beside its rotation."""
        bits = {s.name: n_bits + own for s, own in zip(self.stacks, self.own, strict=True)}
        return Made(self.back(value), bits, dict(bits))


def unfolded(whole: Tensor, gain: Tensor | None) -> Tensor:
    """Take the gain of the norm out of a matrix; nothing reads a column where it is 0."""
    return whole if gain is None else torch.where(gain == 0, 0.0, whole / gain)


def together(parts: Sequence[Made]) -> Made:
    """Give all parts as one."""
    return functools.reduce(Made.beside, parts)


# Codes of one number at a time, for all layers at once


class Code(Protocol):
    """Rounds columns that feedback has moved."""

    def begin(self, part: Tensor) -> None:
        """Look at the columns of a block, ``(columns, layers, rows)``, before any is rounded."""

    def nearest(self, column: Tensor) -> Tensor:
        """Give the value of a column ``(layers, rows)``."""


class Uniform:
    """Symmetric steps, one a row and group, searched for the least squared error."""

    def __init__(self, bits: int) -> None:
        self.most = (2**bits - 1) / 2
        self.step = torch.empty(0)

    def begin(self, part: Tensor) -> None:
        """Search the steps."""
        largest = part.abs().amax(0).clamp_min(1e-9)
        least = torch.full_like(largest, torch.inf)
        self.step = largest
        for share in SEARCH:
            step = largest * share / self.most
            error = (part - self._rounded(part, step)).square().sum(0)
            better = error < least
            least = torch.where(better, error, least)
            self.step = torch.where(better, step, self.step)

    def _rounded(self, x: Tensor, step: Tensor) -> Tensor:
        return ((x / step + self.most).round().clamp(0, 2 * self.most) - self.most) * step

    def nearest(self, column: Tensor) -> Tensor:
        """Round."""
        return self._rounded(column, self.step)


class Fitted:
    """Levels fitted to normal draws; a step a row ``(layers, rows)``, or searched for groups."""

    def __init__(self, bits: int, step: Tensor | None, device: torch.device) -> None:
        self.levels = normal_levels(bits).to(device)
        self.between = (self.levels[1:] + self.levels[:-1]) / 2
        self.is_grouped = step is None
        self.step = torch.empty(0) if step is None else step

    def begin(self, part: Tensor) -> None:
        """Search the steps, if they are not given."""
        if not self.is_grouped:
            return
        own = part.square().mean(0).sqrt()
        least = torch.full_like(own, torch.inf)
        self.step = own
        for spread in SPREADS:
            step = (own * spread).bfloat16().float()
            error = (part - self._rounded(part, step)).square().sum(0)
            better = error < least
            least = torch.where(better, error, least)
            self.step = torch.where(better, step, self.step)

    def _rounded(self, x: Tensor, step: Tensor) -> Tensor:
        inverse = torch.where(step > 0, 1 / step, 0.0)
        return self.levels[torch.bucketize(x * inverse, self.between)] * step

    def nearest(self, column: Tensor) -> Tensor:
        """Round."""
        return self._rounded(column, self.step)


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Levels of least squared error for normal draws, ``(2^bits,)``, float32, on the CPU.

    Source:
        Max, "Quantizing for minimum distortion", IRE Trans. Information Theory, 1960.
    """
    x = torch.linspace(-7, 7, 140_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    # Many levels want a density like the cube root of that of the draws: three times the variance.
    places = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = math.sqrt(6) * torch.erfinv(2 * places - 1)
    for _ in range(300):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, density)
        sums = torch.zeros_like(levels).index_add_(0, nearest, density * x)
        levels = torch.where(mass > 0, sums / mass.clamp_min(1e-300), levels)
    return levels.float()


class Lattice:
    """Points of E8 within a ball: eight rows of a column are one of them, in steps of their rows.

    Source:
        Conway and Sloane, "Fast quantizing and decoding algorithms for lattice quantizers and
        codes", IEEE Trans. Information Theory, 1982; Tseng et al., "QuIP#", 2024.
    """

    def __init__(self, bits: int, step: Tensor) -> None:
        self.norm = ball(bits)
        self.fine = lattice_scale(bits)
        self.step = step

    def begin(self, part: Tensor) -> None:
        """Nothing depends on the block."""

    def nearest(self, column: Tensor) -> Tensor:
        """Round eight rows at a time."""
        rows = column.shape[-1]
        inverse = torch.where(self.step > 0, 1 / self.step, 0.0)
        x = F.pad(column * inverse * self.fine, (0, -rows % 8)).unflatten(-1, (-1, 8))
        point = in_ball(x, self.norm).flatten(-2)[..., :rows]
        return point * (self.step / self.fine)


@functools.cache
def ball(bits: int) -> int:
    """The largest squared norm whose points of E8 are at most ``2^(8 bits)``."""
    count, norm = 1, 0
    while True:
        m = norm // 2 + 1
        count += 240 * sum(d**3 for d in range(1, m + 1) if m % d == 0)
        if count > 2 ** (8 * bits):
            return norm
        norm += 2


@functools.cache
def lattice_scale(bits: int) -> float:
    """What normal draws are multiplied with, so that the ball loses least of them."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    scales = [0.5 * 1.05**i for i in range(60)]
    errors = [float((in_ball(x * c, ball(bits)) / c - x).square().mean()) for c in scales]
    return scales[errors.index(min(errors))]


def in_ball(x: Tensor, norm: int) -> Tensor:
    """Points of E8 near to ``x (..., 8)`` of at most that squared norm; on its rim not the nearest.

    What would fall outside is drawn in by several factors, the least of which always suffices, as
    no place is further than 1 from a point.
    """
    radius = math.sqrt(norm)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-9)
    shares = torch.linspace(1, (radius - 1) / radius, 8, device=x.device)
    shrunk = (radius * shares.view(-1, *[1] * x.dim()) / length).clamp_max(1)
    tried = torch.cat([x[None], x * shrunk])
    point = nearest_e8(tried)
    error = (point - x).square().sum(-1)
    outside = point.square().sum(-1) > norm + 1e-3
    best = error.masked_fill(outside, torch.inf).argmin(0)
    return point.gather(0, best[None, ..., None].expand(1, *x.shape))[0]


def nearest_e8(x: Tensor) -> Tensor:
    """The point of E8 that is nearest to each ``x (..., 8)``."""

    def even(x: Tensor) -> Tensor:
        """Whole numbers of an even sum: the one that was nearest to going the other way goes."""
        near = x.round()
        off = x - near
        worst = off.abs().argmax(-1, keepdim=True)
        other = torch.where(off.gather(-1, worst) >= 0, 1.0, -1.0)
        is_odd = near.sum(-1, keepdim=True) % 2 != 0
        return near.scatter_add(-1, worst, torch.where(is_odd, other, 0.0))

    whole, half = even(x), even(x - 0.5) + 0.5
    closer = (half - x).square().sum(-1, keepdim=True) < (whole - x).square().sum(-1, keepdim=True)
    return torch.where(closer, half, whole)


def rounded(left: Tensor, factor: Tensor | None, code: Code) -> Tensor:
    """Round matrices of all layers column by column, as `feedback.round_columns` does one.

    Args:
        left: ``(layers, rows, cols)``, float32.
        factor: ``(layers, cols, cols)``; None rounds every column by itself.
        code: What a column may be.
    """
    rest, found = left.clone(), torch.empty_like(left)
    cols = left.shape[2]
    for start in range(0, cols, GROUP):
        stop = min(start + GROUP, cols)
        part = rest[:, :, start:stop].permute(2, 0, 1).contiguous()
        code.begin(part)
        value, error = torch.empty_like(part), torch.empty_like(part)
        for i, c in enumerate(range(start, stop)):
            value[i] = code.nearest(part[i])
            if factor is None:
                continue
            spread = factor[:, c, c:stop]
            error[i] = (part[i] - value[i]) / spread[:, :1]
            part[i + 1 :] -= error[i] * spread[:, 1:].T[:, :, None]
        found[:, :, start:stop] = value.permute(1, 2, 0)
        if factor is not None and stop < cols:
            moved = error.permute(1, 2, 0).contiguous()
            rest[:, :, stop:].baddbmm_(moved, factor[:, start:stop, stop:], alpha=-1)
    return found


def fitted(left: Tensor, value: Tensor, moment: Tensor | None, step: Tensor) -> Tensor:
    """Steps of rows in closed form: of least error on the outputs, or without a moment on weights.

    Args:
        left: ``(..., rows, cols)``.
        value: In steps, likewise.
        moment: Of the inputs, ``(..., cols, cols)``.
        step: What stays where there is no better one, ``(..., rows)``.
    """
    seen = value if moment is None else value @ moment
    best = (left * seen).sum(-1) / (value * seen).sum(-1)
    is_sound = torch.isfinite(best) & (best > 0) & (step > 0)
    return torch.where(is_sound, best, step).bfloat16().float()


def by_rows(of: Prepared, left: Tensor, code: Callable[[Tensor], Code]) -> Tensor:
    """Code with one step a row, fitted after each of as many passes as the package makes."""
    step = left.square().mean(-1).sqrt().bfloat16().float()
    for _ in range(sketching.PASSES):
        value = rounded(left, of.factor, code(step))
        value = value * torch.where(step > 0, 1 / step, 0.0)[..., None]
        step = fitted(left, value, of.moment, step)
    return value * step[..., None]


def searched(
    left: Tensor,
    moment: Tensor,
    factor: Tensor,
    bits: int,
    *,
    nu: int = trellis.NU,
    passes: int | None = None,
    by_outputs: bool = True,
) -> Tensor:
    """Code a matrix by trellises as `sketching` does, or with something else than it does.

    Args:
        left: ``(rows, cols)``.
        moment: ``(cols, cols)``.
        factor: ``(cols, cols)``.
        bits: Of a weight.
        nu: Memory of the code.
        passes: With the steps that the last one's codes want; `sketching.PASSES` if left out.
        by_outputs: Whether steps are fitted to outputs, or to weights.

    Returns:
        What the codes stand for, ``(rows, cols)``, float32.
    """
    step = (left.square().mean(1).sqrt() * trellis.UNIT[bits]).bfloat16().float()
    for _ in range(sketching.PASSES if passes is None else passes):
        _, small = ops.encode(left, factor, step, bits=bits, nu=nu)
        value = small.float()
        step = fitted(left, value, moment if by_outputs else None, step)
    return step[:, None] * value


def side_by_side(jobs: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
    """Run searches of paths, several at a time, each on a stream of its own."""

    def run(job: Callable[[], Any]) -> Any:
        with undisturbed(), sketching._stream_of_its_own(device):
            return job()

    if device.type == "cuda":  # torch loads its linear algebra at the first call
        torch.linalg.cholesky(torch.eye(1, device=device))
        torch.cuda.synchronize(device)
    n_threads = JOBS if device.type == "cuda" else torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        try:
            return list(pool.map(run, jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# The model, what is known of it, and the judge


class Study:
    """A model with its moments and continuations, and a copy whose weights are replaced."""

    def __init__(self, args: argparse.Namespace) -> None:
        data = args.data / "valid.jsonl.xz" if args.data.is_dir() else args.data
        found = documents.read(data)
        self.seed: int = args.seed
        self.device = torch.device(args.device)
        self.model, tokenizer = models.load(args.model, dtype="float32", device=self.device)
        self.stacks = models.find_linears(self.model)
        self.by_name = {stack.name: stack for stack in self.stacks}
        select = documents.split(found, "select")
        drawn = draw(sorted_samples(select), self.model, tokenizer, args.tokens, args.seed)
        self.texts = [encoded.ids for taken in drawn for encoded in taken]
        say(f"{len(self.texts)} texts of {sum(t.shape[1] for t in self.texts)} tokens: moments")
        self.moments = sketching._moments(self.model, self.stacks, self.texts, lambda: None)
        self.prompts = agreement.choose_prompts(
            self.model,
            tokenizer,
            documents.split(found, "report"),
            per_task=args.prompts,
            new_tokens=args.new_tokens,
            seed=args.seed,
        )
        say(f"{len(self.prompts)} prompts continued by {args.new_tokens} tokens")
        embedding = self.model.get_input_embeddings()
        own = {
            name: parameter.clone()
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if self.model.get_submodule(name.rpartition(".")[0]) is not embedding
        }
        self.twin = agreement.coded(self.model, own)
        self.twins = {stack.name: stack for stack in models.find_linears(self.twin)}
        self.new_tokens: int = args.new_tokens
        keep = torch.float32 if self.device.type == "cuda" else torch.float16
        self.dense: list[tuple[Tensor, Tensor]] = [None] * len(self.prompts)  # type: ignore[list-item]
        for place, logits in self.read(self.model):
            self.dense[place] = (logits.to(keep), logits.argmax(-1))
        self.kept: dict[Any, Any] = {}  # what the last rows prepared
        self.matrices: dict[tuple[str, tuple[int, ...]], sketches.Matrix] = {}

    # Judging

    @torch.no_grad()
    def read(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Give the number of every prompt and logits along its continuation, float32."""
        n = self.new_tokens
        words = self.stacks[-1].rows
        n_rows = max(1, min(agreement.ROWS, LOGIT_BYTES // (4 * n * words)))
        texts = [torch.cat([prompt.ids, prompt.own])[:-1] for prompt in self.prompts]
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        for start in range(0, len(order), n_rows):
            members = order[start : start + n_rows]
            width = max(len(texts[i]) for i in members)
            ids = torch.zeros(len(members), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):  # at the left, so that all end together
                ids[row, width - len(texts[i]) :], mask[row, width - len(texts[i]) :] = texts[i], 1
            logits = model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(self.device),
                use_cache=False,
                logits_to_keep=n,
            ).logits
            for row, i in enumerate(members):
                yield i, logits[row].float()

    def judged(self) -> dict[str, Any]:
        """Compare the copy with the model along its continuations, as `agreement` does."""
        sums: dict[int, Tensor] = {}
        for place, logits in self.read(self.twin):
            dense, best = self.dense[place]
            p, q = dense.float().log_softmax(-1), logits.log_softmax(-1)
            target = self.prompts[place].own.to(self.device)[:, None]
            values = [
                (p.exp() * (p - q)).sum(1),
                best == logits.argmax(1),
                (p - q).gather(1, target)[:, 0],
            ]
            sums[place] = torch.stack([value.double().sum() for value in values])
        records = [[*sums[i].tolist(), self.new_tokens] for i in range(len(self.prompts))]
        pieces = [judge.Piece(p.document, p.ids[None], len(p.ids)) for p in self.prompts]
        found = agreement._summary(pieces, records, resamples=2000, seed=self.seed)
        return {
            **{key: found[key] for key in ("kl", "kl_ci95", "top1")},
            "tasks": {
                task: {key: of[key] for key in ("kl", "top1")}
                for task, of in found["tasks"].items()
            },
        }

    def put(self, name: str, weight: Tensor) -> None:
        """Replace a matrix of the copy."""
        linears = self.twins[name].linears
        parts = torch.split(weight, [linear.weight.shape[0] for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.data.copy_(part)

    def plain(self, name: str) -> Tensor:
        """Give a matrix as the model has it, ``(rows, cols)``."""
        return torch.cat([linear.weight.detach() for linear in self.by_name[name].linears])

    def restore(self) -> None:
        """Undo what `put` did."""
        for stack in self.stacks:
            self.put(stack.name, self.plain(stack.name))

    def run(self, row: Row) -> dict[str, Any]:
        """Code, judge, and count bits."""
        start = time.monotonic()
        with undisturbed():
            made = row.make(self)
            self.restore()
            for name, weight in made.weights.items():
                self.put(name, weight)
            with made.patch() if made.patch is not None else contextlib.nullcontext():
                judged = self.judged()
            if made.spent is not None:
                made.read = made.spent()
            error = None if made.patch else self.relative_error(made.weights)
        return {
            "name": row.name,
            "kind": row.kind,
            "bits": self.bits(made),
            **judged,
            "relative_error": error,
            "seconds": time.monotonic() - start,
        }

    def relative_error(self, weights: Mapping[str, Tensor]) -> float | None:
        """What replaced matrices leave of their outputs' squares, on average over matrices."""
        found = []
        for name, weight in weights.items():
            gain = self.by_name[name].gain()
            whole = self.plain(name)
            error = weight - whole
            if gain is not None:
                error, whole = error * gain, whole * gain
            moment = self.moments[name]
            found.append(((error @ moment) * error).sum() / ((whole @ moment) * whole).sum())
        return float(torch.stack(found).mean()) if found else None

    def bits(self, made: Made) -> dict[str, float]:
        """Bits a weight: stored and read of the layers, with norms; read of each part."""
        size = {stack.name: stack.rows * stack.cols for stack in self.stacks}

        def each(bits: Bits, kinds: Sequence[str]) -> tuple[float, int]:
            names = [stack.name for stack in self.stacks if stack.kind in kinds]
            whole = sum(bits.get(name, 16.0 * size[name]) for name in names)
            return whole, sum(size[name] for name in names)

        norms = 16 * sum(p.numel() for p in self.model.parameters() if p.dim() == 1)
        layers = (*sketches.PARTS["ffn"], *sketches.PARTS["attention"])
        found = {}
        for what, bits in (("stored", made.stored), ("read", made.read)):
            whole, n = each(bits, layers)
            found[what] = (whole + norms) / n
        for part, kinds in sketches.PARTS.items():
            whole, n = each(made.read, kinds)
            found[part] = whole / n
        return found

    # Coding

    def keep(self, key: Any, make: Callable[[], Any], most: int = 4) -> Any:
        """Give what was made before under a key, of the last few."""
        if key not in self.kept:
            of_kind = [other for other in self.kept if other[0] == key[0]]
            for other in of_kind[: len(of_kind) + 1 - most]:
                del self.kept[other]
            self.kept[key] = make()
        return self.kept[key]

    def prepared(
        self, turn: str, *, folded: bool = True, kinds: Sequence[str] | None = None
    ) -> list[Prepared]:
        """Give all matrices of the layers rotated, those of one size together.

        Args:
            turn: Name of the rotation.
            folded: Whether gains of norms are folded in, as in a sketch.
            kinds: Of matrices to give; all of the layers if left out.
        """
        asked = tuple(kinds or ("qkv", "o", "gate_up", "down"))

        def make(kind: str) -> list[Prepared]:
            sizes: dict[tuple[int, int], list[Stacked]] = {}
            for stack in self.stacks:
                if stack.kind == kind:
                    sizes.setdefault((stack.rows, stack.cols), []).append(stack)
            return [self._prepared(of, turn, folded) for of in sizes.values()]

        # Of two rotations at a time: each is as large as the model three times over.
        return [
            part
            for kind in asked
            for part in self.keep(
                ("prepared", turn, folded, kind), functools.partial(make, kind), 8
            )
        ]

    def _prepared(self, stacks: list[Stacked], turn: str, folded: bool) -> Prepared:
        turns, lefts, moments, factors, gains, own = [], [], [], [], [], []
        for stack in stacks:
            gain = stack.gain()
            moment = self.moments[stack.name].double()
            whole = self.plain(stack.name)
            if gain is not None and folded:
                whole = whole * gain
            elif gain is not None:
                moment = moment * gain.double() * gain.double()[:, None]
            found, n_bits = turn_of(turn, moment, self.seed)
            wide = found.inputs(found.inputs(moment).T).T.contiguous()
            turns.append(found)
            own.append(n_bits)
            gains.append(gain if folded else None)
            lefts.append(found.inputs(whole))
            moments.append(wide.float())
            factors.append(feedback.spread(wide))
        return Prepared(
            stacks,
            turns,
            torch.stack(lefts),
            torch.stack(moments),
            torch.stack(factors),
            gains,
            own,
        )

    def trellis(self, of: Prepared, left: Tensor, bits: int, **options: Any) -> Tensor:
        """Code matrices of one size by trellises, ``(layers, rows, cols)``."""
        found = torch.empty_like(left)

        def job(i: int) -> Callable[[], None]:
            def code() -> None:
                part = left[i].contiguous()
                found[i] = searched(part, of.moment[i], of.factor[i], bits, **options)

            return code

        side_by_side([job(i) for i in range(len(left))], self.device)
        return found

    def levels(self, of: Prepared, bits: Sequence[int], **options: Any) -> list[Tensor]:
        """Code by trellises in levels, each of what those before leave."""
        left, found = of.left, []
        for n in bits:
            found.append(self.trellis(of, left, n, **options))
            left = left - found[-1]
        return found

    def code(self, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Code matrices at bits of each level as the package does, if that was not done before."""
        known: dict[str, list[tuple[int, ...]]] = {}
        for name, bits in self.matrices:
            known.setdefault(name, []).append(bits)
        missing = []
        for name, bits in wanted:
            longer = [other for other in known.get(name, []) if other[: len(bits)] == bits]
            if longer and (name, bits) not in self.matrices:
                matrix = self.matrices[name, longer[0]]
                levels = matrix.levels[: len(bits)]
                self.matrices[name, bits] = dataclasses.replace(matrix, levels=levels)
            elif not longer:
                missing.append((name, bits))
        missing.sort(key=lambda pair: -self.by_name[pair[0]].rows * self.by_name[pair[0]].cols)

        def job(name: str, bits: tuple[int, ...]) -> Callable[[], sketches.Matrix]:
            stack, moment = self.by_name[name], self.moments[name]
            levels = sketching.Levels(bits)
            return lambda: sketching.code(stack, moment.clone(), levels, self.seed)

        found = side_by_side([job(*pair) for pair in missing], self.device)
        self.matrices.update(zip(missing, found, strict=True))

    def coded(self, each: Mapping[str, tuple[int, ...]], base: int | None = None) -> Made:
        """Code matrices as the package does.

        Args:
            each: Bits of each level, by name of matrix.
            base: Levels that are read, all if left out.
        """
        self.code(list(each.items()))
        made = Made({}, {}, {})
        for name, bits in each.items():
            matrix = self.matrices[name, bits]
            made.weights[name] = self.decoded(matrix, base)
            own = 8 * sketches.turned(matrix.rotation).nbytes
            sizes = [8 * (level.codes.nbytes + level.step.nbytes) for level in matrix.levels]
            made.stored[name], made.read[name] = own + sum(sizes), own + sum(sizes[:base])
        return made

    def decoded(self, matrix: sketches.Matrix, n_codes: int | None = None) -> Tensor:
        """Give what the first codes of a matrix stand for, as the model has it, on the device."""
        rows, cols = matrix.rows, matrix.cols
        whole = torch.zeros(rows, cols, device=self.device)
        for level in matrix.levels[:n_codes]:
            value = trellis.values(level.codes.to(self.device), rows, cols)
            whole += level.step.to(self.device).float()[:, None] * value
        turn = matrix.rotation
        there = rotation.Rotation(turn.perm.to(self.device), turn.sign.to(self.device))
        return unfolded(there.undo(whole), self.by_name[matrix.name].gain())

    def layers(self, *kinds: str) -> list[str]:
        """Names of the matrices of the layers, or of those of some kinds."""
        return [
            stack.name
            for stack in self.stacks
            if (stack.kind in kinds if kinds else stack.kind != "head")
        ]

    def costs(self, bits: int) -> dict[str, float]:
        """What coding each matrix at so many bits costs, as the package finds it."""

        def make() -> dict[str, float]:
            stacks = [self.by_name[name] for name in self.layers()]
            moments = {name: moment.clone() for name, moment in self.moments.items()}
            trials = sketching._trials(self.texts)
            return sketching._costs(
                self.model, stacks, moments, trials, bits, self.seed, lambda: None
            )

        found: dict[str, float] = self.keep(("costs", bits), make)
        return found

    @torch.no_grad()
    def crossed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Moments of the copy's inputs, and of the model's with them, of all matrices but the head.

        Returns:
            ``E[x' x']`` and ``E[x x']``, ``(cols, cols)``, by name, without gains.
        """
        seen: dict[str, Tensor] = {}
        names = self.layers()
        zeros = {n: torch.zeros_like(self.moments[n]) for n in names}
        own, cross = zeros, {n: torch.zeros_like(z) for n, z in zeros.items()}

        def watch(stack: Stacked, see: Callable[[str, Tensor], None]) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                see(stack.name, stack.inputs(args[0] if args else next(iter(kwargs.values()))))

            module = stack.linears[0] if stack.norm is None else stack.norm
            return module.register_forward_pre_hook(hook, with_kwargs=True).remove

        def add(name: str, x: Tensor) -> None:
            own[name].addmm_(x.T, x)
            cross[name].addmm_(seen[name].T, x)

        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.callback(watch(self.by_name[name], seen.__setitem__))
                hooks.callback(watch(self.twins[name], add))
            for ids in self.texts:
                models.hidden_states(self.model, ids.to(self.device))
                models.hidden_states(self.twin, ids.to(self.device))
        n_tokens = sum(ids.shape[1] for ids in self.texts)
        for name in names:
            own[name] /= n_tokens
            cross[name] /= n_tokens
        return own, cross


# Rows: codes of all linear maps but the head


def grouped_bits(of: Prepared, bits: float) -> float:
    """Bits of a matrix with a step of 16 bits a row and group."""
    return of.size * bits + 16 * of.left.shape[1] * math.ceil(of.left.shape[2] / GROUP)


def row_bits(of: Prepared, bits: float) -> float:
    """Bits of a matrix with a step of 16 bits a row, its rows padded as trellises want them."""
    return of.size * bits + 16 * of.left.shape[1]


def trellis_bits(of: Prepared, bits: Sequence[int]) -> float:
    """Bits of a matrix of trellis codes, padding counted."""
    rows, cols = of.left.shape[1:]
    tiles = math.ceil(rows / trellis.TILE_ROWS) * math.ceil(cols / trellis.TILE_COLS)
    return sum(8 * 64 * tiles * n + 16 * rows for n in bits)


def gptq(
    *levels: int,
    turn: str = "none",
    folded: bool = False,
    fed: bool = True,
    attention: int | None = None,
) -> Callable[[Study], Made]:
    """Code by uniform steps of groups, as GPTQ does; rounding to nearest if nothing is fed back."""

    def make(study: Study) -> Made:
        parts = []
        for of in study.prepared(turn, folded=folded):
            is_attention = of.stacks[0].kind in sketches.PARTS["attention"]
            bits = (attention,) if attention is not None and is_attention else levels
            value = torch.zeros_like(of.left)
            for n in bits:
                value += rounded(of.left - value, of.factor if fed else None, Uniform(n))
            parts.append(of.made(value, sum(grouped_bits(of, n) for n in bits)))
        return together(parts)

    return make


def scalar(
    *levels: int, grouped: bool = False, kinds: Sequence[str] | None = None
) -> Callable[[Study], Made]:
    """Code by fitted levels with feedback, inputs rotated as in a sketch."""

    def make(study: Study) -> Made:
        parts = []
        for of in study.prepared("dealt", kinds=kinds):
            value = torch.zeros_like(of.left)
            for n in levels:
                if grouped:
                    value += rounded(of.left - value, of.factor, Fitted(n, None, study.device))
                else:
                    code = functools.partial(_fitted_code, n, study.device)
                    value += by_rows(of, of.left - value, code)
            bits = grouped_bits if grouped else row_bits
            parts.append(of.made(value, sum(bits(of, n) for n in levels)))
        return together(parts)

    return make


def _fitted_code(bits: int, device: torch.device, step: Tensor) -> Fitted:
    return Fitted(bits, step, device)


def lattice(bits: int) -> Callable[[Study], Made]:
    """Code by E8, with feedback, inputs rotated as in a sketch."""

    def make(study: Study) -> Made:
        parts = []
        for of in study.prepared("dealt"):
            value = by_rows(of, of.left, functools.partial(Lattice, bits))
            padded = of.size + -of.left.shape[1] % 8 * of.left.shape[2]
            parts.append(of.made(value, padded * bits + 16 * of.left.shape[1]))
        return together(parts)

    return make


def ours(*levels: int) -> Callable[[Study], Made]:
    """Code as `csfast sketch` does."""
    return lambda study: study.coded(dict.fromkeys(study.layers(), levels))


def mix(average: float, *after: int) -> Callable[[Study], Made]:
    """Share an average of bits out as `csfast sketch` does; what comes after it is read as well."""

    def make(study: Study) -> Made:
        n = 2 if average < 3 else 3
        each = sketching.shared(sketching.Average(average, after), study.stacks, study.costs(n), n)
        return study.coded({name: each[name].bits for name in study.layers()})

    return make


def varied(*levels: int, turn: str = "dealt", **options: Any) -> Callable[[Study], Made]:
    """Code by trellises otherwise than `csfast sketch` does."""

    def make(study: Study) -> Made:
        return together(
            [
                of.made(sum(study.levels(of, levels, **options)), trellis_bits(of, levels))
                for of in study.prepared(turn)
            ]
        )

    return make


def refitted(*levels: int, what: Sequence[str]) -> Callable[[Study], Made]:
    """Refit in closed form on what the coded model's matrices read.

    Scales: of every output, which steps of rows take up. Norms: of every input channel after a
    norm, whose gain takes it up.
    """

    def make(study: Study) -> Made:
        made = study.coded(dict.fromkeys(study.layers(), levels))
        study.restore()
        for name, weight in made.weights.items():
            study.put(name, weight)
        own, cross = study.crossed()
        for name, weight in made.weights.items():
            gain = study.by_name[name].gain()
            coded, whole = weight, study.plain(name)
            if gain is not None:
                coded, whole = coded * gain, whole * gain
            if "norms" in what and gain is not None:
                a = (coded.T @ coded).double() * own[name].double()
                b = ((coded.T @ whole).double() * cross[name].double().T).sum(1)
                damp = feedback.DAMP * a.diagonal().mean()
                a.diagonal().add_(damp)
                channel = torch.linalg.solve(a, b + damp).float().bfloat16().float()
                coded = coded * channel
            if "scales" in what:
                seen = coded @ own[name]
                best = ((whole @ cross[name]) * coded).sum(1) / (seen * coded).sum(1)
                coded = coded * torch.where(torch.isfinite(best), best, 1.0)[:, None]
            made.weights[name] = unfolded(coded, gain)
        return made

    return make


# Rows: the head


def head_scalar(bits: int) -> Callable[[Study], Made]:
    """Code the head by fitted levels, one step a row."""
    return scalar(bits, kinds=("head",))


def head_rounded(bits: int) -> Callable[[Study], Made]:
    """Round the head to nearest, a step a group."""

    def make(study: Study) -> Made:
        (of,) = study.prepared("none", folded=False, kinds=("head",))
        return of.made(rounded(of.left, None, Uniform(bits)), grouped_bits(of, bits))

    return make


def head_ours(*levels: int) -> Callable[[Study], Made]:
    """Code the head as `csfast sketch` does."""

    def make(study: Study) -> Made:
        _code_heads(study, levels)
        return study.coded({"head": levels})

    return make


def _code_heads(study: Study, levels: tuple[int, ...]) -> None:
    """Code the head; on a GPU in all ways at once, as each takes a small part of it."""
    wanted = HEADS if study.device.type == "cuda" else (levels,)
    study.code([("head", bits) for bits in wanted])


def head_again(*levels: int, best: int, exact: bool) -> Callable[[Study], Made]:
    """Read one level of the whole head, and the best words again: all levels, or in 16 bits."""

    def make(study: Study) -> Made:
        _code_heads(study, levels)
        base = study.coded({"head": levels}, 1)
        stack = study.by_name["head"]
        full = study.plain("head")
        more = 16.0 * full.numel()
        if not exact:
            all_levels = study.coded({"head": levels})
            full = all_levels.weights["head"]
            more = all_levels.stored["head"] - base.read["head"]
        head = study.twins["head"].linears[0]

        def forward(x: Tensor) -> Tensor:
            logits = F.linear(x, head.weight, head.bias)
            places = logits.topk(min(best, stack.rows), dim=-1).indices
            again = F.linear(x, full, head.bias)
            return logits.scatter(-1, places, again.gather(-1, places))

        stored = base.read["head"] + more
        read = base.read["head"] + more * min(1.0, best / stack.rows)
        return Made(
            base.weights, {"head": stored}, {"head": read}, lambda: replaced({head: forward})
        )

    return make


def on(layers: Callable[[Study], Made], head: Callable[[Study], Made]) -> Callable[[Study], Made]:
    """Code layers and head."""
    return lambda study: layers(study).beside(head(study))


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Let modules compute something else."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


# Rows: rules that follow the token


def most_of(score: Tensor, share: float) -> Tensor:
    """Whether each of ``(..., n)`` is among so large a share of its row's largest."""
    n = score.shape[-1]
    count = min(n, round(share * n))
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    places = score.topk(count, dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, places, True)


def by_neuron(
    base: int, more: int | None, share: float, skip: float = 0.0, attention: int = 3
) -> Callable[[Study], Made]:
    """Read the base of all neurons, and more of those of largest usage at the base.

    Inputs of gate and up are rotated as in a sketch. Down keeps neurons apart: its outputs are
    rotated, every neuron has a scale of 16 bits, and feedback goes from neuron to neuron.

    Args:
        base: Bits of the first level.
        more: Bits of the second, or None for the weights themselves.
        share: Of the neurons that the second is read of.
        skip: Share of the neurons of least usage whose down columns are not read.
        attention: Bits of the other matrices.
    """

    def make(study: Study) -> Made:
        bits = (base,) if more is None else (base, more)
        gate_up = _in_levels(study, "dealt", "gate_up", bits)
        down = _down_in_levels(study, bits)
        made = study.coded(dict.fromkeys(study.layers("qkv", "o"), (attention,)))
        forwards = {}
        for i, ffn in enumerate(models.find_ffns(study.twin)):
            first, last = f"layers.{i}.gate_up", f"layers.{i}.down"
            pairs = []
            for name, of, kept in ((first, gate_up[first], 1.0), (last, down[last], 1.0 - skip)):
                whole = study.plain(name) if more is None else of.parts[0] + of.parts[1]
                pairs.append((of.parts[0], whole))
                second = 16.0 * whole.numel() if more is None else of.bits[1]
                made.stored[name] = of.own + of.bits[0] + second
                made.read[name] = of.own + kept * of.bits[0] + share * second
            forwards[ffn.module] = _neurons(ffn, pairs[0], pairs[1], share, skip)
        return dataclasses.replace(made, patch=lambda: replaced(forwards))

    return make


@dataclasses.dataclass(frozen=True, eq=False)
class InLevels:
    """A matrix in levels, as the model has it, with their bits and those of what else it takes."""

    parts: list[Tensor]
    bits: list[float]
    own: float


def _in_levels(study: Study, turn: str, kind: str, bits: tuple[int, ...]) -> dict[str, InLevels]:
    """Matrices of a kind in levels of trellis codes."""

    def make() -> dict[str, InLevels]:
        found = {}
        for of in study.prepared(turn, kinds=(kind,)):
            back = [of.back(value) for value in study.levels(of, bits)]
            for stack, own in zip(of.stacks, of.own, strict=True):
                parts = [weights[stack.name] for weights in back]
                found[stack.name] = InLevels(parts, [trellis_bits(of, (n,)) for n in bits], own)
        return found

    result: dict[str, InLevels] = study.keep(("levels", turn, kind, bits), make, 6)
    return result


def _down_in_levels(study: Study, bits: tuple[int, ...]) -> dict[str, InLevels]:
    """Down projections in levels, neurons apart."""

    def make() -> dict[str, InLevels]:
        found = {}
        for plain in study.prepared("none", kinds=("down",)):
            rows, cols = plain.left.shape[1:]
            outputs, _ = turn_of("block", torch.ones(rows, 1, device=study.device), study.seed)
            scale = torch.linalg.vector_norm(plain.left, dim=1)
            scale = scale.clamp_min(1e-9).bfloat16().float()  # (layers, neurons)
            turned = outputs.inputs(plain.left.transpose(1, 2)).transpose(1, 2)
            moment = plain.moment.double() * scale[:, :, None] * scale[:, None]
            of = Prepared(
                plain.stacks,
                plain.turns,
                (turned / scale[:, None]).contiguous(),
                moment.float(),
                torch.stack([feedback.spread(each) for each in moment]),
                plain.gains,
                [16 * cols] * len(plain.stacks),
            )
            back = [
                outputs.undo((value * scale[:, None]).transpose(1, 2)).transpose(1, 2)
                for value in study.levels(of, bits)
            ]
            for i, stack in enumerate(of.stacks):
                parts = [value[i].contiguous() for value in back]
                own = float(of.own[i])
                found[stack.name] = InLevels(parts, [trellis_bits(of, (n,)) for n in bits], own)
        return found

    result: dict[str, InLevels] = study.keep(("levels", "neurons", "down", bits), make, 6)
    return result


def _neurons(
    ffn: models.Ffn,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    share: float,
    skip: float,
) -> Callable[[Tensor], Tensor]:
    """What an FFN computes with base and full weights of its neurons."""
    scale = torch.linalg.vector_norm(down[0], dim=0)
    sizes = [linear.bias for linear in ffn.linears]
    if any(bias is not None for bias in sizes):
        raise ValueError(f"[codes] {ffn.name}: has biases; want none for rules by neuron.")

    def activated(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return ffn.act(gate) * up

    def forward(x: Tensor) -> Tensor:
        first = activated(x, gate_up[0])
        usage = first.abs() * scale
        chosen = most_of(usage, share)
        a = torch.where(chosen, activated(x, gate_up[1]), first)
        if skip:
            a = a.masked_fill(most_of(-usage, skip) & ~chosen, 0.0)
        refined = torch.where(chosen, a, 0.0)
        return F.linear(refined, down[1]) + F.linear(a - refined, down[0])

    return forward


def by_channel(
    base: int, more: int | None, share: float, turn: str = "dealt"
) -> Callable[[Study], Made]:
    """Read more of the input channels whose entry times the error of their column is largest.

    Args:
        base: Bits of the first level.
        more: Bits of the second, or None for what is left in 16 bits.
        share: Of the channels that the second is read of.
        turn: Rotation of the inputs; channels are those after it.

    Source:
        Park et al., "DecDEC: a systems approach to advancing low-bit LLM quantization", 2025.
    """

    def make(study: Study) -> Made:
        bits = (base,) if more is None else (base, more)
        made = Made({}, {}, {})
        forwards = {}
        for of in study.prepared(turn):
            levels = study.keep(
                ("channels", turn, of.stacks[0].kind, bits, of.left.shape),
                functools.partial(study.levels, of, bits),
                8,
            )
            rest = of.left - levels[0] if more is None else levels[1]
            made.weights.update(of.back(levels[0]))
            for i, stack in enumerate(of.stacks):
                twins = study.twins[stack.name].linears
                norm = torch.linalg.vector_norm(rest[i], dim=0)
                parts = torch.split(rest[i], [linear.weight.shape[0] for linear in twins])
                for linear, part in zip(twins, parts, strict=True):
                    forwards[linear] = _channels(
                        linear, part, of.turns[i], of.gains[i], norm, share
                    )
                first = trellis_bits(of, (base,)) + of.own[i]
                second = 16.0 * of.size if more is None else trellis_bits(of, (more,))
                made.stored[stack.name] = first + second
                made.read[stack.name] = first + share * second
        return dataclasses.replace(made, patch=lambda: replaced(forwards))

    return make


def _channels(
    linear: nn.Linear, rest: Tensor, turn: Turn, gain: Tensor | None, norm: Tensor, share: float
) -> Callable[[Tensor], Tensor]:
    """What a linear map computes with its base, and more of the channels that matter."""

    def forward(x: Tensor) -> Tensor:
        z = turn.inputs(x if gain is None else unfolded(x, gain))
        chosen = torch.where(most_of(z.abs() * norm, share), z, 0.0)
        return F.linear(x, linear.weight, linear.bias) + F.linear(chosen, rest)

    return forward


def by_layer(base: int, more: int, share: float) -> Callable[[Study], Made]:
    """Read more of the matrices whose base is furthest off for the token, in the middle `share`.

    Source:
        Kwon et al., "DP-LLM: runtime model adaptation with dynamic layer-wise precision
        assignment", 2025.
    """

    def make(study: Study) -> Made:
        names = study.layers()
        both = study.coded(dict.fromkeys(names, (base, more)))
        first = study.coded(dict.fromkeys(names, (base, more)), 1)
        study.restore()
        for name, weight in first.weights.items():
            study.put(name, weight)
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        limit = torch.inf

        def forward_of(name: str, at: int, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
            low, high = first.weights[name], both.weights[name] - first.weights[name]
            rows = slice(at, at + linear.weight.shape[0])

            def forward(x: Tensor) -> Tensor:
                y, off = F.linear(x, low), F.linear(x, high)
                length = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-9)
                score = torch.linalg.vector_norm(off, dim=-1, keepdim=True) / length
                if at == 0:
                    seen[name].append(score[:, -study.new_tokens :].flatten())
                found = torch.where(score > limit, y + off, y)[..., rows]
                return found if linear.bias is None else found + linear.bias

            return forward

        forwards = {}
        for name in names:
            at = 0
            for linear in study.twins[name].linears:
                forwards[linear] = forward_of(name, at, linear)
                at += linear.weight.shape[0]
        n_tokens = 0
        with replaced(forwards):
            for ids in study.texts:
                if n_tokens >= RULE_TOKENS:
                    break
                models.hidden_states(study.twin, ids.to(study.device))
                n_tokens += ids.shape[1]
        scores = torch.cat([torch.cat(seen[name]) for name in names])
        sizes = torch.cat(
            [
                torch.full_like(torch.cat(seen[name]), study.by_name[name].rows)
                * study.by_name[name].cols
                for name in names
            ]
        )
        order = scores.argsort(descending=True)
        spent = sizes[order].double().cumsum(0) / sizes.double().sum()
        limit = float(scores[order][int((spent < share).sum().clamp_max(len(order) - 1))])
        for of in seen.values():
            of.clear()

        def read() -> Bits:
            refined = {
                name: float((torch.cat(seen[name]) > limit).float().mean()) for name in names
            }
            return {
                name: first.read[name] + refined[name] * (both.stored[name] - first.read[name])
                for name in names
            }

        return Made(first.weights, both.stored, dict(first.read), lambda: replaced(forwards), read)

    return make


# The table


def table() -> list[Row]:
    """Give all rows, those that must be there first."""
    rows: list[Row] = []

    def add(kind: str, seconds: float, name: str, make: Callable[[Study], Made]) -> None:
        rows.append(Row(name, kind, make, seconds))

    add("reference", 1, "dense", lambda study: Made({}, {}, {}))
    for n in (3, 4, 2, 5, 6):
        add("rotated GPTQ", 3, f"rotated GPTQ {n}", gptq(n, turn="full"))
    for n in (3, 4):
        name = f"rotated GPTQ ffn 2 attention {n}"
        add("rotated GPTQ", 3, name, gptq(2, turn="full", attention=n))
    add("two levels", 4, "rotated GPTQ 3+3", gptq(3, 3, turn="full"))
    for levels in ((3, 3), (2, 2), (4, 1), (2, 4), (2, 1)):  # whose first levels follow
        add("two levels", 10, f"trellis {'+'.join(map(str, levels))}", ours(*levels))
    for n in (3, 2, 4, 1):
        add("trellis", 4, f"trellis {n}", ours(n))
    for average in (2.53, 3.25, 4.25):
        add("mix", 6, f"mix {average}", mix(average))
    for n in (2, 3, 4):
        add("scalar", 3, f"scalar {n}", scalar(n))
        add("scalar", 3, f"scalar {n} groups", scalar(n, grouped=True))
    add("two levels", 5, "scalar 3+3", scalar(3, 3))
    for n in (2, 3, 4):
        add("lattice", 8, f"E8 {n}", lattice(n))
    for n in (2, 3, 4):
        add("GPTQ", 3, f"GPTQ {n}", gptq(n))
        add("rounding", 2, f"round to nearest {n}", gptq(n, fed=False))
    for name, turn in (("not rotated", "none"), ("not dealt", "block"), ("full rotation", "full")):
        add("rotation", 7, f"trellis 3 {name}", varied(3, turn=turn))
    for n in (3, 4):
        name = f"rotated GPTQ {n} in blocks gains folded"
        add("rotation", 3, name, gptq(n, turn="dealt", folded=True))
    add("refit", 4, "trellis 3 one pass", varied(3, passes=1))
    add("refit", 8, "trellis 3 three passes", varied(3, passes=3))
    add("refit", 6, "trellis 3 fitted to weights", varied(3, by_outputs=False))
    for what in (("scales",), ("norms",), ("norms", "scales")):
        add("refit", 6, f"trellis 3 {' '.join(what)} refitted", refitted(3, what=what))
    for bits, nu in ((3, 4), (3, 6), (2, 4)):
        add("second trellis", 5, f"trellis {bits} memory {nu}", varied(bits, nu=nu))
    heads: dict[str, Callable[[Study], Made]] = {
        **{f"head scalar {n}": head_scalar(n) for n in (4, 6, 3, 5, 7, 8)},
        **{f"head trellis {a}+{b}": head_ours(a, b) for a, b in HEADS},
        **{f"head trellis {n}": head_ours(n) for n in (4, 3)},
        "head round to nearest 4": head_rounded(4),
    }
    for levels in HEADS:
        for best in (64, 256):
            name = f"head trellis {'+'.join(map(str, levels))} best {best}"
            heads[name] = head_again(*levels, best=best, exact=False)
    for n in (3, 4):
        for best in (64, 256):
            heads[f"head trellis {n} best {best} exact"] = head_again(n, best=best, exact=True)
    for name, make in heads.items():
        add("head", 3, name, make)
        add("head on trellis 3", 2, f"{name} on trellis 3", on(ours(3), make))
    for base, more, share, skip in (
        *((3, 3, 0.1, 0.0), (3, 3, 0.1, 0.25), (3, 3, 0.25, 0.25), (3, 3, 0.1, 0.5)),
        *((2, 2, 0.25, 0.0), (2, 2, 0.25, 0.25), (2, 4, 0.1, 0.0), (2, 4, 0.25, 0.25)),
    ):
        name = f"neurons {base}+{more} {share}" + (f" skip {skip}" if skip else "")
        add("by neuron", 6, name, by_neuron(base, more, share, skip))
    for base, share, skip in ((3, 0.02, 0.0), (3, 0.02, 0.25)):
        name = f"neurons {base} exact {share}" + (f" skip {skip}" if skip else "")
        add("by neuron", 5, name, by_neuron(base, None, share, skip))
    for turn, said in (("dealt", ""), ("none", " not rotated")):
        for base, more, share in ((3, 3, 0.1), (3, 3, 0.25), (2, 2, 0.25), (2, 4, 0.125)):
            name = f"channels {base}+{more} {share}{said}"
            add("by channel", 7, name, by_channel(base, more, share, turn))
        name = f"channels 3 exact 0.02{said}"
        add("by channel", 4, name, by_channel(3, None, 0.02, turn))
    for base, more, share in ((3, 3, 0.1), (3, 3, 0.25), (2, 2, 0.25)):
        add("by layer", 4, f"layers {base}+{more} {share}", by_layer(base, more, share))
    for average, after in ((2.53, 3), (3.25, 3)):
        add("mix", 12, f"mix {average}+{after}", mix(average, after))
    assert len({row.name for row in rows}) == len(rows)
    return rows


def interpolated(curve: Sequence[tuple[float, float]], bits: float) -> float:
    """Divergence at so many bits: its logarithm on lines between points, the last ones drawn on.

    Args:
        curve: Bits and divergence, at least two of different bits.
        bits: Where.
    """
    points = sorted(curve)
    place = next((i for i in range(1, len(points)) if bits <= points[i][0]), len(points) - 1)
    (b0, k0), (b1, k1) = points[place - 1], points[place]
    share = (bits - b0) / (b1 - b0)
    return math.exp((1 - share) * math.log(k0) + share * math.log(k1))


def frontier(rows: Sequence[Mapping[str, Any]], what: str) -> list[tuple[float, float]]:
    """Bits and divergence of rows that no other beats at as few bits."""
    points: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["bits"][what], row["kl"])):
        if row["kl"] > 0 and (not points or row["kl"] < points[-1][1]):
            points.append((row["bits"][what], row["kl"]))
    return points


def of_kind(rows: Sequence[Mapping[str, Any]], *kinds: str) -> list[Mapping[str, Any]]:
    """Give the rows of some kinds."""
    return [row for row in rows if row["kind"] in kinds]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay out the table, and what it says of widths, heads and rules."""
    lines = [f"{'':44} {'stored':>6} {'read':>6} {'head':>6} {'KL':>9} {'top-1':>6} {'s':>6}"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for row in sorted(rows, key=lambda row: kinds.index(row["kind"])):
        bits = row["bits"]
        lines.append(
            f"{row['name']:44} {bits['stored']:6.2f} {bits['read']:6.2f} {bits['head']:6.2f} "
            f"{row['kl']:9.5f} {row['top1']:6.3f} {row['seconds']:6.1f}"
        )
    own = [*of_kind(rows, "trellis", "mix"), *_two_levels(rows, "trellis")]
    for most, what in WIDTHS:
        opponent = [*of_kind(rows, "rotated GPTQ"), *_two_levels(rows, "rotated GPTQ")]
        curve = frontier(opponent, what)
        fits = [row for row in own if row["bits"][what] <= most and row["kl"] > 0]
        if not fits or len(curve) < 2:
            continue
        best = min(fits, key=lambda row: row["kl"])
        there = interpolated(curve, best["bits"][what])
        lines.append(
            f"<= {most} bits {what}: {best['name']} {best['kl']:.5f} at {best['bits'][what]:.3f}, "
            f"rotated GPTQ {there:.5f}: {best['kl'] / there:.3f} of it"
        )
    uniform = frontier([*own, *of_kind(rows, "scalar", "lattice", "rotated GPTQ")], "read")
    for row in of_kind(rows, "by neuron", "by channel", "by layer"):
        if len(uniform) >= 2:
            there = interpolated(uniform, row["bits"]["read"])
            ratio = row["kl"] / there
            lines.append(
                f"{row['name']}: {row['kl']:.5f} at {row['bits']['read']:.3f} bits read, best "
                f"uniform code {there:.5f}: {ratio:.3f} of it, "
                f"{'within' if ratio <= DEMANDED else 'above'} {DEMANDED}"
            )
    alone = {row["name"]: row for row in rows}
    for row in of_kind(rows, "head on trellis 3"):
        if "trellis 3" in alone:
            added = row["kl"] - alone["trellis 3"]["kl"]
            head = row["name"].removesuffix(" on trellis 3")
            also = f", alone {alone[head]['kl']:.5f}" if head in alone else ""
            lines.append(
                f"{head} on trellis 3: {added:+.5f} at {row['bits']['head']:.2f} bits read{also}"
            )
    return lines


def _two_levels(rows: Sequence[Mapping[str, Any]], code: str) -> list[Mapping[str, Any]]:
    return [row for row in of_kind(rows, "two levels") if row["name"].startswith(code)]


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("data", type=Path, help="file of documents, or folder of valid.jsonl.xz")
    parser.add_argument("--json", type=Path, help="the table, to begin or to go on with")
    parser.add_argument("--only", help="names or kinds of rows, divided by commas")
    parser.add_argument("--skip", help="names or kinds of rows to leave out")
    parser.add_argument("--list", action="store_true", help="print names and kinds of rows")
    parser.add_argument("--prompts", type=int, default=35, help="of every task, at most")
    parser.add_argument("--new-tokens", type=int, default=96, help="of every prompt")
    parser.add_argument("--tokens", type=int, default=sketching.TOKENS_MAX, help="to fit to")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="what the record says it was made from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.json is None and not args.list:
        parser.error("want --json, or --list.")
    return args


def chosen(args: argparse.Namespace) -> list[Row]:
    """Give the rows that are asked for."""
    rows = table()
    for option in ("only", "skip"):
        words = [word.strip() for word in (getattr(args, option) or "").split(",") if word.strip()]
        known = {row.name for row in rows} | {row.kind for row in rows}
        if odd := [word for word in words if word not in known]:
            raise SystemExit(f"codes: --{option} {odd[0]!r}: want names or kinds of --list.")
        if words:
            rows = [
                row
                for row in rows
                if (row.name in words or row.kind in words) == (option == "only")
            ]
    return rows


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not in the file yet, and give all rows of the file."""
    start = time.monotonic()
    wanted = chosen(args)
    kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    done: list[dict[str, Any]] = kept.get("rows", [])
    names = {row["name"] for row in done}
    left = [row for row in wanted if row.name not in names]
    if not left:
        return done
    with undisturbed():
        study = Study(args)
    settings = {
        "model": Path(args.model).name,
        "model_hash": models.hash_of(study.stacks),
        "documents": len(study.prompts),
        "new_tokens": args.new_tokens,
        "tokens": sum(ids.shape[1] for ids in study.texts),
        "seed": args.seed,
    }
    if kept and {key: kept.get(key) for key in settings} != settings:
        raise SystemExit(
            f"codes: {args.json.name} is of another model, text or settings; want another file."
        )
    # Without the folders of one machine: only the names of files.
    command = ["codes.py", *(Path(word).name for word in sys.argv[1:])]
    about = record_head.of(study.device, command=command, commit=args.commit)
    for number, row in enumerate(left, 1):
        if time.monotonic() - start > args.seconds:
            say(f"{len(left) - number + 1} rows are left.")
            break
        found = study.run(row)
        done.append(found)
        document = {**about, **settings, "rows": done}
        write_atomic(args.json, record_head.text_of(document).encode())
        say(
            f"{time.monotonic() - start:6.0f} s {number:3}/{len(left)} {row.name:44} "
            f"{found['bits']['read']:6.3f} bits, head {found['bits']['head']:5.2f}: "
            f"KL {found['kl']:.5f} top-1 {found['top1']:.4f}, {found['seconds']:.1f} s"
        )
    return done


def main() -> None:
    """Run the study."""
    args = arguments()
    if args.list:
        for row in chosen(args):
            say(f"{row.name:44} {row.kind:18} {row.seconds:3.0f} s")
        return
    for line in summary(run(args)):
        say(line)


if __name__ == "__main__":
    main()
