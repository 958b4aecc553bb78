"""Binary frames of `gateway.v1`: a stream's number, a channel's number, then bytes of a command."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gateway_client.errors import InvalidParams


class StreamId(IntEnum):
    """First byte of a binary frame. A terminal's output is STDOUT."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2


_HEADER = struct.Struct("!BI")
HEADER_SIZE: Final = _HEADER.size


@dataclass(frozen=True, slots=True)
class Frame:
    """One binary frame: `data` of `stream` on `channel`."""

    stream: StreamId
    channel: int
    data: bytes


def frame_header(stream: int, channel: int) -> bytes:
    """Return what comes before a frame's bytes: u8 stream, u32 channel big-endian."""
    return _HEADER.pack(stream, channel)


def pack_frame(stream: int, channel: int, data: bytes) -> bytes:
    """Return a whole frame."""
    return frame_header(stream, channel) + data


def unpack_frame(frame: bytes) -> Frame:
    """Return the parts of a frame. Raises `InvalidParams` if it is none."""
    if len(frame) < HEADER_SIZE:
        raise InvalidParams(f"a binary frame has at least {HEADER_SIZE} bytes")
    stream, channel = _HEADER.unpack_from(frame)
    try:
        return Frame(StreamId(stream), channel, frame[HEADER_SIZE:])
    except ValueError:
        raise InvalidParams(f"unknown stream {stream}") from None
