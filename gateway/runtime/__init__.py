"""The interface between the gateway and the place where tenants run.

Other packages use only the names defined here. `incus` is the real runtime; `local`, without isolation, is
for laptops and tests. The same contract tests run on both.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from gateway.errors import Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.process_tree import Member
from gateway.runtime.holding import Holding as Holding
from gateway.runtime.holding import StreamName as StreamName

REPORT_MAX: Final = 8192  # bytes kept of `Process.report`; a path has at most 4096
# what Incus accepts, and nothing that could be a path
SNAPSHOT_NAME: Final = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?")
TENANT_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

Status = Literal["running", "stopped", "frozen", "starting", "stopping", "error"]


@dataclass(frozen=True, slots=True)
class Tenant:
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
class Pty:
    cols: int = 80
    rows: int = 24


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command to run. `cwd` defaults to the workspace and `user` to its owner; both must exist.

    With `merged`, both streams go to stdout in the order of writing, and what the command writes to
    descriptor 3 becomes `Process.report`. `shown` is displayed instead of `argv` if the gateway has wrapped
    the command. With `outlive` the command has a `Process.holding` if the runtime supports that. `before` is
    awaited with it before anything of the command has happened; what it raises is passed on.
    """

    argv: tuple[str, ...]
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | int | None = None
    pty: Pty | None = None
    stdin: bool = False
    merged: bool = False
    shown: tuple[str, ...] | None = None
    outlive: bool = False
    before: Callable[[Holding | None], Awaitable[None]] | None = None

    def digest(self) -> bytes:
        """Return a hash that identifies this command without revealing it."""
        said = (self.argv, self.cwd, sorted(self.env.items()), self.user, self.pty, self.stdin, self.merged)
        return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class Exit:
    """A command's exit: `code` in a shell's convention (128 + n for a signal), `signal` by name."""

    code: int
    signal: str | None = None

    @classmethod
    def of(cls, code: int) -> Exit:
        """Return the exit for a code in a shell's convention, which is how Incus reports signals."""
        try:
            name = signal.Signals(code - 128).name.removeprefix("SIG") if code > 128 else None
        except ValueError:
            name = None
        return cls(code, name)


@dataclass(frozen=True, slots=True)
class Killed:
    """The result of a kill: processes ended, whether KILL was needed, processes still running."""

    killed: int
    escalated: bool
    survivors: int
    method: Literal["cgroup", "scan"] = "cgroup"


class Process(Protocol):
    """A command that has started in a tenant.

    `streams` names its outputs; with a PTY or with `merged` there is only stdout. Reading provides the
    back-pressure: unread output stays in the kernel and eventually blocks the command. `report` is complete
    once `wait` has returned, and is empty without `merged`.
    """

    pid: int
    started_at: float  # seconds since the epoch
    streams: tuple[StreamName, ...]
    report: bytes
    holding: Holding | None
    patience: float  # seconds an output may stay unread, see `take`

    async def read(self, stream: StreamName) -> bytes:
        """Return the next bytes of `stream`, b"" at its end. If the stream broke, `wait` raises."""
        ...

    def take(self, stream: StreamName) -> bytes:
        """Return what has arrived without waiting; b"" if it can safely stay unread.

        Call it every `patience` seconds while not reading `stream`.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Write to the command's stdin, waiting while it does not read. Dropped once it has ended."""
        ...

    async def close_stdin(self) -> None: ...

    async def resize(self, cols: int, rows: int) -> None: ...

    async def signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        ...

    async def wait(self) -> Exit:
        """Wait until the command has ended and its outputs are read, and return the exit.

        Raises `Unavailable` if the status or some output is lost.
        """
        ...

    @property
    def unsent(self) -> int:
        """Bytes accepted by `write` that have not left this process; more may be in transit."""
        ...

    async def flush(self) -> None:
        """Discard the input in the command's terminal and in transit to it."""
        ...

    async def kill(self, grace: float) -> Killed:
        """Kill the whole tree: TERM, `grace` seconds, KILL. Return once none of it is left."""
        ...

    async def left(self) -> Sequence[Member] | None:
        """Return the tree's running processes, at most a hundred; None if they cannot be determined."""
        ...

    async def aclose(self) -> None:
        """Close the sockets. Idempotent. Does not guarantee that the tree is gone; `kill` does."""
        ...


@dataclass(frozen=True, slots=True)
class Adopted:
    """A command of an earlier process: its recorded facts, and its kept outputs with their start offsets.

    `process` continues after these outputs; it is None if the command has ended, whose `report` is here, or
    if it has not `begun`: then nothing of it has happened or will, and it stays held until it is dropped.
    """

    facts: Mapping[str, Any]
    pid: int
    started_at: float
    holding: Holding
    outputs: Mapping[StreamName, tuple[int, bytes]]
    process: Process | None
    report: bytes = b""
    begun: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
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


class TenantRuntime(Protocol):
    """The interface of a runtime. It is wide because it is everything other packages use of one.

    All names are validated tenant names; unknown ones raise `NotFound`. `tenants` tells a broker how to find
    tenants' files by itself; see `gateway.rootfs.locations`.
    """

    tenants: Mapping[str, Any]

    async def list(self, *, addresses: bool = True) -> list[Tenant]:
        """Return all tenants; without `addresses` only those that need no look into a container."""
        ...

    async def get(self, name: str) -> Tenant: ...

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        """Create a tenant from the base image. A failure removes only what it created. Raises `Conflict`."""
        ...

    async def start(self, name: str) -> None: ...

    async def stop(self, name: str) -> None: ...

    async def restart(self, name: str) -> None: ...

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        """Mark whether requests may wake the tenant. Does not stop it."""
        ...

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        """Return the seconds since each site's last connection ended, 0 while one is open.

        Sites without connections in the last minute are omitted. The gateway's own probes do not count.
        """
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
    ) -> Tenant:
        """Create and start a tenant whose disk is a copy of another's or of its snapshot.

        The clone has its own address, machine id and host uids. Raises `Conflict` if the name is taken, and
        `NotFound`. If it fails or is cancelled, it removes only what it created.
        """
        ...

    async def snapshots(self, name: str) -> Sequence[Snapshot]:
        """Return the tenant's snapshots, oldest first."""
        ...

    async def snapshot(self, name: str, snapshot: str) -> Snapshot:
        """Create a snapshot of the disk. Raises `Conflict` if its name is taken."""
        ...

    async def restore(self, name: str, snapshot: str) -> None:
        """Restore the disk from a snapshot, stopping the tenant and starting it again if it was running.

        Domain, limits and address keep their current values.
        """
        ...

    async def delete_snapshot(self, name: str, snapshot: str) -> None: ...

    async def held(self, name: str) -> int | None:
        """Return the bytes that count for a tenant's disk if its snapshots do, too, and None if not."""
        ...

    async def unshared(self, name: str) -> int | None:
        """Return the bytes of a tenant's disk not shared with any snapshot or image, None if unknown."""
        ...

    async def space(self) -> Space | None:
        """Return size and use of the storage, None if unknown."""
        ...

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        """Return a command that prints the last lines of the site's log, and new ones with `follow`."""
        ...

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        """Start a command; return once it runs. Raises `ExecFailed`, `TenantNotRunning`, `InvalidParams`."""
        ...

    async def prepare(self, tenants: Sequence[str]) -> None:
        """Get ready to take the place of a process that still runs, with warm shells for these tenants.

        Raises `Unavailable` if this runtime could not serve.
        """
        ...

    def told(self) -> Sequence[str]:
        """Return marks of the latest events that `watch` has yielded and whose consumer came back."""
        ...

    def skip(self, told: Sequence[str]) -> None:
        """Have `watch` yield none of these, which an earlier process has told; call it before `watch`."""
        ...

    async def leave(self) -> None:
        """Leave what goes on without this process to the one that adopts it: touch nothing of it any more."""
        ...

    async def adopt(self) -> Sequence[Adopted]:
        """Adopt commands held for an earlier process, running or ended. Call once, before anything else."""
        ...

    async def sweep(self) -> int:
        """Kill processes left by commands of an earlier, killed process of this gateway; return how many."""
        ...

    def expect(self, name: str) -> AbstractContextManager[None]:
        """Expect commands in this tenant while the context is open: a hint that never fails."""
        ...

    async def filesystem(self, name: str) -> FilesystemRoot:
        """Return where the tenant's files are, also for a stopped tenant."""
        ...

    async def metrics(self, name: str) -> Mapping[str, Any]:
        """Return CPU seconds, memory bytes, processes, disk and network, named as in the contract."""
        ...

    def watch(self) -> AsyncIterator[TenantEvent]:
        """Yield the tenants' events forever; reconnects, and yields `gateway.resynced` after a gap."""
        ...

    async def ready(self) -> None:
        """Return if the runtime can serve requests, else raise `Unavailable` with the reason."""
        ...
