"""The SSE response: its bytes, its keep-alive, and how it ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from gateway.events import Bus, Filter, MemoryJournal, positions
from gateway.events.sse import response
from gateway.settings import Settings


class Exchange:
    """One ASGI request for the events, driven by hand."""

    def __init__(
        self, bus: Bus, last: str | None = None, keepalive: float = 3600.0, method: str = "GET"
    ) -> None:
        settings = Settings(state_dir=Path("/nonexistent"))
        self.bus = bus
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        self._gone = asyncio.Event()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gateway.events.sse.KEEPALIVE", keepalive)
            app = response(bus, Filter(), positions.after(last), settings)
        scope: dict[str, Any] = {"type": "http", "method": method, "headers": []}
        self.task = asyncio.ensure_future(app(scope, self._receive, self.sent.put))

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._gone.set()

    async def next(self) -> Message:
        async with asyncio.timeout(10):
            return await self.sent.get()

    async def end(self) -> None:
        async with asyncio.timeout(10):
            await self.task


def small() -> Bus:
    return Bus(MemoryJournal(3, first=100), "t")


async def test_an_event_has_id_type_and_data_on_one_line_each() -> None:
    bus = small()
    exchange = Exchange(bus)
    published = bus.publish("exec.started", "shop", {"text": "a\nb\r\nc", "exec": "e1"})
    start, begin, body = [await exchange.next() for _ in range(3)]
    assert start["status"] == 200
    # no event, but what a client that is cut off here comes back with
    assert begin["body"] == b"id: 99\n\n"
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"last-event-id"] == b"99"
    lines = body["body"].decode().split("\n")
    assert lines[:2] == ["id: 100", "event: exec.started"]
    assert json.loads(lines[2].removeprefix("data: "))["data"] == published.data
    assert lines[3:] == ["", ""]
    bus.close()
    await exchange.end()


async def test_closing_the_bus_ends_the_response_after_the_last_event() -> None:
    bus = small()
    exchange = Exchange(bus)
    bus.publish("gateway.draining")
    bus.close()
    await exchange.next()
    await exchange.next()
    assert b"gateway.draining" in (await exchange.next())["body"]
    assert (await exchange.next()) == {"type": "http.response.body", "body": b"", "more_body": False}
    await exchange.end()


async def test_a_client_that_goes_frees_its_subscription() -> None:
    bus = small()
    exchange = Exchange(bus)
    await exchange.next()
    assert bus.subscribers == 1
    exchange.leave()
    await exchange.end()
    assert bus.subscribers == 0


async def test_a_comment_keeps_the_stream_alive() -> None:
    bus = small()
    exchange = Exchange(bus, keepalive=0.01)
    await exchange.next()
    await exchange.next()
    assert (await exchange.next())["body"] == b": keep-alive\n\n"
    bus.close()
    await exchange.end()


async def test_last_event_id_replays_and_tells_a_gap_first() -> None:
    bus = small()
    for name in "abcdef":
        bus.publish(name)
    bus.close()
    resumed, lost = Exchange(bus, "104"), Exchange(bus, "100")
    await asyncio.gather(resumed.end(), lost.end())
    assert _ids(resumed) == [105]
    assert _ids(lost) == [102, 103, 104, 105]


def _ids(exchange: Exchange) -> list[int]:
    body = b"".join(_body(exchange))
    return [int(line.removeprefix(b"id: ")) for line in body.split(b"\n") if line.startswith(b"id: ")]


def _body(exchange: Exchange) -> list[bytes]:
    return [exchange.sent.get_nowait().get("body", b"") for _ in range(exchange.sent.qsize())]


@pytest.mark.parametrize(
    ("text", "after"),
    [
        *((None, None), ("", None), ("0", 0), ("17", 17), (17, 17), ("-3", 0), ("abc", 0)),
        ("9" * 30, 2**63 - 1),
        ("9" * 5000, 0),
        *(("m1:17", 17), ("m2:4,m1:17", 17), ("m2:4", 0), ("m1:x", 0), ("m1:17,", 0), (":17", 0)),
        (",".join(f"m{number}:{number}" for number in range(1000)), 0),
    ],
)
def test_last_event_id(text: str | int | None, after: int | None) -> None:
    assert positions.after(text, "m1") == after


def test_an_id_of_several_members_is_read_as_it_was_written() -> None:
    for at in (
        {"m1": 17, "m2": 4},
        {"a,b:c\n": 1, "ü": 2**53},
        {f"member-{number}": 10**13 for number in range(500)},
    ):
        said = positions.text(at)
        assert said.isprintable() and said.isascii() and positions.vector(said) == at
    assert (
        positions.vector("17")
        is positions.vector(",".join(f"m{number}:1" for number in range(600)))
        is positions.vector("m:" + "1" * 40_000)
        is None
    )
