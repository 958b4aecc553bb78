"""Run tenants as Incus system containers.

Incus is the database: the set of tenants and their state, domain and port are read from it. An instance is a
tenant if `user.gateway.managed` is true in its expanded configuration, as set by the tenants' profile; the
gateway ignores all others. Only the state of a tenant's disks and its init pid are cached, as long as the
event stream, which would report a change, is connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from gateway.errors import Conflict, NotFound, Unavailable
from gateway.holder.holder import Holder
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.disk_limits import DiskLimits
from gateway.rootfs.locations import MANAGED, Instances, is_tenant
from gateway.runtime import (
    Adopted,
    ExecSpec,
    Process,
    Removed,
    Snapshot,
    Space,
    Tenant,
    TenantEvent,
    unheard,
)
from gateway.runtime.incus.clusters import REASON, clustered, serving
from gateway.runtime.incus.commands import Commands
from gateway.runtime.incus.creation import Creation, identity_of
from gateway.runtime.incus.disks import Disks, inherited
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.moves import Moves
from gateway.runtime.incus.records import (
    ASLEEP,
    PORT,
    disk_state,
    domain_config,
    lacks_address,
    metrics_of,
    tenant_of,
)
from gateway.runtime.incus.resizing import Resizing
from gateway.runtime.incus.watch import Watch
from gateway.runtime.visits import Place, visited
from gateway.settings import Settings
from gateway.tasks import apart

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Located:
    """What is cached of a tenant while the event stream is connected."""

    root: FilesystemRoot
    init_pid: int


class IncusRuntime:
    """The `TenantRuntime` of one Incus project, composed of its parts. An async context manager."""

    def __init__(
        self,
        settings: Settings,
        removed: Removed = unheard,
        incus: Incus | None = None,
        holder: Holder | None = None,
    ) -> None:
        self._settings = settings
        self._incus = incus or Incus(settings.incus_socket, settings.incus_project, settings.incus_timeout)
        instances = Instances.of(settings)
        self._disk_limits = DiskLimits(settings.broker_socket, instances)
        self.making = Creation(settings, self._incus, removed, self._disk_limits.limit)
        self.tenants: Mapping[str, Any] = instances.to_dict()
        self._located: dict[str, _Located] = {}
        self._watch = Watch(settings, self._incus, self, self._changed)
        self.commands = Commands(settings, self._incus, self.init_pid, holder)
        self._disks = Disks(settings, self._incus)
        self._resizing = Resizing(settings, self._incus, self.making, self.commands)
        self.moves = Moves(settings, self._incus, self.making)
        self.check: Callable[[str], None] = lambda tenant: None
        """Raises `Unavailable` for a tenant of which nothing may run here now."""

    @property
    def incus(self) -> Incus:
        """The client of the Incus API that this runtime uses."""
        return self._incus

    async def __aenter__(self) -> IncusRuntime:
        await self._incus.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.commands.aclose()
        await self._disk_limits.aclose()
        await self._incus.__aexit__(kind, error, trace)

    # --- tenants ------------------------------------------------------------------------------------

    async def list(self, *, addresses: bool = True) -> list[Tenant]:
        with translated(""):
            instances = await self._incus.instances(state=lacks_address if addresses else None)
        return [tenant_of(instance) for instance in instances if is_tenant(instance)]

    async def get(self, name: str) -> Tenant:
        with translated(name):
            instance = await self._incus.instance(name, state=lacks_address)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return tenant_of(instance)

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        await self.making.free(name)
        source = {"type": "image", "alias": self._settings.image}
        config = {} if domain is None else domain_config(domain)
        async with self.making.undone("it could not be created") as identity:
            await self.making.make(name, source, config, {}, start=start, identity=identity)
            return await self._made(name, identity)

    async def start(self, name: str) -> None:
        tenant = await self.get(name)
        self.check(name)
        if tenant.status == "frozen":
            await self._state(name, "unfreeze")
        elif tenant.status != "running":
            await self.making.limited(name)
            await self._state(name, "start")
            await self.making.limited(name)

    async def stop(self, name: str) -> None:
        tenant = await self.get(name)
        if tenant.status == "stopped":
            return
        if tenant.status == "frozen":  # a frozen init cannot shut down
            await self._state(name, "stop", force=True)
            return
        await self._disk_limits.limit(name, ending=True)
        try:
            await self._state(name, "stop")
        except Unavailable:  # it does not shut down cleanly; or it has, and Incus could not tidy a full disk
            if (await self.get(name)).status != "stopped":
                await self._state(name, "stop", force=True)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        with translated(name):
            # an empty value removes the key in Incus
            await self._operate("PATCH", instance_path(name), {"config": {ASLEEP: "true" if asleep else ""}})

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        places = {}
        for tenant in tenants:
            if tenant.port is not None:
                with contextlib.suppress(NotFound):
                    pid = await self.init_pid(tenant.name)
                    places[tenant.name] = Place(tenant.port, tenant.address, pid or None)
        return await asyncio.to_thread(visited, places)

    async def destroy(self, name: str) -> None:
        instance = await self._instance(name)
        try:
            await self.making.destroy(name, identity_of(instance))
        finally:
            self._changed(name)

    async def rename(self, name: str, domain: str | None) -> None:
        await self.get(name)
        with translated(name):
            await self._operate("PATCH", instance_path(name), {"config": domain_config(domain)})

    async def resize(self, name: str, size: str) -> None:
        await self.get(name)
        try:
            await self._resizing.resize(name, size)
        finally:
            self._changed(name)

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> Tenant:
        source = await self._instance(name)
        if snapshot is not None:
            await self._disks.fits(source, snapshot)
        await self.making.free(new)
        config = {MANAGED: "true", **domain_config(domain), PORT: source["expanded_config"].get(PORT, "")}
        config |= inherited(source, await self.making.limited(name))
        async with self.making.undone(f"the clone of {name} failed") as identity:
            copy = self._disks.copy_of(source, snapshot)
            await self.making.make(
                new,
                copy.source,
                copy.unset | config,
                copy.devices,
                start=False,
                identity=identity,
                profiles=copy.profiles,
            )
            await self._made(new, identity)
            await self._disks.blank(new)
            await self.start(new)
            return await self._made(new, identity)

    async def snapshots(self, name: str) -> Sequence[Snapshot]:
        await self.get(name)
        return await self._disks.snapshots(name)

    async def snapshot(self, name: str, snapshot: str) -> Snapshot:
        await self.get(name)
        return await self._disks.snapshot(name, snapshot)

    async def restore(self, name: str, snapshot: str) -> None:
        ran = (await self.get(name)).status != "stopped"
        await self._disks.fits(await self._instance(name), snapshot)  # check before stopping it
        await self.stop(name)
        try:
            await self.making.limited(name)
            await self._disks.restore(name, snapshot)
            await self._disk_limits.free()  # or what it held keeps a full one from starting
            await self.making.limited(name)  # in any case: its files can be written while it is stopped
        finally:
            self._changed(name)
            if ran:
                await self.start(name)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await self.get(name)
        await self._disk_limits.limit(name, ending=True)  # Incus needs some room for it on a full disk
        await self._disks.delete(name, snapshot)
        await self._disk_limits.free()
        await self.making.limited(name)

    async def held(self, name: str) -> int | None:
        return await self.making.limited(name)

    async def unshared(self, name: str) -> int | None:
        disk = ((await self._instance(name))["state"].get("disk") or {}).get("root") or {}
        usage: int | None = disk.get("usage")
        return usage

    async def space(self) -> Space | None:
        try:
            found = await self._incus.get(f"/1.0/storage-pools/{self._settings.pool}/resources")
        except IncusError as error:
            log.warning("cannot find out how full the storage pool is: %s", error)
            return None
        return Space(int(found["space"]["total"]), int(found["space"]["used"]))

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        argv = ["journalctl", "--unit=site.service", f"--lines={lines}", "--output=short-iso", "--quiet"]
        argv += ["--no-pager", "--no-hostname", "--all", *(["--follow"] if follow else [])]
        return ExecSpec(tuple(argv), user="root")

    async def filesystem(self, name: str) -> FilesystemRoot:
        return (await self._locate(name)).root

    async def metrics(self, name: str) -> Mapping[str, Any]:
        instance = await self._instance(name)
        return metrics_of(instance, await self.making.limited(name))

    async def ready(self) -> None:
        await serving(self._incus, self._settings)
        if not self._watch.standing:
            raise Unavailable("the Incus event stream is not connected yet")

    # --- in the place of another process ------------------------------------------------------------

    async def prepare(self, tenants: Sequence[str]) -> None:
        with translated(""):
            if why := clustered(await self._incus.get("/1.0"), self._settings):
                raise Unavailable(why, reason=REASON)
            await self._watch.prepare()
            await self._incus.instances()  # kept from now on, since the events tell of changes
        for tenant in tenants:
            with contextlib.suppress(NotFound), self.expect(tenant):  # its shells wait a while
                await self._locate(tenant)
        await self.commands.expected()

    async def leave(self) -> None:
        await self.commands.leave()

    def told(self) -> Sequence[str]:
        return self._watch.told

    def skip(self, told: Sequence[str]) -> None:
        self._watch.skip(told)

    # --- commands -----------------------------------------------------------------------------------

    async def adopt(self) -> Sequence[Adopted]:
        return await self.commands.adopt()

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        return await self.commands.exec(name, spec)

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.commands.expect(name)

    async def sweep(self) -> int:
        ended = 0
        for tenant in await self.list(addresses=False):
            if tenant.status == "running":
                with apart(f"the search for processes that an earlier gateway left in {tenant.name}"):
                    with contextlib.suppress(NotFound):
                        ended += await self.commands.sweep(tenant.name)
        return ended

    async def init_pid(self, name: str) -> int:
        """Return the current host pid of the container's init process, 0 if it is not running."""
        return (await self._locate(name)).init_pid

    # --- events -------------------------------------------------------------------------------------

    def watch(self) -> AsyncIterator[TenantEvent]:
        return self._watch.events()

    @property
    def leaving(self) -> set[str]:
        """Tenants on their way to another member, of which `watch` tells no end."""
        return self._watch.leaving

    def starved(self) -> AsyncGenerator[TenantEvent]:
        """Yield `tenant.oom` whenever the kernel has killed processes of a tenant for lack of memory.

        Ends at once if the kernel log, which only root can read, is not readable.
        """
        return self._watch.starved()

    # --- Incus --------------------------------------------------------------------------------------

    async def _made(self, name: str, identity: str) -> Tenant:
        """Return the tenant just created. Raises `Conflict` if the name belongs to another one by now."""
        with contextlib.suppress(NotFound):
            tenant = await self.get(name)
            if tenant.instance == identity:
                return tenant
        raise Conflict(f"tenant {name} was destroyed while it was being created")

    async def _instance(self, name: str) -> dict[str, Any]:
        with translated(name):
            instance = await self._incus.instance(name)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return instance

    async def _locate(self, name: str) -> _Located:
        self.check(name)
        if name in self.leaving:
            raise Unavailable(f"tenant {name} is moving to another server; ask again", reason="moving")
        located = self._located.get(name)
        if located is not None:
            return located
        watching = self._watch.standing  # or a change during the lookup could be missed
        with translated(name):
            instance, init_pid = await self._incus.started(name)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        root = FilesystemRoot(name, self._settings.workspace, disk_state(instance))
        located = _Located(root, init_pid)
        if watching and self._watch.standing:
            self._located[name] = located
        return located

    async def _state(self, name: str, action: str, *, force: bool = False) -> None:
        # a systemd that is just starting ignores the request to shut down
        seconds = -1 if force or action != "stop" else max(1, int(self._settings.stop_grace))
        body = {"action": action, "timeout": seconds, "force": force}
        with translated(name):
            await self._operate("PUT", instance_path(name, "state"), body)
        self._changed(name)

    def _changed(self, name: str | None) -> None:
        """Drop what is cached of a tenant that may have changed, or of all."""
        if name is None:
            self._located.clear()
        else:
            self._located.pop(name, None)
        self.commands.drop(name)

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._incus.operate(method, path, body, timeout=self._settings.lifecycle_timeout)
