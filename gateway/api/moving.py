"""Builds what moves tenants to and from other members, and tells its clients and its routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any, Final

from gateway.api.connection import Peer
from gateway.cluster.cluster import Cluster
from gateway.cluster.placements import Placements
from gateway.cluster.records import Records
from gateway.deployments import Deployments
from gateway.events import Bus
from gateway.lifecycle.arrivals import Arrivals
from gateway.lifecycle.departures import Departures
from gateway.lifecycle.move import MoveLog
from gateway.limits.capacity import Capacity
from gateway.limits.disk import DiskSpace
from gateway.ownership.names import Names
from gateway.protocol import CloseCode
from gateway.runtime.incus import IncusRuntime
from gateway.storage.store import Store

_RETRY_MS: Final = 50  # milliseconds until clients of a tenant that moves may reconnect, and wait


@contextlib.asynccontextmanager
async def moving(
    cluster: Cluster,
    placements: Placements,
    runtime: IncusRuntime,
    connections: Collection[Peer],
    deployments: Deployments,
    store: Store,
    bus: Bus,
    records: Records,
    names: Names,
    room: DiskSpace,
    capacity: Capacity,
    **others: Any,
) -> AsyncIterator[tuple[Departures, Arrivals]]:
    """Yield the moves from this member, those of an earlier process among them, and to it.

    `others` are what `Departures` takes besides.
    """

    def part(tenant: str) -> None:
        for connection in [one for one in connections if one.tenant == tenant]:
            connection.announce_draining(_RETRY_MS)
            connection.close(CloseCode.DRAINING, "the tenant moves to another server")

    def changed(tenant: str) -> None:
        cluster.changed()
        deployments.look_soon()

    names.elsewhere = cluster.instance_of
    common: dict[str, Any] = {
        "steps": runtime.moves,
        "records": records,
        "names": names,
        "log_": MoveLog(store),
        "bus": bus,
        "changed": changed,
    }
    arrivals = Arrivals(cluster.own, runtime.tenants, room=room, capacity=capacity, **common)
    departures = Departures(
        cluster,
        placements,
        runtime.tenants,
        leaving=runtime.containers.leaving,
        part=part,
        deploying=deployments.deploying,
        **common,
        **others,
    )
    await departures.recover()
    try:
        yield departures, arrivals
    finally:
        await departures.close()
