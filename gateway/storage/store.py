"""The gateway's own records: one SQLite file in the state dir, its schema and its threads.

What concerns instances is Incus's to keep. Here is what Incus does not: events, deployments, records of
calls, names, domains, revoked tokens, the audit log. Each room brings its own statements; this one knows no
table's meaning.

The file is in WAL mode with `synchronous=NORMAL`: whatever ends the gateway, a SIGKILL included, leaves
every write that was acknowledged, and a power cut leaves a whole file that may lack the last moments. A
write that must not be lost to that either asks for `durable`, which costs a flush of the disk.

A `note` is a write that is not waited for: it stands in memory that outlives the process until it is written
with others.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import marshal
import os
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from gateway.errors import Unavailable
from gateway.storage.ledger import NOTE_MAX, Ledger

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
# SQL and its parameters
Statement = tuple[str, tuple[Any, ...]]

FILE: Final = "gateway.db"

# works that share one transaction: bounds how long the first of them waits for its commit
_GROUP: Final = 512
# seconds that notes wait for others to share their commit
_NOTED: Final = 0.05

# Each is run once, in this order, and never changed after a release: a later change is a new one.
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
    "DROP INDEX receipts_at;",  # was for the start alone, and cost each call that writes
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
    # tenants' keys are apart, though all may have the same subject
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
)


class StoreFailed(Unavailable):
    """The records cannot be read or written; `facts["reason"]` is one of `_ADVICE`, or `newer`.

    What of it was not acknowledged was not done; the same write may succeed once the cause is gone.
    """


@dataclass(frozen=True, slots=True)
class _Asked:
    """A work for a thread; `room` is given back when it is done."""

    work: Work[Any]
    answer: asyncio.Future[Any]
    durable: bool = False
    room: asyncio.Semaphore | None = None


@dataclass(frozen=True, slots=True)
class _Note:
    """Statements, in memory that outlives the process, or else with one who waits until they are written."""

    statements: Sequence[Statement]
    written: Callable[[], None] | None = None
    waiting: asyncio.Future[None] | None = None


class Store:
    """The records of one gateway. Use as an async context manager; used from the event loop only.

    Works run in two threads, one that writes and one that reads, so that no disk ever holds up the loop
    and no reader a writer. A work must not keep its connection, nor end the transaction it runs in.
    """

    def __init__(self, folder: Path, waiting: int = 10_000) -> None:
        self._folder = folder
        self._room = asyncio.Semaphore(waiting)
        self._writer = _Thread("store writer", self._room, _write_group)
        self._reader = _Thread("store reader", self._room, _read_one)
        self._lock: int | None = None
        self._ledger: Ledger | None = None
        self._notes: deque[_Note] = deque()  # bounded by the ledger's room, of those that wait by `_room`
        self._settling: asyncio.Future[None] | None = None
        self._failed = False  # whether notes could not be written the last time
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Store:
        """Open the file, making or upgrading it. Raises `StoreFailed` that says what to do."""
        loop = asyncio.get_running_loop()
        try:
            writing, reading = await asyncio.to_thread(self._open)
        except BaseException:
            self._unlock()
            raise
        self._writer.start(loop, writing)
        self._reader.start(loop, reading)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do what was asked for by now, then close."""
        try:
            await self.settled()
        except StoreFailed as failed:
            log.error("%d notes are left to the next process: %s", len(self._notes), failed.message)
        await asyncio.gather(self._writer.end(), self._reader.end())
        if self._ledger is not None:
            self._ledger.close()
        self._unlock()

    async def write(self, work: Work[T], *, durable: bool = False) -> T:
        """Run `work` in a transaction and return what it returned once that is committed.

        Works that wait at the same time share a commit; one that raises is undone alone, and its error
        is raised here. With `durable` the commit reaches the disk before this returns. Waits while more
        works wait than the store was told to hold. A caller that is cancelled does not learn whether the
        work was done. Raises `StoreFailed`.
        """
        return await self._writer.ask(work, durable)

    async def note(self, *statements: Statement, written: Callable[[], None] | None = None) -> None:
        """Have statements executed soon, in the order of all notes, whatever ends this process.

        Waits only where they are too large, there is no room, or those before could not be written: then
        until they are written with those before them, and raises `StoreFailed` where that fails. `written` is
        called once they are. A caller that is cancelled does not learn whether they will be.
        """
        if self._noted(statements):
            self._notes.append(_Note(statements, written))
            if self._timer is None and self._settling is None:
                self._timer = asyncio.get_running_loop().call_later(_NOTED, self._settle)
            return
        await self._room.acquire()  # given back when they are written, whoever still waits for it
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._notes.append(_Note(statements, written, waiting))
        if self._settling is None:
            self._settle()
        await waiting

    def _noted(self, statements: tuple[Statement, ...]) -> bool:
        """Put statements into the memory that outlives this process; return whether they are there."""
        assert self._ledger is not None
        note = marshal.dumps(statements, 4)
        if self._failed or len(note) > NOTE_MAX:
            return False
        if self._ledger.add(note):
            return True
        if not self._notes or self._settling is not None:
            return False
        self._settle()  # turns to where there is room
        return self._ledger.add(note)

    async def settled(self) -> None:
        """Return once all that was noted is written. Raises `StoreFailed`; it is kept for another try."""
        while self._notes or self._settling is not None:
            await asyncio.shield(self._settling or self._settle())

    def _settle(self) -> asyncio.Future[None]:
        """Begin to write what is noted by now; return what is done when it is. None may be under way."""
        assert self._ledger is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop, ledger = asyncio.get_running_loop(), self._ledger
        notes, self._notes = self._notes, deque()
        turned = not self._failed  # else the other half holds what could not be written before
        if turned:
            ledger.turn()
        answer: asyncio.Future[None] = loop.create_future()
        self._settling = settling = loop.create_future()

        def done(answer: asyncio.Future[None]) -> None:
            self._settling = None
            error = answer.exception()
            self._failed = error is not None
            if error is None:
                ledger.clear()
                if not turned:  # nothing was added to this one since
                    ledger.turn()
                    ledger.clear()
                settling.set_result(None)
            else:
                self._notes.extendleft(note for note in reversed(notes) if note.waiting is None)
                settling.set_exception(error)
                settling.exception()  # seen, also where nobody waits
            for note in notes:
                if error is None and note.written is not None:
                    note.written()
                if note.waiting is None:
                    continue
                self._room.release()
                if note.waiting.done():  # who waited was cancelled
                    continue
                if error is None:
                    note.waiting.set_result(None)
                else:
                    note.waiting.set_exception(error)
            if any(note.waiting is not None for note in self._notes):
                self._settle()
            elif self._notes and error is None:
                self._timer = loop.call_later(_NOTED, self._settle)

        answer.add_done_callback(done)
        self._writer.put(_Asked(lambda connection: _write_notes(connection, notes), answer))
        return settling

    async def read(self, work: Work[T]) -> T:
        """Run `work` on what is committed by now and return what it returned. Raises `StoreFailed`."""
        return await self._reader.ask(work, False)

    def _open(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        path = self._folder / FILE
        with _translated():
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _locked(self._folder / f"{FILE}.lock")
                _make(path)
            except OSError as error:
                raise StoreFailed(
                    f"the state dir cannot be used: {error.strerror}; GATEWAY_STATE_DIR names another",
                    reason="io",
                ) from error
            with contextlib.ExitStack() as undo:
                writing = undo.enter_context(contextlib.closing(_connect(path)))
                # stays what it is for the life of the file
                writing.execute("PRAGMA journal_mode=WAL")
                writing.execute(f"PRAGMA journal_size_limit={16 << 20}")
                if writing.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    raise StoreFailed(_ADVICE["corrupt"], reason="corrupt")
                self._ledger = undo.enter_context(contextlib.closing(Ledger.opened(self._folder)))
                _migrate(writing, self._ledger)
                reading = undo.enter_context(contextlib.closing(_connect(path)))
                reading.execute("PRAGMA query_only=1")
                undo.pop_all()
        return writing, reading

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Thread:
    """A thread that owns one connection and runs works on it, `run` as many at once as it is given."""

    def __init__(
        self,
        name: str,
        room: asyncio.Semaphore,
        run: Callable[[sqlite3.Connection, list[_Asked]], list[Any]],
    ) -> None:
        self._name = name
        self._room = room
        self._run = run
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()  # bounded by `_room`
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop, connection: sqlite3.Connection) -> None:
        self._thread = threading.Thread(target=self._serve, args=(loop, connection), name=self._name)
        self._thread.start()

    async def ask(self, work: Work[T], durable: bool) -> T:
        await self._room.acquire()  # given back when the work is done, whoever still waits for it
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.put(_Asked(work, answer, durable, self._room))
        return await answer

    def put(self, asked: _Asked) -> None:
        if self._thread is not None:
            self._asked.put(asked)
        else:
            self._deliver([asked], [Unavailable("the gateway's records are closed")])

    async def end(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._asked.put(None)
            await asyncio.to_thread(thread.join)

    def _serve(self, loop: asyncio.AbstractEventLoop, connection: sqlite3.Connection) -> None:
        with contextlib.closing(connection):
            while (first := self._asked.get()) is not None:
                group, last = [first], False
                while len(group) < _GROUP and not last:
                    try:
                        asked = self._asked.get_nowait()
                    except queue.Empty:
                        break
                    if asked is None:
                        last = True
                    else:
                        group.append(asked)
                try:
                    results = self._run(connection, group)
                except Exception as error:
                    results = [_failure(error)] * len(group)
                loop.call_soon_threadsafe(self._deliver, group, results)
                if last:
                    return

    def _deliver(self, group: list[_Asked], results: list[Any]) -> None:
        for asked, result in zip(group, results, strict=True):
            if asked.room is not None:
                asked.room.release()
            if asked.answer.done():  # who asked was cancelled
                continue
            if isinstance(result, BaseException):
                asked.answer.set_exception(result)
            else:
                asked.answer.set_result(result)


def _write_group(connection: sqlite3.Connection, group: list[_Asked]) -> list[Any]:
    """Run the works in one transaction; return what each returned, or the exception it raised."""
    results: list[Any] = []
    # of the connection, not the transaction; cheap to set, but not within one
    durable = any(asked.durable for asked in group)
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        if len(group) == 1:  # the usual case: what it does is undone with the transaction
            results.append(group[0].work(connection))
        else:
            for asked in group:
                connection.execute("SAVEPOINT work")
                try:
                    results.append(asked.work(connection))
                except Exception as error:
                    if not connection.in_transaction:  # a full disk undoes all of it
                        raise
                    connection.execute("ROLLBACK TO work")
                    results.append(_failure(error))
                connection.execute("RELEASE work")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return results


def _read_one(connection: sqlite3.Connection, group: list[_Asked]) -> list[Any]:
    results: list[Any] = []
    for asked in group:
        try:
            results.append(asked.work(connection))
        except Exception as error:
            results.append(_failure(error))
    return results


def _execute(connection: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    for sql, parameters in statements:
        connection.execute(sql, parameters)


def _write_notes(connection: sqlite3.Connection, notes: Iterable[_Note]) -> None:
    for note in notes:
        try:
            _execute(connection, note.statements)
        except Exception as error:
            # one that no disk would take must not keep back all that come after it
            if isinstance(_failure(error), StoreFailed):
                raise
            log.exception("a note cannot be written")


# --- the file -----------------------------------------------------------------------------------------


def _locked(path: Path) -> int:
    """Return the descriptor that holds the state dir for this gateway. Raises `StoreFailed`, `OSError`.

    A file of its own: SQLite's locks on the database are lost whenever anything of us closes it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _hand_over(descriptor, path.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreFailed(
            "another gateway uses this state dir; stop it, or give this one its own by GATEWAY_STATE_DIR",
            reason="in_use",
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _make(path: Path) -> None:
    """Make the file, or see to it that only its owner may read it: SQLite's other files take its mode."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        _hand_over(descriptor, path.parent)
    finally:
        os.close(descriptor)


def _hand_over(descriptor: int, folder: Path) -> None:
    """Give a file that root may be making to the state dir's owner, who must be able to use it later."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _connect(path: Path) -> sqlite3.Connection:
    # autocommit: transactions are ours. Opened by one thread and used by another, never by two at once.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _migrate(connection: sqlite3.Connection, ledger: Ledger) -> None:
    """Bring the schema up to date, each step whole or not at all. Raises `StoreFailed`."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreFailed(
            "the records in the state dir are of a newer gateway: upgrade this one, or restore a backup",
            reason="newer",
        )
    if version:
        _replay(connection, ledger)  # of the life before, so by its schema
    for _ in (0, 1):  # both halves; what stands there belongs to no new file
        ledger.turn()
        ledger.clear()
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        try:
            connection.executescript(f"BEGIN; {script}; PRAGMA user_version={number}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _replay(connection: sqlite3.Connection, ledger: Ledger) -> None:
    """Write what an earlier process had noted when it was killed."""
    noted = [_Note(marshal.loads(note)) for note in ledger.notes()]  # noqa: S302  checked to be ours
    if noted:
        connection.execute("BEGIN IMMEDIATE")
        _write_notes(connection, noted)
        connection.execute("COMMIT")
        log.info("%d notes of an earlier process were written", len(noted))


_REASONS: Final = {
    sqlite3.SQLITE_FULL: "disk_full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_CANTOPEN: "read_only",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
    sqlite3.SQLITE_BUSY: "in_use",
    sqlite3.SQLITE_LOCKED: "in_use",
}
_ADVICE: Final = {
    "disk_full": "the disk of the state dir is full; free some space there",
    "read_only": "the records in the state dir cannot be written; see who owns it and how it is mounted",
    "corrupt": f"the records in the state dir are damaged; restore a backup of {FILE}, or move it away",
    "in_use": "another program holds the records in the state dir; end it",
    "io": "the records in the state dir cannot be read or written; see the kernel's log",
}


def _failure(error: Exception) -> Exception:
    """Return what a caller gets for `error`: what is no failing of the file stays what it is."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None or code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT):
        return error
    reason = _REASONS.get(code & 0xFF, "io")
    failed = StoreFailed(_ADVICE[reason], reason=reason)
    failed.__cause__ = error
    return failed


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _failure(error) from error
