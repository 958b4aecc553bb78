"""Copy files of any size between a workspace and a client.

A worker opens the file and passes its descriptor (see `opening`). The bytes are copied in this package's own
threads, so that a slow disk delays neither the event loop nor other threads. At most one chunk per transfer
is in memory.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Final, TypeVar

import orjson

from gateway.admission import Admission, descriptors
from gateway.errors import GatewayError, TooLarge, Unavailable
from gateway.rootfs import FilesystemRoot, file_calls
from gateway.rootfs.links import Link, Links
from gateway.rootfs.root import refusal
from gateway.rootfs.workers import Workers
from gateway.settings import Settings

CHUNK: Final = 512 << 10  # bytes per read or write of the disk; malloc would map a whole MiB anew each time
_THREADS: Final = 8  # more would only queue at the same disks
_ENDED: Final = "the transfer was aborted: the tenant or the gateway is going away"

T = TypeVar("T")


class _Held:
    """A descriptor of a tenant's file that can be closed at any time, even while a thread uses it."""

    def __init__(self, descriptor: int, threads: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._threads = threads
        self._busy = False
        self._closing = False
        self.closed = False

    async def run(self, do: Callable[[int], T]) -> T:
        """Call `do` with the descriptor in a thread, one call at a time. Its `OSError`s are translated."""
        if self._closing or self.closed:
            raise Unavailable("the tenant's files went away during the transfer")
        self._busy = True
        running = asyncio.get_running_loop().run_in_executor(self._threads, do, self._descriptor)
        running.add_done_callback(self._done)
        try:
            # Shielded, because the thread continues with the descriptor even if its caller is cancelled.
            return await asyncio.shield(running)
        except OSError as error:
            raise refusal(error) from None

    def _done(self, running: asyncio.Future[Any]) -> None:
        self._busy = False
        if not running.cancelled():
            running.exception()  # mark as retrieved, in case the caller is gone
        if self._closing:
            self.close()

    def close(self) -> None:
        """Close the descriptor, or have it closed when the thread using it is done. Idempotent."""
        self._closing = True
        if not self._busy and not self.closed:
            self.closed = True
            os.close(self._descriptor)


class Source:
    """A file to send."""

    def __init__(self, held: _Held, etag: str, size: int) -> None:
        self.etag = etag
        self.size = size
        self._held = held

    async def read(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes from `offset`, at most a `CHUNK`; b"" at the end."""
        return await self._held.run(lambda descriptor: os.pread(descriptor, min(count, CHUNK), offset))


class Target:
    """A file being received. `commit` gives it its name; without that nothing is left of it."""

    def __init__(self, held: _Held, limit: int, commit: Callable[[], Any]) -> None:
        self.received = 0
        self._held = held
        self._limit = limit
        self._commit = commit
        self._chunks: list[bytes] = []
        self._kept = 0

    async def write(self, data: bytes) -> None:
        """Append bytes. Raises `TooLarge` above `upload_max` or if the workspace is full."""
        self.received += len(data)
        if self.received > self._limit:
            raise TooLarge(f"the file exceeds {self._limit} bytes", reason="too_large", limit=self._limit)
        self._chunks.append(data)
        self._kept += len(data)
        if self._kept >= CHUNK:
            await self._flush()

    async def _flush(self) -> None:
        data, self._chunks, self._kept = b"".join(self._chunks), [], 0
        if data:
            await self._held.run(lambda descriptor: _write_all(descriptor, data))

    async def commit(self) -> dict[str, Any]:
        """Move the file into place; return `{etag, size, created}`. Raises `Conflict` by the conditions."""
        await self._flush()
        await self._held.run(file_calls.start_writing)  # in a thread, or the commit would wait
        self._held.close()
        result: dict[str, Any] = await self._commit()
        return result


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Transfers:
    """The uploads and downloads of all tenants. An async context manager."""

    def __init__(self, workers: Workers, settings: Settings) -> None:
        self._workers = workers
        self._settings = settings
        self._links = Links(
            workers,
            "",
            maximum=settings.max_workers,
            idle=settings.worker_idle,
            farewell="files/releaseAll",  # undoes unfinished uploads, whatever ends the worker
        )
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")
        self._held: dict[str, dict[_Held, asyncio.Timeout]] = defaultdict(dict)
        self._slots = Admission[str](
            "uploads and downloads",
            each=settings.max_transfers,
            total=descriptors() // 8,  # each has a file open
            hint="wait until some finish",
        )
        self._undoing: set[asyncio.Task[None]] = set()
        self._over = False

    async def __aenter__(self) -> Transfers:
        await self._links.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        await asyncio.gather(*self._undoing, return_exceptions=True)
        await self._links.__aexit__(kind, error, trace)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def read(self, root: FilesystemRoot, path: str) -> AsyncIterator[Source]:
        """Open a regular file. Raises the worker's refusals, and `RateLimited`."""
        async with self._hold(root, "files/open", {"path": path}) as (_, told, held):
            yield Source(held, told["etag"], told["size"])

    @asynccontextmanager
    async def write(
        self, root: FilesystemRoot, path: str, conditions: dict[str, Any]
    ) -> AsyncIterator[Target]:
        """Start an upload; leaving the context without a commit leaves nothing behind.

        `conditions` are `ifMatch` and `ifNoneMatch` as in `conditions.check`. They are checked now, so that a
        hopeless upload fails before its first byte, and again by the commit.
        """
        given = {"path": path, **conditions}
        async with self._hold(root, "files/create", given) as (link, told, held):

            async def commit() -> dict[str, Any]:
                await link.call("files/finish", {"token": told["token"]}, self._settings.tool_timeout)
                place = {name: told[name] for name in ("folder", "temporary", "inode")}
                reply = await self._workers.call(root, "files/commit", {**given, **place, "createDirs": True})
                found: dict[str, Any] = orjson.loads(reply)
                return found

            try:
                yield Target(held, self._settings.upload_max, commit)
            except BaseException:
                await asyncio.shield(self._release(link, told["token"]))  # before the error is reported
                raise
            # not awaited: it frees the replaced file, which may be large
            self._release(link, told["token"])

    def _release(self, link: Link, token: str) -> asyncio.Task[None]:
        """Make the worker forget an upload, and remove its file if it was not committed.

        Runs in a separate task, which continues whatever happens to the caller.
        """

        async def release() -> None:
            with suppress(GatewayError):  # the worker is gone and has removed unfinished files
                await link.call("files/release", {"token": token}, self._settings.tool_timeout)

        task = asyncio.create_task(release())
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)
        return task

    @asynccontextmanager
    async def _hold(
        self, root: FilesystemRoot, operation: str, given: dict[str, Any]
    ) -> AsyncIterator[tuple[Link, dict[str, Any], _Held]]:
        tenant = root.tenant
        with self._slots.reserve(tenant):
            link = await self._links.get(root)
            link.holds += 1
            try:
                opening = asyncio.ensure_future(self._open(link, operation, given))
                try:
                    # Shielded: a started upload must become known, or its file would stay.
                    told, held = await asyncio.shield(opening)
                except asyncio.CancelledError:
                    opening.add_done_callback(lambda done: self._undo(link, done))
                    raise
                if self._over:  # `end` was called meanwhile
                    self._undo(link, opening)
                    raise Unavailable(_ENDED)
                try:
                    # a scope that `end` can expire, wherever its task is waiting
                    async with asyncio.timeout(None) as scope:
                        self._held[tenant][held] = scope
                        try:
                            yield link, told, held
                        finally:
                            held.close()
                            self._let_go(tenant, held)
                except TimeoutError:
                    if scope.expired():
                        raise Unavailable(_ENDED) from None
                    raise
            finally:
                link.holds -= 1

    def _let_go(self, tenant: str, held: _Held) -> asyncio.Timeout | None:
        scopes = self._held.get(tenant, {})
        scope = scopes.pop(held, None)
        if not scopes:
            self._held.pop(tenant, None)
        return scope

    def end(self, tenant: str | None = None) -> None:
        """Abort a tenant's transfers, or all and any later ones; nothing is left of uploads."""
        self._over |= tenant is None
        for name in [tenant] if tenant is not None else list(self._held):
            for held in list(self._held.get(name, ())):
                scope = self._let_go(name, held)
                held.close()
                if scope is not None:
                    scope.reschedule(asyncio.get_running_loop().time())

    async def _open(self, link: Link, operation: str, given: dict[str, Any]) -> tuple[dict[str, Any], _Held]:
        reply, descriptor = await link.call(operation, given, self._settings.tool_timeout)
        assert descriptor is not None  # the worker passes one or refuses
        return orjson.loads(reply), _Held(descriptor, self._threads)

    def _undo(self, link: Link, opening: asyncio.Future[tuple[dict[str, Any], _Held]]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            return
        told, held = opening.result()
        held.close()
        if "token" in told:
            self._release(link, told["token"])

    async def forget(self, tenant: str) -> None:
        """End a tenant's transfers and worker, to free its storage. Unfinished uploads are undone."""
        self.end(tenant)
        if self._links.current(tenant) is not None:
            self._links.end(tenant)
            await self._links.ended()
