"""Chats as text, by the template that a checkpoint brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from ..types import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokenizer can turn messages into text."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answered: bool
) -> str:
    """Turn messages into the text that the model was trained on, by the tokenizer's own template.

    Args:
        tokenizer: With a template, which transformers runs in its sandbox.
        messages: Each with ``"role"`` and ``"content"``, the oldest first.
        answered: Whether the last message is the answer; otherwise the text ends where it begins.

    Raises:
        UnsupportedModelError: The tokenizer has no template.
        TypeError: A message is something else.
        ValueError: There is no message, or the template refuses them.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not has_template(tokenizer):
        raise UnsupportedModelError(
            f"[chat] {name}: has no chat template: want an instruct model, or a prompt to continue."
        )
    if not messages:
        raise ValueError("[chat] no messages: want at least one.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"[chat] message {message!r:.80}: want one with role and content.")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not answered,
        )
    except (jinja2.TemplateError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"[chat] {len(messages)} messages that the template of {name} refuses ({error}): want "
            "roles and contents as it takes them."
        ) from error
    return str(text)
