"""The websocket reads ahead by a few small messages, and no further."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from typing import Any, cast

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState
from websockets.asyncio.client import connect
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, State
from websockets.uri import parse_uri

from gateway.transport.websocket import _SMALL, _TURN, _WAITING, TEXT, WebSocketProtocol
from tests.waits import until


class Transport:
    """Stands in for the socket: says whether it is read."""

    def __init__(self) -> None:
        self.reading = True
        self.pauses = 0
        self.closed = False

    def pause_reading(self) -> None:
        self.reading, self.pauses = False, self.pauses + 1

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written = data

    def close(self) -> None:
        self.closed = True

    def writelines(self, parts: list[bytes]) -> None:
        self.written = b"".join(parts)


@pytest.fixture
async def socket() -> tuple[WebSocketProtocol, Transport]:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    protocol = WebSocketProtocol(uvicorn.Config(app), ServerState(), {}, asyncio.get_running_loop())
    transport = Transport()
    protocol.transport = cast(Any, transport)
    return protocol, transport


def arrive(protocol: WebSocketProtocol, data: bytes) -> None:
    protocol.handle_bytes(Frame(Opcode.BINARY, data))


async def test_calls_one_by_one_pause_nothing(socket: tuple[WebSocketProtocol, Transport]) -> None:
    """Messages that are taken as they come cost no pause."""
    protocol, transport = socket
    for _ in range(100):
        arrive(protocol, b"call")
        assert (await protocol.receive())["type"] == "websocket.receive"
    assert transport.pauses == 0


async def test_flood_is_held_back(socket: tuple[WebSocketProtocol, Transport]) -> None:
    """Where nobody takes them, a few messages wait; then nothing more is read until all are taken."""
    protocol, transport = socket
    arrived = 0
    while transport.reading:
        arrive(protocol, b"call")
        arrived += 1
    assert arrived == _WAITING + 1
    for _ in range(arrived):
        assert not transport.reading
        await protocol.receive()
    assert transport.reading


async def test_small_messages_that_are_taken_leave_the_loop_to_others(
    socket: tuple[WebSocketProtocol, Transport],
) -> None:
    """However many have arrived, a few are taken in each turn of the loop."""
    protocol, _ = socket
    loop, taken, seen = asyncio.get_running_loop(), 0, [0]

    def turn() -> None:
        seen.append(taken)
        loop.call_soon(turn)

    loop.call_soon(turn)
    for _ in range(10 * _TURN):
        arrive(protocol, b"call")
    while taken < 10 * _TURN:
        await protocol.receive()
        taken += 1
    assert max(after - before for before, after in pairwise(seen)) <= _TURN


async def test_large_message_is_held_back_at_once(socket: tuple[WebSocketProtocol, Transport]) -> None:
    """A large message is the only one that is read before it is taken."""
    protocol, transport = socket
    arrive(protocol, b"x" * (_SMALL + 1))
    assert not transport.reading
    await protocol.receive()
    assert transport.reading


async def test_a_refused_handshake_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn logs an error for an application that ends without one, and took a denial for none."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        refusal = PlainTextResponse("not here", status_code=421)
        await WebSocket(scope, receive, send).send_denial_response(refusal)

    config = uvicorn.Config(app, http=H11Protocol, ws=WebSocketProtocol, log_config=None)
    config.load()
    loop = asyncio.get_running_loop()
    state = ServerState()
    server = await loop.create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        *("127.0.0.1", 0),
    )
    async with server:
        url = "ws://{}:{}/".format(*server.sockets[0].getsockname())
        with pytest.raises(InvalidStatus) as refused:
            await connect(url)
        assert refused.value.response.status_code == 421
        await until(lambda: not state.tasks)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_handshake_that_cannot_be_parsed_is_answered_and_over() -> None:
    """Else anybody could hold a descriptor for as long as they like, and the server could not end."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    config = uvicorn.Config(app, http=H11Protocol, ws=WebSocketProtocol, log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        *("127.0.0.1", 0),
    )
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nHost: x\r\n"
    async with server:
        for target, header in (
            ("/" + "x" * 9000, ""),
            ("/", f"Cookie: {'x' * 9000}\r\n"),
            ("/", "A: b\r\n" * 200),
        ):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(f"GET {target} HTTP/1.1\r\n{upgrade}{header}\r\n".encode())
            async with asyncio.timeout(60):
                answer = await reader.read()  # to the connection's end
            assert answer.startswith(b"HTTP/1.1 431 ")
            writer.close()
        await until(lambda: not state.connections)


async def test_small_frames_leave_the_loop_to_others(socket: tuple[WebSocketProtocol, Transport]) -> None:
    """A read has 43 000 pings, and each takes microseconds: after some hundred others have their turn."""
    protocol, transport = socket
    protocol.handshake_initiated = True
    taken: list[int] = []
    cast(Any, protocol)._take_in = lambda data: taken.append(
        sum(1 for _ in protocol._lengths.feed(data)) or len(data)
    )
    pings = b"\x89\x80mask" * 20_000
    protocol.data_received(pings)
    assert sum(taken) < len(pings) // 10 and not transport.reading
    protocol.data_received(b"\x89\x80last")  # what was on its way comes after it
    turns = 0
    while sum(taken) < len(pings) + 6:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10 and transport.reading
    taken.clear()
    protocol.data_received(b"\x82\xff" + (200_000).to_bytes(8, "big") + b"mask" + b"x" * 200_000)
    assert len(taken) <= 2 and transport.reading  # one frame's content costs the same in one piece


@pytest.mark.parametrize("size", [5, 200, 70_000])
@pytest.mark.parametrize("text", [True, False])
async def test_parts_make_one_message(
    socket: tuple[WebSocketProtocol, Transport], size: int, text: bool
) -> None:
    """As the client's end of the websocket reads it: text or binary, of any length."""
    protocol, transport = socket
    protocol.writable.set()
    await protocol.send({"type": "websocket.send", "parts": (b"ab", b"x" * size), TEXT: text})
    client = ClientProtocol(parse_uri("ws://gateway/"), state=OPEN)
    client.receive_data(transport.written)
    (frame,) = client.events_received()
    assert isinstance(frame, Frame)
    assert frame.opcode is (Opcode.TEXT if text else Opcode.BINARY)
    assert frame.data == b"ab" + b"x" * size


async def test_the_end_of_the_server_closes_a_connection_whose_peer_has_just_closed_it(
    socket: tuple[WebSocketProtocol, Transport],
) -> None:
    """Between the answer to its close and the end of the connection; all others would be cut by an error."""
    protocol, transport = socket
    protocol.handshake_complete = True
    protocol.conn.state = State.CLOSING
    protocol.shutdown()
    assert transport.closed
