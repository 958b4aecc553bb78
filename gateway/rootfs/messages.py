"""Messages between the gateway, the broker and workers: the request for a worker, its limits, and frames.

A worker's requests and replies are on a stream socket. A request is a u32 length (big-endian) and the JSON
`[operation, arguments]`. A reply is a u32 length, a status byte and a payload: DONE with the operation's
bytes, REFUSED with `{code, message, facts}` of a `GatewayError`, BROKEN with text for the log. The first
frame, READY, is unsolicited and lists the confinement's layers as JSON. PASSED is DONE with a descriptor
(SCM_RIGHTS), TOLD is an unsolicited frame; both are only for `gateway.rootfs.links`.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, Final

MESSAGE_MAX: Final = 64 << 10  # bytes of a request to or an answer of the broker

DONE, REFUSED, BROKEN, READY, PASSED, TOLD = range(6)
HEAD: Final = struct.Struct(">IB")  # length of status byte and payload, status
LENGTH: Final = struct.Struct(">I")
REPLY_MAX: Final = 64 << 20  # bytes the gateway accepts from a worker, which may be compromised

DEPTH_MAX: Final = 256  # folders in a path or a search
RESULT_MAX: Final = 1 << 20  # bytes of a search's result, of a range of a file, and of a diff


def frame(status: int, payload: bytes) -> bytes:
    return HEAD.pack(len(payload) + 1, status) + payload


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of one call. Those that have a setting of the same name are set by it."""

    read_max: int = 256 << 10  # bytes of a file that Read returns whole, as in Claude Code
    write_max: int = 8 << 20  # bytes of a file that Write and Edit accept
    result_max: int = RESULT_MAX
    visit_max: int = 300_000  # files and folders that a Glob or Grep visits: five times a large node_modules
    tool_timeout: float = 10.0  # seconds
    list_max: int = 10_000  # entries of a files/list
    watch_folders: int = 8192
    watch_changes: int = 1000  # paths of one message
    pdf_max: int = 32 << 20  # bytes of a PDF that Read shows
    pdf_pages: int = 20  # that one Read shows, as in Claude Code
    matches_max: int = 10_000  # lines or files that a Grep returns
    depth_max: int = DEPTH_MAX
    pattern_max: int = 4000  # characters of a pattern or glob, so that compiling it stays fast


@dataclass(frozen=True, slots=True)
class Spawn:
    """The parameters of a worker. `memory` is in bytes, `loop` names what it runs.

    The empty `loop` answers calls; others are in `LOOPS` of the operations' module. `search` is for workers
    whose calls may take long, which get a lower priority. A worker that `looks` is read-only.
    """

    tenant: str
    workspace: str
    limits: CallLimits
    memory: int
    loop: str = ""
    search: bool = False
    looks: bool = False

    def wire(self) -> dict[str, Any]:
        return {
            "do": "spawn",
            "tenant": self.tenant,
            "workspace": self.workspace,
            "limits": {name: getattr(self.limits, name) for name in CallLimits.__slots__},
            "memory": self.memory,
            "loop": self.loop,
            "search": self.search,
            "looks": self.looks,
        }

    @classmethod
    def of(cls, message: dict[str, Any]) -> Spawn:
        """Parse and check a request. Raises `ValueError`, `KeyError` or `TypeError` if it is malformed."""
        workspace = str(message["workspace"])
        if workspace != os.path.normpath(workspace) or not workspace.startswith("/") or "\0" in workspace:
            raise ValueError("the workspace must be an absolute path")
        memory = message["memory"]
        if not isinstance(memory, int):  # a float may be too large to pass on
            raise ValueError("memory must be an integer")
        return cls(
            str(message["tenant"]),
            workspace,
            CallLimits(**message["limits"]),
            memory,
            str(message["loop"]),
            bool(message["search"]),
            bool(message["looks"]),
        )
