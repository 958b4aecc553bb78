"""Adopts the commands of earlier processes: those that still run, and the recorded ends of the others."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from gateway.errors import GatewayError
from gateway.execs.ended import Past
from gateway.execs.exec import Exec
from gateway.execs.kept import Kept
from gateway.execs.notes import Earlier, Notes
from gateway.execs.runner import Runner
from gateway.idempotency import Idempotency, Key
from gateway.runtime import Adopted, Commands, ExecSpec, Pty
from gateway.settings import Settings

log = logging.getLogger(__name__)


class Adoption:
    """Adopts commands once, before anything else is done with any. `add` registers each."""

    def __init__(
        self,
        commands: Commands,
        notes: Notes,
        idempotency: Idempotency,
        runner: Runner,
        kept: Kept,
        settings: Settings,
        add: Callable[[Exec], None],
    ) -> None:
        self._commands, self._notes, self._idempotency = commands, notes, idempotency
        self._runner, self._kept, self._settings = runner, kept, settings
        self._add = add
        self._adopted: set[tuple[str, str]] = set()  # tenants and ids
        self._told: Mapping[tuple[str | None, str], float] | None = None  # see `Runner.told`

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

    def _restored(self, earlier: Earlier) -> Exec | None:
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

    async def _adopt(self, found: Adopted, recorded: Mapping[tuple[str, str], Earlier]) -> None:
        """Continue a command of an earlier process, or keep it if it has ended."""
        facts = found.facts
        if not found.begun:
            await self._forget_begin(facts)
            found.holding.drop()
            return
        exec_id, tenant = str(facts["id"]), str(facts["tenant"])
        pty = None if facts["pty"] is None else Pty(*facts["pty"])
        spec = ExecSpec(tuple(facts["argv"]), pty=pty, stdin=facts["stdin"], work=facts.get("work", "client"))
        process = found.process or Past(found.pid, found.started_at, tuple(found.outputs), found.report)
        exec_ = self._runner.make(exec_id, tenant, spec, process, facts["linger"])
        exec_.take_over(found, self._settings.exec_hold)
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
