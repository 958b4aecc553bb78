"""The output streams of one command, and their readers.

One task per stream reads the process into a `Stream`; readers are `Cursor`s on it. While anyone is attached,
that task stops when the slowest cursor is more than the window behind, so that the process is held back and
nothing is lost. Output that the runtime cannot leave unread for long is still taken in from time to time, up
to the lag allowed for a viewer. A viewer that stops reading while others go on is left behind after a while
and told how much it has missed. With nobody attached the tail drops its oldest bytes, and the next attachment
is told how many.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gateway.limits.budget import Share
from gateway.runtime import Holding, Process, StreamName

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


_SEQUENCE: Final = 3  # most bytes of an incomplete UTF-8 sequence
_LITTLE: Final = 64 << 10  # bytes kept of a stream while its tenant's share is full


@dataclass(frozen=True, slots=True)
class Pace:
    """How far readers may fall behind a command.

    A reader more than `window` bytes behind holds the command back. If others read on, a viewer does so for
    at most `patience` seconds; after that up to `lag` bytes are kept for it. For a reader that acknowledges,
    up to `unacked` sent bytes are kept until they are acknowledged.
    """

    window: int
    patience: float
    lag: int
    unacked: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reader wants the output.

    A `viewer` may be left behind. With `acks` the reader acknowledges what has arrived; with a `window` it is
    sent at most that many bytes beyond its last acknowledgement. With `text` no UTF-8 sequence is split whose
    rest may still come.
    """

    viewer: bool = False
    acks: bool = False
    window: int | None = None
    text: bool = False


class Stream:
    """One output stream of a command: its tail and the cursors on it.

    Kept bytes count towards the tenant's `share`. If that is full, only a little is kept: bytes not yet sent
    to a reader, but none that were sent and might be requested again. `room` returns whether it has room for
    so many bytes, and may make some.
    """

    def __init__(
        self, name: StreamName, tail: int, pace: Pace, share: Share, room: Callable[[int], bool] | None = None
    ) -> None:
        self.name: StreamName = name
        self.tail = Tail(tail)
        self._share = share
        self._room = room or (lambda size: share.full(size) is None)
        self._lease = share.reserve()
        self.ended = False
        self.pace = pace
        self.window = max(pace.window, _SEQUENCE)
        self._cursors: set[Cursor] = set()
        self._released = False
        self._progress = asyncio.Event()
        self._draining = False

    def restore(self, start: int, data: bytes) -> None:
        """Load the bytes an earlier process kept, starting at an offset. Call before any attach."""
        self.tail.start = self.tail.end = start
        if data:
            self.tail.append(data, start)
            self._lease.hold(len(data))

    async def pump(self, process: Process) -> None:
        """Read the process until its stream ends, pausing while a reader is too far behind."""
        try:
            while data := await process.read(self.name):
                self._append(data, process.holding)
                relief = asyncio.get_running_loop().time() + process.patience
                while self._slow() and not self._draining:
                    await self._pause(relief)
                    if (now := asyncio.get_running_loop().time()) >= relief:
                        relief = now + process.patience
                        if self._spare() and (data := process.take(self.name)):
                            self._append(data, process.holding)
        finally:
            self.ended = True
            for cursor in self._cursors:
                cursor.wake()

    def _append(self, data: bytes, holding: Holding | None) -> None:
        tight = not self._room(len(data))
        self.tail.append(data, self._floor(tight), _LITTLE if tight else None)
        # output that survives the gateway is kept twice
        held = 0 if holding is None else holding.keep(self.name, self.tail.start)
        self._lease.hold(self.tail.end - self.tail.start + held - self._lease.size)
        for cursor in self._cursors:
            cursor.wake()

    def _spare(self) -> bool:
        """Return whether more may be kept for the readers that hold the command back."""
        most = max((cursor.lag for cursor in self._cursors), default=0)
        return most < self.pace.lag and self._room(READ)

    def attach(self, offset: int, reading: Reading) -> tuple[Cursor, int]:
        """Return a cursor at `offset`, and how many bytes from there have already been dropped."""
        start = min(max(offset, self.tail.start), self.tail.end)
        cursor = Cursor(self, start, reading)
        self._cursors.add(cursor)
        return cursor, max(0, start - offset)

    def detach(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        if self._released and not self._cursors:
            self._lease.release()
        self.progress()

    def progress(self) -> None:
        """Make the reader task check again which cursors have caught up."""
        self._progress.set()

    def drain(self) -> None:
        """Stop waiting for readers: the command is gone, and its end is reported once all output is read.

        Little output is left by then; a viewer that does not read loses what exceeds `lag` bytes.
        """
        self._draining = True
        self.progress()

    def let_go(self) -> None:
        """Keep nothing for the next process any more: count the kept bytes only once."""
        self._lease.hold(min(0, self.tail.end - self.tail.start - self._lease.size))

    def release(self) -> None:
        """Stop counting the kept bytes once the last reader has left, who keeps them in memory."""
        self._released = True
        if not self._cursors:
            self._lease.release()

    def bare(self) -> Stream:
        """Return an ended stream with the same offset and no output."""
        bare = Stream(self.name, 0, self.pace, self._share)
        bare.tail.start = bare.tail.end = self.tail.end
        bare.ended = True
        return bare

    def _floor(self, tight: bool) -> int | None:
        """Return the offset from which bytes are still needed, or None if none are."""
        if tight:
            floors = (one.offset for one in self._cursors if not one.behind)
            return min(floors, default=None)
        most = self.tail.end - self.pace.lag
        if self._draining:
            floors = (max(one.floor, most) if one.viewer else one.floor for one in self._cursors)
            return min(floors, default=None)
        if all(cursor.behind for cursor in self._cursors):
            return min((cursor.floor for cursor in self._cursors), default=None)
        return min(max(cursor.floor, most) if cursor.behind else cursor.floor for cursor in self._cursors)

    def _slow(self) -> list[Cursor]:
        """Return the cursors that hold the command back."""
        slow = [cursor for cursor in self._cursors if cursor.lag > self.window]
        return slow if len(slow) == len(self._cursors) else [one for one in slow if not one.behind]

    async def _pause(self, until: float) -> None:
        """Wait for progress until a loop time; leave behind viewers that make none while others keep up."""
        slow, now = self._slow(), asyncio.get_running_loop().time()
        if all(cursor.viewer for cursor in slow) and len(slow) < len(self._cursors):
            for cursor in slow:
                cursor.slow_since = now if cursor.slow_since is None else cursor.slow_since
                cursor.behind = now - cursor.slow_since >= self.pace.patience
            first = min(cursor.slow_since or now for cursor in slow)
            until = min(until, first + self.pace.patience)
        if self._slow():
            self._progress.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until if until < math.inf else None):
                    await self._progress.wait()


class Streams(dict[StreamName, Stream]):
    """All output streams of one command."""

    @property
    def offsets(self) -> dict[str, int]:
        """The bytes of output so far, with those of a stream that the command does not have as 0."""
        return {"stdout": 0, "stderr": 0} | {name: stream.tail.end for name, stream in self.items()}

    @property
    def printed(self) -> int:
        """The bytes of output so far, of all streams."""
        return sum(self.offsets.values())

    @property
    def kept(self) -> int:
        """Bytes of output in memory."""
        return sum(stream.tail.end - stream.tail.start for stream in self.values())

    def restore(self, outputs: Mapping[StreamName, tuple[int, bytes]]) -> None:
        """Load what an earlier process kept: for each stream its offset and its bytes."""
        for name, (start, data) in outputs.items():
            self[name].restore(start, data)

    def end(self) -> None:
        """Mark all as ended, of a command that ended before this process started."""
        for stream in self.values():
            stream.ended = True

    def drain(self) -> None:
        """Stop waiting for readers; see `Stream.drain`."""
        for stream in self.values():
            stream.drain()

    def shed(self) -> None:
        """Keep only the offsets. Only current readers can finish reading."""
        for name, stream in self.items():
            stream.release()
            self[name] = stream.bare()

    def let_go(self) -> None:
        """Keep nothing for the next process of the gateway."""
        for stream in self.values():
            stream.let_go()

    def release(self) -> None:
        """Stop counting the kept bytes; see `Stream.release`."""
        for stream in self.values():
            stream.release()


class Cursor:
    """One reader's position in a stream. `offset` counts bytes delivered, not merely returned by `next`.

    `floor` is where it may have to resume: bytes sent from there are not known to have arrived.
    `lost` counts the bytes before `offset` that it never got because it was left `behind`.
    """

    def __init__(self, stream: Stream, offset: int, reading: Reading) -> None:
        self.stream = stream
        self.offset = offset
        self.viewer = reading.viewer
        self.behind = False
        self.slow_since: float | None = None
        self.lost = 0
        self._acked = offset
        self._unacked = stream.pace.unacked if reading.acks else 0
        self._window = reading.window
        self._text = reading.text
        self._wake = asyncio.Event()
        self._detached = False

    def detach(self) -> None:
        """Stop reading, and stop holding the command back. Idempotent."""
        self._detached = True
        self.stream.detach(self)
        self.wake()

    def wake(self) -> None:
        self._wake.set()

    async def next(self) -> list[bytes]:
        """Wait for the next bytes and return them in parts, [] at the end. Call `taken` once delivered."""
        while not self._detached:
            room = READ if self._window is None else self._window - (self.offset - self._acked)
            if room > 0:
                if parts := self._read(min(room, READ)):
                    return parts
                if self.stream.ended:
                    break
            self._wake.clear()
            await self._wake.wait()
        return []

    def _read(self, most: int) -> list[bytes]:
        tail, ended = self.stream.tail, self.stream.ended
        if self.offset < tail.start:
            self.lost += tail.start - self.offset
            self.offset = tail.start
        parts = tail.read(self.offset, most)
        if self._window is not None and parts:
            parts[0] = parts[0][:most]
        end = self.offset + sum(map(len, parts))
        if not self._text or (ended and end == tail.end):
            return parts
        if found := whole(parts):
            return found
        rest = b"".join(tail.read(end, _SEQUENCE))[:_SEQUENCE]
        return whole([*parts, rest]) if rest else []

    @property
    def lag(self) -> int:
        return self.stream.tail.end - self.offset

    @property
    def floor(self) -> int:
        return max(self._acked, self.offset - self._unacked)

    def ack(self, offset: int) -> None:
        """Record that everything before `offset` has arrived."""
        self._acked = max(self._acked, min(offset, self.offset))
        self.wake()

    def taken(self, parts: list[bytes]) -> None:
        self.offset += sum(map(len, parts))
        if self.lag <= self.stream.window:
            self.behind, self.slow_since = False, None
        self.stream.progress()


def whole(parts: list[bytes]) -> list[bytes]:
    """Return `parts` without an incomplete UTF-8 sequence at the end; invalid UTF-8 is kept."""
    last = b"".join(parts[-_SEQUENCE:])[-_SEQUENCE:]
    held = len(last) - codecs.utf_8_decode(last, "replace", False)[1]
    parts = list(parts)
    while held:
        part = parts.pop()
        if len(part) > held:
            parts.append(part[:-held])
        held = max(0, held - len(part))
    return parts
