"""The nouns that cross borders: plain, frozen, free of torch."""

from __future__ import annotations

import dataclasses

POOLED = "pooled"
PLAIN = "text"  # the task of documents that name none
TASK_RULE = "up to 64 printable characters, the first a letter, digit or _, and not 'pooled'"
TERNARY = "ternary"
Code = int | str  # of a weight: bits, 1 to 4, or TERNARY
Turn = tuple[str, str]  # of a chat: role and text


def is_task(name: str) -> bool:
    """Say whether a name may be that of a task, the part before the slash, by `TASK_RULE`."""
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        return False
    return (name[0].isalnum() or name[0] == "_") and "/" not in name and name != POOLED


class PlanError(ValueError):
    """A plan file is damaged, or does not belong to this model."""


class SketchError(ValueError):
    """A sketch is damaged, of another format, or not of this model."""


class ResultsError(ValueError):
    """A file of results is damaged, or is not of the kind that it was given as."""


class UnsupportedModelError(ValueError):
    """The model, or its present state, is something csfast does not run on."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of one gated feed-forward layer."""

    d: int  # channels of the activation
    n_neurons: int  # rows of the gate and of the up projection


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to calibrate on or to score.

    A document with a response is a prompt (dense) and what follows it (sparse); one without is a
    plain text, sparse after its first tokens. A chat is the turns before an answer and the answer,
    which become text by the template of the model.
    """

    task: str  # "math/gsm8k": what comes before the slash is the task that it counts for
    prompt: str  # "" for a plain text or a chat
    response: str  # the text itself for a plain text
    answer: str | None = None  # the short answer, where there is one
    turns: tuple[Turn, ...] = ()  # of a chat, before the response

    @property
    def group(self) -> str:
        """The task this document counts for."""
        return self.task.split("/", 1)[0]

    @property
    def is_plain(self) -> bool:
        """Whether nothing comes before the text."""
        return not self.prompt and not self.turns
