"""The resume file: what has been counted and fitted so far, kept and taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ..codes import planes
from ..container import laid_out, unpack
from ..files import check_writable, read_bounded, write_atomic
from ..models import Ffn
from ..plan import LayerPlan, layer_of, layer_tensors
from ..types import Code, PlanError
from .samples import Batch
from .thresholds import BINS

FORMAT = "csfast-calibration-3"  # of a resume file


@dataclasses.dataclass
class State:
    """What has been counted and fitted so far; the whole of a resume file."""

    fitted: list[LayerPlan]  # of the first layers, without orders
    n_summed: int  # batches that the squares of the layers in hand, the next ones, have seen
    n_ordered: int  # layers that have orders and joint usages
    n_counted: int  # batches of the last pass
    square: Tensor  # (n_layers, n_tasks, d_max), float64: sums of squares
    moment: dict[int, Tensor]  # of layers in hand, (d, d), float64, where their weights are
    order: Tensor  # (n_blocks, n_layers, n_neurons_max), int64
    histogram: Tensor  # (n_modes, n_layers, n_tasks, BINS), int64

    @staticmethod
    def empty(ffns: list[Ffn], n_tasks: int, n_blocks: int, n_modes: int) -> State:
        """Nothing counted."""
        d_max = max(ffn.shape.d for ffn in ffns)
        n_neurons_max = max(ffn.shape.n_neurons for ffn in ffns)
        return State(
            fitted=[],
            n_summed=0,
            n_ordered=0,
            n_counted=0,
            square=torch.zeros(len(ffns), n_tasks, d_max, dtype=torch.float64),
            moment={},
            order=torch.zeros(n_blocks, len(ffns), n_neurons_max, dtype=torch.int64),
            histogram=torch.zeros(n_modes, len(ffns), n_tasks, BINS, dtype=torch.int64),
        )


def key_of(model_hash: str, names: Iterable[str], batches: list[Batch], modes: object) -> str:
    """SHA-256 over everything that the counts depend on."""
    head = [FORMAT, model_hash, *names, repr(modes), torch.__version__]
    digest = hashlib.sha256(json.dumps(head).encode())
    for batch in batches:
        digest.update(json.dumps([batch.task, *batch.ids.shape]).encode())
        digest.update(batch.ids.numpy().tobytes())
        digest.update(batch.sparse.numpy().tobytes())
    return digest.hexdigest()


def bytes_max(empty: State, ffns: list[Ffn], bits: tuple[Code, ...], sums: list[list[int]]) -> int:
    """Most bytes that a state grows to: counts, what is fitted, second moments of one round."""
    counts = empty.square.nbytes + empty.order.nbytes + empty.histogram.nbytes
    shapes = [ffn.shape for ffn in ffns]
    fitted = sum(planes.n_bytes(s.n_neurons, s.d, b) for s in shapes for b in bits)
    return counts + fitted + max((sum(8 * shapes[i].d ** 2 for i in of) for of in sums), default=0)


def start(
    resume: pathlib.Path | None,
    key: str,
    empty: State,
    ffns: list[Ffn],
    bits: tuple[Code, ...],
) -> State:
    """The state in the resume file, or an empty one if there is no file yet."""
    if resume is None:
        return empty
    if not resume.exists():
        check_writable(resume)
        return empty
    tensors, fields = unpack(read_bounded(resume))
    if fields.get("format") != FORMAT:
        raise PlanError(f"[calibrate] {resume.name}: want a file of calibrate's option resume.")
    if fields.get("key") != key:
        raise PlanError(
            f"[calibrate] {resume.name}: was begun with another model, samples or options; "
            "want the same, or another file."
        )
    return State(
        fitted=[layer_of(i, tensors, bits) for i in range(int(fields["n_fitted"]))],
        n_summed=int(fields["n_summed"]),
        n_ordered=int(fields["n_ordered"]),
        n_counted=int(fields["n_counted"]),
        square=tensors["square"],
        moment={
            layer: tensors[f"layers.{layer}.moment"].to(ffn.gate.weight.device)
            for layer, ffn in enumerate(ffns)
            if f"layers.{layer}.moment" in tensors
        },
        order=tensors["order"],
        histogram=tensors["histogram"],
    )


def keep_state(resume: pathlib.Path, key: str, state: State) -> None:
    """Write the state, whole or not at all."""
    tensors = {"square": state.square, "order": state.order, "histogram": state.histogram}
    tensors |= {f"layers.{i}.moment": moment.cpu() for i, moment in state.moment.items()}
    for i, layer in enumerate(state.fitted):
        tensors |= layer_tensors(i, layer)
    counts = {
        "n_fitted": len(state.fitted),
        "n_summed": state.n_summed,
        "n_ordered": state.n_ordered,
        "n_counted": state.n_counted,
    }
    fields = {name: str(count) for name, count in counts.items()}
    write_atomic(resume, laid_out(tensors, {"format": FORMAT, "key": key, **fields}))
