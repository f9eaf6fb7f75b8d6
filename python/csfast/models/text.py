"""Text in tokens, and a model run over them: whole sequences, or continued token by token."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..types import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

N_DENSE = 32  # first tokens of a plain text that run dense, as a prompt would


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A document in tokens.

    Attributes:
        ids: ``(1, n_tokens)``, int64.
        n_prompt: Positions at the start that run dense; the others run sparse.
    """

    ids: Tensor
    n_prompt: int


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, *, max_tokens: int) -> Encoded:
    """Turn a document into tokens: ``[bos] prompt response [eos]``, or ``[bos] text``.

    Prompt and response are tokenised apart, so that the border between them is one of tokens. The
    end of a text or response that is too long is cut off.

    Args:
        tokenizer: Of the model. A tokenizer without bos or eos leaves them out.
        document: What to encode.
        max_tokens: Most tokens to give.

    Raises:
        ValueError: The document is empty, or its prompt alone fills ``max_tokens``.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = _tokens(tokenizer, document.prompt)
    response = _tokens(tokenizer, document.response)
    if not response:
        raise ValueError(f"[encode] a document of {document.task!r} without text: want some.")
    if document.prompt:
        if len(bos) + len(prompt) >= max_tokens:
            raise ValueError(
                f"[encode] a prompt of {len(bos) + len(prompt)} tokens: want fewer than "
                f"{max_tokens}, so that something of the response remains."
            )
        ids = (bos + prompt + response + eos)[:max_tokens]
        n_prompt = len(bos) + len(prompt)
    else:
        ids = (bos + response)[:max_tokens]
        n_prompt = min(N_DENSE, len(ids))
    return Encoded(torch.tensor([ids], dtype=torch.int64), n_prompt)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a prompt and give the text piece by piece, as it is made.

    The tokens are those of ``model.generate`` for a model whose generation settings name no
    penalties: the likeliest at temperature 0, else drawn from the whole distribution. It runs in
    the caller's thread, so that Ctrl-C and errors come out of the iterator at once.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Of the model.
        prompt: Text to continue.
        max_new_tokens: Most tokens to make, at least 1.
        temperature: 0 for the likeliest token; else what the logits are divided by.
        seed: Of the draws.

    Yields:
        Pieces whose concatenation is the continuation; never half a character.

    Raises:
        ValueError: The prompt is empty, or does not fit into the context with what is to come, or
            a number is out of range. Raised by the call, not by the iterator.
        TypeError: An argument is of another type; likewise.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"[generate] prompt of type {type(prompt).__name__}: want text.")
    if not prompt:
        raise ValueError("[generate] an empty prompt: want text.")
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
        if type(value) is not int:
            raise TypeError(f"[generate] {name} = {value!r}: want a whole number.")
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"[generate] temperature = {temperature!r}: want a number.")
    if max_new_tokens < 1:
        raise ValueError(f"[generate] max_new_tokens = {max_new_tokens}: want at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"[generate] temperature = {temperature}: want 0 or more.")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = bos + _tokens(tokenizer, prompt)
    length = context_length(model)
    if length is not None and len(ids) + max_new_tokens > length:
        raise ValueError(
            f"[generate] a prompt of {len(ids)} tokens and {max_new_tokens} new ones: want at most "
            f"{length} together, the model's context."
        )
    return _pieces(tokenizer, _new_tokens(model, ids, max_new_tokens, temperature, seed))


def context_length(model: nn.Module) -> int | None:
    """Give how many tokens the model was made for, if its configuration says so."""
    length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


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


def cache_argument(model: nn.Module) -> str:
    """Give the name of the argument, and of the output, that holds a model's keys and values."""
    parameters = inspect.signature(type(model).forward).parameters
    # Newer transformers call it `cache`, and warn of the older name.
    return "cache" if "cache" in parameters else "past_key_values"


def _new_tokens(
    model: PreTrainedModel, ids: list[int], n: int, temperature: float, seed: int
) -> Iterator[int]:
    """Tokens that continue `ids`, up to the end-of-text mark, which is not among them."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(ends) if isinstance(ends, list) else {ends}
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
            if temperature == 0:
                step = logits.argmax(dim=-1, keepdim=True)
            else:
                chance = torch.softmax(logits / temperature, dim=-1)
                step = torch.multinomial(chance, 1, generator=draw)
            token = int(step)
        if token in stops:
            return
        yield token


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Text of the tokens so far, less what was given; held back while a character is unfinished."""
    seen: list[int] = []
    given = 0
    text = ""
    for token in tokens:
        seen.append(token)
        text = str(tokenizer.decode(seen, skip_special_tokens=True))
        if len(text) > given and not text.endswith("�"):
            yield text[given:]
            given = len(text)
    if len(text) > given:
        yield text[given:]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
