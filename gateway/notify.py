"""Reports this process's state to whatever started it: systemd, or the upgrade command.

The protocol is sd_notify(3): lines in a datagram to the socket that `NOTIFY_SOCKET` names. Without that
variable nothing is sent.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final

VARIABLE: Final = "NOTIFY_SOCKET"
_STATUS_MAX: Final = 2000  # characters of a reason


def notify(*lines: str) -> None:
    """Send lines such as `READY=1`. Does nothing if nobody listens."""
    _send("\n".join(lines).encode(), [])


def status(text: str) -> None:
    """Report in one line what is going on, or what went wrong."""
    notify("STATUS=" + " ".join(text.split())[:_STATUS_MAX])


def settled(seconds: float) -> None:
    """Wait, up to `seconds`, until all that was sent has been processed, as sd_notify_barrier(3) does."""
    reading, writing = os.pipe()
    try:
        told = _send(b"BARRIER=1", [writing])
        os.close(writing)
        writing = -1
        if told:
            poll = select.poll()
            poll.register(reading, 0)  # POLLHUP alone: the other end is closed
            poll.poll(seconds * 1000)
    finally:
        for end in (reading, writing):
            if end >= 0:
                os.close(end)


def _send(message: bytes, descriptors: list[int]) -> bool:
    address = os.environ.get(VARIABLE)
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
            telling.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(telling, [message], descriptors)
    except OSError:  # the listener is gone
        return False
    return True
