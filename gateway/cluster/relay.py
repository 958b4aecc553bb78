"""Passes one HTTP request on to the gateway of another member, and its answer back.

Both bodies are streamed at the slower end's pace. A failure on the way looks to the client as if it had asked
the tenant's home itself: if that connection breaks, so does this one.

Passes a large body of a peer's answer on to the client without taking it apart.

aiohttp reads the head. From then on its connection is ours: TLS decrypts into one piece of memory, from which
the client gets it. Nothing more is read until the kernel has all of that, so the client sets the pace.
Both gateways together need an eighth less CPU so than with aiohttp's stream, and wait less for each other.

Opens a client's websocket a second time, to the gateway of another member.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, closing, suppress
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import orjson
from multidict import CIMultiDict
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from gateway.bounds import Flood, first
from gateway.cluster.peers import ASKING, MemberAway, Peer, Peers
from gateway.tasks import begin
from gateway.transport.http1 import ABORT, UNBUFFERED
from gateway.transport.tunnel import CLOSED, HandshakeRefused, ServerEnd, tcp_state

log = logging.getLogger(__name__)

RELAYED: Final = "x-gateway-relayed"
"""Header of a request that a peer passes on: what its client's connection was. Nobody else may send it."""
NOT_HOME: Final = "x-gateway-not-home"
"""Header of the answer 421 of a peer that does not have the tenant either."""
PART: Final = "x-gateway-part"
"""Header of a request of a peer that wants this gateway's part of an answer, whatever it is about."""

_OF_A_HOP: Final = frozenset(
    (
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *("expect", "x-forwarded-for", RELAYED, PART),
    )
)
_PATIENCE: Final = 3.0  # seconds in which a peer that lives accepts a connection, also across its restart
_PAUSE: Final = 0.05
_REPEATABLE: Final = ("GET", "HEAD")
_LOOK: Final = 1.0
_MERGED: Final = 8 << 20  # bytes of one peer's part of a list
_KEPT: Final = 64 << 10  # bytes of a body that can be sent once more, to another peer


class NotHome(Exception):
    """The peer does not have the tenant. Nothing was done, and the request can be made elsewhere."""


class Body:
    """A request's body. It can be sent again, to another peer, as long as no more than its beginning was."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self.empty = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self.lost = False  # more came than is kept
        self._receive = receive
        self._kept: list[bytes] = []
        self._size = 0  # parts that came
        self._turn = asyncio.Lock()
        self._over = asyncio.Event()
        if self.empty:
            self._over.set()

    def parts(self) -> AsyncIterator[bytes] | None:
        """Return the body from its beginning, None if there is none; of `lost` nothing comes twice."""
        return None if self.empty else self._parts()

    async def _parts(self) -> AsyncIterator[bytes]:
        place = 0
        while True:
            async with self._turn:  # one that was given up may still wait for the next part
                if place < len(self._kept):
                    part = self._kept[place]
                elif place < self._size:
                    raise ConnectionResetError("the beginning of the body is gone")
                elif self._over.is_set():
                    return
                else:
                    part = await self._next()
                place += 1
            if part:
                yield part

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client went away")
        part: bytes = message.get("body", b"")
        self._size += 1
        self.lost = self.lost or sum(map(len, self._kept)) + len(part) > _KEPT
        if not self.lost:
            self._kept.append(part)
        if not message.get("more_body", False):
            self._over.set()
        return part

    async def left(self) -> None:
        """Return when the client has gone. While its body arrives, its sender notices that."""
        await self._over.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def relay(
    scope: Scope,
    receive: Receive,
    send: Send,
    peers: Peers,
    peer: Peer,
    *,
    body: Body,
    client: str,
    patience: float,
) -> None:
    """Have a peer answer a request. `client` is what `client_of` returns.

    A client that takes nothing of the answer for `patience` seconds is cut off. Raises `MemberAway` and
    `NotHome` where nothing has happened yet, or only something was read.
    """
    repeatable = scope["method"] in _REPEATABLE
    begun = False
    ended = asyncio.get_running_loop().create_future()

    def cut() -> None:
        if not ended.done():
            ended.set_result(None)

    async def start(message: Message) -> None:
        nonlocal begun
        begun = True
        peer.doubts.discard(cut)
        await send(message)

    working = begin(_relay(scope, start, send, peers, peer, body, client, patience))
    leaving = begin(body.left())
    peer.cut.add(cut)
    if repeatable:
        peer.doubts.add(cut)
    try:
        waiting: list[asyncio.Future[Any]] = [working, leaving, ended]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            whole = await working
        else:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            whole = not ended.done()  # else the client has left
        if not whole and repeatable and not begun:
            raise MemberAway(peer.name)
        if not whole:
            await _break(scope, receive)
    finally:
        peer.cut.discard(cut)
        peer.doubts.discard(cut)
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _relay(
    scope: Scope, start: Send, send: Send, peers: Peers, peer: Peer, body: Body, client: str, patience: float
) -> bool:
    """Return whether the answer was passed on whole."""
    answer = await _answer(scope, peers, peer, body, client)
    if answer is None:
        return False
    peer.hear()
    try:
        if answer.status == 421 and NOT_HOME in answer.headers:
            raise NotHome
        kept = [(name.lower(), value) for name, value in answer.raw_headers]
        headers = [pair for pair in kept if pair[0].decode("latin-1") not in _OF_A_HOP]
        await start({"type": "http.response.start", "status": answer.status, "headers": headers})
        unbuffered = scope.get("state", {}).get(UNBUFFERED)
        passing = partial(_pass, send, answer, patience)
        if unbuffered is not None and is_large(scope["method"], answer):
            if not await pass_on(answer, unbuffered, passing):
                log.info("an answer of %s broke off", peer.name)
                return False
        else:
            async for part in answer.content.iter_any():
                if answer.content.at_eof():
                    await passing(part, more=False)
                    return True
                await passing(part)
        await passing(b"", more=False)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        log.info("an answer of %s was cut off: %r", peer.name, error)
        return False
    finally:
        answer.release()
    return True


async def _pass(
    send: Send, answer: aiohttp.ClientResponse, patience: float, part: bytes, *, more: bool = True
) -> None:
    """Hand the client a part of the answer, the last one without `more`.

    Raises `TimeoutError` if it takes nothing.

    Meanwhile nothing is read of the peer, which may have cut off a client that takes nothing sooner.
    """
    message: Message = {"type": "http.response.body", "body": part, "more_body": more}
    loop = asyncio.get_running_loop()
    until = loop.time() + patience
    while True:
        try:
            async with asyncio.timeout(_LOOK):
                await send(message)  # which writes all of it, once there is room for any
        except TimeoutError:
            connection = answer.connection
            if loop.time() > until or (connection and tcp_state(connection.transport) == CLOSED):
                raise
        else:
            return


async def _answer(
    scope: Scope, peers: Peers, peer: Peer, body: Body, client: str
) -> aiohttp.ClientResponse | None:
    """Return the peer's answer, None where it hung up instead. Raises `MemberAway`."""
    expects = Headers(scope=scope).get("expect", "").lower() == "100-continue"
    again = scope["method"] in _REPEATABLE and body.empty
    loop = asyncio.get_running_loop()
    until = loop.time() + _PATIENCE
    while True:
        if not peer.alive or peer.tls is None:
            raise MemberAway(peer.name)
        try:
            return await peers.session.request(
                scope["method"],
                url_at(scope, peer),
                headers=CIMultiDict(passed_on(scope, client)),
                data=body.parts(),
                ssl=peer.tls,
                expect100=expects and not body.empty,
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            # nothing was sent: it may be about to start again
            if loop.time() > until:
                raise MemberAway(peer.name) from error
        except (aiohttp.ClientError, OSError) as error:
            log.info("%s did not answer a request: %r", peer.name, error)
            # one that ends hangs up on what is asked of it just then; who takes its place answers
            if not again or loop.time() > until:
                return None
        await asyncio.sleep(_PAUSE)


async def _break(scope: Scope, receive: Receive) -> None:
    """Cut the client off, as the home would have been."""
    scope.get("state", {}).get(ABORT, lambda: None)()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await receive())["type"] != "http.disconnect":
                pass


async def ask_same(scope: Scope, peers: Peers, client: str) -> tuple[list[Any], list[str]]:
    """Repeat a client's GET at all peers; return their answers as JSON, and who gave none in time.

    A refusal is no answer.
    """
    found: list[Any] = []
    silent: list[str] = []

    async def one(peer: Peer) -> None:
        try:
            async with asyncio.timeout(ASKING):
                if not peer.alive or peer.tls is None:
                    raise MemberAway(peer.name)
                url, headers = url_at(scope, peer), CIMultiDict(passed_on(scope, client))
                async with peers.session.get(url, headers=headers, ssl=peer.tls) as answer:
                    text = await first(answer.content.readany, _MERGED, most=_MERGED)
                    if answer.status != 200:
                        raise ValueError(f"it answered {answer.status}")
                found.append(orjson.loads(text))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, MemberAway, Flood) as error:
            log.info("%s did not answer %s: %r", peer.name, scope["path"], error)
            silent.append(peer.name)

    await asyncio.gather(*map(one, list(peers.all.values())))
    return found, sorted(silent)


# --- the head -----------------------------------------------------------------------------------------


def url_at(scope: Scope, peer: Peer) -> URL:
    """Return where a peer answers the same request."""
    query = scope["query_string"].decode("latin-1")
    path = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    # to this gateway it is a part of a name like any other, as to the home; `URL` would cut it off
    return URL(peer.url + path.replace("#", "%23"), encoded=True)


def passed_on(scope: Scope, client: str) -> Iterable[tuple[str, str]]:
    """Yield the headers of a request for its peer, including the one that describes the client.

    A length beside a transfer coding counts for nothing, and must not be passed on (RFC 9112, 6.3).
    """
    coded = any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"])
    for name, value in scope["headers"]:
        text = name.decode("latin-1").lower()
        if text not in _OF_A_HOP and not (coded and text == "content-length"):
            yield text, value.decode("utf-8", "surrogateescape")
    yield RELAYED, client


def client_of(scope: Scope, address: str) -> str:
    """Return what a peer must know about a request's client: its scheme and address."""
    return f"{scope['scheme']} {quote(address, safe=':./')}"


def as_client(scope: Scope, told: str) -> Scope:
    """Return the scope of a request that a peer passes on, as if its client had come here."""
    scheme, _, address = told.partition(" ")
    return {
        **scope,
        "scheme": scheme if scheme in ("http", "https", "ws", "wss") else scope["scheme"],
        "client": (address, 0) if address else None,
        "server": None,
        "headers": [(name, value) for name, value in scope["headers"] if name != RELAYED.encode()],
    }


LARGE: Final = 16 << 20
"""Bytes of a body from which on this pays: its connection is not used again, and a new one costs CPU, too."""
_AT_ONCE: Final = 512 << 10  # bytes that the kernel collects before it wakes us, as long as much is to come
_ROOM: Final = 640 << 10  # bytes: those, which TLS hands over in two or three pieces
_WHOLE: Final = (200, 206)

Write = Callable[[memoryview], bool]
"""Writes to the client without copying; returns whether that memory is free again."""


def is_large(method: str, answer: aiohttp.ClientResponse) -> bool:
    """Return whether an answer to this method has a body that `pass_on` is for."""
    length = answer.content_length
    return method == "GET" and answer.status in _WHOLE and length is not None and length >= LARGE


async def pass_on(
    answer: aiohttp.ClientResponse,
    unbuffered: Callable[[], AbstractContextManager[Write]],
    send: Callable[[bytes], Awaitable[None]],
) -> bool:
    """Pass the body on; return whether all of it came, apart from the message that ends it.

    `unbuffered` is what `transport.http1` has under that name. `send` returns once the client has taken what
    was written before. Raises `aiohttp.ClientError` if the connection is gone, and what `send` raises.
    """
    transport = answer.connection and answer.connection.transport
    if not transport:
        raise aiohttp.ClientConnectionError("the peer hung up")
    try:
        came = answer.content.read_nowait()  # which may have aiohttp read on
        transport.pause_reading()
        length = answer.content_length
        assert length is not None
        with unbuffered() as write, closing(_Taken(transport, length - len(came), write)) as taken:
            transport.set_protocol(taken)
            await send(came)
            while taken.left and not taken.lost:
                transport.resume_reading()
                await taken.stopped.wait()
                taken.stopped.clear()
                await send(b"")
        return not taken.left
    finally:
        answer.close()  # aiohttp does not know how much was read


class _Taken(asyncio.BufferedProtocol):
    """A connection on which `left` bytes of a body are to come, taken over from its protocol."""

    def __init__(self, transport: asyncio.Transport, left: int, write: Write) -> None:
        self.left = left
        self.lost = False
        self.stopped = asyncio.Event()
        """Set when nothing more is read, or comes."""
        self._transport = transport
        self._before: Any = transport.get_protocol()
        self._write = write
        self._room = memoryview(bytearray(_ROOM))
        self._filled = 0  # bytes of it that are not written yet
        self._flushing: asyncio.Handle | None = None
        self._wire: socket.socket = transport.get_extra_info("socket")
        self._collect(_AT_ONCE)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room[self._filled :]

    def buffer_updated(self, count: int) -> None:
        self._filled += count
        if self._filled >= min(len(self._room), self.left):
            self._flush()
        elif self._flushing is None:  # the rest of what the kernel has comes in this turn of the loop
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if not self._filled:
            return
        part = self._room[: min(self._filled, self.left)]
        self._filled = 0
        self.left -= len(part)
        if self._collecting and self.left < 4 * _AT_ONCE:
            self._collect(1)  # of what is left, some may have been read by TLS already
        if not self._write(part) or not self.left:
            self._transport.pause_reading()
            self.stopped.set()

    def _collect(self, count: int) -> None:
        with suppress(OSError, ValueError):  # it is closed already
            self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        self._collecting = count > 1

    def connection_lost(self, error: Exception | None) -> None:
        self._flush()
        self.lost = True
        self.stopped.set()
        self._before.connection_lost(error)

    def close(self) -> None:
        """Write nothing any more, and hang up."""
        self._filled = 0
        self._transport.abort()


_DIAL_PATIENCE: Final = 3.0  # seconds, also across the peer's restart
_DIAL_ONCE: Final = 1.0  # seconds for one connection and its handshake
_DIAL_PAUSE: Final = 0.05
_ANSWERING: Final = 10.0  # seconds that the home may take to accept


async def dial(scope: Scope, peer: Peer, client: str) -> tuple[ServerEnd, bytes]:
    """Return the connection, and the head of the answer that accepts the websocket.

    Raises `MemberAway`, `NotHome`, and `HandshakeRefused` with what the peer answered instead.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _DIAL_PATIENCE
    far = ServerEnd()
    while True:
        if not peer.alive or peer.tls is None:
            raise MemberAway(peer.name)
        try:
            async with asyncio.timeout(_DIAL_ONCE):
                host, port = peer.place
                await loop.create_connection(lambda: far, host, port, ssl=peer.tls)  # noqa: B023
            break
        except (OSError, TimeoutError) as error:
            if loop.time() > until:
                raise MemberAway(peer.name) from error
            await asyncio.sleep(_DIAL_PAUSE)
            far = ServerEnd()
    far.transport.write(_head(scope, client))
    try:
        async with asyncio.timeout(_ANSWERING):
            return far, await far.accepted
    except (OSError, TimeoutError) as error:
        raise MemberAway(peer.name) from error
    except HandshakeRefused as refused:
        head = refused.answer.partition(b"\r\n\r\n")[0].lower()
        if head.startswith(b"http/1.1 421 ") and f"\r\n{NOT_HOME}:".encode() in head:
            raise NotHome from None
        raise
    finally:
        if not far.accepted.done() or far.accepted.cancelled() or far.accepted.exception() is not None:
            far.transport.abort()


def _head(scope: Scope, client: str) -> bytes:
    """Return the client's request, the key of its handshake included, as the peer gets it."""
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    lines = [
        b"GET " + scope["raw_path"] + query + b" HTTP/1.1",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
    ]
    for name, value in passed_on(scope, client):
        lines.append(f"{name}: {value}".encode("utf-8", "surrogateescape"))
    return b"\r\n".join([*lines, b"", b""])
