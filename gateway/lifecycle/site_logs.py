"""Sends a site's log: its last lines, and new ones to followers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.admission import Admission
from gateway.errors import GatewayError, InvalidParams
from gateway.execs import Execs
from gateway.runtime import Commands, Process

log = logging.getLogger(__name__)

LINES_MAX: Final = 10_000  # lines of one answer
FOLLOWERS: Final = 8  # of one tenant's log: each is a command in the tenant


class SiteLogs:
    """The logs being read, at most `FOLLOWERS` of one tenant at a time."""

    def __init__(self, execs: Execs, commands: Commands) -> None:
        self._execs, self._commands = execs, commands
        self._readers = Admission[str]("clients that read its log", each=FOLLOWERS, hint="end one first")
        self._following: set[Following] = set()

    async def open(self, tenant: str, lines: int, *, follow: bool) -> Following:
        """Return a response with the last `lines`, and with `follow` new ones until the client leaves.

        Raises `InvalidParams` or `RateLimited`.
        """
        if lines > LINES_MAX:
            raise InvalidParams(f"lines must be a number up to {LINES_MAX}", field="lines")
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._readers.reserve(tenant))
            script = self._execs.script(tenant, self._commands.logs(lines, follow))
            process = await stack.enter_async_context(script)
            following = Following(process, stack.pop_all())
        self._following.add(following)
        following.closing.callback(self._following.discard, following)
        return following

    def end(self) -> None:
        """End all followed logs."""
        for following in list(self._following):
            following.end()


class Following(Response):
    """Sends a command's output until it ends or the client leaves, which ends the command."""

    media_type = "text/plain"

    def __init__(self, process: Process, closing: contextlib.AsyncExitStack) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._process, self.closing = process, closing
        self._ended = asyncio.Event()

    __hash__ = object.__hash__

    def end(self) -> None:
        """End the response soon."""
        self._ended.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        ends = (sending, asyncio.ensure_future(_left(receive)), asyncio.ensure_future(self._ended.wait()))
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            await asyncio.shield(self._close())
        if not sending.cancelled():
            sending.result()
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while data := await self._process.read("stdout"):
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _close(self) -> None:
        async with self.closing:
            try:
                await self._process.kill(0)
            except (GatewayError, TimeoutError) as error:
                log.warning("cannot stop following a log: %s", error)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
