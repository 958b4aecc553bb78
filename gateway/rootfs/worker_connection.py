"""The gateway's connection to a worker for calls, and the parsing of replies."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import cast

import orjson

from gateway.errors import Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.broker_client import REFUSALS
from gateway.rootfs.messages import BROKEN, DONE, LENGTH, PASSED, REFUSED, REPLY_MAX

_log = logging.getLogger(__name__)

_JOINED = 16 << 10  # bytes of a request: to copy so few costs less than to write it in pieces


class Forgotten(Unavailable):
    """The call's worker was ended together with all others of its tenant, and must not be replaced."""


def forgotten() -> Forgotten:
    return Forgotten("the file worker ended during the call; try again")


class WorkerConnection(asyncio.Protocol):
    """The gateway's end of one worker. At most one request is in flight; the first is waiting for READY.

    `answers` is true while a reply is outstanding. It stays so if the caller gives up: the reply is read from
    the stream before the next request.
    """

    def __init__(self, number: int, root: FilesystemRoot) -> None:
        self.number = number
        self.root = root
        self.layers: tuple[str, ...] = ()
        self.used = self.checked = time.monotonic()
        self.closed = False
        self.answers = True
        self._loop = asyncio.get_running_loop()
        self._caller: asyncio.Future[memoryview] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        if not buffer and len(data) >= 4 and len(data) == 4 + LENGTH.unpack_from(data)[0]:
            self._done(memoryview(data)[4:])  # the usual case: exactly one reply
            return
        buffer += data
        length = LENGTH.unpack_from(buffer)[0] if len(buffer) >= 4 else 0
        if length > REPLY_MAX:
            # This process serves all tenants, so a reply that is too large is treated as a timeout. The
            # current or the next caller then ends the worker.
            assert self._transport is not None
            self._transport.pause_reading()
            self._buffer = bytearray()
            self._fail(TimeoutError())
        elif length and len(buffer) >= 4 + length:
            self._buffer = bytearray()
            self._done(memoryview(buffer)[4:])

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._fail(Unavailable("the file worker ended during the call; try again"))
        if not self._caller.cancelled():
            self._caller.exception()  # mark as retrieved, or asyncio logs it

    def _done(self, reply: memoryview) -> None:
        self.answers = False
        if not self._caller.done():
            self._caller.set_result(reply)

    def _fail(self, error: Exception) -> None:
        if not self._caller.done():
            self._caller.set_exception(error)

    async def reply(self, seconds: float) -> memoryview:
        """Wait for the outstanding reply. Raises `TimeoutError`, and `Unavailable` if the worker ends."""
        if self._caller.cancelled():
            self._caller = self._loop.create_future()
        # cheaper than a timeout scope around a shield; this is on the path of each Read
        late = self._loop.call_later(seconds, self._fail, TimeoutError())
        try:
            return await self._caller
        finally:
            late.cancel()

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self.answers = True
        self._caller = self._loop.create_future()
        # On a lost connection, `writelines` of CPython 3.13.5 leaves the descriptor registered with the loop
        # forever, even after it is reused; `connection_lost` is about to end the call.
        if not self._transport.is_closing():
            length = LENGTH.pack(len(request))
            if len(request) <= _JOINED:
                self._transport.write(length + request)
            else:
                self._transport.writelines((length, request))

    def forget(self) -> None:
        """Fail the call in flight, if any, because its tenant is being forgotten."""
        self._fail(forgotten())
        if not self._caller.cancelled():
            self._caller.exception()

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()


def result_of(operation: str, reply: bytes | memoryview) -> bytes:
    """Return a reply's result, or raise its error."""
    match reply[0]:
        case status if status in (DONE, PASSED):
            return bytes(reply[1:])
        case status if status == REFUSED:
            told = orjson.loads(reply[1:])
            raise REFUSALS.get(told["code"], Unavailable)(told["message"], **told["facts"])
        case status if status == BROKEN:
            where = bytes(reply[1:]).decode("utf-8", "replace")
            _log.error("the file operation %s broke at %s", operation, where)
            raise Unavailable("the file operation failed; the gateway's log says why")
        case _:
            raise Unavailable("the file worker sent an unexpected reply")
