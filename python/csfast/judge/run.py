"""The judge: whole documents, many at a time, each position on the support decoding would choose.

What follows the prompts of a batch of documents runs in one forward pass over the keys and values
that the prompts left when they ran dense. Attention is causal and a feed-forward layer sees one
position at a time, so this equals decoding every document token by token. See docs/quality.md.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import models
from ..models import Ffn
from ..types import TASKS, Document, LayerShape
from . import retrieval

BYTES = 2  # of a dense weight
CHUNK = 4096  # sparse positions of one forward: 0.1 TFLOP of the demo model, 2 ms of an H100
LOGITS = 1 << 26  # of one forward: 256 MiB in float32
PROMPTS = 8  # prompt positions of one forward, as a multiple of the sparse ones: no logits
SHORT_PROMPT = 128  # prompts up to this length stand together
CACHE_BYTES = 1 << 31  # of prompts that are kept; what is beyond runs again for every rule
RETRIEVAL_TOKENS = (200, 1500)  # shortest and longest retrieval prompt that is made
NONE = -100  # a target that cross entropy leaves out

Progress = Callable[[int, int], None]  # (done, total)
Done = Callable[[int], None]  # done so far
Thresholds = tuple[tuple[float, ...], ...]  # of every layer
Note = Callable[[int, Tensor], None]  # layer, counts (n, n_counts) int64 of its positions


@dataclass(frozen=True, eq=False)
class Piece:
    """A document as tokens.

    Attributes:
        document: Where the tokens are from.
        ids: ``(1, T)`` int64, on the CPU.
        n_prompt: Positions that run dense. Those from ``n_prompt`` to ``T - 2`` run sparse, and
            what they predict is scored; position ``T - 1`` has nothing to predict.
    """

    document: Document
    ids: Tensor
    n_prompt: int

    @property
    def n_tokens(self) -> int:
        """Tokens after the prompt."""
        return self.ids.shape[1] - self.n_prompt

    @property
    def n_sparse(self) -> int:
        """Tokens that a sparse position predicts: all but the first after the prompt."""
        return self.n_tokens - 1


@dataclass(frozen=True, eq=False)
class Where:
    """Which position of a batch of documents is whose.

    The ``n`` sparse positions stand document by document, in order within each; so do the ``m``
    prompt positions.

    Attributes:
        n_rows: Documents.
        n_columns: Sparse positions of the longest.
        row: ``(n,)`` int64: the document of every sparse position.
        position: ``(n,)`` int64: its number among the sparse positions of its document.
        prompt_row: ``(m,)`` int64: the document of every prompt position.
        task: ``(n_rows,)`` int64: the task of every document, its place in `types.TASKS`.
    """

    n_rows: int
    n_columns: int
    row: Tensor
    position: Tensor
    prompt_row: Tensor
    task: Tensor


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
        self._sums = torch.zeros(n_layers, len(TASKS), 3, dtype=torch.float64, device=device)

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
        task = F.one_hot(where.task[row], len(TASKS)).double()
        self._sums[layer] += task.T @ values

    def means(self) -> tuple[float | None, float | None]:
        """Give recall and share of the energy: mean over positions, tasks, then layers."""
        sums = self._sums.cpu()
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
            ),
            {name: [x[::step] for x in members] for name, members in self.watched.items()},
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums over the scored tokens of every piece under one setting.

    Attributes:
        loss: Of each piece, nats.
        read: ``(n_pieces, n_layers, n_counts)`` int64, on the CPU.
        recovery: What was recorded, if the rule keeps neurons.
    """

    loss: list[float]
    read: Tensor
    recovery: Recovery | None


@dataclass(frozen=True, eq=False)
class Effort:
    """What every scored token of one piece cost.

    Attributes:
        ids: The tokens that were predicted, ``(n,)`` int64.
        dense_loss: Of the dense model, ``(n,)`` float32, nats.
        loss: Of the sparse model, ``(n,)`` float32.
        entropy: Of what the sparse model predicted, ``(n,)`` float32, nats.
        density: Fraction of each layer that was executed to predict them, ``(n, n_layers)``.
    """

    ids: Tensor
    dense_loss: Tensor
    loss: Tensor
    entropy: Tensor
    density: Tensor


def dense_bytes(shape: LayerShape) -> float:
    """Give the bytes of one feed-forward layer's three matrices at 16 bits a weight."""
    return 3.0 * shape.d * shape.n_neurons * BYTES


# Documents


def with_retrieval(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    n: int,
    max_tokens: int,
    seed: str,
) -> list[Document]:
    """Add `n` fresh retrieval prompts to documents that hold none, if the context has room."""
    found = list(documents)
    shortest, longest = RETRIEVAL_TOKENS
    # Room for the response: a chain of variables with its number, about thirty tokens.
    longest = min(longest, context(model, max_tokens) - 64)
    if not found or n == 0 or longest < shortest or any(d.group == "retrieval" for d in found):
        return found
    rng = random.Random(f"retrieval/{seed}")
    for i in range(n):
        length = round(shortest + (longest - shortest) * (i + 0.5) / n)
        kind = retrieval.KINDS[i % len(retrieval.KINDS)]
        sample = retrieval.retrieval_sample(
            kind, length, rng, lambda text: len(tokenizer.encode(text))
        )
        found.append(Document(sample.task, sample.prompt, sample.response, sample.answer))
    return found


def choose(
    verb: str,
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    tokens: int,
    response_tokens: int,
    max_tokens: int,
    seed: int,
) -> list[Piece]:
    """Take documents of every task in a seeded order until enough of their tokens are scored.

    Args:
        verb: What errors begin with.
        model: The model, for the length of its context.
        tokenizer: Its tokenizer.
        documents: To choose from.
        tokens: Scored tokens of each task to stop at, a document more or less.
        response_tokens: Tokens of one document to score at most.
        max_tokens: Tokens of one document at most, its prompt included.
        seed: Of the order.

    Raises:
        ValueError: A number is out of range, a task is unknown, or nothing would run sparse.
    """
    if not documents:
        raise ValueError(f"[{verb}] 0 documents: want at least one.")
    for name, value in (("tokens", tokens), ("response_tokens", response_tokens)):
        if value < 2:
            raise ValueError(f"[{verb}] {name} = {value}: want at least 2.")
    if seed < 0:
        raise ValueError(f"[{verb}] seed = {seed}: want 0 or more.")
    limit = context(model, max_tokens)
    by_task: dict[str, list[Document]] = {task: [] for task in TASKS}
    for document in documents:
        if document.group not in by_task:
            raise ValueError(
                f"[{verb}] task {document.task[:80]!r}: want one of {', '.join(TASKS)}."
            )
        by_task[document.group].append(document)
    pieces = []
    for task, members in by_task.items():
        random.Random(f"{seed}/{task}").shuffle(members)
        n_scored = 0
        for document in members:
            if n_scored >= tokens:
                break
            whole = encoded(tokenizer, document, limit)
            if whole is None or whole.n_sparse < 1:
                continue
            ids = whole.ids[:, : whole.n_prompt + response_tokens]
            pieces.append(Piece(document, ids, whole.n_prompt))
            n_scored += pieces[-1].n_sparse
    if not pieces:
        raise ValueError(
            f"[{verb}] {len(documents)} documents: want at least one with two tokens after its "
            f"dense part within {limit} tokens, or nothing runs sparse."
        )
    return pieces


def context(model: nn.Module, max_tokens: int) -> int:
    """Give how many tokens the model can see, at most `max_tokens`."""
    limit = models.context_length(model)
    return max_tokens if limit is None else min(max_tokens, limit)


def encoded(tokenizer: Any, document: Document, max_tokens: int) -> Piece | None:
    """Give the document as tokens, or None if none of its response fits or its prompt is one token.

    A prompt of one token is decoding already: it would run sparse.
    """
    try:
        found = models.encode(tokenizer, document, max_tokens=max_tokens)
    except ValueError:  # its text is empty, or its prompt fills the context
        return None
    piece = Piece(document, found.ids, found.n_prompt)
    return piece if piece.n_prompt > 1 else None


def by_group(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """Say which pieces are of each task, in the order of `TASKS`."""
    groups: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(piece.document.group, []).append(i)
    return {task: groups[task] for task in TASKS if task in groups}


# The pass


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents that run together, their tensors on the device of the model.

    Prompts are padded at the left, so that what follows stands right behind them; responses at the
    right, where causal attention does not see the padding.

    Attributes:
        members: Which pieces they are.
        prompt: ``(n_rows, n_before)`` int64, 0 where padded.
        prompt_mask: The same shape, int64: 1 where there is a token.
        prompt_place: ``(m,)`` int64: the prompt positions, counted through the rows.
        ids: ``(n_rows, n_columns)`` int64: the sparse positions, 0 where padded.
        target: What they predict, the same shape; `NONE` where padded.
        mask: ``(n_rows, n_before + n_columns)`` int64: 0 at the padding of the prompts.
        place: ``(n,)`` int64: the sparse positions, counted through the rows.
        where: Whose the positions are.
    """

    members: tuple[int, ...]
    prompt: Tensor
    prompt_mask: Tensor
    prompt_place: Tensor
    ids: Tensor
    target: Tensor
    mask: Tensor
    place: Tensor
    where: Where

    def gather(self, x: Tensor) -> Tensor:
        """Take the sparse positions ``(n, width)`` out of ``(n_rows, n_columns, width)``."""
        flat = x.flatten(0, 1)
        return flat if len(flat) == len(self.place) else flat.index_select(0, self.place)

    def scatter(self, out: Tensor) -> Tensor:
        """Put the sparse positions back; padding is zero."""
        shape = (self.where.n_rows, self.where.n_columns, out.shape[1])
        if len(out) == shape[0] * shape[1]:
            return out.view(shape)
        flat = out.new_zeros(shape[0] * shape[1], out.shape[1])
        return flat.index_copy_(0, self.place, out).view(shape)


def batches(pieces: Sequence[Piece], device: torch.device, *, chunk: int = CHUNK) -> list[Batch]:
    """Put documents of similar lengths together.

    Args:
        pieces: The documents.
        device: Where the tensors go.
        chunk: Sparse positions of a batch at most, padding included; a longer document is alone.
    """
    # Per setting a prompt position costs a hundredth of a sparse one, to read its keys and values:
    # where prompts are short, lengths of responses matter more.
    size = [math.ceil(2 * math.log2(max(piece.n_prompt, SHORT_PROMPT))) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (size[i], pieces[i].n_sparse, i))
    found = []
    members: list[int] = []
    n_before = n_columns = n_sparse = 0
    for i in order:
        before, columns = max(n_before, pieces[i].n_prompt), max(n_columns, pieces[i].n_sparse)
        n_rows = len(members) + 1
        full = n_rows * columns > chunk or n_rows * before > PROMPTS * chunk
        # Half may be padding, and what a forward of its own would cost.
        padded = n_rows * columns > 1.5 * (n_sparse + pieces[i].n_sparse) + chunk / 16
        if members and (full or padded or size[i] != size[members[0]]):
            found.append(_batch(pieces, members, device))
            members, before, columns, n_sparse = [], pieces[i].n_prompt, pieces[i].n_sparse, 0
        members, n_before, n_columns = [*members, i], before, columns
        n_sparse += pieces[i].n_sparse
    if members:
        found.append(_batch(pieces, members, device))
    return found


def _batch(pieces: Sequence[Piece], members: Sequence[int], device: torch.device) -> Batch:
    some = [pieces[i] for i in members]
    n_rows, n_before = len(some), max(piece.n_prompt for piece in some)
    n_columns = max(piece.n_sparse for piece in some)
    prompt = torch.zeros(n_rows, n_before, dtype=torch.int64)
    prompt_mask = torch.zeros_like(prompt)
    ids = torch.zeros(n_rows, n_columns, dtype=torch.int64)
    target = torch.full_like(ids, NONE)
    for row, piece in enumerate(some):
        n_prompt, n_sparse = piece.n_prompt, piece.n_sparse
        prompt[row, n_before - n_prompt :] = piece.ids[0, :n_prompt]
        prompt_mask[row, n_before - n_prompt :] = 1
        ids[row, :n_sparse] = piece.ids[0, n_prompt:-1]
        target[row, :n_sparse] = piece.ids[0, n_prompt + 1 :]
    rows, position = (target != NONE).nonzero(as_tuple=True)
    prompt_row, prompt_column = prompt_mask.nonzero(as_tuple=True)
    task = torch.tensor([TASKS.index(piece.document.group) for piece in some])
    return Batch(
        members=tuple(members),
        prompt=prompt.to(device),
        prompt_mask=prompt_mask.to(device),
        prompt_place=(prompt_row * n_before + prompt_column).to(device),
        ids=ids.to(device),
        target=target.to(device),
        mask=torch.cat([prompt_mask, torch.ones_like(ids)], dim=1).to(device),
        place=(rows * n_columns + position).to(device),
        where=Where(
            n_rows,
            n_columns,
            rows.to(device),
            position.to(device),
            prompt_row.to(device),
            task.to(device),
        ),
    )


@torch.no_grad()
def prefill(model: nn.Module, batch: Batch) -> Any:
    """Run the prompts of a batch dense; gives their cache."""
    # What is padded takes position 0; nothing looks at it.
    position_ids = (batch.prompt_mask.cumsum(dim=1) - 1).clamp_min(0)
    out = model(
        input_ids=batch.prompt,
        attention_mask=batch.prompt_mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    return out[models.cache_argument(model)]


def copied(cache: Any) -> Any:
    """Give a cache that may grow and leave this one as it is; None, an empty one, stays None."""
    if cache is None:
        return None
    # Layers of a cache grow by making new tensors, so a shallow copy keeps the old ones.
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


@torch.no_grad()
def follow(model: nn.Module, cache: Any, batch: Batch) -> Tensor:
    """Run what follows the prompts; the cache stays as it was.

    Returns:
        Logits, ``(n_rows, n_columns, vocabulary)``, of no meaning where padded.
    """
    position_ids = batch.mask.cumsum(dim=1)[:, batch.prompt.shape[1] :] - 1
    logits: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=position_ids,
        use_cache=True,
        **{models.cache_argument(model): copied(cache)},
    ).logits
    return logits


def follow_dense(model: nn.Module, ffns: Sequence[Ffn], cache: Any, batch: Batch) -> Tensor:
    """Run what follows the prompts dense; logits as of `follow`.

    The layers get the same positions in the same shape as by a rule, so that a rule which reads
    everything differs in nothing.
    """

    def forward(layer: int, x: Tensor) -> Tensor:
        module = ffns[layer].module
        out: Tensor = type(module).forward(module, batch.gather(x))
        return batch.scatter(out)

    with replaced(ffns, forward):
        return follow(model, cache, batch)


@torch.no_grad()
def follow_by(
    model: nn.Module, cache: Any, batch: Batch, setting: Setting
) -> tuple[Tensor, list[Tensor]]:
    """Run what follows the prompts by a rule.

    Returns:
        Logits as of `follow`, and what every position read, ``(n, n_counts)`` for every layer.
    """
    read: dict[int, Tensor] = {}
    with setting.rule.patched(setting.thresholds, batch, read.__setitem__):
        logits = follow(model, cache, batch)
    return logits, [read[layer] for layer in range(len(read))]


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """Give the loss of every position, ``(n_rows, n_columns)`` float32, nats; 0 where padded."""
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.target.flatten(), reduction="none", ignore_index=NONE
    )
    return loss.view(batch.target.shape)


def summed(counts: Sequence[Tensor], where: Where) -> Tensor:
    """Sum what positions read over documents, ``(n_rows, n_layers, n_counts)`` int64."""
    each = torch.stack(list(counts), dim=1)
    total = each.new_zeros(where.n_rows, *each.shape[1:])
    return total.index_add_(0, where.row, each)


class Judge:
    """Documents that are scored under many settings, paired with the dense model.

    Owns the tensors of the batches and, up to `CACHE_BYTES`, the keys and values of their prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: Sequence[Ffn],
        pieces: Sequence[Piece],
        *,
        chunk: int = CHUNK,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Put the pieces into batches; nothing runs yet."""
        self.model = model
        self.ffns = ffns
        self.pieces = pieces
        words = getattr(getattr(model, "config", None), "vocab_size", 1)
        self.batches = batches(
            pieces, ffns[0].gate.weight.device, chunk=max(1, min(chunk, LOGITS // words))
        )
        self._cache_bytes = cache_bytes
        self._caches: dict[int, Any] = {}

    def cache(self, number: int, *, observer: Rule | None = None) -> Any:
        """Give the cache of one batch's prompts, with or without a rule that looks at them."""
        batch = self.batches[number]
        if observer is not None:

            def see(layer: int, x: Tensor) -> None:
                some = x.flatten(0, 1).index_select(0, batch.prompt_place)
                observer.observe(layer, some, batch.where)

            with watching([ffn.module for ffn in self.ffns], see):
                return prefill(self.model, batch)
        if number in self._caches:
            return self._caches[number]
        cache = prefill(self.model, batch)
        n_bytes = sum(_cache_bytes(layer) for layer in cache.layers)
        if n_bytes <= self._cache_bytes:
            self._cache_bytes -= n_bytes
            self._caches[number] = cache
        return cache

    def dense(self, done: Done = lambda n: None) -> list[float]:
        """Give the summed loss of every piece under the dense model; reports batches done."""
        found = [0.0] * len(self.pieces)
        for number, batch in enumerate(self.batches):
            logits = follow_dense(self.model, self.ffns, self.cache(number), batch)
            for i, loss in zip(batch.members, _row_sums(logits, batch).tolist(), strict=True):
                found[i] = loss
            done(number + 1)
        return found

    def measure(
        self, settings: Sequence[Setting], done: Done = lambda n: None, *, record: bool = False
    ) -> list[Measured]:
        """Score every piece under some settings of one rule.

        Args:
            settings: Settings of one rule.
            done: Called with batches done.
            record: Whether to record how well the rule finds the oracle's neurons.

        Returns:
            What was measured under each setting.
        """
        if not settings:
            done(len(self.batches))
            return []
        rule = settings[0].rule
        assert all(setting.rule is rule for setting in settings)
        loss = torch.zeros(len(settings), len(self.pieces), dtype=torch.float64)
        read = torch.zeros(
            len(settings), len(self.pieces), len(self.ffns), len(rule.counts), dtype=torch.int64
        )
        recoveries = [rule.recovery() if record else None for _ in settings]
        for number, batch in enumerate(self.batches):
            cache = self.cache(number, observer=rule if rule.observes else None)
            sums = []
            for setting, recovery in zip(settings, recoveries, strict=True):
                rule.record(recovery)
                try:
                    logits, counts = follow_by(self.model, cache, batch, setting)
                finally:
                    rule.record(None)
                sums.append((_row_sums(logits, batch), summed(counts, batch.where)))
            members = torch.tensor(batch.members)
            loss[:, members] = torch.stack([of for of, _ in sums]).cpu()
            read[:, members] = torch.stack([of for _, of in sums]).cpu()
            done(number + 1)
        return [
            Measured(loss[i].tolist(), read[i], recovery) for i, recovery in enumerate(recoveries)
        ]

    def capture(
        self, watched: Mapping[str, Sequence[nn.Module]], done: Done = lambda n: None
    ) -> Sample:
        """Collect what the layers are given at the sparse positions of the dense model.

        Args:
            watched: Further modules whose inputs to collect, a list for each name.
            done: Called with batches done.
        """
        modules = [ffn.module for ffn in self.ffns]
        for some in watched.values():
            modules += some
        seen: list[list[Tensor]] = [[] for _ in modules]
        row: list[Tensor] = []
        position: list[Tensor] = []
        for number, batch in enumerate(self.batches):

            def see(which: int, x: Tensor, batch: Batch = batch) -> None:
                seen[which].append(batch.gather(x.detach()))

            cache = self.cache(number)
            with watching(modules, see):
                follow(self.model, cache, batch)
            members = torch.tensor(batch.members)
            row.append(members[batch.where.row.cpu()])
            position.append(batch.where.position.cpu())
            done(number + 1)
        rows, positions = torch.cat(row), torch.cat(position)
        order = self._even(rows, positions)
        device = self.ffns[0].gate.weight.device
        joined = [torch.cat(parts).index_select(0, order.to(device)) for parts in seen]
        found = {}
        start = len(self.ffns)
        for name, some in watched.items():
            found[name] = joined[start : start + len(some)]
            start += len(some)
        task = torch.tensor([TASKS.index(piece.document.group) for piece in self.pieces])
        where = Where(
            len(self.pieces),
            max(piece.n_sparse for piece in self.pieces),
            rows[order].to(device),
            positions[order].to(device),
            torch.zeros(0, dtype=torch.int64, device=device),
            task.to(device),
        )
        return Sample(joined[: len(self.ffns)], where, found)

    def _even(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Order positions by task, document and place, each task as often as the largest."""
        width = int(positions.max()) + 1
        order = (rows * width + positions).argsort()
        parts = []
        for members in by_group(self.pieces).values():
            inside = torch.zeros(len(self.pieces), dtype=torch.bool)
            inside[members] = True
            parts.append(order[inside[rows[order]]])
        most = max(len(part) for part in parts)
        return torch.cat([part[torch.arange(most) % len(part)] for part in parts])


def effort(model: nn.Module, setting: Setting, piece: Piece) -> Effort:
    """Show what every scored token of one document cost, under one setting.

    Args:
        model: The model that the rule of the setting was fitted to.
        setting: From a plan by `evaluate.planned`, or of any rule.
        piece: The document.
    """
    rule = setting.rule
    judge = Judge(model, rule.ffns, [piece])
    (batch,) = judge.batches
    cache = judge.cache(0, observer=rule if rule.observes else None)
    dense = losses(follow_dense(model, rule.ffns, cache, batch), batch)[0].cpu()
    logits, read = follow_by(model, cache, batch, setting)
    density = [
        [rule.density(ffn.shape, row) for row in counts.tolist()]
        for ffn, counts in zip(rule.ffns, read, strict=True)
    ]
    return Effort(
        ids=piece.ids[0, piece.n_prompt + 1 :],
        dense_loss=dense,
        loss=losses(logits, batch)[0].cpu(),
        entropy=torch.special.entr(logits[0].float().softmax(dim=-1)).sum(dim=-1).cpu(),
        density=torch.tensor(density).T.contiguous(),
    )


@contextlib.contextmanager
def replaced(ffns: Sequence[Ffn], forward: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Run every layer by ``forward(layer, x (n_rows, n, d))``; restore the modules at the end."""
    for ffn in ffns:
        if "forward" in vars(ffn.module) or models.is_patched(ffn.module):
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


@contextlib.contextmanager
def watching(modules: Sequence[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(number, input (n_rows, n, width))`` whenever one of the modules runs."""

    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(number, args[0])

    handles = []
    try:
        for number, module in enumerate(modules):
            handles.append(module.register_forward_pre_hook(hook(number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row_sums(logits: Tensor, batch: Batch) -> Tensor:
    """Loss of every document, ``(n_rows,)`` float64, on the device."""
    return losses(logits, batch).double().sum(dim=1)


def _cache_bytes(layer: Any) -> int:
    """Bytes of the keys and values of one layer of a cache."""
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))


# Counting


def mean_read(pieces: Sequence[Piece], read: Tensor) -> Tensor:
    """Give what a token reads of each layer, ``(n_layers, n_counts)`` float64.

    The mean over the tokens of a task, then over tasks.

    Args:
        pieces: What was scored.
        read: Sums over the tokens of each, ``(n_pieces, n_layers, n_counts)``.
    """
    return torch.stack(list(read_by_group(pieces, read).values())).mean(dim=0)


def read_by_group(pieces: Sequence[Piece], read: Tensor) -> dict[str, Tensor]:
    """Give what a token of each task reads of each layer, ``(n_layers, n_counts)`` float64."""
    found = {}
    for group, members in by_group(pieces).items():
        n_sparse = sum(pieces[i].n_sparse for i in members)
        found[group] = read[members].double().sum(dim=0) / n_sparse
    return found


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


def bootstrap(
    pairs: Mapping[str, Sequence[tuple[float, int]]], *, resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Draw documents with replacement; gives the resampled delta of every task, ``(resamples,)``.

    A pair is one document's summed delta and its number of tokens, so that long documents weigh
    as they do in the mean itself.
    """
    draws = {}
    for number, (group, members) in enumerate(pairs.items()):
        delta = np.array([pair[0] for pair in members])
        n_tokens = np.array([pair[1] for pair in members], dtype=np.float64)
        rng = np.random.default_rng([seed, number])
        pick = rng.integers(0, len(members), size=(resamples, len(members)))
        draws[group] = delta[pick].sum(axis=1) / n_tokens[pick].sum(axis=1)
    return draws


def mean_draws(draws: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Give the resampled mean over tasks."""
    found: NDArray[np.float64] = np.mean(list(draws.values()), axis=0)
    return found


def interval(draws: NDArray[np.float64]) -> list[float]:
    """Give the middle 95 % of resampled values."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def mean(values: Iterable[float]) -> float:
    """Give the mean, summed exactly."""
    members = [float(value) for value in values]
    return math.fsum(members) / len(members)
