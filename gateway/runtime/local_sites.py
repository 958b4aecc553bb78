"""Make sites of the `local` runtime: a folder each, and a process on loopback that is started again.

Which port a site has is in its tenant's folder; its process ends with the gateway and comes again with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import shutil
import socket
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.bounds import aside
from gateway.errors import ExecFailed, GatewayError, NotFound, Unavailable
from gateway.runtime import ExecSpec, Process, Removal
from gateway.runtime.listening import of_tree
from gateway.runtime.local import LocalRuntime
from gateway.runtime.sites import (
    ALLOWED,
    Exposure,
    Order,
    Prepared,
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
_LOOK: Final = 5.0  # seconds of a look at its processes
_PAUSE: Final = 0.3  # seconds before a site that ended is started again, as in its systemd unit


class LocalSites:
    """The sites of the local runtime; see `gateway.runtime.sites.Sites`. No size is enforced here."""

    def __init__(self, settings: Settings, runtime: LocalRuntime) -> None:
        self._settings, self._runtime = settings, runtime
        self._home = settings.state_dir / "tenants"
        self._services: dict[tuple[str, Side], _Service] = {}

    async def __aenter__(self) -> LocalSites:
        for site in await self.listed():
            kept = self._kept(site.tenant)
            if "start" in kept and site.deployment is None:
                recipe = Recipe(b"", tuple(kept["start"]), int(kept["port"]))
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
            if self._kept(tenant.name).get("deployment") != deployment:
                continue
            await self._stop(tenant.name, "live")
            if await self._runtime.remove(tenant.name, tenant.instance):
                why = f"deployment {deployment} was undone"
                await self._runtime.removed(Removal(tenant.name, tenant.name, tenant.instance or "", why))

    async def anchor(self, tenant: str) -> None:
        return  # every site is on loopback

    async def push(
        self, tenant: str, side: Side, recipe: Recipe, env: Mapping[str, str] | None, lost: bytes = b""
    ) -> None:
        folder = self._folder(tenant, side)

        def lay() -> None:
            if side == "next":
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(self._folder(tenant, "live"), folder, symlinks=True)
                for path in (folder / os.fsdecode(name) for name in lost.split(b"\0")[:-1]):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            with tarfile.open(fileobj=io.BytesIO(recipe.archive)) as tar:
                tar.extractall(folder, filter="data")

        await asyncio.to_thread(lay)
        if env is not None:
            self._keep(tenant, **{f"env_{side}": dict(env)})

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        if not recipe.install:
            return
        spec = ExecSpec(recipe.install, cwd=str(self._folder(tenant, side)), env={"CI": "1"}, merged=True)
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
            raise ExecFailed(
                f"the install command ended with {exit_.code}: {said[-1000:]}", reason="install_failed"
            )

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        await self._stop(tenant, side)
        env = self._kept(tenant).get(f"env_{side}") or self._kept(tenant).get("env_live") or {}
        port = _free_port()
        told = {"PORT": str(port), "HOST": "127.0.0.1", "NODE_ENV": "development"}
        told = await self._allowed(tenant) | env | told
        spec = ExecSpec(recipe.command(port), cwd=str(self._folder(tenant, side)), env=told, merged=True)
        service = _Service(self._runtime, tenant, spec, port)
        await service.start()
        self._services[tenant, side] = service
        if side == "live":
            self._runtime.set_site(tenant, port=port)
            self._keep(tenant, start=list(recipe.start), port=recipe.port)

    async def restart(self, tenant: str) -> None:
        service = self._services.get((tenant, "live"))
        if service is None:
            raise NotFound(f"tenant {tenant} has no site")
        await service.stop()
        service.told(await self._allowed(tenant))
        await service.start()

    async def allow(self, tenant: str, domain: str) -> None:
        return  # every start looks at what the tenant carries

    async def _allowed(self, tenant: str) -> dict[str, str]:
        domain = (await self._runtime.get(tenant)).domain
        return {} if domain is None else {ALLOWED: domain}

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        service = self._services.get((tenant, side))
        if service is None:
            raise NotFound(f"the site of {tenant} does not run")
        return Exposure("127.0.0.1", service.port, f"127.0.0.1:{service.port}")

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"") -> None:
        live, next_, old = self._folder(tenant, "live"), self._folder(tenant, "next"), self._old(tenant)
        if kept:
            carrying = await asyncio.create_subprocess_exec(
                *(
                    "xargs",
                    "--null",
                    "cp",
                    "-a",
                    "--update",
                    "--parents",
                    f"--target-directory={next_}",
                    "--",
                ),
                cwd=live,
                stdin=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            await carrying.communicate(kept)  # what goes or comes meanwhile is nobody's fault
        if next_.exists() and not old.exists():
            live.rename(old)
        if next_.exists() and not live.exists():
            next_.rename(live)
        facts = self._kept(tenant)
        if "env_next" in facts:
            self._keep(tenant, env_old=facts.get("env_live"), env_live=facts.pop("env_next"))
        self._keep(tenant, start_old=facts.get("start"), port_old=facts.get("port"))
        await self.start(tenant, "live", recipe)

    async def unsettle(self, tenant: str) -> None:
        live, next_, old = self._folder(tenant, "live"), self._folder(tenant, "next"), self._old(tenant)
        if not old.exists():
            return
        if live.exists():
            shutil.rmtree(next_, ignore_errors=True)
            live.rename(next_)
        old.rename(live)
        kept = self._kept(tenant)
        if "env_old" in kept:
            self._keep(tenant, env_live=kept["env_old"])
        if kept.get("start_old"):
            await self.start(tenant, "live", Recipe(b"", tuple(kept["start_old"]), int(kept["port_old"])))
        else:
            await self._stop(tenant, "live")

    async def clear(self, tenant: str) -> None:
        await self._stop(tenant, "next")
        for folder in (self._folder(tenant, "next"), self._old(tenant)):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        with contextlib.suppress(NotFound):
            self._keep(tenant, env_next=None, env_old=None, start_old=None, port_old=None)

    async def finish(self, tenant: str, order: Order) -> None:
        self._keep(tenant, deployment=None, domain=order.domain, health=order.recipe.health)

    async def service(self, tenant: str, side: Side) -> Service | None:
        service = self._services.get((tenant, side))
        return None if service is None else await service.look()

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
            kept = self._kept(tenant.name)
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

    def prepare(
        self, recipe: Recipe, prepared: Prepared, size: str = "small", quiet: Quiet = at_once
    ) -> None:
        prepared(None)  # a folder is made as fast as it could be prepared

    async def tidy(self) -> None:
        return

    async def spare(self, wanted: int) -> int:
        return 0

    async def adopt(self, recipes: Sequence[Recipe]) -> None:
        return

    async def _stop(self, tenant: str, side: Side) -> None:
        service = self._services.pop((tenant, side), None)
        if service is not None:
            await service.stop()

    def _folder(self, tenant: str, side: Side) -> Path:
        live = self._home / tenant / "root" / self._settings.workspace.lstrip("/")
        return (live if side == "live" else live.with_name(f".{live.name}-next")).absolute()

    def _old(self, tenant: str) -> Path:
        live = self._folder(tenant, "live")
        return live.with_name(f".{live.name}-old")

    def _kept(self, tenant: str) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = orjson.loads((self._home / tenant / "site.json").read_bytes())
        except OSError:
            return {}
        return kept

    def _keep(self, tenant: str, **facts: Any) -> None:
        if "domain" in facts:
            self._runtime.set_site(tenant, domain=facts.pop("domain"))
        kept = {name: value for name, value in {**self._kept(tenant), **facts}.items() if value is not None}
        path = self._home / tenant / "site.json"
        if not path.parent.is_dir():
            raise NotFound(f"no tenant {tenant}")
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(orjson.dumps(kept))
        new.replace(path)


class _Service:
    """A site's process, started again whenever it ends."""

    def __init__(self, runtime: LocalRuntime, tenant: str, spec: ExecSpec, port: int) -> None:
        self.port = port
        self._restarts, self._started = 0, 0.0
        self._process: Process | None = None  # that runs
        self._runtime, self._tenant, self._spec = runtime, tenant, spec
        self._said = b""
        self._task: asyncio.Task[None] | None = None

    @property
    def said(self) -> str:
        """The end of what it printed."""
        return self._said.decode("utf-8", "replace")

    def told(self, env: Mapping[str, str]) -> None:
        """Have its next start know more."""
        self._spec = replace(self._spec, env={**self._spec.env, **env})

    async def start(self) -> None:
        """Start it; raises `ExecFailed` where it cannot be started at all."""
        self._restarts = 0
        process = await self._begin()
        self._task = asyncio.create_task(self._keep(process), name=f"site of {self._tenant}")

    async def look(self) -> Service:
        """Return how it does; see `Service`."""
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
