"""The record of a move: its target, progress and outcome. Each member keeps the latest of each tenant."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final, Literal

import orjson

from gateway.storage.store import Store

State = Literal["waiting", "copying", "switching", "decided", "arrived", "undoing", "moved", "failed"]
"""Until `decided` a move is undone where it breaks off; from then on it goes on to its end."""

ENDED: Final = ("moved", "failed")


@dataclass(slots=True)
class Move:
    """One move. Times are in seconds since the epoch, `gap` is how many seconds calls waited."""

    tenant: str
    instance: str
    source: str
    target: str
    by: str
    state: State = "waiting"
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    began: float = field(default_factory=time.time)
    ended: float | None = None
    gap: float | None = None
    error: dict[str, Any] | None = None
    running: bool = False  # before it was stopped to be moved
    memory: str | None = None  # its limit
    managed: str | None = None  # the instance's own mark as a tenant
    drained: bool = False  # it is to come back when its member is restored
    leftover: bool = False  # the target could not be told that the move is given up

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        """Return it as clients see it."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "from": self.source,
            "to": self.target,
            "state": self.state,
            "began": self.began,
            "ended": self.ended,
            "gap_ms": None if self.gap is None else int(self.gap * 1000),
            "error": self.error,
            "drained": self.drained,
        }


def parsed(text: bytes) -> Move:
    """Return a stored move, or one that a peer reports. Fields that a newer gateway added are ignored."""
    said: Mapping[str, Any] = orjson.loads(text)
    known = {name: said[name] for name in Move.__dataclass_fields__ if name in said}
    return Move(**known)


class MoveLog:
    """The last move of each tenant, from this member or to it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def save(self, move: Move) -> None:
        """Store a move's state; it is on the disk when this returns. Raises `StoreFailed`."""
        text = orjson.dumps(asdict(move))
        await self._store.write(partial(_save, tenant=move.tenant, identity=move.id, text=text), durable=True)

    async def last(self, tenant: str) -> Move | None:
        """Return the last move of a tenant, None if there was none."""
        text = await self._store.read(partial(_last, tenant=tenant))
        return None if text is None else parsed(text)

    async def unfinished(self) -> list[Move]:
        """Return the moves that have not ended or not been cleaned up."""
        moves = map(parsed, await self._store.read(_all))
        return [move for move in moves if not move.over or move.leftover]


def _save(connection: sqlite3.Connection, tenant: str, identity: str, text: bytes) -> None:
    connection.execute("INSERT OR REPLACE INTO moves VALUES (?, ?, ?)", (tenant, identity, text))


def _last(connection: sqlite3.Connection, tenant: str) -> bytes | None:
    row = connection.execute("SELECT record FROM moves WHERE tenant = ?", (tenant,)).fetchone()
    return None if row is None else bytes(row[0])


def _all(connection: sqlite3.Connection) -> list[bytes]:
    return [bytes(row[0]) for row in connection.execute("SELECT record FROM moves")]
