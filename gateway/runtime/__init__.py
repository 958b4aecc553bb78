"""The interface between the gateway and the place where tenants run.

Other packages use only the names defined here, and take the part of a `TenantRuntime` that they need.
`incus` is the real runtime; `local`, without isolation, is for laptops and tests. The same contract tests run
on both.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from gateway.errors import Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.runtime.command import ARGUMENT_MAX as ARGUMENT_MAX
from gateway.runtime.command import ARGUMENTS_MAX as ARGUMENTS_MAX
from gateway.runtime.command import REPORT_MAX as REPORT_MAX
from gateway.runtime.command import Adopted as Adopted
from gateway.runtime.command import ExecSpec as ExecSpec
from gateway.runtime.command import Exit as Exit
from gateway.runtime.command import Holding as Holding
from gateway.runtime.command import KillResult as KillResult
from gateway.runtime.command import Process as Process
from gateway.runtime.command import Pty as Pty
from gateway.runtime.command import StreamName as StreamName

# what Incus accepts, and nothing that could be a path
SNAPSHOT_NAME: Final = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?")
TENANT_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

Status = Literal["running", "stopped", "frozen", "starting", "stopping", "error"]


@dataclass(frozen=True, slots=True)
class TenantInstance:
    """A tenant as the runtime reports it; nothing of it is remembered elsewhere."""

    name: str
    status: Status
    domain: str | None = None
    address: str | None = None
    port: int | None = None
    created: str | None = None
    location: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    instance: str | None = None  # unique id; a later tenant with the same name has another
    asleep: bool = False  # stopped, or about to be, until a request wakes it
    idle_stop: float | None = None  # seconds; overrides the setting
    standby: float | None = None  # seconds; overrides the setting
    deployment: str | None = None  # the deployment creating it, until its site is known to work
    migration: str | None = None  # state of the migration of its site from a host folder, if any


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """A snapshot of a tenant's disk; `size` counts the bytes not shared with anything else, if known."""

    name: str
    created: str | None = None
    size: int | None = None


class OnAnotherServer(Unavailable):
    """The tenant exists, but on another server of the cluster: only the gateway there can say more."""

    def __init__(self, tenant: str, location: str) -> None:
        super().__init__(f"tenant {tenant} is on another server", reason="elsewhere", location=location)


@dataclass(frozen=True, slots=True)
class Space:
    """Size and use of the storage for tenants' disks, in bytes."""

    total: int
    used: int


@dataclass(frozen=True, slots=True)
class TenantEvent:
    """A change of a tenant, made by anyone. `type` is as in the SSE contract."""

    type: str
    tenant: str | None
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> str | None:
        """The name that became free because its tenant was destroyed or renamed, or None."""
        match self.type:
            case "tenant.destroyed":
                return self.tenant
            case "tenant.renamed":
                return self.data.get("from")
        return None


@dataclass(frozen=True, slots=True)
class Removal:
    """An instance that the gateway removed by itself; `tenant` is None if it was not a tenant yet."""

    tenant: str | None
    name: str
    instance: str
    reason: str


Removed = Callable[[Removal], Awaitable[None]]


async def unheard(removal: Removal) -> None:
    """Ignore a removal."""


class TenantInstances(Protocol):
    """The tenants of a runtime. Names are valid ones; unknown ones raise `NotFound`."""

    async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
        """Return all tenants; without `addresses` only those that need no look into a container."""
        ...

    async def get(self, name: str) -> TenantInstance: ...

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> TenantInstance:
        """Create a tenant from the base image. A failure removes only what it created. Raises `Conflict`."""
        ...

    async def start(self, name: str) -> None: ...

    async def stop(self, name: str) -> None: ...

    async def restart(self, name: str) -> None: ...

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        """Mark whether requests may wake the tenant. Does not stop it."""
        ...

    async def destroy(self, name: str) -> None:
        """Delete the tenant with everything it has, including snapshots."""
        ...

    async def rename(self, name: str, domain: str | None) -> None:
        """Set or remove the tenant's domain; its name stays."""
        ...

    async def resize(self, name: str, size: str) -> None:
        """Apply the limits of a size of `sizes.SIZES`, all or none of them, without a restart.

        Raises `Conflict` if the tenant uses more disk or memory than that or is being updated,
        `TenantNotRunning` if its disk usage is unknown, and `InvalidParams` if the runtime has no limits.
        """
        ...

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> TenantInstance:
        """Create and start a tenant whose disk is a copy of another's or of its snapshot.

        The clone has its own address, machine id and host uids. Raises `Conflict` if the name is taken, and
        `NotFound`. If it fails or is cancelled, it removes only what it created.
        """
        ...


class DiskSnapshots(Protocol):
    """The snapshots of tenants' disks. Unknown ones raise `NotFound`."""

    async def list(self, tenant: str) -> Sequence[DiskSnapshot]:
        """Return the tenant's snapshots, oldest first."""
        ...

    async def create(self, tenant: str, name: str) -> DiskSnapshot:
        """Create a snapshot of the disk. Raises `Conflict` if its name is taken."""
        ...

    async def restore(self, tenant: str, name: str) -> None:
        """Restore the disk from a snapshot, stopping the tenant and starting it again if it was running.

        Domain, limits and address keep their current values.
        """
        ...

    async def delete(self, tenant: str, name: str) -> None: ...


class UsageReader(Protocol):
    """What tenants use of the machine, and how much of it there is."""

    async def metrics(self, name: str) -> Mapping[str, Any]:
        """Return CPU seconds, memory bytes, processes, disk and network, named as in the contract."""
        ...

    async def visited(self, tenants: Sequence[TenantInstance]) -> Mapping[str, float]:
        """Return the seconds since each site's last connection ended, 0 while one is open.

        Sites without connections in the last minute are omitted. The gateway's own probes do not count.
        """
        ...

    async def held(self, name: str) -> int | None:
        """Return the bytes that count for a tenant's disk if its snapshots do, too, and None if not."""
        ...

    async def unshared(self, name: str) -> int | None:
        """Return the bytes of a tenant's disk not shared with any snapshot or image, None if unknown."""
        ...

    async def space(self) -> Space | None:
        """Return size and use of the storage, None if unknown."""
        ...


class Commands(Protocol):
    """The commands in tenants."""

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        """Start a command; return once it runs. Raises `ExecFailed`, `TenantNotRunning`, `InvalidParams`."""
        ...

    def expect(self, name: str) -> AbstractContextManager[None]:
        """Expect commands in this tenant while the context is open: a hint that never fails."""
        ...

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        """Return a command that prints the last lines of the site's log, and new ones with `follow`."""
        ...

    async def adopt(self) -> Sequence[Adopted]:
        """Adopt commands held for an earlier process, running or ended. Call once, before anything else."""
        ...


class TenantChanges(Protocol):
    """What happens to tenants, whoever does it."""

    def watch(self) -> AsyncIterator[TenantEvent]:
        """Yield the tenants' events forever; reconnects, and yields `gateway.resynced` after a gap."""
        ...

    @property
    def told(self) -> Sequence[str]:
        """The marks of the latest changes that `watch` has yielded and whose consumer came back."""
        ...

    def skip(self, told: Sequence[str]) -> None:
        """Make `watch` skip these changes, which an earlier process has reported; call it before `watch`."""
        ...


class TenantRuntime(Protocol):
    """The place where tenants run, in parts. An async context manager.

    `locations` tells a broker how to find tenants' files by itself; see `gateway.rootfs.locations`.
    """

    @property
    def tenants(self) -> TenantInstances: ...

    @property
    def snapshots(self) -> DiskSnapshots: ...

    @property
    def usage(self) -> UsageReader: ...

    @property
    def commands(self) -> Commands: ...

    @property
    def changes(self) -> TenantChanges: ...

    @property
    def locations(self) -> Mapping[str, Any]: ...

    async def filesystem(self, name: str) -> FilesystemRoot:
        """Return where the tenant's files are, also for a stopped tenant."""
        ...

    async def ready(self) -> None:
        """Return if the runtime can serve requests, else raise `Unavailable` with the reason."""
        ...

    async def prepare(self, tenants: Sequence[str]) -> None:
        """Get ready to take the place of a process that still runs, with warm shells for these tenants.

        Raises `Unavailable` if this runtime could not serve.
        """
        ...

    async def leave(self) -> None:
        """Leave what outlives this process to the one that adopts it: do not touch it any more."""
        ...

    async def sweep(self) -> int:
        """Kill processes left by commands of an earlier, killed process of this gateway; return how many."""
        ...
