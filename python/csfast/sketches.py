"""The sketch of a model: few-bit codes of every linear map and the head, in levels.

A folder of one safetensors file a layer and an index, which docs/sketch.md explains field by
field. It is read into memory and verified: every tensor by its SHA-256, the sizes, the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import container, models
from .codes import trellis
from .codes.rotation import Rotation
from .files import read_bounded
from .models import KINDS, Kind, Stacked, find_linears, hash_of
from .types import PlanError, SketchError

FORMAT = "csfast-sketch-2"
INDEX = "sketch.json"
# Kinds of matrices by the part of the model that they are in.
PARTS: dict[str, tuple[Kind, ...]] = {
    "ffn": ("gate_up", "down"),
    "attention": ("qkv", "o"),
    "head": ("head",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level of the code of a matrix.

    Attributes:
        bits: Of a weight, 1 to 4.
        codes: As `csfast.codes.trellis.pack` lays them out, uint8.
        step: What a value of 1 stands for in each row, ``(rows,)``, bfloat16.
    """

    bits: int
    codes: Tensor
    step: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """Linear maps that read one input, coded.

    Attributes:
        name: ``"layers.0.qkv"``, or ``"head"``.
        rows: Of all the maps.
        cols: Of their input.
        rotation: What the input goes through before it meets the codes.
        levels: The first is a code of its own, each further one codes what is left.
        base: How many of them the sketch's first level is: 2 where one code has too few bits.
    """

    name: str
    rows: int
    cols: int
    rotation: Rotation
    levels: tuple[Level, ...]
    base: int = 1

    @property
    def kind(self) -> str:
        """What it is: the last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def n_levels(self) -> int:
        """How many levels there are to read."""
        return len(self.levels) - self.base + 1

    def read(self, n_levels: int | None = None) -> tuple[Level, ...]:
        """Give the codes that so many levels of the sketch are, all if left out or if fewer.

        Raises:
            ValueError: The number is below 1.
        """
        if n_levels is not None and n_levels < 1:
            raise ValueError(f"[sketch] n_levels = {n_levels}: want 1 or more.")
        return self.levels[: None if n_levels is None else self.base - 1 + n_levels]

    def decode(self, n_levels: int | None = None) -> Tensor:
        """Give the matrix that the first levels stand for, ``(rows, cols)``, float32.

        With the gain of the norm before it, and for inputs that are not rotated.
        """
        rotated = torch.zeros(self.rows, self.cols)
        for level in self.read(n_levels):
            value = trellis.values(level.codes, self.rows, self.cols)
            rotated += level.step.float()[:, None] * value
        return self.rotation.undo(rotated)

    def n_bits(self, n_levels: int | None = None) -> int:
        """Give how many bits reading the first levels takes, all that belongs to them counted."""
        read = self.read(n_levels)
        own = self.rotation.words().nbytes
        return 8 * (own + sum(level.codes.nbytes + level.step.nbytes for level in read))


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """Few-bit codes of all linear maps of a model.

    Attributes:
        matrices: By name, in the order of the model.
        model_type: Name of the architecture.
        model_hash: SHA-256 of what is coded, see `csfast.models.hash_of`.
        settings: How it was made, as the index has it.
    """

    matrices: Mapping[str, Matrix]
    model_type: str
    model_hash: str
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Sketch:
        """Read a sketch and verify every byte of it.

        Raises:
            FileNotFoundError: There is no such folder, or it is not complete.
            SketchError: A file is damaged, or not what the index says; the message names the
                tensor and the check.
        """
        path = pathlib.Path(folder)
        if not path.is_dir():
            raise FileNotFoundError(f"[sketch] {str(folder)!r}: want the folder of a sketch.")
        if not (path / INDEX).is_file():
            raise FileNotFoundError(
                f"[sketch] {str(folder)!r} has no {INDEX}: want a whole sketch; one that was "
                "interrupted is gone on with by csfast sketch --resume."
            )
        index = _index(read_bounded(path / INDEX))
        matrices = {}
        for name, sha256 in index["files"].items():
            tensors, fields = read_part(path / name)
            if fields.get("key") != index["key"] or fields.get("sha256") != sha256:
                raise SketchError(f"[sketch] {name}: want the file that {INDEX} was written with.")
            for matrix in unpacked(tensors, index["matrices"], name):
                matrices[matrix.name] = matrix
        missing = set(index["matrices"]) - set(matrices)
        if missing:
            raise SketchError(f"[sketch] {sorted(missing)[0]}: want it in one of the files.")
        ordered = {name: matrices[name] for name in sorted(matrices, key=_place)}
        return cls(ordered, index["model_type"], index["model_hash"], index["settings"])

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this is not a sketch of.

        Raises:
            SketchError: Its type, or a weight, is another.
        """
        self._stacks_of(model)

    def _stacks_of(self, model: nn.Module) -> list[Stacked]:
        """The matrices of a model that this is a sketch of."""
        stacks = find_linears(model)
        found = models.family_of(model)
        if found != self.model_type:
            raise SketchError(f"[sketch] of a {self.model_type} model: this is a {found}.")
        if hash_of(stacks) != self.model_hash:
            raise SketchError("[sketch] model: its weights are not those that the sketch codes.")
        return stacks

    def weights(
        self, model: nn.Module, n_levels: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Give the weights that the codes stand for, one after another.

        Args:
            model: The model, or a copy; gains of its norms are taken out again. Where a gain is 0
                the column is 0: nothing reads it.
            n_levels: How many levels are read; all if left out.

        Yields:
            Name of a parameter, and what replaces it, float32. Of a head that is tied to the
            embedding its own name, such as ``lm_head.weight``: lookups stay the model's.

        Raises:
            SketchError: As for `check`.
        """
        for stack in self._stacks_of(model):
            whole = self.matrices[stack.name].decode(n_levels)
            gain = stack.gain()
            if gain is not None:
                gain = gain.cpu()
                whole = torch.where(gain == 0, 0.0, whole / gain)
            sizes = [linear.weight.shape[0] for linear in stack.linears]
            yield from zip(stack.parameters, torch.split(whole, sizes), strict=True)

    def bits(self, n_levels: int | None = 1) -> dict[str, float]:
        """Give bits a weight: stored, read by the first levels, and read of each part.

        Args:
            n_levels: How many levels are read; all for None.

        Returns:
            ``stored`` and ``read`` over all coded weights, the head among them, and what is read
            of ``ffn``, ``attention`` and ``head``. Steps, permutations and padding count.
        """
        of = list(self.matrices.values())

        def each(chosen: list[Matrix], levels: int | None) -> float:
            n_weights = sum(matrix.rows * matrix.cols for matrix in chosen)
            return sum(matrix.n_bits(levels) for matrix in chosen) / n_weights

        groups = {
            name: each([matrix for matrix in of if matrix.kind in kinds], n_levels)
            for name, kinds in PARTS.items()
        }
        return {"stored": each(of, None), "read": each(of, n_levels), **groups}


def packed(matrices: list[Matrix]) -> dict[str, Tensor]:
    """Give the tensors of the file of some matrices, by name."""
    tensors = {}
    for matrix in matrices:
        tensors[f"{matrix.name}.turn"] = matrix.rotation.words()
        for i, level in enumerate(matrix.levels):
            tensors[f"{matrix.name}.{i}.codes"] = level.codes
            tensors[f"{matrix.name}.{i}.step"] = level.step
    return tensors


def read_part(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one file of a sketch: its tensors, and its fields beside its SHA-256.

    Raises:
        FileNotFoundError: There is none.
        SketchError: It is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[sketch] {path.name}: missing; want all files of a sketch.")
    try:
        raw = read_bounded(path)
        tensors, fields = container.unpack(raw)
    except PlanError as error:
        raise SketchError(f"[sketch] {path.name}: {str(error).removeprefix('[plan] ')}") from error
    return tensors, {**fields, "sha256": container.sha256_of(raw)}


def unpacked(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, Any], file: str
) -> Iterator[Matrix]:
    """Give the matrices of a file, each tensor checked against the sizes of the index."""
    left = dict(tensors)

    def take(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        tensor = left.pop(name, None)
        if tensor is None:
            raise SketchError(f"[sketch] {file}: want a tensor {name!r}.")
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise SketchError(
                f"[sketch] tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}: want {dtype} "
                f"{shape}."
            )
        return tensor

    for name in sorted({key.rpartition(".")[0] for key in tensors if key.endswith(".turn")}):
        if name not in sizes:
            raise SketchError(f"[sketch] {file}: {name!r} is not a matrix of {INDEX}.")
        rows, cols, bits, base = (sizes[name][key] for key in ("rows", "cols", "bits", "base"))
        turn = Rotation.of(take(f"{name}.turn", torch.int32, (cols,)))
        if not torch.equal(turn.perm.long().sort().values, torch.arange(cols)):
            raise SketchError(f"[sketch] tensor {name + '.turn'!r}: want a permutation.")
        if not bool((torch.isfinite(turn.scale) & (turn.scale != 0)).all()):
            raise SketchError(f"[sketch] tensor {name + '.turn'!r}: want finite scales, none of 0.")
        tiles = (-(-rows // trellis.TILE_ROWS), -(-cols // trellis.TILE_COLS))
        levels = []
        for i, n in enumerate(bits):
            codes = take(f"{name}.{i}.codes", torch.uint8, (*tiles, n, 64))
            step = take(f"{name}.{i}.step", torch.bfloat16, (rows,))
            if not bool((torch.isfinite(step) & (step >= 0)).all()):
                raise SketchError(f"[sketch] tensor '{name}.{i}.step': want finite numbers >= 0.")
            levels.append(Level(n, codes, step))
        yield Matrix(name, rows, cols, turn, tuple(levels), base)
    if left:
        raise SketchError(f"[sketch] {file}: tensor {sorted(left)[0]!r} belongs to no matrix.")


def index_of(fields: Mapping[str, Any]) -> bytes:
    """Give the bytes of the index: the fields and the SHA-256 of their canonical form."""
    sha256 = container.sha256_of(container.canonical(dict(fields)).encode())
    return (json.dumps({**fields, "sha256": sha256}, indent=1) + "\n").encode()


def _index(raw: bytes) -> dict[str, Any]:
    """The index, after verifying what can be verified without the files."""
    try:
        index = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SketchError(f"[sketch] {INDEX}: want JSON ({error}).") from error
    if not isinstance(index, dict):
        raise SketchError(f"[sketch] {INDEX}: want an object.")
    sha256 = index.pop("sha256", None)
    try:
        text = container.canonical(index)
    except (ValueError, RecursionError) as error:
        raise SketchError(f"[sketch] {INDEX}: want finite numbers ({error}).") from error
    if index.get("format") != FORMAT:
        raise SketchError(f"[sketch] {INDEX}: format {index.get('format')!r}; want {FORMAT!r}.")
    if sha256 != container.sha256_of(text.encode()):
        raise SketchError(f"[sketch] {INDEX}: want fields that fit their SHA-256.")
    if index.get("tables") != tables():
        raise SketchError(f"[sketch] {INDEX}: tables of levels that this version does not read.")
    for name, size in index["matrices"].items():
        bits = size["bits"]
        if not bits or any(n not in trellis.BITS for n in bits):
            raise SketchError(f"[sketch] {INDEX}: {name} of {bits} bits; want levels of 1 to 4.")
        if not 1 <= size["base"] <= len(bits):
            raise SketchError(f"[sketch] {INDEX}: {name}: base of {size['base']}; want a level.")
    return index


def tables() -> dict[str, list[int]]:
    """Give the values of every code by index, as the index has them."""
    return {str(bits): trellis.table(bits).tolist() for bits in trellis.BITS}


def _place(name: str) -> tuple[int, int]:
    """Where a matrix stands in its model."""
    parts = name.split(".")
    layer = int(parts[1]) if len(parts) == 3 else 1 << 30
    return layer, [str(kind) for kind in KINDS].index(parts[-1])
