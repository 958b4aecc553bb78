"""Opens what all services of a gateway build on: runtime, cluster, tokens, records."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.api.connection import ClientSession
from gateway.api.services import Topology, topology
from gateway.audit import Audit
from gateway.auth import tokens
from gateway.auth.grants import Grants, Revocations
from gateway.events import Bus, StoredJournal
from gateway.holder.holder import HolderClient
from gateway.idempotency import Idempotency
from gateway.ownership.names import Names
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
class Base:
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


async def opened_trust(base: Base) -> Trust:
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
        bus = Bus(journal, base.topology.member)
        idempotency = await Idempotency.opened(store, settings)
        names = await Names.opened(store, bus, settings)
        async with Audit(store, bus, settings) as audit:
            yield Stored(journal=journal, bus=bus, idempotency=idempotency, names=names, audit=audit)


class _Removals:
    """Records what the gateway removes by itself: undone tenants, and those it had made ready."""

    audit: Audit | None = None

    async def note(self, removal: Removal) -> None:
        action = "instance.removed" if removal.tenant is None else "tenant.removed"
        facts: dict[str, Any] = {"reason": removal.reason, "instance": removal.instance, "name": removal.name}
        if self.audit is not None:
            await self.audit.note("gateway", action, removal.tenant, **facts)
