"""Keep the routes in line with Incus, and finish or undo what a killed gateway left half done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Final

from gateway.caddy import asleep
from gateway.deployments.context import Context
from gateway.deployments.phases import keep_replaced_site
from gateway.deployments.record import PHASES, DeploymentEvents, Record, phase_position
from gateway.errors import GatewayError, NotFound
from gateway.runtime.probe import HostRefused, answer
from gateway.runtime.sites import Order, Recipe, TenantSite, site_of
from gateway.tasks import log_errors

log = logging.getLogger(__name__)

# While all routes are checked no domain can be given, and one deployment causes many events. So the next
# check waits for this many times as long as the last one took, and a second at most.
_REST: Final = 9.0
_REST_MOST: Final = 1.0
_ADDRESS_LOOK: Final = 0.5  # seconds between two tries to get the address of a site that was just started
_ADDRESS_LOOKS: Final = 20


class Reconciler:
    """Checks all sites every `reconcile_interval` seconds, and soon after `look_soon`."""

    def __init__(self, context: Context, recovery: Recovery) -> None:
        self._context, self._recovery = context, recovery
        self._domains, self._caddy, self._sites = context.domains, context.caddy, context.sites
        self._register = context.register
        self._remote = context.remote
        self._moved = asyncio.Event()
        self._unplaced: frozenset[str] = frozenset()  # tenants whose sites have no address yet
        self._looks = 0  # one after another

    def look_soon(self) -> None:
        """Check now, or a moment after the last check, since something happened to a tenant."""
        self._moved.set()

    async def follow(self) -> None:
        """Reconcile forever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), self._context.settings.reconcile_interval)
            self._moved.clear()
            took = -time.monotonic()
            try:
                await self.reconcile()
            except GatewayError as error:
                log.warning("cannot reconcile the routes: %s", error.message)
            except Exception:
                log.exception("cannot reconcile the routes")
            took += time.monotonic()
            await asyncio.sleep(min(took * _REST, _REST_MOST))

    async def reconcile(self) -> None:
        """Recover unfinished deployments, correct the routes, and remove what belongs to no tenant."""
        await self._register.write_down()
        await self._recovery.recover_all()
        await self._anchor()
        with log_errors("what this member has of the cluster's domains"):
            await self._domains.agree()  # not while others wait for us to decide
        wanted = {} if self._remote is None else dict(await self._remote.wanted())
        left = await self._register.unfinished()
        async with self._domains.deciding(), self._caddy.changing:
            found = await self._sites.listed()
            serving = {
                site.tenant
                for site in found
                if site.exposure is not None and self._target(site.domain) == site.exposure.target
            }
            await self._domains.look(found, serving, left | self._register.running.keys())
            busy = self._domains.held()
            wanted |= {
                site.domain: asleep(site.exposure.target) if site.asleep else site.exposure.target
                for site in found
                if site.exposure is not None
                and site.deployment is None
                and self._domains.serves(site.domain, site.tenant)
            }
            changed = await asyncio.to_thread(self._caddy.reconcile, wanted, busy)
        self._look_again(found)
        if changed:
            log.info("corrected routes: %s", ", ".join(changed))
        for site in found:
            await self._remove_left(site)
        with log_errors("the removal of unneeded copies"):
            await self._sites.copies.tidy()
        if wanted or busy or self._remote is not None:
            await self._caddy.ensure()

    def _target(self, domain: str) -> str:
        """Return where a domain is routed now, asleep or not."""
        return (self._caddy.get(domain) or "").removeprefix(asleep(""))

    async def _remove_left(self, site: TenantSite) -> None:
        """Remove a site that was still being made when its gateway died."""
        if site.deployment is None or site.deployment in self._register.running:
            return
        with log_errors(f"the removal of what deployment {site.deployment} left"):
            with contextlib.suppress(NotFound):
                if (await self._register.get(site.deployment)).over:
                    await self._sites.remove(site.deployment)

    def _look_again(self, found: Sequence[TenantSite]) -> None:
        """Route visitors to a site that has just been started, once it has its address."""
        unplaced = frozenset(
            site.tenant
            for site in found
            if site.running and site.exposure is None and site.deployment is None and not site.shares_address
        )
        self._looks = self._looks + 1 if unplaced == self._unplaced else 0
        self._unplaced = unplaced
        if unplaced and self._looks < _ADDRESS_LOOKS:
            asyncio.get_running_loop().call_later(_ADDRESS_LOOK, self._moved.set)

    async def _anchor(self) -> None:
        """Give tenants with sites a fixed address, since the route of a sleeping one depends on it."""
        for site in await self._sites.listed():
            if site.loose and site.deployment is None:
                try:
                    await self._sites.anchor(site.tenant)
                except GatewayError as error:
                    log.warning("cannot give tenant %s a fixed address: %s", site.tenant, error.message)


_RETURNS: Final = 10.0  # seconds for which the others wait for a site that was started again


class Recovery:
    """Finishes deployments whose site was seen to work, and undoes all others."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def recover_all(self) -> None:
        """Recover every deployment whose gateway was killed. What cannot be recovered stays on record."""
        for record in await self._context.register.left():
            with log_errors(f"the recovery of deployment {record.id}"):
                await self.recover(record)

    async def recover(self, record: Record) -> None:
        """Finish one deployment, or undo it."""
        context, began = self._context, time.monotonic()
        progress = DeploymentEvents(record, context.bus, context.settings.install_log)
        try:
            if record.settled:
                await self._finish(record)
            else:
                await self._undo(record, progress)
            await context.register.end(record, progress, began - (time.time() - record.created))
        except GatewayError as error:
            log.warning("cannot undo deployment %s yet: %s", record.id, error.message)
        else:
            await self._release(record)

    async def _release(self, record: Record) -> None:
        """Let visitors go on that an update held, once its site answers, if it does soon."""
        caddy = self._context.caddy
        with contextlib.suppress(GatewayError, HostRefused, TimeoutError):
            site = await site_of(self._context.sites, record.tenant) if caddy.sleeps(record.domain) else None
            if site is not None and (where := site.exposure) is not None:
                await answer(where.address, where.port, site.health, _RETURNS, host=record.domain)
        caddy.release(record.domain)

    async def _finish(self, record: Record) -> None:
        """Clean up after a site that works: only its end was not recorded."""
        sites = self._context.sites
        order = Order(record.id, record.domain, Recipe(b"", (), record.port, record.health))
        if await self._context.is_there(record):
            await sites.finish(record.tenant, order)
            if record.kind == "update":
                await keep_replaced_site(self._context, record)
                await sites.clear(record.tenant)
        record.phases[-1].state = "done"

    async def _undo(self, record: Record, progress: DeploymentEvents) -> None:
        context = self._context
        if record.error is None:
            at = _at(record)
            record.error = {"code": "unavailable", "message": "the gateway ended", "phase": at}
            progress.tell("failed", {**phase_position(at), "error": record.error})
        record.enter("undoing")
        if record.kind == "create":
            if context.domains.serves(record.domain, record.tenant):
                context.caddy.unset(record.domain)
            await context.sites.remove(record.id)
        elif await context.is_there(record):
            await self._undo_update(record.tenant)
        for phase in record.phases:
            if phase.state in ("done", "running"):
                phase.state = "undone" if phase.state == "done" else "failed"

    async def _undo_update(self, tenant: str) -> None:
        """Undo an update in its container, and start that first if somebody has stopped it."""
        tenants, sites = self._context.runtime.tenants, self._context.sites
        async with self._context.use(tenant):
            stopped = (await tenants.get(tenant)).status != "running"
            if stopped:
                await tenants.start(tenant)
            try:
                await sites.unsettle(tenant)
                await sites.clear(tenant)
            finally:
                if stopped:
                    await tenants.stop(tenant)


def _at(record: Record) -> str:
    """Return the phase that a deployment had reached."""
    return next((phase.name for phase in record.phases if phase.state in ("running", "failed")), PHASES[0])
