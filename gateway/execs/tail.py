"""The last bytes of an output stream, addressed by absolute offset. No I/O."""

from __future__ import annotations

from collections import deque
from typing import Final

# smaller chunks are merged, so that a terminal's single characters do not make long lists
_MERGE: Final = 8 * 1024
# size of a frame to a client: larger ones cost less but delay others on the same socket
READ: Final = 256 * 1024


class Tail:
    """A buffer of at least the last `limit` bytes, and of everything a reader still needs.

    `start` and `end` are the absolute offsets of the kept bytes.
    """

    def __init__(self, limit: int) -> None:
        self.start = 0
        self.end = 0
        self._limit = limit
        self._chunks: deque[bytes] = deque()

    def append(self, data: bytes, floor: int | None = None, limit: int | None = None) -> None:
        """Append bytes; drop bytes at the front that exceed the limit and lie before `floor`.

        `limit` lowers the tail's own limit for this call.
        """
        if self._chunks and len(self._chunks[-1]) + len(data) <= _MERGE:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
        self.end += len(data)
        kept = self.end - (self._limit if limit is None else min(limit, self._limit))
        keep = kept if floor is None else min(kept, floor)
        while self._chunks and self.start + len(self._chunks[0]) <= keep:
            self.start += len(self._chunks.popleft())

    def read(self, offset: int, limit: int = READ) -> list[bytes]:
        """Return the bytes from `offset` in parts, about `limit` bytes at most, [] at the end.

        Raises `ValueError` if the offset is no longer, or not yet, in the tail.
        """
        if not self.start <= offset <= self.end:
            raise ValueError(f"offset {offset} is not in {self.start}..{self.end}")
        position, parts = self.end, deque[bytes]()
        for chunk in reversed(self._chunks):
            if position <= offset:
                break
            position -= len(chunk)
            parts.appendleft(chunk if position >= offset else chunk[offset - position :])
        size, some = 0, list[bytes]()
        for part in parts:
            if size and size + len(part) > limit:
                break
            some.append(part)
            size += len(part)
        return some
