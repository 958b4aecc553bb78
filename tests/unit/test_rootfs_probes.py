"""Misbehaving operations for `test_rootfs_workers`: a broker is started with this module's name."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson

from gateway.errors import TooLarge
from gateway.rootfs import kernel
from gateway.rootfs.messages import TOLD, frame
from gateway.rootfs.worker import SCAN, SCANNED, WorkerService, Workspace


def _echo(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return str(arguments["text"]).encode()


def _stop_at(workspace: Workspace, gate: str) -> None:
    """Wait at the test's `Gate` until the test opens it."""
    at = os.open(gate, os.O_RDONLY, dir_fd=workspace.root.descriptor)
    os.read(at, 1)
    os.close(at)


def _hold(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    _stop_at(workspace, "gate")
    return str(arguments.get("text", "")).encode()


def _pid(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return str(os.getpid()).encode()


def _crash(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    os._exit(9)


def _segfault(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return ctypes.string_at(1)


def _hang(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    while True:
        pass


def _much(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return bytes(arguments["length"])


def _litter(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Pass unrequested descriptors to the gateway."""
    own = next(number for number in range(256) if number > 2 and _is_socket(number))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=os.dup(own))
    for _ in range(arguments["count"]):
        socket.send_fds(connection, [frame(TOLD, b"")], [0])
    return b""


def _is_socket(number: int) -> bool:
    with suppress(OSError):
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    return False


def _bug(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    raise ValueError("secret content of a file")


def _eat(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return bytes(1 << 34)


def _gorge(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Allocate and touch memory, a megabyte at a time; return how many succeeded."""
    kept = [b"x" * (1 << 20) for _ in range(arguments["megabytes"])]
    return str(len(kept)).encode()


def _refuse(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    raise TooLarge("too much", size=7)


def _names(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return orjson.dumps(sorted(workspace.root.names("", 100)))


_libc = ctypes.CDLL(None, use_errno=True)

# What a worker must not be able to do; each returns a value where it could.
_FORBIDDEN: dict[str, Callable[[], object]] = {
    "read a host file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "see processes": lambda: os.listdir("/proc"),
    "see devices": lambda: os.stat("/dev/null"),
    "leave by ..": lambda: os.stat("/../etc/passwd"),
    "fork": os.fork,
    "run a program": lambda: os.execv("/bin/true", ["true"]),
    "open a socket": lambda: socket.socket(socket.AF_INET),
    "open a unix socket": lambda: socket.socket(socket.AF_UNIX),
    "become root": lambda: os.setuid(0),
    "make a device": lambda: os.mknod("/null", 0o020666, os.makedev(1, 3)),
    "make a fifo": lambda: os.mkfifo("/pipe"),
    "chroot": lambda: os.chroot("/"),
    "kill": lambda: os.kill(os.getppid(), 0),
    "give a file away": lambda: os.chown("/", 0, 0),
    "mount": lambda: _raw(165, b"none", b"/", b"tmpfs", 0, None),
    "trace": lambda: _raw(101, 16, 1, 0, 0),
    "unshare": lambda: _raw(272, 0x10000000),
    "use io_uring": lambda: _raw(425, 1, None),
    "load a filter": lambda: _raw(321, 0, None, 0),
    "open by handle": lambda: _raw(304, 3, None, 0),
    "keyctl": lambda: _raw(250, 0, 0),
    "make a memory file": lambda: _raw(319, b"x", 0),
    "link": lambda: os.link("/a.txt", "/b.txt"),
    "read its own memory": lambda: os.open("/proc/self/mem", os.O_RDONLY),
    "name a descriptor by /proc": lambda: os.stat("/proc/self/fd/0"),
    "change an attribute by name": lambda: os.setxattr("/a.txt", "user.x", b"x"),
    "change an attribute": lambda: _on("/a.txt", lambda fd: os.setxattr(fd, "user.x", b"x")),
    "remove an attribute": lambda: os.removexattr("/a.txt", "user.x"),
    "change a file's flags": lambda: _on("/a.txt", lambda fd: fcntl.ioctl(fd, _SET_FLAGS, bytes(8))),
    "truncate by name": lambda: _raw(76, b"/a.txt", 0),
    "allocate": lambda: _on("/a.txt", lambda fd: os.posix_fallocate(fd, 0, 1 << 20)),
    "copy between files": lambda: _on("/a.txt", lambda fd: os.copy_file_range(fd, fd, 1)),
    "make a symbolic link": lambda: os.symlink("a.txt", "/link"),
    "mount by descriptor": lambda: _raw(428, -100, b"/", 1),
    "change a mount": lambda: _raw(442, -100, b"/", 0, bytes(32), 32),
    "leave its namespaces": lambda: _on("/", lambda fd: _raw(308, fd, 0)),
    "take another's descriptor": lambda: _raw(438, 3, 0, 0),
    "read another's memory": lambda: _raw(310, 1, None, 0, None, 0, 0),
    "name a process": lambda: _raw(434, 1, 0),
    "clone": lambda: _raw(56, 17, 0, 0, 0, 0),
    "clone anew": lambda: _raw(435, bytes(64), 64),
    "watch all files": lambda: _raw(300, 0, 0),
    "use a userfaultfd": lambda: _raw(323, 0),
    "run itself": lambda: _raw(322, 0, b"/a.txt", None, None, 0),
}


_SET_FLAGS = 0x40086602  # FS_IOC_SETFLAGS


def _on(
    path: str, call: Callable[[int], object], flags: int = os.O_RDONLY, folder: int | None = None
) -> object:
    descriptor = os.open(path, flags, dir_fd=folder)
    try:
        return call(descriptor)
    finally:
        os.close(descriptor)


def _raw(*arguments: object) -> int:
    result = _libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return int(result)


def _attempt(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Try everything that is forbidden; return what succeeded."""
    succeeded = []
    for name, forbidden in _FORBIDDEN.items():
        try:
            forbidden()
        except OSError:
            continue
        succeeded.append(name)
    return orjson.dumps(succeeded)


# What changes something in a workspace that has `a.txt`; the last undoes what the others did.
_CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda folder: os.close(os.open("a.txt", os.O_WRONLY, dir_fd=folder)),
    "truncate": lambda folder: os.close(os.open("a.txt", os.O_WRONLY | os.O_TRUNC, dir_fd=folder)),
    "create": lambda folder: os.close(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=folder)),
    "make a folder": lambda folder: os.mkdir("folder", dir_fd=folder),
    "rename": lambda folder: os.rename("new", "newer", src_dir_fd=folder, dst_dir_fd=folder),
    "change a mode": lambda folder: os.chmod("a.txt", 0o600, dir_fd=folder),
    "change an open one's mode": lambda folder: _open(folder, lambda fd: os.fchmod(fd, 0o600)),
    "touch": lambda folder: os.utime("a.txt", (1, 1), dir_fd=folder),
    "make a nameless file": lambda folder: os.close(os.open(".", os.O_RDWR | os.O_TMPFILE, dir_fd=folder)),
    "append": lambda folder: _open(folder, lambda fd: os.write(fd, b"x"), os.O_WRONLY | os.O_APPEND),
    "cut": lambda folder: _open(folder, lambda fd: os.ftruncate(fd, 0), os.O_RDWR),
    "write a mapped page": lambda folder: _open(folder, _write_mapped, os.O_RDWR),
    "exchange": lambda folder: _renameat2(folder, b"a.txt", b"newer", 2),
    "rename over": lambda folder: _renameat2(folder, b"newer", b"a.txt", 0),
    "make once more": lambda folder: os.close(os.open("newer", os.O_WRONLY | os.O_CREAT, dir_fd=folder)),
    "remove": lambda folder: os.unlink("newer", dir_fd=folder),
    "remove a folder": lambda folder: os.rmdir("folder", dir_fd=folder),
}


def _open(folder: int, call: Callable[[int], object], flags: int = os.O_RDONLY) -> object:
    return _on("a.txt", call, flags, folder)


def _write_mapped(descriptor: int) -> None:
    os.ftruncate(descriptor, 1)
    with mmap.mmap(descriptor, 1) as page:
        page[0] = 1


def _renameat2(folder: int, old: bytes, new: bytes, flags: int) -> None:
    _raw(316, folder, old, folder, new, flags)


# What changes a file by a descriptor that was opened to read it. No worker can, but for giving it a name.
_BY_READING: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.write(fd, b"x"),
    "write at a place": lambda fd: os.pwrite(fd, b"x", 0),
    "cut": lambda fd: os.ftruncate(fd, 0),
    "map to write": lambda fd: mmap.mmap(fd, 1).close(),
    "write later into a map": lambda fd: _write_later(fd),
    "open anew": lambda fd: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR)),
    "link": lambda fd: _raw(265, fd, b"", -100, b"/by-descriptor", 0x1000),
    "open for appending": lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND) or os.write(fd, b"x"),
}


def _write_later(descriptor: int) -> None:
    # an int by default, which would cut the address off
    map_ = ctypes.CFUNCTYPE(
        ctypes.c_void_p,
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
        use_errno=True,
    )(("mmap", _libc))
    address = map_(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")


def _change_by_reading(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    succeeded = []
    for name, change in _BY_READING.items():
        try:
            _open(workspace.root.descriptor, change)
        except (OSError, ValueError):
            continue
        succeeded.append(name)
    return orjson.dumps(succeeded)


def _look(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return which paths can be opened for reading, also from a folder already held open."""
    seen = []
    for path in arguments["paths"]:
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))
            seen.append(path)
        with suppress(OSError):
            folder = os.open(os.path.dirname(path), kernel.O_PATH)
            os.close(os.open(os.path.basename(path), os.O_RDONLY, dir_fd=folder))
            seen.append(path)
    return orjson.dumps(seen)


def _leave_by_moved(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Hold a folder open until it is moved out of the workspace; return what can be opened from it then."""
    folder = os.open("/leaving", os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(folder)
    _stop_at(workspace, "gate")
    seen = []
    for path in ("..", "../..", "../a.txt", "../secret.txt", "../../../../../../etc/passwd", "../site/a.txt"):
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY, dir_fd=folder))
            seen.append(path)
        with suppress(OSError):
            os.close(os.open(path, kernel.O_PATH))
            seen.append(path)
    os.fchdir(workspace.root.descriptor)
    os.close(folder)
    return orjson.dumps(seen)


def _change(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Try every change; return which succeeded."""
    succeeded = []
    for name, change in _CHANGES.items():
        try:
            change(workspace.root.descriptor)
        except OSError:
            continue
        succeeded.append(name)
    return orjson.dumps(succeeded)


def _scan(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Run one share of a search that finds files with a given number of bytes of names."""
    if arguments.get("held"):
        _stop_at(workspace, f"gate{arguments['share'][0]}")
    return SCANNED + b"x" * int(arguments.get("bytes", 0))


def _descriptors(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return all open descriptors, the tree's, and the results of writing a byte to 0, 1 and 2."""
    found = []
    for descriptor in range(256):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        found.append(descriptor)
    written = []
    for descriptor in range(3):
        try:
            written.append(os.write(descriptor, b"x"))
        except OSError as error:
            written.append(-(error.errno or 0))
    return orjson.dumps([found, workspace.root.descriptor, written])


OPERATIONS = {
    "attempt": _attempt,
    "change": _change,
    "change_by_reading": _change_by_reading,
    "leave_by_moved": _leave_by_moved,
    "look": _look,
    "bug": _bug,
    "crash": _crash,
    "descriptors": _descriptors,
    "eat": _eat,
    "echo": _echo,
    "gorge": _gorge,
    "hang": _hang,
    "litter": _litter,
    "much": _much,
    "names": _names,
    "pid": _pid,
    "refuse": _refuse,
    SCAN: _scan,
    "segfault": _segfault,
    "hold": _hold,
}


def _idle() -> None:
    """Nothing to free."""


SERVICE = WorkerService(OPERATIONS, _idle)
