"""The nouns that cross borders: plain, frozen, free of torch."""

from __future__ import annotations

import dataclasses

TASKS = ("math", "code", "prose", "instruct", "retrieval")
POOLED = "pooled"
TERNARY = "ternary"
Code = int | str  # of a weight: bits, 1 to 4, or TERNARY


class PlanError(ValueError):
    """A plan file is damaged, or does not belong to this model."""


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
    plain text, sparse after its first tokens.
    """

    task: str  # "math/gsm8k": the part before the slash is one of TASKS
    prompt: str  # "" for a plain text
    response: str  # the text itself for a plain text
    answer: str | None = None  # the short answer, where there is one

    @property
    def group(self) -> str:
        """The task this document counts for."""
        return self.task.split("/", 1)[0]
