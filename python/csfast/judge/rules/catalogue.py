"""The rules by name: what each is called, which are compared, and how one is fitted.

Every published rule is written here again from its publication, for comparison only, and gets the
same treatment as ours: thresholds per layer are quantiles of the rule's own score over the same
calibration positions, and all that it has to read is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from ...codes import planes
from ...judge import Rule
from ...types import TERNARY, LayerShape
from ..rules import Fit, check_block
from . import compressed, mixed, oracles
from .magnitude import Cats, GreedyTeal, RSparse, Teal, Wina
from .planes import BlockPlanes, JointPlanes, Planes
from .predictors import DejaVu, Linear, LowRank
from .rounded import Calibrated, Rounded
from .static import Griffin, Previous, Random, Static, TaskStatic


def build(method: str, fit: Fit) -> Rule:
    """Fit the named rule to a model.

    Args:
        method: A name, see `default_methods`.
        fit: The model's layers, and the inputs to fit to.

    Raises:
        ValueError: The name is unknown, or its number is out of range.
    """
    storage = mixed.Storage.parse(method)
    with torch.no_grad():
        if storage is not None:
            return mixed.Mixed(method, fit, storage)
        kind, numbers = _parse(method)
        return _makers(method, numbers, fit)[kind]()


def _makers(method: str, numbers: Sequence[int], fit: Fit) -> dict[str, Callable[[], Rule]]:
    """What makes a rule of each kind."""
    ffns, watched = fit.ffns, fit.sample.watched
    return {
        "oracle-neuron": lambda: oracles.Oracle(method, ffns),
        "oracle-block": lambda: _block_oracle(method, fit, *numbers, clustered=True),
        "oracle-block-original": lambda: _block_oracle(method, fit, *numbers, clustered=False),
        "oracle-channel": lambda: oracles.ChannelOracle(method, ffns),
        "oracle-head": lambda: oracles.HeadOracle(
            method, ffns, oracles.find_attention(fit.model, ffns)
        ),
        "oracle-layer": lambda: oracles.LayerOracle(method, ffns, watched[oracles.STREAM]),
        "planes": lambda: Planes(method, fit, *numbers),
        "planes-plain": lambda: Planes(method, fit, *numbers, has_feedback=False),
        "ternary": lambda: Planes(method, fit, TERNARY),
        "ternary-plain": lambda: Planes(method, fit, TERNARY, has_feedback=False),
        "planes-block": lambda: BlockPlanes(method, fit, *numbers),
        "planes-joint": lambda: JointPlanes(method, fit, *numbers),
        "teal": lambda: Teal(method, ffns),
        "teal-greedy": lambda: GreedyTeal(method, fit),
        "wina": lambda: Wina(method, fit),
        "rsparse": lambda: RSparse(method, fit, *numbers),
        "cats": lambda: Cats(method, ffns),
        "lowrank": lambda: LowRank(method, fit, *numbers),
        "linear": lambda: Linear(method, fit),
        "dejavu": lambda: DejaVu(method, fit, *numbers),
        "griffin": lambda: Griffin(method, fit),
        "static": lambda: Static(method, fit),
        "static-task": lambda: TaskStatic(method, fit),
        "previous": lambda: Previous(method, ffns),
        "random": lambda: Random(method, fit),
        "random-pursuit": lambda: compressed.RawPursuit(method, fit, *numbers),
        "innovation": lambda: compressed.InnovationPursuit(method, fit, *numbers),
        "mmse": lambda: compressed.Mmse(method, fit, *numbers),
        "probe": lambda: compressed.Probe(method, fit, *numbers),
        "rtn": lambda: Rounded(method, fit, *numbers),
        "gptq": lambda: Calibrated(method, fit, *numbers),
    }


def default_methods(shape: LayerShape) -> tuple[str, ...]:
    """Name the rules that an ablation of layers of this size compares."""
    d, n_blocks = shape.d, -(-shape.n_neurons // compressed.BLOCK)

    def parts(whole: int, *divisors: int) -> list[int]:
        return sorted({max(1, whole // divisor) for divisor in divisors})

    sizes = (4, 8, 16, 32, 64, 128)
    return (
        "oracle-neuron",
        *(f"oracle-block-{size}" for size in sizes),
        *(f"oracle-block-{size}-original" for size in sizes),
        "oracle-channel",
        "oracle-head",
        "oracle-layer",
        *(f"planes-b{bits}" for bits in planes.BITS),
        "ternary",
        "planes-b2-plain",
        "planes-b3-plain",
        *(f"planes-b2-block-{size}" for size in (4, 16, 64)),
        *(f"planes-b2-joint-{requests}" for requests in (2, 4, 16)),
        "teal",
        "teal-greedy",
        "wina",
        *(f"rsparse-{rank}" for rank in parts(d, 16, 8)),
        "cats",
        *(f"lowrank-{rank}" for rank in parts(d, 16, 8, 4)),
        "linear",
        *(f"dejavu-{width}" for width in parts(d, 8, 4)),
        "griffin",
        "static",
        "static-task",
        "previous",
        "random",
        *(f"random-{n}" for n in parts(n_blocks, 2)),
        *(f"innovation-{n}" for n in parts(n_blocks, 8, 4)),
        *(f"mmse-{n}" for n in parts(n_blocks, 8, 4, 2)),
        f"probe-{max(compressed.SPARSITY, shape.n_neurons // 16)}",
        "mixed-3+3",
        *(f"rtn-int{bits}" for bits in (8, 4, 3, 2)),
        *(f"gptq-int{bits}" for bits in (8, 4, 3, 2)),
    )


def quick_methods(shape: LayerShape) -> tuple[str, ...]:
    """Name a few rules that already tell the story."""
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
    """Say what a method is: ``oracle``, ``few-bit``, ``selection``, ``quantised`` or ``mixed``."""
    if mixed.Storage.parse(method) is not None:
        return "mixed"
    kind, _ = _parse(method)
    for start, name in (("oracle", "oracle"), ("planes", "few-bit"), ("ternary", "few-bit")):
        if kind.startswith(start):
            return name
    return "quantised" if kind in ("rtn", "gptq") else "selection"


# What each kind is called; <name> stands for a whole number of at most five digits.
_NAMES = {
    "oracle-neuron": "oracle-neuron",
    "oracle-block": "oracle-block-<size>",
    "oracle-block-original": "oracle-block-<size>-original",
    "oracle-channel": "oracle-channel",
    "oracle-head": "oracle-head",
    "oracle-layer": "oracle-layer",
    "planes": "planes-b<bits>",
    "planes-plain": "planes-b<bits>-plain",
    "ternary": "ternary",
    "ternary-plain": "ternary-plain",
    "planes-block": "planes-b<bits>-block-<size>",
    "planes-joint": "planes-b<bits>-joint-<requests>",
    "teal": "teal",
    "teal-greedy": "teal-greedy",
    "wina": "wina",
    "rsparse": "rsparse-<rank>",
    "cats": "cats",
    "lowrank": "lowrank-<rank>",
    "linear": "linear",
    "dejavu": "dejavu-<width>",
    "griffin": "griffin",
    "static": "static",
    "static-task": "static-task",
    "previous": "previous",
    "random": "random",
    "random-pursuit": "random-<measurements>",
    "innovation": "innovation-<measurements>",
    "mmse": "mmse-<measurements>",
    "probe": "probe-<neurons>",
    "rtn": "rtn-int<bits>",
    "gptq": "gptq-int<bits>",
}


def _parse(method: str) -> tuple[str, tuple[int, ...]]:
    """Split a method's name in its kind and its numbers."""
    for kind, name in _NAMES.items():
        found = re.fullmatch(re.sub(r"<\w+>", r"(\\d{1,5})", name), method, re.ASCII)
        if found:
            return kind, tuple(int(number) for number in found.groups())
    names = (*_NAMES.values(), mixed.NAMES)
    raise ValueError(f"[ablate] method {method!r}: want one of {', '.join(names)}.")


def _block_oracle(method: str, fit: Fit, block: int, *, clustered: bool) -> Rule:
    check_block(method, fit.ffns, block)
    return oracles.BlockOracle(method, fit.ffns, fit.layouts(block, clustered=clustered))
