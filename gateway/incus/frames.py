"""The frames of one exec websocket, as bytes: what incusd sends parsed, what it is sent made. No IO.

It is no websocket for anything else: it trusts the peer, a local daemon, and never answers a ping; see
`gateway.incus.exec_sockets`.
"""

from __future__ import annotations

import struct
from typing import Final

from gateway.incus.memory import Log

_CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
_HEADER: Final = 10  # bytes at most


class Frames:
    """Takes the payload out of what one socket receives, in pieces of the same memory.

    `ended` says that the stream came to its end, `closed` that incusd hung up without one, `start` is the
    offset of the first byte. A `log` holds the bytes, and is told where frames begin.
    """

    def __init__(self, log: Log | None = None) -> None:
        self.log = log
        self.rest = b""  # the start of a header
        self.ended = False
        self.closed = False
        self.start = 0 if log is None else log.start
        self._payload = self.start
        self._left = 0  # bytes of the present frame that are still to come
        self._wanted = False  # whether they belong to the stream
        self._kind = BINARY

    def feed(self, view: memoryview) -> list[memoryview]:
        """Return the stream's bytes in what was received next."""
        pieces: list[memoryview] = []
        if self.rest:
            view = self._split(view)
        while view and not self.ended:
            if self._left:
                piece, view = view[: self._left], view[self._left :]
                self._left -= len(piece)
                if self._wanted:
                    pieces.append(piece)
                    self._payload += len(piece)
                continue
            found = header(view)
            if found is None:
                self.rest = bytes(view)
                break
            self._begin(found, len(view))
            view = view[found[2] :]
        return pieces

    def _split(self, view: memoryview) -> memoryview:
        """Complete a header that was cut off; return what follows it."""
        before = len(self.rest)
        joined = self.rest + bytes(view[:_HEADER])
        found = header(memoryview(joined))
        if found is None:
            self.rest = joined
            return view[:0]
        self.rest = b""
        self._begin(found, len(view) + before)
        return view[found[2] - before :]

    def _begin(self, found: tuple[int, int, int], behind: int) -> None:
        """Take note of what the frame is whose header was `found`, so many bytes before the end of all."""
        kind, self._left, _ = found
        if kind in (TEXT, BINARY):
            self._kind = kind
        self._wanted = kind == BINARY or (kind == _CONTINUATION and self._kind == BINARY)
        self.ended = kind == TEXT  # an empty one ends a stream, and there are no others
        if kind == CLOSE:
            self.closed = True
        if kind == BINARY and self.log is not None:
            self.log.point(self.log.raw - behind, self._payload)


def header(view: memoryview) -> tuple[int, int, int] | None:
    """Return kind, length and own size of the frame header that `view` begins with; None: not all there."""
    if len(view) < 2:
        return None
    kind, length = view[0] & 0x0F, view[1] & 0x7F
    if length < 126:
        return kind, length, 2
    size, form = (4, "!H") if length == 126 else (10, "!Q")
    if len(view) < size:
        return None
    return kind, struct.unpack_from(form, view, 2)[0], size


def frame(kind: int, data: bytes) -> tuple[bytes, ...]:
    """Return a client's frame in parts, none of them empty: on one asyncio's `writelines` spins forever.

    A client has to mask; by the key 0 the bytes stay what they are. Masks protect proxies between browsers
    and servers from scripts (RFC 6455 §10.3): on a unix socket there are neither.
    """
    length = len(data)
    if length < 126:
        head = struct.pack("!BB", 0x80 | kind, 0x80 | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", 0x80 | kind, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", 0x80 | kind, 0x80 | 127, length)
    head += bytes(4)
    return (head, data) if data else (head,)
