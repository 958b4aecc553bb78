"""The socket on which clients connect: opened, or inherited from the previous process."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from gateway.errors import Unavailable

# The kernel detects a client that vanished silently: 30 s without traffic, then 3 probes. A peer that merely
# stalls still answers them, so a slow reader is never mistaken for a dead one. Websocket pings could not tell
# the two apart.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_BACKLOG: Final = 2048  # connections that wait while nobody accepts
_FIRST: Final = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_INHERITED: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def listen(address: str) -> socket.socket:
    """Return a socket that listens on HOST:PORT or a path. Raises `Unavailable` with what to change."""
    if not is_tcp(address):
        return _listen_unix(Path(address))
    host, port = _split(address)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=1)[0]
        listening = socket.socket(found[0], socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # on Linux, accepted connections inherit these
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(found[4])
        listening.listen(_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(f"{address} is in use; stop what uses it or set GATEWAY_LISTEN") from error
        raise Unavailable(f"cannot listen on {address}: {error.strerror}; set GATEWAY_LISTEN") from error
    return listening


def inherited() -> socket.socket | None:
    """Return the listening socket that was passed to this process as in sd_listen_fds(3), or None."""
    given = {name: os.environ.pop(name, "") for name in _INHERITED}
    if given["LISTEN_PID"] != str(os.getpid()) or given["LISTEN_FDS"] != "1":
        return None
    os.set_inheritable(_FIRST, False)
    return socket.socket(fileno=_FIRST)


def bequeath(listening: socket.socket) -> dict[str, str]:
    """Let the program that this process executes next inherit the socket; return the variables it needs."""
    os.dup2(listening.fileno(), _FIRST, inheritable=True)
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}


def remove(address: str) -> None:
    """Remove the socket's file, if the address is a path."""
    if not is_tcp(address):
        Path(address).unlink(missing_ok=True)


def is_tcp(address: str) -> bool:
    """Return whether an address is HOST:PORT, not a path."""
    return "/" not in address


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise Unavailable(f"GATEWAY_LISTEN must be HOST:PORT or the path of a unix socket, not {address!r}")
    return host.strip("[]"), int(port)


def _listen_unix(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise Unavailable(f"{path} is in use; stop what uses it or set GATEWAY_LISTEN")
            path.unlink()  # left by a killed gateway
        old = os.umask(0o117)
        try:
            listening.bind(str(path))
        finally:
            os.umask(old)
        listening.listen(_BACKLOG)
    except OSError as error:
        raise Unavailable(f"cannot listen on {path}: {error.strerror}; set GATEWAY_LISTEN") from error
    return listening
