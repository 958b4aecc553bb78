"""The output of a command: one stream's bytes between the connection and whoever reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from gateway_client.errors import GatewayError

# bytes of each stream that wait here for their reader before the socket is no longer read
BUFFER: Final = 1 << 20


class Buffer:
    """The bytes of one stream that wait for their reader: at most `limit` and one frame.

    `offset` counts the bytes received since the command began, `lost` those that nobody will see.
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
        """Note that somebody reads: from now on no output is dropped while the command is waited for."""
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
        """Note that somebody waits for the end: output that nobody reads is dropped beyond the buffer.

        `discard` says that a stream which somebody began to read is not read on.
        """
        self._waited = True
        self._abandoned |= discard
        self._drop()

    def abandon(self) -> None:
        """Note that nobody reads on: all output is dropped beyond the buffer."""
        self._abandoned = True
        self._drop()

    def end(self, error: GatewayError | None = None) -> None:
        self.error, self.ended = error, True
        self._changed.set()
        self._drained.set()

    async def room(self) -> None:
        """Return once half of the buffer is free, or the stream has ended."""
        while self._size > self._limit and not self.ended:
            self._drained.clear()
            await self._drained.wait()

    def _drop(self) -> None:
        # nothing reads, and a caller waits for the end: keep the last `limit` bytes
        if self._abandoned or (self._waited and not self._begun):
            while self._size > self._limit:
                dropped = len(self._chunks.popleft())
                self._size -= dropped
                self.lost += dropped
            self._drained.set()


class Output:
    """One output stream of a command, as an async iterator of bytes.

    At most a buffer of bytes waits here, and one frame; then the connection is not read until half of them
    are taken, and in time the command itself is held up. `offset` counts the bytes received since the
    command began. `lost` counts those that nobody will see: the gateway dropped them while nobody was
    attached, or `Exec.wait` did here.
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
        """Return the rest of the stream. Unbounded: for output known to be small."""
        return b"".join([chunk async for chunk in self])
