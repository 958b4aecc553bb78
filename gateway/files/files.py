"""The gateway's side of the editor's file calls: picks the worker and publishes writes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, ClassVar

import orjson

from gateway.errors import GatewayError
from gateway.events import Bus
from gateway.files.transfers import Source, Transfers
from gateway.files.watches import Watch, Watches
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.links import Links
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.settings import Settings

log = logging.getLogger(__name__)


def file_written(bus: Bus, tenant: str, path: str, by: str, tool: str | None = None) -> None:
    """Tell that a file was written by a client or a tool, never with its content."""
    facts = {"path": path[:1000], "by": by}
    bus.publish("file.written", tenant, facts if tool is None else {**facts, "tool": tool})


class Files:
    """The files of every tenant, as an editor sees them. Use as an async context manager."""

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
        self._transfers = Transfers(workers, settings)
        self._watches = Watches(workers, settings)
        self._settings = settings
        self._began = time.time()
        # One at a time, and a separate worker: a sweep goes through a whole workspace.
        self._sweeps = Links(workers, "", maximum=1, idle=settings.worker_idle, search=True)
        self._sweeping = asyncio.Lock()
        self._swept: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Files:
        await self._transfers.__aenter__()
        await self._watches.__aenter__()
        await self._sweeps.__aenter__()
        self._workers.opened = self._opened
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._swept.values():
            task.cancel()
        await asyncio.gather(*self._swept.values(), return_exceptions=True)
        await self._sweeps.__aexit__(kind, error, trace)
        await self._watches.__aexit__(kind, error, trace)
        await self._transfers.__aexit__(kind, error, trace)

    async def call(self, tenant: str, method: str, given: dict[str, Any], *, by: str = "") -> bytes:
        """Run one method on its checked parameters and return its result as JSON.

        Raises what the worker refuses with and what `Workers.call` raises.
        """
        root = await self._runtime.filesystem(tenant)
        # What goes through whole trees takes long, and must hold up no read. Writes of files all go one way,
        # in their order; to remove a folder beside them is what a tenant's own `rm -r` does too.
        search = given.get("depth", 1) > 1 or (bool(given.get("recursive")) and not given.get("ifMatch"))
        changes = self.SCOPES[method] == "files:write"
        result = await self._workers.call(root, method, given, search=search, changes=changes)
        if method == "files/write":
            file_written(self._bus, tenant, given["path"], by)
        return result

    @asynccontextmanager
    async def read(self, tenant: str, path: str) -> AsyncIterator[Source]:
        """Open a regular file to be sent."""
        root = await self._runtime.filesystem(tenant)
        async with self._transfers.read(root, path) as source:
            yield source

    async def write(
        self, tenant: str, path: str, body: AsyncIterator[bytes], conditions: dict[str, Any], *, by: str = ""
    ) -> dict[str, Any]:
        """Put a file in place from its bytes, all or nothing; return `{etag, size, created}`."""
        root = await self._runtime.filesystem(tenant)
        async with self._transfers.write(root, path, conditions) as target:
            async for data in body:
                await target.write(data)
            result = await target.commit()
        file_written(self._bus, tenant, path, by)
        return result

    def end_transfers(self) -> None:
        """Break off every upload and download: the gateway is ending."""
        self._transfers.end()

    async def watch(self, tenant: str, paths: list[str], ignore: list[str] | None) -> Watch:
        """Begin to watch; end it by `unwatch`."""
        return await self._watches.add(await self._runtime.filesystem(tenant), paths, ignore)

    def unwatch(self, watch: Watch) -> None:
        self._watches.remove(watch)

    async def forget(self, tenant: str, reason: str) -> None:
        """Let go of a tenant's files, which were replaced or are going away. Watches end with `reason`."""
        await self._transfers.forget(tenant)
        await self._watches.forget(tenant, reason)
        self._sweeps.end(tenant)
        await self._sweeps.ended()
        if (task := self._swept.get(tenant)) is not None and task.done():
            del self._swept[tenant]

    def _opened(self, root: FilesystemRoot, broke: bool) -> None:
        """Have a workspace swept when it is first opened, and where a worker was killed at its work."""
        task = self._swept.get(root.tenant)
        if task is None or (broke and task.done()):
            self._swept[root.tenant] = asyncio.create_task(self._sweep(root))

    async def _sweep(self, root: FilesystemRoot) -> None:
        """Remove the unfinished files that killed gateways and workers left.

        A file that was written to within `transfer_stall` may belong to another gateway, which is ending or
        serves the tenant too; older ones belong to none.
        """
        stall = self._settings.transfer_stall
        async with self._sweeping:
            await asyncio.sleep(max(0.0, self._began + stall - time.time()))  # for those of a life before
            try:
                link = await self._sweeps.get(root)
                given = {"before": time.time() - stall}
                reply, _ = await link.call("files/sweep", given, self._settings.tool_timeout + 1)
            except GatewayError as error:
                log.info("the workspace of %s could not be swept: %s", root.tenant, error.message)
            else:
                if removed := orjson.loads(reply)["removed"]:
                    log.warning("removed %d unfinished files from the workspace of %s", removed, root.tenant)
            finally:
                self._sweeps.end(root.tenant)

    async def recheck(self, tenant: str) -> None:
        """Something of the tenant changed: end its watches where its files are in another place now."""
        try:
            root = await self._runtime.filesystem(tenant)
        except GatewayError:
            await self.forget(tenant, "unavailable")
        else:
            await self._watches.recheck(root)
