"""Queue of a command's standard input: first in memory, then on disk, both bounded.

The gateway must keep reading a websocket even if one command does not read its input, because a cancel may
follow. A client that respects its window never exceeds the memory queue. Otherwise each piece is delayed
briefly, and what the command has not read by then goes to an unnamed file. The client is made to wait only
when that file is full too.
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
from gateway.limits.budget import SMALL, Share
from gateway.runtime import Process

log = logging.getLogger(__name__)

T = TypeVar("T")

_PIECE: Final = 256 * 1024  # bytes written to the command at a time
_PATIENCE: Final = 0.05  # seconds a sender waits for the command to read before the disk is used


class Sender(Protocol):
    """A sender of input, which is told what happened to its bytes."""

    closed: bool
    slot: int  # in the accounts

    def took(self, size: int) -> None:
        """`size` bytes were accepted."""
        ...

    def passed(self, size: int) -> None:
        """`size` accepted bytes no longer wait: they were written to the command, or dropped."""
        ...


class Spools:
    """Disk space for waiting input: `each` bytes per command, `limit` in all, a quarter of it per tenant."""

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
    """The input of one command, passed from its senders to the process in order of arrival.

    Bytes waiting in memory count towards the tenant's `share`. If that is full, the disk is used earlier.
    """

    def __init__(self, process: Process, limit: int, spools: Spools, share: Share, tenant: str) -> None:
        self._process = process
        self.accounts = Accounts(process.holding)
        self._limit = limit
        self._queue: deque[tuple[bytes, Sender]] = deque()
        self._size = 0
        self._share = share
        self._lease = share.reserve()
        self._spool = _Spool(spools, tenant, self._drop)
        self._ending = False
        self._over = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()  # lets one sender at a time in

    @property
    def waiting(self) -> int:
        """Bytes the process has not accepted yet."""
        return self._size + self._spool.size

    async def put(self, data: bytes, by: Sender) -> None:
        """Queue bytes, waiting for room. Dropped if the input, the command or the sender has ended."""
        async with self._turn:
            if self._full and not self._spool.size:
                self._room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE):
                        await self._room.wait()
            while not (self._ending or self._over or by.closed):
                self._room.clear()  # before the disk is tried: room may come meanwhile
                if not self._full and not self._spool.size:
                    self._queue.append((data, by))
                    self._holds(len(data))
                elif not await self._spool.put(data, by):
                    await self._room.wait()
                    continue
                by.took(len(data))
                self._wake.set()
                if self._over:  # the command ended during the write to disk
                    self.discard()
                return

    def end(self) -> None:
        """Close stdin once everything queued is written. Idempotent."""
        self._ending = True
        self._wake.set()
        self._room.set()

    def discard(self) -> None:
        """Drop everything that waits, as a terminal does on Ctrl-C."""
        for data, by in self._queue:
            self._holds(-len(data))
            self._drop(len(data), by)
        self._queue.clear()
        self._spool.clear()
        self._room.set()

    async def run(self) -> None:
        """Write everything to the process, then close its stdin."""
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
        # even with the share full, one piece may wait in memory: the command is ready for it
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
    """A ring buffer in an unnamed file that exists only while needed. One `put` and one `get` at a time."""

    def __init__(self, spools: Spools, tenant: str, drop: Callable[[int, Sender], None]) -> None:
        self._drop = drop
        self._spools = spools
        self._tenant = tenant
        self._file: IO[bytes] | None = None
        self._parts: deque[tuple[int, Sender]] = deque()
        self._start = 0
        self._end = 0
        self._broken = False
        self._busy = 0  # threads using the file

    @property
    def size(self) -> int:
        return self._end - self._start

    async def put(self, data: bytes, by: Sender) -> bool:
        """Store `data`; return False if there is no room for it now."""
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
            log.warning("cannot store input on disk: %s", error)  # its sender waits instead
            self._broken = True
        finally:
            if not kept:
                self._spools.give(size, self._tenant)
            self._tidy()
        return kept

    async def get(self, limit: int) -> tuple[bytes, Sender]:
        """Remove and return the next bytes of one sender, at most `limit`. Must not be empty."""
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
        """Drop everything."""
        for size, by in self._parts:
            self._drop(size, by)
        self._parts.clear()
        self._spools.give(self.size, self._tenant)
        self._start = self._end
        self._tidy()

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run file work in a thread. A cancelled caller still waits, so that no thread is left behind."""
        self._busy += 1
        task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        try:
            return await asyncio.shield(task)
        finally:
            # only while not done: a cancel arriving during the wait would otherwise leave the file busy
            # forever
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
