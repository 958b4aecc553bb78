"""When changes outside of turns are recorded, and whose they are; with looks that come quickly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.execs.exec import Exec
from gateway.history import outside
from gateway.history.outside import OutsideChanges
from gateway.history.recorder import OpenTurn, OpenTurns, Recorder, without
from gateway.runtime import ExecSpec, Pty
from gateway.runtime.command import Work
from tests.waits import settled, turn


class Recorded:
    """Takes what is to be recorded, in the place of a recorder; a commit takes until `free` is set."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.by: list[str] = []
        self.free = asyncio.Event()
        self.free.set()
        self.some = asyncio.Event()

        self.deploying: set[str] = set()
        self.changes: list[OpenTurn] = []

    def spawn(self, tenant: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    async def outside(self, tenant: str, change: OpenTurn) -> None:
        await self.free.wait()
        self.titles.append(change.title)
        self.by.append(change.by)
        self.changes.append(change)
        self.some.set()


class World:
    def __init__(self) -> None:
        self.execs: list[Any] = []
        self.open = OpenTurns()
        self.recorded = Recorded()
        listed = cast(list[Exec], self.execs)
        self.outside = OutsideChanges(lambda tenant: listed, self.open, cast(Recorder, self.recorded))

    def start(self, *argv: str, by: str = "eve", pty: Pty | None = None, work: Work = "client") -> Any:
        spec = ExecSpec(argv, pty=pty, work=work)
        exec_ = SimpleNamespace(
            **{"id": f"x-{len(self.execs)}", "spec": spec, "state": "running"},
            **{"streams": SimpleNamespace(printed=0), "process": SimpleNamespace(started_at=time.time())},
            **{"ended": asyncio.Future(), "over": None},
        )
        self.execs.append(exec_)
        self.outside.ran("t", exec_.id, by)
        return exec_

    def end(self, exec_: Any, seconds: float = 0.0) -> None:
        exec_.state, exec_.over = "ended", SimpleNamespace(duration_ms=seconds * 1000)
        exec_.ended.set_result(None)

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(60):
            await self.recorded.some.wait()
        self.recorded.some.clear()
        await settled()
        return self.recorded.titles[-1], self.recorded.by[-1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "_LOOK", 0.02)
    monkeypatch.setattr(outside, "_SAVED", 0.02)


async def test_a_terminal_is_looked_at_once_it_rests_and_again_once_it_goes_on() -> None:
    world = World()
    terminal = world.start("bash", pty=Pty(80, 24))
    assert await world.next() == ("Changed in a terminal", "eve")
    terminal.streams.printed += 10
    assert await world.next() == ("Changed in a terminal", "eve")
    world.end(terminal, 60)
    assert await world.next() == ("Changed in a terminal", "eve")
    assert world.outside._of == {}


async def test_what_never_rests_is_recorded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.history.recorder.TURN_REST", 0.05)
    world = World()
    server = world.start("npm", "run", "dev")

    async def print_on() -> None:
        while not world.recorded.titles:
            server.streams.printed += 1
            await turn()

    async with asyncio.timeout(60):
        await print_on()
    assert world.recorded.titles == ["Changed by npm run dev"]
    world.outside.close()


async def test_commands_of_several_of_tools_and_of_helpers() -> None:
    """What a tool runs is its turn's, what a language server does is nobody's; neither is looked at."""
    world = World()
    world.start("bash", "-c", "wrapped", work="tool")
    world.start("language-server", work="helper")
    assert world.outside._of == {}
    world.end(world.start("make", by="ann"), 5)
    world.end(world.start("true", by="bob"), 5)
    assert await world.next() == ("Changed by 2 commands", "several")


async def test_a_command_has_what_changed_while_it_ran() -> None:
    """Not what changed later, nor while a command of a turn ran too, nor what a deployment does."""
    world = World()
    cat = world.start("cat", "index.html")
    world.end(cat, 0.1)
    assert await world.next() == ("Changed by cat index.html", "eve")
    ((since, over),) = world.recorded.changes[0].at_work()
    assert since < cat.process.started_at < over < cat.process.started_at + 0.2
    turn = world.open.open("t", OpenTurn("one", "a", "a"))
    turn.wrote(None)
    turn.begin()
    world.end(world.start("make"), 5)
    assert world.outside.record("t") == [], "all its time is the turn's"
    turn.end()
    world.open.take("t", "one")
    world.recorded.deploying.add("t")
    world.end(world.start("make"), 5)
    assert world.outside.record("t") == []
    world.recorded.deploying.clear()
    assert await world.next() == ("Changed by make", "eve")


def test_spans_of_time_are_taken_from_others() -> None:
    assert without([(0, 10), (20, 30)], []) == [(0, 10), (20, 30)]
    assert without([(0, 10), (20, 30)], [(2, 3), (8, 22), (40, 50)]) == [(0, 2), (3, 8), (22, 30)]
    assert without([(0, 10)], [(0, 5), (5, 10)]) == []


async def test_a_call_waits_for_what_it_would_hide_and_for_nothing_else() -> None:
    world = World()
    world.recorded.free.clear()
    world.outside.saved("t", "page", "eve")
    world.start("make")
    async with asyncio.timeout(30):  # of another file, beside a command, and of another tenant
        await world.outside.before("t", "other", first=False)
        await world.outside.before("t", "other", first=True)
        await world.outside.before("u", None, first=True)
    world.recorded.free.set()
    assert await world.next() == ("Changed by make", "eve")
    world.recorded.free.clear()
    world.outside.saved("t", "page", "eve")
    for path, first in (("page", False), ("page", True), (None, False)):
        waiting = asyncio.create_task(world.outside.before("t", path, first=first))
        await settled()
        assert not waiting.done(), (path, first)
        world.recorded.free.set()
        async with asyncio.timeout(60):
            await waiting
        world.recorded.free.clear()
        world.outside.saved("t", "page", "eve")
    assert world.recorded.titles[2:] == ["Saved page"] * 3
    world.outside.forget("t")


async def test_a_call_waits_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "PATIENCE", 0.01)
    world = World()
    world.recorded.free.clear()
    world.outside.saved("t", "page", "eve")
    async with asyncio.timeout(60):
        await world.outside.before("t", "page", first=True)
    assert world.recorded.titles == []
    world.recorded.free.set()
    assert await world.next() == ("Saved page", "eve")
