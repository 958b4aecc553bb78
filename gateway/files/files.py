"""The gateway's side of the editor's file calls and watches: choose the worker, publish writes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from types import TracebackType
from typing import Any, ClassVar

import orjson

from gateway.errors import GatewayError, TooLarge, Unavailable
from gateway.events import Bus
from gateway.files.changes import Changes
from gateway.files.transfers import Source, Transfers
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.links import Links
from gateway.rootfs.root import NO_SPACE, Spare, nothing_to_spare
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.settings import Settings


class Watch:
    """One watch. Unread changes are merged, up to `watch_changes` paths; more is an overflow.

    `unwatched` counts folders that cannot be watched because they are unreadable or too deep.
    """

    def __init__(self, number: int, tenant: str, maximum: int) -> None:
        self.number = number
        self.tenant = tenant
        self.unwatched = 0
        self._changes = Changes(maximum)
        self._ended: str | None = None
        self._closed = False
        self._grown = asyncio.Event()

    def feed(self, changes: Iterable[dict[str, Any]], overflow: bool) -> None:
        for change in changes:
            self._changes.add(**change)
        self._changes.overflow |= overflow
        self._grown.set()

    def end(self, reason: str) -> None:
        """Tell the reader that the watch has ended, and why. The first reason counts."""
        self._ended = self._ended or reason
        self._grown.set()

    def close(self) -> None:
        """End it on behalf of the reader."""
        self._closed = True
        self._grown.set()

    async def next(self) -> dict[str, Any] | None:
        """Wait for changes and return `{changes, overflow}`; the last has `ended`, then None follows."""
        await self._grown.wait()
        self._grown.clear()
        if self._closed:
            return None
        told = self._changes.take()
        if self._ended is not None:
            # later changes go unseen, so the reader must read the files again
            told |= {"overflow": True, "ended": self._ended}
            self._closed = True
            self._grown.set()
        return told


class Watches:
    """The watches of all tenants. An async context manager; use it from the event loop only."""

    def __init__(self, workers: Workers, settings: Settings) -> None:
        self._settings = settings
        self._links = Links(
            workers,
            "watch",
            maximum=settings.max_workers,
            idle=settings.worker_idle,
            told=self._told,
            lost=lambda tenant: self._end(tenant, "unavailable"),
        )
        self._numbers = itertools.count(1)
        self._watches: dict[str, dict[int, Watch]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Watches:
        await self._links.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tenant in list(self._watches):
            self._end(tenant, "unavailable")
        await self._links.__aexit__(kind, error, trace)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def add(self, root: FilesystemRoot, paths: list[str], ignore: list[str] | None) -> Watch:
        """Start a watch. Raises `RateLimited` at a limit of the host, and refusals of paths."""
        settings, tenant = self._settings, root.tenant
        link = await self._links.get(root)
        watches = self._watches.setdefault(tenant, {})
        watch = Watch(next(self._numbers), tenant, settings.watch_changes)
        watches[watch.number] = watch
        link.holds += 1
        given = {
            "watch": watch.number,
            "paths": paths,
            "ignore": list(settings.watch_ignore) if ignore is None else ignore,
        }
        try:
            reply, _ = await link.call("watch", given, settings.tool_timeout)
        except BaseException:
            self.remove(watch)
            raise
        if watches.get(watch.number) is not watch:
            raise Unavailable("the tenant's files went away; try again")
        watch.unwatched = orjson.loads(reply)["unwatched"]
        return watch

    def remove(self, watch: Watch) -> None:
        """End a watch that no longer has a reader. Idempotent."""
        watch.close()
        watches = self._watches.get(watch.tenant, {})
        if watches.pop(watch.number, None) is None:
            return
        if not watches:
            del self._watches[watch.tenant]
            self._links.end(watch.tenant)
            return
        task = asyncio.create_task(self._unwatch(watch))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _unwatch(self, watch: Watch) -> None:
        link = self._links.current(watch.tenant)
        if link is None:
            return
        link.holds -= 1
        try:
            await link.call("unwatch", {"watch": watch.number}, self._settings.tool_timeout)
        except GatewayError:
            return  # the worker has ended, and the watch with it

    def _told(self, tenant: str, payload: bytes) -> None:
        told = orjson.loads(payload)
        if "gone" in told:
            self._end(tenant, "workspace_changed")
            self._links.end(tenant)
            return
        watch = self._watches.get(tenant, {}).get(told["watch"])
        if watch is not None:
            watch.feed(told["changes"], told["overflow"])

    def _end(self, tenant: str, reason: str) -> None:
        for watch in self._watches.pop(tenant, {}).values():
            watch.end(reason)

    async def forget(self, tenant: str, reason: str) -> None:
        """End a tenant's watches and return once their worker is gone."""
        self._end(tenant, reason)
        if self._links.current(tenant) is not None:
            self._links.end(tenant)
            await self._links.ended()

    async def recheck(self, root: FilesystemRoot) -> None:
        """End a tenant's watches if its workspace was replaced."""
        if not await self._links.recheck(root.tenant, root):
            self._end(root.tenant, "workspace_changed")


log = logging.getLogger(__name__)


def file_written(bus: Bus, tenant: str, path: str, by: str, tool: str | None = None) -> None:
    """Publish that a client or a tool wrote a file, without its content."""
    facts = {"path": path[:1000], "by": by}
    bus.publish("file.written", tenant, facts if tool is None else {**facts, "tool": tool})


Changing = Callable[[FilesystemRoot, Sequence[str], str, str], AbstractAsyncContextManager[None]]


def _unnoted(
    root: FilesystemRoot, paths: Sequence[str], by: str, verb: str
) -> AbstractAsyncContextManager[None]:
    return nullcontext()


def _changed(method: str, given: Mapping[str, Any]) -> tuple[Sequence[str], str]:
    """Return the paths that a method changes, and what it does to them."""
    match method:
        case "files/write":
            return (given["path"],), "Saved"
        case "files/move":
            return (given["from"], given["to"]), "Moved"
        case "files/remove":
            return (given["path"],), "Removed"
    return (), ""


class Files:
    """The files of all tenants, as an editor uses them. An async context manager."""

    SCOPES: ClassVar[Mapping[str, str]] = {
        "files/stat": "files:read",
        "files/list": "files:read",
        "files/read": "files:read",
        "files/write": "files:write",
        "files/move": "files:write",
        "files/remove": "files:write",
        "files/mkdir": "files:write",
    }

    def __init__(
        self,
        runtime: TenantRuntime,
        workers: Workers,
        bus: Bus,
        settings: Settings,
        spare: Spare = nothing_to_spare,
    ) -> None:
        self._runtime = runtime
        self._spare = spare
        self._workers = workers
        self._bus = bus
        self._transfers = Transfers(workers, settings)
        self._watches = Watches(workers, settings)
        self._settings = settings
        self.changing: Changing = _unnoted
        """Entered while files are changed: notes whose that is."""
        self._began = time.time()
        # a separate worker, and one sweep at a time, because a sweep walks a whole workspace
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
        """Run a method with validated parameters and return its result as JSON.

        Raises the worker's refusals and what `Workers.call` raises.
        """
        root = await self._runtime.filesystem(tenant)
        # Walking whole trees takes long and must not delay reads. Writes of files go through one worker in
        # order; removing a folder in parallel to them is no different from a tenant's own `rm -r`.
        search = given.get("depth", 1) > 1 or (bool(given.get("recursive")) and not given.get("ifMatch"))
        changes = self.SCOPES[method] == "files:write"
        paths, verb = _changed(method, given)
        async with self.changing(root, paths, by, verb) if paths else nullcontext():
            while True:
                try:
                    result = await self._workers.call(root, method, given, search=search, changes=changes)
                    break
                except TooLarge as error:
                    if error.facts.get("reason") != NO_SPACE or not await self._spare(tenant):
                        raise
        if method == "files/write":
            file_written(self._bus, tenant, given["path"], by)
        return result

    @asynccontextmanager
    async def read(self, tenant: str, path: str) -> AsyncIterator[Source]:
        """Open a regular file for sending."""
        root = await self._runtime.filesystem(tenant)
        async with self._transfers.read(root, path) as source:
            yield source

    async def write(
        self, tenant: str, path: str, body: AsyncIterator[bytes], conditions: dict[str, Any], *, by: str = ""
    ) -> dict[str, Any]:
        """Write a file atomically from a stream of bytes; return `{etag, size, created}`."""
        root = await self._runtime.filesystem(tenant)
        async with self._transfers.write(root, path, conditions) as target:
            async for data in body:
                await target.write(data)
            async with self.changing(root, (path,), by, "Saved"):
                result = await target.commit()
        file_written(self._bus, tenant, path, by)
        return result

    def end_transfers(self) -> None:
        """Abort all uploads and downloads, because the gateway is shutting down."""
        self._transfers.end()

    async def watch(self, tenant: str, paths: list[str], ignore: list[str] | None) -> Watch:
        """Start watching; `unwatch` ends it."""
        return await self._watches.add(await self._runtime.filesystem(tenant), paths, ignore)

    def unwatch(self, watch: Watch) -> None:
        self._watches.remove(watch)

    async def forget(self, tenant: str, reason: str) -> None:
        """Release a tenant's files, which were replaced or are going away. Watches end with `reason`."""
        await self._transfers.forget(tenant)
        await self._watches.forget(tenant, reason)
        self._sweeps.end(tenant)
        await self._sweeps.ended()
        if (task := self._swept.get(tenant)) is not None and task.done():
            del self._swept[tenant]

    def _opened(self, root: FilesystemRoot, broke: bool) -> None:
        """Sweep a workspace when it is first opened, and after a worker was killed while working."""
        task = self._swept.get(root.tenant)
        if task is None or (broke and task.done()):
            self._swept[root.tenant] = asyncio.create_task(self._sweep(root))

    async def _sweep(self, root: FilesystemRoot) -> None:
        """Remove unfinished files left by killed gateways and workers.

        A file written to within `transfer_stall` may belong to another gateway that is shutting down or also
        serves the tenant; older ones belong to nobody.
        """
        stall = self._settings.transfer_stall
        async with self._sweeping:
            await asyncio.sleep(max(0.0, self._began + stall - time.time()))  # until those are old
            try:
                link = await self._sweeps.get(root)
                given = {"before": time.time() - stall}
                reply, _ = await link.call("files/sweep", given, self._settings.tool_timeout + 1)
            except GatewayError as error:
                log.info("cannot sweep the workspace of %s: %s", root.tenant, error.message)
            else:
                if removed := orjson.loads(reply)["removed"]:
                    log.warning("removed %d unfinished files from the workspace of %s", removed, root.tenant)
            finally:
                self._sweeps.end(root.tenant)

    async def recheck(self, tenant: str) -> None:
        """End a changed tenant's watches if its files have moved elsewhere."""
        try:
            root = await self._runtime.filesystem(tenant)
        except GatewayError:
            await self.forget(tenant, "unavailable")
        else:
            await self._watches.recheck(root)
