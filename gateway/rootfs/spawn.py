"""The request for a worker, from the gateway to the broker."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from gateway.rootfs.operation import Limits

MESSAGE_MAX = 64 << 10  # bytes of one request or answer of the broker


@dataclass(frozen=True, slots=True)
class Spawn:
    """What a worker is started with: `memory` is in bytes, `loop` what it does.

    The empty `loop` answers calls; the operations' module names the others in `LOOPS`. `search` is for
    workers whose calls may take long: they run with lower priority. A worker that `looks` can change nothing.
    """

    tenant: str
    workspace: str
    limits: Limits
    memory: int
    loop: str = ""
    search: bool = False
    looks: bool = False

    def wire(self) -> dict[str, Any]:
        return {
            "do": "spawn",
            "tenant": self.tenant,
            "workspace": self.workspace,
            "limits": {name: getattr(self.limits, name) for name in Limits.__slots__},
            "memory": self.memory,
            "loop": self.loop,
            "search": self.search,
            "looks": self.looks,
        }

    @classmethod
    def of(cls, message: dict[str, Any]) -> Spawn:
        """Check and take a request. Raises `ValueError`, `KeyError` or `TypeError` if it is malformed."""
        workspace = str(message["workspace"])
        if workspace != os.path.normpath(workspace) or not workspace.startswith("/") or "\0" in workspace:
            raise ValueError("a workspace is an absolute path")
        memory = message["memory"]
        if not isinstance(memory, int):  # one of a fraction may be too large to be passed on
            raise ValueError("memory is a whole number")
        return cls(
            str(message["tenant"]),
            workspace,
            Limits(**message["limits"]),
            memory,
            str(message["loop"]),
            bool(message["search"]),
            bool(message.get("looks")),  # an older gateway does not say
        )
