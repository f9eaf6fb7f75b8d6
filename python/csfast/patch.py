"""The first front door: patch a loaded model in place so that decoding runs sparsely.

In a patched layer one token a sequence goes through the kernels; anything longer, and whatever else
`bypass` gives a reason for, through the original module. The user's weights are read where they are
and never written; csfast owns the codes and one transposed copy of the down projection, for blocks
also a copy of gate and up in the order of the plan, and `remove` frees all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import bypass, models, ops
from .bypass import Bypassed
from .codes import planes
from .layer import Decision, Layer, Weights
from .models import PATCH, Ffn
from .plan import BLOCK_MAX, LayerPlan, Plan
from .session import Session, ffn_workspace
from .types import POOLED, TERNARY, Code
from .votes import BATCH_MAX, Votes

_MEMORY_SHARE = 0.8  # of the free memory: the cache of keys and values needs some too
_log = logging.getLogger("csfast")

Criterion = Callable[..., Tensor]  # what `generate` asks after every step


class ResourceLimitError(ValueError):
    """What `apply` would allocate is more than it may."""


@dataclasses.dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes:
        n_layers: Layers that were patched.
        n_bytes: Memory that csfast owns for them: codes, scales, transposed down projections,
            reordered copies of gate and up for blocks, the kernels' workspace.
        bits: Code of the sensor.
        block: Neurons that are kept or skipped together.
        joint: Whether the sequences of a batch share a support.
        density: Fraction of neurons that the thresholds were calibrated for.
        task: Whose thresholds.
        cap: Most of a layer's neurons that run, as a fraction; None without one.
    """

    n_layers: int
    n_bytes: int
    bits: Code
    block: int
    joint: bool
    density: float
    task: str
    cap: float | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the kernels did since `apply`, a number a layer each.

    Attributes:
        tokens: Tokens that ran through the kernels.
        neurons: Neurons executed for them, in all.
        fallbacks: Calls that the kernels failed and the original module answered.
        n_neurons: Neurons of the layer.
        dense: Calls that ran the original module, those of all layers together, by the reason:
            ``"prompt"``, ``"fallback"`` and so on; `docs/api.md` has them all.
    """

    tokens: tuple[int, ...]
    neurons: tuple[int, ...]
    fallbacks: tuple[int, ...]
    n_neurons: tuple[int, ...]
    dense: Mapping[str, int]

    @property
    def density(self) -> float:
        """Fraction of neurons executed over all tokens and layers; 1 if there were none."""
        possible = sum(t * n for t, n in zip(self.tokens, self.n_neurons, strict=True))
        return sum(self.neurons) / possible if possible else 1.0


class _Here(threading.local):
    """What holds for the calls of one thread."""

    def __init__(self) -> None:
        self.depth = 0  # nesting of `dense`
        self.why: str | None = None  # the present call of the model runs the original, if it does
        self.goes_on = False  # it has tokens in its cache already


class _Turns:
    """Lets the streams of a device use one workspace in turn.

    Asks nothing of the device as long as there is one stream. Calls that a graph captures are left
    alone: whoever replays it says after what.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None  # of the last call
        self._event: torch.cuda.Event | None = None  # behind the last call, of several streams

    def begin(self) -> None:
        """Let the current stream wait for the call before, if that was on another."""
        stream = torch.cuda.current_stream(self._device)
        if stream == self._last or torch.cuda.is_current_stream_capturing():
            return
        if self._event is not None:
            stream.wait_event(self._event)
        elif self._last is not None:
            # The other stream's call has no event behind it, and may be gone.
            torch.cuda.synchronize(self._device)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._last = stream

    def end(self) -> None:
        """Mark where the call ends, once there have been several streams."""
        if self._event is not None and not torch.cuda.is_current_stream_capturing():
            self._event.record(self._last)


@dataclasses.dataclass(eq=False)
class _Shared:
    """What the layers of one model have in common."""

    session: Session
    plan: Plan
    bits: Code
    block: int
    activation: str
    cap: float | None  # of a layer's blocks, the most that run
    threshold: Tensor  # (n_layers, BATCH_MAX), float32; joint: the first of a layer counts
    counts: Tensor  # (n_layers, 2), int64: tokens, neurons; written by the kernels
    votes: Votes | None  # of joint supports
    full: bool  # density 1: original modules
    # Held while thresholds, votes, counts or the workspace are in use, never while modules run.
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    here: _Here = dataclasses.field(default_factory=_Here)
    turns: _Turns | None = None  # of the streams of a CUDA device
    dense: dict[str, int] = dataclasses.field(default_factory=dict)  # calls by reason
    handles: tuple[RemovableHandle, ...] = ()  # of the hooks on the model
    modules: tuple[nn.Module, ...] = ()  # that were patched


class _Listener:
    """Hears of every call of a model what its layers cannot see: whose tokens they are given."""

    def __init__(self, model: nn.Module, shared: _Shared) -> None:
        self._shared = shared
        self._caches = {models.cache_argument(model), "past_key_values"}  # new name and old
        self.handles = (
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end),
        )

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        here = self._shared.here
        # It is said where sequences end only if they stand behind one another in a row.
        here.why = None if kwargs.get("cu_seq_lens_q") is None else bypass.CONTINUOUS
        here.goes_on = any(models.cached_tokens(kwargs.get(name)) for name in self._caches)

    def end(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._shared.here.why, self._shared.here.goes_on = None, False

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse_copy()


@dataclasses.dataclass(eq=False)
class _Layer:
    """What a patched module carries besides its own."""

    shared: _Shared
    number: int  # in the session
    bound: Layer  # gate and up are the model's; for blocks copies in their order
    bypassed: Bypassed
    dtype: torch.dtype
    device: torch.device
    fallbacks: int = 0


def needed_bytes(model: nn.Module, *, bits: Code = 2, block: int = 1) -> int:
    """Give the bytes that `apply` would allocate and keep.

    Args:
        model: As `models.find_ffns` wants it.
        bits: Code of the sensor.
        block: Neurons a block; above 1 csfast keeps a copy of gate and up as well.

    Raises:
        ValueError: There is no such sensor or block.
    """
    if bits not in planes.CODES:
        raise ValueError(f'[needed_bytes] bits = {bits!r}: want 1, 2, 3, 4 or "{TERNARY}".')
    if type(block) is not int or not 1 <= block <= BLOCK_MAX:
        raise ValueError(f"[needed_bytes] block = {block!r}: want 1 to {BLOCK_MAX}.")
    return _needed_bytes(models.find_ffns(model), bits, block)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    density: float = 0.5,
    bits: Code = 2,
    block: int = 1,
    joint: bool = False,
    task: str = POOLED,
    cap: float | None = None,
    limit_bytes: int | None = None,
) -> Applied:
    """Patch the feed-forward layers of a model in place, so that decoding runs sparsely.

    From then on a call with one token a sequence, for up to 16 sequences, runs through the kernels
    if the model is in evaluation mode, no gradient is asked for, and nothing that the kernels
    bypass is hooked, wrapped or recorded; every other call runs the original module, and `stats`
    counts it by the reason. The choice of neurons is each token's own, unless a joint one is asked
    for. Threads may share the model. `docs/api.md` has the details.

    Args:
        model: As `models.find_ffns` wants it; its weights are not changed.
        plan: Made by `calibrate` on this very model.
        density: Fraction of neurons to run, within the plan's densities; 1 runs the original
            modules, bit for bit.
        bits: Code of the sensor, one of the plan's.
        block: Neurons to keep or skip together, one of the plan's sizes. Above 1 csfast keeps a
            copy of gate and up in the plan's order.
        joint: Whether the sequences of a batch share one support, chosen by the mean of what they
            use; the plan must have been calibrated for it. `set_votes` says which of them count.
        task: Whose thresholds: one of the plan's tasks.
        cap: Most of a layer's neurons that one choice may run, a fraction in (0, 1], rounded to
            whole blocks, at least one; of a longer choice the largest usages run. None, and
            density 1: as many as reach the threshold.
        limit_bytes: Most that csfast may allocate; four fifths of the free memory if not given.
            The bytes are logged before they are allocated.

    Returns:
        What was done, and the bytes it took.

    Raises:
        ValueError: csfast is applied already, or the plan does not hold what was asked for.
        TypeError: An argument is of another type.
        ResourceLimitError: It would take more than ``limit_bytes``.
        PlanError: The plan belongs to another model.
        UnsupportedModelError: csfast does not run on the model, or on its present state.
        BackendError: There are no kernels for the model's device.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"[apply] plan of type {type(plan).__name__}: want a csfast.Plan.")
    if not isinstance(joint, bool):
        raise TypeError(f"[apply] joint = {joint!r}: want True or False.")
    if cap is not None and (type(cap) not in (int, float) or not 0 < cap <= 1):
        raise ValueError(f"[apply] cap = {cap!r}: want a fraction in (0, 1], or None.")
    if limit_bytes is not None and type(limit_bytes) is not int:
        raise TypeError(f"[apply] limit_bytes = {limit_bytes!r}: want a whole number.")
    ffns = models.find_ffns(model)
    if any(models.is_patched(ffn.module) for ffn in ffns):
        raise ValueError("[apply] csfast is applied to this model: call csfast.remove first.")
    plan.check(model)
    if joint and plan.batches == (1,):
        raise ValueError("[apply] joint = True: want a plan calibrated with joint = True.")
    table = _thresholds(plan, bits=bits, block=block, joint=joint, density=density, task=task)
    n_bytes = _needed_bytes(ffns, bits, block)
    n_bytes += 0 if cap is None else len(ffns) * BATCH_MAX * 4
    device = ffns[0].gate.weight.device
    limit = _free_share(device) if limit_bytes is None else limit_bytes
    _log.info(
        "[apply] %d layers take %d bytes beside the model (limit %d)", len(ffns), n_bytes, limit
    )
    if n_bytes > limit:
        raise ResourceLimitError(
            f"[apply] {n_bytes} bytes for codes, copies of weights and workspace: want at most "
            f"{limit}; raise limit_bytes, or free memory."
        )
    with torch.inference_mode(False):  # or these could not be written to in any other mode
        shared = _Shared(
            session=Session(device),
            plan=plan,
            bits=bits,
            block=block,
            activation=ffns[0].activation,
            cap=cap,
            threshold=torch.empty(len(ffns), BATCH_MAX, dtype=torch.float32, device=device),
            counts=torch.zeros(len(ffns), 2, dtype=torch.int64, device=device),
            votes=Votes.none(len(ffns), device) if joint else None,
            full=density == 1,
            turns=_Turns(device) if device.type == "cuda" else None,
        )
    _write_thresholds(shared, table)
    layers = [_bind(shared, i, ffn, plan.layers[i]) for i, ffn in enumerate(ffns)]
    patched = {original: _patched(original) for original in {type(f.module) for f in ffns}}
    # Nothing above touched the model; nothing below can fail.
    shared.handles = _Listener(model, shared).handles
    shared.modules = tuple(ffn.module for ffn in ffns)
    for ffn, layer in zip(ffns, layers, strict=True):
        ffn.module.__dict__[PATCH] = layer
        ffn.module.__class__ = patched[type(ffn.module)]
    return Applied(len(ffns), n_bytes, bits, block, joint, density, task, cap)


def remove(model: nn.Module) -> None:
    """Undo `apply`: the modules are what they were, and what csfast owned is freed.

    All layers that `apply` patched are undone together, whichever of them the model still has.

    Raises:
        ValueError: csfast is not applied to the model.
    """
    given = [module.__dict__[PATCH].shared for module in _patched_modules(model, "remove")]
    for shared in {id(shared): shared for shared in given}.values():
        _undo(shared)


def _undo(shared: _Shared) -> None:
    """Give all modules back what they were."""
    for handle in shared.handles:
        handle.remove()
    for module in shared.modules:
        layer: _Layer = module.__dict__[PATCH]
        # Who wrapped the layer and unwrapped it again has left the forward that he found.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
        module.__class__ = layer.bypassed.kind
        del module.__dict__[PATCH]


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run the original modules while the block lasts; blocks may be nested.

    The block holds for the thread that opens it: what other threads generate meanwhile runs sparse
    as before, threads that are started within it included.

    Raises:
        ValueError: csfast is not applied to the model.
    """
    here = _shared(model, "dense").here
    here.depth += 1
    try:
        yield
    finally:
        here.depth -= 1


def set_density(model: nn.Module, density: float, task: str = POOLED) -> None:
    """Change density and task of a patched model; nothing is allocated on its device.

    Raises:
        ValueError: csfast is not applied, or the plan does not hold what was asked for.
    """
    shared = _shared(model, "set_density")
    table = _thresholds(
        shared.plan,
        bits=shared.bits,
        block=shared.block,
        joint=shared.votes is not None,
        density=density,
        task=task,
    )
    with shared.lock:
        _write_thresholds(shared, table)
        shared.full = density == 1


def set_votes(model: nn.Module, votes: Sequence[bool] | Tensor | None) -> None:
    """Say which sequences of a batch have a vote in joint supports.

    What is padded or finished runs with what the others chose. Without votes every sequence has
    one. Nothing is allocated, and a tensor on the model's device is not waited for.

    Args:
        model: Patched with ``joint = True``.
        votes: One for every sequence of the batches to come, ``(n,)``, bool, at most 16; None
            gives every sequence a vote again, whatever the batch. If none is true, no neuron runs.

    Raises:
        ValueError: csfast is not applied with joint supports, or the votes are too many, too few,
            or on another device.
        TypeError: The votes are not booleans.
    """
    shared = _shared(model, "set_votes")
    of = shared.votes
    if of is None:
        raise ValueError("[set_votes] a model with joint = False: want apply(..., joint=True).")
    with shared.lock:
        of.give(votes, shared.threshold)


@contextlib.contextmanager
def unfinished_votes(
    model: nn.Module, eos_token_id: int | Sequence[int] | None = None
) -> Iterator[Criterion]:
    """Let the sequences of one call of `generate` vote until they have ended.

    A layer cannot tell a sequence that has ended from one that goes on: it is given padding and
    runs on. `generate` shows its stopping criteria the tokens after every step, so this gives one,
    which stops nothing: ``model.generate(..., stopping_criteria=[criterion])``. When the block ends
    every sequence has a vote again.

    Args:
        model: Patched with ``joint = True``.
        eos_token_id: What ends a sequence; that of the model's generation settings if not given.

    Yields:
        The criterion, for one call of `generate`.

    Raises:
        ValueError: csfast is not applied with joint supports, or nothing ends a sequence.
    """
    set_votes(model, None)
    if eos_token_id is None:
        eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos_token_id is None:
        raise ValueError("[unfinished_votes] a model without eos_token_id: want one given.")
    ends = torch.tensor(eos_token_id, device="cpu").flatten()
    ended: list[Tensor] = []

    def criterion(ids: Tensor, scores: object, **_: object) -> Tensor:
        now = torch.isin(ids[:, -1], ends.to(ids.device))
        ended[:] = [now | ended[0] if ended else now]
        if len(ids) <= BATCH_MAX:
            set_votes(model, ~ended[0])
        return torch.zeros_like(now)

    try:
        yield criterion
    finally:
        set_votes(model, None)


def stats(model: nn.Module) -> Stats:
    """Read what the kernels counted since `apply`; waits for the device.

    Raises:
        ValueError: csfast is not applied to the model.
    """
    layers = [m.__dict__[PATCH] for m in _patched_modules(model, "stats")]
    shared = layers[0].shared
    with shared.lock:
        counts, dense_calls = shared.counts.tolist(), dict(shared.dense)
    return Stats(
        tokens=tuple(c[0] for c in counts),
        neurons=tuple(c[1] for c in counts),
        fallbacks=tuple(layer.fallbacks for layer in layers),
        n_neurons=tuple(len(layer.bound.sensor.row_scale) for layer in layers),
        dense=dense_calls,
    )


def _patched(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a patched layer: the original, but for `forward`."""

    class Patched(original):  # type: ignore[valid-type, misc]
        dense_forward = original.forward

        @functools.wraps(original.forward)  # for those who look at its parameters
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            layer: _Layer | None = self.__dict__.get(PATCH)
            if layer is not None:
                is_traced = torch.compiler.is_compiling()
                why = _why_dense(self, layer, args, kwargs, is_traced)
                if why is None:
                    return _run_traced(layer, args[0]) if is_traced else _run(self, layer, args[0])
                if not is_traced:
                    if why is bypass.STALE:
                        layer.bypassed.refuse(layer.number, self)
                    _count(layer.shared, why)
            # Without a layer it is a bound method that somebody kept, and csfast was removed.
            out: Tensor = original.forward(self, *args, **kwargs)
            return out

        def __reduce_ex__(self, protocol: object) -> NoReturn:
            _refuse_copy()

    Patched.__name__ = Patched.__qualname__ = f"Csfast{original.__name__}"
    Patched.__module__ = original.__module__
    return Patched


def _why_dense(
    module: nn.Module,
    layer: _Layer,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    is_traced: bool,
) -> str | None:
    """The reason for which a call runs the original module, if it does."""
    shared, here = layer.shared, layer.shared.here
    if not is_traced and torch._C._is_tracing():  # which would record the questions below
        return bypass.TRACING
    if here.depth:
        return bypass.ASKED
    if shared.full:
        return bypass.FULL
    if module.training:
        return bypass.TRAINING
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return bypass.LAYOUT
    x = args[0]
    if torch.is_grad_enabled() and layer.bypassed.wants_gradients(x):
        return bypass.GRADIENTS
    if here.why is not None:
        return here.why
    shape = x.shape
    if len(shape) != 3 or not shape[0] or not shape[1]:
        return bypass.LAYOUT
    if shape[1] != 1:
        return bypass.SEVERAL if here.goes_on else bypass.PROMPT
    if shape[0] > BATCH_MAX:
        return bypass.BATCH
    if not x.is_contiguous():
        return bypass.LAYOUT
    why = layer.bypassed.changed(module, is_traced=is_traced)
    if why is not None or is_traced:  # modes and transforms are the affair of torch.compile
        return why
    return layer.bypassed.recorded(x)


def _count(shared: _Shared, why: str, detail: object = None) -> None:
    """Count a call that runs the original, and log the first for each reason."""
    with shared.lock:
        n = shared.dense[why] = shared.dense.get(why, 0) + 1
    if n == 1:
        level, text = bypass.TOLD[why]
        _log.log(level, "[ffn] %s%s", text, "." if detail is None else f": {detail}")


def _refuse_copy() -> NoReturn:
    raise TypeError(
        "[apply] a copy or pickle of a patched model: its layers read the original's weights by "
        "address; call csfast.remove first."
    )


def _run(module: Any, layer: _Layer, x: Tensor) -> Tensor:
    """One token a sequence through the kernels."""
    shared = layer.shared
    out = torch.empty_like(x)
    rows = x.view(-1, x.shape[2]), out.view(-1, x.shape[2])
    try:
        with shared.lock:
            if shared.turns is not None:
                shared.turns.begin()
            if shared.votes is not None:
                shared.votes.expect(x.shape[0], shared.threshold)
            shared.session.ffn(layer.number, *rows)
            if shared.turns is not None:
                shared.turns.end()
    except (TypeError, ValueError):
        if x.dtype == layer.dtype and x.device == layer.device:
            raise
        raise bypass.StaleWeightsError(
            f"[ffn] layer {layer.number}: x is {x.dtype} on {x.device}: want {layer.dtype} on "
            f"{layer.device}, as at apply; call csfast.remove, and apply again."
        ) from None
    except RuntimeError as error:  # a BackendError, or what torch makes of a failing device
        # The decision guard: a token is answered densely rather than not at all.
        layer.fallbacks += 1
        _count(shared, bypass.FALLBACK, error)
        answer: Tensor = module.dense_forward(x)
        return answer
    return out


def _run_traced(layer: _Layer, x: Tensor) -> Tensor:
    """The same through the registered operator, which torch.compile can see."""
    shared, batch = layer.shared, x.shape[0]
    bound, threshold, votes = layer.bound, shared.threshold[layer.number, :batch], None
    if shared.votes is not None:
        if shared.votes.are_given:
            shared.votes.check_rows(batch)
            threshold, votes = threshold[:1], shared.votes.weight[:batch]
        else:
            threshold = shared.votes.table[batch, layer.number : layer.number + 1]
            votes = torch.full((batch,), 1 / batch, dtype=torch.float32, device=x.device)
    cap = None if bound.decision.cap is None else bound.decision.cap[: len(threshold)]
    decision = Decision(threshold, bound.decision.tile_rows, votes, cap)
    now = Layer(bound.sensor, bound.weights, decision, bound.activation)
    return ops.ffn(now, x[:, 0])[:, None]


def _bind(shared: _Shared, number: int, ffn: Ffn, layer_plan: LayerPlan) -> _Layer:
    """Make what csfast owns of one layer, and bind it to the session."""
    gate, up, down = (w.detach() for w in ffn.weights)
    device = gate.device
    biases = [None if p.bias is None else p.bias.detach() for p in (ffn.gate, ffn.up, ffn.down)]
    down_t = down.T
    if shared.block > 1:
        order = layer_plan.order[shared.block].to(device)
        gate, up, down_t = (t[order] for t in (gate, up, down_t))
        biases[:2] = [None if b is None else b[order] for b in biases[:2]]
    cap = None
    if shared.cap is not None:
        most = max(1, round(shared.cap * -(-ffn.shape.n_neurons // shared.block)))
        cap = torch.full((BATCH_MAX,), most, dtype=torch.int32, device=device)
    bound = Layer(
        layer_plan.sensor(bits=shared.bits, block=shared.block, offset=ffn.offset(), device=device),
        Weights(gate, up, down_t.contiguous(), *biases),
        Decision(
            shared.threshold[number],
            tile_rows=shared.block,
            votes=None if shared.votes is None else shared.votes.weight,
            cap=cap,
        ),
        shared.activation,
    )
    layer = _Layer(
        shared=shared,
        number=number,
        bound=bound,
        bypassed=Bypassed.of(ffn),
        dtype=gate.dtype,
        device=device,
    )
    found = shared.session.bind(bound, max_batch=BATCH_MAX, stats=shared.counts[number])
    assert found == number
    return layer


def _thresholds(
    plan: Plan, *, bits: Code, block: int, joint: bool, density: float, task: str
) -> Tensor:
    """Thresholds by the number of votes, ``(1 + BATCH_MAX or 1, n_layers)``, on the CPU.

    Refuses what the plan does not hold. Without votes nothing is kept, whatever the threshold.
    """
    sizes = (1, *range(1, BATCH_MAX + 1)) if joint else (1,)
    rows = [
        [
            plan.threshold(i, bits=bits, block=block, batch=n, density=density, task=task)
            for i in range(len(plan.layers))
        ]
        for n in sizes
    ]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _write_thresholds(shared: _Shared, table: Tensor) -> None:
    """Put the thresholds where the kernels read them."""
    votes = shared.votes
    if votes is None:
        shared.threshold.copy_(table[0, :, None])
        return
    votes.table.copy_(table)
    torch.index_select(votes.table, 0, votes.index, out=votes.row)
    shared.threshold.copy_(votes.row[0, :, None])


def _needed_bytes(ffns: Sequence[Ffn], bits: Code, block: int) -> int:
    """Bytes that csfast keeps for some layers, without votes and caps, a kilobyte or two."""
    workspaces = {
        ffn_workspace(BATCH_MAX, f.shape.d, f.shape.n_neurons, f.gate.weight.device) for f in ffns
    }
    return sum(_layer_bytes(ffn, bits, block) for ffn in ffns) + sum(workspaces)


def _layer_bytes(ffn: Ffn, bits: Code, block: int) -> int:
    """Bytes that csfast keeps for one layer."""
    d, n_neurons = ffn.shape.d, ffn.shape.n_neurons
    n_biases = sum(bias is not None for bias in (ffn.gate.bias, ffn.up.bias))
    size = ffn.down.weight.element_size()
    copies = n_neurons * d * size  # of down
    if block > 1:
        copies += n_neurons * (2 * d + n_biases) * size
    if n_biases:
        copies += n_neurons * 2 * 4
    return planes.n_bytes(n_neurons, d, bits) + copies + BATCH_MAX * 4 + 2 * 8


def _free_share(device: torch.device) -> int:
    """What may be allocated on a device if nobody says otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE)
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(int(available) * 1024 * _MEMORY_SHARE)


def _layer_of(module: nn.Module) -> _Layer | None:
    """What a patched module carries; nothing if it is not patched."""
    return module.__dict__.get(PATCH)


def _patched_modules(model: nn.Module, verb: str) -> list[nn.Module]:
    """The patched modules of a model, in order."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{verb}] model of type {type(model).__name__}: want an nn.Module.")
    found = [m for m in model.modules() if _layer_of(m)]
    if not found:
        raise ValueError(f"[{verb}] a model without csfast: want one it is applied to.")
    return found


def _shared(model: nn.Module, verb: str) -> _Shared:
    shared: _Shared = _patched_modules(model, verb)[0].__dict__[PATCH].shared
    return shared
