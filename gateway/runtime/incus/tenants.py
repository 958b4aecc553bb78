"""Runs tenants as Incus system containers.

Incus is the database: which instances are tenants, their state, domain and port are read from it. An
instance is a tenant where `user.gateway.managed` is true in its expanded configuration, which the tenant
profile sets; others do not exist for the gateway. Only the state of its disks and which process is the
container's first is kept, for as long as the event stream stands that would tell of a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.errors import Conflict, GatewayError, NotFound, Unavailable
from gateway.hostnames import plain
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.locations import MANAGED, Instances, is_tenant
from gateway.rootfs.root import show
from gateway.runtime import (
    TENANT_NAME,
    ExecSpec,
    Process,
    Removed,
    Snapshot,
    Space,
    Status,
    Tenant,
    TenantEvent,
    unheard,
)
from gateway.runtime.incus.addresses import address_of
from gateway.runtime.incus.commands import Commands, is_ours
from gateway.runtime.incus.creation import Creation, identity_of
from gateway.runtime.incus.disks import Disks
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.migrations import STATE as MIGRATION
from gateway.runtime.incus.oom_kills import ooms
from gateway.runtime.incus.resizing import Resizing
from gateway.runtime.sites import ALLOWED
from gateway.runtime.visits import Place, visited
from gateway.settings import Settings
from gateway.tasks import apart

log = logging.getLogger(__name__)

DOMAIN: Final = "user.gateway.domain"
_ALLOWED: Final = f"environment.{ALLOWED}"
PORT: Final = "user.gateway.port"
DEPLOYMENT: Final = "user.gateway.deployment"
ASLEEP: Final = "user.gateway.asleep"
IDLE_STOP: Final = "user.gateway.idle_stop"  # the operator's, in the place of the setting of that name

_STATUS: Final[Mapping[str, Status]] = {
    "Running": "running",
    "Ready": "running",
    "Stopped": "stopped",
    "Frozen": "frozen",
    "Freezing": "frozen",
    "Starting": "starting",
    "Stopping": "stopping",
    "Aborting": "stopping",
}

# Incus's lifecycle actions that have a name of their own in our events
_LIFECYCLE: Final[Mapping[str, str]] = {
    "instance-created": "tenant.created",
    "instance-started": "tenant.started",
    "instance-stopped": "tenant.stopped",
    "instance-shutdown": "tenant.stopped",
    "instance-restarted": "tenant.restarted",
    "instance-deleted": "tenant.destroyed",
    "instance-renamed": "tenant.renamed",
    "instance-snapshot-created": "tenant.snapshot.created",
    "instance-snapshot-deleted": "tenant.snapshot.deleted",
}
# a snapshot's events name it in their source alone
_SNAPSHOT: Final = re.compile(r"/1\.0/instances/([^/?]+)/snapshots/([^/?]+)")
# destroyed tenants of which a late event is still known to be theirs, not of a new tenant of the same name
_ENDS: Final = 1000

# what a tenant is after an action, where that tells
_AFTER: Final[Mapping[str, Status]] = {
    "instance-started": "running",
    "instance-restarted": "running",
    "instance-stopped": "stopped",
    "instance-shutdown": "stopped",
}

_INTERFACES: Final = 64  # of a tenant, who may make thousands, that its metrics tell of

# actions that change nothing of where a tenant's files and processes are
_LOOKS: Final = ("instance-file-", "instance-log-", "instance-metadata-", "instance-console")


@dataclass(frozen=True, slots=True)
class _Located:
    """What is kept of a tenant while the event stream stands."""

    root: FilesystemRoot
    init_pid: int


class IncusRuntime:
    """The tenants of one Incus project. Use as an async context manager."""

    def __init__(self, settings: Settings, removed: Removed = unheard) -> None:
        self._settings = settings
        self._incus = Incus(settings.incus_socket, settings.incus_project, settings.incus_timeout)
        self.making = Creation(settings, self._incus, removed)
        self.tenants: Mapping[str, Any] = Instances(
            str(settings.incus_socket), settings.incus_project, settings.workspace, settings.workspace_uid
        ).to_dict()
        self._located: dict[str, _Located] = {}
        self._watching = False
        self._ends: dict[str, datetime] = {}  # when each was destroyed, the latest last
        self.commands = Commands(settings, self._incus, self.init_pid)
        self._disks = Disks(settings, self._incus)
        self._resizing = Resizing(settings, self._incus, self.making, self.commands)

    @property
    def incus(self) -> Incus:
        """The API that this runtime speaks to."""
        return self._incus

    async def __aenter__(self) -> IncusRuntime:
        await self._incus.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.commands.aclose()
        await self._incus.__aexit__(kind, error, trace)

    # --- tenants ------------------------------------------------------------------------------------

    async def list(self) -> list[Tenant]:
        with translated(""):
            instances = await self._incus.instances(state=lacks_address)
        return [_tenant(instance) for instance in instances if is_tenant(instance)]

    async def get(self, name: str) -> Tenant:
        with translated(name):
            instance = await self._incus.instance(name, state=lacks_address)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return _tenant(instance)

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        await self.making.free(name)
        source = {"type": "image", "alias": self._settings.image}
        config = {} if domain is None else domain_config(domain)
        async with self.making.undone("it could not be created") as identity:
            await self.making.make(name, source, config, {}, start=start, identity=identity)
            return await self._made(name, identity)

    async def start(self, name: str) -> None:
        tenant = await self.get(name)
        if tenant.status == "frozen":
            await self._state(name, "unfreeze")
        elif tenant.status != "running":
            await self._state(name, "start")

    async def stop(self, name: str) -> None:
        tenant = await self.get(name)
        if tenant.status == "stopped":
            return
        if tenant.status == "frozen":  # a frozen init cannot shut down
            await self._state(name, "stop", force=True)
            return
        try:
            await self._state(name, "stop")
        except Unavailable:  # it does not shut down by itself
            await self._state(name, "stop", force=True)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        with translated(name):
            # Incus takes an empty value for none
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
            # Incus takes an empty value for none
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
        await self._disks.fits(await self._instance(name), snapshot)  # before it is stopped for nothing
        await self.stop(name)
        try:
            await self._disks.restore(name, snapshot)
        finally:
            self._changed(name)
            if ran:
                await self.start(name)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await self.get(name)
        await self._disks.delete(name, snapshot)

    async def unshared(self, name: str) -> int | None:
        disk = ((await self._instance(name))["state"].get("disk") or {}).get("root") or {}
        usage: int | None = disk.get("usage")
        return usage

    async def space(self) -> Space | None:
        try:
            found = await self._incus.get(f"/1.0/storage-pools/{self._settings.pool}/resources")
        except IncusError as error:
            log.warning("how full the storage pool is cannot be known: %s", error)
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
        state = instance["state"]
        memory = state.get("memory") or {}
        disk = (state.get("disk") or {}).get("root") or {}
        network = {
            interface: {
                "received_bytes": facts["counters"]["bytes_received"],
                "sent_bytes": facts["counters"]["bytes_sent"],
            }
            for interface, facts in itertools.islice((state.get("network") or {}).items(), _INTERFACES)
            if interface != "lo"
        }
        return {
            "cpu_seconds": (state.get("cpu") or {}).get("usage", 0) / 1e9,
            "memory_bytes": memory.get("usage", 0),
            "memory_peak_bytes": memory.get("usage_peak", 0),
            "memory_limit_bytes": memory.get("total", 0),
            "processes": max(0, state.get("processes", 0)),
            "disk_bytes": disk.get("usage"),
            "disk_limit_bytes": disk.get("total"),
            "network": network,
        }

    async def ready(self) -> None:
        with translated(""):
            await self._incus.get("/1.0")
        if not self._watching:
            raise Unavailable("the Incus event stream is not up yet")

    # --- commands -----------------------------------------------------------------------------------

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        return await self.commands.exec(name, spec)

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.commands.expect(name)

    async def sweep(self) -> int:
        ended = 0
        for tenant in await self.list():
            if tenant.status == "running":
                with apart(f"the look for what an earlier gateway left in {tenant.name}"):
                    with contextlib.suppress(NotFound):
                        ended += await self.commands.sweep(tenant.name)
        return ended

    async def init_pid(self, name: str) -> int:
        """Return the host's pid of the container's first process now; 0 where it does not run."""
        return (await self._locate(name)).init_pid

    # --- events -------------------------------------------------------------------------------------

    async def watch(self) -> AsyncIterator[TenantEvent]:
        """Yield what happens to tenants, for ever.

        Incus replays nothing: after each gap the instances are listed and the differences published,
        then `gateway.resynced`. The same look is taken every `reconcile_interval`, since Incus drops a
        slow reader's events and a deleted profile key tells nobody.
        """
        known: dict[str, Status] | None = None
        pause = 0.1
        while True:
            try:
                stream = self._incus.events("lifecycle")
                ticks = _with_ticks(stream, self._settings.reconcile_interval)
                # both: while one waits for the other that one cannot be closed, and a cancel would be lost
                async with contextlib.aclosing(stream), contextlib.aclosing(ticks):
                    async for event in ticks:
                        if event is None or event["type"] == "connected":
                            changes, known = await self._differences(known)
                            for change in changes:
                                yield change
                            if event is not None:
                                pause, self._watching = 0.1, True
                                yield TenantEvent("gateway.resynced", None, {"tenants": len(known)})
                            continue
                        if known is None:  # it is connected first, or there would be no events
                            continue
                        async for change in self._lifecycle(event, known):
                            yield change
                raise IncusError("the event stream ended", 0)
            except (GatewayError, IncusError) as error:
                if self._watching:
                    log.warning("Incus event stream lost: %s", error)
            except Exception:
                # one odd answer must not end the watch for ever: look again from the start
                log.exception("an Incus event could not be understood")
            self._watching = False
            self._changed(None)
            await asyncio.sleep(pause)  # back-off of a reconnect, not coordination
            pause = min(pause * 2, 5.0)

    async def starved(self) -> AsyncGenerator[TenantEvent]:
        """Yield `tenant.oom` where the kernel killed processes of a tenant for want of memory, for ever.

        It ends at once where the kernel's log, which is root's, cannot be read.
        """
        project = self._settings.incus_project
        prefix = "" if project == "default" else f"{project}_"
        async with contextlib.aclosing(ooms()) as told:
            async for container, process, count in told:
                name = container.removeprefix(prefix)
                # only names of other projects have an underscore
                if container.startswith(prefix) and TENANT_NAME.fullmatch(name):
                    with contextlib.suppress(GatewayError):  # none of ours, or Incus is away
                        await self.get(name)
                        yield TenantEvent("tenant.oom", name, {"process": show(process), "killed": count})

    async def _differences(
        self, known: dict[str, Status] | None
    ) -> tuple[Sequence[TenantEvent], dict[str, Status]]:
        now = {tenant.name: tenant.status for tenant in await self.list()}
        changes = [] if known is None else differences(known, now)
        for change in changes:
            self._changed(change.tenant or "")
        return changes, now

    async def _lifecycle(
        self, event: Mapping[str, Any], known: dict[str, Status]
    ) -> AsyncIterator[TenantEvent]:
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        context, facts = metadata.get("context") or {}, dict[str, str]()
        if action.startswith("instance-snapshot-"):
            if (source := _SNAPSHOT.match(str(metadata.get("source", "")))) is None:
                return
            name, facts["snapshot"] = source[1], source[2]
        if not action.startswith("instance-") or not name or "/" in name:
            return
        at = _moment(event)
        if at < self._ends.get(name, at):
            return  # of one that was destroyed: Incus sends events in any order
        if action == "instance-exec":
            if is_ours(context.get("command") or []):
                return  # our own, told as exec.started
        elif not action.startswith(_LOOKS):
            self._changed(name)
        old = str(context.get("old_name", "")) if action == "instance-renamed" else ""
        self._changed(old)
        if name not in known and old not in known:
            try:
                await self.get(name)  # is it ours?
            except NotFound:
                return
        requestor = metadata.get("requestor") or {}
        by = requestor.get("username") or requestor.get("protocol") or "guest"
        data = {"action": action, **facts, "by": by}
        if old:
            known.pop(old, None)
            data["from"] = old
        if action == "instance-deleted":
            self._ends.pop(name, None)
            self._ends[name] = at
            while len(self._ends) > _ENDS:
                del self._ends[next(iter(self._ends))]
            if known.pop(name, "stopped") != "stopped":  # told late, or lost: it did stop
                yield TenantEvent("tenant.stopped", name, {"action": "instance-stopped", "by": by})
        else:
            before: Status = "stopped" if action == "instance-created" else "running"
            known[name] = _AFTER.get(action, known.get(name, before))
        # an exec's command line is the tenant's own: only that it happened is told
        yield TenantEvent(_LIFECYCLE.get(action, f"incus.{action}"), name, data)
        if action == "instance-restored" and (snapshot := str(context.get("snapshot", ""))):
            data = {"action": action, "snapshot": snapshot.rpartition("/")[2], "by": by}
            yield TenantEvent("tenant.snapshot.restored", name, data)

    # --- Incus --------------------------------------------------------------------------------------

    async def _made(self, name: str, identity: str) -> Tenant:
        """Return the tenant that was just made. Raises `Conflict` where it is another's name by now."""
        with contextlib.suppress(NotFound):
            tenant = await self.get(name)
            if tenant.instance == identity:
                return tenant
        raise Conflict(f"tenant {name} was destroyed by somebody while it was being made")

    async def _instance(self, name: str) -> dict[str, Any]:
        with translated(name):
            instance = await self._incus.instance(name)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return instance

    async def _locate(self, name: str) -> _Located:
        located = self._located.get(name)
        if located is not None:
            return located
        watching = self._watching  # a change during the look-up must not be kept
        instance = await self._instance(name)
        root = FilesystemRoot(name, self._settings.workspace, _disk_state(instance))
        located = _Located(root, int(instance["state"].get("pid") or 0))
        if watching and self._watching:
            self._located[name] = located
        return located

    async def _state(self, name: str, action: str, *, force: bool = False) -> None:
        # a systemd that has just begun does not hear that it should end
        seconds = -1 if force or action != "stop" else max(1, int(self._settings.stop_grace))
        body = {"action": action, "timeout": seconds, "force": force}
        with translated(name):
            await self._operate("PUT", instance_path(name, "state"), body)
        self._changed(name)

    def _changed(self, name: str | None) -> None:
        """Let go of what is kept of a tenant to which something happened, or of all."""
        if name is None:
            self._located.clear()
        else:
            self._located.pop(name, None)
        self.commands.drop(name)

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._incus.operate(method, path, body, timeout=self._settings.lifecycle_timeout)


def differences(known: Mapping[str, Status], now: Mapping[str, Status]) -> list[TenantEvent]:
    """Return what must have happened between two looks, marked `resync`: no event told of it."""
    data = {"resync": True}
    changes: list[TenantEvent] = []
    for name, status in now.items():
        if name not in known:
            changes.append(TenantEvent("tenant.created", name, data))
        if known.get(name) != status and status in ("running", "stopped"):
            kind = "tenant.started" if status == "running" else "tenant.stopped"
            if name in known or status == "running":
                changes.append(TenantEvent(kind, name, data))
    changes += [TenantEvent("tenant.destroyed", name, data) for name in known if name not in now]
    return changes


def _tenant(instance: Mapping[str, Any]) -> Tenant:
    config, devices = instance["expanded_config"], instance["expanded_devices"]
    port = config.get(PORT, "")
    return Tenant(
        name=instance["name"],
        status=_STATUS.get(instance["status"], "error"),
        domain=plain(config.get(DOMAIN)) or config.get(DOMAIN) or None,
        address=address_of(instance),
        port=int(port) if port.isdigit() else None,
        created=instance.get("created_at"),
        instance=instance["config"].get("volatile.uuid"),
        location=None if instance.get("location") in (None, "", "none") else instance["location"],
        limits={
            "cpu": config.get("limits.cpu"),
            "memory": config.get("limits.memory"),
            "processes": config.get("limits.processes"),
            "disk": devices.get("root", {}).get("size"),
        },
        asleep=config.get(ASLEEP) == "true",
        deployment=config.get(DEPLOYMENT) or None,
        migration=config.get(MIGRATION) or None,
        idle_stop=_seconds(config.get(IDLE_STOP)),
    )


def _moment(event: Mapping[str, Any]) -> datetime:
    """Return when an event was sent; one that does not say so, now."""
    try:
        return datetime.fromisoformat(str(event.get("timestamp"))).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


def _seconds(text: str | None) -> float | None:
    """Return what an operator wrote; what is no number is as if it was not there."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


def lacks_address(instance: Mapping[str, Any]) -> bool:
    """Say whether the address of a tenant is known from its state alone."""
    return is_tenant(instance) and instance["status"] == "Running" and address_of(instance) is None


def _disk_state(instance: Mapping[str, Any]) -> str:
    """Return what changes with an instance's disks, their ids or their content as a whole."""
    config, devices = instance["config"], instance["expanded_devices"]
    keys = ("uuid.generation", "idmap.current", "idmap.next", "last_state.idmap")
    disks = {name: device for name, device in devices.items() if device.get("type") == "disk"}
    facts = [[config.get(f"volatile.{key}") for key in keys], disks]
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


async def _with_ticks(
    stream: AsyncIterator[dict[str, Any]], interval: float
) -> AsyncGenerator[dict[str, Any] | None]:
    """Yield the stream's items, and None whenever `interval` seconds passed without a look."""
    pending: asyncio.Task[dict[str, Any]] | None = None
    due = time.monotonic() + interval
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(stream))
            await asyncio.wait([pending], timeout=max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                due = time.monotonic() + interval
                yield None
            if pending.done():
                task, pending = pending, None
                try:
                    item = task.result()
                except StopAsyncIteration:
                    return
                yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def domain_config(domain: str | None) -> dict[str, str]:
    """Return the keys that give an instance a domain, or none: Incus takes an empty value for none.

    Its first process is told it at its next start, and the site's unit passes that on, so that golden
    copies can share the unit.
    """
    return {DOMAIN: domain or "", _ALLOWED: domain or ""}
