"""System calls missing in Python, through ctypes.

Constants are from `include/uapi/linux/openat2.h`, `fcntl.h` and `mount.h`; system calls from 424 on have the
same number on every architecture.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

# A '..' that coincides with a rename anywhere in the tree fails with EAGAIN (openat2(2)); under a hostile
# rename loop, 46 of 251 508 opens did so once and none four times.
_ATTEMPTS = 128

O_PATH: int = getattr(os, "O_PATH", 0)
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK

_REAL = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS

_SYS_OPENAT2 = 437
_libc = ctypes.CDLL(None, use_errno=True)
syscall = _libc.syscall
syscall.restype = ctypes.c_long

# A separate prototype, because fixed argument types make the call twice as fast.
_openat2 = ctypes.CDLL(None, use_errno=True).syscall
_openat2.restype = ctypes.c_long
_openat2.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]

_hows: dict[tuple[int, int, int], bytes] = {}


def openat2(directory: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """Open `path` under `directory` with close-on-exec; return the descriptor.

    Retries EAGAIN and EINTR. Raises `OSError` without a file name, because names are the tenant's bytes.
    """
    if b"\0" in path:
        raise OSError(errno.EINVAL, "NUL in path")
    key = (flags, mode, resolve)
    how = _hows.get(key)
    if how is None:
        how = _hows[key] = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    number = 0
    for _ in range(_ATTEMPTS):
        descriptor: int = _openat2(_SYS_OPENAT2, directory, path, how, 24)
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number))


def _has_openat2() -> bool:
    if not O_PATH:
        return False
    try:
        os.close(openat2(AT_FDCWD, b"/", O_PATH, 0))
    except OSError:
        return False
    return True


HAS_OPENAT2 = _has_openat2()


def open_real(directory: int, path: str, flags: int) -> int:
    """Open `path` under `directory`; it must not contain links, and one at the end raises ELOOP."""
    if HAS_OPENAT2:
        return openat2(directory, os.fsencode(path or "."), flags, _REAL)
    directory = os.dup(directory)
    folder, _, name = path.rpartition("/")
    try:
        for part in folder.split("/") if folder else ():
            following = os.open(part, FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = following
        return os.open(name or ".", flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)


def read_part(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the first `limit` bytes of a file. Raises `OSError`.

    For files of the kernel whose length a tenant controls. Hundreds are read at each look at the tenants'
    memory, so this avoids Python's file objects.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(descriptor, limit)
        while 0 < len(found) < limit and (more := os.read(descriptor, limit - len(found))):
            found += more
    finally:
        os.close(descriptor)
    return found


def checked(result: int, what: str) -> int:
    """Return the result of a raw call, or raise an `OSError` with `what` in its text."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def started(pid: int) -> str:
    """Return a process's start time in ticks, which together with its pid is unique; empty if it is dead."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


# sched_setattr(2). Since 6.12 `sched_runtime` is the time slice of a normal process; ignored before.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_RESET_ON_FORK = 1
_SHORT_SLICE = 100_000  # nanoseconds, the kernel's minimum; its default is 3 ms on two cores


def take_turns(*, nice: int = 0, short: bool = False) -> None:
    """Lower this thread's share by `nice`, and give it `short` time slices.

    A thread with short slices runs as soon as it has work, ahead of one in a long slice, without getting a
    larger share: a Read beside a busy search takes no longer than without it. Children do not inherit this.
    If the kernel refuses, nothing changes.
    """
    number = _SCHED_SETATTR.get(os.uname().machine)
    if sys.platform != "linux" or number is None:
        return
    value = min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    # struct sched_attr, first version: size, policy, flags, nice, priority, runtime, deadline, period
    turn = _SHORT_SLICE if short else 0
    wanted = struct.pack("IIQiIQQQ", 48, 0, _SCHED_RESET_ON_FORK, value, 0, turn, 0, 0)
    syscall(number, 0, wanted, 0)
