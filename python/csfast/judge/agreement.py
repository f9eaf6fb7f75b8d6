"""How closely coded weights follow the model they are of: divergence, agreement, drafts that hold.

A coded model is the dense one with some weights replaced. Both read the same texts, one at a time,
each with keys and values of its own: documents as they go on, and what the dense model itself goes
on with. Rollouts let the coded model draft on the dense model's keys and values, which the dense
model then checks. See docs/quality.md.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import judge, models, traces
from ..files import check_writable, read_bounded, write_atomic
from ..judge import Piece
from ..traces import DRAFTS, Round, Trace
from ..types import TASK_RULE, Document, PlanError, is_task

SHORTEST, LONGEST = 16, 400  # tokens of a prompt; longer ones say no more and take longer
ROWS = 32  # prompts that are continued together
_POSITIONS = 32  # compared at a time: 32 MiB of float32 for each 262,144 words and distribution
FORMAT = "csfast-agreement-1"  # of a resume file

Advance = Callable[[int, int], None]  # (done, total)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """The beginning of a document with two ways to go on.

    Attributes:
        document: What it is the beginning of.
        ids: The prompt, ``(n_prompt,)`` int64, on the CPU.
        given: What the document goes on with, ``(n,)``, at least one token.
        own: What the dense model goes on with, ``(new_tokens,)``.
    """

    document: Document
    ids: Tensor
    given: Tensor
    own: Tensor

    @property
    def task(self) -> str:
        """The task that it counts for."""
        return self.document.group


@dataclasses.dataclass(frozen=True)
class Compared:
    """Sums over the tokens of one text that were compared.

    Attributes:
        kl: ``KL(dense || coded)``, nats.
        n_agree: Positions at which both find the same token likeliest.
        delta: Loss of the coded model less that of the dense one, nats.
        n: Tokens.
    """

    kl: float
    n_agree: int
    delta: float
    n: int


def judge_weights(
    model: nn.Module,
    tokenizer: Any,
    weights: Mapping[str, Tensor],
    documents: Sequence[Document],
    *,
    drafting: Mapping[str, Tensor] | None = None,
    prompts: Sequence[Prompt] | None = None,
    per_task: int = 35,
    new_tokens: int = 96,
    rollouts: int = 12,
    resamples: int = 2000,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: Advance | None = None,
) -> tuple[dict[str, Any], list[Trace]]:
    """Compare a model whose weights are replaced with the model itself.

    Args:
        model: A causal language model in evaluation mode, without csfast applied; float32 for
            divergences below .001. What is computed is in its dtype, on its device.
        tokenizer: Its tokenizer.
        weights: What replaces parameters of the model, by their names, in their shapes. A head that
            is tied to the embedding is replaced by its own name; lookups stay the model's.
        documents: Whose beginnings are prompts; ``documents.split(..., "report")`` of a file that
            the weights were coded on.
        drafting: Weights of the model that drafts in rollouts; `weights` if left out.
        prompts: From `choose_prompts`, to compare several codes on the same; `documents`,
            `per_task`, `new_tokens` and the tokenizer are not looked at then.
        per_task: Prompts of each task, at most.
        new_tokens: Tokens that the dense model goes on with, and most that are compared of a
            document after its prompt.
        rollouts: Prompts of each task to roll out, at most; 0 for none.
        resamples: Draws of the bootstrap over documents.
        seed: Of the choice of documents and of the bootstrap.
        resume: File that keeps what is done. If it exists, the run goes on from there. It is not
            removed at the end.
        progress: Called with steps done and their number.

    Returns:
        What ``csfast eval --sketch --json`` writes, but for ``bits`` and ``levels``;
        docs/schemas.md explains every key. And the traces of the rollouts.

    Raises:
        ValueError: A number is out of range, weights do not fit, no document has a prompt of
            fitting length, or logits are not finite.
        TypeError: A weight is not floating.
        PlanError: The resume file is damaged or belongs to other arguments.
        KeyboardInterrupt: On Ctrl-C; the resume file holds all prompts that were done.
    """
    if rollouts < 0 or resamples < 1:
        raise ValueError(
            f"[eval] rollouts = {rollouts}, resamples = {resamples}: want 0 or more, and 1 or more."
        )
    twin = coded(model, weights)
    drafter = twin if drafting is None else coded(model, drafting)
    report = progress or (lambda done, total: None)
    n_known = 0
    if prompts is None:
        begun = _begun(model, tokenizer, documents, per_task, new_tokens, seed)
        n_known = len(begun)
    else:
        begun = list(prompts)
    if not begun:
        raise ValueError("[eval] 0 prompts: want at least one.")
    rolled = _first_of_each(begun, rollouts)
    total = n_known + len(begun) + DRAFTS * len(rolled)  # a rollout takes longer than a comparison
    keep = None if resume is None else pathlib.Path(resume)
    model_hash = models.fingerprint(model).model_hash
    key = ""
    if keep is not None:
        key = _key(model_hash, (weights, drafting or {}), begun, (new_tokens, rollouts))
    state = _start(keep, key)
    if prompts is None and not state.own:
        begun = continued(model, begun, new_tokens, lambda n: report(n, total))
        state.own = [prompt.own.tolist() for prompt in begun]
    elif prompts is None:
        begun = [
            dataclasses.replace(prompt, own=torch.tensor(own))
            for prompt, own in zip(begun, state.own, strict=True)
        ]
    done = n_known
    for number, prompt in enumerate(begun):
        if number == len(state.records):
            record = _Record(
                _listed(compared(model, twin, prompt.ids, prompt.given)),
                _listed(compared(model, twin, prompt.ids, prompt.own)),
                None,
            )
            if number in rolled:
                trace = rolled_out(model, drafter, prompt.ids, task=prompt.task, n=new_tokens)
                record.trace = traces.laid_out([trace])
            state.records.append(record)
            if keep is not None:
                _keep(keep, key, state)
        done += 1 + DRAFTS * (number in rolled)
        report(done, total)
    found = [
        trace
        for record in state.records
        if record.trace is not None
        for trace in traces.parsed(record.trace, "rollouts")
    ]
    pieces = [Piece(prompt.document, prompt.ids[None], len(prompt.ids)) for prompt in begun]
    results = {
        **_summary(pieces, [r.own for r in state.records], resamples=resamples, seed=seed),
        "expected_accepted": {
            f"{length}": traces.expected_accepted(found, length)
            for length in (range(1, DRAFTS + 1) if found else ())
        },
        "text": _summary(pieces, [r.given for r in state.records], resamples=resamples, seed=seed),
        "outside": judge.outside(pieces),
        "new_tokens": new_tokens,
        "rollouts": len(found),
        "seed": seed,
        "model_hash": model_hash,
    }
    return results, found


def traced(results: Mapping[str, Any], rolled: Sequence[Trace]) -> dict[str, Any]:
    """Give the traces of `judge_weights` as ``csfast eval --sketch --traces`` writes them."""
    return {
        "prompts": traces.laid_out(rolled),
        "drafts": DRAFTS,
        **{key: results[key] for key in ("new_tokens", "seed", "model_hash")},
    }


def choose_prompts(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    per_task: int = 35,
    new_tokens: int = 96,
    seed: int = 0,
    progress: Advance | None = None,
) -> list[Prompt]:
    """Take prompts of every task in a seeded order and continue them with the dense model.

    A document with a prompt has its own; of a plain text it is the first half. Prompts of
    `SHORTEST` to `LONGEST` tokens are taken, and only those that leave room in the context.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        documents: To choose from.
        per_task: Prompts of each task, at most.
        new_tokens: Tokens to go on with, and most to take of the document after its prompt.
        seed: Of the order.
        progress: Called with prompts that are continued, and their number.

    Raises:
        ValueError: A number is out of range, the name of a task is not fit for one, or no document
            has such a prompt.
    """
    begun = _begun(model, tokenizer, documents, per_task, new_tokens, seed)
    report = progress or (lambda done, total: None)
    return continued(model, begun, new_tokens, lambda n: report(n, len(begun)))


def coded(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy a model with some weights replaced; all others are the model's own tensors.

    Args:
        model: The dense model.
        weights: By the names of parameters, in their shapes; floating, taken in the parameters'
            dtype. The name of a head that is tied to the embedding unties it.

    Raises:
        ValueError: There is no such parameter, it has another shape, it is the embedding, or csfast
            is applied.
        TypeError: A weight is not floating.
    """
    for name, module in model.named_modules():
        if models.is_patched(module):
            raise ValueError(
                f"[eval] {name} has its forward replaced: want the model as it was loaded; call "
                "csfast.remove first."
            )
    own = dict(model.named_parameters(remove_duplicate=False))
    found = copy.deepcopy(model, {id(parameter): parameter for parameter in own.values()})
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for name, weight in weights.items():
        if name not in own:
            raise ValueError(f"[eval] weights of {name!r}: want the name of a parameter.")
        parent, _, leaf = name.rpartition(".")
        if model.get_submodule(parent) is embedding:
            raise ValueError(f"[eval] weights of {name!r}: want the embedding as the model has it.")
        if weight.shape != own[name].shape:
            raise ValueError(
                f"[eval] weights of {name!r} of shape {tuple(weight.shape)}: want "
                f"{tuple(own[name].shape)}."
            )
        if not weight.is_floating_point():
            raise TypeError(f"[eval] weights of {name!r} in {weight.dtype}: want them floating.")
        value = weight.detach().to(own[name].device, own[name].dtype)
        found.get_submodule(parent)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return found


@torch.no_grad()
def continued(
    model: nn.Module,
    prompts: Sequence[Prompt],
    new_tokens: int,
    done: Callable[[int], None] = lambda n: None,
) -> list[Prompt]:
    """Continue prompts with the likeliest tokens, `ROWS` prompts of similar lengths at a time.

    An end of text is never taken, so that all continuations are of one length.

    Args:
        model: The dense model.
        prompts: What to continue.
        new_tokens: Tokens to make.
        done: Called with prompts that are done.
    """
    ends = _ends(model)
    device = next(model.parameters()).device
    name = models.cache_argument(model)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    found = list(prompts)
    for start in range(0, len(order), ROWS):
        members = order[start : start + ROWS]
        width = max(len(prompts[i].ids) for i in members)
        step = torch.zeros(len(members), width, dtype=torch.int64)
        mask = torch.zeros_like(step)
        for row, i in enumerate(members):
            n = len(prompts[i].ids)
            step[row, width - n :], mask[row, width - n :] = prompts[i].ids, 1
        step, mask = step.to(device), mask.to(device)
        # What is padded takes position 0; nothing looks at it.
        position = (mask.cumsum(dim=1) - 1).clamp_min(0)
        cache = None
        made = []
        for _ in range(new_tokens):
            out = model(
                input_ids=step,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            cache = out[name]
            step = _sound(out.logits[:, -1], ends).argmax(dim=-1, keepdim=True)
            made.append(step)
            mask = torch.cat([mask, torch.ones_like(step)], dim=1)
            position = position[:, -1:] + 1
        for i, own in zip(members, torch.cat(made, dim=1).cpu(), strict=True):
            found[i] = dataclasses.replace(prompts[i], own=own)
        done(start + len(members))
    return found


@torch.no_grad()
def compared(model: nn.Module, twin: nn.Module, prompt: Tensor, text: Tensor) -> Compared:
    """Let two models read a text in one pass each and compare what they predict of it.

    Args:
        model: The dense model.
        twin: The coded model.
        prompt: ``(n_prompt,)`` int64; what follows is predicted from its last token on.
        text: ``(n,)`` int64.

    Raises:
        ValueError: Logits are not finite.
    """
    device = next(model.parameters()).device
    ids = torch.cat([prompt, text]).to(device)
    # The last token predicts nothing.
    dense, other = (
        _sound(each(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=len(text)).logits[0])
        for each in (model, twin)
    )
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part in range(0, len(text), _POSITIONS):
        rows = slice(part, part + _POSITIONS)
        p, q = F.log_softmax(dense[rows], dim=-1), F.log_softmax(other[rows], dim=-1)
        target = ids[len(prompt) :][rows, None]
        values = [
            (p.exp() * (p - q)).sum(dim=1),
            dense[rows].argmax(dim=1) == other[rows].argmax(dim=1),
            (p - q).gather(1, target)[:, 0],
        ]
        sums += torch.stack([value.double().sum() for value in values])
    kl, n_agree, delta = sums.tolist()
    return Compared(kl, round(n_agree), delta, len(text))


@torch.no_grad()
def rolled_out(
    model: nn.Module,
    drafter: nn.Module,
    prompt: Tensor,
    *,
    task: str,
    n: int,
    n_drafts: int = DRAFTS,
) -> Trace:
    """Let one model draft what the other says, round by round, on the other's keys and values.

    The dense model reads the prompt and takes its first token. In every round the drafter takes its
    likeliest tokens one after the other, on the keys and values that the dense model left; those of
    drafts are its own. Then the dense model reads the drafts in one pass. Those before the first
    that is not its choice are kept, and its own choice follows them. Both take no end of text, and
    probabilities are of what is left.

    Args:
        model: The dense model.
        drafter: A coded model with caches of the same kind.
        prompt: ``(n_prompt,)`` int64.
        task: What the prompt counts for.
        n: Tokens after the prompt to reach.
        n_drafts: Drafts of a round.

    Raises:
        ValueError: Logits are not finite.
    """
    ends = _ends(model)
    name = models.cache_argument(model)
    ids = prompt.to(next(model.parameters()).device)
    out = model(input_ids=ids[None], use_cache=True, logits_to_keep=1)
    cache = out[name]
    last = _sound(out.logits[0], ends).argmax(dim=-1)  # (1,): read by nobody yet
    position = len(prompt) + 1
    rounds: list[Round] = []
    while position < len(prompt) + n or not rounds:
        tokens, chances = [last], []
        work = judge.copied(cache)
        for _ in range(n_drafts):
            out = drafter(input_ids=tokens[-1][None], use_cache=True, **{name: work})
            work = out[name]
            logits = _sound(out.logits[0, -1:], ends)
            tokens.append(logits.argmax(dim=-1))
            chances.append(logits.softmax(dim=-1).gather(1, tokens[-1][None])[0])
        rows = torch.cat(tokens)
        out = model(input_ids=rows[None], use_cache=True, **{name: judge.copied(cache)})
        logits = _sound(out.logits[0], ends)
        best = logits.argmax(dim=-1)
        said = logits[:-1].softmax(dim=-1).gather(1, rows[1:, None])[:, 0]
        found = Round(
            position,
            tuple((rows[1:] == best[:-1]).tolist()),
            tuple(torch.cat(chances).tolist()),
            tuple(said.tolist()),
        )
        rounds.append(found)
        kept = found.n_accepted
        # Read again rather than cut off: not every cache can forget.
        out = model(
            input_ids=rows[None, : kept + 1], use_cache=True, logits_to_keep=1, **{name: cache}
        )
        cache = out[name]
        last = best[kept : kept + 1]
        position += kept + 1
    return Trace(task, len(prompt), tuple(rounds))


def _begun(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    per_task: int,
    new_tokens: int,
    seed: int,
) -> list[Prompt]:
    """The prompts that `choose_prompts` takes, not yet continued."""
    for what, value, least in (
        ("prompts", per_task, 1),
        ("new_tokens", new_tokens, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"[eval] {what} = {value}: want {least} or more.")
    room = judge.context(model, 1 << 20)
    longest = min(LONGEST, room - new_tokens - DRAFTS - 1)
    if longest < SHORTEST:
        raise ValueError(
            f"[eval] new_tokens = {new_tokens} in a context of {room} tokens: want at most "
            f"{room - SHORTEST - DRAFTS - 1}, so that prompts and drafts have room."
        )
    by_task: dict[str, list[Document]] = {}
    for document in documents:
        if not is_task(document.group):
            raise ValueError(f"[eval] task {document.group[:80]!r}: want {TASK_RULE}.")
        by_task.setdefault(document.group, []).append(document)
    found: list[Prompt] = []
    for task, members in sorted(by_task.items()):
        random.Random(f"{seed}/{task}").shuffle(members)
        some = (_prompt(model, tokenizer, d, longest, new_tokens) for d in members)
        found += itertools.islice((prompt for prompt in some if prompt is not None), per_task)
    if not found:
        raise ValueError(
            f"[eval] {len(documents)} documents: want at least one with a prompt, or the first "
            f"half of a text, of {SHORTEST} to {longest} tokens."
        )
    return found


def _prompt(
    model: nn.Module, tokenizer: Any, document: Document, longest: int, new_tokens: int
) -> Prompt | None:
    """The beginning of a document, if it is of fitting length."""
    if document.is_plain:
        half = len(document.response) // 2
        prompt, response = document.response[:half], document.response[half:]
        if not prompt.strip():
            return None
        document = Document(document.task, prompt, response)
    try:
        whole = models.encode(tokenizer, document, max_tokens=longest + new_tokens)
    except models.NothingLeftError:
        return None
    ids, n = whole.ids[0], whole.n_prompt
    if not SHORTEST <= n <= longest or len(ids) == n:
        return None
    models.check_ids("eval", model, ids.tolist())
    none = torch.zeros(0, dtype=torch.int64)
    return Prompt(document, ids[:n], ids[n : n + new_tokens], none)


def _first_of_each(prompts: Sequence[Prompt], n: int) -> frozenset[int]:
    """Places of the first `n` prompts of every task."""
    seen: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        seen.setdefault(prompt.task, []).append(place)
    return frozenset(place for members in seen.values() for place in members[:n])


def _ends(model: nn.Module) -> list[int]:
    """Tokens that end a text, of those that the model knows."""
    n_words = models.vocabulary(model)
    return sorted(end for end in models.end_tokens(model) if n_words is None or end < n_words)


def _sound(logits: Tensor, ends: Sequence[int] = ()) -> Tensor:
    """Logits in float32, without those of `ends`, after refusing what is no number."""
    found = logits.float()
    if not bool(torch.isfinite(found).all()):
        raise ValueError("[eval] logits that are not finite: want sound weights.")
    if ends:
        found = found.clone()
        found[..., list(ends)] = -torch.inf
    return found


def _listed(of: Compared) -> list[float]:
    """What a record keeps of a comparison."""
    return [of.kl, of.n_agree, of.delta, of.n]


def _summary(
    pieces: Sequence[Piece], records: Sequence[Sequence[float]], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Means by task and over tasks, with intervals; a record is as of `_listed`."""
    by_task = {
        task: [records[place] for place in members]
        for task, members in judge.by_group(pieces).items()
    }
    in_mean = judge.in_mean(pieces)
    results: dict[str, dict[str, Any]] = {task: {} for task in by_task}
    means: dict[str, Any] = {}
    for column, figure in enumerate(("kl", "top1", "delta")):
        pairs = {
            task: [(record[column], int(record[3])) for record in members]
            for task, members in by_task.items()
        }
        draws = judge.bootstrap(pairs, resamples=resamples, seed=seed)
        for task, of_task in pairs.items():
            n_tokens = sum(n for _, n in of_task)
            results[task][figure] = math.fsum(value for value, _ in of_task) / n_tokens
            results[task][f"{figure}_ci95"] = judge.interval(draws[task])
        means[figure] = judge.mean(results[task][figure] for task in in_mean)
        means[f"{figure}_ci95"] = judge.interval(judge.mean_draws([draws[t] for t in in_mean]))
    for task, members in by_task.items():
        results[task]["tokens"] = sum(int(record[3]) for record in members)
        results[task]["documents"] = len(members)
    return {"tasks": results, **means}


# What is done so far


@dataclasses.dataclass
class _Record:
    """One prompt: comparisons as of `_listed`, and its trace as of `traces.laid_out`."""

    given: list[float]
    own: list[float]
    trace: list[dict[str, Any]] | None


@dataclasses.dataclass
class _State:
    """The whole of a resume file: continuations, and prompts that are done, in turn."""

    own: list[list[int]]
    records: list[_Record]


def _key(
    model_hash: str,
    codes: Iterable[Mapping[str, Tensor]],
    prompts: Sequence[Prompt],
    settings: object,
) -> str:
    """SHA-256 over everything that the records depend on."""
    digest = hashlib.sha256(
        json.dumps([FORMAT, model_hash, repr(settings), torch.__version__]).encode()
    )
    for weights in codes:
        for name, weight in sorted(weights.items()):
            digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
            for rows in torch.split(weight.detach().contiguous(), 1024):
                digest.update(rows.cpu().view(torch.uint8).numpy().tobytes())
    for prompt in prompts:
        digest.update(json.dumps([prompt.task, len(prompt.ids), len(prompt.given)]).encode())
        for ids in (prompt.ids, prompt.given, prompt.own):
            digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _start(resume: pathlib.Path | None, key: str) -> _State:
    """The state in the resume file, or an empty one if there is no file yet."""
    if resume is None:
        return _State([], [])
    if not resume.exists():
        check_writable(resume)
        return _State([], [])
    try:
        found = json.loads(read_bounded(resume))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"[eval] {resume.name}: want a whole JSON file ({error}).") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise PlanError(f"[eval] {resume.name}: want a file of the option --resume.")
    if found.get("key") != key:
        raise PlanError(
            f"[eval] {resume.name}: was begun with another model, sketch, documents or options; "
            "want the same, or another file."
        )
    return _State(found["own"], [_Record(**record) for record in found["records"]])


def _keep(resume: pathlib.Path, key: str, state: _State) -> None:
    """Write the state, whole or not at all."""
    whole = {"format": FORMAT, "key": key, **dataclasses.asdict(state)}
    write_atomic(resume, (json.dumps(whole, allow_nan=False) + "\n").encode())
