"""What others make as large or as slow as they like costs what is kept of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies

from gateway.bounds import Flood, LineSplitter, first, part, run_in_thread
from tests.waits import turn


def stream(*pieces: bytes) -> Callable[[], Awaitable[bytes]]:
    left = list(pieces)

    async def read() -> bytes:
        return left.pop(0) if left else b""

    return read


async def test_the_first_bytes_are_kept_and_the_rest_is_read_and_dropped() -> None:
    assert await first(stream(b"ab", b"cd", b"ef"), 3) == b"abc"
    assert await first(stream(), 3) == b""
    assert await first(stream(b"abc"), 3, most=3) == b"abc"
    with pytest.raises(Flood):
        await first(stream(b"abc", b"d"), 10, most=3)


@given(
    strategies.lists(strategies.text("ab\n", max_size=20).map(str.encode), max_size=10),
    strategies.integers(0, 8),
)
def test_lines_are_those_of_the_whole_however_it_is_cut(pieces: list[bytes], most: int) -> None:
    lines = LineSplitter(most, length=5, tail=7)
    found = [line for piece in pieces for line in lines.feed(piece)]
    found += lines.end()
    whole = b"".join(pieces)
    expected = [line[:5].decode() for line in whole.split(b"\n")[:most]]
    while expected and not expected[-1] and len(expected) > whole.count(b"\n"):
        expected.pop()
    assert found == expected
    last = whole[-7:]
    if len(whole) > 7:
        last = last.partition(b"\n")[2] or last
    assert lines.tail == last.decode()


def test_a_flood_of_line_ends_is_not_taken_apart() -> None:
    lines, flood = LineSplitter(2000, length=100, tail=100), b"\n" * (256 << 10)
    began = time.process_time()
    told = sum(len(lines.feed(flood)) for _ in range(200))
    assert told == 2000
    assert time.process_time() - began < 1


def test_a_part_of_an_endless_file() -> None:
    assert part("/dev/zero", 100_000) == bytes(100_000)
    with pytest.raises(OSError, match="No such file"):
        part(Path("/nonexistent"), 1)


async def test_what_hangs_holds_up_its_own_tenant_alone() -> None:
    hanging, free = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        free.wait(60)

    try:
        for _ in range(2):  # all that a tenant may have at once
            with pytest.raises(TimeoutError):
                await run_in_thread("hostile", 0.05, hang)
        assert hanging.is_set()
        with pytest.raises(TimeoutError):
            await run_in_thread("hostile", 0.05, lambda: None)
        assert await run_in_thread("other", 30, lambda: 7) == 7
    finally:
        free.set()
    assert await run_in_thread("hostile", 30, lambda: 8) == 8


async def test_what_fails_is_told_and_frees_its_place() -> None:
    def fail() -> None:
        raise ValueError("no")

    for _ in range(5):
        with pytest.raises(ValueError, match="no"):
            await run_in_thread("one", 30, fail)
    waiting = asyncio.create_task(run_in_thread("one", 30, time.sleep, 0.05))
    await turn()
    waiting.cancel()
    assert await asyncio.gather(*(run_in_thread("one", 30, lambda: 1) for _ in range(10))) == [1] * 10
