"""What every token cost: held-out or generated text, token by token, dense loss beside sparse.

Effort is the fraction of a layer's neurons that were executed to predict a token. It comes from the
judge, which runs each position on the support that decoding would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import judge, models, patch
from ..judge import Piece, Progress
from ..plan import Plan
from ..types import POOLED, Code, Document
from . import evaluate

TOKENS_MIN = 32  # of a response that shows something, where the documents have one
HALF = "\ufffd"  # what a tokenizer gives for bytes that do not end a character


def examples(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    documents: Sequence[Document],
    *,
    density: float = 0.5,
    bits: Code = 2,
    task: str = POOLED,
    generate: bool = False,
    tokens: int = 160,
    max_tokens: int = 2048,
    retrieval_prompts: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Show the effort of every token of one text of each task.

    Args:
        model: A causal language model in evaluation mode, without csfast applied.
        tokenizer: Its tokenizer.
        plan: A plan of this model.
        documents: To choose from: of each task the first of a seeded order that is long enough.
        density: Fraction of the neurons to execute, in (0, 1].
        bits: Bits of the sensing codes, among the plan's.
        task: Whose thresholds to use, among the plan's.
        generate: Whether to show what csfast continues the prompts with, the likeliest token at
            every step, in place of the text of the documents.
        tokens: Tokens of one response to show at most, at least 3.
        max_tokens: Tokens of one document at most, its prompt included.
        retrieval_prompts: Retrieval prompts to make if the documents hold none.
        seed: Of the choice of documents and the retrieval prompts.
        progress: Called with texts done and their number.

    Returns:
        What ``csfast tokens --json`` writes; docs/schemas.md explains every key.

    Raises:
        PlanError: The plan is not for this model.
        ValueError: A number is out of range, the plan lacks the bits or the task, or nothing in the
            documents would run sparse.
    """
    if tokens < 3:
        raise ValueError(f"[tokens] tokens = {tokens}: want at least 3.")
    if not 0 < density <= 1:
        raise ValueError(f"[tokens] density = {density}: want one in (0, 1].")
    plan.check(model)
    documents = judge.with_retrieval(
        model, tokenizer, documents, n=retrieval_prompts, max_tokens=max_tokens, seed=f"{seed}"
    )
    found = judge.choose(
        "tokens",
        model,
        tokenizer,
        documents,
        tokens=4 * max(TOKENS_MIN, tokens),
        response_tokens=tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    chosen = [_long_enough([found[i] for i in of]) for of in judge.by_group(found).values()]
    if generate:
        chosen = continued(
            model, plan, chosen, density=density, bits=bits, task=task, tokens=tokens
        )
    setting = evaluate.planned(model, plan, density=density, bits=bits, task=task)
    report = progress or (lambda done, total: None)
    shown = []
    for number, piece in enumerate(chosen, 1):
        shown.append(_example(tokenizer, piece, judge.effort(model, setting, piece)))
        report(number, len(chosen))
    return {
        "examples": shown,
        "generated": generate,
        "asked_density": density,
        "bits": bits,
        "task": task,
        "seed": seed,
        "plan_hash": plan.plan_hash,
        "model_hash": plan.model.model_hash,
    }


def continued(
    model: nn.Module,
    plan: Plan,
    pieces: Sequence[Piece],
    *,
    density: float,
    bits: Code,
    task: str,
    tokens: int,
) -> list[Piece]:
    """Replace what follows the prompts by what csfast continues them with.

    Args:
        model: The plan's model, without csfast applied; so it is when this returns.
        plan: The plan.
        pieces: Whose prompts to continue.
        density: Fraction of the neurons to execute.
        bits: Bits of the sensing codes.
        task: Whose thresholds to use.
        tokens: Tokens to make at most.

    Returns:
        The prompts, each with the likeliest tokens up to the end of text, which is kept. One that
        ends before anything ran sparse is left out.
    """
    stops = models.end_tokens(model)
    patch.apply(model, plan, density=density, bits=bits, task=task)
    try:
        made = [
            Piece(piece.document, _likeliest(model, piece, stops, tokens), piece.n_prompt)
            for piece in pieces
        ]
    finally:
        patch.remove(model)
    return [piece for piece in made if piece.n_sparse > 0]


def texts(tokenizer: Any, ids: Sequence[int], n_before: int) -> list[str]:
    """Give what each token adds to the text, from the token `n_before` on.

    A token that ends within a character adds nothing; the one that completes it adds the character.
    """
    found = []
    whole = _decoded(tokenizer, ids[:n_before])
    for end in range(n_before + 1, len(ids) + 1):
        text = _decoded(tokenizer, ids[:end])
        if text.endswith(HALF) and end < len(ids):
            found.append("")
            continue
        found.append(text[len(whole) :])
        whole = text
    return found


def _long_enough(pieces: Sequence[Piece]) -> Piece:
    """The first with enough to show, or else the longest."""
    for piece in pieces:
        if piece.n_sparse >= TOKENS_MIN:
            return piece
    return max(pieces, key=lambda piece: piece.n_sparse)


@torch.no_grad()
def _likeliest(model: nn.Module, piece: Piece, stops: frozenset[int], n: int) -> Tensor:
    """The prompt and at most `n` tokens after it, ``(1, T)`` int64 on the CPU."""
    ids = piece.ids[:, : piece.n_prompt]
    step = ids.to(next(model.parameters()).device)
    found = [ids]
    name = models.cache_argument(model)
    cache = None
    for _ in range(n):
        out = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = out[name]
        step = out.logits[:, -1:].argmax(dim=-1)
        found.append(step.cpu())
        if int(step) in stops:
            break
    return torch.cat(found, dim=1)


def _example(tokenizer: Any, piece: Piece, effort: judge.Effort) -> dict[str, Any]:
    """One text as ``csfast tokens --json`` writes it."""
    ids = piece.ids[0].tolist()
    # The first token after the prompt is predicted by a position that ran dense.
    first, *rest = texts(tokenizer, ids, piece.n_prompt)
    columns = zip(
        rest,
        effort.dense_loss.tolist(),
        effort.loss.tolist(),
        effort.entropy.tolist(),
        effort.density.tolist(),
        strict=True,
    )
    return {
        "task": piece.document.group,
        "prompt": str(tokenizer.decode(ids[: piece.n_prompt], skip_special_tokens=True)),
        "first": first,
        "tokens": [
            {
                "text": text,
                "dense_loss": dense_loss,
                "loss": loss,
                "entropy": entropy,
                "density": density,
            }
            for text, dense_loss, loss, entropy, density in columns
        ],
    }


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, marks of beginning and end included."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
