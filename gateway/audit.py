"""The audit log: who did what to tenants and tokens, kept longer than events.

Changes of a tenant's lifecycle are recorded where they are made. What tools, commands and deployments do
comes from the events, which name the caller, from where the last process stopped. No entry has contents,
command lines or secrets.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.events import GAP, Bus, Event, Filter, Subscription
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

# the events that become entries, and which of their data is kept
_TAKEN: Final[Mapping[str, Sequence[str]]] = {
    "exec.started": ("exec",),
    "exec.cancelled": ("exec", "killed"),
    "file.written": ("path",),
    "deployment.started": ("deployment",),
    "deployment.succeeded": ("deployment",),
    "deployment.failed": ("deployment",),
    "deployment.cancelled": ("deployment",),
    "deployment.rolledback": ("deployment",),
}
_RETRY: Final = 1.0
_FACT: Final = 500  # characters kept of one fact; a path may have thousands


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One entry. `event` is the id of its event, 0 for none. `operator`: an operator did it."""

    time: float
    who: str
    action: str
    tenant: str | None
    facts: Mapping[str, Any]
    event: int = 0
    operator: bool = False


class AuditLog:
    """The last `audit_kept` entries. Use as an async context manager while the bus is open.

    The tenants share the room: when it is full, the tenant with most entries loses its oldest. Operators'
    entries have as much room of their own.
    """

    def __init__(self, store: Store, bus: Bus, settings: Settings) -> None:
        self._store = store
        self._bus = bus
        self._kept = settings.audit_kept
        self._fresh = settings.audit_kept  # entries since the last check of the limit
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AuditLog:
        after = await self._store.read(_last_event)
        types = (*_TAKEN, GAP)
        subscription = self._bus.subscribe(Filter(types=types), after, patient=True)
        self._following = asyncio.create_task(self._follow(subscription), name="audit")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop following events; the next process continues from here. Idempotent."""
        assert self._following is not None
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)

    async def note(
        self, who: str, action: str, tenant: str | None = None, *, operator: bool = False, **facts: Any
    ) -> None:
        """Record an action. A failure to record it is logged, and the action stays."""
        try:
            await self._write([AuditRecord(time.time(), who, action, tenant, facts, operator=operator)])
        except StoreFailed as failed:
            log.error("cannot record %s of %s by %s in the audit: %s", action, tenant, who, failed.message)

    async def entries(self, limit: int, tenant: str | None = None, before: int | None = None) -> list[Any]:
        """Return the latest entries, newest first; `before` is the id of the last one already seen."""
        return await self._store.read(lambda connection: _entries(connection, limit, tenant, before))

    async def _follow(self, subscription: Subscription) -> None:
        while events := await subscription.batch():
            while True:
                try:
                    await self._write([_taken(event) for event in events])
                    break
                except StoreFailed:
                    await asyncio.sleep(_RETRY)  # before the next try; the journal has logged the cause
                except Exception:  # later events must still be recorded
                    log.exception("cannot record the events from %d on in the audit", events[0].id)
                    break

    async def _write(self, entries: Sequence[AuditRecord]) -> None:
        self._fresh += len(entries)
        full = self._fresh > self._kept // 100  # not each time, since it looks at all entries
        await self._store.write(lambda connection: _insert(connection, entries, self._kept if full else None))
        if full:
            self._fresh = 0


def _taken(event: Event) -> AuditRecord:
    data = event.data
    facts = {key: data[key] for key in _TAKEN.get(event.type, ("oldest",)) if key in data}
    facts = {key: fact[:_FACT] if isinstance(fact, str) else fact for key, fact in facts.items()}
    return AuditRecord(event.time, str(data.get("by", "")), event.type, event.tenant, facts, event.id)


# --- statements: each is a work of the store -----------------------------------------------------------


def _last_event(connection: sqlite3.Connection) -> int | None:
    (last,) = connection.execute("SELECT max(event) FROM audit").fetchone()
    return last or None


def _insert(connection: sqlite3.Connection, entries: Sequence[AuditRecord], kept: int | None) -> None:
    connection.executemany(
        "INSERT INTO audit (time, who, action, tenant, facts, event, operator) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                entry.time,
                entry.who,
                entry.action,
                entry.tenant,
                orjson.dumps(entry.facts).decode(),
                entry.event,
                entry.operator,
            )
            for entry in entries
        ],
    )
    if kept is None:
        return
    for operator in (0, 1):
        counts: dict[str | None, int] = dict(
            connection.execute(
                "SELECT tenant, count(*) FROM audit WHERE operator = ? GROUP BY tenant", (operator,)
            )
        )
        level = _level(counts.values(), kept)
        for tenant, count in counts.items():
            if count > level:
                connection.execute(_TRIM, (operator, tenant, count - level))


_TRIM: Final = (
    "DELETE FROM audit WHERE id IN"
    " (SELECT id FROM audit WHERE operator = ? AND tenant IS ? ORDER BY id LIMIT ?)"
)


def _level(counts: Collection[int], kept: int) -> int:
    """Return how many entries each tenant may have, at least 1, so that together they have at most `kept`."""
    room, left = kept, len(counts)
    for count in sorted(counts):
        if count > room // left:
            return max(1, room // left)
        room, left = room - count, left - 1
    return kept


def _entries(
    connection: sqlite3.Connection, limit: int, tenant: str | None, before: int | None
) -> list[dict[str, Any]]:
    rows = connection.execute(
        "SELECT id, time, who, action, tenant, facts FROM audit"
        " WHERE id < coalesce(?1, 1 << 62) AND (?2 IS NULL OR tenant = ?2) ORDER BY id DESC LIMIT ?3",
        (before, tenant, limit),
    )
    return [
        {"id": id_, "time": at, "who": who, "action": action, "tenant": of, "facts": orjson.loads(facts)}
        for id_, at, who, action, of, facts in rows
    ]
