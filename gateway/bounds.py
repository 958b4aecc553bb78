"""Bounded reads of what others can make large or slow: a part of it, within a time, off the event loop.

`first` and `LineSplitter` are for streams: they keep a part and drop the rest. `paced` ends one that is too
slow. `part` is for files of the kernel whose length a tenant controls. `run_in_thread` is for work that takes
more than a moment, or waits for the kernel: it has a deadline, and each tenant has few threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from gateway.admission import Admission

P = ParamSpec("P")
T = TypeVar("T")

LEAST_RATE: Final = 1 << 10  # bytes a second of a client's body, or it would hold a connection forever

_THREADS: Final = 16
_SHARE: Final = 2  # threads for one tenant
_WAITING: Final = 4096  # that wait for a thread

# separate from asyncio's: work that waits for the kernel beyond its deadline still occupies its thread
_threads: Final = ThreadPoolExecutor(_THREADS, thread_name_prefix="aside")
# of each loop, since what it still waits for at its end is nobody's any more
_shares: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Admission[object]]] = WeakKeyDictionary()


class Flood(Exception):
    """More data came than may be read."""


async def first(read: Callable[[], Awaitable[bytes]], limit: int, *, most: int | None = None) -> bytes:
    """Read to the end; return the first `limit` bytes, drop the rest. Raises `Flood` over `most` in all."""
    kept, size = bytearray(), 0
    while piece := await read():
        size += len(piece)
        if len(kept) < limit:
            kept += piece[: limit - len(kept)]
        if most is not None and size > most:
            raise Flood
    return bytes(kept)


async def paced(stream: AsyncIterator[bytes], patience: float) -> AsyncIterator[bytes]:
    """Yield a client's stream. Raises `TimeoutError` if it is too slow.

    That is if nothing comes for `patience` seconds, or less than `LEAST_RATE` in so many of waiting for it.
    """
    loop = asyncio.get_running_loop()
    waited, came = 0.0, 0
    while True:
        began = loop.time()
        try:
            async with asyncio.timeout(patience):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        waited += loop.time() - began
        came += len(piece)
        if waited > patience:
            if came < waited * LEAST_RATE:
                raise TimeoutError
            waited, came = 0.0, 0
        yield piece


class LineSplitter:
    """Splits a stream into lines, at most `most`, each cut to `length` bytes; also keeps its end.

    The cost of a piece depends on the part that is kept, not on how many lines it has.
    """

    def __init__(self, most: int, *, length: int, tail: int) -> None:
        self._left = most
        self._length = length
        self._size = tail
        self._tail = b""
        self._cut = False  # whether the tail begins somewhere within the stream
        self._rest = b""

    def feed(self, piece: bytes) -> list[str]:
        """Return the lines completed by this data."""
        if len(self._tail) + len(piece) > self._size:
            self._tail, self._cut = (self._tail + piece[-self._size :])[-self._size :], True
        else:
            self._tail += piece
        if not self._left:
            return []
        *whole, rest = (self._rest + piece).split(b"\n", self._left)
        self._left -= len(whole)
        self._rest = rest[: self._length] if self._left else b""
        return [self._text(line) for line in whole]

    def end(self) -> list[str]:
        """Return the last line if it is incomplete."""
        rest, self._rest = self._rest, b""
        return [self._text(rest)] if rest else []

    @property
    def tail(self) -> str:
        """The last bytes of the stream, from the beginning of a line if one begins among them."""
        _, line_end, after = self._tail.partition(b"\n") if self._cut else (b"", b"", b"")
        return (after if line_end and after else self._tail).decode("utf-8", "replace")

    def _text(self, line: bytes) -> str:
        return line[: self._length].decode("utf-8", "replace")


def part(path: str | Path, limit: int) -> bytes:
    """Return the first `limit` bytes of a file. Raises `OSError`."""
    with Path(path).open("rb", buffering=0) as file:
        pieces, left = [], limit
        while left > 0 and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)


async def run_in_thread(
    of: object, seconds: float, work: Callable[P, T], *given: P.args, **more: P.kwargs
) -> T:
    """Return what `work` returns in a separate thread. Raises `TimeoutError` after `seconds`.

    `of` names the tenant that the work is for. Each has a share of the threads, and its work waits in turn;
    raises `RateLimited` if far too much waits.
    Work that is late keeps running to its end, so it must be bounded and change nothing.
    """
    loop = asyncio.get_running_loop()
    threads = _shares.get(loop)
    if threads is None:
        threads = _shares[loop] = Admission("threads", each=_SHARE, total=_THREADS, waiting=_WAITING)
    async with asyncio.timeout(seconds):
        thread = await threads.acquire(of)
        working = loop.run_in_executor(_threads, lambda: work(*given, **more))

        def over(ended: asyncio.Future[T]) -> None:
            thread.release()  # only now, even if the caller is gone: the thread was busy until here
            if not ended.cancelled():
                ended.exception()  # retrieved, or asyncio would log it

        working.add_done_callback(over)
        return await asyncio.shield(working)
