"""Text in tokens, and a model run over them: whole sequences, or continued token by token."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..types import Document
from .chat import Message, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

N_DENSE = 32  # first tokens of a plain text that run dense, as a prompt would
_log = logging.getLogger("csfast")


class NothingLeftError(ValueError):
    """Nothing of a document would be left to score."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A document in tokens.

    Attributes:
        ids: ``(1, n_tokens)``, int64.
        n_prompt: Positions at the start that run dense; the others run sparse.
    """

    ids: Tensor
    n_prompt: int


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, continued: bool) -> list[int]:
    """Turn text into tokens as ``tokenizer(text)`` does, its marks of beginning and end included.

    Two things are left out: marks of beginning that the text has already, as chat templates give
    them, and marks of end where the text is to be continued.

    Args:
        tokenizer: Of the model.
        text: What to turn into tokens.
        continued: Whether something follows, which a mark of end would cut off.
    """
    before, ids, after = _marked(tokenizer, text)
    after = [] if continued else after[_shared(ids, after) :]
    return before[: len(before) - _shared(before, ids)] + ids + after


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, *, max_tokens: int) -> Encoded:
    """Turn a document into tokens: prompt, response and a mark of end, or the text alone.

    Marks of beginning are the tokenizer's own. Prompt and response are tokenised apart, so that the
    border between them is one of tokens; the response as what stands after the prompt, without the
    blank that some tokenizers put before every text. The end of a text or response that is too long
    is cut off.

    Turns of a chat are laid out by the tokenizer's template, and its answer with the marks that the
    template puts after it.

    Args:
        tokenizer: Of the model. One without a mark of end leaves it out.
        document: What to encode.
        max_tokens: Most tokens to give.

    Raises:
        NothingLeftError: The document is empty, or its prompt alone fills ``max_tokens``.
        ValueError: The template refuses the turns.
        UnsupportedModelError: The document is a chat, and the tokenizer has no template.
    """
    if not document.response:
        raise NothingLeftError(f"[encode] a document of {document.task!r} without text: want some.")
    if document.turns:
        return _answered(tokenizer, document, max_tokens)
    if not document.prompt:
        ids = token_ids(tokenizer, document.response, continued=False)[:max_tokens]
        return Encoded(torch.tensor([ids], dtype=torch.int64), min(N_DENSE, len(ids)))
    prompt = token_ids(tokenizer, document.prompt, continued=True)
    response = _following(tokenizer, document.prompt, document.response)
    after = _marked(tokenizer, document.prompt)[2]
    if not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    return _joined(prompt, response + after[_shared(response, after) :], max_tokens)


def _answered(tokenizer: PreTrainedTokenizerBase, document: Document, max_tokens: int) -> Encoded:
    """A chat in tokens: what the template makes of its turns, and of the answer after them."""
    turns = [{"role": role, "content": text} for role, text in document.turns]
    answer = {"role": "assistant", "content": document.response}
    before = render(tokenizer, turns, answered=False)
    whole = render(tokenizer, [*turns, answer], answered=True)
    # Some templates open an answer in another way than they show one that is given.
    response = whole[len(before) :] if whole.startswith(before) else document.response
    marked = response.rstrip()  # a break after the mark of end is no part of the answer
    after = []
    if marked.endswith(document.response.rstrip()) and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    prompt = _called(tokenizer, before, marks=False)
    return _joined(prompt, _following(tokenizer, before, marked) + after, max_tokens)


def _joined(prompt: list[int], response: list[int], max_tokens: int) -> Encoded:
    """Prompt and response, after refusing a prompt that leaves no room."""
    if len(prompt) >= max_tokens:
        raise NothingLeftError(
            f"[encode] a prompt of {len(prompt)} tokens: want fewer than {max_tokens}, so that "
            "something of the response remains."
        )
    ids = (prompt + response)[:max_tokens]
    return Encoded(torch.tensor([ids], dtype=torch.int64), len(prompt))


def check_ids(operation: str, model: nn.Module, ids: Iterable[int]) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        operation: What the error begins with.
        model: What is to be given the tokens.
        ids: Tokens.

    Raises:
        ValueError: A token is not among those of the model.
    """
    n_words = vocabulary(model)
    highest = max(ids, default=0)
    if n_words is not None and highest >= n_words:
        raise ValueError(
            f"[{operation}] token {highest} of a model whose embedding has {n_words} rows: want a "
            "smaller one; the tokenizer has tokens that the model was not made for."
        )


def end_tokens(model: nn.Module) -> frozenset[int]:
    """Give the tokens that end a text, as ``model.generate`` takes them from its settings.

    Raises:
        ValueError: They are no whole numbers.
    """
    settings = getattr(model, "generation_config", None) or getattr(model, "config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        return frozenset()
    # A number, several in a list or tuple, or either as a tensor or an array.
    several = ends.tolist() if hasattr(ends, "tolist") else ends
    several = list(several) if isinstance(several, (list, tuple)) else [several]
    if any(type(end) is not int for end in several):
        raise ValueError(f"[generate] eos_token_id = {ends!r}: want whole numbers.")
    return frozenset(several)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a prompt and give the text piece by piece, as it is made.

    The tokens are those of ``model.generate`` for a model whose generation settings name no
    penalties: the likeliest at temperature 0, else drawn from the whole distribution. It runs in
    the caller's thread, so that Ctrl-C and errors come out of the iterator at once. A continuation
    without any text is explained by a warning of the logger ``csfast``.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Of the model.
        prompt: Text to continue; or the messages of a chat, ``{"role": ..., "content": ...}``,
            which the tokenizer's own template turns into text.
        max_new_tokens: Most tokens to make, at least 1.
        temperature: 0 for the likeliest token; else what the logits are divided by.
        seed: Of the draws.

    Yields:
        Pieces whose concatenation is the continuation; never half a character.

    Raises:
        ValueError: The prompt is empty, or does not fit into the context with what is to come, or
            has tokens that the model does not know, or a number is out of range. Raised by the
            call, not by the iterator.
        UnsupportedModelError: Messages are given, and the tokenizer has no template; likewise.
        TypeError: An argument is of another type; likewise.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
        if type(value) is not int:
            raise TypeError(f"[generate] {name} = {value!r}: want a whole number.")
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"[generate] temperature = {temperature!r}: want a number.")
    if max_new_tokens < 1:
        raise ValueError(f"[generate] max_new_tokens = {max_new_tokens}: want at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"[generate] temperature = {temperature}: want 0 or more.")
    ids = prompt_ids(tokenizer, prompt)
    check_ids("generate", model, ids)
    length = context_length(model)
    if length is not None and len(ids) + max_new_tokens > length:
        raise ValueError(
            f"[generate] a prompt of {len(ids)} tokens and {max_new_tokens} new ones: want at most "
            f"{length} together, the model's context."
        )
    return pieces(
        tokenizer, _new_tokens(model, ids, max_new_tokens, temperature, seed), end_tokens(model)
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Give the tokens of a text to continue, or of a chat to answer.

    Raises:
        ValueError: There is no text, or none that gives tokens.
        UnsupportedModelError: Messages are given, and the tokenizer has no template.
        TypeError: It is neither text nor messages.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("[generate] an empty prompt: want text.")
        ids = token_ids(tokenizer, prompt, continued=True)
    elif isinstance(prompt, (list, tuple)):
        # A template has the marks that it wants, and no more: so the model was trained.
        ids = _called(tokenizer, render(tokenizer, prompt, answered=False), marks=False)
    else:
        raise TypeError(
            f"[generate] prompt of type {type(prompt).__name__}: want text, or a list of messages."
        )
    if not ids:
        raise ValueError(f"[generate] prompt {prompt!r:.80}: want text that gives tokens.")
    return ids


def context_length(model: nn.Module) -> int | None:
    """Give how many tokens the model was made for, if its configuration says so."""
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def vocabulary(model: nn.Module) -> int | None:
    """Give how many tokens the model has embeddings for, if it says so."""
    getter = getattr(model, "get_input_embeddings", None)
    weight = None if getter is None else getattr(getter(), "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0]
    size = getattr(_text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def hidden_states(model: nn.Module, ids: Tensor) -> None:
    """Run the layers of a model over whole sequences, without its output projection.

    For the hooks that watch the layers; sequences of a batch are padded at their end, which a
    causal model's earlier positions do not see.

    Args:
        model: A causal language model.
        ids: ``(batch, n_tokens)``, int64, on the model's device.
    """
    body = getattr(model, "base_model", model)
    body(input_ids=ids, use_cache=False)


def cached_tokens(cache: object) -> int:
    """Give how many tokens a model's cache holds, as far as that is known without waiting for it.

    Args:
        cache: What `cache_argument` names; None is an empty one.

    Returns:
        Tokens; 0 where the cache does not say, or says it on a GPU.
    """
    ask = getattr(cache, "get_seq_length", None)
    if ask is None:
        return 0
    try:
        length = ask()
    except ValueError:  # recurrent states alone, which have no length
        return 0
    if isinstance(length, Tensor):
        return int(length) if length.device.type == "cpu" else 0
    return int(length)


def cache_argument(model: nn.Module) -> str:
    """Give the name of the argument, and of the output, that holds a model's keys and values."""
    parameters = inspect.signature(type(model).forward).parameters
    # Newer transformers call it `cache`, and warn of the older name.
    return "cache" if "cache" in parameters else "past_key_values"


def _new_tokens(
    model: PreTrainedModel, ids: list[int], n: int, temperature: float, seed: int
) -> Iterator[int]:
    """Tokens that continue `ids`, up to and with one that ends the text."""
    ends = end_tokens(model)
    device = next(model.parameters()).device
    draw = torch.Generator(device=device).manual_seed(seed)
    step = torch.tensor([ids], device=device)
    cache_name = cache_argument(model)
    cache: dict[str, Any] = {cache_name: None}
    for _ in range(n):
        # Not around the yield: the caller's code must not run in this mode.
        with torch.inference_mode():
            out = model(input_ids=step, use_cache=True, logits_to_keep=1, **cache)
            cache[cache_name] = out[cache_name]
            logits = out.logits[:, -1].float()
            if math.isnan(float(logits.max())):
                raise ValueError("[generate] logits that are not a number: want a sound model.")
            if temperature == 0:
                step = logits.argmax(dim=-1, keepdim=True)
            else:
                chance = torch.softmax(logits / temperature, dim=-1)
                step = torch.multinomial(chance, 1, generator=draw)
            token = int(step)
        yield token
        if token in ends:
            return


def pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int], ends: frozenset[int]
) -> Iterator[str]:
    """Give text as tokens come: of those so far, less what was given; no half of a character.

    A continuation without any text is explained by a warning of the logger ``csfast``.

    Args:
        tokenizer: Of the model.
        tokens: Of the continuation.
        ends: Tokens that end it, and are no text.
    """
    seen: list[int] = []
    given = 0
    text = ""
    end = None
    for token in tokens:
        if token in ends:
            end = token
            break
        seen.append(token)
        text = str(tokenizer.decode(seen, skip_special_tokens=True))
        if len(text) > given and not text.endswith("�"):
            yield text[given:]
            given = len(text)
    if len(text) > given:
        yield text[given:]
    if not text:
        _log.warning("[generate] %s", _why_empty(tokenizer, seen, end))


def _why_empty(tokenizer: PreTrainedTokenizerBase, seen: list[int], end: int | None) -> str:
    """Say why a continuation has no text."""
    names = [str(tokenizer.convert_ids_to_tokens(token)) for token in seen[:4]]
    if end is not None:
        names.append(str(tokenizer.convert_ids_to_tokens(end)))
    if not seen:
        return f"no text: the first token, {names[0]!r}, ends it."
    return f"no text: tokens without any came first: {len(seen)}, such as {', '.join(names)}."


def _called(tokenizer: PreTrainedTokenizerBase, text: str, *, marks: bool) -> list[int]:
    """What the tokenizer gives when it is called, with or without the marks that it adds."""
    # Not verbose: how long a text may be is the model's affair.
    return list(tokenizer(text, add_special_tokens=marks, verbose=False)["input_ids"])


def _marked(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[int], list[int]]:
    """The tokens of a text between those that the tokenizer adds before and after it."""
    ids, whole = (_called(tokenizer, text, marks=marks) for marks in (False, True))
    n_added = len(whole) - len(ids)
    places = [i for i in range(n_added + 1) if whole[i : i + len(ids)] == ids]
    if not places:
        return [], whole, []
    # Several places only for a text that is nothing but marks: behind that of the beginning.
    begun = [i for i in places if i and whole[i - 1] == tokenizer.bos_token_id]
    start = [*begun, places[0]][0]
    return whole[:start], ids, whole[start + len(ids) :]


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens at the end of the first are those at the beginning of the second."""
    most = min(len(first), len(second))
    return next((n for n in range(most, 0, -1) if first[-n:] == second[:n]), 0)


def _following(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Tokens of a text that stands after another.

    Where a token of both together spans the border, a line break stands for what is before.
    """
    for lead in (before, "\n"):
        first, whole = (_called(tokenizer, part, marks=False) for part in (lead, lead + text))
        if whole[: len(first)] == first and len(whole) > len(first):
            return whole[len(first) :]
    return _called(tokenizer, text, marks=False)


def _text_config(model: nn.Module) -> Any:
    """The configuration of the part that reads text, where that is one of several."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return config if getter is None else getter()
