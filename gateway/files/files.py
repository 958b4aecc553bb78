"""Knows the gateway's side of the editor's calls: which worker is asked, and who is told of a write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gateway.events import Bus
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.settings import Settings


def file_written(bus: Bus, tenant: str, path: str, by: str) -> None:
    """Tell that a file was written by a client or a tool, never with its content."""
    bus.publish("file.written", tenant, {"path": path[:1000], "by": by})


class Files:
    """The files of every tenant, as an editor sees them. Used from the event loop only."""

    SCOPES: ClassVar[Mapping[str, str]] = {
        "files/stat": "files:read",
        "files/list": "files:read",
        "files/read": "files:read",
        "files/write": "files:write",
        "files/move": "files:write",
        "files/remove": "files:write",
        "files/mkdir": "files:write",
    }

    def __init__(self, runtime: TenantRuntime, workers: Workers, bus: Bus, settings: Settings) -> None:
        self._runtime = runtime
        self._workers = workers
        self._bus = bus
        self._settings = settings

    async def call(self, tenant: str, method: str, given: dict[str, Any], *, by: str = "") -> bytes:
        """Run one method on its checked parameters and return its result as JSON.

        Raises what the worker refuses with and what `Workers.call` raises.
        """
        root = await self._runtime.filesystem(tenant)
        # Listing a deep tree takes long, and must hold up no read. Writes all go one way, in their order.
        search = method == "files/list" and given.get("depth", 1) > 1
        result = await self._workers.call(root, method, given, search=search)
        if method == "files/write":
            file_written(self._bus, tenant, given["path"], by)
        return result
