"""The input of a slow command: order, limits, and unread input."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.execs import input as module
from gateway.execs.input import Spools, StdinQueue
from gateway.limits.budget import Budget
from tests.waits import settled, turn, until

KiB = 1 << 10


class Slow:
    """A process that reads input only when told to."""

    holding = None

    def __init__(self) -> None:
        self.got = bytearray()
        self.closed = False
        self.open = asyncio.Event()

    async def write(self, data: bytes) -> None:
        await self.open.wait()
        self.got += data
        await turn()

    async def close_stdin(self) -> None:
        self.closed = True


class Sender:
    slot = 0

    def __init__(self) -> None:
        self.closed = False
        self.taken = 0
        self.consumed = 0

    def took(self, size: int) -> None:
        self.taken += size

    def passed(self, size: int) -> None:
        self.consumed += size


def make(folder: Path, *, memory: int, each: int, limit: int) -> tuple[Any, StdinQueue, Spools, Any]:
    process: Any = Slow()
    spools = Spools(folder, each, limit)
    input_ = StdinQueue(process, memory, spools, Budget(1 << 30, 1 << 30).tenant("demo"), "demo")
    return process, input_, spools, asyncio.create_task(input_.run())


def spooled() -> int:
    """Count this process's unnamed files."""
    found = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            found += "(deleted)" in os.readlink(entry.path)
        except FileNotFoundError:
            continue
    return found


async def test_bytes_keep_their_order_from_memory_over_the_disk_and_round_its_ring(tmp_path: Path) -> None:
    process, input_, spools, running = make(tmp_path, memory=10 * KiB, each=100 * KiB, limit=100 * KiB)
    by, sent, before = Sender(), bytearray(), spooled()
    for number in range(40):
        piece = bytes([number]) * (7 * KiB + number)
        sent += piece
        await asyncio.wait_for(input_.put(piece, by), 5)
        if number % 8 == 7:
            assert input_.waiting > 10 * KiB and spooled() == before + 1
            process.open.set()
            await until(lambda: input_.waiting <= 20 * KiB, every=0)  # some of it is in a file
            process.open.clear()
    process.open.set()
    input_.end()
    await running
    assert process.got == sent and process.closed
    assert by.taken == by.consumed == len(sent)
    assert spools._free == 100 * KiB and spooled() == before


async def test_beyond_both_limits_a_sender_waits_and_loses_nothing(tmp_path: Path) -> None:
    process, input_, spools, running = make(tmp_path, memory=1, each=20 * KiB, limit=8 * KiB)
    by = Sender()
    for _ in range(3):
        await input_.put(b"x" * 4 * KiB, by)
    fourth = asyncio.create_task(input_.put(b"y" * 4 * KiB, by))
    await asyncio.wait([fourth], timeout=0.2)
    assert not fourth.done() and by.taken == 12 * KiB
    process.open.set()
    await asyncio.wait_for(fourth, 30)
    input_.end()
    await running
    assert process.got == b"x" * 12 * KiB + b"y" * 4 * KiB
    assert spools._free == 8 * KiB


async def test_what_waits_when_the_command_ends_is_let_go(tmp_path: Path) -> None:
    _, input_, spools, running = make(tmp_path, memory=1, each=20 * KiB, limit=20 * KiB)
    by, before = Sender(), spooled()
    for _ in range(4):
        await input_.put(b"x" * 4 * KiB, by)
    late = [asyncio.create_task(input_.put(b"z" * 10 * KiB, by)) for _ in range(2)]
    await asyncio.wait(late, timeout=0.1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await asyncio.wait_for(asyncio.gather(*late), 5)
    await input_.put(b"later", by)
    assert (by.consumed, input_.waiting, spools._free) == (by.taken, 0, 20 * KiB)
    assert spooled() == before


async def test_a_disk_that_fails_makes_the_sender_wait(tmp_path: Path) -> None:
    process, input_, spools, running = make(tmp_path / "none", memory=1, each=20 * KiB, limit=20 * KiB)
    by = Sender()
    await input_.put(b"1", by)
    second = asyncio.create_task(input_.put(b"2", by))
    await asyncio.wait([second], timeout=0.2)
    assert not second.done()
    process.open.set()
    await asyncio.wait_for(second, 30)
    input_.end()
    await running
    assert process.got == b"12" and spools._free == 20 * KiB


async def test_room_that_comes_while_the_disk_fails_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, input_, _, running = make(tmp_path, memory=1, each=20 * KiB, limit=20 * KiB)
    by, fail, storing = Sender(), threading.Event(), threading.Event()

    def full(*_: Any) -> None:
        storing.set()
        assert fail.wait(30)
        raise OSError("the disk is full")

    monkeypatch.setattr(module._Spool, "_write", full)
    await input_.put(b"1", by)
    second = asyncio.create_task(input_.put(b"2", by))
    await until(storing.is_set)
    process.open.set()
    await until(lambda: by.consumed == 1)
    fail.set()
    await asyncio.wait_for(second, 10)
    input_.end()
    await running
    assert process.got == b"12"


async def test_a_cancel_at_any_step_leaves_no_file_open(tmp_path: Path) -> None:
    """In whichever iteration of the loop it arrives, during the write to disk and right after it."""
    loop = asyncio.get_running_loop()
    for turns in range(8):
        process, input_, spools, running = make(tmp_path, memory=1, each=1 << 20, limit=1 << 20)
        by = Sender()
        await input_.put(b"a", by)
        done = asyncio.Event()
        write = input_._spool._write

        def written(data: bytes, at: int, done: asyncio.Event = done, write: Any = write) -> None:
            write(data, at)
            loop.call_soon_threadsafe(done.set)

        input_._spool._write = written  # type: ignore[method-assign]
        putting = asyncio.create_task(input_.put(b"b", by))
        await done.wait()
        for _ in range(turns):
            await turn()
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        process.open.set()
        input_.end()
        await running
        assert input_._spool._file is None
        assert spools._free == 1 << 20


async def test_a_sender_that_is_cancelled_leaves_no_half_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it waits for room, is being written to disk, or was just written."""
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    loop = asyncio.get_running_loop()
    process, input_, spools, running = make(tmp_path, memory=1, each=1 << 20, limit=1 << 20)
    by = Sender()
    await input_.put(b"a", by)
    write = input_._spool._write
    for moment, turns in (("put", 1), ("begun", 0), ("begun", 1), ("done", 0), ("done", 1), ("done", 2)):
        moments, may = {name: asyncio.Event() for name in ("put", "begun", "done")}, threading.Event()

        def written(
            data: bytes, at: int, moments: dict[str, asyncio.Event] = moments, may: threading.Event = may
        ) -> None:
            loop.call_soon_threadsafe(moments["begun"].set)
            assert may.wait(30)
            write(data, at)
            loop.call_soon_threadsafe(moments["done"].set)

        input_._spool._write = written  # type: ignore[method-assign]
        moments["put"].set()
        if moment != "begun":
            may.set()
        putting = asyncio.create_task(input_.put(b"b" * 200 * KiB, by))
        await asyncio.wait_for(moments[moment].wait(), 30)
        for _ in range(turns):
            await turn()
        putting.cancel()
        if moment == "begun":
            await settled()
            assert not putting.done(), "the disk is still written"
            may.set()
        await asyncio.gather(putting, return_exceptions=True)
    await input_.put(b"c", by)
    process.open.set()
    input_.end()
    await running
    whole = (by.taken - 2) // (200 * KiB)
    assert process.got == b"a" + b"b" * whole * 200 * KiB + b"c"
    assert spools._free == 1 << 20


async def test_input_goes_to_disk_sooner_where_the_tenants_share_is_full(tmp_path: Path) -> None:
    """Each command has one piece in memory; everything arrives in order."""
    process: Any = Slow()
    share = Budget(1 << 20, 1 << 20).tenant("demo")
    share.hold(1 << 20)
    input_ = StdinQueue(process, 1 << 20, Spools(tmp_path, 1 << 20, 1 << 20), share, "demo")
    writing, sender, before = asyncio.create_task(input_.run()), Sender(), spooled()
    async with asyncio.timeout(10):
        for number in range(20):
            await input_.put(bytes([number]) * 10_000, sender)
        assert share.held <= (1 << 20) + 10_000
        assert spooled() == before + 1
        process.open.set()
        input_.end()
        await writing
    assert process.got == b"".join(bytes([number]) * 10_000 for number in range(20))
    assert share.held == 1 << 20


def test_a_tenant_has_a_share_of_the_disk(tmp_path: Path) -> None:
    spools = Spools(tmp_path, 10, 100)
    assert spools.take(25, "a") and not spools.take(1, "a")
    assert spools.take(25, "b")
    spools.give(25, "a")
    assert spools.take(20, "a")
