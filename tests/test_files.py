"""Files are written whole, and where the user pointed."""

import os
import pathlib
import resource
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

from csfast import files

OLD, NEW = b"old", b"new and longer"


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def written(path, data=NEW):
    """Write after the check that a command makes before its work, and leave nothing beside."""
    path = pathlib.Path(path)
    files.check_writable(path)
    files.write_atomic(path, data)
    assert not list(path.resolve().parent.glob("*.tmp"))


@pytest.fixture
def nobody():
    """A folder, and the rights of a user who owns nothing, for as long as the test runs."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        os.setegid(65534)
        os.seteuid(65534)
        try:
            yield pathlib.Path(name)
        finally:
            os.seteuid(0)
            os.setegid(0)


def as_root(function, *arguments):
    os.seteuid(0)
    function(*arguments)
    os.seteuid(65534)


def test_a_check_changes_nothing(folder):
    (folder / "a").write_bytes(OLD)
    before = (folder / "a").stat()
    for name in ("a", "b"):
        files.check_writable(folder / name)
    assert [path.name for path in folder.iterdir()] == ["a"]
    after = (folder / "a").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_links_are_followed_and_stay(folder, there):
    (folder / "store").mkdir()
    target = folder / "store" / "a"
    if there:
        target.write_bytes(OLD)
    (folder / "first").symlink_to("second")
    (folder / "second").symlink_to(target)
    (folder / "rooms").symlink_to("store")
    written(folder / "first")
    assert (folder / "first").is_symlink() and (folder / "second").is_symlink()
    assert target.read_bytes() == NEW and not target.is_symlink()
    written(folder / "rooms" / "b")
    assert (folder / "store" / "b").read_bytes() == NEW


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none/a", FileNotFoundError, "no such folder as '.*none': want one that is there"),
        ("lost", FileNotFoundError, "no such folder as '.*none': want one that is there"),
        ("store", IsADirectoryError, "a folder; want a file"),
        (".", IsADirectoryError, "a folder; want a file"),
        ("file/a", NotADirectoryError, "want a folder before the last name"),
        ("circle", OSError, "too many levels of symbolic links"),
        ("x" * 256, OSError, "file name too long"),
        ("listener", OSError, "a socket; want a file or a pipe"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(folder, name, error, message):
    (folder / "store").mkdir()
    (folder / "file").write_bytes(OLD)
    (folder / "lost").symlink_to(folder / "none" / "a")
    (folder / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # a socket's name is short
        listener.bind("listener")
        os.chdir(here)
        for write in (files.check_writable, lambda path: files.write_atomic(path, NEW)):
            with pytest.raises(error, match=rf"\[write\] '.*{message}"):
                write(folder / name)
    assert (folder / "file").read_bytes() == OLD and not (folder / "none").exists()


@pytest.mark.parametrize("size", [255, 250, 1])
def test_a_name_may_be_as_long_as_a_folder_takes(folder, size):
    path = folder / ("x" * size)
    written(path)
    written(path, OLD)
    assert path.read_bytes() == OLD
    partial = files.partial_of(path)
    partial.write_bytes(OLD)
    assert partial.parent == folder and partial.name.endswith(".partial")


def test_what_is_left_of_a_run_stands_beside_its_output(folder):
    (folder / "store").mkdir()
    (folder / "link").symlink_to(folder / "store" / "a")
    assert files.partial_of(folder / "a.plan") == folder / "a.plan.partial"
    assert files.partial_of(folder / "link") == folder / "store" / "a.partial"
    assert files.partial_of("/dev/null") is None
    assert not list(folder.rglob("*.partial")) + list(folder.rglob("*.tmp"))


def test_a_pipe_is_written_into(folder):
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    data = bytes(range(256)) * 1024  # more than a pipe holds
    seen = []
    for name in ("pipe", "link"):
        reader = threading.Thread(target=lambda: seen.append((folder / "pipe").read_bytes()))
        reader.start()
        written(folder / name, [memoryview(data[:1000]), memoryview(data[1000:])])
        reader.join(30)
    assert seen == [data, data] and stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    assert files.partial_of(folder / "pipe") is None


def test_devices_are_written_into():
    written("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    files.check_writable("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic("/dev/full", NEW)


SAY = """
import sys
from csfast import files
for path in sys.argv[1:]:
    files.check_writable(path)
    print("one", flush=True)
    files.write_atomic(path, b"two ")
    print("three", flush=True)
"""


def test_standard_output_goes_on_where_it_is(folder):
    """In a file that the shell opened: neither replaced, nor begun anew."""

    def say(*names, **options):
        command = [sys.executable, "-c", SAY, *names]
        return subprocess.run(command, check=False, timeout=120, **options)

    with (folder / "log").open("wb") as log, pathlib.Path("/dev/null").open("rb") as nothing:
        log.write(b"zero ")
        log.flush()
        names = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/stdin")
        done = say(*names, stdin=nothing, stdout=log, stderr=subprocess.PIPE)
    assert (folder / "log").read_bytes() == b"zero " + b"one\ntwo three\n" * 3
    assert b"[write] '/dev/stdin': want a file that may be written to" in done.stderr
    assert say("/dev/stdout", stdout=subprocess.PIPE).stdout == b"one\ntwo three\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert say("/dev/stdout", stdout=theirs).returncode == 0
        assert ours.recv(100).startswith(b"one\n")


def test_permissions_stay_and_new_files_obey_the_mask(folder):
    (folder / "old").write_bytes(OLD)
    for mode in (0o600, 0o640, 0o664, 0o755):
        (folder / "old").chmod(mode)
        written(folder / "old")
        assert stat.S_IMODE((folder / "old").stat().st_mode) == mode
    before = os.umask(0o027)
    try:
        written(folder / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o640


def test_the_owner_stays(folder):
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    (folder / "old").write_bytes(OLD)
    os.chown(folder / "old", 65534, 65534)
    written(folder / "old")
    assert ((folder / "old").stat().st_uid, (folder / "old").stat().st_gid) == (65534, 65534)


def test_a_file_is_written_where_it_is_if_its_folder_takes_no_other(nobody):
    as_root((nobody / "a").write_bytes, OLD + bytes(100))
    as_root((nobody / "a").chmod, 0o666)
    inode = (nobody / "a").stat().st_ino
    written(nobody / "a")
    assert (nobody / "a").read_bytes() == NEW and (nobody / "a").stat().st_ino == inode
    assert files.partial_of(nobody / "a") is None
    # Room for all of it comes before the first byte.
    with pytest.raises(OSError, match="too large"):
        limited(1000, files.write_atomic, nobody / "a", bytes(2000))
    assert (nobody / "a").read_bytes() == NEW
    with pytest.raises(PermissionError, match="want a folder that takes a new file"):
        files.check_writable(nobody / "b")
    with pytest.raises(PermissionError):
        files.write_atomic(nobody / "b", NEW)
    as_root((nobody / "a").chmod, 0o644)
    for write in (files.check_writable, lambda path: files.write_atomic(path, NEW)):
        with pytest.raises(PermissionError, match="want a file that may be written to"):
            write(nobody / "a")


def test_another_users_file_in_a_sticky_folder_is_written_where_it_is(nobody):
    as_root(nobody.chmod, 0o1777)
    as_root((nobody / "a").write_bytes, OLD)
    as_root((nobody / "a").chmod, 0o666)
    written(nobody / "a")
    assert (nobody / "a").read_bytes() == NEW and (nobody / "a").stat().st_uid == 0


def limited(n_bytes, function, *arguments):
    """Call a function while no file may grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        function(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(folder):
    (folder / "a").write_bytes(OLD)
    with pytest.raises(OSError, match="too large"):
        limited(1000, files.write_atomic, folder / "a", bytes(2000))
    assert (folder / "a").read_bytes() == OLD
    assert [path.name for path in folder.iterdir()] == ["a"]
