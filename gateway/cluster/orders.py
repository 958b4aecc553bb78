"""Orders a peer to do something. The peer answers once it is done, or says why not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any, Final

import aiohttp
import orjson

from gateway.bounds import Flood, first
from gateway.cluster.peers import MemberAway, Peer, Peers
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

_ANSWER: Final = 1 << 20  # bytes
_CONNECTING: Final = 10.0  # seconds
_PAUSE: Final = 0.1


class OrderRefused(Unavailable):
    """A peer refuses an order, for its own reason."""


async def order(peers: Peers, peer: Peer, path: str, body: bytes, patience: float) -> Any:
    """Have a peer do something; return what it answers as JSON.

    Raises `OrderRefused` with the peer's reason, and `MemberAway` where no answer comes within `patience`
    seconds: then it may be done all the same, so order only what can be repeated.
    """
    if not peer.alive or peer.tls is None:
        raise MemberAway(peer.name)
    limit = asyncio.timeout(patience)
    cut = partial(_expire, limit)
    peer.cut.add(cut)
    try:
        async with limit, await _posted(peers, peer, path, body) as answer:
            text = await first(answer.content.readany, _ANSWER, most=_ANSWER)
            if answer.status == 404:
                raise OrderRefused(f"the gateway of {peer.name} is too old; upgrade it first", reason="older")
            if answer.status == 409:
                told = orjson.loads(text)
                raise OrderRefused(str(told["message"]), **_facts(told["facts"]))
            if answer.status != 200:
                raise ValueError(f"{peer.name} answered {answer.status}")
            return orjson.loads(text) if text else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError, Flood) as error:
        log.info("%s did not answer %s: %r", peer.name, path, error)
        raise MemberAway(peer.name) from error
    finally:
        peer.cut.discard(cut)


async def _posted(peers: Peers, peer: Peer, path: str, body: bytes) -> aiohttp.ClientResponse:
    """Return a peer's answer; one that is busy or just restarted may take a while to accept a connection."""
    assert peer.tls is not None
    loop = asyncio.get_running_loop()
    until = loop.time() + _CONNECTING
    while True:
        try:
            return await peers.session.post(peer.url + path, ssl=peer.tls, data=body)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            if loop.time() > until or not peer.alive:  # nothing was sent
                raise
        await asyncio.sleep(_PAUSE)


def _expire(limit: asyncio.Timeout) -> None:
    with contextlib.suppress(RuntimeError):  # it is just over
        limit.reschedule(asyncio.get_running_loop().time())


def _facts(told: object) -> dict[str, Any]:
    return {str(key): value for key, value in told.items()} if isinstance(told, dict) else {}
