"""The container of plans and resume files: safetensors in one canonical form, verified when read.

A file is the canonical form of its content, so equal contents are equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .files import FILE_BYTES_MAX
from .types import PlanError

HEADER_BYTES_MAX = 4 << 20  # a plan of 200 layers has 60 KB
TENSORS_MAX = 65_536
_DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def laid_out(tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> Iterator[memoryview]:
    """Lay tensors and text fields out as one safetensors file, always in the same way.

    Args:
        tensors: Contiguous, on the CPU, of a dtype of `_DTYPES`.
        fields: Names and values of the metadata.

    Yields:
        The parts of the file: its header, then the memory of the tensors, which is not copied.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    table: dict[str, Any] = {}
    metadata = dict(fields)
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        table[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        metadata[f"sha256.{name}"] = _sha256(tensor)
        offset += tensor.nbytes
    metadata["header_sha256"] = _header_hash(table, metadata)
    header = canonical({**table, "__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)
    yield memoryview(struct.pack("<Q", len(header)) + header)
    for name in sorted(tensors):
        yield _memory(tensors[name])


def pack(tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> bytes:
    """Give the file of `laid_out` in one piece."""
    return b"".join(laid_out(tensors, fields))


def unpack(raw: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take apart what `pack` made, after verifying every byte of it.

    Raises:
        PlanError: The bytes are not exactly what `pack` writes.
    """
    header, start = _header(raw)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise PlanError("[plan] header: want metadata of strings.")
    if metadata.pop("header_sha256", None) != _header_hash(header, metadata):
        raise PlanError("[plan] header: want one that fits its SHA-256; the file is damaged.")
    if len(header) > TENSORS_MAX:
        raise PlanError(f"[plan] {len(header)} tensors: want at most {TENSORS_MAX}.")
    tensors = {}
    end = start
    for name in sorted(header):
        tensors[name], end = _tensor(raw, name, header[name], start, end)
        if metadata.pop(f"sha256.{name}", None) != _sha256(tensors[name]):
            raise PlanError(f"[plan] tensor {name!r}: want data that fit their SHA-256.")
    if end != len(raw):
        raise PlanError(f"[plan] file of {len(raw)} bytes: want {end}, as its header says.")
    return tensors, metadata


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its data begin."""
    if len(raw) < 8:
        raise PlanError(f"[plan] file of {len(raw)} bytes: want a header.")
    (n,) = struct.unpack_from("<Q", raw)
    if not 2 <= n <= min(HEADER_BYTES_MAX, len(raw) - 8):
        raise PlanError(
            f"[plan] header of {n} bytes in a file of {len(raw)}: want it whole, "
            f"at most {HEADER_BYTES_MAX} bytes."
        )
    text = raw[8 : 8 + n]
    try:
        header = json.loads(text)
        text_of = canonical(header).encode()
    except (ValueError, RecursionError) as error:
        raise PlanError(f"[plan] header: want JSON ({error}).") from error
    if not isinstance(header, dict) or text_of + b" " * (-len(text_of) % 8) != text:
        raise PlanError("[plan] header: want a JSON object in its canonical form.")
    return header, 8 + n


def _tensor(raw: bytes, name: str, entry: Any, start: int, begin: int) -> tuple[Tensor, int]:
    """One tensor that begins where the last one ended, and where it ends."""
    where = f"[plan] tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise PlanError(f"{where}: want dtype, shape and data_offsets.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all_sizes(shape) or not all_sizes(offsets) or len(shape) > 4 or len(offsets) != 2:
        raise PlanError(f"{where}: want at most four sizes and two offsets.")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise PlanError(f"{where}: dtype = {entry['dtype']!r}: want one of {', '.join(_DTYPES)}.")
    n = math.prod(shape)
    end = begin + n * dtype.itemsize
    if [begin - start, end - start] != offsets or end > len(raw):
        raise PlanError(f"{where}: want {n} elements at byte {begin} of {len(raw)}, no gaps.")
    if n == 0:
        return torch.empty(shape, dtype=dtype), end
    memory = bytearray(memoryview(raw)[begin:end])
    return torch.frombuffer(memory, dtype=dtype).view(shape), end


def all_sizes(value: Any) -> bool:
    """Whether a value read from a header is a list of sizes or offsets."""
    return isinstance(value, list) and all(
        type(v) is int and 0 <= v <= FILE_BYTES_MAX for v in value
    )


def sha256_of(raw: bytes) -> str:
    """Give the SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(raw).hexdigest()


def canonical(value: Any) -> str:
    """Give the one JSON text that a value has in these files."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _header_hash(table: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical([table, metadata]).encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_memory(tensor)).hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor where they are."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data
