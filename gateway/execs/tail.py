"""The last bytes of one output stream, by absolute offset. No IO."""

from __future__ import annotations

from collections import deque
from typing import Final

# chunks below this are merged, so that a terminal's single characters do not make long lists
_MERGE: Final = 8 * 1024
# one frame to a client: fewer, larger ones cost less, but hold up the others on its socket
READ: Final = 256 * 1024


class Tail:
    """Keeps at least the last `limit` bytes appended, and whatever a reader at `floor` still needs.

    `start` and `end` are the absolute offsets of what is kept.
    """

    def __init__(self, limit: int) -> None:
        self.start = 0
        self.end = 0
        self._limit = limit
        self._chunks: deque[bytes] = deque()

    def append(self, data: bytes, floor: int | None = None, limit: int | None = None) -> None:
        """Add bytes at the end; drop from the front what is beyond the limit and before `floor`.

        `limit` takes the place of the tail's own where that is more.
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
        """Return what is kept from `offset` on, at most some `limit` bytes, nothing at the end.

        Raises `ValueError` if the offset is not kept.
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
