"""Knows all tools of the gateway: who may call which, in which session, exactly once, and who is told.

Connection, HTTP and MCP call tools through it; it finds the tenant's files and hands the call to the room
that runs it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Protocol

import orjson

from gateway.errors import (
    Cancelled,
    Conflict,
    GatewayError,
    InvalidParams,
    NotFound,
    RateLimited,
    Timeout,
    Unavailable,
)
from gateway.events import Bus
from gateway.files.files import file_written
from gateway.receipts import Key, Receipts
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.store import StoreFailed
from gateway.tasks import begin
from gateway.tools.files import FileTools, ToolResult
from gateway.tools.schemas import SHELL_TOOLS, descriptions
from gateway.tools.session import ToolSession

log = logging.getLogger(__name__)

__all__ = ["ToolResult", "ToolSession", "Toolbox"]

_SCOPES: Final[Mapping[str, str]] = {
    "Read": "files:read",
    "Glob": "files:read",
    "Grep": "files:read",
    "Write": "files:write",
    "Edit": "files:write",
    "Bash": "exec",
    "BashOutput": "exec",
    "KillShell": "exec",
}
# what of a call's input is told to those who watch; never contents
_TOLD: Final = (
    *("file_path", "path", "pattern", "glob", "type", "output_mode"),
    *("command", "description", "bash_id", "shell_id", "filter"),
)
_WRITES: Final = frozenset({"Write", "Edit"})
# what may leave something behind that outlives the gateway
_LASTING: Final = _WRITES | {"Bash"}


class _Running:
    """A call under a `callId` that runs: what was asked, and who waits for it."""

    __slots__ = ("_lingering", "_waiting", "digest", "work")

    def __init__(self, digest: bytes, work: Callable[[], Awaitable[ToolResult]]) -> None:
        self.digest = digest
        self._lingering: asyncio.TimerHandle | None = None
        self._waiting: set[asyncio.Future[ToolResult]] = set()
        self.work = begin(self._do(work))
        self.work.add_done_callback(self._over)

    async def _do(self, work: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        result = await work()
        # not by the end of this task, of which is told a turn of the loop later
        self._tell(lambda one: one.set_result(result))
        return result

    def _over(self, work: asyncio.Task[ToolResult]) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        if work.cancelled():
            self._tell(lambda one: one.set_exception(_given_up()))
        elif (error := work.exception()) is not None:
            self._tell(lambda one: one.set_exception(error))

    def _tell(self, how: Callable[[asyncio.Future[ToolResult]], None]) -> None:
        for one in self._waiting:
            if not one.done():
                how(one)

    async def result(self, linger: float) -> ToolResult:
        """Wait for the result. Work that nobody waits for any more ends `linger` seconds later.

        Raises what the work raises, and `Cancelled` where it was given up.
        """
        if self.work.done():
            if self.work.cancelled():
                raise _given_up()
            return self.work.result()
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        loop = asyncio.get_running_loop()
        one: asyncio.Future[ToolResult] = loop.create_future()
        self._waiting.add(one)
        try:
            return await one
        finally:
            self._waiting.discard(one)
            if not self._waiting and not self.work.done():
                self._lingering = loop.call_later(linger, self.work.cancel)


def _given_up() -> Cancelled:
    return Cancelled("the call was given up by who asked for it")


class ShellTools(Protocol):
    """What runs Bash, BashOutput and KillShell; `gateway.shells` does."""

    async def call(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        name: str,
        arguments: object,
        *,
        exec_id: str,
        by: str,
    ) -> ToolResult: ...

    async def end(self, session: ToolSession) -> None:
        """End what a session left running; return when nothing of it is left."""
        ...


class Toolbox:
    """The tools of every tenant, their sessions and their receipts. Used from the event loop only.

    Use as an async context manager: sessions that are not used any more end while it is open.
    """

    def __init__(
        self,
        runtime: TenantRuntime,
        workers: Workers,
        shells: ShellTools,
        bus: Bus,
        receipts: Receipts,
        settings: Settings,
    ) -> None:
        self._runtime = runtime
        self._shells = shells
        self._files = FileTools(workers, settings)
        self._bus = bus
        self._settings = settings
        self._sessions: OrderedDict[tuple[str, str], ToolSession] = OrderedDict()
        self._receipts = receipts
        self._running: dict[Key, _Running] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Toolbox:
        self._sweep()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        running = [one.work for one in self._running.values()]
        for work in running:
            work.cancel()
        await asyncio.gather(*running, *self._ending, return_exceptions=True)

    SCOPES: Final = frozenset(_SCOPES.values())

    def descriptions(self) -> list[dict[str, Any]]:
        """Return the tools as `tools/list` shows them."""
        return descriptions()

    def scope(self, tool: str) -> str:
        """Return the scope that `tool` needs. Raises `NotFound` for one that there is not."""
        try:
            return _SCOPES[tool]
        except KeyError:
            known = ", ".join(_SCOPES)
            raise NotFound(f"no tool {tool[:100]}; there are {known}") from None

    def session(
        self, tenant: str, name: str | None, read_before_write: bool, *, lasting: bool = False
    ) -> ToolSession:
        """Return the tenant's session of that name, or one of its own for a caller without a name.

        Such a one is for a single call, or, where it is `lasting`, until its owner calls `leave`. Raises
        `RateLimited` where the gateway holds as many as it may.
        """
        if name is None:
            life: Literal["call", "connection"] = "connection" if lasting else "call"
            return ToolSession(life=life, read_before_write=read_before_write)
        if not 0 < len(name) <= 128:
            raise InvalidParams("a session's name has 1 to 128 characters")
        now, key = time.monotonic(), (tenant, name)
        found = self._sessions.get(key)
        if found is None or self._unused(found, now):
            self._expire(now)
            if len(self._sessions) >= self._settings.max_sessions:
                raise RateLimited("too many tool sessions", limit=self._settings.max_sessions)
            found = self._sessions[key] = ToolSession(life="named")
        self._sessions.move_to_end(key)
        found.holders += lasting
        found.read_before_write = read_before_write
        found.last_used = now
        return found

    async def leave(self, session: ToolSession) -> None:
        """End a session with its connection; one with a name stays for others, until nobody uses it."""
        if session.life == "named":
            session.holders -= 1
            session.last_used = time.monotonic()
        else:
            await self._shells.end(session)

    async def end(self, session: ToolSession) -> None:
        """End a session; return when nothing of it runs. The next of its name begins anew."""
        for key in [key for key, one in self._sessions.items() if one is session]:
            del self._sessions[key]
        await self._shells.end(session)

    async def end_named(self, tenant: str, name: str) -> None:
        """End the tenant's session of that name, if there is one."""
        session = self._sessions.get((tenant, name))
        if session is not None:
            await self.end(session)

    def forget(self, tenant: str) -> None:
        """Forget a tenant that is destroyed: another of its name starts anew."""
        for key in [key for key in self._sessions if key[0] == tenant]:
            self._end(key)

    def _sweep(self) -> None:
        self._expire(time.monotonic())
        pause = min(self._settings.session_idle / 4, 30.0)
        self._sweeper = asyncio.get_running_loop().call_later(pause, self._sweep)

    def _expire(self, now: float) -> None:
        """End the named sessions that nobody has used for long."""
        for key in [key for key, session in self._sessions.items() if self._unused(session, now)]:
            self._end(key)

    def _unused(self, session: ToolSession, now: float) -> bool:
        return not session.holders and session.last_used < now - self._settings.session_idle

    def _end(self, key: tuple[str, str]) -> None:
        task = asyncio.create_task(self._shells.end(self._sessions.pop(key)))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def call(
        self,
        tenant: str,
        session: ToolSession,
        name: str,
        arguments: Mapping[str, Any],
        *,
        by: str = "",
        call_id: str | None = None,
    ) -> ToolResult:
        """Run one tool; with a `call_id` that was seen before, return what it returned, or will.

        A call with an id is not ended by the end of who asked: it goes on for `call_linger` seconds, so that
        a client whose connection broke can ask again. `give_up` ends it. Raises `Conflict` where that id
        stood for another input, `Cancelled` where it was cancelled, `Gone` where an earlier life of the
        gateway ended during it, `StoreFailed` where it cannot be noted, and what `FileTools.call` raises.
        """
        if call_id is None:
            return await self._call(tenant, session, name, arguments, by, call_id)
        digest = hashlib.sha256(orjson.dumps([name, arguments], option=orjson.OPT_SORT_KEYS)).digest()
        key: Key = (tenant, "call", call_id)
        running = self._running.get(key)
        if running is None:
            known = await self._receipts.result(key, digest)
            if known is not None:
                return ToolResult.unpacked(known)
            running = self._running.get(key)  # another may have come first meanwhile
        if running is None:
            running = _Running(digest, partial(self._once, key, digest, session, name, arguments, by))
            self._running[key] = running
            running.work.add_done_callback(lambda _: self._running.pop(key))
        elif running.digest != digest:
            raise Conflict(f"callId {call_id} was used with another input", callId=call_id)
        return await running.result(self._settings.call_linger)

    async def _once(
        self,
        key: Key,
        digest: bytes,
        session: ToolSession,
        name: str,
        arguments: Mapping[str, Any],
        by: str,
    ) -> ToolResult:
        """Make a call and keep what came of it under its id."""
        tenant, _, call_id = key
        if name not in _LASTING:
            result = await self._call(tenant, session, name, arguments, by, call_id)
            self._receipts.keep(key, digest, result.packed())
            return result
        await self._receipts.begin(key, digest)
        try:
            result = await self._call(tenant, session, name, arguments, by, call_id)
        except asyncio.CancelledError:
            await asyncio.shield(self._receipts.fence(key))  # some of it may have happened
            raise
        except (Unavailable, Timeout):
            raise  # whether it happened nobody knows: it stays begun
        except GatewayError:
            await self._receipts.forget(key)  # it did not happen: it may be made again
            raise
        try:
            await self._receipts.finish(key, digest, result.packed())
        except StoreFailed as failed:
            log.error("the result of a call of %s will not outlive this process: %s", tenant, failed.message)
        return result

    async def give_up(self, tenant: str, call_id: str) -> None:
        """End a call that runs under this id, for everybody; return when nothing of it is left."""
        running = self._running.get((tenant, "call", call_id))
        if running is not None and not running.work.done():
            running.work.cancel()
            await asyncio.wait([running.work])

    async def fence(self, tenant: str, call_id: str) -> None:
        """Cancel whatever is asked for under this id, also where it comes only later."""
        await self.give_up(tenant, call_id)
        await self._receipts.fence((tenant, "call", call_id))

    async def _call(
        self,
        tenant: str,
        session: ToolSession,
        name: str,
        arguments: Mapping[str, Any],
        by: str,
        call_id: str | None,
    ) -> ToolResult:
        began = time.perf_counter()
        told = {key: str(arguments[key])[:200] for key in _TOLD if isinstance(arguments.get(key), str)}
        who: dict[str, Any] = {"call": f"c-{secrets.token_hex(8)}", "by": by}  # in both events of the call
        if call_id is not None:
            who["callId"] = call_id
        started: dict[str, Any] = {"name": name, "input": told, **who}
        exec_id = ""
        if name == "Bash":
            started["exec"] = exec_id = f"x-{secrets.token_hex(8)}"
        self._bus.publish("tool.started", tenant, started)
        outcome: dict[str, Any] = {"isError": True, "code": "cancelled"}
        try:
            root = await self._runtime.filesystem(tenant)
            if name in SHELL_TOOLS:
                result = await self._shells.call(root, session, name, arguments, exec_id=exec_id, by=by)
            else:
                result = await self._files.call(root, session, name, arguments)
            outcome = {"isError": result.is_error, "code": result.code}
        except GatewayError as error:
            outcome["code"] = error.code
            raise
        finally:
            ms = round((time.perf_counter() - began) * 1000, 3)
            self._bus.publish("tool.finished", tenant, {"name": name, **who, "ms": ms, **outcome})
        if name in _WRITES and not result.is_error:
            file_written(self._bus, tenant, told.get("file_path", ""), by)
        return result
