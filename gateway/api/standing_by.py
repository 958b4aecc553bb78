"""Builds what copies tenants to other members, and what keeps two members from serving the same tenant."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Final

from gateway.api.connection import Peer
from gateway.caddy import Caddy
from gateway.cluster.cluster import Cluster
from gateway.cluster.dead_peers import answers
from gateway.cluster.lease import Lease
from gateway.cluster.peers import MemberAway
from gateway.cluster.records import Records
from gateway.cluster.sharing import Sharing
from gateway.errors import GatewayError
from gateway.events import Bus
from gateway.files.files import Files
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.fencing import Fence
from gateway.lifecycle.standby import Standby
from gateway.lifecycle.takeover import Return, Takeover
from gateway.limits.capacity import Capacity
from gateway.ownership.names import Names
from gateway.protocol import CloseCode
from gateway.rootfs.cutter import Cutter
from gateway.rootfs.workers import Workers
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.standby_copies import StandbyCopies
from gateway.settings import Settings
from gateway.storage.store import Store

_RETRY_MS: Final = 5000  # milliseconds until clients of a tenant that is fenced may come again


@dataclass(frozen=True, slots=True)
class StandingBy:
    """`lease` answers peers in any case; the others exist only if tenants come back by themselves."""

    standby: Standby
    lease: Lease
    fence: Fence | None = None
    takeover: Takeover | None = None
    returning: Return | None = None

    def holds(self, tenant: str) -> bool:
        """Return whether this member may not serve a tenant now."""
        return self.fence is not None and self.fence.holds(tenant)


@contextlib.asynccontextmanager
async def standing_by(
    cluster: Cluster,
    shared: Sharing,
    runtime: IncusRuntime,
    cutter: Cutter,
    connections: Collection[Peer],
    doors: Doors,
    caddy: Caddy,
    workers: Workers,
    files: Files,
    settings: Settings,
    capacity: Capacity,
    names: Names,
    records: Records,
    store: Store,
    bus: Bus,
    moving: Callable[[str], bool],
) -> AsyncIterator[StandingBy]:
    """Yield them after one attempt to renew the lease. Tenants that are `moving` are not copied."""
    lease = Lease(cluster.own, cluster.peers, shared.keys, settings.lease)
    fence: Fence | None = None

    def busy(tenant: str) -> bool:
        return moving(tenant) or (fence is not None and fence.holds(tenant))

    async with StandbyCopies(settings, runtime) as copies:
        standby = Standby(
            *(copies, runtime.tenants, cluster, shared.members, capacity, names),
            *(records, store, bus, settings),
            changed=workers.broker.changed,
            moving=busy,
        )
        if not settings.failover:
            yield StandingBy(standby, lease)
            return

        async def part(tenant: str) -> None:
            for connection in [one for one in connections if one.tenant == tenant]:
                connection.announce_draining(_RETRY_MS)
                connection.close(CloseCode.TRY_LATER, MemberAway(cluster.own).message)
            doors.end_streams(tenant)
            await workers.forget(tenant)
            with contextlib.suppress(GatewayError):
                await files.forget(tenant, "away")

        returning = Return(
            *(cluster.own, shared.placements, standby, copies, runtime.tenants, names, records),
            *(runtime.moves, runtime.containers.leaving, lambda tenant: cluster.changed()),
            state_dir=settings.state_dir,
        )
        fence = Fence(
            *(cluster.own, lease, cutter, settings.state_dir, lambda: standby.copied, cluster.domain),
            *(part, caddy.excuse, returning.accused, returning.start, lambda: returning.left),
        )
        takeover = Takeover(
            *(cluster, lease, shared.placements, copies, standby, answers, shared.statuses, settings)
        )
        await standby.recall()
        doors.check = runtime.containers.check = fence.check
        shared.domains.is_doubtful = fence.holds
        with contextlib.suppress(GatewayError):  # before anybody is answered
            await lease.renew()
        yield StandingBy(standby, lease, fence, takeover, returning)
