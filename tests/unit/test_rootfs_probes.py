"""Operations that misbehave, for `test_rootfs_workers`: a broker is started with this module's name."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import orjson

from gateway.errors import TooLarge
from gateway.rootfs.operations import SCAN, SCANNED, Workspace


def _echo(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return str(arguments["text"]).encode()


def _slow_echo(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    time.sleep(arguments["seconds"])
    return str(arguments["text"]).encode()


def _pid(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return str(os.getpid()).encode()


def _crash(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    os._exit(9)


def _segfault(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return ctypes.string_at(1)


def _hang(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    while True:
        pass


def _bug(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    raise ValueError("secret content of a file")


def _eat(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return bytes(1 << 34)


def _gorge(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Take and touch memory, a megabyte at a time; return how many it got."""
    kept = [b"x" * (1 << 20) for _ in range(arguments["megabytes"])]
    return str(len(kept)).encode()


def _refuse(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    raise TooLarge("too much", size=7)


def _names(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    return orjson.dumps(sorted(workspace.tree.names("", 100)))


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
}


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
    "touch": lambda folder: os.utime("a.txt", (1, 1), dir_fd=folder),
    "remove": lambda folder: os.unlink("newer", dir_fd=folder),
    "remove a folder": lambda folder: os.rmdir("folder", dir_fd=folder),
}


def _change(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Try every change; return which succeeded."""
    succeeded = []
    for name, change in _CHANGES.items():
        try:
            change(workspace.tree.descriptor)
        except OSError:
            continue
        succeeded.append(name)
    return orjson.dumps(succeeded)


def _scan(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Take long for one share of a search, in which each finds files of as many bytes of names."""
    time.sleep(arguments.get("seconds", 0))
    return SCANNED + b"x" * int(arguments.get("bytes", 0))


def _descriptors(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return the open descriptors, found by asking for each, the tree's, and what 0 to 2 take of a byte."""
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
    return orjson.dumps([found, workspace.tree.descriptor, written])


OPERATIONS = {
    "attempt": _attempt,
    "change": _change,
    "bug": _bug,
    "crash": _crash,
    "descriptors": _descriptors,
    "eat": _eat,
    "echo": _echo,
    "gorge": _gorge,
    "hang": _hang,
    "names": _names,
    "pid": _pid,
    "refuse": _refuse,
    SCAN: _scan,
    "segfault": _segfault,
    "slow_echo": _slow_echo,
}


def idle() -> None:
    """Nothing is kept."""
