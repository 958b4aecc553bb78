"""A log in shared memory, where notes survive a kill of the process until they are on disk.

It is a mapped file in a memory file system. Its contents survive any end of the process without waiting for
a disk, but not the machine's. It has two halves that are used in turn: while one is being written to disk,
new notes go into the other. A half begins with its turn and the number of bytes in use, which is set last, so
that an incomplete note does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

MEMORY: Final = Path("/dev/shm")  # noqa: S108  what lies there is checked to be ours
HALF: Final = 64 << 10  # bytes
NOTE_MAX: Final = HALF // 4

_TURN, _USED = 0, 1  # a half's first words: its turn, and the number of bytes in use after them
_HEAD: Final = 16  # bytes of both
_LENGTH: Final = struct.Struct("<I")


class MemoryLog:
    """The notes of one folder. Create it with `opened`; for one process and one thread at a time."""

    def __init__(self, path: Path, mapped: mmap.mmap | None) -> None:
        self._path = path
        self._mapped = mapped
        self._now, self._turn, self._used = 0, 0, HALF  # no room without memory
        self._heads: list[memoryview] = []
        if mapped is not None:
            # whole words are stored at once; `struct` clears them first, and a kill could come in between
            self._heads = [memoryview(mapped)[at : at + _HEAD].cast("Q") for at in (0, HALF)]
            self._now = 0 if self._heads[0][_TURN] >= self._heads[1][_TURN] else 1
            self._turn, self._used = self._heads[self._now]

    @classmethod
    def opened(cls, folder: Path) -> MemoryLog:
        """Open a folder's log, with the notes of an earlier process. If that fails, the log has no room."""
        path = place(folder)
        try:
            return cls(path, _mapped(path, folder.stat()))
        except OSError as error:
            log.warning("no log in memory, so each write waits for the disk: %s", error.strerror)
            return cls(path, None)

    def notes(self) -> Iterator[bytes]:
        """Yield the notes, oldest first."""
        if self._mapped is None:
            return
        for half in (1 - self._now, self._now):
            at = half * HALF + _HEAD
            end = at + min(self._heads[half][_USED], HALF - _HEAD)
            while at + _LENGTH.size <= end:
                (length,) = _LENGTH.unpack_from(self._mapped, at)
                at += _LENGTH.size + length
                if at > end:
                    return
                yield self._mapped[at - length : at]

    def add(self, note: bytes) -> bool:
        """Add a note; return whether there was room for it."""
        size = _LENGTH.size + len(note)
        if self._used + size > HALF - _HEAD:
            return False
        assert self._mapped is not None
        at = self._now * HALF + _HEAD + self._used
        _LENGTH.pack_into(self._mapped, at, len(note))
        self._mapped[at + _LENGTH.size : at + size] = note
        self._used += size
        self._heads[self._now][_USED] = self._used
        return True

    def turn(self) -> None:
        """Switch to the other half, forgetting its contents."""
        if self._mapped is not None:
            self._now, self._turn, self._used = 1 - self._now, self._turn + 1, 0
            self._heads[self._now][_USED] = 0
            self._heads[self._now][_TURN] = self._turn

    def clear(self) -> None:
        """Forget the contents from before the last turn."""
        if self._mapped is not None:
            self._heads[1 - self._now][_USED] = 0

    def close(self) -> None:
        """Close the file, and remove it if it is empty."""
        if self._mapped is None:
            return
        empty = next(self.notes(), None) is None
        for head in self._heads:
            head.release()
        self._mapped.close()
        self._mapped, self._used = None, HALF
        if empty:
            with contextlib.suppress(OSError):
                self._path.unlink()


def place(folder: Path) -> Path:
    """Return the path of a folder's notes, which exists while there are any."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    return MEMORY / f"incus-gateway-{name}"


def _mapped(path: Path, folder: os.stat_result) -> mmap.mmap:
    """Map the file, creating it if needed. Raises `OSError`, also if the folder's owner does not own it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # with O_CREAT not even root may open another's file in a world-writable folder: fs.protected_regular
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        status = os.fstat(descriptor)
        ours = status.st_uid in (os.geteuid(), folder.st_uid) and status.st_mode & 0o7177 == 0
        if not (ours and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            raise PermissionError(1, f"{path} belongs to another user")
        if os.geteuid() == 0:  # root may be creating a file that the folder's owner must be able to use
            os.fchown(descriptor, folder.st_uid, folder.st_gid)
        # now, not when a page is first touched: with full memory that would kill this process
        os.posix_fallocate(descriptor, 0, 2 * HALF)
        return mmap.mmap(descriptor, 2 * HALF)
    finally:
        os.close(descriptor)
