"""Sites of the `local` runtime: a folder each, and a process on loopback that is restarted when it ends.

A site's process ends with the gateway and is started again with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import random
import shutil
import socket
import tarfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final

from gateway.bounds import aside
from gateway.errors import ExecFailed, GatewayError, NotFound, Unavailable
from gateway.runtime import ExecSpec, Process, Removal
from gateway.runtime.installs import failure
from gateway.runtime.listening import Listener, of_tree
from gateway.runtime.local import LocalRuntime
from gateway.runtime.local_folders import SiteFolders, before, recipe_of, started_by, unpack
from gateway.runtime.local_former import LocalFormerSites, remove
from gateway.runtime.sites import (
    ALLOWED,
    Exchange,
    Exposure,
    FormerSites,
    Life,
    Order,
    Prepared,
    PreparedCopies,
    Quiet,
    Recipe,
    Say,
    Service,
    Side,
    Site,
    Source,
    at_once,
    disk_was_full,
    lines,
)
from gateway.settings import Settings

log = logging.getLogger(__name__)

_TAIL: Final = 4000
_LOOK: Final = 5.0  # seconds for a look at its processes
_STAY: Final = (".git", ".gateway")  # stays with the live site in a rollback
_PAUSE: Final = 0.3  # seconds before an ended site is restarted, as in its systemd unit
_PORTS: Final = range(20_000, 32_000)  # below net.ipv4.ip_local_port_range


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
        self._services: dict[tuple[str, Side], _Service] = {}

    async def __aenter__(self) -> LocalSites:
        for site in await self.listed():
            recipe = recipe_of(self._folders.noted(site.tenant))
            if recipe is not None and site.deployment is None:
                await self.start(site.tenant, "live", recipe)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._services):
            await self._stop(*key)

    async def create(self, tenant: str, order: Order) -> Source:
        await self._runtime.make(tenant, order.domain, site={"deployment": order.deployment})
        await self._runtime.start(tenant)
        return "folder"

    async def remove(self, deployment: str) -> None:
        for tenant in await self._runtime.list():
            if self._folders.noted(tenant.name).get("deployment") != deployment:
                continue
            await self._stop(tenant.name, "live")
            if await self._runtime.remove(tenant.name, tenant.instance):
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
        process = await self._runtime.exec(tenant, spec)
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
        await self._stop(tenant, side)
        facts = self._folders.noted(tenant)
        env = facts.get(f"env_{side}", facts.get("env_live", {}))
        port = _free_port()
        told = {"PORT": str(port), "HOST": "127.0.0.1", "NODE_ENV": "development"}
        told = await self._allowed(tenant) | env | told
        spec = ExecSpec(recipe.command(port), cwd=str(self._folders.of(tenant, side)), env=told, merged=True)
        service = _Service(self._runtime, tenant, spec, port)
        await service.start()
        self._services[tenant, side] = service
        if side == "live":
            self._runtime.set_site(tenant, port=port)
            self._folders.note(tenant, **started_by(recipe))

    async def restart(self, tenant: str) -> None:
        service = self._services.get((tenant, "live"))
        if service is None:
            raise NotFound(f"tenant {tenant} has no site")
        await service.stop()
        service.told(await self._allowed(tenant))
        await service.start()

    async def allow(self, tenant: str, domain: str) -> None:
        return  # every start reads the tenant's domain

    async def _allowed(self, tenant: str) -> dict[str, str]:
        domain = (await self._runtime.get(tenant)).domain
        return {} if domain is None else {ALLOWED: domain}

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        service = self._services.get((tenant, side))
        if service is None:
            raise NotFound(f"the site of {tenant} is not running")
        return Exposure("127.0.0.1", service.port, f"127.0.0.1:{service.port}")

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"", how: Exchange = "update") -> None:
        live, following = (self._folders.of(tenant, side) for side in ("live", "next"))
        old, facts = self._folders.beside(tenant, "old"), self._folders.noted(tenant)
        if kept:
            self._folders.beside(tenant, "lasting").write_bytes(kept)
            if how == "rollback":
                await asyncio.to_thread(remove, following, kept.split(b"\0")[:-1])
            if how != "environment":
                await _carry(kept, live, following)
        if "before" not in facts:
            self._folders.note(tenant, before={**before(facts), "how": how})
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
            await self._stop(tenant, "live")

    async def clear(self, tenant: str) -> None:
        await self._stop(tenant, "next")
        self._former.put_back(tenant)
        for folder in (self._folders.of(tenant, "next"), self._folders.beside(tenant, "old")):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._folders.beside(tenant, "lasting").unlink(missing_ok=True)
        with contextlib.suppress(NotFound):
            self._folders.note(tenant, env_next=None, before=None, taken=None)

    async def finish(self, tenant: str, order: Order) -> None:
        self._runtime.set_site(tenant, domain=order.domain)
        self._folders.note(tenant, deployment=None, health=order.recipe.health)

    async def service(self, tenant: str, side: Side) -> Service | None:
        service = self._services.get((tenant, side))
        return None if service is None else await service.look()

    async def life(self, tenant: str, side: Side) -> Life | None:
        return None  # `service` costs nothing here

    async def listening(self, tenant: str) -> Collection[Listener]:
        service = await self.service(tenant, "live")
        return () if service is None else service.listens

    async def log(self, tenant: str, side: Side) -> str:
        service = self._services.get((tenant, side))
        return "" if service is None else service.said

    async def listed(self) -> Sequence[Site]:
        sites = []
        for tenant in await self._runtime.list():
            if tenant.domain is None:
                continue
            service = self._services.get((tenant.name, "live"))
            exposure = None
            if service is not None:
                exposure = Exposure("127.0.0.1", service.port, f"127.0.0.1:{service.port}")
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

    async def _stop(self, tenant: str, side: Side) -> None:
        service = self._services.pop((tenant, side), None)
        if service is not None:
            await service.stop()


async def _carry(kept: bytes, live: Path, following: Path) -> None:
    """Copy files that the live site has written, if they are newer."""
    words = ("-a", "--update", "--parents", f"--target-directory={following}", "--")
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


class _Service:
    """A site's process, restarted whenever it ends."""

    def __init__(self, runtime: LocalRuntime, tenant: str, spec: ExecSpec, port: int) -> None:
        self.port = port
        self._restarts, self._started = 0, 0.0
        self._process: Process | None = None  # while it runs
        self._runtime, self._tenant, self._spec = runtime, tenant, spec
        self._said = b""
        self._task: asyncio.Task[None] | None = None

    @property
    def said(self) -> str:
        """The end of its output."""
        return self._said.decode("utf-8", "replace")

    def told(self, env: Mapping[str, str]) -> None:
        """Add variables for its next start."""
        self._spec = replace(self._spec, env={**self._spec.env, **env})

    async def start(self) -> None:
        """Start it. Raises `ExecFailed` if it cannot be started at all."""
        self._restarts = 0
        process = await self._begin()
        self._task = asyncio.create_task(self._keep(process), name=f"site of {self._tenant}")

    async def look(self) -> Service:
        """Return its state; see `Service`."""
        process = self._process
        if process is None:
            return Service("ended", self._restarts, self._started)
        try:
            listens, cpu = await aside(self, _LOOK, of_tree, process.pid)
        except TimeoutError:
            listens, cpu = frozenset(), 0.0
        return Service("running", self._restarts, self._started, cpu=cpu, listens=listens)

    async def _begin(self) -> Process:
        process = self._process = await self._runtime.exec(self._tenant, self._spec)
        self._started = time.monotonic()
        return process

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self, process: Process) -> None:
        while True:
            try:
                while piece := await process.read("stdout"):
                    self._said = (self._said + piece[-_TAIL:])[-_TAIL:]
                await process.wait()
                self._process = None
            except asyncio.CancelledError:
                await asyncio.shield(process.kill(1.0))
                raise
            while True:
                await asyncio.sleep(_PAUSE)
                try:
                    process = await self._begin()
                    self._restarts += 1
                    break
                except NotFound:
                    return
                except GatewayError as error:
                    log.info("the site of %s cannot be started: %s", self._tenant, error.message)


def _free_port() -> int:
    """Return a free port outside of the kernel's range for outgoing connections.

    A site that finds its port taken would keep failing.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - as a site does
            return port
    raise Unavailable("this machine has no free port for a site")
