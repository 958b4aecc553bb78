"""Disk space: what is left of the storage pool, and what a tenant's snapshots may hold of it.

A snapshot costs nothing when it is made, and later what the tenant has changed or removed since. What it can
cost at most is what no earlier one holds of the disk when it is made, and that is counted. Incus tells of a
snapshot what nothing else holds; of data that two of them share it tells nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from gateway.errors import GatewayError, TooLarge, Unavailable
from gateway.rootfs.workers import Workers
from gateway.runtime import Snapshot, TenantRuntime
from gateway.runtime.sizes import size_of
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

_MiB: Final = 1 << 20
_RETRY_AFTER: Final = 60


class DiskSpace:
    """The room of all tenants. Used from the event loop only, for one change of a tenant at a time."""

    def __init__(
        self,
        runtime: TenantRuntime,
        workers: Workers,
        store: Store,
        settings: Settings,
        spare: Callable[[int], Awaitable[int]] | None = None,
    ) -> None:
        """`spare` gives bytes of the pool back that hold nothing but time, and returns how many."""
        self._runtime, self._workers, self._store, self._settings = runtime, workers, store, settings
        self._spare = spare

    async def admit(self) -> None:
        """Return where the pool has room for one more disk. Raises `Unavailable`, with `disk_full`.

        What is kept only to be quick is given up for it.
        """
        await self._look(self._spare)

    async def spacious(self) -> None:
        """Return where there is that room without giving anything up. Raises the same."""
        await self._look(None)

    async def _look(self, spare: Callable[[int], Awaitable[int]] | None) -> None:
        space = await self._runtime.space()
        if space is None:
            return
        left, reserve = space.total - space.used, int(space.total * self._settings.pool_reserve)
        if left < reserve and spare is not None:
            left += await spare(reserve - left)  # the pool itself says so only seconds later
        if left < reserve:
            raise Unavailable(
                f"the storage pool has {left // _MiB} MiB left, and {reserve // _MiB} are kept in reserve: "
                "ask whoever runs the gateway for a larger pool, or delete snapshots",
                reason="disk_full",
                retry_after=_RETRY_AFTER,
            )

    @contextlib.asynccontextmanager
    async def snapshot(self, tenant: str, name: str) -> AsyncIterator[None]:
        """Have room for a new snapshot, which is made while the context is open.

        Raises `TooLarge` if the tenant's would hold more than they may, and what `admit` and the store
        raise.
        """
        await self.admit()
        await self._settle(tenant)
        held = sum((await self._counted(tenant, await self._runtime.snapshots(tenant))).values())
        more, limit = await self._runtime.unshared(tenant) or 0, await self._limit(tenant)
        if held + more > limit:
            raise TooLarge(
                f"the tenant's snapshots hold {held // _MiB} MiB, and this one would hold {more // _MiB} MiB "
                f"beside them; {limit // _MiB} MiB are the most they may: raise GATEWAY_SNAPSHOT_BYTES, or "
                "delete one",
                reason="quota",
                limit=limit,
                held=held,
            )
        await self._store.write(lambda connection: _put(connection, tenant, {name: more}))
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreFailed):
                await self._store.write(lambda connection: _drop(connection, tenant, name))
            raise

    @contextlib.asynccontextmanager
    async def deleting(self, tenant: str, name: str) -> AsyncIterator[None]:
        """Count what a snapshot that is deleted meanwhile leaves to the next one."""
        kept = await self._runtime.snapshots(tenant)
        counted = await self._counted(tenant, kept)
        yield
        changed: dict[str, int] = {}
        for one, later in pairwise(kept):
            if one.name == name:  # what only this one held is free; the rest the next one holds on
                changed[later.name] = counted[later.name] + max(0, counted[name] - (one.size or 0))
        try:
            await self._store.write(lambda connection: _put(connection, tenant, changed, gone=name))
        except StoreFailed as failed:
            log.warning("what a snapshot of %s held stays counted: %s", tenant, failed.message)

    async def forget(self, tenant: str) -> None:
        """Forget a tenant that is destroyed."""
        try:
            await self._store.write(lambda connection: _drop(connection, tenant))
        except StoreFailed as failed:
            log.warning("what snapshots of %s held stays counted: %s", tenant, failed.message)

    async def _counted(self, tenant: str, kept: Sequence[Snapshot]) -> dict[str, int]:
        """Return what each snapshot counts: of one that others made what it alone holds."""
        known = await self._store.read(lambda connection: _all(connection, tenant))
        return {one.name: max(known.get(one.name, 0), one.size or 0) for one in kept}

    async def _limit(self, tenant: str) -> int:
        if self._settings.snapshot_bytes:
            return self._settings.snapshot_bytes
        disk = (await self._runtime.get(tenant)).limits.get("disk") or self._settings.tenant_disk
        return size_of(str(disk))

    async def _settle(self, tenant: str) -> None:
        """Bring to the disk what the tenant wrote: only that is counted there."""
        try:
            root = await self._runtime.filesystem(tenant)
            await self._workers.call(root, "files/settle", {}, search=True, changes=True)
        except GatewayError as error:
            log.info("what %s wrote last may not be counted: %s", tenant, error.message)


# --- statements: each is a work of the store -----------------------------------------------------------


def _all(connection: sqlite3.Connection, tenant: str) -> dict[str, int]:
    return dict(connection.execute("SELECT name, bytes FROM snapshots WHERE tenant = ?", (tenant,)))


def _put(
    connection: sqlite3.Connection, tenant: str, counted: Mapping[str, int], gone: str | None = None
) -> None:
    if gone is not None:
        _drop(connection, tenant, gone)
    connection.executemany(
        "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)",
        [(tenant, name, size) for name, size in counted.items()],
    )


def _drop(connection: sqlite3.Connection, tenant: str, name: str | None = None) -> None:
    connection.execute(
        "DELETE FROM snapshots WHERE tenant = ?1 AND (?2 IS NULL OR name = ?2)", (tenant, name)
    )
