"""What waits for a command's standard input: in memory, then on disk, each within a limit.

A websocket must be read even if one command does not read its input: a cancel may come behind the bytes. A
client that keeps to its window never has more here than fits into memory. One that does not is delayed for a
moment at each piece, and what its command has not read by then goes to a file without a name. Only when that
is full too does the client wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypeVar

from gateway.execs.accounts import Accounts
from gateway.limits.budget import SMALL, Lease, Share
from gateway.runtime import Process

log = logging.getLogger(__name__)

T = TypeVar("T")

_PIECE: Final = 256 * 1024  # bytes given to the command at a time
_PATIENCE: Final = 0.05  # seconds that a sender waits for a command that reads, before the disk is used


class Sender(Protocol):
    """A sender of input; it hears what became of it."""

    closed: bool
    slot: int  # of its accounts

    def took(self, size: int) -> None:
        """So many bytes were taken over."""
        ...

    def passed(self, size: int) -> None:
        """So many of them are no longer waiting: given to the command, or dropped with it."""
        ...


class Spools:
    """The disk that waiting input may take: `each` bytes of one command, `limit` of all.

    A tenant may have a quarter of that.
    """

    def __init__(self, folder: Path, each: int, limit: int) -> None:
        self.folder = folder
        self.each = each
        self._free = limit
        self._most = max(each, limit // 4)
        self._taken: Counter[str] = Counter()

    def take(self, size: int, tenant: str) -> bool:
        if size > self._free or self._taken[tenant] + size > self._most:
            return False
        self._free -= size
        self._taken[tenant] += size
        return True

    def give(self, size: int, tenant: str) -> None:
        self._free += size
        self._taken[tenant] -= size
        if not self._taken[tenant]:
            del self._taken[tenant]


class Input:
    """The input of one command, from its senders to the process, in the order in which it came.

    What waits in memory is in a `share` of the tenant. Where that is full the disk is used sooner.
    """

    def __init__(self, process: Process, limit: int, spools: Spools, share: Share, tenant: str) -> None:
        self._process = process
        self.accounts = Accounts(process.holding)
        self._limit = limit
        self._queue: deque[tuple[bytes, Sender]] = deque()
        self._size = 0
        self._share = share
        self._lease = Lease(share)
        self._spool = _Spool(spools, tenant, self._drop)
        self._ending = False
        self._over = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()  # of senders

    @property
    def waiting(self) -> int:
        """How many bytes the process has not taken."""
        return self._size + self._spool.size

    async def put(self, data: bytes, by: Sender) -> None:
        """Take bytes over. They are dropped where the input, the command or the sender has ended."""
        async with self._turn:
            if self._full and not self._spool.size:
                self._room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE):
                        await self._room.wait()
            while not (self._ending or self._over or by.closed):
                if not self._full and not self._spool.size:
                    self._queue.append((data, by))
                    self._holds(len(data))
                elif not await self._spool.put(data, by):
                    self._room.clear()
                    await self._room.wait()
                    continue
                by.took(len(data))
                self._wake.set()
                if self._over:  # it ended while the disk was written
                    self.discard()
                return

    def end(self) -> None:
        """End the input after what was taken over. Idempotent."""
        self._ending = True
        self._wake.set()
        self._room.set()

    def discard(self) -> None:
        """Forget what waits, as a terminal does at Ctrl-C."""
        for data, by in self._queue:
            self._holds(-len(data))
            self._drop(len(data), by)
        self._queue.clear()
        self._spool.clear()
        self._room.set()

    async def run(self) -> None:
        """Give everything to the process, then its end."""
        try:
            while True:
                while self._queue:
                    await self._give(*self._queue.popleft())
                if self._spool.size:
                    data, by = await self._spool.get(_PIECE)
                    self._holds(len(data))
                    await self._give(data, by)
                elif self._ending:
                    await self._process.close_stdin()
                    self.accounts.settle()
                    return
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self._over = True
            self.discard()

    @property
    def _full(self) -> bool:
        # with nothing in memory the command waits for more, and gets it
        return self._size >= self._limit or (self._size > 0 and self._share.full(SMALL) is not None)

    def _holds(self, size: int) -> None:
        self._size += size
        self._lease.hold(size)

    async def _give(self, data: bytes, by: Sender) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self.accounts.gives(by.slot)
            try:
                await self._process.write(piece)
            finally:
                self._holds(-len(piece))
                self.accounts.gave(by.slot, len(piece))
                by.passed(len(piece))
                self._room.set()

    def _drop(self, size: int, by: Sender) -> None:
        self.accounts.dropped(by.slot, size)
        by.passed(size)


class _Spool:
    """A ring in a nameless file. One puts and one gets at a time; the file is there only while needed."""

    def __init__(self, spools: Spools, tenant: str, drop: Callable[[int, Sender], None]) -> None:
        self._drop = drop
        self._spools = spools
        self._tenant = tenant
        self._file: IO[bytes] | None = None
        self._parts: deque[tuple[int, Sender]] = deque()
        self._start = 0
        self._end = 0
        self._broken = False
        self._busy = 0  # threads at the file

    @property
    def size(self) -> int:
        return self._end - self._start

    async def put(self, data: bytes, by: Sender) -> bool:
        """Keep `data`; False if there is no room for it now."""
        size = len(data)
        if self._broken or self.size + size > self._spools.each or not self._spools.take(size, self._tenant):
            return False
        kept = False
        try:
            await self._apart(self._write, data, self._end)
            self._end += size
            self._parts.append((size, by))
            kept = True
        except OSError as error:
            log.warning("input cannot be kept on disk: %s", error)  # its sender waits instead
            self._broken = True
        finally:
            if not kept:
                self._spools.give(size, self._tenant)
            self._tidy()
        return kept

    async def get(self, limit: int) -> tuple[bytes, Sender]:
        """Take the next bytes of one sender, `limit` at most. Call it only where there are some."""
        size, by = self._parts[0]
        start, size = self._start, min(size, limit)
        try:
            data = await self._apart(self._read, start, size)
        finally:
            self._tidy()
        if self._start != start:
            return b"", by  # cleared meanwhile
        left = self._parts.popleft()[0] - size
        if left:
            self._parts.appendleft((left, by))
        self._start += size
        self._spools.give(size, self._tenant)
        self._tidy()
        return data, by

    def clear(self) -> None:
        """Forget everything."""
        for size, by in self._parts:
            self._drop(size, by)
        self._parts.clear()
        self._spools.give(self.size, self._tenant)
        self._start = self._end
        self._tidy()

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do work on the file in a thread; a cancelled caller waits for it, so that none is left behind."""
        self._busy += 1
        task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        try:
            return await asyncio.shield(task)
        finally:
            # not where it is done: a cancel that comes during the wait would leave the file busy forever
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            self._busy -= 1

    def _tidy(self) -> None:
        if self._file is not None and not self._busy and not self._parts:
            self._file.close()
            self._file = None

    def _write(self, data: bytes, at: int) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._spools.folder, buffering=0)  # noqa: SIM115 - `_tidy`
        place = at % self._spools.each
        first = min(len(data), self._spools.each - place)
        for part, offset in ((data[:first], place), (data[first:], 0)):
            view = memoryview(part)
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[written:], offset + written

    def _read(self, at: int, size: int) -> bytes:
        assert self._file is not None
        place = at % self._spools.each
        first = min(size, self._spools.each - place)
        found = os.pread(self._file.fileno(), first, place)
        return found + os.pread(self._file.fileno(), size - first, 0) if size > first else found
