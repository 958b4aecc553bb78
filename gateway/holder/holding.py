"""The holder process: it keeps descriptors by name and nothing else.

It never reads them, takes no input other than packets (`messages`), and should never need to change. It can
be restarted at no cost while a gateway runs, because that sends everything again. If no gateway is connected
for a while, the holder closes everything, and the commands behind it end.

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

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from time import monotonic
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


_NAMES: Final = 20_000
# descriptors that are not held: standard files, clients, and those of a packet that is being received
_SPARE: Final = 64
_CLIENTS: Final = 16  # one for the gateway, one for its successor, and briefly one for `doctor`
_PATIENCE: Final = 5.0  # seconds for a client to read an answer


def hold(path: Path, seconds: float) -> None:
    """Hold descriptors for gateways of our own user that connect to `path`, until SIGTERM.

    Everything is closed if no gateway is connected for `seconds`. Raises `OSError`, with EADDRINUSE if
    another holder is listening there.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _listening(path) as listener:
        try:
            _DescriptorStore(listener, seconds).run()
        finally:
            path.unlink(missing_ok=True)


def _listening(path: Path) -> socket.socket:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, "another holder is listening; stop it first", str(path))
    path.unlink(missing_ok=True)  # left by a killed holder
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(_CLIENTS)
    return listener


class _DescriptorStore:
    def __init__(self, listener: socket.socket, seconds: float) -> None:
        self._listener = listener
        self._seconds = seconds
        self._held: dict[str, list[int]] = {}
        self._room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE  # for descriptors
        self._clients: dict[int, socket.socket] = {}
        self._gateways: set[int] = set()  # clients that have listed what is held
        self._asking: set[int] = set()  # clients that wait for the list
        self._since = monotonic()  # when the last gateway left
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def run(self) -> None:
        while True:
            left = self._since + self._seconds - monotonic() if self._held and not self._gateways else None
            if left is not None and left <= 0:
                for name in list(self._held):
                    self._drop(name)
                continue
            ready = self._poll.poll(0 if self._asking else None if left is None else left * 1000 + 1)
            for descriptor, _ in ready:
                if descriptor == self._listener.fileno():
                    self._welcome()
                elif not self._heard(descriptor):
                    self._dismiss(descriptor)
            if not ready:
                self._answer()

    def _drop(self, name: str) -> None:
        descriptors = self._held.pop(name, [])
        self._room += len(descriptors)
        close(descriptors)

    def _welcome(self) -> None:
        client, _ = self._listener.accept()
        # struct ucred: pid, uid, gid, as the kernel reports them
        _, uid, _ = struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()) or len(self._clients) >= _CLIENTS:
            client.close()
            return
        client.settimeout(_PATIENCE)
        self._clients[client.fileno()] = client
        self._poll.register(client, select.POLLIN)

    def _dismiss(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._clients.pop(descriptor).close()
        self._asking.discard(descriptor)
        if descriptor in self._gateways:
            self._gateways.discard(descriptor)
            self._since = monotonic()

    def _answer(self) -> None:
        """List what is held, once all is taken in that a gateway sent before it was killed."""
        while self._asking:
            descriptor = self._asking.pop()
            try:
                for name, descriptors in self._held.items():
                    send(self._clients[descriptor], {"name": name}, descriptors)
                send(self._clients[descriptor], {"end": True})
            except OSError:
                self._dismiss(descriptor)

    def _heard(self, descriptor: int) -> bool:
        """Handle a client's packet; return False to close the connection."""
        client, passed = self._clients[descriptor], list[int]()
        try:
            received = receive(client)
            if received is None:
                return False
            said, passed = received
            if said.get("v") != VERSION:
                return False
            match said:
                case {"put": str(name)}:
                    if len(name) > NAME_MAX:
                        return False
                    self._drop(name)
                    if len(self._held) >= _NAMES or len(passed) > self._room:
                        send(client, {"refused": name})
                    else:
                        self._room -= len(passed)
                        self._held[name], passed = passed, []
                case {"drop": str(name)}:
                    self._drop(name)
                case {"list": True}:
                    self._gateways.add(descriptor)
                    self._asking.add(descriptor)
                case {"about": True}:
                    send(client, {"v": VERSION, "held": len(self._held)})
                case _:
                    return False
        except (OSError, ValueError):
            return False
        finally:
            with contextlib.suppress(OSError):
                close(passed)
        return True


def main() -> None:
    """Run a holder; the command line names its path and seconds."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # inherited locks of the starter would be held forever
    hold(Path(sys.argv[1]), float(sys.argv[2]))


if __name__ == "__main__":
    main()
