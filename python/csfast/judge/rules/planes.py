"""Rules of csfast: usage estimated from few-bit codes of the neurons' own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...codes import feedback, planes
from ...judge import Sample, Thresholds, Where
from ...types import Code, LayerShape
from ..rules import BlockRule, Fit, NeuronRule, check_block, cuts


class Planes(NeuronRule):
    """The rule of csfast: usage estimated from few-bit codes of the neurons' own rows.

    The arithmetic of `csfast.sense` and `csfast.recover` in float32 matrix products, whose
    integers are exact below 2^24.
    """

    def __init__(self, name: str, fit: Fit, bits: Code, *, has_feedback: bool = True) -> None:
        """Code the rows of every layer, with the channels evened out over the sample."""
        super().__init__(name, fit.ffns)
        self.bits = bits
        for ffn in fit.ffns:
            if 127 * planes.level_max(bits) * ffn.shape.d >= 2**24:
                raise ValueError(
                    f"[ablate] {name} with d = {ffn.shape.d}: sums of float32 are exact "
                    f"below 2^24 only, want fewer bits."
                )
        self._codes = fit.once(
            ("planes", bits, has_feedback),
            lambda: [_coded(fit, layer, bits, has_feedback) for layer in range(len(fit.ffns))],
        )

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimated usage; a scale that is not finite makes all of it not-a-number."""
        codes = self._codes[layer]
        q, scale = planes.quantize(x, codes.equal)
        y = (q.float() @ codes.value.T).view(len(x), 2, -1)
        z = scale[:, None, None] * codes.row_scale.T * y
        if codes.offset is not None:
            z = z + codes.offset.T
        usage: Tensor = (self.ffns[layer].act(z[:, 0]) * z[:, 1]).abs()
        return usage

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the codes, their scales and the equaliser."""
        return float(planes.n_bytes(shape.n_neurons, shape.d, self.bits))


class BlockPlanes(BlockRule):
    """The rule of csfast for blocks: the root of the sum of squared estimates, for large tiles."""

    def __init__(self, name: str, fit: Fit, bits: int, block: int) -> None:
        """Code the rows and cluster the neurons."""
        check_block(name, fit.ffns, block)
        super().__init__(name, fit.ffns, fit.layouts(block))
        self._planes = Planes(name, fit, bits)

    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimated usage of every block."""
        return self.layouts[layer].grouped(self._planes.score(layer, x, a, a, where))

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of the codes, their scales and the equaliser."""
        return self._planes.sensor_bytes(shape)


class JointPlanes(Planes):
    """The rule of csfast for batches that share a support: mean estimate of some requests.

    Documents that run together are requests: in every step the positions of equal number vote,
    those of finished ones do not. Every request counts the bytes of the joint support as if it ran
    alone, so that a row shows what sharing costs; what a step of the batch reads is the same once.
    """

    def __init__(self, name: str, fit: Fit, bits: int, requests: int) -> None:
        """Code the rows; a support is shared by at most so many requests."""
        super().__init__(name, fit, bits)
        if not 2 <= requests <= 256:
            raise ValueError(f"[ablate] {name}: want 2 to 256 requests.")
        self._requests = requests

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate one threshold for each number of voters: the fewer, the more their means vary.

        Voters are positions far apart, of all tasks.
        """
        found: list[list[tuple[float, ...]]] = [[] for _ in densities]
        for score in self.sample_scores(sample):
            by_voters = []
            for voters in range(1, self._requests + 1):
                n = max(1, len(score) // voters)
                parts = score[: n * voters].view(-1, n, score.shape[1])
                by_voters.append(cuts(parts.mean(dim=0), densities))
            for i, thresholds in enumerate(zip(*by_voters, strict=True)):
                found[i].append(thresholds)
        return [tuple(layers) for layers in found]

    def keep(
        self,
        layer: int,
        x: Tensor,
        gate: Tensor,
        a: Tensor,
        thresholds: tuple[float, ...],
        where: Where,
    ) -> Tensor:
        """Choose for every position what the mean over its requests' estimates wants."""
        score = self.score(layer, x, gate, a, where)
        groups = -(-where.n_rows // self._requests)
        # Document r is request r // groups of group r % groups: long beside short.
        voted = torch.cat([score, torch.ones_like(score[:, :1])], dim=1)
        places = self._requests * groups * where.n_columns
        table = score.new_zeros(places, voted.shape[1])
        table.index_copy_(0, where.row * where.n_columns + where.position, voted)
        total = table.view(self._requests, groups * where.n_columns, -1).sum(dim=0)
        voters = total[:, -1].clamp_min(1)
        least = torch.tensor(thresholds, device=x.device).index_select(0, voters.long() - 1)
        keep = ~(total[:, :-1] / voters[:, None] < least[:, None])
        return keep.index_select(0, where.row % groups * where.n_columns + where.position)


@dataclass(frozen=True, eq=False)
class _Codes:
    """Few-bit codes of one layer as numbers."""

    equal: Tensor  # (d,)
    value: Tensor  # (2 n_neurons, d): levels of the gate rows, then of the up rows
    row_scale: Tensor  # (n_neurons, 2)
    offset: Tensor | None  # (n_neurons, 2): from the biases


def _coded(fit: Fit, layer: int, bits: Code, has_feedback: bool) -> _Codes:
    ffn, x = fit.ffns[layer], fit.sample.inputs[layer]
    equal = planes.equalizer(x.float().square().mean(dim=0)).to(x.device)
    factor = None
    if has_feedback:
        wide = equal.double()
        factor = feedback.spread(fit.moment(layer) * wide[:, None] * wide)
    levels, scales = [], []
    for weight in ffn.weights[:2]:
        scales.append(planes.fit_scale(weight, equal, bits))
        packed = planes.encode(weight, equal, scales[-1], bits, factor)
        levels.append(planes.levels_of(planes.unpack(packed, bits, ffn.shape.d), bits))
    row_scale = torch.stack([scales[0], scales[1] * ffn.down_norm()], dim=1)
    return _Codes(equal, torch.cat(levels), row_scale, ffn.offset())
