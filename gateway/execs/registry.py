"""The registry of all tenants' commands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

from gateway.admission import Admission, Reservation
from gateway.errors import Cancelled, Conflict, GatewayError, Gone, NotFound, TenantNotRunning
from gateway.events import Bus
from gateway.execs.ended import EndedProcess
from gateway.execs.exec import Exec, listed
from gateway.execs.runner import EndedExecs, ExecRunner, Notes, RecordedExec
from gateway.idempotency import Idempotency, Key
from gateway.runtime import Adopted, Commands, ExecSpec, Holding, KillResult, Process, Pty
from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class Starting:
    """A command that is being started; see `Execs.start`. `deadline` is in seconds since the epoch."""

    exec_id: str
    tenant: str
    spec: ExecSpec
    deadline: float | None
    linger: float
    by: str
    once: bool
    purpose: Mapping[str, Any] | None
    before: Callable[[], Awaitable[None]] | None

    async def note(self, holding: Holding | None) -> None:
        """Record the command, before anything of it has happened.

        What is held comes first, so that of whatever `before` recorded the next process can tell whether it
        has begun.
        """
        if holding is not None:
            self._note(holding)
        if self.before is not None:
            await self.before()

    def _note(self, holding: Holding) -> None:
        if self.purpose is not None:
            holding.note_purpose(self.purpose)
        holding.note(
            {
                "starting": {"by": self.by},
                **{"id": self.exec_id, "tenant": self.tenant},
                "argv": listed(self.spec),
                "asked": self.spec.digest().hex(),
                "pty": None if self.spec.pty is None else [self.spec.pty.cols, self.spec.pty.rows],
                **{"stdin": self.spec.stdin, "work": self.spec.work},
                **{"linger": self.linger, "lingers": None},
                **{"deadline": self.deadline, "once": self.once},
                **{"ending": None, "owed": None, "places": [], "over": None},
            }
        )


log = logging.getLogger(__name__)


class Adoption:
    """Adopts commands once, before anything else is done with any. `add` registers each."""

    def __init__(
        self,
        commands: Commands,
        notes: Notes,
        idempotency: Idempotency,
        runner: ExecRunner,
        kept: EndedExecs,
        settings: Settings,
        add: Callable[[Exec], None],
    ) -> None:
        self._commands, self._notes, self._idempotency = commands, notes, idempotency
        self._runner, self._kept, self._settings = runner, kept, settings
        self._add = add
        self._adopted: set[tuple[str, str]] = set()  # tenants and ids
        self._told: Mapping[tuple[str | None, str], float] | None = None  # see `ExecRunner.told`

    async def run(self) -> None:
        """Adopt the held commands of earlier processes, and load the recorded ends of the others.

        Recorded commands that were still running and not held are reported as lost.
        """
        recorded = {(one.tenant, one.exec_id): one for one in await self._notes.earlier()}
        adopted = await self._commands.adopt()
        held = {(str(found.facts.get("tenant")), str(found.facts.get("id"))) for found in adopted}
        # those on record alone first: they have no output, and above a limit what was kept first goes first
        lost = [self._restored(one) for name, one in recorded.items() if name not in held]
        for found in adopted:
            try:
                await self._adopt(found, recorded)
            except Exception as error:  # a broken record must not keep the others from being adopted
                log.warning("cannot continue a command of an earlier process: %r", error)
                await _let_go(found)
        lost += [self._restored(recorded[name]) for name in recorded.keys() & held - self._adopted]
        for exec_ in filter(None, lost):
            await self._report(exec_, keep=True)

    def _restored(self, earlier: RecordedExec) -> Exec | None:
        """Keep the recorded end of a command; return the command if it is lost, since its end is missing."""
        key: Key = (earlier.tenant, "exec", earlier.exec_id)
        if earlier.lost and not self._idempotency.begun(key, earlier.asked):
            return None  # it never began, and may be started under that id
        exec_ = self._runner.make(earlier.exec_id, earlier.tenant, earlier.spec, earlier.process, None)
        exec_.ended_before(earlier.asked, earlier.ended)
        if earlier.lost or earlier.age < self._settings.exec_keep:
            self._add(exec_)
            self._kept.add(exec_)
        return exec_ if earlier.lost else None

    async def _adopt(self, found: Adopted, recorded: Mapping[tuple[str, str], RecordedExec]) -> None:
        """Continue a command of an earlier process, or keep it if it has ended."""
        facts = found.facts
        if not found.begun:
            await self._forget_begin(facts)
            found.holding.drop()
            return
        exec_id, tenant = str(facts["id"]), str(facts["tenant"])
        pty = None if facts["pty"] is None else Pty(*facts["pty"])
        spec = ExecSpec(tuple(facts["argv"]), pty=pty, stdin=facts["stdin"], work=facts.get("work", "client"))
        process = found.process or EndedProcess(
            found.pid, found.started_at, tuple(found.outputs), found.report
        )
        exec_ = self._runner.make(exec_id, tenant, spec, process, facts["linger"])
        exec_.take_over(found)
        self._add(exec_)
        self._adopted.add((tenant, exec_id))
        if found.process is not None:
            self._runner.run(exec_)
            if starting := facts.get("starting"):
                self._runner.publish_start(exec_, str(starting["by"]))
            return
        self._kept.add(exec_)
        record = recorded.get((tenant, exec_id))
        if record is not None and record.lost:  # it ended without an event
            await self._report(exec_, keep=exec_.once)

    async def _report(self, exec_: Exec, *, keep: bool) -> None:
        """Report an end that was not noted as told, unless a kill came between its event and the note."""
        if self._told is None:
            self._told = await self._runner.told()
        at = self._told.get((exec_.tenant, exec_.id), 0.0)
        # an earlier command may have had the same id
        self._runner.report(exec_, told=at >= exec_.process.started_at, keep=keep)

    async def _forget_begin(self, facts: Mapping[str, Any]) -> None:
        """Forget that a command, or the call that it is for, was recorded as begun: it may be made again."""
        tenant, asked = str(facts["tenant"]), bytes.fromhex(facts["asked"])
        begun: list[tuple[Key, bytes]] = [((tenant, "exec", str(facts["id"])), asked)]
        if (call := facts["purpose"].get("call")) is not None:
            begun.append(((tenant, "call", str(call["id"])), bytes.fromhex(call["digest"])))
        for key, digest in begun:
            if self._idempotency.begun(key, digest):
                await self._idempotency.forget(key)


async def _let_go(found: Adopted) -> None:
    """Kill an adopted command that cannot be continued."""
    if found.process is not None:
        with contextlib.suppress(GatewayError, TimeoutError):
            await found.process.kill(0)
        await found.process.aclose()
    found.holding.drop()


class Execs:
    """All commands of this gateway. An async context manager; leaving it kills every command."""

    def __init__(self, commands: Commands, bus: Bus, idempotency: Idempotency, settings: Settings) -> None:
        self._commands = commands
        self._idempotency = idempotency
        self._notes = Notes(idempotency)
        self._bus = bus
        self._settings = settings
        self._slots = Admission[str]("running commands", each=settings.max_execs, hint="end one first")
        self._execs: dict[str, dict[str, Exec]] = {}
        self._starting: dict[tuple[str, str], asyncio.Future[Exec]] = {}
        self._kept = EndedExecs(settings, self._forgotten)
        self._runner = ExecRunner(self._notes, self._kept, bus, settings)

    async def __aenter__(self) -> Execs:
        """Adopt the held commands of earlier processes, and load the recorded ends of the others.

        Recorded commands that were still running and not held are reported as lost.
        """
        adoption = Adoption(
            *(self._commands, self._notes, self._idempotency, self._runner, self._kept),
            *(self._settings, self._add),
        )
        await adoption.run()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end_all()

    @property
    def held(self) -> int:
        """Bytes of command output and input in memory, for all tenants."""
        return self._runner.held

    @property
    def running(self) -> int:
        """Number of running commands of all tenants."""
        return sum(exec_.state == "running" for execs in self._execs.values() for exec_ in execs.values())

    def running_in(self, tenant: str) -> int:
        """Return how many commands of a tenant are running or being started, the gateway's own included."""
        return self._slots.of(tenant)

    async def start(
        self,
        tenant: str,
        spec: ExecSpec,
        *,
        exec_id: str | None = None,
        timeout: float | None = None,
        linger: float | None = None,
        by: str = "",
        once: bool = False,
        outlive: bool = False,
        purpose: Mapping[str, Any] | None = None,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> Exec:
        """Start a command, or return the one already started under `exec_id`.

        `once`: the id is the caller's own and stays valid across a restart of the gateway. `outlive`: the
        command itself survives a restart, if there is a holder; with a `purpose` too, see `left_behind`.
        `before` is awaited before anything of the command has happened. Raises `Conflict` if the id belongs
        to a different command, `RateLimited` if the tenant runs too many, and what the runtime raises if the
        command cannot start.
        """
        known = exec_id or f"x-{secrets.token_hex(8)}"
        found = await self._known(tenant, known)
        if found is None and once:
            if await self._idempotency.result((tenant, "exec", known), spec.digest()) is not None:
                raise Gone(f"exec {known} ended and is no longer kept; use a new id", exec=known)
            found = await self._known(tenant, known)  # another call may have started it meanwhile
        if found is not None:
            if found.asked != spec.digest():
                raise Conflict(f"exec {known} was started with another command", exec=known)
            return found
        slot = self._slots.reserve(tenant)
        promise: asyncio.Future[Exec] = asyncio.get_running_loop().create_future()
        self._starting[tenant, known] = promise
        try:
            try:
                if once:
                    before = partial(self._idempotency.begin, (tenant, "exec", known), spec.digest())
                deadline = None if timeout is None else time.time() + timeout
                stays = self._settings.exec_linger if linger is None else linger
                asked = replace(spec, outlive=outlive or purpose is not None)
                starting = Starting(known, tenant, asked, deadline, stays, by, once, purpose, before)
                exec_ = await self._start(starting, slot)
            except BaseException:
                slot.release()
                if once:  # nothing was started, so the id may be used again
                    await asyncio.shield(self._idempotency.forget((tenant, "exec", known)))
                raise
        except BaseException as error:
            # only this caller was cancelled; others wait for the same start
            gone = isinstance(error, asyncio.CancelledError)
            promise.set_exception(Cancelled("the first caller cancelled the start") if gone else error)
            promise.exception()  # mark as retrieved, or asyncio logs it
            raise
        else:
            promise.set_result(exec_)
            return exec_
        finally:
            del self._starting[tenant, known]

    async def _known(self, tenant: str, exec_id: str) -> Exec | None:
        """Return the command started under an id, waiting if it is being started."""
        starting = self._starting.get((tenant, exec_id))
        if starting is not None:
            return await asyncio.shield(starting)
        return self._execs.get(tenant, {}).get(exec_id)

    async def fence(self, tenant: str, exec_id: str) -> Exec | None:
        """Return the command with this id; if there is none, bar the id from being used for a start."""
        with contextlib.suppress(GatewayError):  # a command whose start failed does not exist either
            if (found := await self._known(tenant, exec_id)) is not None:
                return found
        await self._idempotency.fence((tenant, "exec", exec_id))
        return None

    @contextlib.asynccontextmanager
    async def script(self, tenant: str, spec: ExecSpec, *, always: bool = False) -> AsyncIterator[Process]:
        """Run a command of the gateway's own, and kill its whole tree if the context ends with an exception.

        It counts among the tenant's commands; with `always` beyond their limit, too, for what must not be
        lost. Raises `RateLimited`.
        """
        with self._slots.hold(tenant) if always else self._slots.reserve(tenant):
            process = await self._commands.exec(tenant, spec)
            try:
                yield process
            except BaseException:
                with contextlib.suppress(GatewayError, TimeoutError):
                    await asyncio.shield(process.kill(0))
                raise
            finally:
                await asyncio.shield(process.aclose())

    async def _start(self, asked: Starting, slot: Reservation[str]) -> Exec:
        process = await self._commands.exec(asked.tenant, replace(asked.spec, before=asked.note))
        exec_ = self._runner.make(asked.exec_id, asked.tenant, asked.spec, process, asked.linger)
        self._add(exec_, slot)
        exec_.once, exec_.deadline = asked.once, asked.deadline
        # most callers attach at once, which records it; until then `Starting`'s facts are enough
        asyncio.get_running_loop().call_soon(exec_.note_unattached)
        self._runner.run(exec_)
        try:
            self._runner.publish_start(exec_, asked.by)
        except BaseException:
            exec_.end("cancelled", 0)
            raise
        return exec_

    def get(self, tenant: str, exec_id: str) -> Exec:
        """Return a command that runs or has ended recently. Raises `NotFound`."""
        try:
            return self._execs[tenant][exec_id]
        except KeyError:
            raise NotFound(f"no exec {exec_id}; it ended long ago or never existed", exec=exec_id) from None

    def list(self, tenant: str) -> list[Exec]:
        return list(self._execs.get(tenant, {}).values())

    def left_behind(self) -> Sequence[Exec]:
        """Return the commands of an earlier process that were started for a purpose.

        Each waits for its reader, `Exec.reader`, from what is kept of its outputs on.
        """
        everyone = (exec_ for execs in self._execs.values() for exec_ in execs.values())
        return [exec_ for exec_ in everyone if exec_.reader is not None]

    async def cancel(self, exec_: Exec, grace: float | None = None) -> KillResult:
        """Kill a command's whole process tree and return once it is gone."""
        grace = self._settings.cancel_grace if grace is None else grace
        ran = exec_.state == "running"
        began = exec_.end("cancelled", grace)
        killed = await exec_.cancel(grace)
        if exec_.slot is not None:
            exec_.slot.release()  # its exit may be known a moment later
        if not began or (not ran and not killed.killed):
            return killed  # another call reports this kill, or there was nothing to kill
        data = {"exec": exec_.id, "killed": killed.killed, "escalated": killed.escalated}
        self._bus.publish("exec.cancelled", exec_.tenant, {**data, "survivors": killed.survivors})
        return killed

    async def lose(self, tenant: str, cause: str, seconds: float) -> None:
        """End all of a tenant's commands as lost, and wait a while for their ends to be recorded."""
        running = [exec_ for exec_ in self.list(tenant) if not exec_.ended.done()]
        for exec_ in running:
            exec_.lose(cause)
        if running:
            await asyncio.wait([exec_.ended for exec_ in running], timeout=seconds)

    async def leave(self) -> None:
        """Hand the held commands to the next gateway process untouched."""
        everyone = (exec_ for execs in self._execs.values() for exec_ in execs.values())
        await self._runner.leave({exec_.id for exec_ in everyone if exec_.leave()})

    async def end_all(self) -> None:
        """Kill all commands and all processes left by ended ones, except commands handed over by `leave`."""
        everyone = [exec_ for execs in self._execs.values() for exec_ in execs.values()]
        running = [exec_ for exec_ in everyone if exec_.may_run and not exec_.left]
        kills = [exec_.cancel(self._settings.cancel_grace) for exec_ in running]
        for failure in await asyncio.gather(*kills, return_exceptions=True):
            # if its container is gone or stopped, the command has ended
            if isinstance(failure, BaseException) and not isinstance(failure, (NotFound, TenantNotRunning)):
                log.warning("cannot end a command: %s", failure)
        await self._runner.close()
        await self._kept.close()

    def _add(self, exec_: Exec, slot: Reservation[str] | None = None) -> None:
        """Keep a command, which has a slot until its end; one of an earlier process gets one in any case."""
        self._execs.setdefault(exec_.tenant, {})[exec_.id] = exec_
        if not exec_.ended.done():
            exec_.slot = held = self._slots.hold(exec_.tenant) if slot is None else slot
            exec_.ended.add_done_callback(lambda _: held.release())

    def _forgotten(self, exec_: Exec) -> None:
        of_tenant = self._execs.get(exec_.tenant, {})
        if of_tenant.get(exec_.id) is exec_:
            del of_tenant[exec_.id]
            if not of_tenant:
                del self._execs[exec_.tenant]

    def forget_tenant(self, tenant: str) -> None:
        """Forget the ended commands of an earlier tenant of this name, which a new one must not see."""
        for exec_ in self.list(tenant):
            if exec_.ended.done():
                self._kept.forget(exec_)
