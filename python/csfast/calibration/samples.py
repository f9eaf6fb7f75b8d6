"""Samples: sorted by task, drawn, encoded, and put into batches."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .. import models
from ..models import Encoded
from ..types import PLAIN, TASK_RULE, Document, is_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENT_TOKENS_MAX = 1024  # of one sample: twenty samples a pass at the least
_BATCH_TOKENS = 2048

Sample = Document | str | Tensor
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one task that run through the model together."""

    task: int
    ids: Tensor  # (batch, n_tokens), padded at the end
    sparse: Tensor  # (batch, n_tokens), bool: the positions that would run sparse


def listed(name: str, values: Iterable[T]) -> tuple[T, ...]:
    """Give the values of a sequence; a string is none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"[calibrate] {name} = {values!r}: want a sequence.")
    return tuple(values)


def sorted_samples(samples: Sample | Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples by task, each checked as far as that goes without a tokenizer."""
    if isinstance(samples, (str, Document, Tensor)):
        samples = [samples]
    given = listed("samples", samples)
    if not given:
        raise ValueError("[calibrate] no samples: want at least one.")
    groups: dict[str, list[Sample]] = {}
    for i, sample in enumerate(given):
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
        elif not sample.response:
            raise ValueError(f"{where}: a document of {sample.task!r} without text: want some.")
        group = sample.group if isinstance(sample, Document) else PLAIN
        if not is_task(group):
            raise ValueError(f"{where}: task {group[:80]!r}: want {TASK_RULE}.")
        groups.setdefault(group, []).append(sample)
    return dict(sorted(groups.items()))


def draw(
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
        n_words = models.vocabulary(model)
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
        encoded = models.encode(tokenizer, document, max_tokens=most)
        models.check_ids("calibrate", model, encoded.ids[0].tolist())
        return encoded
    encoded = models.encode(tokenizer, document, max_tokens=sys.maxsize)
    if encoded.n_prompt >= length:
        return None
    models.check_ids("calibrate", model, encoded.ids[0].tolist())
    return Encoded(encoded.ids[:, :length], encoded.n_prompt)


def batches_of(drawn: list[list[Encoded]]) -> list[Batch]:
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
            batches.append(Batch(task, ids, sparse))
    return batches


def positions(names: Iterable[str], batches: list[Batch], *, least: int) -> dict[str, int]:
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


def n_tokens_of(batches: list[Batch]) -> int:
    """Count tokens, padding included."""
    return sum(b.ids.numel() for b in batches)
