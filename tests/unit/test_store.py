"""The store: what was acknowledged is there, whatever happens, and what cannot be is refused by name."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from gateway.errors import Unavailable
from gateway.storage import store as stores
from gateway.storage import writer
from gateway.storage.store import FILE, MIGRATIONS, Statement, Store, StoreFailed, Work
from gateway.storage.writer import NOTE_MAX
from tests.waits import settled, turn


def make(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, body BLOB)")


def add(number: int, body: bytes = b"") -> Work[int]:
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


def _synchronous(connection: sqlite3.Connection) -> int:
    """Return 2 if the commit of this transaction waits for the disk, else 1."""
    level: int = connection.execute("PRAGMA synchronous").fetchone()[0]
    return level


async def test_only_a_durable_write_waits_for_the_disk_and_whoever_shares_its_commit(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        durable = [False, True, True, False, True]
        assert [await store.write(_synchronous, durable=one) for one in durable] == [1, 2, 2, 1, 2]
        async with Held(store):
            waiting = [asyncio.ensure_future(store.write(_synchronous, durable=one)) for one in (False, True)]
            await turn()
        assert await asyncio.gather(*waiting) == [2, 2]
        assert await store.write(_synchronous) == 1


async def test_writes_that_wait_share_one_commit(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        statements: list[str] = []
        await store.write(lambda connection: connection.set_trace_callback(statements.append))
        async with Held(store):
            waiting = [asyncio.ensure_future(store.write(add(n))) for n in range(100)]
            await turn()
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
            await turn()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[0] == 1
        assert isinstance(results[1], ValueError)
        assert isinstance(results[2], sqlite3.IntegrityError)  # ours to handle, not the disk's
        assert results[3] == 2
        assert await store.read(numbers) == [1, 2]


async def test_more_than_may_wait_is_held_up_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.storage.store.WAITING", 3)
    async with Store(tmp_path) as store:
        await store.write(make)
        async with Held(store):
            waiting = [asyncio.ensure_future(store.write(add(n))) for n in range(10)]
            await settled()
            assert store._writer._asked.qsize() == 2
            waiting[0].cancel()  # its work was handed over: its room is not free before it is done
            await settled()
            assert store._writer._asked.qsize() == 2
        await asyncio.gather(*waiting[1:])
        assert await store.read(numbers) == list(range(10))


async def test_a_reader_does_not_wait_for_the_writer(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        await store.write(add(1))
        async with Held(store), asyncio.timeout(30):
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
    monkeypatch.setattr(stores, "MIGRATIONS", (*MIGRATIONS, f"{good}; INSERT INTO nowhere VALUES (1)"))
    with pytest.raises(sqlite3.OperationalError):
        async with Store(tmp_path):
            pass
    monkeypatch.setattr(stores, "MIGRATIONS", (*MIGRATIONS, good))
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


async def test_the_write_ahead_log_goes_with_the_last_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that are closed at once may each take the other for the last one."""
    store = await Store(tmp_path).__aenter__()
    await store.write(make)
    told = list[str]()
    for name, thread in (("reader", store._reader), ("writer", store._writer)):

        async def end(name: str = name, real: Callable[[], Awaitable[None]] = thread.end) -> None:
            told.append(f"{name} is closed")
            await real()
            told.append(f"{name} was closed")

        monkeypatch.setattr(thread, "end", end)
    await store.close()
    assert told == ["reader is closed", "reader was closed", "writer is closed", "writer was closed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, f"{FILE}.lock"]


async def test_after_the_end_nothing_is_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    async with store:
        await store.write(make)
        last = asyncio.ensure_future(store.write(add(1)))
        await turn()
    assert await last == 1  # asked for before
    with pytest.raises(Unavailable):
        await store.write(add(2))


def insert(number: int, body: bytes = b"") -> Statement:
    return "INSERT INTO t VALUES (?, ?)", (number, body)


async def test_a_note_waits_for_nothing_and_is_written_with_others_in_their_order(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        statements: list[str] = []
        await store.write(lambda connection: connection.set_trace_callback(statements.append))
        written: list[int] = []
        async with Held(store), asyncio.timeout(30):
            for n in range(50):
                done = partial(written.append, n)
                await store.note(insert(n), ("DELETE FROM t WHERE n < ?", (n,)), written=done)
            statements.clear()
            assert written == []
        await store.settled()
        assert written == list(range(50))
        assert statements.count("COMMIT") == 2  # that of the one that held them up is the other
        assert await store.read(numbers) == [49]


async def test_what_is_too_large_for_a_note_comes_after_those_before_it(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        await store.note(insert(1))
        await store.note(("UPDATE t SET body = ?", (b"x" * NOTE_MAX,)))
        assert await store.read(numbers) == [1]
        rows = await store.read(
            lambda connection: connection.execute("SELECT length(body) FROM t").fetchall()
        )
        assert rows == [(NOTE_MAX,)]


async def test_what_is_too_large_for_a_note_comes_before_those_after_it(tmp_path: Path) -> None:
    """Or what is forgotten with its tenant would be there again."""
    async with Store(tmp_path) as store:
        await store.write(make)
        async with Held(store):
            await store.note(insert(1))
            large = [asyncio.ensure_future(store.note(insert(n, b"x" * NOTE_MAX))) for n in (2, 3)]
            await turn()
            large.pop().cancel()  # it counts all the same, as does the room that it takes
            await store.note(("DELETE FROM t", ()))
            await store.note(insert(4))
        await asyncio.gather(*large)
        await store.settled()
        assert await store.read(numbers) == [4]


async def test_what_is_too_large_for_a_note_waits_for_none_that_comes_after_it(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        n = 10

        def more() -> None:  # each time that notes are written there are new ones
            nonlocal n
            n += 1
            another.append(asyncio.ensure_future(store.note(insert(n), written=more)))

        another = list[asyncio.Future[None]]()
        more()
        try:
            async with asyncio.timeout(30):
                for large in range(3):
                    await store.note(insert(large, b"x" * NOTE_MAX))
        finally:
            more = lambda: None  # noqa: E731
        await asyncio.gather(*another)
        assert set(await store.read(numbers)) >= {0, 1, 2}


async def test_more_notes_than_there_is_room_for(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        async with asyncio.timeout(30):
            for n in range(40):
                await store.note(insert(n, b"x" * (NOTE_MAX // 2)))
        await store.settled()
        assert await store.read(numbers) == list(range(40))


async def test_a_note_that_no_disk_would_take_keeps_back_no_other(tmp_path: Path) -> None:
    async with Store(tmp_path) as store:
        await store.write(make)
        for n in (1, 1, 2):
            await store.note(insert(n))
        await store.settled()
        assert await store.read(numbers) == [1, 2]


async def test_notes_for_which_there_is_no_disk_are_kept_and_others_refused(tmp_path: Path) -> None:
    async def pages(count: int) -> None:
        await store.write(lambda connection: connection.execute(f"PRAGMA max_page_count={count}").fetchall())

    async with Store(tmp_path) as store:
        await store.write(make)
        await pages(1)
        await store.note(insert(1, b"x" * 10_000))
        for _ in range(2):
            with pytest.raises(StoreFailed, match="full; free some space"):
                await store.settled()
        with pytest.raises(StoreFailed):
            await store.note(insert(2))
        async with Held(store):
            waiting = [asyncio.ensure_future(store.note(insert(n))) for n in (2, 2, 2)]
            await turn()
        refused = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in refused] == [StoreFailed] * 3  # those that came meanwhile too
        await pages(1 << 20)
        await store.note(insert(3))
        assert await store.read(numbers) == [1, 3]


async def test_whenever_the_end_comes_the_memory_has_what_is_not_written(tmp_path: Path) -> None:
    def left() -> list[bytes]:
        return list(writer.MemoryLog.opened(tmp_path).notes())

    async with Store(tmp_path) as store:
        await store.write(make)
        await store.write(lambda connection: connection.execute("PRAGMA max_page_count=1").fetchall())
        async with Held(store):
            await store.note(insert(1, b"x" * 10_000))
            first = asyncio.ensure_future(store.settled())
            await turn()
            await store.note(insert(2))
            assert len(left()) == 2
        with pytest.raises(StoreFailed):
            await first
        assert len(left()) == 2
        await store.write(lambda connection: connection.execute("PRAGMA max_page_count=1000").fetchall())
        async with Held(store):
            second = asyncio.ensure_future(store.settled())
            await turn()
            assert len(left()) == 2
        await second
        assert left() == []
        assert await store.read(numbers) == [1, 2]


def test_the_memory_log_tells_what_came_first(tmp_path: Path) -> None:
    for cleared in (False, True):
        for turns in range(4):
            book = writer.MemoryLog.opened(tmp_path)
            for n in range(turns):
                assert book.add(b"%d" % n)
                book.turn()
                if cleared:
                    book.clear()
            assert book.add(b"last")
            before = [] if cleared else [b"%d" % n for n in range(turns)][-1:]
            assert list(writer.MemoryLog.opened(tmp_path).notes()) == [*before, b"last"]
            for _ in (0, 1):
                book.turn()
                book.clear()
            book.close()


_FILLER = """
import sys, time
from pathlib import Path
from gateway.storage.writer import MemoryLog
book, end = MemoryLog.opened(Path(sys.argv[1])), time.monotonic() + 1.5
print(flush=True)
while time.monotonic() < end:
    while book.add(b"note"):
        pass
    book.turn()
    book.clear()
"""


def test_at_no_moment_does_the_memory_log_forget_what_it_has(tmp_path: Path) -> None:
    """Another process sees what a kill would leave."""
    with subprocess.Popen(
        [sys.executable, "-c", _FILLER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        path = writer.memory_log_path(tmp_path)
        try:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                words = memoryview(mapped).cast("Q")
                other = writer.HALF // 8
                while process.poll() is None:
                    for _ in range(1000):
                        turns = words[0], words[other]
                        used, later = words[1], words[1]
                        if turns == (words[0], words[other]) and turns[0] > turns[1]:
                            assert later >= used
                words.release()
        finally:
            path.unlink()


def test_root_opens_what_the_gateways_user_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fs.protected_regular` refuses to open another's file with O_CREAT in a folder of everybody."""
    opened = os.open

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and path.exists():
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", open_)
    books = [writer.MemoryLog.opened(tmp_path) for _ in range(2)]
    assert [book.add(b"noted") for book in books] == [True, True]
    for book in books:
        for _ in (0, 1):
            book.turn()
            book.clear()
        book.close()


async def test_without_memory_of_ours_a_note_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").touch(0o666)
    memory = tmp_path / "memory"
    monkeypatch.setattr(writer, "MEMORY", memory)
    for case in ("missing", "linked", "open to others"):
        async with Store(tmp_path / case) as store:
            if case == "missing":
                await store.write(make)
                await store.note(insert(1))
                assert await store.read(numbers) == [1]
                memory.mkdir()
        async with Store(tmp_path / case):
            (place,) = memory.iterdir()
        assert list(memory.iterdir()) == []  # nothing was left to be noted
        if case == "linked":
            place.symlink_to(tmp_path / "theirs")
        else:
            place.touch(0o666)
            place.chmod(0o666)
        async with Store(tmp_path / case) as store:
            if case != "missing":
                await store.write(make)
            await store.note(insert(2))
            assert 2 in await store.read(numbers)
        assert (tmp_path / "theirs").read_bytes() == place.read_bytes() == b""
        place.unlink()


_WRITER = """
import asyncio, sys
from pathlib import Path
from gateway.storage.store import Store
from tests.unit.test_store import add, insert, make, numbers

async def main():
    async with Store(Path(sys.argv[1])) as store:
        try:
            await store.write(make)
        except Exception:
            pass
        n = max(await store.read(numbers), default=0)
        while True:
            n += 1
            await (store.note(insert(n)) if sys.argv[2:] else store.write(add(n)))
            print(n, flush=True)

asyncio.run(main())
"""


async def test_what_was_noted_survives_a_kill(tmp_path: Path) -> None:
    noted = 0
    for lines in (1, 7, 300):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _WRITER, str(tmp_path), "note"),
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(lines):
            noted = int(await process.stdout.readline())
        process.kill()
        noted = max([noted, *map(int, (await process.stdout.read()).split())])
        await process.wait()
        async with Store(tmp_path) as store:
            kept = await store.read(numbers)
        assert kept[:noted] == list(range(1, noted + 1))
        assert len(kept) - noted in (0, 1)


async def test_notes_belong_to_the_file_that_they_were_made_for(tmp_path: Path) -> None:
    """Whoever moves the records away begins anew."""
    async with Store(tmp_path) as store:
        await store.write(make)
        await store.note(("INSERT INTO revoked (token, at, who) VALUES ('old', 0, '')", ()))
        left = writer.MemoryLog.opened(tmp_path)
        assert len(list(left.notes())) == 1
        for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}.lock"):
            (tmp_path / name).unlink()
        async with Store(tmp_path) as anew:
            assert (
                await anew.read(lambda connection: connection.execute("SELECT * FROM revoked").fetchall())
                == []
            )


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
    writer.MemoryLog.opened(tmp_path).close()
