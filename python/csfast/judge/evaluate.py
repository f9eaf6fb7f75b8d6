"""What a plan's sparsity costs: paired with the dense model, on the supports of real decoding.

The pass itself is `judge/run.py`; see docs/quality.md for what is counted.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import judge, models, ops, patch
from ..judge import (
    BYTES,
    CHUNK,
    Judge,
    Piece,
    Progress,
    Rule,
    Sample,
    Setting,
    Thresholds,
    Where,
)
from ..layer import Decision, Sensor
from ..models import Ffn
from ..plan import Plan
from ..types import POOLED, Code, Document, LayerShape
from . import retrieval, rules

RESAMPLES = 2000  # of the bootstrap: the quantiles of .025 and .975 rest on 50 draws each
SHORT_TOKENS = 16  # longest response that is compared as an answer


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    documents: Sequence[Document],
    *,
    density: float = 0.5,
    bits: Code = 2,
    block: int = 1,
    task: str = POOLED,
    tokens: int = 4000,
    response_tokens: int = 256,
    max_tokens: int = 2048,
    retrieval_prompts: int = 0,
    answers: int = 20,
    chunk: int = CHUNK,
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
        bits: Code of the sensor, among the plan's.
        block: Neurons that are kept or skipped together, among the plan's.
        task: Whose thresholds to use, among the plan's.
        tokens: Scored tokens of each task to stop at, a document more or less.
        response_tokens: Tokens of one document to score at most.
        max_tokens: Tokens of one document at most, its prompt included.
        retrieval_prompts: Retrieval prompts to make, if the documents hold none. They stand in a
            row of their own, outside the means.
        answers: Short answers of each task to decode greedily; 0 decodes none.
        chunk: Sparse positions that run together; bounds memory, changes rounding only.
        resamples: Draws of the bootstrap over documents.
        seed: Of the choice of documents, the retrieval prompts and the bootstrap.
        progress: Called with documents done and their number.

    Returns:
        What ``csfast eval --json`` writes; docs/schemas.md explains every key.

    Raises:
        PlanError: The plan is not for this model.
        ValueError: The plan does not hold what was asked for, a number is out of range, or nothing
            in the documents would run sparse.
    """
    if not 0 < density <= 1:
        raise ValueError(f"[evaluate] density = {density}: want one in (0, 1].")
    plan.check(model)
    ffns = models.find_ffns(model)
    documents = judge.with_retrieval(
        model, tokenizer, documents, n=retrieval_prompts, max_tokens=max_tokens, seed=f"{seed}"
    )
    pieces = judge.choose(
        "evaluate",
        model,
        tokenizer,
        documents,
        tokens=tokens,
        response_tokens=response_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    limit = judge.context(model, max_tokens) - 2
    quizzes = _quizzes(tokenizer, documents, limit=answers, max_tokens=limit, seed=seed)
    total = len(pieces) + len(quizzes)
    report = progress or (lambda done, total: None)
    setting = planned(model, plan, density=density, bits=bits, block=block, task=task)
    of = Judge(model, ffns, pieces, chunk=chunk, cache_bytes=0)
    sums = torch.zeros(len(pieces), 4, dtype=torch.float64)
    read = torch.zeros(len(pieces), len(ffns), len(setting.rule.counts), dtype=torch.int64)
    done = 0
    for number, batch in enumerate(of.batches):
        cache = of.cache(number)
        dense = judge.follow_dense(model, ffns, cache, batch)
        sparse, counts = judge.follow_by(model, cache, batch, setting)
        rows = torch.tensor(batch.members)
        sums[rows] = judge.compare(dense, sparse, batch).cpu()
        read[rows] = judge.summed(counts, batch.where).cpu()
        done += len(rows)
        report(done, total)
    right: dict[str, list[tuple[bool, bool]]] = {}
    if quizzes:
        patch.apply(model, plan, density=density, bits=bits, block=block, task=task)
        try:
            for number, piece in enumerate(quizzes, 1):
                pair = _decode_both(model, tokenizer, piece)
                right.setdefault(piece.document.group, []).append(pair)
                report(done + number, total)
        finally:
            patch.remove(model)
    groups, in_mean = judge.by_group(pieces), judge.in_mean(pieces)
    losses = sums.tolist()
    draws = judge.bootstrap(
        {
            group: [(losses[i][1] - losses[i][0], pieces[i].n_sparse) for i in members]
            for group, members in groups.items()
        },
        resamples=resamples,
        seed=seed,
    )
    results: dict[str, Any] = {}
    for group, members in groups.items():
        n_sparse = sum(pieces[i].n_sparse for i in members)
        dense_loss, loss, kl, n_agree = (sums[members].sum(dim=0) / n_sparse).tolist()
        judged = right.get(group)
        results[group] = {
            "dense_loss": dense_loss,
            "loss": loss,
            "delta": loss - dense_loss,
            "ci95": judge.interval(draws[group]),
            "kl": kl,
            "top1_agreement": n_agree,
            "exact_match": _share(judged, 1),
            "dense_exact_match": _share(judged, 0),
            "answers": len(judged) if judged else 0,
            "documents": len(members),
            "tokens": sum(pieces[i].n_tokens for i in members),
            "sparse_tokens": n_sparse,
        }
    mean_read = judge.mean_read(pieces, read)
    per_layer = judge.densities(setting.rule, mean_read)
    share = judge.spent(setting.rule, mean_read)
    dense_bytes = sum(judge.dense_bytes(ffn.shape) for ffn in ffns)
    rest = _rest_bytes(model, ffns)
    return {
        "tasks": results,
        "outside": judge.outside(pieces),
        "mean_delta": judge.mean(results[group]["delta"] for group in in_mean),
        "mean_ci95": judge.interval(judge.mean_draws([draws[group] for group in in_mean])),
        "density": judge.mean(per_layer),
        "density_per_layer": per_layer,
        "density_per_task_layer": {
            group: judge.densities(setting.rule, of_group)
            for group, of_group in judge.read_by_group(pieces, read).items()
        },
        "bytes_fraction": share,
        "token_bytes_fraction": (share * dense_bytes + rest) / (dense_bytes + rest),
        "asked_density": density,
        "bits": bits,
        "block": block,
        "task": task,
        "seed": seed,
        "plan_hash": plan.plan_hash,
        "model_hash": plan.model.model_hash,
    }


def planned(
    model: nn.Module,
    plan: Plan,
    *,
    density: float = 0.5,
    bits: Code = 2,
    block: int = 1,
    task: str = POOLED,
) -> Setting:
    """Give a plan at one density as a setting that the judge runs.

    Args:
        model: The plan's model.
        plan: The plan.
        density: Fraction of the neurons to execute, in (0, 1]; 1 is the dense path.
        bits: Code of the sensor, among the plan's.
        block: Neurons that are kept or skipped together, among the plan's.
        task: Whose thresholds to use, among the plan's.
    """
    rule = PlanRule(
        models.find_ffns(model), plan, density=density, bits=bits, block=block, task=task
    )
    return Setting(rule, None, density, ((),) * len(plan.layers))


class PlanRule(Rule):
    """The rule of a plan: supports of the native operations, execution masked dense.

    At density 1 nothing is sensed, as in `engine.apply`.
    """

    counts = ("neurons",)

    def __init__(
        self, ffns: Sequence[Ffn], plan: Plan, *, density: float, bits: Code, block: int, task: str
    ) -> None:
        """Take the codes of one setting of the plan."""
        super().__init__("plan", ffns)
        self._density = density
        self._bits = bits
        self._block = block
        # Of each layer sensor and neurons in the order of the blocks, and the threshold, ().
        self._layers: list[tuple[Sensor, Tensor, Tensor]] = []
        for layer, (ffn, of_plan) in enumerate(zip(ffns, plan.layers, strict=True)):
            device = ffn.gate.weight.device
            threshold = plan.threshold(layer, bits=bits, block=block, density=density, task=task)
            order = torch.arange(ffn.shape.n_neurons) if block == 1 else of_plan.order[block]
            sensor = of_plan.sensor(bits=bits, block=block, offset=ffn.offset(), device=device)
            self._layers.append((sensor, order.to(device), torch.tensor(threshold, device=device)))

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Give no thresholds: the plan holds them."""
        return [((),) * len(self.ffns) for _ in densities]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the supports of the plan."""
        ffn = self.ffns[layer]
        keep = self.supports(layer, x)
        _, a = ffn.activations(x)
        return rules.masked_down(ffn, a, keep), keep.sum(dim=1, keepdim=True)

    def supports(self, layer: int, x: Tensor) -> Tensor:
        """Give a layer's supports for inputs ``(n, d)``, a mask ``(n, n_neurons)``."""
        n_neurons = self.ffns[layer].shape.n_neurons
        if self._density == 1:
            return torch.ones(len(x), n_neurons, dtype=torch.bool, device=x.device)
        sensor, order, threshold = self._layers[layer]
        decision = Decision(threshold.expand(len(x)).contiguous(), tile_rows=self._block)
        activation = self.ffns[layer].activation
        tiles, _ = ops.select(sensor, decision, x.contiguous(), activation=activation)
        keep = torch.empty(len(x), n_neurons, dtype=torch.bool, device=x.device)
        keep[:, order] = _mask(tiles, n_neurons)
        return keep

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the codes and three rows and an index for each neuron; at density 1 the layer."""
        if self._density == 1:
            return self.dense_bytes(shape)
        return rules.planes_bytes(shape, self._bits, counts[0])


def _mask(tiles: ops.TileList, n_neurons: int) -> Tensor:
    """The neurons of a tile list, as a mask ``(batch, n_neurons)``."""
    n_tiles = tiles.tile.shape[1]
    place = torch.arange(n_tiles, device=tiles.tile.device)
    valid = place < tiles.n_tiles[:, None]
    # What is not valid is undefined: it goes to a column that is cut off.
    column = torch.where(valid, tiles.tile.long(), n_tiles)
    mask = torch.zeros(len(column), n_tiles + 1, dtype=torch.bool, device=column.device)
    mask = mask.scatter_(1, column, True)[:, :n_tiles]
    return mask.repeat_interleave(tiles.tile_rows, dim=1)[:, :n_neurons]


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
        if len(members) >= limit or document.is_plain or "\n" in document.response.strip():
            continue
        # A token is a byte at least: what is longer cannot be short, and is not worth encoding.
        if document.group != "retrieval" and len(document.response) > 16 * SHORT_TOKENS:
            continue
        piece = judge.encoded(tokenizer, document, max_tokens)
        if piece is None or piece.n_tokens < 1:
            continue
        # The end of text is not part of the answer.
        if document.group == "retrieval" or piece.n_tokens <= SHORT_TOKENS + 1:
            members.append(piece)
    return [piece for _, members in sorted(found.items()) for piece in members]


@torch.no_grad()
def _decode_both(model: nn.Module, tokenizer: Any, piece: Piece) -> tuple[bool, bool]:
    """Whether greedy decoding finds the answer, dense and with what is applied."""
    # The last prompt position gives the first token, dense as the prompt is, so it runs with the
    # one before it: a pass of two positions is not decoding.
    ids = piece.ids[:, : piece.n_prompt - 2].to(next(model.parameters()).device)
    models.check_ids("eval", model, ids[0].tolist())
    cache = None
    if ids.shape[1] > 0:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = out[models.cache_argument(model)]
    with patch.dense(model):
        dense = _greedy(model, tokenizer, cache, piece)
    sparse = _greedy(model, tokenizer, cache, piece)
    return _is_right(piece.document, dense), _is_right(piece.document, sparse)


@torch.no_grad()
def _greedy(model: nn.Module, tokenizer: Any, cache: Any, piece: Piece) -> str:
    """Decode one token at a time after the prompt, of which all but two tokens are in the cache."""
    cache = judge.copied(cache)
    ids = piece.ids[:, piece.n_prompt - 2 : piece.n_prompt].to(next(model.parameters()).device)
    name = models.cache_argument(model)
    # An answer ends as the response of a document does, or as the model ends a text.
    ends = models.end_tokens(model) | {tokenizer.eos_token_id}
    found: list[int] = []
    for _ in range(piece.n_tokens + 2):
        # Two positions are the end of the prompt.
        with patch.dense(model) if ids.shape[1] > 1 else contextlib.nullcontext():
            out = model(input_ids=ids, use_cache=True, **{name: cache})
        cache = out[name]
        ids = out.logits[:, -1:].argmax(dim=-1)
        token = int(ids)
        if token in ends:
            break
        found.append(token)
    return str(tokenizer.decode(found, skip_special_tokens=True))


def _is_right(document: Document, text: str) -> bool:
    """Whether a decoded text is the document's answer."""
    if document.group == "retrieval" and document.answer is not None:
        sample = retrieval.Sample(
            document.task, document.prompt, document.response, document.answer
        )
        return retrieval.is_correct(sample, text)
    return text.split("\n", 1)[0].strip() == document.response.strip()


def _rest_bytes(model: nn.Module, ffns: Sequence[Ffn]) -> float:
    """16-bit bytes of all other linear layers: attention and the language-model head."""
    inside = {id(linear) for ffn in ffns for linear in ffn.linears}
    return float(
        sum(
            module.weight.numel() * BYTES
            for module in model.modules()
            if isinstance(module, nn.Linear) and id(module) not in inside
        )
    )


def _share(judged: Sequence[tuple[bool, bool]] | None, which: int) -> float | None:
    """Share of right answers, or None where none was asked for."""
    return judge.mean(pair[which] for pair in judged) if judged else None
