"""Probe from outside whether something in a tenant answers, without running anything in it."""

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

_PAUSE: Final = 0.015  # seconds between attempts; there is no event to wait for
_CONNECT: Final = 0.1  # seconds per attempt; while the network is down the kernel would retry only after 1 s
_ANSWER: Final = 10.0  # seconds for an answer
_DISCARD: Final = 9  # a port on which nothing listens (RFC 863)
DOCUMENT: Final = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"  # what a browser accepts
_TRACE: Final = 61.0  # seconds for which an ended connection is visible
_FIELDS: Final = 100  # most header lines before a body
_HEAD: Final = 4096  # most bytes of a line of an answer
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")  # RFC 9112, section 4


# status codes that refuse a host, and words servers use when they refuse all hosts but their own
_REFUSALS: Final = (400, 403, 421)
_HOSTS: Final = re.compile(r"(?i)allowed_?hosts|host header|http_host|blocked host|this host\b")
_BODY: Final = 2048  # bytes of a refusal to read
_SHOWN: Final = 300  # characters of a refusal to show
_TAG: Final = re.compile(r"<[^<>]*>")


class HostRefused(Exception):
    """A site answers, but refuses its domain; `said` is its message, safe to display."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class NoAnswer(TimeoutError):
    """The connection was accepted, but no answer came."""


_ports: dict[int, float] = {}  # local ports of our probes -> until when they are visible; oldest first


def ours(port: int) -> bool:
    """Return whether a connection from this local port is, or was, one of our own probes."""
    return _ports.get(port, 0.0) > time.monotonic()


def own_ports() -> frozenset[int]:
    """Return the local ports of probes under way."""
    return frozenset(port for port, until in _ports.items() if until == math.inf)


async def network_up(address: str, timeout: float) -> None:
    """Wait until an address accepts or refuses a connection. Raises `TimeoutError`."""
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
    """Request a path until the site answers with success or a redirect; return the status.

    Raises `TimeoutError`, and `HostRefused` at once if the site refuses `host`.
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
    """Return a site's message if it answered `status` because it refuses the host, else "".

    It does if it accepts its own address as a host, or says so. Raises what `ask` raises.
    """
    if status not in _REFUSALS:
        return ""
    _, body = await _exchange(address, port, path, _CONNECT, _ANSWER, host=host, most=_BODY)
    said = shown(body)
    if _HOSTS.search(said) or await ask(address, port, path) < 400:
        return said or "nothing"
    return ""


def shown(body: bytes) -> str:
    """Return the beginning of a site's answer as one line without markup and unprintable characters."""
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
    """Send one request; return the status.

    `connect` and `answer` are timeouts in seconds. Only the first line of the answer is read; a hostile
    answer may be anything and endless. Reading may be delayed by up to `leisure` seconds, so that many
    answers are read together. Raises `OSError` (including `TimeoutError` and `NoAnswer`) and `ValueError`.
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
    """Send one request; return the first line and up to `most` bytes of the body. Raises as `ask` does."""
    version = "1.0" if most else "1.1"  # HTTP/1.0 bodies are not chunked
    # a page is asked for as by a browser: Qwik's dev server answers 404 to whoever does not accept HTML
    fields = f"Host: {host or address}\r\nAccept: {DOCUMENT}\r\nConnection: close"
    request = f"GET {path} HTTP/{version}\r\n{fields}\r\n\r\n".encode()
    with socket.socket() as own:
        own.setblocking(False)
        own.bind(("", 0))  # so that the port is known before the connection becomes visible
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
                writer.transport.abort()  # neither send nor wait for anything else
    except TimeoutError:
        raise NoAnswer from None
    return line, body


class _Asking:
    """One request on a socket of its own, up to the first line of the answer.

    Each site is probed every few seconds, so this uses callbacks: streams take twice the time. Most of the
    cost is waking up for each answer; with a `leisure` in seconds, answers to requests sent together are read
    together.
    """

    def __init__(self, own: socket.socket, request: bytes, answer: float) -> None:
        self._own, self._request, self._answer = own, request, answer
        self._loop = asyncio.get_running_loop()
        self._line: asyncio.Future[bytes] = self._loop.create_future()
        self._said = b""
        self._timers: list[asyncio.TimerHandle] = []

    async def line(self, place: tuple[str, int], connect: float, leisure: float) -> bytes:
        """Connect and send; return at most `_HEAD` bytes of the first line.

        Raises `OSError`, including `TimeoutError` and `NoAnswer`.
        """
        failed = self._own.connect_ex(place)
        if failed not in (0, errno.EINPROGRESS):
            raise OSError(failed, os.strerror(failed))
        try:
            # on one machine a connection is usually established at once
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
        """Send the request; return False if not connected yet."""
        try:
            self._own.send(self._request)  # it fits into the buffer of a new connection
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(error)
            return True
        self._timers = [self._loop.call_later(self._answer, self._fail, NoAnswer())]
        if leisure:
            # together with all others sent within the same interval
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
    """Return the first bytes of a body, skipping up to `_FIELDS` header lines."""
    for _ in range(_FIELDS):
        if await reader.readline() in (b"\r\n", b"\n", b""):
            break
    body = bytearray()
    while len(body) < most and (piece := await reader.read(most - len(body))):
        body += piece
    return bytes(body)


def status_of(line: bytes) -> int:
    """Return the status from an answer's first line. Raises `ValueError` if it is not HTTP."""
    match = _STATUS.fullmatch(line)
    if match is None:
        raise ValueError("not HTTP")
    return int(match[1])


def _ended(port: int) -> None:
    now = time.monotonic()
    _ports.pop(port, None)
    _ports[port] = now + _TRACE
    for old, _ in list(itertools.takewhile(lambda entry: entry[1] < now, _ports.items())):
        del _ports[old]
