"""The end of a service as the kernel reports it; a file stands for the one of its cgroup."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.rootfs import file_calls, memory
from gateway.rootfs.memory import Place
from gateway.runtime.incus.site_services import Ends

UNIT = "site.service"
DEADLINE = 30


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which the kernel tells whether the unit has processes."""
    try:
        os.close(file_calls.inotify())
    except OSError:
        pytest.skip("this system has no inotify")
    monkeypatch.setattr(memory, "place", lambda pid: Place(tmp_path, None) if pid == 1 else None)
    group = tmp_path / "system.slice" / UNIT
    group.mkdir(parents=True)
    (group / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    return group / "cgroup.events"


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


async def test_an_end_is_reported_once(events: Path, ends: Ends) -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()
    assert ends.report(1, UNIT, lambda: ended.put_nowait("first"))
    with events.open("r+") as file:  # in one write each, as the kernel does
        file.write("populated 0\n")
    async with asyncio.timeout(DEADLINE):
        assert await ended.get() == "first"
    events.write_text("populated 1\nfrozen 0\n")
    assert ends.report(1, UNIT, lambda: ended.put_nowait("second"))
    with events.open("r+") as file:
        file.write("populated 0\n")
    async with asyncio.timeout(DEADLINE):
        assert await ended.get() == "second"
    assert ended.empty()


async def test_what_has_ended_or_is_not_there_is_not_reported(events: Path, ends: Ends) -> None:
    def ended() -> None:
        raise AssertionError

    events.write_text("populated 0\nfrozen 0\n")
    assert not ends.report(1, UNIT, ended)
    assert not ends.report(1, "other.service", ended)
    assert not ends.report(2, UNIT, ended)
    events.write_text("populated 1\nfrozen 0\n")
    await asyncio.sleep(0)
