"""Rules whose precision follows the support, to compare how weights of few bits can be stored.

Every neuron is sensed by a base code of its gate and up rows. Those that matter most are executed
at full precision; of the others, the ones that matter still are executed at the precision of the
base, which sensing has read but for their down row, and the rest is skipped:

    |                      | gate and up          | down                 |
    | most important       | base and refinement  | base and refinement  |
    | of some importance   | base                 | base                 |
    | others               | base                 | nothing              |

What is saved by bytes is one dial: a neuron is refined if the error expected without it, and its
base row of down is read if the usage expected, exceeds a threshold; the two thresholds are in the
ratio of the roots of their costs, which minimises the sum of squared errors for the bytes.

Names of methods: ``mixed-3+3`` is the above with a nested code of 3 and 3 bits, ``drop-3+3`` skips
whatever is not refined, ``mixed-3/6`` stores a separate code of 6 bits beside the base of 3.
Suffixes: ``-g128`` weights that share a step, ``-plain`` no error feedback, ``-cell`` refinement
steps that are fixed fractions of the base's, ``-usage`` refinement by usage instead of error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ...codes import levels as levels_
from ...codes.levels import Level
from ...judge import Rule, Sample, Thresholds, Where
from ...models import Ffn
from ...types import LayerShape
from ..rules import INDEX_BYTES, ROWS, Fit, second_moment

NAMES = "mixed-<bits>+<bits>, drop-<bits>+<bits>, mixed-<bits>/<bits>, drop-<bits>/<bits>"
NUMBER_BYTES = 2  # of a scale or a norm that every neuron has
_NAME = re.compile(
    r"(?P<kind>mixed|drop)-(?P<base>[1-8])(?P<how>[+/])(?P<full>[1-8]|16)"
    r"(?:-g(?P<group>\d{2,4}))?(?P<plain>-plain)?(?P<cell>-cell)?(?P<usage>-usage)?"
)
_STEP = 2.0**-5  # of a derivative: the third one, below 1, errs by 2^-12 at most
_ROUNDS = 40  # halvings of the logarithm of a threshold: to one part in 10^9


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the weights of a layer are stored, from a method's name.

    Attributes:
        executes_base: Whether neurons that are not refined may be executed by the base.
        base: Bits of the base.
        full: Bits of the refinement, or of the separate code.
        is_nested: Whether the second code refines the base, or stands beside it.
        group: Weights of a row that share a step.
        has_feedback: Whether codes make up for each other's errors.
        is_relative: Whether the refinement's steps are fixed fractions of the base's.
        by_usage: Whether neurons are refined by usage rather than by expected error.
    """

    executes_base: bool
    base: int
    full: int
    is_nested: bool
    group: int = levels_.GROUP
    has_feedback: bool = True
    is_relative: bool = False
    by_usage: bool = False

    @classmethod
    def parse(cls, method: str) -> Storage | None:
        """Read a method's name; None if it is of another kind."""
        found = _NAME.fullmatch(method)
        if found is None or (found["how"] == "+" and found["full"] == "16"):
            return None
        return cls(
            executes_base=found["kind"] == "mixed",
            base=int(found["base"]),
            full=int(found["full"]),
            is_nested=found["how"] == "+",
            group=int(found["group"] or levels_.GROUP),
            has_feedback=found["plain"] is None,
            is_relative=found["cell"] is not None,
            by_usage=found["usage"] is not None,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """One layer's codes, decoded, and what the choice of neurons knows of their errors.

    Attributes:
        base: Gate, up and transposed down of the base, each ``(n_neurons, d)`` float32.
        full: The same of the full precision.
        norm: Norm of the down rows, ``(n_neurons,)`` float32.
        noise: Expected error of the gate and of the up measurement of every neuron, and norm of
            the error of its down row, ``(3, n_neurons)`` float32.
    """

    base: tuple[Tensor, Tensor, Tensor]
    full: tuple[Tensor, Tensor, Tensor]
    norm: Tensor
    noise: Tensor


class Mixed(Rule):
    """Neurons at two precisions, or none, by what sensing expects of them."""

    counts = ("base", "full")  # neurons whose base row of down is read; neurons that are refined

    def __init__(self, name: str, fit: Fit, storage: Storage) -> None:
        """Code every layer."""
        super().__init__(name, fit.ffns)
        self.storage = storage
        self._coded = [self._code(fit, layer) for layer in range(len(fit.ffns))]

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Find for every layer the two thresholds that read a share of what can be read."""
        some = sample.some(ROWS)
        layers = []
        for layer, x in enumerate(some.inputs):
            usage, error, _ = self._expected(layer, x)
            shape = self.ffns[layer].shape
            layers.append([self._thresholds(shape, usage, error, share) for share in densities])
        return [tuple(of_layer[i] for of_layer in layers) for i in range(len(densities))]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer, each neuron at its precision."""
        coded = self._coded[layer]
        usage, error, a_base = self._expected(layer, x)
        is_full = ~(error < thresholds[1])
        is_base = self._at_base(usage, thresholds[0]) & ~is_full
        gate, up, down_t = coded.full
        ffn = self.ffns[layer]
        a_full = ffn.act(_biased(x @ gate.T, ffn.gate.bias)) * _biased(x @ up.T, ffn.up.bias)
        out = torch.where(is_full, a_full, 0.0) @ down_t
        if self.storage.executes_base:
            out = out + torch.where(is_base, a_base, 0.0) @ coded.base[2]
        reads_base = is_base | is_full if self.storage.is_nested else is_base
        out = _biased(out, ffn.down.bias)
        return out, torch.stack([reads_base.sum(dim=1), is_full.sum(dim=1)], dim=1)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the base of all gate and up rows, and what is read of the others."""
        base, full = counts
        return (
            self.sensor_bytes(shape)
            + base * base_row_bytes(self.storage, shape)
            + full * (3 * full_row_bytes(self.storage, shape) + INDEX_BYTES)
        )

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the base of gate and up and the norms; the output's scales, too."""
        rows = 2 * base_row_bytes(self.storage, shape) + NUMBER_BYTES
        return shape.n_neurons * rows + shape.d * NUMBER_BYTES

    def density(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the fraction of neurons that are refined."""
        return counts[1] / shape.n_neurons

    def full(self, shape: LayerShape) -> tuple[float, ...]:
        """Give all neurons; those that are read in full have no need of a separate base."""
        has_base = self.storage.is_nested
        return float(shape.n_neurons * has_base), float(shape.n_neurons)

    def _at_base(self, usage: Tensor, threshold: float) -> Tensor:
        """Neurons that are worth their base row of down."""
        if not self.storage.executes_base:
            return torch.zeros_like(usage, dtype=torch.bool)
        return ~(usage < threshold)

    def _thresholds(
        self, shape: LayerShape, usage: Tensor, error: Tensor, share: float
    ) -> tuple[float, float]:
        """Usage and error above which neurons are read, for a share of what can be read."""
        most = self.n_bytes(shape, self.full(shape))
        least = self.sensor_bytes(shape)
        wanted = least + share * (most - least)
        costs = (
            full_row_bytes(self.storage, shape) * 3 + INDEX_BYTES,
            base_row_bytes(self.storage, shape),
        )
        ratio = (costs[0] / costs[1]) ** 0.5
        low, high = -60.0, 60.0  # logarithms of thresholds that keep everything, or nothing
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            at = 2.0**middle
            is_full = ~(error < ratio * at)
            is_base = self._at_base(usage, at) & ~is_full
            reads_base = is_base | is_full if self.storage.is_nested else is_base
            means = (float(m.sum()) / len(m) for m in (reads_base, is_full))
            if self.n_bytes(shape, tuple(means)) > wanted:
                low = middle
            else:
                high = middle
        return (2.0**high, ratio * 2.0**high) if share < 1 else (0.0, 0.0)

    def _expected(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Usage and error that the base lets expect, and its activations; ``(n, n_neurons)``.

        With `g` and `u` off by independent errors of variance `sg^2` and `su^2`,

            E[(s(g) u)^2] ~ (s(g)^2 + s'(g)^2 sg^2) (u^2 + su^2)

        and what is lost without refinement is the part of it that an error is a factor of.
        """
        coded = self._coded[layer]
        gate, up, _ = coded.base
        ffn = self.ffns[layer]
        g, u = _biased(x @ gate.T, ffn.gate.bias), _biased(x @ up.T, ffn.up.bias)
        act = ffn.act(g)
        a = act * u
        length = x.square().sum(dim=1, keepdim=True).sqrt()
        gate_noise, up_noise = coded.noise[0] * length, coded.noise[1] * length
        slope = _slope(ffn, g)
        from_gate = (slope * gate_noise).square() * (u.square() + up_noise.square())
        from_up = (act * up_noise).square()
        norm = coded.norm.square()
        usage = ((a.square() + from_gate + from_up) * norm).sqrt()
        if self.storage.by_usage:
            return a.abs() * coded.norm, a.abs() * coded.norm, a
        from_down = (a * coded.noise[2]).square()
        return usage, ((from_gate + from_up) * norm + from_down).sqrt(), a

    def _code(self, fit: Fit, layer: int) -> Coded:
        """Code one layer; levels that methods share are fitted once."""
        storage, ffn = self.storage, self.ffns[layer]
        gate, up = ffn.gate.weight.detach().float(), ffn.up.weight.detach().float()
        down_t = ffn.down.weight.detach().float().T
        scale = levels_.output_scale(down_t)
        base = _levels(fit, layer, (storage.base,), storage)
        bases = [levels_.decode(levels) for levels in base]
        if storage.full == 16:
            fulls = [gate, up, down_t / scale]
        elif storage.is_relative:
            fulls = [
                b + _cells(w - b, levels[0], storage.full)
                for w, b, levels in zip((gate, up, down_t / scale), bases, base, strict=True)
            ]
        else:
            bits = (storage.base, storage.full) if storage.is_nested else (storage.full,)
            fulls = [levels_.decode(levels) for levels in _levels(fit, layer, bits, storage)]
        bases[2], fulls[2] = bases[2] * scale, fulls[2] * scale
        moment = fit.moment(layer)
        length = moment.diagonal().sum().sqrt()
        noise = []
        for exact, coded, levels in zip((gate, up), bases[:2], base[:2], strict=True):
            off = (exact - coded).double()
            each = ((off @ moment) * off).sum(dim=1).clamp_min(0).sqrt() / length
            noise.append(_typical(each.float(), levels[0].top))
        each = (down_t - bases[2]).norm(dim=1)
        noise.append(_typical(each, base[2][0].top))
        return Coded(
            (bases[0], bases[1], bases[2]),
            (fulls[0], fulls[1], fulls[2]),
            ffn.down_norm(),
            torch.stack(noise),
        )


def base_row_bytes(storage: Storage, shape: LayerShape) -> float:
    """Give the bytes of one row of the base, its steps included."""
    return shape.d * storage.base / 8 + _step_bytes(storage, shape)


def full_row_bytes(storage: Storage, shape: LayerShape) -> float:
    """Give the bytes of one row of the second code, its steps included."""
    if storage.full == 16:
        return 2.0 * shape.d
    steps = 0.0 if storage.is_relative else _step_bytes(storage, shape)
    return shape.d * storage.full / 8 + steps


def _step_bytes(storage: Storage, shape: LayerShape) -> float:
    return -(-shape.d // storage.group) + NUMBER_BYTES


def stored_bytes(storage: Storage, shape: LayerShape) -> float:
    """Give the bytes that a layer takes in memory, norms and the output's scales included."""
    base, full = base_row_bytes(storage, shape), full_row_bytes(storage, shape)
    # Without execution of the base, and beside codes that stand alone, its down rows are not kept.
    base_rows = 3 if storage.executes_base or storage.is_nested else 2
    return shape.n_neurons * (base_rows * base + 3 * full + NUMBER_BYTES) + shape.d * NUMBER_BYTES


def _levels(
    fit: Fit, layer: int, bits: tuple[int, ...], storage: Storage
) -> tuple[tuple[Level, ...], ...]:
    """Levels of gate, of up, and of transposed down over the output's scales, of a layer.

    Fitted level by level: a prefix serves every code that begins with it.
    """
    key = ("levels", layer, bits, storage.group, storage.has_feedback)
    return fit.once(key, lambda: _fitted(fit, layer, bits, storage))


def _fitted(
    fit: Fit, layer: int, bits: tuple[int, ...], storage: Storage
) -> tuple[tuple[Level, ...], ...]:
    ffn, group = fit.ffns[layer], storage.group
    n_neurons = ffn.shape.n_neurons
    rows = torch.cat([weight.detach().float() for weight in ffn.weights[:2]])
    down_t = ffn.down.weight.detach().float().T
    scale = levels_.output_scale(down_t)
    left = [rows, down_t / scale]
    before: tuple[tuple[Level, ...], ...] = ((), (), ())
    if len(bits) > 1:
        before = _levels(fit, layer, bits[:-1], storage)
        gate, up, down = map(levels_.decode, before)
        left = [left[0] - torch.cat([gate, up]), left[1] - down]
    of_rows = of_down = None
    if storage.has_feedback:
        of_rows = fit.moment(layer)
        of_down = fit.once(("activation moment", layer), lambda: _moment(fit, layer))
    (both,) = levels_.fit_rows(left[0], of_rows, bits[-1:], group=group)
    (down_level,) = levels_.fit_neurons(
        left[1], of_down, bits[-1:], weight=scale.square(), group=group
    )
    gate_level, up_level = (
        dataclasses.replace(
            both, codes=both.codes[half], exponent=both.exponent[half], top=both.top[half]
        )
        for half in (slice(n_neurons), slice(n_neurons, None))
    )
    new = (gate_level, up_level, down_level)
    return tuple((*levels, level) for levels, level in zip(before, new, strict=True))


def _typical(error: Tensor, top: Tensor) -> Tensor:
    """Errors ``(n,)`` as large as those of all rows are in units of their largest steps."""
    is_coded = top > 0  # others are zeros, without error
    relative = torch.where(is_coded, error / torch.where(is_coded, top, torch.ones_like(top)), 0.0)
    return top * (relative.square().sum() / is_coded.sum().clamp_min(1)).sqrt()


def _moment(fit: Fit, layer: int) -> Tensor:
    """Second moment of a layer's activations, ``(n_neurons, n_neurons)`` float64."""
    ffn = fit.ffns[layer]
    x = fit.sample.inputs[layer]
    return second_moment(ffn.activations(x)[1])


def _cells(left: Tensor, level: Level, bits: int) -> Tensor:
    """What refines a base within its cells: the best of a few fractions of its steps."""
    step = level.steps().repeat_interleave(level.group, dim=1)[:, : left.shape[1]]
    best, least = left, float("inf")
    half = 2 ** (bits - 1)
    for widening in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0):
        fine = step * (widening / 2**bits)
        found = (torch.floor(left / fine).clamp(-half, half - 1) + 0.5) * fine
        error = float((found - left).square().sum())
        if error < least:
            best, least = found, error
    return best


def _slope(ffn: Ffn, g: Tensor) -> Tensor:
    """Derivative of the activation function, by central differences."""
    return (ffn.act(g + _STEP) - ffn.act(g - _STEP)) / (2 * _STEP)


def _biased(z: Tensor, bias: Tensor | None) -> Tensor:
    return z if bias is None else z + bias
