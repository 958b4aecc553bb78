"""Runs work on the records in threads, each with its own connection."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from gateway.admission import Admission, Reservation
from gateway.errors import Unavailable
from gateway.storage.errors import failure

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
