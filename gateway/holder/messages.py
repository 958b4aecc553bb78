"""The protocol between a gateway and its holder: packets on a unix socket.

Each packet is a JSON object with at most `MOST` descriptors attached.

| a gateway sends | the holder answers |
|---|---|
| `{"v": 1, "put": NAME}` and descriptors | nothing; an existing name is replaced |
| `{"v": 1, "drop": NAME}` | nothing |
| `{"v": 1, "list": true}` | `{"name": NAME}` and its descriptors for each, then `{"end": true}` |
| `{"v": 1, "about": true}` | `{"v": 1, "held": NAMES}` |

A put for which there is no room is answered `{"refused": NAME}`, and nothing is held under that name. A sent
packet stays in the holder's queue even if the sender dies, so others need no answer. A packet of any other
version than `VERSION` ends the connection.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any, Final

VERSION: Final = 1
MOST: Final = 16  # descriptors of one name
NAME_MAX: Final = 512  # bytes
_PACKET: Final = 1024


def send(connection: socket.socket, said: dict[str, Any], descriptors: list[int] | None = None) -> None:
    """Send one packet. Raises `OSError`; on `BlockingIOError` nothing was sent."""
    socket.send_fds(connection, [json.dumps(said).encode()], descriptors or [])


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next packet and its descriptors, None at the end of the connection.

    Raises `OSError`, and `ValueError` for what is none of these packets; the descriptors are closed then.
    """
    data, descriptors, flags, _ = socket.recv_fds(connection, _PACKET, MOST)
    for descriptor in descriptors:
        # MSG_CMSG_CLOEXEC of recvmsg(2) would do this at once, but `recv_fds` cannot pass it
        _close_on_exec(descriptor)
    if not data:
        return None
    try:
        said = json.loads(data)
        if not isinstance(said, dict) or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise ValueError("not a packet of a gateway or its holder")
    except ValueError:
        close(descriptors)
        raise
    return said, list(descriptors)


def close(descriptors: list[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def _close_on_exec(descriptor: int) -> None:
    os.set_inheritable(descriptor, False)
