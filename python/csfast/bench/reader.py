"""Reading and nothing else: what the benchmarks measure the operations by."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import native

MOST_BUFFERS = 240  # of one reader: CUDA takes them as an argument of its kernel


class Reader:
    """Reads all bytes of 1 to `MOST_BUFFERS` tensors whenever it is called, and keeps them alive.

    A call goes to the current stream, and a CUDA graph can hold it.

    Attributes:
        n_bytes: What a call reads.
        sums: Written by a call, int32: parts whose sum modulo 2^32 is that of all 32-bit words.

    Raises:
        ValueError: A tensor is elsewhere than the first or not contiguous; a call does so if they
            are too many, or one does not consist of whole 16 bytes.
        BackendError: The device has no csfast backend.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        """Take the addresses of the tensors."""
        devices = {str(buffer.device) for buffer in buffers}
        if len(devices) != 1 or not all(buffer.is_contiguous() for buffer in buffers):
            strides = sorted({buffer.stride() for buffer in buffers if not buffer.is_contiguous()})
            raise ValueError(
                f"[read] {len(buffers)} buffers on {sorted(devices)}, of strides {strides} where "
                "not contiguous: want 1 to 240 contiguous ones on one device."
            )
        self._buffers = tuple(buffers)
        self._address = [buffer.data_ptr() for buffer in buffers]
        self._bytes = [buffer.numel() * buffer.element_size() for buffer in buffers]
        self.n_bytes = sum(self._bytes)
        device = buffers[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            n_sums = native.read_sums(device.type == "cuda")
        self.sums = torch.empty(n_sums, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Read everything; asynchronous on CUDA."""
        device = self.sums.device
        if device.type != "cuda":
            native.read(self._address, self._bytes, self.sums, 0)
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            native.read(self._address, self._bytes, self.sums, stream)
