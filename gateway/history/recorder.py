"""Makes commits of turns, one at a time in each tenant. Turns of a stopped tenant wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Coroutine
from typing import Any, Final, Literal, TypeVar
from weakref import WeakValueDictionary

from gateway.errors import Conflict, ExecFailed, GatewayError, TenantNotRunning, Timeout, Unavailable
from gateway.events import Bus
from gateway.history.afterwards import Afterwards
from gateway.history.open_turns import OpenTurn, OpenTurns
from gateway.history.reading import TITLE_MAX, Turn, name, nobody, said
from gateway.history.repository import Repository
from gateway.settings import Settings

log = logging.getLogger(__name__)

Side = Literal["before", "after"]
T = TypeVar("T")

_OURS: Final = "incus-gateway"  # author of commits without a turn
_TRIES: Final = 3  # tries to record a turn of a running tenant
_WRITES: Final = 3  # tries to undo a turn while others write its files
_LATE: Final = 64  # turns of one stopped tenant that wait
_TIDY: Final = 32  # commits after which a history is compacted


class Recorder:
    """Writes the histories of all tenants. Used from the event loop only."""

    def __init__(self, repository: Repository, open_: OpenTurns, bus: Bus, settings: Settings) -> None:
        self._repository = repository
        self._open = open_
        self._bus = bus
        self._settings = settings
        self._closed = False
        self._late: dict[str, list[OpenTurn]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._begun: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, int] = {}  # commits of each tenant
        self.deploying: set[str] = set()  # tenants whose files a deployment may be changing
        self._going: dict[str, asyncio.Future[None]] = {}  # tenants that are going back
        self._asleep: dict[str, Turn] = {}  # sites deployed to tenants that stopped before it was recorded
        self.afterwards = Afterwards()

    async def aclose(self) -> None:
        """Cancel all tasks and wait for them."""
        self._closed = True
        self.afterwards.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, tenant: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        """Begin a task; a failure is logged."""
        task = asyncio.create_task(_quiet(tenant, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def carried(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns; it is carried through even if whoever asked for it is gone."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there
        return await asyncio.shield(task)

    def expect(self, tenant: str, made: Collection[str] = ()) -> None:
        """Begin a history if there is none, so that the first turn can be undone.

        Files in `made`, of a turn that has just ended, are left to it, as are those of open turns.
        """
        if tenant not in self._begun:
            self._begun[tenant] = self.spawn(tenant, self._begin(tenant, made))

    async def ready(self, tenant: str, made: Collection[str] = ()) -> None:
        """Wait until the history has begun. Not for tool calls, which must not wait."""
        self.expect(tenant, made)
        if (begun := self._begun.get(tenant)) is not None:
            await asyncio.wait([begun])

    async def record(self, tenant: str, turn: OpenTurn) -> Turn | None:
        """Commit a turn that has ended; None if nothing changed."""
        await self.ready(tenant, turn.made)
        try:
            found = await self._commit(tenant, turn)
        except (TenantNotRunning, Unavailable, Timeout, ExecFailed) as error:
            self._postpone(tenant, turn, error)
            raise
        except BaseException:
            self._open.recorded(tenant, turn)
            raise
        self._open.recorded(tenant, turn)
        return found

    async def idle(self, tenant: str) -> None:
        """Wait until what is being recorded now is on record."""
        async with self._lock(tenant):
            pass

    async def part(self, tenant: str, turn: OpenTurn, path: str | None) -> None:
        """Commit what an open turn has changed so far, at a path or all: others are about to change it."""
        await self.ready(tenant, turn.made)
        if path is None:
            await self._commit(tenant, turn, whole=True)
        else:
            so_far = OpenTurn(turn, turn.agent, turn.by, turn.title, paths={path}, times=[*turn.at_work()])
            # of a file tool it is known; what a command has changed is seen by its time
            await self._commit(tenant, so_far, by_time=path not in turn.paths)
            if not turn.changing:
                turn.paths.discard(path)
                turn.parted.add(path)

    async def _commit(
        self, tenant: str, turn: OpenTurn, *, by_time: bool = False, whole: bool = False
    ) -> Turn | None:
        made = _made("turn", turn.agent, turn.by, turn.title or "Untitled")
        async with self._lock(tenant):
            mode, paths = self._open.share(tenant, turn)
            if turn.wide and tenant in self.deploying and not whole:
                mode, paths = "only", sorted(turn.paths)  # all else is the deployment's
            times = turn.at_work() if mode != "only" or by_time else ()
            left = self._open.others_at_work(tenant, turn)
            others, found = await self._repository.commit(tenant, mode, paths, made, times, left)
        for one in (others, found):
            self._tell(tenant, one)
        return found

    async def outside(self, tenant: str, change: OpenTurn) -> None:
        """Record what was changed without a turn, but for what others are known to have changed."""
        await self.ready(tenant)
        turn = _made("outside", change.agent, change.by, change.title)
        try:
            async with self._lock(tenant):
                mode, paths = self._open.share(tenant, change)
                times = change.at_work() if change.wide else ()
                left = self._open.others_at_work(tenant, change)
                others, found = await self._repository.commit(tenant, mode, paths, turn, times, left)
        finally:
            self._open.recorded(tenant, change)
        for one in (others, found):
            self._tell(tenant, one)

    async def deployed(self, tenant: str, title: str, by: str) -> None:
        """Record a site as it was deployed, and make its workspace a repository if it is not one.

        It costs a fifth of a deployment, so it waits for those that are under way, unless something needs it.
        """
        await self._deployed(tenant, _made("deployed", name(by), name(by), said(title, TITLE_MAX)))

    async def _deployed(self, tenant: str, made: Turn) -> None:
        # everything but what open turns are known to have written
        turn = OpenTurn(object(), made.agent, made.by, wide=True)
        lock = self._lock(tenant)
        # who holds it, or waits for it, could not hurry this one yet
        resting = contextlib.nullcontext() if lock.locked() else self.afterwards.turn(tenant)
        try:
            async with lock, resting:
                mode, paths = self._open.share(tenant, turn)
                found = await self._repository.deployed(tenant, mode, paths, made)
        except TenantNotRunning:
            self._asleep[tenant] = made
            raise
        finally:
            self.deploying.discard(tenant)
        self._begun.setdefault(tenant, self.spawn(tenant, asyncio.sleep(0)))
        self._tell(tenant, found)

    async def still(self, tenant: str, seconds: float) -> None:
        """Wait until nobody goes back in a workspace, for so long at most: before it is changed."""
        if (going := self._going.get(tenant)) is not None:
            await asyncio.wait([going], timeout=seconds)

    @contextlib.asynccontextmanager
    async def _alone(self, tenant: str) -> AsyncIterator[None]:
        """Go back inside, while tools and people wait with their changes."""
        async with self._lock(tenant):
            going = self._going[tenant] = asyncio.get_running_loop().create_future()
            try:
                yield
            finally:
                del self._going[tenant]
                going.set_result(None)

    async def restore(self, tenant: str, turn: str, side: Side, by: str) -> Turn | None:
        """Restore the files to `before` a turn or `after` it, as a new turn; None if nothing changes."""
        async with self._alone(tenant):
            changed = await self._repository.changes(tenant, turn)
            title = said(str(changed["title"]).partition("\n")[0], 200) or turn[:8]
            words = f"Undo: {title}" if side == "before" else f"Restore: {title}"
            new = _made("restored", name(by), name(by), words)
            found, restored = await self._repository.restore(
                tenant, turn, side, nobody(int(time.time())), new
            )
        for one in (found, restored):
            self._tell(tenant, one)
        return restored

    async def undo(
        self, tenant: str, turn: str, force: Collection[str], by: str
    ) -> tuple[Turn | None, list[str]]:
        """Take back what one turn changed, as a new turn; None if nothing changes or paths conflict."""
        async with self._alone(tenant):
            changed = await self._repository.changes(tenant, turn)
            title = said(str(changed["title"]).partition("\n")[0], 200) or turn[:8]
            of, _, what = title.partition(": ")
            again = {"Undo": "Redo", "Redo": "Undo"}.get(of) if changed["kind"] == "restored" else None
            words = f"Undo: {title}" if again is None else f"{again}: {what}"
            new = _made("restored", name(by), name(by), words)
            for left in reversed(range(_WRITES)):
                try:
                    found, undone, conflicts = await self._repository.undo(
                        tenant, turn, force, nobody(int(time.time())), new
                    )
                    break
                except Conflict as error:  # files that somebody writes at this moment
                    if not left or error.facts.get("reason") != "in_the_way":
                        raise
        for one in (found, undone):
            self._tell(tenant, one)
        return undone, conflicts

    def again(self, tenant: str) -> None:
        """Record what waited for the tenant to run again."""
        if not self._closed and (made := self._asleep.pop(tenant, None)) is not None:
            self.spawn(tenant, self._deployed(tenant, made))
        for turn in () if self._closed else self._late.pop(tenant, []):
            self.spawn(tenant, self.record(tenant, turn))

    def forget(self, tenant: str) -> None:
        """Forget a destroyed tenant; a new one of that name has a new history."""
        self.afterwards.hurry(tenant)
        for of in (self._begun, self._told, self._late, self._asleep):
            of.pop(tenant, None)
        self.deploying.discard(tenant)

    def _postpone(self, tenant: str, turn: OpenTurn, error: GatewayError) -> None:
        """Record a turn later: when its tenant runs again or, if it is running, in a while."""
        turn.tries += not isinstance(error, TenantNotRunning)
        if turn.tries > _TRIES or error.facts.get("reason") == "no_git":
            self._open.recorded(tenant, turn)
            return
        waiting = self._late.setdefault(tenant, [])
        waiting.append(turn)
        for lost in waiting[:-_LATE]:
            self._open.recorded(tenant, lost)
        del waiting[:-_LATE]
        if not isinstance(error, TenantNotRunning):
            asyncio.get_running_loop().call_later(self._settings.turn_rest, self.again, tenant)

    async def _begin(self, tenant: str, made: Collection[str]) -> None:
        first = _made("first", _OURS, _OURS, "The workspace as it was found")
        try:
            async with self._lock(tenant):
                found = await self._repository.begin(tenant, [*self._open.made(tenant), *made], first)
        except GatewayError:
            self._begun.pop(tenant, None)
            raise
        self._tell(tenant, found)

    def _tell(self, tenant: str, turn: Turn | None) -> None:
        if turn is None:
            return
        self._bus.publish("turn.committed", tenant, turn.on_wire())
        told = self._told[tenant] = self._told.get(tenant, 0) + 1
        if told % _TIDY == 0:
            self.spawn(tenant, self._tidy(tenant))

    async def _tidy(self, tenant: str) -> None:
        async with self._lock(tenant):
            await self._repository.tidy(tenant)

    def _lock(self, tenant: str) -> asyncio.Lock:
        self.afterwards.hurry(tenant)  # whoever holds it has no reason to wait any more
        lock = self._locks.get(tenant)
        if lock is None:
            lock = self._locks[tenant] = asyncio.Lock()
        return lock


async def _quiet(tenant: str, work: Coroutine[Any, Any, Any]) -> None:
    try:
        await work
    except GatewayError as error:
        log.warning("cannot write the history of %s: %s", tenant, error.message)


def _made(kind: str, agent: str, by: str, title: str) -> Turn:
    return Turn("", kind, agent, by, title, int(time.time()))
