"""Large bodies of peers' answers alone: what comes is passed on as it is, and a loss is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest

from gateway.cluster.relay import LARGE, is_large, pass_on

PIECE = 1 << 20


def body(size: int) -> bytes:
    """Return bytes of which no two pieces are alike."""
    return b"".join(number.to_bytes(8) for number in range(size // 8))


class Client:
    """Takes what is passed on; if it is `slow` only once it is waited for, as where a buffer is full."""

    def __init__(self, *, slow: bool) -> None:
        self.took = bytearray()
        self.copies = 0  # bytes that came otherwise than from the one memory
        self._slow = slow
        self._waiting: list[memoryview] = []

    @contextlib.contextmanager
    def unbuffered(self) -> Iterator[Callable[[memoryview], bool]]:
        yield self._write

    def _write(self, part: memoryview) -> bool:
        assert not self._waiting, "written to while it has not taken all"
        self._waiting.append(part)
        if not self._slow:
            self._take()
        return not self._slow

    def _take(self) -> None:
        for part in self._waiting:
            self.took += part
        self._waiting.clear()

    async def send(self, part: bytes) -> None:
        for _ in range(3):
            await asyncio.sleep(0)  # meanwhile others must leave the memory alone
        self._take()
        self.took += part
        self.copies += len(part)


@contextlib.asynccontextmanager
async def answered(
    status: int, length: int, *parts: bytes, end: bool
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask a peer that answers with these parts, and hangs up then, or not."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, length))
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            if not end:
                await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            async with session.get("/") as found:
                yield found
            async with asyncio.timeout(30):
                await session.close()  # which waits for connections whose end it was not told


@pytest.mark.parametrize("slow", [False, True])
async def test_a_large_body_is_passed_on_whole_and_its_most_from_where_it_was_read(slow: bool) -> None:
    sent = body(LARGE)
    parts = [sent[at : at + PIECE] for at in range(0, LARGE, PIECE)]
    client = Client(slow=slow)
    async with asyncio.timeout(60), answered(200, LARGE, *parts, end=False) as answer:
        assert is_large("GET", answer)
        assert await pass_on(answer, client.unbuffered, client.send)
    assert client.took == sent
    assert client.copies < LARGE / 4  # what had come with the head


@pytest.mark.parametrize("slow", [False, True])
async def test_a_body_that_breaks_off_is_not_whole(slow: bool) -> None:
    sent = body(LARGE - PIECE)
    client = Client(slow=slow)
    async with asyncio.timeout(60), answered(200, LARGE, sent, end=True) as answer:
        assert not await pass_on(answer, client.unbuffered, client.send)
    assert client.took == sent


async def test_more_than_was_announced_is_not_passed_on() -> None:
    sent = body(LARGE + PIECE)
    client = Client(slow=False)
    async with asyncio.timeout(60), answered(206, LARGE, sent, end=False) as answer:
        assert await pass_on(answer, client.unbuffered, client.send)
    assert client.took == sent[:LARGE]


async def test_who_gives_up_leaves_no_connection() -> None:
    """Nor is it used for another request: the rest of the body would be taken for its answer."""
    client = Client(slow=False)
    async with asyncio.timeout(60), answered(200, LARGE, body(2 * PIECE), end=False) as answer:
        transport = answer.connection and answer.connection.transport
        assert transport
        passing = asyncio.create_task(pass_on(answer, client.unbuffered, client.send))
        while len(client.took) < PIECE:
            await asyncio.sleep(0)
        passing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await passing
        assert transport.is_closing() and answer.connection is None


@pytest.mark.parametrize(
    ("method", "status", "length"), [("HEAD", 200, LARGE), ("GET", 304, LARGE), ("GET", 200, LARGE - 1)]
)
async def test_what_has_no_large_body_is_left_to_others(method: str, status: int, length: int) -> None:
    async with asyncio.timeout(60), answered(status, length, end=True) as answer:
        assert not is_large(method, answer)
