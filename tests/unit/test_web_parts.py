"""An answer that is made as it is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.api.http import InParts
from tests.waits import turn


class Client:
    """Who takes an answer: what came, and how."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.takes = asyncio.Event()
        self.takes.set()

    async def send(self, message: Any) -> None:
        await self.takes.wait()
        self.messages.append(message)

    async def receive(self) -> Any:
        await asyncio.Event().wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def ended(self) -> bool:
        return not self.messages[-1].get("more_body", False)


async def answered(client: Client, parts: Iterator[bytes]) -> dict[bytes, bytes]:
    async with asyncio.timeout(30):
        await InParts(parts)({"type": "http"}, client.receive, client.send)
    return dict(client.messages[0]["headers"])


async def test_a_small_one_goes_out_whole() -> None:
    client = Client()
    headers = await answered(client, iter([b"a", b"b"]))
    assert client.body == b"ab" and len(client.messages) == 2 and headers[b"content-length"] == b"2"


async def test_a_large_one_is_made_as_it_is_taken_and_others_have_their_turn() -> None:
    client, made, turns = Client(), 0, 0

    def parts() -> Iterator[bytes]:
        nonlocal made
        for _ in range(100):
            made += 1
            yield b"x" * 100_000

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await turn()

    answer = InParts(parts())
    assert made < 10
    beside = asyncio.create_task(other())
    await answer({"type": "http"}, client.receive, client.send)
    beside.cancel()
    assert len(client.body) == 10_000_000 and client.ended and turns > 50
    assert b"content-length" not in dict(client.messages[0]["headers"])


async def test_one_that_nobody_takes_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.http.BODY_TIMEOUT", 0.05)
    client = Client()

    def parts() -> Iterator[bytes]:
        for number in range(100):
            if number == 50:
                client.takes.clear()
            yield b"x" * 100_000

    await answered(client, parts())
    assert not client.ended and len(client.body) < 6_000_000


@pytest.mark.parametrize("size", [0, 1, 256 << 10, (256 << 10) + 1])
async def test_every_byte_comes_once(size: int) -> None:
    client = Client()
    await answered(client, (b"%d" % (n % 10) for n in range(size)))
    assert client.body == b"".join(b"%d" % (n % 10) for n in range(size)) and client.ended
