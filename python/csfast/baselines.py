"""Rules that choose what a feed-forward layer reads: ours, and published ones to compare with.

Every rule is written here again from its publication, for comparison only, and gets the same
treatment as ours: one threshold per layer (`Teal` has two), a quantile of the rule's own score
over the same calibration positions. Execution is masked dense, so these rules measure quality and
count bytes; they are not fast.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import planes, reference
from .models import Ffn
from .plan import LayerPlan
from .types import TERNARY, Code, LayerShape

BYTES = 2  # of a dense weight
INDEX_BYTES = 4  # of the number of one neuron or channel that is read
GROUP = 64  # weights that share a scale in round-to-nearest quantisation
ROWS = 4096  # positions whose scores give a quantile: a density is met to about .0005
_CLIPS = (0.45, 0.55, 0.65, 0.75, 0.85, 1.0)  # fractions of a group's maximum, tried in turn
_METHODS = (
    "oracle-neuron, planes-b<bits>, ternary, teal, cats, griffin, static, lowrank-<rank>, "
    "rtn-int<bits>"
)


def dense_bytes(shape: LayerShape) -> float:
    """Give the bytes of one layer's three matrices at 16 bits a weight."""
    return 3.0 * shape.d * shape.n_neurons * BYTES


class Rule(abc.ABC):
    """One way to run a feed-forward layer on part of its weights, with what it costs.

    A rule owns the operators that it was fitted with. Thresholds are given to every call, so one
    rule serves many densities.
    """

    observes = False  # whether the rule wants to see prompts

    def __init__(self, name: str, ffns: Sequence[Ffn]) -> None:
        """Keep the layers that the rule runs."""
        self.name = name
        self.ffns = ffns

    @abc.abstractmethod
    def thresholds(
        self, layer: int, x: Tensor, densities: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Calibrate one layer.

        Args:
            layer: Number of the layer.
            x: Inputs of the layer at positions that would run sparse, ``(n, d)``.
            densities: Fractions to keep on average, each in (0, 1].

        Returns:
            The thresholds of each density.
        """

    @abc.abstractmethod
    def run(self, layer: int, x: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Run one layer.

        Args:
            layer: Number of the layer.
            x: Inputs, ``(n, d)``, in the dtype of the weights.
            thresholds: From `thresholds`.

        Returns:
            The output ``(n, d)``, and how many input channels and how many neurons were read,
            summed over the ``n`` positions, ``(2,)`` int64.
        """

    @abc.abstractmethod
    def n_bytes(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give all bytes that one position reads of one layer, what choosing costs included.

        Args:
            shape: Sizes of the layer.
            channels: Input channels read, a mean may be fractional.
            neurons: Neurons read.
        """

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes that choosing costs before anything can be skipped."""
        return 0.0

    def density(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give the fraction of the layer that was executed, in the rule's own unit."""
        return neurons / shape.n_neurons

    def observe(self, layer: int, x: Tensor) -> None:  # noqa: B027 (most have no use for it)
        """Look at the inputs ``(n, d)`` that one layer gets from a new prompt, if `observes`."""


class NeuronRule(Rule):
    """A rule that keeps the neurons whose score reaches the threshold of the layer."""

    @abc.abstractmethod
    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Score the neurons.

        Args:
            layer: Number of the layer.
            x: Inputs, ``(n, d)``.
            gate: ``silu(x W_gate')``, ``(n, n_neurons)``; for rules that pay for it.
            a: ``gate * x W_up'``, ``(n, n_neurons)``; for rules that pay for it.

        Returns:
            ``(n, n_neurons)``, the larger the more wanted; not-a-number is kept.
        """

    def thresholds(
        self, layer: int, x: Tensor, densities: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Calibrate one layer: a quantile of its scores for each density."""
        x = _thinned(x)
        score = self.score(layer, x, *_activations(self.ffns[layer], x))
        return [(threshold,) for threshold in _cuts(score, densities)]

    def run(self, layer: int, x: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Run one layer on the neurons whose score is not below the threshold."""
        ffn = self.ffns[layer]
        gate, a = _activations(ffn, x)
        keep = ~(self.score(layer, x, gate, a) < thresholds[0])
        return masked_down(ffn, a, keep)

    def n_bytes(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give the sensor's bytes and three rows and an index for each neuron."""
        return self.sensor_bytes(shape) + neurons * _neuron_bytes(shape)


class Oracle(NeuronRule):
    """Keep by the true usage, known by magic: the limit of every rule that skips neurons."""

    def __init__(self, name: str, ffns: Sequence[Ffn]) -> None:
        """Take the norms of the down rows."""
        super().__init__(name, ffns)
        self._norm = [_down_norm(ffn) for ffn in ffns]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Give ``|a| ||w_down||``."""
        return a.float().abs() * self._norm[layer]


class Planes(NeuronRule):
    """The rule of csfast: usage estimated from few-bit codes of the neurons' own rows.

    The arithmetic of `csfast.sense` and `csfast.recover` in float32 matrix products, whose
    integers are exact below 2^24.
    """

    def __init__(
        self, name: str, ffns: Sequence[Ffn], equal: Sequence[Tensor], *, bits: Code
    ) -> None:
        """Code the rows of every layer; `equal` holds an equaliser ``(d,)`` for each."""
        super().__init__(name, ffns)
        self.bits = bits
        self._equal = [e.to(ffn.gate.weight.device) for e, ffn in zip(equal, ffns, strict=True)]
        setting = cast(int, bits)  # plans are typed for bits; their codes are those of `planes`
        self._value = []  # levels of the gate rows, then of the up rows, (2 n_neurons, d)
        self._row_scale = []  # (n_neurons, 2)
        for ffn, e in zip(ffns, self._equal, strict=True):
            if 127 * planes.level_max(bits) * ffn.shape.d >= 2**24:
                raise ValueError(
                    f"[ablate] {name} with d = {ffn.shape.d}: sums of float32 are exact "
                    f"below 2^24 only, want fewer bits."
                )
            weights = (ffn.gate.weight, ffn.up.weight, ffn.down.weight)
            layer = LayerPlan.fit(*weights, e, (setting,))
            codes = layer.encode(*weights, bits=setting)
            unpacked = planes.unpack(codes.transpose(0, 1).flatten(0, 1), bits, ffn.shape.d)
            self._value.append(planes.levels_of(unpacked, bits))
            self._row_scale.append(layer.row_scale[setting].to(e.device))

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Give the estimated usage; a scale that is not finite makes all of it not-a-number."""
        q, scale = reference.quantize(x, self._equal[layer])
        y = (q.float() @ self._value[layer].T).view(x.shape[0], 2, self.ffns[layer].shape.n_neurons)
        row_scale = self._row_scale[layer]
        z = scale[:, None, None] * row_scale.T * y
        usage: Tensor = (F.silu(z[:, 0]) * z[:, 1]).abs()
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

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Give the magnitude of the activated gate."""
        return gate.float().abs()

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the gate matrix, which is read whole."""
        return float(shape.d * shape.n_neurons * BYTES)

    def n_bytes(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give the gate matrix and, for each neuron, its up and down rows and its index."""
        return self.sensor_bytes(shape) + neurons * (2 * shape.d * BYTES + INDEX_BYTES)


class LowRank(NeuronRule):
    """Estimate usage from gate and up matrices of low rank, the best for the calibration inputs.

    ``W S = U s V'`` with ``S`` the square root of the inputs' second moment; the estimate is
    ``U_r s_r (V_r' S^-1 x)``, which is the rank-r matrix of least mean squared error.

    Source:
        Yuan et al., "ASVD: activation-aware singular value decomposition", 2023; the exact
        whitening is Wang et al., "SVD-LLM", 2024.
    """

    def __init__(
        self, name: str, ffns: Sequence[Ffn], factors: Sequence[Sequence[Factors]], rank: int
    ) -> None:
        """Cut factors of higher rank, a gate and an up pair for each layer, to `rank`."""
        super().__init__(name, ffns)
        self.rank = rank
        self._norm = [_down_norm(ffn) for ffn in ffns]
        self._factors = [
            [(left[:, :rank].contiguous(), right[:rank].contiguous()) for left, right in pair]
            for pair in factors
        ]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Give the usage of the low-rank estimate."""
        xf = x.float()
        z_gate, z_up = ((xf @ right.T) @ left.T for left, right in self._factors[layer])
        return (F.silu(z_gate) * z_up).abs() * self._norm[layer]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give two pairs of factors at 16 bits."""
        return 2.0 * self.rank * (shape.d + shape.n_neurons) * BYTES


class Static(NeuronRule):
    """Keep the same neurons for every token: those used most over the calibration positions."""

    def __init__(self, name: str, ffns: Sequence[Ffn], inputs: Sequence[Tensor]) -> None:
        """Average the usage over the `inputs` ``(n, d)`` of each layer."""
        super().__init__(name, ffns)
        self._usage = []
        for ffn, x in zip(ffns, inputs, strict=True):
            _, a = _activations(ffn, x)
            self._usage.append(a.float().square().mean(dim=0).sqrt() * _down_norm(ffn))

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Give the mean usage, whatever the token."""
        return self._usage[layer].expand(x.shape[0], -1)


class Griffin(NeuronRule):
    """Keep for the whole response the neurons that the prompt used most.

    The neurons are ranked by the norm over the prompt of their activation relative to the token's;
    the threshold is on the rank, so each prompt keeps the same number.

    Source:
        Dong, Chen, Chi, "Prompt-prompted adaptive structured pruning for efficient LLM
        generation" (GRIFFIN), 2024.
    """

    observes = True

    def __init__(self, name: str, ffns: Sequence[Ffn]) -> None:
        """Start without a prompt."""
        super().__init__(name, ffns)
        self._rank: list[Tensor | None] = [None] * len(ffns)

    def observe(self, layer: int, x: Tensor) -> None:
        """Rank the neurons of one layer by what the prompt did with them."""
        _, a = _activations(self.ffns[layer], x)
        a = a.float()
        relative = a / a.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        order = relative.norm(dim=0).argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        self._rank[layer] = rank

    def thresholds(
        self, layer: int, x: Tensor, densities: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Give the least score of the first neurons; nothing to calibrate."""
        n_neurons = self.ffns[layer].shape.n_neurons
        return [(1.0 - round(density * n_neurons),) for density in densities]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Give the negative rank of each neuron on the prompt."""
        rank = self._rank[layer]
        assert rank is not None, "observe comes first"
        return (-rank.float()).expand(x.shape[0], -1)


class Teal(Rule):
    """Skip input channels of gate and up, and neurons of down, by their magnitude alone.

    Densities are uniform over layers and matrices; the publication also searches them greedily.

    Source:
        Liu et al., "Training-free activation sparsity in large language models" (TEAL), 2024.
    """

    def thresholds(
        self, layer: int, x: Tensor, densities: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Calibrate the input first, then the intermediate activation that it leaves."""
        x = _thinned(x)
        found = []
        for density, channel in zip(densities, _cuts(x.abs(), densities), strict=True):
            _, a = _activations(self.ffns[layer], _keep(x, channel))
            found.append((channel, *_cuts(a.abs(), [density])))
        return found

    def run(self, layer: int, x: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Run one layer on the channels and the neurons of large magnitude."""
        ffn = self.ffns[layer]
        used = ~(x.float().abs() < thresholds[0])
        _, a = _activations(ffn, torch.where(used, x, torch.zeros_like(x)))
        out, kept = masked_down(ffn, a, ~(a.float().abs() < thresholds[1]))
        return out, torch.stack([used.sum(), kept[1]])

    def n_bytes(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give the columns of gate and up, the rows of down and the indices of both."""
        column = 2 * shape.n_neurons * BYTES + INDEX_BYTES
        return channels * column + neurons * (shape.d * BYTES + INDEX_BYTES)

    def density(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give the fraction of the weights that was read."""
        return (2 * channels / shape.d + neurons / shape.n_neurons) / 3


class Rounded(Rule):
    """Read everything, at fewer bits: plain round-to-nearest with one scale for 64 weights."""

    def __init__(self, name: str, ffns: Sequence[Ffn], *, bits: int) -> None:
        """Round all three matrices of every layer."""
        super().__init__(name, ffns)
        self._weights = []
        self._bytes = {}
        for ffn in ffns:
            pairs = [round_to_nearest(m.weight, bits) for m in (ffn.gate, ffn.up, ffn.down)]
            self._weights.append([weight for weight, _ in pairs])
            self._bytes[ffn.shape] = sum(n_bytes for _, n_bytes in pairs)

    def thresholds(
        self, layer: int, x: Tensor, densities: Sequence[float]
    ) -> list[tuple[float, ...]]:
        """Give no thresholds: there is nothing to choose."""
        return [() for _ in densities]

    def run(self, layer: int, x: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Run the whole layer with rounded weights."""
        gate, up, down = self._weights[layer]
        out = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        shape = self.ffns[layer].shape
        kept = torch.tensor([shape.d, shape.n_neurons], device=x.device) * x.shape[0]
        return out, kept

    def n_bytes(self, shape: LayerShape, channels: float, neurons: float) -> float:
        """Give the bytes of all codes and scales."""
        return self._bytes[shape]


def round_to_nearest(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    """Round a matrix to few bits, in groups of 64 weights of a row.

    Two usual codes are tried and the better one (least squared error over the matrix) is taken:
    symmetric with the best of six clipping points (one 16-bit scale a group), and from minimum to
    maximum (a 16-bit scale and a 16-bit minimum).

    Args:
        weight: ``(n, d)``, floating.
        bits: 2 to 8.

    Returns:
        The rounded matrix in the shape and dtype of `weight`, and its size in bytes.

    Raises:
        ValueError: `bits` is out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"[ablate] rtn-int{bits}: want 2 to 8 bits.")
    n, d = weight.shape
    groups = -(-d // GROUP)
    w = F.pad(weight.detach().float(), (0, groups * GROUP - d), mode="replicate")
    w = w.view(n, groups, GROUP)
    symmetric, affine = _symmetric(w, bits), _affine(w, bits)
    error = [(rounded - w).square().sum().item() for rounded in (symmetric, affine)]
    best, scales = (symmetric, 1) if error[0] <= error[1] else (affine, 2)
    n_bytes = n * d * bits / 8 + n * groups * 2.0 * scales
    return best.flatten(1)[:, :d].to(weight.dtype).contiguous(), n_bytes


def build(methods: Iterable[str], ffns: Sequence[Ffn], inputs: Sequence[Tensor]) -> list[Rule]:
    """Fit the named rules to a model.

    Args:
        methods: Names, see `default_methods`.
        ffns: The layers, from `models.find_ffns`.
        inputs: Inputs of each layer at calibration positions, ``(n, d)``, every task with equal
            weight.

    Returns:
        One rule a name, in order.

    Raises:
        ValueError: A name is unknown, or its number is out of range.
    """
    parsed = [_parse(name) for name in methods]
    ranks = [number for kind, number in parsed if kind == "lowrank"]
    for rank in ranks:
        limit = min(ffn.shape.d for ffn in ffns)
        if not 1 <= rank <= limit:
            raise ValueError(f"[ablate] lowrank-{rank}: want a rank from 1 to {limit}.")
    factors = [_factors(ffn, x, max(ranks)) for ffn, x in _zip(ffns, inputs)] if ranks else []
    equal = [planes.equalizer(x.float().square().mean(dim=0)) for x in inputs]
    makers: dict[str, Callable[[str, int], Rule]] = {
        "oracle-neuron": lambda name, _: Oracle(name, ffns),
        "teal": lambda name, _: Teal(name, ffns),
        "cats": lambda name, _: Cats(name, ffns),
        "griffin": lambda name, _: Griffin(name, ffns),
        "static": lambda name, _: Static(name, ffns, inputs),
        "planes": lambda name, bits: Planes(name, ffns, equal, bits=bits),
        "ternary": lambda name, _: Planes(name, ffns, equal, bits=TERNARY),
        "lowrank": lambda name, rank: LowRank(name, ffns, factors, rank),
        "rtn": lambda name, bits: Rounded(name, ffns, bits=bits),
    }
    return [
        makers[kind](name, number) for name, (kind, number) in zip(methods, parsed, strict=True)
    ]


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


def planes_bytes(shape: LayerShape, bits: Code, neurons: float) -> float:
    """Give all bytes that the few-bit rule reads of one layer for one position."""
    return planes.n_bytes(shape.n_neurons, shape.d, bits) + neurons * _neuron_bytes(shape)


def masked_down(ffn: Ffn, a: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Project the kept activations down; give the output and ``(channels, neurons)`` read."""
    out: Tensor = ffn.down(torch.where(keep, a, torch.zeros_like(a)))
    return out, torch.stack(
        [keep.new_tensor(a.shape[0] * ffn.shape.d, dtype=torch.int64), keep.sum()]
    )


Factors = tuple[Tensor, Tensor]  # left (n_neurons, rank), right (rank, d)


def _neuron_bytes(shape: LayerShape) -> int:
    """Three rows of one neuron, and its number."""
    return 3 * shape.d * BYTES + INDEX_BYTES


def _parse(method: str) -> tuple[str, int]:
    """Split a method's name in its kind and its number, 0 where it has none."""
    if method in ("oracle-neuron", "ternary", "teal", "cats", "griffin", "static"):
        return method, 0
    for kind, prefix in (("planes", "planes-b"), ("lowrank", "lowrank-"), ("rtn", "rtn-int")):
        number = method.removeprefix(prefix)
        if number != method and number.isdecimal() and len(number) < 6:
            return kind, int(number)
    raise ValueError(f"[ablate] method {method!r}: want one of {_METHODS}.")


def _activations(ffn: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activated gate and the intermediate activation, both ``(n, n_neurons)``."""
    gate = F.silu(ffn.gate(x))
    return gate, gate * ffn.up(x)


def _down_norm(ffn: Ffn) -> Tensor:
    """Norm of each neuron's down row, ``(n_neurons,)``, float32."""
    norm: Tensor = ffn.down.weight.detach().float().norm(dim=0)
    return norm


def _cuts(score: Tensor, densities: Sequence[float]) -> list[float]:
    """The threshold that keeps each fraction of the scores, ties included."""
    flat = score.detach().float().cpu().numpy().ravel()
    places = [flat.size - round(density * flat.size) for density in densities]
    inside = sorted({place for place in places if 0 < place < flat.size})
    # Linear in time whatever repeats, unlike torch.kthvalue on the CPU.
    parted = np.partition(flat, inside) if inside else flat
    edges = {0: float("-inf"), flat.size: float("inf")}
    return [edges[place] if place in edges else float(parted[place]) for place in places]


def _thinned(x: Tensor) -> Tensor:
    """Evenly spaced rows, few enough for a quantile of their scores."""
    return x[:: max(1, -(-x.shape[0] // ROWS))]


def _keep(x: Tensor, threshold: float) -> Tensor:
    """The entries whose magnitude reaches the threshold, zeros elsewhere."""
    return torch.where(x.float().abs() < threshold, torch.zeros_like(x), x)


def _factors(ffn: Ffn, x: Tensor, rank: int) -> list[Factors]:
    """The activation-aware factors of gate and up, float32, largest singular values first."""
    xd = x.double()
    moment = xd.T @ xd / max(1, x.shape[0])
    # A ten-thousandth of the mean keeps directions that the sample never showed invertible.
    ridge = 1e-4 * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eigen, basis = torch.linalg.eigh(moment + ridge * torch.eye(len(moment)).to(moment))
    root = (basis * eigen.clamp_min(0).sqrt()) @ basis.T
    inverse = (basis / eigen.clamp_min(ridge).sqrt()) @ basis.T
    pair = []
    for linear in (ffn.gate, ffn.up):
        u, s, vh = torch.linalg.svd(linear.weight.detach().double() @ root, full_matrices=False)
        pair.append(((u[:, :rank] * s[:rank]).float(), (vh[:rank] @ inverse).float()))
    return pair


def _symmetric(w: Tensor, bits: int) -> Tensor:
    """Levels at odd multiples of half a step, so that none is wasted on a zero."""
    half = 2 ** (bits - 1)
    peak = w.abs().amax(dim=-1, keepdim=True)
    best = torch.zeros_like(w)
    least = torch.full_like(peak, float("inf"))
    for clip in _CLIPS:
        step = (peak * clip / half).half().float()
        code = torch.floor(w / torch.where(step > 0, step, torch.ones_like(step)))
        rounded = (code.clamp(-half, half - 1) + 0.5) * step
        error = (rounded - w).square().sum(dim=-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, rounded, best), torch.where(better, error, least)
    return best


def _affine(w: Tensor, bits: int) -> Tensor:
    """Levels from the group's minimum to its maximum."""
    low, high = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)
    low = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float()
    code = torch.round((w - low) / torch.where(step > 0, step, torch.ones_like(step)))
    rounded: Tensor = code.clamp(0, 2**bits - 1) * step + low
    return rounded


def _zip(ffns: Sequence[Ffn], inputs: Sequence[Tensor]) -> Iterable[tuple[Ffn, Tensor]]:
    return zip(ffns, inputs, strict=True)
