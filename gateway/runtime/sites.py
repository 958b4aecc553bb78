"""The seam between deployments and where sites run: what turns a tenant into a site that answers.

A tenant has one site. Beside the one that is `live`, a redeploy builds the `next` one in a separate folder
and starts it on a separate port, so that the live one serves until the next one has been seen to work.
Every call that undoes is idempotent: after a crash it is not known how far its counterpart came.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Protocol

from gateway.bounds import Lines
from gateway.errors import ExecFailed, GatewayError
from gateway.runtime import Process
from gateway.runtime.listening import Listener

_TAIL: Final = 4000  # bytes of a command's output that an error tells
_LINE: Final = 2000  # bytes of one line that is passed on
_QUOTA: Final = ("quota exceeded", "edquot")
_FULL: Final = ("no space left", "enospc", *_QUOTA)

# neither `\$PORT`, which a shell is to leave alone, nor `$$PORT` and `$PORTS`, which are something else
_PORT: Final = re.compile(r"(?<![\\$])\$(?:PORT(?![A-Za-z0-9_])|\{PORT\})")

Side = Literal["live", "next"]
Exchange = Literal["update", "rollback", "environment"]
"""What takes the live site's place: the next one's files; those of a kept one, beside what belongs to no
deployment; or, the files being what they are, its environment alone."""

ServiceState = Literal["running", "starting", "ended"]
Source = Literal["pool", "golden", "image", "folder"]
Say = Callable[[str], None]
"""Takes one line that a command printed."""

Prepared = Callable[[GatewayError | None], None]
"""Takes how preparing ended: the error, or None where all that is to be ready is."""

Quiet = Callable[[], Awaitable[None]]
"""Returns once there is time for what is only made to be ready."""


async def at_once() -> None:
    """Be a `Quiet` that waits for nothing."""


FORMER_ID: Final = re.compile(r"d-[0-9a-f]{16}")
ALLOWED: Final = "__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS"
"""The variable by which a site is told its domain, which Vite and what is built on it then answers to."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a site is made of. `archive` is a tar of the workspace that holds nothing but plain entries.

    `key` names what may be prepared ahead and shared between tenants; empty if nothing may. `warm` are paths
    that are requested while it is prepared, so that a dev server has done its first work. `owner` names the
    owner of an upload, and is part of the key then: nothing of an upload is shared with others. If it is
    `alone`, its two sides never run at the same time, and both have the one port. `keep` are the
    patterns of what the site writes itself, `template` is what it was made by.
    """

    archive: bytes
    start: tuple[str, ...]
    port: int
    health: str = "/"
    install: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    key: str = ""
    owner: str = ""
    alone: bool = False
    keep: tuple[str, ...] = ()
    template: str = ""

    def listens(self, side: Side) -> int:
        """Return the port of a side: it is told to the site as PORT."""
        if side == "live" or self.alone:
            return self.port
        return self.port + 10_000 if self.port < 50_000 else self.port - 10_000

    def command(self, port: int) -> tuple[str, ...]:
        """Return `start` with `port` for each `$PORT` and `${PORT}`: no shell is there to do it."""
        return tuple(_PORT.sub(str(port), word) for word in self.start)


@dataclass(frozen=True, slots=True)
class Order:
    """What a deployment asks of a new tenant. `deployment` marks it until the site works."""

    deployment: str
    domain: str
    recipe: Recipe
    size: str = "small"


@dataclass(frozen=True, slots=True)
class Exposure:
    """Where a site answers: for the gateway's own probes, and `target` as a route of Caddy."""

    address: str
    port: int
    target: str


@dataclass(frozen=True, slots=True)
class Service:
    """The state of one side's service. One that waits to be restarted has `ended`.

    `restarts` counts its automatic restarts since it was started, and `started` is the time of the last one,
    by `time.monotonic()`. `oom_kills` counts its processes that the kernel has killed since then for lack of
    memory. `cpu` is in seconds.
    """

    state: ServiceState
    restarts: int = 0
    started: float = 0.0
    oom_kills: int = 0
    cpu: float = 0.0
    listens: frozenset[Listener] = frozenset()


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a service as its host sees it: its `first` process is another after each start.

    `started` is when that began, by `time.monotonic()`. `oom_kills` counts its processes that the kernel has
    killed since then for lack of memory.
    """

    first: str
    started: float = field(compare=False)
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """A tenant with a domain. `deployment` is set while it is not known to work; then it has no route yet.

    Visitors of a site that is `asleep` reach the gateway first. `instance` and `created` are as a `Tenant`'s.
    If another instance has the same address (`shares_address`), the younger one has no exposure: it would
    show the elder's site. The address of a `loose` site is lost once it is stopped: `Sites.anchor` it before.
    Its answers to visitors leave through `link`, an interface of this host, if that is known.
    """

    tenant: str
    domain: str
    running: bool
    exposure: Exposure | None
    deployment: str | None = None
    health: str = "/"
    asleep: bool = False
    instance: str | None = None
    created: str | None = None
    shares_address: bool = False
    loose: bool = False
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Former:
    """A site that was live: the deployment that made it, and when it was `replaced`, since the epoch."""

    id: str
    replaced: float


class FormerSites(Protocol):
    """The sites that each tenant keeps of those that were live. Nothing here starts a tenant."""

    async def listed(self, tenant: str) -> Sequence[Former]:
        """Return what is kept, newest first."""
        ...

    async def live(self, tenant: str) -> tuple[str | None, Recipe | None]:
        """Return the deployment of the live site, where that is noted, and how it is started, where known."""
        ...

    async def recipe(self, tenant: str, former: str) -> Recipe:
        """Return how a kept site is started. Raises `NotFound` with the reason `not_kept`."""
        ...

    async def environment(self, tenant: str) -> Mapping[str, str]:
        """Return the live site's environment. Raises `Conflict` for one that cannot be understood."""
        ...

    async def take(self, tenant: str, former: str) -> None:
        """Make a kept site the next side; `Sites.clear` puts it back unless it became the live one."""
        ...

    async def put(self, tenant: str, former: str, live: str, most: int) -> None:
        """Keep what `settle` put out of the live site's place as `former`, and note what is `live` now.

        Of over `most` the oldest are removed. Idempotent.
        """
        ...


class PreparedCopies(Protocol):
    """Copies of sites that work, kept ready for new tenants; see `Sites.copies`."""

    def prepare(
        self, recipe: Recipe, prepared: Prepared, size: str = "small", quiet: Quiet = at_once
    ) -> None:
        """Get ready for more tenants of a recipe that works at that size, in the background.

        For an upload `prepared` is always called with the outcome, unless these sites are closed before.
        """
        ...

    async def tidy(self) -> None:
        """Remove copies of uploads that are not needed any more."""
        ...

    async def spare(self, wanted: int) -> int:
        """Remove copies of uploads until so many bytes of the pool are free; return how many were."""
        ...

    async def adopt(self, recipes: Sequence[Recipe]) -> None:
        """Keep what an earlier process prepared for these recipes; destroy the rest of what it left."""
        ...


class Sites(Protocol):
    """The sites of one runtime: all that deployments use of it. Use as an async context manager."""

    former: FormerSites
    copies: PreparedCopies

    async def __aenter__(self) -> Sites: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def create(self, tenant: str, order: Order) -> Source:
        """Make and start a tenant, from what is ready; say from what. Raises `Conflict`, `Unavailable`.

        From `pool` or `golden` it comes with the recipe's files, installed and started.
        """
        ...

    async def remove(self, deployment: str) -> None:
        """Destroy whatever carries the mark of a deployment; return once nothing does."""
        ...

    async def anchor(self, tenant: str) -> None:
        """Give a tenant an address that it keeps, so that it is known where its site is while it sleeps."""
        ...

    async def push(
        self, tenant: str, side: Side, recipe: Recipe, env: Mapping[str, str] | None, lost: bytes = b""
    ) -> None:
        """Copy the recipe's files over the workspace, `next` over a copy of it; keep its environment.

        The copy leaves out the `lost` paths below the workspace, each with a NUL.
        """
        ...

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        """Run the recipe's install command; it is ended as a whole tree where this is cancelled."""
        ...

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        """Start, or start again, the site's service."""
        ...

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        """Make a side reachable, and say where."""
        ...

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"", how: Exchange = "update") -> None:
        """Make the next site's files the live ones and start them; the next service runs on. Idempotent.

        Takes along what the live site wrote meanwhile below the `kept` paths, each with a NUL.
        """
        ...

    async def unsettle(self, tenant: str) -> None:
        """Undo `settle`."""
        ...

    async def clear(self, tenant: str) -> None:
        """Remove everything of the next side, and what `settle` kept; put back what was taken. Idempotent."""
        ...

    async def finish(self, tenant: str, order: Order) -> None:
        """Record that the site works: domain, port, and no deployment any more."""
        ...

    async def service(self, tenant: str, side: Side) -> Service | None:
        """Return how a side's service does; None if that cannot be had."""
        ...

    async def life(self, tenant: str, side: Side) -> Life | None:
        """Return which life of a side's service this is, at little cost; None where only `service` tells."""
        ...

    async def log(self, tenant: str, side: Side) -> str:
        """Return the last lines of a side's service; empty if they cannot be had."""
        ...

    async def listed(self) -> Sequence[Site]:
        """Return every tenant with a domain, also those that are just being made."""
        ...

    async def allow(self, tenant: str, domain: str) -> None:
        """Tell a running tenant's services the domain that they are asked by, from their next start on.

        A tenant that is created or started with a domain gets it by itself.
        """
        ...

    async def restart(self, tenant: str) -> None:
        """Start the live site's service again."""
        ...


def disk_was_full(said: str) -> bool:
    """Say whether a command that failed had no room on its disk, by what it said last."""
    return any(words in said.lower() for words in _FULL)


def quota_was_reached(said: str) -> bool:
    """Say whether that was the end of its own share, by the kernel's words for it."""
    return any(words in said.lower() for words in _QUOTA)


async def lines(process: Process, say: Say | None, most: int, limit: int) -> str:
    """Pass the first `most` lines of a merged command's output on; return the end of it all.

    Raises `ExecFailed` if it prints over `limit` bytes.
    """
    heard, size = Lines(0 if say is None else most, length=_LINE, tail=_TAIL), 0
    tell = say or (lambda line: None)
    while piece := await process.read("stdout"):
        size += len(piece)
        if size > limit:
            raise ExecFailed(f"the command printed over {limit} bytes and was ended", reason="printed")
        for line in heard.feed(piece):
            tell(line)
    for line in heard.end():
        tell(line)
    return heard.tail
