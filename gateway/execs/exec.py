"""One running command: its attachments, its input, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

from gateway.admission import Reservation
from gateway.errors import GatewayError, Unavailable
from gateway.execs.ended import ExecEnd, Reason, ended_of
from gateway.execs.input import PtyControl, Spools, StdinQueue
from gateway.execs.readers import Attachment, Readers
from gateway.execs.streams import Pace, Reading, Stream, Streams
from gateway.limits.budget import Share
from gateway.rootfs.command_cgroup import CgroupMember
from gateway.runtime import Adopted, ExecSpec, Holding, KillResult, Process

LISTED: Final = 4096  # characters of a command where it is listed beside all others


def listed(spec: ExecSpec) -> list[str]:
    """Return a command's words as `exec/list` has them, as text that JSON can carry."""
    return [word.encode(errors="replace").decode() for word in shortened(spec, LISTED)]


def shortened(spec: ExecSpec, room: int) -> list[str]:
    """Return a command's words, truncated to about `room` characters in all."""
    words = list[str]()
    for word in spec.shown or spec.argv:
        words.append(word if len(word) <= room else word[: max(0, room - 1)] + "…")
        room -= len(word) + 1
        if room < 0:
            break
    return words


def started_at(process: Process) -> str:
    """Return the start time in RFC 3339 format, with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(process.started_at))
    return f"{whole}.{int(process.started_at * 1000) % 1000:03d}Z"


log = logging.getLogger(__name__)

_SOONER: Final = 0.1  # seconds by which a second kill must be earlier to replace the first
_TOLD: Final = 100  # most processes of a tree that a runtime reports


class CommandTree:
    """A command's process and its descendants. `emptied` is called once a kill has left none of them.

    `late` is set if the kill came after the command itself had ended and only its descendants were running.
    `lasting` is set if the command has ended and descendants were still running when last seen.
    """

    def __init__(self, process: Process, name: str, emptied: Callable[[], None]) -> None:
        self.late = False
        self.lasting = False
        self._process = process
        self._name = name
        self._emptied = emptied
        self._killing: asyncio.Task[KillResult] | None = None
        self._due = 0.0  # when the grace period ends, in loop time

    async def members(self) -> Sequence[CgroupMember] | None:
        """Return the running processes, or None if they cannot be determined."""
        try:
            return await self._process.left()
        except GatewayError as error:
            log.info("cannot list the processes of %s: %s", self._name, error.message)
            return None

    async def left(self, grace: float | None) -> int | None:
        """Return how many processes an ended command has left, None if that is unknown.

        Waits for a kill under way. Otherwise, with a `grace`, those processes are killed.
        """
        killed = await self._settle()
        if not killed and grace is not None and await self.members():
            with contextlib.suppress(GatewayError, TimeoutError):
                await self._process.kill(grace)
        left = await self.members()
        self.lasting = bool(left)
        return None if left is None else len(left)

    async def look(self) -> Sequence[CgroupMember]:
        """Return the processes that an ended command left and that still run, as far as that is known."""
        left = await self.members() if self.lasting else ()
        if left is not None:
            self.lasting = bool(left)
        return left or ()

    @property
    def killed(self) -> bool:
        """Whether a kill has finished and left no process."""
        killing = self._killing
        if killing is None or not killing.done() or killing.cancelled() or killing.exception() is not None:
            return False
        return killing.result().survivors == 0

    def begin_kill(self, grace: float, *, running: bool) -> bool:
        """Start killing the tree without waiting; return False if a kill was already under way.

        `running` is True while the command's own end is unknown. A second kill may shorten the grace period.
        """
        due, killing = asyncio.get_running_loop().time() + grace, self._killing
        if killing is not None and not killing.done():
            if due < self._due - _SOONER:
                self._due = due
                self._begin(self._hasten(killing, grace))
            return False
        if self.killed and running:
            return False  # its end is being reported right now
        self._due = due
        self._begin(self._kill(grace, running))
        return True

    async def wait_killed(self) -> KillResult:
        """Wait for the kill under way and return its result. Raises what the kill raises."""
        killing = None
        while killing is not self._killing:  # a less patient kill may have replaced it meanwhile
            killing = self._killing
            assert killing is not None
            killed = await asyncio.shield(killing)
        return killed

    async def _settle(self) -> bool:
        """Wait for a kill under way to finish, even if it fails; return False if there is none."""
        if self._killing is None:
            return False
        await asyncio.wait([self._killing])
        return True

    def _begin(self, kill: Coroutine[Any, Any, KillResult]) -> None:
        self._killing = asyncio.create_task(kill, name=f"kill {self._name}")
        self._killing.add_done_callback(self._over)

    def _over(self, killing: asyncio.Task[KillResult]) -> None:
        # a kill nobody waits for (linger, timeout) may fail while Incus is away; the exec then ends as `lost`
        with contextlib.suppress(asyncio.CancelledError, GatewayError, TimeoutError):
            if killing.result().survivors == 0:
                self._emptied()

    async def _kill(self, grace: float, running: bool) -> KillResult:
        if running:
            self.late = await self._outlived()
        return await self._process.kill(grace)

    async def _hasten(self, first: asyncio.Task[KillResult], grace: float) -> KillResult:
        """Give a kill under way `grace` seconds, then send KILL to what is left."""
        await asyncio.wait([first], timeout=grace)
        if first.done():
            return first.result()
        harder = await self._process.kill(0)
        killed = await first
        return replace(
            killed,
            killed=max(killed.killed, harder.killed),
            escalated=killed.escalated or harder.escalated,
        )

    async def _outlived(self) -> bool:
        """Return whether the command has ended while its descendants still hold its outputs open."""
        members = await self.members() or ()
        return 0 < len(members) < _TOLD and all(member.pid != self._process.pid for member in members)


class OwnerState:
    """What the package that started a command needs to continue it; without a `holding` nothing is kept.

    `found` is what an earlier process recorded, empty for a command that only its own reader wants.
    """

    def __init__(self, holding: Holding | None) -> None:
        self._holding = holding
        self.found: Mapping[str, Any] = {}

    @property
    def held(self) -> bool:
        return self._holding is not None

    def take_over(self, holding: Holding) -> None:
        """Continue with what an earlier process recorded."""
        self._holding = holding
        self.found = holding.purpose()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep facts in the place of those before: 4 KiB at most, as JSON."""
        if self._holding is not None:
            self._holding.note_purpose(facts)

    def begin_with(self, at: int, data: bytes) -> None:
        """Keep a part of the first 128 KiB of an output."""
        if self._holding is not None:
            self._holding.begin_with(at, data)

    def beginning(self, size: int) -> bytes:
        """Return so many of these first bytes."""
        return b"" if self._holding is None else self._holding.beginning(size)

    def leave(self) -> None:
        """Record nothing more: it belongs to another process now."""
        self._holding = None


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
        room: Callable[[int], bool],
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
        self._kill_left = grace if kill_left else None
        self.share = share
        self.streams = Streams({name: Stream(name, tail, pace, share, room) for name in process.streams})
        self.over: ExecEnd
        self.ended: asyncio.Future[ExecEnd] = asyncio.get_running_loop().create_future()
        self._reason: Reason = "exited"
        self._cause: str | None = None
        self.keeping: asyncio.TimerHandle | None = None  # the registry's timer, once the command has ended
        self._began = time.monotonic()
        self.stdin_window = stdin_buffer
        self._input = StdinQueue(process, stdin_buffer, spools, share, tenant)
        self.terminal = PtyControl(process, self._input, spec.pty, exec_id, self.note)
        self.tree = CommandTree(process, f"exec {exec_id} of {tenant}", self.streams.drain)
        self.readers = Readers(self, self._input, linger, partial(self.end, "cancelled", grace), self.note)
        self.deadline: float | None = None  # seconds since the epoch
        self.once = False
        self.slot: Reservation[str] | None = None  # among its tenant's running commands
        self.left = False  # handed to the next gateway process: this one no longer owns it
        self._holding = process.holding
        self.purpose = OwnerState(process.holding)
        self._ending = self._finished = False
        self.reader: Attachment | None = None  # for the purpose that an earlier process recorded

    def ended_before(self, asked: bytes, ended: ExecEnd) -> None:
        """Represent a command of an earlier gateway process of which only the end is known."""
        self.asked = asked
        self.streams.restore({name: (ended.offsets.get(name, 0), b"") for name in self.streams})
        self._end_as(ended)

    def _end_as(self, ended: ExecEnd) -> None:
        """Mark the command as having ended before this process started."""
        self._finished = True
        self.streams.end()
        self.readers.close()
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
            left = await self.tree.left(self._kill_left)
        except Unavailable:
            if self._reason == "exited":
                self._reason = "lost"
            # the command cannot be followed any more, but still runs if only Incus went away
            with contextlib.suppress(GatewayError, TimeoutError):
                await self.process.kill(0)
            left = await self.tree.left(self._kill_left)
        except Exception:
            log.exception("exec %s of %s failed", self.id, self.tenant)
            self._reason = "lost"
        finally:
            writing.cancel()
            self.readers.close()
            await asyncio.gather(writing, self.terminal.close(), return_exceptions=True)
            if not self.left:
                await self._finish(code, signal, left)

    async def _finish(self, code: int | None, signal: str | None, left: int | None) -> None:
        duration = int((time.monotonic() - self._began) * 1000)
        if self.tree.late and code is not None and signal not in ("TERM", "KILL"):
            self._reason = "exited"
        cause = self._cause if self._reason == "lost" else None
        if cause is not None:  # a status that only this kill made
            code = signal = None
        self.over = ExecEnd(self._reason, code, signal, duration, self.streams.offsets, left, cause)
        self._finished = True
        if self._holding is not None:
            self._holding.end(self._facts(self.over))
        await self.process.aclose()

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
        return self.readers.attach(offsets or {}, resume, reading)

    def close_stdin(self) -> None:
        """Close stdin once the queued input is written. Idempotent."""
        self.readers.end_input()

    async def cancel(self, grace: float, reason: Reason = "cancelled") -> KillResult:
        """Kill the whole process tree and return once it is gone. A second call joins the first.

        The second call may shorten the grace period. If the command itself has already ended, this kills the
        processes it left behind.
        """
        self.end(reason, grace)
        return await self.tree.wait_killed()

    def end(self, reason: Reason, grace: float) -> bool:
        """Start killing the tree without waiting; return False if that was already under way."""
        running = not self.ended.done()
        began = self.tree.begin_kill(grace, running=running)
        if began and running:
            self._reason = reason
            self.note(ending=True)
        return began

    def lose(self, cause: str) -> None:
        """Kill a running command and report it as lost: its tenant goes away."""
        self._cause = cause
        self.end("lost", 0)

    async def describe(self) -> dict[str, Any]:
        """Return the command's entry in `exec/list`."""
        ended = self.ended.result() if self.ended.done() else None
        left = [{"pid": one.pid, "name": one.name} for one in await self.tree.look()]
        return {
            "exec": self.id,
            "argv": shortened(self.spec, LISTED),
            "pid": self.process.pid,
            "startedAt": started_at(self.process),
            "pty": self.spec.pty is not None,
            "state": self.state,
            "attached": len(self.readers),
            "offsets": self.streams.offsets,
            **({} if ended is None else {"exit": ended.on_wire(self.id), "left": left}),
        }

    def shed(self, words: Sequence[str]) -> None:
        """Keep only the end and `words` of an ended command. Only current readers can finish reading."""
        self.streams.shed()
        self.spec = replace(self.spec, argv=tuple(words), env={}, shown=None)
        self.let_go()

    def let_go(self) -> None:
        """Keep nothing of an ended command for the next process any more."""
        self.streams.let_go()
        self.purpose.leave()
        if self._holding is not None:
            self._holding.drop()

    # --- across a restart of the gateway ---------------------------------------------------------------

    def leave(self) -> bool:
        """Hand the command to the next gateway process; return whether that is possible."""
        self.left = self._holding is not None and self._holding.safe and not self.ended.done()
        if self.left:
            self.readers.close()
            self.purpose.leave()
        return self.left

    def note_unattached(self) -> None:
        """Record that nobody is attached, unless a reader has attached since."""
        if not self.readers:
            self.note()

    def note(self, *, ending: bool = False) -> None:
        """Record what the next process needs to continue the command, if it can be held."""
        if self._holding is not None and not self.left and not self._finished:
            self._ending = self._ending or ending
            self._holding.note(self._facts(None))

    def _facts(self, over: ExecEnd | None) -> dict[str, Any]:
        size = self.terminal.size
        return {
            **{"id": self.id, "tenant": self.tenant},
            "argv": listed(self.spec),
            "asked": self.asked.hex(),
            "pty": None if size is None else [size.cols, size.rows],
            **{"stdin": self.spec.stdin, "work": self.spec.work},
            **{"linger": self.linger, "deadline": self.deadline, "once": self.once},
            "ending": self._reason if self._ending else None,
            **self.readers.facts(),
            "over": None if over is None else over.on_wire(self.id),
        }

    def take_over(self, found: Adopted) -> None:
        """Continue an earlier process's command, before any attach. Its readers may resume."""
        facts = found.facts
        self._holding = found.holding
        self.asked, self.once, self.deadline = bytes.fromhex(facts["asked"]), facts["once"], facts["deadline"]
        self._began = time.monotonic() - max(0.0, time.time() - found.started_at)
        self.streams.restore(found.outputs)
        self.purpose.take_over(found.holding)
        if (over := facts["over"]) is not None:
            self._holding.end(facts)
            self._end_as(ended_of(over))
            self.reader = self.attach() if self.purpose.found else None
            return
        if not facts.get("starting"):  # else what it was given was our shell's
            self._input.accounts.take_over()
        self.readers.take_over(facts)
        self.reader = self.attach() if self.purpose.found else None
        if facts["ending"] is not None:
            self.end(facts["ending"], 0)
        self.note()

    @property
    def may_run(self) -> bool:
        """Whether any of its processes may still run."""
        return not self.ended.done() or self.tree.lasting or self.over.left is None

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory for the outputs and the command line."""
        asked = sum(map(len, (*self.spec.argv, *self.spec.env, *self.spec.env.values())))
        return asked + self.streams.kept

    @property
    def state(self) -> Literal["running", "ended"]:
        """The command's state. A killed command counts as ended even before its exit is known."""
        return "ended" if self.ended.done() or self.tree.killed else "running"
