"""The gateway's side of file watching: watches, pending changes, and how watches end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import orjson

from gateway.errors import GatewayError, Unavailable
from gateway.files.changes import Changes
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.links import Links
from gateway.rootfs.workers import Workers
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
