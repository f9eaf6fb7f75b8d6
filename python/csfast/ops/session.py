"""The layers of a model bound once, for decoding."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .. import _native
from ..types import Code
from . import check
from .register import stream
from .table import OPS

# The tensors of a layer as `ops.ffn` has them, but for what each call brings.
_BOUND = [
    arg
    for op in OPS
    for arg in op.tensors
    if op.name == "ffn" and arg.name not in ("x", "cap", "dropped")
]


class Session:
    """The layers of a model, bound once, so that a token costs one call of plain addresses.

    Keeps what is bound alive, and one workspace for each size of layer. Calls of one session must
    not overlap: they share that workspace.
    """

    def __init__(self, device: torch.device) -> None:
        """Open a session for tensors on `device`, the CPU or one CUDA device.

        Raises:
            ValueError: The device is of another kind.
        """
        self._device = torch.device(device)
        if self._device.type not in ("cpu", "cuda"):
            raise ValueError(f"[session] device = {device}: want cpu or cuda.")
        self._cuda = self._device.type == "cuda"
        self._native = _native.Session(self._cuda)
        self._bound: list[tuple[Tensor | None, ...]] = []
        self._rows: list[tuple[torch.dtype, int]] = []  # of each layer: T and d
        self._workspaces: dict[int, Tensor] = {}
        self._place: torch.device | None = None  # of what is bound
        # Made once: a step of decoding enters it for every layer.
        self._current: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def bind(
        self,
        *,
        codes: Tensor,
        equal: Tensor,
        row_scale: Tensor,
        threshold: Tensor,
        gate: Tensor,
        up: Tensor,
        down_t: Tensor,
        bits: Code,
        max_batch: int,
        tile_rows: int = 1,
        offset: Tensor | None = None,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        weight: Tensor | None = None,
        activation: str = "silu",
        stats: Tensor | None = None,
    ) -> int:
        """Check the tensors of one layer and take them over.

        Args:
            codes: Packed codes, ``(n_neurons, 2, groups, group_bytes)``, uint8.
            equal: Channel equaliser, ``(d,)``, float32.
            row_scale: Scales of the rows' codes, ``(n_neurons, 2)``, float32.
            threshold: Usage from which a tile is kept, ``(max_batch,)``, float32; with `weight`
                the first entry is that of the joint decision. Read at every call, so writing to it
                changes what later calls keep.
            gate: Gate projection, ``(n_neurons, d)``, T.
            up: Up projection, ``(n_neurons, d)``, T.
            down_t: Transposed down projection, ``(n_neurons, d)``, T.
            bits: Code of a weight: 1 to 4 bits, or ``"ternary"``.
            max_batch: The most rows that a call may bring.
            tile_rows: Neurons a tile, at least 1.
            offset: The biases as `recover` takes them, ``(n_neurons, 2)``, float32.
            gate_bias: Bias of the gate projection, ``(n_neurons,)``, T.
            up_bias: Bias of the up projection, ``(n_neurons,)``, T.
            down_bias: Bias of the down projection, ``(d,)``, T.
            weight: What each row counts in a joint decision, ``(max_batch,)``, float32, see
                `recover`; read at every call, as far as its batch goes. Without it every row has a
                support of its own.
            activation: What the gate goes through, ``silu`` or ``gelu_tanh``.
            stats: Counters to add to, ``(2,)``, int64: rows of the batch, and neurons executed in
                all of them.

        Returns:
            The number of the layer.

        Raises:
            ValueError: The shapes do not fit together, a tensor is on another device, or the
                activation is unknown.
            TypeError: A tensor has another dtype or is not contiguous.
            BackendError: The device has no csfast backend.
        """
        given: tuple[Tensor | None, ...] = (codes, equal, row_scale, threshold, gate, up, down_t)
        given += (offset, gate_bias, up_bias, down_bias, weight, stats)
        check.tensors("session", enumerate(_BOUND), given)
        code = check.code("session", "bits", bits)
        check.integers("session", tile_rows=tile_rows, max_batch=max_batch)
        check.activation("session", "activation", activation)
        if gate.device.type != self._device.type or self._place not in (None, gate.device):
            raise ValueError(
                f"[session] gate is on {gate.device}: want {self._place or self._device}."
            )
        if gate.dim() != 2 or threshold.shape != (max_batch,):
            raise ValueError(
                f"[session] gate {tuple(gate.shape)}, threshold {tuple(threshold.shape)}: want "
                f"(n_neurons, d) and (max_batch = {max_batch},)."
            )
        check.total("session", max_batch, gate.shape[0])
        n_bytes = ffn_workspace(max_batch, gate.shape[1], gate.shape[0], gate.device)
        workspace = self._workspaces.get(n_bytes)
        if workspace is None:
            workspace = torch.empty(n_bytes, dtype=torch.uint8, device=gate.device)
        layer = self._native.bind(
            codes.detach(),
            equal.detach(),
            row_scale.detach(),
            threshold.detach(),
            gate.detach(),
            up.detach(),
            down_t.detach(),
            code,
            tile_rows,
            _plain(offset),
            _plain(gate_bias),
            _plain(up_bias),
            _plain(down_bias),
            _plain(weight),
            activation,
            stats,
            workspace,
            self._cuda,
        )
        self._workspaces[n_bytes] = workspace
        self._place = gate.device
        if self._cuda:
            self._current = torch.cuda.device(gate.device)
        layer_tensors = (codes, equal, row_scale, threshold, gate, up, down_t, stats)
        self._bound.append((*layer_tensors, offset, gate_bias, up_bias, down_bias, weight))
        self._rows.append((gate.dtype, gate.shape[1]))
        return layer

    def ffn(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Run one bound layer: x ``(batch, d)`` to out ``(batch, d)``, both T and contiguous.

        Raises:
            ValueError: No such layer, another shape or device, or more rows than it was bound for.
            TypeError: Another dtype, or not contiguous.
            BackendError: The device failed.
        """
        if not 0 <= layer < len(self._rows):
            raise ValueError(f"[session] layer = {layer}: want one of {len(self._rows)} bound.")
        dtype, d = self._rows[layer]
        batch = x.shape[0]
        if x.shape != (batch, d) or out.shape != x.shape:
            raise ValueError(
                f"[session] x {tuple(x.shape)}, out {tuple(out.shape)}: want (batch, d = {d})."
            )
        if x.dtype is not dtype or out.dtype is not dtype:
            raise TypeError(f"[session] x {x.dtype}, out {out.dtype}: want {dtype}.")
        if not (x.is_contiguous() and out.is_contiguous()):
            raise TypeError("[session] x or out has other strides: want contiguous tensors.")
        if x.device != self._place or out.device != x.device:
            raise ValueError(f"[session] x on {x.device}, out on {out.device}: want {self._place}.")
        if not self._cuda:
            self._native.ffn(layer, x.data_ptr(), out.data_ptr(), batch, 0)
            return
        with self._current:
            self._native.ffn(layer, x.data_ptr(), out.data_ptr(), batch, stream(x))


def ffn_workspace(max_batch: int, d: int, n_neurons: int, device: torch.device) -> int:
    """Give the bytes of workspace that a `Session` keeps for layers of one size.

    Raises:
        ValueError: The device is neither the CPU nor CUDA, or a size is out of range.
        BackendError: There are no kernels for the device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"[session] device = {device}: want cpu or cuda.")
    return _native.ffn_workspace(max_batch, d, n_neurons, device.type == "cuda")


def _plain(tensor: Tensor | None) -> Tensor | None:
    """Without autograd, which refuses to show its tensors to other libraries."""
    return None if tensor is None else tensor.detach()
