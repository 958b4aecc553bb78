"""Takes the steps of a migration, each with its way back. Only the instance's keys say how far it is.

| state | the domain leads to | the workspace is |
|---|---|---|
| attaching, attached | the old service | the folder of the host, by a disk device |
| copied | the old service | the same; the copy lies beside it |
| switching | visitors wait | as before, then the copy |
| switched | the tenant | the tenant's own |
| returning | the old service | the tenant's own, then the folder again |

The next run goes on where a killed one stopped: it first takes back a switch that was not finished.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gateway.caddy import Caddy, asleep
from gateway.deployments.verify import SiteUnderTest, Verifier
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound
from gateway.host import HostError, Report
from gateway.host.caddy_service import CaddyService
from gateway.hostnames import DomainReserved, gateway_names, normalized, plain, reserved, tenant_name
from gateway.migration.destination import Destination, close_door
from gateway.migration.plan import ENDED, MigrationPlan, Moving, Wanted, decided, keys, scan
from gateway.migration.source import OldServices, Owner, Units, led, own_block
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import ASLEEP, FOLDER, MIGRATION_STATE
from gateway.runtime.incus.service_unit import environment_file
from gateway.runtime.listening import drained
from gateway.runtime.probe import answer
from gateway.runtime.sites import Exposure
from gateway.runtime.sizes import SIZES
from gateway.settings import Settings
from gateway.tasks import whole

STEPS: Final = ("attach", "copy", "switch", "finish")
_DONE: Final[Mapping[str, int]] = {"attached": 1, "copied": 2, "switched": 3}
_LEAVE: Final = ("/proc", "/sys", "/dev", "/run", "/tmp")  # noqa: S108 - what no site lies in, here or inside


class Migration:
    """The migrations of one host's sites into one gateway's tenants."""

    def __init__(
        self,
        settings: Settings,
        runtime: IncusRuntime,
        sites: IncusSites,
        caddy: Caddy,
        units: Units,
        say: Report,
    ) -> None:
        self._settings, self._runtime, self._sites, self._caddy = settings, runtime, sites, caddy
        self._say = say
        self._old = OldServices(units)
        self._there = Destination(settings, runtime)
        self._verifier = Verifier(sites.services, caddy, settings)

    # --- what the operator asks ---------------------------------------------------------------------

    async def plan(self, domain: str, wanted: Wanted) -> MigrationPlan:
        """Look at a folder and its service; change nothing."""
        domain, tenant = self._names(domain)
        folder = await asyncio.to_thread(_real, wanted.folder)
        owner = folder.stat()
        old = await asyncio.to_thread(self._old.find, folder, wanted.unit, wanted.port, wanted.env)
        found = await asyncio.to_thread(scan, folder, frozenset(wanted.leave))
        with translated(""):
            pool = await self._runtime.incus.get(f"/1.0/storage-pools/{self._settings.pool}")
        asked = replace(wanted, folder=folder)
        return decided(
            *(tenant, domain, asked, old, found, Owner(owner.st_uid, owner.st_gid), self._settings),
            own_block=await asyncio.to_thread(self._own_block, domain),
            driver=str(pool["driver"]),
        )

    async def forward(self, domain: str, wanted: Wanted | None, until: str) -> str:
        """Go on to a step, from wherever the migration stands; return its state, "" once it is finished."""
        domain, tenant = self._names(domain)
        found = await self._there.instance(tenant)
        if found is None or not found["config"].get(MIGRATION_STATE):
            if wanted is None:
                raise NotFound(f"no migration of {domain} is under way; start one with --from FOLDER")
            await self._begin(await self._beginnable(domain, tenant, wanted, found))
        elif wanted is not None and str(_real(wanted.folder)) != found["config"].get(FOLDER):
            raise Conflict(
                f"{domain} is already moving from {found['config'].get(FOLDER)}; continue without --from"
            )
        moving = await self._settled(tenant)
        for number, step in enumerate(STEPS[: STEPS.index(until) + 1], 1):
            if _DONE.get(moving.state, 0) < number:
                began = time.monotonic()
                await getattr(self, f"_{step}")(moving)
                self._say(f"{step}: done after {time.monotonic() - began:.1f} s")
                if step == "finish":
                    return ""
                moving = await self._there.moving(tenant)
        return moving.state

    async def back(self, domain: str, *, sure: bool) -> str:
        """Undo the last step; return the state, "" if nothing of the migration is left.

        Raises `Conflict` if something would be lost that nothing else has, unless `sure`.
        """
        moving = await self._there.moving(self._names(domain)[1])
        match moving.state:
            case "attaching" | "attached":
                await self._forget(moving, sure)
                return ""
            case "copied":
                await self._sites.clear(moving.tenant)
                await self._there.change(moving.tenant, {MIGRATION_STATE: "attached"})
            case _:
                await self._return(moving)
        return (await self._there.moving(moving.tenant)).state

    # --- attach -------------------------------------------------------------------------------------

    async def _beginnable(
        self, domain: str, tenant: str, wanted: Wanted, found: Mapping[str, Any] | None
    ) -> MigrationPlan:
        if found is not None:
            raise Conflict(f"tenant {tenant} already exists; a site can only move into a new one")
        for other in await self._runtime.tenants.list():
            if plain(other.domain) == domain:
                raise Conflict(f"{domain} belongs to tenant {other.name}; take it from that one first")
        plan = await self.plan(domain, wanted)
        if plan.stops:
            raise Conflict("this folder cannot be moved yet: " + "; ".join(plan.stops))
        return plan

    async def _begin(self, plan: MigrationPlan) -> None:
        """Create the tenant, stopped: from now on it is in Incus, and its domain leads to the old service."""
        making, devices, size = self._runtime.making, {}, SIZES[plan.wanted.size]
        if "disk" in size:
            root = (await making.profile())["devices"]["root"]
            devices["root"] = {**root, "size": size["disk"]}
        source = {"type": "image", "alias": self._settings.image}
        async with making.undone("the migration could not begin") as identity:
            await making.make(plan.tenant, source, keys(plan), devices, start=False, identity=identity)

    async def _attach(self, moving: Moving) -> None:
        await self._there.show_folder(moving)
        folder = str(moving.folder)
        if not folder.startswith(tuple(f"{place}/" for place in _LEAVE)):
            await self._there.run(moving.tenant, "link", self._settings.workspace, folder)
        await led(self._caddy, moving.domain, moving.old)
        await self._there.change(moving.tenant, {MIGRATION_STATE: "attached"})

    async def _forget(self, moving: Moving, sure: bool) -> None:
        domain, tenant = moving.domain, moving.tenant
        instance = await self._runtime.making.instance(tenant)
        if not sure and not await asyncio.to_thread(self._own_block, domain) and self._caddy.get(domain):
            raise Conflict(
                "visitors may reach the old service through the gateway's route, which is removed with the "
                f"tenant: first make your Caddy serve {domain} itself (reverse_proxy {moving.old}), then "
                "give --yes"
            )
        if not sure and instance["status"] == "Running":
            kept = await self._there.kept(tenant)
            if kept:
                raise Conflict(
                    "the tenant has files that were written since a switch and are not in the folder: "
                    f"{kept}; copy them out (incus file pull), then give --yes"
                )
        await self._runtime.making.destroy(tenant, instance["config"].get("volatile.uuid", ""))
        await asyncio.to_thread(close_door, self._there.place(instance))

    # --- copy ---------------------------------------------------------------------------------------

    async def _copy(self, moving: Moving) -> None:
        """Copy the folder, and check that the copy's site answers next to the old one, unseen by visitors."""
        tenant, recipe = moving.tenant, moving.recipe
        await self._there.mirror(moving)
        old = await asyncio.to_thread(self._old.find, moving.folder, moving.unit, recipe.port, moving.env)
        await self._there.run(tenant, "keep", given=environment_file(old.environment).encode())
        if recipe.install:
            await self._sites.install(tenant, "next", recipe, lambda line: self._say(f"  {line}"))
        try:
            await self._sites.start(tenant, "next", recipe)
            address = (await self._runtime.tenants.get(tenant)).address or ""
            there = Exposure(address, recipe.port)
            await self._verifier.answering(SiteUnderTest(tenant, "next", moving.domain, recipe, there))
        finally:
            await self._there.run(tenant, "rest")
        await self._there.change(tenant, {MIGRATION_STATE: "copied"})

    # --- switch -------------------------------------------------------------------------------------

    async def _switch(self, moving: Moving) -> None:
        tenant, domain, recipe = moving.tenant, moving.domain, moving.recipe
        await led(self._caddy, domain, moving.old)
        if await asyncio.to_thread(self._own_block, domain):
            raise Conflict(
                f"Caddy has its own block for {domain}, which takes precedence over the gateway's routes; "
                "comment it out and reload Caddy: visitors then reach the old service through the gateway's "
                "route. Then run this again"
            )
        await self._there.mirror(moving)  # what has changed since; the last pass has little left to do
        exposure = await self._sites.expose(tenant, "live", recipe)
        await self._there.change(tenant, {MIGRATION_STATE: "switching", ASLEEP: "true"})
        began = time.monotonic()
        try:
            await self._exchange(moving, exposure)
            await self._verifier.answering(SiteUnderTest(tenant, "live", domain, recipe, exposure))
        except BaseException as error:
            self._say("the switch is undone: the old service is started again")
            try:
                await whole(self._return(moving))
            except GatewayError as failed:
                self._say(f"this is not finished: {failed.message}; run the command again")
            if isinstance(error, TimeoutError):
                raise HostError(
                    "the last pass of the copy took too long; the old service keeps running"
                ) from error
            raise
        await self._there.change(tenant, {MIGRATION_STATE: "switched", ASLEEP: ""})
        await led(self._caddy, domain, exposure.target)
        self._say(f"  visitors waited {time.monotonic() - began:.2f} s at most; none was refused")
        await self._switched(moving)

    async def _exchange(self, moving: Moving, exposure: Exposure) -> None:
        """Stop the old service and start the copy, while visitors wait in Caddy for the gateway."""
        await led(self._caddy, moving.domain, asleep(exposure.target))
        if not await drained(*moving.listens):
            self._say("  clients that waited for the old service, or had a websocket, were disconnected")
        began = time.monotonic()
        await asyncio.to_thread(self._old.pause, moving.folder, moving.unit, moving.recipe.port)
        await self._there.mirror(moving)
        await self._there.move_in(moving.tenant)
        await self._sites.start(moving.tenant, "live", moving.recipe)
        self._say(
            f"  the old service was paused for {time.monotonic() - began:.2f} s until the copy was started"
        )

    async def _switched(self, moving: Moving) -> None:
        """Do what is left once the domain leads to the tenant. Idempotent."""
        self._old.let_go(moving.folder, moving.unit)
        await self._there.hide_folder(moving.tenant)
        await self._sites.clear(moving.tenant)

    async def _return(self, moving: Moving) -> None:
        """Have the old service serve again, and the folder be the workspace; what the tenant wrote stays."""
        tenant, health = moving.tenant, moving.recipe.health
        await asyncio.to_thread(self._old.resume, moving.folder, moving.unit)
        try:
            await answer(*moving.listens, health, self._settings.verify_timeout)
        except TimeoutError:
            if moving.state == "switched":
                raise HostError(
                    "the old service does not answer; the tenant keeps serving. Repair the old one, then "
                    "give --back"
                ) from None
        await self._there.change(tenant, {MIGRATION_STATE: "returning", ASLEEP: ""})
        await led(self._caddy, moving.domain, moving.old)
        if not await self._there.shows_folder(tenant):
            await self._runtime.tenants.start(tenant)
            kept = await self._there.move_out(tenant)
            if kept:
                self._say(f"  what the tenant had since the switch is kept in it as {kept}")
        await self._there.show_folder(moving)
        await self._there.change(tenant, {MIGRATION_STATE: "attached"})

    # --- finish -------------------------------------------------------------------------------------

    async def _finish(self, moving: Moving) -> None:
        exposure = await self._sites.expose(moving.tenant, "live", moving.recipe)
        await self._verifier.seen(
            SiteUnderTest(moving.tenant, "live", moving.domain, moving.recipe, exposure)
        )
        await self._switched(moving)
        await asyncio.to_thread(self._old.disable, moving.unit)
        await self._there.change(moving.tenant, ENDED)
        self._say(f"  {moving.folder} is as the old service left it, and yours")

    # --- what all need ------------------------------------------------------------------------------

    async def _settled(self, tenant: str) -> Moving:
        """Return a migration once what a killed run left half done is taken back."""
        moving = await self._there.moving(tenant)
        if moving.state in ("switching", "returning"):
            self._say("an earlier run was interrupted; it is undone first")
            await self._return(moving)
        elif moving.state in ("attached", "copied"):
            await self._there.show_folder(moving)  # the host may have been rebooted
        elif moving.state == "switched":
            await self._switched(moving)
        return await self._there.moving(tenant)

    def _names(self, domain: str) -> tuple[str, str]:
        domain = normalized(domain)
        if reserved(domain, gateway_names(self._settings)):
            raise DomainReserved(domain)
        return domain, tenant_name(domain)

    def _own_block(self, domain: str) -> bool:
        return own_block(CaddyService(self._settings).running(), domain, str(self._caddy.routes))


def _real(folder: Path) -> Path:
    """Return a folder by its real path. Raises `InvalidParams` if it is none that could be moved."""
    try:
        real = folder.resolve(strict=True)
    except OSError as error:
        raise InvalidParams(f"{folder} cannot be opened: {error.strerror}", field="from") from error
    if not real.is_dir() or len(real.parts) < 3 or str(real).startswith(("/proc/", "/sys/", "/dev/")):
        raise InvalidParams(f"{folder} is not the folder of a site", field="from")
    return real
