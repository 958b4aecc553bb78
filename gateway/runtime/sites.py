"""The interface between deployments and the place where sites run.

A tenant has one site. A redeployment builds the `next` version beside the `live` one, in a separate folder,
and tries it on a separate port, while the live version serves. `settle` then stops both and starts the next
one in the live one's place. Every call that undoes something is idempotent, because after a crash it is
unknown how far its counterpart got.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Protocol

from gateway.bounds import LineSplitter
from gateway.errors import ExecFailed, GatewayError
from gateway.runtime import Process
from gateway.runtime.listening import ListeningSocket

Cause = Literal["lockfile", "memory", "killed", "program", "registry"]

_MISSING: Final = 127  # a shell's code for a missing program
_KILLED: Final = 128 + 9
# each package manager's words for a lockfile that does not match the manifest
_STALE: Final = (
    ("lockfile had changes, but lockfile is frozen", "bun"),
    ("npm error code EUSAGE", "npm"),
    ('Run "npm help ci"', "npm"),  # npm lists all its options first, more than is kept of the output
    ("ERR_PNPM_OUTDATED_LOCKFILE", "pnpm"),
    ("ERR_PNPM_LOCKFILE_CONFIG_MISMATCH", "pnpm"),
    ("Your lockfile needs to be updated", "yarn"),
    ("YN0028", "yarn"),
    ("needs to be updated, but `--locked`", "uv"),
    ("changed significantly since poetry.lock was last generated", "poetry"),
)
_SHORT: Final = re.compile(r"heap out of memory|ERR_WORKER_OUT_OF_MEMORY|Cannot allocate memory")
_SIGKILL: Final = re.compile(r"\bSIGKILL\b|^Killed\b", re.MULTILINE)
# each package manager's last words for a registry that does not answer, not those of a retry
_NPM: Final = re.compile(
    r"npm error code E(?:NOTFOUND|AI_AGAIN|CONN\w+|TIMEDOUT|\w+UNREACH|50\d|RR_SOCKET_TIMEOUT)"
    r"|error: (?:Connection\w+|FailedToOpenSocket|DNS\w+|Timeout) downloading"  # Bun
    r"|ERR_PNPM_META_FETCH_FAIL"
    r'|An unexpected error occurred: "https?://[^"\n]*(?:getaddrinfo|ECONN|ETIMEDOUT)'  # Yarn
)
_PYPI: Final = re.compile(r"error sending request for url|All attempts to connect to")  # uv, Poetry
_PIP: Final = ("NewConnectionError", "No matching distribution found")
_NOT_FOUND: Final = re.compile(r"(?:\d+: |line \d+: )([\w./@+-]{1,60}): (?:command )?not found\b")


@dataclass(frozen=True, slots=True)
class Failure:
    """The cause of a failure; `of` is the package manager, program or registry. Only the last may come back.

    Whether it was `killed` for lack of memory the kernel tells; see `Pressure.has_killed`.
    """

    cause: Cause
    of: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """The facts for an error."""
        return {"cause": self.cause} | ({"of": self.of} if self.of else {})


def failure(code: int | None, said: str) -> Failure | None:
    """Return the cause of a failure from exit code and end of output, None if unknown."""
    for stale, manager in _STALE:
        if stale in said:
            return Failure("lockfile", manager)
    if _SHORT.search(said):
        return Failure("memory")
    if code == _KILLED or _SIGKILL.search(said):
        return Failure("killed")
    if code == _MISSING and (found := _NOT_FOUND.search(said)) is not None:
        return Failure("program", found[1])
    if _NPM.search(said) is not None:
        return Failure("registry", "the npm registry")
    if _PYPI.search(said) is not None or all(words in said for words in _PIP):
        return Failure("registry", "PyPI")
    return None


_TAIL: Final = 4000  # bytes of a command's output in an error
_LINE: Final = 2000  # bytes of one line passed on
_QUOTA: Final = ("quota exceeded", "edquot")
_FULL: Final = ("no space left", "enospc", *_QUOTA)

# but not `\$PORT`, which is escaped, nor `$$PORT` and `$PORTS`, which mean something else
_PORT: Final = re.compile(r"(?<![\\$])\$(?:PORT(?![A-Za-z0-9_])|\{PORT\})")

Side = Literal["live", "next"]
Exchange = Literal["update", "rollback", "environment"]
"""What replaces the live site: the next one's files; a kept site's files, except those outside of any
deployment; or only the environment."""

ServiceState = Literal["running", "starting", "ended"]
Source = Literal["pool", "golden", "image", "folder"]
Say = Callable[[str], None]
"""Receives one line that a command printed."""

Prepared = Callable[[GatewayError | None], None]
"""Receives the outcome of preparing: the error, or None if everything is ready."""

Quiet = Callable[[], Awaitable[None]]
"""Returns once the host is quiet enough for work done in advance."""


async def at_once() -> None:
    """A `Quiet` that does not wait."""


FORMER_ID: Final = re.compile(r"d-[0-9a-f]{16}")
ALLOWED: Final = "__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS"
"""The variable that tells a site its domain; Vite and tools built on it then accept that host."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a site is built and started. `archive` is a tar of the workspace with plain entries only.

    `key` identifies what may be prepared in advance and shared between tenants; empty if nothing may. `warm`
    are paths to request during preparation, so that a dev server has done its initial work. `owner` is the
    owner of an upload and then part of the key, so that an upload is never shared with others. If `alone`,
    both sides use one port and never run at the same time. `keep` are patterns of files the site writes
    itself, and `template` names the template.
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
        """Return the port of a side, which the site gets as PORT."""
        if side == "live" or self.alone:
            return self.port
        return self.port + 10_000 if self.port < 50_000 else self.port - 10_000

    def command(self, port: int) -> tuple[str, ...]:
        """Return `start` with `$PORT` and `${PORT}` replaced, since no shell does it."""
        return tuple(_PORT.sub(str(port), word) for word in self.start)


@dataclass(frozen=True, slots=True)
class Order:
    """A deployment's order for a new tenant. The tenant is marked with `deployment` until its site works."""

    deployment: str
    domain: str
    recipe: Recipe
    size: str = "small"


@dataclass(frozen=True, slots=True)
class Exposure:
    """Where a site answers."""

    address: str
    port: int

    @property
    def target(self) -> str:
        """The target of its route in Caddy."""
        return f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Service:
    """The state of one side's service. A service waiting for a restart has `ended`.

    `restarts` counts automatic restarts since the service was started, and `started` is the time of the last
    one by `time.monotonic()`. `oom_kills` counts processes the kernel has killed since then for lack of
    memory.
    """

    state: ServiceState
    restarts: int = 0
    started: float = 0.0
    oom_kills: int = 0
    listens: frozenset[ListeningSocket] = frozenset()


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a service as seen from the host: each start has a different `first` process.

    `started` is that process's start by `time.monotonic()`. `oom_kills` counts processes the kernel has
    killed since then for lack of memory. `worked` is the seconds for which it computed or waited for a CPU.
    """

    first: str
    started: float = field(compare=False)
    oom_kills: int = 0
    worked: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class TenantSite:
    """A tenant with a domain. While `deployment` is set, the site is not known to work and has no route.

    Visitors of a site that is `asleep` reach the gateway first. `instance` and `created` are those of the
    `Tenant`. If another instance has the same address (`shares_address`), the newer one has no exposure,
    because it would show the older one's site. A `loose` site loses its address when stopped, unless
    `Sites.anchor` is called before. `link` is the host's interface through which answers to visitors pass, if
    known.
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
    """A formerly live site: the id of its deployment, and when it was `replaced`, in epoch seconds."""

    id: str
    replaced: float


class FormerSites(Protocol):
    """The formerly live sites that each tenant keeps. No method starts a tenant."""

    async def listed(self, tenant: str) -> Sequence[Former]:
        """Return the kept sites, newest first."""
        ...

    async def live(self, tenant: str) -> tuple[str | None, Recipe | None]:
        """Return the live site's deployment and recipe, as far as they are recorded."""
        ...

    async def recipe(self, tenant: str, former: str) -> Recipe:
        """Return a kept site's recipe. Raises `NotFound` with the reason `not_kept`."""
        ...

    async def environment(self, tenant: str) -> Mapping[str, str]:
        """Return the live site's environment. Raises `Conflict` if it cannot be parsed."""
        ...

    async def take(self, tenant: str, former: str) -> None:
        """Make a kept site the next side; `Sites.clear` puts it back unless it has become live."""
        ...

    async def copy(self, tenant: str) -> None:
        """Copy the live site's files ahead of `put`, which does so itself if this failed.

        Does nothing if the next side is a copy of them.
        """
        ...

    async def put(self, tenant: str, former: str, live: str, most: int) -> None:
        """Keep the site that `settle` replaced as `former`, and record which one is `live` now.

        At most `most` sites are kept; older ones are removed. Idempotent.
        """
        ...

    async def spare(self, tenant: str) -> bool:
        """Remove the oldest kept site for a write that found the disk full; say whether one was removed.

        The newest stays.
        """
        ...


class PreparedCopies(Protocol):
    """Copies of working sites, kept ready for new tenants; see `Sites.copies`."""

    def prepare(
        self, recipe: Recipe, prepared: Prepared, size: str = "small", quiet: Quiet = at_once
    ) -> None:
        """Prepare, in the background, for more tenants of a recipe that works at this size.

        For an upload, `prepared` is always called with the outcome, unless these sites are closed first.
        """
        ...

    async def tidy(self) -> None:
        """Remove copies of uploads that are no longer needed."""
        ...

    async def spare(self, wanted: int) -> int:
        """Remove copies of uploads to free `wanted` bytes of the pool; return the bytes freed."""
        ...

    def leave(self) -> None:
        """Leave what is ready to the next process, which `adopt`s it, instead of removing it at the end."""
        ...

    async def adopt(self, recipes: Sequence[Recipe]) -> None:
        """Keep what an earlier process prepared for these recipes; destroy everything else it left."""
        ...


class SiteServices(Protocol):
    """The state of sites' services, each the process of one side of a tenant's site."""

    async def state(self, tenant: str, side: Side) -> Service | None:
        """Return the state of a side's service, None if it cannot be determined."""
        ...

    async def life(self, tenant: str, side: Side) -> Life | None:
        """Return the current run of a side's service, cheaply; None if only `state` can tell."""
        ...

    async def report_end(self, tenant: str, ended: Callable[[], None]) -> bool:
        """Call `ended` once when the live site's service may have ended; return False if nothing tells."""
        ...

    async def listening(self, tenant: str) -> Collection[ListeningSocket]:
        """Return where processes of a tenant listen; nothing if it does not run."""
        ...

    async def log(self, tenant: str, side: Side) -> str:
        """Return the last log lines of a side's service, empty if unavailable."""
        ...


class Sites(Protocol):
    """The sites of one runtime: everything that deployments use of it. An async context manager."""

    former: FormerSites
    copies: PreparedCopies
    services: SiteServices

    async def __aenter__(self) -> Sites: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def create(self, tenant: str, order: Order) -> Source:
        """Create and start a tenant from the best source available; return which one that was.

        From `pool` or `golden` it already has the recipe's files, installed and started. Raises `Conflict`
        and `Unavailable`.
        """
        ...

    async def remove(self, deployment: str) -> None:
        """Destroy everything marked with a deployment; return once nothing is left."""
        ...

    async def anchor(self, tenant: str) -> None:
        """Give a tenant a permanent address, so that its site can be located while it sleeps."""
        ...

    async def push(
        self,
        tenant: str,
        side: Side,
        recipe: Recipe,
        env: Mapping[str, str] | None,
        lost: bytes = b"",
        how: Exchange = "update",
    ) -> None:
        """Copy the recipe's files into the workspace, for `next` into a copy of it; store the environment.

        The copy omits the `lost` paths below the workspace, each terminated by NUL. For an `environment` it
        may be the workspace itself, with what the next site writes beside it.
        """
        ...

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        """Run the recipe's install command; a cancel kills its whole process tree."""
        ...

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        """Start or restart the site's service."""
        ...

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        """Make a side reachable; return where."""
        ...

    async def halt(self, tenant: str) -> None:
        """Stop both services; from now on `unsettle` is due. Idempotent."""
        ...

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"", how: Exchange = "update") -> None:
        """Make the next site's files live, and start them; `halt` was called. Idempotent.

        Files that the live site has written at the `kept` paths, each terminated by NUL, are copied; what
        the next one has written there in its rehearsal goes. The site that goes keeps its own of those that
        begin with "./", and none of the others.
        """
        ...

    async def unsettle(self, tenant: str) -> None:
        """Undo `settle`."""
        ...

    async def clear(self, tenant: str) -> None:
        """Remove the next side and what `settle` saved; put a taken site back. Idempotent."""
        ...

    async def finish(self, tenant: str, order: Order) -> None:
        """Record that the site works: set domain and port, and remove the deployment's mark."""
        ...

    async def listed(self) -> Sequence[TenantSite]:
        """Return all tenants with a domain, including those being created."""
        ...

    async def allow(self, tenant: str, domain: str) -> None:
        """Tell a running tenant's services their domain; it takes effect at their next start.

        A tenant created or started with a domain does not need this.
        """
        ...

    async def restart(self, tenant: str) -> None:
        """Restart the live site's service."""
        ...


async def site_of(sites: Sites, tenant: str) -> TenantSite | None:
    """Return a tenant's site, None if it has none."""
    return next((site for site in await sites.listed() if site.tenant == tenant), None)


def disk_was_full(said: str) -> bool:
    """Return whether a failed command ran out of disk space, judging by the end of its output."""
    return any(words in said.lower() for words in _FULL)


def quota_was_reached(said: str) -> bool:
    """Return whether it hit its own quota, judging by the kernel's message."""
    return any(words in said.lower() for words in _QUOTA)


async def lines(process: Process, say: Say | None, most: int, limit: int) -> str:
    """Pass the first `most` lines of a merged command's output to `say`; return the end of the output.

    Raises `ExecFailed` if it prints more than `limit` bytes.
    """
    heard, size = LineSplitter(0 if say is None else most, length=_LINE, tail=_TAIL), 0
    tell = say or (lambda line: None)
    while piece := await process.read("stdout"):
        size += len(piece)
        if size > limit:
            raise ExecFailed(f"the command printed over {limit} bytes and was stopped", reason="printed")
        for line in heard.feed(piece):
            tell(line)
    for line in heard.end():
        tell(line)
    return heard.tail
