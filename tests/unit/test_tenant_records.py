"""What a home keeps of one tenant, adopted by another home: all of it, once, and only what is whole."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.cluster.records import STAYS, TABLES, VERSION, CannotAdopt, Header, Records
from gateway.errors import Cancelled, Gone, TooLarge
from gateway.idempotency import Idempotency, Key
from gateway.settings import Settings
from gateway.storage.store import Store
from gateway.tools.session import SessionFolders

MOST = 1 << 20
CALL: Key = ("shop", "call", "c1")


class Home:
    """The records of one member's gateway."""

    def __init__(self, member: str, store: Store, idempotency: Idempotency, folders: SessionFolders) -> None:
        self.store, self.idempotency, self.folders = store, idempotency, folders
        self.recalled: list[str] = []
        self.records = Records(store, member, (idempotency.recall, folders.recall, self._recall))

    async def _recall(self, tenant: str) -> None:
        self.recalled.append(tenant)

    async def rows(self, query: str, *given: Any) -> list[Any]:
        return await self.store.read(lambda connection: connection.execute(query, given).fetchall())

    async def do(self, statement: str, *given: Any) -> None:
        await self.store.write(lambda connection: connection.execute(statement, given) and None)


@contextlib.asynccontextmanager
async def home(folder: Path, member: str) -> AsyncIterator[Home]:
    async with Store(folder / member) as store:
        idempotency = await Idempotency.opened(store, Settings())
        yield Home(member, store, idempotency, await SessionFolders.opened(store))


@pytest.fixture
async def old(tmp_path: Path) -> AsyncIterator[Home]:
    """The home that has the tenant, and another one of which nothing is to be told."""
    async with home(tmp_path, "m1") as old:
        for tenant in ("shop", "other"):
            await old.idempotency.begin((tenant, "call", "c1"), b"d1")
            await old.idempotency.finish((tenant, "call", "c1"), b"d1", b"\x00\xffdone")
            await old.idempotency.begin((tenant, "exec", "x1"), b"d2")
            await old.idempotency.fence((tenant, "call", "c3"))
            await old.folders.keep(tenant, "agent", "src")
            await old.do("INSERT INTO snapshots VALUES (?, 'before', 4096)", tenant)
            await old.do(
                "INSERT INTO deployments VALUES (?, ?, 1.5, 2.5, 'me', 'key', 'digest', ?)",
                *(f"d-{tenant}", tenant, b'{"id": "d"}'),
            )
            await old.do(
                "INSERT INTO audit (time, who, action, tenant, facts, event)"
                " VALUES (3, 'me', 'a', ?, '{}', 9)",
                tenant,
            )
        await old.do(
            "INSERT INTO names (tenant, instance, ended, begun, at) VALUES ('shop', 'i-1', 7, 8, 1234.5)"
        )
        yield old


@pytest.fixture
async def new(tmp_path: Path) -> AsyncIterator[Home]:
    async with home(tmp_path, "m2") as new:
        yield new


async def travelled(old: Home, new: Home, identity: str = "m-1") -> Header:
    await new.records.keep(await old.records.export("shop", "i-1", identity))
    return await new.records.adopt("shop", identity)


async def test_all_of_one_tenant_travels_and_nothing_of_others(old: Home, new: Home) -> None:
    assert await travelled(old, new) == Header("m-1", "shop", "i-1", "m1", 1234.5)
    assert await new.idempotency.result(CALL, b"d1") == b"\x00\xffdone"
    with pytest.raises(Gone):  # it was under way: nobody knows
        await new.idempotency.result(("shop", "exec", "x1"), b"d2")
    with pytest.raises(Cancelled):
        await new.idempotency.result(("shop", "call", "c3"), b"")
    assert dict(new.folders.kept) == {("shop", "agent"): "src"}
    assert await new.rows("SELECT * FROM snapshots") == [("shop", "before", 4096)]
    assert await new.rows("SELECT * FROM deployments") == [
        ("d-shop", "shop", 1.5, 2.5, "me", "key", "digest", b'{"id": "d"}')
    ]
    # an event's number is another one's at another member
    assert await new.rows("SELECT time, who, tenant, event FROM audit") == [(3, "me", "shop", 0)]
    assert new.recalled == ["shop"]


async def test_to_adopt_twice_is_to_adopt_once(old: Home, new: Home) -> None:
    header = await travelled(old, new)
    await new.idempotency.begin(("shop", "call", "later"), b"d")
    await new.idempotency.finish(("shop", "call", "later"), b"d", b"later")
    await new.store.settled()
    assert await new.records.adopt("shop", "m-1") == header
    assert await new.idempotency.result(("shop", "call", "later"), b"d") == b"later"
    assert len(await new.rows("SELECT * FROM audit")) == 1
    assert new.recalled == ["shop"]


async def test_a_later_text_replaces_an_earlier_one_that_is_kept(old: Home, new: Home) -> None:
    await new.records.keep(await old.records.export("shop", "i-1", "m-1"))
    await old.idempotency.begin(("shop", "call", "c9"), b"d")
    await old.idempotency.finish(("shop", "call", "c9"), b"d", b"nine")
    await new.records.keep(await old.records.export("shop", "i-1", "m-2"))
    assert await new.records.kept("shop") == Header("m-2", "shop", "i-1", "m1", 1234.5)
    with pytest.raises(CannotAdopt):
        await new.records.adopt("shop", "m-1")
    await new.records.adopt("shop", "m-2")
    assert await new.idempotency.result(("shop", "call", "c9"), b"d") == b"nine"
    assert await new.records.kept("shop") is None


async def test_what_is_dropped_is_not_adopted(old: Home, new: Home) -> None:
    await new.records.keep(await old.records.export("shop", "i-1", "m-1"))
    await new.records.drop("shop", "m-0")
    assert await new.records.kept("shop") is not None
    for _ in range(2):
        await new.records.drop("shop", "m-1")
    with pytest.raises(CannotAdopt):
        await new.records.adopt("shop", "m-1")


async def test_an_earlier_tenants_calls_are_not_the_new_ones(old: Home, new: Home) -> None:
    """One that had the name at the new home: its calls go, its history stays."""
    await new.idempotency.begin(("shop", "call", "theirs"), b"d")
    await new.idempotency.finish(("shop", "call", "theirs"), b"d", b"r")
    new.idempotency.keep(("shop", "call", "read"), b"d", b"r")
    await new.do(
        "INSERT INTO audit (time, who, action, tenant, facts, event) VALUES (1, 'x', 'b', 'shop', '{}', 0)"
    )
    await new.store.settled()
    await travelled(old, new)
    for call in ("theirs", "read"):  # nor are their ids taken
        assert await new.idempotency.result(("shop", "call", call), b"another") is None
    assert [row[0] for row in await new.rows("SELECT who FROM audit ORDER BY time")] == ["x", "me"]


async def test_the_old_home_keeps_nothing_of_one_that_left(old: Home, new: Home) -> None:
    await travelled(old, new)
    for _ in range(2):
        await old.records.leave("shop")
    for table in TABLES:
        assert await old.rows(f"SELECT DISTINCT tenant FROM {table}") == [("other",)]
    assert await old.idempotency.result(CALL, b"d1") is None
    assert await old.idempotency.result(("other", "call", "c1"), b"d1") == b"\x00\xffdone"
    assert dict(old.folders.kept) == {("other", "agent"): "src"}


async def test_what_is_cut_off_or_spoilt_is_refused_whole(old: Home, new: Home) -> None:
    text = await old.records.export("shop", "i-1", "m-1")
    lines = text.splitlines(keepends=True)
    spoilt = [text[:cut] for cut in (0, 1, len(text) // 2, len(text) - 1, len(text) - len(lines[-1]))]
    spoilt += [text + b"x\n", b"".join(lines[:2] + lines[3:]), text.replace(b'"b"', b'"c"')]
    for one in spoilt:
        with pytest.raises(CannotAdopt) as refused:
            await new.records.keep(one)
        assert refused.value.facts["reason"] == "damaged"
    assert await new.records.kept("shop") is None


async def test_a_newer_gateways_text_is_refused_with_the_reason(old: Home, new: Home) -> None:
    text = await old.records.export("shop", "i-1", "m-1")
    with pytest.raises(CannotAdopt) as refused:
        await new.records.keep(text.replace(b'{"v":%d,' % VERSION, b'{"v":%d,' % (VERSION + 1)))
    assert refused.value.facts["reason"] == "newer"


async def test_tables_and_columns_of_another_version_are_passed_over(old: Home, new: Home) -> None:
    """A minor step may add some; a gateway that lacks them goes on without."""
    lines = (await old.records.export("shop", "i-1", "m-1")).splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b'"snapshots"' in line)
    lines[at : at + 2] = [
        b'{"table":"snapshots","columns":["name","bytes","colour"],"more":1}\n',
        b'["before",4096,"red"]\n',
        b'{"table":"sqlite_master","columns":["name"]}\n',
        b'["x"]\n',
    ]
    lines[-1] = orjson.dumps({"rows": orjson.loads(lines[-1])["rows"] + 1}) + b"\n"
    await new.records.keep(b"".join(lines))
    await new.records.adopt("shop", "m-1")
    assert await new.rows("SELECT * FROM snapshots") == [("shop", "before", 4096)]


async def test_the_size_is_bounded_on_both_sides(
    old: Home, new: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cluster.records.MOST", MOST)
    result = bytes(MOST)
    await old.idempotency.begin(("shop", "call", "big"), b"d")
    await old.idempotency.finish(("shop", "call", "big"), b"d", result)
    with pytest.raises(TooLarge):
        await old.records.export("shop", "i-1", "m-1")
    with pytest.raises(TooLarge):
        await new.records.keep(result + b"x")


async def test_every_table_of_tenants_travels_or_is_known_to_stay(new: Home) -> None:
    """Whoever adds a table decides it here."""

    def tables(connection: sqlite3.Connection) -> dict[str, set[str]]:
        found = connection.execute(
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
        )
        columns: dict[str, set[str]] = {}
        for table, column in found:
            columns.setdefault(table, set()).add(column)
        return columns

    columns = await new.store.read(tables)
    assert {table for table, names in columns.items() if "tenant" in names} == STAYS | TABLES.keys()
    own = {"audit": {"id", "event"}}
    for table, given in TABLES.items():
        assert columns[table] == {*given, "tenant", *own.get(table, ())}
