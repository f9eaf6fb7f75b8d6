"""Files that are read whole or not at all, and written in one step."""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Iterable

from .types import PlanError

FILE_BYTES_MAX = 1 << 36  # 80 layers of 28,672 neurons at d = 8192, 2 and 3 bits: 22 GiB


def read_bounded(path: pathlib.Path) -> bytes:
    """Read a regular file of acceptable size into memory.

    Raises:
        FileNotFoundError: There is no such file.
        PlanError: It is no regular file, too large, or changed while it was read.
    """
    if path.exists() and not path.is_file():
        raise PlanError(f"[plan] {str(path)!r}: want a regular file.")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > FILE_BYTES_MAX:
            raise PlanError(f"[plan] {path.name} of {size} bytes: want at most {FILE_BYTES_MAX}.")
        raw = stream.read(size + 1)
    if len(raw) != size:
        raise PlanError(f"[plan] {path.name}: want a file that nobody is writing to.")
    return raw


def write_atomic(path: pathlib.Path, data: bytes | Iterable[memoryview]) -> None:
    """Write a file beside its destination, make it durable, and rename it into place.

    Args:
        path: The destination.
        data: The whole file, or its parts.
    """
    parts = [data] if isinstance(data, bytes) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
