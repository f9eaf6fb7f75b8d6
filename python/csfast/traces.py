"""Traces of rollouts: what a sketch drafted round by round, and what the model said to it.

Free of torch, so that whoever replays them needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .files import read_bounded
from .types import ResultsError, is_task

DRAFTS = 15  # of a round: the most rows that a check has beside the last token, 16 in all
_DIGITS = 6  # of a probability in a file: finer than what rounding of logits leaves


@dataclasses.dataclass(frozen=True)
class Round:
    """Drafts from one place of a text on, each after those before it.

    Attributes:
        position: Tokens of the text, its prompt included, before the first draft.
        agreed: Of every draft whether it is the model's own choice after the drafts before it.
        draft_probability: What the sketch gave to every draft, the largest that it gave to any.
        model_probability: What the model gave to it.
    """

    position: int
    agreed: tuple[bool, ...]
    draft_probability: tuple[float, ...]
    model_probability: tuple[float, ...]

    @property
    def n_accepted(self) -> int:
        """Drafts that a check keeps: those before the first that is not the model's choice."""
        return self.agreed.index(False) if False in self.agreed else len(self.agreed)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The rounds of one prompt, in turn.

    A round begins where the one before ended: after its accepted drafts and the model's own token
    that follows them.

    Attributes:
        task: Of the document that the prompt is from.
        n_prompt: Tokens of the prompt. The model's own first token follows; then rounds begin.
        rounds: At least one.
    """

    task: str
    n_prompt: int
    rounds: tuple[Round, ...]


def expected_accepted(traces: Iterable[Trace], length: int) -> float:
    """Give how many drafts a check keeps on average if a round drafts `length` tokens.

    The mean is over all rounds. The model's own token, which every check adds, is not counted.

    Raises:
        ValueError: There is no round, or rounds are shorter than `length`.
    """
    rounds = [each for trace in traces for each in trace.rounds]
    shortest = min((len(each.agreed) for each in rounds), default=0)
    if not 1 <= length <= shortest:
        raise ValueError(
            f"[traces] length = {length} of {len(rounds)} rounds of {shortest} drafts: want a "
            "length from 1 to that of the rounds."
        )
    return sum(min(each.n_accepted, length) for each in rounds) / len(rounds)


def laid_out(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Give traces as JSON has them, under the key ``prompts`` of a file of traces."""
    return [
        {
            "task": trace.task,
            "prompt_tokens": trace.n_prompt,
            "rounds": [
                {
                    "position": each.position,
                    "agreed": list(each.agreed),
                    "draft_probability": [round(p, _DIGITS) for p in each.draft_probability],
                    "model_probability": [round(p, _DIGITS) for p in each.model_probability],
                }
                for each in trace.rounds
            ],
        }
        for trace in traces
    ]


def read_traces(path: str | os.PathLike[str]) -> list[Trace]:
    """Read a file of traces, as ``csfast eval --sketch --traces`` writes it, and check it.

    Raises:
        ResultsError: The file is no JSON of traces; the error says where.
        OSError: It cannot be read.
    """
    file = pathlib.Path(path)
    try:
        found = json.loads(read_bounded(file))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"[traces] {file.name}: want a whole JSON file ({error}).") from error
    return parsed(_value(found, "prompts", list, file.name), file.name)


def parsed(prompts: Sequence[Any], where: str) -> list[Trace]:
    """Give what `laid_out` gave, checked.

    Args:
        prompts: The list.
        where: What errors call it.

    Raises:
        ResultsError: Something is missing, or is something else, or rounds do not follow each
            other.
    """
    return [_trace(prompt, f"{where}.prompts[{i}]") for i, prompt in enumerate(prompts)]


def _trace(given: Any, where: str) -> Trace:
    """One trace, its rounds each where the one before ended."""
    task = _value(given, "task", str, where)
    if not is_task(task):
        raise _wrong(task, f"{where}.task", "the name of a task")
    n_prompt = _count(given, "prompt_tokens", where)
    rounds = _value(given, "rounds", list, where)
    if not rounds:
        raise _wrong(rounds, f"{where}.rounds", "at least one")
    found: list[Round] = []
    position = n_prompt + 1
    for i, member in enumerate(rounds):
        each = _round(member, f"{where}.rounds[{i}]")
        if each.position != position:
            raise _wrong(each.position, f"{where}.rounds[{i}].position", f"{position}")
        found.append(each)
        position += each.n_accepted + 1
    return Trace(task, n_prompt, tuple(found))


def _round(given: Any, where: str) -> Round:
    """One round, its three lists of one length."""
    agreed = _value(given, "agreed", list, where)
    if not agreed or not all(type(value) is bool for value in agreed):
        raise _wrong(agreed, f"{where}.agreed", "at least one true or false, and nothing else")
    chances = []
    for key in ("draft_probability", "model_probability"):
        values = _value(given, key, list, where)
        sound = all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
        if len(values) != len(agreed) or not sound:
            wanted = f"{len(agreed)} numbers from 0 to 1"
            raise _wrong(values, f"{where}.{key}", wanted)
        chances.append(tuple(float(value) for value in values))
    return Round(_count(given, "position", where), tuple(agreed), *chances)


def _count(given: Any, key: str, where: str) -> int:
    value: int = _value(given, key, int, where)
    if isinstance(value, bool) or value < 1:
        raise _wrong(value, f"{where}.{key}", "a whole number, 1 or more")
    return value


def _value(given: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key, of one kind."""
    if not isinstance(given, Mapping) or key not in given:
        raise ResultsError(f"[traces] {where} without {key!r}: want it.")
    if not isinstance(given[key], kind):
        raise _wrong(given[key], f"{where}.{key}", f"a {kind.__name__}")
    return given[key]


def _wrong(value: Any, where: str, wanted: str) -> ResultsError:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return ResultsError(f"[traces] {where} = {text}: want {wanted}.")
