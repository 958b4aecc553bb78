"""What gateways report to one another about their tenants.

The gateways of the other members: their addresses, whether they are reachable, and their tenants.

```
membership ──► Peers ──► Peer: one standing request to each, `/peer/watch`, of which a line comes each second
                          ├ alive, until nothing has arrived for `AWAY` seconds
                          └ tenants, as its gateway reports them
```

Orders a peer to do something. The peer answers once it is done, or says why not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol, Self

import aiohttp
import orjson

from gateway.bounds import Flood, first
from gateway.cluster.identity import Identity, fingerprint, trust
from gateway.errors import GatewayError, Unavailable
from gateway.incus import IncusError
from gateway.incus.members import PREFIX, Member
from gateway.tasks import begin, run_forever

log = logging.getLogger(__name__)

MOST: Final = 10_000
"""Tenants of one member that are kept; more are not told."""
_TOGETHER: Final = 100  # tenants in one line
_TEXT: Final = 300  # characters of one member; a domain has at most 253


@dataclass(frozen=True, slots=True)
class Known:
    """One tenant as its home reports it. `instance` is the id that no later tenant of its name has."""

    name: str
    domain: str | None = None
    status: str = "stopped"
    asleep: bool = False
    instance: str | None = None
    created: str | None = None

    @classmethod
    def parse(cls, told: object) -> Known:
        """Return a tenant from a peer's line. Raises `ValueError` if it is malformed."""
        match told:
            case {"name": str(name), "status": str(status), "asleep": bool(asleep), **more}:
                domain, instance, created = (
                    _text(more.get(key)) for key in ("domain", "instance", "created")
                )
                return cls(str(_text(name)), domain, str(_text(status)), asleep, instance, created)
        raise ValueError("not a tenant")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _text(told: object) -> str | None:
    if told is None or (isinstance(told, str) and len(told) <= _TEXT):
        return told
    raise ValueError("not a property of a tenant")


def lines(before: Mapping[str, Known], now: Mapping[str, Known]) -> Iterator[dict[str, Any]]:
    """Yield the difference between two states, in lines of bounded size."""
    gone = [name for name in before if name not in now]
    told = [known for name, known in now.items() if before.get(name) != known]
    for start in range(0, max(len(gone), len(told)), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        yield {"tenants": [known.to_dict() for known in told[part]], "gone": gone[part]}


def apply(line: Mapping[str, Any], tenants: dict[str, Known]) -> bool:
    """Apply one of these lines; return whether it changed anything. Raises `ValueError`."""
    gone, told = line.get("gone", ()), line.get("tenants", ())
    if not isinstance(gone, list | tuple) or not isinstance(told, list | tuple):
        raise ValueError("not a line of tenants")
    for name in gone:
        tenants.pop(name, None)
    for known in map(Known.parse, told):
        if known.name in tenants or len(tenants) < MOST:
            tenants[known.name] = known
    return bool(gone or told)


def first_tenants(tenants: Iterable[Known]) -> dict[str, Known]:
    """Return the tenants by name, at most `MOST`."""
    return {known.name: known for known, _ in zip(tenants, range(MOST), strict=False)}


KEY: Final = f"{PREFIX}peer"
"""Under which a member publishes where its gateway is, and its certificate."""
AWAY: Final = 3.0
"""Seconds without a word after which a gateway counts as away."""
ASKING: Final = 1.0
"""Seconds that a peer has for an answer that others wait for."""

_CUT: Final = 3.0  # seconds more until what is under way is given up, as one that is only slow may finish it
_LATE: Final = 0.25  # seconds by which a timer is late where this process itself has no CPU
_CONNECT: Final = 1.0  # seconds
_PAUSES: Final = (0.1, 1.0)  # seconds, the first and the longest, until a peer is called again
_LOOK: Final = 10.0  # seconds after which the members are looked at again
_SOON: Final = 1.0  # seconds after which they are, where a peer or Incus does not answer
_LOOKING: Final = 5.0  # seconds that such a look may take: without a quorum it does not end
_LINE: Final = 256 << 10  # bytes
_ANSWER: Final = 1 << 20  # bytes
# seconds for which a removed member still counts as one that is away: until every gateway has looked, and
# those that have copies of its tenants answer for them
_REMOVED: Final = 15.0
GONE: Final = 410
"""Status by which a gateway tells another that it was removed from the cluster."""
_KEEP: Final = 60.0  # seconds that an unused connection to a peer is kept; it keeps ours longer

_FAILED: Final = (aiohttp.ClientError, OSError, TimeoutError, ValueError)


class Members(Protocol):
    """The source of the members and of what they publish: `Membership`, or a folder in tests."""

    async def members(self) -> Sequence[Member]: ...

    async def publish(self, config: Mapping[str, str]) -> None: ...


class RemovedFromCluster(Unavailable):
    """This server was removed from the cluster, so its tenants may run elsewhere by now."""

    def __init__(self) -> None:
        super().__init__(
            "this server was removed from the cluster and serves nothing any more; ask another member",
            reason="member_away",
        )


class MemberAway(Unavailable):
    """The tenant's home does not answer."""

    def __init__(self, member: str) -> None:
        super().__init__(
            f"the server {member} does not answer; its tenants will be back when it is",
            reason="member_away",
            location=member,
        )


class Peer:
    """The gateway of one other member. `tenants` are those that it last reported, also while it is away."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.certificate = self.fingerprint = ""
        self.incus = ""
        """HOST:PORT of its server's Incus, empty while that is not known."""
        self.tenants: dict[str, Known] = {}
        self.told = asyncio.Event()  # all its tenants, by the connection that is open now
        self.facts: Mapping[str, Any] = {}  # of its gateway
        self.tls: ssl.SSLContext | None = None
        self.drained = False  # it gets no new tenants
        self.cut: set[Callable[[], None]] = set()
        """Called once it has been away for a while: what depends on it ends then."""
        self.gone: Callable[[Peer], None] = lambda _: None
        """Called as soon as it is away."""
        self.last_heard: float | None = None
        """When it was last heard before it went away, in seconds since the epoch."""
        self.doubts: set[Callable[[], None]] = set()
        """Called as soon as it is away: what may as well be asked again."""
        self._heard: float | None = None
        self._timer: asyncio.TimerHandle | None = None  # of the end of its silence, or then of the cut

    @property
    def alive(self) -> bool:
        """Whether anything has arrived from it in the last `AWAY` seconds."""
        return self._heard is not None

    @property
    def version(self) -> int:
        """The version of its gateway's protocol, see `own.PROTOCOL`; 1 if it reports none."""
        version = self.facts.get("v")
        return version if isinstance(version, int) else 1

    @property
    def url(self) -> str:
        return f"https://{self.address}"

    @property
    def place(self) -> tuple[str, int]:
        """Return its host and port."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)

    def hear(self) -> None:
        """Start measuring its silence from now on."""
        loop = asyncio.get_running_loop()
        if self._heard is None and self._timer is not None:
            self._timer.cancel()  # that of the cut
            self._timer = None
        self._heard = loop.time()
        if self._timer is None:
            self._timer = loop.call_at(self._heard + AWAY, self._look, self._heard + AWAY)

    def _look(self, at: float) -> None:
        loop = asyncio.get_running_loop()
        assert self._heard is not None
        if loop.time() > at + _LATE:
            again = loop.time() + _LATE  # this process was busy: what came meanwhile is read first
        elif (again := self._heard + AWAY) <= loop.time():
            log.warning("no heartbeat from %s: it is away", self.name)
            self._lose()
            self.told.clear()
            self._timer = loop.call_later(_CUT, self.end)
            self.gone(self)
            for doubt in list(self.doubts):
                doubt()
            return
        self._timer = loop.call_at(again, self._look, again)

    def _lose(self) -> None:
        assert self._heard is not None
        self.last_heard = time.time() - (asyncio.get_running_loop().time() - self._heard)
        self._heard = None

    def end(self) -> None:
        """End all requests that depend on it."""
        if self._timer is not None:
            self._timer.cancel()
        if self.alive:
            self._lose()
            self.gone(self)
        self._timer = None
        self.told.clear()
        for end in list(self.cut):
            end()


class Peers:
    """All peers. Use as an async context manager: they are followed as long as it is open.

    `changed` is called with a peer whose tenants are others now.
    """

    def __init__(self, own: str, members: Members, identity: Identity) -> None:
        self.own = own
        self.out = asyncio.Event()
        """Set once a peer has told that our own member was removed: then it must serve nothing."""
        self.removed: dict[str, float] = {}
        """Members that were removed a moment ago, and when, by the loop's clock; they are still in `all`."""
        self.host: str | None = None
        """Where our own member is reached, once that is known."""
        self.drained = False
        """Whether our own member gets no new tenants."""
        self.all: dict[str, Peer] = {}
        self.accepting = identity.accepting()
        for certificate in identity.known.certificates():  # also of removed members, to tell them so
            with contextlib.suppress(ValueError):
                trust(self.accepting, certificate)
        self._known_members = identity.known
        self.changed: Callable[[Peer], None] = lambda _: None
        self.moved: Callable[[], None] = lambda: None
        """Called when a peer has come or gone."""
        self.silent: Callable[[], None] = lambda: None
        """Called when a peer has gone, or one that is not there is new."""
        self.watchers: set[Callable[[], object]] = set()
        """Called after each look at the members, who may be others."""
        self._members = members
        self._identity = identity
        self._following: dict[str, asyncio.Task[None]] = {}
        self._look = asyncio.Event()
        self._published: str | None = None
        self._known = asyncio.Event()  # the members were read
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP, use_dns_cache=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_LINE,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        self._looking = begin(run_forever("the list of the cluster's members", self._look_on))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._following.values(), *([self._looking] if self._looking else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()

    def publish(self, address: str) -> None:
        """Have our member publish where this gateway listens for peers, HOST:PORT."""
        said = {"address": address, "certificate": self._identity.certificate}
        self._published = orjson.dumps(said).decode()
        self._look.set()

    async def settle(self, seconds: float) -> None:
        """Return once each peer has reported its tenants, or after `seconds`.

        It does not wait for a peer that has never published its address, as when gateways first start.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._known.wait()
                for peer in list(self.all.values()):
                    if peer.address:
                        await peer.told.wait()

    async def known(self) -> None:
        """Return once the members have been read, which is impossible without a quorum."""
        await self._known.wait()

    def of(self, certificate: bytes) -> Peer | None:
        """Return the peer that has this certificate, as DER; None if none has."""
        shown = fingerprint(certificate)
        present = (peer for name, peer in self.all.items() if name not in self.removed)
        return next((peer for peer in present if peer.fingerprint == shown), None)

    def was_known(self, certificate: bytes) -> bool:
        """Return whether this certificate, as DER, was ever a member's."""
        return self._known_members.name(fingerprint(certificate)) is not None

    async def was_removed(self, certificate: bytes) -> bool:
        """Ask the cluster whether the member with this certificate is none any more; False if it cannot say.

        One that has joined again may not have published its certificate yet.
        """
        name = self._known_members.name(shown := fingerprint(certificate))
        if name is None:
            return False
        try:
            async with asyncio.timeout(_LOOKING):
                members = await self._members.members()
        except (IncusError, GatewayError, TimeoutError, OSError):
            return False
        present = next((member for member in members if member.name == name), None)
        if present is None:
            return True
        try:
            return fingerprint(_published(present.config.get(KEY, ""))[1]) != shown
        except ValueError:
            return False

    def heard(self, member: str) -> float | None:
        """Return when a member that is away or removed was last heard; None if it is not, or if unknown."""
        peer = self.all.get(member)
        if peer is None or peer.last_heard is None:
            return self._known_members.heard(member) if peer is None or not peer.alive else None
        return None if peer.alive else peer.last_heard

    @property
    def present(self) -> Collection[str]:
        """The names of the other members."""
        return self.all.keys() - self.removed.keys()

    def look(self) -> None:
        """Look at the members soon."""
        self._look.set()

    # --- who there is -------------------------------------------------------------------------------

    async def _look_on(self) -> None:
        read = True
        while True:
            self._look.clear()
            try:
                async with asyncio.timeout(_LOOKING):
                    if (published := self._published) is not None:
                        await self._members.publish({KEY: published})
                        if self._published == published:  # nothing else is to be published by now
                            self._published = None
                    self._take(await self._members.members())
            except (IncusError, GatewayError, TimeoutError, OSError) as error:
                if read:
                    log.warning("cannot list the members of the cluster now: %s", str(error) or "no answer")
                read = False  # what is known of them stays
            else:
                read = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK if read else 0.0):
                    await self._look.wait()
            await asyncio.sleep(_SOON)

    def _take(self, members: Sequence[Member]) -> None:
        """Follow the present members at their present addresses."""
        found = {member.name: member for member in members if member.name != self.own}
        self.host = next((member.host for member in members if member.name == self.own), None)
        self.drained = any(member.drained for member in members if member.name == self.own)
        now = asyncio.get_running_loop().time()
        for name in self.all.keys() - found.keys():
            peer = self.all[name]
            if name not in self.removed:
                log.info("%s is no longer a member", name)
                self.removed[name] = now
                if name in self._following:
                    self._following.pop(name).cancel()
                peer.end()
            elif now - self.removed[name] >= _REMOVED:
                del self.all[name], self.removed[name]
                peer.tenants = {}
                self.changed(peer)
        for name in self.removed.keys() & found.keys():  # it joined again
            del self.removed[name]
        for name, member in found.items():
            peer = self.all.get(name) or self.all.setdefault(name, Peer(name))
            peer.gone, peer.drained = self._lost, member.drained
            if peer.incus != member.address:
                peer.incus = member.address
                if not peer.alive:
                    self.silent()
            try:
                address, certificate = _published(member.config.get(KEY, ""))
                shown = fingerprint(certificate)
                if (address, shown) != (peer.address, peer.fingerprint):
                    trust(self.accepting, certificate)
                    peer.tls = self._identity.calling(certificate)
                    peer.address, peer.certificate, peer.fingerprint = address, certificate, shown
                    self._note(peer)
            except ValueError:
                continue  # its gateway has not come up yet
        for name in self.all.keys() - self._following.keys() - self.removed.keys():
            self._following[name] = begin(self._follow(self.all[name]))
        for changed in list(self.watchers):
            changed()
        self._known.set()

    def _lost(self, peer: Peer) -> None:
        self._note(peer)
        self.moved()
        self.silent()

    def _note(self, peer: Peer) -> None:
        if not peer.certificate:
            return
        try:
            self._known_members.note(peer.name, peer.certificate, peer.last_heard)
        except OSError as error:
            log.error("cannot record that %s is a member: %s", peer.name, error)

    # --- what they tell -----------------------------------------------------------------------------

    async def _follow(self, peer: Peer) -> None:
        pause, longest = _PAUSES
        while True:
            try:
                if peer.address:
                    await self._listen(peer)
            except _FAILED as error:
                log.debug("lost contact to %s: %r", peer.name, error)
            if peer.told.is_set():
                pause = _PAUSES[0]
                log.info("lost the connection to %s", peer.name)
            peer.told.clear()
            self._look.set()
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    async def _listen(self, peer: Peer) -> None:
        """Process a peer's reports until the connection ends. Raises one of `_FAILED`."""
        assert peer.tls is not None
        patience = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=AWAY)
        tenants: dict[str, Known] = {}
        async with self.session.get(f"{peer.url}/peer/watch", ssl=peer.tls, timeout=patience) as answer:
            if answer.status == GONE and not self.out.is_set():
                log.error("%s says that this server was removed: it serves nothing any more", peer.name)
                self.out.set()
            if answer.status != 200:
                raise ValueError(f"{peer.name} answered {answer.status}")
            async for text in answer.content:
                line = orjson.loads(text)
                if not isinstance(line, dict):
                    raise ValueError("not a line of a peer")
                peer.hear()
                if "v" in line:
                    peer.facts = line
                changed = apply(line, tenants)
                if line.get("whole"):
                    peer.told.set()
                    self.moved()
                    changed = True
                if changed and peer.told.is_set():
                    peer.tenants = dict(tenants)
                    self.changed(peer)

    # --- what they are asked ------------------------------------------------------------------------

    async def ask(self, peer: Peer, path: str, body: Any = None, patience: float = ASKING) -> Any:
        """Return a peer's answer as JSON, None if it does not have what was asked for.

        With a body it is a POST. Raises `MemberAway` where no answer comes in time.
        """
        if not peer.alive or peer.tls is None:
            raise MemberAway(peer.name)
        method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
        try:
            async with asyncio.timeout(patience):
                async with self.session.request(method, peer.url + path, ssl=peer.tls, data=data) as answer:
                    peer.hear()
                    if answer.status == 404:
                        return None
                    if answer.status != 200:
                        raise ValueError(f"{peer.name} answered {answer.status}")
                    text = await answer.content.read(_ANSWER)
                    while len(text) < _ANSWER and (more := await answer.content.read(_ANSWER - len(text))):
                        text += more
                    return orjson.loads(text)
        except _FAILED as error:
            log.info("%s did not answer %s: %r", peer.name, path.partition("?")[0], error)
            raise MemberAway(peer.name) from error

    async def ask_all(
        self, path: str, body: Any = None, patience: float = ASKING
    ) -> tuple[dict[str, Any], list[str]]:
        """Ask all peers at once; return the answers, and the names of those that gave none."""
        found: dict[str, Any] = {}
        silent: list[str] = []

        async def one(peer: Peer) -> None:
            try:
                found[peer.name] = await self.ask(peer, path, body, patience)
            except MemberAway:
                silent.append(peer.name)

        await asyncio.gather(*(one(peer) for peer in self.all.values() if peer.name not in self.removed))
        return found, sorted(silent)


def _published(text: str) -> tuple[str, str]:
    """Return the address and the certificate that a member publishes. Raises `ValueError`."""
    match orjson.loads(text):
        case {"address": str(address), "certificate": str(certificate)}:
            host, _, port = address.rpartition(":")
            if host and port.isdecimal():
                return address, certificate
    raise ValueError("not the address of a gateway")


_ORDER_ANSWER: Final = 1 << 20  # bytes
_ORDER_CONNECTING: Final = 10.0  # seconds
_ORDER_PAUSE: Final = 0.1


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
            text = await first(answer.content.readany, _ORDER_ANSWER, most=_ORDER_ANSWER)
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
    until = loop.time() + _ORDER_CONNECTING
    while True:
        try:
            return await peers.session.post(peer.url + path, ssl=peer.tls, data=body)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            if loop.time() > until or not peer.alive:  # nothing was sent
                raise
        await asyncio.sleep(_ORDER_PAUSE)


def _expire(limit: asyncio.Timeout) -> None:
    with contextlib.suppress(RuntimeError):  # it is just over
        limit.reschedule(asyncio.get_running_loop().time())


def _facts(told: object) -> dict[str, Any]:
    return {str(key): value for key, value in told.items()} if isinstance(told, dict) else {}
