"""Finish or undo the deployments that a killed gateway left half done."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Final

from gateway.deployments.context import Context
from gateway.deployments.former import keep_former
from gateway.deployments.progress import Progress, place
from gateway.deployments.record import PHASES, Record
from gateway.errors import GatewayError
from gateway.events import Bus
from gateway.runtime.probe import HostRefused, answer
from gateway.runtime.sites import Order, Recipe, site_of
from gateway.tasks import log_errors

_RETURNS: Final = 10.0  # seconds for which the others wait for a site that was started again

log = logging.getLogger(__name__)


class Recovery:
    """Finishes deployments whose site was seen to work, and undoes all others."""

    def __init__(self, context: Context, bus: Bus) -> None:
        self._context, self._bus = context, bus

    async def recover_all(self) -> None:
        """Recover every deployment that nobody runs any more. What cannot be done yet stays on record."""
        for record in await self._context.register.left():
            with log_errors(f"the recovery of deployment {record.id}"):
                await self.recover(record)

    async def recover(self, record: Record) -> None:
        """Finish one deployment, or undo it."""
        context, began = self._context, time.monotonic()
        progress = Progress(record, self._bus, context.settings.install_log)
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
                await keep_former(self._context, record)
                await sites.clear(record.tenant)
        record.phases[-1].state = "done"

    async def _undo(self, record: Record, progress: Progress) -> None:
        context = self._context
        if record.error is None:
            at = _at(record)
            record.error = {"code": "unavailable", "message": "the gateway ended", "phase": at}
            progress.tell("failed", {**place(at), "error": record.error})
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
