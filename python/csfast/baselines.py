"""Rules that choose what a layer reads: ours, and published ones to compare with.

Every rule is written here again from its publication, for comparison only, and gets the same
treatment as ours: thresholds per layer are quantiles of the rule's own score over the same
calibration positions, and all that it has to read is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import oracles, planes, quantize, reference
from .judge import BYTES, Rule, Sample, Thresholds, Where
from .models import Ffn
from .plan import LayerPlan
from .rules import (
    INDEX_BYTES,
    ROWS,
    Fit,
    NeuronRule,
    activate,
    activations,
    channel_bytes,
    channel_density,
    cuts,
    keep_large,
)
from .types import TERNARY, Code, LayerShape

_METHODS = (
    "oracle-neuron, planes-b<bits>, ternary, teal, cats, griffin, static, lowrank-<rank>, "
    "rtn-int<bits>"
)


class Planes(NeuronRule):
    """The rule of csfast: usage estimated from few-bit codes of the neurons' own rows.

    The arithmetic of `csfast.sense` and `csfast.recover` in float32 matrix products, whose
    integers are exact below 2^24.
    """

    def __init__(self, name: str, fit: Fit, *, bits: Code) -> None:
        """Code the rows of every layer, with the channels evened out over the sample."""
        super().__init__(name, fit.ffns)
        self.bits = bits
        self._equal = []
        self._value = []  # levels of the gate rows, then of the up rows, (2 n_neurons, d)
        self._row_scale = []  # (n_neurons, 2)
        self._offset = [ffn.offset() for ffn in fit.ffns]  # (n_neurons, 2), or none
        for ffn, x in zip(fit.ffns, fit.sample.inputs, strict=True):
            if 127 * planes.level_max(bits) * ffn.shape.d >= 2**24:
                raise ValueError(
                    f"[ablate] {name} with d = {ffn.shape.d}: sums of float32 are exact "
                    f"below 2^24 only, want fewer bits."
                )
            equal = planes.equalizer(x.float().square().mean(dim=0)).to(x.device)
            layer = LayerPlan.fit(*ffn.weights, equal, (bits,))
            codes = layer.encode(*ffn.weights, bits=bits)
            unpacked = planes.unpack(codes.transpose(0, 1).flatten(0, 1), bits, ffn.shape.d)
            self._equal.append(equal)
            self._value.append(planes.levels_of(unpacked, bits))
            self._row_scale.append(layer.row_scale[bits].to(x.device))

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimated usage; a scale that is not finite makes all of it not-a-number."""
        q, scale = reference.quantize(x, self._equal[layer])
        y = (q.float() @ self._value[layer].T).view(x.shape[0], 2, self.ffns[layer].shape.n_neurons)
        z = scale[:, None, None] * self._row_scale[layer].T * y
        if (offset := self._offset[layer]) is not None:
            z = z + offset.T
        usage: Tensor = (activate(self.ffns[layer], z[:, 0]) * z[:, 1]).abs()
        return usage

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the codes, their scales and the equaliser."""
        return float(planes.n_bytes(shape.n_neurons, shape.d, self.bits))


class Cats(NeuronRule):
    """Compute the gate of every neuron, skip up and down rows where it is small.

    Source:
        Lee et al., "CATS: Contextually-aware thresholding for sparsity in large language models",
        2024.
    """

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the magnitude of the activated gate."""
        return gate.float().abs()

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the gate matrix, which is read whole."""
        return float(shape.d * shape.n_neurons * BYTES)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the gate matrix and, for each neuron, its up and down rows and its index."""
        return self.sensor_bytes(shape) + counts[0] * (2 * shape.d * BYTES + INDEX_BYTES)


class LowRank(NeuronRule):
    """Estimate usage from gate and up matrices of low rank, the best for the calibration inputs.

    ``W S = U s V'`` with ``S`` the square root of the inputs' second moment; the estimate is
    ``U_r s_r (V_r' S^-1 x)``, which is the rank-r matrix of least mean squared error.

    Source:
        Yuan et al., "ASVD: activation-aware singular value decomposition", 2023; the exact
        whitening is Wang et al., "SVD-LLM", 2024.
    """

    def __init__(self, name: str, fit: Fit, rank: int) -> None:
        """Cut the factors of every layer to `rank`."""
        super().__init__(name, fit.ffns)
        _check_rank(name, fit.ffns, rank)
        self.rank = rank
        self._factors = []
        for layer in range(len(fit.ffns)):
            pair = [fit.right_factors(layer, up=up) for up in (False, True)]
            self._factors.append(
                [(left[:, :rank].contiguous(), right[:rank].contiguous()) for left, right in pair]
            )

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the usage of the low-rank estimate."""
        xf = x.float()
        ffn = self.ffns[layer]
        z_gate, z_up = (
            F.linear(xf @ right.T, left, None if bias is None else bias.float())
            for (left, right), bias in zip(
                self._factors[layer], (ffn.gate.bias, ffn.up.bias), strict=True
            )
        )
        return (activate(ffn, z_gate) * z_up).abs() * self.norm[layer]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give two pairs of factors at 16 bits."""
        return 2.0 * self.rank * (shape.d + shape.n_neurons) * BYTES


class Static(NeuronRule):
    """Keep the same neurons for every token: those used most over the calibration positions."""

    def __init__(self, name: str, fit: Fit) -> None:
        """Average the usage over the sample."""
        super().__init__(name, fit.ffns)
        self._usage = [
            fit.usage(layer).square().mean(dim=0).sqrt() for layer in range(len(fit.ffns))
        ]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the mean usage, whatever the token."""
        return self._usage[layer].expand(len(x), -1)


class RankedRule(NeuronRule):
    """A rule that ranks the neurons for whole documents: each keeps the same number of them."""

    def thresholds(
        self, layer: int, x: Tensor, where: Where, densities: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Give the least score of the first neurons; nothing to calibrate."""
        n_neurons = self.ffns[layer].shape.n_neurons
        return [(1.0 - round(density * n_neurons),) for density in densities]


class Griffin(RankedRule):
    """Keep for the whole response the neurons that the prompt used most.

    The neurons are ranked by the norm over the prompt of their activation relative to the token's;
    the threshold is on the rank, so each prompt keeps the same number.

    Source:
        Dong, Chen, Chi, "Prompt-prompted adaptive structured pruning for efficient LLM
        generation" (GRIFFIN), 2024.
    """

    observes = True

    def __init__(self, name: str, fit: Fit) -> None:
        """Start without a prompt."""
        super().__init__(name, fit.ffns)
        self._rank: list[Tensor | None] = [None] * len(fit.ffns)

    def observe(self, layer: int, x: Tensor, where: Where) -> None:
        """Rank the neurons of one layer by what every prompt did with them."""
        _, a = activations(self.ffns[layer], x)
        a = a.float()
        tiny = torch.finfo(torch.float32).tiny
        square = (a / a.norm(dim=1, keepdim=True).clamp_min(tiny)).square()
        length = torch.bincount(where.prompt_row, minlength=where.n_rows)
        self._rank[layer] = ranks(torch.segment_reduce(square, "sum", lengths=length))

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the negative rank of each neuron on the prompt."""
        rank = self._rank[layer]
        assert rank is not None, "observe comes first"
        return -rank.index_select(0, where.row)


class Teal(Rule):
    """Skip input channels of gate and up, and neurons of down, by their magnitude alone.

    Densities are uniform over layers and matrices; `GreedyTeal` searches them.

    Source:
        Liu et al., "Training-free activation sparsity in large language models" (TEAL), 2024.
    """

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate the input first, then the intermediate activation that it leaves."""
        some = sample.some(ROWS)
        layers = []
        for layer, x in enumerate(some.inputs):
            found = []
            for density, channel in zip(densities, cuts(x.abs(), densities), strict=True):
                a = self.inner(layer, x, keep_large(x, channel)[1])
                found.append((channel, *cuts(a.abs(), [density])))
            layers.append(found)
        return [tuple(of_layer[i] for of_layer in layers) for i in range(len(densities))]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the channels and the neurons of large magnitude."""
        used, kept_x = keep_large(x, thresholds[0])
        a = self.inner(layer, x, kept_x)
        keep, kept_a = keep_large(a, thresholds[1])
        counts = torch.stack([used.sum(dim=1), keep.sum(dim=1)], dim=1)
        return self.outer(layer, a, kept_a), counts

    def inner(self, layer: int, x: Tensor, kept: Tensor) -> Tensor:
        """Give the intermediate activation of an input of which some channels were kept."""
        return activations(self.ffns[layer], kept)[1]

    def outer(self, layer: int, a: Tensor, kept: Tensor) -> Tensor:
        """Give the output of an intermediate activation of which some neurons were kept."""
        out: Tensor = self.ffns[layer].down(kept)
        return out

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the columns of gate and up, the rows of down and the indices of both."""
        return self.sensor_bytes(shape) + channel_bytes(shape, counts)

    def density(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the fraction of the weights that was read."""
        return channel_density(shape, counts)


class Rounded(Rule):
    """Read everything, at fewer bits: plain round-to-nearest."""

    counts = ("neurons",)

    def __init__(self, name: str, fit: Fit, *, bits: int) -> None:
        """Round all three matrices of every layer."""
        super().__init__(name, fit.ffns)
        self._weights: list[list[Tensor]] = []
        self._n_bytes: dict[LayerShape, list[float]] = {}
        for layer, ffn in enumerate(fit.ffns):
            pairs = self.rounded(fit, layer, bits)
            self._weights.append([weight for weight, _ in pairs])
            n_bytes = sum(n_bytes for _, n_bytes in pairs)
            self._n_bytes.setdefault(ffn.shape, []).append(n_bytes)

    def rounded(self, fit: Fit, layer: int, bits: int) -> list[tuple[Tensor, float]]:
        """Give gate, up and down of one layer, rounded, each with its bytes."""
        ffn = fit.ffns[layer]
        return [quantize.round_to_nearest(m.weight, bits) for m in (ffn.gate, ffn.up, ffn.down)]

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Give no thresholds: there is nothing to choose."""
        return [((),) * len(self.ffns) for _ in densities]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run the whole layer with rounded weights."""
        gate, up, down = self._weights[layer]
        ffn = self.ffns[layer]
        a = activate(ffn, F.linear(x, gate, ffn.gate.bias)) * F.linear(x, up, ffn.up.bias)
        out = F.linear(a, down, ffn.down.bias)
        return out, where.row.new_full((len(x), 1), ffn.shape.n_neurons)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the bytes of all codes and scales, the mean over layers of this size."""
        members = self._n_bytes[shape]
        return sum(members) / len(members)


def ranks(score: Tensor) -> Tensor:
    """Give the place of every entry in its row, the largest first; ties to the lower index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device, dtype=torch.float32)
    return torch.empty_like(score, dtype=torch.float32).scatter_(1, order, place.expand_as(order))


def build(method: str, fit: Fit) -> Rule:
    """Fit the named rule to a model.

    Args:
        method: A name, see `default_methods`.
        fit: The model's layers, and the inputs to fit to.

    Raises:
        ValueError: The name is unknown, or its number is out of range.
    """
    kind, number = _parse(method)
    with torch.no_grad():
        return _makers(method, number, fit)[kind]()


def _makers(method: str, number: int, fit: Fit) -> dict[str, Callable[[], Rule]]:
    """What makes a rule of each kind."""
    return {
        "oracle-neuron": lambda: oracles.Oracle(method, fit.ffns),
        "teal": lambda: Teal(method, fit.ffns),
        "cats": lambda: Cats(method, fit.ffns),
        "griffin": lambda: Griffin(method, fit),
        "static": lambda: Static(method, fit),
        "planes": lambda: Planes(method, fit, bits=number),
        "ternary": lambda: Planes(method, fit, bits=TERNARY),
        "lowrank": lambda: LowRank(method, fit, number),
        "rtn": lambda: Rounded(method, fit, bits=number),
    }


def default_methods(shape: LayerShape) -> tuple[str, ...]:
    """Name the rules that an ablation of layers of this size compares."""
    ranks = sorted({max(1, shape.d // part) for part in (16, 8, 4)})
    return (
        "oracle-neuron",
        "ternary",
        "planes-b2",
        "planes-b3",
        "planes-b4",
        "teal",
        "cats",
        *(f"lowrank-{rank}" for rank in ranks),
        "griffin",
        "static",
        *(f"rtn-int{bits}" for bits in (8, 4, 3, 2)),
    )


def family(method: str) -> str:
    """Say what a method is: ``oracle``, ``few-bit``, ``selection`` or ``quantised``."""
    kind, _ = _parse(method)
    families = {"oracle-neuron": "oracle", "planes": "few-bit", "ternary": "few-bit"}
    return {**families, "rtn": "quantised"}.get(kind, "selection")


def _parse(method: str) -> tuple[str, int]:
    """Split a method's name in its kind and its number, 0 where it has none."""
    if method in ("oracle-neuron", "ternary", "teal", "cats", "griffin", "static"):
        return method, 0
    for kind, prefix in (("planes", "planes-b"), ("lowrank", "lowrank-"), ("rtn", "rtn-int")):
        number = method.removeprefix(prefix)
        if number != method and number.isdecimal() and len(number) < 6:
            return kind, int(number)
    raise ValueError(f"[ablate] method {method!r}: want one of {_METHODS}.")


def _check_rank(method: str, ffns: Iterable[Ffn], rank: int) -> None:
    limit = min(ffn.shape.d for ffn in ffns)
    if not 1 <= rank <= limit:
        raise ValueError(f"[ablate] {method}: want a rank from 1 to {limit}.")
