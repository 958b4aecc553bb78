"""The records pass from one process to the next: checked before, opened once they are free."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.storage import store, writer
from gateway.storage.store import FILE, Store, StoreFailed


def _put(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO revoked (token, at, who) VALUES ('a token', 1.0, 'test')")


def _all(connection: sqlite3.Connection) -> list[tuple[str]]:
    return connection.execute("SELECT token FROM revoked").fetchall()


async def test_a_successor_checks_what_another_has_and_opens_it_as_it_was_left(tmp_path: Path) -> None:
    """The first one's close writes nothing back: its log of writes is there, and goes on."""
    old, new = Store(tmp_path), Store(tmp_path)
    async with old:
        await old.write(_put)
        await new.check()
        with pytest.raises(StoreFailed, match="another gateway"):
            await new.__aenter__()
        await new.check()
        await old.close()
        assert (tmp_path / f"{FILE}-wal").stat().st_size > 0
        async with new:
            assert await new.read(_all) == [("a token",)]
            await new.write(lambda connection: connection.execute("DELETE FROM revoked"))
    assert not (tmp_path / f"{FILE}-wal").exists()
    async with Store(tmp_path) as later:
        assert await later.read(_all) == []


async def test_what_is_closed_stays_closed(tmp_path: Path) -> None:
    async with Store(tmp_path) as records:
        await records.close()
        await records.close()
        with pytest.raises(Exception, match="records are closed"):
            await records.write(_put)


async def test_records_of_a_newer_gateway_are_found_before_anything_is_taken(tmp_path: Path) -> None:
    async with Store(tmp_path):
        with sqlite3.connect(tmp_path / FILE) as records:
            records.execute("PRAGMA user_version=9999")
        records.close()
        successor = Store(tmp_path)
        with pytest.raises(StoreFailed, match="newer gateway"):
            await successor.check()


async def test_a_damaged_file_is_found_before_anything_is_taken(tmp_path: Path) -> None:
    async with Store(tmp_path):
        pass
    (tmp_path / FILE).write_bytes(b"nothing of SQLite" * 1000)
    successor = Store(tmp_path)
    with pytest.raises(StoreFailed, match="damaged"):
        await successor.check()


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Have the log be copied into the file after each transaction; tells that it began, and waits."""
    began, go_on = threading.Event(), threading.Event()

    def copy(connection: sqlite3.Connection) -> None:
        began.set()
        assert go_on.wait(30)
        writer.copy_log(connection)

    monkeypatch.setattr(writer, "_COPIED", 1)
    monkeypatch.setattr(store, "copy_log", copy)
    yield began, go_on
    go_on.set()


async def test_nobody_waits_for_the_log_to_be_copied_into_the_file(
    tmp_path: Path, copying: tuple[threading.Event, threading.Event]
) -> None:
    """That waits for the disk twice, and a disk in use may take seconds."""
    began, go_on = copying
    async with Store(tmp_path) as records:
        await asyncio.wait_for(records.write(_put), 30)
        assert await asyncio.to_thread(began.wait, 30)
        assert (tmp_path / f"{FILE}-wal").stat().st_size > 0
        go_on.set()
        await records.write(lambda connection: None)
        with contextlib.closing(sqlite3.connect(f"file:{tmp_path / FILE}?immutable=1", uri=True)) as alone:
            assert _all(alone) == [("a token",)]  # without the log


async def test_a_successor_does_not_wait_for_it_either(
    tmp_path: Path, copying: tuple[threading.Event, threading.Event]
) -> None:
    began, _ = copying
    async with Store(tmp_path) as records:
        records.hurry()
        await records.write(_put)
        await asyncio.wait_for(records.close(), 30)
    assert not began.is_set()
