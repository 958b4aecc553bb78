"""Opens a state dir's SQLite file: locks, checks and upgrades it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Final

from gateway.storage import schema
from gateway.storage.errors import ADVICE, StoreFailed, translated
from gateway.storage.memory_log import MemoryLog
from gateway.storage.write_behind import replay

FILE: Final = "gateway.db"
_LOG_MAX: Final = 4096  # pages of 4 KiB


class Database:
    """The records' file in `folder`, and the memory log of notes that are not in it yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: int | None = None
        self._memory_log: MemoryLog | None = None
        self._checking: sqlite3.Connection | None = None

    def check(self) -> None:
        """Check the file while another process has it open, so that `open` need not. Raises `StoreFailed`.

        The connection stays open until then. So the other process does not close the last one, which would
        write the whole write-ahead log into the file while clients wait.
        """
        with translated():
            self._checking = _connect(self._folder / FILE)
            try:
                self._checking.execute("PRAGMA query_only=1")
                schema.version_of(self._checking)
                _check(self._checking)
            except BaseException:
                self._end_check()
                raise

    def open(self) -> tuple[sqlite3.Connection, sqlite3.Connection, MemoryLog]:
        """Lock and open the file; return the connections for writing and reading, and the memory log.

        Writes the notes left by an earlier process. Blocks on the disk. Raises `StoreFailed`; call `close` in
        any case.
        """
        path = self._folder / FILE
        with translated():
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _locked(self._folder / f"{FILE}.lock")
                if self._checking is None:  # closing another descriptor would release its locks
                    _make(path)
            except OSError as error:
                raise StoreFailed(
                    f"the state dir cannot be used: {error.strerror}; set another GATEWAY_STATE_DIR",
                    reason="io",
                ) from error
            with contextlib.ExitStack() as undo:
                writing = undo.enter_context(contextlib.closing(_connect(path)))
                # the file keeps this mode
                writing.execute("PRAGMA journal_mode=WAL")
                writing.execute(f"PRAGMA journal_size_limit={16 << 20}")
                # the thread that writes copies the log when nobody waits for it; this is its limit, in pages
                writing.execute(f"PRAGMA wal_autocheckpoint={_LOG_MAX}")
                if self._checking is None:
                    _check(writing)
                memory_log = undo.enter_context(contextlib.closing(MemoryLog.opened(self._folder)))
                if schema.version_of(writing):
                    replay(writing, memory_log)  # notes of an earlier process fit its schema
                for _ in (0, 1):  # both halves, since their contents belong to no new file
                    memory_log.turn()
                    memory_log.clear()
                schema.migrate(writing)
                reading = undo.enter_context(contextlib.closing(_connect(path)))
                reading.execute("PRAGMA query_only=1")
                undo.pop_all()
        self._end_check()
        self._memory_log = memory_log
        return writing, reading, memory_log

    def close(self) -> None:
        """Release the file for another process. The threads close their connections."""
        self._end_check()
        if self._memory_log is not None:
            self._memory_log.close()
            self._memory_log = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _end_check(self) -> None:
        if self._checking is not None:
            self._checking.close()
            self._checking = None


def _locked(path: Path) -> int:
    """Return a descriptor that locks the state dir for this gateway. Raises `StoreFailed` or `OSError`.

    The lock has a separate file: closing any descriptor of the database would drop its POSIX locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _hand_over(descriptor, path.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreFailed(
            "another gateway uses this state dir; stop it, or set another GATEWAY_STATE_DIR",
            reason="in_use",
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _make(path: Path) -> None:
    """Create the file if it does not exist, readable by its owner only. SQLite's other files get its mode."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        _hand_over(descriptor, path.parent)
    finally:
        os.close(descriptor)


def _hand_over(descriptor: int, folder: Path) -> None:
    """Give a file created by root to the state dir's owner, who must be able to use it later."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _check(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise StoreFailed(ADVICE["corrupt"], reason="corrupt")


def _connect(path: Path) -> sqlite3.Connection:
    # autocommit, since we manage transactions. Opened by one thread, used by another, never by two at once.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.execute("PRAGMA foreign_keys=ON")
    return connection
