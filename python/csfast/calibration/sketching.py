"""From a model and sample texts to a sketch: second moments, rotation, codes, layer by layer.

Every pass over the texts takes the second moments of the inputs of as many layers as fit, then
their matrices are coded one layer after another, each into a file of its own. Where an average of
bits is shared out, every matrix is coded once before, to see what that costs. What was interrupted
goes on after the last file that is whole, with the same bytes as without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import container, models, ops, sketches
from ..codes import feedback, rotation, trellis
from ..files import write_atomic
from ..models import KINDS, Kind, Stacked
from ..sketches import Level, Matrix, Sketch
from ..types import SketchError
from .passes import undisturbed
from .samples import Sample, draw, sorted_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bits = str | float | Mapping[str, Sequence[int]]
Progress = Callable[[int, int], None]
_T = TypeVar("_T")

DEFAULT = "3+3,head=4+2"
TOKENS_MAX = 32_768  # of calibration text, as `calibrate` takes
PASSES = 2  # of the codes of a level, with the steps that the last one's codes want
LEVELS_MAX = 4
AVERAGES = (2.0, 5.0)  # that can be asked for
_MOMENT_BYTES = 1 << 30  # of second moments at a time
_CHUNK = 1024  # rows of a moment that are rotated at a time
_ROWS = 8192  # of a weight, likewise
_GROUPS: dict[str, tuple[Kind, ...]] = {
    "all": KINDS,
    **sketches.PARTS,
    **{str(kind): (kind,) for kind in KINDS},
}
# What coding at so many bits leaves of the variance of normal draws, for the share of bits.
_LEFT = {2: 0.080, 3: 0.0226, 4: 0.0070, 5: 0.0019}
_CODES = {2: (2,), 3: (3,), 4: (4,), 5: (4, 1)}  # the codes that a first level of so many bits is
_HEAD: tuple[int, ...] = (4, 2)  # levels of the head where an average of the layers is asked for
_TRIAL_TOKENS = 4096  # that say what coding a matrix costs
_TRIAL_LENGTH = 256  # of a text, at most
_SHARES = "shares.json"  # how an average was shared out, while the sketch is being made
_OWN = re.compile(r"sketch\.json|shares\.json|layer-\d{5}\.safetensors|head\.safetensors")
_AVERAGE = re.compile(r"(\d*\.\d+)((?:\+[1-4])*)")


@dataclasses.dataclass(frozen=True)
class Levels:
    """How a matrix is coded.

    Attributes:
        bits: Of each code.
        base: Codes that the first level is.
    """

    bits: tuple[int, ...]
    base: int = 1


@dataclasses.dataclass(frozen=True)
class Average:
    """Bits of a first level that are shared out over the matrices of the layers.

    Attributes:
        bits: Most bits a weight, on average.
        after: Bits of the levels after it, of every matrix.
        head: Levels of the head.
    """

    bits: float
    after: tuple[int, ...] = ()
    head: tuple[int, ...] = _HEAD


_TORN = re.compile(r"\.csfast-[0-9a-f]{16}\.tmp")  # what a killed run was writing


class _Enough(Exception):
    """All that is wanted of a pass has been seen."""


def parse_bits(text: str) -> dict[str, tuple[int, ...]]:
    """Read levels of bits by what a matrix is.

    Args:
        text: ``"3"``, ``"3+3"``, or such for parts, divided by commas and later ones overruling:
            ``"3+3,down=4+2,head=4+2"``. Parts are all, ffn, attention and the kinds of matrices.

    Returns:
        The levels of each kind.

    Raises:
        ValueError: The text is something else, or leaves a kind without.
    """
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, _, levels = part.strip().rpartition("=")
        name = name or "all"
        if name not in _GROUPS or not re.fullmatch(r"[1-4](\+[1-4]){0,3}", levels):
            raise ValueError(
                f"[sketch] bits = {part.strip()!r}: want 1 to 4 levels of 1 to 4 bits such as 3 or "
                f"3+3, of {', '.join(_GROUPS)} such as head=4+2, or an average such as 2.6."
            )
        for kind in _GROUPS[name]:
            found[kind] = tuple(int(n) for n in levels.split("+"))
    missing = [kind for kind in KINDS if kind not in found]
    if missing:
        raise ValueError(f"[sketch] bits = {text!r}: want levels of {missing[0]} as well.")
    return found


def parse_average(text: str) -> Average | None:
    """Read an average of bits: ``"2.6"``, ``"2.6+3"`` with a level after it, ``"2.6,head=4+2"``.

    Returns:
        What is asked for, or None if the text does not begin with a number with a point.

    Raises:
        ValueError: It does, and something is out of range.
    """
    first, *others = (part.strip() for part in text.split(","))
    matched = _AVERAGE.fullmatch(first)
    if matched is None:
        return None
    bits = float(matched[1])
    after = tuple(int(n) for n in matched[2].split("+")[1:])
    low, high = AVERAGES
    if not low <= bits <= high:
        raise ValueError(f"[sketch] bits = {bits}: want an average from {low:g} to {high:g}.")
    if len(after) > LEVELS_MAX - 2:
        raise ValueError(f"[sketch] bits = {first!r}: want at most {LEVELS_MAX - 2} levels more.")
    head = _HEAD
    for other in others:
        if not other.startswith("head="):
            raise ValueError(f"[sketch] bits = {other!r}: want head=, as an average is shared out.")
        head = parse_bits(f"3,{other}")["head"]
    return Average(bits, after, head)


def check_bits(text: str) -> str:
    """Refuse what `make` does not take as bits.

    Raises:
        ValueError: It is neither levels nor an average.
    """
    if parse_average(text) is None:
        parse_bits(text)
    return text


@undisturbed()
def make(
    model: nn.Module,
    samples: Sample | Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    out: str | os.PathLike[str],
    bits: Bits = DEFAULT,
    resume: bool = False,
    progress: Progress | None = None,
    seed: int = 0,
    max_tokens: int = TOKENS_MAX,
) -> Sketch:
    """Make a sketch of a model: few-bit codes of every linear map and the head.

    Inputs are rotated and weights coded by trellises with error feedback on the texts. The model is
    left as it was. Equal arguments on one machine give equal bytes, interrupted or not.
    docs/sketch.md says what time and memory that takes.

    Args:
        model: A causal language model of one of `models.FAMILIES`, without csfast applied.
        samples: Documents, strings or token ids ``(1, T)``, as `calibrate` takes them. One token is
            enough to run, though not to be good: what texts do not show is coded as if all inputs
            mattered alike.
        tokenizer: Of the model; needed unless all samples are token ids.
        out: The folder, made if it is not there.
        bits: Levels by kind of matrix, see `parse_bits`; or by name of matrix, all of them; or a
            average of the first levels of all matrices but the head, see `parse_average`, or the
            number alone: those get more bits whose codes change the model's answers most. That
            takes a pass backwards, and the memory of training the model.
        resume: Go on with what is in the folder.
        progress: Called with steps done and their number.
        seed: Of the draw of samples and of the signs.
        max_tokens: Most tokens of text.

    Returns:
        The sketch, as it was written.

    Raises:
        ValueError: There is no text, a weight or an activation is not finite, or an option is out
            of range.
        UnsupportedModelError: The model is of another family, or quantised.
        SketchError: The folder has parts of another sketch.
    """
    folder = pathlib.Path(out)
    stacks = models.find_linears(model)
    drawn = draw(sorted_samples(samples), model, tokenizer, max_tokens, seed)
    texts = [encoded.ids for taken in drawn for encoded in taken]
    if not texts:
        raise ValueError("[sketch] no text of more than a few tokens: want at least one sample.")
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(ids.numpy().tobytes() + b"|")
    average, each = _asked(bits, stacks)  # before anything is written
    _want_finite(stacks)
    layers = _by_layer(stacks)
    asked = bits if isinstance(bits, (str, float, int)) else {k: list(v) for k, v in bits.items()}
    settings = {
        "bits": asked,
        "max_tokens": max_tokens,
        "seed": seed,
        "n_tokens": sum(ids.shape[1] for ids in texts),
        "texts_sha256": digest.hexdigest(),
        "device": stacks[0].linears[0].weight.device.type,
        "threads": torch.get_num_threads(),
    }
    model_hash = models.hash_of(stacks)
    head = {"format": sketches.FORMAT, "model_hash": model_hash, "settings": settings}
    key = container.sha256_of(container.canonical(head).encode())
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder, layers, key, resume=resume)
    groups = _groups(layers)
    shares = None if average is None else _shares(folder, key)
    waiting = [group for group in groups if any(name not in done for name in group)]
    is_new = average is not None and shares is None
    tried = [
        (group, of)
        for group in (groups if is_new else [])
        if (of := [s for name in group for s in layers[name] if s.kind != "head"])
    ]
    is_one = len(groups) == 1 and is_new  # whose moments stay for the codes
    total = (0 if is_one else len(waiting)) * len(texts)
    total += sum(len(stacks) for name, stacks in layers.items() if name not in done)
    trials = _trials(texts)
    total += sum(len(texts) + len(trials) + len(of) for _, of in tried)
    steps = 0

    def advance() -> None:
        nonlocal steps
        steps += 1
        if progress is not None:
            progress(steps, total)

    if shares is not None:
        each = shares
    elif average is not None:
        n = 2 if average.bits < 3 else 3
        cost: dict[str, float] = {}
        for group, of in tried:
            moments = _moments(model, [s for name in group for s in layers[name]], texts, advance)
            seen = dict(moments) if is_one else moments
            cost.update(_costs(model, of, seen, trials, n, seed, advance))
        each = shared(average, stacks, cost, n)
        _keep_shares(folder, key, each)
    for group in groups:
        if all(name in done for name in group):
            continue
        if not is_one:
            moments = _moments(model, [s for name in group for s in layers[name]], texts, advance)
        for name in group:
            if name in done:
                continue
            matrices = _coded(layers[name], moments, each, seed, advance)
            part = {"format": sketches.FORMAT, "key": key}
            raw = container.pack(sketches.packed(matrices), part)
            write_atomic(folder / name, raw)
            done[name] = container.sha256_of(raw)
    fields: dict[str, Any] = {
        **head,
        "key": key,
        "model_type": models.family_of(model),
        "tables": sketches.tables(),
        "matrices": {
            s.name: {
                "rows": s.rows,
                "cols": s.cols,
                "bits": list(each[s.name].bits),
                "base": each[s.name].base,
            }
            for s in stacks
        },
        "files": {name: done[name] for name in layers},
    }
    write_atomic(folder / sketches.INDEX, sketches.index_of(fields))
    (folder / _SHARES).unlink(missing_ok=True)
    return Sketch.load(folder)


def is_begun(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a sketch, or parts of one."""
    path = pathlib.Path(folder)
    return path.is_dir() and any(_OWN.fullmatch(entry.name) for entry in path.iterdir())


def clear(folder: str | os.PathLike[str]) -> None:
    """Remove a sketch from a folder; what else is there stays."""
    for entry in sorted(pathlib.Path(folder).iterdir()):
        if _OWN.fullmatch(entry.name) or _TORN.fullmatch(entry.name):
            entry.unlink()


def _want_finite(stacks: list[Stacked]) -> None:
    """Refuse a weight that is not finite, by name, before a pass over texts meets it."""
    for stack in stacks:
        for name, linear in zip(stack.parameters, stack.linears, strict=True):
            if not bool(torch.isfinite(linear.weight.detach()).all()):
                raise ValueError(f"[sketch] {name}: not finite; want finite weights.")


def _by_layer(stacks: list[Stacked]) -> dict[str, list[Stacked]]:
    """Matrices by the file that they are in."""
    layers: dict[str, list[Stacked]] = {}
    for stack in stacks:
        number = stack.name.split(".")[1] if "." in stack.name else ""
        name = f"layer-{int(number):05d}.safetensors" if number else "head.safetensors"
        layers.setdefault(name, []).append(stack)
    return layers


def _done(
    folder: pathlib.Path, layers: Mapping[str, Any], key: str, *, resume: bool
) -> dict[str, str]:
    """The files that are whole, with their SHA-256."""
    if not resume and is_begun(folder):
        raise SketchError(
            f"[sketch] {str(folder)!r}: has a sketch; want resume, or another folder."
        )
    for entry in folder.iterdir():
        if _TORN.fullmatch(entry.name):
            entry.unlink()
    done: dict[str, str] = {}
    for name in layers:
        if not (folder / name).exists():
            continue
        try:
            _, fields = sketches.read_part(folder / name)
        except SketchError:  # a disk that lied; it is made anew
            continue
        if fields.get("key") != key:
            raise SketchError(
                f"[sketch] {name}: begun with another model, text or settings; want the same to "
                "resume."
            )
        done[name] = fields["sha256"]
    return done


def _groups(layers: Mapping[str, list[Stacked]]) -> list[list[str]]:
    """As many files at a time as second moments fit."""
    groups: list[list[str]] = []
    room = 0
    for name, stacks in layers.items():
        size = sum(4 * stack.cols**2 for stack in stacks)
        if not groups or size > room:
            groups.append([])
            room = _MOMENT_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _moments(
    model: nn.Module, stacks: list[Stacked], texts: list[Tensor], advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Second moments of the inputs of matrices, ``(cols, cols)`` float32, by name."""
    device = stacks[0].linears[0].weight.device
    moments = {s.name: torch.zeros(s.cols, s.cols, device=device) for s in stacks}
    last = stacks[-1]

    def watch(stack: Stacked) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            x = stack.inputs(given)
            moments[stack.name].addmm_(x.T, x)
            if stack is last:
                raise _Enough

        return see

    with contextlib.ExitStack() as hooks:
        for stack in stacks:
            module = stack.linears[0] if stack.norm is None else stack.norm
            hook = module.register_forward_pre_hook(watch(stack), with_kwargs=True)
            hooks.callback(hook.remove)
        n_tokens = 0
        for ids in texts:
            n_tokens += ids.shape[1]
            with contextlib.suppress(_Enough):
                models.hidden_states(model, ids.to(device))
            advance()
    for name, moment in moments.items():
        moment /= n_tokens
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(f"[sketch] {name}: its inputs are not finite; want a sound model.")
    return moments


def _coded(
    stacks: list[Stacked],
    moments: dict[str, Tensor],
    each: Mapping[str, Levels],
    seed: int,
    advance: Callable[[], None],
) -> list[Matrix]:
    """The matrices of a file, several at a time: a search of paths has one thread."""

    def job(stack: Stacked) -> Callable[[], Matrix]:
        moment = moments.pop(stack.name)
        return lambda: code(stack, moment, each[stack.name], seed)

    return _side_by_side(stacks, job, advance)


def _side_by_side(
    stacks: list[Stacked], job: Callable[[Stacked], Callable[[], _T]], advance: Callable[[], None]
) -> list[_T]:
    """Do a job for every matrix, several at a time, and be gone at once if interrupted.

    What is in the middle of a search of paths then ends by itself, and is thrown away: threads of
    `concurrent.futures` would be waited for.
    """
    is_cuda = stacks[0].linears[0].weight.is_cuda
    if is_cuda:  # torch loads its linear algebra at the first call, which two threads may not be
        torch.linalg.cholesky(torch.eye(1, device=stacks[0].linears[0].weight.device))
    # Largest first, or the last one runs alone.
    left = [(stack, job(stack)) for stack in sorted(stacks, key=lambda s: s.rows * s.cols)]
    found: dict[str, _T] = {}
    failed: dict[str, Exception] = {}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work() -> None:
        while True:
            try:
                stack, call = left.pop()
            except IndexError:
                return
            try:
                found[stack.name] = call()
            except (ValueError, RuntimeError, MemoryError) as error:
                failed[stack.name] = error  # for the thread that waits, which raises it
            finally:
                ended.put(stack.name)

    for _ in range(min(len(stacks), len(left) if is_cuda else torch.get_num_threads())):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in stacks:
            name = ended.get()
            if name not in found:
                raise failed.get(name, RuntimeError(f"[sketch] {name}: its thread ended."))
            advance()
    finally:
        left.clear()
    return [found[stack.name] for stack in stacks]


@contextlib.contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Run what is launched within beside what other threads launch, and wait for it."""
    if device.type != "cuda":
        yield
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@undisturbed()
def code(stack: Stacked, moment: Tensor, levels: Levels, seed: int = 0) -> Matrix:
    """Code one matrix.

    Args:
        stack: The matrix.
        moment: Second moment of its inputs, ``(cols, cols)``, float32.
        levels: How.
        seed: Of the signs.
    """
    with _stream_of_its_own(moment.device):
        weight = stack.weight()
        turn, there, rotated, factor = _turned(moment, weight, seed)
        left = _rotated(there, weight)
        coded = []
        for n in levels.bits:
            codes, value, step = _level(left, rotated, factor, n, PASSES)
            left.addcmul_(step[:, None], value, value=-1)
            coded.append(Level(n, codes.cpu(), step.bfloat16().cpu()))
    return Matrix(stack.name, stack.rows, stack.cols, turn, tuple(coded), levels.base)


@undisturbed()
def _error_of(stack: Stacked, moment: Tensor, bits: int, seed: int) -> Tensor:
    """What a trial of coding a matrix leaves of it, ``(rows, cols)``, as its own inputs meet it."""
    with _stream_of_its_own(moment.device):
        weight = stack.weight()
        _, there, rotated, factor = _turned(moment, weight, seed)
        left = _rotated(there, weight)
        _, value, step = _level(left, rotated, factor, bits, 1)
        error = there.undo(left.addcmul_(step[:, None], value, value=-1))
        gain = stack.gain()
        return error if gain is None else torch.where(gain == 0, 0.0, error / gain)


def _level(
    left: Tensor, moment: Tensor, factor: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a level, the values that they stand for, and the steps."""
    step = (left.square().mean(1).sqrt() * trellis.UNIT[bits]).bfloat16().float()
    for _ in range(passes):
        codes, value = ops.encode(left, factor, step, bits=bits)
        value = value.float()
        step = _fitted(left, value, moment, step)
    return codes, value, step


def _rotated(turn: rotation.Rotation, weight: Tensor) -> Tensor:
    """Rotate a weight in its place."""
    for part in torch.split(weight, _ROWS):
        part.copy_(turn.weight(part))
    return weight


# Factors of float64 are the most that coding holds: one at a time, whatever is side by side.
_FACTORS = threading.Lock()


def _turned(
    moment: Tensor, weight: Tensor, seed: int
) -> tuple[rotation.Rotation, rotation.Rotation, Tensor, Tensor]:
    """The rotation for a moment, on the CPU and beside it, its rotated form, how errors spread."""
    turn = rotation.fit(moment.diagonal(), column=weight.square().mean(0), seed=seed)
    device = moment.device
    there = turn.to(device)
    with _FACTORS:
        wide = moment.double()
        for of in (wide, wide.T):  # symmetric: rows, then columns
            for part in torch.split(of, _CHUNK):
                part.copy_(there.inputs(part))
        rotated = wide.float()
        rows = [wide]
        del wide, of, part
        factor = feedback.spread(rows.pop(), overwrite=True).contiguous()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return turn, there, rotated, factor


def _fitted(left: Tensor, value: Tensor, moment: Tensor, step: Tensor) -> Tensor:
    """The step of each row that is best for its codes on the inputs, with digits of bfloat16."""
    fitted = torch.empty_like(step)
    for start in range(0, len(step), _ROWS):
        part = slice(start, start + _ROWS)
        seen = value[part] @ moment
        fitted[part] = (left[part] * seen).sum(1) / (value[part] * seen).sum(1)
    is_sound = torch.isfinite(fitted) & (fitted > 0) & (step > 0)
    return torch.where(is_sound, fitted, step).bfloat16().float()


def _asked(bits: Bits, stacks: list[Stacked]) -> tuple[Average | None, dict[str, Levels]]:
    """The average that is to be shared out, or the levels of every matrix."""
    if isinstance(bits, (int, float)):
        bits = str(float(bits))
    if isinstance(bits, str):
        average = parse_average(bits)
        by_kind = {} if average is not None else parse_bits(bits)
        return average, {s.name: Levels(by_kind[s.kind]) for s in stacks if by_kind}
    odd = set(bits) ^ {stack.name for stack in stacks}
    if odd:
        raise ValueError(f"[sketch] bits of {sorted(odd)[0]!r}: want one entry a matrix.")
    for name, levels in bits.items():
        if not 1 <= len(levels) <= LEVELS_MAX or any(n not in trellis.BITS for n in levels):
            raise ValueError(
                f"[sketch] bits of {name} = {tuple(levels)}: want 1 to {LEVELS_MAX} levels of "
                "1 to 4 bits."
            )
    return None, {name: Levels(tuple(levels)) for name, levels in bits.items()}


def _shares(folder: pathlib.Path, key: str) -> dict[str, Levels] | None:
    """How a run that was interrupted shared bits out, if it came to that."""
    try:
        kept = json.loads((folder / _SHARES).read_bytes())
        if kept.pop("sha256") != container.sha256_of(container.canonical(kept).encode()):
            return None  # a disk that lied; it is made anew
    except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):
        return None
    if kept["key"] != key:
        raise SketchError(
            f"[sketch] {_SHARES}: begun with another model, text or settings; want the same to "
            "resume."
        )
    return {name: Levels(tuple(bits), base) for name, (bits, base) in kept["levels"].items()}


def _keep_shares(folder: pathlib.Path, key: str, each: Mapping[str, Levels]) -> None:
    levels = {name: [list(of.bits), of.base] for name, of in each.items()}
    fields = {"key": key, "levels": levels}
    write_atomic(folder / _SHARES, sketches.index_of(fields))


def _trials(texts: list[Tensor]) -> list[Tensor]:
    """The texts, cut, that say what coding a matrix costs."""
    trials: list[Tensor] = []
    for ids in texts:
        if sum(trial.shape[1] for trial in trials) >= _TRIAL_TOKENS:
            break
        trials.append(ids[:, :_TRIAL_LENGTH])
    return trials


def _costs(
    model: nn.Module,
    stacks: list[Stacked],
    moments: dict[str, Tensor],
    trials: list[Tensor],
    bits: int,
    seed: int,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Say what coding each of some matrices costs, in nats a token.

    Half the mean square of what the error of a trial coding changes the log-likelihood of an
    answer by, to first order, for answers that are drawn as the model gives them.

    Source:
        The divergence of two near distributions is half the Fisher information's form: Kullback,
        "Information theory and statistics", 1959.
    """

    def job(stack: Stacked) -> Callable[[], Tensor]:
        moment = moments.pop(stack.name)
        return lambda: _error_of(stack, moment, bits, seed)

    errors = dict(zip((s.name for s in stacks), _side_by_side(stacks, job, advance), strict=True))
    cost = dict.fromkeys(errors, 0.0)
    draws = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor]] = {}
    net: Any = model

    def watch(stack: Stacked) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def see(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.retain_grad()
            inputs[stack.name] = args[0].detach()
            outputs.setdefault(stack.name, []).append(output)

        return see

    # The one attention whose pass backwards has the same sums every time.
    same = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(same)
        for stack in stacks:
            for linear in stack.linears:
                hooks.callback(linear.register_forward_hook(watch(stack)).remove)
        for ids in trials:
            outputs.clear()
            with torch.enable_grad():
                embed = net.get_input_embeddings()(ids.to(net.device)).detach()
                out = net(inputs_embeds=embed.requires_grad_(), use_cache=False)
                logits = out.logits[0].float()
                chance = logits.detach().softmax(-1).cpu()
                answer = torch.multinomial(chance, 1, generator=draws).to(net.device)
                log = logits.log_softmax(-1).gather(1, answer)
                log.sum().backward(inputs=[o for many in outputs.values() for o in many])
            for name, many in outputs.items():
                gradient = torch.cat([_gradient(output) for output in many], 1)
                x = inputs[name].reshape(-1, inputs[name].shape[-1]).float()
                change = ((x @ errors[name].T) * gradient).sum(1)
                cost[name] += 0.5 * float(change.double().square().sum())
            advance()
    n_tokens = sum(ids.shape[1] for ids in trials)
    return {name: total / n_tokens for name, total in cost.items()}


def _gradient(output: Tensor) -> Tensor:
    gradient = output.grad
    assert gradient is not None  # it was retained
    return gradient.reshape(-1, gradient.shape[-1]).float()


def shared(
    average: Average, stacks: list[Stacked], cost: Mapping[str, float], bits: int
) -> dict[str, Levels]:
    """Share bits out over the layers' matrices, where they take most off per bit.

    Args:
        average: What is asked for; steps and all else are left out.
        stacks: The matrices.
        cost: Of coding each of the layers' matrices, in nats a token, at so many bits:
        bits: 2 to 5.

    Returns:
        How every matrix is coded.
    """
    size = {s.name: s.rows * s.cols for s in stacks if s.kind != "head"}
    given = dict.fromkeys(size, min(_LEFT))
    left = average.bits * sum(size.values()) - min(_LEFT) * sum(size.values())
    while True:
        gains = {
            name: cost[name] / _LEFT[bits] * (_LEFT[n] - _LEFT[n + 1]) / size[name]
            for name, n in given.items()
            if n < max(_LEFT) and size[name] <= left
        }
        if not gains:
            break
        best = max(gains, key=lambda name: gains[name])
        given[best] += 1
        left -= size[best]
    layers = {
        name: Levels((*_CODES[n], *average.after), len(_CODES[n])) for name, n in given.items()
    }
    head = {s.name: Levels(average.head) for s in stacks if s.kind == "head"}
    return {**layers, **head}
