"""The nouns of the operations: a gated feed-forward layer as it is bound, and what they find.

The parts of a layer and their fields bear the names that they have in ``csfast/layer.h``. T is one
of float32, float16 and bfloat16, the same for all tensors of a layer that have it and for its
activations. All tensors are contiguous and on one device.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from torch import Tensor

from .types import Code


@dataclasses.dataclass(frozen=True, eq=False)
class Sensor:
    """What a layer's neurons are measured by.

    Attributes:
        codes: Packed codes, ``(n_neurons, 2, groups, group_bytes)``, uint8, see `planes.pack`.
        equal: Channel equaliser, ``(d,)``, float32.
        row_scale: Scales of the rows' codes, ``(n_neurons, 2)``, float32, gate then up; the second
            holds the norm of the neuron's down row as well.
        bits: Code of a weight: 1 to 4 bits, or ``"ternary"``.
        offset: Added to the scaled measurements, ``(n_neurons, 2)``, float32: the biases, the
            second times the norm of the neuron's down row.
    """

    codes: Tensor
    equal: Tensor
    row_scale: Tensor
    bits: Code
    offset: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What is computed with.

    Attributes:
        gate: Gate projection, ``(n_neurons, d)``, T.
        up: Up projection, ``(n_neurons, d)``, T.
        down_t: Transposed down projection, ``(n_neurons, d)``, T.
        gate_bias: Bias of the gate projection, ``(n_neurons,)``, T.
        up_bias: Bias of the up projection, ``(n_neurons,)``, T.
        down_bias: Bias of the down projection, ``(d,)``, T.
    """

    gate: Tensor
    up: Tensor
    down_t: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """Which tiles of a layer's neurons are kept.

    Every row of a batch has a list of its own, or with votes all rows have one together: `lists` is
    the batch, or 1.

    Attributes:
        threshold: Usage from which a tile is kept, ``(lists,)``, float32.
        tile_rows: Neurons a tile, at least 1: those that are kept or skipped together.
        votes: What each row counts in a joint decision, ``(batch,)``, float32, none negative; see
            `ops.recover`.
        cap: The most tiles that each list keeps, ``(lists,)``, int32: of a longer one the largest
            usages, ties going to the lower index and NaN ranking as infinity. A scale that is not
            finite keeps everything nevertheless.
    """

    threshold: Tensor
    tile_rows: int = 1
    votes: Tensor | None = None
    cap: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A gated feed-forward layer.

    Attributes:
        sensor: What its neurons are measured by.
        weights: What is computed with.
        decision: Which of its tiles are kept.
        activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
    """

    sensor: Sensor
    weights: Weights
    decision: Decision
    activation: str = "silu"

    def detached(self) -> Layer:
        """Give the same without autograd, which refuses to show its tensors to other libraries."""
        parts = (self.sensor, self.weights, self.decision)
        sensor, weights, decision = (_detached(part) for part in parts)
        return Layer(sensor, weights, decision, self.activation)


def _detached(part: Any) -> Any:
    tensors = {name: t.detach() for name, t in vars(part).items() if isinstance(t, Tensor)}
    return dataclasses.replace(part, **tensors)


@dataclasses.dataclass(frozen=True)
class Support:
    """Which tiles matter to each row of a batch, or to all together: from `ops.recover`."""

    index: Tensor  # (lists, n_tiles_max) int32, ascending up to count, 0 beyond
    count: Tensor  # (lists,) int32
    usage: Tensor  # (lists, n_tiles_max) float32: what the measurements promise
    missed: Tensor  # (lists,) float32: sum of usage^2 over the tiles that are not in it
    tile_rows: int = 1  # tile t is neurons t * tile_rows .. (t + 1) * tile_rows - 1


@dataclasses.dataclass(frozen=True)
class TileList:
    """Which tiles of neurons each row of a batch reads, from `ops.tile` or `ops.select`.

    One list for each row, or one for all of them.
    """

    tile: Tensor  # (lists, n_tiles_max) int32, ascending up to n_tiles, 0 beyond
    n_tiles: Tensor  # (lists,) int32
    tile_rows: int  # tile t is neurons t * tile_rows .. (t + 1) * tile_rows - 1
    dropped: Tensor | None = None  # (lists,) int32: tiles that only a cap left out, if there is one


class PursuitStatus(enum.IntEnum):
    """Why `ops.omp` took no further atom."""

    CONVERGED = 0  # what is left is within the tolerance, or no atom explains any of it
    BUDGET = 1  # the budget is spent
    ZERO = 2  # the signal has no energy
    DEPENDENT = 3  # the next atom lies in the span of those taken, up to rounding
    NOT_FINITE = 4  # something is not finite, or an energy is negative: nothing is kept
    NO_GAIN = 5  # the last step explained too little


@dataclasses.dataclass(frozen=True)
class Pursuit:
    """Which atoms explain each signal of a batch, from `ops.omp`."""

    index: Tensor  # (batch, budget_max) int32, in the order taken, 0 beyond count
    # Their least-squares coefficients, 0 beyond count; without columns if they were not asked for.
    coef: Tensor  # (batch, budget_max) float32
    count: Tensor  # (batch,) int32
    residual: Tensor  # (batch,) float32: norm of what they leave unexplained
    status: Tensor  # (batch,) int32: a `PursuitStatus`
