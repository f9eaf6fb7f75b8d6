"""What the race of codes puts in place of weights: codes, heads, rules that follow the token."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from code_kinds import (
    GROUP,
    Bits,
    Fitted,
    Lattice,
    Made,
    Prepared,
    Turn,
    Uniform,
    by_rows,
    rounded,
    together,
    turn_of,
    unfolded,
)
from code_study import Study
from csfast import models, sketches
from csfast.calibration import sketching
from csfast.codes import feedback, trellis

HEADS = ((4, 4), (4, 2), (3, 3))  # levels of trellis codes of the head
RULE_TOKENS = 2048  # of calibration text that the threshold of a rule by layer is found on


# Codes of all linear maps but the head


def grouped_bits(of: Prepared, bits: float) -> float:
    """Bits of a matrix with a step of 16 bits a row and group."""
    return of.size * bits + 16 * of.left.shape[1] * math.ceil(of.left.shape[2] / GROUP)


def row_bits(of: Prepared, bits: float) -> float:
    """Bits of a matrix with a step of 16 bits a row."""
    return of.size * bits + 16 * of.left.shape[1]


def trellis_bits(of: Prepared, bits: Sequence[int]) -> float:
    """Bits of a matrix of trellis codes, padding counted."""
    rows, cols = of.left.shape[1:]
    tiles = math.ceil(rows / trellis.TILE_ROWS) * math.ceil(cols / trellis.TILE_COLS)
    return sum(8 * 64 * tiles * n + 16 * rows for n in bits)


def gptq(
    *levels: int,
    turn: str = "none",
    folded: bool = False,
    fed: bool = True,
    attention: int | None = None,
) -> Callable[[Study], Made]:
    """Code by uniform steps of groups, as GPTQ does; rounding to nearest if nothing is fed back."""

    def make(study: Study) -> Made:
        parts = []
        for of in study.prepared(turn, folded=folded):
            is_attention = of.stacks[0].kind in sketches.PARTS["attention"]
            bits = (attention,) if attention is not None and is_attention else levels
            value = torch.zeros_like(of.left)
            for n in bits:
                value += rounded(of.left - value, of.factor if fed else None, Uniform(n))
            parts.append(of.made(value, sum(grouped_bits(of, n) for n in bits)))
        return together(parts)

    return make


def scalar(
    *levels: int, grouped: bool = False, kinds: Sequence[str] | None = None
) -> Callable[[Study], Made]:
    """Code by fitted levels with feedback, inputs rotated as in a sketch."""

    def make(study: Study) -> Made:
        parts = []
        for of in study.prepared("dealt", kinds=kinds):
            value = torch.zeros_like(of.left)
            for n in levels:
                if grouped:
                    value += rounded(of.left - value, of.factor, Fitted(n, None, study.device))
                else:
                    code = functools.partial(_fitted_code, n, study.device)
                    value += by_rows(of, of.left - value, code)
            bits = grouped_bits if grouped else row_bits
            parts.append(of.made(value, sum(bits(of, n) for n in levels)))
        return together(parts)

    return make


def _fitted_code(bits: int, device: torch.device, step: Tensor) -> Fitted:
    return Fitted(bits, step, device)


def lattice(bits: int) -> Callable[[Study], Made]:
    """Code by E8, with feedback, inputs rotated as in a sketch."""

    def make(study: Study) -> Made:
        parts = []
        for of in study.prepared("dealt"):
            value = by_rows(of, of.left, functools.partial(Lattice, bits))
            padded = of.size + -of.left.shape[1] % 8 * of.left.shape[2]
            parts.append(of.made(value, padded * bits + 16 * of.left.shape[1]))
        return together(parts)

    return make


def ours(*levels: int) -> Callable[[Study], Made]:
    """Code as `csfast sketch` does."""
    return lambda study: study.coded(dict.fromkeys(study.layers(), levels))


def mix(average: float, *after: int) -> Callable[[Study], Made]:
    """Share an average of bits out as `csfast sketch` does; what comes after it is read as well."""

    def make(study: Study) -> Made:
        n = 2 if average < 3 else 3
        each = sketching.shared(sketching.Average(average, after), study.stacks, study.costs(n), n)
        return study.coded({name: each[name].bits for name in study.layers()})

    return make


def varied(*levels: int, turn: str = "dealt", **options: Any) -> Callable[[Study], Made]:
    """Code by trellises otherwise than `csfast sketch` does."""

    def make(study: Study) -> Made:
        return together(
            [
                of.made(
                    torch.stack(study.levels(of, levels, **options)).sum(0),
                    trellis_bits(of, levels),
                )
                for of in study.prepared(turn)
            ]
        )

    return make


def refitted(*levels: int, what: Sequence[str]) -> Callable[[Study], Made]:
    """Refit in closed form on what the coded model's matrices read.

    Scales: of every output, which steps of rows take up. Norms: of every input channel after a
    norm, whose gain takes it up.
    """

    def make(study: Study) -> Made:
        made = study.coded(dict.fromkeys(study.layers(), levels))
        study.restore()
        for name, weight in made.weights.items():
            study.put(name, weight)
        own, cross = study.crossed()
        for name, weight in made.weights.items():
            gain = study.by_name[name].gain()
            coded, whole = weight, study.plain(name)
            if gain is not None:
                coded, whole = coded * gain, whole * gain
            if "norms" in what and gain is not None:
                a = (coded.T @ coded).double() * own[name].double()
                b = ((coded.T @ whole).double() * cross[name].double().T).sum(1)
                damp = feedback.DAMP * a.diagonal().mean()
                a.diagonal().add_(damp)
                channel = torch.linalg.solve(a, b + damp).float().bfloat16().float()
                coded = coded * channel
            if "scales" in what:
                seen = coded @ own[name]
                best = ((whole @ cross[name]) * coded).sum(1) / (seen * coded).sum(1)
                coded = coded * torch.where(torch.isfinite(best), best, 1.0)[:, None]
            made.weights[name] = unfolded(coded, gain)
        return made

    return make


# The head


def head_scalar(bits: int) -> Callable[[Study], Made]:
    """Code the head by fitted levels, one step a row."""
    return scalar(bits, kinds=("head",))


def head_rounded(bits: int) -> Callable[[Study], Made]:
    """Round the head to nearest, a step a group."""

    def make(study: Study) -> Made:
        (of,) = study.prepared("none", folded=False, kinds=("head",))
        return of.made(rounded(of.left, None, Uniform(bits)), grouped_bits(of, bits))

    return make


def head_ours(*levels: int) -> Callable[[Study], Made]:
    """Code the head as `csfast sketch` does."""

    def make(study: Study) -> Made:
        _code_heads(study, levels)
        return study.coded({"head": levels})

    return make


def _code_heads(study: Study, levels: tuple[int, ...]) -> None:
    """Code the head; on a GPU in all ways at once, as each takes a small part of it."""
    wanted = HEADS if study.device.type == "cuda" else (levels,)
    study.code([("head", bits) for bits in wanted])


def head_again(*levels: int, best: int, exact: bool) -> Callable[[Study], Made]:
    """Read one level of the whole head, and the best words again: all levels, or in 16 bits."""

    def make(study: Study) -> Made:
        _code_heads(study, levels)
        base = study.coded({"head": levels}, 1)
        stack = study.by_name["head"]
        full = study.plain("head")
        more = 16.0 * full.numel()
        if not exact:
            all_levels = study.coded({"head": levels})
            full = all_levels.weights["head"]
            more = all_levels.stored["head"] - base.read["head"]
        head = study.twins["head"].linears[0]

        def forward(x: Tensor) -> Tensor:
            logits = F.linear(x, head.weight, head.bias)
            places = logits.topk(min(best, stack.rows), dim=-1).indices
            again = F.linear(x, full, head.bias)
            return logits.scatter(-1, places, again.gather(-1, places))

        stored = base.read["head"] + more
        read = base.read["head"] + more * min(1.0, best / stack.rows)
        return Made(
            base.weights, {"head": stored}, {"head": read}, lambda: replaced({head: forward})
        )

    return make


def on(layers: Callable[[Study], Made], head: Callable[[Study], Made]) -> Callable[[Study], Made]:
    """Code layers and head."""
    return lambda study: layers(study).beside(head(study))


@contextlib.contextmanager
def replaced(forwards: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let modules compute something else."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


# Rules that follow the token


def most_of(score: Tensor, share: float) -> Tensor:
    """Whether each of ``(..., n)`` is among so large a share of its row's largest."""
    n = score.shape[-1]
    count = min(n, round(share * n))
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    places = score.topk(count, dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, places, True)


def by_neuron(
    base: int,
    more: int | None,
    share: float,
    skip: float = 0.0,
    *,
    attention: int = 3,
    fed: bool = True,
) -> Callable[[Study], Made]:
    """Read the base of all neurons, and more of those of largest usage at the base.

    Inputs of gate and up are rotated as in a sketch. Down keeps neurons apart: its outputs are
    rotated, every neuron has a scale of 16 bits, and feedback goes from neuron to neuron.

    Args:
        base: Bits of the first level.
        more: Bits of the second, or None for the weights themselves.
        share: Of the neurons that the second is read of.
        skip: Share of the neurons of least usage whose down columns are not read.
        attention: Bits of the other matrices.
        fed: Whether errors are fed back from neuron to neuron.
    """

    def make(study: Study) -> Made:
        bits = (base,) if more is None else (base, more)
        gate_up = _in_levels(study, "dealt", "gate_up", bits)
        down = _down_in_levels(study, bits, fed)
        made = study.coded(dict.fromkeys(study.layers("qkv", "o"), (attention,)))
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for i, ffn in enumerate(models.find_ffns(study.twin)):
            first, last = f"layers.{i}.gate_up", f"layers.{i}.down"
            pairs = []
            for name, of, kept in ((first, gate_up[first], 1.0), (last, down[last], 1.0 - skip)):
                whole = study.plain(name) if more is None else of.parts[0] + of.parts[1]
                pairs.append((of.parts[0], whole))
                second = 16.0 * whole.numel() if more is None else of.bits[1]
                made.stored[name] = of.own + of.bits[0] + second
                made.read[name] = of.own + kept * of.bits[0] + share * second
            forwards[ffn.module] = _neurons(ffn, pairs[0], pairs[1], share, skip)
        return dataclasses.replace(made, patch=lambda: replaced(forwards))

    return make


@dataclasses.dataclass(frozen=True, eq=False)
class InLevels:
    """A matrix in levels, as the model has it, with their bits and those of what else it takes."""

    parts: list[Tensor]
    bits: list[float]
    own: float


def _in_levels(study: Study, turn: str, kind: str, bits: tuple[int, ...]) -> dict[str, InLevels]:
    """Matrices of a kind in levels of trellis codes."""

    def make() -> dict[str, InLevels]:
        found = {}
        for of in study.prepared(turn, kinds=(kind,)):
            back = [of.back(value) for value in study.levels(of, bits)]
            for stack, own in zip(of.stacks, of.own, strict=True):
                parts = [weights[stack.name] for weights in back]
                found[stack.name] = InLevels(parts, [trellis_bits(of, (n,)) for n in bits], own)
        return found

    result: dict[str, InLevels] = study.keep(("levels", turn, kind, bits), make, 6)
    return result


def _down_in_levels(study: Study, bits: tuple[int, ...], fed: bool) -> dict[str, InLevels]:
    """Down projections in levels, neurons apart."""

    def make() -> dict[str, InLevels]:
        found = {}
        for plain in study.prepared("none", kinds=("down",)):
            rows, cols = plain.left.shape[1:]
            outputs, _ = turn_of("block", torch.ones(rows, 1, device=study.device), study.seed)
            scale = torch.linalg.vector_norm(plain.left, dim=1)
            scale = scale.clamp_min(1e-9).bfloat16().float()  # (layers, neurons)
            turned = outputs.inputs(plain.left.transpose(1, 2)).transpose(1, 2)
            moment = plain.moment.double() * scale[:, :, None] * scale[:, None]
            of = Prepared(
                plain.stacks,
                plain.turns,
                (turned / scale[:, None]).contiguous(),
                moment.float(),
                torch.stack([feedback.spread(each) for each in moment]),
                plain.gains,
                [16 * cols] * len(plain.stacks),
            )
            back = [
                outputs.undo((value * scale[:, None]).transpose(1, 2)).transpose(1, 2)
                for value in study.levels(of, bits, fed=fed)
            ]
            for i, stack in enumerate(of.stacks):
                parts = [value[i].contiguous() for value in back]
                own = float(of.own[i])
                found[stack.name] = InLevels(parts, [trellis_bits(of, (n,)) for n in bits], own)
        return found

    result: dict[str, InLevels] = study.keep(("levels", "neurons", fed, bits), make, 6)
    return result


def _neurons(
    ffn: models.Ffn,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    share: float,
    skip: float,
) -> Callable[[Tensor], Tensor]:
    """What an FFN computes with base and full weights of its neurons."""
    scale = torch.linalg.vector_norm(down[0], dim=0)
    sizes = [linear.bias for linear in ffn.linears]
    if any(bias is not None for bias in sizes):
        raise ValueError(f"[codes] {ffn.name}: has biases; want none for rules by neuron.")

    def activated(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return ffn.act(gate) * up

    def forward(x: Tensor) -> Tensor:
        first = activated(x, gate_up[0])
        usage = first.abs() * scale
        chosen = most_of(usage, share)
        a = torch.where(chosen, activated(x, gate_up[1]), first)
        if skip:
            a = a.masked_fill(most_of(-usage, skip) & ~chosen, 0.0)
        refined = torch.where(chosen, a, 0.0)
        return F.linear(refined, down[1]) + F.linear(a - refined, down[0])

    return forward


def by_channel(
    base: int, more: int | None, share: float, turn: str = "dealt", fed: bool = True
) -> Callable[[Study], Made]:
    """Read more of the input channels whose entry times the error of their column is largest.

    Args:
        base: Bits of the first level.
        more: Bits of the second, or None for what is left in 16 bits.
        share: Of the channels that the second is read of.
        turn: Rotation of the inputs; channels are those after it.
        fed: Whether errors are fed back, which makes those of different channels cancel out: then
            taking some away can leave more.

    Source:
        Park et al., "DecDEC: a systems approach to advancing low-bit LLM quantization", 2025.
    """

    def make(study: Study) -> Made:
        bits = (base,) if more is None else (base, more)
        made = Made({}, {}, {})
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for of in study.prepared(turn):
            levels = study.keep(
                ("channels", turn, of.stacks[0].kind, bits, of.left.shape, fed),
                functools.partial(study.levels, of, bits, fed=fed),
                8,
            )
            rest = of.left - levels[0] if more is None else levels[1]
            made.weights.update(of.back(levels[0]))
            for i, stack in enumerate(of.stacks):
                twins = study.twins[stack.name].linears
                norm = torch.linalg.vector_norm(rest[i], dim=0)
                parts = torch.split(rest[i], [linear.weight.shape[0] for linear in twins])
                for linear, part in zip(twins, parts, strict=True):
                    forwards[linear] = _channels(
                        linear, part, of.turns[i], of.gains[i], norm, share
                    )
                first = trellis_bits(of, (base,)) + of.own[i]
                second = 16.0 * of.size if more is None else trellis_bits(of, (more,))
                made.stored[stack.name] = first + second
                made.read[stack.name] = first + share * second
        return dataclasses.replace(made, patch=lambda: replaced(forwards))

    return make


def _channels(
    linear: nn.Linear, rest: Tensor, turn: Turn, gain: Tensor | None, norm: Tensor, share: float
) -> Callable[[Tensor], Tensor]:
    """What a linear map computes with its base, and more of the channels that matter."""

    def forward(x: Tensor) -> Tensor:
        z = turn.inputs(x if gain is None else unfolded(x, gain))
        chosen = torch.where(most_of(z.abs() * norm, share), z, 0.0)
        return F.linear(x, linear.weight, linear.bias) + F.linear(chosen, rest)

    return forward


def by_layer(base: int, more: int, share: float) -> Callable[[Study], Made]:
    """Read more of the matrices whose base is furthest off for the token, in the middle `share`.

    Source:
        Kwon et al., "DP-LLM: runtime model adaptation with dynamic layer-wise precision
        assignment", 2025.
    """

    def make(study: Study) -> Made:
        names = study.layers()
        both = study.coded(dict.fromkeys(names, (base, more)))
        first = study.coded(dict.fromkeys(names, (base, more)), 1)
        study.restore()
        for name, weight in first.weights.items():
            study.put(name, weight)
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        limit = torch.inf

        def forward_of(name: str, at: int, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
            low, high = first.weights[name], both.weights[name] - first.weights[name]
            rows = slice(at, at + linear.weight.shape[0])

            def forward(x: Tensor) -> Tensor:
                y, off = F.linear(x, low), F.linear(x, high)
                length = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-9)
                score = torch.linalg.vector_norm(off, dim=-1, keepdim=True) / length
                if at == 0:
                    seen[name].append(score[:, -study.new_tokens :].flatten())
                found = torch.where(score > limit, y + off, y)[..., rows]
                return found if linear.bias is None else found + linear.bias

            return forward

        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for name in names:
            at = 0
            for linear in study.twins[name].linears:
                forwards[linear] = forward_of(name, at, linear)
                at += linear.weight.shape[0]
        n_tokens = 0
        with replaced(forwards):
            for ids in study.texts:
                if n_tokens >= RULE_TOKENS:
                    break
                models.hidden_states(study.twin, ids.to(study.device))
                n_tokens += ids.shape[1]
        scores = torch.cat([torch.cat(seen[name]) for name in names])
        sizes = torch.cat(
            [
                torch.full_like(torch.cat(seen[name]), study.by_name[name].rows)
                * study.by_name[name].cols
                for name in names
            ]
        )
        order = scores.argsort(descending=True)
        spent = sizes[order].double().cumsum(0) / sizes.double().sum()
        limit = float(scores[order][int((spent < share).sum().clamp_max(len(order) - 1))])
        for of in seen.values():
            of.clear()

        def read() -> Bits:
            refined = {
                name: float((torch.cat(seen[name]) > limit).float().mean()) for name in names
            }
            return {
                name: first.read[name] + refined[name] * (both.stored[name] - first.read[name])
                for name in names
            }

        return Made(first.weights, both.stored, dict(first.read), lambda: replaced(forwards), read)

    return make
