"""A language model as its decode loop reads it: maps, norms, rotations and scales, layer by layer.

Tensors are the model's own, but for the gains of norms, which become float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..types import UnsupportedModelError
from .linears import Stacked, family_of, find_linears, gain_of
from .structure import find_ffns

DECODED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
# Kinds of rotary positions that do not depend on how long the text is.
_STEADY = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """One linear map.

    Attributes:
        weight: ``(rows, cols)``, the parameter or a view of it.
        bias: ``(rows,)``, or nothing.
    """

    weight: Tensor
    bias: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer: attention and a gated feed-forward layer.

    Attributes:
        q: Of queries.
        k: Of keys.
        v: Of values.
        o: Of what attention gives.
        gate: Of the feed-forward layer.
        up: Likewise.
        down: Likewise.
        before_attention: Gain of the norm before attention, ``(d,)``, float32.
        before_ffn: Before the feed-forward layer.
        after_attention: After attention, or nothing.
        after_ffn: After the feed-forward layer, or nothing.
        of_q: Of the norm of every head of queries, ``(head_dim,)``, or nothing.
        of_k: The same for keys.
        kind: Of its rotary positions, where a model has several; else "".
        window: Positions that a token attends to, its own included; 0 for all before it.
    """

    q: Map
    k: Map
    v: Map
    o: Map
    gate: Map
    up: Map
    down: Map
    before_attention: Tensor
    before_ffn: Tensor
    after_attention: Tensor | None
    after_ffn: Tensor | None
    of_q: Tensor | None
    of_k: Tensor | None
    kind: str
    window: int


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model.

    Attributes:
        layers: In order.
        embedding: ``(vocabulary, d)``.
        head: To the vocabulary.
        norm: Gain of the norm before the head, ``(d,)``, float32.
        activation: Of the gates, one of `csfast.models.ACTIVATIONS`.
        n_heads: Of queries.
        n_kv_heads: Of keys and values.
        head_dim: Width of a head.
        eps: Of every norm.
        embedding_scale: What embeddings are multiplied by.
        score_scale: What queries times keys are multiplied by.
        score_cap: Scores become ``cap * tanh(score / cap)``; 0 for as they are.
        logit_cap: The same of logits.
    """

    layers: tuple[DecoderLayer, ...]
    embedding: Tensor
    head: Map
    norm: Tensor
    activation: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    embedding_scale: float
    score_scale: float
    score_cap: float
    logit_cap: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embedding.dtype


def find_decoder(model: nn.Module) -> Decoder:
    """Take a model apart.

    Args:
        model: As `find_linears` wants it, of one of `DECODED`.

    Raises:
        UnsupportedModelError: The model is of another family, or something about it is not as
            expected; the message names it.
    """
    family = family_of(model)
    if family not in DECODED:
        raise UnsupportedModelError(
            f"[engine] a model of type {family!r}: want one of {', '.join(DECODED)}."
        )
    stacks = {stack.name: stack for stack in find_linears(model)}
    ffns = find_ffns(model)
    modules = dict(model.named_modules())
    config: Any = model.config
    blocks = [modules[ffn.name.rpartition(".")[0]] for ffn in ffns]
    first: Any = blocks[0].self_attn
    for rotary in _rotaries(model).values():
        _check_rotation(rotary)
    layers = []
    for i, (block, ffn) in enumerate(zip(blocks, ffns, strict=True)):
        attention: Any = block.self_attn
        qkv = _apart(stacks[f"layers.{i}.qkv"], attention.head_dim, config)
        (o,) = stacks[f"layers.{i}.o"].linears
        window = getattr(attention, "sliding_window", None)
        if family in ("mistral", "phi3"):  # whose layers ask the configuration
            window = config.sliding_window
        layers.append(
            DecoderLayer(
                *qkv,
                o=Map(o.weight, o.bias),
                gate=Map(ffn.gate.weight, ffn.gate.bias),
                up=Map(ffn.up.weight, ffn.up.bias),
                down=Map(ffn.down.weight, ffn.down.bias),
                before_attention=_gain(stacks[f"layers.{i}.qkv"]),
                before_ffn=_gain(stacks[f"layers.{i}.gate_up"]),
                after_attention=_after(block, "post_attention_layernorm"),
                after_ffn=_after(block, "post_feedforward_layernorm"),
                of_q=_of_heads(attention, "q_norm"),
                of_k=_of_heads(attention, "k_norm"),
                kind=_kind(model, attention),
                window=window or 0,
            )
        )
    embedding: Any = cast(Any, model).get_input_embeddings()
    (head,) = stacks["head"].linears
    return Decoder(
        layers=tuple(layers),
        embedding=embedding.weight.detach(),
        head=Map(head.weight, head.bias),
        norm=_gain(stacks["head"]),
        activation=ffns[0].activation,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=first.head_dim,
        eps=_one_eps(model),
        embedding_scale=_scale(family, embedding),
        score_scale=float(first.scaling),
        score_cap=float(getattr(first, "attn_logit_softcapping", None) or 0.0),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def rotations(model: nn.Module, positions: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Give the cosines and sines that turn queries and keys, of every kind of layer.

    Returns:
        By `DecoderLayer.kind`; both ``(positions, head_dim / 2)``, float32.
    """
    place = torch.arange(positions)[None]
    like = place.float()  # what turns is float32
    found = {}
    for kind, rotary in _rotaries(model).items():
        with torch.no_grad():
            by_kind = hasattr(rotary, "layer_types")
            both = rotary(like, place, kind) if by_kind else rotary(like, place)
        cosine, sine = (table[0, :, : table.shape[-1] // 2].contiguous() for table in both)
        found[kind] = (cosine, sine)
    return found


def _rotaries(model: nn.Module) -> dict[str, Any]:
    """The module of rotary positions, by the kinds of layers that it knows."""
    body: Any = getattr(model, "base_model", model)
    if hasattr(body, "rotary_emb_local"):
        raise UnsupportedModelError("[engine] rotary_emb_local: want transformers 5 or later.")
    return dict.fromkeys(getattr(body.rotary_emb, "layer_types", [""]), body.rotary_emb)


def _kind(model: nn.Module, attention: Any) -> str:
    """Which of those a layer is."""
    return "" if "" in _rotaries(model) else str(attention.layer_type)


def _scale(family: str, embedding: Any) -> float:
    """What embeddings are multiplied by, rounded as the model rounds it."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        # Before transformers 5 the first two Gemmas multiply outside of the module.
        if not family.startswith("gemma"):
            return 1.0
        scale = torch.tensor(embedding.weight.shape[1] ** 0.5)
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))


def _apart(stack: Stacked, head_dim: int, config: Any) -> tuple[Map, Map, Map]:
    """Queries, keys and values, cut apart where they are one map."""
    if len(stack.linears) == 3:
        q, k, v = (Map(linear.weight, linear.bias) for linear in stack.linears)
        return q, k, v
    (linear,) = stack.linears
    keys = config.num_key_value_heads * head_dim
    sizes = [linear.weight.shape[0] - 2 * keys, keys, keys]
    weights = torch.split(linear.weight, sizes)
    biases = [None] * 3 if linear.bias is None else torch.split(linear.bias, sizes)
    q, k, v = (Map(*pair) for pair in zip(weights, biases, strict=True))
    return q, k, v


def _gain(stack: Stacked) -> Tensor:
    """The gain of the norm before some maps."""
    gain = stack.gain()
    if gain is None:
        raise UnsupportedModelError(f"[engine] {stack.name}: want a norm before it.")
    return gain


def _after(block: nn.Module, name: str) -> Tensor | None:
    """The gain of a norm after a part of a layer, where a layer has such norms."""
    if not hasattr(block, "pre_feedforward_layernorm"):
        return None
    return gain_of(getattr(block, name))


def _of_heads(attention: nn.Module, name: str) -> Tensor | None:
    """The gain of the norm of queries or keys."""
    norm = getattr(attention, name, None)
    return None if norm is None else gain_of(norm)


def _one_eps(model: nn.Module) -> float:
    """What all norms of a model add to the mean square."""
    found = {
        float(getattr(module, "variance_epsilon", getattr(module, "eps", None)))  # type: ignore[arg-type]
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm")
    }
    if len(found) != 1:
        raise UnsupportedModelError(f"[engine] norms with eps {sorted(found)}: want one for all.")
    return found.pop()


def _check_rotation(rotary: Any) -> None:
    """Refuse rotary positions that depend on the length of a text, or of a part of a head."""
    kinds = rotary.rope_type
    if getattr(rotary.config, "partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedModelError(
            "[engine] rotary positions of a part of a head: want all of it."
        )
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind not in _STEADY:
            raise UnsupportedModelError(
                f"[engine] rotary positions of type {kind!r}: want one of {', '.join(_STEADY)}."
            )
