"""The judge: whole documents, many at a time, each position on the support decoding would choose.

What follows the prompts of a batch of documents runs in one forward pass over the keys and values
that the prompts left when they ran dense. Attention is causal and a feed-forward layer sees one
position at a time, so this equals decoding every document token by token. See docs/quality.md.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..models import Ffn
from ..types import UnsupportedModelError
from .batch import CHUNK, NONE, Batch, Piece, Where, batches, by_group, task_names
from .rule import Recovery, Rule, Sample, Setting, replaced

LOGITS = 1 << 26  # of one forward: 256 MiB in float32
CACHE_BYTES = 1 << 31  # of prompts that are kept; what is beyond runs again for every rule
# Layers of a cache that grow by making new tensors, so that a shallow copy keeps the old ones.
# Others are written to in place: recurrent states, static and quantised keys and values.
GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")

Progress = Callable[[int, int], None]  # (done, total)
Done = Callable[[int], None]  # done so far


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums over the scored tokens of every piece under one setting.

    Attributes:
        loss: Of each piece, nats.
        read: ``(n_pieces, n_layers, n_counts)`` int64, on the CPU.
        recovery: What was recorded, if the rule keeps neurons.
        kl: Divergence from the dense model of each piece, nats, if it was recorded.
        n_agree: Tokens of each at which both find the same token likeliest, likewise.
    """

    loss: list[float]
    read: Tensor
    recovery: Recovery | None
    kl: list[float] | None
    n_agree: list[float] | None


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
    if not hasattr(cache, "layers"):
        return copy.deepcopy(cache)
    found = copy.copy(cache)
    found.layers = [
        copy.copy(layer) if type(layer).__name__ in GROWING else copy.deepcopy(layer)
        for layer in cache.layers
    ]
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


@torch.no_grad()
def check_parts(model: nn.Module, cache: Any, batch: Batch) -> None:
    """Refuse a model that does not go on from its cache as if it had run everything at once.

    Keys and values do, padded or not. What other layers of a cache keep is tried, on the document
    whose prompt is padded most.

    Raises:
        UnsupportedModelError: The logits differ by more than rounding.
    """
    layers = getattr(cache, "layers", [cache])
    kinds = sorted({type(layer).__name__ for layer in layers} - set(GROWING))
    if not kinds:
        return
    row = int(batch.prompt_mask.sum(dim=1).argmin())
    n = int((batch.target[row] != NONE).sum())
    prompt = batch.prompt[row][batch.prompt_mask[row].bool()]
    ids = torch.cat([prompt, batch.ids[row, :n]])[None]
    whole = model(input_ids=ids, use_cache=False).logits[0, len(prompt) :]
    parts = follow(model, cache, batch)[row, :n]
    gap = float((whole - parts).double().norm() / whole.double().norm())
    # Between rounding, a few times eps, and states that are lost, a good part of 1.
    limit = torch.finfo(whole.dtype).eps ** (2 / 3)
    if not gap <= limit:
        raise UnsupportedModelError(
            f"[judge] a cache with {', '.join(kinds)}: logits after padded prompts are {gap:.2g} "
            f"from those of one pass: want at most {limit:.2g}."
        )


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


def compare(dense: Tensor, sparse: Tensor, batch: Batch) -> Tensor:
    """Sum over the scored tokens of every document what two kinds of logits say of them.

    Args:
        dense: As of `follow`.
        sparse: The same, by a rule.
        batch: What was run.

    Returns:
        Dense loss, loss, ``KL(dense || sparse)`` and how often both find the same token likeliest,
        ``(n_rows, 4)`` float64, on the device.
    """
    sums = []
    for expected, found, target in zip(dense, sparse, batch.target, strict=True):
        p, q = F.log_softmax(expected.float(), dim=-1), F.log_softmax(found.float(), dim=-1)
        scored = (target != NONE).double()
        wanted = target.clamp_min(0)[:, None]
        values = [
            -p.gather(1, wanted)[:, 0],
            -q.gather(1, wanted)[:, 0],
            (p.exp() * (p - q)).sum(dim=1),
            expected.argmax(dim=1) == found.argmax(dim=1),
        ]
        sums.append(torch.stack([value.double() @ scored for value in values]))
    return torch.stack(sums)


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
        among: Sequence[Piece] = (),
    ) -> None:
        """Put the pieces into batches, tasks counted through `among` as well; nothing runs yet."""
        self.model = model
        self.ffns = ffns
        self.pieces = pieces
        self._tasks = task_names([*pieces, *among])
        words = getattr(getattr(model, "config", None), "vocab_size", 1)
        self.batches = batches(
            pieces,
            ffns[0].gate.weight.device,
            chunk=max(1, min(chunk, LOGITS // words)),
            among=among,
        )
        self._cache_bytes = cache_bytes
        self._caches: dict[int, Any] = {}
        self._is_checked = False  # that the model goes on from its cache

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
        if not self._is_checked:
            check_parts(self.model, cache, batch)
            self._is_checked = True
        n_bytes = _cache_bytes(cache)
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
            record: Whether to record how well the rule finds the oracle's neurons, and how far
                what it predicts is from what the dense model does, which takes a dense pass more.

        Returns:
            What was measured under each setting.
        """
        if not settings:
            done(len(self.batches))
            return []
        rule = settings[0].rule
        assert all(setting.rule is rule for setting in settings)
        # Loss, divergence, agreement.
        scored = torch.zeros(len(settings), len(self.pieces), 3, dtype=torch.float64)
        read = torch.zeros(
            len(settings), len(self.pieces), len(self.ffns), len(rule.counts), dtype=torch.int64
        )
        recoveries = [rule.recovery() if record else None for _ in settings]
        for number, batch in enumerate(self.batches):
            cache = self.cache(number, observer=rule if rule.observes else None)
            dense = follow_dense(self.model, self.ffns, cache, batch) if record else None
            sums = []
            for setting, recovery in zip(settings, recoveries, strict=True):
                rule.record(recovery)
                try:
                    logits, counts = follow_by(self.model, cache, batch, setting)
                finally:
                    rule.record(None)
                if dense is None:
                    of_rows = F.pad(_row_sums(logits, batch)[:, None], (0, 2))
                else:
                    of_rows = compare(dense, logits, batch)[:, 1:]
                sums.append((of_rows, summed(counts, batch.where)))
            members = torch.tensor(batch.members)
            scored[:, members] = torch.stack([of for of, _ in sums]).cpu()
            read[:, members] = torch.stack([of for _, of in sums]).cpu()
            done(number + 1)
        found = []
        for i, recovery in enumerate(recoveries):
            loss, kl, n_agree = scored[i].T.tolist()
            more = (kl, n_agree) if record else (None, None)
            found.append(Measured(loss, read[i], recovery, *more))
        return found

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
        task = torch.tensor([self._tasks[0].index(p.document.group) for p in self.pieces])
        where = Where(
            len(self.pieces),
            max(piece.n_sparse for piece in self.pieces),
            rows[order].to(device),
            positions[order].to(device),
            torch.zeros(0, dtype=torch.int64, device=device),
            task.to(device),
            *self._tasks,
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


def effort(
    model: nn.Module, setting: Setting, piece: Piece, *, among: Sequence[Piece] = ()
) -> Effort:
    """Show what every scored token of one document cost, under one setting.

    Args:
        model: The model that the rule of the setting was fitted to.
        setting: From a plan by `evaluate.planned`, or of any rule.
        piece: The document.
        among: What a rule that knows of tasks was fitted to.
    """
    rule = setting.rule
    judge = Judge(model, rule.ffns, [piece], among=among)
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


def _cache_bytes(part: Any) -> int:
    """Bytes of a cache, whatever its layers keep: keys, values, recurrent states."""
    if isinstance(part, Tensor):
        return part.numel() * part.element_size()
    if isinstance(part, Mapping):
        return sum(_cache_bytes(value) for value in part.values())
    if isinstance(part, (list, tuple)):
        return sum(_cache_bytes(value) for value in part)
    layers = getattr(part, "layers", None)
    if layers is not None:
        return _cache_bytes(layers)
    return _cache_bytes(vars(part)) if hasattr(part, "__dict__") else 0
