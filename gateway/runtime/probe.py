"""See from outside whether something in a tenant answers, without running anything in it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import math
import os
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
_FIELDS: Final = 100  # of its head, where its body is wanted
_HEAD: Final = 4096  # bytes of an answer that are looked at, and read
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")  # RFC 9112, section 4


# a status with which a host is refused, and how those that refuse every host but their own put it
_REFUSALS: Final = (400, 403, 421)
_HOSTS: Final = re.compile(r"(?i)allowed_?hosts|host header|http_host|blocked host|this host\b")
_BODY: Final = 2048  # bytes of a refusal that are read
_SHOWN: Final = 300  # characters of it that are told
_TAG: Final = re.compile(r"<[^<>]*>")


class HostRefused(Exception):
    """A site answers, but not under its domain; `said` is what it says of that, fit to be shown."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class Silent(TimeoutError):
    """It took the connection, and then said nothing."""


_ports: dict[int, float] = {}  # from which this process asked, until when that can be seen; oldest first


def ours(port: int) -> bool:
    """Say whether a connection from that port of this machine is, or was, one of our own probes."""
    return _ports.get(port, 0.0) > time.monotonic()


def own_ports() -> frozenset[int]:
    """Return the ports of this machine from which this process asks just now."""
    return frozenset(port for port, until in _ports.items() if until == math.inf)


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


async def answer(address: str, port: int, path: str, timeout: float, *, host: str | None = None) -> int:
    """Ask a site until it answers with success or a redirect; return the status.

    Raises `TimeoutError`, and `HostRefused` at once if it refuses the host that it is asked for.
    """
    async with asyncio.timeout(timeout):
        while True:
            with contextlib.suppress(OSError, ValueError):
                status = await ask(address, port, path, host=host)
                if status < 400:
                    return status
                if host is not None and (said := await refusal(address, port, path, host, status)):
                    raise HostRefused(status, said)
            await asyncio.sleep(_PAUSE)


async def refusal(address: str, port: int, path: str, host: str, status: int) -> str:
    """Return what a site says that answered `status` since it refuses the host; "" if that is not why.

    It is if the site answers at its own address, or says so. Raises as `ask` does.
    """
    if status not in _REFUSALS:
        return ""
    _, body = await _exchange(address, port, path, _CONNECT, _ANSWER, host=host, most=_BODY)
    said = shown(body)
    if _HOSTS.search(said) or await ask(address, port, path) < 400:
        return said or "nothing"
    return ""


def shown(body: bytes) -> str:
    """Return the begin of what a site says as one line, without markup and what may not be printed."""
    text = _TAG.sub(" ", body[:_BODY].decode("utf-8", "replace"))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_SHOWN]


async def ask(
    address: str,
    port: int,
    path: str,
    connect: float = _CONNECT,
    answer: float = _ANSWER,
    *,
    host: str | None = None,
    tls: ssl.SSLContext | None = None,
    leisure: float = 0.0,
) -> int:
    """Ask once; return the status. Raises `OSError`, so `TimeoutError` and `Silent`, and `ValueError`.

    `connect` and `answer` are the seconds that each of the two may take. Only the first line of the answer is
    read, which may be anything and never end. It may be read up to `leisure` seconds later, so that many are
    read at once.
    """
    line, _ = await _exchange(address, port, path, connect, answer, host=host, tls=tls, leisure=leisure)
    return status_of(line)


async def _exchange(
    address: str,
    port: int,
    path: str,
    connect: float,
    answer: float,
    *,
    host: str | None = None,
    tls: ssl.SSLContext | None = None,
    most: int = 0,
    leisure: float = 0.0,
) -> tuple[bytes, bytes]:
    """Ask once; return the first line, and up to `most` bytes of the body. Raises the same as `ask`."""
    version = "1.0" if most else "1.1"  # whose bodies come in no chunks
    request = f"GET {path} HTTP/{version}\r\nHost: {host or address}\r\nConnection: close\r\n\r\n".encode()
    with socket.socket() as own:
        own.setblocking(False)
        own.bind(("", 0))  # so that its port is known before anybody sees the connection
        mine = own.getsockname()[1]
        _ports[mine] = math.inf
        try:
            if tls is None and not most:
                return await _Asking(own, request, answer).line((address, port), connect, leisure), b""
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(own, (address, port)), connect)
            return await _streamed(own, request, answer, host, tls, most)
        finally:
            _ended(mine)


async def _streamed(
    own: socket.socket,
    request: bytes,
    answer: float,
    host: str | None,
    tls: ssl.SSLContext | None,
    most: int,
) -> tuple[bytes, bytes]:
    body = b""
    try:
        async with asyncio.timeout(answer):
            reader, writer = await asyncio.open_connection(
                sock=own, limit=_HEAD, ssl=tls, server_hostname=None if tls is None else host
            )
            try:
                writer.write(request)
                line = await reader.readline()
                if most:
                    body = await _body(reader, most)
            finally:
                writer.transport.abort()  # no word more, and no wait for one
    except TimeoutError:
        raise Silent from None
    return line, body


class _Asking:
    """One request on a separate socket, up to the first line of its answer.

    Each site is asked every few seconds, so this uses callbacks: a stream takes twice the time. Waking for
    each answer costs more than the rest: with some `leisure`, in seconds, answers to requests that were sent
    together are read together.
    """

    def __init__(self, own: socket.socket, request: bytes, answer: float) -> None:
        self._own, self._request, self._answer = own, request, answer
        self._loop = asyncio.get_running_loop()
        self._line: asyncio.Future[bytes] = self._loop.create_future()
        self._said = b""
        self._timers: list[asyncio.TimerHandle] = []

    async def line(self, place: tuple[str, int], connect: float, leisure: float) -> bytes:
        """Connect and ask; return at most `_HEAD` bytes. Raises `OSError`, so `TimeoutError` and `Silent`."""
        failed = self._own.connect_ex(place)
        if failed not in (0, errno.EINPROGRESS):
            raise OSError(failed, os.strerror(failed))
        try:
            # between two ends on one machine a connection is there at once
            if not self._sent(leisure):
                self._timers.append(self._loop.call_later(connect, self._fail, TimeoutError()))
                self._loop.add_writer(self._own, self._connected, leisure)
            return await self._line
        finally:
            self._cancel()
            self._loop.remove_writer(self._own)
            self._loop.remove_reader(self._own)

    def _connected(self, leisure: float) -> None:
        self._loop.remove_writer(self._own)
        if failed := self._own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._fail(OSError(failed, os.strerror(failed)))
        else:
            self._cancel()
            self._sent(leisure)

    def _sent(self, leisure: float) -> bool:
        """Send the request; return whether it was connected."""
        try:
            self._own.send(self._request)  # a new connection has room for all of it
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(error)
            return True
        self._timers = [self._loop.call_later(self._answer, self._fail, Silent())]
        if leisure:
            # with all others that are asked in the same moment
            moment = (self._loop.time() // leisure + 2) * leisure
            self._timers.append(self._loop.call_at(moment, self._heard))
        else:
            self._loop.add_reader(self._own, self._heard)
        return True

    def _heard(self) -> None:
        try:
            piece = self._own.recv(_HEAD)
        except BlockingIOError:
            self._loop.add_reader(self._own, self._heard)
            return
        except OSError as error:
            self._fail(error)
            return
        self._said += piece
        line, end, _ = self._said.partition(b"\n")
        if end or not piece or len(self._said) >= _HEAD:
            if not self._line.done():
                self._line.set_result(line + end)
        else:
            self._loop.add_reader(self._own, self._heard)

    def _cancel(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _fail(self, error: OSError) -> None:
        if not self._line.done():
            self._line.set_exception(error)


async def _body(reader: asyncio.StreamReader, most: int) -> bytes:
    """Return the first bytes of a body; without any of it where the head does not end in time."""
    for _ in range(_FIELDS):
        if await reader.readline() in (b"\r\n", b"\n", b""):
            break
    body = bytearray()
    while len(body) < most and (piece := await reader.read(most - len(body))):
        body += piece
    return bytes(body)


def status_of(line: bytes) -> int:
    """Return the status of an answer by its first line. Raises `ValueError` if it is none of HTTP."""
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
