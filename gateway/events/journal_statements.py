"""The event journal's SQL. The store runs each function in one of its threads."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from gateway.events.event import Event, Filter
from gateway.events.journal import SCAN, Stretch
from gateway.events.retention import ALL, concerned

# events per statement; SQLite caches the parsed statement of each length
_ROWS: Final = 64
# events of a write with unknown outcome may exist already
_INSERT: Final = "INSERT OR IGNORE INTO events VALUES"
_LOSE: Final = (
    "INSERT INTO losses VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
    " upto = max(upto, excluded.upto), number = excluded.number"
)
_REMOVE: Final = "DELETE FROM events WHERE id IN (SELECT value FROM json_each(?))"
_FOLD: Final = "DELETE FROM losses WHERE key IN (SELECT value FROM json_each(?))"

# id, tenant, deployment, bytes, time
Row = tuple[int, str | None, str | None, int, float]


@dataclass(slots=True)
class Change:
    """A transaction of the journal: adds `events`, and deletes those with the ids in `removed`.

    `number` is the number of this loss. `lost` maps keys of `Losses` to the last id each loses. `folded` has
    the keys whose losses count for everybody from now on, and their last id.
    """

    events: Sequence[Event]
    removed: Sequence[int]
    lost: Mapping[str, int]
    number: int = 0
    folded: tuple[Sequence[str], int] = ((), 0)

    def losses(self) -> list[tuple[str, int, int]]:
        """Return the rows of the table `losses`: key, last lost id, number of the loss."""
        found = dict(self.lost)
        if self.folded[0]:
            found[ALL] = max(self.folded[1], found.get(ALL, -1))
        return [(key, upto, self.number) for key, upto in found.items()]

    def write(self, connection: sqlite3.Connection) -> None:
        """Add and delete the events, and record the losses."""
        # Many rows per statement, because the thread releases and retakes the GIL at each statement, right in
        # the middle of the calls that the events are about.
        for rows in (self.events[at : at + _ROWS] for at in range(0, len(self.events), _ROWS)):
            connection.execute(
                f"{_INSERT} {', '.join(['(?, ?, ?, ?, ?, ?, ?)'] * len(rows))}",
                [
                    field
                    for event in rows
                    for field in (
                        *(event.id, event.time, event.type, event.source),
                        *(event.tenant, event.deployment, event.encoded),
                    )
                ],
            )
        if self.removed:
            connection.execute(_REMOVE, (_listed(self.removed),))
        if self.folded[0]:
            connection.execute(_FOLD, (_listed(self.folded[0]),))
        for row in self.losses():
            connection.execute(_LOSE, row)


def _listed(values: Iterable[int | str]) -> str:
    return orjson.dumps(list(values)).decode()


def noted_boot(connection: sqlite3.Connection) -> str | None:
    """Return the boot of the machine in which the last gateway may have written what is not on disk yet."""
    found = connection.execute("SELECT boot FROM journal").fetchone()
    return None if found is None else found[0]


def begin_process(connection: sqlite3.Connection, boot: str, clock: int) -> None:
    """Record that a gateway writes in this boot of the machine."""
    connection.execute("INSERT OR REPLACE INTO journal VALUES (1, ?)", (boot,))
    connection.execute(
        "INSERT OR IGNORE INTO losses VALUES (?, coalesce((SELECT min(id) - 1 FROM events), ?), 1)",
        (ALL, clock),
    )


def end_process(connection: sqlite3.Connection) -> None:
    """Record that the gateway is shutting down and everything it wrote is on disk."""
    connection.execute("UPDATE journal SET boot = NULL")


def read_ends(
    connection: sqlite3.Connection,
) -> tuple[int | None, int | None, list[tuple[str, int, int]]]:
    """Return the ids of the first and the last event, None without any, and the losses."""
    first, last = connection.execute(
        "SELECT (SELECT min(id) FROM events), (SELECT max(id) FROM events)"
    ).fetchone()
    return first, last, connection.execute("SELECT key, upto, number FROM losses").fetchall()


def read_kept(connection: sqlite3.Connection) -> list[Row]:
    """Return a row per event, oldest first."""
    return connection.execute(
        "SELECT id, tenant, deployment, length(encoded), time FROM events ORDER BY id"
    ).fetchall()


def _events(connection: sqlite3.Connection, after: int, upto: int, limit: int) -> Iterator[Event]:
    for number, at, type_, source, tenant, deployment, encoded in connection.execute(
        "SELECT * FROM events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", (after, upto, limit)
    ):
        yield Event(number, type_, source, at, tenant, deployment, encoded)


def read_stretch(
    connection: sqlite3.Connection, after: int, newest: int, limit: int, wanted: Filter
) -> Stretch:
    """Return the next stretch after an id, up to the id `newest`, with at most `limit` events."""
    found: list[Event] = []
    start, end, looked = after, after, 0
    # one transaction for both reads: an event deleted in between would be missed or reported twice
    connection.execute("BEGIN")
    try:
        lost = _loss(connection, after, wanted)
        for looked, event in enumerate(_events(connection, after, newest, SCAN), 1):
            start = event.id - 1 if looked == 1 else start
            end = event.id
            if wanted.matches(event):
                found.append(event)
                if len(found) == limit:
                    break
    finally:
        connection.execute("COMMIT")
    if looked < SCAN and len(found) < limit:  # the end was reached
        end = max(end, newest)
        start = start if looked else end
    return Stretch(start, end, found, lost)


def _loss(connection: sqlite3.Connection, after: int, wanted: Filter) -> int:
    keys = concerned(wanted)
    whose, given = (
        ("", ()) if keys is None else ("AND key IN (SELECT value FROM json_each(?))", (_listed(keys),))
    )
    (number,) = connection.execute(
        f"SELECT coalesce(max(number), 0) FROM losses WHERE upto > ? {whose}",  # noqa: S608 - ours alone
        (after, *given),
    ).fetchone()
    found: int = number
    return found
