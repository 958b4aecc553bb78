"""Notes writes in memory that outlives the process, and writes them to the file in groups."""

from __future__ import annotations

import asyncio
import logging
import marshal
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.admission import Admission, Reservation
from gateway.storage.errors import StoreFailed, failure
from gateway.storage.memory_log import NOTE_MAX, MemoryLog
from gateway.storage.threads import Asked

log = logging.getLogger(__name__)

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
