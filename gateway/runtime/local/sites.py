"""Sites of the `local` runtime: a folder each, and a process on loopback that is restarted when it ends.

A site's process ends with the gateway and is started again with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from gateway.errors import ExecFailed, NotFound, Unavailable
from gateway.runtime import ExecSpec, Removal
from gateway.runtime.installs import failure
from gateway.runtime.local.folders import SiteFolders, before, recipe_of, started_by, unpack
from gateway.runtime.local.former import LocalFormerSites, remove
from gateway.runtime.local.runtime import LocalRuntime
from gateway.runtime.local.service import LocalService, free_port
from gateway.runtime.local.site_services import LocalServices
from gateway.runtime.sites import (
    ALLOWED,
    Exchange,
    Exposure,
    FormerSites,
    Order,
    Prepared,
    PreparedCopies,
    Quiet,
    Recipe,
    Say,
    Side,
    Site,
    SiteServices,
    Source,
    at_once,
    disk_was_full,
    lines,
)
from gateway.settings import Settings

_STAY: Final = (".git", ".gateway")  # stays with the live site in a rollback


class _NoCopies:
    """Prepares no copies: creating a folder takes no longer."""

    def prepare(
        self, recipe: Recipe, prepared: Prepared, size: str = "small", quiet: Quiet = at_once
    ) -> None:
        prepared(None)

    async def tidy(self) -> None:
        return

    def leave(self) -> None:
        pass

    async def spare(self, wanted: int) -> int:
        return 0

    async def adopt(self, recipes: Sequence[Recipe]) -> None:
        return


class LocalSites:
    """The sites of the local runtime; see `gateway.runtime.sites.Sites`. Sizes are not enforced."""

    def __init__(self, settings: Settings, runtime: LocalRuntime) -> None:
        self._settings, self._runtime = settings, runtime
        self._folders = SiteFolders(settings)
        self._former = LocalFormerSites(self._folders)
        self.former: FormerSites = self._former
        self.copies: PreparedCopies = _NoCopies()
        self._services = LocalServices()
        self.services: SiteServices = self._services

    async def __aenter__(self) -> LocalSites:
        for site in await self.listed():
            recipe = recipe_of(self._folders.noted(site.tenant))
            if recipe is not None and site.deployment is None:
                await self.start(site.tenant, "live", recipe)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._services.close()

    async def create(self, tenant: str, order: Order) -> Source:
        await self._runtime.tenants.make(tenant, order.domain, site={"deployment": order.deployment})
        await self._runtime.tenants.start(tenant)
        return "folder"

    async def remove(self, deployment: str) -> None:
        for tenant in await self._runtime.tenants.list():
            if self._folders.noted(tenant.name).get("deployment") != deployment:
                continue
            await self._services.stop(tenant.name, "live")
            if await self._runtime.tenants.remove(tenant.name, tenant.instance):
                why = f"deployment {deployment} was undone"
                await self._runtime.removed(Removal(tenant.name, tenant.name, tenant.instance or "", why))

    async def anchor(self, tenant: str) -> None:
        return  # every site is on loopback

    async def push(
        self,
        tenant: str,
        side: Side,
        recipe: Recipe,
        env: Mapping[str, str] | None,
        lost: bytes = b"",
        how: Exchange = "update",
    ) -> None:
        folder = self._folders.of(tenant, side)

        def lay() -> None:
            if side == "next":
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(self._folders.of(tenant, "live"), folder, symlinks=True)
                remove(folder, lost.split(b"\0")[:-1])
            if recipe.archive:
                with tarfile.open(fileobj=io.BytesIO(recipe.archive)) as tar:
                    unpack(tar, folder)

        await asyncio.to_thread(lay)
        if env is not None:
            self._folders.note(tenant, **{f"env_{side}": dict(env)})

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        if not recipe.install:
            return
        spec = ExecSpec(recipe.install, cwd=str(self._folders.of(tenant, side)), env={"CI": "1"}, merged=True)
        process = await self._runtime.commands.exec(tenant, spec)
        try:
            async with asyncio.timeout(self._settings.install_timeout):
                said = await lines(process, say, self._settings.install_log, self._settings.install_output)
                exit_ = await process.wait()
        except BaseException:
            await asyncio.shield(process.kill(0))
            raise
        if exit_.code != 0 and disk_was_full(said):
            raise Unavailable("this machine's disk is full; make room on it", reason="disk_full")
        if exit_.code != 0:
            known = failure(exit_.code, said)
            raise ExecFailed(
                f"the install command ended with {exit_.code}: {said[-1000:]}",
                reason="install_failed",
                exit_code=exit_.code,
                **({} if known is None else known.facts),
            )

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        await self._services.stop(tenant, side)
        facts = self._folders.noted(tenant)
        env = facts.get(f"env_{side}", facts.get("env_live", {}))
        port = free_port()
        told = {"PORT": str(port), "HOST": "127.0.0.1", "NODE_ENV": "development"}
        told = await self._allowed(tenant) | env | told
        spec = ExecSpec(recipe.command(port), cwd=str(self._folders.of(tenant, side)), env=told, merged=True)
        service = LocalService(self._runtime.commands, tenant, spec, port)
        await self._services.start(tenant, side, service)
        if side == "live":
            self._runtime.tenants.set_site(tenant, port=port)
            self._folders.note(tenant, **started_by(recipe))

    async def restart(self, tenant: str) -> None:
        service = self._services.find(tenant, "live")
        if service is None:
            raise NotFound(f"tenant {tenant} has no site")
        await service.stop()
        service.told(await self._allowed(tenant))
        await service.start()

    async def allow(self, tenant: str, domain: str) -> None:
        return  # every start reads the tenant's domain

    async def _allowed(self, tenant: str) -> dict[str, str]:
        domain = (await self._runtime.tenants.get(tenant)).domain
        return {} if domain is None else {ALLOWED: domain}

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        service = self._services.find(tenant, side)
        if service is None:
            raise NotFound(f"the site of {tenant} is not running")
        return Exposure("127.0.0.1", service.port)

    async def halt(self, tenant: str) -> None:
        facts = self._folders.noted(tenant)
        if "before" not in facts:
            self._folders.note(tenant, before=before(facts) | {"how": "update"})
        for side in ("live", "next"):
            await self._services.stop(tenant, side)

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"", how: Exchange = "update") -> None:
        live, following = (self._folders.of(tenant, side) for side in ("live", "next"))
        old, facts = self._folders.beside(tenant, "old"), self._folders.noted(tenant)
        self._folders.note(tenant, before=facts["before"] | {"how": how})
        if kept:
            self._folders.beside(tenant, "lasting").write_bytes(kept)
            if how != "environment":
                await asyncio.to_thread(remove, following, kept.split(b"\0")[:-1])
            if how != "environment":
                await _carry(kept, live, following)
        if how != "environment":
            if following.exists() and not old.exists():
                live.rename(old)
            if following.exists() and not live.exists():
                following.rename(live)
        if how == "rollback":
            await asyncio.to_thread(_move, _STAY, old, live)
        if "env_next" in facts:
            self._folders.note(tenant, env_live=facts["env_next"], env_next=None)
        await self.start(tenant, "live", recipe)

    async def unsettle(self, tenant: str) -> None:
        live, following = (self._folders.of(tenant, side) for side in ("live", "next"))
        old, facts = self._folders.beside(tenant, "old"), self._folders.noted(tenant).get("before")
        if facts is None:
            return
        if old.exists():
            if live.exists():
                if facts["how"] == "rollback":
                    await asyncio.to_thread(_move, _STAY, live, old)
                await asyncio.to_thread(shutil.rmtree, following, ignore_errors=True)
                live.rename(following)
            old.rename(live)
        self._folders.note(tenant, **before(facts), before=None)
        if (recipe := recipe_of(facts)) is not None:
            await self.start(tenant, "live", recipe)
        else:
            await self._services.stop(tenant, "live")

    async def clear(self, tenant: str) -> None:
        await self._services.stop(tenant, "next")
        self._former.put_back(tenant)
        for folder in (self._folders.of(tenant, "next"), self._folders.beside(tenant, "old")):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._folders.beside(tenant, "lasting").unlink(missing_ok=True)
        with contextlib.suppress(NotFound):
            self._folders.note(tenant, env_next=None, before=None, taken=None)

    async def finish(self, tenant: str, order: Order) -> None:
        self._runtime.tenants.set_site(tenant, domain=order.domain)
        self._folders.note(tenant, deployment=None, health=order.recipe.health)

    async def listed(self) -> Sequence[Site]:
        sites = []
        for tenant in await self._runtime.tenants.list():
            if tenant.domain is None:
                continue
            service = self._services.find(tenant.name, "live")
            exposure = None
            if service is not None:
                exposure = Exposure("127.0.0.1", service.port)
            kept = self._folders.noted(tenant.name)
            sites.append(
                Site(
                    tenant.name,
                    tenant.domain,
                    tenant.status == "running",
                    exposure,
                    kept.get("deployment"),
                    kept.get("health", "/"),
                    tenant.asleep,
                    tenant.instance,
                    tenant.created,
                )
            )
        return sites


async def _carry(kept: bytes, live: Path, following: Path) -> None:
    """Copy files that the live site has written."""
    words = ("-a", "--parents", f"--target-directory={following}", "--")
    carrying = await asyncio.create_subprocess_exec(
        *("xargs", "--null", "cp", *words),
        cwd=live,
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await carrying.communicate(kept)  # files that appear or vanish meanwhile are no error


def _move(names: Sequence[str], source: Path, target: Path) -> None:
    """Move the entries with these names, if they exist, replacing any in the target."""
    for name in names:
        if (source / name).exists():
            remove(target, [os.fsencode(name)])
            (source / name).rename(target / name)
