"""Parser and builder of the websocket frames of an exec. No I/O.

Not a general websocket: it trusts its peer, a local daemon, and never answers a ping; see
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
_HEADER: Final = 10  # most bytes of a frame header


class Frames:
    """Incremental parser of one socket's frames; the payload is returned as views of the received bytes.

    `ended`: the stream has ended properly; what follows is only what incusd left behind (`StreamSocket.add`).
    `closed`: incusd sent a close frame. `start`: the offset of the first byte. A `log` stores the received
    bytes, and is told where frames begin.
    """

    def __init__(self, log: Log | None = None) -> None:
        self.log = log
        self.rest = b""  # an incomplete header
        self.ended = False
        self.closed = False
        self.start = 0 if log is None else log.start
        self._payload = self.start
        self._left = 0  # bytes of the current frame still to come
        self._wanted = False  # whether those bytes belong to the stream
        self._kind = BINARY

    def feed(self, view: memoryview) -> list[memoryview]:
        """Parse the next received bytes and return the payload among them."""
        pieces: list[memoryview] = []
        if self.rest:
            view = self._split(view)
        while view:
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
        """Complete a header split between two reads; return the bytes after it."""
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
        """Start the frame with the parsed header `found`, `behind` bytes before the end of received data."""
        kind, self._left, _ = found
        if kind in (TEXT, BINARY):
            self._kind = kind
        self._wanted = kind == BINARY or (kind == _CONTINUATION and self._kind == BINARY)
        self.ended |= kind == TEXT  # incusd sends only empty text frames, each at the end of a stream
        if kind == CLOSE:
            self.closed = True
        if kind == BINARY and self.log is not None:
            self.log.point(self.log.raw - behind, self._payload)


def header(view: memoryview) -> tuple[int, int, int] | None:
    """Parse the frame header at the start of `view`.

    Returns the kind, the payload's length and the header's size in bytes; None if the header is incomplete.
    """
    if len(view) < 2:
        return None
    kind, length = view[0] & 0x0F, view[1] & 0x7F
    if length < 126:
        return kind, length, 2
    size, form = (4, "!H") if length == 126 else (10, "!Q")
    if len(view) < size:
        return None
    return kind, struct.unpack_from(form, view, 2)[0], size


def arrived(data: bytes) -> bytes:
    """Return bytes of a stream as a server's frame, which is not masked."""
    return struct.pack("!BBQ", 0x80 | BINARY, 127, len(data)) + data


def frame(kind: int, data: bytes) -> tuple[bytes, ...]:
    """Return a client frame in non-empty parts; an empty one makes asyncio's `writelines` spin forever.

    A client must mask; with the key 0 the bytes stay unchanged. Masking protects proxies from scripts in
    browsers (RFC 6455 §10.3), and a unix socket has neither.
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
