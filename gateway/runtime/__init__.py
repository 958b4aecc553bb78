"""The seam between the gateway and where tenants live.

Other packages use only these names. `incus` is the real runtime; `local`, without isolation, is for laptops
and tests. The same contract tests run on both.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from gateway.rootfs import FilesystemRoot
from gateway.rootfs.process_tree import Member

REPORT_MAX: Final = 8192  # bytes kept of `Process.report`; a path has at most 4096
# what Incus takes, and no path
SNAPSHOT_NAME: Final = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?")
TENANT_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

Status = Literal["running", "stopped", "frozen", "starting", "stopping", "error"]
StreamName = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class Tenant:
    """What is known of one tenant; all of it comes from the runtime, never from memory."""

    name: str
    status: Status
    domain: str | None = None
    address: str | None = None
    port: int | None = None
    created: str | None = None
    location: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    instance: str | None = None  # tells it from any other, one of its name too, as long as it lives
    asleep: bool = False  # it is stopped, or about to be, until it is asked for
    idle_stop: float | None = None  # seconds in the place of the setting's
    deployment: str | None = None  # that made it, until its site is known to work
    migration: str | None = None  # how far its site has moved in from a folder of the host, if it does


@dataclass(frozen=True, slots=True)
class Pty:
    cols: int = 80
    rows: int = 24


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """One command. `cwd` defaults to the workspace and `user` to its owner; both must exist.

    With `merged` both streams are written to one output, stdout, in the order of time; what the command
    writes to descriptor 3 is `Process.report`. `shown` is listed instead of `argv` if that has a wrapping of
    ours. One that is to `outlive` this process has a `Process.holding` where the runtime can do so.
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

    def digest(self) -> bytes:
        """Return what tells this command from another, and nothing else of it."""
        said = (self.argv, self.cwd, sorted(self.env.items()), self.user, self.pty, self.stdin, self.merged)
        return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class Exit:
    """A wait status that was seen: `code` as a shell shows it (128 + n for a signal), `signal` its name."""

    code: int
    signal: str | None = None

    @classmethod
    def of(cls, code: int) -> Exit:
        """Return the exit for a code in a shell's convention, the only one in which Incus tells a signal."""
        try:
            name = signal.Signals(code - 128).name.removeprefix("SIG") if code > 128 else None
        except ValueError:
            name = None
        return cls(code, name)


@dataclass(frozen=True, slots=True)
class Killed:
    """What a cancel did: processes ended, whether KILL was needed, processes that are still there."""

    killed: int
    escalated: bool
    survivors: int
    method: Literal["cgroup", "scan"] = "cgroup"


class Holding(Protocol):
    """What of a command outlives this process: its sockets, the last of its output, facts for the next one.

    `position` counts the bytes of input that were given to the command, by earlier processes too.
    """

    @property
    def position(self) -> int: ...

    @property
    def safe(self) -> bool:
        """Whether somebody holds it now."""
        ...

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep these facts in the place of those before; from the first ones on the command is held."""
        ...

    def end(self, facts: Mapping[str, Any]) -> None:
        """Keep these facts and the outputs; the command has ended, and nothing else is held any more."""
        ...

    def keep(self, stream: StreamName, offset: int) -> int:
        """Let go of an output before an offset; return how many bytes of memory the rest takes."""
        ...

    def accounts(self) -> bytes:
        """Return what `account` kept last."""
        ...

    def account(self, accounts: bytes) -> None:
        """Keep so many bytes of accounts of the input: up to a thousand, much faster than facts."""
        ...

    def drop(self) -> None:
        """Hold nothing of it any more. Idempotent."""
        ...


class Process(Protocol):
    """A command that has started in a tenant.

    `streams` names its outputs; with a PTY there is only stdout, the terminal, and with `merged` only
    stdout. Reading is the back-pressure: what is not read stays in the kernel and in time stops the command.
    `report` is complete once `wait` has returned, and empty without `merged`.
    """

    pid: int
    started_at: float  # seconds since the epoch
    streams: tuple[StreamName, ...]
    report: bytes
    holding: Holding | None
    patience: float  # seconds for which an output may be left unread, see `take`

    async def read(self, stream: StreamName) -> bytes:
        """Return the next bytes of `stream`, or b"" after its last; where it broke off `wait` says so."""
        ...

    def take(self, stream: StreamName) -> bytes:
        """Return at once what `read` would return without waiting; b"" where leaving it does no harm.

        Call it every `patience` seconds while `stream` is held back.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Give `data` to the command; waits while it does not read. Late input is dropped."""
        ...

    async def close_stdin(self) -> None: ...

    async def resize(self, cols: int, rows: int) -> None: ...

    async def signal(self, number: int) -> None:
        """Send one signal to the command itself."""
        ...

    async def wait(self) -> Exit:
        """Return the exit once the command has ended and its outputs were read.

        Raises `Unavailable` if its status, or some of its output, is lost.
        """
        ...

    @property
    def unsent(self) -> int:
        """How many bytes that `write` took have not left this process; more may wait on their way."""
        ...

    async def flush(self) -> None:
        """Drop the input that the command's terminal holds, and all on its way there."""
        ...

    async def kill(self, grace: float) -> Killed:
        """End the whole tree: TERM, `grace` seconds, KILL; return when nothing of it is left."""
        ...

    async def left(self) -> Sequence[Member] | None:
        """Return what runs of the tree, a hundred processes at most; None if that cannot be known."""
        ...

    async def aclose(self) -> None:
        """Let go of the sockets. Idempotent; does not promise that the tree is gone: `kill` does."""
        ...


@dataclass(frozen=True, slots=True)
class Adopted:
    """A command of an earlier process: the facts that were noted, and what is kept of its outputs, by offset.

    `process` goes on behind that; it is None for a command that had ended.
    """

    facts: Mapping[str, Any]
    pid: int
    started_at: float
    holding: Holding
    outputs: Mapping[StreamName, tuple[int, bytes]]
    process: Process | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A tenant's disk at one moment; `size` the bytes that nothing else holds, where they are known."""

    name: str
    created: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Space:
    """The bytes of the storage where tenants' disks lie: in all, and in use."""

    total: int
    used: int


@dataclass(frozen=True, slots=True)
class TenantEvent:
    """A change of a tenant, by anyone. `type` is as in the SSE contract."""

    type: str
    tenant: str | None
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> str | None:
        """The name that is free now: its tenant was destroyed or renamed."""
        match self.type:
            case "tenant.destroyed":
                return self.tenant
            case "tenant.renamed":
                return self.data.get("from")
        return None


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that the gateway removed by itself: `tenant` is None of what was not one yet."""

    tenant: str | None
    name: str
    instance: str
    reason: str


Removed = Callable[[Removal], Awaitable[None]]


async def unheard(removal: Removal) -> None:
    """Take a removal and record it nowhere."""


class TenantRuntime(Protocol):
    """The seam to where tenants live: wide, because it is all that the packages above it use of a runtime.

    All names are validated tenant names; unknown ones raise `NotFound`. `tenants` tells a broker how to find
    their files by itself; see `gateway.rootfs.locations`.
    """

    tenants: Mapping[str, Any]

    async def list(self) -> list[Tenant]: ...

    async def get(self, name: str) -> Tenant: ...

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        """Make a tenant from the base image; a failure removes only what it made. Raises `Conflict`."""
        ...

    async def start(self, name: str) -> None: ...

    async def stop(self, name: str) -> None: ...

    async def restart(self, name: str) -> None: ...

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        """Note that requests may wake the tenant, or that they may not any more; stop nothing."""
        ...

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        """Return the seconds since each site's last connection ended, 0 while there is one.

        Sites without one in the last minute are left out; our probes do not count.
        """
        ...

    async def destroy(self, name: str) -> None:
        """Remove the tenant and everything of it, its snapshots too."""
        ...

    async def rename(self, name: str, domain: str | None) -> None:
        """Give the tenant another domain, or none; its name stays."""
        ...

    async def resize(self, name: str, size: str) -> None:
        """Give the tenant the limits of a size of `sizes.SIZES`, all or none, without a restart.

        Raises `Conflict` if it uses more disk or memory than these allow or is being updated,
        `TenantNotRunning` if its disk usage is unknown, and `InvalidParams` if this runtime has no limits.
        """
        ...

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> Tenant:
        """Create a tenant whose disk is a copy of another's, or of a snapshot of it, and start it.

        It has an address, a machine id and host uids of its own. Raises `Conflict` if the name is taken, and
        `NotFound`. If it fails or is cancelled, it removes what it made and nothing else.
        """
        ...

    async def snapshots(self, name: str) -> Sequence[Snapshot]:
        """Return the tenant's snapshots, oldest first."""
        ...

    async def snapshot(self, name: str, snapshot: str) -> Snapshot:
        """Keep the disk as it is now. Raises `Conflict` if the snapshot's name is taken."""
        ...

    async def restore(self, name: str, snapshot: str) -> None:
        """Make the disk what it was: stop, restore, and start again what ran before.

        Domain, limits and address stay as they are now.
        """
        ...

    async def delete_snapshot(self, name: str, snapshot: str) -> None: ...

    async def unshared(self, name: str) -> int | None:
        """Return the bytes of a tenant's disk that no snapshot or image holds too, None where not known."""
        ...

    async def space(self) -> Space | None:
        """Return how full the storage is, None if that cannot be known."""
        ...

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        """Return the command that prints the last lines of the site's log, and with `follow` what comes."""
        ...

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        """Start a command; returns once it runs. Raises `ExecFailed`, `TenantNotRunning`, `InvalidParams`."""
        ...

    async def adopt(self) -> Sequence[Adopted]:
        """Take over what an earlier process left running, or ended not long ago; once, before all else."""
        ...

    async def sweep(self) -> int:
        """End what commands of an earlier, killed life of this gateway left; return how many processes."""
        ...

    def expect(self, name: str) -> AbstractContextManager[None]:
        """Get ready for commands in this tenant while the context is open; a hint, never an error."""
        ...

    async def filesystem(self, name: str) -> FilesystemRoot:
        """Say where the tenant's files are; works for stopped tenants too."""
        ...

    async def metrics(self, name: str) -> Mapping[str, Any]:
        """Return cpu seconds, memory bytes, processes, disk and network as the contract names them."""
        ...

    def watch(self) -> AsyncIterator[TenantEvent]:
        """Yield what happens to tenants, forever; reconnects, and yields `gateway.resynced` after a gap."""
        ...

    async def ready(self) -> None:
        """Return if the runtime can serve now; raise `Unavailable` with the reason else."""
        ...
