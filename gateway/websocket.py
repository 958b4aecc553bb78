"""Knows how uvicorn's websocket sends bytes without copying them together first.

The ASGI message `websocket.send` may carry `parts`, a list of bytes that make one binary message, where the
scope has the extension `PARTS`. A command that prints a gigabyte costs a third less of the gateway's CPU so.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

PARTS: Final = "gateway.parts"

_WAITING: Final = 8  # messages that wait to be taken while more are read
_SMALL: Final = 16 << 10  # bytes of one such message


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's own, which holds back in both directions, and `parts`."""

    async def run_asgi(self) -> None:
        self.scope["extensions"][PARTS] = {}
        await super().run_asgi()

    def send_receive_event_to_app(self) -> None:
        # uvicorn stops reading at each message until it is taken, which costs two calls of the kernel: a few
        # small ones may wait instead
        may_wait = not self.read_paused and self.queue.qsize() < _WAITING
        may_wait = may_wait and sum(map(len, self.frames)) <= _SMALL
        if may_wait:
            self.read_paused = True  # for uvicorn's eyes alone
        super().send_receive_event_to_app()
        if may_wait:
            self.read_paused = False

    async def send(self, message: Any) -> None:
        parts: Sequence[bytes] | None = message.get("parts")
        if parts is None:
            await super().send(message)
            return
        await self.writable.wait()
        if self.disconnected or self.close_sent or self.transport.is_closing():
            raise ClientDisconnected
        length = sum(map(len, parts))
        if length < 126:
            head = struct.pack("!BB", 0x82, length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", 0x82, 126, length)
        else:
            head = struct.pack("!BBQ", 0x82, 127, length)
        self.transport.writelines([head, *parts])
