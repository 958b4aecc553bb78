"""Opens a client's websocket a second time, to the gateway of another member."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import Scope

from gateway.cluster.peers import MemberAway, Peer
from gateway.cluster.relay import NOT_HOME, NotHome, passed_on
from gateway.transport.tunnel import Far, Refused

_PATIENCE: Final = 3.0  # seconds, also across the peer's restart
_ONCE: Final = 1.0  # seconds for one connection and its handshake
_PAUSE: Final = 0.05
_ANSWERING: Final = 10.0  # seconds that the home may take to accept


async def dial(scope: Scope, peer: Peer, client: str) -> tuple[Far, bytes]:
    """Return the connection, and the head of the answer that accepts the websocket.

    Raises `MemberAway`, `NotHome`, and `Refused` with what the peer answered instead.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _PATIENCE
    far = Far()
    while True:
        if not peer.alive or peer.tls is None:
            raise MemberAway(peer.name)
        try:
            async with asyncio.timeout(_ONCE):
                host, port = peer.place
                await loop.create_connection(lambda: far, host, port, ssl=peer.tls)  # noqa: B023
            break
        except (OSError, TimeoutError) as error:
            if loop.time() > until:
                raise MemberAway(peer.name) from error
            await asyncio.sleep(_PAUSE)
            far = Far()
    far.transport.write(_head(scope, client))
    try:
        async with asyncio.timeout(_ANSWERING):
            return far, await far.accepted
    except (OSError, TimeoutError) as error:
        raise MemberAway(peer.name) from error
    except Refused as refused:
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
