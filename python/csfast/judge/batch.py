"""Documents as tokens, chosen in a seeded order, and many of them put together for one pass."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..types import TASK_RULE, Document, is_task
from . import retrieval

CHUNK = 4096  # sparse positions of one forward: 0.1 TFLOP of the demo model, 2 ms of an H100
PROMPTS = 8  # prompt positions of one forward, as a multiple of the sparse ones: no logits
SHORT_PROMPT = 128  # prompts up to this length stand together
RETRIEVAL_TOKENS = (200, 1500)  # shortest and longest retrieval prompt that is made
NONE = -100  # a target that cross entropy leaves out


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
        task: ``(n_rows,)`` int64: the task of every document, its place among `tasks`.
        tasks: Names of the tasks, in the order of `task_names`.
        n_mean: How many of them, the first, count for means.
    """

    n_rows: int
    n_columns: int
    row: Tensor
    position: Tensor
    prompt_row: Tensor
    task: Tensor
    tasks: tuple[str, ...]
    n_mean: int


def with_retrieval(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    n: int,
    max_tokens: int,
    seed: str,
) -> list[Document]:
    """Add `n` fresh retrieval prompts to documents that hold none, if the context has room.

    They stand in a row of their own: means are those of the documents (`is_made`).
    """
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
        ValueError: A number is out of range, the name of a task is not fit for one, or nothing
            would run sparse.
    """
    if not documents:
        raise ValueError(f"[{verb}] 0 documents: want at least one.")
    for name, value in (("tokens", tokens), ("response_tokens", response_tokens)):
        if value < 2:
            raise ValueError(f"[{verb}] {name} = {value}: want at least 2.")
    if seed < 0:
        raise ValueError(f"[{verb}] seed = {seed}: want 0 or more.")
    limit = context(model, max_tokens)
    by_task: dict[str, list[Document]] = {}
    for document in documents:
        if not is_task(document.group):
            raise ValueError(f"[{verb}] task {document.group[:80]!r}: want {TASK_RULE}.")
        by_task.setdefault(document.group, []).append(document)
    pieces = []
    for task, members in sorted(by_task.items()):
        random.Random(f"{seed}/{task}").shuffle(members)
        n_scored = 0
        for document in members:
            if n_scored >= tokens:
                break
            whole = encoded(tokenizer, document, limit)
            if whole is None or whole.n_sparse < 1:
                continue
            ids = whole.ids[:, : whole.n_prompt + response_tokens]
            models.check_ids(verb, model, ids[0].tolist())
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
    except models.NothingLeftError:  # its text is empty, or its prompt fills the context
        return None
    piece = Piece(document, found.ids, found.n_prompt)
    return piece if piece.n_prompt > 1 else None


def is_made(document: Document) -> bool:
    """Say whether a document is a prompt that `retrieval` made, rather than of the user's data."""
    return document.task in {f"retrieval/{kind}" for kind in retrieval.KINDS}


def task_names(pieces: Sequence[Piece]) -> tuple[tuple[str, ...], int]:
    """Give the tasks that are present, and how many of them, the first, count for means.

    Those do that have documents of the user's, by name; those of made prompts alone come after
    them, and count only where there is nothing else.
    """
    given = sorted({p.document.group for p in pieces if not is_made(p.document)})
    made = sorted({p.document.group for p in pieces} - set(given))
    return (*given, *made), len(given) or len(made)


def by_group(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """Say which pieces are of each task, in the order of `task_names`."""
    groups: dict[str, list[int]] = {task: [] for task in task_names(pieces)[0]}
    for i, piece in enumerate(pieces):
        groups[piece.document.group].append(i)
    return groups


def in_mean(pieces: Sequence[Piece]) -> list[str]:
    """Give the tasks that count for means."""
    names, n_mean = task_names(pieces)
    return list(names[:n_mean])


def outside(pieces: Sequence[Piece]) -> list[str]:
    """Give the tasks that do not count for means."""
    names, n_mean = task_names(pieces)
    return list(names[n_mean:])


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


def batches(
    pieces: Sequence[Piece],
    device: torch.device,
    *,
    chunk: int = CHUNK,
    among: Sequence[Piece] = (),
) -> list[Batch]:
    """Put documents of similar lengths together.

    Args:
        pieces: The documents.
        device: Where the tensors go.
        chunk: Sparse positions of a batch at most, padding included; a longer document is alone.
        among: Further documents whose tasks are counted through with those of the pieces.
    """
    tasks = task_names([*pieces, *among])
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
            found.append(_batch(pieces, members, device, tasks))
            members, before, columns, n_sparse = [], pieces[i].n_prompt, pieces[i].n_sparse, 0
        members, n_before, n_columns = [*members, i], before, columns
        n_sparse += pieces[i].n_sparse
    if members:
        found.append(_batch(pieces, members, device, tasks))
    return found


def _batch(
    pieces: Sequence[Piece],
    members: Sequence[int],
    device: torch.device,
    tasks: tuple[tuple[str, ...], int],
) -> Batch:
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
    task = torch.tensor([tasks[0].index(piece.document.group) for piece in some])
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
            *tasks,
        ),
    )
