"""The plan: what calibration found about one model, as one file that is verified before use.

`docs/plan.md` describes the format field by field. A file is the canonical form of its content, so
equal plans are equal bytes and the SHA-256 of the file is the plan's hash.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import models
from .codes import feedback as feedback_
from .codes import planes
from .container import all_sizes, canonical, laid_out, unpack
from .files import read_bounded, write_atomic
from .layer import Sensor
from .models import Fingerprint
from .types import POOLED, Code, LayerShape, PlanError, is_task

FORMAT = "csfast-plan"
VERSION = "3"
BLOCK_MAX = 128  # neurons of a block: a tile of the tensor cores, and quality is gone before that
JOINT = (2, 4, 8, 16)  # sizes of batches with one support that have thresholds, where any have
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a model type
_HASH = re.compile(r"[0-9a-f]{64}")
_LIST_MAX = 400  # characters of a list in a message
# Of a float32 copy of the rows that are fitted at a time: five or so are held, and the more rows,
# the fewer times feedback goes through the columns.
_FIT_BYTES = 1 << 26
_T = TypeVar("_T")


class Mode(NamedTuple):
    """What a table of thresholds is for."""

    bits: Code  # of the sensor
    block: int  # neurons that are kept or skipped together
    batch: int  # sequences that share one support; 1: each has its own


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPlan:
    """What sensing one layer needs besides its weights.

    Attributes:
        equal: Factors that even out the channels of the input, ``(d,)``, float32, positive.
        row_scale: For each code the scales of the measurements, ``(n_neurons, 2)``,
            float32: of the gate row, and of the up row times the norm of the down row.
        codes: For each code the rows of gate and up as `planes.pack` lays them out,
            ``(n_neurons, 2, groups, group_bytes)``, uint8.
        order: For each block size above 1 the neurons in the order of csfast's own copy,
            ``(n_neurons,)``, int64: block ``i`` is ``order[i * block : (i + 1) * block]``.
    """

    equal: Tensor
    row_scale: Mapping[Code, Tensor]
    codes: Mapping[Code, Tensor]
    order: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    @staticmethod
    def fit(
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        equal: Tensor,
        bits: tuple[Code, ...],
        moment: Tensor | None = None,
    ) -> LayerPlan:
        """Fit scales and codes of one layer.

        Args:
            gate: ``(n_neurons, d)``, floating.
            up: ``(n_neurons, d)``, floating.
            down: ``(d, n_neurons)``, floating.
            equal: ``(d,)``, float32, from `planes.equalizer`.
            bits: Codes to fit for.
            moment: Second moment of the layer's inputs, ``(d, d)``, float64, on the device of the
                weights: codes then make up for each other's errors (eq. 42). None codes every
                weight by itself.

        Raises:
            ValueError: The moment is of another shape or not finite.
        """
        norm = _down_norm(down)
        factor = None
        if moment is not None:
            d = gate.shape[1]
            if moment.shape != (d, d):
                raise ValueError(f"[fit] moment of shape {tuple(moment.shape)}: want {(d, d)}.")
            wide = equal.to(moment.device).double()
            factor = feedback_.spread(moment * wide[:, None] * wide)
        scales: dict[Code, Tensor] = {}
        codes: dict[Code, Tensor] = {}
        for b in bits:
            scale_parts, code_parts = [], []
            for rows in _row_slices(*gate.shape):
                pair = gate[rows], up[rows]
                of_pair = [planes.fit_scale(weight, equal, b) for weight in pair]
                coded = [
                    planes.encode(weight, equal, scale, b, factor)
                    for weight, scale in zip(pair, of_pair, strict=True)
                ]
                scale_parts.append(torch.stack([of_pair[0], of_pair[1] * norm[rows]], dim=1).cpu())
                code_parts.append(torch.stack(coded, dim=1).cpu())
            scales[b], codes[b] = torch.cat(scale_parts), torch.cat(code_parts)
        return LayerPlan(equal.cpu(), scales, codes)

    def sensor(
        self,
        *,
        bits: Code,
        block: int = 1,
        offset: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Sensor:
        """Give what the neurons are measured by, in the order of their blocks.

        Args:
            bits: One of this plan's codes.
            block: One of this plan's blocks; 1 leaves the neurons where they are.
            offset: What the biases add, ``(n_neurons, 2)``, float32, in the order of the neurons;
                None without biases.
            device: Where its tensors shall be, which are copies of the plan's.
        """
        codes, row_scale = self.codes[bits], self.row_scale[bits]
        if block > 1:
            order = self.order[block]
            codes, row_scale = codes[order], row_scale[order]
            offset = None if offset is None else offset[order.to(offset.device)]
        return Sensor(
            codes=codes.to(device, copy=block == 1),
            equal=self.equal.to(device, copy=True),
            row_scale=row_scale.to(device, copy=block == 1),
            bits=bits,
            offset=offset,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything calibration found about one model. Checked when it is made.

    Attributes:
        model: The model it belongs to.
        bits: Codes of the sensor that it holds, in the order of `planes.CODES`.
        blocks: Sizes of block that it holds, ascending; 1 is single neurons.
        batches: Sizes of batches with one support that it holds, ascending from 1: ``(1,)``, or
            ``(1, *JOINT)``.
        tasks: Names of the columns of ``thresholds``; the first is ``"pooled"``.
        densities: Fractions of neurons executed, ascending in ``(0, 1]``; the last is 1.
        layers: One entry a feed-forward layer, in the order of the model.
        thresholds: For each mode of bits, block and batch the usage below which a block is
            skipped, ``(n_layers, n_tasks, n_densities)``, float32, not rising with the density.
            The usage of a block is the root of its neurons' summed squares, that of a batch the
            mean over its sequences.
        n_tokens: Positions that were sensed for each task, the pooled one left out.
        feedback: Whether the codes were fitted with error feedback on the calibration inputs.
        seed: Seed that calibration drew its samples with.

    Raises:
        PlanError: Something does not fit together.
    """

    model: Fingerprint
    bits: tuple[Code, ...]
    blocks: tuple[int, ...]
    batches: tuple[int, ...]
    tasks: tuple[str, ...]
    densities: tuple[float, ...]
    layers: tuple[LayerPlan, ...]
    thresholds: Mapping[Mode, Tensor]
    n_tokens: Mapping[str, int]
    feedback: bool
    seed: int

    def __post_init__(self) -> None:
        """Refuse a plan whose parts do not fit together."""
        _validate(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan in one step: whoever reads sees the old file or the new one, whole.

        Raises:
            OSError: The file cannot be written; what was there before still is.
        """
        write_atomic(pathlib.Path(path), laid_out(*_to_content(self)))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan into memory and verify all of it.

        Raises:
            FileNotFoundError: There is no such file.
            PlanError: It is not a plan, is damaged, or of another format version.
        """
        file = pathlib.Path(path)
        if not file.exists():
            raise FileNotFoundError(f"[plan] {str(path)!r}: no such file; want that of a plan.")
        tensors, fields = unpack(read_bounded(file))
        return _from_content(tensors, fields)

    @functools.cached_property
    def plan_hash(self) -> str:
        """SHA-256 of the plan's canonical form, which is its file: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in laid_out(*_to_content(self)):
            digest.update(part)
        return digest.hexdigest()

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Give the modes that have thresholds."""
        return tuple(Mode(*s) for s in itertools.product(self.bits, self.blocks, self.batches))

    def threshold(
        self,
        layer: int,
        *,
        bits: Code,
        density: float,
        task: str = POOLED,
        block: int = 1,
        batch: int = 1,
    ) -> float:
        """Give the usage below which a neuron, or a block of them, of a layer is skipped.

        Between the densities of the plan the logarithm of the threshold is linear in the density
        (the threshold itself where its lower end is 0), between its batches in the logarithm of
        their size.

        Args:
            layer: Number of the layer.
            bits: One of the plan's codes.
            density: Fraction of neurons wanted, within the plan's densities; 1 gives 0, which
                keeps every neuron.
            task: One of the plan's tasks.
            block: Neurons a block, one of the plan's.
            batch: Sequences that share the support, up to the largest of the plan's batches.

        Raises:
            ValueError: The plan does not hold what was asked for.
            TypeError: A number is of another type.
        """
        for name, value in (("layer", layer), ("batch", batch), ("density", density)):
            kinds = (int, float) if name == "density" else (int,)
            if not isinstance(value, kinds):
                raise TypeError(f"[threshold] {name} = {value!r}: want a number.")
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"[threshold] layer = {layer}: want 0 to {len(self.layers) - 1}.")
        if bits not in self.bits:
            raise ValueError(f"[threshold] bits = {bits!r}: want one of {_list(self.bits)}.")
        if block not in self.blocks:
            raise ValueError(f"[threshold] block = {block!r}: want one of {_list(self.blocks)}.")
        if not 1 <= batch <= self.batches[-1]:
            raise ValueError(
                f"[threshold] batch = {batch}: want 1 to {self.batches[-1]}, as far as this plan "
                "was calibrated."
            )
        if task not in self.tasks:
            raise ValueError(f"[threshold] task = {task!r}: want one of {_list(self.tasks)}.")
        if not self.densities[0] <= density <= 1:
            raise ValueError(
                f"[threshold] density = {density}: want {self.densities[0]} to 1, "
                "as far as this plan was calibrated."
            )
        column = self.tasks.index(task)
        above = bisect.bisect_left(self.batches, batch)
        around = self.batches[max(above - 1, 0)], self.batches[above]
        low, high = (
            self._at(self.thresholds[Mode(bits, block, size)][layer, column], density)
            for size in around
        )
        if batch == around[1]:
            return high
        part = math.log(batch / around[0]) / math.log(around[1] / around[0])
        return _between(low, high, part)

    def _at(self, row: Tensor, density: float) -> float:
        """The threshold of a density in a row ``(n_densities,)``."""
        above = bisect.bisect_left(self.densities, density)
        if self.densities[above] == density:
            return float(row[above])
        low, high = self.densities[above - 1], self.densities[above]
        return _between(float(row[above - 1]), float(row[above]), (density - low) / (high - low))

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not made for.

        Raises:
            PlanError: The model differs; the message says in what.
            UnsupportedModelError: csfast does not run on the model at all.
        """
        given, wanted = models.fingerprint(model), self.model
        if given.model_type != wanted.model_type:
            difference = f"of type {given.model_type!r}", f"{wanted.model_type!r}"
        elif len(given.shapes) != len(wanted.shapes):
            difference = f"with {len(given.shapes)} layers", f"{len(wanted.shapes)}"
        elif given.shapes != wanted.shapes:
            pairs = zip(given.shapes, wanted.shapes, strict=True)
            i, (a, b) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
            difference = (
                f"whose layer {i} has d = {a.d}, n_neurons = {a.n_neurons}",
                f"d = {b.d}, n_neurons = {b.n_neurons}",
            )
        elif given.dtype != wanted.dtype:
            difference = f"in {given.dtype}", wanted.dtype
        elif given.activation != wanted.activation:
            difference = f"of activation {given.activation}", wanted.activation
        elif given.model_hash != wanted.model_hash:
            difference = (
                f"whose feed-forward weights have SHA-256 {given.model_hash[:12]}...",
                f"{wanted.model_hash[:12]}...",
            )
        else:
            return
        raise PlanError(
            f"[plan] a model {difference[0]}: this plan wants {difference[1]}; it is another's."
        )


def _between(first: float, last: float, part: float) -> float:
    """Between two thresholds: their logarithm is linear, or they are where one of them is 0."""
    if first == 0 or last == 0:
        return first * (1 - part) + last * part
    return math.exp((1 - part) * math.log(first) + part * math.log(last))


def _to_content(plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and fields of a plan's file."""
    tensors = {_threshold_name(s): plan.thresholds[s] for s in plan.modes}
    for i, layer in enumerate(plan.layers):
        tensors |= layer_tensors(i, layer)
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "model_type": plan.model.model_type,
        "model_dtype": plan.model.dtype,
        "model_activation": plan.model.activation,
        "model_hash": plan.model.model_hash,
        "shapes": canonical([[s.d, s.n_neurons] for s in plan.model.shapes]),
        "bits": canonical(plan.bits),
        "blocks": canonical(plan.blocks),
        "batches": canonical(plan.batches),
        "tasks": canonical(plan.tasks),
        "densities": canonical(plan.densities),
        "n_tokens": canonical(dict(plan.n_tokens)),
        "feedback": canonical(plan.feedback),
        "seed": canonical(plan.seed),
    }
    return tensors, fields


def layer_tensors(i: int, layer: LayerPlan) -> dict[str, Tensor]:
    """Give the tensors of a layer by the names that a file has for them."""
    tensors = {f"layers.{i}.equal": layer.equal}
    tensors |= {f"layers.{i}.row_scale.b{b}": scale for b, scale in layer.row_scale.items()}
    tensors |= {f"layers.{i}.codes.b{b}": codes for b, codes in layer.codes.items()}
    return tensors | {f"layers.{i}.order.block{n}": order for n, order in layer.order.items()}


def layer_of(
    i: int, tensors: Mapping[str, Tensor], bits: Iterable[Code], blocks: Iterable[int] = ()
) -> LayerPlan:
    """Give the layer that `layer_tensors` took apart."""
    return LayerPlan(
        equal=tensors[f"layers.{i}.equal"],
        row_scale={b: tensors[f"layers.{i}.row_scale.b{b}"] for b in bits},
        codes={b: tensors[f"layers.{i}.codes.b{b}"] for b in bits},
        order={n: tensors[f"layers.{i}.order.block{n}"] for n in blocks if n > 1},
    )


def _from_content(tensors: dict[str, Tensor], fields: dict[str, str]) -> Plan:
    """The plan of a file's tensors and fields."""
    if fields.get("format") != FORMAT:
        raise PlanError(
            f"[plan] format = {fields.get('format')!r}: want {FORMAT!r}, the file of a whole plan "
            "(a name that ends in .partial is of a calibration to go on with)."
        )
    if fields.get("version") != VERSION:
        raise PlanError(
            f"[plan] format version {fields.get('version')!r}: this csfast wants {VERSION!r}; "
            "calibrate again."
        )
    shapes = _field(fields, "shapes", list)
    if not all(all_sizes(s) and len(s) == 2 for s in shapes):
        raise PlanError("[plan] shapes: want pairs of sizes.")
    fingerprint = Fingerprint(
        model_type=fields.get("model_type", ""),
        shapes=tuple(LayerShape(d=s[0], n_neurons=s[1]) for s in shapes),
        dtype=fields.get("model_dtype", ""),
        activation=fields.get("model_activation", ""),
        model_hash=fields.get("model_hash", ""),
    )
    bits = tuple(_field(fields, "bits", list))
    if not all(type(b) in (int, str) and b in planes.CODES for b in bits):
        raise PlanError(f"[plan] bits = {_list(bits)}: want some of {_list(planes.CODES)}.")
    blocks, batches = (tuple(_field(fields, name, list)) for name in ("blocks", "batches"))
    for name, sizes in (("blocks", blocks), ("batches", batches)):
        if not all(type(n) is int and n >= 1 for n in sizes):
            raise PlanError(f"[plan] {name} = {_list(sizes)}: want sizes from 1 on.")
    for name, values in (("bits", bits), ("blocks", blocks), ("batches", batches)):
        # Few enough to multiply, before what they name is looked for.
        if len(values) > BLOCK_MAX:
            raise PlanError(f"[plan] {len(values)} {name}: want at most {BLOCK_MAX}.")
    modes = [Mode(*s) for s in itertools.product(bits, blocks, batches)]
    wanted = _names(len(shapes), bits, blocks, modes)
    if set(tensors) != wanted:
        odd = sorted(set(tensors) ^ wanted)[0]
        raise PlanError(f"[plan] tensor {odd!r}: want exactly those of {len(shapes)} layers.")
    return Plan(
        model=fingerprint,
        bits=bits,
        blocks=blocks,
        batches=batches,
        tasks=tuple(_field(fields, "tasks", list)),
        densities=tuple(_field(fields, "densities", list)),
        layers=tuple(layer_of(i, tensors, bits, blocks) for i in range(len(shapes))),
        thresholds={s: tensors[_threshold_name(s)] for s in modes},
        n_tokens=_field(fields, "n_tokens", dict),
        feedback=_field(fields, "feedback", bool),
        seed=_field(fields, "seed", int),
    )


def _names(
    n_layers: int, bits: tuple[Code, ...], blocks: tuple[int, ...], modes: Sequence[Mode]
) -> set[str]:
    """Names of the tensors of a plan."""
    kinds = ["equal", *(f"{kind}.b{b}" for kind in ("row_scale", "codes") for b in bits)]
    kinds += [f"order.block{n}" for n in blocks if n > 1]
    layers = {f"layers.{i}.{k}" for i, k in itertools.product(range(n_layers), kinds)}
    return layers | {_threshold_name(s) for s in modes}


def _threshold_name(mode: Mode) -> str:
    joint = "" if mode.batch == 1 else f".joint{mode.batch}"
    return f"thresholds.b{mode.bits}.block{mode.block}{joint}"


def _field(fields: dict[str, str], name: str, kind: type[_T]) -> _T:
    """A field of the metadata that holds JSON of one kind."""
    try:
        value = json.loads(fields.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"[plan] {name}: want JSON ({error}).") from error
    if type(value) is not kind:
        raise PlanError(f"[plan] {name}: want a JSON {kind.__name__}.")
    return value


def _validate(plan: Plan) -> None:
    """Refuse a plan whose parts are out of range or do not fit together."""
    m = plan.model
    _want(bool(_NAME.fullmatch(m.model_type)), f"model_type = {m.model_type!r}", "a model type")
    dtypes = ("float32", "float16", "bfloat16")
    _want(m.dtype in dtypes, f"model_dtype = {m.dtype!r}", f"one of {_list(dtypes)}")
    known = m.activation in models.ACTIVATIONS
    wanted = f"one of {_list(models.ACTIVATIONS)}"
    _want(known, f"model_activation = {m.activation!r}", wanted)
    _want(bool(_HASH.fullmatch(m.model_hash)), "model_hash", "64 hexadecimal digits")
    sizes_fit = all(s.d > 0 and s.n_neurons > 0 for s in m.shapes)
    _want(len(m.shapes) > 0 and sizes_fit, "shapes", "at least one layer, sizes above 0")

    known = all(type(b) in (int, str) and b in planes.CODES for b in plan.bits)
    in_order = known and plan.bits == tuple(b for b in planes.CODES if b in plan.bits)
    wanted = f"some of {_list(planes.CODES)}, in this order"
    _want(bool(plan.bits) and in_order, f"bits = {plan.bits}", wanted)
    sizes_fit = all(type(n) is int and 1 <= n <= BLOCK_MAX for n in plan.blocks)
    rising = plan.blocks == tuple(sorted(set(plan.blocks)))
    wanted = f"sizes from 1 to {BLOCK_MAX}, rising"
    _want(bool(plan.blocks) and sizes_fit and rising, f"blocks = {plan.blocks}", wanted)
    wanted = f"(1,) or {(1, *JOINT)}"
    _want(plan.batches in ((1,), (1, *JOINT)), f"batches = {plan.batches}", wanted)
    tasks_fit = all(isinstance(t, str) and (t == POOLED or is_task(t)) for t in plan.tasks)
    first = plan.tasks[:1] == (POOLED,)
    distinct = tasks_fit and len(set(plan.tasks)) == len(plan.tasks)
    _want(first and distinct, f"tasks = {plan.tasks}", f"distinct names, {POOLED!r} first")
    _want(set(plan.n_tokens) == set(plan.tasks[1:]), "n_tokens", "a number a task, none pooled")
    counts_fit = all(type(n) is int and n >= 0 for n in plan.n_tokens.values())
    _want(counts_fit, "n_tokens", "whole numbers")
    _want(isinstance(plan.feedback, bool), f"feedback = {plan.feedback!r}", "True or False")
    _want(type(plan.seed) is int and 0 <= plan.seed < 2**63, "seed", "0 to 2^63 - 1")

    numbers = all(type(r) is float and 0 < r <= 1 for r in plan.densities)
    rising = numbers and all(a < b for a, b in itertools.pairwise(plan.densities))
    _want(rising and plan.densities[-1:] == (1.0,), "densities", "rising fractions that end at 1")

    _want(len(plan.layers) == len(m.shapes), f"{len(plan.layers)} layers", f"{len(m.shapes)}")
    for i, (layer, shape) in enumerate(zip(plan.layers, m.shapes, strict=True)):
        _want_tensor(f"layers.{i}.equal", layer.equal, (shape.d,))
        _want(bool((layer.equal > 0).all()), f"layers.{i}.equal", "positive factors")
        _want(set(layer.row_scale) == set(plan.bits), f"layers.{i}.row_scale", "one a code")
        for b, scale in layer.row_scale.items():
            _want_tensor(f"layers.{i}.row_scale.b{b}", scale, (shape.n_neurons, 2))
        _want(set(layer.codes) == set(plan.bits), f"layers.{i}.codes", "one a code")
        for b, codes in layer.codes.items():
            _want_codes(f"layers.{i}.codes.b{b}", codes, shape, b)
        above = {n for n in plan.blocks if n > 1}
        _want(set(layer.order) == above, f"layers.{i}.order", "one a block size above 1")
        for n, order in layer.order.items():
            _want_order(f"layers.{i}.order.block{n}", order, shape.n_neurons)
    wanted = "one tensor for each of bits, block and batch"
    _want(set(plan.thresholds) == set(plan.modes), "thresholds", wanted)
    for mode, threshold in plan.thresholds.items():
        name = _threshold_name(mode)
        _want_tensor(name, threshold, (len(m.shapes), len(plan.tasks), len(plan.densities)))
        falling = bool((threshold[..., 1:] <= threshold[..., :-1]).all())
        _want(falling, name, "thresholds that do not rise with the density")
        _want(bool((threshold[..., -1] == 0).all()), name, "threshold 0 at density 1")


def _want_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not a finite, non-negative float32 tensor of the shape, on the CPU."""
    sound = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    _want(sound and tensor.is_contiguous(), name, "a contiguous float32 tensor on the CPU")
    _want(tuple(tensor.shape) == shape, f"{name} of shape {tuple(tensor.shape)}", f"{shape}")
    sane = bool(torch.isfinite(tensor).all()) and bool((tensor >= 0).all())
    _want(sane, name, "finite numbers, none below 0")


def _want_codes(name: str, codes: Tensor, shape: LayerShape, bits: Code) -> None:
    """Refuse what is not a uint8 tensor of the shape, on the CPU; any byte of one is a code."""
    sound = codes.dtype == torch.uint8 and codes.device.type == "cpu" and codes.is_contiguous()
    _want(sound, name, "a contiguous uint8 tensor on the CPU")
    wanted = (shape.n_neurons, 2, *planes.row_shape(shape.d, bits))
    _want(tuple(codes.shape) == wanted, f"{name} of shape {tuple(codes.shape)}", f"{wanted}")


def _want_order(name: str, order: Tensor, n_neurons: int) -> None:
    """Refuse what is not every neuron once, in int64 on the CPU."""
    sound = order.dtype == torch.int64 and order.device.type == "cpu" and order.is_contiguous()
    _want(sound, name, "a contiguous int64 tensor on the CPU")
    shape = (n_neurons,)
    _want(tuple(order.shape) == shape, f"{name} of shape {tuple(order.shape)}", f"{shape}")
    is_whole = torch.equal(order.sort().values, torch.arange(n_neurons, device="cpu"))
    _want(is_whole, name, f"each of the neurons 0 to {n_neurons - 1} once")


def _want(fits: bool, given: str, wanted: str) -> None:
    if not fits:
        raise PlanError(f"[plan] {given}: want {wanted}.")


def _list(values: tuple[object, ...]) -> str:
    text = ", ".join(str(v) for v in values)
    return text if len(text) <= _LIST_MAX else f"{text[:_LIST_MAX]}..."


def _row_slices(n_rows: int, d: int) -> list[slice]:
    """Parts of the rows, small enough for float32 copies."""
    step = max(1, _FIT_BYTES // (4 * d))
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _down_norm(down: Tensor) -> Tensor:
    """Norm of every neuron's down row, ``(n_neurons,)``, float32."""
    norm: Tensor = torch.linalg.vector_norm(down.detach(), dim=0, dtype=torch.float32)
    return norm
