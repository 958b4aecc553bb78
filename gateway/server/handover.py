"""The protocol between a gateway and its successor: packets on a unix socket in the state dir.

| the successor sends | the gateway answers |
|---|---|
| `{"v": 1, "take": true}` | `{"v": 1, "listen": ADDRESS, "tenants": […]}`, its listening socket |
| `{"ready": true}` | `{"waiting": N}` while deployments are under way, then `{"go": true, "told": […]}` |
| `{"serving": true, "listen": ADDRESS}` | nothing |
| `{"known": true}` once whatever started it knows | nothing: it ends |

Any answer may be `{"refused": REASON}` instead; nothing has changed then. Until `go`, either side may hang up
without affecting the other. From `go` on the successor owns the records; if it hangs up before it serves, the
gateway restarts itself.
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
    """Return the path at which the gateway of a state dir listens for its successor."""
    return state_dir / "handover.sock"


def listening_at(path: Path) -> socket.socket:
    """Return a socket that listens for a successor; the state dir must be locked. Raises `OSError`."""
    path.unlink(missing_ok=True)  # left by a killed gateway
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
    # struct ucred: pid, uid, gid, as the kernel reports them
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())


def say(connection: socket.socket, said: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one packet. Raises `OSError`."""
    socket.send_fds(connection, [json.dumps(said).encode()], list(descriptors))


async def heard(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return a non-blocking socket's next packet; None at the end, or if it is not one of this protocol."""
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
    """Return a socket's next packet, None at the end. Raises `OSError`, or `ValueError` for a bad packet."""
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
