"""When changes outside of turns are recorded, and whose they are; with looks that come quickly."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.execs.exec import Exec
from gateway.history import outside
from gateway.history.open_turns import OpenTurn, OpenTurns
from gateway.history.outside import Outside
from gateway.history.recorder import Recorder
from gateway.runtime import ExecSpec, Pty
from tests.waits import settled, turn, until


class Recorded:
    """Takes what is to be recorded, in the place of a recorder; a commit takes until `free` is set."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.by: list[str] = []
        self.free = asyncio.Event()
        self.free.set()
        self.some = asyncio.Event()

    def spawn(self, tenant: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    async def outside(self, tenant: str, change: OpenTurn) -> None:
        await self.free.wait()
        self.titles.append(change.title)
        self.by.append(change.by)
        self.some.set()


class World:
    def __init__(self, rest: float = 60.0) -> None:
        self.execs: list[Any] = []
        self.open = OpenTurns()
        self.recorded = Recorded()
        listed = cast(list[Exec], self.execs)
        self.outside = Outside(lambda tenant: listed, self.open, cast(Recorder, self.recorded), rest)

    def start(self, *argv: str, by: str = "eve", pty: Pty | None = None, shown: Any = None) -> Any:
        spec = ExecSpec(argv, pty=pty, shown=shown)
        exec_ = SimpleNamespace(
            id=f"x-{len(self.execs)}", spec=spec, state="running", streams=SimpleNamespace(printed=0)
        )
        self.execs.append(exec_)
        self.outside.ran("t", exec_.id, by)
        return exec_

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
    terminal.state = "ended"
    assert await world.next() == ("Changed by a command", "eve")
    assert world.outside._of == {}


async def test_what_never_rests_is_recorded_all_the_same() -> None:
    world = World(rest=0.05)
    server = world.start("npm", "run", "dev")

    async def print_on() -> None:
        while not world.recorded.titles:
            server.streams.printed += 1
            await turn()

    async with asyncio.timeout(60):
        await print_on()
    assert world.recorded.titles == ["Changed by npm run dev"]
    world.outside.close()


async def test_commands_of_several_and_of_tools() -> None:
    """What a tool runs is its turn's; where a turn runs a command too, all that changed is that turn's."""
    world = World()
    world.start("bash", "-c", "wrapped", shown=("bash", "-c", "true"))
    assert world.outside._of == {}
    world.start("make", by="ann").state = "ended"
    world.start("true", by="bob").state = "ended"
    assert await world.next() == ("Changed by 2 commands", "several")
    world.open.open("t", OpenTurn("one", "a", "a")).wrote(None)
    world.start("make").state = "ended"
    assert world.outside.record("t") == []
    await until(lambda: world.outside._of == {}, every=0.01)
    assert len(world.recorded.titles) == 1


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
    monkeypatch.setattr(outside, "_PATIENCE", 0.01)
    world = World()
    world.recorded.free.clear()
    world.outside.saved("t", "page", "eve")
    async with asyncio.timeout(60):
        await world.outside.before("t", "page", first=True)
    assert world.recorded.titles == []
    world.recorded.free.set()
    assert await world.next() == ("Saved page", "eve")
