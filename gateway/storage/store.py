"""The gateway's own records: events, deployments, calls, names, domains, revoked tokens, the audit log.

Incus stores everything about instances. Each package has its own statements; the store itself reads no table.

The file is in WAL mode with `synchronous=NORMAL`: however the gateway ends, even by SIGKILL, every
acknowledged write is in the file. A power cut leaves a consistent file that may lack the last moments. A
write that must survive that too asks for `durable`, which costs a flush of the disk.

A caller does not wait for a `note`: it stays in memory that outlives the process, until it is written
together with others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from gateway.admission import Admission
from gateway.storage.database import Database
from gateway.storage.errors import StoreFailed
from gateway.storage.threads import DatabaseThread, GroupWriter, T, Work, copy_log, read_each
from gateway.storage.write_behind import Statement, WriteBehind

__all__ = ["Statement", "Store", "StoreFailed", "Work"]

log = logging.getLogger(__name__)

WAITING: Final = 10_000  # pending reads and writes, so that a slow disk cannot fill the memory


class Store:
    """The records of one gateway. Use as an async context manager, and from the event loop only.

    Work runs in two threads, one for writing and one for reading: the loop never waits for a disk, nor a
    reader for a writer. Work must not keep its connection, nor end the transaction that it runs in.
    """

    _notes: WriteBehind  # exists while the file is open

    def __init__(self, folder: Path) -> None:
        # callers are the gateway itself; who finds no room waits, which is felt by what it works for
        self._room = Admission[None]("pending calls of the records", each=WAITING)
        self._database = Database(folder)
        self._writer = DatabaseThread("store writer", self._room, GroupWriter(), copy_log)
        self._reader = DatabaseThread("store reader", self._room, read_each)
        self._closed = False

    async def check(self) -> None:
        """Check the file while another process has it, so that opening it is quick.

        Raises `StoreFailed`, also if a newer gateway wrote it.
        """
        await asyncio.to_thread(self._database.check)

    async def __aenter__(self) -> Store:
        """Open the file, creating or upgrading it. Raises `StoreFailed` with what to do."""
        loop = asyncio.get_running_loop()
        try:
            writing, reading, memory_log = await asyncio.to_thread(self._database.open)
        except BaseException:
            self._database.close()
            raise
        self._notes = WriteBehind(memory_log, self._writer.put, self._room)
        self._writer.start(loop, writing)
        self._reader.start(loop, reading)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the pending work, then close."""
        await self.close()

    def hurry(self) -> None:
        """Leave to the next process what takes long and can wait, since that process waits for `close`."""
        self._writer.hurry()

    async def close(self) -> None:
        """Close as when leaving the context, so that another process can open the records. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.settled()
        except StoreFailed as failed:
            log.error("%d notes are left to the next process: %s", len(self._notes), failed.message)
        await self._reader.end()
        await self._writer.end()  # last, and alone: it removes the write-ahead log
        self._database.close()

    async def write(self, work: Work[T], *, durable: bool = False) -> T:
        """Run `work` in a transaction; return its result once that is committed.

        Concurrent calls share a commit. If one raises, only its work is undone, and its error is raised here.
        With `durable` the commit is on disk before this returns. Waits while the store has its maximum of
        pending calls. A cancelled caller does not learn whether the work was done. Raises `StoreFailed`.
        """
        return await self._writer.ask(work, durable)

    async def read(self, work: Work[T]) -> T:
        """Run `work` on what has been committed; return its result. Raises `StoreFailed`."""
        return await self._reader.ask(work, False)

    async def note(self, *statements: Statement, written: Callable[[], None] | None = None) -> None:
        """Execute statements soon, in the order of all notes, even if this process is killed.

        Waits only if they are too large, if there is no room, or if earlier notes could not be written: then
        until they and all earlier ones are written, and raises `StoreFailed` if that fails. `written` is
        called once they are. A cancelled caller does not learn whether they will be.
        """
        await self._notes.add(statements, written)

    async def settled(self) -> None:
        """Wait until every note is written. Raises `StoreFailed`; the notes are kept for another try."""
        await self._notes.settled()
