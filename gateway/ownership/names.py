"""Decides which instance has each name: a tenant that is destroyed and made again under its name is another.

Events, records of calls, deployments and tokens go by the name, which may be another customer's by now.
Incus tells instances of one name apart. The last one is stored here, so that a gateway that was down finds a
change too.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from gateway.errors import GatewayError, NotFound
from gateway.events import Bus, Event, Span, positions
from gateway.runtime import TenantEvent, TenantInstance, TenantRuntime
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed, Work

log = logging.getLogger(__name__)

# a name may have come to another instance
_MADE: Final = ("tenant.created", "tenant.renamed")
# nothing told of it, as in the runtime's own differences
_MISSED: Final = {"resync": True}
_RETRY: Final = 1.0
# how long a destroyed tenant's end is waited for: where Incus's events are interrupted it is found out later
_TOLD: Final = 5.0


@dataclass(frozen=True, slots=True)
class _NameHolder:
    """The owner of a name: `instance`, "" for none.

    `ended` is the id of the event that ended the last owner, `at` its time, `begun` the id of the first event
    of this one; each 0 if there was none. One that came from another member has `arrived`, the id of its
    first event here; one that went to another is `gone`, and stays to tell whose its events here are.
    """

    instance: str = ""
    ended: int = 0
    begun: int = 0
    at: float = 0.0
    arrived: int = 0
    gone: bool = False


class Names:
    """The names of all existing tenants, and of the latest destroyed ones. Create it with `opened`."""

    def __init__(self, store: Store, bus: Bus, settings: Settings) -> None:
        self._store = store
        self._bus = bus
        # a name whose end is longer ago has no event and no deployment left
        self._kept = settings.events_kept + settings.deployments_kept
        self._holders: dict[
            str, _NameHolder
        ] = {}  # those without an instance in the order in which they ended
        self._changed = asyncio.Event()
        self.moving: set[str] = set()
        """Names that no instance may have for a moment, and that are no less their owners'."""
        self.elsewhere: Callable[[str], str | None] = lambda name: None
        """Returns the instance that another member has under a name, None if that is not known."""

    @classmethod
    async def opened(cls, store: Store, bus: Bus, settings: Settings) -> Names:
        """Continue from the records of the last process; readers of earlier events wait for `watch`."""
        self = cls(store, bus, settings)
        next_ = bus.last + 1  # what was not written may have had an id that another event gets
        for tenant, instance, ended, begun, at, arrived, gone in await store.read(_all):
            self._holders[tenant] = _NameHolder(
                *(instance, min(ended, next_), min(begun, next_), at),
                arrived=min(arrived, next_),
                gone=bool(gone),
            )
        bus.part(None)
        return self

    async def watch(self, runtime: TenantRuntime) -> AsyncIterator[TenantEvent]:
        """Yield the runtime's events of tenants, and what happened to names while no gateway watched.

        Call `took` for each event that was published before you ask for the next one.
        """
        async for event in runtime.changes.watch():
            if event.type == "gateway.resynced":
                for missed in await self._missed(runtime):
                    yield missed
                self._bus.part(self._spans)
            elif event.tenant is not None and event.type in _MADE and self.holder(event.tenant):
                there = await _found(runtime, event.tenant)
                if there is not None and self._is_another(there):
                    yield TenantEvent("tenant.destroyed", there.name, _MISSED)
            yield event

    async def took(self, runtime: TenantRuntime, event: TenantEvent, told: Event) -> None:
        """Record an event's effect on names, once everything kept under an ended name has been forgotten."""
        if event.ended is not None:
            await self._end(event.ended, told)
        name = event.tenant
        if name is not None and name != event.ended and not self.holder(name):
            there = await _found(runtime, name)
            if there is not None:
                await self._begin(there, told.id)

    def holder(self, name: str) -> str:
        """Return the id of the name's current instance, "" if there is none."""
        found = self._holders.get(name, _NOBODY)
        return "" if found.gone else found.instance

    async def arrive(self, name: str, instance: str, ended: float) -> None:
        """Record a tenant that arrives from another member, where the name's last owner ended at that time.

        A client that resumes its events from before that is told that some may be missing.
        """
        before, next_ = self._holders.get(name, _NOBODY), self._bus.last + 1
        if before.instance == instance and not before.gone:
            return
        begun = before.begun if before.instance == instance else next_  # an earlier stay is the same tenant's
        at = max(before.at, ended) if before.ended else ended
        await self._keep(name, _NameHolder(instance, before.ended, begun, at, arrived=next_))

    async def leave(self, name: str) -> None:
        """Forget a tenant that has another home now. Idempotent."""
        before = self._holders.get(name, _NOBODY)
        if before.instance and not before.gone:
            await self._keep(name, replace(before, gone=True))

    def arrived(self, name: str) -> int:
        """Return the id of the first event here of one that came from another member, 0 for any other."""
        return self._holders.get(name, _NOBODY).arrived

    def position(self, name: str, last_event_id: str | int | None) -> int | None:
        """Return where in our journal a client resumes a tenant's events, 0 if that is not known."""
        after, arrived = positions.after(last_event_id, self._bus.member), self.arrived(name)
        if not last_event_id or after is None or not arrived:
            return after
        # a number alone may be of the tenant's former home
        return 0 if positions.is_plain(last_event_id) or after < arrived - 1 else after

    def ended(self, name: str) -> float:
        """Return when the last tenant of that name ended, 0 if there was none."""
        return self._holders.get(name, _NOBODY).at

    def is_present(self, name: str, at: float) -> bool:
        """Return whether what began at that time belongs to the name's current owner, or a future one."""
        return at >= self.ended(name)

    async def over(self, name: str, instance: str) -> None:
        """Wait, for a while at most, until this instance's destruction has been noticed."""
        try:
            async with asyncio.timeout(_TOLD):
                while instance and self.holder(name) == instance:
                    await self._changed.wait()
        except TimeoutError:
            log.warning("the end of %s is not reported yet", name)

    def _spans(self, names: Iterable[str]) -> Mapping[str, Span]:
        found = {name: self._holders[name] for name in names if name in self._holders}
        after = self._bus.last + 1

        def span(name: str, of: _NameHolder) -> Span:
            # of one that left, whoever has the name now may be another
            there = of.instance if not of.gone else self.elsewhere(name)
            return Span(
                of.ended, of.begun if of.instance and there == of.instance else after, of.at, of.arrived
            )

        return {name: span(name, of) for name, of in found.items()}

    def _is_another(self, tenant: TenantInstance) -> bool:
        return tenant.instance not in (None, self.holder(tenant.name))

    async def _missed(self, runtime: TenantRuntime) -> Sequence[TenantEvent]:
        """Return the ends and beginnings that no event reported, and record tenants that are new here."""
        now = {tenant.name: tenant for tenant in await _listed(runtime)}
        missed = list[TenantEvent]()
        for name in [name for name in self._holders if self.holder(name) and name not in self.moving]:
            # a list may leave out one that is just changing
            try:
                there = now.get(name) or await runtime.tenants.get(name)
            except NotFound:
                missed.append(TenantEvent("tenant.destroyed", name, _MISSED))
                continue
            except GatewayError:
                continue
            except Exception:  # see `_found`
                log.exception("cannot understand what the runtime says of %s", name)
                continue
            if self._is_another(there):
                kinds = ["tenant.destroyed", "tenant.created"]
                kinds += ["tenant.started"] if there.status == "running" else []
                missed += [TenantEvent(kind, name, _MISSED) for kind in kinds]
        for tenant in now.values():
            if not self.holder(tenant.name):
                # one that was never heard of may have been there before this record was kept
                known = self._holders.get(tenant.name, _NOBODY).ended
                await self._begin(tenant, self._bus.last + 1 if known else 0)
        return missed

    async def _begin(self, tenant: TenantInstance, begun: int) -> None:
        if tenant.instance is not None:
            before = self._holders.get(tenant.name, _NOBODY)
            await self._keep(tenant.name, _NameHolder(tenant.instance, before.ended, begun, before.at))

    async def _end(self, name: str, told: Event) -> None:
        self._holders.pop(name, None)
        await self._keep(name, _NameHolder("", told.id, 0, told.time))
        nobodys = [name for name, holder in self._holders.items() if not holder.instance or holder.gone]
        for old in nobodys[: max(0, len(nobodys) - self._kept)]:
            del self._holders[old]
            await self._write(partial(_delete, tenant=old))

    async def _keep(self, name: str, holder: _NameHolder) -> None:
        self._holders[name] = holder
        self._changed.set()
        self._changed = asyncio.Event()
        await self._write(partial(_insert, tenant=name, holder=holder))

    async def _write(self, work: Work[None]) -> None:
        try:
            await self._store.write(work)
        except StoreFailed as failed:
            # this process knows it; the next one finds another instance than the recorded one
            log.warning("cannot record which tenant has which name: %s", failed.message)


_NOBODY: Final = _NameHolder()


async def _found(runtime: TenantRuntime, name: str) -> TenantInstance | None:
    """Return a tenant, None if there is none, or that cannot be known now."""
    try:
        return await runtime.tenants.get(name)
    except GatewayError:
        return None
    except Exception:
        # one odd answer must not end the watch forever
        log.exception("cannot understand what the runtime says of %s", name)
        return None


async def _listed(runtime: TenantRuntime) -> Sequence[TenantInstance]:
    while True:
        try:
            return await runtime.tenants.list(addresses=False)
        except GatewayError as error:
            log.warning("cannot check yet whether tenants have been replaced: %s", error.message)
        except Exception:  # see `_found`
            log.exception("cannot understand the list of tenants")
        await asyncio.sleep(_RETRY)  # nothing else tells when Incus answers again


# --- statements: each is a work of the store -----------------------------------------------------------


def _all(connection: sqlite3.Connection) -> Sequence[tuple[str, str, int, int, float, int, int]]:
    return connection.execute(
        "SELECT tenant, instance, ended, begun, at, arrived, gone FROM names ORDER BY ended"
    ).fetchall()


def _insert(connection: sqlite3.Connection, tenant: str, holder: _NameHolder) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO names (tenant, instance, ended, begun, at, arrived, gone)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            *(tenant, holder.instance, holder.ended, holder.begun),
            *(holder.at, holder.arrived, int(holder.gone)),
        ),
    )


def _delete(connection: sqlite3.Connection, tenant: str) -> None:
    connection.execute("DELETE FROM names WHERE tenant = ?", (tenant,))
