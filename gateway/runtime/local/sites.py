"""Sites of the `local` runtime: a folder each, and a process on loopback that is restarted when it ends.

A site's process ends with the gateway and is started again with the next one.

Each has a folder beside the workspace with its files and a record of how it was started.
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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.bounds import run_in_thread
from gateway.errors import ExecFailed, GatewayError, NotFound, Unavailable
from gateway.runtime import Commands, ExecSpec, Process, Removal
from gateway.runtime.listening import ListeningSocket, of_tree
from gateway.runtime.local.runtime import LocalRuntime
from gateway.runtime.sites import (
    ALLOWED,
    FORMER_ID,
    Exchange,
    Exposure,
    Former,
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
    SiteServices,
    Source,
    TenantSite,
    at_once,
    disk_was_full,
    failure,
    lines,
)
from gateway.settings import Settings

_RECIPE: Final = ("start", "port", "health", "keep", "template")


class SiteFolders:
    """The folders of each tenant's site: the live one and those beside it, and the file of facts."""

    def __init__(self, settings: Settings) -> None:
        self.home = settings.state_dir / "tenants"
        self._workspace = settings.workspace.lstrip("/")

    def of(self, tenant: str, side: Side) -> Path:
        return self._live(tenant) if side == "live" else self.beside(tenant, "next")

    def beside(self, tenant: str, what: str) -> Path:
        live = self._live(tenant)
        return live.with_name(f".{live.name}-{what}")

    def _live(self, tenant: str) -> Path:
        return (self.home / tenant / "root" / self._workspace).absolute()

    def noted(self, tenant: str) -> dict[str, Any]:
        return read(self.home / tenant / "site.json")

    def note(self, tenant: str, **facts: Any) -> None:
        """Update the facts about a site; None removes a fact. Raises `NotFound`."""
        path = self.home / tenant / "site.json"
        if not path.parent.is_dir():
            raise NotFound(f"no tenant {tenant}")
        write(path, {**self.noted(tenant), **facts})


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError:
        return {}
    return found


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write facts, which may contain secrets, atomically and readable only by the owner."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(orjson.dumps({name: value for name, value in facts.items() if value is not None}))
    new.replace(path)


def started_by(recipe: Recipe) -> dict[str, Any]:
    """Return the facts to record about how a site is started."""
    return {name: getattr(recipe, name) for name in _RECIPE}


def recipe_of(facts: dict[str, Any]) -> Recipe | None:
    """Return the recipe recorded in a site's facts, None if there is none."""
    if "start" not in facts:
        return None
    more = {name: facts[name] for name in ("health", "template") if name in facts}
    return Recipe(b"", tuple(facts["start"]), int(facts["port"]), keep=tuple(facts.get("keep", ())), **more)


def before(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts to save before a site is replaced."""
    return {name: facts.get(name) for name in (*_RECIPE, "env_live")}


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack below a folder and nowhere else. Raises `tarfile.TarError`."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    # Python has filters since 3.11.4
    top = folder.resolve()
    for member in tar:
        at = (top / member.name).resolve()
        leads = (at.parent / member.linkname).resolve() if member.issym() else at
        plain = member.isreg() or member.isdir() or member.issym()
        if not (plain and at.is_relative_to(top) and leads.is_relative_to(top)):
            raise tarfile.ExtractError(f"{member.name!r} is not a plain entry of the site's folder")
        tar.extract(member, top)


class LocalFormerSites:
    def __init__(self, folders: SiteFolders) -> None:
        self._folders = folders

    async def listed(self, tenant: str) -> Sequence[Former]:
        return await asyncio.to_thread(self._listed, tenant)

    async def live(self, tenant: str) -> tuple[str | None, Recipe | None]:
        facts = self._folders.noted(tenant)
        return facts.get("live"), recipe_of(facts)

    async def recipe(self, tenant: str, former: str) -> Recipe:
        recipe = recipe_of(self._facts(tenant, former))
        if recipe is None:
            raise _gone(tenant, former)
        return recipe

    async def environment(self, tenant: str) -> Mapping[str, str]:
        return dict(self._folders.noted(tenant).get("env_live") or {})

    async def take(self, tenant: str, former: str) -> None:
        facts = self._facts(tenant, former)
        kept = self._place(tenant, former) / "site"
        if not kept.is_dir():
            raise _gone(tenant, former)
        following = self._folders.of(tenant, "next")
        await asyncio.to_thread(shutil.rmtree, following, ignore_errors=True)
        self._folders.note(tenant, taken=former, env_next=facts.get("env_live") or {})
        kept.rename(following)

    def put_back(self, tenant: str) -> None:
        """Put a taken site that is still the next one back where it was kept."""
        taken = self._folders.noted(tenant).get("taken")
        if taken is None:
            return
        following, kept = self._folders.of(tenant, "next"), self._place(tenant, taken)
        if following.is_dir() and kept.is_dir() and not (kept / "site").exists():
            with contextlib.suppress(OSError):  # files copied from the live site do not belong to it
                remove(following, self._folders.beside(tenant, "lasting").read_bytes().split(b"\0")[:-1])
            following.rename(kept / "site")

    async def copy(self, tenant: str) -> None:
        return  # the next side is always a copy

    async def put(self, tenant: str, former: str, live: str, most: int) -> None:
        await asyncio.to_thread(self._put, tenant, former, live, most)

    def _put(self, tenant: str, former: str, live: str, most: int) -> None:
        noted = self._folders.noted(tenant)
        was = noted.get("before")
        if was is None:
            return
        if (taken := noted.get("taken")) is not None:
            self._folders.note(tenant, taken=None)
            shutil.rmtree(self._place(tenant, taken), ignore_errors=True)
        place = self._place(tenant, former)
        # if only the environment changed, the next side has a copy of the site's files
        source = self._folders.beside(tenant, "old")
        if not source.exists():
            source = self._folders.of(tenant, "next")
        if most > 0 and was.get("start") and source.exists():
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_what_lasts(tenant, source)
            shutil.rmtree(place / "site", ignore_errors=True)
            source.rename(place / "site")
            write(place / "facts.json", {**was, "replaced": time.time()})
        self._folders.note(tenant, live=live)
        for one in self._listed(tenant)[most:]:
            shutil.rmtree(self._place(tenant, one.id), ignore_errors=True)

    async def spare(self, tenant: str) -> bool:
        return await asyncio.to_thread(self._spare, tenant)

    def _spare(self, tenant: str) -> bool:
        kept = self._listed(tenant)
        if len(kept) < 2 or self._folders.noted(tenant).get("taken") is not None:
            return False
        shutil.rmtree(self._place(tenant, kept[-1].id), ignore_errors=True)
        return True

    def _remove_what_lasts(self, tenant: str, folder: Path) -> None:
        """Remove files that no rollback changes; those with "./" are not named by a manifest."""
        live, names = self._folders.of(tenant, "live"), [b".git", b".gateway"]
        names = [name for name in names if (live / os.fsdecode(name)).exists()]
        with contextlib.suppress(OSError):
            lasting = self._folders.beside(tenant, "lasting").read_bytes().split(b"\0")[:-1]
            names += [name for name in lasting if not name.startswith(b"./")]
        remove(folder, names)

    def _listed(self, tenant: str) -> list[Former]:
        try:
            names = [entry.name for entry in self._folders.beside(tenant, "kept").iterdir()]
        except OSError:
            return []
        found = [
            Former(name, float(self._facts(tenant, name).get("replaced", 0)))
            for name in names
            if FORMER_ID.fullmatch(name) and (self._place(tenant, name) / "site").is_dir()
        ]
        return sorted(found, key=lambda one: one.replaced, reverse=True)

    def _facts(self, tenant: str, former: str) -> dict[str, Any]:
        return read(self._place(tenant, former) / "facts.json")

    def _place(self, tenant: str, former: str) -> Path:
        return self._folders.beside(tenant, "kept") / former


def remove(folder: Path, names: Sequence[bytes]) -> None:
    """Remove the entries with these names in a folder."""
    for path in (folder / os.fsdecode(name) for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _gone(tenant: str, former: str) -> NotFound:
    return NotFound(f"tenant {tenant} no longer keeps deployment {former}", reason="not_kept")


log = logging.getLogger(__name__)

_TAIL: Final = 4000  # bytes of its output that are kept
_LOOK: Final = 5.0  # seconds for a look at its processes
_PAUSE: Final = 0.3  # seconds before an ended site is restarted, as in its systemd unit
_PORTS: Final = range(20_000, 32_000)  # below net.ipv4.ip_local_port_range


class LocalService:
    """A site's process, restarted whenever it ends."""

    def __init__(self, commands: Commands, tenant: str, spec: ExecSpec, port: int) -> None:
        self.port = port
        self._restarts, self._started = 0, 0.0
        self._process: Process | None = None  # while it runs
        self._commands, self._tenant, self._spec = commands, tenant, spec
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
            listens = await run_in_thread(self, _LOOK, of_tree, process.pid)
        except TimeoutError:
            listens = frozenset()
        return Service("running", self._restarts, self._started, listens=listens)

    async def _begin(self) -> Process:
        process = self._process = await self._commands.exec(self._tenant, self._spec)
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


def free_port() -> int:
    """Return a free port outside of the kernel's range for outgoing connections.

    A site that finds its port taken would keep failing.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - as a site does
            return port
    raise Unavailable("this machine has no free port for a site")


class LocalServices:
    """Implements `gateway.runtime.sites.SiteServices`."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, Side], LocalService] = {}

    async def close(self) -> None:
        for key in list(self._running):
            await self.stop(*key)

    def find(self, tenant: str, side: Side) -> LocalService | None:
        """Return a side's service if it was started."""
        return self._running.get((tenant, side))

    async def start(self, tenant: str, side: Side, service: LocalService) -> None:
        """Start a side's service. Raises `ExecFailed` if it cannot be started at all."""
        await service.start()
        self._running[tenant, side] = service

    async def stop(self, tenant: str, side: Side) -> None:
        """Stop a side's service if it was started."""
        service = self._running.pop((tenant, side), None)
        if service is not None:
            await service.stop()

    async def state(self, tenant: str, side: Side) -> Service | None:
        service = self.find(tenant, side)
        return None if service is None else await service.look()

    async def life(self, tenant: str, side: Side) -> Life | None:
        return None  # `state` costs nothing here

    async def report_end(self, tenant: str, ended: Callable[[], None]) -> bool:
        return False

    async def listening(self, tenant: str) -> Collection[ListeningSocket]:
        service = await self.state(tenant, "live")
        return () if service is None else service.listens

    async def log(self, tenant: str, side: Side) -> str:
        service = self.find(tenant, side)
        return "" if service is None else service.said


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

    async def listed(self) -> Sequence[TenantSite]:
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
                TenantSite(
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
