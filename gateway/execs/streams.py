"""The output streams of one command, and their readers.

Output flows from the process into a `Stream`, with one reader task each; readers are `Cursor`s on it. While
anyone is attached, the reader task stops when the slowest cursor is more than the window behind, so that the
process itself is held back and nothing is lost. Output that must not be left on its way for long is taken in
now and then all the same, up to the lag that a viewer may have. A viewer that stops reading while another
reads on is left behind after a moment, and told what it has missed. With nobody attached the tail drops its
oldest bytes, and the next attachment is told how many.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import math
from dataclasses import dataclass
from typing import Final

from gateway.execs.tail import READ, Tail
from gateway.limits.budget import Lease, Share
from gateway.runtime import Holding, Process, StreamName

_SEQUENCE: Final = 3  # bytes at most of a UTF-8 sequence that is not complete
_LITTLE: Final = 64 << 10  # bytes kept of a stream where its tenant's share is full


@dataclass(frozen=True, slots=True)
class Pace:
    """How far a command and its readers may be apart.

    A reader may be `window` bytes behind. One that is further behind holds the command back; a viewer does so
    for `patience` seconds only if others read on, and then up to `lag` bytes are kept for it. Up to `unacked`
    sent bytes are kept until they are acknowledged, for a reader that acknowledges.
    """

    window: int
    patience: float
    lag: int
    unacked: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How one reader wants the output.

    A `viewer` can be left behind. `acks` says that it acknowledges what has arrived; with a `window` it is
    sent at most so many bytes beyond that. A reader of `text` gets no incomplete UTF-8 sequence whose rest
    may still come.
    """

    viewer: bool = False
    acks: bool = False
    window: int | None = None
    text: bool = False


class Stream:
    """One output stream of a command: its tail and the cursors on it.

    What it keeps is in a `share` of its tenant. Where that is full it keeps a little: what a reader has not
    been sent, and not what was sent and may be asked for again.
    """

    def __init__(self, name: StreamName, tail: int, pace: Pace, share: Share) -> None:
        self.name: StreamName = name
        self.tail = Tail(tail)
        self._share = share
        self._lease = Lease(share)
        self.ended = False
        self.pace = pace
        self.window = max(pace.window, _SEQUENCE)
        self._cursors: set[Cursor] = set()
        self._progress = asyncio.Event()
        self._draining = False

    def restore(self, start: int, data: bytes) -> None:
        """Have what an earlier process kept, from an offset on; before anybody is attached."""
        self.tail.start = self.tail.end = start
        if data:
            self.tail.append(data, start)
            self._lease.hold(len(data))

    async def pump(self, process: Process) -> None:
        """Read the process until its stream ends; stop while a cursor that counts lags too far."""
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
        tight = self._share.full(len(data)) is not None
        self.tail.append(data, self._floor(tight), _LITTLE if tight else None)
        # what outlives the gateway is kept twice
        held = 0 if holding is None else holding.keep(self.name, self.tail.start)
        self._lease.hold(self.tail.end - self.tail.start + held - self._lease.size)
        for cursor in self._cursors:
            cursor.wake()

    def _spare(self) -> bool:
        """Whether more may be kept for those that the command waits for."""
        most = max((cursor.lag for cursor in self._cursors), default=0)
        return most < self.pace.lag and self._share.full(READ) is None

    def attach(self, offset: int, reading: Reading) -> tuple[Cursor, int]:
        """Return a cursor from `offset` on, and how many bytes from there are no longer kept."""
        start = min(max(offset, self.tail.start), self.tail.end)
        cursor = Cursor(self, start, reading)
        self._cursors.add(cursor)
        return cursor, max(0, start - offset)

    def detach(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        self.progress()

    def progress(self) -> None:
        """Have the reader task check again which cursors have caught up."""
        self._progress.set()

    def drain(self) -> None:
        """Wait for no reader from now on: nothing writes any more, and the end can be told once all is read.

        What is still on its way is small; of more than `lag` bytes a viewer that stands still loses some.
        """
        self._draining = True
        self.progress()

    def release(self) -> None:
        """Stop counting what is kept: it goes with its last reader."""
        self._lease.end()

    def _floor(self, tight: bool) -> int | None:
        """Return from where on something is still wanted, by those that are not left behind at least."""
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
        """Return the cursors that the command waits for."""
        slow = [cursor for cursor in self._cursors if cursor.lag > self.window]
        return slow if len(slow) == len(self._cursors) else [one for one in slow if not one.behind]

    async def _pause(self, until: float) -> None:
        """Wait for progress; leave behind a viewer that makes none while others have read all."""
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


class Cursor:
    """One reader's place in a stream. `offset` is what it has taken over, not what it has looked at.

    `floor` is what it may come back to: of what was sent, the part that is not known to have arrived.
    `lost` counts the bytes in front of `offset` that it never got, because it was left `behind`.
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
        """Read no further, and hold the command back no more. Idempotent."""
        self._detached = True
        self.stream.detach(self)
        self.wake()

    def wake(self) -> None:
        self._wake.set()

    async def next(self) -> list[bytes]:
        """Return the next bytes in parts, none after the stream's last. Call `taken` once delivered."""
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
        """Take note that everything before `offset` has arrived."""
        self._acked = max(self._acked, min(offset, self.offset))
        self.wake()

    def taken(self, parts: list[bytes]) -> None:
        self.offset += sum(map(len, parts))
        if self.lag <= self.stream.window:
            self.behind, self.slow_since = False, None
        self.stream.progress()


def whole(parts: list[bytes]) -> list[bytes]:
    """Return `parts` without the UTF-8 sequence that they end in the middle of; what is not UTF-8 stays."""
    last = b"".join(parts[-_SEQUENCE:])[-_SEQUENCE:]
    held = len(last) - codecs.utf_8_decode(last, "replace", False)[1]
    parts = list(parts)
    while held:
        part = parts.pop()
        if len(part) > held:
            parts.append(part[:-held])
        held = max(0, held - len(part))
    return parts
