"""Runs commands to their ends, records and reports these, and keeps ended commands for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import orjson

from gateway.events import Bus, Event
from gateway.execs.ended import EndedProcess, ExecEnd, ended_of
from gateway.execs.exec import Exec, shortened
from gateway.execs.input import Spools
from gateway.execs.streams import Pace
from gateway.idempotency import Idempotency, IdempotencyRecord, Key
from gateway.limits.budget import Budget, Share
from gateway.runtime import ExecSpec, Process
from gateway.settings import Settings
from gateway.storage.store import StoreFailed

log = logging.getLogger(__name__)

WINDOW: Final = 256 << 10  # bytes that a reader may lag behind before its command is slowed down
PATIENCE: Final = 1.0  # seconds that a viewer which does not read holds up a command that others read
LAG: Final = 8 << 20  # bytes of each output kept for a reader that has stalled
STDIN_BUFFER: Final = (
    4 << 20
)  # bytes of input in memory for a command that does not read; the clients' window
STDIN_SPOOL: Final = (
    64 << 20
)  # bytes of further input on disk for one command: a client that ignores its window

SHORT: Final = 200  # characters of a command in events and records
_UNNOTED: Final = 0.01  # seconds; the same delay as the event journal's


@dataclass(frozen=True, slots=True)
class RecordedExec:
    """A command of an earlier process, without its output: how it ended, or that it was `lost`."""

    tenant: str
    exec_id: str
    spec: ExecSpec
    process: EndedProcess
    asked: bytes
    ended: ExecEnd
    lost: bool
    age: float  # seconds since it was recorded


class Notes:
    """Records of commands in the idempotency store. A failed write is only logged."""

    def __init__(self, idempotency: Idempotency) -> None:
        self._idempotency = idempotency

    async def earlier(self) -> Iterator[RecordedExec]:
        """Return the recorded commands of earlier processes, of each tenant the oldest first."""
        return (_earlier(key, record) for key, record in await self._idempotency.earlier("exec"))

    async def start(self, exec_: Exec, once: bool) -> None:
        """Record that a command runs, so that the next process can report it as lost.

        For a command without a caller's id the write is delayed briefly, so as not to delay its first byte;
        if it ends before that, nothing is recorded.
        """
        if not once:
            await asyncio.sleep(_UNNOTED)
            if exec_.ended.done():
                return
        try:
            await self._idempotency.note(_key(exec_), exec_.asked, orjson.dumps(_facts(exec_)))
        except StoreFailed as failed:
            log.warning("exec %s will be unknown after a restart: %s", exec_.id, failed.message)

    async def end(self, exec_: Exec) -> None:
        """Record how a command with a caller's id ended."""
        told = {**_facts(exec_), "exit": exec_.over.on_wire(exec_.id)}
        try:
            await self._idempotency.finish(_key(exec_), exec_.asked, orjson.dumps(told))
        except StoreFailed as failed:
            log.error("the end of exec %s will be unknown after a restart: %s", exec_.id, failed.message)

    async def forget(self, exec_: Exec) -> None:
        """Delete the record of an ended command that has no caller's id."""
        try:
            await self._idempotency.forget(_key(exec_))
        except StoreFailed as failed:
            log.warning("exec %s will be reported as lost after a restart: %s", exec_.id, failed.message)


def _earlier(key: Key, record: IdempotencyRecord) -> RecordedExec:
    tenant, _, exec_id = key
    told: Mapping[str, Any] = {} if record.result is None else orjson.loads(record.result)
    process = EndedProcess(told.get("pid", 0), told.get("startedAt", record.at))
    words = tuple(told.get("argv") or [told.get("command", "")])  # older records have only the command line
    # a command that ran when its gateway was killed counts as running until now
    ran = max(0, int((time.time() - process.started_at) * 1000))
    exit_ = told.get("exit") or {
        "reason": "lost",
        "durationMs": ran,
        "offsets": {"stdout": 0, "stderr": 0},
    }
    ended = ended_of(exit_)
    lost, age = record.state == "begun", time.time() - record.at
    return RecordedExec(tenant, exec_id, ExecSpec(words), process, record.digest, ended, lost, age)


def _key(exec_: Exec) -> Key:
    return exec_.tenant, "exec", exec_.id


def _facts(exec_: Exec) -> dict[str, Any]:
    """Return what the next process must know of a command, except its end."""
    process = exec_.process
    words = shortened(exec_.spec, SHORT)
    return {"pid": process.pid, "startedAt": process.started_at, "argv": words}


class EndedExecs:
    """Ended commands of all tenants. `forgotten` is called with each command that is dropped."""

    def __init__(self, settings: Settings, forgotten: Callable[[Exec], None]) -> None:
        self._settings = settings
        self._forgotten = forgotten
        self._of: dict[str, dict[str, Exec]] = {}  # per tenant, oldest end first
        self._whole: dict[str, dict[Exec, int]] = {}  # those kept with their output: bytes
        self._held = 0  # their sum
        self._looks: set[asyncio.Task[None]] = set()

    def add(self, exec_: Exec) -> None:
        """Keep an ended command for a while; above the limits, drop the oldest commands' output first.

        A command with processes still running is kept until they end, so that they can be listed and killed,
        unless there are too many of these as well.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        exec_.keeping = loop.call_later(settings.exec_keep, self._forget_in_time, exec_)
        of_tenant = self._of.setdefault(exec_.tenant, {})
        of_tenant[exec_.id] = exec_
        whole = self._whole.setdefault(exec_.tenant, {})
        whole[exec_] = exec_.kept_bytes
        self._held += exec_.kept_bytes
        for other in [*whole][: max(0, len(whole) - settings.exec_keep_count)]:
            self._shed(other)
        while self._held > settings.exec_keep_bytes:
            most = max(self._whole.values(), key=lambda of_one: sum(of_one.values()))
            self._shed(next(iter(most)))
        if len(of_tenant) > settings.exec_keep_exits:
            first = sorted(of_tenant.values(), key=lambda other: other.tree.lasting)
            for other in first[: len(first) - settings.exec_keep_exits]:
                self.forget(other)

    def make_room(self, tenant: str, share: Share, size: int) -> bool:
        """Return whether a tenant's share has room, for which its ended commands' output gives way.

        The oldest goes first, but none that is being read: its readers keep it in memory. A running command
        needs the room more: without it, it may be lost.
        """
        if share.full(size) is None:
            return True
        for exec_ in [*self._whole.get(tenant, {})]:
            if exec_.streams.kept and not exec_.readers:
                self._shed(exec_)
                if share.full(size) is None:
                    return True
        return False

    def _shed(self, exec_: Exec) -> None:
        self._forget_output(exec_)
        exec_.shed(shortened(exec_.spec, SHORT))

    def _forget_output(self, exec_: Exec) -> None:
        whole = self._whole.get(exec_.tenant, {})
        self._held -= whole.pop(exec_, 0)
        if not whole:
            self._whole.pop(exec_.tenant, None)

    def _forget_in_time(self, exec_: Exec) -> None:
        if exec_.tree.lasting:
            task = asyncio.create_task(self._forget_unless_it_lasts(exec_), name=f"look at {exec_.id}")
            self._looks.add(task)
            task.add_done_callback(self._looks.discard)
        else:
            self.forget(exec_)

    async def _forget_unless_it_lasts(self, exec_: Exec) -> None:
        await exec_.tree.look()
        if exec_.tree.lasting:
            loop = asyncio.get_running_loop()
            exec_.keeping = loop.call_later(self._settings.exec_keep, self._forget_in_time, exec_)
        else:
            self.forget(exec_)

    def forget(self, exec_: Exec) -> None:
        """Drop a command."""
        if exec_.keeping is not None:
            exec_.keeping.cancel()  # a pending timer would keep the command and all its output alive
        self._forget_output(exec_)
        exec_.let_go()
        exec_.streams.release()
        of_tenant = self._of.get(exec_.tenant, {})
        if of_tenant.get(exec_.id) is exec_:
            del of_tenant[exec_.id]
            if not of_tenant:
                del self._of[exec_.tenant]
        self._forgotten(exec_)

    async def close(self) -> None:
        """Cancel all pending checks."""
        for task in self._looks:
            task.cancel()
        await asyncio.gather(*self._looks, return_exceptions=True)


_LATEST: Final = 4096  # events; one that a kill separated from the record of its command is among the last


class ExecRunner:
    """Runs commands to their ends, after which they are `kept`."""

    def __init__(self, notes: Notes, kept: EndedExecs, bus: Bus, settings: Settings) -> None:
        self._notes, self._kept, self._bus, self._settings = notes, kept, bus, settings
        self._budget = Budget(settings.exec_bytes, settings.exec_tenant_bytes)
        self._spools = Spools(settings.state_dir, STDIN_SPOOL, settings.exec_stdin_spools)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        """Bytes of command output and input in memory, for all tenants."""
        return self._budget.held

    @property
    def resting(self) -> bool:
        """Whether no command runs, and the ends of all are reported."""
        return not self._tasks

    async def leave(self, left: Collection[str]) -> None:
        """Stop running the commands with these ids here: the next process does."""
        tasks = [task for task in self._tasks if task.get_name().removeprefix("exec ") in left]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Wait a while for killed commands to end, and abandon the others."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._settings.cancel_timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def make(self, exec_id: str, tenant: str, spec: ExecSpec, process: Process, linger: float | None) -> Exec:
        """Return a command by its process, which nobody reads yet."""
        settings, share = self._settings, self._budget.tenant(tenant)
        return Exec(
            exec_id,
            tenant,
            spec,
            process,
            tail=settings.exec_tail,
            pace=Pace(
                window=WINDOW,
                patience=PATIENCE,
                lag=LAG,
                unacked=settings.exec_unacked,
            ),
            stdin_buffer=STDIN_BUFFER,
            spools=self._spools,
            share=share,
            room=partial(self._kept.make_room, tenant, share),
            linger=settings.exec_linger if linger is None else linger,
            grace=settings.cancel_grace,
            kill_left=settings.exec_left == "kill",
        )

    def publish_start(self, exec_: Exec, by: str) -> None:
        """Report that a command has started."""
        facts = {"exec": exec_.id, "pid": exec_.process.pid, "command": _short(exec_.spec), "by": by}
        self._bus.publish("exec.started", exec_.tenant, facts)

    def publish_end(self, exec_: Exec) -> Event:
        """Report how a command ended."""
        return self._bus.publish("exec.exited", exec_.tenant, exec_.over.on_wire(exec_.id))

    def run(self, exec_: Exec) -> None:
        """Run a command in its own task, independent of the call that started it."""
        self._begin(self._run(exec_), f"exec {exec_.id}")

    async def told(self) -> Mapping[tuple[str | None, str], float]:
        """Return of which commands, by tenant and id, the latest events tell the end, and when they did."""
        return {
            (event.tenant, event.data["exec"]): event.time
            for event in await self._bus.latest(_LATEST, "exec.exited")
        }

    def report(self, exec_: Exec, *, told: bool, keep: bool) -> None:
        """Report the end of an earlier process's command unless it was `told`; then `keep` or forget it."""
        event = None if told else self.publish_end(exec_)
        self._begin(self._reported(exec_, event, keep), f"end {exec_.id}")

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reported(self, exec_: Exec, event: Event | None, keep: bool) -> None:
        if event is not None:
            await self._bus.recorded(event)
        await (self._notes.end(exec_) if keep else self._notes.forget(exec_))

    async def _run(self, exec_: Exec) -> None:
        timer = None
        noting = asyncio.create_task(self._notes.start(exec_, exec_.once), name=f"note {exec_.id}")
        if exec_.deadline is not None:
            left = max(0.0, exec_.deadline - time.time())
            loop = asyncio.get_running_loop()
            timer = loop.call_later(left, exec_.end, "timeout", self._settings.cancel_grace)
        try:
            await exec_.run()
        finally:
            if timer is not None:
                timer.cancel()
            if exec_.left:
                noting.cancel()
            else:
                await self._ended(exec_, noting)

    async def _ended(self, exec_: Exec, noting: asyncio.Task[None]) -> None:
        """Report how a command ended, and keep it for a while."""
        try:
            if exec_.once:
                await self._notes.end(exec_)  # before the end is reported to anybody
        finally:
            exec_.tell_end()
        ended = exec_.ended.result()
        self._kept.add(exec_)
        event = self.publish_end(exec_)
        log.info(
            "exec %s of %s: %s, code %s, %d ms, %s bytes",
            exec_.id,
            exec_.tenant,
            ended.reason,
            ended.code,
            ended.duration_ms,
            sum(ended.offsets.values()),
        )
        await noting
        if not exec_.once:
            await self._bus.recorded(event)  # or the next process would not know that it has to report it
            await self._notes.forget(exec_)


def _short(spec: ExecSpec) -> str:
    line = " ".join(spec.shown or spec.argv)
    return line if len(line) <= SHORT else line[: SHORT - 1] + "…"
