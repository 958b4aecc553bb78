"""A standing request at a peer: what the peer is told, how much is read ahead, and that it is cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from gateway.cluster.events import BROKEN, PeerStream, reading
from gateway.cluster.identity import Identity, trust
from gateway.cluster.peers import Peer, Peers

AHEAD = 64 << 10


class Endless:
    """A peer that answers without an end. `full` is set once nobody takes any more of it."""

    def __init__(self) -> None:
        self.full = asyncio.Event()
        self.request: Any = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.request = request
        answer = web.StreamResponse()
        await answer.prepare(request)
        try:
            while True:
                async with asyncio.timeout(0.5):
                    await answer.write(b"x" * 16_384)
        except TimeoutError:
            self.full.set()
            await asyncio.Event().wait()
        except ConnectionError:
            pass
        return answer


@contextlib.asynccontextmanager
async def asking(folder: Path, peer: Endless) -> AsyncIterator[tuple[PeerStream, Peer]]:
    for name in ("ours", "theirs"):
        (folder / name).mkdir()
    ours, theirs = Identity(folder / "ours"), Identity(folder / "theirs")
    context = theirs.accepting()
    trust(context, ours.certificate)
    app = web.Application()
    app.router.add_get("/v1/events", peer.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    found = Peer("m2")
    found.address = f"127.0.0.1:{runner.addresses[0][1]}"
    found.tls = ours.calling(theirs.certificate)
    found.told.set()
    scope = {
        "raw_path": b"/v1/events",
        "query_string": b"tenant=a%2Cb&lastEventId=m1:3",
        "headers": [
            (b"authorization", b"Bearer t"),
            (b"last-event-id", b"m1:3,m2:4"),
            (b"x-gateway-part", b"forged"),
        ],
    }
    async with aiohttp.ClientSession() as session:
        peers = cast(Peers, type("_", (), {"session": session}))
        yield PeerStream(scope, "http 192.0.2.1", peers), found
    await runner.cleanup()


async def test_a_peer_gets_the_clients_request_with_its_own_position(tmp_path: Path) -> None:
    peer = Endless()
    async with asking(tmp_path, peer) as (standing, found):
        for after, said in ((4, ["4"]), (None, [])):
            async with reading(found, await standing.answer(found, after)):
                assert dict(peer.request.query) == {"tenant": "a,b"}
                assert peer.request.headers.getall("Last-Event-ID", []) == said
                assert peer.request.headers.getall("X-Gateway-Part") == ["1"]
                assert peer.request.headers["Authorization"] == "Bearer t"


async def test_no_more_is_read_ahead_than_the_setting_says(tmp_path: Path) -> None:
    """And what one read of TLS may bring."""
    peer = Endless()
    async with asking(tmp_path, peer) as (standing, found):
        answer = await standing.answer(found, None)
        async with reading(found, answer) as content:
            async with asyncio.timeout(20):
                await peer.full.wait()
            assert AHEAD <= content.total_bytes <= AHEAD + (256 << 10)


async def test_an_answer_of_a_peer_that_is_away_is_cut(tmp_path: Path) -> None:
    peer = Endless()
    async with asking(tmp_path, peer) as (standing, found):
        async with reading(found, await standing.answer(found, None)) as content:
            found.end()
            with pytest.raises(BROKEN):
                while await content.readany():
                    pass
        assert not found.cut
