"""A client's request, repeated at a peer and answered there for as long as the client listens.

Merges the events of all members into one stream: this gateway's own and those of its peers.

```
journal ──► subscription ──┐
peer ─────► its answer ────┼──► one part at a time ──► the client
peer ─────► its answer ────┘
```

The client sets the pace for all: each source waits until the client has taken its last part.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from functools import partial
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

import aiohttp
from multidict import CIMultiDict
from starlette.types import Scope
from yarl import URL

from gateway.cluster.peers import ASKING, AWAY, Peer, Peers
from gateway.cluster.relay import PART, passed_on
from gateway.errors import Unavailable
from gateway.events import Bus, Draft, Filter, positions, sse
from gateway.events.event import gap, numbered, source
from gateway.tasks import begin

log = logging.getLogger(__name__)

BROKEN: Final = (aiohttp.ClientError, OSError)
"""What is raised where such an answer ends before its time."""

_PAUSES: Final = (0.05, 2.0)  # seconds, the first and the longest, until a peer is asked again
AHEAD: Final = 64 << 10  # bytes of each other member's events that are read ahead for one stream
_ANSWERING: Final = 5.0  # seconds that a peer may take to begin
_RESUME: Final = "last-event-id"


class PeerStream:
    """One request, as sent to each peer with the client's own token, which the peer verifies again.

    Of each answer about `AHEAD` bytes are read before they are asked for.
    """

    def __init__(self, scope: Scope, client: str, peers: Peers) -> None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        self._query = urlencode([(name, value) for name, value in query if name != "lastEventId"])
        self._path = scope["raw_path"].decode("latin-1")
        self._headers = [(name, value) for name, value in passed_on(scope, client) if name != _RESUME]
        self._peers = peers

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
            read_bufsize=AHEAD // 2,  # aiohttp stops reading at twice as much
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


_PAUSE: Final = 0.1  # seconds until a peer is asked again whose answer has ended
_LARGEST: Final = 16 << 20  # bytes of one event; no client takes more

_Sent = Sequence[tuple[int | None, bytes]]
"""Events with their ids, None for one that leaves its member's position where it is."""


class MergedEvents:
    """The events of all members: each event once, and those of one member in order. It ends with the bus.

    `at` is where this stream stands: the position in each member's journal up to which the client has been
    given everything. `last_event_id` is the client's. A member that is away is told by `away`, once, and by
    `back`; its events then go on from its position. Where there is none, a `gap` is told first.
    """

    def __init__(
        self,
        bus: Bus,
        filter: Filter,
        member: str,
        peers: Peers,
        standing: PeerStream,
        last_event_id: str | None,
        *,
        only: Collection[str] | None = None,
        begin: int | None = None,
    ) -> None:
        """`only` are the members whose events these are, by default all. `begin` is the position here of a
        client whose id has none, and who misses nothing before it.
        """
        self.resumed = bool(last_event_id)
        self.at = _positions(last_event_id, [member, *peers.all])
        self._only = only
        if begin is not None:
            self.at.setdefault(member, begin)
        self._member, self._peers, self._standing = member, peers, standing
        self._given: asyncio.Queue[tuple[str, _Sent] | None] = asyncio.Queue(1)
        self._following: dict[Peer, asyncio.Task[None]] = {}
        self._passing: asyncio.Task[None] | None = None
        self._missed = self.resumed  # whether a member without a position has events that the client misses
        self._own = bus.subscribe(filter, self.at.get(member))
        self._own_missed = self._missed and member not in self.at
        self.at.setdefault(member, self._own.last_id)

    async def begin(self) -> None:
        """Follow all members, and return once each has answered; after a second in any case."""
        self._peers.watchers.add(self._follow_all)
        self._passing = begin(self._pass_own())
        answered = self._follow_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASKING):
                for one in answered:
                    await one.wait()
        self._missed = True

    def close(self) -> None:
        """End the stream once the client has taken what is under way. Idempotent."""
        self._own.close()
        self._leave()

    def end(self) -> None:
        """End everything at once. Idempotent."""
        self.close()
        if self._passing is not None:
            self._passing.cancel()

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the events as they are sent, several at once."""
        while (given := await self._given.get()) is not None:
            member, events = given
            part = bytearray()
            for id_, body in events:
                if id_ is not None:
                    self.at[member] = id_
                part += f"id: {positions.text(self.at)}\n".encode()
                part += body
            yield bytes(part)

    async def _give(self, member: str, events: _Sent) -> None:
        await self._given.put((member, events))

    async def _give_gap(self, member: str, at: int) -> None:
        told = gap(at + 1, source(member), time.time())
        await self._give(member, [(at, sse.body(told))])

    # --- this member --------------------------------------------------------------------------------

    async def _pass_own(self) -> None:
        try:
            if self._own_missed:
                await self._give_gap(self._member, self.at[self._member])
            while events := await self._own.batch():
                await self._give(self._member, [(event.id, sse.body(event)) for event in events])
        except Unavailable as error:
            log.warning("an event stream ended: %s", error.message)
        self._leave()
        await self._given.put(None)

    # --- the others ---------------------------------------------------------------------------------

    def _follow_all(self) -> list[asyncio.Event]:
        """Follow the present peers; return the events that are set once each new one answers."""
        there = {one for one in self._peers.all.values() if self._only is None or one.name in self._only}
        for peer in self._following.keys() - there:
            self._following.pop(peer).cancel()
            self.at.pop(peer.name, None)
        answered = []
        for peer in there - self._following.keys():
            answered.append(begun := asyncio.Event())
            self._following[peer] = begin(self._follow(peer, begun))
        return answered

    def _leave(self) -> None:
        self._peers.watchers.discard(self._follow_all)
        for task in self._following.values():
            task.cancel()

    async def _follow(self, peer: Peer, answered: asyncio.Event) -> None:
        after, patience, away = self.at.get(peer.name), ASKING, False
        while True:
            try:
                async with asyncio.timeout(patience):
                    answer = await self._standing.answer(peer, after)
            except TimeoutError:
                away = True
                await self._tell("away", peer)
                answer = await self._standing.answer(peer, after)
            try:
                async with reading(peer, answer) as content:
                    answered.set()
                    if away:
                        away = False
                        await self._tell("back", peer)
                    if after is None:
                        after = await self._begin_at(peer, answer)
                    async for events in _events(content):
                        after = events[-1][0]
                        await self._give(peer.name, events)
            except (*BROKEN, ValueError) as error:
                log.info("the event stream of %s broke: %r", peer.name, error)
            patience = AWAY if peer.alive else 0.0  # that is over where its silence broke it off
            await asyncio.sleep(_PAUSE)

    async def _begin_at(self, peer: Peer, answer: aiohttp.ClientResponse) -> int:
        """Follow a member from now on; return the position."""
        at = int(answer.headers.get("Last-Event-ID", "").rpartition(":")[2])
        if self._missed:
            await self._give_gap(peer.name, at)
        else:
            self.at[peer.name] = at
        return at

    async def _tell(self, type: str, peer: Peer) -> None:
        """Report something about a member that is in no journal and moves no position."""
        now = time.time()
        origin = f"{source(self._member)}/members/{quote(peer.name, safe='')}"
        told = numbered(Draft(type, origin, now, data={"member": peer.name}), int(now * 1000))
        await self._give(peer.name, [(None, sse.body(told))])


def _positions(last_event_id: str | None, members: Iterable[str]) -> dict[str, int]:
    """Return the positions of these members in a client's id. An id of a single journal, or one that is not
    ours, has none: all events that are kept are then new to the client.
    """
    if not last_event_id:
        return {}
    known = positions.vector(last_event_id)
    if known is None:
        return dict.fromkeys(members, 0)
    return {name: known[name] for name in members if name in known}


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[_Sent]:
    """Yield the events of a peer's answer as they arrive. Raises `ValueError` for anything else."""
    rest = bytearray()
    while chunk := await content.readany():
        seen = max(0, len(rest) - 1)
        rest += chunk
        if (end := rest.rfind(b"\n\n", seen)) < 0:
            if len(rest) > _LARGEST:
                raise ValueError("an event is too large")
            continue
        whole = bytes(rest[:end])
        del rest[: end + 2]
        if events := [event for block in whole.split(b"\n\n") if (event := sse.parsed(block))]:
            yield events
