"""A client's request, repeated at a peer and answered there for as long as the client listens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Final
from urllib.parse import parse_qsl, urlencode

import aiohttp
from multidict import CIMultiDict
from starlette.types import Scope
from yarl import URL

from gateway.cluster.peers import Peer, Peers
from gateway.cluster.relay import PART, passed_on

log = logging.getLogger(__name__)

BROKEN: Final = (aiohttp.ClientError, OSError)
"""What is raised where such an answer ends before its time."""

_PAUSES: Final = (0.05, 2.0)  # seconds, the first and the longest, until a peer is asked again
_ANSWERING: Final = 5.0  # seconds that a peer may take to begin
_RESUME: Final = "last-event-id"


class Standing:
    """One request, as sent to each peer with the client's own token, which the peer verifies again.

    Of each answer about `ahead` bytes are read before they are asked for.
    """

    def __init__(self, scope: Scope, client: str, peers: Peers, ahead: int) -> None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        self._query = urlencode([(name, value) for name, value in query if name != "lastEventId"])
        self._path = scope["raw_path"].decode("latin-1")
        self._headers = [(name, value) for name, value in passed_on(scope, client) if name != _RESUME]
        self._peers = peers
        self._ahead = ahead

    async def answer(self, peer: Peer, after: int | None) -> aiohttp.ClientResponse:
        """Return a peer's answer with what comes after an id, however long it takes. Use it by `reading`."""
        pause, longest = _PAUSES
        while True:
            await peer.told.wait()  # before that it is not there
            try:
                async with asyncio.timeout(_ANSWERING):
                    return await self._ask(peer, after)
            except (*BROKEN, ValueError) as error:
                log.debug("%s does not answer %s: %r", peer.name, self._path, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _ask(self, peer: Peer, after: int | None) -> aiohttp.ClientResponse:
        headers = CIMultiDict([*self._headers, (PART, "1")])
        if after is not None:
            headers[_RESUME] = str(after)
        assert peer.tls is not None
        answer = await self._peers.session.get(
            URL(f"{peer.url}{self._path}?{self._query}", encoded=True),
            headers=headers,
            ssl=peer.tls,
            allow_redirects=False,
            read_bufsize=self._ahead // 2,  # aiohttp stops reading at twice as much
        )
        if answer.status != 200:
            answer.close()
            raise ValueError(f"it answered {answer.status}")
        return answer


@contextlib.asynccontextmanager
async def reading(peer: Peer, answer: aiohttp.ClientResponse) -> AsyncIterator[aiohttp.StreamReader]:
    """Read a peer's answer, which raises one of `BROKEN` once the peer is away; close it at the end."""
    cut = partial(answer.content.set_exception, ConnectionResetError(f"{peer.name} is away"))
    peer.cut.add(cut)
    try:
        yield answer.content
    finally:
        peer.cut.discard(cut)
        answer.close()
