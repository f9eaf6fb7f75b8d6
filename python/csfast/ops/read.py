"""Reading and nothing else: what the benchmarks measure the operations by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native

MOST_BUFFERS = 240  # of one reader: CUDA takes them as an argument of its kernel


class Reader:
    """Reads all bytes of some tensors once, whenever it is called.

    Nothing reads memory faster, so what an operation reads of the same tensors takes no smaller
    share of the time than of the bytes. A call can be captured in a CUDA graph; it goes to the
    stream that is current then.

    Attributes:
        n_bytes: What a call reads.
        sums: Written by every call, int32: parts whose sum modulo 2^32 is that of all 32-bit words.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        """Take the addresses of the tensors, which are kept alive.

        Args:
            buffers: 1 to `MOST_BUFFERS` contiguous tensors of one device, each at a multiple of 16
                bytes and of a multiple of 16 bytes.

        Raises:
            ValueError: There is no tensor, or one is elsewhere or not contiguous; a call does so
                if there are too many, or one is not of whole 16 bytes.
            BackendError: The device has no csfast backend.
        """
        if not buffers:
            raise ValueError(f"[read] 0 buffers: want 1 to {MOST_BUFFERS}.")
        device = buffers[0].device
        for number, buffer in enumerate(buffers):
            if buffer.device != device:
                raise ValueError(f"[read] buffer {number} on {buffer.device}: want it on {device}.")
            if not buffer.is_contiguous():
                raise ValueError(
                    f"[read] buffer {number} of strides {buffer.stride()}: want it contiguous."
                )
        self._device = device
        self._buffers = tuple(buffers)
        self._address = [buffer.data_ptr() for buffer in buffers]
        self._bytes = [buffer.numel() * buffer.element_size() for buffer in buffers]
        self.n_bytes = sum(self._bytes)
        if device.type == "cuda":
            with torch.cuda.device(device):
                n_sums = _native.read_sums(True)
        else:
            n_sums = _native.read_sums(False)
        self.sums = torch.empty(n_sums, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Read everything; asynchronous on CUDA."""
        if self._device.type != "cuda":
            _native.read(self._address, self._bytes, self.sums, 0)
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device).cuda_stream
            _native.read(self._address, self._bytes, self.sums, stream)
