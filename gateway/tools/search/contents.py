"""Contents of the files that Grep searches, cached between calls while a file does not change."""

from __future__ import annotations

import os

from gateway.errors import GatewayError
from gateway.rootfs.walk import settled
from gateway.tools.call import Call

FILE_MAX = 16 << 20  # bytes of a file that Grep searches; larger ones are skipped and counted
CACHE_MAX = 16 << 20  # bytes of file contents that a worker caches between calls
CACHE_FILE_MAX = 1 << 20
BLOCK = 1 << 16  # bytes that ripgrep reads at once


# Contents as UTF-8, and the position of the first NUL, by device, inode, ctime and size. First in, first out,
# since each search reads all of it.
_cache: dict[tuple[int, int, int, int], tuple[bytes, int]] = {}
_cached = 0


def forget() -> None:
    """Drop the cache."""
    global _cached
    _cache.clear()
    _cached = 0


def content(call: Call, path: str, status: os.stat_result) -> tuple[bytes, int]:
    """Return a file's bytes and the position of the first NUL; empty if it cannot be read."""
    global _cached
    key = (status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)
    kept = _cache.get(key)
    if kept is not None:
        return kept
    lasting = settled(status)
    try:
        read, _ = call.root.read_file(path, FILE_MAX)
    except GatewayError:
        return b"", -1
    data = _as_utf8(read)
    kept = data, data.find(b"\0")
    if lasting and len(data) <= CACHE_FILE_MAX and len(read) == status.st_size:
        _cache[key] = kept
        _cached += len(data)
        while _cached > CACHE_MAX:
            dropped, _ = _cache.pop(next(iter(_cache)))
            _cached -= len(dropped)
    return kept


def before_nul(data: bytes, nul: int) -> bytes:
    """Return the part of a binary file that ripgrep searches if the file was not named.

    It reads in blocks, each up to its last line end, and stops at the one with the NUL.
    """
    searched = 0
    while searched + BLOCK <= nul:
        end = data.rfind(b"\n", searched, searched + BLOCK) + 1
        if not end:
            break
        searched = end
    return data[:searched]


def _as_utf8(data: bytes) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace").encode("utf-8", "replace")
    return data[3:] if data.startswith(b"\xef\xbb\xbf") else data
