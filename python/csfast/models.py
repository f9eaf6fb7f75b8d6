"""Hugging Face models: found by structure, loaded, fingerprinted, run.

The one module that imports transformers, and only where it is called: importing it takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .types import Document, LayerShape, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

N_DENSE = 32  # first tokens of a plain text that run dense, as a prompt would
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHILDREN = ("gate_proj", "up_proj", "down_proj", "act_fn")
_EXPERTS = ("experts", "expert", "shared_expert", "block_sparse_moe")
_HASH_BYTES = 1 << 24  # hashed at a time, so that a copy from a GPU stays small and Ctrl-C works


@dataclasses.dataclass(frozen=True, eq=False)
class Ffn:
    """One gated feed-forward layer of a model.

    Attributes:
        name: Name of the module within the model.
        module: The module that holds the projections.
        gate: Weight ``(n_neurons, d)``.
        up: Weight ``(n_neurons, d)``.
        down: Weight ``(d, n_neurons)``.
        shape: Sizes.
    """

    name: str
    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    shape: LayerShape


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What identifies a model to a plan.

    Attributes:
        model_type: Name of the architecture in its configuration, ``"llama"``.
        shapes: Sizes of the feed-forward layers, in order.
        dtype: Of their weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        model_hash: SHA-256 over type, shapes, dtype and feed-forward weights, hexadecimal.
    """

    model_type: str
    shapes: tuple[LayerShape, ...]
    dtype: str
    model_hash: str


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A document in tokens.

    Attributes:
        ids: ``(1, n_tokens)``, int64.
        n_prompt: Positions at the start that run dense; the others run sparse.
    """

    ids: Tensor
    n_prompt: int


def find_ffns(model: nn.Module) -> list[Ffn]:
    """Find the gated feed-forward layers of a model by their structure.

    A layer is a module whose children are ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``
    and nothing else, and which computes ``down_proj(silu(gate_proj(x)) * up_proj(x))``: one token
    is run through it to see. Its weights are plain, of one dtype, on one device.

    Args:
        model: In evaluation mode, not compiled, quantised, offloaded or sharded.

    Returns:
        The layers in the order of the model; at least one.

    Raises:
        UnsupportedModelError: The model, or its present state, is something else; the message
            names the module and what it is.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "[find_ffns] a module made by torch.compile: want the original; compile after apply."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"[find_ffns] model of type {type(model).__name__}: want an nn.Module.")
    if model.training:
        raise UnsupportedModelError("[find_ffns] a model in training mode: call model.eval().")
    ffns = []
    for name, module in model.named_modules(remove_duplicate=False):
        _refuse_kind(name, module)
        if hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            ffns.append(_ffn(name, module))
    if not ffns:
        raise UnsupportedModelError(
            f"[find_ffns] {type(model).__name__}: want layers with gate_proj, up_proj, down_proj "
            "and act_fn, as in Llama and Qwen2; it has none."
        )
    _refuse_mixture(ffns)
    return ffns


def load(
    path: str | pathlib.Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder, or by name from the local cache.

    Nothing is downloaded, no code of the model's author is run, and only safetensors are read.

    Args:
        path: Folder, or name of a model in the cache of Hugging Face.
        dtype: Of the weights; ``"auto"`` takes the one they are stored in.
        device: Where to put the model.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: Neither a folder nor a name in the cache.
        ValueError: There is no such device.
        UnsupportedModelError: Not a causal language model that csfast may load.
    """
    import safetensors
    import transformers

    folder = pathlib.Path(path)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"[load] device = {str(device)!r}: want cpu, torch sees no other here.")
    config = _config(folder, str(path))
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"[load] {path}: want weights that are not quantised.")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"[load] {path}: model type {config.model_type!r}: want a causal language model that "
            "transformers knows without code of its author."
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(f"[load] {path}: want weights in .safetensors files.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _without_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, use_safetensors=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **options)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UnsupportedModelError(
            f"[load] {path}: want a whole model folder ({error})."
        ) from error
    return cast("PreTrainedModel", nn.Module.to(model, device)), tokenizer


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own on stderr."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def demo_folder() -> pathlib.Path:
    """Give the folder of the model that ships with csfast."""
    return pathlib.Path(__file__).parent / "demo_model"


def context_length(model: nn.Module) -> int | None:
    """Give how many tokens the model was made for, if its configuration says so."""
    length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, *, max_tokens: int) -> Encoded:
    """Turn a document into tokens: ``[bos] prompt response [eos]``, or ``[bos] text``.

    Prompt and response are tokenised apart, so that the border between them is one of tokens. The
    end of a text or response that is too long is cut off.

    Args:
        tokenizer: Of the model. A tokenizer without bos or eos leaves them out.
        document: What to encode.
        max_tokens: Most tokens to give.

    Raises:
        ValueError: The document is empty, or its prompt alone fills ``max_tokens``.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = _tokens(tokenizer, document.prompt)
    response = _tokens(tokenizer, document.response)
    if not response:
        raise ValueError(f"[encode] a document of {document.task!r} without text: want some.")
    if document.prompt:
        if len(bos) + len(prompt) >= max_tokens:
            raise ValueError(
                f"[encode] a prompt of {len(bos) + len(prompt)} tokens: want fewer than "
                f"{max_tokens}, so that something of the response remains."
            )
        ids = (bos + prompt + response + eos)[:max_tokens]
        n_prompt = len(bos) + len(prompt)
    else:
        ids = (bos + response)[:max_tokens]
        n_prompt = min(N_DENSE, len(ids))
    return Encoded(torch.tensor([ids], dtype=torch.int64), n_prompt)


def hidden_states(model: nn.Module, ids: Tensor) -> None:
    """Run the layers of a model over whole sequences, without its output projection.

    For the hooks that watch the layers; sequences of a batch are padded at their end, which a
    causal model's earlier positions do not see.

    Args:
        model: A causal language model.
        ids: ``(batch, n_tokens)``, int64, on the model's device.
    """
    body = getattr(model, "base_model", model)
    body(input_ids=ids, use_cache=False)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Identify a model by its type and its feed-forward layers, weights included.

    Raises:
        UnsupportedModelError: csfast does not run on the model.
    """
    ffns = find_ffns(model)
    model_type = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    dtype = str(ffns[0].gate.weight.dtype).removeprefix("torch.")
    shapes = tuple(f.shape for f in ffns)
    sizes = [[s.d, s.n_neurons] for s in shapes]
    digest = hashlib.sha256(json.dumps([model_type, dtype, sizes]).encode())
    for ffn in ffns:
        for linear in (ffn.gate, ffn.up, ffn.down):
            raw = linear.weight.detach().view(torch.uint8).flatten()
            for part in torch.split(raw, _HASH_BYTES):
                digest.update(part.cpu().numpy().tobytes())
    return Fingerprint(model_type, shapes, dtype, digest.hexdigest())


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a prompt and give the text piece by piece, as it is made.

    The tokens are those of ``model.generate`` for a model whose generation settings name no
    penalties: the likeliest at temperature 0, else drawn from the whole distribution. It runs in
    the caller's thread, so that Ctrl-C and errors come out of the iterator at once.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Of the model.
        prompt: Text to continue.
        max_new_tokens: Most tokens to make, at least 1.
        temperature: 0 for the likeliest token; else what the logits are divided by.
        seed: Of the draws.

    Yields:
        Pieces whose concatenation is the continuation; never half a character.

    Raises:
        ValueError: The prompt is empty, or does not fit into the context with what is to come, or
            a number is out of range. Raised by the call, not by the iterator.
    """
    if not prompt:
        raise ValueError("[generate] an empty prompt: want text.")
    if max_new_tokens < 1:
        raise ValueError(f"[generate] max_new_tokens = {max_new_tokens}: want at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"[generate] temperature = {temperature}: want 0 or more.")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = bos + _tokens(tokenizer, prompt)
    length = context_length(model)
    if length is not None and len(ids) + max_new_tokens > length:
        raise ValueError(
            f"[generate] a prompt of {len(ids)} tokens and {max_new_tokens} new ones: want at most "
            f"{length} together, the model's context."
        )
    return _pieces(tokenizer, _new_tokens(model, ids, max_new_tokens, temperature, seed))


def _new_tokens(
    model: PreTrainedModel, ids: list[int], n: int, temperature: float, seed: int
) -> Iterator[int]:
    """Tokens that continue `ids`, up to the end-of-text mark, which is not among them."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(ends) if isinstance(ends, list) else {ends}
    device = next(model.parameters()).device
    draw = torch.Generator(device=device).manual_seed(seed)
    step = torch.tensor([ids], device=device)
    cache = None
    for _ in range(n):
        # Not around the yield: the caller's code must not run in this mode.
        with torch.inference_mode():
            out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if temperature == 0:
                step = logits.argmax(dim=-1, keepdim=True)
            else:
                chance = torch.softmax(logits / temperature, dim=-1)
                step = torch.multinomial(chance, 1, generator=draw)
            token = int(step)
        if token in stops:
            return
        yield token


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Text of the tokens so far, less what was given; held back while a character is unfinished."""
    seen: list[int] = []
    given = 0
    text = ""
    for token in tokens:
        seen.append(token)
        text = str(tokenizer.decode(seen, skip_special_tokens=True))
        if len(text) > given and not text.endswith("�"):
            yield text[given:]
            given = len(text)
    if len(text) > given:
        yield text[given:]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _config(folder: pathlib.Path, name: str) -> Any:
    """The configuration of a model folder or of a model in the cache."""
    import transformers

    if folder.exists() and not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"[load] {name}: want a model folder with config.json.")
    try:
        return transformers.AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"[load] {name}: want a configuration that transformers reads without code of its "
            f"author ({error})."
        ) from error
    except OSError as error:
        if folder.exists():
            raise UnsupportedModelError(f"[load] {name}: want a sound config.json.") from error
        raise FileNotFoundError(
            f"[load] {name!r}: want a model folder, or the name of a model in the local cache."
        ) from error


def _refuse_kind(name: str, module: nn.Module) -> None:
    """Refuse modules whose presence anywhere means that csfast cannot run on the model."""
    where = f"[find_ffns] {name or type(module).__name__}"
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(f"{where}: compiled; want the original, compile after apply.")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{where}: scripted; want the original module.")
    if set(name.split(".")) & set(_EXPERTS):
        raise UnsupportedModelError(f"{where}: experts of a mixture; want a dense model.")
    if hasattr(module, "gate_up_proj"):
        raise UnsupportedModelError(f"{where}: a fused gate_up_proj; want gate and up apart.")


def _ffn(name: str, module: nn.Module) -> Ffn:
    """The layer, after checking everything that running it sparsely takes for granted."""
    where = f"[find_ffns] {name}"
    children = dict(module.named_children())
    if not callable(getattr(module, "act_fn", None)):
        raise UnsupportedModelError(f"{where}: want an activation named act_fn.")
    odd = sorted((set(children) | {"act_fn"}) ^ set(_CHILDREN))
    if odd:
        raise UnsupportedModelError(f"{where}: want {', '.join(_CHILDREN)} only, not {odd[0]!r}.")
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{where}: its forward was replaced (offloaded, or patched by another library); "
            "want the original module."
        )
    gate, up, down = (_linear(f"{where}.{n}", children[n]) for n in _CHILDREN[:3])
    n_neurons, d = gate.weight.shape
    fits = tuple(up.weight.shape) == (n_neurons, d) and tuple(down.weight.shape) == (d, n_neurons)
    if not fits:
        shapes = ", ".join(str(tuple(m.weight.shape)) for m in (gate, up, down))
        raise UnsupportedModelError(f"{where}: weights {shapes}: want (F, d), (F, d), (d, F).")
    ffn = Ffn(name, module, gate, up, down, LayerShape(d=d, n_neurons=n_neurons))
    _probe(where, ffn)
    return ffn


def _linear(where: str, module: nn.Module) -> nn.Linear:
    """The projection, after checking that its weight is all there is to it."""
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(f"{where}: an adapter (LoRA); want it merged into the weights.")
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(
            f"{where}: {type(module).__name__}, perhaps quantised; want a plain nn.Linear."
        )
    if module.bias is not None:
        raise UnsupportedModelError(f"{where}: has a bias; want none.")
    hooked = any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
    if hooked or hasattr(module, "_hf_hook") or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{where}: hooked (offloaded, or watched by another library); want it plain."
        )
    weight = module.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        raise UnsupportedModelError(
            f"{where}: a weight of type {type(weight).__name__}, perhaps sharded; want a tensor."
        )
    if weight.is_meta:
        raise UnsupportedModelError(f"{where}: a meta tensor; want weights that are loaded.")
    if weight.dtype not in DTYPES:
        dtypes = ", ".join(str(t).removeprefix("torch.") for t in DTYPES)
        raise UnsupportedModelError(f"{where}: {weight.dtype} weights; want one of {dtypes}.")
    if not weight.is_contiguous():
        raise UnsupportedModelError(f"{where}: strides {weight.stride()}; want it contiguous.")
    return module


def _probe(where: str, ffn: Ffn) -> None:
    """Refuse a layer that computes something else, by running one token through it."""
    weights = (ffn.gate.weight, ffn.up.weight, ffn.down.weight)
    if len({w.device for w in weights}) > 1 or len({w.dtype for w in weights}) > 1:
        raise UnsupportedModelError(f"{where}: want one device and one dtype.")
    with torch.no_grad():
        angle = torch.arange(ffn.shape.d, device=weights[0].device, dtype=torch.float32)
        x = (4 * torch.sin(angle)).to(weights[0].dtype)[None, None]
        z = torch.linspace(-8, 8, 64, device=x.device)
        act = cast("nn.Module", ffn.module.act_fn)
        if not torch.allclose(act(z), nn.functional.silu(z), atol=1e-5):
            raise UnsupportedModelError(f"{where}.act_fn: {act}: want SiLU.")
        want = ffn.down(nn.functional.silu(ffn.gate(x)) * ffn.up(x))
        # The same three products by the same library: only the order of `a * b` may differ.
        forward = getattr(type(ffn.module), "dense_forward", type(ffn.module).forward)
        if not torch.equal(torch.nan_to_num(forward(ffn.module, x)), torch.nan_to_num(want)):
            raise UnsupportedModelError(
                f"{where}: computes something else than down(silu(gate(x)) * up(x))."
            )


def _refuse_mixture(ffns: list[Ffn]) -> None:
    """Refuse layers that share weights, differ in kind, or stand in one list of experts."""
    owners: dict[int, str] = {}
    for ffn in ffns:
        for linear in (ffn.gate, ffn.up, ffn.down):
            first = owners.setdefault(linear.weight.data_ptr(), ffn.name)
            if first != ffn.name:
                raise UnsupportedModelError(
                    f"[find_ffns] {ffn.name}: shares weights with {first}; want its own."
                )
    weights = [ffn.gate.weight for ffn in ffns]
    if len({w.device for w in weights}) > 1 or len({w.dtype for w in weights}) > 1:
        raise UnsupportedModelError("[find_ffns] layers on several devices or dtypes; want one.")
    parents = [ffn.name.rpartition(".")[0] for ffn in ffns]
    for parent in parents:
        if parents.count(parent) > 1:
            raise UnsupportedModelError(
                f"[find_ffns] {parent}: several feed-forward layers in one; want one a layer."
            )
