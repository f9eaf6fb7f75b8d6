"""`Engine`: prompts in, the model's own tokens out, a round of drafts and one check at a time."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import models
from ..ops import native
from ..sketches import Sketch
from ..types import UnsupportedModelError
from .lookup import Lookup
from .weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 16  # of one step
DRAFTS = ROWS - 1  # of one round at most
_SPLIT = 256  # positions: the cache grows by as many
# How a token came about: drafted by the sketch, looked up in the text before it, the model's own
# after a draft that it did not take, or after no draft at all.
Effort = Literal["drafted", "looked up", "corrected", "dense"]
Prompt = str | Sequence[int] | Tensor
_DTYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger("csfast")


@dataclasses.dataclass(frozen=True)
class Result:
    """What follows one prompt.

    Attributes:
        ids: The new tokens, the one that ends the text included.
        text: The same as text, without marks; None where the engine has no tokenizer.
        logprobs: The model's own log-probability of every token.
        effort: How every token came about.
        finish_reason: ``"stop"`` for a token that ends a text, ``"length"`` for the most wanted,
            ``"cancelled"`` for a stream that was left before either.
        checks: Steps of the model after the prompt.
        drafted: Tokens that were drafted or looked up, kept or not.
    """

    ids: list[int]
    text: str | None
    logprobs: list[float]
    effort: list[Effort]
    finish_reason: Literal["stop", "length", "cancelled"]
    checks: int
    drafted: int


@dataclasses.dataclass(frozen=True)
class _Round:
    """What one round adds to a text."""

    ids: list[int]
    logprobs: list[float]
    effort: list[Effort]
    drafted: int


class Stream(Iterator[str]):
    """The text that follows one prompt, piece by piece as it is checked; see `Engine.stream`."""

    def __init__(
        self,
        rounds: Iterator[_Round],
        pieces: Callable[[Iterator[int]], Iterator[str]],
        result: Callable[[list[_Round]], Result],
    ) -> None:
        """Give the pieces of what rounds add; made by `Engine.stream`."""
        self._rounds: list[_Round] = []
        self._result = result
        self._pieces = pieces(self._tokens(rounds))

    def __next__(self) -> str:
        """Give the next piece."""
        return next(self._pieces)

    def result(self) -> Result:
        """Give what has been made so far; all of it once the stream is through, or left."""
        return self._result(self._rounds)

    def _tokens(self, rounds: Iterator[_Round]) -> Iterator[int]:
        """The tokens of rounds, which are kept."""
        for done in rounds:
            self._rounds.append(done)
            yield from done.ids


class Engine:
    """A model, perhaps with its sketch, ready to decode on the CPU.

    Tokens are the model's own greedy choices, bit for bit those of the engine without a sketch.
    Weights stay where the model has them; the engine adds a cache of keys and values and room for
    sixteen rows. It decodes one text at a time: threads take turns, and a stream that was left for
    another call is refused when it goes on.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        sketch: Sketch | str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        threads: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Bind a model.

        Args:
            model: In evaluation mode on the CPU, of one of `csfast.models.DECODED`; or a folder, a
                GGUF file or a name in the local cache.
            sketch: Of that model, or its folder; without one only what the text before repeats is
                drafted.
            dtype: Of the weights, float32 or bfloat16; for a model in memory it has to be its own.
            threads: That a step shares; those of torch if left out.
            tokenizer: For prompts and results as text; that of the folder if left out.

        Raises:
            FileNotFoundError: There is no such model or sketch.
            UnsupportedModelError: The engine does not run on the model.
            SketchError: The sketch is damaged, or of another model.
            TypeError: The dtype is neither of the two, or not that of the model.
            ValueError: A number is out of range.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise TypeError(f"[engine] dtype = {dtype}: want float32 or bfloat16.")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"[engine] threads = {threads!r}: want 1 or more.")
        if not isinstance(model, nn.Module):
            path = pathlib.Path(model) if isinstance(model, os.PathLike) else model
            loaded, own = models.load(path, dtype="auto" if dtype is None else dtype)
            model, tokenizer = loaded, own if tokenizer is None else tokenizer
        self._weights = Weights(
            model, sketch if isinstance(sketch, Sketch | None) else Sketch.load(sketch)
        )
        own_dtype = self._weights.decoder.dtype
        if own_dtype not in _DTYPES or dtype not in (None, own_dtype):
            wanted = "float32 or bfloat16" if dtype is None else str(dtype)
            raise TypeError(f"[engine] a model of {own_dtype}: want {wanted}.")
        if self._weights.decoder.embedding.device.type != "cpu":
            raise UnsupportedModelError(
                f"[engine] a model on {self._weights.decoder.embedding.device}: want it on the CPU."
            )
        self._threads = torch.get_num_threads() if threads is None else threads
        self.tokenizer = tokenizer
        self._ends = models.end_tokens(model)
        self._context = models.context_length(model)
        self._vocabulary = self._weights.decoder.embedding.shape[0]
        self._positions = 0
        self._turn = 0  # of texts: a stream that another call has come between may not go on
        self._lock = threading.RLock()
        self._native: Any = None
        self._bound: Any = None  # what the native engine reads, and writes to
        self.logits = torch.empty(0)  # of the last step's rows

    def needed_bytes(self, length: int) -> dict[str, int]:
        """Give what texts of a length, prompt included, take besides the model and its sketch.

        Args:
            length: Tokens.

        Returns:
            ``cache`` of keys and values, ``workspace``, ``logits`` and ``tables`` of positions.

        Raises:
            ValueError: The length is below 1, or beyond the model's context.
        """
        positions = self._rounded(length)
        decoder = self._weights.decoder
        cache, workspace = native.engine_bytes(self._weights.bound(1), 1, positions)
        kinds = {layer.kind for layer in decoder.layers}
        return {
            "cache": cache,
            "workspace": workspace,
            "logits": 4 * ROWS * self._vocabulary,
            "tables": 4 * positions * decoder.head_dim * len(kinds),
        }

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor],
        *,
        max_new_tokens: int = 128,
        longest: int = 8,
        surely: float = 0.2,
        lookup: bool = True,
    ) -> list[Result]:
        """Continue prompts, one after another, each with the tokens that the model likes best.

        Args:
            prompts: One or several: text, token ids, or tensors of them, ``(n,)`` or ``(1, n)``.
            max_new_tokens: Most tokens to make of each.
            longest: Most tokens to draft before a check, up to `DRAFTS`; 0 for the model alone.
            surely: A draft ends once the product of the probabilities that the sketch gives to its
                tokens is below this.
            lookup: Whether to draft what followed the last tokens when they stood before.

        Returns:
            What follows each, in order.

        Raises:
            ValueError: A prompt is empty, does not fit into the context with what is to come, or
                has tokens that the model does not know; or a number is out of range.
            TypeError: A prompt is of another type, or text without a tokenizer.
            NotFiniteError: The model's logits are not.
            MemoryError: There is no room for the cache.
            RuntimeError: There are no more threads to be had.
        """
        results = []
        settings = self._checked(max_new_tokens, longest, surely, lookup)
        for ids in [self._ids(prompt) for prompt in _several(prompts)]:
            with self._lock:
                rounds = list(self._rounds(ids, max_new_tokens, *settings))
            results.append(self._result(rounds, max_new_tokens))
        return results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        longest: int = 8,
        surely: float = 0.2,
        lookup: bool = True,
    ) -> Stream:
        """Continue one prompt and give the text piece by piece, as it is checked.

        Args and errors are those of `generate`; the engine needs a tokenizer.

        Returns:
            Pieces whose concatenation is the continuation, never half a character; its
            ``result()`` is what `generate` would give, of as much as there is. Going on after
            another call of the engine is a RuntimeError.
        """
        if self.tokenizer is None:
            raise TypeError("[engine] no tokenizer: want one to give text.")
        settings = self._checked(max_new_tokens, longest, surely, lookup)
        return Stream(
            self._rounds(self._ids(prompt), max_new_tokens, *settings),
            functools.partial(models.pieces, self.tokenizer, ends=self._ends),
            functools.partial(self._result, most=max_new_tokens),
        )

    def _checked(
        self, max_new_tokens: int, longest: int, surely: float, lookup: bool
    ) -> tuple[int, float, bool]:
        """The settings of a loop, after refusing what is out of range."""
        for name, value in (("max_new_tokens", max_new_tokens), ("longest", longest)):
            if type(value) is not int:
                raise TypeError(f"[generate] {name} = {value!r}: want a whole number.")
        if max_new_tokens < 1:
            raise ValueError(f"[generate] max_new_tokens = {max_new_tokens}: want at least 1.")
        if not 0 <= longest <= DRAFTS:
            raise ValueError(f"[generate] longest = {longest}: want 0 to {DRAFTS}.")
        if not 0 <= surely <= 1:
            raise ValueError(f"[generate] surely = {surely}: want 0 to 1.")
        return longest, surely, lookup

    def _rounds(
        self, prompt: list[int], n: int, longest: int, surely: float, lookup: bool
    ) -> Iterator[_Round]:
        """The continuation of a prompt, round by round; the first is the prompt's own."""
        token, logprob, turn = self._begun(prompt, n)
        yield _Round([token], [logprob], ["dense"], 0)
        left = n - 1
        text = Lookup([*prompt, token]) if lookup else Lookup([])
        most = longest if self._weights.codes else 0
        reach = longest  # of what is looked up: twice what held last time
        while left > 0 and token not in self._ends:
            given = text.drafts(min(reach, left - 1)) if lookup and longest and left > 1 else []
            with self._lock:
                if turn != self._turn:
                    raise RuntimeError(
                        "[engine] a stream that another call came between: want it read to its "
                        "end first, or an engine for each."
                    )
                made = self._native.round(0, token, given, min(most, left - 1), surely)
            ids, logprobs, sure = made
            kept = len(ids) - 1
            how: Effort = "looked up" if given else "drafted"
            last: Effort = "dense" if kept == len(sure) else "corrected"
            effort = [*([how] * kept), last]
            if given:
                reach = min(longest, 2 * kept + 1)
            end = next((i for i, new in enumerate(ids) if new in self._ends), kept) + 1
            text.extend(ids[:end])
            yield _Round(ids[:end], logprobs[:end], effort[:end], len(sure))
            token = ids[end - 1]
            left -= end

    def _begun(self, prompt: list[int], n: int) -> tuple[int, float, int]:
        """Read a prompt: the first token after it, its log-probability, the number of the text."""
        with self._lock:
            self._turn += 1
            self._make_room(len(prompt) + n)
            engine = self._native
            engine.rewind(0, 0)
            for i in range(0, len(prompt), ROWS):
                part = prompt[i : i + ROWS]
                is_last = i + ROWS >= len(prompt)
                engine.step([0] * len(part), part, len(part) - is_last, False)
            token, logprob = engine.choice((len(prompt) - 1) % ROWS)
            if logprob != logprob:
                raise native.NotFiniteError(
                    f"[engine] logits after position {len(prompt) - 1}: not finite; want a model "
                    "whose logits are."
                )
            return token, logprob, self._turn

    def _result(self, rounds: list[_Round], most: int) -> Result:
        """What rounds have made of a text of at most so many tokens."""
        new = [token for done in rounds for token in done.ids]
        ended = bool(new) and new[-1] in self._ends
        return Result(
            ids=new,
            text=self._text(new),
            logprobs=[value for done in rounds for value in done.logprobs],
            effort=[how for done in rounds for how in done.effort],
            finish_reason="stop" if ended else "length" if len(new) == most else "cancelled",
            checks=max(len(rounds) - 1, 0),
            drafted=sum(done.drafted for done in rounds),
        )

    def _make_room(self, length: int) -> None:
        """Have a cache for a text of some length."""
        positions = self._rounded(length)
        if positions <= self._positions:
            return
        sizes = self.needed_bytes(length)
        _log.info(
            "[engine] %d positions: %s.",
            positions,
            ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in sizes.items()),
        )
        self._native = self._bound = None  # before the next is made
        self._positions = 0
        try:
            bound = self._weights.bound(positions)
            cache = torch.zeros(sizes["cache"], dtype=torch.uint8)
            workspace = torch.zeros(sizes["workspace"], dtype=torch.uint8)
            self.logits = torch.zeros(ROWS, self._vocabulary)
        except RuntimeError as error:  # what torch raises on the CPU
            raise MemoryError(
                f"[engine] {sum(sizes.values())} bytes for {positions} positions: want that much "
                "memory, or a shorter prompt and fewer new tokens."
            ) from error
        self._native = native.Engine(
            bound, cache, workspace, self.logits, 1, positions, self._threads
        )
        self._bound = (bound, cache, workspace)
        self._positions = positions

    def _rounded(self, length: int) -> int:
        """Positions that a text of some length is given."""
        if length < 1 or (self._context is not None and length > self._context):
            raise ValueError(
                f"[engine] {length} tokens, prompt included: want 1 to {self._context}, the "
                "model's context."
            )
        return -(-length // _SPLIT) * _SPLIT

    def _ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TypeError("[engine] a prompt of text and no tokenizer: want token ids.")
            ids = models.prompt_ids(self.tokenizer, prompt)
        elif isinstance(prompt, Tensor):
            if prompt.is_floating_point() or prompt.dim() not in (1, 2):
                raise TypeError(
                    f"[engine] prompt {prompt.dtype} {tuple(prompt.shape)}: want whole numbers, "
                    "(n,) or (1, n)."
                )
            if prompt.dim() == 2 and prompt.shape[0] != 1:
                raise ValueError(f"[engine] prompt {tuple(prompt.shape)}: want (n,) or (1, n).")
            ids = prompt.flatten().tolist()
        else:
            ids = list(prompt)
            if any(type(token) is not int for token in ids):
                raise TypeError("[engine] prompt: want text, whole numbers or a tensor of them.")
        if not ids:
            raise ValueError("[engine] an empty prompt: want at least one token.")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            odd = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"[engine] token {odd}: want 0 to {self._vocabulary - 1}.")
        return ids

    def _text(self, ids: list[int]) -> str | None:
        """The text of some tokens, where there is a tokenizer."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _several(prompts: Any) -> list[Any]:
    """One prompt or several, as several."""
    if isinstance(prompts, (str, Tensor)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise TypeError(
            f"[generate] prompts of type {type(prompts).__name__}: want text, token ids or a "
            "tensor, or a list of those."
        )
    return [prompts] if type(prompts[0]) is int else list(prompts)
