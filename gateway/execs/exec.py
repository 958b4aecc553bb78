"""One running command: its attachments, its input, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.execs.command_tree import CommandTree
from gateway.execs.ended import Ended, Reason
from gateway.execs.input import Input, Spools
from gateway.execs.pty_control import PtyControl
from gateway.execs.streams import Cursor, Pace, Reading, Stream
from gateway.limits.budget import Share
from gateway.rootfs.process_tree import Member
from gateway.runtime import ExecSpec, Killed, Process, StreamName

log = logging.getLogger(__name__)

_LISTED: Final = 4096  # characters of a command where it is listed beside all others
_READERS: Final = 64  # of one command, whose place is kept for their return


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
        self._attachments: set[Attachment] = set()
        self._places: OrderedDict[str, Attachment] = OrderedDict()
        self._began = time.monotonic()
        self.stdin_window = stdin_buffer
        self._input = Input(process, stdin_buffer, spools, share, tenant)
        self._terminal = PtyControl(process, self._input, spec.pty, exec_id)
        self._tree = CommandTree(process, f"exec {exec_id} of {tenant}", self._drain)
        self._lingering: asyncio.TimerHandle | None = None

    def ended_before(self, asked: bytes, ended: Ended) -> None:
        """Become a command of an earlier process of the gateway, of which only the end is known."""
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
            # it cannot be followed any more, but if only Incus went away it still runs
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(0)
            left = await self._left()
        except Exception:
            log.exception("exec %s of %s failed", self.id, self.tenant)
            self._reason = "lost"
        finally:
            writing.cancel()
            await asyncio.gather(writing, self._terminal.close(), return_exceptions=True)
            await self.process.aclose()
            if self._lingering is not None:
                self._lingering.cancel()
            duration = int((time.monotonic() - self._began) * 1000)
            if self._tree.late and code is not None and signal not in ("TERM", "KILL"):
                self._reason = "exited"
            self.over = Ended(self._reason, code, signal, duration, self._offsets(), left)

    async def _left(self) -> int | None:
        """Return how many processes of the tree run on, after a cancel that is under way."""
        killed = await self._tree.settle()
        if not killed and self._kill_left and await self._tree.members():
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(self._grace)
        left = await self._tree.members()
        self.lasting = bool(left)
        return None if left is None else len(left)

    def tell_end(self) -> None:
        """Let everybody know of the end, once `run` has found it."""
        self.ended.set_result(self.over)

    def attach(
        self,
        offsets: Mapping[str, int] | None = None,
        *,
        resume: str | None = None,
        reading: Reading = Reading(),  # noqa: B008 - immutable
    ) -> Attachment:
        """Start to read from the given offsets (default: the beginning).

        `resume` is an attachment whose reader has lost it: it ends, and its input goes on here. Raises
        `NotFound` if there is no such attachment, or no longer.
        """
        before = None if resume is None else self._places.pop(resume, None)
        if resume is not None and before is None:
            raise NotFound(
                f"exec {self.id} has no attachment {resume}; attach again without it", exec=self.id
            )
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
        self._terminal.typed(data)

    async def resize(self, cols: int, rows: int) -> None:
        """Give the terminal another size."""
        await self._terminal.resize(cols, rows)

    def redraw(self) -> None:
        """Have a full-screen program redraw its terminal, for a reader that lacks its earlier output."""
        if not self.ended.done():
            self._terminal.redraw()

    def close_stdin(self) -> None:
        """End the input after what was queued. Idempotent."""
        self._input.end()

    async def cancel(self, grace: float, reason: Reason = "cancelled") -> Killed:
        """End the whole tree; return when nothing of it is left. A second call joins the first.

        The second may have less patience. After the command's own end it ends what the command left behind.
        """
        self.end(reason, grace)
        return await self._tree.wait_killed()

    def end(self, reason: Reason, grace: float) -> bool:
        """Start to end the tree and return at once: whether it was not being ended already."""
        running = not self.ended.done()
        began = self._tree.begin_kill(grace, running=running)
        if began and running:
            self._reason = reason
        return began

    def _drain(self) -> None:
        for stream in self.streams.values():
            stream.drain()

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
        left = await self._tree.members() if self.lasting else ()
        if left is not None:
            self.lasting = bool(left)
        return left or ()

    async def _told_left(self) -> list[dict[str, Any]]:
        return [{"pid": member.pid, "name": member.name} for member in await self.look()]

    def shed(self, words: Sequence[str]) -> None:
        """Keep only the end and `words` of an ended command.

        Present readers of its output read on; later ones are told that it is lost.
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
    def printed(self) -> int:
        """Bytes of output until now."""
        return sum(self._offsets().values())

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
        return "ended" if self.ended.done() or self._tree.killed else "running"


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
