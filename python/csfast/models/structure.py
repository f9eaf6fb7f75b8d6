"""Gated feed-forward layers of a model, found by their structure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..types import LayerShape, UnsupportedModelError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
APART = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")  # gate rows first, then up, in one weight
PATCH = "_csfast"  # name that what a layer runs in place of its own is kept under
_ACTS = ("act_fn", "activation_fn")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}
ACTIVATIONS = tuple(_ACTIVATIONS)  # by the names that the kernels know
_EXPERTS = ("experts", "expert", "shared_expert", "block_sparse_moe")


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """The gate or up map of a layer: a whole `nn.Linear`, or neighbouring rows of one.

    Attributes:
        linear: The module whose weight it is.
        start: First row of that weight.
        stop: Row after the last.
    """

    linear: nn.Linear
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the module."""
        return self.stop - self.start == self.linear.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """Give the weight ``(rows, d_in)``, contiguous: the parameter or a view of it."""
        weight = self.linear.weight
        return weight if self.is_whole else weight[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """Give the bias ``(rows,)``, the parameter or a view of it, if there is one."""
        bias = cast("Tensor | None", self.linear.bias)
        return bias if bias is None or self.is_whole else bias[self.start : self.stop]

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``(..., d_in)`` to ``(..., rows)``, the bias included."""
        if self.is_whole:
            return cast(Tensor, self.linear(x))
        return nn.functional.linear(x, self.weight, self.bias)


@dataclasses.dataclass(frozen=True, eq=False)
class Ffn:
    """One gated feed-forward layer of a model, ``down(act(gate(x)) * up(x))``.

    Attributes:
        name: Name of the module within the model.
        module: The module that holds the projections.
        gate: Weight ``(n_neurons, d)``.
        up: Weight ``(n_neurons, d)``; rows of the same module as those of `gate` where both are
            fused.
        down: Weight ``(d, n_neurons)``.
        act: The module's own activation function.
        activation: What it computes, one of `ACTIVATIONS`.
        shape: Sizes.
    """

    name: str
    module: nn.Module
    gate: Projection
    up: Projection
    down: nn.Linear
    act: Callable[[Tensor], Tensor]
    activation: str
    shape: LayerShape

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the weights of gate, up and down."""
        return self.gate.weight, self.up.weight, self.down.weight

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Give the modules that hold the weights, each once."""
        return tuple(dict.fromkeys((self.gate.linear, self.up.linear, self.down)))

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give what the module computes before its down projection, bit for bit.

        Args:
            x: ``(..., d)``, in the dtype of the weights.

        Returns:
            The activated gate, and its product with the up projection, both ``(..., n_neurons)``.
        """
        if self.gate.is_whole:
            gate, up = self.gate(x), self.up(x)
        else:
            gate, up = self.gate.linear(x).chunk(2, dim=-1)
        gate = self.act(gate)
        return gate, gate * up

    def dense(self, x: Tensor) -> Tensor:
        """Give the output ``(..., d)`` of the module for ``x (..., d)``, bit for bit."""
        return cast(Tensor, self.down(self.activations(x)[1]))

    def down_norm(self) -> Tensor:
        """Give the norm of every neuron's down row, ``(n_neurons,)``, float32."""
        down = self.down.weight.detach()
        norm: Tensor = torch.linalg.vector_norm(down, dim=0, dtype=torch.float32)
        return norm

    def offset(self) -> Tensor | None:
        """Give what the biases add to the readings of a sensor, or nothing if there are none.

        Returns:
            ``(n_neurons, 2)``, float32, contiguous: the gate bias, and the up bias times the norm
            of the neuron's down row.
        """
        gate, up = self.gate.bias, self.up.bias
        if gate is None and up is None:
            return None
        norm = self.down_norm()
        columns = [
            torch.zeros_like(norm) if bias is None else bias.detach().float() for bias in (gate, up)
        ]
        return torch.stack([columns[0], columns[1] * norm], dim=1)


def is_patched(module: nn.Module) -> bool:
    """Say whether a layer runs something in place of what was loaded, under `PATCH`."""
    return PATCH in vars(module)


def find_ffns(model: nn.Module) -> list[Ffn]:
    """Find the gated feed-forward layers of a model by their structure.

    A layer is a module whose children are ``gate_proj``, ``up_proj`` and ``down_proj``, or
    ``gate_up_proj`` with the rows of both and ``down_proj``, besides its activation function, and
    which computes ``down(act(gate(x)) * up(x))`` with SiLU or tanh-approximated GELU: one token is
    run through it to see. Its weights and biases are plain, of one dtype, on one device.

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
        has_gate = hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")
        if has_gate and hasattr(module, "down_proj"):
            ffns.append(_ffn(name, module))
    if not ffns:
        raise UnsupportedModelError(
            f"[find_ffns] {type(model).__name__}: want layers with gate_proj, up_proj and "
            "down_proj, as in Llama, or gate_up_proj and down_proj, as in Phi-3; it has none."
        )
    _refuse_mixture(ffns)
    return ffns


def _refuse_kind(name: str, module: nn.Module) -> None:
    """Refuse modules whose presence anywhere means that csfast cannot run on the model."""
    where = f"[find_ffns] {name or type(module).__name__}"
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(f"{where}: compiled; want the original, compile after apply.")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{where}: scripted; want the original module.")
    if set(name.split(".")) & set(_EXPERTS):
        raise UnsupportedModelError(f"{where}: experts of a mixture; want a dense model.")


def _ffn(name: str, module: nn.Module) -> Ffn:
    """The layer, after checking everything that running it sparsely takes for granted."""
    where = f"[find_ffns] {name}"
    children = dict(module.named_children())
    names = FUSED if hasattr(module, "gate_up_proj") else APART
    act_name = next((n for n in _ACTS if callable(getattr(module, n, None))), None)
    if act_name is None:
        raise UnsupportedModelError(f"{where}: want an activation named {' or '.join(_ACTS)}.")
    odd = sorted((set(children) | {act_name}) ^ {*names, act_name})
    if odd:
        wanted = ", ".join((*names, act_name))
        raise UnsupportedModelError(f"{where}: want {wanted} only, not {odd[0]!r}.")
    for own, _ in module.named_parameters(recurse=False):
        raise UnsupportedModelError(f"{where}: want no parameter of its own, not {own!r}.")
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{where}: its forward was replaced (offloaded, or patched by another library); "
            "want the original module."
        )
    linears = [plain_linear(f"{where}.{n}", children[n]) for n in names]
    gate, up = _gate_and_up(where, linears)
    down = linears[-1]
    n_neurons, d = gate.weight.shape
    fits = tuple(up.weight.shape) == (n_neurons, d) and tuple(down.weight.shape) == (d, n_neurons)
    if not fits:
        shapes = ", ".join(str(tuple(m.weight.shape)) for m in (gate, up, down))
        raise UnsupportedModelError(f"{where}: weights {shapes}: want (F, d), (F, d), (d, F).")
    act = cast("Callable[[Tensor], Tensor]", getattr(module, act_name))
    activation = _activation(f"{where}.{act_name}", act, gate.weight.device)
    shape = LayerShape(d=d, n_neurons=n_neurons)
    ffn = Ffn(name, module, gate, up, down, act, activation, shape)
    if not is_patched(module):  # or it was tried before, and has a forward of ours now
        _probe(where, ffn)
    return ffn


def _gate_and_up(where: str, linears: list[nn.Linear]) -> tuple[Projection, Projection]:
    """Gate and up, cut apart where they are fused."""
    first, rows = linears[0], linears[0].weight.shape[0]
    if len(linears) == len(APART):
        second = linears[1]
        return Projection(first, 0, rows), Projection(second, 0, second.weight.shape[0])
    if rows % 2:
        raise UnsupportedModelError(
            f"{where}.{FUSED[0]}: a weight of {rows} rows; want those of gate and of up, as many "
            "each."
        )
    return Projection(first, 0, rows // 2), Projection(first, rows // 2, rows)


def plain_linear(where: str, module: nn.Module) -> nn.Linear:
    """The projection, after checking that weight and bias are all there is to it."""
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(f"{where}: an adapter (LoRA); want it merged into the weights.")
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(
            f"{where}: {type(module).__name__}, perhaps quantised; want a plain nn.Linear."
        )
    hooked = any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
    if hooked or hasattr(module, "_hf_hook") or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{where}: hooked (offloaded, or watched by another library); want it plain."
        )
    for name, tensor in module.named_parameters(recurse=False):
        _refuse_tensor(where, name, tensor)
    return module


def _refuse_tensor(where: str, name: str, tensor: nn.Parameter) -> None:
    """Refuse a weight or bias that the kernels could not read where it is."""
    if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
        raise UnsupportedModelError(
            f"{where}: a {name} of type {type(tensor).__name__}, perhaps sharded; want a tensor."
        )
    if tensor.is_meta:
        raise UnsupportedModelError(f"{where}: a meta tensor; want a {name} that is loaded.")
    if tensor.dtype not in DTYPES:
        dtypes = ", ".join(str(t).removeprefix("torch.") for t in DTYPES)
        raise UnsupportedModelError(f"{where}: a {name} of {tensor.dtype}; want one of {dtypes}.")
    if not tensor.is_contiguous():
        raise UnsupportedModelError(
            f"{where}: a {name} of strides {tensor.stride()}; want it contiguous."
        )


def _activation(where: str, act: Callable[[Tensor], Tensor], device: torch.device) -> str:
    """Which of the activations a function is, by trying it."""
    z = torch.linspace(-8, 8, 129, dtype=torch.float32, device=device)
    with torch.no_grad():
        found = act(z)
        for name, function in _ACTIVATIONS.items():
            # Float32 rounds by 1e-6 here; GELU and its approximation by tanh are 4.7e-4 apart.
            if found.shape == z.shape and torch.allclose(found, function(z), rtol=0, atol=1e-5):
                return name
    raise UnsupportedModelError(f"{where}: {act}: want SiLU or GELU approximated by tanh.")


def _probe(where: str, ffn: Ffn) -> None:
    """Refuse a layer that computes something else, by running one token through it."""
    tensors = [p for linear in ffn.linears for p in linear.parameters(recurse=False)]
    first = tensors[0]
    if len({t.device for t in tensors}) > 1 or len({t.dtype for t in tensors}) > 1:
        raise UnsupportedModelError(f"{where}: want one device and one dtype.")
    with torch.no_grad():
        angle = torch.arange(ffn.shape.d, device=first.device, dtype=torch.float32)
        x = (4 * torch.sin(angle)).to(first.dtype)[None, None]
        # The same products by the same library: only the order of `a * b` may differ.
        found, want = type(ffn.module).forward(ffn.module, x), ffn.dense(x)
        if not torch.equal(torch.nan_to_num(found), torch.nan_to_num(want)):
            raise UnsupportedModelError(
                f"{where}: computes something else than down(act(gate(x)) * up(x))."
            )


def _refuse_mixture(ffns: list[Ffn]) -> None:
    """Refuse layers that share weights, differ in kind, or stand in one list of experts."""
    owners: dict[int, str] = {}
    for ffn in ffns:
        for linear in ffn.linears:
            first = owners.setdefault(linear.weight.data_ptr(), ffn.name)
            if first != ffn.name:
                raise UnsupportedModelError(
                    f"[find_ffns] {ffn.name}: shares weights with {first}; want its own."
                )
    weights = [ffn.gate.weight for ffn in ffns]
    if len({w.device for w in weights}) > 1 or len({w.dtype for w in weights}) > 1:
        raise UnsupportedModelError("[find_ffns] layers on several devices or dtypes; want one.")
    if len({ffn.activation for ffn in ffns}) > 1:
        raise UnsupportedModelError("[find_ffns] layers of several activations; want one.")
    parents = [ffn.name.rpartition(".")[0] for ffn in ffns]
    for parent in parents:
        if parents.count(parent) > 1:
            raise UnsupportedModelError(
                f"[find_ffns] {parent}: several feed-forward layers in one; want one a layer."
            )
