"""One Bash command, in the foreground or background: its output and status."""

from __future__ import annotations

import asyncio
import codecs
from typing import Any, Literal

from gateway.execs import Attachment, Cursor, Ended, Exec
from gateway.runtime import StreamName
from gateway.shells.printed import OutputFile, Unread
from gateway.tools import shell


class Shell:
    """One Bash command, in the foreground or background, and its output.

    `ended` resolves to its end once all output has been copied here; the exec's own copy is dropped then.
    """

    def __init__(self, shell_id: str, command: str, exec_: Exec, file: OutputFile, limit: int) -> None:
        self.id = shell_id
        self.command = command
        self.tenant = exec_.tenant
        self.exec_id = exec_.id
        self.file = file
        self.over = exec_.ended
        self.ended: Ended | None = None
        self.report = b""
        self.flooded = False
        self.unread: dict[StreamName, Unread] = {name: Unread(exec_.share) for name in exec_.streams}
        self.timer: asyncio.TimerHandle | None = None
        self._limit = limit
        self._size = 0
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._head = bytearray()
        self._tail = bytearray()
        self._showing = True
        self._writing = asyncio.Lock()
        self.task = asyncio.create_task(self._carry(exec_, exec_.attach()), name=f"shell {exec_.id}")

    async def _carry(self, exec_: Exec, attachment: Attachment) -> None:
        """Copy all output, then resolve `ended`."""
        try:
            async with asyncio.TaskGroup() as group:
                for name, cursor in attachment.cursors.items():
                    group.create_task(self._take(exec_, self.unread[name], cursor))
            self.ended = await asyncio.shield(exec_.ended)
            self.report = exec_.process.report
        finally:
            attachment.close()
            if self.timer is not None:
                self.timer.cancel()

    async def _take(self, exec_: Exec, unread: Unread, cursor: Cursor) -> None:
        while parts := await cursor.next():
            data = b"".join(parts)
            async with self._writing:
                beyond = self._keep(data)
                unread.add(data)
                if self.file.path is not None:
                    await self.file.append(data)
                elif beyond and not self.file.broken:  # from here on only part of it is in memory
                    await self.file.create(bytes(self._head) + beyond)
            cursor.taken(parts)
            if self._size > self._limit and not self.flooded:
                self.flooded = True
                exec_.end("cancelled", 0)

    def _keep(self, data: bytes) -> bytes:
        """Keep the beginning and the end of the output; return what is beyond the beginning."""
        self._size += len(data)
        self._characters += len(self._decoder.decode(data))
        if not self._showing:
            return b""
        beyond = data[shell.KEPT - len(self._head) :]
        self._head += data[: len(data) - len(beyond)]
        self._tail += data
        if len(self._tail) > 2 * shell.KEPT:  # not at each chunk, since it moves the rest
            del self._tail[: -shell.KEPT]
        return beyond

    async def save(self) -> None:
        """Write the output to a file from now on, unless it is or that has failed."""
        async with self._writing:
            if self.file.path is None and not self.file.broken:
                await self.file.create(bytes(self._head))

    def let_go(self) -> None:
        """Drop beginning and end: of a background command only the unread part is shown."""
        self._showing = False
        self._head.clear()
        self._tail.clear()

    def printed(self) -> shell.Printed:
        return shell.Printed(
            self._size,
            self._characters,
            self._head.decode("utf-8", "replace"),
            self._tail[-shell.KEPT :].decode("utf-8", "replace"),
            self._size == len(self._head),
            self.file.path,
        )

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
