"""Disk space: the free space of the storage pool, and how much of it a tenant's snapshots may use.

A new snapshot takes no space; later it takes what the tenant has changed or removed since. Its maximum is the
part of the disk that no earlier snapshot has when it is created, and that is what counts. Incus reports only
the space exclusive to a snapshot, not what two snapshots share.
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
    """Disk space of all tenants. Use it from the event loop only, for one change per tenant at a time."""

    def __init__(
        self,
        runtime: TenantRuntime,
        workers: Workers,
        store: Store,
        settings: Settings,
        spare: Callable[[int], Awaitable[int]] | None = None,
    ) -> None:
        """`spare` frees bytes of the pool that are used only as caches, and returns how many."""
        self._runtime, self._workers, self._store, self._settings = runtime, workers, store, settings
        self._spare = spare

    async def admit(self) -> None:
        """Check that the pool has room for another disk, dropping caches if necessary.

        Raises `Unavailable` with `disk_full`.
        """
        await self._look(self._spare)

    async def spacious(self) -> None:
        """Check for that room without dropping anything. Raises the same."""
        await self._look(None)

    async def _look(self, spare: Callable[[int], Awaitable[int]] | None) -> None:
        space = await self._runtime.usage.space()
        if space is None:
            return
        left, reserve = space.total - space.used, int(space.total * self._settings.pool_reserve)
        if left < reserve and spare is not None:
            left += await spare(reserve - left)  # the pool itself reports it only seconds later
        if left < reserve:
            raise Unavailable(
                f"the storage pool has {left // _MiB} MiB left, but {reserve // _MiB} are kept in "
                "reserve: ask the operator for a larger pool, or delete snapshots",
                reason="disk_full",
                retry_after=_RETRY_AFTER,
            )

    @contextlib.asynccontextmanager
    async def snapshot(self, tenant: str, name: str) -> AsyncIterator[None]:
        """Reserve room for a snapshot that is created while the context is open.

        Raises `TooLarge` if the tenant's snapshots would exceed their limit, and what `admit` and the store
        raise.
        """
        await self.admit()
        await self._settle(tenant)
        held = sum((await self._counted(tenant, await self._runtime.snapshots.list(tenant))).values())
        if (together := await self._runtime.usage.held(tenant)) is None:
            more = await self._runtime.usage.unshared(tenant) or 0
        else:  # the kernel knows better than the sum, and limits it as well
            held = min(held, together)
            more = together - held
        limit = await self._limit(tenant)
        if held + more > limit:
            raise TooLarge(
                f"the tenant's snapshots use {held // _MiB} MiB, and this one would add {more // _MiB} MiB; "
                f"their limit is {limit // _MiB} MiB: raise GATEWAY_SNAPSHOT_BYTES, or delete one",
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
        """Transfer the count of a snapshot deleted within the context to the next one."""
        kept = await self._runtime.snapshots.list(tenant)
        counted = await self._counted(tenant, kept)
        yield
        changed: dict[str, int] = {}
        for one, later in pairwise(kept):
            if one.name == name:  # its exclusive bytes are freed; the next snapshot still has the rest
                changed[later.name] = counted[later.name] + max(0, counted[name] - (one.size or 0))
        try:
            await self._store.write(lambda connection: _put(connection, tenant, changed, gone=name))
        except StoreFailed as failed:
            log.warning("a deleted snapshot of %s is still counted: %s", tenant, failed.message)

    async def forget(self, tenant: str) -> None:
        """Forget a destroyed tenant."""
        try:
            await self._store.write(lambda connection: _drop(connection, tenant))
        except StoreFailed as failed:
            log.warning("deleted snapshots of %s are still counted: %s", tenant, failed.message)

    async def _counted(self, tenant: str, kept: Sequence[Snapshot]) -> dict[str, int]:
        """Return the count of each snapshot; for one created by others, its exclusive bytes."""
        known = await self._store.read(lambda connection: _all(connection, tenant))
        return {one.name: max(known.get(one.name, 0), one.size or 0) for one in kept}

    async def _limit(self, tenant: str) -> int:
        if self._settings.snapshot_bytes:
            return self._settings.snapshot_bytes
        disk = (await self._runtime.tenants.get(tenant)).limits.get("disk") or self._settings.tenant_disk
        return size_of(str(disk))

    async def _settle(self, tenant: str) -> None:
        """Flush the tenant's writes to the disk, because only those are accounted."""
        try:
            root = await self._runtime.filesystem(tenant)
            await self._workers.call(root, "files/settle", {}, search=True, changes=True)
        except GatewayError as error:
            log.info("the latest writes of %s may not be counted: %s", tenant, error.message)


# --- SQL statements, run by the store -------------------------------------------------------------------


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
