"""The contents of files that Grep looks into, kept between calls while the file does not change."""

from __future__ import annotations

import os

from gateway.errors import GatewayError
from gateway.rootfs.walk import settled
from gateway.tools.call import Call

FILE_MAX = 16 << 20  # bytes of a file that Grep looks into; larger ones are skipped and counted
CACHE_MAX = 16 << 20  # bytes of file contents that a worker keeps between two calls
CACHE_FILE_MAX = 1 << 20
BLOCK = 1 << 16  # bytes that ripgrep reads at once


# What was read, as UTF-8, and where its first NUL is, by device, inode, ctime and size. What came first goes
# first: each search comes by all of it.
_cache: dict[tuple[int, int, int, int], tuple[bytes, int]] = {}
_cached = 0


def forget() -> None:
    """Let go of what is kept between calls."""
    global _cached
    _cache.clear()
    _cached = 0


def content(call: Call, path: str, status: os.stat_result) -> tuple[bytes, int]:
    """Return a file's bytes and where the first NUL is; nothing if it cannot be read."""
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
    """Return what ripgrep searches of a binary file that was not named.

    It reads block by block, each to its last line end, and stops at the one that has the NUL.
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
