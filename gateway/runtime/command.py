"""A command in a tenant: what is asked for, what then runs, and how it ended."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from gateway.rootfs.command_cgroup import CgroupMember

StreamName = Literal["stdout", "stderr"]


class Holding(Protocol):
    """The parts of a command that survive this process: sockets, latest output, facts for the next process.

    `position` counts the bytes of input written to the command, including by earlier processes.
    """

    @property
    def position(self) -> int: ...

    @property
    def safe(self) -> bool:
        """Whether a holder currently holds it."""
        ...

    def note(self, facts: Mapping[str, Any]) -> None:
        """Replace the stored facts. The first call makes the command held."""
        ...

    def end(self, facts: Mapping[str, Any]) -> None:
        """Store the final facts of an ended command; besides them only its outputs are still held."""
        ...

    def keep(self, stream: StreamName, offset: int) -> int:
        """Drop an output's bytes before an offset; return the memory used by the rest, in bytes."""
        ...

    def accounts(self) -> bytes:
        """Return what `account` last stored."""
        ...

    def account(self, accounts: bytes) -> None:
        """Store up to 1000 bytes of input accounts, which is much faster than storing facts."""
        ...

    def purpose(self) -> Mapping[str, Any]:
        """Return what `note_purpose` last stored, or nothing."""
        ...

    def note_purpose(self, facts: Mapping[str, Any]) -> None:
        """Store what the command is for: up to 4 KiB, faster than facts. First before the first `note`."""
        ...

    def begin_with(self, at: int, data: bytes) -> None:
        """Store a part of the first 128 KiB of an output, which stay as long as the command is held."""
        ...

    def beginning(self, size: int) -> bytes:
        """Return the first bytes that `begin_with` stored."""
        ...

    def drop(self) -> None:
        """Stop holding the command. Idempotent."""
        ...


ARGUMENT_MAX: Final = (
    128 << 10
) - 1  # bytes of one argument or environment string: the kernel's MAX_ARG_STRLEN
ARGUMENTS_MAX: Final = 1 << 20  # bytes of all of them: half of what incusd can pass on
REPORT_MAX: Final = 8192  # bytes kept of `Process.report`; a path has at most 4096


@dataclass(frozen=True, slots=True)
class Pty:
    cols: int = 80
    rows: int = 24


Work = Literal["client", "tool", "helper"]


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command to run. `cwd` defaults to the workspace and `user` to its owner; both must exist.

    With `merged`, both streams go to stdout in the order of writing, and what the command writes to
    descriptor 3 becomes `Process.report`. `shown` is displayed instead of `argv` if the gateway has wrapped
    the command. With `outlive` the command has a `Process.holding` if the runtime supports that. `before` is
    awaited with it before anything of the command has happened; what it raises is passed on. `work` says
    whose its changes are: of whoever started it, of a tool's turn, or nobody's, as a language server's.
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
    work: Work = "client"
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
class KillResult:
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

    async def signal(self, number: int, *, tree: bool = False) -> None:
        """Send a signal to the command itself; with `tree`, to all its processes if they can be found."""
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

    async def kill(self, grace: float) -> KillResult:
        """Kill the whole tree: TERM, `grace` seconds, KILL. Return once none of it is left."""
        ...

    async def left(self) -> Sequence[CgroupMember] | None:
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
