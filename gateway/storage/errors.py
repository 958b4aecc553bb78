"""Why the gateway's records cannot be read or written, and what the operator can do."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Final

from gateway.errors import Unavailable

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
