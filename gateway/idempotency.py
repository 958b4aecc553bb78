"""Calls and commands by their callers' ids, with their results, so that none is made twice.

A call that may change something is stored before it begins, and again with its result before that is
returned. So the next gateway knows what a killed one had begun and not finished. Calls that only read are
kept in memory, since repeating them does no harm.
"""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

from gateway.errors import Cancelled, Conflict, Gone
from gateway.settings import Settings
from gateway.storage.store import Statement, Store

Kind = Literal["call", "exec"]
Key = tuple[str, Kind, str]  # tenant, kind, the caller's id

# bytes of one record besides its result, in memory and on disk
_OVERHEAD: Final = 500


@dataclass(slots=True)
class IdempotencyRecord:
    """What is known about one id. `result` is None if it is only in the store, or if there is none.

    For a call that has begun, it is what `note` stored.
    """

    digest: bytes
    at: float
    state: Literal["begun", "done", "fenced"]
    size: int = 0
    result: bytes | None = None


KEPT: Final = 1000  # calls and commands of one tenant, under their callers' ids
KEPT_BYTES: Final = 16 << 20  # of one tenant's in the store
READS_BYTES: Final = 32 << 20  # results of calls that only read, of all tenants: they are in memory


class _Shelf:
    """Records in the order of insertion, bounded; the oldest are dropped."""

    def __init__(self, kept: int, kept_bytes: int, age: float) -> None:
        self.records: OrderedDict[Key, IdempotencyRecord] = OrderedDict()
        self._kept, self._kept_bytes, self._age = kept, kept_bytes, age
        self.bytes = 0

    def put(self, key: Key, record: IdempotencyRecord) -> None:
        self.take(key)
        self.records[key] = record
        self.bytes += _OVERHEAD + record.size

    def take(self, key: Key) -> IdempotencyRecord | None:
        record = self.records.pop(key, None)
        if record is not None:
            self.bytes -= _OVERHEAD + record.size
        return record

    def drop(self) -> None:
        """Drop the oldest."""
        self.take(next(iter(self.records)))

    def trim(self) -> list[Key]:
        """Drop records above the limits or too old, and return them."""
        born, gone = time.time() - self._age, list[Key]()
        while self.records:
            key, record = next(iter(self.records.items()))
            full = len(self.records) > self._kept or self.bytes > self._kept_bytes
            if not full and record.at >= born:
                break
            self.take(key)
            gone.append(key)
        return gone


class Idempotency:
    """The latest records of each tenant. Create it with `opened`; used from the event loop only.

    The store keeps `KEPT` of one tenant, of at most `KEPT_BYTES`, for `settings.idempotency_age` seconds.
    Memory keeps the latest reading calls of all tenants in `READS_BYTES` bytes; above that, the tenant
    with the most loses its oldest.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._stored: dict[str, _Shelf] = {}  # by tenant, so that none can push out another's
        self._reads: dict[str, _Shelf] = {}
        self._reads_bytes = 0

    @classmethod
    async def opened(cls, store: Store, settings: Settings) -> Idempotency:
        """Load the records of earlier processes; calls that these did not finish are still `begun`."""
        self = cls(store, settings)
        await store.settled()
        for key, record in await store.read(_all):
            self._shelf(key).put(key, record)
        gone = [key for shelf in self._stored.values() for key in shelf.trim()]
        await store.note(*map(_delete, gone))
        return self

    async def result(self, key: Key, digest: bytes) -> bytes | None:
        """Return the result stored under an id, or None if the call has to be made.

        Raises `Conflict` if the id was used with a different input, `Cancelled` if the call was cancelled,
        `Gone` if it was begun and its outcome is unknown.
        """
        record = self._find(key)
        if record is None:
            return None
        id_ = key[2]
        if record.state == "fenced":
            raise Cancelled(f"{id_} was cancelled; use a new id to do it", id=id_)
        if record.digest != digest:
            raise Conflict(f"{id_} was used with a different input", id=id_)
        if record.state == "begun":
            raise Gone(
                f"{id_} was started, and how it ended is not known: check what it did, then use a new id",
                id=id_,
                reason="unknown_outcome",
            )
        if record.result is not None:
            return record.result
        return await self._store.read(lambda connection: _result(connection, key))

    def begun(self, key: Key, digest: bytes) -> bool:
        """Return whether a call with this id was begun and its outcome is unknown."""
        record = self._find(key)
        return record is not None and record.state == "begun" and record.digest == digest

    async def begin(self, key: Key, digest: bytes) -> None:
        """Record that a call begins. Raises `StoreFailed`; the call must not be made then."""
        record = IdempotencyRecord(digest, time.time(), "begun")
        self._shelf(key).put(key, record)
        try:
            await self._store.note(_insert(key, record))
        except BaseException:
            self._shelf(key).take(key)
            raise

    async def note(self, key: Key, digest: bytes, facts: bytes) -> None:
        """Store facts of a begun call for the next process's `earlier`. Raises `StoreFailed`."""
        record = IdempotencyRecord(digest, time.time(), "begun", len(facts), facts)
        noted = _insert(key, record)
        record.result = None  # this process does not need it
        self._shelf(key).put(key, record)
        await self._store.note(noted)

    async def finish(self, key: Key, digest: bytes, result: bytes) -> None:
        """Store the result of a begun call.

        Raises `StoreFailed` if it can only be kept in this process's memory.
        """
        record = IdempotencyRecord(digest, time.time(), "done", len(result), result)

        def written() -> None:
            record.result = None  # rarely requested, so it need not be in memory too

        await self._put(key, record, written)

    def keep(self, key: Key, digest: bytes, result: bytes) -> None:
        """Keep the result of a reading call in memory for a while."""
        settings = self._settings
        shelf = self._reads.get(key[0])
        if shelf is None:
            shelf = _Shelf(1 << 20, READS_BYTES, settings.idempotency_age)
            self._reads[key[0]] = shelf
        before = shelf.bytes
        shelf.put(key, IdempotencyRecord(digest, time.time(), "done", len(result), result))
        shelf.trim()
        self._reads_bytes += shelf.bytes - before
        if self._reads_bytes > READS_BYTES:
            self._lighten(READS_BYTES // 10 * 9)

    def _lighten(self, most: int) -> None:
        """Drop results of reading calls, from the tenant with the most, down to `most` bytes."""
        heap = [(-shelf.bytes, tenant) for tenant, shelf in self._reads.items()]
        heapq.heapify(heap)
        while heap and self._reads_bytes > most:
            _, tenant = heapq.heappop(heap)
            shelf = self._reads[tenant]
            before = shelf.bytes
            shelf.drop()
            self._reads_bytes -= before - shelf.bytes
            if shelf.records:
                heapq.heappush(heap, (-shelf.bytes, tenant))
            else:
                del self._reads[tenant]

    async def forget(self, key: Key) -> None:
        """Undo `begin`: the call did not happen and may be made again."""
        if self._shelf(key).take(key) is not None:
            await self._store.note(_delete(key))

    async def fence(self, key: Key) -> None:
        """Bar this id from any call from now on, whether it is unused or begun."""
        known = self._find(key)
        if known is not None and known.state == "done":
            return
        await self._put(key, IdempotencyRecord(b"", time.time(), "fenced"))

    async def forget_tenant(self, tenant: str) -> None:
        """Forget a destroyed tenant, so that the next one of its name has no records."""
        self._unload(tenant)
        await self._store.note(("DELETE FROM receipts WHERE tenant = ?", (tenant,)))

    async def recall(self, tenant: str) -> None:
        """Read a tenant's records again, since those in the store have been replaced."""
        self._unload(tenant)
        for key, record in await self._store.read(partial(_all, tenant=tenant)):
            self._shelf(key).put(key, record)
        if tenant in self._stored:
            await self._store.note(*map(_delete, self._stored[tenant].trim()))

    def _unload(self, tenant: str) -> None:
        self._stored.pop(tenant, None)
        if (reads := self._reads.pop(tenant, None)) is not None:
            self._reads_bytes -= reads.bytes

    async def earlier(self, kind: Kind) -> list[tuple[Key, IdempotencyRecord]]:
        """Return the records of one kind of earlier processes, with their results. For the start.

        Those of a tenant come in the order in which they were made.
        """
        await self._store.settled()
        results = await self._store.read(partial(_results, kind=kind))
        return [
            (key, replace(record, result=results.get(key)))
            for shelf in self._stored.values()
            for key, record in shelf.records.items()
            if key[1] == kind and record.state != "fenced"
        ]

    def _find(self, key: Key) -> IdempotencyRecord | None:
        shelves = (self._stored.get(key[0]), self._reads.get(key[0]))
        found = (shelf.records.get(key) for shelf in shelves if shelf is not None)
        return next((record for record in found if record is not None), None)

    def _shelf(self, key: Key) -> _Shelf:
        shelf = self._stored.get(key[0])
        if shelf is None:
            settings = self._settings
            shelf = _Shelf(KEPT, KEPT_BYTES, settings.idempotency_age)
            self._stored[key[0]] = shelf
        return shelf

    async def _put(
        self, key: Key, record: IdempotencyRecord, written: Callable[[], None] | None = None
    ) -> None:
        """Store a record, and in the same transaction drop those above the limits."""
        shelf = self._shelf(key)
        shelf.put(key, record)
        await self._store.note(_insert(key, record), *map(_delete, shelf.trim()), written=written)


# --- statements -----------------------------------------------------------------------------------------


def _all(connection: sqlite3.Connection, tenant: str | None = None) -> list[tuple[Key, IdempotencyRecord]]:
    rows = connection.execute(
        "SELECT tenant, kind, id, digest, at, state, coalesce(length(result), 0) FROM receipts"
        " WHERE ?1 IS NULL OR tenant = ?1 ORDER BY at",
        (tenant,),
    )
    return [
        ((tenant, kind, id_), IdempotencyRecord(digest, at, state, size))
        for tenant, kind, id_, digest, at, state, size in rows
    ]


def _result(connection: sqlite3.Connection, key: Key) -> bytes | None:
    row = connection.execute(
        "SELECT result FROM receipts WHERE tenant = ? AND kind = ? AND id = ?", key
    ).fetchone()
    found: bytes | None = None if row is None else row[0]
    return found


def _results(connection: sqlite3.Connection, kind: Kind) -> dict[Key, bytes | None]:
    rows = connection.execute("SELECT tenant, kind, id, result FROM receipts WHERE kind = ?", (kind,))
    return {(tenant, kind, id_): result for tenant, kind, id_, result in rows}


def _insert(key: Key, record: IdempotencyRecord) -> Statement:
    return _INSERT, (*key, record.digest, record.at, record.state, record.result)


def _delete(key: Key) -> Statement:
    return "DELETE FROM receipts WHERE tenant = ? AND kind = ? AND id = ?", key


# not REPLACE, which deletes the row and inserts it again in every index
_INSERT: Final = (
    "INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
    " digest = excluded.digest, at = excluded.at, state = excluded.state, result = excluded.result"
)
