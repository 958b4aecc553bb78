"""Makes commands, runs each in a task of its own, and reports how it starts and ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from gateway.events import Bus, Event
from gateway.execs.exec import Exec
from gateway.execs.input import Spools
from gateway.execs.kept import Kept
from gateway.execs.notes import SHORT, Notes
from gateway.execs.streams import Pace
from gateway.limits.budget import Budget
from gateway.runtime import ExecSpec, Process
from gateway.settings import Settings

log = logging.getLogger(__name__)

_LATEST: Final = 4096  # events; one that a kill separated from the record of its command is among the last


class Runner:
    """Runs commands to their ends, after which they are `kept`."""

    def __init__(self, notes: Notes, kept: Kept, bus: Bus, settings: Settings) -> None:
        self._notes, self._kept, self._bus, self._settings = notes, kept, bus, settings
        self._budget = Budget(settings.exec_bytes, settings.exec_tenant_bytes)
        self._spools = Spools(settings.state_dir, settings.exec_stdin_spool, settings.exec_stdin_spools)
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
                window=settings.exec_window,
                patience=settings.exec_patience,
                lag=settings.exec_lag,
                unacked=settings.exec_unacked,
            ),
            stdin_buffer=settings.exec_stdin_buffer,
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
