"""What a gateway answers to its peers: its tenants, what they ask, and the requests that they pass on."""

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

from gateway.cluster.own import Own
from gateway.cluster.peers import Peer, Peers
from gateway.cluster.relay import RELAYED, as_client
from gateway.errors import GatewayError
from gateway.tasks import begin
from gateway.transport.secure import PEER

log = logging.getLogger(__name__)

FROM: Final = "gateway.from"
"""In a scope: the name of the peer that passed the request on."""
_BODY: Final = 1 << 20  # bytes

Question = Callable[[Peer, Any], Awaitable[Any]]
"""Takes who asks and the JSON body, and returns what is answered as JSON; None for 404."""


class Listener:
    """The ASGI application for peers. `app` gets the requests that they pass on.

    `questions` are what peers may ask, by name: `/peer/ask/NAME`.
    """

    def __init__(self, peers: Peers, own: Own, app: ASGIApp) -> None:
        self.questions: dict[str, Question] = {}
        self._peers = peers
        self._own = own
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = self._peers.of(scope["state"][PEER])
        path: str = scope["path"]
        relayed = Headers(scope=scope).get(RELAYED)
        if peer is None:  # it was one when it connected
            await _answer(scope, send, 403)
        elif relayed is not None:
            await self._app({**as_client(scope, relayed), FROM: peer.name}, receive, send)
        elif scope["type"] == "http" and path == "/peer/watch":
            await self._watch(receive, send)
        elif scope["type"] == "http" and path.startswith("/peer/ask/"):
            question = self.questions.get(path.removeprefix("/peer/ask/"))
            await self._ask(peer, question, scope, receive, send)
        else:
            await _answer(scope, send, 404)

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Tell this member's tenants until the peer hangs up."""
        wake = asyncio.Event()
        leaving = begin(_gone(receive))
        leaving.add_done_callback(lambda _: wake.set())
        await send(_start(200, b"application/x-ndjson"))
        async with contextlib.aclosing(self._own.follow(wake)) as told:
            async for line in told:
                if leaving.done():
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
        body = bytearray()
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > _BODY:
                await _answer(scope, send, 413)
                return
            more = message.get("more_body", False)
        try:
            given = orjson.loads(body) if body else dict(parse_qsl(scope["query_string"].decode("latin-1")))
            found = await question(peer, given)
        except (GatewayError, ValueError, KeyError, TypeError) as error:
            log.info("a question of %s was not answered: %r", peer.name, error)
            await _answer(scope, send, 503)
            return
        await _answer(scope, send, 404 if found is None else 200, found)


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
