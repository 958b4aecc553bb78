"""The output of a command: one stream's buffer between the connection and its reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from gateway_client.errors import GatewayError, TooLarge

# bytes of each stream that wait for their reader; beyond that the socket is not read
BUFFER: Final = 1 << 20


class Buffer:
    """The bytes of one stream that wait for their reader: at most `limit` and one frame.

    `offset` counts the bytes received since the command began, `lost` those that were dropped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._waited = self._begun = self._abandoned = False
        self.ended = False
        self.error: GatewayError | None = None
        self.offset = 0
        self.lost = 0

    @property
    def filled(self) -> bool:
        """Whether a chunk waits, so that `take` returns at once."""
        return bool(self._chunks)

    def begin(self) -> None:
        """Mark the stream as being read: from now on `wait` drops none of it."""
        self._begun = True

    async def take(self) -> bytes | None:
        """Return the next chunk, or None at the end. Raises the error that the stream ended with."""
        self._begun = True
        while not self._chunks:
            if self.error is not None:
                raise self.error.with_traceback(None)
            if self.ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._size -= len(chunk)
        if self._size <= self._limit // 2:
            self._drained.set()
        return chunk

    def feed(self, data: bytes) -> None:
        self.offset += len(data)
        self._chunks.append(data)
        self._size += len(data)
        self._changed.set()
        self._drop()

    def wait(self, *, discard: bool) -> None:
        """Mark the command as waited for: unread output is dropped beyond the buffer.

        `discard` says that a stream that was being read is no longer read.
        """
        self._waited = True
        self._abandoned |= discard
        self._drop()

    def abandon(self) -> None:
        """Mark the stream as no longer read: all output beyond the buffer is dropped."""
        self._abandoned = True
        self._drop()

    def end(self, error: GatewayError | None = None) -> None:
        self.error, self.ended = error, True
        self._changed.set()
        self._drained.set()

    async def room(self) -> None:
        """Wait until half of the buffer is free, or the stream has ended."""
        while self._size > self._limit and not self.ended:
            self._drained.clear()
            await self._drained.wait()

    def _drop(self) -> None:
        # unread, and a caller waits for the end: keep the last `limit` bytes
        if self._abandoned or (self._waited and not self._begun):
            while self._size > self._limit:
                dropped = len(self._chunks.popleft())
                self._size -= dropped
                self.lost += dropped
            self._drained.set()


class Output:
    """One output stream of a command, as an async iterator of bytes.

    At most one buffer and one frame wait here. Then the connection is not read until half of that is taken,
    which in time slows down the command itself. `offset` counts the bytes received since the command began.
    `lost` counts dropped ones: by the gateway while no client was attached, or by `Exec.wait` here.
    """

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    @property
    def offset(self) -> int:
        return self._buffer.offset

    @property
    def lost(self) -> int:
        return self._buffer.lost

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._buffer.take()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def read(self) -> bytes:
        """Return the rest of the stream, whole. Raises `TooLarge` if some was dropped.

        Unbounded, so only for output known to be small. Read first, then `wait`, which keeps only the
        last buffer of an unread stream.
        """
        read = b"".join([chunk async for chunk in self])
        if self.lost:
            words = f"{self.lost} bytes of this output were dropped before anybody read it"
            raise TooLarge(f"{words}: read it before you wait for the end", lost=self.lost)
        return read
