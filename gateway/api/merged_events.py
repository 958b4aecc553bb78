"""One stream of the events of all members, which a client resumes at any of them.

Each member numbers its own events, so the stream's ids are vectors, `m1:17,m2:4`: up to which event of each
member it has come. Each member's events come in their order, and each once, or after a `gap`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Final

import aiohttp
from multidict import CIMultiDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api.http import address
from gateway.api.services import Services
from gateway.cluster.peers import Peer
from gateway.cluster.relay import client_of, passed_on, url_at
from gateway.events import Subscription
from gateway.tasks import begin

_FIRST: Final = 1.0  # seconds for each member to say from where on it tells
_AGAIN: Final = 0.5  # seconds until a member that broke off is asked again
_LOOK: Final = 1.0  # seconds between two looks at who is a member
_EVENT_MAX: Final = 4 << 20  # bytes
_MEMBER: Final = re.compile(r"[^:,\s]+:[0-9]{1,18}")
_ID_MAX: Final = 8192  # characters of a vector


class MergedEvents(Response):
    """The answer. `subscription` is to our own events; to close it ends the answer."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, services: Services, subscription: Subscription, vector: Mapping[str, int]
    ) -> None:
        """`vector` is where to resume, empty for a new stream."""
        assert services.cluster is not None
        super().__init__()
        self.subscription = subscription
        self._request, self._services, self._cluster = request, services, services.cluster
        self._resumed = dict(vector)
        self._vector = {self._cluster.own: subscription.last_id, **vector}
        self._turn = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        leaving = begin(_gone(receive))
        leaving.add_done_callback(lambda _: self.subscription.close())
        await self._turn.acquire()  # nobody tells anything before the stream begins
        begun = [self._follow(peer) for peer in self._cluster.peers.all.values()]
        try:
            await asyncio.wait([begin(event.wait()) for event in begun], timeout=_FIRST) if begun else None
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            raw.append((b"last-event-id", self._id))
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            if not self._resumed:
                await self._write(b"id: " + self._id + b"\n\n")
            self._turn.release()
            self._tasks |= {":members": begin(self._look_at_members()), ":alive": begin(self._keep_alive())}
            await self._tell_own()
            await self._turn.acquire()
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.subscription.close()
            tasks = [leaving, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _id(self) -> bytes:
        return vector_text(self._vector).encode()

    async def _write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._services.settings.events_keepalive)
            async with self._turn:
                await self._write(b": keep-alive\n\n")

    # --- our own ------------------------------------------------------------------------------------

    async def _tell_own(self) -> None:
        while events := await self.subscription.batch():
            found = [
                (event.id, b"event: %s\ndata: %s" % (event.type.encode(), event.encoded)) for event in events
            ]
            await self._tell(self._cluster.own, found)

    async def _tell(self, member: str, events: list[tuple[int, bytes]]) -> None:
        """Send events of one member, each with the place of all members."""
        async with self._turn:
            parts = []
            for number, body in events:
                self._vector[member] = number
                parts.append(b"id: %s\n%s\n\n" % (self._id, body))
            await self._write(b"".join(parts))

    # --- the others' --------------------------------------------------------------------------------

    async def _look_at_members(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            for name, peer in list(self._cluster.peers.all.items()):
                if name not in self._tasks:
                    self._follow(peer)

    def _follow(self, peer: Peer) -> asyncio.Event:
        """Tell a peer's events from now on; return what is set once it is known from where on."""
        known = asyncio.Event()
        self._tasks[peer.name] = begin(self._tell_peers(peer, known))
        return known

    async def _tell_peers(self, peer: Peer, known: asyncio.Event) -> None:
        while self._cluster.peers.all.get(peer.name) is peer:
            if peer.alive and peer.tls is not None:
                try:
                    if not await self._tell_once(peer, known):
                        self.subscription.close()  # the token has ended
                        return
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                    pass  # it is resumed where it broke off
            else:
                known.set()
            await asyncio.sleep(_AGAIN)
        self._vector.pop(peer.name, None)
        del self._tasks[peer.name]

    async def _tell_once(self, peer: Peer, known: asyncio.Event) -> bool:
        """Tell a peer's events until that breaks off; return False if it refuses."""
        scope = self._request.scope
        headers = CIMultiDict(passed_on(scope, client_of(scope, address(self._request))))
        after = self._vector.get(peer.name, 0 if self._resumed else None)
        headers.popall("last-event-id", None)
        if after is not None:
            headers["last-event-id"] = str(after)
        assert peer.tls is not None
        async with self._cluster.peers.session.get(
            url_at(scope, peer), headers=headers, ssl=peer.tls
        ) as answer:
            if answer.status != 200:
                return answer.status not in (401, 403)
            if after is None:
                self._vector[peer.name] = int(answer.headers["last-event-id"])
            known.set()
            rest = b""
            async for data in answer.content.iter_any():
                *blocks, rest = (rest + data).split(b"\n\n")
                if len(rest) > _EVENT_MAX:
                    raise ValueError("this is no event of a gateway")
                if found := [block for block in map(_parsed, blocks) if block is not None]:
                    await self._tell(peer.name, found)
        return True


def vector_text(vector: Mapping[str, int]) -> str:
    return ",".join(f"{member}:{number}" for member, number in sorted(vector.items()))


def parse_vector(text: str | None) -> dict[str, int]:
    """Return where to resume; empty for a new stream.

    What is no vector, as an id of one member alone, is before all events of each.
    """
    if not text:
        return {}
    parts = text.split(",") if len(text) <= _ID_MAX else [""]
    if not all(_MEMBER.fullmatch(part) for part in parts):
        return {"": 0}
    return {member: int(number) for member, _, number in (part.partition(":") for part in parts)}


def _parsed(block: bytes) -> tuple[int, bytes] | None:
    """Return the id and the rest of an event as `sse` formats it; None for what is none."""
    head, _, body = block.partition(b"\n")
    name, _, number = head.partition(b": ")
    return (int(number), body) if name == b"id" and body else None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
