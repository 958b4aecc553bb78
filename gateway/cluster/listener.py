"""Answers a gateway's peers: reports tenants, and takes questions, orders and requests passed on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qsl

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.admission import Admission
from gateway.cluster.own import Own
from gateway.cluster.peers import GONE, Peer, Peers
from gateway.cluster.relay import RELAYED, as_client
from gateway.errors import GatewayError
from gateway.tasks import begin
from gateway.transport.http1 import PEER

log = logging.getLogger(__name__)

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
