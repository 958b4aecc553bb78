"""The request for a worker, from the gateway to the broker, and what is common to all requests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from gateway.rootfs.operation import Limits

MESSAGE_MAX = 64 << 10  # bytes of a request to or an answer of the broker
UNKNOWN = "unknown request"  # the broker's error for a request of a later version


@dataclass(frozen=True, slots=True)
class Spawn:
    """The parameters of a worker. `memory` is in bytes, `loop` names what it runs.

    The empty `loop` answers calls; others are in `LOOPS` of the operations' module. `search` is for workers
    whose calls may take long, which get a lower priority. A worker that `looks` is read-only.
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
            Limits(**message["limits"]),
            memory,
            str(message["loop"]),
            bool(message["search"]),
            bool(message.get("looks")),  # missing from an older gateway
        )
