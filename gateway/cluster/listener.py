"""The tenants of this member, as they are reported to the peers that follow them.

Answers a gateway's peers: reports tenants, and takes questions, orders and requests passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.admission import Admission
from gateway.cluster.peers import GONE, Known, Peer, Peers, first_tenants, lines
from gateway.cluster.relay import RELAYED, as_client
from gateway.errors import GatewayError
from gateway.tasks import begin
from gateway.transport.http1 import PEER

log = logging.getLogger(__name__)

PROTOCOL: Final = 2
"""Of what gateways say to one another. A gateway passes over what a higher one says besides, and expects of a
lower one what that knows: 1 tells tenants and answers questions, 2 takes orders, such as moves.
"""
BEAT: Final = 1.0
"""Seconds after which something is told in any case, so that silence means something."""
_TOGETHER: Final = 0.02  # seconds in which changes are taken together
_RESYNC: Final = 10.0  # seconds after which is looked without being asked to


class Own:
    """The tenants of this member. `list` returns them; it is called again after each `changed`.

    `facts` is sent with each first line: what peers need to know about this gateway itself.
    """

    def __init__(self, list: Callable[[], Awaitable[Iterable[Known]]], facts: Mapping[str, Any]) -> None:
        self.tenants: dict[str, Known] = {}
        self._looked = False  # before that nobody is told that these are all
        self._list = list
        self._facts = facts
        self._asked = asyncio.Event()
        self._followers: set[asyncio.Event] = set()
        self._ended = False

    def changed(self) -> None:
        """Check the tenants again soon, since one has changed."""
        self._asked.set()

    def end(self) -> None:
        """End all reports: the peers that follow ask again, and reach the next process."""
        self._ended = True
        for wake in self._followers:
            wake.set()

    async def look(self) -> None:
        """Keep `tenants` up to date, forever."""
        while True:
            self._asked.clear()
            again = _RESYNC
            try:
                found = first_tenants(await self._list())
            except GatewayError as error:
                log.info("cannot list this member's tenants now: %s", error.message)
                again = BEAT
            else:
                if not self._looked or found != self.tenants:
                    self._looked, self.tenants = True, found
                    for wake in self._followers:
                        wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again):
                    await self._asked.wait()
            await asyncio.sleep(_TOGETHER)

    async def follow(self, wake: asyncio.Event) -> AsyncGenerator[dict[str, Any]]:
        """Yield all tenants, then `{"whole": true}`, then each change; an empty line where nothing happens.

        Until the tenants are known, only empty lines come.
        A slow reader gets only the difference to what it was sent last, however many changes there were.
        Setting `wake` makes the next line come at once.
        """
        told: Mapping[str, Known] = {}
        yield {"v": PROTOCOL, **self._facts}
        self._followers.add(wake)
        try:
            last: dict[str, Any] = {"whole": True}
            while not self._ended:
                wake.clear()
                if self._looked:
                    now = self.tenants
                    for line in lines(told, now):
                        yield line
                    told = now
                    yield last
                    last = {}
                else:  # only that this gateway is there
                    yield {}
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT):
                        await wake.wait()
        finally:
            self._followers.discard(wake)


FROM: Final = "gateway.from"
"""In a scope: the name of the peer that passed the request on."""
_BODY: Final = 1 << 20  # bytes
_LARGE_AT_ONCE: Final = 2  # uploads in memory

Question = Callable[[Peer, Any], Awaitable[Any]]
"""Takes who asks and the JSON body, and returns what is answered as JSON; None for 404."""

Order = Callable[[Peer, bytes], Awaitable[Any]]
"""Takes who orders something and the body, and returns what is answered as JSON; what it raises is told."""


class Listener:
    """The ASGI application for peers. `app` gets the requests that they pass on.

    `questions` are what peers may ask, by name: `/peer/ask/NAME`. `orders` are what they may have done,
    `/peer/do/NAME`, and `uploads`, `/peer/put/NAME`, such with a body of `most` bytes.
    """

    def __init__(self, peers: Peers, own: Own, app: ASGIApp, most: int = _BODY) -> None:
        self.questions: dict[str, Question] = {}
        self.orders: dict[str, Order] = {}
        self.uploads: dict[str, Order] = {}
        self._most = most
        self._large = Admission[str]("uploads", each=_LARGE_AT_ONCE, total=_LARGE_AT_ONCE)
        self._peers = peers
        self._own = own
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ConnectionResetError):
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = self._peers.of(scope["state"][PEER])
        path: str = scope["path"]
        relayed = Headers(scope=scope).get(RELAYED)
        if peer is None:  # it was one when it connected, or before it was removed
            removed = await self._peers.was_removed(scope["state"][PEER])
            await _answer(scope, send, GONE if removed else 403)
        elif relayed is not None:
            await self._app({**as_client(scope, relayed), FROM: peer.name}, receive, send)
        elif scope["type"] == "http" and path == "/peer/watch":
            await self._watch(scope["state"][PEER], receive, send)
        elif scope["type"] == "http" and path.startswith("/peer/ask/"):
            question = self.questions.get(path.removeprefix("/peer/ask/"))
            await self._ask(peer, question, scope, receive, send)
        elif scope["type"] == "http" and path.startswith("/peer/do/"):
            order = self.orders.get(path.removeprefix("/peer/do/"))
            await self._do(peer, order, _BODY, scope, receive, send)
        elif scope["type"] == "http" and path.startswith("/peer/put/"):
            order = self.uploads.get(path.removeprefix("/peer/put/"))
            async with self._large.slot(peer.name):
                await self._do(peer, order, self._most, scope, receive, send)
        else:
            await _answer(scope, send, 404)

    async def _watch(self, certificate: bytes, receive: Receive, send: Send) -> None:
        """Report this member's tenants until the peer hangs up, or is none any more."""
        wake = asyncio.Event()
        leaving = begin(_gone(receive))
        leaving.add_done_callback(lambda _: wake.set())
        await send(_start(200, b"application/x-ndjson"))
        async with contextlib.aclosing(self._own.follow(wake)) as told:
            async for line in told:
                if leaving.done() or self._peers.of(certificate) is None:
                    break
                body = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
                await send({"type": "http.response.body", "body": body, "more_body": True})
        # for a server that ends: it would take an answer without an end for a fault
        await send({"type": "http.response.body", "body": b""})

    async def _ask(
        self, peer: Peer, question: Question | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if question is None:
            await _answer(scope, send, 404)
            return
        body = await _body(receive, _BODY) if scope["method"] == "POST" else b""
        if body is None:
            await _answer(scope, send, 413)
            return
        try:
            given = orjson.loads(body) if body else dict(parse_qsl(scope["query_string"].decode("latin-1")))
            found = await question(peer, given)
        except (GatewayError, ValueError, KeyError, TypeError) as error:
            log.info("cannot answer a question of %s: %r", peer.name, error)
            await _answer(scope, send, 503)
            return
        await _answer(scope, send, 404 if found is None else 200, found)

    async def _do(
        self, peer: Peer, order: Order | None, most: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if order is None:  # of a newer gateway
            await _answer(scope, send, 404)
            return
        body = await _body(receive, most)
        if body is None:
            await _answer(scope, send, 413)
            return
        try:
            found = await order(peer, body)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("malformed order from %s: %r", peer.name, error)
            await _answer(scope, send, 400)
        except GatewayError as error:
            log.info("an order from %s failed: %s", peer.name, error.message)
            told = {"code": error.code, "message": error.message, "facts": error.facts}
            await _answer(scope, send, 409, told)
        else:
            await _answer(scope, send, 200, found)


async def _body(receive: Receive, most: int) -> bytes | None:
    """Return a body, None if it has more than `most` bytes. Raises `ConnectionResetError`."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("a peer went away")
        body += message.get("body", b"")
        if len(body) > most:
            return None
        more = message.get("more_body", False)
    return bytes(body)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(scope: Scope, send: Send, status: int, found: Any = None) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
        return
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": b"" if found is None else orjson.dumps(found)})


def _start(status: int, kind: bytes) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}
