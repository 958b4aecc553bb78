"""Work that waits for a quiet moment: one piece after another, and at once for whoever needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest

from gateway.errors import TenantNotRunning
from gateway.events import Bus, MemoryJournal
from gateway.execs import Execs
from gateway.history.history import History
from gateway.history.recorder import OpenTurn, OpenTurns, QuietQueue, Recorder
from gateway.history.repository import Commit, Mode, Repository, Times
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from tests.waits import settled


class Works:
    """Pieces of work, of which `begun` tells the order; each ends when it is told to."""

    def __init__(self) -> None:
        self.afterwards, self.calm = QuietQueue(), asyncio.Event()
        self.afterwards.quiet = self._quiet
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def _quiet(self) -> None:
        await self.calm.wait()

    async def begin(self, *tenants: str) -> None:
        for tenant in tenants:
            self._ends[tenant] = asyncio.Event()
            self.tasks[tenant] = asyncio.create_task(self._one(tenant))
            await settled()

    async def _one(self, tenant: str) -> None:
        async with self.afterwards.turn(tenant):
            self.begun.append(tenant)
            await self._ends[tenant].wait()

    async def end(self, tenant: str) -> None:
        self._ends[tenant].set()
        await self.tasks[tenant]
        await settled()


@pytest.fixture
async def works() -> AsyncIterator[Works]:
    found = Works()
    yield found
    found.afterwards.close()
    for task in found.tasks.values():
        task.cancel()


async def test_pieces_wait_for_a_quiet_moment_and_then_for_each_other(works: Works) -> None:
    await works.begin("a", "b", "c")
    assert works.begun == []
    works.calm.set()
    await settled()
    assert works.begun == ["a"]
    works.calm.clear()
    await works.end("a")
    assert works.begun == ["a"]
    works.calm.set()
    await settled()
    await works.end("b")
    assert works.begun == ["a", "b", "c"]


async def test_one_that_is_needed_begins_at_once_and_holds_up_no_other(works: Works) -> None:
    await works.begin("a", "b")
    works.afterwards.hurry("b")
    works.afterwards.hurry("none")
    await settled()
    assert works.begun == ["b"]
    works.calm.set()
    await settled()
    assert works.begun == ["b", "a"]


async def test_one_that_fails_holds_up_no_other(works: Works) -> None:
    await works.begin("a", "b")
    works.tasks["a"].cancel()
    works.calm.set()
    await settled()
    assert works.begun == ["b"]


async def test_later_ones_wait_anew(works: Works) -> None:
    works.calm.set()
    await works.begin("a")
    await works.end("a")
    works.calm.clear()
    await works.begin("b")
    assert works.begun == ["a"]


async def test_on_a_host_that_is_never_quiet_each_begins_in_the_end(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.history.recorder.QUIET_WAIT", 0.0)
    await works.begin("a", "b")
    async with asyncio.timeout(5):
        await works.end("a")
        await works.end("b")
    assert works.begun == ["a", "b"]


async def test_at_the_end_all_is_done_one_after_another(works: Works) -> None:
    await works.begin("a", "b")
    finishing = asyncio.create_task(works.afterwards.finish())
    await settled()
    assert works.begun == ["a"]
    await works.end("a")
    await works.end("b")
    await asyncio.wait_for(finishing, 5)
    assert works.begun == ["a", "b"]


# --- the sites that were deployed -----------------------------------------------------------------------


class Written(Repository):
    """A repository that remembers in which order it was asked to write; its tenant may be `asleep`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.asleep = False
        self.free = asyncio.Event()
        self.free.set()

    async def deployed(self, tenant: str, mode: Mode, paths: Sequence[str], turn: Commit) -> Commit | None:
        self.done.append(f"deployed {mode} {','.join(paths)}")
        if self.asleep:
            raise TenantNotRunning("it is stopped")
        return turn

    async def begin(self, tenant: str, made: Sequence[str], turn: Commit) -> Commit | None:
        self.done.append("begin")
        return None

    async def commit(
        self, tenant: str, mode: Mode, paths: Sequence[str], turn: Commit, *_: Times, **__: Times
    ) -> tuple[Commit | None, Commit | None]:
        await self.free.wait()
        self.done.append(f"commit {mode} of {turn.by}")
        return None, None

    async def changes(self, tenant: str, turn: str) -> dict[str, object]:
        return {"title": "a turn", "kind": "turn"}

    async def undo(
        self, tenant: str, undone: str, force: Collection[str], outside: Commit, turn: Commit
    ) -> tuple[Commit | None, Commit | None, list[str]]:
        self.done.append(turn.title)
        return None, None, []

    async def turns(self, tenant: str, most: int, before: str | None) -> list[Commit]:
        return []


@dataclass(slots=True)
class Told:
    """A recorder on a host that is never quiet, what it wrote, and the turns that are open."""

    written: Written
    turns: OpenTurns
    recorder: Recorder
    bus: Bus

    async def deployed(self) -> asyncio.Task[None]:
        task = self.recorder.spawn("shop", self.recorder.deployed("shop", "Deployed", "eve"))
        await settled()
        return task


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    written, turns, bus = Written(), OpenTurns(), Bus(MemoryJournal(10), "t")
    recorder = Recorder(written, turns, bus, Settings())

    async def never() -> None:
        await asyncio.Event().wait()

    recorder.afterwards.quiet = never
    yield Told(written, turns, recorder, bus)
    await recorder.aclose()


async def test_a_deployed_site_is_recorded_before_the_first_turn_changes_it(told: Told) -> None:
    deployed = await told.deployed()
    assert told.written.done == []
    told.recorder.expect("shop")  # a turn begins
    told.turns.open("shop", OpenTurn("one", "a", "a")).wrote("page")
    await asyncio.wait_for(deployed, 5)
    await told.recorder.ready("shop")
    assert told.written.done[0] == "deployed but page"


async def test_nobody_waits_for_a_deployed_site_behind_another_commit(told: Told) -> None:
    async with told.recorder._lock("shop"):
        first = await told.deployed()
        second = await told.deployed()
    await asyncio.wait_for(asyncio.gather(first, second), 5)
    assert told.written.done == ["deployed all "] * 2


async def test_a_deployed_site_that_stops_is_recorded_when_it_runs_again(told: Told) -> None:
    told.written.asleep = True
    deployed = await told.deployed()
    told.recorder.afterwards.hurry("shop")
    await asyncio.wait_for(deployed, 5)
    told.written.asleep = False
    told.recorder.again("shop")
    await settled()
    told.recorder.afterwards.hurry("shop")
    await settled()
    assert told.written.done == ["deployed all "] * 2
    told.recorder.again("shop")
    await settled()
    assert len(told.written.done) == 2


async def test_the_end_of_a_tenant_ends_the_wait_for_its_record(told: Told) -> None:
    deployed = await told.deployed()
    told.recorder.forget("shop")
    await asyncio.wait_for(deployed, 5)


# --- what needs a record at once ------------------------------------------------------------------------


@pytest.fixture
async def followed() -> AsyncIterator[tuple[History, Bus, Written]]:
    """A history that follows the events of a host that is never quiet, after a site was deployed."""
    bus, written = Bus(MemoryJournal(10), "t"), Written()
    execs = cast(Execs, SimpleNamespace(list=lambda tenant: []))
    async with History(cast(TenantRuntime, None), execs, bus, Settings(history=True)) as history:

        async def never() -> None:
            await asyncio.Event().wait()

        history.afterwards.quiet = never
        history._recorder._repository = history._repository = written
        following = asyncio.create_task(history.follow())
        await settled()
        bus.publish("deployment.succeeded", "shop", {"deployment": "d-1", "by": "eve", "template": "static"})
        await settled()
        assert written.done == []
        yield history, bus, written
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@pytest.mark.parametrize(
    ("type", "data"),
    [("exec.started", {"exec": "x-1", "by": "eve"}), ("file.written", {"path": "page", "by": "eve"})],
)
async def test_a_command_or_a_saved_file_has_it_recorded_at_once(
    followed: tuple[History, Bus, Written], type: str, data: dict[str, str]
) -> None:
    _, bus, written = followed
    bus.publish(type, "other", data)
    await settled()
    assert written.done == []
    bus.publish(type, "shop", data)
    await settled()
    assert written.done == ["deployed all "]


async def test_who_looks_at_the_list_has_it_recorded_at_once(
    followed: tuple[History, Bus, Written],
) -> None:
    history, _, written = followed
    await history.turns("shop")
    await settled()
    assert "deployed all " in written.done


async def test_an_undo_waits_for_a_turn_that_is_ending(followed: tuple[History, Bus, Written]) -> None:
    """Or what that has changed would be nobody's."""
    history, _, written = followed
    await history.turns("shop")
    session = ToolSession(lifetime="connection")
    history._open.open("shop", OpenTurn(session, "ann", "ann")).wrote(None)
    history._outside.saved("shop", "page", "eve")
    written.free.clear()
    ending = asyncio.create_task(history.end("shop", session, "ann"))
    await settled()
    undoing = asyncio.create_task(history.undo("shop", "0" * 40, (), "eve"))
    await settled()
    written.free.set()
    await asyncio.wait_for(asyncio.gather(ending, undoing), 5)
    assert written.done[-2:] == ["commit all of ann", "Undo: a turn"]


async def test_whoever_leaves_during_an_undo_takes_no_turn_along(
    followed: tuple[History, Bus, Written],
) -> None:
    history, _, written = followed
    history._open.open("shop", OpenTurn("one", "ann", "ann")).wrote(None)
    written.free.clear()
    undoing = asyncio.create_task(history.undo("shop", "0" * 40, (), "eve"))
    await settled()
    undoing.cancel()
    await asyncio.gather(undoing, return_exceptions=True)
    written.free.set()
    await settled()
    assert written.done[-1] == "commit all of ann"


async def test_at_the_end_of_the_gateway_it_is_recorded(followed: tuple[History, Bus, Written]) -> None:
    history, _, written = followed
    await asyncio.wait_for(history.close_turns(), 5)
    assert written.done == ["deployed all "]
