"""The websocket reads ahead by a few small messages, and no further."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode

from gateway.transport.websocket import _SMALL, _WAITING, WebSocketProtocol


class Transport:
    """Stands in for the socket: says whether it is read."""

    def __init__(self) -> None:
        self.reading = True
        self.pauses = 0

    def pause_reading(self) -> None:
        self.reading, self.pauses = False, self.pauses + 1

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False


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


async def test_large_message_is_held_back_at_once(socket: tuple[WebSocketProtocol, Transport]) -> None:
    """A large message is the only one that is read before it is taken."""
    protocol, transport = socket
    arrive(protocol, b"x" * (_SMALL + 1))
    assert not transport.reading
    await protocol.receive()
    assert transport.reading
