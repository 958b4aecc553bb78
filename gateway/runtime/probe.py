"""Knows how to see from outside whether something in a tenant answers, without running anything in it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import re
import socket
import ssl
import time
from typing import Final

_PAUSE: Final = 0.015  # seconds between two looks; there is nothing to wait on but the network itself
_CONNECT: Final = 0.1  # seconds of one try; before the network is up the kernel would wait a whole one
_ANSWER: Final = 10.0  # seconds of one answer
_DISCARD: Final = 9  # a port at which nothing listens (RFC 863)
_TRACE: Final = 61.0  # seconds that a connection that has ended can be seen
_HEAD: Final = 4096  # bytes of an answer that are looked at, and read
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")  # RFC 9112, section 4


class Silent(TimeoutError):
    """It took the connection, and then said nothing."""


_ports: dict[int, float] = {}  # from which this process asked, until when that can be seen; oldest first


def ours(port: int) -> bool:
    """Say whether a connection from that port of this machine is, or was, one of our own probes."""
    return _ports.get(port, 0.0) > time.monotonic()


async def network_up(address: str, timeout: float) -> None:
    """Return once an address refuses or takes a connection. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout):
        while True:
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(address, _DISCARD), _CONNECT)
                writer.close()
                return
            except ConnectionRefusedError:
                return
            except (OSError, TimeoutError):
                await asyncio.sleep(_PAUSE)


async def answer(address: str, port: int, path: str, timeout: float) -> int:
    """Ask a site until it answers with success or elsewhere, return the status. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout):
        while True:
            with contextlib.suppress(OSError, ValueError):
                status = await ask(address, port, path)
                if status < 400:
                    return status
            await asyncio.sleep(_PAUSE)


async def ask(
    address: str,
    port: int,
    path: str,
    connect: float = _CONNECT,
    answer: float = _ANSWER,
    *,
    host: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> int:
    """Ask once; return the status. Raises `OSError`, so `TimeoutError` and `Silent`, and `ValueError`.

    `connect` and `answer` are the seconds that each of the two may take. Of the answer, which may be anything
    and never end, the first line alone is taken.
    """
    request = f"GET {path} HTTP/1.1\r\nHost: {host or address}\r\nConnection: close\r\n\r\n".encode()
    with socket.socket() as own:
        own.setblocking(False)
        own.bind(("", 0))  # so that its port is known before anybody sees the connection
        mine = own.getsockname()[1]
        _ports[mine] = math.inf
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(own, (address, port)), connect)
            try:
                async with asyncio.timeout(answer):
                    reader, writer = await asyncio.open_connection(
                        sock=own, limit=_HEAD, ssl=tls, server_hostname=None if tls is None else host
                    )
                    try:
                        writer.write(request)
                        line = await reader.readline()
                    finally:
                        writer.transport.abort()  # no word more, and no wait for one
            except TimeoutError:
                raise Silent from None
        finally:
            _ended(mine)
    return status_of(line)


def status_of(line: bytes) -> int:
    """Return the status of an answer by its first line. Raises `ValueError` where it is none of HTTP."""
    match = _STATUS.fullmatch(line)
    if match is None:
        raise ValueError("no HTTP")
    return int(match[1])


def _ended(port: int) -> None:
    now = time.monotonic()
    _ports.pop(port, None)
    _ports[port] = now + _TRACE
    for old, _ in list(itertools.takewhile(lambda entry: entry[1] < now, _ports.items())):
        del _ports[old]
