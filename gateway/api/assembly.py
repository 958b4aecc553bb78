"""Builds each service of a gateway once, in order of dependency, and closes them in reverse.

`opened` opens one group after another, each with those before it: `Foundations`, what all build on; `Trust`,
the tokens; `Stored`, the records; then `_Work` and `_Serving`, then what is one service alone. A group opens
its own services in order, so that the last group is closed first, and the last service of a group.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.api.connection import ClientSession
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.metrics import Metrics
from gateway.api.preview import Previews
from gateway.api.services import Services, Topology, topology
from gateway.audit import AuditLog
from gateway.auth import tokens
from gateway.auth.grants import Grants, Revocations
from gateway.caddy import Caddy
from gateway.deployments import Context, Deployer, Hangs, Health
from gateway.deployments.publishing import Sources
from gateway.deployments.record import Register
from gateway.events import Bus, StoredJournal
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.history import History
from gateway.holder.holder import HolderClient
from gateway.idempotency import Idempotency
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.idle import Idle
from gateway.lifecycle.lifecycle import Lifecycle, SiteRoutes
from gateway.lifecycle.site_logs import SiteLogs
from gateway.limits.budget import ClientLimits
from gateway.limits.capacity import Capacity, DiskSpace
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime import Removal
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.local import LocalRuntime, LocalSites
from gateway.runtime.sites import Sites
from gateway.settings import Settings
from gateway.shells import Shells
from gateway.storage.store import Store
from gateway.tools.session import SessionFolders
from gateway.tools.toolbox import FileTools, Toolbox


@dataclass(kw_only=True)
class Prepared:
    """What needs no records, so that it can be opened while another process still has them."""

    runtime: IncusRuntime | LocalRuntime
    workers: Workers
    removals: _Removals
    topology: Topology


@contextlib.asynccontextmanager
async def prepared(settings: Settings) -> AsyncIterator[Prepared]:
    """Open what needs no records; close it in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        removals = _Removals()
        runtime: IncusRuntime | LocalRuntime = await enter(
            IncusRuntime(settings, removals.note, holder=await enter(HolderClient(settings.holder_socket)))
            if settings.runtime == "incus"
            else LocalRuntime(settings, removals.note)
        )
        workers = await enter(Workers(settings, tenants=runtime.locations))
        servers = await enter(topology(settings, runtime))
        yield Prepared(runtime=runtime, workers=workers, removals=removals, topology=servers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundations:
    """What all groups build on."""

    settings: Settings
    store: Store
    runtime: IncusRuntime | LocalRuntime
    workers: Workers
    topology: Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Tokens, and what is open under them."""

    secret: str = field(repr=False)
    revocations: Revocations
    grants: Grants
    connections: set[ClientSession]
    end_token: Callable[[str], int]

    def verify(self, raw: str | None) -> tokens.Token:
        return tokens.verify(self.secret, raw, self.revocations.__contains__)


async def opened_trust(base: Foundations) -> Trust:
    secret = await base.topology.secret(base.settings)
    revocations = await Revocations.opened(base.store)
    grants = Grants(revocations.__contains__)
    connections: set[ClientSession] = set()

    def end_token(token: str) -> int:
        closed = sum(one.token is not None and one.token.id == token for one in connections)
        grants.revoke(token)
        return closed

    await base.topology.share_revocations(revocations, end_token)  # before any client is answered
    return Trust(
        secret=secret,
        revocations=revocations,
        grants=grants,
        connections=connections,
        end_token=end_token,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What is recorded: events, results of calls, owners of names, the audit log."""

    journal: StoredJournal
    bus: Bus
    idempotency: Idempotency
    names: Names
    audit: AuditLog


@contextlib.asynccontextmanager
async def opened_stored(base: Foundations) -> AsyncIterator[Stored]:
    settings, store = base.settings, base.store
    async with StoredJournal(
        store,
        kept=settings.events_kept,
        kept_bytes=settings.events_bytes,
        age=settings.events_age,
    ) as journal:
        bus = Bus(journal, base.topology.member)
        idempotency = await Idempotency.opened(store, settings)
        names = await Names.opened(store, bus, settings)
        async with AuditLog(store, bus, settings) as audit:
            yield Stored(journal=journal, bus=bus, idempotency=idempotency, names=names, audit=audit)


class _Removals:
    """Records what the gateway removes by itself: undone tenants, and those it had made ready."""

    audit: AuditLog | None = None

    async def note(self, removal: Removal) -> None:
        action = "instance.removed" if removal.tenant is None else "tenant.removed"
        facts: dict[str, Any] = {"reason": removal.reason, "instance": removal.instance, "name": removal.name}
        if self.audit is not None:
            await self.audit.note("gateway", action, removal.tenant, **facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What is done inside tenants: commands, tools, files, and the history of what these changed."""

    sites: Sites
    execs: Execs
    history: History
    toolbox: Toolbox
    files: Files


@contextlib.asynccontextmanager
async def _work(base: Foundations, stored: Stored) -> AsyncIterator[_Work]:
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
        folders = await SessionFolders.opened(store)
        file_tools = FileTools(workers, settings, spare)
        toolbox = await enter(
            Toolbox(runtime, file_tools, shells, history, bus, idempotency, folders, settings)
        )
        files = await enter(Files(runtime, workers, bus, settings, spare))
        files.changing = history.saving
        yield _Work(sites=sites, execs=execs, history=history, toolbox=toolbox, files=files)


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
async def _serving(base: Foundations, trust: Trust, stored: Stored, work: _Work) -> AsyncIterator[_Serving]:
    settings, runtime, workers, sites = base.settings, base.runtime, base.workers, work.sites
    bus = stored.bus
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        caddy = await enter(Caddy(settings))
        await base.topology.share_sites(caddy, trust.secret)
        caddy.route_own_domain()
        caddy.clear_error_pages()
        domains = await Domains.opened(runtime.tenants, base.store, bus, settings, base.topology.domains)
        room = DiskSpace(runtime, workers, base.store, settings, sites.copies.spare)
        capacity = Capacity(runtime.tenants, settings)
        routes = SiteRoutes(runtime.tenants, sites, caddy, domains)
        lifecycle = Lifecycle(runtime, routes, workers, bus, stored.names, room, capacity, settings)
        idle = await enter(Idle(runtime, routes, lifecycle, work.execs.running_in, settings))
        register = Register(base.store, domains, settings)
        health = await enter(Health(sites, bus, settings, register, caddy.show_error_page))
        pressure = None
        if isinstance(runtime, IncusRuntime):
            pressure = await enter(Pressure(runtime, workers.broker, bus))
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
            doors=Doors(),
        )


@contextlib.asynccontextmanager
async def _deploying(
    base: Foundations, stored: Stored, work: _Work, serving: _Serving
) -> AsyncIterator[Deployer]:
    settings, runtime, workers, sites = base.settings, base.runtime, base.workers, work.sites
    async with contextlib.AsyncExitStack() as stack:
        deployments = await stack.enter_async_context(
            Deployer(
                Context(
                    runtime=runtime,
                    sites=sites,
                    caddy=serving.caddy,
                    domains=serving.domains,
                    register=serving.register,
                    bus=stored.bus,
                    settings=settings,
                    idle=serving.idle,
                    names=stored.names,
                    room=serving.room,
                    capacity=serving.capacity,
                    workers=workers,
                    health=serving.health,
                    pressure=serving.pressure,
                    remote=base.topology.remote_routes(serving.caddy, serving.domains),
                    moving=base.topology.moving,
                )
            )
        )
        if isinstance(runtime, IncusRuntime):
            told = serving.health.hangs
            hangs = Hangs(runtime.containers, sites, workers.broker, told, serving.register, settings)
            await stack.enter_async_context(hangs)
        work.history.afterwards.quiet = deployments.quiet
        yield deployments


@contextlib.asynccontextmanager
async def opened(settings: Settings, store: Store, ready: Prepared | None = None) -> AsyncIterator[Services]:
    """Build and open everything on the open `store`; close it in reverse.

    What was already `prepared` is used and left open.
    """
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        ready = await enter(prepared(settings)) if ready is None else ready
        base = Foundations(
            settings=settings,
            store=store,
            runtime=ready.runtime,
            workers=ready.workers,
            topology=ready.topology,
        )
        trust = await opened_trust(base)
        stored = await enter(opened_stored(base))
        ready.removals.audit = stored.audit
        work = await enter(_work(base, stored))
        serving = await enter(_serving(base, trust, stored, work))
        deployments = await enter(_deploying(base, stored, work, serving))
        stack.callback(stored.bus.close)
        mcp = None
        if importlib.util.find_spec("mcp") is not None:
            mcp = await enter(McpEndpoint(work.toolbox, work.history, settings))
        services = _services(base, trust, stored, work, serving, deployments, mcp)
        await enter(base.topology.attached(services, store))
        yield services


def _services(
    base: Foundations,
    trust: Trust,
    stored: Stored,
    work: _Work,
    serving: _Serving,
    deployments: Deployer,
    mcp: McpEndpoint | None,
) -> Services:
    """Return what routes and websockets use of all this, with what needs no opening."""
    settings, runtime = base.settings, base.runtime
    limits = ClientLimits(settings)
    metrics = Metrics(trust.connections, work.execs, serving.domains, limits, serving.pressure)
    return Services(
        settings=settings,
        runtime=runtime,
        workers=base.workers,
        topology=base.topology,
        home=base.topology.home,
        secret=trust.secret,
        verify=trust.verify,
        revocations=trust.revocations,
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
        files=work.files,
        domains=serving.domains,
        capacity=serving.capacity,
        room=serving.room,
        lifecycle=serving.lifecycle,
        idle=serving.idle,
        health=serving.health,
        pressure=serving.pressure,
        doors=serving.doors,
        deployments=deployments,
        mcp=mcp,
        limits=limits,
        metrics=metrics,
        leave_ready=work.sites.copies.leave,
        site_logs=SiteLogs(work.execs, runtime.commands),
        sources=Sources(runtime, work.execs),
        previews=Previews(serving.caddy, trust.secret),
    )
