"""Records turns: which turn a change belongs to, and the commits of turns, one at a time in each tenant.

`OpenTurns` has the open turns of each tenant and the paths that each has written, without IO. `QuietQueue`
delays work until the host is quiet. The turns of a stopped tenant wait until it runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar
from weakref import WeakValueDictionary

from gateway.errors import Conflict, ExecFailed, GatewayError, TenantNotRunning, Timeout, Unavailable
from gateway.events import Bus
from gateway.history.repository import (
    TITLE_MAX,
    Commit,
    Mode,
    Repository,
    Times,
    clean_text,
    name,
    unattributed,
)
from gateway.runtime.sites import Quiet, at_once
from gateway.settings import Settings

log = logging.getLogger(__name__)

Side = Literal["before", "after"]
T = TypeVar("T")

_PATHS: Final = 500  # paths that a turn remembers; one with more records every change
_BYTES: Final = 64 << 10  # bytes of these paths
_PATHS_OF_TENANT: Final = 8000  # of all open turns; sorting them takes about 5 ms of the loop
_TIMES: Final = 32  # spans of time that a turn remembers; the two oldest of more become one
COARSE: Final = 0.02  # seconds by which the kernel's time of a change may be too early
TURN_REST: Final = 60.0  # seconds without a tool call after which a session's turn ends
QUIET_WAIT: Final = 120.0  # seconds after which the oldest task no longer waits for a quiet moment
_OURS: Final = "incus-gateway"  # author of commits without a turn
_TRIES: Final = 3  # tries to record a turn of a running tenant
_WRITES: Final = 3  # tries to undo a turn while others write its files
_LATE: Final = 64  # turns of one stopped tenant that wait
_TIDY: Final = 32  # commits after which a history is compacted


@dataclass(eq=False, slots=True)
class OpenTurn:
    """A session's work until it ends its turn or rests.

    `paths` were written by its file tools; if `wide`, a command of it may have changed any other.
    `made` are the paths that it created. `calls` counts its running calls, `changing` those that may change
    something, and `times` says when there were any; a command in the background lasts until the turn ends.
    `parted` are paths at which all that it has done is on record. `tries` counts failed recordings, of which
    `ending` is the first. It ends at `rested`, of the loop's clock, if no call comes before.
    """

    key: Hashable
    agent: str
    by: str
    title: str = ""
    wide: bool = False
    calls: int = 0
    changing: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    rested: float = 0.0
    paths: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    parted: set[str] = field(default_factory=set)
    tries: int = 0
    ending: asyncio.Task[Any] | None = None
    _bytes: int = 0
    _since: float | None = None

    @property
    def changed(self) -> bool:
        """Whether anything may have changed."""
        return self.wide or bool(self.paths)

    def wrote(self, path: str | None) -> None:
        """Note a path below the workspace; None stands for any."""
        if path is None:
            self.wide = True
        elif path not in self.paths:
            self._bytes += len(path) + 1
            if len(self.paths) >= _PATHS or self._bytes > _BYTES:
                self.wide = True
            else:
                self.paths.add(path)

    def touches(self, path: str) -> bool:
        """Whether it is known to have changed a path, or something below it or around it."""
        return path in self.paths or any(
            one.startswith(f"{path}/") or path.startswith(f"{one}/") for one in self.paths
        )

    def begin(self, *, lasting: bool = False) -> None:
        """Note that a call begins that may change something."""
        self.changing += 1 + lasting  # one in the background does not end
        self.parted.clear()
        if self._since is None:
            self._since = time.time() - COARSE

    def end(self) -> None:
        """Note that such a call has ended."""
        self.changing -= 1
        if not self.changing and self._since is not None:
            self.worked(self._since, time.time())
            self._since = None

    def worked(self, since: float, until: float) -> None:
        """Note when something of it was at work."""
        self.times.append((since, until))
        if len(self.times) > _TIMES:
            self.times[:2] = [(self.times[0][0], self.times[1][1])]

    def at_work(self) -> Times:
        """Return when something of it was at work, until now."""
        return self.times if self._since is None else [*self.times, (self._since, time.time())]


def without(times: Times, others: Times) -> list[tuple[float, float]]:
    """Return spans of time with the others cut out of them."""
    left = sorted(times)
    for since, until in others:
        pieces = (piece for a, b in left for piece in ((a, min(b, since)), (max(a, until), b)))
        left = [(a, b) for a, b in pieces if a < b]
    return left


class OpenTurns:
    """The open turns of all tenants, and other changes that are known and not on record yet."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Hashable, OpenTurn]] = {}
        self._waiting: dict[str, set[OpenTurn]] = {}

    def get(self, tenant: str, key: Hashable) -> OpenTurn | None:
        return self._of.get(tenant, {}).get(key)

    def open(self, tenant: str, turn: OpenTurn) -> OpenTurn:
        """Return the session's open turn, or open `turn` if there is none."""
        return self._of.setdefault(tenant, {}).setdefault(turn.key, turn)

    def wrote(self, tenant: str, turn: OpenTurn, path: str | None) -> None:
        """Note a path that a turn wrote; one too many for the tenant stands for any."""
        full = sum(len(one.paths) for one in self._of.get(tenant, {}).values()) >= _PATHS_OF_TENANT
        turn.wrote(None if full and path not in turn.paths else path)

    def take(self, tenant: str, key: Hashable) -> OpenTurn | None:
        """Remove and return the session's open turn."""
        of = self._of.get(tenant, {})
        turn = of.pop(key, None)
        if turn is not None and not of:
            del self._of[tenant]
        return turn

    def wait(self, tenant: str, turn: OpenTurn) -> None:
        """Note a change that is known and not on record yet: a turn that has ended, or what was saved."""
        self._waiting.setdefault(tenant, set()).add(turn)

    def recorded(self, tenant: str, turn: OpenTurn) -> None:
        """Forget such a change."""
        if (waiting := self._waiting.get(tenant)) is not None:
            waiting.discard(turn)
            if not waiting:
                del self._waiting[tenant]

    def waiting(self, tenant: str) -> list[OpenTurn]:
        """Return these changes."""
        return list(self._waiting.get(tenant, ()))

    def unrecorded(self, tenant: str) -> list[OpenTurn]:
        """Return the tenant's open turns, and the other changes that are known and not on record yet."""
        return [*self._of.get(tenant, {}).values(), *self._waiting.get(tenant, ())]

    def others_at_work(self, tenant: str, turn: OpenTurn) -> Times:
        """Return when commands of other turns were at work that are not on record yet."""
        others = (one for one in self.unrecorded(tenant) if one is not turn and one.wide)
        return [span for one in others for span in one.at_work()]

    def forget(self, tenant: str) -> list[OpenTurn]:
        """Remove and return the tenant's open turns."""
        self._waiting.pop(tenant, None)
        return list(self._of.pop(tenant, {}).values())

    def of(self, tenant: str) -> list[OpenTurn]:
        """Return the tenant's open turns."""
        return list(self._of.get(tenant, {}).values())

    def all(self) -> Iterator[tuple[str, OpenTurn]]:
        """Yield each open turn with its tenant."""
        for tenant, of in list(self._of.items()):
            for turn in list(of.values()):
                yield tenant, turn

    def made(self, tenant: str) -> list[str]:
        """Return the paths that open turns are known to have created."""
        return sorted({path for turn in self._of.get(tenant, {}).values() for path in turn.made})

    def share(self, tenant: str, turn: OpenTurn) -> tuple[Mode, list[str]]:
        """Return which changes belong to `turn`: `only` these paths, all `but` these, or `all`.

        A path that only another turn is known to have written belongs to that other turn.
        """
        if not turn.wide:
            return "only", sorted(turn.paths)
        others = {path for other in self.unrecorded(tenant) if other is not turn for path in other.paths}
        if not (leave := others - turn.paths):
            return "all", []
        return "but", sorted(leave)


class _QuietTask:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.until = loop.time() + QUIET_WAIT
        self.may_begin, self.over = asyncio.Event(), asyncio.Event()


class QuietQueue:
    """Lets pieces of work begin one after another, while it is `quiet`. Used from the event loop only."""

    def __init__(self) -> None:
        self.quiet: Quiet = at_once
        self._waiting: dict[str, _QuietTask] = {}  # by tenant, oldest first
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Let nothing begin by itself any more."""
        if self._task is not None:
            self._task.cancel()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait until the tenant's work may begin; it is done inside. A tenant has at most one waiting."""
        piece = self._waiting[tenant] = _QuietTask(asyncio.get_running_loop())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._one_by_one(), name="work that can wait")
        try:
            await piece.may_begin.wait()
            yield
        finally:
            self._waiting.pop(tenant)
            piece.over.set()

    def hurry(self, tenant: str) -> None:
        """Let a tenant's piece of work begin now: its result is needed."""
        if (piece := self._waiting.get(tenant)) is not None:
            piece.may_begin.set()

    async def finish(self) -> None:
        """Do all that waits, still one after another."""
        self.close()
        while self._waiting:
            await self._begin(next(iter(self._waiting.values())))

    async def _one_by_one(self) -> None:
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(oldest.until):
                    await self.quiet()
            await self._begin(oldest)

    async def _begin(self, piece: _QuietTask) -> None:
        piece.may_begin.set()
        await piece.over.wait()


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
        self._commits: dict[str, int] = {}  # commits of each tenant
        self.deploying: set[str] = set()  # tenants whose files a deployment may be changing
        self._going: dict[str, asyncio.Future[None]] = {}  # tenants that are going back
        self._asleep: dict[str, Commit] = {}  # sites deployed to tenants that stopped before it was recorded
        self.afterwards = QuietQueue()

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
        """Return what `work` returns; it continues if its caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may be gone
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

    async def record(self, tenant: str, turn: OpenTurn) -> Commit | None:
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
    ) -> Commit | None:
        made = _made("turn", turn.agent, turn.by, turn.title or "Untitled")
        async with self._lock(tenant):
            mode, paths = self._open.share(tenant, turn)
            if turn.wide and tenant in self.deploying and not whole:
                mode, paths = "only", sorted(turn.paths)  # all else is the deployment's
            times = turn.at_work() if mode != "only" or by_time else ()
            left = self._open.others_at_work(tenant, turn)
            others, found = await self._repository.commit(tenant, mode, paths, made, times, left)
        for one in (others, found):
            self._publish(tenant, one)
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
            self._publish(tenant, one)

    async def deployed(self, tenant: str, title: str, by: str) -> None:
        """Record a deployed site, and make its workspace a git repository if necessary.

        It costs a fifth of a deployment, so it waits for those that are under way, unless something needs it.
        """
        await self._deployed(tenant, _made("deployed", name(by), name(by), clean_text(title, TITLE_MAX)))

    async def _deployed(self, tenant: str, made: Commit) -> None:
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
        self._publish(tenant, found)

    async def still(self, tenant: str, seconds: float) -> None:
        """Wait, for at most some seconds, until no undo or restore runs in a workspace."""
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

    async def restore(self, tenant: str, turn: str, side: Side, by: str) -> Commit | None:
        """Restore the files to `before` a turn or `after` it, as a new turn; None if nothing changes."""
        async with self._alone(tenant):
            changed = await self._repository.changes(tenant, turn)
            title = clean_text(str(changed["title"]).partition("\n")[0], 200) or turn[:8]
            words = f"Undo: {title}" if side == "before" else f"Restore: {title}"
            new = _made("restored", name(by), name(by), words)
            found, restored = await self._repository.restore(
                tenant, turn, side, unattributed(int(time.time())), new
            )
        for one in (found, restored):
            self._publish(tenant, one)
        return restored

    async def undo(
        self, tenant: str, turn: str, force: Collection[str], by: str
    ) -> tuple[Commit | None, list[str]]:
        """Take back what one turn changed, as a new turn; None if nothing changes or paths conflict."""
        async with self._alone(tenant):
            changed = await self._repository.changes(tenant, turn)
            title = clean_text(str(changed["title"]).partition("\n")[0], 200) or turn[:8]
            of, _, what = title.partition(": ")
            again = {"Undo": "Redo", "Redo": "Undo"}.get(of) if changed["kind"] == "restored" else None
            words = f"Undo: {title}" if again is None else f"{again}: {what}"
            new = _made("restored", name(by), name(by), words)
            for left in reversed(range(_WRITES)):
                try:
                    found, undone, conflicts = await self._repository.undo(
                        tenant, turn, force, unattributed(int(time.time())), new
                    )
                    break
                except Conflict as error:  # files that somebody writes at this moment
                    if not left or error.facts.get("reason") != "in_the_way":
                        raise
        for one in (found, undone):
            self._publish(tenant, one)
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
        for of in (self._begun, self._commits, self._late, self._asleep):
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
            asyncio.get_running_loop().call_later(TURN_REST, self.again, tenant)

    async def _begin(self, tenant: str, made: Collection[str]) -> None:
        first = _made("first", _OURS, _OURS, "The workspace as it was found")
        try:
            async with self._lock(tenant):
                found = await self._repository.begin(tenant, [*self._open.made(tenant), *made], first)
        except GatewayError:
            self._begun.pop(tenant, None)
            raise
        self._publish(tenant, found)

    def _publish(self, tenant: str, turn: Commit | None) -> None:
        if turn is None:
            return
        self._bus.publish("turn.committed", tenant, turn.on_wire())
        count = self._commits[tenant] = self._commits.get(tenant, 0) + 1
        if count % _TIDY == 0:
            self.spawn(tenant, self._tidy(tenant))

    async def _tidy(self, tenant: str) -> None:
        async with self._lock(tenant):
            await self._repository.tidy(tenant)

    def _lock(self, tenant: str) -> asyncio.Lock:
        self.afterwards.hurry(tenant)  # its holder need not wait for a quiet moment any more
        lock = self._locks.get(tenant)
        if lock is None:
            lock = self._locks[tenant] = asyncio.Lock()
        return lock


async def _quiet(tenant: str, work: Coroutine[Any, Any, Any]) -> None:
    try:
        await work
    except GatewayError as error:
        log.warning("cannot write the history of %s: %s", tenant, error.message)


def _made(kind: str, agent: str, by: str, title: str) -> Commit:
    return Commit("", kind, agent, by, title, int(time.time()))
