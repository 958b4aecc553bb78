"""The result of an operation, delivered on a connection that can be handed to another process.

incusd answers `/wait` with a header at once and a body when the operation ends. Since the request is made on
a separate connection before the command starts, the body stays in the connection's buffer for as long as
anybody holds the descriptor; the operation's own record is gone 5 s after its end. `Connection: close` makes
sure that the descriptor is good for this one answer and for no other request.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.incus.operation import Operation
from gateway.incus.rest import IncusError

_MOST: Final = 256 << 10  # most bytes of an answer
_PARTS: Final = 0.005  # seconds between checks of an incomplete answer
# incusd reports these return codes as errors, even if they are the program's own
_CODES: Final = {"Command not executable": 126, "Command not found": 127}


class OperationWait:
    """A pending `/wait` request: `ask` sends one, the constructor adopts the socket of an earlier one."""

    def __init__(self, own: socket.socket) -> None:
        self.own = own
        own.setblocking(False)

    @classmethod
    async def ask(cls, place: Path, operation: str) -> OperationWait:
        """Send the request. Raises `OSError`."""
        own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            own.setblocking(False)
            try:
                own.connect(str(place))
            except BlockingIOError:  # incusd's accept queue is full
                own.setblocking(True)
                await asyncio.to_thread(own.connect, str(place))
            path = f"/1.0/operations/{operation}/wait?timeout=-1"
            own.send(f"GET {path} HTTP/1.1\r\nHost: incus\r\nConnection: close\r\n\r\n".encode())
            return cls(own)
        except BaseException:
            own.close()
            raise

    async def result(self) -> Operation:
        """Wait for the operation's result. Raises `IncusError`, with status 0 if incusd went away."""
        while True:
            try:
                found = self.own.recv(_MOST, socket.MSG_PEEK)
            except BlockingIOError:
                await self._readable()
                continue
            except OSError:
                found = b""
            if not found:
                raise IncusError("incusd hung up before the end of an operation", 0)
            head, end, _ = found.partition(b"\r\n\r\n")
            if end and found.startswith(b"HTTP/") and b"chunked" in head.lower():
                self.own.recv(len(head) + len(end))  # or each peek would find it again
                continue
            if (body := _body(found)) is not None:
                return _operation(body)
            if self._hung_up():  # no more data will come
                if self.own.recv(_MOST, socket.MSG_PEEK) == found:
                    raise IncusError("incusd hung up in the middle of an answer", 0)
            else:
                await asyncio.sleep(_PARTS)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self.own.close()

    async def _readable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.own, ready.set)
        try:
            await ready.wait()
        finally:
            with contextlib.suppress(ValueError):  # closed meanwhile
                loop.remove_reader(self.own)

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.own, 0)
        return bool(poll.poll(0))


def _body(said: bytes) -> bytes | None:
    """Return the body of an answer whose header may have been consumed; None while it is incomplete."""
    if not said.startswith(b"HTTP/"):
        return _chunks(said)
    head, end, body = said.partition(b"\r\n\r\n")
    lengths = [
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    ]
    return body if end and lengths and len(body) >= lengths[0] else None


def _chunks(said: bytes) -> bytes | None:
    whole = b""
    while True:
        size, end, rest = said.partition(b"\r\n")
        if not end:
            return None
        length = int(size.partition(b";")[0], 16)
        if length == 0:
            return whole
        if len(rest) < length + 2:
            return None
        whole, said = whole + rest[:length], rest[length + 2 :]


def _operation(body: bytes) -> Operation:
    answer: Any = orjson.loads(body)
    record = answer.get("metadata") or {}
    error = str(answer.get("error") or record.get("err") or "")
    metadata = dict(record.get("metadata") or {})
    if error in _CODES:
        metadata.setdefault("return", _CODES[error])
    if answer.get("error_code") == 404:
        raise IncusError(error, 404)
    return Operation(ok=not error, error=error, metadata=metadata)
