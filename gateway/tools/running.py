"""A running call and its callers, who may leave and come back while it continues."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from gateway.errors import Cancelled, Unavailable
from gateway.tasks import begin
from gateway.tools.file_tools import ToolResult

_BRIEFLY: Final = 0.1  # seconds a call may have been running when the gateway is handed over


class Left(Unavailable):
    """The gateway is ending; the next one continues the call and answers it under its id."""

    def __init__(self) -> None:
        super().__init__("the gateway is being restarted; call again with the same id", retry_after=1)


class Running:
    """A running call of a tool under a `callId`: its input, and its waiting callers."""

    __slots__ = ("_asked", "_lingering", "_since", "_waiting", "digest", "tool", "work")

    def __init__(self, tool: str, digest: bytes, work: Callable[[], Awaitable[ToolResult]]) -> None:
        self.tool = tool
        self.digest = digest
        self._lingering: asyncio.TimerHandle | None = None
        self._waiting: set[asyncio.Future[ToolResult]] = set()
        self._asked = 0.0  # until when a caller that left may return
        self._since = asyncio.get_running_loop().time()
        self.work = begin(self._do(work))
        self.work.add_done_callback(self._over)

    async def _do(self, work: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        result = await work()
        # not at this task's end, which others notice one turn of the loop later
        self._tell(lambda one: one.set_result(result))
        return result

    def _over(self, work: asyncio.Task[ToolResult]) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        if work.cancelled():
            self._tell(lambda one: one.set_exception(given_up()))
        elif (error := work.exception()) is not None:
            self._tell(lambda one: one.set_exception(error))

    def _tell(self, how: Callable[[asyncio.Future[ToolResult]], None]) -> None:
        for one in self._waiting:
            if not one.done():
                how(one)

    async def result(self, linger: float) -> ToolResult:
        """Wait for the result. The work is ended `linger` seconds after its last caller has left.

        Of several callers that left, the longest `linger` counts. Raises what the work raises, and
        `Cancelled` if it was given up.
        """
        if self.work.done():
            if self.work.cancelled():
                raise given_up()
            return self.work.result()
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        loop = asyncio.get_running_loop()
        one: asyncio.Future[ToolResult] = loop.create_future()
        if not self._waiting:
            self._asked = 0.0  # the caller came back
        self._waiting.add(one)
        try:
            return await one
        finally:
            self._waiting.discard(one)
            self._asked = max(self._asked, loop.time() + linger)
            if not self._waiting and not self.work.done():
                self._lingering = loop.call_at(self._asked, self.work.cancel)

    def expect(self, linger: float) -> None:
        """Give the caller of an earlier process `linger` seconds to come back, then end the call."""
        if not self._waiting and not self.work.done():
            self._lingering = asyncio.get_running_loop().call_later(linger, self.work.cancel)

    def leave(self) -> None:
        """Tell all callers that the next process will have the result."""
        self._tell(lambda one: one.set_exception(Left()))


async def only_brief(calls: Callable[[], Iterable[Running]], seconds: float) -> None:
    """Wait until all of the running `calls` have just begun, for at most some seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while late := [one.work for one in calls() if loop.time() - one._since >= _BRIEFLY]:
        if loop.time() >= until:
            return
        await asyncio.wait(late, timeout=until - loop.time())


def given_up() -> Cancelled:
    return Cancelled("the caller cancelled the call")
