"""The first front door: patch a loaded model in place so that decoding runs sparsely.

A patched layer decides by shape alone: one token a sequence goes through the kernels, anything
longer through the original module. The user's weights are read where they are and never written;
csfast owns the codes and one transposed copy of the down projection, and `remove` frees both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import models, ops, planes
from .models import Ffn
from .plan import LayerPlan, Plan
from .types import POOLED

BATCH_MAX = 16  # sequences that decode together; a larger batch runs dense
_MEMORY_SHARE = 0.8  # of the free memory: the cache of keys and values needs some too
_log = logging.getLogger("csfast")

Seen = tuple[int, ...]  # addresses of gate, up and down, then how often each was written


class StaleWeightsError(RuntimeError):
    """Weights of a patched model were changed, moved or replaced since `apply`."""


class ResourceLimitError(ValueError):
    """What `apply` would allocate is more than it may."""


@dataclasses.dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes:
        n_layers: Layers that were patched.
        n_bytes: Memory that csfast owns for them: codes, scales, transposed down projections.
        bits: Of the sensor.
        density: Fraction of neurons that the thresholds were calibrated for.
        task: Whose thresholds.
    """

    n_layers: int
    n_bytes: int
    bits: int
    density: float
    task: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the kernels did since `apply`, a number a layer each.

    Attributes:
        tokens: Tokens that ran through the kernels.
        neurons: Neurons executed for them, in all.
        fallbacks: Calls that the kernels failed and the original module answered.
        n_neurons: Neurons of the layer.
    """

    tokens: tuple[int, ...]
    neurons: tuple[int, ...]
    fallbacks: tuple[int, ...]
    n_neurons: tuple[int, ...]

    @property
    def density(self) -> float:
        """Fraction of neurons executed over all tokens and layers; 1 if there were none."""
        possible = sum(t * n for t, n in zip(self.tokens, self.n_neurons, strict=True))
        return sum(self.neurons) / possible if possible else 1.0


@dataclasses.dataclass(eq=False)
class _Shared:
    """What the layers of one model have in common."""

    session: ops.Session
    plan: Plan
    bits: int
    counts: Tensor  # (n_layers, 2), int64: tokens, neurons; written by the kernels
    full: bool  # density 1: original modules
    dense_depth: int = 0  # nesting of `dense`
    has_warned: bool = False


@dataclasses.dataclass(eq=False)
class _Layer:
    """What a patched module carries besides its own."""

    shared: _Shared
    number: int  # in the session
    codes: Tensor  # (n_neurons, 2, chunks, 16 * bits), uint8
    equal: Tensor  # (d,), float32
    row_scale: Tensor  # (n_neurons, 2), float32
    threshold: Tensor  # (BATCH_MAX,), float32
    down_t: Tensor  # (n_neurons, d)
    weights: tuple[Tensor, Tensor, Tensor]  # gate, up, down as bound
    seen: Seen
    has_versions: bool  # tensors made in inference mode keep no count of writes
    dtype: torch.dtype
    device: torch.device
    fallbacks: int = 0


def needed_bytes(model: nn.Module, *, bits: int = 2) -> int:
    """Give the bytes that `apply` would allocate and keep.

    Args:
        model: As `models.find_ffns` wants it.
        bits: Of the sensor.
    """
    return sum(_layer_bytes(ffn, bits) for ffn in models.find_ffns(model))


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    density: float = 0.5,
    bits: int = 2,
    task: str = POOLED,
    limit_bytes: int | None = None,
) -> Applied:
    """Patch the feed-forward layers of a model in place, so that decoding runs sparsely.

    From then on a call with one token a sequence, for up to 16 sequences, runs through the kernels
    if the model is in evaluation mode and no gradient is asked for; every other call runs the
    original module. The choice of neurons is each token's own. `docs/api.md` has the details.

    Args:
        model: Of Llama or Qwen2 type, as `models.find_ffns` wants it; its weights are not changed.
        plan: Made by `calibrate` on this very model.
        density: Fraction of neurons to run, within the plan's densities; 1 runs the original
            modules, bit for bit.
        bits: Of the sensor, one of the plan's settings.
        task: Whose thresholds: one of the plan's tasks.
        limit_bytes: Most that csfast may allocate; four fifths of the free memory if not given.
            The bytes are logged before they are allocated.

    Returns:
        What was done, and the bytes it took.

    Raises:
        ValueError: csfast is applied already, or the plan does not hold what was asked for.
        ResourceLimitError: It would take more than ``limit_bytes``.
        PlanError: The plan belongs to another model.
        UnsupportedModelError: csfast does not run on the model, or on its present state.
        BackendError: There are no kernels for the model's device.
    """
    ffns = models.find_ffns(model)
    if any(_layer_of(ffn.module) for ffn in ffns):
        raise ValueError("[apply] csfast is applied to this model: call csfast.remove first.")
    plan.check(model)
    thresholds = _thresholds(plan, bits, density, task)
    n_bytes = sum(_layer_bytes(ffn, bits) for ffn in ffns)
    device = ffns[0].gate.weight.device
    limit = _free_share(device) if limit_bytes is None else limit_bytes
    _log.info(
        "[apply] %d layers take %d bytes beside the model (limit %d)", len(ffns), n_bytes, limit
    )
    if n_bytes > limit:
        raise ResourceLimitError(
            f"[apply] {n_bytes} bytes for codes and transposed weights: want at most {limit}; "
            "raise limit_bytes, or free memory."
        )
    shared = _Shared(
        session=ops.Session(device),
        plan=plan,
        bits=bits,
        counts=torch.zeros(len(ffns), 2, dtype=torch.int64, device=device),
        full=density == 1,
    )
    layers = [_bind(shared, i, ffn, plan.layers[i], thresholds[i]) for i, ffn in enumerate(ffns)]
    patched = {original: _patched(original) for original in {type(f.module) for f in ffns}}
    # Nothing above touched the model; nothing below can fail.
    for ffn, layer in zip(ffns, layers, strict=True):
        ffn.module.__dict__["_csfast"] = layer
        ffn.module.__class__ = patched[type(ffn.module)]
    return Applied(len(ffns), n_bytes, bits, density, task)


def remove(model: nn.Module) -> None:
    """Undo `apply`: the modules are what they were, and what csfast owned is freed.

    Raises:
        ValueError: csfast is not applied to the model.
    """
    for module in _patched_modules(model, "remove"):
        module.__class__ = type(module).__mro__[1]
        del module.__dict__["_csfast"]


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run the original modules while the block lasts; blocks may be nested.

    Raises:
        ValueError: csfast is not applied to the model.
    """
    shared = _shared(model, "dense")
    shared.dense_depth += 1
    try:
        yield
    finally:
        shared.dense_depth -= 1


def set_density(model: nn.Module, density: float, task: str = POOLED) -> None:
    """Change density and task of a patched model; nothing is allocated.

    Raises:
        ValueError: csfast is not applied, or the plan does not hold what was asked for.
    """
    modules = _patched_modules(model, "set_density")
    shared = _shared(model, "set_density")
    thresholds = _thresholds(shared.plan, shared.bits, density, task)
    for module, threshold in zip(modules, thresholds, strict=True):
        module.__dict__["_csfast"].threshold.fill_(threshold)
    shared.full = density == 1


def stats(model: nn.Module) -> Stats:
    """Read what the kernels counted since `apply`; waits for the device.

    Raises:
        ValueError: csfast is not applied to the model.
    """
    layers = [m.__dict__["_csfast"] for m in _patched_modules(model, "stats")]
    counts = layers[0].shared.counts.tolist()
    return Stats(
        tokens=tuple(c[0] for c in counts),
        neurons=tuple(c[1] for c in counts),
        fallbacks=tuple(layer.fallbacks for layer in layers),
        n_neurons=tuple(len(layer.row_scale) for layer in layers),
    )


def _patched(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a patched layer: the original, but for `forward`."""

    class Patched(original):  # type: ignore[valid-type, misc]
        dense_forward = original.forward

        def forward(self, x: Tensor) -> Tensor:
            layer: _Layer = self.__dict__["_csfast"]
            shared = layer.shared
            runs_sparse = (
                x.ndim == 3
                and x.shape[1] == 1
                and 0 < x.shape[0] <= BATCH_MAX
                and not (shared.full or shared.dense_depth or self.training)
                and not (x.requires_grad and torch.is_grad_enabled())
                and x.is_contiguous()
            )
            if not runs_sparse:
                out: Tensor = original.forward(self, x)
                return out
            if torch.compiler.is_compiling():
                return _run_traced(self, layer, x)
            return _run(self, layer, x)

        def __reduce_ex__(self, protocol: object) -> NoReturn:
            raise TypeError(
                "[apply] a copy or pickle of a patched model: its layers read the original's "
                "weights by address; call csfast.remove first."
            )

    Patched.__name__ = Patched.__qualname__ = f"Csfast{original.__name__}"
    Patched.__module__ = original.__module__
    return Patched


def _run(module: Any, layer: _Layer, x: Tensor) -> Tensor:
    """One token a sequence through the kernels."""
    now = _seen(module._modules, layer.has_versions)
    if now != layer.seen or x.dtype != layer.dtype or x.device != layer.device:
        _refuse_stale(layer, x, now)
    out = torch.empty_like(x)
    try:
        layer.shared.session.ffn(layer.number, x.view(-1, x.shape[2]), out.view(-1, x.shape[2]))
    except RuntimeError as error:  # a BackendError, or what torch makes of a failing device
        # The decision guard: a token is answered densely rather than not at all.
        layer.fallbacks += 1
        if not layer.shared.has_warned:
            layer.shared.has_warned = True
            _log.warning("[ffn] kernels failed, running dense: %s", error)
        answer: Tensor = module.dense_forward(x)
        return answer
    return out


def _run_traced(module: Any, layer: _Layer, x: Tensor) -> Tensor:
    """The same through the registered operator, which torch.compile can see."""
    gate, up, _ = layer.weights
    return ops.ffn(
        layer.codes,
        layer.equal,
        layer.row_scale,
        layer.threshold[: x.shape[0]],
        gate,
        up,
        layer.down_t,
        x[:, 0],
        bits=layer.shared.bits,
    )[:, None]


def _seen(modules: Mapping[str, Any], has_versions: bool) -> Seen:
    """Version and address of the weights that a module has now, by the shortest way to them."""
    try:
        gate = modules["gate_proj"]._parameters["weight"]
        up = modules["up_proj"]._parameters["weight"]
        down = modules["down_proj"]._parameters["weight"]
    except KeyError:  # an adapter took the place of a projection
        return ()
    places = gate.data_ptr(), up.data_ptr(), down.data_ptr()
    if not has_versions:
        return places
    return *places, gate._version, up._version, down._version


def _refuse_stale(layer: _Layer, x: Tensor, now: Seen) -> NoReturn:
    if not now:
        raise StaleWeightsError(
            f"[ffn] layer {layer.number}: a projection was replaced since apply: want plain ones; "
            "call csfast.remove."
        )
    for i, (seen, found) in enumerate(zip(layer.seen, now, strict=True)):
        if seen != found:
            name = ("gate_proj", "up_proj", "down_proj")[i % 3]
            how = "moved or replaced" if i < 3 else "written to"
            raise StaleWeightsError(
                f"[ffn] layer {layer.number}: {name} was {how} since apply: want the weights that "
                "the plan was made for; call csfast.remove, calibrate, and apply again."
            )
    raise StaleWeightsError(
        f"[ffn] layer {layer.number}: x is {x.dtype} on {x.device}: want {layer.dtype} on "
        f"{layer.device}, as at apply; call csfast.remove, and apply again."
    )


def _bind(
    shared: _Shared, number: int, ffn: Ffn, layer_plan: LayerPlan, threshold: float
) -> _Layer:
    """Make what csfast owns of one layer, and bind it to the session."""
    weights = (ffn.gate.weight, ffn.up.weight, ffn.down.weight)
    gate, up, down = (w.detach() for w in weights)
    device = gate.device
    has_versions = not any(w.is_inference() for w in weights)
    layer = _Layer(
        shared=shared,
        number=number,
        codes=layer_plan.encode(gate, up, down, bits=shared.bits),
        equal=layer_plan.equal.to(device, copy=True),
        row_scale=layer_plan.row_scale[shared.bits].to(device, copy=True),
        threshold=torch.full((BATCH_MAX,), threshold, device=device),
        down_t=down.T.contiguous(),
        weights=weights,
        seen=_seen(ffn.module._modules, has_versions),
        has_versions=has_versions,
        dtype=gate.dtype,
        device=device,
    )
    bound = shared.session.bind(
        codes=layer.codes,
        equal=layer.equal,
        row_scale=layer.row_scale,
        threshold=layer.threshold,
        gate=gate,
        up=up,
        down_t=layer.down_t,
        bits=shared.bits,
        max_batch=BATCH_MAX,
        stats=shared.counts[number],
    )
    assert bound == number
    return layer


def _thresholds(plan: Plan, bits: int, density: float, task: str) -> list[float]:
    """A threshold a layer, after refusing what the plan does not hold."""
    return [
        plan.threshold(i, bits=bits, density=density, task=task) for i in range(len(plan.layers))
    ]


def _layer_bytes(ffn: Ffn, bits: int) -> int:
    """Bytes that csfast keeps for one layer."""
    d, n_neurons = ffn.shape.d, ffn.shape.n_neurons
    down = n_neurons * d * ffn.down.weight.element_size()
    return planes.n_bytes(n_neurons, d, bits) + down + BATCH_MAX * 4 + 2 * 8


def _free_share(device: torch.device) -> int:
    """What may be allocated on a device if nobody says otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE)
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(int(available) * 1024 * _MEMORY_SHARE)


def _layer_of(module: nn.Module) -> _Layer | None:
    """What a patched module carries; nothing if it is not patched."""
    return module.__dict__.get("_csfast")


def _patched_modules(model: nn.Module, verb: str) -> list[nn.Module]:
    """The patched modules of a model, in order."""
    found = [m for m in model.modules() if _layer_of(m)]
    if not found:
        raise ValueError(f"[{verb}] a model without csfast: want one it is applied to.")
    return found


def _shared(model: nn.Module, verb: str) -> _Shared:
    shared: _Shared = _patched_modules(model, verb)[0].__dict__["_csfast"].shared
    return shared
