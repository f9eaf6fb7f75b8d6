"""Oracles: rules that know what they cannot know, the limits of all others.

They read nothing to choose, so their loss is that of the structure they skip: neurons, blocks,
channels, heads or layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...judge import BYTES, Batch, Note, Rule, Sample, Thresholds, Where, dense_bytes
from ...models import Ffn
from ...types import LayerShape
from ..rules import (
    INDEX_BYTES,
    ROWS,
    BlockRule,
    NeuronRule,
    channel_bytes,
    channel_density,
    cuts,
    masked_down,
)

STREAM = "stream"  # inputs of the decoder blocks, among what a sample watched
HEADS = "heads"  # inputs of the output projections of attention


class Oracle(NeuronRule):
    """Keep by the true usage, known by magic: the limit of every rule that skips neurons."""

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give ``|a| ||w_down||``."""
        return self.usage(layer, a)


class BlockOracle(BlockRule):
    """Keep blocks by the root of the sum of their squared true usages."""

    def block_score(self, layer: int, x: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the true usage of every block."""
        return self.layouts[layer].grouped(self.usage(layer, a))


class ChannelOracle(Rule):
    """Skip input channels of gate and up, and neurons of down by their true usage.

    A channel counts by ``|x_i|`` times the norm of its columns in gate and up together; the usage
    is that of the layer with all channels, so the second choice does not suffer from the first.
    """

    def __init__(self, name: str, ffns: Sequence[Ffn]) -> None:
        """Take the norms of columns and down rows."""
        super().__init__(name, ffns)
        self._column = []
        self._norm = []
        for ffn in ffns:
            gate, up, down = (m.weight.detach().float() for m in (ffn.gate, ffn.up, ffn.down))
            self._column.append((gate.square().sum(dim=0) + up.square().sum(dim=0)).sqrt())
            self._norm.append(down.norm(dim=0))

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate channels and neurons of every layer to the same density."""
        some = sample.some(ROWS)
        layers = []
        for layer, x in enumerate(some.inputs):
            channel = cuts(x.float().abs() * self._column[layer], densities)
            _, a = self.ffns[layer].activations(x)
            neuron = cuts(a.float().abs() * self._norm[layer], densities)
            layers.append(list(zip(channel, neuron, strict=True)))
        return [tuple(of_layer[i] for of_layer in layers) for i in range(len(densities))]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run one layer on the channels and the neurons that matter."""
        ffn = self.ffns[layer]
        _, a = ffn.activations(x)
        keep = ~(a.float().abs() * self._norm[layer] < thresholds[1])
        used = ~(x.float().abs() * self._column[layer] < thresholds[0])
        _, a = ffn.activations(torch.where(used, x, 0.0))
        counts = torch.stack([used.sum(dim=1), keep.sum(dim=1)], dim=1)
        return masked_down(ffn, a, keep), counts

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the columns of gate and up, the rows of down and the indices of both."""
        return channel_bytes(shape, counts)

    def density(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the fraction of the weights that was read."""
        return channel_density(shape, counts)


class LayerOracle(Rule):
    """Skip whole feed-forward layers by the norm of their output.

    The norm is taken relative to the mean norm of what enters the decoder block, so that one
    threshold serves all layers.
    """

    counts = ("layers",)
    structure = "layer"

    def __init__(self, name: str, ffns: Sequence[Ffn], stream: Sequence[Tensor]) -> None:
        """Take the mean norm of what enters every decoder block, from inputs ``(n, d)``."""
        super().__init__(name, ffns)
        self._scale = [1 / float(x.float().norm(dim=1).mean()) for x in stream]

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Find one quantile over positions and layers for each density."""
        some = sample.some(ROWS)
        scores = [self._score(layer, self._out(layer, x)) for layer, x in enumerate(some.inputs)]
        return [((cut,),) * len(self.ffns) for cut in cuts(torch.stack(scores), densities)]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Run the layer where its output is large."""
        out = self._out(layer, x)
        keep = ~(self._score(layer, out) < thresholds[0])[:, None]
        return torch.where(keep, out, 0.0), keep.long()

    def full(self, shape: LayerShape) -> tuple[float, ...]:
        """Give the one layer."""
        return (1.0,)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give the bytes of the layer if it runs."""
        return counts[0] * dense_bytes(shape)

    def _out(self, layer: int, x: Tensor) -> Tensor:
        ffn = self.ffns[layer]
        out: Tensor = ffn.down(ffn.activations(x)[1])
        return out

    def _score(self, layer: int, out: Tensor) -> Tensor:
        norm: Tensor = out.float().norm(dim=1)
        return norm * self._scale[layer]


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention beside one feed-forward layer.

    Attributes:
        output: Its output projection, ``(d, n_heads * head_dim)``.
        n_heads: Query heads.
        head_bytes: Query rows and output columns of one head, and its number.
        rest_bytes: Key and value projections, which are always computed.
    """

    output: nn.Linear
    n_heads: int
    head_bytes: float
    rest_bytes: float


def find_attention(model: nn.Module, ffns: Sequence[Ffn]) -> list[Attention]:
    """Find the attention beside every feed-forward layer, by its child ``o_proj``.

    Raises:
        ValueError: A decoder block has none, or its heads do not divide the projection.
    """
    found = []
    for ffn in ffns:
        block = model.get_submodule(ffn.name.rpartition(".")[0])
        members = [m for m in block.children() if isinstance(getattr(m, "o_proj", None), nn.Linear)]
        width = getattr(members[0], "head_dim", None) if len(members) == 1 else None
        if not isinstance(width, int):
            raise ValueError(
                f"[ablate] oracle-head: no attention with o_proj and head_dim beside {ffn.name}: "
                "want one."
            )
        output = members[0].o_proj
        assert isinstance(output, nn.Linear)
        n_heads = output.in_features // width
        linear = sum(m.weight.numel() for m in members[0].children() if isinstance(m, nn.Linear))
        head = 2 * ffn.shape.d * width
        found.append(
            Attention(
                output,
                n_heads,
                float(head * BYTES + INDEX_BYTES),
                float((linear - n_heads * head) * BYTES),
            )
        )
    return found


class HeadOracle(Rule):
    """Skip attention heads by the norm of what they would add to the output.

    Keys and values of all heads are computed and kept, so later tokens see them.
    """

    counts = ("heads",)
    structure = "attention"

    def __init__(self, name: str, ffns: Sequence[Ffn], attention: Sequence[Attention]) -> None:
        """Take the square of every head's part of the output projection."""
        super().__init__(name, ffns)
        self._attention = attention
        self._square = []  # (n_heads, head_dim, head_dim) each
        for each in attention:
            weight = each.output.weight.detach().float()
            part = weight.view(len(weight), each.n_heads, -1)
            self._square.append(torch.einsum("dhi,dhj->hij", part, part))

    def calibrate(self, sample: Sample, densities: Sequence[float]) -> list[Thresholds]:
        """Calibrate every layer by itself, on the inputs of its output projection."""
        inputs = sample.some(ROWS).watched[HEADS]
        layers = [cuts(self._score(layer, x), densities) for layer, x in enumerate(inputs)]
        return [tuple((of_layer[i],) for of_layer in layers) for i in range(len(densities))]

    def run(
        self, layer: int, x: Tensor, thresholds: tuple[float, ...], where: Where
    ) -> tuple[Tensor, Tensor]:
        """Leave heads out of the input of the output projection, ``(n, n_heads * head_dim)``."""
        keep = ~(self._score(layer, x) < thresholds[0])
        heads = x.view(*keep.shape, -1)
        kept = torch.where(keep[:, :, None], heads, 0.0).flatten(1)
        return kept, keep.sum(dim=1, keepdim=True)

    @contextlib.contextmanager
    def patched(self, thresholds: Thresholds, batch: Batch, note: Note) -> Iterator[None]:
        """Take heads out before the output projection of every layer."""

        def hook(layer: int, x: Tensor) -> tuple[Tensor]:
            out, counts = self.run(layer, batch.gather(x), thresholds[layer], batch.where)
            note(layer, counts)
            return (batch.scatter(out),)

        handles = []
        try:
            for layer, each in enumerate(self._attention):
                handles.append(
                    each.output.register_forward_pre_hook(
                        lambda _, args, layer=layer: hook(layer, args[0])
                    )
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def full(self, shape: LayerShape) -> tuple[float, ...]:
        """Give all heads."""
        return (float(self._attention[0].n_heads),)

    def n_bytes(self, shape: LayerShape, counts: Sequence[float]) -> float:
        """Give keys and values of all heads, queries and output of those kept."""
        return self._attention[0].rest_bytes + counts[0] * self._attention[0].head_bytes

    def dense_bytes(self, shape: LayerShape) -> float:
        """Give the bytes of all linear layers of attention."""
        each = self._attention[0]
        return each.rest_bytes + each.n_heads * (each.head_bytes - INDEX_BYTES)

    def _score(self, layer: int, x: Tensor) -> Tensor:
        """Norm of what every head adds, ``(n, n_heads)``."""
        heads = x.float().view(len(x), self._attention[layer].n_heads, -1)
        inner: Tensor = torch.einsum("nhi,hij->nhj", heads, self._square[layer])
        return (inner * heads).sum(dim=2).clamp_min(0).sqrt()
