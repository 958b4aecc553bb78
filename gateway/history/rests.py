"""When turns end by themselves: once their session has called nothing for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.history.open_turns import OpenTurn


class Rests:
    """The timers of open turns: `over` is called for one that has rested for `seconds`."""

    def __init__(self, seconds: float, over: Callable[[str, OpenTurn], None]) -> None:
        self._seconds, self._over = seconds, over
        self._timers: dict[OpenTurn, asyncio.TimerHandle] = {}

    def close(self) -> None:
        """Stop all timers."""
        for timer in self._timers.values():
            timer.cancel()

    def begin(self, tenant: str, turn: OpenTurn) -> None:
        """Count from now on. Calls are many: a timer that already runs looks later whether there was one."""
        loop = asyncio.get_running_loop()
        turn.rested = loop.time() + self._seconds
        if turn not in self._timers:
            self._timers[turn] = loop.call_at(turn.rested, self._look, tenant, turn)

    def end(self, turn: OpenTurn) -> None:
        """Stop counting: the turn is over."""
        if (timer := self._timers.pop(turn, None)) is not None:
            timer.cancel()

    def _look(self, tenant: str, turn: OpenTurn) -> None:
        del self._timers[turn]
        loop = asyncio.get_running_loop()
        if turn.calls:
            return  # the last of them begins anew
        if loop.time() < turn.rested:
            self._timers[turn] = loop.call_at(turn.rested, self._look, tenant, turn)
        else:
            self._over(tenant, turn)
