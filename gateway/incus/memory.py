"""The memory of one command that survives the gateway: its latest output as received, and small records.

Everything is in one memfd. Whoever holds its descriptor sees the last committed state, no matter at which
instruction the writer was killed: each record has two copies and a word that selects the valid one. A commit
writes the other copy and then changes the word in one aligned store.

The kernel receives output directly into this memory (`Log.room`), and keeps count of it even if the reader is
killed: for a unix socket with SO_PEEK_OFF (socket(7)), every receive subtracts the received bytes from that
offset in the same system call. Set to a large number, it serves as an odometer that belongs to the socket.

A header of records is followed by segments. The file is sparse: a command costs only the pages it touches.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import orjson

# The smallest size that does not slow a fast stream; up to six per output exceed what is kept of it.
SEGMENT: Final = 128 << 10
SEGMENTS: Final = 1600  # per command: more than its kept output needs with any sensible settings

_FACTS: Final = 48 << 10
_LOG: Final = 4096
_PLACE: Final = 64
_ACCOUNTS: Final = 1024
_PURPOSE: Final = 4096
_AREAS: Final = {
    **{"first": _LOG, "second": _LOG, "place": _PLACE},
    **{"accounts": _ACCOUNTS, "facts": _FACTS, "purpose": _PURPOSE},
}
_HEAD: Final = 128 << 10
_SIZE: Final = _HEAD + SEGMENTS * SEGMENT

SO_PEEK_OFF: Final = 42
_ODOMETER: Final = 0x7FFF_0000
_TURN: Final = 0x3FFF_0000  # bytes after which the odometer is reset
_SPARE: Final = 8  # most free segments that keep their pages
_AHEAD: Final = 2  # segments that a long output takes, and gives back, at a time
_READ: Final = 256 << 10  # bytes for one read of a long output: with more `incus.socket` would have to pause
_STEP: Final = 64 << 10  # least bytes between two remembered frame positions of a log

Facts = Literal["facts", "purpose"]
"""Two kinds: of the command itself, and of what it is for, which change more often."""


class MemoryFull(Exception):
    """The memory has no room left."""


class ExecMemory:
    """The memory of one command: `made` creates one, the constructor opens an existing descriptor."""

    def __init__(self, descriptor: int) -> None:
        """Take ownership of `descriptor`. Raises `ValueError`, and closes it, if it is no such memory."""
        self.descriptor = descriptor
        if os.fstat(descriptor).st_size != _SIZE:
            os.close(descriptor)
            raise ValueError("not a command's memory of this version")
        # Python's own duplicate of the descriptor would be one more of each command
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        self._map = mmap.mmap(descriptor, _SIZE, **options)
        self.view = memoryview(self._map)
        self._free: list[int] = []  # segments that were used before and still have pages
        self._bare: list[int] = []  # that have none any more
        self._fresh = 0  # from here on none was used, but for what was claimed
        self._claimed: set[int] = set()
        self.closed = False

    @classmethod
    def made(cls) -> ExecMemory:
        descriptor = os.memfd_create("command", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def reopened(self) -> ExecMemory:
        """Close it and return it as another process would open it, with nothing claimed yet."""
        again = ExecMemory(os.dup(self.descriptor))
        self.close()
        return again

    def take(self, after: int | None = None) -> int:
        """Return the number of a free segment: if it can be had with pages, the one that follows `after`.

        Else of used ones the one that was freed first. Raises `MemoryFull`.
        """
        if after is not None and after + 1 in self._free:
            self._free.remove(after + 1)
            return after + 1
        if used := self._free or self._bare:
            return used.pop(0)
        while self._fresh in self._claimed:
            self._fresh += 1
        if self._fresh == SEGMENTS - 1:  # the last is `beginning`
            raise MemoryFull
        self._fresh += 1
        return self._fresh - 1

    def claim(self, number: int) -> None:
        """Take over a segment that an earlier process used, before any is taken. Raises `ValueError`."""
        if number in self._claimed or not 0 <= number < SEGMENTS - 1:
            raise ValueError("not a free segment")
        self._claimed.add(number)

    @property
    def spare(self) -> int:
        """The number of free segments that keep their pages."""
        return len(self._free)

    def give(self, numbers: Sequence[int], spare: int) -> None:
        """Free segments, of which `spare` keep their pages for the next output."""
        self._free += numbers
        while len(self._free) > spare:
            number = self._free.pop()
            self._map.madvise(mmap.MADV_REMOVE, _HEAD + number * SEGMENT, SEGMENT)
            self._bare.append(number)

    def segment(self, number: int) -> memoryview:
        return self.part(number * SEGMENT, (number + 1) * SEGMENT)

    def part(self, start: int, end: int) -> memoryview:
        """Return a part of all segments, by offsets from the first one's start."""
        return self.view[_HEAD + start : _HEAD + end]

    @property
    def beginning(self) -> memoryview:
        """Memory for the first bytes of an output, for use when the log no longer has them."""
        return self.segment(SEGMENTS - 1)

    def prepare(self) -> None:
        """Have the kernel give the pages of the records now, since a command's start is delayed by each."""
        for area in ("place", "accounts", "facts"):
            self.record(area).touch()

    @property
    def noted(self) -> bool:
        """Whether facts were ever written."""
        return self.record("facts").written

    def read_facts(self, area: Facts = "facts") -> dict[str, object]:
        """Return what `write_facts` last wrote. Raises `ValueError`."""
        record = self.record(area)
        (size,) = struct.unpack("<I", record.read(4))
        found = orjson.loads(record.read(4 + min(size, _AREAS[area] - 4))[4:])
        if not isinstance(found, dict):
            raise ValueError("the facts are not an object")
        return found

    def write_facts(self, facts: Mapping[str, object], area: Facts = "facts") -> None:
        """Store facts. Raises `MemoryFull` if they are too large."""
        data = orjson.dumps(facts)
        if len(data) > _AREAS[area] - 4:
            raise MemoryFull
        self.record(area).write(struct.pack("<I", len(data)) + data)

    def record(self, area: str) -> MemoryRecord:
        start = 0
        for name, size in _AREAS.items():
            if name == area:
                return MemoryRecord(self.view, start, size)
            start += 64 + 2 * size
        raise KeyError(area)

    def close(self) -> None:
        """Close it; its pages stay while others hold the descriptor. Idempotent."""
        if not self.closed:
            self.closed = True
            os.close(self.descriptor)
            with contextlib.suppress(BufferError):  # views still in use are freed with their last user
                self.view.release()
                self._map.close()


class MemoryRecord:
    """Two copies of a state and a word that selects the valid one."""

    def __init__(self, view: memoryview, start: int, size: int) -> None:
        self._view = view
        self._start = start
        self._size = size

    def read(self, size: int | None = None) -> bytes:
        """Return the state, or its first bytes: the kernel allocates each page that is read."""
        at = self._at(self._word)
        return bytes(self._view[at : at + (self._size if size is None else size)])

    def touch(self) -> None:
        for word in (0, 1):
            self._view[self._at(word)] |= 0

    @property
    def written(self) -> bool:
        return self._word > 0

    def write(self, state: bytes) -> None:
        word = self._word
        at = self._at(word + 1)
        self._view[at : at + len(state)] = state
        struct.pack_into("@Q", self._view, self._start, word + 1)

    @property
    def _word(self) -> int:
        return int(struct.unpack_from("@Q", self._view, self._start)[0])

    def _at(self, word: int) -> int:
        return self._start + 64 + (word & 1) * self._size


class Odometer:
    """Counts the bytes received from a socket, by any process."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, _ODOMETER)

    def read(self) -> int:
        """Return how many bytes were received since the last `reset`."""
        left: int = self._socket.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        return _ODOMETER - left


# raw offsets of the first segment, of the odometer's zero, and of its next zero during a reset; the mark
# from which frames can be read, as raw and payload offset; 1 + the end once complete; number of segments
_STATE: Final = struct.Struct("<QQQQQQH")


class Log:
    """The latest bytes of one output as received, including frame headers, and where frames begin.

    Offsets are either `raw`, counting all received bytes, or count the payload only. The log of an ended
    command has no odometer and can be read without its socket.
    """

    def __init__(self, memory: ExecMemory, area: str, odometer: Odometer | None) -> None:
        """Open the log stored in the memory, empty if the memory is new. Raises `ValueError`."""
        self._memory = memory
        self._record = memory.record(area)
        self._odometer = odometer
        state = self._record.read()
        first, zero, turning, raw, payload, end, count = map(int, _STATE.unpack_from(state))
        self._first, self._zero, self._turning, self._end = first, zero, turning, end
        self._segments = list(array("H", state[_STATE.size : _STATE.size + 2 * count]))
        for number in self._segments:
            memory.claim(number)
        self._points: deque[tuple[int, int]] = deque([(raw, payload)])
        self._at = self._until = 0  # of `room`, by offsets from the first segment's start
        self.raw = raw

    @property
    def start(self) -> int:
        """The payload offset from which the log can be read."""
        return self._points[0][1]

    def room(self) -> memoryview:
        """Return the memory for the next bytes to receive. Raises `MemoryFull`.

        A long output is given segments that lie together, if there are any: a socket has more for us than the
        rest of one.
        """
        if self._until - self._at < _READ:
            self._make_room()
        return self._memory.part(self._at, min(self._until, self._at + _READ))

    def _make_room(self) -> None:
        """Find where the next bytes go, and how many segments lie together there. Raises `MemoryFull`."""
        index, at = divmod(self.raw - self._first, SEGMENT)
        there, long = len(self._segments) - index, self.raw >= SEGMENT
        if (missing := -(-(at + (_READ if long else 1)) // SEGMENT) - there) > 0:
            self._extend(index, max(missing, _AHEAD if long else 1))
        number, end = self._segments[index], index + 1
        while end < len(self._segments) and self._segments[end] == number + end - index:
            end += 1
        self._at, self._until = number * SEGMENT + at, (number + end - index) * SEGMENT

    def _extend(self, index: int, number: int) -> None:
        """Take segments behind the one at `index`, and that one too if it is missing. Raises `MemoryFull`."""
        try:
            for _ in range(number):
                self._segments.append(self._memory.take(self._segments[-1] if self._segments else None))
        except MemoryFull:
            if index >= len(self._segments):
                raise
        self._commit()

    def landed(self, size: int) -> memoryview:
        """Record that `size` bytes were received into `room`, and return them."""
        start = self._at
        self._at += size
        self.raw += size
        if self._odometer is not None and self.raw - self._zero >= _TURN:
            self._turn(self._odometer)
        return self._memory.part(start, start + size)

    def begin(self, raw: int) -> None:
        """Record where the first frame begins."""
        self._points = deque([(raw, 0)])
        self._commit()

    def point(self, raw: int, payload: int) -> None:
        """Record that a frame, from which reading can resume, begins at `raw`."""
        if raw - self._points[-1][0] >= _STEP:
            self._points.append((raw, payload))

    def keep(self, payload: int) -> int:
        """Drop whole segments before the offset `payload`; return the bytes of memory that are still used."""
        points = self._points
        while len(points) > 1 and points[1][1] <= payload:
            points.popleft()
        gone = (points[0][0] - self._first) // SEGMENT
        if gone >= _AHEAD:
            numbers, self._segments = self._segments[:gone], self._segments[gone:]
            self._first += gone * SEGMENT
            self._commit()
            # Only now: the previous state still referred to them. A fast stream uses them again at once, and
            # new pages would cost it a fifth of its speed.
            self._memory.give(numbers, min(_SPARE, len(self._segments)))
        return (len(self._segments) + self._memory.spare) * SEGMENT

    def close(self) -> None:
        """Mark the log as complete, so that it can be read without its socket."""
        self._end = self.raw + 1
        self._odometer = None
        self._commit()

    def replay(self) -> Iterator[memoryview]:
        """Yield what an earlier process received, from the last mark on. Raises `ValueError`."""
        end = self._end - 1 if self._odometer is None else self._received(self._odometer)
        if not self._points[0][0] <= end <= self._first + len(self._segments) * SEGMENT:
            raise ValueError("the log is inconsistent")
        while self.raw < end:
            number, at = divmod(self.raw - self._first, SEGMENT)
            size = min(end - self.raw, SEGMENT - at)
            self.raw += size
            yield self._memory.segment(self._segments[number])[at : at + size]

    def _received(self, odometer: Odometer) -> int:
        received, self._end = odometer.read(), 0
        if self._turning and received >= _TURN:
            self._turning = 0  # the odometer was not reset
        elif self._turning:  # it was reset, but that was not recorded
            self._zero, self._turning = self._turning, 0
        self._commit()
        return self._zero + received

    def _turn(self, odometer: Odometer) -> None:
        """Reset the odometer. A process taking over in between sees a large count or zero, and can tell."""
        self._turning = self._zero + odometer.read()
        self._commit()
        odometer.reset()
        self._zero, self._turning = self._turning, 0
        self._commit()

    def _commit(self) -> None:
        state = (self._first, self._zero, self._turning, *self._points[0], self._end, len(self._segments))
        self._record.write(_STATE.pack(*state) + array("H", self._segments).tobytes())
