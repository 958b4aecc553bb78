"""Calls of tools: checks scopes, finds the session, runs each call once, and publishes events.

The websocket, HTTP and MCP call tools through it. It finds the tenant's files and passes the call to the
package that runs it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol

import orjson

from gateway.errors import (
    Cancelled,
    Conflict,
    GatewayError,
    InvalidParams,
    NotFound,
    Timeout,
    Unavailable,
)
from gateway.events import Bus
from gateway.files.files import file_written
from gateway.idempotency import Idempotency, Key
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.refusals import Spare, nothing_to_spare
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.storage.store import StoreFailed
from gateway.tasks import begin
from gateway.tools.file_tools import FileTools, ToolResult
from gateway.tools.schemas import SHELL_TOOLS, descriptions
from gateway.tools.session import Background, Sessions, ToolSession

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
# the parts of a call's input that its events contain; never contents of files
_TOLD: Final = (
    *("file_path", "path", "pattern", "glob", "type", "output_mode"),
    *("command", "description", "bash_id", "shell_id", "filter"),
)
_VALUES_MAX: Final = 256  # values in lists and objects of one input; no tool here takes any
_WRITES: Final = frozenset({"Write", "Edit"})
# tools whose effects may outlast the gateway
_LASTING: Final = _WRITES | {"Bash"}


class _Running:
    """A running call under a `callId`: its input, and its waiting callers."""

    __slots__ = ("_asked", "_lingering", "_waiting", "digest", "work")

    def __init__(self, digest: bytes, work: Callable[[], Awaitable[ToolResult]]) -> None:
        self.digest = digest
        self._lingering: asyncio.TimerHandle | None = None
        self._waiting: set[asyncio.Future[ToolResult]] = set()
        self._asked = 0.0  # until when a caller that left may return
        self.work = begin(self._do(work))
        self.work.add_done_callback(self._over)

    async def _do(self, work: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        result = await work()
        # not when this task ends, which others see one turn of the loop later
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
        """Wait for the result. The work is ended `linger` seconds after its last caller has left.

        Of several callers that left, the longest `linger` counts. Raises what the work raises, and
        `Cancelled` if it was given up.
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


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuse deep or large inputs that no tool takes: a list of lists takes thirty times its text's memory.

    Raises `InvalidParams`.
    """
    left, inside = _VALUES_MAX, [*arguments.values()]
    while inside:
        value = inside.pop()
        if isinstance(value, dict | list):
            left -= len(value)
            if left < 0:
                raise InvalidParams(f"a tool's input may have at most {_VALUES_MAX} values")
            inside += value.values() if isinstance(value, dict) else value


def _given_up() -> Cancelled:
    return Cancelled("the caller gave up the call")


class ShellTools(Background, Protocol):
    """Runs Bash, BashOutput and KillShell; `gateway.shells` implements it."""

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


class Turns(Protocol):
    """Records what calls may have changed; `gateway.history` implements it."""

    def during(
        self, root: FilesystemRoot, session: ToolSession, tool: str, arguments: Mapping[str, Any], by: str
    ) -> AbstractAsyncContextManager[Callable[[ToolResult], None]]:
        """Note a call while it runs, and its result. Refuses nothing.

        Waits, for a moment, only where it would hide what somebody else has just changed.
        """
        ...


class Toolbox:
    """The tools of every tenant, their sessions and their idempotency. Used from the event loop only.

    Use as an async context manager; it opens and closes its sessions too.
    """

    def __init__(
        self,
        runtime: TenantRuntime,
        workers: Workers,
        shells: ShellTools,
        turns: Turns,
        bus: Bus,
        idempotency: Idempotency,
        settings: Settings,
        spare: Spare = nothing_to_spare,
    ) -> None:
        self._runtime = runtime
        self._turns = turns
        self._shells = shells
        self._files = FileTools(workers, settings, spare)
        self._bus = bus
        self._settings = settings
        self._idempotency = idempotency
        self._running: dict[Key, _Running] = {}
        self.sessions = Sessions(shells, settings)

    async def __aenter__(self) -> Toolbox:
        await self.sessions.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = [one.work for one in self._running.values()]
        for work in running:
            work.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.sessions.__aexit__(kind, error, trace)

    SCOPES: Final = frozenset(_SCOPES.values())

    def descriptions(self) -> list[dict[str, Any]]:
        """Return the tools as `tools/list` shows them."""
        return descriptions()

    def scope(self, tool: str) -> str:
        """Return the scope that `tool` needs. Raises `NotFound` for an unknown one."""
        try:
            return _SCOPES[tool]
        except KeyError:
            known = ", ".join(_SCOPES)
            raise NotFound(f"no tool {tool[:100]}; there are {known}") from None

    async def call(
        self,
        tenant: str,
        session: ToolSession,
        name: str,
        arguments: Mapping[str, Any],
        *,
        by: str = "",
        call_id: str | None = None,
        linger: float | None = None,
    ) -> ToolResult:
        """Run one tool; with a `call_id` that was used before, return the result of that call.

        A call with an id continues for `linger` seconds after its caller has left (at most and by default
        `call_linger`), so that a client whose connection broke can repeat it. `give_up` ends it. Raises
        `Conflict` if the id was used with another input, `Cancelled` if it was cancelled, `Gone` if the
        gateway was restarted during the call, `StoreFailed` if it cannot be recorded, and what
        `FileTools.call` raises.
        """
        _check(arguments)
        if call_id is None:
            return await self._call(tenant, session, name, arguments, by, call_id)
        digest = hashlib.sha256(orjson.dumps([name, arguments], option=orjson.OPT_SORT_KEYS)).digest()
        key: Key = (tenant, "call", call_id)
        running = self._running.get(key)
        if running is None:
            known = await self._idempotency.result(key, digest)
            if known is not None:
                return ToolResult.unpacked(known)
            running = self._running.get(key)  # another may have come first meanwhile
        if running is None:
            running = _Running(digest, partial(self._once, key, digest, session, name, arguments, by))
            self._running[key] = running
            running.work.add_done_callback(lambda _: self._running.pop(key))
        elif running.digest != digest:
            raise Conflict(f"callId {call_id} was used with another input", callId=call_id)
        longest = self._settings.call_linger
        return await running.result(longest if linger is None else min(linger, longest))

    async def _once(
        self,
        key: Key,
        digest: bytes,
        session: ToolSession,
        name: str,
        arguments: Mapping[str, Any],
        by: str,
    ) -> ToolResult:
        """Make a call and store its result under its id."""
        tenant, _, call_id = key
        if name not in _LASTING:
            result = await self._call(tenant, session, name, arguments, by, call_id)
            self._idempotency.keep(key, digest, result.packed())
            return result
        await self._idempotency.begin(key, digest)
        try:
            result = await self._call(tenant, session, name, arguments, by, call_id)
        except asyncio.CancelledError:
            await asyncio.shield(self._idempotency.fence(key))  # it may have had some effect
            raise
        except (Unavailable, Timeout):
            raise  # unknown whether it had an effect: it stays recorded as begun
        except GatewayError:
            await self._idempotency.forget(key)  # it had no effect: it may be repeated
            raise
        try:
            await self._idempotency.finish(key, digest, result.packed())
        except StoreFailed as failed:
            log.error("the result of a call of %s will not outlive this process: %s", tenant, failed.message)
        return result

    async def give_up(self, tenant: str, call_id: str) -> None:
        """End the call that runs under this id, for all callers, and wait until it has ended."""
        running = self._running.get((tenant, "call", call_id))
        if running is not None and not running.work.done():
            running.work.cancel()
            await asyncio.wait([running.work])

    async def fence(self, tenant: str, call_id: str) -> None:
        """Cancel the call under this id, even if it arrives only later."""
        await self.give_up(tenant, call_id)
        await self._idempotency.fence((tenant, "call", call_id))

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
        session.holders += 1  # it must not make room for another meanwhile
        outcome: dict[str, Any] = {"isError": True, "code": "cancelled"}
        try:
            root = await self._runtime.filesystem(tenant)
            async with self._turns.during(root, session, name, arguments, by) as note:
                if name in SHELL_TOOLS:
                    result = await self._shells.call(root, session, name, arguments, exec_id=exec_id, by=by)
                else:
                    result = await self._files.call(root, session, name, arguments)
                note(result)
            outcome = {"isError": result.is_error, "code": result.code}
        except GatewayError as error:
            outcome["code"] = error.code
            raise
        finally:
            session.holders -= 1
            ms = round((time.perf_counter() - began) * 1000, 3)
            self._bus.publish("tool.finished", tenant, {"name": name, **who, "ms": ms, **outcome})
        if name in _WRITES and not result.is_error:
            file_written(self._bus, tenant, told.get("file_path", ""), by, name)
        return result
