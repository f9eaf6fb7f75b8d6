"""Drafts without weights: what followed the last tokens when they stood in the text before."""

from __future__ import annotations

from collections.abc import Iterable

LENGTH = 3  # tokens that have to have stood there before


class Lookup:
    """A text, and where its sequences of `LENGTH` tokens ended last."""

    def __init__(self, tokens: Iterable[int]) -> None:
        """Begin with the tokens of a prompt."""
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Go on with the text."""
        for token in tokens:
            # Of all but the newest sequence: that one is what is looked for.
            if len(self._tokens) >= LENGTH:
                self._ends[tuple(self._tokens[-LENGTH:])] = len(self._tokens)
            self._tokens.append(token)

    def drafts(self, longest: int) -> list[int]:
        """Give what followed the last tokens before, at most ``longest`` tokens; perhaps none."""
        end = self._ends.get(tuple(self._tokens[-LENGTH:]))
        return [] if end is None else self._tokens[end : end + longest]
