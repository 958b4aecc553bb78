"""Who reads a command: the attached, those that may resume, and how long it runs without any."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from gateway.errors import NotFound
from gateway.execs.ended import ExecEnd
from gateway.execs.input import SLOTS, PendingEof, PtyControl, StdinQueue
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
    ended: asyncio.Future[ExecEnd]
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
        """Queue input; see `StdinQueue.put`. Dropped if stdin or this attachment is closed."""
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

    def hold(self) -> None:
        """Keep the position of a disconnected reader for `HOLD` seconds, unless it resumes earlier."""
        if not self.closed:
            self._holding = asyncio.get_running_loop().call_later(HOLD, self.close)

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


HOLD: Final = 10.0  # seconds that a command waits for an acknowledging reader whose connection broke
_READERS: Final = 64  # readers of one command whose position is kept so that they can resume


class Readers:
    """The attachments of one command. Its length is the number of those attached now.

    `unread` is called when nobody has read the command for `linger` seconds, never if that is negative.
    `changed` is called whenever the next gateway process has to know.
    """

    def __init__(
        self,
        owner: Attached,
        input_: StdinQueue,
        linger: float,
        unread: Callable[[], object],
        changed: Callable[[], None],
    ) -> None:
        self._owner = owner
        self._input = input_
        self._linger = linger
        self._unread = unread
        self._changed = changed
        self._attached: set[Attachment] = set()
        self._places: OrderedDict[str, Attachment] = OrderedDict()  # attached or not, oldest first
        self._owed = PendingEof()
        self._timer: asyncio.TimerHandle | None = None
        self._since: float | None = None  # since when nobody reads, in epoch seconds
        self._closed = False

    def __len__(self) -> int:
        return len(self._attached)

    def attach(self, offsets: Mapping[str, int], resume: str | None, reading: Reading) -> Attachment:
        """Attach a reader; see `Exec.attach`."""
        before = None if resume is None else self._places.pop(resume, None)
        if resume is not None and before is None:
            exec_id = self._owner.id
            raise NotFound(
                f"exec {exec_id} has no attachment {resume}; attach again without it", exec=exec_id
            )
        # before the old one is closed, so that no output is lost in between
        attachment = Attachment(self._owner, offsets, before, reading, self._slot())
        if before is None:
            self._input.accounts.open(attachment.slot)
        self._attached.add(attachment)
        self._places[attachment.id] = attachment
        if before is not None:
            before.close()
        if len(self._places) > _READERS:
            self._places.popitem(last=False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._since = None
        self._changed()
        return attachment

    def _slot(self) -> int:
        """Return an account slot that no remembered reader uses."""
        taken = {place.slot for place in list(self._places.values())[-(SLOTS - 1) :]}
        return next(slot for slot in range(SLOTS) if slot not in taken)

    def detached(self, attachment: Attachment) -> None:
        """Remember a closed attachment's position, and start the linger time if it was the last."""
        if attachment not in self._attached:
            return
        self._attached.discard(attachment)
        if not (self._attached or self._closed):
            self._wait(time.time())
        self._changed()
        self.took_input()

    def _wait(self, since: float) -> None:
        """Let the command run without a reader for the rest of the linger time."""
        self._since = since
        if self._linger >= 0:
            left = max(0.0, since + self._linger - time.time())
            self._timer = asyncio.get_running_loop().call_later(left, self._unread)

    def close(self) -> None:
        """Stop waiting for readers: the command has ended, or belongs to the next process."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    # --- the end of the input ---------------------------------------------------------------------------

    def end_input(self) -> None:
        """Close stdin once the queued input is written. Idempotent."""
        self._owed.close()
        self._input.end()
        self._changed()

    def took_input(self) -> None:
        """Close stdin as an earlier process was asked to, once the missing input has been sent again."""
        if self._owed.due(self._places.values()):
            self._input.end()

    # --- across a restart of the gateway ----------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return what the next process needs for `take_over`."""
        places = self._places.values()
        return {
            "lingers": self._since,
            "owed": self._owed.facts(places),
            "places": [[place.id, place.slot, place.acking and not place.closed] for place in places],
        }

    def take_over(self, facts: Mapping[str, Any]) -> None:
        """Continue from an earlier process's facts. Its readers may resume for `HOLD` seconds."""
        passed = self._input.accounts.passed
        for id_, slot, acking in facts["places"]:
            place = Attachment(self._owner, {}, None, Reading(viewer=True, acks=acking), slot, id_)
            place.restore(passed[slot])
            self._places[id_] = place
            if acking:
                self._attached.add(place)
                place.hold()
            else:
                place.close()
        if not self._attached:
            self._wait(facts["lingers"] or time.time())
        if facts["owed"] is not None:
            self._owed.take_over(facts["owed"], passed)
            self.took_input()
