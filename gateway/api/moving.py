"""Builds what moves tenants to and from other members and informs their clients and routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any, Final

from gateway.api.connection import ClientSession
from gateway.cluster.cluster import Cluster
from gateway.cluster.placements import Placements
from gateway.cluster.records import Records
from gateway.deployments import Deployments
from gateway.events import Bus
from gateway.lifecycle.arrivals import Arrivals
from gateway.lifecycle.departures import Departures
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.move import MoveLog
from gateway.lifecycle.mover import Mover, Uses
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.ownership.names import Names
from gateway.protocol import CloseCode
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from gateway.storage.store import Store

_RETRY_MS: Final = 50  # milliseconds until clients of a tenant that moves may reconnect, and wait


@contextlib.asynccontextmanager
async def moving(
    cluster: Cluster,
    placements: Placements,
    runtime: IncusRuntime,
    connections: Collection[ClientSession],
    deployments: Deployments,
    store: Store,
    bus: Bus,
    records: Records,
    names: Names,
    room: DiskSpace,
    capacity: Capacity,
    lifecycle: Lifecycle,
    settings: Settings,
    **uses: Any,
) -> AsyncIterator[tuple[Departures, Arrivals]]:
    """Yield the moves from this member, including those of an earlier process, and the moves to it.

    `uses` are the other arguments of `Uses`.
    """

    def part(tenant: str) -> None:
        for connection in [one for one in connections if one.tenant == tenant]:
            connection.announce_draining(_RETRY_MS)
            connection.close(CloseCode.DRAINING, "the tenant moves to another server")

    def changed(tenant: str) -> None:
        cluster.changed()
        deployments.look_soon()

    names.elsewhere = cluster.instance_of
    log, tenants, deploying = MoveLog(store), runtime.tenants, deployments.deploying
    arrivals = Arrivals(
        *(cluster.own, tenants, runtime.moves, records, names, log, bus, room, capacity, changed)
    )
    mover = Mover(
        *(cluster, placements, tenants, runtime.moves, Uses(part=part, **uses)),
        leaving=runtime.containers.leaving,
        records=records,
        names=names,
        log_=log,
        bus=bus,
        settings=settings,
        deploying=deploying,
    )
    departures = Departures(cluster, tenants, mover, lifecycle, log, bus, settings, deploying, changed)
    await departures.recover()
    try:
        yield departures, arrivals
    finally:
        await departures.close()
