"""The store: what was acknowledged is there, whatever happens, and what cannot be is refused by name."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gateway import store as store_module
from gateway.errors import Unavailable
from gateway.store import FILE, MIGRATIONS, Store, StoreFailed


def make(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, body BLOB)")


def add(number: int, body: bytes = b"") -> store_module.Work[int]:
    def work(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO t VALUES (?, ?)", (number, body))
        return number

    return work


def numbers(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT n FROM t ORDER BY n")]


class Held:
    """Holds up the writer's thread until it is let go."""

    def __init__(self, store: Store) -> None:
        self._go, self._began = threading.Event(), threading.Event()
        self._task = asyncio.ensure_future(store.write(self._wait))

    def _wait(self, connection: sqlite3.Connection) -> None:
        self._began.set()
        assert self._go.wait(10)

    async def __aenter__(self) -> Held:
        assert await asyncio.to_thread(self._began.wait, 10)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._go.set()
        await self._task


async def test_what_was_written_is_read_and_kept(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        assert await store.write(add(1)) == 1
        assert await store.read(numbers) == [1]
    async with Store(tmp_path) as store:
        assert await store.read(numbers) == [1]


async def test_writes_that_wait_share_one_commit(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        statements: list[str] = []
        await store.write(lambda connection: connection.set_trace_callback(statements.append))
        async with Held(store):
            waiting = [asyncio.ensure_future(store.write(add(n))) for n in range(100)]
            await asyncio.sleep(0)
            statements.clear()
        assert await asyncio.gather(*waiting) == list(range(100))
        # the one that held them up, and theirs
        assert statements.count("COMMIT") == 2


async def test_a_work_that_raises_is_undone_alone(tmp_path: Path) -> None:
    def bad(connection: sqlite3.Connection) -> None:
        add(50)(connection)
        raise ValueError("mine")

    async with Store(tmp_path) as store:
        await store.write(make)
        async with Held(store):
            waiting = [asyncio.ensure_future(store.write(work)) for work in (add(1), bad, add(1), add(2))]
            await asyncio.sleep(0)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[0] == 1
        assert isinstance(results[1], ValueError)
        assert isinstance(results[2], sqlite3.IntegrityError)  # ours to handle, not the disk's
        assert results[3] == 2
        assert await store.read(numbers) == [1, 2]


async def test_more_than_may_wait_is_held_up_outside(tmp_path: Path) -> None:
    async with Store(tmp_path, waiting=3) as store:
        await store.write(make)
        async with Held(store):
            waiting = [asyncio.ensure_future(store.write(add(n))) for n in range(10)]
            for _ in range(5):
                await asyncio.sleep(0)
            assert store._writer._asked.qsize() == 2
            waiting[0].cancel()  # its work was handed over: its room is not free before it is done
            for _ in range(5):
                await asyncio.sleep(0)
            assert store._writer._asked.qsize() == 2
        await asyncio.gather(*waiting[1:])
        assert await store.read(numbers) == list(range(10))


async def test_a_reader_does_not_wait_for_the_writer(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        await store.write(add(1))
        async with Held(store), asyncio.timeout(5):
            assert await store.read(numbers) == [1]


async def test_a_reader_cannot_write(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        with pytest.raises(StoreFailed):
            await store.read(add(1))


async def test_only_the_owner_can_open_the_files(tmp_path: Path) -> None:
    (tmp_path / FILE).touch(mode=0o644)
    old = os.umask(0)
    try:
        async with Store(tmp_path / "new") as made, Store(tmp_path) as found:
            for store, folder in ((made, tmp_path / "new"), (found, tmp_path)):
                await store.write(make)
                files = list(folder.glob(f"{FILE}*"))
                assert {file.name for file in files} == {FILE + end for end in ("", "-wal", "-shm", ".lock")}
                assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    finally:
        os.umask(old)


async def test_a_second_gateway_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    async with Store(tmp_path):
        with pytest.raises(StoreFailed, match="another gateway") as refused:
            async with Store(tmp_path):
                pass
        assert refused.value.facts == {"reason": "in_use"}
    async with Store(tmp_path):
        pass


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    junk = os.urandom(8192)
    (tmp_path / FILE).write_bytes(junk)
    with pytest.raises(StoreFailed, match="damaged") as refused:
        async with Store(tmp_path):
            pass
    assert refused.value.facts == {"reason": "corrupt"}
    assert (tmp_path / FILE).read_bytes() == junk
    (tmp_path / FILE).unlink()
    async with Store(tmp_path):  # the refused one holds nothing any more
        pass


async def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        for n in range(50):
            await store.write(add(n, b"x" * 1000))
    with (tmp_path / FILE).open("r+b") as file:
        file.seek(4 * 4096)
        file.write(b"\xff" * 8 * 4096)
    with pytest.raises(StoreFailed, match="damaged"):
        async with Store(tmp_path):
            pass


async def test_a_newer_gateways_file_is_refused(tmp_path: Path) -> None:
    async with Store(tmp_path):
        pass
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    other.close()
    with pytest.raises(StoreFailed, match="newer gateway"):
        async with Store(tmp_path):
            pass


async def test_a_state_dir_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailed, match="GATEWAY_STATE_DIR") as refused:
        async with Store(tmp_path / "file" / "state"):
            pass
    assert str(tmp_path) not in refused.value.message


async def test_an_upgrade_keeps_what_is_there_and_a_failing_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        await store.write(add(7))
    good = "ALTER TABLE t ADD COLUMN more TEXT DEFAULT 'x'"
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, f"{good}; INSERT INTO nowhere VALUES (1)"))
    with pytest.raises(sqlite3.OperationalError):
        async with Store(tmp_path):
            pass
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, good))
    async with Store(tmp_path) as store:
        rows = await store.read(lambda connection: connection.execute("SELECT n, more FROM t").fetchall())
        assert rows == [(7, "x")]


async def test_a_full_disk_is_told_and_passes(tmp_path: Path) -> None:
    """SQLite's own page limit is the full disk: the same code, whatever the reason that it has no page."""

    async def pages(count: int) -> None:
        await store.write(lambda connection: connection.execute(f"PRAGMA max_page_count={count}").fetchall())

    async with Store(tmp_path) as store:
        await store.write(make)
        await store.write(add(1))
        await pages(1)  # as many as there are
        with pytest.raises(StoreFailed, match="full; free some space") as refused:
            await store.write(add(2, b"x" * 100_000))
        assert refused.value.facts == {"reason": "disk_full"}
        assert await store.read(numbers) == [1]
        await pages(1 << 20)
        await store.write(add(2, b"x" * 100_000))
        assert await store.read(numbers) == [1, 2]


async def test_after_the_end_nothing_is_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    async with store:
        await store.write(make)
        last = asyncio.ensure_future(store.write(add(1)))
        await asyncio.sleep(0)
    assert await last == 1  # asked for before
    with pytest.raises(Unavailable):
        await store.write(add(2))


_WRITER = """
import asyncio, sys
from pathlib import Path
from gateway.store import Store
from tests.unit.test_store import add, make, numbers

async def main():
    async with Store(Path(sys.argv[1])) as store:
        try:
            await store.write(make)
        except Exception:
            pass
        n = max(await store.read(numbers), default=0)
        while True:
            n += 1
            await store.write(add(n))
            print(n, flush=True)

asyncio.run(main())
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    acknowledged = 0
    for lines in (1, 7, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(lines):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        with sqlite3.connect(tmp_path / FILE) as found:
            kept = numbers(found)
        found.close()
        assert kept[:acknowledged] == list(range(1, acknowledged + 1))
        assert len(kept) - acknowledged in (0, 1)  # written, and killed before it could say so
