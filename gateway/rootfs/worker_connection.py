"""The gateway's end of one worker for calls, and what a reply carries."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import cast

import orjson

from gateway.errors import Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.broker_client import REFUSALS
from gateway.rootfs.worker import BROKEN, DONE, LENGTH, PASSED, REFUSED, REPLY_MAX

_log = logging.getLogger(__name__)


class Forgotten(Unavailable):
    """The worker of this call was ended with all others of its tenant, and is not to be replaced for it."""


def forgotten() -> Forgotten:
    return Forgotten("the file worker ended during the call; try again")


class WorkerConnection(asyncio.Protocol):
    """The gateway's end of one worker: at most one request is under way, the first is that it gets READY.

    `answers` says whether its reply is still to come. A caller that gives up leaves it so: the reply is taken
    off the stream before the next request.
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
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        if not buffer and len(data) >= 4 and len(data) == 4 + LENGTH.unpack_from(data)[0]:
            self._done(memoryview(data)[4:])  # the usual case: one reply, whole
            return
        buffer += data
        length = LENGTH.unpack_from(buffer)[0] if len(buffer) >= 4 else 0
        if length > REPLY_MAX:
            # This process serves all tenants: a reply that is too large counts as one that does not come. The
            # present caller, or the next, ends the worker.
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
            self._caller.exception()  # retrieved, or asyncio would log it

    def _done(self, reply: memoryview) -> None:
        self.answers = False
        if not self._caller.done():
            self._caller.set_result(reply)

    def _fail(self, error: Exception) -> None:
        if not self._caller.done():
            self._caller.set_exception(error)

    async def reply(self, seconds: float) -> memoryview:
        """Return the reply that is to come. Raises `TimeoutError`, and `Unavailable` if none will."""
        if self._caller.cancelled():
            self._caller = self._loop.create_future()
        # cheaper than a timeout's scope around a shield: this is on the way of each Read
        late = self._loop.call_later(seconds, self._fail, TimeoutError())
        try:
            return await self._caller
        finally:
            late.cancel()

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self.answers = True
        self._caller = self._loop.create_future()
        # On a lost connection the `writelines` of CPython 3.13.5 has the loop watch the descriptor forever,
        # whosever it is next; `connection_lost` is about to end the call.
        if not self._transport.is_closing():
            self._transport.writelines((LENGTH.pack(len(request)), request))

    def forget(self) -> None:
        """Have the call that is under way, if there is one, end as one of a tenant that is forgotten."""
        self._fail(forgotten())
        if not self._caller.cancelled():
            self._caller.exception()

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()


def result_of(operation: str, reply: bytes | memoryview) -> bytes:
    """Return what a reply carries, or raise what it refuses with."""
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
