"""What one host has room for: how many more tenants its memory can take, and the space of its storage pool.

An idle tenant uses a few per cent of its memory limit, so a host may promise more than it has:
GATEWAY_OVERCOMMIT times its memory, to all tenants that are not stopped. Regardless of that, no tenant is
started while less than GATEWAY_MEMORY_RESERVE of the memory is available.

A new snapshot takes no space; later it takes what the tenant has changed or removed since. Its maximum is the
part of the disk that no earlier snapshot has when it is created, and that is what counts. Incus reports only
the space exclusive to a snapshot, not what two snapshots share.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Interface
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from gateway.admission import Admission
from gateway.errors import GatewayError, NotFound, RateLimited, TooLarge, Unavailable
from gateway.rootfs.workers import Workers
from gateway.runtime import DiskSnapshot, TenantInstance, TenantInstances, TenantRuntime
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.sizes import SIZES, size_of
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

_MiB: Final = 1 << 20
_RETRY_AFTER: Final = 60
_AT_REST: Final = 64 * _MiB  # assumed memory of an idle tenant, with page cache, if none can be measured
_DISK: Final = 64 * _MiB  # assumed disk space of a tenant besides its image, if there is none yet
_COPY: Final = 1.3  # CPU seconds of one copy of a tenant to another member, at its home; as much there
_ASKED: Final = 8  # tenants measured in parallel


@dataclass(frozen=True, slots=True)
class Memory:
    """The host's memory, in bytes."""

    total: int
    available: int


def host_memory() -> Memory:
    """Read this host's memory."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    found = {words[0]: int(words[1]) << 10 for words in lines if len(words) > 1}
    return Memory(found["MemTotal:"], found["MemAvailable:"])


class Capacity:
    """The memory one host has promised. Use it from the event loop only."""

    def __init__(
        self, tenants: TenantInstances, settings: Settings, memory: Callable[[], Memory] = host_memory
    ) -> None:
        self._tenants, self._settings, self._memory = tenants, settings, memory
        self._deciding = asyncio.Lock()
        self._held: dict[object, tuple[str, int]] = {}  # tenants about to run, and their limits

    @contextlib.asynccontextmanager
    async def promise(self, tenant: str, memory: str | None = None) -> AsyncIterator[None]:
        """Reserve memory for a tenant that is started, or gets a larger limit, while the context is open.

        `memory` is its limit in Incus's notation; None means its current one, and is also for a tenant that
        no longer exists. Raises `Unavailable` with `capacity` if the host is full, and `RateLimited` at the
        maximum number of tenants.
        """
        if self._settings.runtime != "incus":  # other runtimes do not limit memory
            yield
            return
        mine = object()
        async with self._deciding:
            self._held[mine] = (tenant, await self._decide(tenant, memory))
        try:
            yield
        finally:
            del self._held[mine]

    async def takes(self, tenants: Sequence[TenantInstance]) -> int | None:
        """Return how many more tenants of the usual size the host has memory for; None without limits."""
        if self._settings.runtime != "incus":
            return None
        host = await asyncio.to_thread(self._memory)
        left = host.available - int(self._settings.memory_reserve * host.total)
        if most := self._settings.overcommit * host.total:
            left = min(left, int(most) - sum(promised(tenants, host.total, self._settings).values()))
        return max(0, left) // max(1, limit_of(None, host.total, self._settings))

    async def _decide(self, tenant: str, memory: str | None) -> int:
        """Return the bytes to promise to the tenant."""
        host, found = self._memory(), {one.name: one for one in await self._tenants.list()}
        if memory is None and tenant not in found:
            return 0  # the start reports the error
        limit = found[tenant].limits.get("memory") if memory is None else memory
        need = limit_of(limit, host.total, self._settings)
        awake = promised(found.values(), host.total, self._settings)
        for name, held in self._held.values():
            awake[name] = max(awake.get(name, 0), held)
        if tenant not in found and len({*found, *awake, tenant}) > self._settings.max_tenants:
            raise RateLimited(
                f"the limit of {self._settings.max_tenants} tenants is reached; raise GATEWAY_MAX_TENANTS",
                reason="quota",
            )
        if awake.get(tenant, 0) >= need:
            return need
        after, most = sum((awake | {tenant: need}).values()), self._settings.overcommit * host.total
        if most and after > most:
            log.warning(
                "%s is refused: %d MiB would be promised, but the limit is %d MiB (GATEWAY_OVERCOMMIT)",
                *(tenant, after // _MiB, most // _MiB),
            )
            raise self._refused(need)
        if host.available < self._settings.memory_reserve * host.total:
            log.warning(
                "%s is refused: only %d MiB of memory are available (GATEWAY_MEMORY_RESERVE)",
                *(tenant, host.available // _MiB),
            )
            raise self._refused(need)
        return need

    @staticmethod
    def _refused(need: int) -> Unavailable:
        return Unavailable(
            f"this host has no room for another {need // _MiB} MiB of tenants' memory: try again when others "
            "sleep, take a smaller size, or ask the operator (incus-gateway capacity shows details)",
            reason="capacity",
            retry_after=_RETRY_AFTER,
        )


def limit_of(text: object, total: int, settings: Settings) -> int:
    """Return a memory limit in bytes, given as a size or as a share of all memory, such as 25%."""
    limit = str(text or settings.tenant_memory)
    if limit.endswith("%") and limit[:-1].isdigit():
        return total * min(int(limit[:-1]), 100) // 100
    return min(size_of(limit), total)


def promised(tenants: Iterable[TenantInstance], total: int, settings: Settings) -> dict[str, int]:
    """Return the bytes promised to each tenant that is not stopped."""
    return {
        one.name: limit_of(one.limits.get("memory"), total, settings)
        for one in tenants
        if one.status != "stopped"
    }


# --- remaining capacity ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """A host's resources, their use by tenants, and how many more tenants of each size fit."""

    tenants: int
    awake: int
    memory_total: int
    memory_available: int
    memory_promised: int
    memory_promise: int  # the limit of that, 0 if unlimited
    memory_each: int  # average of a running tenant, including page cache
    measured: bool  # whether that was measured or is an assumption
    disk_total: int
    disk_used: int
    disk_each: int
    copied: int  # tenants that have copies on other members of a cluster
    copying: float  # share of one core that these take here, if all have changed each time
    more: Mapping[str, Mapping[str, int]]  # by size and resource: how many more tenants it suffices for

    def takes(self, size: str) -> tuple[int, str]:
        """Return how many more tenants of a size fit, and the resource that is used up then."""
        what = min(self.more[size], key=lambda one: self.more[size][one])
        return self.more[size][what], what

    def to_dict(self) -> dict[str, Any]:
        sizes = {}
        for size in self.more:
            takes, what = self.takes(size)
            sizes[size] = {"takes": takes, "bottleneck": what, "by": dict(self.more[size])}
        facts = asdict(self)
        del facts["more"]
        return {**facts, "sizes": sizes}


async def look(runtime: IncusRuntime, settings: Settings, host: Memory) -> Report:
    """Measure this host and its tenants. Raises `GatewayError` if Incus is unavailable."""
    tenants = await runtime.tenants.list()
    running = [one.name for one in tenants if one.status == "running"]
    uses = await _measured(runtime, running)
    each = sum(use["memory_bytes"] for use in uses) // len(uses) if uses else _AT_REST
    space = await runtime.usage.space()
    # besides what tenants share with their image and each other
    disk_each = max(_MiB, space.used // len(tenants)) if space is not None and tenants else _DISK
    awake = promised(tenants, host.total, settings)
    most = int(settings.overcommit * host.total)
    left = {
        "tenants": settings.max_tenants - len(tenants),
        "addresses": IPv4Interface(settings.network_ipv4).network.num_addresses - 3 - len(tenants),
    }
    instances = await _instances_left(runtime, settings)
    if instances is not None:
        left["instances"] = instances
    if space is not None:
        left["disk"] = (space.total - space.used - int(space.total * settings.pool_reserve)) // disk_each
    left["memory"] = (host.available - int(settings.memory_reserve * host.total)) // max(1, each)
    more = {}
    for size, has in SIZES.items():
        promise = (most - sum(awake.values())) // limit_of(has.get("memory"), host.total, settings)
        by = left | ({"promise": promise} if most else {})
        more[size] = {what: max(0, count) for what, count in by.items()}
    standby = (settings.standby if one.standby is None else one.standby for one in tenants)
    rounds = [seconds for seconds in standby if seconds] if runtime.incus.known_member else []
    return Report(
        tenants=len(tenants),
        awake=len(awake),
        memory_total=host.total,
        memory_available=host.available,
        memory_promised=sum(awake.values()),
        memory_promise=most,
        memory_each=each,
        measured=bool(uses),
        disk_total=space.total if space is not None else 0,
        disk_used=space.used if space is not None else 0,
        disk_each=disk_each,
        copied=len(rounds),
        copying=sum(_COPY / seconds for seconds in rounds),
        more=more,
    )


async def _measured(runtime: IncusRuntime, names: Sequence[str]) -> list[Mapping[str, Any]]:
    asking = Admission[str]("tenants that are measured", each=1, total=_ASKED)

    async def one(name: str) -> Mapping[str, Any] | None:
        async with asking.slot(name):
            with contextlib.suppress(NotFound):
                return await runtime.usage.metrics(name)
        return None

    found = await asyncio.gather(*(one(name) for name in names))
    return [use for use in found if use is not None and use["memory_bytes"]]


async def _instances_left(runtime: IncusRuntime, settings: Settings) -> int | None:
    """Return how many more instances the project's limits allow, None if it has no limits."""
    with contextlib.suppress(GatewayError):
        config = (await runtime.incus.get(f"/1.0/projects/{settings.incus_project}"))["config"]
        limits = [config.get("limits.instances"), config.get("limits.containers")]
        known = [int(limit) for limit in limits if str(limit).isdigit()]
        if known:
            return min(known) - len(await runtime.incus.names())  # of all members of a cluster
    return None


def lines(report: Report) -> list[str]:
    """Format a report for people."""
    each = "measured" if report.measured else "assumed: none runs"
    said = [
        f"tenants   {report.tenants}, {report.awake} of them awake",
        f"memory    {report.memory_available // _MiB} of {report.memory_total // _MiB} MiB available; "
        f"{report.memory_each // _MiB} MiB a running tenant ({each})",
        f"promised  {report.memory_promised // _MiB} of {report.memory_promise // _MiB or 'any'} MiB memory",
        f"disk      {report.disk_used // _MiB} of {report.disk_total // _MiB} MiB used; "
        f"{report.disk_each // _MiB} MiB a tenant",
    ]
    if report.copied:
        said.append(
            f"standby   {report.copied} tenants have copies on other members: at most "
            f"{report.copying:.0%} of a core on each side, and their disks once more there"
        )
    for size in report.more:
        takes, what = report.takes(size)
        said.append(f"{size:<9} {takes} more; then the limit is: {what}")
    return said


# --- disk space ----------------------------------------------------------------------------------------


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

    async def _counted(self, tenant: str, kept: Sequence[DiskSnapshot]) -> dict[str, int]:
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
