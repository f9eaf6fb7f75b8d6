"""From a model and sample texts to a sketch: second moments, rotation, codes, layer by layer.

Every pass over the texts takes the second moments of the inputs of as many layers as fit, then
their matrices are coded one layer after another, each into a file of its own. What was interrupted
goes on after the last file that is whole, with the same bytes as without.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

DEFAULT = "3+3,head=4+2"
TOKENS_MAX = 32_768  # of calibration text, as `calibrate` takes
PASSES = 2  # of the codes of a level, with the steps that the last one's codes want
LEVELS_MAX = 4
_MOMENT_BYTES = 2 << 30  # of second moments at a time
_GROUPS: dict[str, tuple[Kind, ...]] = {
    "all": KINDS,
    **sketches.PARTS,
    **{str(kind): (kind,) for kind in KINDS},
}
# What coding at so many bits leaves of the variance of normal draws, for the share of bits.
_LEFT = {2: 0.080, 3: 0.0226, 4: 0.0070}
_HEAD = (4, 2)  # levels of the head where an average of the layers is asked for
_FISHER_TOKENS = 4096  # that say how much every matrix matters
_OWN = re.compile(r"sketch\.json|layer-\d{5}\.safetensors|head\.safetensors")


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


def parse(text: str) -> Bits:
    """Read what `make` takes as bits: an average, or levels by kind, which are checked.

    Raises:
        ValueError: It is neither.
    """
    if re.fullmatch(r"\d*\.\d+", text.strip()):
        average = float(text)
        _want_average(average)
        return average
    parse_bits(text)
    return text


def _want_average(bits: float) -> None:
    if not 2 <= bits <= 4:
        raise ValueError(f"[sketch] bits = {bits}: want an average from 2 to 4.")


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
            number from 2 to 4: the average of the first levels of all matrices but the head, those
            getting more bits that change the model's answers most. That takes a pass backwards, and
            the memory of training the model.
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
    each = _levels(model, stacks, bits, texts, seed)
    groups = _groups(layers)
    n_passes = sum(any(name not in done for name in group) for group in groups)
    total = n_passes * len(texts) + sum(
        len(each[s.name]) for name in layers if name not in done for s in layers[name]
    )
    steps = 0

    def advance() -> None:
        nonlocal steps
        steps += 1
        if progress is not None:
            progress(steps, total)

    for group in groups:
        if all(name in done for name in group):
            continue
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
            s.name: {"rows": s.rows, "cols": s.cols, "bits": list(each[s.name])} for s in stacks
        },
        "files": {name: done[name] for name in layers},
    }
    write_atomic(folder / sketches.INDEX, sketches.index_of(fields))
    return Sketch.load(folder)


def is_begun(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a sketch, or parts of one."""
    path = pathlib.Path(folder)
    return path.is_dir() and any(_OWN.fullmatch(entry.name) for entry in path.iterdir())


def clear(folder: str | os.PathLike[str]) -> None:
    """Remove a sketch from a folder; what else is there stays."""
    for entry in sorted(pathlib.Path(folder).iterdir()):
        if _OWN.fullmatch(entry.name):
            entry.unlink()


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
    each: Mapping[str, Sequence[int]],
    seed: int,
    advance: Callable[[], None],
) -> list[Matrix]:
    """The matrices of a file, several at a time: a search of paths has one thread."""
    # Largest first, or the last one runs alone.
    order = sorted(stacks, key=lambda s: -s.rows * s.cols)
    is_cuda = stacks[0].linears[0].weight.is_cuda
    n_threads = len(order) if is_cuda else torch.get_num_threads()
    if is_cuda:  # torch loads its linear algebra at the first call, which two threads may not be
        torch.linalg.cholesky(torch.eye(1, device=stacks[0].linears[0].weight.device))
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        jobs = {
            stack.name: pool.submit(
                code, stack, moments.pop(stack.name), each[stack.name], seed, advance
            )
            for stack in order
        }
        try:
            return [jobs[stack.name].result() for stack in stacks]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
def code(
    stack: Stacked,
    moment: Tensor,
    bits: Sequence[int],
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Matrix:
    """Code one matrix.

    Args:
        stack: The matrix.
        moment: Second moment of its inputs, ``(cols, cols)``, float32.
        bits: Of each level.
        seed: Of the signs.
        advance: Called after every level.
    """
    with _stream_of_its_own(moment.device):
        return _code(stack, moment, bits, seed, advance)


def _code(
    stack: Stacked, moment: Tensor, bits: Sequence[int], seed: int, advance: Callable[[], None]
) -> Matrix:
    turn, there, rotated, factor = _turned(moment, seed)
    left = there.weight(stack.weight()).contiguous()
    levels = []
    for n in bits:
        step = (left.square().mean(1).sqrt() * trellis.UNIT[n]).bfloat16().float()
        for _ in range(PASSES):
            codes, value = ops.encode(left, factor, step, bits=n)
            step = _fitted(left, value.float(), rotated, step)
        left = left - step[:, None] * value
        levels.append(Level(n, codes.cpu(), step.bfloat16().cpu()))
        advance()
    return Matrix(stack.name, stack.rows, stack.cols, turn, tuple(levels))


def _turned(
    moment: Tensor, seed: int
) -> tuple[rotation.Rotation, rotation.Rotation, Tensor, Tensor]:
    """The rotation for a moment, on the CPU and beside it, its rotated form, how errors spread."""
    turn = rotation.fit(moment.diagonal(), seed=seed)
    device = moment.device
    there = rotation.Rotation(turn.perm.to(device), turn.sign.to(device))
    wide = there.inputs(there.inputs(moment.double()).T).T.contiguous()
    return turn, there, wide.float(), feedback.spread(wide).contiguous()


def _fitted(left: Tensor, value: Tensor, moment: Tensor, step: Tensor) -> Tensor:
    """The step of each row that is best for its codes on the inputs, with digits of bfloat16."""
    seen = value @ moment
    fitted = (left * seen).sum(1) / (value * seen).sum(1)
    is_sound = torch.isfinite(fitted) & (fitted > 0) & (step > 0)
    return torch.where(is_sound, fitted, step).bfloat16().float()


def _levels(
    model: nn.Module, stacks: list[Stacked], bits: Bits, texts: list[Tensor], seed: int
) -> dict[str, tuple[int, ...]]:
    """The levels of every matrix."""
    if isinstance(bits, str):
        by_kind = parse_bits(bits)
        return {stack.name: by_kind[stack.kind] for stack in stacks}
    if isinstance(bits, Mapping):
        odd = set(bits) ^ {stack.name for stack in stacks}
        if odd:
            raise ValueError(f"[sketch] bits of {sorted(odd)[0]!r}: want one entry a matrix.")
        for name, levels in bits.items():
            if not 1 <= len(levels) <= LEVELS_MAX or any(n not in trellis.BITS for n in levels):
                raise ValueError(
                    f"[sketch] bits of {name} = {tuple(levels)}: want 1 to {LEVELS_MAX} levels of "
                    "1 to 4 bits."
                )
        return {name: tuple(levels) for name, levels in bits.items()}
    _want_average(bits)
    return shared(float(bits), stacks, importance(model, stacks, texts, seed))


def importance(
    model: nn.Module, stacks: list[Stacked], texts: list[Tensor], seed: int
) -> dict[str, float]:
    """Say what coding a matrix costs, in nats a token for codes that leave all of the variance.

    The diagonal of the Fisher information of its outputs, times what its codes leave of each with
    error feedback: the variance of the row's weights times the sum of the pivots of the moment.

    Source:
        The divergence of two near distributions is half the Fisher information's form: Kullback,
        "Information theory and statistics", 1959.
    """
    information = _information(model, stacks, texts)
    layers = _by_layer([stack for stack in stacks if stack.kind != "head"])
    found = {}
    for group in _groups(layers):
        members = [stack for name in group for stack in layers[name]]
        moments = _moments(model, members, texts, lambda: None)
        for stack in members:
            _, _, _, factor = _turned(moments.pop(stack.name), seed)
            pivots = float(factor.diagonal().double().square().reciprocal().sum())
            variance = stack.weight().square().mean(1)
            found[stack.name] = 0.5 * pivots * float((information[stack.name] * variance).sum())
    return found


def _information(model: nn.Module, stacks: list[Stacked], texts: list[Tensor]) -> dict[str, Tensor]:
    """The mean square of the gradient of each output ``(rows,)``, for answers of its own."""
    outputs: dict[str, list[Tensor]] = {}
    net: Any = model
    found: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(0)
    n_tokens = 0
    with contextlib.ExitStack() as hooks:
        for stack in stacks:
            if stack.kind == "head":
                continue
            for linear in stack.linears:

                def keep(_: nn.Module, __: Any, output: Tensor, name: str = stack.name) -> None:
                    output.retain_grad()
                    outputs.setdefault(name, []).append(output)

                hooks.callback(linear.register_forward_hook(keep).remove)
        for ids in texts:
            if n_tokens >= _FISHER_TOKENS:
                break
            outputs.clear()
            with torch.enable_grad():
                embed = net.get_input_embeddings()(ids[:, :256].to(net.device))
                logits = net(inputs_embeds=embed.detach().requires_grad_(), use_cache=False).logits[
                    0
                ]
                chance = logits.detach().float().softmax(-1).cpu()
                answer = torch.multinomial(chance, 1, generator=draws).to(net.device)
                log = logits.float().log_softmax(-1).gather(1, answer)
                log.sum().backward(inputs=[o for many in outputs.values() for o in many])
            n_tokens += ids[:, :256].shape[1]
            for name, many in outputs.items():
                parts = []
                for output in many:
                    gradient = output.grad
                    assert gradient is not None  # it was retained
                    parts.append(gradient.float().square().sum((0, 1)))
                found[name] = found.get(name, 0) + torch.cat(parts)
    return {name: total / n_tokens for name, total in found.items()}


def shared(
    average: float, stacks: list[Stacked], matters: Mapping[str, float]
) -> dict[str, tuple[int, ...]]:
    """Share bits out over the layers' matrices, where they take most off per bit.

    Args:
        average: Most bits a weight of all matrices but the head, steps and all else left out.
        stacks: The matrices.
        matters: From `importance`.

    Returns:
        One level a matrix, of 2 to 4 bits; two of the head.
    """
    size = {s.name: s.rows * s.cols for s in stacks if s.kind != "head"}
    most = average * sum(size.values())
    bits = dict.fromkeys(size, 2)
    left = most - 2 * sum(size.values())
    while True:
        gains = {
            name: matters[name] * (_LEFT[n] - _LEFT[n + 1]) / size[name]
            for name, n in bits.items()
            if n < max(_LEFT) and size[name] <= left
        }
        if not gains:
            break
        best = max(gains, key=lambda name: gains[name])
        bits[best] += 1
        left -= size[best]
    head = {s.name: _HEAD for s in stacks if s.kind == "head"}
    return {**{name: (n,) for name, n in bits.items()}, **head}
