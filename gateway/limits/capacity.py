"""Say how many more tenants this host takes, and refuse those beyond what it can promise.

A tenant at rest uses a few per cent of its memory limit, so a host may promise more than it has:
GATEWAY_OVERCOMMIT times its memory, to all tenants that are not stopped. Whatever is promised, nothing more
is started while less than GATEWAY_MEMORY_RESERVE of the memory is available.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, Final

from gateway.errors import GatewayError, NotFound, RateLimited, Unavailable
from gateway.runtime import Tenant, TenantRuntime
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.sizes import SIZES, size_of
from gateway.settings import Settings

log = logging.getLogger(__name__)

_MiB: Final = 1 << 20
_RETRY_AFTER: Final = 60
_AT_REST: Final = 64 * _MiB  # memory of a tenant at rest, page cache included, where none could be measured
_DISK: Final = 64 * _MiB  # of the pool, that a tenant holds beside its image, where there is none yet
_ASKED: Final = 8  # tenants that are measured at a time


@dataclass(frozen=True, slots=True)
class Memory:
    """The host's memory, in bytes."""

    total: int
    available: int


def host_memory() -> Memory:
    """Read the memory of this host."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    found = {words[0]: int(words[1]) << 10 for words in lines if len(words) > 1}
    return Memory(found["MemTotal:"], found["MemAvailable:"])


class Capacity:
    """The promise of one host. Used from the event loop only."""

    def __init__(
        self, runtime: TenantRuntime, settings: Settings, memory: Callable[[], Memory] = host_memory
    ) -> None:
        self._runtime, self._settings, self._memory = runtime, settings, memory
        self._deciding = asyncio.Lock()
        self._held: dict[object, tuple[str, int]] = {}  # tenants that are about to run, and their limits

    @contextlib.asynccontextmanager
    async def promise(self, tenant: str, memory: str | None = None) -> AsyncIterator[None]:
        """Have memory for a tenant, which starts to run, or gets a larger limit, while the context is open.

        `memory` is its limit as Incus takes it; None for what it has, and for one that is no more. Raises
        `Unavailable`, with `capacity`, where this host has promised all, and `RateLimited` if there are
        as many tenants as there may be.
        """
        if self._settings.runtime != "incus":  # others limit no memory
            yield
            return
        mine = object()
        async with self._deciding:
            self._held[mine] = (tenant, await self._decide(tenant, memory))
        try:
            yield
        finally:
            del self._held[mine]

    async def _decide(self, tenant: str, memory: str | None) -> int:
        """Return the bytes that are to be promised to the tenant."""
        host, found = self._memory(), {one.name: one for one in await self._runtime.list()}
        if memory is None and tenant not in found:
            return 0  # its start reports the error
        limit = found[tenant].limits.get("memory") if memory is None else memory
        need = limit_of(limit, host.total, self._settings)
        awake = promised(found.values(), host.total, self._settings)
        for name, held in self._held.values():
            awake[name] = max(awake.get(name, 0), held)
        if tenant not in found and len({*found, *awake, tenant}) > self._settings.max_tenants:
            raise RateLimited(
                f"{self._settings.max_tenants} tenants are the limit; raise GATEWAY_MAX_TENANTS",
                reason="quota",
            )
        if awake.get(tenant, 0) >= need:
            return need
        after, most = sum((awake | {tenant: need}).values()), self._settings.overcommit * host.total
        if most and after > most:
            log.warning(
                "%s is refused: %d MiB would be promised, and %d MiB may be (GATEWAY_OVERCOMMIT)",
                *(tenant, after // _MiB, most // _MiB),
            )
            raise self._refused(need)
        if host.available < self._settings.memory_reserve * host.total:
            log.warning(
                "%s is refused: %d MiB of memory are available (GATEWAY_MEMORY_RESERVE)",
                *(tenant, host.available // _MiB),
            )
            raise self._refused(need)
        return need

    @staticmethod
    def _refused(need: int) -> Unavailable:
        return Unavailable(
            f"this host has no room for another {need // _MiB} MiB of tenants' memory: ask again when others "
            "sleep, take a smaller size, or ask whoever runs the gateway (incus-gateway capacity says more)",
            reason="capacity",
            retry_after=_RETRY_AFTER,
        )


def limit_of(text: object, total: int, settings: Settings) -> int:
    """Return a memory limit in bytes: of a size, or of a share of all memory, such as 25%."""
    limit = str(text or settings.tenant_memory)
    if limit.endswith("%") and limit[:-1].isdigit():
        return total * min(int(limit[:-1]), 100) // 100
    return min(size_of(limit), total)


def promised(tenants: Iterable[Tenant], total: int, settings: Settings) -> dict[str, int]:
    """Return what is promised to each tenant that is not stopped."""
    return {
        one.name: limit_of(one.limits.get("memory"), total, settings)
        for one in tenants
        if one.status != "stopped"
    }


# --- how many more --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What a host has, what its tenants use of it, and how many more of each size it takes."""

    tenants: int
    awake: int
    memory_total: int
    memory_available: int
    memory_promised: int
    memory_promise: int  # 0: without a limit
    memory_each: int  # that a running tenant uses, page cache included
    measured: bool  # whether tenants that run were measured for it
    disk_total: int
    disk_used: int
    disk_each: int
    more: Mapping[str, Mapping[str, int]]  # by size, then by what would be used up after so many

    def takes(self, size: str) -> tuple[int, str]:
        """Return how many more of a size this host takes, and what is used up then."""
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
    """Measure this host and its tenants. Raises `GatewayError` if Incus cannot be asked."""
    tenants = await runtime.list()
    running = [one.name for one in tenants if one.status == "running"]
    uses = await _measured(runtime, running)
    each = sum(use["memory_bytes"] for use in uses) // len(uses) if uses else _AT_REST
    space = await runtime.space()
    # beside what they share with their image and one another
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
        more=more,
    )


async def _measured(runtime: IncusRuntime, names: Sequence[str]) -> list[Mapping[str, Any]]:
    asking = asyncio.Semaphore(_ASKED)

    async def one(name: str) -> Mapping[str, Any] | None:
        async with asking:
            with contextlib.suppress(NotFound):
                return await runtime.metrics(name)
        return None

    found = await asyncio.gather(*(one(name) for name in names))
    return [use for use in found if use is not None and use["memory_bytes"]]


async def _instances_left(runtime: IncusRuntime, settings: Settings) -> int | None:
    """Return how many more instances the project's own limits allow; None if it has none."""
    with contextlib.suppress(GatewayError):
        config = (await runtime.incus.get(f"/1.0/projects/{settings.incus_project}"))["config"]
        limits = [config.get("limits.instances"), config.get("limits.containers")]
        known = [int(limit) for limit in limits if str(limit).isdigit()]
        if known:
            return min(known) - len(await runtime.incus.instances())
    return None


def lines(report: Report) -> list[str]:
    """Return a report for people."""
    each = "measured" if report.measured else "assumed: none runs"
    said = [
        f"tenants   {report.tenants}, {report.awake} of them awake",
        f"memory    {report.memory_available // _MiB} of {report.memory_total // _MiB} MiB available; "
        f"{report.memory_each // _MiB} MiB a running tenant ({each})",
        f"promised  {report.memory_promised // _MiB} of {report.memory_promise // _MiB or 'any'} MiB memory",
        f"disk      {report.disk_used // _MiB} of {report.disk_total // _MiB} MiB used; "
        f"{report.disk_each // _MiB} MiB a tenant",
    ]
    for size in report.more:
        takes, what = report.takes(size)
        said.append(f"{size:<9} {takes} more; then the limit is: {what}")
    return said
