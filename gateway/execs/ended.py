"""How a command ended, and a stand-in process for one that ended under an earlier gateway process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gateway.errors import Unavailable
from gateway.rootfs.command_cgroup import CgroupMember
from gateway.runtime import Exit, Holding, KillResult, StreamName

Reason = Literal["exited", "cancelled", "timeout", "lost"]


@dataclass(frozen=True, slots=True)
class ExecEnd:
    """How a command ended. `code` and `signal` are None if the wait status is unknown.

    `left` counts the processes of its tree that were still running; None if unknown. `cause` says why it was
    lost, if the gateway itself did that: `moved`.
    """

    reason: Reason
    code: int | None
    signal: str | None
    duration_ms: int
    offsets: Mapping[str, int]
    left: int | None = None
    cause: str | None = None

    def on_wire(self, exec_id: str) -> dict[str, Any]:
        return {
            "exec": exec_id,
            "exitCode": self.code,
            "signal": self.signal,
            "reason": self.reason,
            "durationMs": self.duration_ms,
            "offsets": dict(self.offsets),
            "left": self.left,
            **({} if self.cause is None else {"cause": self.cause}),
        }


def ended_of(told: Mapping[str, Any]) -> ExecEnd:
    """Parse the output of `ExecEnd.on_wire`."""
    code, signal, left = told.get("exitCode"), told.get("signal"), told.get("left")
    ended = ExecEnd(told["reason"], code, signal, told["durationMs"], told["offsets"], left)
    return replace(ended, cause=told.get("cause"))


class EndedProcess:
    """Stand-in for the process of a command that ended under an earlier gateway process; it does nothing."""

    holding: Holding | None = None
    patience: float = math.inf
    unsent = 0

    def __init__(
        self,
        pid: int,
        started_at: float,
        streams: tuple[StreamName, ...] = ("stdout", "stderr"),
        report: bytes = b"",
    ) -> None:
        self.streams = streams
        self.report = report
        self.pid = pid
        self.started_at = started_at

    async def read(self, stream: StreamName) -> bytes:
        return b""

    def take(self, stream: StreamName) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        pass

    async def close_stdin(self) -> None:
        pass

    async def resize(self, cols: int, rows: int) -> None:
        pass

    async def signal(self, number: int, *, tree: bool = False) -> None:
        pass

    async def flush(self) -> None:
        pass

    async def wait(self) -> Exit:
        raise Unavailable("the command ended before this gateway started")

    async def kill(self, grace: float) -> KillResult:
        return KillResult(0, False, 0)

    async def left(self) -> Sequence[CgroupMember]:
        return ()

    async def aclose(self) -> None:
        pass
