"""Builds each service of a gateway once, in order of dependency, and closes them in reverse.

`opened` opens one group after another, each with those before it: `Base`, `Trust` and `Stored` of
`foundation`, then `_Work` and `_Serving`, then what is one service alone. A group opens its own services in
order, so that the last group is closed first, and the last service of a group.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gateway.api.foundation import (
    Base,
    Prepared,
    Stored,
    Trust,
    opened_base,
    opened_stored,
    opened_trust,
    prepared,
)
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.metrics import Metrics
from gateway.api.moving import moving
from gateway.api.preview import Previews
from gateway.api.services import Services
from gateway.api.standing_by import standing_by
from gateway.caddy import Caddy
from gateway.cluster.records import Records
from gateway.cluster.sharing import Sharing
from gateway.deployments import Deployments, Hangs, Health
from gateway.deployments.publishing import Sources
from gateway.deployments.register import Register
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.history import History
from gateway.lifecycle.arrivals import Arrivals
from gateway.lifecycle.departures import Departures
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.idle import Idle
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.site_logs import SiteLogs
from gateway.lifecycle.standby import Standby
from gateway.limits.budget import Limits
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.local import LocalSites
from gateway.runtime.sites import Sites
from gateway.settings import Settings
from gateway.shells import Shells
from gateway.storage.store import Store
from gateway.tools.session import Folders
from gateway.tools.toolbox import Toolbox
from gateway.transport.tunnel import Near


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What is done inside tenants: commands, tools, files, and the history of what these changed."""

    sites: Sites
    execs: Execs
    history: History
    toolbox: Toolbox
    records: Records
    files: Files


@contextlib.asynccontextmanager
async def _work(base: Base, stored: Stored) -> AsyncIterator[_Work]:
    settings, store, runtime, workers = base.settings, base.store, base.runtime, base.workers
    bus, idempotency = stored.bus, stored.idempotency
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        sites: Sites = await enter(
            IncusSites(settings, runtime)
            if isinstance(runtime, IncusRuntime)
            else LocalSites(settings, runtime)
        )
        spare = sites.former.spare
        execs = await enter(Execs(runtime.commands, bus, idempotency, settings))
        shells = await enter(Shells(execs, workers, settings))
        history = await enter(History(runtime, execs, bus, settings))
        folders = await Folders.opened(store)
        toolbox = await enter(
            Toolbox(runtime, workers, shells, history, bus, idempotency, folders, settings, spare)
        )
        recall = (idempotency.recall, toolbox.sessions.recall, history.recall)
        records = Records(store, base.own, settings.records_most, recall)
        files = await enter(Files(runtime, workers, bus, settings, spare))
        files.changing = history.saving
        yield _Work(sites=sites, execs=execs, history=history, toolbox=toolbox, records=records, files=files)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Serving:
    """What keeps sites answering: domains and routes, sleep and wake, room. `pressure` is None on `local`."""

    caddy: Caddy
    domains: Domains
    room: DiskSpace
    capacity: Capacity
    lifecycle: Lifecycle
    idle: Idle
    health: Health
    register: Register
    pressure: Pressure | None
    doors: Doors


@contextlib.asynccontextmanager
async def _serving(base: Base, trust: Trust, stored: Stored, work: _Work) -> AsyncIterator[_Serving]:
    settings, runtime, workers, sites = base.settings, base.runtime, base.workers, work.sites
    bus, shared = stored.bus, base.shared
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        caddy = await enter(Caddy(settings))
        await _meet_peers(caddy, trust.secret, shared)
        caddy.route_own_domain()
        caddy.clear_error_pages()
        domains = await Domains.opened(
            *(runtime.tenants, base.store, bus, settings), None if shared is None else shared.domains
        )
        room = DiskSpace(runtime, workers, base.store, settings, sites.copies.spare)
        capacity = Capacity(runtime.tenants, settings)
        lifecycle = Lifecycle(
            *(runtime, sites, caddy, domains, workers, bus, stored.names, room, capacity, settings)
        )
        idle = await enter(Idle(runtime, sites, caddy, domains, lifecycle, work.execs.running_in, settings))
        register = Register(base.store, domains, settings)
        health = await enter(Health(sites, bus, settings, register, caddy.show_error_page))
        pressure = None
        if isinstance(runtime, IncusRuntime):
            pressure = await enter(Pressure(runtime, workers.broker, bus, settings))
        yield _Serving(
            caddy=caddy,
            domains=domains,
            room=room,
            capacity=capacity,
            lifecycle=lifecycle,
            idle=idle,
            health=health,
            register=register,
            pressure=pressure,
            doors=Doors(settings),
        )


class _Leaving:
    """Tells whether a tenant is moving to another member: none is until `departures` are open."""

    departures: Departures | None = None

    def __call__(self, tenant: str) -> bool:
        return self.departures is not None and self.departures.moving(tenant)


@contextlib.asynccontextmanager
async def _copying(
    base: Base, stored: Stored, work: _Work, serving: _Serving, leaving: _Leaving
) -> AsyncIterator[Standby | None]:
    """Keep copies of tenants on other members of a cluster of Incus."""
    runtime, cluster, shared = base.runtime, base.cluster, base.shared
    if not isinstance(runtime, IncusRuntime) or cluster is None or shared is None:
        yield None
        return
    async with standing_by(
        *(cluster, shared, runtime, serving.doors, base.workers, base.settings, serving.capacity),
        *(stored.names, work.records, base.store, stored.bus, leaving),
    ) as standby:
        yield standby


@contextlib.asynccontextmanager
async def _deploying(
    base: Base, stored: Stored, work: _Work, serving: _Serving, leaving: _Leaving
) -> AsyncIterator[Deployments]:
    settings, runtime, workers, sites = base.settings, base.runtime, base.workers, work.sites
    async with contextlib.AsyncExitStack() as stack:
        deployments = await stack.enter_async_context(
            Deployments(
                *(runtime, sites, serving.caddy, serving.domains, serving.register, stored.bus, settings),
                moving=leaving,
                use=serving.idle.use,
                admit=serving.room.admit,
                spacious=serving.room.spacious,
                promise=serving.capacity.promise,
                ended=stored.names.ended,
                workers=workers,
                health=serving.health,
                pressure=serving.pressure,
                remote=None if base.shared is None else base.shared.sites,
            )
        )
        if isinstance(runtime, IncusRuntime):
            told = serving.health.hangs
            hangs = Hangs(runtime.containers, sites, workers.broker, told, serving.register, settings)
            await stack.enter_async_context(hangs)
        work.history.afterwards.quiet = deployments.quiet
        yield deployments


@contextlib.asynccontextmanager
async def _moves(
    base: Base, trust: Trust, stored: Stored, work: _Work, serving: _Serving, deployments: Deployments
) -> AsyncIterator[tuple[Departures | None, Arrivals | None]]:
    """Open the moves of tenants from and to this member of a cluster of Incus."""
    runtime, cluster, shared = base.runtime, base.cluster, base.shared
    if not isinstance(runtime, IncusRuntime) or cluster is None or shared is None:
        yield None, None
        return
    async with moving(
        *(cluster, shared.placements, runtime, trust.connections, deployments),
        store=base.store,
        bus=stored.bus,
        records=work.records,
        names=stored.names,
        room=serving.room,
        capacity=serving.capacity,
        doors=serving.doors,
        lifecycle=serving.lifecycle,
        execs=work.execs,
        workers=base.workers,
        files=work.files,
        settings=base.settings,
    ) as moves:
        yield moves


@contextlib.asynccontextmanager
async def opened(settings: Settings, store: Store, ready: Prepared | None = None) -> AsyncIterator[Services]:
    """Build and open everything on the open `store`; close it in reverse.

    What was already `prepared` is used and left open.
    """
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        ready = await enter(prepared(settings)) if ready is None else ready
        base = await enter(opened_base(settings, store, ready))
        trust = await opened_trust(base)
        stored = await enter(opened_stored(base))
        ready.removals.audit = stored.audit
        work = await enter(_work(base, stored))
        serving = await enter(_serving(base, trust, stored, work))
        leaving = _Leaving()
        standby = await enter(_copying(base, stored, work, serving, leaving))
        deployments = await enter(_deploying(base, stored, work, serving, leaving))
        stack.callback(stored.bus.close)
        mcp = None
        if importlib.util.find_spec("mcp") is not None:
            mcp = await enter(McpEndpoint(work.toolbox, work.history, settings))
        departures, arrivals = await enter(_moves(base, trust, stored, work, serving, deployments))
        leaving.departures = departures
        yield _services(base, trust, stored, work, serving, deployments, standby, mcp, departures, arrivals)


def _services(
    base: Base,
    trust: Trust,
    stored: Stored,
    work: _Work,
    serving: _Serving,
    deployments: Deployments,
    standby: Standby | None,
    mcp: McpEndpoint | None,
    departures: Departures | None,
    arrivals: Arrivals | None,
) -> Services:
    """Return what routes and websockets use of all this, with what needs no opening."""
    settings, runtime, cluster = base.settings, base.runtime, base.cluster
    limits = Limits(settings)
    tunnels = set[Near]()
    metrics = Metrics(
        lambda: len(trust.connections),
        lambda: work.execs.running,
        lambda: serving.domains.contested,
        lambda: serving.domains.shared,
        limits,
    )
    if serving.pressure is not None:
        metrics.show_pressure(serving.pressure.counts)
    if cluster is not None:
        metrics.show_peers(cluster.peers, tunnels)
        if standby is not None:
            metrics.show_standby(lambda: standby.late)
    return Services(
        settings=settings,
        runtime=runtime,
        workers=base.workers,
        cluster=cluster,
        shared=base.shared,
        dead_peers=base.dead_peers,
        home=None if cluster is None else {"member": cluster.own, "url": settings.advertise},
        secret=trust.secret,
        verify=trust.verify,
        revocations=trust.revocations,
        revoking=trust.revoking,
        grants=trust.grants,
        connections=trust.connections,
        end_token=trust.end_token,
        journal=stored.journal,
        bus=stored.bus,
        idempotency=stored.idempotency,
        names=stored.names,
        audit=stored.audit,
        sites=work.sites,
        execs=work.execs,
        history=work.history,
        toolbox=work.toolbox,
        records=work.records,
        files=work.files,
        domains=serving.domains,
        lifecycle=serving.lifecycle,
        idle=serving.idle,
        health=serving.health,
        pressure=serving.pressure,
        doors=serving.doors,
        deployments=deployments,
        standby=standby,
        mcp=mcp,
        departures=departures,
        arrivals=arrivals,
        limits=limits,
        tunnels=tunnels,
        metrics=metrics,
        leave_ready=work.sites.copies.leave,
        site_logs=SiteLogs(work.execs, runtime.commands, settings),
        sources=Sources(runtime, work.execs, settings),
        previews=Previews(serving.caddy, trust.secret, settings.max_previews),
    )


async def _meet_peers(caddy: Caddy, secret: str, shared: Sharing | None) -> None:
    """Have Caddy answer those of the cluster's other members, if there are any."""
    if shared is None:
        caddy.leave()
        return
    await shared.sites.look()
    if shared.sites.own is not None:  # else it is as the last process left it
        await asyncio.to_thread(caddy.join, shared.sites.own, secret)
