"""What is to go on goes on, whatever breaks in it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from gateway import tasks
from gateway.errors import Unavailable


async def test_what_breaks_off_begins_again_and_what_ends_has_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_PAUSES", (0.001, 0.002))
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 4:
            raise IndexError("odd") if begun > 1 else Unavailable("no disk")

    async with asyncio.timeout(30):
        await tasks.run_forever("the watch", work)
    assert begun == 4
    assert caplog.text.count("the watch failed") == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR, logging.ERROR]


def test_what_had_run_for_long_soon_begins_again() -> None:
    """However often it broke off before: as a connection that each restart of the other end breaks."""
    pause, seen = 0.0, list[float]()
    for ran in (0, 0, 0, 0, 0, 0, 0, 0, 500, 601, 30, 5):
        pause = tasks.next_pause(pause, ran)
        seen.append(pause)
    assert seen == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1, 1, 2]


async def test_a_cancel_ends_it() -> None:
    began = asyncio.Event()

    async def work() -> None:
        began.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(tasks.run_forever("the watch", work))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_one_thing_that_fails_lets_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    for error in (Unavailable("no disk"), IndexError("odd")):
        with tasks.log_errors("a look"):
            raise error
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]
