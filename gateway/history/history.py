"""The histories of all tenants: when turns begin and end, and the list of those that ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Final

from gateway.errors import InvalidParams, NotFound
from gateway.events import Bus, Filter
from gateway.execs import Execs
from gateway.history import recorder
from gateway.history.outside import PATIENCE, OutsideChanges
from gateway.history.recorder import OpenTurn, OpenTurns, Recorder, Side
from gateway.history.repository import ID, TITLE_MAX, Commit, Repository, clean_text, deployed, name
from gateway.rootfs import FilesystemRoot
from gateway.runtime import TenantEvent, TenantRuntime
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import EncodedResult, named_file

_WRITING: Final = frozenset({"Write", "Edit"})
_CHANGING: Final = _WRITING | {"Bash"}
_LIST_MAX: Final = 200
_STARTED: Final = frozenset({"tenant.started", "tenant.restarted"})
_FOLLOWED: Final = (
    *("deployment.started", "deployment.succeeded", "deployment.rolledback"),
    *("exec.started", "file.written"),
)


class History:
    """Turns of all tenants. Used from the event loop only; an async context manager.

    A tool call only notes what it may change. Commits are made later, one at a time in each tenant, when a
    session ends its turn or has been idle for `TURN_REST`.
    """

    def __init__(self, runtime: TenantRuntime, execs: Execs, bus: Bus, settings: Settings) -> None:
        self._bus = bus
        self._settings = settings
        self._repository = Repository(runtime, execs, settings)
        self._open = OpenTurns()
        self._recorder = Recorder(self._repository, self._open, bus, settings)
        self.afterwards = self._recorder.afterwards
        """What waits until few deployments are under way."""
        self._rests: dict[OpenTurn, asyncio.TimerHandle] = {}
        self._outside = OutsideChanges(execs.list, self._open, self._recorder)

    async def __aenter__(self) -> History:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._rests.values():
            timer.cancel()
        self._outside.close()
        await self._recorder.aclose()

    @property
    def on(self) -> bool:
        return self._settings.history

    def during(
        self, root: FilesystemRoot, session: ToolSession, tool: str, arguments: Mapping[str, Any], by: str
    ) -> AbstractAsyncContextManager[Callable[[EncodedResult], None]]:
        """Note what a tool call may change; it is recorded later. Yields a function for the call's result."""
        key = _key(session, by)
        turn = self._open.get(root.tenant, key)
        if not self.on or (turn is None and tool not in _CHANGING):
            return _NOTHING
        path = None
        if tool in _WRITING:
            path = named_file(arguments, session.cwd or root.workspace, root.workspace)
        return _TurnCall(
            self, root.tenant, key, turn, tool, path, by, lasting=arguments.get("run_in_background") is True
        )

    async def changing(self, tenant: str, key: Hashable, tool: str, path: str | None, by: str) -> OpenTurn:
        """Return the session's turn, which has noted what a call is about to change; for `_TurnCall`."""
        await self._recorder.still(tenant, PATIENCE)
        turn = self._open.get(tenant, key)
        if path is not None and (hidden := self._parts(tenant, path, turn, by)):
            await asyncio.wait(hidden, timeout=PATIENCE)
        turn = self._open.get(tenant, key)
        if turn is None or (path not in turn.paths and not turn.wide):
            first = turn is None or not turn.changed
            await self._outside.before(tenant, path, first=first)
            turn = self._open.get(tenant, key)
        if tool != "Write":  # only the result of a Write says whether it created its file
            self._recorder.expect(tenant)
        if turn is None:
            turn = self._open.open(tenant, OpenTurn(key, name(by), name(by)))
        if tool == "Bash" or path is not None:
            self._open.wrote(tenant, turn, path)
        return turn

    @contextlib.asynccontextmanager
    async def saving(
        self, root: FilesystemRoot, paths: Sequence[str], by: str, verb: str = "Saved"
    ) -> AsyncIterator[None]:
        """Let somebody change files without a tool; what others have changed there is recorded before."""
        if not self.on:
            yield
            return
        tenant, place = root.tenant, root.workspace
        self.afterwards.hurry(tenant)
        await self._recorder.still(tenant, PATIENCE)
        known = [path for path in (named_file({"file_path": one}, place, place) for one in paths) if path]
        hidden = [task for path in known for task in self._parts(tenant, path, None, by)]
        hidden += [task for path in known for task in self._outside.others(tenant, path, by)]
        if hidden:
            await asyncio.wait(hidden, timeout=PATIENCE)
        # noted before the change, or a commit made during it would leave it unattributed
        change = OpenTurn(by, by, by, paths=set(known))
        self._open.wait(tenant, change)
        try:
            yield
            for path in known:
                self._outside.saved(tenant, path, by, verb)
        finally:
            self._open.recorded(tenant, change)

    def _parts(self, tenant: str, path: str, turn: OpenTurn | None, by: str) -> Sequence[asyncio.Task[None]]:
        """Record what others have changed at a path that `turn`, or a person, is about to change."""
        waiting = self._open.waiting(tenant)
        known = any(one.touches(path) for one in self._open.unrecorded(tenant))
        others = [one for one in self._open.of(tenant) if one is not turn and path not in one.parted]
        found = [
            self._recorder.spawn(tenant, self._recorder.part(tenant, one, path))
            for one in others
            if one.touches(path) or (one.wide and not known)
        ]
        if any(one.key != by and (one.wide or one.touches(path)) for one in waiting):
            found.append(self._recorder.spawn(tenant, self._recorder.idle(tenant)))
        return found

    def called(self, tenant: str, turn: OpenTurn) -> None:
        """Have a turn rest from now on, unless it has ended; for `_TurnCall`."""
        if not turn.calls and self._open.get(tenant, turn.key) is turn:
            self._rest(tenant, turn)

    async def begin(
        self, tenant: str, session: ToolSession, title: str, agent: str | None, by: str
    ) -> Commit | None:
        """Begin a turn of a session with a title; return the previous one, now ended, if it changed anything.

        Raises what `end` raises.
        """
        self._check()
        before = await self.end(tenant, session, by)
        await self._recorder.ready(tenant)
        if others := self._outside.record(tenant):
            await asyncio.wait(others)  # they go on if this call is cancelled, as below
        key = _key(session, by)
        turn = OpenTurn(key, name(agent or by), name(by), clean_text(title, TITLE_MAX))
        self._rest(tenant, self._open.open(tenant, turn))
        return before

    async def end(self, tenant: str, session: ToolSession, by: str) -> Commit | None:
        """End a session's turn and return it once it is recorded; None if nothing changed."""
        self._check()
        turn = self._open.get(tenant, _key(session, by))
        return None if turn is None else await self._recorder.carried(self._finish(tenant, turn))

    def leave(self, tenant: str, session: ToolSession) -> None:
        """End the turn of a session that has ended, without waiting for it."""
        if session.lifetime != "named" and (turn := self._open.get(tenant, session)) is not None:
            self._recorder.spawn(tenant, self._finish(tenant, turn))

    # --- what is asked --------------------------------------------------------------------------------

    async def turns(self, tenant: str, most: int = 50, before: str | None = None) -> dict[str, Any]:
        """Return the turns of a tenant, latest first, and whether there may be more."""
        self._check()
        self.afterwards.hurry(tenant)
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

    async def restore(self, tenant: str, turn: str, side: Side, by: str) -> Commit | None:
        """Restore the files to before a turn, or to right after it, as a new turn; None if nothing changes.

        Open turns end first, so that their changes can be restored. Raises `NotFound`, and `Conflict` if
        something unrecorded is in the way.
        """
        self._check()
        _check_id(turn)
        await self._settle(tenant)
        return await self._recorder.carried(self._recorder.restore(tenant, turn, side, by))

    async def undo(self, tenant: str, turn: str, force: Collection[str], by: str) -> dict[str, Any]:
        """Take back exactly what one turn changed, as a new turn; later changes of others stay.

        Where these are of the same lines, nothing is changed: `conflicts` has the paths. Those in `force`
        become what they were before the turn. Open turns end first. Raises `NotFound`, and `Conflict` if
        something unrecorded is in the way.
        """
        self._check()
        _check_id(turn)
        await self._settle(tenant)
        undoing = self._recorder.undo(tenant, turn, frozenset(force), by)
        undone, conflicts = await self._recorder.carried(undoing)
        return {"turn": None if undone is None else undone.on_wire(), "conflicts": conflicts}

    async def _settle(self, tenant: str) -> None:
        """Record what was changed outside of turns, and end the open ones."""
        ending: set[asyncio.Task[Any]] = {*self._outside.record(tenant)}
        ending |= {self._recorder.spawn(tenant, self._finish(tenant, one)) for one in self._open.of(tenant)}
        ending |= {one.ending for one in self._open.waiting(tenant) if one.ending is not None}
        if ending:
            await asyncio.wait(ending)

    # --- with tenants and the gateway -------------------------------------------------------------------

    async def follow(self) -> None:
        """Record each deployed site, and what people change, until the bus closes."""
        async for event in self._bus.subscribe(Filter(types=_FOLLOWED), patient=True):
            if not self.on or event.tenant is None:
                continue
            data = event.data
            if event.type != "deployment.succeeded":
                self.afterwards.hurry(event.tenant)  # before more is changed
            match event.type:
                case "exec.started":
                    self._outside.ran(event.tenant, str(data["exec"]), str(data["by"]))
                case "deployment.started":
                    self._outside.record(event.tenant)
                    for turn in self._open.of(event.tenant):
                        if turn.wide:
                            self._recorder.spawn(event.tenant, self._recorder.part(event.tenant, turn, None))
                    self._recorder.deploying.add(event.tenant)
                case "deployment.succeeded":
                    title, by = deployed(data)
                    self._recorder.spawn(event.tenant, self._recorder.deployed(event.tenant, title, by))
                case "deployment.rolledback":
                    self._recorder.deploying.discard(event.tenant)

    def noticed(self, event: TenantEvent) -> None:
        """Handle an event of a tenant."""
        if event.ended is not None:
            self._forget(event.ended)
        if event.tenant is not None and event.type in _STARTED:
            self._recorder.again(event.tenant)

    async def recall(self, tenant: str) -> None:
        """Forget what is in memory of a tenant that has just come from another member, or gone to one."""
        self._forget(tenant)

    def _forget(self, tenant: str) -> None:
        self._recorder.forget(tenant)
        self._outside.forget(tenant)
        for turn in self._open.forget(tenant):
            self._end_rest(turn)

    async def close_turns(self) -> None:
        """Record every open turn: the gateway is ending."""
        ending = self._outside.record_all()
        ending += [
            self._recorder.spawn(tenant, self._finish(tenant, turn)) for tenant, turn in self._open.all()
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_timeout / 4):
                await asyncio.gather(*ending)
                await self.afterwards.finish()

    # --- how a turn ends --------------------------------------------------------------------------------

    def _rest(self, tenant: str, turn: OpenTurn) -> None:
        """End a turn once its session has called nothing for `TURN_REST` seconds from now on.

        Calls are many: a timer that already runs finds out when it fires whether there was one.
        """
        loop = asyncio.get_running_loop()
        turn.rested = loop.time() + recorder.TURN_REST
        if turn not in self._rests:
            self._rests[turn] = loop.call_at(turn.rested, self._rested, tenant, turn)

    def _end_rest(self, turn: OpenTurn) -> None:
        if (timer := self._rests.pop(turn, None)) is not None:
            timer.cancel()

    def _rested(self, tenant: str, turn: OpenTurn) -> None:
        del self._rests[turn]
        loop = asyncio.get_running_loop()
        if turn.calls:
            return  # `called` counts from the end of the last of them
        if loop.time() < turn.rested:
            self._rests[turn] = loop.call_at(turn.rested, self._rested, tenant, turn)
        else:
            self._recorder.spawn(tenant, self._finish(tenant, turn))

    async def _finish(self, tenant: str, turn: OpenTurn) -> Commit | None:
        self._end_rest(turn)
        turn.ending = asyncio.current_task()
        if self._open.get(tenant, turn.key) is turn:
            self._open.take(tenant, turn.key)
        if not turn.changed:
            return None
        self._open.wait(tenant, turn)
        if turn.wide and (others := self._outside.record(tenant)):
            await asyncio.wait(others)  # or what others have changed would be unattributed
        return await self._recorder.record(tenant, turn)

    def _check(self) -> None:
        if not self.on:
            raise NotFound("this gateway keeps no history: GATEWAY_HISTORY is off", reason="off")


class _TurnCall:
    """A tool call inside a turn. Written by hand, since a generator's context costs four times as much."""

    __slots__ = ("_by", "_history", "_key", "_lasting", "_path", "_tenant", "_tool", "_turn")

    def __init__(
        self,
        history: History,
        tenant: str,
        key: Hashable,
        turn: OpenTurn | None,
        tool: str,
        path: str | None,
        by: str,
        *,
        lasting: bool,
    ) -> None:
        """`turn` is that of a call that changes nothing; with `lasting` something of it runs on."""
        self._history = history
        self._tenant = tenant
        self._key = key
        self._turn = turn
        self._tool = tool
        self._path = path
        self._by = by
        self._lasting = lasting

    async def __aenter__(self) -> Callable[[EncodedResult], None]:
        if self._tool in _CHANGING:
            self._turn = await self._history.changing(
                self._tenant, self._key, self._tool, self._path, self._by
            )
        assert self._turn is not None
        self._turn.calls += 1
        if self._tool in _CHANGING:
            self._turn.begin(lasting=self._lasting)
        if self._tool == "Write" and self._path is not None:
            return partial(_note, self._turn, self._path)
        return _ignore_result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._turn is not None
        self._turn.calls -= 1
        if self._tool in _CHANGING:
            self._turn.end()
        self._history.called(self._tenant, self._turn)


def _note(turn: OpenTurn, path: str, result: EncodedResult) -> None:
    """Note that a Write created its file, so that the first commit of a workspace leaves it to its turn."""
    if not result.is_error and path in turn.paths and result.data()["structuredContent"]["type"] == "create":
        turn.made.add(path)


def _ignore_result(result: EncodedResult) -> None:
    """Ignore a result that does not matter to the turn."""


# of a call that changes nothing outside a turn: a Read is served often
_NOTHING: Final = contextlib.nullcontext(_ignore_result)


def _key(session: ToolSession, by: str) -> Hashable:
    """Return who owns a call's turn: its session or, if that is for this call only, its subject."""
    return by if session.lifetime == "call" else session


def _check_id(turn: str) -> None:
    if not ID.fullmatch(turn):
        raise InvalidParams("a turn is 40 hexadecimal digits, as in history/list", field="turn")
