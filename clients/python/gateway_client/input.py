"""The sent input of a command, kept for a while so that it can be sent again after a break."""

from __future__ import annotations

from collections import deque
from typing import Final

# bytes of one input frame: below any gateway's frame limit, and large enough to be fast
CHUNK: Final = 256 << 10
# bytes of input kept for sending again after a break: more than the buffers on the way can hold
SENT: Final = 16 << 20


class Sent:
    """The last `SENT` bytes of input, by offset. `closed` says that the input has ended."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self.end = 0
        self.closed = False

    def add(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        self.end += len(data)
        while self._size - len(self._chunks[0]) >= SENT:
            self._size -= len(self._chunks.popleft())

    def since(self, offset: int) -> list[bytes] | None:
        """Return what was sent from `offset` on, None if that is no longer kept."""
        skip = offset - (self.end - self._size)
        if skip < 0:
            return None
        found = []
        for chunk in self._chunks:
            if skip < len(chunk):
                found.append(chunk[max(skip, 0) :])
            skip -= len(chunk)
        return found
