"""System calls on files that are missing in Python, through ctypes; only for what works on open files."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

from gateway.rootfs.kernel import AT_EMPTY_PATH, checked

# include/uapi/linux/inotify.h
IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF, IN_UNMOUNT, IN_Q_OVERFLOW, IN_IGNORED = 0x400, 0x800, 0x2000, 0x4000, 0x8000
IN_ONLYDIR, IN_EXCL_UNLINK, IN_ISDIR = 0x1000000, 0x4000000, 0x40000000

_RENAME_NOREPLACE = 1
_INOTIFY_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows

# whether `open_nameless` works; None until tried
_names_files: bool | None = None if hasattr(os, "O_TMPFILE") else False

_libc = ctypes.CDLL(None, use_errno=True)


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


def trim_memory() -> None:
    """Return freed heap pages to the kernel, if the C library supports it."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
