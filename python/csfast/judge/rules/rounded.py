"""Rules that read every weight at fewer bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...judge import Rule, Sample, Thresholds, Where
from ...types import LayerShape
from .. import quantize
from ..rules import Fit, second_moment


class Rounded(Rule):
    """Read everything, at fewer bits: plain round-to-nearest."""

    counts = ("neurons",)

    def __init__(self, name: str, fit: Fit, bits: int) -> None:
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
        a = ffn.act(F.linear(x, gate, ffn.gate.bias)) * F.linear(x, up, ffn.up.bias)
        out = F.linear(a, down, ffn.down.bias)
        return out, where.row.new_full((len(x), 1), ffn.shape.n_neurons)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the bytes of all codes and scales, the mean over layers of this size."""
        members = self._n_bytes[shape]
        return sum(members) / len(members)


class Calibrated(Rounded):
    """Read everything, at fewer bits, rounded with feedback on the calibration inputs.

    The down projection is fitted to what the rounded gate and up projections give it.
    """

    def rounded(self, fit: Fit, layer: int, bits: int) -> list[tuple[Tensor, float]]:
        """Give gate, up and down of one layer, each with its bytes."""
        ffn = fit.ffns[layer]
        x = fit.sample.inputs[layer]
        gate, up = (quantize.gptq(m.weight, fit.moment(layer), bits) for m in (ffn.gate, ffn.up))
        a = ffn.act(F.linear(x, gate[0], ffn.gate.bias))
        a = a * F.linear(x, up[0], ffn.up.bias)
        return [gate, up, quantize.gptq(ffn.down.weight, second_moment(a), bits)]
