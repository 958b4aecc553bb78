"""Whoever waits for a call under a `callId` is told how it ended, and nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import Cancelled, NotFound
from gateway.tools.call import ToolAnswer
from gateway.tools.toolbox import EncodedResult, Running, only_brief
from tests.waits import pause, settled, turn

DONE = EncodedResult.of(ToolAnswer([{"type": "text", "text": "done"}], {}))


@pytest.mark.parametrize("ending", ["result", "error", "given up"])
async def test_all_are_told(ending: str) -> None:
    """Also those who come when it is over; one who leaves costs the others nothing."""
    gate = asyncio.Event()

    async def work() -> EncodedResult:
        await gate.wait()
        if ending == "error":
            raise NotFound("no such thing")
        return DONE

    running = Running("Bash", b"", work)
    waiting = [asyncio.ensure_future(running.result(60)) for _ in range(3)]
    await turn()
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    if ending == "given up":
        running.work.cancel()
    gate.set()
    async with asyncio.timeout(30):
        told = await asyncio.gather(*waiting[1:], return_exceptions=True)
        late = await asyncio.gather(running.result(60), return_exceptions=True)
    assert waiting[0].cancelled()
    kinds = {"result": EncodedResult, "error": NotFound, "given up": Cancelled}
    assert [type(one) for one in (*told, *late)] == [kinds[ending]] * 3


async def test_ends_when_nobody_waits() -> None:
    """After the time that a client has to come back, not before, and not where one came back."""
    running = Running("Bash", b"", asyncio.Event().wait)  # type: ignore[arg-type]  # it never ends by itself
    for linger, ended in ((60.0, False), (0.01, True)):
        waiting = asyncio.ensure_future(running.result(linger))
        await turn()
        waiting.cancel()
        await asyncio.wait([waiting])
        if ended:
            await asyncio.wait([running.work], timeout=30)
        else:
            await settled()
        assert running.work.done() is ended


async def test_the_longest_linger_of_those_who_left_counts() -> None:
    """A client that leaves nothing behind takes nothing from another which joined the same call."""
    running = Running("Bash", b"", asyncio.Event().wait)  # type: ignore[arg-type]  # it never ends by itself
    waiting = [asyncio.ensure_future(running.result(linger)) for linger in (60.0, 0.0)]
    await turn()
    for one in waiting:
        one.cancel()
        await asyncio.wait([one])
    await settled()
    assert not running.work.done()
    running.work.cancel()


async def test_calls_that_take_long_are_waited_for_before_a_hand_over() -> None:
    """Those that have just begun are not, and none is for longer than it may take."""
    loop = asyncio.get_running_loop()
    gate, running = asyncio.Event(), list[Running]()

    async def work() -> EncodedResult:
        await gate.wait()
        return DONE

    running.append(Running("Write", b"", work))
    await asyncio.wait_for(only_brief(lambda: running, 60), 5)  # it has just begun
    await pause(0.11)
    waiting = asyncio.ensure_future(only_brief(lambda: running, 60))
    await settled()
    assert not waiting.done()
    began = loop.time()
    await only_brief(lambda: running, 0.2)
    assert loop.time() - began >= 0.2
    gate.set()
    await running[0].work
    running.clear()
    await asyncio.wait_for(waiting, 30)
