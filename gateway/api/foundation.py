"""Opens what all services of a gateway build on: runtime, cluster, tokens, records."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.api.connection import ClientSession
from gateway.audit import Audit
from gateway.auth import tokens
from gateway.auth.grants import Grants, Revocations
from gateway.cluster.cluster import Cluster, joined
from gateway.cluster.common_secret import common_secret
from gateway.cluster.dead_peers import DeadPeers
from gateway.cluster.folder import FolderKeys, FolderMembers
from gateway.cluster.member import Membership
from gateway.cluster.peers import Members
from gateway.cluster.placements import Placements
from gateway.cluster.revoking import Revoking
from gateway.cluster.shared_keys import Keys
from gateway.cluster.sharing import Sharing, own_member, sharing
from gateway.errors import GatewayError
from gateway.events import Bus, StoredJournal
from gateway.holder.holder import HolderClient
from gateway.idempotency import Idempotency
from gateway.ownership.names import Names
from gateway.rootfs.broker_client import DeadMemberCutter
from gateway.rootfs.workers import Workers
from gateway.runtime import Removal
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from gateway.storage.store import Store


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
            IncusRuntime(settings, removals.note, holder=await enter(HolderClient(settings.holder_socket)))
            if settings.runtime == "incus"
            else LocalRuntime(settings, removals.note)
        )
        workers = await enter(Workers(settings, tenants=runtime.locations))
        own, members = await _membership(settings, runtime)
        cluster = await enter(joined(own, members, settings)) if own else None
        yield Prepared(runtime=runtime, workers=workers, removals=removals, cluster=cluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What all groups build on; `shared`, `cutter` and `dead_peers` are None without a cluster of Incus."""

    settings: Settings
    store: Store
    runtime: IncusRuntime | LocalRuntime
    workers: Workers
    cluster: Cluster | None
    keys: Keys | None
    shared: Sharing | None
    cutter: DeadMemberCutter | None
    dead_peers: DeadPeers | None

    @property
    def own(self) -> str:
        """The name of this gateway's member, empty without a cluster."""
        return "" if self.cluster is None else self.cluster.own


@contextlib.asynccontextmanager
async def opened_base(settings: Settings, store: Store, ready: Prepared) -> AsyncIterator[Base]:
    """Open what this gateway shares with others of its cluster, if it is in one."""
    runtime, cluster = ready.runtime, ready.cluster
    keys: Keys | None = None
    shared = cutter = dead_peers = None
    async with contextlib.AsyncExitStack() as stack:
        if cluster is not None and isinstance(runtime, IncusRuntime):
            shared = await stack.enter_async_context(sharing(cluster.own, cluster.alive, settings))
            keys, cluster.placements = shared.keys, shared.placements
            cutter = DeadMemberCutter(settings)
            stack.push_async_callback(cutter.aclose)
            dead_peers = DeadPeers(cluster.peers, cutter.cut_off)
        elif cluster is not None and settings.local_member is not None:
            keys = FolderKeys(settings.local_member.with_name("shared.keys"))
            members = FolderMembers(settings.local_member)
            cluster.placements = Placements(keys, members.names, settings.cluster_home_kept)
        yield Base(
            settings=settings,
            store=store,
            runtime=runtime,
            workers=ready.workers,
            cluster=cluster,
            keys=keys,
            shared=shared,
            cutter=cutter,
            dead_peers=dead_peers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Tokens, and what is open under them. `revoking` is None without a cluster."""

    secret: str = field(repr=False)
    revocations: Revocations
    revoking: Revoking | None
    grants: Grants
    connections: set[ClientSession]
    end_token: Callable[[str], int]

    def verify(self, raw: str | None) -> tokens.Token:
        return tokens.verify(self.secret, raw, self.revocations.__contains__)


async def opened_trust(base: Base) -> Trust:
    secret = await _secret(base.settings, base.shared, base.cluster)
    revocations = await Revocations.opened(base.store)
    grants = Grants(revocations.__contains__)
    connections: set[ClientSession] = set()

    def end_token(token: str) -> int:
        closed = sum(one.token is not None and one.token.id == token for one in connections)
        grants.revoke(token)
        return closed

    revoking = None
    if base.keys is not None and base.cluster is not None:
        revoking = Revoking(revocations, base.keys, end_token, base.cluster.tell_revoked)
        with contextlib.suppress(GatewayError):  # else it follows when the cluster can be asked
            await revoking.agree()  # before anybody is answered
    return Trust(
        secret=secret,
        revocations=revocations,
        revoking=revoking,
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
    audit: Audit


@contextlib.asynccontextmanager
async def opened_stored(base: Base) -> AsyncIterator[Stored]:
    settings, store = base.settings, base.store
    async with StoredJournal(
        store,
        kept=settings.events_kept,
        kept_bytes=settings.events_bytes,
        age=settings.events_age,
        waiting=settings.events_waiting,
    ) as journal:
        bus = Bus(journal, base.own)
        idempotency = await Idempotency.opened(store, settings)
        names = await Names.opened(store, bus, settings)
        async with Audit(store, bus, settings) as audit:
            yield Stored(journal=journal, bus=bus, idempotency=idempotency, names=names, audit=audit)


async def _secret(settings: Settings, shared: Sharing | None, cluster: Cluster | None) -> str:
    """Return the secret that signs tokens, in a cluster the one of all its gateways."""
    if shared is None or cluster is None:
        return tokens.load_secret(settings)
    configured = None if settings.secret is None else settings.secret.get_secret_value()
    return await common_secret(shared.keys, configured, settings.state_dir, cluster.fetch_secret)


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
