"""Files that are read whole or not at all, and written in one step, where the user pointed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import pathlib
import secrets
import stat
from collections.abc import Iterable

from .types import PlanError

FILE_BYTES_MAX = 1 << 36  # 80 layers of 28,672 neurons at d = 8192, 2 and 3 bits: 22 GiB
NAME_BYTES_MAX = 255  # of one name in a folder, as Linux has it
_LINKS_MAX = 40  # that Linux follows
_PARTIAL = ".partial"
# What is answered where a folder takes no new file, or a file no other in its place: the folder is
# another's, or mounted to be read, or the file is mounted by itself.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
_EFFECTIVE = os.access in os.supports_effective_ids


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


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that `write_atomic` could not write to, before the work whose result it takes.

    Nothing of what is there changes. A pipe is not opened, since that would wait for its reader.

    Args:
        path: A file that is there or not, a link to one, a pipe or a device.

    Raises:
        OSError: It is a folder, stands in no folder or in one that takes no file, or may not be
            written to; or its name is too long, or its links lead in a circle.
    """
    place = _place(path)
    if not place.is_replaced or _takes_files(place.path.parent):
        return
    if place.status is None:
        raise PermissionError(f"[write] {str(path)!r}: want a folder that takes a new file.")


def write_atomic(path: str | os.PathLike[str], data: bytes | Iterable[memoryview]) -> None:
    """Write a file beside its destination, make it durable, and rename it into place.

    What is there keeps its permissions, and a link is followed: its target is what changes. A pipe,
    a device, or an open file of this process such as ``/dev/stdout`` is written into. So is a file
    in a folder that takes no other beside it, once there is room for the whole.

    Args:
        path: The destination.
        data: The whole file, or its parts.

    Raises:
        OSError: As for `check_writable`, or there is no room; what was there before still is.
    """
    place = _place(path)
    parts = [data] if isinstance(data, bytes) else data
    if not place.is_replaced:
        _write_into(place, parts)
        return
    temporary = place.path.with_name(f".csfast-{secrets.token_hex(8)}.tmp")
    try:
        stream = temporary.open("xb")
    except OSError as error:
        if error.errno not in _REFUSALS or place.status is None:
            raise
        _overwrite(place.path, b"".join(parts))
        return
    try:
        with stream:
            for part in parts:
                stream.write(part)
            if place.status is not None:
                _keep_permissions(stream.fileno(), place.status)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            temporary.replace(place.path)
        except OSError as error:
            if error.errno not in _REFUSALS or place.status is None:
                raise
            _overwrite(place.path, temporary.read_bytes())
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(place.path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def partial_of(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """Give the file beside an output that keeps what is done of it, for an interrupted run.

    There is none for an output that is written into, such as a pipe, nor in a folder that takes no
    new file.

    Raises:
        OSError: As for `check_writable`.
    """
    place = _place(path)
    if not place.is_replaced or not _takes_files(place.path.parent):
        return None
    name = place.path.name
    if len(os.fsencode(name + _PARTIAL)) > NAME_BYTES_MAX:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return place.path.with_name(name + _PARTIAL)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a path stands for once its links are followed."""

    path: pathlib.Path
    status: os.stat_result | None  # None where there is nothing yet
    descriptor: int | None  # of an open file of this process

    @property
    def is_replaced(self) -> bool:
        """Whether a new file takes its place; otherwise it is written into."""
        if self.descriptor is not None:
            return False
        return self.status is None or stat.S_ISREG(self.status.st_mode)


def _place(path: str | os.PathLike[str]) -> _Place:
    """Find what a path stands for, after refusing what no file can be written to."""
    given = pathlib.Path(path)
    where = f"[write] {str(path)!r}"
    try:
        status = given.stat()
    except FileNotFoundError:
        status = None  # nothing yet, or a link to nothing yet
    except NotADirectoryError as error:
        raise NotADirectoryError(f"{where}: want a folder before the last name.") from error
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else type(error).__name__
        raise type(error)(f"{where}: want a file that can be reached ({reason}).") from error
    target = pathlib.Path(os.path.realpath(given))
    if status is None:
        if not target.parent.is_dir():
            raise FileNotFoundError(
                f"{where}: no such folder as {str(target.parent)!r}: want one that is there."
            )
        return _Place(target, None, None)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{where}: a folder; want a file.")
    if stat.S_ISBLK(status.st_mode):
        raise OSError(f"{where}: a disk; want a file.")
    descriptor = _descriptor(given)
    if descriptor is None and stat.S_ISSOCK(status.st_mode):
        raise OSError(f"{where}: a socket; want a file or a pipe.")
    if descriptor is None:
        is_open = os.access(given, os.W_OK, effective_ids=_EFFECTIVE)
    else:
        is_open = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    if not is_open:
        raise PermissionError(f"{where}: want a file that may be written to.")
    return _Place(target, status, descriptor)


def _descriptor(path: pathlib.Path) -> int | None:
    """Number of the open file of this process that a path such as ``/dev/stdout`` stands for."""
    for _ in range(_LINKS_MAX):
        folder = os.path.realpath(path.parent)
        if folder == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = pathlib.Path(folder, os.readlink(path))
    return None


def _takes_files(folder: pathlib.Path) -> bool:
    """Whether a new file can be made in a folder, by making one."""
    probe = folder / f".csfast-{secrets.token_hex(8)}.tmp"
    try:
        probe.open("xb").close()
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return False
    probe.unlink()
    return True


def _write_into(place: _Place, parts: Iterable[bytes | memoryview]) -> None:
    """Write into a pipe, a device or an open file, whose place in it moves on."""
    if place.descriptor is None:
        number = os.open(place.path, os.O_WRONLY)
    else:
        number = os.dup(place.descriptor)
    with os.fdopen(number, "wb") as stream:
        for part in parts:
            stream.write(part)


def _overwrite(path: pathlib.Path, data: bytes) -> None:
    """Write a file where it is, once there is room for all of it."""
    number = os.open(path, os.O_WRONLY)
    with os.fdopen(number, "wb") as stream:
        size = os.fstat(number).st_size
        try:
            if data:
                os.posix_fallocate(number, 0, len(data))
        except OSError:
            os.ftruncate(number, size)
            raise
        stream.write(data)
        stream.truncate()
        stream.flush()
        os.fsync(number)


def _keep_permissions(number: int, status: os.stat_result) -> None:
    """Give an open file the owner, as far as that is allowed, and the permissions of another."""
    with contextlib.suppress(PermissionError):
        os.fchown(number, status.st_uid, status.st_gid)
    os.fchmod(number, stat.S_IMODE(status.st_mode))
