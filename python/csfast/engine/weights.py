"""A model and its sketch as the native engine takes them: tensors by name, none of them copied."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .. import models
from ..models import Decoder
from ..sketches import Matrix, Sketch

# Levels that a draft reads: the first of every matrix, and of the head as many as there are, where
# few bits cost the most.
_OF_LAYERS, _OF_HEAD = 1, None


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """The levels of a coded matrix that drafts read.

    Attributes:
        turn: Words of its rotation, see `csfast.codes.rotation.Rotation`.
        bits: Of each level.
        codes: Likewise.
        steps: Likewise.
    """

    turn: Tensor
    bits: tuple[int, ...]
    codes: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]


def code_of(matrix: Matrix, n_levels: int | None) -> Code:
    """Give the first levels of a matrix; all for None."""
    levels = matrix.read(n_levels)
    return Code(
        matrix.rotation.words().contiguous(),
        tuple(level.bits for level in levels),
        tuple(level.codes for level in levels),
        tuple(level.step for level in levels),
    )


class Weights:
    """What the native engine reads, for any number of positions."""

    def __init__(self, model: nn.Module, sketch: Sketch | None) -> None:
        """Take a model and a sketch of it apart.

        Raises:
            UnsupportedModelError: The engine does not run on the model.
            SketchError: The sketch is of another model.
        """
        self.model = model
        self.decoder: Decoder = models.find_decoder(model)
        self.codes: dict[str, Code] = {}
        if sketch is not None:
            sketch.check(model)
            self.codes = {
                name: code_of(matrix, _OF_HEAD if name == "head" else _OF_LAYERS)
                for name, matrix in sketch.matrices.items()
            }

    def bound(self, positions: int) -> Any:
        """Give the object that the native engine reads, with tables for some positions."""
        tables = models.rotations(self.model, positions)
        layers = []
        for i, layer in enumerate(self.decoder.layers):
            kinds = ("qkv", "o", "gate_up", "down")
            codes = {f"{kind}_code": self.codes.get(f"layers.{i}.{kind}") for kind in kinds}
            cosine, sine = tables[layer.kind]
            layers.append(SimpleNamespace(**vars(layer), **codes, cosine=cosine, sine=sine))
        fields = {**vars(self.decoder), "layers": layers, "head_code": self.codes.get("head")}
        return SimpleNamespace(**fields)
