"""What the kernels of a patched layer bypass, and whether anybody would miss it.

The kernels call neither the projections nor the activation of a layer, and torch sees none of their
operations. So they may run only where that makes no difference: nothing is hooked or wrapped, no
gradient is wanted, nobody records what happens. In doubt the original runs, for a reason that has a
name; `stats` counts by it, and the log tells the first of each.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as of_all  # where torch keeps the hooks of all modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .models import Ffn
from .votes import BATCH_MAX

ASKED = "dense()"
FULL = "density 1"
PROMPT = "prompt"
SEVERAL = "several tokens"
BATCH = f"batch above {BATCH_MAX}"
CONTINUOUS = "continuous batching"
LAYOUT = "layout"
TRAINING = "training"
GRADIENTS = "gradients"
HOOKS = "hooks"
WRAPPED = "wrapped"
TRACING = "tracing"
TRANSFORM = "transform"
AUTOCAST = "autocast"
FALLBACK = "fallback"
STALE = "stale"  # what the plan was made for is gone: an error, not a reason

# Looked up once: they are asked before every token.
_n_dispatch_modes = torch._C._len_torch_dispatch_stack
_n_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_is_autocast = torch.is_autocast_enabled

# What the log says of the first call of each kind, and how loud: what was asked for, and prompts,
# which are meant to run dense, are told to those who listen.
TOLD = {
    ASKED: (logging.INFO, "in a block of csfast.dense the original runs"),
    FULL: (logging.INFO, "density 1: the original runs"),
    PROMPT: (logging.INFO, "a prompt runs dense; steps of one token a sequence run sparse"),
    SEVERAL: (
        logging.WARNING,
        "several tokens a sequence after those in the cache (assisted generation, a prompt in "
        "parts, the next turn of a chat) run dense: want one token a sequence",
    ),
    BATCH: (
        logging.WARNING,
        f"a batch of more than {BATCH_MAX} sequences runs dense: want at most {BATCH_MAX}",
    ),
    CONTINUOUS: (
        logging.WARNING,
        "continuous batching puts the tokens of all requests into one sequence, so the whole batch "
        "runs dense, alone or in company: want generate for sparse steps",
    ),
    LAYOUT: (
        logging.WARNING,
        "an input that is not a plain contiguous tensor (batch, 1, d) runs dense",
    ),
    TRAINING: (logging.WARNING, "a model in training mode runs dense: want model.eval()"),
    GRADIENTS: (
        logging.WARNING,
        "gradients are asked for, so the original runs: want torch.no_grad() or inference_mode()",
    ),
    HOOKS: (
        logging.WARNING,
        "a layer's projection or activation has hooks, so the original runs: want them removed",
    ),
    WRAPPED: (
        logging.WARNING,
        "the forward of a layer, its projection or its activation was wrapped or replaced, so the "
        "original runs: want it as it was at apply",
    ),
    TRACING: (
        logging.WARNING,
        "a trace or a mode of torch records the operations, so the original runs",
    ),
    TRANSFORM: (
        logging.WARNING,
        "a transform of torch.func or forward-mode differentiation is on, so the original runs",
    ),
    AUTOCAST: (
        logging.WARNING,
        "autocast to another dtype than the weights' is on, so the original runs",
    ),
    FALLBACK: (logging.WARNING, "kernels failed, running dense"),
}


class StaleWeightsError(RuntimeError):
    """Weights of a patched model were changed, moved or replaced since `apply`."""


class Part(NamedTuple):
    """A child of a module: a projection, or an activation that is a module."""

    name: str
    child: nn.Module
    own: dict[str, Any]  # what it is made of: `vars`
    kind: type[nn.Module]
    is_linear: bool
    weight: tuple[int, int]  # where it is, and how often it was written to; 0 if there is none
    bias: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Bypassed:
    """What of one module the kernels bypass, as it was when csfast was applied.

    Attributes:
        kind: Class of the module, before it was patched.
        forward: Of that class.
        parts: Its children.
        act: Name and function of an activation that is no module.
        classes: Of the children, with the forward and the call of each.
        has_versions: Tensors made in inference mode keep no count of writes.
        device: Type of the device of the weights.
        dtype: Of the weights.
    """

    kind: type[nn.Module]
    forward: Callable[..., Any]
    parts: tuple[Part, ...]
    act: tuple[str, Callable[[Tensor], Tensor]] | None
    classes: tuple[tuple[type[nn.Module], Callable[..., Any], Callable[..., Any]], ...]
    has_versions: bool
    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, ffn: Ffn) -> Bypassed:
        """Take down how a layer is now."""
        module = ffn.module
        has_versions = not any(p.is_inference() for m in ffn.linears for p in m.parameters())
        parts = []
        for name, child in module.named_children():
            weight, bias = (
                _place(child._parameters.get(parameter), has_versions)
                for parameter in ("weight", "bias")
            )
            is_linear = child in ffn.linears
            parts.append(Part(name, child, vars(child), type(child), is_linear, weight, bias))
        plain = [(name, value) for name, value in vars(module).items() if value is ffn.act]
        kinds = dict.fromkeys(part.kind for part in parts)
        return cls(
            kind=type(module),
            forward=type(module).forward,
            parts=tuple(parts),
            act=plain[0] if plain else None,
            classes=tuple((kind, kind.forward, kind.__call__) for kind in kinds),
            has_versions=has_versions,
            device=ffn.gate.weight.device.type,
            dtype=ffn.gate.weight.dtype,
        )

    def wants_gradients(self, x: Tensor) -> bool:
        """Say whether a gradient of the input or of a weight is asked for, where any could be."""
        return x.requires_grad or any(
            p.requires_grad for part in self.parts for p in part.child.parameters()
        )

    def changed(self, module: nn.Module, *, is_traced: bool) -> str | None:
        """Give the reason if calling the children does more than it did, or something else.

        It is asked before every token, so it asks plain dictionaries by the shortest way. Backward
        hooks need no question: they run where gradients are wanted, and the original does there.

        Args:
            module: What was taken down.
            is_traced: By `torch.compile`, which cannot ask where a weight is.

        Returns:
            `STALE` if that is an error, whatever else is changed.
        """
        if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
            return HOOKS
        modules, has_versions = module._modules, self.has_versions
        for name, child, own, kind, is_linear, weight, bias in self.parts:
            if modules.get(name) is not child:
                return STALE
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return HOOKS
            if child.__class__ is not kind or "forward" in own or "_compiled_call_impl" in own:
                return WRAPPED
            if is_linear and not is_traced:
                parameters = own["_parameters"]
                tensor = parameters.get("weight")
                if tensor is None or tensor.data_ptr() != weight[0]:
                    return STALE
                if has_versions and tensor._version != weight[1]:
                    return STALE
                tensor = parameters.get("bias")
                if tensor is not None:
                    if _place(tensor, has_versions) != bias:
                        return STALE
                elif bias[0]:
                    return STALE
        for kind, forward, call in self.classes:
            if kind.forward is not forward or kind.__call__ is not call:
                return WRAPPED
        if self.act is not None and module.__dict__.get(self.act[0]) is not self.act[1]:
            return STALE
        return None if self.kind.forward is self.forward else WRAPPED

    def recorded(self, x: Tensor) -> str | None:
        """Give the reason if torch would do more with operations on `x` than run them."""
        if _n_dispatch_modes():
            return TRACING
        # A default device is a mode too; it makes tensors elsewhere and changes none.
        if _n_function_modes():
            modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
            if not all(isinstance(mode, DeviceContext) for mode in modes):
                return TRACING
        if _transform() is not None or forward_ad._current_level >= 0:
            return TRANSFORM
        if _is_autocast(self.device):
            to = torch.get_autocast_dtype(self.device)
            if not x.dtype == self.dtype == to:
                return AUTOCAST
        return None

    def refuse(self, number: int, module: nn.Module) -> NoReturn:
        """Say what of layer `number` is not what it was: a child, or a weight."""
        now = {**vars(module), **module._modules}
        was: list[tuple[str, object]] = [(part.name, part.child) for part in self.parts]
        for name, child in was if self.act is None else [*was, self.act]:
            if now.get(name) is not child:
                raise StaleWeightsError(
                    f"[ffn] layer {number}: {name} was replaced since apply: want the one that the "
                    "plan was made for; call csfast.remove."
                )
        for part in self.parts:
            for parameter, seen in (("weight", part.weight), ("bias", part.bias)):
                found = _place(part.child._parameters.get(parameter), self.has_versions)
                if found != seen:
                    name = part.name if parameter == "weight" else f"{part.name}.bias"
                    how = "written to" if found[0] == seen[0] else "moved or replaced"
                    raise StaleWeightsError(
                        f"[ffn] layer {number}: {name} was {how} since apply: want the weights "
                        "that the plan was made for; call csfast.remove, calibrate, and apply "
                        "again."
                    )
        raise AssertionError("nothing is stale")


def _place(tensor: Tensor | None, has_versions: bool) -> tuple[int, int]:
    """Address and count of writes of a weight or bias, 0 if there is none."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), tensor._version if has_versions else 0
