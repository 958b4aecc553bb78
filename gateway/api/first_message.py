"""The first message of a websocket that is passed on byte by byte, which may have the client's token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import Protocol, Side, State

from gateway.transport.websocket import LARGE


class FirstMessage:
    """Reads what a client sends up to the end of its first message, and extracts that message's `params`."""

    def __init__(self, told: Callable[[Mapping[str, Any]], None]) -> None:
        self._told = told
        self._wire = Protocol(Side.SERVER, state=State.OPEN, max_size=LARGE)
        self._text = bytearray()

    def __call__(self, data: bytes) -> bool:
        """Read these bytes; return whether more are needed."""
        self._wire.receive_data(data)
        for frame in self._wire.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode not in DATA_OPCODES:
                continue
            self._text += frame.data
            if frame.fin:
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    self._told(orjson.loads(self._text).get("params") or {})
                return False
        return self._wire.parser_exc is None and len(self._text) <= LARGE
