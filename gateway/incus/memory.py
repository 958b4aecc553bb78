"""What of one command outlives the gateway: its last output, as it came from incusd, and some small records.

All of it lies in one memfd. Whoever holds a descriptor of that sees what was last committed, at whatever
instruction the writer was killed: a record has two copies, and a word that says which one counts. A commit
writes the other copy and then changes the word, by one aligned store.

The kernel writes output right here (`Log.room`), and knows how much it wrote, whatever became of the reader:
of a unix socket with SO_PEEK_OFF (socket(7)) each byte that is taken out is subtracted from it, in the call
that takes it out. Set to a large number once it is an odometer, which belongs to the socket.

A head of records is followed by segments. The file is sparse: a command costs the pages that it touches.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Final

import orjson

# The smallest that costs a fast stream no speed: up to three of each output are more than what is kept of it.
SEGMENT: Final = 128 << 10
SEGMENTS: Final = 1600  # of one command: more than all that is kept of its outputs by any sensible settings

_FACTS: Final = 48 << 10
_LOG: Final = 4096
_PLACE: Final = 64
_ACCOUNTS: Final = 1024
_AREAS: Final = {"first": _LOG, "second": _LOG, "place": _PLACE, "accounts": _ACCOUNTS, "facts": _FACTS}
_HEAD: Final = 128 << 10
_SIZE: Final = _HEAD + SEGMENTS * SEGMENT

SO_PEEK_OFF: Final = 42
_ODOMETER: Final = 0x7FFF_0000
_TURN: Final = 0x3FFF_0000  # bytes after which it is set again
_STEP: Final = 64 << 10  # bytes at least between two places that are remembered of a log


class Full(Exception):
    """There is no room for more."""


class Memory:
    """The memory of one command. `made` makes one; else it takes over the descriptor of an earlier one's."""

    def __init__(self, descriptor: int) -> None:
        """Raises `ValueError` for what is no such memory; the descriptor is closed then."""
        self.descriptor = descriptor
        if os.fstat(descriptor).st_size != _SIZE:
            os.close(descriptor)
            raise ValueError("not a command's memory of this version")
        self._map = mmap.mmap(descriptor, _SIZE)
        self.view = memoryview(self._map)
        self._free: list[int] = []  # segments that were used before, and have memory
        self._bare = list(range(SEGMENTS - 1, -1, -1))
        self.closed = False

    @classmethod
    def made(cls) -> Memory:
        descriptor = os.memfd_create("command", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def take(self) -> int:
        """Return the number of a free segment. Raises `Full`."""
        try:
            return self._free.pop() if self._free else self._bare.pop()
        except IndexError:
            raise Full from None

    def claim(self, number: int) -> None:
        """Take over a segment that an earlier process used. Raises `ValueError`."""
        self._bare.remove(number)

    def give(self, number: int) -> None:
        """Take a segment back; the memory of all but one goes back to the kernel."""
        if self._free:
            self._map.madvise(mmap.MADV_REMOVE, _HEAD + number * SEGMENT, SEGMENT)
            self._bare.append(number)
        else:
            self._free.append(number)

    def segment(self, number: int) -> memoryview:
        start = _HEAD + number * SEGMENT
        return self.view[start : start + SEGMENT]

    def read_facts(self) -> dict[str, object]:
        """Return what `write_facts` wrote last. Raises `ValueError`."""
        data = self.record("facts").read()
        (size,) = struct.unpack_from("<I", data)
        found = orjson.loads(data[4 : 4 + size])
        if not isinstance(found, dict):
            raise ValueError("no facts")
        return found

    def write_facts(self, facts: dict[str, object]) -> None:
        """Keep facts. Raises `Full` for too many."""
        data = orjson.dumps(facts)
        if len(data) > _FACTS - 4:
            raise Full
        self.record("facts").write(struct.pack("<I", len(data)) + data)

    def record(self, area: str) -> Record:
        start = 0
        for name, size in _AREAS.items():
            if name == area:
                return Record(self.view, start, size)
            start += 64 + 2 * size
        raise KeyError(area)

    def close(self) -> None:
        """Let go of it; pages that others hold stay. Idempotent."""
        if not self.closed:
            self.closed = True
            os.close(self.descriptor)
            with contextlib.suppress(BufferError):  # what is still looked at goes with its last look
                self.view.release()
                self._map.close()


class Record:
    """Two copies of a state, and the word that says which one counts."""

    def __init__(self, view: memoryview, start: int, size: int) -> None:
        self._view = view
        self._start = start
        self._size = size

    def read(self) -> bytes:
        at = self._at(self._word)
        return bytes(self._view[at : at + self._size])

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
    """Counts what was ever received of one socket, by whomever."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, _ODOMETER)

    def read(self) -> int:
        """Return how many bytes were received since the last `reset`."""
        left: int = self._socket.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        return _ODOMETER - left


# raw offsets of the first segment, of the odometer's zero, and of its next while it is set again; the mark,
# from which frames can be read, as raw and payload offset; the end plus one once nothing more comes; segments
_STATE: Final = struct.Struct("<QQQQQQH")


class Log:
    """The last of one output as it came, headers and all, and where in it frames begin.

    Offsets are `raw`, of all that was received, or of the payload. That of a command that has ended has no
    odometer, and can be read without its socket.
    """

    def __init__(self, memory: Memory, area: str, odometer: Odometer | None) -> None:
        """Take over what the memory has; nothing, where it was just made. Raises `ValueError`."""
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
        self.raw = raw

    @property
    def start(self) -> int:
        """The payload offset from which on it can be read."""
        return self._points[0][1]

    def room(self) -> memoryview:
        """Return where the next bytes are to be received. Raises `Full`."""
        number, at = divmod(self.raw - self._first, SEGMENT)
        if number == len(self._segments):
            self._segments.append(self._memory.take())
            self._commit()
        return self._memory.segment(self._segments[number])[at:]

    def landed(self, size: int) -> memoryview:
        """Take note that so many bytes were received there, and return them."""
        number, at = divmod(self.raw - self._first, SEGMENT)
        self.raw += size
        if self._odometer is not None and self.raw - self._zero >= _TURN:
            self._turn(self._odometer)
        return self._memory.segment(self._segments[number])[at : at + size]

    def begin(self, raw: int) -> None:
        """Take note that the first frame begins there."""
        self._points = deque([(raw, 0)])
        self._commit()

    def point(self, raw: int, payload: int) -> None:
        """Take note that a frame from which on others can be read begins there."""
        if raw - self._points[-1][0] >= _STEP:
            self._points.append((raw, payload))

    def keep(self, payload: int) -> int:
        """Let go of what lies before `payload`, in whole segments; return the bytes that the rest takes."""
        points = self._points
        while len(points) > 1 and points[1][1] <= payload:
            points.popleft()
        gone = (points[0][0] - self._first) // SEGMENT
        if gone > 0:
            numbers, self._segments = self._segments[:gone], self._segments[gone:]
            self._first += gone * SEGMENT
            self._commit()
            for number in numbers:  # not before: the state that counted until now still named them
                self._memory.give(number)
        return len(self._segments) * SEGMENT

    def close(self) -> None:
        """Take note that nothing more comes: it can be read without its socket from now on."""
        self._end = self.raw + 1
        self._odometer = None
        self._commit()

    def replay(self) -> Iterator[memoryview]:
        """Yield what an earlier process received, from the mark on. Raises `ValueError`."""
        end = self._end - 1 if self._odometer is None else self._received(self._odometer)
        if not self._points[0][0] <= end <= self._first + len(self._segments) * SEGMENT:
            raise ValueError("a log that cannot be")
        while self.raw < end:
            number, at = divmod(self.raw - self._first, SEGMENT)
            size = min(end - self.raw, SEGMENT - at)
            self.raw += size
            yield self._memory.segment(self._segments[number])[at : at + size]

    def _received(self, odometer: Odometer) -> int:
        received, self._end = odometer.read(), 0
        if self._turning and received >= _TURN:
            self._turning = 0  # it was not turned
        elif self._turning:  # it was, and that not noted
            self._zero, self._turning = self._turning, 0
        self._commit()
        return self._zero + received

    def _turn(self, odometer: Odometer) -> None:
        """Set the odometer again. Who comes in between finds it either far or at its zero."""
        self._turning = self._zero + odometer.read()
        self._commit()
        odometer.reset()
        self._zero, self._turning = self._turning, 0
        self._commit()

    def _commit(self) -> None:
        state = (self._first, self._zero, self._turning, *self._points[0], self._end, len(self._segments))
        self._record.write(_STATE.pack(*state) + array("H", self._segments).tobytes())
