"""One running command: its attachments, its input, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.execs.accounts import SLOTS
from gateway.execs.attachment import Attachment
from gateway.execs.command_tree import CommandTree
from gateway.execs.ended import Ended, Reason, ended_of
from gateway.execs.input import Input, Spools
from gateway.execs.owed import Owed
from gateway.execs.pty_control import PtyControl
from gateway.execs.purpose import Purpose
from gateway.execs.shown import LISTED, listed, shortened, started_at
from gateway.execs.streams import Pace, Reading, Stream
from gateway.limits.budget import Share
from gateway.rootfs.process_tree import Member
from gateway.runtime import Adopted, ExecSpec, Killed, Process

log = logging.getLogger(__name__)

_READERS: Final = 64  # readers of one command whose position is kept so that they can resume


class Exec:
    """A command, from its start until some time after its end.

    The future `ended` resolves once all output has been read and the exit is known.
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
        self.keeping: asyncio.TimerHandle | None = None  # the registry's timer, once the command has ended
        self.lasting = False  # ended, but some of its processes were still running when last seen
        self._attachments: set[Attachment] = set()
        self._places: OrderedDict[str, Attachment] = OrderedDict()
        self._began = time.monotonic()
        self.stdin_window = stdin_buffer
        self._input = Input(process, stdin_buffer, spools, share, tenant)
        self._terminal = PtyControl(process, self._input, spec.pty, exec_id)
        self._tree = CommandTree(process, f"exec {exec_id} of {tenant}", self._drain)
        self._lingering: asyncio.TimerHandle | None = None
        self._lingers_since: float | None = None
        self.deadline: float | None = None  # seconds since the epoch
        self.once = False
        self.left = False  # handed to the next gateway process: this one no longer owns it
        self._holding = process.holding
        self.purpose = Purpose(process.holding)
        self._ending = self._finished = False
        self._owed = Owed()
        self.reader: Attachment | None = None  # for the purpose that an earlier process recorded

    def ended_before(self, asked: bytes, ended: Ended) -> None:
        """Represent a command of an earlier gateway process of which only the end is known."""
        self.asked = asked
        for name, stream in self.streams.items():
            stream.restore(ended.offsets.get(name, 0), b"")
        self._end_as(ended)

    def _end_as(self, ended: Ended) -> None:
        """Mark the command as having ended before this process started."""
        self._finished = True
        for stream in self.streams.values():
            stream.ended = True
        self.over = ended
        self.tell_end()

    async def run(self) -> None:
        """Run the command until it ends. The owning task calls this; a failing command raises nothing."""
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
            # the command cannot be followed any more, but still runs if only Incus went away
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(0)
            left = await self._left()
        except Exception:
            log.exception("exec %s of %s failed", self.id, self.tenant)
            self._reason = "lost"
        finally:
            writing.cancel()
            await asyncio.gather(writing, self._terminal.close(), return_exceptions=True)
            if self._lingering is not None:
                self._lingering.cancel()
            if not self.left:
                await self._finish(code, signal, left)

    async def _finish(self, code: int | None, signal: str | None, left: int | None) -> None:
        duration = int((time.monotonic() - self._began) * 1000)
        if self._tree.late and code is not None and signal not in ("TERM", "KILL"):
            self._reason = "exited"
        self.over = Ended(self._reason, code, signal, duration, self._offsets(), left)
        self._finished = True
        if self._holding is not None:
            self._holding.end(self._facts(self.over))
        await self.process.aclose()

    async def _left(self) -> int | None:
        """Return how many processes of the tree still run, once a pending cancel has finished."""
        killed = await self._tree.settle()
        if not killed and self._kill_left and await self._tree.members():
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(self._grace)
        left = await self._tree.members()
        self.lasting = bool(left)
        return None if left is None else len(left)

    def tell_end(self) -> None:
        """Resolve `ended` with the end that `run` found."""
        self.ended.set_result(self.over)

    def attach(
        self,
        offsets: Mapping[str, int] | None = None,
        *,
        resume: str | None = None,
        reading: Reading = Reading(),  # noqa: B008 - immutable
    ) -> Attachment:
        """Attach a reader at the given offsets (default: the beginning).

        `resume` names an attachment whose connection was lost: it is closed, and its input continues here.
        Raises `NotFound` if that attachment does not exist or was dropped.
        """
        before = None if resume is None else self._places.pop(resume, None)
        if resume is not None and before is None:
            raise NotFound(
                f"exec {self.id} has no attachment {resume}; attach again without it", exec=self.id
            )
        # before the old one is closed, so that no output is lost in between
        attachment = Attachment(self, offsets or {}, before, reading, self._slot())
        if before is None:
            self._input.accounts.open(attachment.slot)
        self._attachments.add(attachment)
        self._places[attachment.id] = attachment
        if before is not None:
            before.close()
        if len(self._places) > _READERS:
            self._places.popitem(last=False)
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = self._lingers_since = None
        self.note()
        return attachment

    def _slot(self) -> int:
        """Return an account slot that no remembered reader uses."""
        taken = {place.slot for place in list(self._places.values())[-(SLOTS - 1) :]}
        return next(slot for slot in range(SLOTS) if slot not in taken)

    def detached(self, attachment: Attachment) -> None:
        if attachment not in self._attachments:
            return
        self._attachments.discard(attachment)
        if not (self._attachments or self.ended.done() or self.left):
            self._linger()
        self.note()
        self.look_for_end()

    def _linger(self, since: float | None = None) -> None:
        """Let the command run without a reader for the linger time.

        `since` (epoch seconds) is when an earlier process started that time; default now.
        """
        self._lingers_since = since or time.time()
        if self.linger >= 0:
            left = max(0.0, self._lingers_since + self.linger - time.time())
            loop = asyncio.get_running_loop()
            self._lingering = loop.call_later(left, self.end, "cancelled", self._grace)

    async def write(self, data: bytes, by: Attachment) -> None:
        """Queue input from an attachment; see `Input.put`."""
        await self._input.put(data, by)
        self._terminal.typed(data)

    async def resize(self, cols: int, rows: int) -> None:
        """Resize the terminal."""
        await self._terminal.resize(cols, rows)
        self.note()

    def redraw(self) -> None:
        """Make a full-screen program redraw, for a reader that lacks the earlier output."""
        if not self.ended.done():
            self._terminal.redraw()

    def close_stdin(self) -> None:
        """Close stdin once the queued input is written. Idempotent."""
        self._owed.close()
        self._input.end()
        self.note()

    async def cancel(self, grace: float, reason: Reason = "cancelled") -> Killed:
        """Kill the whole process tree and return once it is gone. A second call joins the first.

        The second call may shorten the grace period. If the command itself has already ended, this kills the
        processes it left behind.
        """
        self.end(reason, grace)
        return await self._tree.wait_killed()

    def end(self, reason: Reason, grace: float) -> bool:
        """Start killing the tree without waiting; return False if that was already under way."""
        running = not self.ended.done()
        began = self._tree.begin_kill(grace, running=running)
        if began and running:
            self._reason = reason
            self.note(ending=True)
        return began

    def _drain(self) -> None:
        for stream in self.streams.values():
            stream.drain()

    async def describe(self) -> dict[str, Any]:
        """Return the command's entry in `exec/list`."""
        ended = self.ended.result() if self.ended.done() else None
        left = [{"pid": one.pid, "name": one.name} for one in await self.look()]
        return {
            "exec": self.id,
            "argv": shortened(self.spec, LISTED),
            "pid": self.process.pid,
            "startedAt": started_at(self.process),
            "pty": self.spec.pty is not None,
            "state": self.state,
            "attached": len(self._attachments),
            "offsets": self._offsets(),
            **({} if ended is None else {"exit": ended.on_wire(self.id), "left": left}),
        }

    def _offsets(self) -> dict[str, int]:
        return {"stdout": 0, "stderr": 0} | {name: stream.tail.end for name, stream in self.streams.items()}

    async def look(self) -> Sequence[Member]:
        """Return the processes of an ended command that still run, as far as that can be known."""
        left = await self._tree.members() if self.lasting else ()
        if left is not None:
            self.lasting = bool(left)
        return left or ()

    def shed(self, words: Sequence[str]) -> None:
        """Keep only the end and `words` of an ended command. Only current readers can finish reading."""
        for name, stream in self.streams.items():
            stream.release()
            bare = Stream(name, 0, stream.pace, self.share)
            bare.tail.start = bare.tail.end = stream.tail.end
            bare.ended = True
            self.streams[name] = bare
        self.spec = replace(self.spec, argv=tuple(words), env={}, shown=None)
        self.let_go()

    def release(self) -> None:
        """Give back the memory accounted to a command that is being forgotten."""
        self.let_go()
        for stream in self.streams.values():
            stream.release()

    def let_go(self) -> None:
        """Keep nothing for the next process any more; of a command that has ended."""
        for stream in self.streams.values():
            stream.let_go()
        self.purpose.leave()
        if self._holding is not None:
            self._holding.drop()

    # --- across a restart of the gateway ---------------------------------------------------------------

    def leave(self) -> bool:
        """Hand the command to the next gateway process; return whether that is possible."""
        self.left = self._holding is not None and self._holding.safe and not self.ended.done()
        if self.left:
            self.purpose.leave()
        return self.left

    def note(self, *, ending: bool = False) -> None:
        """Record what the next process needs to continue the command, if it can be held."""
        if self._holding is not None and not self.left and not self._finished:
            self._ending = self._ending or ending
            self._holding.note(self._facts(None))

    def _facts(self, over: Ended | None) -> dict[str, Any]:
        size = self._terminal.size
        return {
            **{"id": self.id, "tenant": self.tenant},
            "argv": listed(self.spec),
            "asked": self.asked.hex(),
            "pty": None if size is None else [size.cols, size.rows],
            "stdin": self.spec.stdin,
            **{"linger": self.linger, "lingers": self._lingers_since},
            **{"deadline": self.deadline, "once": self.once},
            "ending": self._reason if self._ending else None,
            "owed": self._owed.facts(self._places.values()),
            "places": [
                [place.id, place.slot, place.acking and not place.closed] for place in self._places.values()
            ],
            "over": None if over is None else over.on_wire(self.id),
        }

    def take_over(self, found: Adopted, hold: float) -> None:
        """Continue an earlier process's command, before any attach. Readers may resume for `hold` seconds."""
        facts, accounts = found.facts, self._input.accounts
        self._holding = found.holding
        self.asked, self.once, self.deadline = bytes.fromhex(facts["asked"]), facts["once"], facts["deadline"]
        self._began = time.monotonic() - max(0.0, time.time() - found.started_at)
        for name, (start, data) in found.outputs.items():
            self.streams[name].restore(start, data)
        self.purpose.take_over(found.holding)
        if (over := facts["over"]) is not None:
            self._holding.end(facts)
            self._end_as(ended_of(over))
            self.reader = self.attach() if self.purpose.found else None
            return
        if not facts.get("starting"):  # else what it was given was our shell's
            accounts.take_over()
        for id_, slot, acking in facts["places"]:
            place = Attachment(self, {}, None, Reading(viewer=True, acks=acking), slot, id_)
            place.restore(accounts.passed[slot])
            self._places[id_] = place
            if acking:
                self._attachments.add(place)
                place.hold(hold)
            else:
                place.close()
        self.reader = self.attach() if self.purpose.found else None
        if not self._attachments:
            self._linger(facts["lingers"])
        if facts["owed"] is not None:
            self._owed.take_over(facts["owed"], accounts.passed)
            self.look_for_end()
        if facts["ending"] is not None:
            self.end(facts["ending"], 0)
        self.note()

    def look_for_end(self) -> None:
        """Close stdin as an earlier process was asked to, once the missing input has been sent again."""
        if self._owed.due(self._places.values()):
            self._input.end()

    @property
    def printed(self) -> int:
        """Bytes of output so far."""
        return sum(self._offsets().values())

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory for the outputs and the command line."""
        asked = sum(map(len, (*self.spec.argv, *self.spec.env, *self.spec.env.values())))
        return asked + sum(stream.tail.end - stream.tail.start for stream in self.streams.values())

    @property
    def state(self) -> Literal["running", "ended"]:
        """The command's state. A killed command counts as ended even before its exit is known."""
        return "ended" if self.ended.done() or self._tree.killed else "running"
