"""Knows one running command: its output streams, who reads them, its input, its end.

Output flows from the process into a `Stream`, one reader task each; readers are `Cursor`s on it. While
anyone is attached the reader task stops when the slowest cursor lags by more than the window, so that
the process itself is held back and nothing is lost. A viewer that stands still while another reads on is
left behind after a moment, and told what it has missed. With nobody attached the tail drops its oldest bytes
and the next attachment is told how many.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.execs.input import Input, Spools
from gateway.execs.tail import READ, Tail
from gateway.limits.budget import Lease, Share
from gateway.rootfs.process_tree import Member
from gateway.runtime import ExecSpec, Exit, Killed, Process, Pty, StreamName

log = logging.getLogger(__name__)

Reason = Literal["exited", "cancelled", "timeout", "lost"]

_CTRL_C: Final = b"\x03"
_TAKES: Final = 0.05  # seconds within which a terminal takes a byte, if it takes any
_SEES: Final = 0.15  # seconds within which a program sees that its terminal has another size
_SEQUENCE: Final = 3  # bytes at most of a UTF-8 sequence that is not complete
_SOONER: Final = 0.1  # seconds by which a second cancel must be less patient to make a difference
_TOLD: Final = 100  # processes of a tree that a runtime tells of, at most
_LISTED: Final = 4096  # characters of a command where it is listed beside all others
_READERS: Final = 64  # of one command, whose place is kept for their return
_LITTLE: Final = 64 << 10  # bytes kept of a stream where its tenant's share is full


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `code` and `signal` are None where no wait status was seen.

    `left` is how many processes of its tree ran on, None where that is not known.
    """

    reason: Reason
    code: int | None
    signal: str | None
    duration_ms: int
    offsets: Mapping[str, int]
    left: int | None = None

    def on_wire(self, exec_id: str) -> dict[str, Any]:
        return {
            "exec": exec_id,
            "exitCode": self.code,
            "signal": self.signal,
            "reason": self.reason,
            "durationMs": self.duration_ms,
            "offsets": dict(self.offsets),
            "left": self.left,
        }


@dataclass(frozen=True, slots=True)
class Pace:
    """How far a command and its readers may be apart.

    A reader may lag by `window` bytes. Who lags by more holds the command back, but a viewer beside which
    others read on does so for `patience` seconds only; after that up to `lag` bytes are kept for it. Of what
    was sent up to `unacked` bytes are kept until they are acknowledged, for a reader that does so.
    """

    window: int
    patience: float
    lag: int
    unacked: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How one reader wants the output.

    A `viewer` can be left behind. `acks` says that it acknowledges what has arrived; with a `window` it is
    sent so many bytes beyond that and no more. A reader of `text` is given no part of a UTF-8 sequence whose
    rest may come.
    """

    viewer: bool = False
    acks: bool = False
    window: int | None = None
    text: bool = False


class Stream:
    """One output stream of a command: its tail and the cursors on it.

    What it keeps is in a `share` of its tenant. Where that is full it keeps a little: what a reader has not
    been sent, and not what was sent and may be asked for again.
    """

    def __init__(self, name: StreamName, tail: int, pace: Pace, share: Share) -> None:
        self.name: StreamName = name
        self.tail = Tail(tail)
        self._share = share
        self._lease = Lease(share)
        self.ended = False
        self.pace = pace
        self.window = max(pace.window, _SEQUENCE)
        self._cursors: set[Cursor] = set()
        self._progress = asyncio.Event()
        self._draining = False

    async def pump(self, process: Process) -> None:
        """Read the process until its stream ends; stop while a cursor that counts lags too far."""
        try:
            while data := await process.read(self.name):
                tight = self._share.full(len(data)) is not None
                self.tail.append(data, self._floor(tight), _LITTLE if tight else None)
                self._lease.hold(self.tail.end - self.tail.start - self._lease.size)
                for cursor in self._cursors:
                    cursor.wake()
                while self._slow() and not self._draining:
                    await self._pause()
        finally:
            self.ended = True
            for cursor in self._cursors:
                cursor.wake()

    def attach(self, offset: int, reading: Reading) -> tuple[Cursor, int]:
        """Return a cursor from `offset` on, and how many bytes from there are no longer kept."""
        start = min(max(offset, self.tail.start), self.tail.end)
        cursor = Cursor(self, start, reading)
        self._cursors.add(cursor)
        return cursor, max(0, start - offset)

    def detach(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        self.progress()

    def progress(self) -> None:
        """Let the reader task look again who has caught up."""
        self._progress.set()

    def drain(self) -> None:
        """Wait for no reader from now on: nothing writes any more, and the end can be told once all is read.

        What is still on its way is small; of more than `lag` bytes a viewer that stands still loses some.
        """
        self._draining = True
        self.progress()

    def release(self) -> None:
        """Count what is kept no more: it goes with whoever still reads it."""
        self._lease.end()

    def _floor(self, tight: bool) -> int | None:
        """Return from where on something is still wanted, by those that are not left behind at least."""
        if tight:
            floors = (one.offset for one in self._cursors if not one.behind)
            return min(floors, default=None)
        most = self.tail.end - self.pace.lag
        if self._draining:
            floors = (max(one.floor, most) if one.viewer else one.floor for one in self._cursors)
            return min(floors, default=None)
        if all(cursor.behind for cursor in self._cursors):
            return min((cursor.floor for cursor in self._cursors), default=None)
        return min(max(cursor.floor, most) if cursor.behind else cursor.floor for cursor in self._cursors)

    def _slow(self) -> list[Cursor]:
        """Return the cursors that the command waits for."""
        slow = [cursor for cursor in self._cursors if cursor.lag > self.window]
        return slow if len(slow) == len(self._cursors) else [one for one in slow if not one.behind]

    async def _pause(self) -> None:
        """Wait for progress; leave behind who makes none for too long while others have read all."""
        slow, now = self._slow(), asyncio.get_running_loop().time()
        until = None
        if all(cursor.viewer for cursor in slow) and len(slow) < len(self._cursors):
            for cursor in slow:
                cursor.slow_since = now if cursor.slow_since is None else cursor.slow_since
                cursor.behind = now - cursor.slow_since >= self.pace.patience
            first = min(cursor.slow_since or now for cursor in slow)
            until = first + self.pace.patience
        if self._slow():
            self._progress.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._progress.wait()


class Cursor:
    """One reader's place in a stream. `offset` is what it has taken over, not what it has looked at.

    `floor` is what it may come back to: of what was sent, the part that is not known to have arrived.
    `lost` counts the bytes in front of `offset` that it never got, because it was left `behind`.
    """

    def __init__(self, stream: Stream, offset: int, reading: Reading) -> None:
        self.stream = stream
        self.offset = offset
        self.viewer = reading.viewer
        self.behind = False
        self.slow_since: float | None = None
        self.lost = 0
        self._acked = offset
        self._unacked = stream.pace.unacked if reading.acks else 0
        self._window = reading.window
        self._text = reading.text
        self._wake = asyncio.Event()
        self._detached = False

    def detach(self) -> None:
        """Read no further, and hold the command back no more. Idempotent."""
        self._detached = True
        self.stream.detach(self)
        self.wake()

    def wake(self) -> None:
        self._wake.set()

    async def next(self) -> list[bytes]:
        """Return the next bytes in parts, none after the stream's last. Call `taken` once delivered."""
        while not self._detached:
            room = READ if self._window is None else self._window - (self.offset - self._acked)
            if room > 0:
                if parts := self._read(min(room, READ)):
                    return parts
                if self.stream.ended:
                    break
            self._wake.clear()
            await self._wake.wait()
        return []

    def _read(self, most: int) -> list[bytes]:
        tail, ended = self.stream.tail, self.stream.ended
        if self.offset < tail.start:
            self.lost += tail.start - self.offset
            self.offset = tail.start
        parts = tail.read(self.offset, most)
        if self._window is not None and parts:
            parts[0] = parts[0][:most]
        end = self.offset + sum(map(len, parts))
        if not self._text or (ended and end == tail.end):
            return parts
        if found := whole(parts):
            return found
        rest = b"".join(tail.read(end, _SEQUENCE))[:_SEQUENCE]
        return whole([*parts, rest]) if rest else []

    @property
    def lag(self) -> int:
        return self.stream.tail.end - self.offset

    @property
    def floor(self) -> int:
        return max(self._acked, self.offset - self._unacked)

    def ack(self, offset: int) -> None:
        """Take note that everything before `offset` has arrived."""
        self._acked = max(self._acked, min(offset, self.offset))
        self.wake()

    def taken(self, parts: list[bytes]) -> None:
        self.offset += sum(map(len, parts))
        if self.lag <= self.stream.window:
            self.behind, self.slow_since = False, None
        self.stream.progress()


def whole(parts: list[bytes]) -> list[bytes]:
    """Return `parts` without the UTF-8 sequence that they end in the middle of; what is not UTF-8 stays."""
    last = b"".join(parts[-_SEQUENCE:])[-_SEQUENCE:]
    held = len(last) - codecs.utf_8_decode(last, "replace", False)[1]
    parts = list(parts)
    while held:
        part = parts.pop()
        if len(part) > held:
            parts.append(part[:-held])
        held = max(0, held - len(part))
    return parts


class Attachment:
    """One reader of a command's output: a cursor per stream. Close it; the command outlives it.

    `id` is what the next attachment names to take its place; `taken` counts the bytes of its input that were
    taken over, and those of the attachments before it, `consumed` those of them that wait no more.
    """

    def __init__(
        self, owner: Exec, offsets: Mapping[str, int], before: Attachment | None, reading: Reading
    ) -> None:
        self.exec = owner
        self.id = f"a-{secrets.token_hex(8)}"
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

    def hold(self, seconds: float) -> None:
        """Keep the place for a reader whose connection broke: until it is resumed, or for so long."""
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


class Past:
    """The process of a command that ended in an earlier life of the gateway: nothing is left to do."""

    streams: tuple[StreamName, ...] = ("stdout", "stderr")
    report = b""
    unsent = 0

    def __init__(self, pid: int, started_at: float) -> None:
        self.pid = pid
        self.started_at = started_at

    async def read(self, stream: StreamName) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        pass

    async def close_stdin(self) -> None:
        pass

    async def resize(self, cols: int, rows: int) -> None:
        pass

    async def signal(self, number: int) -> None:
        pass

    async def flush(self) -> None:
        pass

    async def wait(self) -> Exit:
        raise Unavailable("the command ended before this gateway began")

    async def kill(self, grace: float) -> Killed:
        return Killed(0, False, 0)

    async def left(self) -> Sequence[Member]:
        return ()

    async def aclose(self) -> None:
        pass


class Exec:
    """A command that has started, until some time after its end.

    `ended` is a future that resolves once the outputs are read to their end and the exit is known.
    """

    def __init__(
        self,
        exec_id: str,
        tenant: str,
        spec: ExecSpec,
        process: Process,
        *,
        tail: int,
        pace: Pace,
        stdin_buffer: int,
        spools: Spools,
        share: Share,
        linger: float,
        grace: float,
        kill_left: bool,
    ) -> None:
        self.id = exec_id
        self.tenant = tenant
        self.spec = spec
        self.asked = spec.digest()
        self.process = process
        self.linger = linger
        self._grace = grace
        self._kill_left = kill_left
        self.share = share
        self.streams = {name: Stream(name, tail, pace, share) for name in process.streams}
        self.over: Ended
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._reason: Reason = "exited"
        self.keeping: asyncio.TimerHandle | None = None  # of the registry, once it has ended
        self.lasting = False  # it has ended, and something of its tree was last seen to run on
        self._late = False  # it was ended when only what it left behind was seen to run
        self._attachments: set[Attachment] = set()
        self._places: OrderedDict[str, Attachment] = OrderedDict()
        self._began = time.monotonic()
        self.stdin_window = stdin_buffer
        self._input = Input(process, stdin_buffer, spools, share, tenant)
        self._interrupting: asyncio.Task[None] | None = None
        self._size = spec.pty
        self._redrawing: asyncio.Task[None] | None = None
        self._killing: asyncio.Task[Killed] | None = None
        self._due = 0.0  # when it stops to be patient
        self._lingering: asyncio.TimerHandle | None = None

    def ended_before(self, asked: bytes, ended: Ended) -> None:
        """Be a command of an earlier life of the gateway, of which only the end is known."""
        self.asked = asked
        for name, stream in self.streams.items():
            stream.tail.start = stream.tail.end = ended.offsets.get(name, 0)
            stream.ended = True
        self.over = ended
        self.tell_end()

    async def run(self) -> None:
        """Carry the command to its end; the task that owns it. Never raises for what the command does."""
        code = signal = left = None
        writing = asyncio.create_task(self._input.run(), name=f"stdin {self.id}")
        try:
            async with asyncio.TaskGroup() as group:
                for stream in self.streams.values():
                    group.create_task(stream.pump(self.process))
            exit_ = await self.process.wait()
            code, signal = exit_.code, exit_.signal
            left = await self._left()
        except Unavailable:
            if self._reason == "exited":
                self._reason = "lost"
            # nobody follows it any more, but where only Incus went away it still runs
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(0)
            left = await self._left()
        except Exception:
            log.exception("exec %s of %s failed", self.id, self.tenant)
            self._reason = "lost"
        finally:
            helping = [task for task in (writing, self._interrupting, self._redrawing) if task is not None]
            for task in helping:
                task.cancel()
            await asyncio.gather(*helping, return_exceptions=True)
            await self.process.aclose()
            if self._lingering is not None:
                self._lingering.cancel()
            duration = int((time.monotonic() - self._began) * 1000)
            if self._late and code is not None and signal not in ("TERM", "KILL"):
                self._reason = "exited"
            self.over = Ended(self._reason, code, signal, duration, self._offsets(), left)

    async def _left(self) -> int | None:
        """Return how many processes of the tree run on, once whoever ends it has done so, as we may."""
        if self._killing is not None:
            await asyncio.wait([self._killing])
        elif self._kill_left and await self._members():
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(self._grace)
        left = await self._members()
        self.lasting = bool(left)
        return None if left is None else len(left)

    async def _members(self) -> Sequence[Member] | None:
        """Return what runs of the tree, None where that cannot be known."""
        try:
            return await self.process.left()
        except GatewayError as error:
            log.info("what runs of exec %s of %s is not known: %s", self.id, self.tenant, error.message)
            return None

    def tell_end(self) -> None:
        """Let everybody know of the end, once `run` has found it."""
        self.ended.set_result(self.over)

    def attach(
        self,
        offsets: Mapping[str, int] | None = None,
        *,
        resume: str | None = None,
        reading: Reading = Reading(),
    ) -> Attachment:
        """Start to read from the given offsets (default: the beginning).

        `resume` is an attachment whose reader has lost it: it ends, whatever became of its connection, and
        its input goes on here. Raises `NotFound` for one that there never was, or that is forgotten.
        """
        before = None if resume is None else self._places.pop(resume, None)
        if resume is not None and before is None:
            raise NotFound(f"exec {self.id} has no attachment {resume}; attach anew", exec=self.id)
        # before the old one ends: nothing falls between
        attachment = Attachment(self, offsets or {}, before, reading)
        self._attachments.add(attachment)
        if before is not None:
            before.close()
        self._places[attachment.id] = attachment
        if len(self._places) > _READERS:
            self._places.popitem(last=False)
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        return attachment

    def detached(self, attachment: Attachment) -> None:
        if attachment not in self._attachments:
            return
        self._attachments.discard(attachment)
        if not self._attachments and self.linger >= 0 and not self.ended.done():
            loop = asyncio.get_running_loop()
            self._lingering = loop.call_later(self.linger, self.end, "cancelled", self._grace)

    async def write(self, data: bytes, by: Attachment) -> None:
        """Give input of an attachment; see `Input.put`."""
        await self._input.put(data, by)
        if data == _CTRL_C and self.spec.pty is not None:
            self._interrupting = asyncio.create_task(self._interrupt(), name=f"interrupt {self.id}")

    async def _interrupt(self) -> None:
        """Let a Ctrl-C through to a terminal that takes no input.

        It holds some 4 KiB that no program reads, and the byte waits behind all that was typed or pasted. As
        a terminal does by itself at Ctrl-C, what waits is dropped.
        """
        await asyncio.sleep(_TAKES)
        if self._input.waiting or self.process.unsent:
            self._input.discard()
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.flush()
                await self.process.write(_CTRL_C)

    async def resize(self, cols: int, rows: int) -> None:
        """Give the terminal another size."""
        self._size = Pty(cols, rows)
        await self.process.resize(cols, rows)

    def redraw(self) -> None:
        """Have a program that fills its terminal draw it anew, for a reader who lacks what it drew before."""
        if self._size is not None and not self.ended.done() and self._redrawing is None:
            self._redrawing = asyncio.create_task(self._redraw(), name=f"redraw {self.id}")

    async def _redraw(self) -> None:
        # a terminal tells its program only of a change, and two within a moment may be none to it
        assert self._size is not None
        try:
            await self.process.resize(self._size.cols, max(1, self._size.rows - 1))
            await asyncio.sleep(_SEES)
            await self.process.resize(self._size.cols, self._size.rows)
        finally:
            self._redrawing = None

    def close_stdin(self) -> None:
        """End the input after what was queued. Idempotent."""
        self._input.end()

    async def cancel(self, grace: float, reason: Reason = "cancelled") -> Killed:
        """End the whole tree; return when nothing of it is left. A second call joins the first.

        The second may have less patience. After the command's own end it ends what the command left behind.
        """
        self.end(reason, grace)
        killing = None
        while killing is not self._killing:  # another's patience may have been shorter meanwhile
            killing = self._killing
            assert killing is not None
            killed = await asyncio.shield(killing)
        return killed

    def end(self, reason: Reason, grace: float) -> bool:
        """Start to end the tree and return at once: whether it was not being ended already."""
        due, killing = asyncio.get_running_loop().time() + grace, self._killing
        if killing is not None and not killing.done():
            if due < self._due - _SOONER:
                self._due = due
                self._kill(self._hastened(killing, grace))
            return False
        if self._killed() and not self.ended.done():
            return False  # its end is just being told
        if not self.ended.done():
            self._reason = reason
        self._due = due
        self._kill(self._ended_by_us(grace))
        return True

    async def _ended_by_us(self, grace: float) -> Killed:
        if not self.ended.done():
            self._late = await self._outlived()
        return await self.process.kill(grace)

    def _kill(self, kill: Coroutine[Any, Any, Killed]) -> None:
        self._killing = asyncio.create_task(kill, name=f"kill {self.id}")
        self._killing.add_done_callback(self._was_killed)

    async def _hastened(self, first: asyncio.Task[Killed], grace: float) -> Killed:
        """Wait `grace` seconds for a kill that is under way, then KILL what is left."""
        await asyncio.wait([first], timeout=grace)
        if first.done():
            return first.result()
        harder = await self.process.kill(0)
        killed = await first
        return replace(
            killed,
            killed=max(killed.killed, harder.killed),
            escalated=killed.escalated or harder.escalated,
        )

    async def _outlived(self) -> bool:
        """Whether the command was seen to have ended before its outputs, which what it left holds open."""
        members = await self._members() or ()
        return 0 < len(members) < _TOLD and all(member.pid != self.process.pid for member in members)

    async def describe(self) -> dict[str, Any]:
        """Return what `exec/list` tells."""
        ended = self.ended.result() if self.ended.done() else None
        return {
            "exec": self.id,
            "argv": shortened(self.spec, _LISTED),
            "pid": self.process.pid,
            "startedAt": started_at(self.process),
            "pty": self.spec.pty is not None,
            "state": self.state,
            "attached": len(self._attachments),
            "offsets": self._offsets(),
            **({} if ended is None else {"exit": ended.on_wire(self.id), "left": await self._told_left()}),
        }

    def _offsets(self) -> dict[str, int]:
        return {"stdout": 0, "stderr": 0} | {name: stream.tail.end for name, stream in self.streams.items()}

    async def look(self) -> Sequence[Member]:
        """Return what of an ended command's tree runs on, as far as that can be known."""
        left = await self._members() if self.lasting else ()
        if left is not None:
            self.lasting = bool(left)
        return left or ()

    async def _told_left(self) -> list[dict[str, Any]]:
        return [{"pid": member.pid, "name": member.name} for member in await self.look()]

    def shed(self, words: Sequence[str]) -> None:
        """Keep of an ended command its end and `words` alone.

        Who reads its output reads on; who comes later is told that it is lost.
        """
        for name, stream in self.streams.items():
            stream.release()
            bare = Stream(name, 0, stream.pace, self.share)
            bare.tail.start = bare.tail.end = stream.tail.end
            bare.ended = True
            self.streams[name] = bare
        self.spec = replace(self.spec, argv=tuple(words), env={}, shown=None)

    def release(self) -> None:
        """Count none of what is kept any more: the command is forgotten."""
        for stream in self.streams.values():
            stream.release()

    @property
    def kept_bytes(self) -> int:
        """How much is held of the outputs, and of what was asked for."""
        asked = (*self.spec.argv, *self.spec.env, *self.spec.env.values())
        return sum(stream.tail.end - stream.tail.start for stream in self.streams.values()) + sum(
            map(len, asked)
        )

    @property
    def state(self) -> Literal["running", "ended"]:
        """Whether the command runs; one that was killed does not, though its exit may not be known yet."""
        return "ended" if self.ended.done() or self._killed() else "running"

    def _was_killed(self, killing: asyncio.Task[Killed]) -> None:
        # one that nobody waits for (linger, timeout) may fail where Incus is away; the exec then ends `lost`
        with contextlib.suppress(asyncio.CancelledError, GatewayError, TimeoutError):
            if killing.result().survivors == 0:
                for stream in self.streams.values():
                    stream.drain()

    def _killed(self) -> bool:
        killing = self._killing
        if killing is None or not killing.done() or killing.cancelled() or killing.exception() is not None:
            return False
        return killing.result().survivors == 0


def shortened(spec: ExecSpec, room: int) -> list[str]:
    """Return a command's words, cut off after `room` characters."""
    words = list[str]()
    for word in spec.shown or spec.argv:
        words.append(word if len(word) <= room else word[: max(0, room - 1)] + "…")
        room -= len(word) + 1
        if room < 0:
            break
    return words


def started_at(process: Process) -> str:
    """Return the start as an RFC 3339 time with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(process.started_at))
    return f"{whole}.{int(process.started_at * 1000) % 1000:03d}Z"
