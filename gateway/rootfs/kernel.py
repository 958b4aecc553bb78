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
from collections.abc import Iterator

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

# include/uapi/linux/inotify.h
IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF, IN_UNMOUNT, IN_Q_OVERFLOW, IN_IGNORED = 0x400, 0x800, 0x2000, 0x4000, 0x8000
IN_ONLYDIR, IN_EXCL_UNLINK, IN_ISDIR = 0x1000000, 0x4000000, 0x40000000

# A '..' that coincides with a rename anywhere in the tree fails with EAGAIN (openat2(2)); under a hostile
# rename loop, 46 of 251 508 opens did so once and none four times.
_ATTEMPTS = 128

O_PATH: int = getattr(os, "O_PATH", 0)
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK

_REAL = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS

_SYS_OPENAT2 = 437
_RENAME_NOREPLACE = 1
_INOTIFY_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows

# whether `open_nameless` works; None until tried
_names_files: bool | None = None if hasattr(os, "O_TMPFILE") else False

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


def settle(descriptor: int) -> None:
    """Flush writes to the file system of a descriptor. Raises `OSError`."""
    checked(_libc.syncfs(descriptor), "syncfs")


def inotify() -> int:
    """Return a new non-blocking inotify instance. Raises `OSError`, ENOSYS if not supported."""
    init = getattr(_libc, "inotify_init1", None)
    if init is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return int(checked(init(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1"))


def inotify_add(descriptor: int, mask: int, path: bytes = b".") -> int:
    """Watch the working directory; return the watch's number, which is unique per inode.

    A tenant's folder is entered by descriptor first, since `fchdir` follows no link. `path` is for files of
    the kernel.
    """
    return int(checked(_libc.inotify_add_watch(descriptor, path, mask), "inotify_add_watch"))


def inotify_remove(descriptor: int, watch: int) -> None:
    """End a watch. An error for a watch that has already ended is ignored."""
    _libc.inotify_rm_watch(descriptor, watch)


def inotify_events(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Parse events that were read: yield watch, mask, cookie and name, see inotify(7)."""
    at = 0
    while at < len(data):
        watch, mask, cookie, length = _INOTIFY_EVENT.unpack_from(data, at)
        at += _INOTIFY_EVENT.size + length
        yield watch, mask, cookie, data[at - length : at].rstrip(b"\0")


def start_writing(descriptor: int) -> None:
    """Make the kernel start writing a file to disk, if supported, without waiting.

    ext4 otherwise does so when a new file is renamed over an old one, and the rename waits for block
    allocation.
    """
    sync = getattr(_libc, "sync_file_range", None)
    if sync is not None:
        sync(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # SYNC_FILE_RANGE_WRITE


def rename_new(source_folder: int, source: bytes, target_folder: int, target: bytes) -> None:
    """Rename without replacing. Raises `OSError`, EEXIST if the target exists."""
    rename = getattr(_libc, "renameat2", None)
    if rename is not None:
        if rename(source_folder, source, target_folder, target, _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        # EINVAL: not supported by the file system, or a folder into itself, which the rename below reports
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
    try:
        os.stat(target, dir_fd=target_folder, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(source, target, src_dir_fd=source_folder, dst_dir_fd=target_folder)
        return
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def open_nameless(directory: int, flags: int, probe: str) -> int:
    """Open a new file in `directory` that has no name until `name_file` gives it one.

    It disappears with its last descriptor, however the process ends. Raises `OSError` if the file system does
    not support that or the kernel does not let us name the file (Linux before 6.10), which is tested once
    with the name `probe`.
    """
    global _names_files
    if _names_files is False:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    flags |= os.O_TMPFILE | os.O_CLOEXEC
    descriptor = os.open(".", flags, 0o600, dir_fd=directory)
    if _names_files:
        return descriptor
    try:
        name_file(descriptor, directory, probe)
        os.unlink(probe, dir_fd=directory)
    except OSError as error:
        # EPERM, ENOENT: not permitted; EINVAL, ENOSYS: not supported; other errors may be temporary
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOENT, errno.EINVAL, errno.ENOSYS):
            _names_files = False
        raise
    finally:
        os.close(descriptor)
    _names_files = True
    return os.open(".", flags, 0o600, dir_fd=directory)  # a file can be named only once


def name_file(descriptor: int, directory: int, name: str) -> None:
    """Give an open file a name, which must not exist. Raises `OSError`."""
    checked(_libc.linkat(descriptor, b"", directory, os.fsencode(name), AT_EMPTY_PATH), "linkat")


def started(pid: int) -> str:
    """Return a process's start time in ticks, which together with its pid is unique; empty if it is dead."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def trim_memory() -> None:
    """Return freed heap pages to the kernel, if the C library supports it."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


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
