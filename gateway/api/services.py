"""Builds each service of a gateway once, in order of dependency, and closes them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from gateway.api.connection import Hub, Peer
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.metrics import Metrics
from gateway.api.moving import moving
from gateway.api.preview import Previews
from gateway.api.standing_by import StandingBy, standing_by
from gateway.audit import Audit
from gateway.auth import tokens
from gateway.auth.grants import Grants
from gateway.auth.revocations import Revocations
from gateway.caddy import Caddy
from gateway.cluster.cluster import Cluster, joined
from gateway.cluster.common_secret import common_secret
from gateway.cluster.dead_peers import DeadPeers
from gateway.cluster.folder import FolderKeys, FolderMembers
from gateway.cluster.member import Membership
from gateway.cluster.peers import MemberAway, Members
from gateway.cluster.placements import Placements
from gateway.cluster.records import Records
from gateway.cluster.revoking import Revoking
from gateway.cluster.shared_keys import Keys
from gateway.cluster.sharing import Sharing, own_member, sharing
from gateway.deployments import Deployments, Hangs, Health
from gateway.deployments.publishing import Sources
from gateway.errors import GatewayError, Unavailable
from gateway.events import Bus, StoredJournal
from gateway.execs import Execs
from gateway.files.files import Files
from gateway.history import History
from gateway.holder.holder import Holder
from gateway.idempotency import Idempotency
from gateway.lifecycle.arrivals import Arrivals
from gateway.lifecycle.departures import Departures
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.idle import Idle
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.site_logs import SiteLogs
from gateway.limits.budget import Budget, Places
from gateway.limits.capacity import Capacity
from gateway.limits.disk import DiskSpace
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.rootfs.cutter import Cutter
from gateway.rootfs.workers import Workers
from gateway.runtime import Removal
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.local import LocalRuntime, LocalSites
from gateway.runtime.sites import Sites
from gateway.settings import Settings
from gateway.shells import Shells
from gateway.storage.store import Store
from gateway.tools.folders import Folders
from gateway.tools.toolbox import Toolbox
from gateway.transport.tunnel import Near

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Services(Hub):
    """Everything that lives as long as the gateway. Websockets see the part in `Hub`.

    `secret` signs tokens. `end_token` ends what is open under a token, by its id, and returns how many
    websockets that closed. `pressure` is None on the local runtime, `mcp` if that extra is not installed, and
    `revoking` and `cluster` are if there is no cluster. `shared`, `dead_peers` and `standing` are if there
    is none of Incus.
    """

    secret: str = field(repr=False)
    journal: StoredJournal
    idempotency: Idempotency
    revocations: Revocations
    end_token: Callable[[str], int]
    shared: Sharing | None
    revoking: Revoking | None
    names: Names
    records: Records
    audit: Audit
    workers: Workers
    domains: Domains
    lifecycle: Lifecycle
    site_logs: SiteLogs
    health: Health
    deployments: Deployments
    sources: Sources
    pressure: Pressure | None
    metrics: Metrics
    mcp: McpEndpoint | None
    leave_ready: Callable[[], None]  # leaves what is ready for new tenants to the next process
    sites: Sites
    previews: Previews
    cluster: Cluster | None
    dead_peers: DeadPeers | None
    departures: Departures | None  # to other members, and
    arrivals: Arrivals | None  # from them; None without a cluster of Incus
    standing: StandingBy | None
    tunnels: set[Near]  # websockets of other members' tenants
    draining: bool = False

    def resumed(self, tenant: str, last_event_id: str | int | None) -> int | None:
        return self.names.position(tenant, last_event_id)

    def elsewhere(self, tenant: str) -> None:
        peer = None if self.cluster is None else self.cluster.homes.home(tenant)
        if peer is not None and not peer.alive:
            raise MemberAway(peer.name)
        if peer is not None:
            raise Unavailable(f"tenant {tenant} is another member's; connect again", reason="elsewhere")


def services(asked: HTTPConnection) -> Services:
    """Return the services of a request's or websocket's gateway."""
    found: Services = asked.app.state.services
    return found


@dataclass(kw_only=True)
class Prepared:
    """What needs no records, so that it can be opened while another process still has them."""

    runtime: IncusRuntime | LocalRuntime
    workers: Workers
    removals: _Removals
    cluster: Cluster | None


@contextlib.asynccontextmanager
async def prepared(settings: Settings) -> AsyncIterator[Prepared]:
    """Open what needs no records; close it in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        removals = _Removals()
        runtime: IncusRuntime | LocalRuntime = await enter(
            IncusRuntime(settings, removals.note, holder=await enter(Holder(settings.holder_socket)))
            if settings.runtime == "incus"
            else LocalRuntime(settings, removals.note)
        )
        workers = await enter(Workers(settings, tenants=runtime.locations))
        own, members = await _membership(settings, runtime)
        cluster = await enter(joined(own, members, settings)) if own else None
        if own and isinstance(runtime, IncusRuntime):
            runtime.incus.slots.second = settings.failover_project
        yield Prepared(runtime=runtime, workers=workers, removals=removals, cluster=cluster)


@contextlib.asynccontextmanager
async def opened(settings: Settings, store: Store, ready: Prepared | None = None) -> AsyncIterator[Services]:
    """Build and open everything on the open `store`; close it in reverse.

    What was already `prepared` is used and left open.
    """
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        ready = await enter(prepared(settings)) if ready is None else ready
        runtime, workers = ready.runtime, ready.workers
        cluster, shared, dead_peers = ready.cluster, None, None
        keys: Keys | None = None
        if cluster is not None and isinstance(runtime, IncusRuntime):
            shared = await enter(sharing(cluster.own, cluster.alive, settings))
            keys, cluster.placements = shared.keys, shared.placements
            cutter = Cutter(settings)
            stack.push_async_callback(cutter.aclose)
            dead_peers = DeadPeers(cluster.peers, cutter.cut_off)
        elif cluster is not None and settings.local_member is not None:
            keys = FolderKeys(settings.local_member.with_name("shared.keys"))
            members = FolderMembers(settings.local_member)
            cluster.placements = Placements(keys, members.names, settings.cluster_home_kept)
        secret = await _secret(settings, shared, cluster)
        journal = await enter(
            StoredJournal(
                store,
                kept=settings.events_kept,
                kept_bytes=settings.events_bytes,
                age=settings.events_age,
                waiting=settings.events_waiting,
            )
        )
        bus = Bus(journal, "" if cluster is None else cluster.own)
        idempotency = await Idempotency.opened(store, settings)
        revocations = await Revocations.opened(store)
        grants = Grants(revocations.__contains__)
        connections: set[Peer] = set()

        def end_token(token: str) -> int:
            closed = sum(one.token is not None and one.token.id == token for one in connections)
            grants.revoke(token)
            return closed

        revoking = None
        if keys is not None and cluster is not None:
            revoking = Revoking(revocations, keys, end_token, cluster.tell_revoked)
            with contextlib.suppress(GatewayError):  # else it follows when the cluster can be asked
                await revoking.agree()  # before anybody is answered
        names = await Names.opened(store, bus, settings)
        audit = await enter(Audit(store, bus, settings))
        ready.removals.audit = audit
        sites: Sites = await enter(
            IncusSites(settings, runtime)
            if isinstance(runtime, IncusRuntime)
            else LocalSites(settings, runtime)
        )
        execs = await enter(Execs(runtime.commands, bus, idempotency, settings))
        shells = await enter(Shells(execs, workers, settings))
        history = await enter(History(runtime, execs, bus, settings))
        spare = sites.former.spare
        folders = await Folders.opened(store)
        toolbox = await enter(
            Toolbox(runtime, workers, shells, history, bus, idempotency, folders, settings, spare)
        )
        recall = (idempotency.recall, toolbox.sessions.recall, history.recall)
        records = Records(store, "" if cluster is None else cluster.own, settings.records_most, recall)
        files = await enter(Files(runtime, workers, bus, settings, spare))
        caddy = await enter(Caddy(settings))
        await _meet_peers(caddy, secret, shared)
        caddy.lead_home()
        caddy.excuse_nobody()
        domains = await Domains.opened(
            *(runtime.tenants, store, bus, settings), None if shared is None else shared.domains
        )
        room = DiskSpace(runtime, workers, store, settings, sites.copies.spare)
        capacity = Capacity(runtime.tenants, settings)
        lifecycle = Lifecycle(runtime, sites, caddy, domains, workers, bus, names, room, capacity, settings)
        idle = await enter(Idle(runtime, sites, caddy, domains, lifecycle, execs.running_in, settings))
        health = await enter(Health(sites, bus, settings, caddy.excuse))
        pressure = None
        if isinstance(runtime, IncusRuntime):
            pressure = await enter(Pressure(runtime, workers.broker, bus, settings))
        doors = Doors(settings)
        departures: Departures | None = None
        arrivals: Arrivals | None = None

        def is_leaving(tenant: str) -> bool:
            return departures is not None and departures.moving(tenant)

        standing = None
        if isinstance(runtime, IncusRuntime) and cluster is not None and shared is not None:
            standing = await enter(
                standing_by(
                    *(cluster, shared, runtime, cutter, connections, doors, caddy, workers, files, settings),
                    *(capacity, names, records, store, bus, is_leaving),
                )
            )
        deployments = await enter(
            Deployments(
                *(runtime, sites, caddy, domains, store, bus, settings),
                moving=is_leaving,
                use=idle.use,
                admit=room.admit,
                spacious=room.spacious,
                promise=capacity.promise,
                ended=names.ended,
                workers=workers,
                unwell=health.unwell,
                pressed=None if pressure is None else pressure.seconds,
                remote=None if shared is None else shared.sites,
            )
        )
        if isinstance(runtime, IncusRuntime):
            await enter(Hangs(runtime.containers, sites, workers.broker, health.hangs, settings))
        budget, places = Budget(settings.bytes_in_flight, settings.tenant_bytes), Places(settings)
        stack.callback(bus.close)
        mcp = None
        if importlib.util.find_spec("mcp") is not None:
            mcp = await enter(McpEndpoint(toolbox, history, settings))

        def verify(raw: str | None) -> tokens.Token:
            return tokens.verify(secret, raw, revocations.__contains__)

        if cluster is not None and shared is not None and isinstance(runtime, IncusRuntime):
            departures, arrivals = await enter(
                moving(
                    *(cluster, shared.placements, runtime, connections, deployments),
                    store=store,
                    bus=bus,
                    records=records,
                    names=names,
                    room=room,
                    capacity=capacity,
                    doors=doors,
                    lifecycle=lifecycle,
                    execs=execs,
                    workers=workers,
                    files=files,
                    settings=settings,
                )
            )
        metrics = Metrics(
            lambda: len(connections),
            lambda: execs.running,
            lambda: domains.contested,
            lambda: domains.shared,
            budget,
            places,
        )
        if pressure is not None:
            metrics.show_pressure(pressure.counts)
        tunnels = set[Near]()
        if cluster is not None:
            metrics.show_peers(cluster.peers, tunnels)
        yield Services(
            runtime=runtime,
            execs=execs,
            toolbox=toolbox,
            files=files,
            history=history,
            bus=bus,
            idle=idle,
            settings=settings,
            budget=budget,
            places=places,
            verify=verify,
            secret=secret,
            grants=grants,
            connections=connections,
            journal=journal,
            idempotency=idempotency,
            revocations=revocations,
            end_token=end_token,
            shared=shared,
            revoking=revoking,
            names=names,
            records=records,
            audit=audit,
            workers=workers,
            domains=domains,
            lifecycle=lifecycle,
            site_logs=SiteLogs(runtime.commands, settings),
            health=health,
            deployments=deployments,
            sources=Sources(runtime, settings),
            pressure=pressure,
            metrics=metrics,
            mcp=mcp,
            leave_ready=sites.copies.leave,
            sites=sites,
            previews=Previews(caddy, secret, settings.max_previews),
            cluster=cluster,
            dead_peers=dead_peers,
            doors=doors,
            departures=departures,
            arrivals=arrivals,
            standing=standing,
            tunnels=tunnels,
            home=None if (here := ready.cluster) is None else {"member": here.own, "url": settings.advertise},
        )


async def _secret(settings: Settings, shared: Sharing | None, cluster: Cluster | None) -> str:
    """Return the secret that signs tokens, in a cluster the one of all its gateways."""
    if shared is None or cluster is None:
        return tokens.load_secret(settings)
    configured = None if settings.secret is None else settings.secret.get_secret_value()
    return await common_secret(shared.keys, configured, settings.state_dir, cluster.fetch_secret)


async def _meet_peers(caddy: Caddy, secret: str, shared: Sharing | None) -> None:
    """Have Caddy answer those of the cluster's other members, if there are any."""
    if shared is None:
        caddy.leave()
        return
    await shared.sites.look()
    if shared.sites.own is not None:  # else it is as the last process left it
        await asyncio.to_thread(caddy.join, shared.sites.own, secret)


async def _membership(settings: Settings, runtime: IncusRuntime | LocalRuntime) -> tuple[str, Members]:
    """Return the name of this gateway's member, empty without a cluster, and what tells the members."""
    if isinstance(runtime, LocalRuntime):
        file = settings.local_member
        return ("" if file is None else file.name), FolderMembers(file or settings.state_dir)
    own = await own_member(runtime.incus, settings.state_dir)
    return own, Membership(runtime.incus)


class _Removals:
    """Records what the gateway removes by itself: undone tenants, and those it had made ready."""

    audit: Audit | None = None

    async def note(self, removal: Removal) -> None:
        action = "instance.removed" if removal.tenant is None else "tenant.removed"
        facts: dict[str, Any] = {"reason": removal.reason, "instance": removal.instance, "name": removal.name}
        if self.audit is not None:
            await self.audit.note("gateway", action, removal.tenant, **facts)
