"""All linear maps of a causal language model, by what they read: found by structure.

Linear maps that read the same input are one matrix, their rows one below the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..types import UnsupportedModelError
from .structure import find_ffns, plain_linear

Kind = Literal["qkv", "o", "gate_up", "down", "head"]
KINDS: tuple[Kind, ...] = ("qkv", "o", "gate_up", "down", "head")
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
)
_HASHED = 1 << 22  # numbers that are hashed at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """Linear maps that read one input, as one matrix.

    Attributes:
        name: ``"layers.0.qkv"``, or ``"head"``.
        kind: What it is.
        linears: The modules, in the order of its rows.
        parameters: Names of their weights in the model, in that order.
        norm: The norm whose output they read, with its gain folded into the matrix; or nothing.
    """

    name: str
    kind: Kind
    linears: tuple[nn.Linear, ...]
    parameters: tuple[str, ...]
    norm: nn.Module | None

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return sum(linear.weight.shape[0] for linear in self.linears)

    @property
    def cols(self) -> int:
        """Columns of the matrix."""
        return int(self.linears[0].weight.shape[1])

    def gain(self) -> Tensor | None:
        """Give what the norm multiplies its output by, ``(cols,)`` float32, if there is a norm."""
        return None if self.norm is None else gain_of(self.norm)

    def weight(self) -> Tensor:
        """Give the matrix with the gain folded in, ``(rows, cols)``, float32.

        Raises:
            ValueError: A weight is not finite; the message names its parameter.
        """
        gain = self.gain()
        parts = []
        for name, linear in zip(self.parameters, self.linears, strict=True):
            part = linear.weight.detach().float()
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"[sketch] {name}: not finite; want finite weights.")
            parts.append(part)
        whole = torch.cat(parts)
        if gain is None:
            return whole
        if not bool(torch.isfinite(gain).all()):
            raise ValueError(f"[sketch] gain of the norm before {self.name}: want finite numbers.")
        return whole.mul_(gain)

    def inputs(self, h: Tensor) -> Tensor:
        """Give what the matrix with its gain folded in reads, ``(n, cols)``, float32.

        Args:
            h: What the norm reads, or the linear maps if there is none, ``(..., cols)``.
        """
        x = h.detach().reshape(-1, h.shape[-1]).float()
        if self.norm is None:
            return x
        eps = getattr(self.norm, "variance_epsilon", getattr(self.norm, "eps", None))
        scale: Tensor = torch.rsqrt(x.square().mean(1, keepdim=True) + cast(float, eps))
        return x * scale


def gain_of(norm: nn.Module) -> Tensor:
    """Give what a norm multiplies its output by, ``(cols,)`` float32."""
    weight = cast(Tensor, norm.weight).detach().float()
    return 1 + weight if type(norm).__name__.startswith("Gemma") else weight


def find_linears(model: nn.Module) -> list[Stacked]:
    """Find every linear map of a model and its head.

    Args:
        model: As `find_ffns` wants it, of one of `FAMILIES`.

    Returns:
        Of every layer ``qkv``, ``o``, ``gate_up`` and ``down``, then ``head``.

    Raises:
        UnsupportedModelError: The model is of another family, quantised, or not as expected; the
            message names the module.
    """
    family = family_of(model)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"[sketch] a model of type {family!r}: want one of {', '.join(FAMILIES)}."
        )
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise UnsupportedModelError("[sketch] a model that is quantised: want plain weights.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    found = []
    ffns = find_ffns(model)
    for i, ffn in enumerate(ffns):
        path = ffn.name.rpartition(".")[0]
        block = modules[path]
        attention = getattr(block, "self_attn", None)
        if attention is None:
            raise UnsupportedModelError(f"[sketch] {path}: want attention named self_attn.")
        fused = hasattr(attention, "qkv_proj")
        reads = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        qkv = [_child(path, attention, name) for name in reads]
        after = "pre_feedforward_layernorm"
        after = after if hasattr(block, after) else "post_attention_layernorm"
        before, middle = _norm(path, block, "input_layernorm"), _norm(path, block, after)
        o = _child(path, attention, "o_proj")
        up = tuple(dict.fromkeys((ffn.gate.linear, ffn.up.linear)))
        for kind, linears, norm in (
            ("qkv", tuple(qkv), before),
            ("o", (o,), None),
            ("gate_up", up, middle),
            ("down", (ffn.down,), None),
        ):
            parameters = tuple(names[id(linear.weight)] for linear in linears)
            found.append(Stacked(f"layers.{i}.{kind}", cast(Kind, kind), linears, parameters, norm))
    body = cast(nn.Module, getattr(model, "base_model", model))
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None:
        raise UnsupportedModelError(f"[sketch] {type(model).__name__}: want a head.")
    head = plain_linear("[sketch] head", head)
    name = next(name for name, module in modules.items() if module is head) + ".weight"
    found.append(Stacked("head", "head", (head,), (name,), _norm("model", body, "norm")))
    return found


def family_of(model: nn.Module) -> str:
    """Give the name of the architecture in the model's configuration."""
    return str(getattr(getattr(model, "config", None), "model_type", "unknown"))


def hash_of(stacks: list[Stacked]) -> str:
    """Give the SHA-256 over weights, biases and gains as float32, whatever their dtype."""
    digest = hashlib.sha256()
    for stack in stacks:
        tensors: list[Tensor | None] = []
        for linear in stack.linears:
            tensors += [linear.weight, cast("Tensor | None", linear.bias)]
        tensors.append(None if stack.norm is None else cast(Tensor, stack.norm.weight))
        for tensor in tensors:
            if tensor is None:
                continue
            digest.update(json.dumps([stack.name, list(tensor.shape)]).encode())
            for part in torch.split(tensor.detach().flatten(), _HASHED):
                digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _child(path: str, attention: nn.Module, name: str) -> nn.Linear:
    child = getattr(attention, name, None)
    if child is None:
        raise UnsupportedModelError(f"[sketch] {path}.self_attn: want a projection {name}.")
    return plain_linear(f"[sketch] {path}.self_attn.{name}", child)


def _norm(path: str, block: nn.Module, name: str) -> nn.Module:
    """A norm that divides by the root mean square and multiplies by its gain, nothing else."""
    norm = getattr(block, name, None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    is_known = type(norm).__name__.endswith("RMSNorm") and isinstance(eps, float)
    if norm is None or not is_known or not isinstance(getattr(norm, "weight", None), Tensor):
        raise UnsupportedModelError(
            f"[sketch] {path}.{name}: {type(norm).__name__}; want a norm by the root mean square."
        )
    return cast(nn.Module, norm)
