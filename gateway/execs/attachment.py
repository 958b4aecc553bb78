"""One client attached to a command: it reads output and sends input."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Protocol

from gateway.execs.ended import Ended
from gateway.execs.pty_control import PtyControl
from gateway.execs.streams import Cursor, Reading, Streams
from gateway.runtime import ExecSpec, StreamName


class Places(Protocol):
    """Where a command's attachments are remembered."""

    def detached(self, attachment: Attachment) -> None: ...

    def took_input(self) -> None: ...


class Attached(Protocol):
    """The command as its attachments see it."""

    id: str
    tenant: str
    spec: ExecSpec
    streams: Streams
    stdin_window: int
    ended: asyncio.Future[Ended]
    terminal: PtyControl

    @property
    def readers(self) -> Places: ...

    def close_stdin(self) -> None: ...


class Attachment:
    """One reader of a command, with a cursor per stream. Close it when done; the command keeps running.

    A later attachment names `id` to resume this one. `taken` counts the bytes of input accepted from this
    attachment and those it resumed; `consumed` counts those written to the command or dropped.
    """

    def __init__(
        self,
        owner: Attached,
        offsets: Mapping[str, int],
        before: Attachment | None,
        reading: Reading,
        slot: int,
        known: str | None = None,
    ) -> None:
        self.exec = owner
        self.id = known or f"a-{secrets.token_hex(8)}"
        self.slot: int = slot if before is None else before.slot
        self.taken: int = 0 if before is None else before.taken
        self.consumed: int = 0 if before is None else before.consumed
        self.closed = False
        self._told = self.taken
        self._heir: Attachment | None = None
        self._progress = asyncio.Event()
        if before is not None:
            before._heir = self
        self.acking = reading.acks
        self._holding: asyncio.TimerHandle | None = None
        self.cursors: dict[StreamName, Cursor] = {}
        self.lost: dict[str, int] = {"stdout": 0, "stderr": 0}
        for name, stream in owner.streams.items():
            self.cursors[name], self.lost[name] = stream.attach(offsets.get(name, 0), reading)

    async def write(self, data: bytes) -> None:
        """Queue input; see `Input.put`. Dropped if stdin or this attachment is closed."""
        await self.exec.terminal.write(data, self)

    def took(self, size: int) -> None:
        self.taken += size
        self.exec.readers.took_input()

    def passed(self, size: int) -> None:
        if self._heir is not None:
            self._heir.passed(size)
        self.consumed += size
        self._progress.set()

    async def more_consumed(self) -> int | None:
        """Wait until `consumed` has grown by a quarter of the window and return it; None once closed."""
        while not self.closed:
            if self.consumed - self._told >= self.exec.stdin_window // 4:
                self._told = self.consumed
                return self.consumed
            self._progress.clear()
            await self._progress.wait()
        return None

    def restore(self, passed: int) -> None:
        """Continue after the input that an earlier process had settled, in bytes."""
        self.taken = self.consumed = self._told = passed

    def hold(self, seconds: float) -> None:
        """Keep the position of a disconnected reader for some seconds, unless it resumes earlier."""
        if not self.closed:
            self._holding = asyncio.get_running_loop().call_later(seconds, self.close)

    def close(self) -> None:
        """Detach. Idempotent."""
        self.closed = True
        self._progress.set()
        if self._holding is not None:
            self._holding.cancel()
        for cursor in self.cursors.values():
            cursor.detach()
        self.cursors = {}  # the position is remembered so that it can be resumed, but keeps no output
        self.exec.readers.detached(self)
