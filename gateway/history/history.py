"""The histories of all tenants: when turns begin and end, and how each becomes a commit beside the calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal
from weakref import WeakValueDictionary

from gateway.errors import (
    ExecFailed,
    GatewayError,
    InvalidParams,
    NotFound,
    TenantNotRunning,
    Timeout,
    Unavailable,
)
from gateway.events import Bus, Filter
from gateway.history.open_turns import OpenTurn, OpenTurns
from gateway.history.reading import ID, TITLE_MAX, Turn, name, said
from gateway.history.repository import Repository
from gateway.rootfs import FilesystemRoot
from gateway.runtime import TenantEvent, TenantRuntime
from gateway.settings import Settings
from gateway.tools.file_tools import ToolResult, named_file
from gateway.tools.session import ToolSession

log = logging.getLogger(__name__)

Side = Literal["before", "after"]

_CHANGING: Final = frozenset({"Write", "Edit", "Bash"})
_OUTSIDE: Final = "Changed outside of turns"
_FIRST: Final = "The workspace as it was found"
_LIST_MAX: Final = 200
_TRIES: Final = 3  # to record a turn of a tenant that runs
_LATE: Final = 64  # turns of one tenant that wait until it runs again
_TIDY: Final = 32  # commits after which a history is made small again
_STARTED: Final = frozenset({"tenant.started", "tenant.restarted"})


class History:
    """Turns of all tenants. Used from the event loop only; an async context manager.

    A tool call only notes what it may change. Commits are made apart, one at a time in each tenant, once a
    session ends its turn or has rested for `turn_rest`.
    """

    def __init__(self, runtime: TenantRuntime, bus: Bus, settings: Settings) -> None:
        self._runtime = runtime
        self._bus = bus
        self._settings = settings
        self._repository = Repository(runtime, settings)
        self._open = OpenTurns()
        self._timers: dict[OpenTurn, asyncio.TimerHandle] = {}
        self._late: dict[str, list[OpenTurn]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._begun: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, int] = {}  # commits of each tenant

    async def __aenter__(self) -> History:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def on(self) -> bool:
        return self._settings.history

    # --- what sessions do -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def during(
        self, root: FilesystemRoot, session: ToolSession, tool: str, arguments: Mapping[str, Any], by: str
    ) -> Iterator[Callable[[ToolResult], None]]:
        """Note what a tool call may change; it is recorded later. Yields what takes the result."""
        if not self.on:
            yield _unheard
            return
        key = _key(session, by)
        turn = self._open.get(root.tenant, key)
        if tool in _CHANGING:
            if tool != "Write":  # of one it is known only afterwards whether it made its file
                self.expect(root.tenant)
            if turn is None:
                turn = self._open.open(root.tenant, OpenTurn(key, name(by), name(by)))
            path = named_file(arguments, session.cwd or root.workspace, root.workspace)
            if tool == "Bash" or path is not None:
                turn.wrote(None if tool == "Bash" else path)
        if turn is None:
            yield _unheard
            return
        turn.calls += 1
        self._rest(turn)
        try:
            yield partial(_note, turn, path) if tool == "Write" and path is not None else _unheard
        finally:
            turn.calls -= 1
            if not turn.calls and self._open.get(root.tenant, key) is turn:
                self._wait(root.tenant, turn)

    def expect(self, tenant: str, made: Collection[str] = ()) -> None:
        """Have a history begun where there is none, so that the first turn can be taken back.

        What a turn that is open no longer has `made` is left to it, as is that of those that are open.
        """
        if self.on and tenant not in self._begun:
            self._begun[tenant] = self._spawn(self._begin(tenant, made))

    async def begin(
        self, tenant: str, session: ToolSession, title: str, agent: str | None, by: str
    ) -> Turn | None:
        """Begin a turn of a session with its title; return the one before, now ended, if it changed anything.

        Raises what `end` raises.
        """
        self._check()
        before = await self.end(tenant, session, by)
        await self._ready(tenant)
        key = _key(session, by)
        turn = OpenTurn(key, name(agent or by), name(by), said(title, TITLE_MAX))
        self._wait(tenant, self._open.open(tenant, turn))
        return before

    async def end(self, tenant: str, session: ToolSession, by: str) -> Turn | None:
        """End a session's turn and return it once it is recorded; None where nothing changed."""
        self._check()
        turn = self._open.get(tenant, _key(session, by))
        return None if turn is None else await self._finish(tenant, turn)

    def leave(self, tenant: str, session: ToolSession) -> None:
        """End the turn of a session that has ended, without waiting for it."""
        if session.life != "named" and (turn := self._open.get(tenant, session)) is not None:
            self._spawn(self._finish_quietly(tenant, turn))

    # --- what is asked --------------------------------------------------------------------------------

    async def turns(self, tenant: str, most: int = 50, before: str | None = None) -> dict[str, Any]:
        """Return the turns of a tenant, latest first, and whether there may be more."""
        self._check()
        if before is not None:
            _check_id(before)
        most = min(max(1, most), _LIST_MAX)
        found = await self._repository.turns(tenant, most, before)
        return {"turns": [turn.on_wire() for turn in found], "more": len(found) == most}

    async def changes(self, tenant: str, turn: str) -> dict[str, Any]:
        """Return a turn with the files that it changed and its patch. Raises `NotFound`."""
        self._check()
        _check_id(turn)
        return await self._repository.changes(tenant, turn)

    async def restore(self, tenant: str, turn: str, side: Side, by: str) -> Turn | None:
        """Make the files what they were before a turn, or right after it, as a new turn; None where they are.

        The open turns end first, so that what they changed can be gone back to. Raises `NotFound`, and
        `Conflict` where something that is not recorded is in the way.
        """
        self._check()
        _check_id(turn)
        for where, open_ in self._open.all():
            if where == tenant:
                await self._finish_quietly(tenant, open_)
        async with self._lock(tenant):
            changed = await self._repository.changes(tenant, turn)
            title = said(str(changed["title"]).partition("\n")[0], 200) or turn[:8]
            words = f"Undo: {title}" if side == "before" else f"Restore: {title}"
            outside = _made("outside", "nobody", "nobody", _OUTSIDE)
            new = _made("restored", name(by), name(by), words)
            found, restored = await self._repository.restore(tenant, turn, side, outside, new)
        for one in (found, restored):
            self._tell(tenant, one)
        return restored

    # --- with tenants and the gateway -------------------------------------------------------------------

    async def follow(self) -> None:
        """Record each site as it was deployed, and make its workspace a repository, until the bus closes."""
        async for event in self._bus.subscribe(Filter(types=("deployment.succeeded",))):
            if self.on and event.tenant is not None:
                self._spawn(self._deployed(event.tenant))

    async def _deployed(self, tenant: str) -> None:
        made = _made("deployed", "incus-gateway", "incus-gateway", "Deployed")
        # all that a session with an open turn is not known to have written
        turn = OpenTurn(object(), made.agent, made.by, wide=True)
        try:
            async with self._lock(tenant):
                mode, paths = self._open.share(tenant, turn)
                found = await self._repository.deployed(tenant, mode, paths, made)
        except GatewayError as error:
            _complain(tenant, error)
        else:
            self._begun.setdefault(tenant, self._spawn(asyncio.sleep(0)))
            self._tell(tenant, found)

    def noticed(self, event: TenantEvent) -> None:
        """Take notice of what happened to a tenant."""
        if event.ended is not None:
            self._begun.pop(event.ended, None)
            self._told.pop(event.ended, None)
            self._late.pop(event.ended, None)
            for turn in self._open.forget(event.ended):
                self._rest(turn)
        if event.tenant is not None and event.type in _STARTED:
            self._again(event.tenant)

    async def close_turns(self) -> None:
        """Record every open turn: the gateway is ending."""
        ending = [self._finish_quietly(tenant, turn) for tenant, turn in self._open.all()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_timeout / 4):
                await asyncio.gather(*ending)

    # --- how a turn becomes a commit --------------------------------------------------------------------

    def _rest(self, turn: OpenTurn) -> None:
        if (timer := self._timers.pop(turn, None)) is not None:
            timer.cancel()

    def _wait(self, tenant: str, turn: OpenTurn) -> None:
        self._rest(turn)
        loop = asyncio.get_running_loop()
        self._timers[turn] = loop.call_later(self._settings.turn_rest, self._rested, tenant, turn)

    def _rested(self, tenant: str, turn: OpenTurn) -> None:
        if not turn.calls:
            self._spawn(self._finish_quietly(tenant, turn))

    async def _finish(self, tenant: str, turn: OpenTurn) -> Turn | None:
        self._rest(turn)
        if self._open.get(tenant, turn.key) is turn:
            self._open.take(tenant, turn.key)
        return await self._record(tenant, turn) if turn.changed else None

    async def _finish_quietly(self, tenant: str, turn: OpenTurn) -> None:
        try:
            await self._finish(tenant, turn)
        except GatewayError as error:
            _complain(tenant, error)

    async def _record_quietly(self, tenant: str, turn: OpenTurn) -> None:
        try:
            await self._record(tenant, turn)
        except GatewayError as error:
            _complain(tenant, error)

    async def _record(self, tenant: str, turn: OpenTurn) -> Turn | None:
        made = _made("turn", turn.agent, turn.by, turn.title or "Untitled")
        await self._ready(tenant, turn.made)
        try:
            async with self._lock(tenant):
                mode, paths = self._open.share(tenant, turn)
                found = await self._repository.commit(tenant, mode, paths, made)
        except (TenantNotRunning, Unavailable, Timeout, ExecFailed) as error:
            self._postpone(tenant, turn, error)
            raise
        self._tell(tenant, found)
        return found

    def _postpone(self, tenant: str, turn: OpenTurn, error: GatewayError) -> None:
        """Record a turn later: when its tenant runs again, or, where it may be about to stop, in a while."""
        turn.tries += not isinstance(error, TenantNotRunning)
        if turn.tries > _TRIES or error.facts.get("reason") == "no_git":
            return
        waiting = self._late.setdefault(tenant, [])
        waiting.append(turn)
        del waiting[:-_LATE]
        if not isinstance(error, TenantNotRunning):
            asyncio.get_running_loop().call_later(self._settings.turn_rest, self._again, tenant)

    def _again(self, tenant: str) -> None:
        for turn in self._late.pop(tenant, []):
            self._spawn(self._record_quietly(tenant, turn))

    async def _ready(self, tenant: str, made: Collection[str] = ()) -> None:
        """Wait until the history has begun: whoever asks is no tool call."""
        self.expect(tenant, made)
        if (begun := self._begun.get(tenant)) is not None:
            await asyncio.wait([begun])

    async def _begin(self, tenant: str, made: Collection[str]) -> None:
        try:
            async with self._lock(tenant):
                first = _made("first", "incus-gateway", "incus-gateway", _FIRST)
                found = await self._repository.begin(tenant, [*self._open.made(tenant), *made], first)
        except GatewayError as error:
            self._begun.pop(tenant, None)
            _complain(tenant, error)
        else:
            self._tell(tenant, found)

    def _tell(self, tenant: str, turn: Turn | None) -> None:
        if turn is None:
            return
        self._bus.publish("turn.committed", tenant, turn.on_wire())
        told = self._told[tenant] = self._told.get(tenant, 0) + 1
        if told % _TIDY == 0:
            self._spawn(self._tidy(tenant))

    async def _tidy(self, tenant: str) -> None:
        try:
            async with self._lock(tenant):
                await self._repository.tidy(tenant)
        except GatewayError as error:
            log.warning("the history of %s could not be tidied: %s", tenant, error.message)

    def _lock(self, tenant: str) -> asyncio.Lock:
        lock = self._locks.get(tenant)
        if lock is None:
            lock = self._locks[tenant] = asyncio.Lock()
        return lock

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _check(self) -> None:
        if not self.on:
            raise NotFound("this gateway keeps no history: GATEWAY_HISTORY is off", reason="off")


def _note(turn: OpenTurn, path: str, result: ToolResult) -> None:
    """Note that a Write made its file, so that the first look at a workspace leaves it to its turn."""
    if not result.is_error and path in turn.paths and result.data()["structuredContent"]["type"] == "create":
        turn.made.add(path)


def _unheard(result: ToolResult) -> None:
    """Take a result that says nothing of a turn."""


def _key(session: ToolSession, by: str) -> Hashable:
    """Return whose turn a call is: its session's, or, where that is for the call alone, its subject's."""
    return by if session.life == "call" else session


def _made(kind: str, agent: str, by: str, title: str) -> Turn:
    return Turn("", kind, agent, by, title, int(time.time()))


def _check_id(turn: str) -> None:
    if not ID.fullmatch(turn):
        raise InvalidParams("a turn is 40 hexadecimal digits, as history/list tells them", field="turn")


def _complain(tenant: str, error: GatewayError) -> None:
    log.warning("a turn of %s could not be recorded: %s", tenant, error.message)
