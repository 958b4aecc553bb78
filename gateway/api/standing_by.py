"""Builds what copies tenants to other members, and what ends a member that was removed from the cluster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection

from gateway.api.connection import ClientSession
from gateway.caddy import Caddy
from gateway.cluster.cluster import Cluster
from gateway.cluster.peers import Removed
from gateway.cluster.records import Records
from gateway.cluster.sharing import Sharing
from gateway.errors import GatewayError
from gateway.events import Bus
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.standby import Standby
from gateway.limits.capacity import Capacity
from gateway.ownership.names import Names
from gateway.protocol import CloseCode
from gateway.rootfs.workers import Workers
from gateway.runtime import TenantRuntime
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.standby_copies import StandbyCopies
from gateway.settings import Settings
from gateway.storage.store import Store

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def standing_by(
    cluster: Cluster,
    shared: Sharing,
    runtime: IncusRuntime,
    doors: Doors,
    workers: Workers,
    settings: Settings,
    capacity: Capacity,
    names: Names,
    records: Records,
    store: Store,
    bus: Bus,
    moving: Callable[[str], bool],
) -> AsyncIterator[Standby]:
    """Yield the copies of tenants. Tenants that are `moving` are not copied."""
    async with StandbyCopies(settings, runtime) as copies:
        standby = Standby(
            *(copies, runtime.tenants, cluster, shared.members, capacity, names),
            *(records, store, bus, settings),
            changed=workers.broker.changed,
            moving=lambda tenant: moving(tenant) or cluster.peers.out.is_set(),
        )
        doors.check = standby.check
        yield standby


async def leave_cluster(
    cluster: Cluster,
    runtime: TenantRuntime,
    connections: Collection[ClientSession],
    doors: Doors,
    caddy: Caddy,
) -> None:
    """Once this member turns out to be removed from its cluster, end what clients and visitors have here."""
    await cluster.peers.out.wait()
    for connection in list(connections):
        connection.close(CloseCode.TRY_LATER, Removed().message)
    doors.end_streams()
    for domain in caddy.listed():
        caddy.show_error_page(domain, True)
    try:
        for tenant in await runtime.tenants.list():
            if tenant.status == "running":
                await runtime.tenants.stop(tenant.name)
    except GatewayError as error:
        log.error("cannot stop the tenants of this removed server: %s", error.message)
