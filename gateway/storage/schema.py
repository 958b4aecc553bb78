"""The tables of the gateway's records, as steps from an empty file to today's."""

from __future__ import annotations

import sqlite3
from typing import Final

from gateway.storage.errors import StoreFailed

# Each step runs once, in this order. After a release a step never changes: a later change is a new step.
MIGRATIONS: Final = (
    """
    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        time REAL NOT NULL,
        type TEXT NOT NULL,
        source TEXT NOT NULL,
        tenant TEXT,
        deployment TEXT,
        encoded BLOB NOT NULL
    ) STRICT;
    CREATE TABLE journal (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        boot TEXT
    ) STRICT;
    """,
    """
    CREATE TABLE deployments (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        created REAL NOT NULL,
        ended REAL,
        subject TEXT NOT NULL,
        key TEXT,
        request TEXT NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX deployments_key ON deployments (subject, key) WHERE key IS NOT NULL;
    CREATE INDEX deployments_created ON deployments (created);
    """,
    """
    CREATE TABLE receipts (
        tenant TEXT NOT NULL,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        digest BLOB NOT NULL,
        at REAL NOT NULL,
        state TEXT NOT NULL,
        result BLOB,
        PRIMARY KEY (tenant, kind, id)
    ) STRICT;
    CREATE INDEX receipts_at ON receipts (at);
    """,
    """
    CREATE TABLE revoked (token TEXT PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL) STRICT;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        time REAL NOT NULL,
        who TEXT NOT NULL,
        action TEXT NOT NULL,
        tenant TEXT,
        facts TEXT NOT NULL,
        event INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX audit_event ON audit (event);
    """,
    "DROP INDEX receipts_at;",  # only the start used it, and each call that writes paid for it
    """
    CREATE TABLE names (
        tenant TEXT PRIMARY KEY,
        instance TEXT NOT NULL,
        ended INTEGER NOT NULL,
        begun INTEGER NOT NULL,
        at REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE domains (
        domain TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        instance TEXT NOT NULL,
        deployment TEXT NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE losses (key TEXT PRIMARY KEY, upto INTEGER NOT NULL, number INTEGER NOT NULL) STRICT;
    CREATE INDEX losses_upto ON losses (upto);
    """,
    # several tenants may use the same key under one subject
    """
    DROP INDEX deployments_key;
    CREATE INDEX deployments_key ON deployments (subject, key) WHERE key IS NOT NULL;
    """,
    """
    CREATE TABLE snapshots (
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (tenant, name)
    ) STRICT;
    """,
    """
    ALTER TABLE audit ADD COLUMN operator INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX audit_share ON audit (operator, tenant);
    """,
    """
    CREATE TABLE folders (
        tenant TEXT NOT NULL,
        session TEXT NOT NULL,
        folder TEXT NOT NULL,
        PRIMARY KEY (tenant, session)
    ) STRICT;
    """,
    "ALTER TABLE revoked ADD COLUMN expires REAL;",
    "CREATE TABLE peers (member TEXT PRIMARY KEY, tenants BLOB NOT NULL) STRICT;",
    # what came of tenants from other members: a text until it is adopted, then what it was about
    """
    CREATE TABLE arrivals (tenant TEXT PRIMARY KEY, id TEXT NOT NULL, text BLOB, adopted TEXT) STRICT;
    """,
    # the last move of each tenant from here or to here; and of names, where a tenant came from or went to
    """
    CREATE TABLE moves (
        tenant TEXT PRIMARY KEY,
        id TEXT NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    ALTER TABLE names ADD COLUMN arrived INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE names ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE standby (
        tenant TEXT PRIMARY KEY,
        instance TEXT NOT NULL,
        member TEXT NOT NULL,
        at REAL NOT NULL
    ) STRICT;
    """,
)


def version_of(connection: sqlite3.Connection) -> int:
    """Return how many of the steps the file has. Raises `StoreFailed` if a newer gateway wrote it."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreFailed(
            "the records in the state dir are from a newer gateway: upgrade this one, or restore a backup",
            reason="newer",
        )
    return version


def migrate(connection: sqlite3.Connection) -> None:
    """Run the steps that the file does not have, each of them whole or not at all."""
    version = version_of(connection)
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        try:
            connection.executescript(f"BEGIN; {script}; PRAGMA user_version={number}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
