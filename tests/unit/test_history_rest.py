"""When a turn ends by itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from gateway.events import Bus
from gateway.events.journal import MemoryJournal
from gateway.execs import Execs
from gateway.history.history import History
from gateway.history.recorder import OpenTurn
from gateway.history.repository import Commit
from gateway.rootfs import FilesystemRoot
from gateway.runtime import TenantRuntime
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from tests.waits import turn as turn_of_the_loop


class Noted(History):
    """Notes which turns end, in place of recording them."""

    def __init__(self) -> None:
        execs = cast(Execs, SimpleNamespace(list=lambda tenant: []))
        super().__init__(cast(TenantRuntime, None), execs, Bus(MemoryJournal(10)), Settings(history=True))
        self.ended: list[OpenTurn] = []

    async def __aenter__(self) -> Noted:
        return self

    async def _finish(self, tenant: str, turn: OpenTurn) -> Commit | None:
        self.ended.append(turn)
        return None

    def timer(self) -> asyncio.TimerHandle:
        (timer,) = self._rests.values()
        return timer

    def elapse(self, tenant: str) -> OpenTurn:
        """Do what the timer does when its time has come."""
        ((turn, timer),) = self._rests.items()
        timer.cancel()
        self._rested(tenant, turn)
        return turn


def call(history: History, session: ToolSession, tool: str = "Write") -> Any:
    return history.during(FilesystemRoot("t", "/work"), session, tool, {"file_path": "a"}, "eve")


async def test_a_turn_rests_from_the_end_of_its_last_call_with_the_timer_of_an_earlier_one() -> None:
    async with Noted() as history:
        session = ToolSession(lifetime="connection")
        async with call(history, session):
            pass
        first = history.timer()
        due = first.when()
        async with call(history, session, "Read"):
            pass
        assert history.timer() is first
        turn = history.elapse("t")
        await turn_of_the_loop()
        assert history.ended == []
        assert history.timer().when() > due
        turn.rested = 0.0
        history.elapse("t")
        await turn_of_the_loop()
        assert history.ended == [turn]


async def test_a_turn_does_not_end_within_a_call() -> None:
    async with Noted() as history:
        session = ToolSession(lifetime="connection")
        async with call(history, session):
            pass
        async with call(history, session, "Read"):
            (turn,) = history._open.of("t")
            turn.rested = 0.0
            history.elapse("t")
            await turn_of_the_loop()
            assert history.ended == []
        assert history.timer().when() > asyncio.get_running_loop().time()


async def test_a_call_that_changes_nothing_outside_a_turn_opens_none() -> None:
    async with Noted() as history:
        session = ToolSession(lifetime="connection")
        async with call(history, session, "Read"):
            pass
        assert history._open.of("t") == []
