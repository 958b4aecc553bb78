"""Puts unused tenants to sleep, and wakes them for the first request.

A tenant is in use by requests and websockets of the gateway, by its running commands, and by connections to
its site. A tenant that is asleep is stopped and marked in Incus, and its route leads to the gateway first.
The order ensures that nothing is lost: first the mark and the route, so that visitors from then on wait here;
then a last check for earlier visitors; then the stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final

from gateway.admission import Admission
from gateway.caddy import caddy
from gateway.errors import (
    Conflict,
    GatewayError,
    NotFound,
    TenantNotRunning,
    Timeout,
    Unavailable,
)
from gateway.lifecycle.lifecycle import Lifecycle, SiteRoutes
from gateway.runtime import TenantEvent, TenantInstance, TenantRuntime
from gateway.runtime.probe import HostRefused, answer
from gateway.runtime.sites import site_of
from gateway.settings import Settings

log = logging.getLogger(__name__)

# seconds for a request whose route Caddy has looked up to become a connection
_ON_THE_WAY: Final = 0.5

LOOK_INTERVAL: Final = 15.0  # seconds between two checks of which tenants are in use
_WAKES: Final = 8  # tenants that are woken or put to sleep at once: each start and stop keeps incusd busy
VISITORS: Final = 2000  # visitors that wait for sleeping sites and for updates, half of them for one site
_RETRY_AFTER: Final = 5  # seconds
_HELD: Final = 150.0  # seconds for which a visitor waits for an update: a new site's start, and its undo
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


class Idle:
    """The sleep of one gateway's tenants. Use as an async context manager, from the event loop only.

    `running` returns how many commands run in a tenant.
    """

    def __init__(
        self,
        runtime: TenantRuntime,
        routes: SiteRoutes,
        lifecycle: Lifecycle,
        running: Callable[[str], int],
        settings: Settings,
    ) -> None:
        self._tenants, self._usage, self._routes = runtime.tenants, runtime.usage, routes
        self._sites, self._caddy, self._domains = routes.sites, routes.caddy, routes.domains
        self._lifecycle, self._running, self._settings = lifecycle, running, settings
        self._uses: Counter[str] = Counter()
        self._last: dict[str, float] = {}  # when each running tenant was last used, by the monotonic clock
        self._asleep: set[str] | None = None  # or about to sleep; None until Incus has been asked
        self._stops: set[str] = set()  # tenants whose last stop was ours
        self._starts: set[str] = set()  # tenants whose next start is ours
        self._waking: dict[str, _Waking] = {}
        self._visitors = Admission[str](
            "visitors that wait for a sleeping site",
            each=VISITORS // 2,
            total=VISITORS,
            name="this site",
            hint="try again soon",
            retry_after=_RETRY_AFTER,
        )
        self._slots = Admission[str]("wakes", each=2, total=_WAKES)
        self._dozing: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Idle:
        self._looking = asyncio.create_task(self._watch(), name="idle")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [waking.task for waking in self._waking.values()] + [*self._dozing.values()]
        tasks += [] if self._looking is None else [self._looking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- use ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, tenant: str) -> Iterator[None]:
        """Count as a use of the tenant while the context is open."""
        self._uses[tenant] += 1
        try:
            yield
        finally:
            self._uses[tenant] -= 1
            if not self._uses[tenant]:
                del self._uses[tenant]
            self._last[tenant] = time.monotonic()

    async def awake(self, tenant: str) -> None:
        """Wait until a sleeping tenant runs; return at once for any other. Raises what a start raises."""
        if tenant in self._asleep if self._asleep is not None else (await self._tenants.get(tenant)).asleep:
            await self._within(asyncio.shield(self._wake(tenant).started))

    @contextlib.asynccontextmanager
    async def use(self, tenant: str) -> AsyncIterator[None]:
        """Keep a tenant awake while the context is open, even one that does not exist yet."""
        with self.using(tenant):
            with contextlib.suppress(NotFound):
                await self.awake(tenant)
            yield

    async def visit(self, domain: str) -> None:
        """Wait until the site at a domain answers, asleep or held, for a visitor that waits in Caddy.

        Raises `NotFound`, `RateLimited`, and what a start raises.
        """
        domain = domain.lower().removesuffix(".")
        # so that Incus is not asked for every made-up name
        if not _HOST.fullmatch(domain) or self._caddy.get(domain) is None:
            raise NotFound("there is no site at this address")
        if not self._caddy.sleeps(domain):
            return
        with self._visitors.reserve(domain):
            try:
                async with asyncio.timeout(_HELD):
                    await self._caddy.released(domain)
            except TimeoutError:
                raise Timeout("the site is being updated; try again soon", reason="updating") from None
            if not self._caddy.sleeps(domain):
                return
            tenant = await self._domains.owner(domain)
            if tenant is None:
                raise NotFound("there is no site at this address")
            with self.using(tenant):
                await self._within(asyncio.shield(self._wake(tenant).task))

    async def _within(self, waking: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(caddy.WAKE_TIMEOUT):
                await waking
        except TimeoutError:
            raise Timeout(
                "the tenant was asleep and is not awake yet; try again soon", reason="waking"
            ) from None

    # --- waking -------------------------------------------------------------------------------------

    def _wake(self, tenant: str) -> _Waking:
        waking = self._waking.get(tenant)
        if waking is None:
            started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._woken(tenant, started), name=f"wake {tenant}")
            waking = self._waking[tenant] = _Waking(started, task)
            task.add_done_callback(partial(self._over, self._waking, tenant))
        return waking

    async def _woken(self, tenant: str, started: asyncio.Future[None]) -> None:
        """Start a sleeping tenant, wait until its site answers, and route its domain there again."""
        began = time.monotonic()
        try:
            async with self._slots.slot(tenant), self._lifecycle.alone(tenant):
                found = await self._tenants.get(tenant)
                if found.status != "running" and found.asleep:
                    self._starts.add(tenant)
                    async with self._lifecycle.capacity.promise(tenant):
                        await self._tenants.start(tenant)
                self._last[tenant] = time.monotonic()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
                started.exception()  # retrieved, or asyncio would log it
            raise
        started.set_result(None)
        if not found.asleep:  # somebody has started it, or stopped it for good
            self._asleep = (self._asleep or set()) - {tenant}
            return
        site = await site_of(self._sites, tenant)
        if site is not None and site.exposure is not None:
            where = site.exposure
            try:
                limit = caddy.WAKE_TIMEOUT
                await answer(where.address, where.port, site.health, limit, host=site.domain)
            except HostRefused:
                log.warning("the site of %s refuses its domain after it was woken", tenant)
            except TimeoutError:
                # requests for it find out by themselves
                log.warning("the site of %s does not answer after it was woken", tenant)
        await self._unmark(tenant)
        log.info("woke %s in %d ms", tenant, (time.monotonic() - began) * 1000)

    async def _unmark(self, tenant: str) -> None:
        await self._routes.mark_awake(tenant)
        if self._asleep is not None:
            self._asleep.discard(tenant)

    # --- going to sleep -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except GatewayError as error:
                log.info("cannot tell which tenants are in use: %s", error.message)
            except Exception:
                log.exception("cannot tell which tenants are in use")
            await asyncio.sleep(LOOK_INTERVAL)

    async def _look(self) -> None:
        moving = self._dozing.keys() | self._waking.keys()
        tenants = await self._tenants.list()
        # for uses in progress, then or now, our own counts are more accurate
        moving |= self._dozing.keys() | self._waking.keys()
        known = self._asleep or set()
        self._asleep = {t.name for t in tenants if t.asleep and t.name not in moving} | (known & moving)
        limits = {tenant.name: self._limit(tenant) for tenant in tenants if tenant.status == "running"}
        now = time.monotonic()
        self._last = {name: self._last.get(name, now) for name in limits}
        watched = [tenant for tenant in tenants if limits.get(tenant.name)]
        visited = await self._usage.visited(watched) if watched else {}
        for tenant in watched:
            name = tenant.name
            if self._in_use(name):
                self._last[name] = now
            elif name in visited:
                self._last[name] = max(self._last[name], now - visited[name])
            if now - self._last[name] >= limits[name] and name not in moving:
                task = asyncio.create_task(self._put_to_sleep(name, limits[name]), name=f"{name} to sleep")
                self._dozing[name] = task
                task.add_done_callback(partial(self._over, self._dozing, name))

    @staticmethod
    def _over(tasks: dict[str, Any], name: str, task: asyncio.Task[None]) -> None:
        del tasks[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            known = isinstance(error, GatewayError | TimeoutError)
            log.warning("%s: %s", task.get_name(), error, exc_info=None if known else error)

    def _limit(self, tenant: TenantInstance) -> float:
        return self._settings.idle_stop if tenant.idle_stop is None else tenant.idle_stop

    def _in_use(self, tenant: str) -> bool:
        return bool(self._uses[tenant] or self._running(tenant))

    async def sleep(self, name: str) -> None:
        """Put a tenant to sleep now. Raises `Conflict` if it is in use, `TenantNotRunning` if stopped."""
        found = await self._tenants.get(name)
        if found.status != "running":
            if found.asleep:
                return
            raise TenantNotRunning(f"{name} is {found.status}; only a running tenant can be put to sleep")
        if self._asleep is None:
            raise Unavailable("the gateway does not know yet which tenants are in use; try again soon")
        task = self._dozing.get(name)
        if task is None:
            task = asyncio.create_task(self._put_to_sleep(name, _ON_THE_WAY), name=f"{name} to sleep")
            self._dozing[name] = task
            task.add_done_callback(partial(self._over, self._dozing, name))
        await asyncio.shield(task)
        if (await self._tenants.get(name)).status == "running":
            commands, clients = self._running(name), self._uses[name]
            why = "a visitor is connected to its site, or was a moment ago"
            if commands or clients:
                why = f"commands that run in it: {commands}, clients that use it: {clients}"
            raise Conflict(f"{name} stays awake ({why}); try again later, or stop it", reason="in_use")

    async def _put_to_sleep(self, name: str, limit: float) -> None:
        async with self._slots.slot(name), self._lifecycle.alone(name):
            if self._in_use(name) or (await self._tenants.get(name)).status != "running":
                return
            assert self._asleep is not None
            self._asleep.add(name)  # from now on, requests for it wait and wake it
            await self._doze(name, limit)

    async def _doze(self, name: str, limit: float) -> None:
        """Mark a tenant, check once more, stop it. A wake removes a mark left on a running one."""
        await self._routes.mark_asleep(name)
        await asyncio.sleep(_ON_THE_WAY)  # what Caddy does in between cannot be awaited
        tenant = await self._tenants.get(name)
        visited = (await self._usage.visited([tenant])).get(name)
        if name in self._waking or self._in_use(name) or (visited is not None and visited < limit):
            await self._unmark(name)
            log.info("%s is in use again and stays awake", name)
            return
        await self._lifecycle.end_workers(name)
        self._stops.add(name)
        try:
            await self._tenants.stop(name)
        except GatewayError:
            self._stops.discard(name)
            raise
        log.info("%s is asleep", name)

    # --- changes by others --------------------------------------------------------------------------

    def explained(self, event: TenantEvent) -> Mapping[str, Any]:
        """Return an event's facts, with the `reason` if the stop or start is ours."""
        if event.type == "tenant.stopped" and event.tenant in self._stops:
            if "resync" not in event.data:  # else Incus's own event may still come
                self._stops.discard(event.tenant)
            return {**event.data, "reason": "idle"}
        if event.type == "tenant.started" and event.tenant in self._starts:
            return {**event.data, "reason": "wake"}
        return event.data

    def noticed(self, event: TenantEvent) -> None:
        """Handle a change to a tenant, made by anyone."""
        name = event.tenant
        if name is None:
            return
        if event.type in ("tenant.started", "tenant.restarted"):
            self._last[name] = time.monotonic()
            self._starts.discard(name)
            if self._asleep is not None and name in self._asleep:
                self._wake(name)  # somebody else started it
        elif event.type == "tenant.destroyed":
            self._stops.discard(name)
            if self._asleep is not None:
                self._asleep.discard(name)


class _Waking:
    """A tenant being woken. `started` is set once it runs, `task` ends once its site answers."""

    def __init__(self, started: asyncio.Future[None], task: asyncio.Task[None]) -> None:
        self.started, self.task = started, task
