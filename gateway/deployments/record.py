"""The record of a deployment, as stored and as shown."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import orjson

from gateway.errors import GatewayError

Kind = Literal["create", "update"]
State = Literal["waiting", "running", "succeeded", "undoing", "rolledback"]
PHASES: Final = ("validate", "create", "push", "install", "start", "expose", "route", "verify")
ENDED: Final = ("succeeded", "rolledback")


@dataclass(slots=True)
class Phase:
    name: str
    state: Literal["waiting", "running", "done", "failed", "undone"] = "waiting"
    ms: int | None = None


@dataclass(slots=True)
class Record:
    """One deployment, without the secrets and files that it was given."""

    tenant: str
    domain: str
    url: str
    template: str
    by: str
    kind: Kind = "create"
    port: int = 0
    health: str = "/"
    source: str | None = None  # what the tenant was made from
    instance: str | None = None  # distinguishes the tenant from others with its name
    rollback: str | None = None  # the deployment whose site it brings back
    env: list[str] | None = None  # the variables that it changes
    former: str | None = None  # the deployment whose site it replaces
    settled: bool = False  # of an update: the new files are live, and only clean-up is left
    state: State = "waiting"
    id: str = field(default_factory=lambda: f"d-{secrets.token_hex(8)}")
    created: float = field(default_factory=time.time)
    ended: float | None = None
    ms: int | None = None
    error: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    detected: dict[str, Any] | None = None  # what a folder was detected as
    phases: list[Phase] = field(default_factory=lambda: [Phase(name) for name in PHASES])

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        """Return it as HTTP shows it."""
        hidden = {"by", "settled", "health", "instance", "former"}
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    def failed(self, error: GatewayError, phase: str) -> None:
        self.error = {"code": error.code, "message": error.message, **error.facts, "phase": phase}


def parsed(text: bytes) -> Record:
    said = orjson.loads(text)
    said["phases"] = [Phase(**phase) for phase in said["phases"]]
    return Record(**said)


def save(
    connection: sqlite3.Connection, record: bytes, identity: str, tenant: str, ended: float | None
) -> None:
    connection.execute(
        "UPDATE deployments SET record = ?, ended = ?, tenant = ? WHERE id = ?",
        (record, ended, tenant, identity),
    )


def keyed(connection: sqlite3.Connection, subject: str, key: str) -> list[tuple[Record, str]]:
    """Return the deployments that a subject began under a key, newest first, with their requests' digests."""
    rows = connection.execute(
        "SELECT record, request FROM deployments WHERE subject = ? AND key = ? ORDER BY created DESC",
        (subject, key),
    )
    return [(parsed(record), str(request)) for record, request in rows]


def begin(connection: sqlite3.Connection, record: Record, key: str | None, request: str, kept: int) -> None:
    """Store a new deployment. Beyond `kept`, remove ended ones: the oldest of the tenant with most."""
    connection.execute(
        "INSERT INTO deployments (id, tenant, created, ended, subject, key, request, record) "
        "VALUES (?, ?, ?, NULL, ?, ?, ?, ?)",
        (record.id, record.tenant, record.created, record.by, key, request, orjson.dumps(record)),
    )
    connection.execute(_TRIM, (kept,))


# numbered by age within each tenant; the highest numbers are removed first
_TRIM: Final = """
    DELETE FROM deployments WHERE id IN (
        SELECT id FROM (
            SELECT id, created, ended, row_number() OVER (PARTITION BY tenant ORDER BY created DESC) AS place
            FROM deployments
        )
        WHERE ended IS NOT NULL ORDER BY place DESC, created
        LIMIT max(0, (SELECT count(*) FROM deployments) - ?)
    )
"""


def find(connection: sqlite3.Connection, identity: str) -> Record | None:
    row = connection.execute("SELECT record FROM deployments WHERE id = ?", (identity,)).fetchone()
    return None if row is None else parsed(row[0])


def recent(connection: sqlite3.Connection, tenants: Iterable[str] | None, limit: int) -> list[Record]:
    """Return the newest deployments, of these tenants or of all."""
    where, names = "", list(tenants or ())
    if tenants is not None:
        where = f"WHERE tenant IN ({','.join('?' * len(names))})"
    rows = connection.execute(
        f"SELECT record FROM deployments {where} ORDER BY created DESC LIMIT ?",  # noqa: S608 - question marks
        (*names, limit),
    ).fetchall()
    return [parsed(row[0]) for row in rows]


def unfinished(connection: sqlite3.Connection) -> list[Record]:
    rows = connection.execute(
        "SELECT record FROM deployments WHERE ended IS NULL ORDER BY created"
    ).fetchall()
    return [parsed(row[0]) for row in rows]
