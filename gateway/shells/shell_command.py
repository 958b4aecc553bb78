"""One Bash command, in the foreground or background: its output and status."""

from __future__ import annotations

import asyncio
import codecs
import weakref
from collections.abc import Mapping
from typing import Any, Literal

from gateway.admission import Reservation
from gateway.execs import Attachment, Cursor, Ended, Exec
from gateway.runtime import StreamName
from gateway.shells.printed import OutputFile, Unread
from gateway.shells.record import Record, mark
from gateway.tools import shell
from gateway.tools.session import ToolSession


class Shell:
    """One Bash command, in the foreground or background, and its output.

    `ended` resolves to its end once all output has been copied here; the exec's own copy is dropped then.
    If the command is held, `record` tells the gateway's next process how much has been copied.
    """

    def __init__(self, record: Record, command: str, exec_: Exec, file: OutputFile, limit: int) -> None:
        self.id = record.shell
        self.record = record
        self.command = command
        self.tenant = exec_.tenant
        self.exec_id = exec_.id
        self.file = file
        self.over = exec_.ended
        self.ended: Ended | None = None
        self.report = b""
        self.flooded = False
        self.left = False  # to the next process
        self.timer: asyncio.TimerHandle | None = None
        self._limit = limit
        self._purpose = exec_.purpose
        self._head = bytearray(self._purpose.beginning(record.head))
        self._lease = exec_.share.reserve()  # for the beginning, if it is kept for the next process too
        weakref.finalize(self, self._lease.release)
        self._tail = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((bytes.fromhex(record.pending), 0))
        self._again = record.last  # a BashOutput call that an earlier process may not have answered
        self._known = dict(record.offsets)  # how much an earlier process had copied
        self._behind = {name for name, offset in self._known.items() if offset and name in exec_.streams}
        self._caught_up = asyncio.Event()
        before = record.taken if record.last is None else record.last[1]
        self.unread = {name: Unread(exec_.share, before.get(name, 0)) for name in exec_.streams}
        self._writing = asyncio.Lock()
        reader, exec_.reader = exec_.reader or exec_.attach(), None
        self.task = asyncio.create_task(self._carry(exec_, reader), name=f"shell {exec_.id}")

    def occupy(self, slot: Reservation[ToolSession]) -> None:
        """Keep a place among its session's commands until it has ended."""
        self.task.add_done_callback(lambda _: slot.release())

    async def _carry(self, exec_: Exec, attachment: Attachment) -> None:
        """Copy all output, then resolve `ended`."""
        try:
            self._look_for_flood(exec_)
            async with asyncio.TaskGroup() as group:
                for name, cursor in attachment.cursors.items():
                    group.create_task(self._take(exec_, name, cursor))
            self.ended = await asyncio.shield(exec_.ended)
            self.report = exec_.process.report
        finally:
            attachment.close()
            if self.timer is not None:
                self.timer.cancel()

    async def _take(self, exec_: Exec, name: StreamName, cursor: Cursor) -> None:
        while parts := await cursor.next():
            data = b"".join(parts)
            async with self._writing:
                self.unread[name].add(data, cursor.offset)
                known = min(len(data), max(0, self._known.get(name, 0) - cursor.offset))
                if known and self.record.shown:
                    self._end_with(data[:known])
                if cursor.offset + len(data) >= self._known.get(name, 0):
                    self._behind.discard(name)
                    self._caught_up.set()
                if data := data[known:]:
                    await self._keep(data)
                    self.record.offsets[name] = cursor.offset + known + len(data)
                    self.note()
            cursor.taken(parts)
            self._look_for_flood(exec_)

    async def _keep(self, data: bytes) -> None:
        """Keep the output's beginning and end; the file gets what does not fit into the beginning."""
        record, head = self.record, len(self._head)
        record.size += len(data)
        record.characters += len(self._decoder.decode(data))
        record.pending = self._decoder.getstate()[0].hex()
        beyond = b""
        if record.shown:
            beyond = data[shell.KEPT - head :]
            self._head += data[: len(data) - len(beyond)]
            if self._purpose.held:
                self._purpose.begin_with(head, bytes(self._head[head:]))
                self._lease.hold(len(self._head) - head)
            record.head = len(self._head)
            self._end_with(data)
        if self.file.path is not None:
            await self.file.append(data)
        elif beyond and not self.file.broken:  # from here on, memory has only part of it
            await self.file.create(bytes(self._head) + beyond)

    def _end_with(self, data: bytes) -> None:
        self._tail += data
        if len(self._tail) > 2 * shell.KEPT:  # not for each chunk, since it moves the rest
            del self._tail[: -shell.KEPT]

    def _look_for_flood(self, exec_: Exec) -> None:
        if self.record.size > self._limit and not self.flooded:
            self.flooded = True
            exec_.end("cancelled", 0)

    def note(self) -> None:
        """Record the progress of everything for the next process."""
        self.record.file = -1 if self.file.broken else self.file.size
        if self._purpose.held:
            self._purpose.note(self.record.facts())

    async def save(self) -> None:
        """Write the output to a file from now on, unless that has begun or failed before."""
        async with self._writing:
            if self.file.path is None and not self.file.broken:
                await self.file.create(bytes(self._head))
                self.note()

    def let_go(self) -> None:
        """Drop beginning and end; of a background command only the unread part is shown."""
        self.record.shown, self.record.head = False, 0
        self._head.clear()
        self._tail.clear()
        self.note()

    def printed(self) -> shell.Printed:
        record = self.record
        return shell.Printed(
            record.size,
            record.characters,
            self._head.decode("utf-8", "replace"),
            self._tail[-shell.KEPT :].decode("utf-8", "replace"),
            record.size == len(self._head),
            self.file.path,
        )

    @property
    def held(self) -> bool:
        """Whether the next process can continue it."""
        return self._purpose.held

    async def caught_up(self) -> None:
        """Wait until everything that an earlier process had copied has been copied again."""
        while self._behind and not self.task.done():
            self._caught_up.clear()
            looking = asyncio.ensure_future(self._caught_up.wait())
            await asyncio.wait([looking, self.task], return_when=asyncio.FIRST_COMPLETED)
            looking.cancel()

    # --- what BashOutput returns ------------------------------------------------------------------------

    def asked(self, call_id: str | None) -> dict[StreamName, int]:
        """Return the offsets from which a BashOutput call returns the outputs.

        A call that an earlier process may not have answered returns the same output again, and what followed.
        """
        again, self._again = self._again, None
        if again is not None and again[0] != mark(call_id):
            for name, offset in self.record.taken.items():
                self.unread[name].taken(offset)
        return {name: unread.returned for name, unread in self.unread.items()}

    def answered(self, call_id: str | None, began: dict[StreamName, int], upto: Mapping[str, int]) -> None:
        """Record that a BashOutput call has returned the outputs up to these offsets."""
        for name, unread in self.unread.items():
            unread.taken(upto[name])
        self.record.taken = {name: unread.returned for name, unread in self.unread.items()}
        told = mark(call_id)
        self.record.last = None if told is None else (told, began)
        self.note()

    @property
    def status(self) -> Literal["running", "completed", "failed", "killed"]:
        ended = self.ended
        if ended is None:
            return "failed" if self.task.done() else "running"
        if ended.reason in ("cancelled", "timeout"):
            return "killed"
        return "completed" if ended.code == 0 else "failed"

    def facts(self) -> dict[str, Any]:
        """Return the fields that every command has in `structuredContent`."""
        ended = self.ended
        facts: dict[str, Any] = {"exec": self.exec_id, "status": self.status}
        if ended is not None:
            facts |= {"exitCode": ended.code, "signal": ended.signal, "reason": ended.reason}
            facts |= {"durationMs": ended.duration_ms, "left": ended.left}
        return facts
