"""All records of one tenant, as text that another home can adopt: for a move or a standby copy.

```
{"v": 1, "id": …, "tenant": …, "instance": …, "member": …, "ended": …}
{"table": "receipts", "columns": ["kind", "id", …]}
["call", "c1", {"b": BASE64}, …]                              a row; bytes are in base64
{"rows": NUMBER}                                              the end, so that nothing cut off is adopted
```

Tables and columns that the adopting gateway does not know are passed over, and those that it misses get their
defaults: so two versions of the gateway can stand side by side.

Events stay in the journal of the member where they happened, whose numbers they have. A domain is claimed
anew by the home that has the tenant.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import orjson

from gateway.errors import TooLarge, Unavailable
from gateway.storage.store import Store

VERSION: Final = 1
"""Of the text. A gateway adopts what is of its own version or an older one."""

TABLES: Final[Mapping[str, Sequence[str]]] = {
    "receipts": ("kind", "id", "digest", "at", "state", "result"),
    "folders": ("session", "folder"),
    "snapshots": ("name", "bytes"),
    "deployments": ("id", "created", "ended", "subject", "key", "request", "record"),
    "audit": ("time", "who", "action", "facts", "operator"),
}
"""What travels, without the column `tenant`."""

STAYS: Final = frozenset({"events", "names", "domains", "arrivals", "moves", "standby"})
"""Tables with a column `tenant` that do not travel."""

# what a new home may have of an earlier tenant of that name, or of an earlier stay; the rest is history
_REPLACED: Final = ("receipts", "folders", "snapshots")
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {"audit": {"event": 0}}  # its event is another journal's
MOST: Final = 64 << 20  # bytes of one tenant's records, which are one text in memory at both ends
_KEPT: Final = 10_000  # tenants of which the last adopted text is remembered


class CannotAdopt(Unavailable):
    """The text is a newer gateway's, cut off, or about something else. Nothing of it was adopted."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a text: its unique `id`; `member` is the home that it comes from.

    `ended` is when the last owner of the tenant's name ended there, 0.0 if there was none.
    """

    id: str
    tenant: str
    instance: str
    member: str
    ended: float = 0.0


class Records:
    """The records of one gateway's tenants, to and from the gateways of other members.

    A text that has come is kept by `keep` until `adopt` makes it the tenant's records, or `drop` forgets it;
    of a tenant the last one is kept. Each of `recall` is called with a
    tenant whose records have been replaced, to reload what it keeps in memory.
    """

    def __init__(
        self, store: Store, member: str, recall: Sequence[Callable[[str], Awaitable[None]]] = ()
    ) -> None:
        self._store, self._member = store, member
        self._recall = recall

    async def export(self, tenant: str, instance: str, identity: str) -> bytes:
        """Return the records of one of our tenants, including everything recorded before this call.

        Raises `StoreFailed`, and `TooLarge` if they have more than `MOST` bytes.
        """
        await self._store.settled()
        header = Header(identity, tenant, instance, self._member)
        return await self._store.read(partial(_export, header=header, most=MOST))

    async def keep(self, text: bytes) -> Header:
        """Keep a text for later, on disk when this returns. It replaces an earlier one of the same tenant.

        Raises `CannotAdopt`, `TooLarge` and `StoreFailed`.
        """
        if len(text) > MOST:
            raise _too_large("a tenant", MOST)
        return await self._store.write(partial(_keep, text=text), durable=True)

    async def kept(self, tenant: str) -> Header | None:
        """Return the header of a tenant's kept text, None if there is none."""
        return await self._store.read(partial(_kept, tenant=tenant))

    async def drop(self, tenant: str, identity: str) -> None:
        """Forget a text that is kept, unless another one has replaced it. Idempotent."""
        await self._store.write(partial(_drop, tenant=tenant, identity=identity))

    async def adopt(self, tenant: str, identity: str) -> Header:
        """Make the text that is kept the tenant's records, all of it or nothing. Idempotent.

        Raises `CannotAdopt` if there is no such text, and `StoreFailed`.
        """
        header, anew = await self._store.write(
            partial(_adopt, tenant=tenant, identity=identity), durable=True
        )
        if anew:
            await self._tell(tenant)
        return header

    async def leave(self, tenant: str) -> None:
        """Remove the records of a tenant that has another home now. Idempotent. Raises `StoreFailed`."""
        await self._store.settled()
        await self._store.write(partial(_clear, tenant=tenant, tables=tuple(TABLES)))
        await self._tell(tenant)

    async def _tell(self, tenant: str) -> None:
        for recall in self._recall:
            await recall(tenant)


def unsure(before: bytes, after: bytes) -> bytes:
    """Return the text `after`, with the outcome of each call set to unknown that differs from `before`.

    This is for a disk that was copied in between, which may or may not have that call's changes.
    """
    same, table, columns = frozenset(before.splitlines()), "", list[str]()
    header, *lines = after.splitlines(keepends=True)
    text = bytearray(header)
    for line in lines:
        match orjson.loads(line):
            case {"table": str(table), "columns": list(columns)}:
                pass
            case list(values) if table == "receipts" and line[:-1] not in same:
                row = dict(zip(columns, values, strict=True))
                if row["state"] == "done":
                    line = _line([*(row | {"state": "begun", "result": None}).values()])
        text += line
    return bytes(text)


# --- work of the store ----------------------------------------------------------------------------------


def _export(connection: sqlite3.Connection, header: Header, most: int) -> bytes:
    ended = connection.execute("SELECT at FROM names WHERE tenant = ?", (header.tenant,)).fetchone()
    facts = {**asdict(header), "ended": ended[0] if ended is not None else 0.0}
    text = bytearray(_line({"v": VERSION, **facts}))
    rows = 0
    for table, columns in TABLES.items():
        text += _line({"table": table, "columns": columns})
        found = connection.execute(
            f"SELECT {', '.join(columns)} FROM {table} WHERE tenant = ? ORDER BY rowid",  # noqa: S608 - ours
            (header.tenant,),
        )
        for row in found:
            text += _line(row)
            rows += 1
            if len(text) > most:
                raise _too_large(header.tenant, most)
    text += _line({"rows": rows})
    return bytes(text)


def _keep(connection: sqlite3.Connection, text: bytes) -> Header:
    header = _header(text)
    for _ in _rows(connection, text):
        pass  # refused now rather than when the tenant is stopped, and nothing else can be done
    connection.execute(
        "INSERT OR REPLACE INTO arrivals (tenant, id, text) VALUES (?, ?, ?)",
        (header.tenant, header.id, text),
    )
    return header


def _kept(connection: sqlite3.Connection, tenant: str) -> Header | None:
    row = connection.execute("SELECT text FROM arrivals WHERE tenant = ?", (tenant,)).fetchone()
    return None if row is None or row[0] is None else _header(row[0])


def _drop(connection: sqlite3.Connection, tenant: str, identity: str) -> None:
    connection.execute("DELETE FROM arrivals WHERE tenant = ? AND id = ?", (tenant, identity))


def _adopt(connection: sqlite3.Connection, tenant: str, identity: str) -> tuple[Header, bool]:
    """Return what was adopted, and whether it was by this call."""
    row = connection.execute(
        "SELECT text, adopted FROM arrivals WHERE tenant = ? AND id = ?", (tenant, identity)
    ).fetchone()
    if row is None:
        raise CannotAdopt(f"there are no records of {tenant} under {identity}", reason="no_records")
    text, adopted = row
    if adopted is not None:
        return Header(**orjson.loads(adopted)), False
    header = _header(text)
    _clear(connection, tenant, _REPLACED)
    for table, values in _rows(connection, text):
        given = {**values, "tenant": tenant, **_DEFAULTS.get(table, {})}
        connection.execute(
            f"INSERT OR REPLACE INTO {table} ({', '.join(given)}) "  # noqa: S608 - names of ours
            f"VALUES ({', '.join('?' * len(given))})",
            tuple(given.values()),
        )
    # its id stays, to know it again
    connection.execute(
        "UPDATE arrivals SET text = NULL, adopted = ? WHERE tenant = ?",
        (orjson.dumps(header).decode(), tenant),
    )
    connection.execute(
        "DELETE FROM arrivals WHERE adopted IS NOT NULL AND rowid <= (SELECT max(rowid) - ? FROM arrivals)",
        (_KEPT,),
    )
    return header, True


def _clear(connection: sqlite3.Connection, tenant: str, tables: Sequence[str]) -> None:
    for table in tables:
        connection.execute(f"DELETE FROM {table} WHERE tenant = ?", (tenant,))  # noqa: S608 - names of ours


# --- the text -------------------------------------------------------------------------------------------


def _line(said: object) -> bytes:
    return orjson.dumps(said, default=_bytes, option=orjson.OPT_APPEND_NEWLINE)


def _bytes(value: object) -> object:
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode()}
    raise TypeError


def _value(said: object) -> object:
    """Return a value of a row. Raises `CannotAdopt` for what is none."""
    match said:
        case {"b": str(text)}:
            return base64.b64decode(text)
        case None | str() | int() | float():
            return said
    raise CannotAdopt("a tenant's records cannot be read", reason="damaged")


def _header(text: bytes) -> Header:
    """Return the header of a text. Raises `CannotAdopt`."""
    try:
        said = orjson.loads(text[: text.index(b"\n")])
        version, ended = int(said["v"]), float(said["ended"])
        names = {key: str(said[key]) for key in ("id", "tenant", "instance", "member")}
    except (ValueError, KeyError, TypeError) as error:
        raise CannotAdopt("a tenant's records cannot be read", reason="damaged") from error
    if version > VERSION:
        raise CannotAdopt(
            f"the records of {names['tenant']} are from a newer gateway: upgrade this one first",
            reason="newer",
        )
    return Header(**names, ended=ended)


def _rows(connection: sqlite3.Connection, text: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield table and values of each row that we have a place for. Raises `CannotAdopt`."""
    table, columns, known, rows = "", list[str](), frozenset[str](), 0
    try:
        start = text.index(b"\n") + 1
        while start < len(text):
            end = text.index(b"\n", start)
            match orjson.loads(text[start:end]):
                case {"table": str(table), "columns": list(columns)}:
                    known = _columns(connection, table) if table in TABLES else frozenset()
                case {"rows": int(number)} if number == rows and end + 1 == len(text):
                    return
                case list(values) if len(values) == len(columns):
                    rows += 1
                    if known:
                        pairs = zip(columns, map(_value, values), strict=True)
                        yield table, {column: value for column, value in pairs if column in known}
                case _:
                    break
            start = end + 1
    except ValueError:
        pass
    raise CannotAdopt("a tenant's records are cut off or cannot be read", reason="damaged")


def _columns(connection: sqlite3.Connection, table: str) -> frozenset[str]:
    """Return the columns of a table that may be given."""
    found = connection.execute("SELECT name FROM pragma_table_info(?)", (table,))
    return frozenset(name for (name,) in found if name in TABLES[table])


def _too_large(whose: str, most: int) -> TooLarge:
    return TooLarge(
        f"the records of {whose} have more than {most} bytes, the most that can be sent to another member",
        limit=most,
    )
