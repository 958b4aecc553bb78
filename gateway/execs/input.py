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
import struct
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypeVar

from gateway.errors import GatewayError
from gateway.limits.budget import SMALL, Share
from gateway.runtime import Holding, Process, Pty


class _SenderPlace(Protocol):
    """A sender's place, as far as it counts here."""

    slot: int
    taken: int
    consumed: int
    closed: bool


class PendingEof:
    """Whether the input is to end, and how many bytes each slot of its accounts must have before that."""

    def __init__(self) -> None:
        self._closing = False
        self._sizes: dict[int, int] = {}

    def close(self) -> None:
        """Have the input end after what was taken over."""
        self._closing, self._sizes = True, {}

    def facts(self, places: Iterable[_SenderPlace]) -> list[list[int]] | None:
        """Return what another process needs: waiting input may have to be sent again. None without an end."""
        if not self._closing:
            return None
        waits = {place.slot: place.taken for place in places if place.taken > place.consumed}
        return [list(one) for one in (waits | self._sizes).items()]

    def take_over(self, owed: Iterable[Sequence[int]], passed: Sequence[int]) -> None:
        """Continue from an earlier process's facts; `passed` is how far each slot has come."""
        self._closing = True
        self._sizes = {slot: size for slot, size in owed if passed[slot] < size}

    def due(self, places: Iterable[_SenderPlace]) -> bool:
        """Return whether the input is to end now."""
        if not self._closing:
            return False
        taken = {place.slot: place.taken for place in places if not place.closed}
        self._sizes = {slot: size for slot, size in self._sizes.items() if taken.get(slot, size) < size}
        return not self._sizes


SLOTS: Final = 64  # senders that are accounted for separately
# current sender, bytes accounted for in total, bytes settled per sender
_ACCOUNTS: Final = struct.Struct(f"<QQ{SLOTS}Q")


class Accounts:
    """The accounts of one command's input. Without a `holding` they are lost with this process.

    The runtime counts all bytes written to the command. Bytes not accounted for yet belong to the last
    sender.
    """

    def __init__(self, holding: Holding | None) -> None:
        self._holding = holding
        self._giver = 0
        self._settled = 0 if holding is None else holding.position
        self.passed = [0] * SLOTS

    def take_over(self) -> None:
        """Continue from the accounts of an earlier process."""
        assert self._holding is not None
        self._giver, settled, *self.passed = _ACCOUNTS.unpack_from(self._holding.accounts())
        self.passed[self._giver] += max(0, self._holding.position - settled)
        self.settle()

    def open(self, slot: int) -> None:
        """Reset a slot for a new sender."""
        self.passed[slot] = 0
        self._note()

    def gives(self, slot: int) -> None:
        """Record which sender the next bytes come from."""
        if slot != self._giver:
            self._giver = slot
            self._note()

    def gave(self, slot: int, size: int) -> None:
        """Record that `size` bytes of a sender were written."""
        self.passed[slot] += size
        self._settled += size
        self._note()

    def dropped(self, slot: int, size: int) -> None:
        """Record that `size` bytes of a sender were discarded."""
        self.passed[slot] += size
        self._note()

    def other(self, size: int) -> None:
        """Record that `size` bytes were written that came from no sender."""
        self._settled += size
        self._note()

    def settle(self) -> None:
        """Count everything written so far as accounted for."""
        if self._holding is not None:
            self._settled = self._holding.position
        self._note()

    def _note(self) -> None:
        if self._holding is not None:
            self._holding.account(_ACCOUNTS.pack(self._giver, self._settled, *self.passed))


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


class StdinQueue:
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


_CTRL_C: Final = b"\x03"
_TAKES: Final = 0.05  # seconds in which a terminal accepts a byte, if it accepts any
_SEES: Final = 0.15  # seconds in which a program notices that its terminal was resized


class PtyControl:
    """Control of a command's terminal. A command without one only has its input. Close it at the end.

    `resized` is called after each change of the size.
    """

    def __init__(
        self,
        process: Process,
        input_: StdinQueue,
        size: Pty | None,
        exec_id: str,
        resized: Callable[[], None],
    ) -> None:
        self._process = process
        self._input = input_
        self._size = size
        self._exec_id = exec_id
        self._resized = resized
        self._closed = False
        self._interrupting: asyncio.Task[None] | None = None
        self._redrawing: asyncio.Task[None] | None = None

    async def write(self, data: bytes, by: Sender) -> None:
        """Queue input; see `StdinQueue.put`. A Ctrl-C gets through even to a terminal that accepts no input.

        If the terminal's buffer of some 4 KiB is full, the byte would wait behind everything typed or pasted.
        That input is dropped, as a terminal itself does on Ctrl-C.
        """
        await self._input.put(data, by)
        if data == _CTRL_C and self._size is not None:
            self._interrupting = asyncio.create_task(self._interrupt(), name=f"interrupt {self._exec_id}")

    async def _interrupt(self) -> None:
        await asyncio.sleep(_TAKES)
        if self._input.waiting or self._process.unsent:
            self._input.discard()
            with contextlib.suppress(GatewayError, TimeoutError):
                await self._process.flush()
                await self._process.write(_CTRL_C)
                self._input.accounts.other(len(_CTRL_C))

    async def resize(self, cols: int, rows: int) -> None:
        """Resize the terminal."""
        self._size = Pty(cols, rows)
        await self._process.resize(cols, rows)
        self._resized()

    @property
    def size(self) -> Pty | None:
        return self._size

    def redraw(self) -> None:
        """Make a full-screen program redraw, for a reader that lacks the earlier output."""
        if not (self._size is None or self._closed or self._redrawing):
            self._redrawing = asyncio.create_task(self._redraw(self._size), name=f"redraw {self._exec_id}")

    async def _redraw(self, size: Pty) -> None:
        # a program is signalled only if the size changes, and may miss two changes in quick succession
        try:
            await self._process.resize(size.cols, max(1, size.rows - 1))
            await asyncio.sleep(_SEES)
            assert self._size is not None
            await self._process.resize(self._size.cols, self._size.rows)
        finally:
            self._redrawing = None

    async def close(self) -> None:
        """Cancel pending work. Idempotent."""
        self._closed = True
        tasks = [task for task in (self._interrupting, self._redrawing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
