"""Deployments as the API sees them: requests are checked and queued, and records are looked up.

`runner` and `phases` do the work of one; `recovery` finishes or undoes what a killed gateway left half done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final

from gateway.auth.tokens import Token
from gateway.caddy import Caddy
from gateway.deployments.admission import Admission
from gateway.deployments.context import Context, Promise, RemoteRoutes
from gateway.deployments.health import Health
from gateway.deployments.progress import Progress
from gateway.deployments.queue import DeploymentQueue, Owner
from gateway.deployments.reconciler import Reconciler
from gateway.deployments.record import Record
from gateway.deployments.recovery import Recovery
from gateway.deployments.register import Register, Running
from gateway.deployments.request import Change, Request, Variables
from gateway.deployments.runner import Runner
from gateway.deployments.template import named, names
from gateway.deployments.verify import Verifier
from gateway.deployments.warming import Warming
from gateway.errors import Conflict, GatewayError, Unavailable
from gateway.events import Bus
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantEvent, TenantRuntime
from gateway.runtime.sites import Former, Recipe, Sites
from gateway.settings import Settings

# events of a tenant after which its route may be wrong
_MOVES: Final = (
    *("tenant.created", "tenant.started", "tenant.destroyed", "tenant.renamed"),
    *("incus.instance-updated", "gateway.resynced"),
)
_ENDS: Final = ("tenant.stopped", "tenant.destroyed", "tenant.renamed", "tenant.restarted")


class Deployments:
    """The deployments of one gateway. Use as an async context manager."""

    def __init__(
        self,
        runtime: TenantRuntime,
        sites: Sites,
        caddy: Caddy,
        domains: Domains,
        register: Register,
        bus: Bus,
        settings: Settings,
        use: Callable[[str], contextlib.AbstractAsyncContextManager[None]] | None = None,
        admit: Callable[[], Awaitable[None]] | None = None,
        spacious: Callable[[], Awaitable[None]] | None = None,
        promise: Promise | None = None,
        ended: Callable[[str], float] | None = None,
        workers: Workers | None = None,
        health: Health | None = None,
        pressure: Pressure | None = None,
        remote: RemoteRoutes | None = None,
        moving: Callable[[str], bool] | None = None,
    ) -> None:
        """`use` keeps a tenant awake while its context is open; `ended` returns when a name was last freed.

        `admit` refuses if there is no room for another tenant, `spacious` if room would have to be made
        first, `promise` if this host lacks the memory. Without `workers` updates remove no files. In a
        cluster `remote` tells where other members' sites are, and `moving` which tenants are about to go
        there.
        """
        self._caddy, self._domains, self._sites, self._tenants = caddy, domains, sites, runtime.tenants
        self._bus, self._settings = bus, settings
        self._register = register
        self._admission = Admission(
            *(domains, self._register, sites, settings),
            ended=ended or (lambda tenant: 0.0),
            moving=moving or (lambda tenant: False),
        )
        self._verifier = Verifier(sites.services, caddy, settings, pressure)
        self._turns = DeploymentQueue(settings)
        self._warming = Warming(sites.copies, self._turns, spacious, settings)
        self._recovered = asyncio.Event()
        self._resting = False
        context = Context(
            runtime=runtime,
            sites=sites,
            caddy=caddy,
            domains=domains,
            register=self._register,
            verifier=self._verifier,
            workers=workers,
            settings=settings,
            use=use or (lambda tenant: contextlib.nullcontext()),
            admit=admit or _anything,
            promise=promise or (lambda tenant, memory: contextlib.nullcontext()),
            health=health,
            pressure=pressure,
            remote=remote,
        )
        self._runner = Runner(context, self._turns, self._warming, self._recovered, bus)
        self._recovery = Recovery(context, bus)
        self._reconciler = Reconciler(context, self._recovery)
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Deployments:
        await self._domains.retain(await self._register.unfinished())
        for record in await self._register.left():
            if record.kind == "update" and self._caddy.sleeps(record.domain):
                self._caddy.hold(record.domain)  # until it is recovered
        self._following = asyncio.create_task(self._follow(), name="routes")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self.end()
        await self._warming.aclose()
        await self._verifier.aclose()
        await self._register.write_down()

    async def quiet(self) -> None:
        """Wait until no deployment waits and half of the places are free."""
        await self._turns.quiet()

    async def end(self) -> None:
        """Cancel what runs and wait until it is undone. What takes too long is left to the next start."""
        tasks = [running.task for running in self._register.running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.shutdown_timeout / 2)

    async def rest(self, seconds: float, waiting: Callable[[int], None]) -> None:
        """Return once no deployment is under way, from when on none begins until `go_on`.

        `waiting` is told how many are. Raises `Unavailable` if some still are after `seconds`.
        """
        running = self._register.running
        try:
            async with asyncio.timeout(seconds):
                while running:
                    waiting(len(running))
                    tasks = [one.task for one in running.values() if one.task is not None]
                    if tasks:
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    else:  # it was just asked for
                        await asyncio.sleep(0)
        except TimeoutError:
            raise Unavailable(
                f"{len(running)} deployments are still running after {seconds:.0f} s; try again later, or "
                "restart the gateway, which undoes them"
            ) from None
        self._resting = True

    def go_on(self) -> None:
        """Let deployments begin again."""
        self._resting = False

    async def begin(self, request: Request, token: Token, *, key: str | None = None) -> tuple[Record, bool]:
        """Begin a deployment; return it, and whether it is new. The same key returns the same deployment.

        Raises `InvalidParams`, `NotFound` and `Forbidden` for what can be checked at once, `Conflict` if one
        runs for the tenant or the key was used for another request, and `RateLimited`.
        """
        if self._resting:
            raise Unavailable("the gateway is being replaced; try again", retry_after=1)
        tenant, domain = await self._admission.check(request, token)
        by = token.subject
        fresh = Record(tenant, domain, self._caddy.url(domain), _told(request), by)
        if isinstance(request.template, Variables):
            fresh.env = sorted(request.template.changes)
        if key is not None:
            begun = await self._register.keyed(by, key)
            # nothing may be revealed of another tenant's, or of one that had the name before
            if told := [one for one in begun if self._admission.knows(token, one[0])]:
                return _same(told, request), False
        self._admission.check_alone(tenant, domain, token)
        fresh.template = await self._admission.template_of_change(tenant, request) or fresh.template
        self._admission.check_alone(tenant, domain, token)  # another may have begun meanwhile
        owner, size = Owner.of(token), len(request.template) if isinstance(request.template, bytes) else 0
        place = self._turns.admit(owner, size)
        progress = Progress(fresh, self._bus, self._settings.install_log)
        running = Running(fresh, request, owner, progress, self._admission.uploader(token), key)
        try:
            await self._register.open(running)
        except BaseException:
            place.close()
            raise
        running.task = asyncio.create_task(self._runner.run(running), name=f"deploy {tenant}")
        running.task.add_done_callback(lambda _: place.close())
        return fresh, True

    def deploying(self, tenant: str) -> bool:
        """Return whether a deployment of the tenant is under way; one whose end can be seen is not."""
        return self._register.deploying(tenant)

    async def change(
        self, tenant: str, change: Change, token: Token, *, key: str | None = None
    ) -> tuple[Record, bool]:
        """Begin a deployment without new files for an existing tenant; see `begin`."""
        domain = (await self._tenants.get(tenant)).domain
        if domain is None:
            raise Conflict(f"tenant {tenant} has no domain, and so no site; give it one first")
        return await self.begin(Request(domain, change, tenant=tenant), token, key=key)

    async def kept(self, tenant: str) -> tuple[str | None, Sequence[Former]]:
        """Return the deployment of a tenant's live site, if known, and those it keeps, newest first."""
        there, former = await self._tenants.get(tenant), self._sites.former
        live, _ = await former.live(tenant)
        return live or await self._register.maker(tenant, there.instance), await former.listed(tenant)

    async def environment(self, tenant: str) -> Mapping[str, str]:
        """Return the environment of a tenant's site. Raises `NotFound` and `Conflict`."""
        await self._tenants.get(tenant)
        return await self._sites.former.environment(tenant)

    async def get(self, identity: str) -> Record:
        """Return a deployment. Raises `NotFound`."""
        return await self._register.get(identity)

    async def recent(self, coverage: frozenset[str] | None) -> list[Record]:
        """Return the newest deployments of the tenants that a token covers, None for all."""
        return await self._register.recent(coverage)

    async def cancel(self, identity: str) -> Record:
        """Cancel a deployment and return it once it is undone; one that has ended is returned as it is."""
        running = self._register.running.get(identity)
        if running is None or running.task is None:
            return await self.get(identity)
        if running.record.state in ("waiting", "running") and not running.record.settled:
            running.cancelled = True
            running.task.cancel()
        await asyncio.wait([running.task])
        return running.record

    async def recover(self) -> None:
        """Finish or undo what an earlier run left, then let new ones run. Call it once Incus answers."""
        try:
            await self._sites.copies.adopt(await asyncio.to_thread(self._shared_recipes))
            await self._reconciler.reconcile()
        finally:
            self._recovered.set()

    def _shared_recipes(self) -> list[Recipe]:
        recipes = []
        for name in names(self._settings):
            with contextlib.suppress(GatewayError, OSError):
                recipes.append(named(name, self._settings).recipe())
        return recipes

    async def _follow(self) -> None:
        await self._recovered.wait()
        await self._reconciler.follow()

    def look_soon(self) -> None:
        """Check the routes soon: something happened to the sites of other members."""
        self._reconciler.look_soon()

    def noticed(self, event: TenantEvent) -> None:
        """Handle an event of a tenant."""
        if event.type in _MOVES:
            self._reconciler.look_soon()
        if event.type in _ENDS and event.tenant is not None:
            self._verifier.forget(event.tenant)


def _told(request: Request) -> str:
    """Return the template's name for the record; that of a change is known only when it runs."""
    match request.template:
        case str():
            return request.template
        case bytes():
            return "upload"
    return ""


def _same(known: Iterable[tuple[Record, str]], request: Request) -> Record:
    """Return the deployment begun with this key and the same request. Raises `Conflict` for another."""
    for record, digest in known:
        if digest == request.digest:
            return record
    raise Conflict("this Idempotency-Key was used for another deployment; use a new one")


async def _anything() -> None:
    """Refuse no tenant."""
