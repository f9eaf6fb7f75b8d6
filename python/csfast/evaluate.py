"""What sparsity costs: paired, teacher-forced, on the supports that real decoding would choose.

A document is scored in two phases that together equal decoding it token by token. The prompt runs
dense and leaves its keys and values in a cache. Everything after it runs over that cache in one
chunked pass in which every token gets a support of its own in every layer; its keys and values
come from those sparse states, as they do in decoding. The dense run differs in the second phase
only. See docs/quality.md for what is counted.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from . import baselines, engine, models, ops, tasks
from .baselines import Rule
from .models import Ffn
from .plan import Plan
from .types import POOLED, TASKS, Document

RESAMPLES = 2000  # of the bootstrap: the quantiles of .025 and .975 rest on 50 draws each
TOGETHER = 16  # settings that run as one batch: their caches of a long prompt fit in 1 GB
SHORT_TOKENS = 16  # longest response that is compared as an answer
RETRIEVAL_TOKENS = (200, 1500)  # shortest and longest retrieval prompt that is made

Progress = Callable[[int, int], None]  # (done, total)
Run = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # layer, x (n, d) -> out (n, d), read (2,)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Score:
    """Sums over the scored tokens of one piece; losses and divergence in nats."""

    dense_loss: float
    loss: float
    kl: float  # of the sparse prediction from the dense one, KL(dense || sparse)
    n_agree: int  # tokens where both find the same token likeliest
    read: Tensor  # (n_layers, 2) int64, on the CPU: input channels and neurons read


@dataclass(frozen=True)
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
    thresholds: tuple[tuple[float, ...], ...]

    def run(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run one layer, see `Rule.run`."""
        return self.rule.run(layer, x, self.thresholds[layer])


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    documents: Sequence[Document],
    *,
    density: float = 0.5,
    bits: int = 2,
    task: str = POOLED,
    tokens: int = 4000,
    response_tokens: int = 256,
    max_tokens: int = 2048,
    retrieval_prompts: int = 40,
    answers: int = 20,
    chunk: int = 512,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a plan's sparse model with the dense model on the same tokens.

    Supports come from the native operations, execution is masked dense. The model is as it was
    when this returns, or raises, or is interrupted.

    Args:
        model: A causal language model in evaluation mode, without csfast applied.
        tokenizer: Its tokenizer.
        plan: A plan of this model.
        documents: What to score; ``documents.split(..., "report")`` of a file that the plan was
            calibrated on.
        density: Fraction of the neurons to execute, in (0, 1]; 1 is the dense path.
        bits: Bits of the sensing codes, among the plan's.
        task: Whose thresholds to use, among the plan's.
        tokens: Scored tokens of each task to stop at, a document more or less.
        response_tokens: Tokens of one document to score at most.
        max_tokens: Tokens of one document at most, its prompt included.
        retrieval_prompts: Retrieval prompts to make if the documents hold none; 0 makes none.
        answers: Short answers of each task to decode greedily; 0 decodes none.
        chunk: Positions that run together; bounds memory, changes rounding only.
        resamples: Draws of the bootstrap over documents.
        seed: Of the choice of documents, the retrieval prompts and the bootstrap.
        progress: Called with documents done and their number.

    Returns:
        What ``csfast eval --json`` writes; docs/quality.md explains every key.

    Raises:
        PlanError: The plan is not for this model, or lacks the bits or the task.
        ValueError: A number is out of range, or nothing in the documents would run sparse.
    """
    _check_density("evaluate", density)
    plan.check(model)
    ffns = models.find_ffns(model)
    documents = _with_retrieval(
        model, tokenizer, documents, n=retrieval_prompts, max_tokens=max_tokens, seed=f"{seed}"
    )
    pieces = _pieces(
        "evaluate",
        model,
        tokenizer,
        documents,
        tokens=tokens,
        response_tokens=response_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    quizzes = _quizzes(
        tokenizer, documents, limit=answers, max_tokens=_context(model, max_tokens) - 2, seed=seed
    )
    total = len(pieces) + len(quizzes)
    report = progress or (lambda done, total: None)
    run = _planned(ffns, plan, density=density, bits=bits, task=task)
    scores = []
    for piece in pieces:
        scores.append(_score(model, ffns, piece, run, chunk=chunk))
        report(len(scores), total)
    right: dict[str, list[tuple[bool, bool]]] = {}
    if quizzes:
        engine.apply(model, plan, density=density, bits=bits, task=task)
        try:
            for done, piece in enumerate(quizzes, len(pieces) + 1):
                pair = _decode_both(model, tokenizer, piece)
                right.setdefault(piece.document.group, []).append(pair)
                report(done, total)
        finally:
            engine.remove(model)
    groups = _by_group(pieces)
    draws = _bootstrap(
        {
            group: [(scores[i].loss - scores[i].dense_loss, pieces[i].n_sparse) for i in members]
            for group, members in groups.items()
        },
        resamples=resamples,
        seed=seed,
    )
    results: dict[str, Any] = {}
    for group, members in groups.items():
        n_sparse = sum(pieces[i].n_sparse for i in members)
        dense_loss = sum(scores[i].dense_loss for i in members) / n_sparse
        loss = sum(scores[i].loss for i in members) / n_sparse
        judged = right.get(group)
        results[group] = {
            "dense_loss": dense_loss,
            "loss": loss,
            "delta": loss - dense_loss,
            "ci95": _interval(draws[group]),
            "kl": sum(scores[i].kl for i in members) / n_sparse,
            "top1_agreement": sum(scores[i].n_agree for i in members) / n_sparse,
            "exact_match": _share(judged, 1),
            "dense_exact_match": _share(judged, 0),
            "answers": len(judged) if judged else 0,
            "documents": len(members),
            "tokens": sum(pieces[i].n_tokens for i in members),
            "sparse_tokens": n_sparse,
        }
    read = _mean_read(groups, pieces, [score.read for score in scores])
    per_layer = [
        neurons / ffn.shape.n_neurons for (_, neurons), ffn in zip(read, ffns, strict=True)
    ]
    dense = sum(baselines.dense_bytes(ffn.shape) for ffn in ffns)
    spent = (
        dense
        if density == 1
        else sum(
            baselines.planes_bytes(ffn.shape, bits, neurons)
            for (_, neurons), ffn in zip(read, ffns, strict=True)
        )
    )
    rest = _rest_bytes(model, ffns)
    return {
        "tasks": results,
        "mean_delta": _mean(entry["delta"] for entry in results.values()),
        "mean_ci95": _interval(_mean_draws(draws)),
        "density": _mean(per_layer),
        "density_per_layer": per_layer,
        "bytes_fraction": spent / dense,
        "token_bytes_fraction": (spent + rest) / (dense + rest),
        "asked_density": density,
        "bits": bits,
        "task": task,
        "seed": seed,
        "plan_hash": plan.plan_hash,
        "model_hash": plan.model.model_hash,
    }


def ablate(
    model: nn.Module,
    tokenizer: Any,
    documents_select: Sequence[Document],
    documents_report: Sequence[Document],
    *,
    methods: Sequence[str] | None = None,
    bytes_fractions: Sequence[float] = (0.25, 0.35, 0.55, 0.75),
    tokens: int = 1500,
    calibration_tokens: int = 2000,
    response_tokens: int = 256,
    max_tokens: int = 2048,
    retrieval_prompts: int = 40,
    chunk: int = 256,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare rules that choose what to read, and plain quantisation, at equal bytes.

    Everything that is fitted or chosen is fitted and chosen on `documents_select`: operators,
    thresholds, the density that meets the bytes, which setting counts as best. The rows are
    measured on `documents_report`, paired with the dense model.

    Args:
        model: A causal language model in evaluation mode, without csfast applied; float32 for
            differences below .001.
        tokenizer: Its tokenizer.
        documents_select: What to fit and choose on.
        documents_report: What to report on.
        methods: Names, see `baselines.default_methods`, which is the default.
        bytes_fractions: Bytes to meet, as fractions of the dense 16-bit bytes of the layers.
        tokens: Scored tokens of each task to stop at; half as many for choosing.
        calibration_tokens: Tokens of each task to fit operators and thresholds to.
        response_tokens: Tokens of one document to score at most.
        max_tokens: Tokens of one document at most, its prompt included.
        retrieval_prompts: Retrieval prompts to make for each part that holds none.
        chunk: Positions that run together.
        resamples: Draws of the bootstrap over documents.
        seed: Of the choice of documents, the retrieval prompts and the bootstrap.
        progress: Called with documents done and their number, over all phases.

    Returns:
        What ``csfast ablate --json`` writes; docs/quality.md explains every key.

    Raises:
        ValueError: A method is unknown, a number is out of range, or nothing would run sparse.
    """
    for fraction in bytes_fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"[ablate] bytes fraction {fraction}: want one in (0, 1].")
    ffns = models.find_ffns(model)
    names = tuple(methods) if methods is not None else baselines.default_methods(ffns[0].shape)
    for name in names:
        baselines.family(name)
    halves = {"select": documents_select, "report": documents_report}
    with_retrieval = {
        part: _with_retrieval(
            model,
            tokenizer,
            documents,
            n=retrieval_prompts,
            max_tokens=max_tokens,
            seed=f"{seed}/{part}",
        )
        for part, documents in halves.items()
    }
    both = set(with_retrieval["select"]) & set(with_retrieval["report"])
    if both:
        raise ValueError(
            f"[ablate] {len(both)} documents in both parts: want disjoint parts, as "
            "documents.split gives them."
        )

    def pieces(documents: Sequence[Document], n: int) -> list[Piece]:
        return _pieces(
            "ablate",
            model,
            tokenizer,
            documents,
            tokens=n,
            response_tokens=response_tokens,
            max_tokens=max_tokens,
            seed=seed,
        )

    # What is fitted to some documents looks better on them: density and the best setting are chosen
    # on others.
    fitted = pieces(with_retrieval["select"][0::2], calibration_tokens)
    tried = pieces(with_retrieval["select"][1::2], max(2, tokens // 2))
    kept = pieces(with_retrieval["report"], tokens)
    # Phases in turn; a trial or final document runs every setting, hence their weight.
    weight = 20
    total = len(fitted) + weight * (len(tried) + len(kept))
    report = progress or (lambda done, total: None)

    inputs = _capture(model, ffns, fitted, chunk, lambda done: report(done, total))
    rules = baselines.build(names, ffns, inputs)
    wanted, notes = _wanted(rules, ffns, bytes_fractions)

    def measure(settings: list[Setting], members: list[Piece], before: int) -> Measured:
        start = len(fitted) + weight * before
        return _measure(
            model, ffns, members, settings, chunk, lambda done: report(start + weight * done, total)
        )

    settings = _calibrated(ffns, inputs, wanted)
    trial = measure(settings, tried, 0)
    select_rows = _rows(settings, trial, tried, ffns, resamples=0, seed=seed)
    settings = _calibrated(ffns, inputs, _corrected(settings, trial, tried, ffns))
    final = measure(settings, kept, len(tried))
    rows = _rows(settings, final, kept, ffns, resamples=resamples, seed=seed)
    for row, on_select in zip(rows, select_rows, strict=True):
        row["select_delta"] = on_select["delta"]
    groups = _by_group(kept)
    return {
        "rows": rows,
        "best": [_best(rows, fraction) for fraction in bytes_fractions],
        "notes": notes,
        "dense": {
            group: sum(final.dense[i] for i in members) / sum(kept[i].n_sparse for i in members)
            for group, members in groups.items()
        },
        "documents": {group: len(members) for group, members in groups.items()},
        "tokens": {
            group: sum(kept[i].n_tokens for i in members) for group, members in groups.items()
        },
        "sparse_tokens": {
            group: sum(kept[i].n_sparse for i in members) for group, members in groups.items()
        },
        "seed": seed,
        "model_hash": models.fingerprint(model).model_hash,
    }


# Documents


def _with_retrieval(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    n: int,
    max_tokens: int,
    seed: str,
) -> list[Document]:
    """The documents, and fresh retrieval prompts if they hold none and the context has room."""
    found = list(documents)
    shortest, longest = RETRIEVAL_TOKENS
    # Room for the response: a chain of variables with its number, about thirty tokens.
    longest = min(longest, _context(model, max_tokens) - 64)
    if not found or n == 0 or longest < shortest or any(d.group == "retrieval" for d in found):
        return found
    rng = random.Random(f"retrieval/{seed}")
    for i in range(n):
        length = round(shortest + (longest - shortest) * (i + 0.5) / n)
        kind = tasks.KINDS[i % len(tasks.KINDS)]
        sample = tasks.retrieval_sample(kind, length, rng, lambda text: len(tokenizer.encode(text)))
        found.append(Document(sample.task, sample.prompt, sample.response, sample.answer))
    return found


def _pieces(
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
    """Documents of every task in a seeded order, until enough of their tokens are scored."""
    if not documents:
        raise ValueError(f"[{verb}] 0 documents: want at least one.")
    for name, value in (("tokens", tokens), ("response_tokens", response_tokens)):
        if value < 2:
            raise ValueError(f"[{verb}] {name} = {value}: want at least 2.")
    if seed < 0:
        raise ValueError(f"[{verb}] seed = {seed}: want 0 or more.")
    context = _context(model, max_tokens)
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
            whole = _encoded(tokenizer, document, context)
            if whole is None or whole.n_sparse < 1:
                continue
            ids = whole.ids[:, : whole.n_prompt + response_tokens]
            pieces.append(Piece(document, ids, whole.n_prompt))
            n_scored += pieces[-1].n_sparse
    if not pieces:
        raise ValueError(
            f"[{verb}] {len(documents)} documents: want at least one with two tokens after its "
            f"dense part within {context} tokens, or nothing runs sparse."
        )
    return pieces


def _context(model: nn.Module, max_tokens: int) -> int:
    """Tokens that the model can see, at most `max_tokens`."""
    limit = models.context_length(model)
    return max_tokens if limit is None else min(max_tokens, limit)


def _encoded(tokenizer: Any, document: Document, max_tokens: int) -> Piece | None:
    """The document as tokens, or None if nothing of its response fits or its prompt is one token.

    A prompt of one token is decoding already: it would run sparse.
    """
    try:
        encoded = models.encode(tokenizer, document, max_tokens=max_tokens)
    except ValueError:  # its text is empty, or its prompt fills the context
        return None
    piece = Piece(document, encoded.ids, encoded.n_prompt)
    return piece if piece.n_prompt > 1 else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _by_group(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """Which pieces are of each task, in the order of `TASKS`."""
    groups: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(piece.document.group, []).append(i)
    return {task: groups[task] for task in TASKS if task in groups}


# The two phases


@contextlib.contextmanager
def _patched(ffns: Sequence[Ffn], forward: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Run every layer by `forward(layer, x (batch, n, d))`; restore the modules at the end."""
    for ffn in ffns:
        if "forward" in vars(ffn.module) or hasattr(type(ffn.module), "dense_forward"):
            raise ValueError(
                f"[evaluate] {ffn.name} has its forward replaced: want the model as it was "
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
def _running(ffns: Sequence[Ffn], runs: Sequence[Run]) -> Iterator[Tensor]:
    """Run row ``i`` of the batch by rule ``i`` in every layer.

    Gives what is read, ``(n_rules, n_layers, 2)`` int64, while it grows.
    """
    device = ffns[0].gate.weight.device
    read = torch.zeros(len(runs), len(ffns), 2, dtype=torch.int64, device=device)

    def forward(layer: int, x: Tensor) -> Tensor:
        rows = [run(layer, row) for run, row in zip(runs, x, strict=True)]
        read[:, layer] += torch.stack([seen for _, seen in rows])
        return torch.stack([out for out, _ in rows])

    with _patched(ffns, forward):
        yield read


@torch.no_grad()
def _prefill(model: nn.Module, piece: Piece) -> Any:
    """Run the prompt; gives its cache."""
    ids = piece.ids[:, : piece.n_prompt].to(_device(model))
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def _continue(
    model: nn.Module, cache: Any, piece: Piece, chunk: int, *, n_rows: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run what follows the prompt, a chunk at a time, and leave the cache as it was.

    Gives the logits of each chunk's positions, ``(n_rows, n, vocabulary)``, and the tokens that
    follow them, ``(n,)``; every row of the batch holds the same tokens.
    """
    ids = piece.ids.to(_device(model))
    last = ids.shape[1] - 1
    try:
        for start in range(piece.n_prompt, last, chunk):
            stop = min(start + chunk, last)
            rows = ids[:, start:stop].expand(n_rows, -1)
            out = model(input_ids=rows, past_key_values=cache, use_cache=True)
            yield out.logits, ids[0, start + 1 : stop + 1]
    finally:
        _crop(cache, piece.n_prompt)


def _crop(cache: Any, n_tokens: int) -> None:
    """Cut a cache back to its first tokens."""
    surplus = cache.get_seq_length() - n_tokens
    if surplus > 0:
        cache.crop(-surplus)


def _score(model: nn.Module, ffns: Sequence[Ffn], piece: Piece, run: Run, *, chunk: int) -> Score:
    """Score one piece, dense and sparse."""
    cache = _prefill(model, piece)
    dense = [logits for logits, _ in _continue(model, cache, piece, chunk)]
    sums = torch.zeros(4, dtype=torch.float64)
    with _running(ffns, [run]) as read:
        steps = _continue(model, cache, piece, chunk)
        for expected, (logits, target) in zip(dense, steps, strict=True):
            sums += _compare(expected[0], logits[0], target).cpu()
    dense_loss, loss, kl, n_agree = sums.tolist()
    return Score(dense_loss, loss, kl, round(n_agree), read[0].cpu())


def _compare(dense: Tensor, sparse: Tensor, target: Tensor) -> Tensor:
    """Dense loss, loss, divergence and agreement, summed over the rows, ``(4,)`` float64."""
    p, q = F.log_softmax(dense.float(), dim=-1), F.log_softmax(sparse.float(), dim=-1)
    return torch.stack(
        [
            -p.gather(1, target[:, None]).double().sum(),
            -q.gather(1, target[:, None]).double().sum(),
            (p.exp() * (p - q)).sum(dim=1).double().sum(),
            (dense.argmax(dim=1) == sparse.argmax(dim=1)).double().sum(),
        ]
    )


def _planned(ffns: Sequence[Ffn], plan: Plan, *, density: float, bits: int, task: str) -> Run:
    """The rule of a plan: supports as `_supports` gives them, execution masked dense."""
    supports = _supports(ffns, plan, density=density, bits=bits, task=task)

    def run(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        ffn = ffns[layer]
        _, a = ffn.activations(x)
        return baselines.masked_down(ffn, a, supports(layer, x))

    return run


def _supports(
    ffns: Sequence[Ffn], plan: Plan, *, density: float, bits: int, task: str
) -> Callable[[int, Tensor], Tensor]:
    """What gives a layer's supports for inputs ``(n, d)``, a mask ``(n, n_neurons)``.

    They come from the native operations. At density 1 nothing is sensed, as in `engine.apply`.
    """
    layers = []
    for layer, (ffn, of_plan) in enumerate(zip(ffns, plan.layers, strict=True)):
        device = ffn.gate.weight.device
        threshold = plan.threshold(layer, bits=bits, density=density, task=task)
        codes = of_plan.encode(*ffn.weights, bits=bits)
        row_scale = of_plan.row_scale[bits].to(device).contiguous()
        layers.append(
            (codes, of_plan.equal.to(device), row_scale, torch.tensor(threshold, device=device))
        )

    def supports(layer: int, x: Tensor) -> Tensor:
        n_neurons = ffns[layer].shape.n_neurons
        if density == 1:
            return torch.ones(x.shape[0], n_neurons, dtype=torch.bool, device=x.device)
        codes, equal, row_scale, threshold = layers[layer]
        thresholds = threshold.expand(x.shape[0]).contiguous()
        tiles, _ = ops.select(codes, equal, row_scale, thresholds, x.contiguous(), bits=bits)
        return _mask(tiles, n_neurons)

    return supports


def _mask(tiles: ops.TileList, n_neurons: int) -> Tensor:
    """The neurons of tiles of one row, as a mask ``(batch, n_neurons)``."""
    place = torch.arange(tiles.tile.shape[1], device=tiles.tile.device)
    valid = place < tiles.n_tiles[:, None]
    # What is not valid is undefined: it goes to a column that is cut off.
    column = torch.where(valid, tiles.tile.long(), n_neurons)
    mask = torch.zeros(len(column), n_neurons + 1, dtype=torch.bool, device=column.device)
    return mask.scatter_(1, column, True)[:, :n_neurons]


# Short answers


def _quizzes(
    tokenizer: Any, documents: Sequence[Document], *, limit: int, max_tokens: int, seed: int
) -> list[Piece]:
    """Documents whose whole response is a short answer, at most `limit` of each task."""
    found: dict[str, list[Piece]] = {}
    order = list(documents)
    random.Random(f"{seed}/answers").shuffle(order)
    for document in order:
        members = found.setdefault(document.group, [])
        if len(members) >= limit or not document.prompt or "\n" in document.response.strip():
            continue
        # A token is a byte at least: what is longer cannot be short, and is not worth encoding.
        if document.group != "retrieval" and len(document.response) > 16 * SHORT_TOKENS:
            continue
        piece = _encoded(tokenizer, document, max_tokens)
        if piece is None or piece.n_tokens < 1:
            continue
        # The end of text is not part of the answer.
        if document.group == "retrieval" or piece.n_tokens <= SHORT_TOKENS + 1:
            members.append(piece)
    return [piece for task in TASKS for piece in found.get(task, [])]


def _decode_both(model: nn.Module, tokenizer: Any, piece: Piece) -> tuple[bool, bool]:
    """Whether greedy decoding finds the answer, dense and with what is applied."""
    cache = _prefill(model, piece)
    with engine.dense(model):
        dense = _greedy(model, tokenizer, cache, piece)
    sparse = _greedy(model, tokenizer, cache, piece)
    return _is_right(piece.document, dense), _is_right(piece.document, sparse)


@torch.no_grad()
def _greedy(model: nn.Module, tokenizer: Any, cache: Any, piece: Piece) -> str:
    """Decode one token at a time after the prompt; the cache is left as it was."""
    # The last prompt position runs again to give the first token, dense as the prompt is: a pass
    # of two positions is not decoding.
    _crop(cache, piece.n_prompt - 2)
    ids = piece.ids[:, piece.n_prompt - 2 : piece.n_prompt].to(_device(model))
    found: list[int] = []
    for _ in range(piece.n_tokens + 2):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
        ids = logits.argmax(dim=-1)
        token = int(ids)
        if token == tokenizer.eos_token_id:
            break
        found.append(token)
    _crop(cache, piece.n_prompt)
    return str(tokenizer.decode(found, skip_special_tokens=True))


def _is_right(document: Document, text: str) -> bool:
    """Whether a decoded text is the document's answer."""
    if document.group == "retrieval" and document.answer is not None:
        sample = tasks.Sample(document.task, document.prompt, document.response, document.answer)
        return tasks.is_correct(sample, text)
    return text.split("\n", 1)[0].strip() == document.response.strip()


# Ablation


@dataclass(frozen=True)
class Measured:
    """Sums over the scored tokens of every piece, for every setting."""

    dense: list[float]  # of each piece
    loss: list[list[float]]  # [setting][piece]
    read: list[list[Tensor]]  # [setting][piece], (n_layers, 2) int64


def _capture(
    model: nn.Module,
    ffns: Sequence[Ffn],
    pieces: Sequence[Piece],
    chunk: int,
    done: Callable[[int], None],
) -> list[Tensor]:
    """Inputs of every layer at the positions that would run sparse, every task with equal weight.

    A task with fewer positions than the largest has its own repeated in order.
    """
    seen: list[dict[str, list[Tensor]]] = [{} for _ in ffns]
    group = ""

    def forward(layer: int, x: Tensor) -> Tensor:
        seen[layer].setdefault(group, []).append(x.detach()[0])
        return ffns[layer].dense(x)

    for count, piece in enumerate(pieces, 1):
        cache = _prefill(model, piece)
        group = piece.document.group
        with _patched(ffns, forward):
            for _ in _continue(model, cache, piece, chunk):
                pass
        done(count)
    inputs = []
    for by_group in seen:
        joined = [torch.cat(parts) for parts in by_group.values()]
        most = max(len(x) for x in joined)
        inputs.append(torch.cat([x[torch.arange(most, device=x.device) % len(x)] for x in joined]))
    return inputs


def _wanted(
    rules: Sequence[Rule], ffns: Sequence[Ffn], fractions: Sequence[float]
) -> tuple[list[tuple[Rule, float | None, float]], list[str]]:
    """Rule, target and density of every row; and a note for each target that is out of reach."""
    wanted: list[tuple[Rule, float | None, float]] = []
    notes = []
    for rule in rules:
        empty, full = _bytes_at(rule, ffns, 0.0), _bytes_at(rule, ffns, 1.0)
        if empty == full:
            wanted.append((rule, None, 1.0))
            continue
        for fraction in fractions:
            density = (fraction - empty) / (full - empty)
            if density <= 0:
                notes.append(
                    f"{rule.name} cannot reach {fraction:.2f} of the bytes: "
                    f"choosing alone costs {empty:.3f}."
                )
            else:
                wanted.append((rule, fraction, min(density, 1.0)))
    return wanted, notes


def _bytes_at(rule: Rule, ffns: Sequence[Ffn], density: float) -> float:
    """Fraction of the dense bytes that a rule reads if every layer keeps `density`."""
    spent = sum(
        rule.n_bytes(f.shape, density * f.shape.d, density * f.shape.n_neurons) for f in ffns
    )
    return spent / sum(baselines.dense_bytes(ffn.shape) for ffn in ffns)


def _calibrated(
    ffns: Sequence[Ffn],
    inputs: Sequence[Tensor],
    wanted: Sequence[tuple[Rule, float | None, float]],
) -> list[Setting]:
    """The wanted settings with their thresholds."""
    settings = []
    for rule in dict.fromkeys(rule for rule, _, _ in wanted):
        asked = [(target, density) for of, target, density in wanted if of is rule]
        with torch.no_grad():
            layers = [
                rule.thresholds(layer, x, [density for _, density in asked])
                for layer, x in enumerate(inputs)
            ]
        for i, (target, density) in enumerate(asked):
            settings.append(Setting(rule, target, density, tuple(found[i] for found in layers)))
    return settings


@torch.no_grad()
def _measure(
    model: nn.Module,
    ffns: Sequence[Ffn],
    pieces: Sequence[Piece],
    settings: Sequence[Setting],
    chunk: int,
    done: Callable[[int], None],
) -> Measured:
    """Score every piece under every setting; one piece at a time, so memory stays bounded."""
    measured = Measured([], [[] for _ in settings], [[] for _ in settings])
    observers = {id(s.rule): s.rule for s in settings if s.rule.observes}
    for count, piece in enumerate(pieces, 1):
        cache = _prefill_observed(model, ffns, piece, list(observers.values()))
        measured.dense.extend(_losses(_continue(model, cache, piece, chunk), 1))
        for start in range(0, len(settings), TOGETHER):
            some = settings[start : start + TOGETHER]
            rows = copy.deepcopy(cache)
            rows.batch_repeat_interleave(len(some))
            with _running(ffns, [setting.run for setting in some]) as read:
                steps = _continue(model, rows, piece, chunk, n_rows=len(some))
                losses = _losses(steps, len(some))
            for i, loss in enumerate(losses):
                measured.loss[start + i].append(loss)
                measured.read[start + i].append(read[i].cpu())
        done(count)
    return measured


def _prefill_observed(
    model: nn.Module, ffns: Sequence[Ffn], piece: Piece, observers: Sequence[Rule]
) -> Any:
    """Run the prompt under the eyes of the rules that look at it; gives its cache."""
    if not observers:
        return _prefill(model, piece)

    def forward(layer: int, x: Tensor) -> Tensor:
        for rule in observers:
            rule.observe(layer, x[0])
        return ffns[layer].dense(x)

    with _patched(ffns, forward):
        return _prefill(model, piece)


def _losses(steps: Iterator[tuple[Tensor, Tensor]], n_rows: int) -> list[float]:
    """Loss of every row of the batch, summed over the steps, nats."""
    total = torch.zeros(n_rows, dtype=torch.float64)
    for logits, target in steps:
        for i, row in enumerate(logits):
            total[i] += F.cross_entropy(row.float(), target, reduction="none").double().sum().cpu()
    return total.tolist()


def _corrected(
    settings: Sequence[Setting],
    trial: Measured,
    pieces: Sequence[Piece],
    ffns: Sequence[Ffn],
) -> list[tuple[Rule, float | None, float]]:
    """The settings with densities that make up for what the trial read too much or too little.

    Thresholds were calibrated on dense states; sparse states differ, and so does what is kept.
    """
    wanted: list[tuple[Rule, float | None, float]] = []
    groups = _by_group(pieces)
    for setting, read in zip(settings, trial.read, strict=True):
        density = setting.density
        if setting.target is not None and density < 1:
            spent = _spent(setting.rule, ffns, _mean_read(groups, pieces, read))
            empty = _bytes_at(setting.rule, ffns, 0.0)
            density *= (setting.target - empty) / max(spent - empty, 1e-9)
        wanted.append((setting.rule, setting.target, min(density, 1.0)))
    return wanted


def _rows(
    settings: Sequence[Setting],
    measured: Measured,
    pieces: Sequence[Piece],
    ffns: Sequence[Ffn],
    *,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row a setting, as ``csfast ablate --json`` writes it."""
    groups = _by_group(pieces)
    dense = sum(baselines.dense_bytes(ffn.shape) for ffn in ffns)
    rows = []
    for i, setting in enumerate(settings):
        pairs = {
            group: [(measured.loss[i][j] - measured.dense[j], pieces[j].n_sparse) for j in members]
            for group, members in groups.items()
        }
        per_task = {
            group: sum(delta for delta, _ in members) / sum(n for _, n in members)
            for group, members in pairs.items()
        }
        read = _mean_read(groups, pieces, measured.read[i])
        row: dict[str, Any] = {
            "method": setting.rule.name,
            "family": baselines.family(setting.rule.name),
            "target": setting.target,
            "density": _mean(
                setting.rule.density(ffn.shape, *pair) for ffn, pair in zip(ffns, read, strict=True)
            ),
            "sensor_fraction": sum(setting.rule.sensor_bytes(ffn.shape) for ffn in ffns) / dense,
            "bytes_fraction": _spent(setting.rule, ffns, read),
            "delta": _mean(per_task.values()),
            "per_task": per_task,
        }
        if resamples:
            draws = _bootstrap(pairs, resamples=resamples, seed=seed)
            row["ci95"] = _interval(_mean_draws(draws))
            row["per_task_ci95"] = {group: _interval(d) for group, d in draws.items()}
        rows.append(row)
    return rows


def _best(rows: Sequence[Mapping[str, Any]], fraction: float) -> dict[str, Any]:
    """The few-bit rule and the other selection rule that `select` preferred at one target."""
    found: dict[str, Any] = {"target": fraction}
    for key, kind in (("few_bit", "few-bit"), ("other", "selection")):
        members = [row for row in rows if row["target"] == fraction and row["family"] == kind]
        best = min(members, key=lambda row: float(row["select_delta"]), default=None)
        found[key] = None if best is None else best["method"]
        found[f"{key}_delta"] = None if best is None else best["delta"]
    ours, other = found["few_bit_delta"], found["other_delta"]
    found["ratio"] = ours / other if ours is not None and other is not None and other > 0 else None
    return found


# Counting


def _mean_read(
    groups: Mapping[str, Sequence[int]], pieces: Sequence[Piece], read: Sequence[Tensor]
) -> list[tuple[float, float]]:
    """Channels and neurons of each layer that a token reads, mean over tasks of equal weight."""
    total = torch.zeros(read[0].shape, dtype=torch.float64)
    for members in groups.values():
        n_sparse = sum(pieces[i].n_sparse for i in members)
        total += torch.stack([read[i].double() for i in members]).sum(dim=0) / n_sparse
    return [(pair[0], pair[1]) for pair in (total / len(groups)).tolist()]


def _spent(rule: Rule, ffns: Sequence[Ffn], read: Sequence[tuple[float, float]]) -> float:
    """Fraction of the dense bytes that was read."""
    spent = sum(rule.n_bytes(ffn.shape, *pair) for ffn, pair in zip(ffns, read, strict=True))
    return spent / sum(baselines.dense_bytes(ffn.shape) for ffn in ffns)


def _rest_bytes(model: nn.Module, ffns: Sequence[Ffn]) -> float:
    """16-bit bytes of all other linear layers: attention and the language-model head."""
    inside = {id(linear) for ffn in ffns for linear in ffn.linears}
    return float(
        sum(
            module.weight.numel() * baselines.BYTES
            for module in model.modules()
            if isinstance(module, nn.Linear) and id(module) not in inside
        )
    )


def _bootstrap(
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


def _mean_draws(draws: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Resampled mean over tasks."""
    mean: NDArray[np.float64] = np.mean(list(draws.values()), axis=0)
    return mean


def _interval(draws: NDArray[np.float64]) -> list[float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def _mean(values: Any) -> float:
    members = [float(value) for value in values]
    return math.fsum(members) / len(members)


def _share(judged: Sequence[tuple[bool, bool]] | None, which: int) -> float | None:
    """Share of right answers, or None where none was asked for."""
    return _mean(pair[which] for pair in judged) if judged else None


def _check_density(verb: str, density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"[{verb}] density = {density}: want one in (0, 1].")
