"""What a command in a tenant prints while a site is made: passed on in part, and ended where it floods."""

from __future__ import annotations

import time
from typing import cast

import pytest

from gateway.errors import ExecFailed
from gateway.runtime import Process
from gateway.runtime.sites import lines


class Printing:
    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    async def read(self, stream: str) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""


def printing(*pieces: bytes) -> Process:
    return cast(Process, Printing(*pieces))


async def test_lines_are_passed_on_up_to_a_limit_and_the_end_is_returned() -> None:
    told: list[str] = []
    assert await lines(printing(b"a\nb", b"c\nd"), told.append, 10, 100) == "a\nbc\nd"
    assert told == ["a", "bc", "d"]
    told.clear()
    assert await lines(printing(b"a\nb\nc\n"), told.append, 2, 100) == "a\nb\nc\n"
    assert told == ["a", "b"]
    assert await lines(printing(b"a\nb"), None, 2, 100) == "a\nb"


async def test_a_command_that_floods_is_ended() -> None:
    with pytest.raises(ExecFailed, match="printed over 1000 bytes"):
        await lines(printing(*[b"x" * 100] * 11), None, 0, 1000)


async def test_line_ends_without_end_take_a_moment() -> None:
    told, began = list[str](), time.process_time()
    with pytest.raises(ExecFailed):
        await lines(printing(*[b"\n" * (256 << 10)] * 300), told.append, 2000, 64 << 20)
    assert len(told) == 2000 and time.process_time() - began < 1
