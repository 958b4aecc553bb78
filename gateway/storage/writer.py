"""Why the gateway's records cannot be read or written, and what the operator can do.

Runs work on the records in threads, each with its own connection.

A log in shared memory, where notes survive a kill of the process until they are on disk.

It is a mapped file in a memory file system. Its contents survive any end of the process without waiting for
a disk, but not the machine's. It has two halves that are used in turn: while one is being written to disk,
new notes go into the other. A half begins with its turn and the number of bytes in use, which is set last, so
that an incomplete note does not count.

Notes writes in memory that outlives the process, and writes them to the file in groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import marshal
import mmap
import os
import queue
import sqlite3
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from gateway.admission import Admission, Reservation
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

_REASONS: Final = {
    sqlite3.SQLITE_FULL: "disk_full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_CANTOPEN: "read_only",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
    sqlite3.SQLITE_BUSY: "in_use",
    sqlite3.SQLITE_LOCKED: "in_use",
}
ADVICE: Final = {
    "disk_full": "the disk of the state dir is full; free some space there",
    "read_only": "the records in the state dir cannot be written; check its owner and how it is mounted",
    "corrupt": "the records in the state dir are damaged; restore a backup of gateway.db, or move it away",
    "in_use": "another program has locked the records in the state dir; stop it",
    "io": "the records in the state dir cannot be read or written; see the kernel's log",
}


class StoreFailed(Unavailable):
    """The records cannot be read or written; `facts["reason"]` is a key of `ADVICE`, or `newer`.

    A write that was not acknowledged was not made. It may succeed once the cause is gone.
    """


def failure(error: Exception) -> Exception:
    """Return `StoreFailed` if `error` is the file's fault, else `error` itself."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None or code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT):
        return error
    reason = _REASONS.get(code & 0xFF, "io")
    failed = StoreFailed(ADVICE[reason], reason=reason)
    failed.__cause__ = error
    return failed


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise SQLite's errors in this block as translated by `failure`."""
    try:
        yield
    except sqlite3.Error as error:
        raise failure(error) from error


T = TypeVar("T")
# work for a thread: it must not keep its connection, nor end the transaction that it runs in
Work = Callable[[sqlite3.Connection], T]

# calls that share one transaction; bounds how long the first one waits for its commit
_GROUP: Final = 512
# transactions after which the write-ahead log is copied into the file
_COPIED: Final = 100


@dataclass(frozen=True, slots=True)
class Asked:
    """Work for a thread; `room` is released when it is done."""

    work: Work[Any]
    answer: asyncio.Future[Any]
    durable: bool = False
    room: Reservation[None] | None = None


class DatabaseThread:
    """A thread with its own connection. `run` executes a group of works on it and returns their results.

    `tidy` is called now and then, when the results of a group have been delivered.
    """

    def __init__(
        self,
        name: str,
        room: Admission[None],
        run: Callable[[sqlite3.Connection, list[Asked]], list[Any]],
        tidy: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        self._name = name
        self._room = room
        self._run = run
        self._tidy = tidy
        self._asked: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()  # bounded by `_room`
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop, connection: sqlite3.Connection) -> None:
        self._thread = threading.Thread(target=self._serve, args=(loop, connection), name=self._name)
        self._thread.start()

    async def ask(self, work: Work[T], durable: bool) -> T:
        room = await self._room.acquire(None)  # released when the work is done, even if the caller is gone
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.put(Asked(work, answer, durable, room))
        return await answer

    def put(self, asked: Asked) -> None:
        if self._thread is not None:
            self._asked.put(asked)
        else:
            self._deliver([asked], [Unavailable("the gateway's records are closed")])

    def hurry(self) -> None:
        """Tidy up no more: another process waits for the file."""
        self._tidy = None

    async def end(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._asked.put(None)
            await asyncio.to_thread(thread.join)

    def _serve(self, loop: asyncio.AbstractEventLoop, connection: sqlite3.Connection) -> None:
        groups = 0  # since the last `tidy`
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
                    results = [failure(error)] * len(group)
                loop.call_soon_threadsafe(self._deliver, group, results)
                if last:
                    return
                groups += 1
                if groups >= _COPIED and (tidy := self._tidy) is not None:
                    tidy(connection)
                    groups = 0

    def _deliver(self, group: list[Asked], results: list[Any]) -> None:
        for asked, result in zip(group, results, strict=True):
            if asked.room is not None:
                asked.room.release()
            if asked.answer.done():  # its caller was cancelled
                continue
            if isinstance(result, BaseException):
                asked.answer.set_exception(result)
            else:
                asked.answer.set_result(result)


class GroupWriter:
    """Runs works in one transaction; returns what each returned, or the exception it raised."""

    def __init__(self) -> None:
        self._durable: bool | None = None  # as the connection is set; None: not yet

    def __call__(self, connection: sqlite3.Connection, group: list[Asked]) -> list[Any]:
        durable = any(asked.durable for asked in group)
        if durable is not self._durable:
            # of the connection, not the transaction, and not to be set within one
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        connection.execute("BEGIN IMMEDIATE")
        try:
            results = _results(connection, group)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return results


def _results(connection: sqlite3.Connection, group: list[Asked]) -> list[Any]:
    if len(group) == 1:  # the usual case: the transaction alone undoes it
        return [group[0].work(connection)]
    results: list[Any] = []
    for asked in group:
        connection.execute("SAVEPOINT work")
        try:
            results.append(asked.work(connection))
        except Exception as error:
            if not connection.in_transaction:  # a full disk rolls back everything
                raise
            connection.execute("ROLLBACK TO work")
            results.append(failure(error))
        connection.execute("RELEASE work")
    return results


def copy_log(connection: sqlite3.Connection) -> None:
    """Copy the write-ahead log into the file, as far as no reader needs it. Waits for the disk."""
    with contextlib.suppress(sqlite3.Error):  # nobody's work has failed; the next one that does says so
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")


def read_each(connection: sqlite3.Connection, group: list[Asked]) -> list[Any]:
    """Run the works one by one; return what each returned, or the exception it raised."""
    results: list[Any] = []
    for asked in group:
        try:
            results.append(asked.work(connection))
        except Exception as error:
            results.append(failure(error))
    return results


MEMORY: Final = Path("/dev/shm")  # noqa: S108  what lies there is checked to be ours
HALF: Final = 64 << 10  # bytes
NOTE_MAX: Final = HALF // 4

_TURN, _USED = 0, 1  # a half's first words: its turn, and the number of bytes in use after them
_HEAD: Final = 16  # bytes of both
_LENGTH: Final = struct.Struct("<I")


class MemoryLog:
    """The notes of one folder. Create it with `opened`; for one process and one thread at a time."""

    def __init__(self, path: Path, mapped: mmap.mmap | None) -> None:
        self._path = path
        self._mapped = mapped
        self._now, self._turn, self._used = 0, 0, HALF  # no room without memory
        self._heads: list[memoryview] = []
        if mapped is not None:
            # whole words are stored at once; `struct` clears them first, and a kill could come in between
            self._heads = [memoryview(mapped)[at : at + _HEAD].cast("Q") for at in (0, HALF)]
            self._now = 0 if self._heads[0][_TURN] >= self._heads[1][_TURN] else 1
            self._turn, self._used = self._heads[self._now]

    @classmethod
    def opened(cls, folder: Path) -> MemoryLog:
        """Open a folder's log, with the notes of an earlier process. If that fails, the log has no room."""
        path = memory_log_path(folder)
        try:
            return cls(path, _mapped(path, folder.stat()))
        except OSError as error:
            log.warning("no log in memory, so each write waits for the disk: %s", error.strerror)
            return cls(path, None)

    def notes(self) -> Iterator[bytes]:
        """Yield the notes, oldest first."""
        if self._mapped is None:
            return
        for half in (1 - self._now, self._now):
            at = half * HALF + _HEAD
            end = at + min(self._heads[half][_USED], HALF - _HEAD)
            while at + _LENGTH.size <= end:
                (length,) = _LENGTH.unpack_from(self._mapped, at)
                at += _LENGTH.size + length
                if at > end:
                    return
                yield self._mapped[at - length : at]

    def add(self, note: bytes) -> bool:
        """Add a note; return whether there was room for it."""
        size = _LENGTH.size + len(note)
        if self._used + size > HALF - _HEAD:
            return False
        assert self._mapped is not None
        at = self._now * HALF + _HEAD + self._used
        _LENGTH.pack_into(self._mapped, at, len(note))
        self._mapped[at + _LENGTH.size : at + size] = note
        self._used += size
        self._heads[self._now][_USED] = self._used
        return True

    def turn(self) -> None:
        """Switch to the other half, forgetting its contents."""
        if self._mapped is not None:
            self._now, self._turn, self._used = 1 - self._now, self._turn + 1, 0
            self._heads[self._now][_USED] = 0
            self._heads[self._now][_TURN] = self._turn

    def clear(self) -> None:
        """Forget the contents from before the last turn."""
        if self._mapped is not None:
            self._heads[1 - self._now][_USED] = 0

    def close(self) -> None:
        """Close the file, and remove it if it is empty."""
        if self._mapped is None:
            return
        empty = next(self.notes(), None) is None
        for head in self._heads:
            head.release()
        self._mapped.close()
        self._mapped, self._used = None, HALF
        if empty:
            with contextlib.suppress(OSError):
                self._path.unlink()


def memory_log_path(folder: Path) -> Path:
    """Return the path of a folder's notes, which exists while there are any."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    return MEMORY / f"incus-gateway-{name}"


def _mapped(path: Path, folder: os.stat_result) -> mmap.mmap:
    """Map the file, creating it if needed. Raises `OSError`, also if the folder's owner does not own it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # with O_CREAT not even root may open another's file in a world-writable folder: fs.protected_regular
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        status = os.fstat(descriptor)
        ours = status.st_uid in (os.geteuid(), folder.st_uid) and status.st_mode & 0o7177 == 0
        if not (ours and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            raise PermissionError(1, f"{path} belongs to another user")
        if os.geteuid() == 0:  # root may be creating a file that the folder's owner must be able to use
            os.fchown(descriptor, folder.st_uid, folder.st_gid)
        # now, not when a page is first touched: with full memory that would kill this process
        os.posix_fallocate(descriptor, 0, 2 * HALF)
        return mmap.mmap(descriptor, 2 * HALF)
    finally:
        os.close(descriptor)


# SQL and its parameters
Statement = tuple[str, tuple[Any, ...]]

# seconds that notes wait for others to share their commit
_NOTED: Final = 0.05


@dataclass(frozen=True, slots=True)
class _Note:
    """Statements to execute. `waiting` is set if they are not in the log, so that the caller must wait."""

    statements: Sequence[Statement]
    written: Callable[[], None] | None = None
    waiting: asyncio.Future[None] | None = None
    room: Reservation[None] | None = None


class WriteBehind:
    """The notes that are not in the file yet, in order. Used from the event loop only.

    `write` hands work to the thread that writes. The log's size bounds the notes, and `room` those whose
    callers wait.
    """

    def __init__(self, memory_log: MemoryLog, write: Callable[[Asked], None], room: Admission[None]) -> None:
        self._memory_log = memory_log
        self._write = write
        self._room = room
        self._notes: deque[_Note] = deque()
        self._settling: asyncio.Future[None] | None = None
        self._failed = False  # whether the last attempt to write failed
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._notes)

    async def add(self, statements: tuple[Statement, ...], written: Callable[[], None] | None) -> None:
        """Note statements; if the memory log has no room, wait until they are written."""
        if self._noted(statements):
            self._notes.append(_Note(statements, written))
            if self._timer is None and self._settling is None:
                self._timer = asyncio.get_running_loop().call_later(_NOTED, self._settle)
            return
        room = await self._room.acquire(None)  # released when they are written, even if the caller is gone
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._notes.append(_Note(statements, written, waiting, room))
        if self._settling is None:
            self._settle()
        await waiting

    def _noted(self, statements: tuple[Statement, ...]) -> bool:
        """Add statements to the memory log; return whether they fitted."""
        note = marshal.dumps(statements, 4)
        if self._failed or len(note) > NOTE_MAX:
            return False
        if self._memory_log.add(note):
            return True
        if not self._notes or self._settling is not None:
            return False
        self._settle()  # frees the other half
        return self._memory_log.add(note)

    async def settled(self) -> None:
        """Wait until every note is written. Raises `StoreFailed`; the notes are kept for another try."""
        while self._notes or self._settling is not None:
            await asyncio.shield(self._settling or self._settle())

    def _settle(self) -> asyncio.Future[None]:
        """Start writing the notes; return a future for the end of that. No other write may be in progress."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop, memory_log = asyncio.get_running_loop(), self._memory_log
        notes, self._notes = self._notes, deque()
        turned = not self._failed  # otherwise the other half has notes that could not be written
        if turned:
            memory_log.turn()
        answer: asyncio.Future[None] = loop.create_future()
        self._settling = settling = loop.create_future()

        def done(answer: asyncio.Future[None]) -> None:
            self._settling = None
            error = answer.exception()
            self._failed = error is not None
            if error is None:
                memory_log.clear()
                if not turned:  # nothing has been added to this half since
                    memory_log.turn()
                    memory_log.clear()
                settling.set_result(None)
            else:
                self._notes.extendleft(note for note in reversed(notes) if note.waiting is None)
                settling.set_exception(error)
                settling.exception()  # retrieved, or asyncio would log it
            for note in notes:
                if error is None and note.written is not None:
                    note.written()
                if note.waiting is None or note.room is None:
                    continue
                note.room.release()
                if note.waiting.done():  # its caller was cancelled
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
        self._write(Asked(lambda connection: _write_notes(connection, notes), answer))
        return settling


def replay(connection: sqlite3.Connection, memory_log: MemoryLog) -> None:
    """Write the notes of an earlier process that was killed."""
    noted = [_Note(marshal.loads(note)) for note in memory_log.notes()]  # noqa: S302  checked to be ours
    if noted:
        connection.execute("BEGIN IMMEDIATE")
        _write_notes(connection, noted)
        connection.execute("COMMIT")
        log.info("%d notes of an earlier process were written", len(noted))


def _execute(connection: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    for sql, parameters in statements:
        connection.execute(sql, parameters)


def _write_notes(connection: sqlite3.Connection, notes: Iterable[_Note]) -> None:
    for note in notes:
        try:
            _execute(connection, note.statements)
        except Exception as error:
            # a faulty note must not hold up all later ones
            if isinstance(failure(error), StoreFailed):
                raise
            log.exception("cannot write a note")
