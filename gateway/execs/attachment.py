"""One reader of a command, and its input."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Protocol

from gateway.execs.ended import Ended
from gateway.execs.streams import Cursor, Reading, Stream
from gateway.runtime import ExecSpec, StreamName


class Attached(Protocol):
    """The command that is read, as far as its readers see it."""

    id: str
    tenant: str
    spec: ExecSpec
    streams: dict[StreamName, Stream]
    stdin_window: int
    ended: asyncio.Future[Ended]

    async def write(self, data: bytes, by: Attachment) -> None: ...

    def detached(self, attachment: Attachment) -> None: ...

    def close_stdin(self) -> None: ...

    def look_for_end(self) -> None: ...


class Attachment:
    """One reader of a command's output: a cursor per stream. Close it; the command outlives it.

    `id` is what the next attachment names to take its place; `taken` counts the bytes of its input that were
    taken over, and those of the attachments before it, `consumed` those of them that wait no more.
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
        """Give input; see `Input.put`. Dropped where the input or we have ended."""
        await self.exec.write(data, self)

    def took(self, size: int) -> None:
        self.taken += size
        self.exec.look_for_end()

    def passed(self, size: int) -> None:
        if self._heir is not None:
            self._heir.passed(size)
        self.consumed += size
        self._progress.set()

    async def more_consumed(self) -> int | None:
        """Return `consumed` once it is worth telling: a quarter of the window further. None once closed."""
        while not self.closed:
            if self.consumed - self._told >= self.exec.stdin_window // 4:
                self._told = self.consumed
                return self.consumed
            self._progress.clear()
            await self._progress.wait()
        return None

    def restore(self, passed: int) -> None:
        """Go on behind the input that an earlier process was rid of."""
        self.taken = self.consumed = self._told = passed

    def hold(self, seconds: float) -> None:
        """Keep the place of a reader whose connection broke, until it is resumed or the time has passed."""
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
        self.cursors = {}  # its place, which is kept for its return, holds no output
        self.exec.detached(self)
