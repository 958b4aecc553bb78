"""Check from outside whether sites answer or hang, and publish changes. Nothing runs in a tenant."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol

from gateway.admission import Admission
from gateway.bounds import run_in_thread
from gateway.deployments.record import Register
from gateway.errors import GatewayError
from gateway.events import Bus
from gateway.rootfs import connections
from gateway.runtime import TenantEvent
from gateway.runtime.incus.runtime import Containers
from gateway.runtime.listening import packets
from gateway.runtime.probe import HostRefused, NoAnswer, answer, ask, own_ports, refusal
from gateway.runtime.sites import Sites, TenantSite, site_of
from gateway.settings import Settings

log = logging.getLogger(__name__)

INTERVAL: Final = 5.0  # seconds between two checks of a site
TIMEOUT: Final = 5.0  # seconds without an answer after which a site is unhealthy at once
FAILURES: Final = 3  # failed checks in a row after which a site is unhealthy
HANG_TIMEOUT: Final = 4.0  # seconds after which visitors of a site that reads no requests get the error page
_AT_ONCE: Final = 32  # checks asked for by clients, and of one site
_OF_ONE: Final = 4
_WAITING: Final = 128
_WAITS: Final = 10.0  # seconds
# checks begun at once: waking up for each costs more than the check, and hundreds would block the loop
_TOGETHER: Final = 32
_LEISURE: Final = 0.01  # part of an interval in which nearly all have answered
_SKIPPED: Final = 3  # intervals that a healthy site without visitors is skipped
_SKIPPED_REPORTED: Final = 11  # if the end of its service would be reported
_ANSWERS: Final = 12  # packets that a site sends at most for one of our checks
_NOISE: Final = 2  # packets in an interval that cannot be an answer to a visitor, which takes four
_STARTS: Final = ("tenant.started", "tenant.restarted")


class Health:
    """The health of every site. Use as an async context manager.

    A site that has just been started is checked until it answers, which is published as `tenant.healthy` with
    the milliseconds it took. Each site is then checked separately, so that one that hangs delays no other.
    One that was healthy and has had no visitors since is checked every fourth time, or every twelfth if the
    runtime reports the end of its service, after which it is checked next time. A site that is healthy when
    the gateway starts causes no event.
    """

    def __init__(
        self,
        sites: Sites,
        bus: Bus,
        settings: Settings,
        register: Register | None = None,
        show_error_page: Callable[[str, bool], None] = lambda domain, away: None,
        packets: Callable[[], Mapping[str, int]] = packets,
    ) -> None:
        """`register` has the deployments: the site of a tenant that is being deployed may be slow.

        `show_error_page` answers visitors of a domain with a page while its site hangs, and `packets` counts
        the packets from each site's `link`.
        """
        self._sites, self._bus, self._settings = sites, bus, settings
        self._register, self._show_error_page, self._packets = register, show_error_page, packets
        # by tenant: the packets that it has sent, how many intervals may still be skipped, and whether it was
        # checked in the last one
        self._sent: dict[str, tuple[int, int, bool]] = {}
        self._reported: set[str] = set()  # tenants whose site's end will be reported
        self._away: dict[str, str] = {}  # domains that show an error page, by tenant
        self._failures: dict[str, int] = {}
        self._unhealthy: set[str] = set()
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._looks: dict[str, asyncio.Task[None]] = {}  # at most one for each site
        self._watching: asyncio.Task[None] | None = None
        self._asking = Admission[str](
            "checks of its site", each=_OF_ONE, total=_AT_ONCE, waiting=_WAITING, patience=_WAITS
        )

    async def __aenter__(self) -> Health:
        self._watching = asyncio.create_task(self._watch(), name="health")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [
            task
            for task in (self._watching, *self._starting.values(), *self._looks.values())
            if task is not None
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def noticed(self, event: TenantEvent) -> None:
        """Handle an event of a tenant."""
        tenant = event.tenant
        if tenant is not None and event.type in _STARTS and tenant not in self._starting:
            self._look_no_more(tenant)  # a check of what it was before
            task = asyncio.create_task(self._started(tenant), name=f"health of {tenant}")
            self._starting[tenant] = task
            task.add_done_callback(lambda _: self._starting.pop(tenant, None))

    async def now(self, tenant: str) -> Mapping[str, Any]:
        """Probe a tenant's site; return whether it answers, or None if that would wake it.

        `status` is its answer's, None without one. An error status (5xx) does not count as an answer, nor
        does a refusal of the tenant's domain: then `reason` is `host_refused`, and `said` its text. Raises
        `RateLimited` if too many ask.
        """
        site = await site_of(self._sites, tenant)
        if site is None or site.exposure is None or site.asleep:
            return {"answers": None, "status": None}
        status: int | None = None
        said = ""
        if site.running:
            async with self._asking.slot(tenant):
                with contextlib.suppress(OSError, ValueError):
                    where, limit = site.exposure, TIMEOUT
                    status = await ask(where.address, where.port, site.health, 1.0, limit, host=site.domain)
                    said = await refusal(where.address, where.port, site.health, site.domain, status)
        if said:
            return {"answers": False, "status": status, "reason": "host_refused", "said": said}
        return {"answers": status is not None and status < 500, "status": status}

    def unwell(self, tenant: str, port: int, path: str, why: str) -> None:
        """Record that a site is unhealthy, as seen elsewhere; the next check may say otherwise."""
        if tenant not in self._unhealthy:
            self._unhealthy.add(tenant)
            self._bus.publish(
                "tenant.unhealthy", tenant, {"port": port, "path": path, "failures": 1, "why": why}
            )

    def hangs(self, site: TenantSite, why: str) -> None:
        """Record that a site hangs, as seen elsewhere; the next check may say otherwise."""
        self._hangs(site.tenant, site.domain)
        self._failed(site, self._failures.get(site.tenant, 0) + 1, why, at_once=True)

    async def _started(self, tenant: str) -> None:
        began = time.monotonic()
        with contextlib.suppress(GatewayError):
            site = await site_of(self._sites, tenant)
            # its deployment reports on it
            if site is None or site.exposure is None or site.deployment is not None:
                return
            where = site.exposure
            try:
                limit = self._settings.verify_timeout
                await answer(where.address, where.port, site.health, limit, host=site.domain)
            except HostRefused as error:
                why = f"it refuses its domain: {error.said}"
                self._failed(site, FAILURES, why, at_once=True)
                return
            except TimeoutError:
                why = f"no answer within {self._settings.verify_timeout:g} s of its start"
                self._failed(site, FAILURES, why, at_once=True)
                return
            self._failures[tenant] = 0
            self._unhealthy.discard(tenant)
            self._hangs(tenant, None)
            self._bus.publish(
                "tenant.healthy", tenant, {"port": where.port, "ms": round((time.monotonic() - began) * 1000)}
            )

    async def _watch(self) -> None:
        while True:
            parts: Sequence[Sequence[TenantSite]] = [()]
            try:
                parts = self._due(await self._sites.listed())
            except GatewayError as error:
                log.info("cannot check the sites: %s", error.message)
            except Exception:
                log.exception("cannot check the sites")
            for part in parts:
                for site in part:
                    self._look(site)
                await asyncio.sleep(INTERVAL / len(parts))

    def _due(self, sites: Sequence[TenantSite]) -> Sequence[Sequence[TenantSite]]:
        """Return the sites to check now, part by part, and forget those that are gone."""
        watched = {
            site.tenant: site
            for site in sites
            if site.running and site.deployment is None and site.exposure is not None
        }
        for gone in [tenant for tenant in self._failures if tenant not in watched]:
            del self._failures[gone]
            self._unhealthy.discard(gone)
            self._hangs(gone, None)
        for gone in [tenant for tenant in self._looks if tenant not in watched]:
            self._look_no_more(gone)
        counts, before, self._sent = self._packets(), self._sent, {}
        parts: list[list[TenantSite]] = [[] for _ in range(1 + len(watched) // _TOGETHER)]
        for tenant, site in watched.items():
            well = self._failures.get(tenant) == 0 and tenant not in self._unhealthy
            if (count := counts.get(site.link or "")) is not None:
                last, left, checked = before.get(tenant, (count + 1, 0, False))
                silent = 0 <= count - last <= (_ANSWERS if checked else _NOISE)
                if well and silent and left:
                    self._sent[tenant] = count, left - 1, False
                    continue
                skipped = _SKIPPED_REPORTED if tenant in self._reported else _SKIPPED
                self._sent[tenant] = count, skipped, True
            # at the same moment of each interval
            parts[zlib.crc32(tenant.encode()) % len(parts)].append(site)
        return parts

    def _look(self, site: TenantSite) -> None:
        """Begin to check a site, unless a check is under way."""
        tenant = site.tenant
        if tenant not in self._starting and tenant not in self._looks:
            task = asyncio.create_task(self._one(site), name=f"look at {tenant}")
            self._looks[tenant] = task
            task.add_done_callback(partial(self._looked, tenant))

    def _looked(self, tenant: str, task: asyncio.Task[None]) -> None:
        if self._looks.get(tenant) is task:
            del self._looks[tenant]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cannot check a site", exc_info=error)

    def _look_no_more(self, tenant: str) -> None:
        if (task := self._looks.pop(tenant, None)) is not None:
            task.cancel()

    def _deploying(self, tenant: str) -> bool:
        return self._register is not None and self._register.deploying(tenant)

    async def _one(self, site: TenantSite) -> None:
        assert site.exposure is not None
        tenant, where, why, silent = site.tenant, site.exposure, "", False
        began = self._deploying(tenant)
        try:
            limit, leisure = TIMEOUT, INTERVAL * _LEISURE
            status = await ask(
                *(where.address, where.port, site.health, 1.0, limit), host=site.domain, leisure=leisure
            )
            why = f"status {status}" if status >= 500 else ""
            if said := await refusal(where.address, where.port, site.health, site.domain, status):
                why = f"it refuses its domain: {said}"
        except NoAnswer:
            why, silent = f"no answer in {TIMEOUT:g} s", True
        except ValueError:
            why = "no HTTP"
        except OSError:
            why = "no connection"
        except Exception:  # an unexpected error with one site must not end the checks
            log.exception("cannot check the site of %s", tenant)
            why = "it cannot be checked"
        if silent and (began or self._deploying(tenant)):
            return  # no visitor is sent away
        self._hangs(tenant, site.domain if silent else None)
        if why:
            self._failed(site, self._failures.get(tenant, 0) + 1, why, at_once=silent)
            return
        self._failures[tenant] = 0
        if tenant in self._unhealthy:
            self._unhealthy.discard(tenant)
            self._bus.publish("tenant.healthy", tenant, {"port": where.port})
        # asked for by a check only, since a tenant may cause as many reports as it likes
        ended = partial(self._ended, tenant)
        if tenant not in self._reported and await self._sites.services.report_end(tenant, ended):
            self._reported.add(tenant)

    def _ended(self, tenant: str) -> None:
        """Check a site in the next interval, since its service may have ended."""
        self._reported.discard(tenant)
        self._sent.pop(tenant, None)

    def _hangs(self, tenant: str, domain: str | None) -> None:
        """Serve the page at the domain of a site that hangs, and stop once it does not."""
        before = self._away.pop(tenant, None)
        if domain is not None:
            self._away[tenant] = domain
        for name, away in ((before, False), (domain, True)):
            if name is not None and before != domain:
                with contextlib.suppress(OSError):
                    self._show_error_page(name, away)

    def _failed(self, site: TenantSite, failures: int, why: str, *, at_once: bool) -> None:
        tenant = site.tenant
        self._failures[tenant] = failures
        if (at_once or failures >= FAILURES) and tenant not in self._unhealthy:
            self._unhealthy.add(tenant)
            assert site.exposure is not None
            facts = {"port": site.exposure.port, "path": site.health, "failures": failures, "why": why}
            self._bus.publish("tenant.unhealthy", tenant, facts)


_LOOK: Final = 5.0  # seconds of one look at the kernel's tables; it takes a millisecond
_CONNECT: Final = 1.0
_ROUNDS: Final = 10  # rounds of closing connections: Caddy sends some requests once more
_PAUSE: Final = 0.1


class ConnectionCutter(Protocol):
    """What needs root; see `BrokerClient`."""

    async def break_off(self, tenant: str, port: int, leave: Collection[int]) -> int: ...


class Hangs:
    """The watch for sites that hang. Use as an async context manager.

    A site that has not read a request for a quarter of `HANG_TIMEOUT` is probed. If it does not answer within
    half of that time it hangs: `told` is called with the reason, and connections from which it has read
    nothing are closed, so that Caddy answers their visitors. A request that was read is never cut, since an
    answer may take long. A site without visitors costs nothing.
    """

    def __init__(
        self,
        containers: Containers,
        sites: Sites,
        root: ConnectionCutter,
        told: Callable[[TenantSite, str], None],
        register: Register,
        settings: Settings,
    ) -> None:
        self._containers, self._sites, self._root, self._told = containers, sites, root, told
        self._register, self._settings = register, settings
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Hangs:
        self._watching = asyncio.create_task(self._watch(), name="sites that hang")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._watching, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        step = HANG_TIMEOUT / 4
        while True:
            await asyncio.sleep(step)
            try:
                found = await run_in_thread(
                    "hangs", _LOOK, connections.waiting, self._settings.network_ipv4, step
                )
                if found:
                    await self._look(found)
            except (GatewayError, OSError) as error:
                log.info("cannot list the visitors that wait for a site: %s", error)
            except Exception:
                log.exception("cannot list the visitors that wait for a site")

    async def _look(self, found: Sequence[connections.TcpConnection]) -> None:
        """Begin to probe each site that has not read what one of these visitors sent."""
        own = own_ports()
        visitors = {(one.local, one.remote) for one in found if one.local[1] not in own}
        ends = {remote for _, remote in visitors}
        for site in await self._sites.listed():
            where = site.exposure
            if where is None or site.deployment is not None or site.tenant in self._asking:
                continue
            # an update shares its processors, and visitors rather wait
            if self._register.deploying(site.tenant):
                continue
            end = (socket.inet_aton(where.address), where.port)
            if end not in ends or not (pid := await self._containers.init_pid(site.tenant)):
                continue
            unread = await run_in_thread("hangs", _LOOK, connections.unread, pid, end)
            if any((local, end) in visitors for local in unread):
                task = asyncio.create_task(self._probe(site), name=f"does {site.tenant} hang")
                self._asking[site.tenant] = task
                task.add_done_callback(partial(self._over, site.tenant))

    def _over(self, tenant: str, task: asyncio.Task[None]) -> None:
        del self._asking[tenant]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cannot check whether a site hangs", exc_info=error)

    async def _probe(self, site: TenantSite) -> None:
        where, limit = site.exposure, HANG_TIMEOUT
        assert where is not None
        try:
            await ask(where.address, where.port, site.health, _CONNECT, limit / 2, host=site.domain)
        except TimeoutError:
            if self._register.deploying(site.tenant):
                return
            self._told(site, f"it has read no request for {limit * 3 / 4:g} s")
            await self._break_off(site.tenant, where.port)
        except (OSError, ValueError):
            return  # it refuses the connection, or answers something

    async def _break_off(self, tenant: str, port: int) -> None:
        try:
            for _ in range(_ROUNDS):
                if not await self._root.break_off(tenant, port, own_ports()):
                    break
                await asyncio.sleep(_PAUSE)  # there is no event for when Caddy tries again
        except GatewayError as error:
            log.info(
                "cannot disconnect the visitors that wait for %s, which hangs: %s", tenant, error.message
            )
