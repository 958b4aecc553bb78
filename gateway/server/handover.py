"""What a gateway and its successor say to each other, in packets of a unix socket in the state dir.

| the successor sends | the gateway answers |
|---|---|
| `{"v": 1, "take": true}` | `{"v": 1, "listen": ADDRESS, "tenants": […]}`, its listening socket |
| `{"ready": true}` | `{"waiting": N}` while deployments are under way, then `{"go": true, "told": […]}` |
| `{"serving": true, "listen": ADDRESS}` | nothing |
| `{"known": true}` once whoever started it knows | nothing: it ends |

`{"refused": REASON}` may come instead of each answer; nothing has changed then. Up to `go` whichever hangs up
leaves the other as it is. From then on the records are the successor's; where that hangs up before it serves,
the gateway starts itself anew.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

VERSION: Final = 1
_PACKET: Final = 64 << 10


def path_in(state_dir: Path) -> Path:
    """Return where the gateway of a state dir listens for its successor."""
    return state_dir / "handover.sock"


def listening_at(path: Path) -> socket.socket:
    """Return the socket at which a gateway listens. Raises `OSError`; the state dir's lock must be held."""
    path.unlink(missing_ok=True)  # a killed one's
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(4)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def trusted(connection: socket.socket) -> bool:
    """Return whether our own user or root is at the other end."""
    # struct ucred: pid, uid, gid; the kernel's word, not the peer's
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())


def say(connection: socket.socket, said: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one packet. Raises `OSError`."""
    socket.send_fds(connection, [json.dumps(said).encode()], list(descriptors))


async def heard(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next packet of a socket that does not block, None at the end, or if it is none of these."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def came() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(connection, came)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
    try:
        return received(connection)
    except (OSError, ValueError):
        return None


def received(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next packet of a socket, None at the end. Raises `OSError`, and `ValueError` for another."""
    data, descriptors, flags, _ = socket.recv_fds(connection, _PACKET, 1)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not data:
        return None
    try:
        said = json.loads(data)
        if not isinstance(said, dict) or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise ValueError("not a packet of a gateway or its successor")
    except ValueError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return said, list(descriptors)
