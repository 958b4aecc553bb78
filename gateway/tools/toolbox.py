"""Calls of tools: checks scopes, finds the session, runs each call once, and publishes events.

The websocket, HTTP and MCP call tools through `Toolbox`. `FileTools` passes Read, Write, Edit, Glob and Grep
to the tenant's workers; `ShellTools`, which `gateway.shells` implements, runs Bash, BashOutput and KillShell.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol

import orjson

from gateway.errors import Cancelled, Conflict, GatewayError, NotFound, Timeout, Unavailable
from gateway.events import Bus
from gateway.files.files import file_written
from gateway.idempotency import Idempotency, Key
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.paths import locate
from gateway.rootfs.root import NO_SPACE, Spare, nothing_to_spare
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.storage.store import StoreFailed
from gateway.tasks import begin
from gateway.tools.call import Seen, ToolAnswer, ToolFailure, decode, meant, timed_out
from gateway.tools.schemas import FILE_TOOLS, SHELL_TOOLS, check_size, descriptions
from gateway.tools.session import Background, SessionFolders, Sessions, ToolSession

log = logging.getLogger(__name__)

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
_BRIEF: Final = frozenset(
    {"file_path", "path", "pattern", "glob", "type", "output_mode"}
    | {"command", "description", "bash_id", "shell_id", "filter"}
)
_WRITES: Final = frozenset({"Write", "Edit"})
_WRITTEN: Final = 1.0  # seconds for calls of these to end while clients wait for the next process
# tools whose effects may outlast the gateway
_LASTING: Final = _WRITES | {"Bash"}
_SEARCHES: Final = frozenset({"Glob", "Grep"})
_CORES: Final = os.cpu_count() or 1
_PROCESSES_MAX: Final = 4  # of one search
CALL_LINGER: Final = 30.0  # seconds that a call with an id goes on without its caller, who may come back
_BRIEFLY: Final = 0.1  # seconds a call may have been running when the gateway is handed over


@dataclass(frozen=True, slots=True)
class LastingCall:
    """A call under its caller's id, as recorded with its command. Times are in seconds."""

    id: str
    digest: str  # of its input, in hexadecimal digits
    linger: float  # how long it continues without its caller
    event: str  # its id in events
    by: str
    began: float  # since the epoch


class AdoptedCall(Protocol):
    """A command of an earlier process. `in_front` means that its call has not been answered."""

    @property
    def tenant(self) -> str: ...

    @property
    def exec_id(self) -> str: ...

    @property
    def session(self) -> str | None:
        """The name of its session, or None."""
        ...

    @property
    def cwd(self) -> str | None:
        """The session's folder when it began."""
        ...

    @property
    def call(self) -> LastingCall | None: ...

    @property
    def in_front(self) -> bool: ...


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
        call_id: str | None = None,
        call: LastingCall | None = None,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> EncodedResult: ...

    def answered(self, exec_id: str) -> None: ...

    async def leave(self) -> set[tuple[str, str]]:
        """Leave the held commands to the next process; return the tenants and ids of their calls."""
        ...

    def adopted(self) -> Iterator[Any]:  # of `AdoptedCall`
        ...

    def discard(self, left: Any) -> None: ...

    def take_over(self, root: FilesystemRoot, session: ToolSession, left: Any) -> None: ...

    async def resume(self, root: FilesystemRoot, session: ToolSession, left: Any) -> EncodedResult: ...


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """One finished tool call.

    `encoded` is the JSON of `{content, isError, structuredContent}`, which is spliced into a reply unchanged.
    `code` is a wire code if the tool failed.
    """

    encoded: bytes
    is_error: bool
    code: str | None = None

    @classmethod
    def of(cls, answer: ToolAnswer) -> EncodedResult:
        head, body = decode(answer.encode())
        return cls(body, head["is_error"], head["code"])

    def packed(self) -> bytes:
        """Return the result as one value for storage; `unpacked` reverses it."""
        return orjson.dumps([self.is_error, self.code]) + b"\n" + self.encoded

    @classmethod
    def unpacked(cls, packed: bytes) -> EncodedResult:
        head, _, encoded = packed.partition(b"\n")
        is_error, code = orjson.loads(head)
        return cls(encoded, is_error, code)

    def data(self) -> dict[str, Any]:
        """Decode the result, for the few callers that read it."""
        found: dict[str, Any] = orjson.loads(self.encoded)
        return found


class FileTools:
    """Read, Write, Edit, Glob and Grep on a tenant's workspace. None of it runs in the container."""

    def __init__(self, workers: Workers, settings: Settings, spare: Spare = nothing_to_spare) -> None:
        self._workers = workers
        self._settings = settings
        self._spare = spare

    async def call(
        self, root: FilesystemRoot, session: ToolSession, name: str, arguments: object
    ) -> EncodedResult:
        """Run one tool. A refusal by the tool itself is a result.

        Raises `NotFound` for an unknown tool, `InvalidParams` for input that is not JSON, and `Unavailable`,
        `RateLimited` or `Timeout` of the worker.
        """
        if name not in FILE_TOOLS:
            raise NotFound(f"no such tool: {str(name)[:100]}")
        session.last_used = time.monotonic()
        cwd = session.cwd or root.workspace
        path = named_file(arguments, cwd, root.workspace)
        seen = session.seen(path) if path is not None else None
        given = {
            "input": arguments,
            "cwd": cwd,
            "seen": seen.wire() if seen else None,
            "read_first": session.read_before_write,
            "brief": name in _SEARCHES,
            "named": None,
        }
        if name in _SEARCHES:
            return await self._search(root, name, given)
        # rendering a document takes long, and must not block other reads
        apart = name == "Read" and (path or "").lower().endswith(".pdf")
        head, body = decode(await self._workers.call(root, name, given, search=apart))
        while head["is_error"] and _had_no_room(name, body) and await self._spare(root.tenant):
            head, body = decode(await self._workers.call(root, name, given))
        if path is not None and head["seen"] is not None:
            session.remember(path, Seen(*head["seen"]))
        return EncodedResult(body, head["is_error"], head["code"])

    async def _search(self, root: FilesystemRoot, name: str, given: dict[str, Any]) -> EncodedResult:
        # Most searches end quickly, so the worker for single files tries first: it is awake and warm.
        # A longer one goes to a worker where it blocks no other call.
        apart = not self._workers.rests(root.tenant)
        head, body = decode(await self._workers.call(root, name, given, search=apart))
        if head["code"] == "timeout":
            given["brief"] = False
            if name == "Grep":
                try:
                    named = await self._named(root, {"input": given["input"], "cwd": given["cwd"]})
                except Timeout:
                    return EncodedResult.of(timed_out(self._settings.tool_timeout).answer())
                given["named"] = None if named is None else named.decode("latin-1")
            head, body = decode(await self._workers.call(root, name, given, search=True))
        return EncodedResult(body, head["is_error"], head["code"])

    async def _named(self, root: FilesystemRoot, asked: dict[str, Any]) -> bytes | None:
        """Return the names of the matching files in a large tree; None if one worker must walk it instead."""
        # a core for each process if no other tenant needs one: a second one on two cores left none to
        # the neighbours, the p99 of their reads tripled
        cores = min(_CORES if self._workers.alone(root.tenant) else max(1, _CORES // 2), _PROCESSES_MAX)
        return await self._workers.scan(root, asked, cores)


def _had_no_room(name: str, body: bytes) -> bool:
    """Say whether a tool failed since the disk was full."""
    return name in _WRITES and orjson.loads(body)["structuredContent"].get("reason") == NO_SPACE


def named_file(arguments: object, cwd: str, workspace: str) -> str | None:
    """Return the relative path of the file that a call names, None if it names none in the workspace."""
    given = arguments.get("file_path") if isinstance(arguments, dict) else None
    if not isinstance(given, str):
        return None
    try:
        return locate(meant(given), cwd, workspace)
    except GatewayError:
        return None


class HandedOver(Unavailable):
    """The gateway is ending; the next one continues the call and answers it under its id."""

    def __init__(self) -> None:
        super().__init__("the gateway is being restarted; call again with the same id", retry_after=1)


class Running:
    """A running call of a tool under a `callId`: its input, and its waiting callers."""

    __slots__ = ("_asked", "_lingering", "_since", "_waiting", "digest", "tool", "work")

    def __init__(self, tool: str, digest: bytes, work: Callable[[], Awaitable[EncodedResult]]) -> None:
        self.tool = tool
        self.digest = digest
        self._lingering: asyncio.TimerHandle | None = None
        self._waiting: set[asyncio.Future[EncodedResult]] = set()
        self._asked = 0.0  # until when a caller that left may return
        self._since = asyncio.get_running_loop().time()
        self.work = begin(self._do(work))
        self.work.add_done_callback(self._over)

    async def _do(self, work: Callable[[], Awaitable[EncodedResult]]) -> EncodedResult:
        result = await work()
        # not at this task's end, which others notice one turn of the loop later
        self._tell(lambda one: one.set_result(result))
        return result

    def _over(self, work: asyncio.Task[EncodedResult]) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        if work.cancelled():
            self._tell(lambda one: one.set_exception(given_up()))
        elif (error := work.exception()) is not None:
            self._tell(lambda one: one.set_exception(error))

    def _tell(self, how: Callable[[asyncio.Future[EncodedResult]], None]) -> None:
        for one in self._waiting:
            if not one.done():
                how(one)

    async def result(self, linger: float) -> EncodedResult:
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
        one: asyncio.Future[EncodedResult] = loop.create_future()
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
        self._tell(lambda one: one.set_exception(HandedOver()))


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


class TurnRecorder(Protocol):
    """Records what calls may have changed; `gateway.history` implements it."""

    def during(
        self, root: FilesystemRoot, session: ToolSession, tool: str, arguments: Mapping[str, Any], by: str
    ) -> AbstractAsyncContextManager[Callable[[EncodedResult], None]]:
        """Note a call while it runs, and its result. Never refuses a call.

        Waits, briefly, only if the call would hide what somebody else has just changed.
        """
        ...


class Toolbox:
    """The tools of every tenant, their sessions and their idempotency. Used from the event loop only.

    Use as an async context manager; it opens and closes its sessions too.
    """

    def __init__(
        self,
        runtime: TenantRuntime,
        files: FileTools,
        shells: ShellTools,
        turns: TurnRecorder,
        bus: Bus,
        idempotency: Idempotency,
        folders: SessionFolders,
        settings: Settings,
    ) -> None:
        self._runtime = runtime
        self._turns = turns
        self._shells = shells
        self._files = files
        self._bus = bus
        self._settings = settings
        self._idempotency = idempotency
        self._running: dict[Key, Running] = {}
        self._leaving = False
        self.sessions = Sessions(shells, folders)

    async def __aenter__(self) -> Toolbox:
        """Continue the calls and background commands of earlier processes."""
        await self.sessions.__aenter__()
        for left in self._shells.adopted():
            await self._take_over(left)
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
    ) -> EncodedResult:
        """Run one tool; with a `call_id` that was used before, return the result of that call.

        A call with an id continues for `linger` seconds after its caller has left (at most and by default
        `CALL_LINGER`), so that a client whose connection broke can repeat it. `give_up` ends it. Raises
        `Conflict` if the id was used with another input, `Cancelled` if it was cancelled, `Gone` if the
        gateway was restarted during the call, `StoreFailed` if it cannot be recorded, and what
        `FileTools.call` raises.
        """
        self.scope(name)
        try:
            check_size(name, arguments)
        except ToolFailure as error:
            return EncodedResult.of(error.answer())
        if call_id is None:
            exec_id = _exec_id(name)
            try:
                return await self._call(tenant, session, name, arguments, by, None, exec_id=exec_id)
            finally:
                if exec_id:
                    self._shells.answered(exec_id)
        linger = CALL_LINGER if linger is None else min(linger, CALL_LINGER)
        digest = hashlib.sha256(orjson.dumps([name, arguments], option=orjson.OPT_SORT_KEYS)).digest()
        key: Key = (tenant, "call", call_id)
        running = self._running.get(key)
        if running is None:
            known = await self._idempotency.result(key, digest)
            if known is not None:
                return EncodedResult.unpacked(known)
            running = self._running.get(key)  # another call may have come first
        if running is None:
            if self._leaving:
                raise HandedOver
            work = partial(self._first, key, digest, session, name, arguments, by, linger)
            running = self._begin(key, name, digest, work)
        elif running.digest != digest:
            raise Conflict(f"callId {call_id} was used with a different input", callId=call_id)
        return await running.result(linger)

    def _begin(
        self, key: Key, tool: str, digest: bytes, work: Callable[[], Awaitable[EncodedResult]]
    ) -> Running:
        running = self._running[key] = Running(tool, digest, work)
        running.work.add_done_callback(lambda _: self._running.pop(key))
        return running

    async def _first(
        self,
        key: Key,
        digest: bytes,
        session: ToolSession,
        name: str,
        arguments: Mapping[str, Any],
        by: str,
        linger: float,
    ) -> EncodedResult:
        """Make a call and store its result under its id."""
        tenant, _, call_id = key
        if name not in _LASTING:
            result = await self._call(tenant, session, name, arguments, by, call_id)
            self._idempotency.keep(key, digest, result.packed())
            return result
        begin = partial(self._idempotency.begin, key, digest)
        if name != "Bash":
            await begin()
        call = LastingCall(call_id, digest.hex(), linger, _event_id(), by, time.time())
        exec_id = _exec_id(name)
        work = self._call(
            tenant, session, name, arguments, by, call_id, exec_id=exec_id, call=call, begin=begin
        )
        return await self._recorded(key, digest, work, exec_id)

    async def _recorded(
        self, key: Key, digest: bytes, work: Awaitable[EncodedResult], exec_id: str
    ) -> EncodedResult:
        """Wait for a call that is recorded as begun, and store its result."""
        try:
            result = await work
            try:
                await self._idempotency.finish(key, digest, result.packed())
            except StoreFailed as failed:
                log.error(
                    "the result of a call of %s will not outlive this process: %s", key[0], failed.message
                )
            return result
        except asyncio.CancelledError:
            if not self._leaving:  # else the next process may continue it
                await asyncio.shield(self._idempotency.fence(key))  # it may have had some effect
            raise
        except (Unavailable, Timeout):
            raise  # unknown whether it had an effect: it stays recorded as begun
        except GatewayError:
            await self._idempotency.forget(key)  # it had no effect: it may be repeated
            raise
        finally:
            if not self._leaving:
                self._shells.answered(exec_id)

    # --- across a restart of the gateway ---------------------------------------------------------------

    async def rest(self) -> None:
        """Wait until no call that changes files has been running for more than a moment.

        Others go on; a tenant whose calls all take long is waited for as long as one of them may take.
        """
        await only_brief(self._writing, self._settings.tool_timeout)

    def _writing(self) -> list[Running]:
        return [running for running in self._running.values() if running.tool in _WRITES]

    async def leave(self) -> None:
        """Leave the held calls and commands to the next process, and tell their callers so.

        Calls that change files are waited for, since that process could only say that their outcome is
        unknown.
        """
        self._leaving = True
        for tenant, call_id in await self._shells.leave():
            if (running := self._running.get((tenant, "call", call_id))) is not None:
                running.leave()
        if writing := self._writing():
            await asyncio.wait([one.work for one in writing], timeout=_WRITTEN)

    async def _take_over(self, left: AdoptedCall) -> None:
        """Continue what an earlier process left behind, if it may still be needed."""
        call, running = left.call, False
        key: Key = (left.tenant, "call", "" if call is None else call.id)
        try:
            if call is not None:
                digest = bytes.fromhex(call.digest)
                running = self._idempotency.begun(key, digest)
            if not running if left.in_front else left.session is None:
                self._shells.discard(left)
                return
            root = await self._runtime.filesystem(left.tenant)
            if left.session is None:
                session = ToolSession(cwd=left.cwd)
            else:
                session = self.sessions.open(left.tenant, left.session, False)
            self._shells.take_over(root, session, left)
        except (GatewayError, ValueError) as error:
            log.warning("exec %s of %s is not continued: %s", left.exec_id, left.tenant, error)
            self._shells.discard(left)
            return
        if call is not None and running:
            work = partial(self._finish, key, digest, root, session, left, call)
            self._begin(key, "Bash", digest, work).expect(min(call.linger, CALL_LINGER))

    async def _finish(
        self,
        key: Key,
        digest: bytes,
        root: FilesystemRoot,
        session: ToolSession,
        left: AdoptedCall,
        call: LastingCall,
    ) -> EncodedResult:
        """Finish a call of an earlier process."""
        work = self._finished(root, session, left, call)
        return await self._recorded(key, digest, work, left.exec_id)

    async def _finished(
        self, root: FilesystemRoot, session: ToolSession, left: AdoptedCall, call: LastingCall
    ) -> EncodedResult:
        who = {"call": call.event, "by": call.by, "callId": call.id}
        with self._published(left.tenant, session, "Bash", who, call.began) as outcome:
            async with self._turns.during(root, session, "Bash", {}, call.by) as note:
                result = await self._shells.resume(root, session, left)
                note(result)
            outcome(result)
        await self.sessions.keep(left.tenant, session)
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
        *,
        exec_id: str = "",
        call: LastingCall | None = None,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> EncodedResult:
        brief = {
            key: value[:200] for key, value in arguments.items() if key in _BRIEF and isinstance(value, str)
        }
        who = {"call": _event_id() if call is None else call.event, "by": by}  # in both events of the call
        if call_id is not None:
            who["callId"] = call_id
        started: dict[str, Any] = {"name": name, "input": brief, **who}
        if exec_id:
            started["exec"] = exec_id
        self._bus.publish("tool.started", tenant, started)
        with self._published(tenant, session, name, who, time.time()) as outcome:
            root = await self._runtime.filesystem(tenant)
            async with self._turns.during(root, session, name, arguments, by) as note:
                if name in SHELL_TOOLS:
                    result = await self._shells.call(
                        *(root, session, name, arguments),
                        exec_id=exec_id,
                        by=by,
                        call_id=call_id,
                        call=call,
                        begin=begin,
                    )
                else:
                    result = await self._files.call(root, session, name, arguments)
                note(result)
            outcome(result)
        if name == "Bash":
            await self.sessions.keep(tenant, session)
        if name in _WRITES and not result.is_error:
            file_written(self._bus, tenant, brief.get("file_path", ""), by, name)
        return result

    @contextlib.contextmanager
    def _published(
        self, tenant: str, session: ToolSession, name: str, who: Mapping[str, Any], began: float
    ) -> Iterator[Callable[[EncodedResult], None]]:
        """Publish how a call ends; the block passes its result to the yielded function."""
        outcome: dict[str, Any] = {"isError": True, "code": "cancelled"}
        session.holders += 1  # so that it is not dropped to make room during the call
        try:
            yield lambda result: outcome.update(isError=result.is_error, code=result.code)
        except GatewayError as error:
            outcome["code"] = error.code
            raise
        finally:
            session.holders -= 1
            if not self._leaving or outcome["code"] != "cancelled":  # else the next process publishes it
                ms = round((time.time() - began) * 1000, 3)
                self._bus.publish("tool.finished", tenant, {"name": name, **who, "ms": ms, **outcome})


def _event_id() -> str:
    return f"c-{secrets.token_hex(8)}"


def _exec_id(name: str) -> str:
    return f"x-{secrets.token_hex(8)}" if name == "Bash" else ""
