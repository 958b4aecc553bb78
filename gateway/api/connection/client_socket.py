"""The client's websocket: takes messages once there is room, sends at the client's pace, and closes.

It does not interpret messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import protocol
from gateway.admission import Reservation
from gateway.bounds import LEAST_RATE
from gateway.limits.budget import Share
from gateway.protocol import CloseCode
from gateway.settings import Settings
from gateway.transport.websocket import COMING, FLOW, LARGE, PARTS, SIZE, TEXT

_SLOWEST: Final = 16 << 10  # bytes a second that a client must take of a large answer
_GONE: Final = frozenset({1005, 1006})  # RFC 6455 §7.1.5: there is no peer to send a code to
_FAREWELL: Final = 2.0  # seconds for a close


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message from the client: `data` if it is binary, else `text`, a large one not yet decoded.

    `lease` counts its bytes.
    """

    text: str | bytes
    data: bytes | None
    size: int
    lease: Reservation[Share]


class Closed(Exception):
    """The connection must be closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class ClientSocket:
    """One client's websocket. `share` counts its bytes in flight."""

    def __init__(self, websocket: WebSocket, share: Share, settings: Settings) -> None:
        extensions = websocket.scope.get("extensions", {})
        self.share = share
        self._websocket = websocket
        self._settings = settings
        self._parts = PARTS in extensions
        self._flow: Mapping[str, Callable[[], Any]] = extensions.get(FLOW, {})
        self._arriving: deque[Reservation[Share]] = deque()  # for large messages that are arriving
        # since when a channel's output, or a large answer, has waited for the client
        self._waiting: dict[object, float] = {}
        self.closing: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()

    async def accept(self) -> None:
        """Complete the handshake, with our subprotocol if the client offers it."""
        offered = self._websocket.scope.get("subprotocols") or []
        await self._websocket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)

    # --- receiving ----------------------------------------------------------------------------------

    async def receive(self, *, large: bool) -> Arrived:
        """Return the next message; `large` says whether one over `LARGE` bytes is allowed.

        Raises `WebSocketDisconnect`, or `Closed` for a message that is too large or has stalled.
        """
        while True:
            message = await (self._rest() if self._arriving else self._websocket.receive())
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            if COMING in message:
                await self._admit(message[COMING], large)
                continue
            size = message.get(SIZE, 0)
            lease = self._arriving.popleft() if size > LARGE and self._arriving else self.share.reserve()
            return Arrived(message.get("text", ""), message.get("bytes"), size, lease)

    async def _admit(self, size: int, large: bool) -> None:
        """Accept a large message once there is room for it; nothing more is read until then."""
        if not large:
            raise Closed(
                CloseCode.FRAME_TOO_LARGE, f"a message before initialize is limited to {LARGE} bytes"
            )
        self._arriving.append(await self.share.wait(size))
        self._flow["admit"]()

    async def _rest(self) -> Message:
        """Return the next message, whose remaining bytes must keep arriving."""
        patience = self._settings.body_timeout
        while True:
            received = self._flow["received"]()
            try:
                async with asyncio.timeout(patience):
                    return await self._websocket.receive()
            except TimeoutError:
                if self._flow["received"]() < received + patience * LEAST_RATE:
                    raise Closed(
                        CloseCode.TOO_MANY,
                        f"a message is too slow: under {LEAST_RATE} bytes a second",
                    ) from None

    # --- sending ------------------------------------------------------------------------------------

    async def send(self, text: str) -> None:
        """Send one text message. If the client is gone, this ends the connection."""
        await self._send({"type": "websocket.send", "text": text})

    async def send_answer(self, answer: protocol.Message) -> None:
        """Send an answer. If the client does not take a large one in time, this ends the connection."""
        whole: Message = {"type": "websocket.send"}
        if isinstance(answer, str):
            whole["text"] = answer
        elif self._parts:
            whole["parts"], whole[TEXT] = answer, True
        else:
            whole["text"] = b"".join(answer).decode()
        size = protocol.size(answer)
        if size <= LARGE:
            await self._send(whole)
            return
        key = object()
        self._waiting[key] = asyncio.get_running_loop().time() + size / _SLOWEST
        await self._send(whole)
        self._waiting.pop(key, None)

    async def send_output(self, channel: int, *parts: bytes) -> None:
        """Send a channel's output as one binary message of `parts`. The client must take it in time too."""
        self._waiting.setdefault(channel, asyncio.get_running_loop().time())
        whole = {"parts": parts} if self._parts else {"bytes": b"".join(parts)}
        await self._send({"type": "websocket.send", **whole})
        self._waiting.pop(channel, None)

    async def _send(self, message: Message) -> None:
        try:
            await self._websocket.send(message)
        except (WebSocketDisconnect, RuntimeError):
            # starlette raises RuntimeError for a send after a close
            self.close(1006, "")

    async def watch_stalls(self) -> None:
        """End the connection if a send that must be taken in time takes too long."""
        stall, loop = self._settings.exec_stall, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(stall / 4)
            if any(loop.time() - since > stall for since in self._waiting.values()):
                # a stalled socket cannot be told anything; the client resumes from its offset
                self.close(CloseCode.TOO_MANY, f"no output taken for {stall:.0f} s")

    # --- the end ------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Ask for the connection's end with this code by resolving `closing`. The first reason counts."""
        if not self.closing.done():
            self.closing.set_result(Closed(code, reason))

    async def say_goodbye(self, code: int, reason: str) -> None:
        """Close the websocket, if the client is still there."""
        if code in _GONE:
            return
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # already gone
            async with asyncio.timeout(_FAREWELL):
                await self._websocket.close(code=code, reason=reason[:100])

    def release(self) -> None:
        """Stop counting messages that have not arrived completely."""
        for lease in self._arriving:
            lease.release()
