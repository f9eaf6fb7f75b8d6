"""The layers of a model bound once, for decoding."""

from __future__ import annotations

import contextlib
from typing import NoReturn

import torch
from torch import Tensor

from .layer import Layer
from .ops import check, native, stream
from .ops.table import OPS

# The tensors of a bound layer, by their places in the row of `ops.ffn`: all but what calls bring.
_ROW = next(op for op in OPS if op.name == "ffn").args
_NAMES = [arg.name for arg in _ROW]
_BOUND = [(i, arg) for i, arg in enumerate(_ROW) if arg.shape and arg.name not in ("x", "dropped")]


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
        self._native = native.Session(self._cuda)
        self._bound: list[tuple[Layer, Tensor | None]] = []
        # Of each layer: T, d, and where it is as `Tensor.get_device` says it.
        self._rows: list[tuple[torch.dtype, int, int]] = []
        self._workspaces: dict[int, Tensor] = {}
        self._place: torch.device | None = None  # of what is bound
        # Made once; entered where another device is current.
        self._current: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def bind(self, layer: Layer, *, max_batch: int, stats: Tensor | None = None) -> int:
        """Check the tensors of one layer and take them over.

        What a layer has for every list or row is for `max_batch` of them here: its threshold and
        cap, of which with votes the first is that of the joint decision, and its votes, as far as a
        call's batch goes. They are read at every call, so writing to them changes what later calls
        keep.

        Args:
            layer: The layer.
            max_batch: The most rows that a call may bring.
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
        sensor, weights, decision = layer.sensor, layer.weights, layer.decision
        parts = {**vars(sensor), **vars(weights), **vars(decision), "stats": stats}
        check.tensors("session", _BOUND, [parts.get(name) for name in _NAMES])
        code = check.code("session", "bits", sensor.bits)
        check.integers("session", tile_rows=decision.tile_rows, max_batch=max_batch)
        check.activation("session", "activation", layer.activation)
        gate, threshold = weights.gate, decision.threshold
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
        number = self._native.bind(layer.detached(), code, stats, workspace, self._cuda)
        self._workspaces[n_bytes] = workspace
        self._place = gate.device
        if self._cuda:
            self._current = torch.cuda.device(gate.device)
        self._bound.append((layer, stats))
        self._rows.append((gate.dtype, gate.shape[1], gate.get_device()))
        return number

    def ffn(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Run one bound layer: x ``(batch, d)`` to out ``(batch, d)``, both T and contiguous.

        Raises:
            ValueError: No such layer, another shape or device, or more rows than it was bound for.
            TypeError: Another dtype, or not contiguous.
            BackendError: The device failed.
        """
        if not 0 <= layer < len(self._rows):
            raise ValueError(f"[session] layer = {layer}: want one of {len(self._rows)} bound.")
        dtype, d, place = self._rows[layer]
        # Whatever is asked here is asked for every layer of every token.
        fits = (
            x.dtype is dtype
            and out.dtype is dtype
            and x.dim() == 2
            and x.size(1) == d
            and out.shape == x.shape
            and x.is_contiguous()
            and out.is_contiguous()
            and (
                x.is_cuda and out.is_cuda and x.get_device() == out.get_device() == place
                if self._cuda
                else x.is_cpu and out.is_cpu
            )
        )
        if not fits:
            self._refuse(layer, x, out)
        if not self._cuda:
            self._native.ffn(layer, x.data_ptr(), out.data_ptr(), x.size(0), 0)
        elif torch.cuda.current_device() == place:
            self._native.ffn(layer, x.data_ptr(), out.data_ptr(), x.size(0), stream(x))
        else:
            with self._current:
                self._native.ffn(layer, x.data_ptr(), out.data_ptr(), x.size(0), stream(x))

    def _refuse(self, layer: int, x: Tensor, out: Tensor) -> NoReturn:
        """Say what of a call does not fit the layer."""
        dtype, d, _ = self._rows[layer]
        if x.dim() != 2 or x.size(1) != d or out.shape != x.shape:
            raise ValueError(
                f"[session] x {tuple(x.shape)}, out {tuple(out.shape)}: want (batch, d = {d})."
            )
        if x.dtype is not dtype or out.dtype is not dtype:
            raise TypeError(f"[session] x {x.dtype}, out {out.dtype}: want {dtype}.")
        if not (x.is_contiguous() and out.is_contiguous()):
            raise TypeError("[session] x or out has other strides: want contiguous tensors.")
        raise ValueError(f"[session] x on {x.device}, out on {out.device}: want {self._place}.")


def ffn_workspace(max_batch: int, d: int, n_neurons: int, device: torch.device) -> int:
    """Give the bytes of workspace that a `Session` keeps for layers of one size.

    Raises:
        ValueError: The device is neither the CPU nor CUDA, or a size is out of range.
        BackendError: There are no kernels for the device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"[session] device = {device}: want cpu or cuda.")
    return native.ffn_workspace(max_batch, d, n_neurons, device.type == "cuda")
