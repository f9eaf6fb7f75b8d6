"""What identifies a model to a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
from torch import nn

from ..types import LayerShape
from .structure import find_ffns

_HASH_BYTES = 1 << 24  # hashed at a time, so that a copy from a GPU stays small and Ctrl-C works


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What identifies a model to a plan.

    Attributes:
        model_type: Name of the architecture in its configuration, ``"llama"``.
        shapes: Sizes of the feed-forward layers, in order.
        dtype: Of their weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        activation: Of their gates, one of `ACTIVATIONS`.
        model_hash: SHA-256 over all of the above and the feed-forward weights and biases,
            hexadecimal.
    """

    model_type: str
    shapes: tuple[LayerShape, ...]
    dtype: str
    activation: str
    model_hash: str


def fingerprint(model: nn.Module) -> Fingerprint:
    """Identify a model by its type and its feed-forward layers, weights included.

    Raises:
        UnsupportedModelError: csfast does not run on the model.
    """
    ffns = find_ffns(model)
    model_type = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    dtype = str(ffns[0].gate.weight.dtype).removeprefix("torch.")
    shapes = tuple(f.shape for f in ffns)
    activation = ffns[0].activation
    sizes = [[s.d, s.n_neurons] for s in shapes]
    parts = [part for f in ffns for p in (f.gate, f.up, f.down) for part in (p.weight, p.bias)]
    head = [model_type, dtype, activation, sizes, [part is not None for part in parts]]
    digest = hashlib.sha256(json.dumps(head).encode())
    for part in parts:
        if part is not None:
            for raw in torch.split(part.detach().view(torch.uint8).flatten(), _HASH_BYTES):
                digest.update(raw.cpu().numpy().tobytes())
    return Fingerprint(model_type, shapes, dtype, activation, digest.hexdigest())
