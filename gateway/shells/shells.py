"""Runs the tools Bash, BashOutput and KillShell.

`gateway.tools.shell` has their semantics and texts, `gateway.execs` runs the commands, and the tenant's
worker writes output files.

A command in the foreground belongs to its call: if the call ends early, its whole process tree is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import orjson

from gateway.admission import Admission, Reservation
from gateway.errors import (
    ExecFailed,
    GatewayError,
    InvalidParams,
    NotFound,
    RateLimited,
    TooLarge,
    Unavailable,
)
from gateway.execs import Exec, Execs
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import ExecSpec, KillResult
from gateway.settings import Settings
from gateway.shells.shell_command import BashCommand, BashRecord, OutputFile, mark, parsed
from gateway.tools import shell
from gateway.tools.call import ToolAnswer, ToolFailure, failure
from gateway.tools.schemas import checked
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import EncodedResult, LastingCall

log = logging.getLogger(__name__)

_BRIEF: Final = 1.0  # seconds to answer the calls that end with this process


@dataclass(slots=True)
class AdoptedBash:
    """A Bash command of an earlier process; see `gateway.tools.toolbox`. `shell` is set once it continues."""

    exec_: Exec
    record: BashRecord
    shell: BashCommand | None = None

    @property
    def tenant(self) -> str:
        return self.exec_.tenant

    @property
    def exec_id(self) -> str:
        return self.exec_.id

    @property
    def session(self) -> str | None:
        return self.record.session

    @property
    def cwd(self) -> str | None:
        return self.record.cwd

    @property
    def call(self) -> LastingCall | None:
        return self.record.call

    @property
    def in_front(self) -> bool:
        return self.record.phase == "front"


class BashCommands:
    """The commands of all tool sessions. A background command belongs to its session."""

    def __init__(self, execs: Execs, workers: Workers, settings: Settings) -> None:
        self.leaving = False
        self._execs = execs
        self._workers = workers
        self._settings = settings
        self._of: WeakKeyDictionary[ToolSession, dict[str, BashCommand]] = WeakKeyDictionary()
        self._slots = Admission[ToolSession](
            "commands in the background",
            each=settings.max_shells,
            name="this session",
            hint="end one with KillShell first",
        )
        self._all: set[asyncio.Task[None]] = set()
        self._live: set[BashCommand] = set()  # whose output has not been copied completely

    async def close(self) -> None:
        """End every command except those left to the next process."""
        for session in list(self._of):
            await self.end_all(session)
        for task in self._all:
            task.cancel()
        await asyncio.gather(*self._all, return_exceptions=True)

    async def start(
        self,
        root: FilesystemRoot,
        record: BashRecord,
        command: str,
        exec_id: str,
        by: str,
        begin: Callable[[], Awaitable[None]] | None,
    ) -> BashCommand:
        """Start a command, after `begin`. Raises `ToolFailure`, and what `Execs.start` raises."""
        shown, cwd = ("bash", "-c", command), record.cwd
        if record.phase == "background":
            spec = ExecSpec(("/bin/bash", "-c", command), cwd=cwd, shown=shown, work="tool")
        else:
            argv = ("/bin/bash", "-c", shell.SCRIPT, "bash", command)
            spec = ExecSpec(argv, cwd=cwd, merged=True, shown=shown, work="tool")
        purpose = record.facts() if record.lasting else None
        try:
            exec_ = await self._execs.start(
                root.tenant, spec, exec_id=exec_id, by=by, purpose=purpose, before=begin
            )
        except (TooLarge, InvalidParams) as error:
            raise failure("Bash", error) from None
        return self._made(root, record, command, exec_)

    def _made(self, root: FilesystemRoot, record: BashRecord, command: str, exec_: Exec) -> BashCommand:
        file = OutputFile(self._workers, root, f"{record.shell}.txt", self._settings)
        one = BashCommand(record, command, exec_, file, self._settings.bash_printed_max)
        self._all.add(one.task)
        self._live.add(one)
        one.task.add_done_callback(self._all.discard)
        one.task.add_done_callback(lambda _: self._live.discard(one))
        return one

    def busy(self, session: ToolSession) -> bool:
        """Return whether a command of a session is running."""
        return any(not one.task.done() for one in self._of.get(session, {}).values())

    async def end_all(self, session: ToolSession) -> None:
        """End every command of a session and forget them; return when their process trees are gone.

        A command that is in the foreground at that moment can no longer be moved to the background.
        """
        session.ended = True
        shells = [one for one in self._of.pop(session, {}).values() if not one.left]
        await asyncio.gather(*(self.end(one) for one in shells if not one.task.done()))
        for one in shells:
            self.drop(one)

    async def end(self, one: BashCommand) -> None:
        """End a command's process tree and wait until its output is copied."""
        try:
            await self.cancel(one)
        except (GatewayError, TimeoutError) as error:
            log.warning("cannot end shell %s of %s: %s", one.id, one.tenant, error)
        await asyncio.wait([one.task], timeout=self._settings.cancel_timeout)

    def drop(self, one: BashCommand) -> None:
        """Keep nothing of a command for the next process, if it has ended."""
        with contextlib.suppress(NotFound):
            exec_ = self._execs.get(one.tenant, one.exec_id)
            if exec_.ended.done() and not self.leaving:
                exec_.let_go()

    async def cancel(self, one: BashCommand) -> KillResult:
        return await self._execs.cancel(self._execs.get(one.tenant, one.exec_id))

    def make_room(self, session: ToolSession) -> Reservation[ToolSession]:
        """Take a place among the session's running shells, and forget ended ones. Raises `ToolFailure`."""
        if session.ended:
            raise ToolFailure("gone", "This tool session has ended; open a new one.")
        if session.lifetime == "call":
            raise ToolFailure(
                "conflict",
                "Commands in the background need a tool session that outlives this call: "
                "name one with X-Tool-Session, or use a websocket.",
            )
        shells = self._of.setdefault(session, {})
        try:
            slot = self._slots.reserve(session)
        except RateLimited as error:
            raise failure("Bash", error) from None
        for one in [one for one in shells.values() if one.status != "running"]:
            if len(shells) < self._settings.shells_kept:
                break
            self.drop(shells.pop(one.id))
        return slot

    async def to_background(
        self, session: ToolSession, started: BashCommand, slot: Reservation[ToolSession] | None = None
    ) -> None:
        """Give a running command to its session, until its timeout. Raises `ToolFailure`."""
        if slot is None or session.ended:
            started.occupy(self.make_room(session))
        self._of.setdefault(session, {})[started.id] = started
        if started.record.phase == "front":
            started.record.phase = "moved"
        started.note()
        self._due(started)
        await self._saved(started)

    def _due(self, one: BashCommand) -> None:
        """End a background command at its timeout."""
        if not one.over.done():
            left, grace = max(0.0, one.record.until - time.time()), self._settings.cancel_grace
            exec_ = self._execs.get(one.tenant, one.exec_id)
            one.timer = asyncio.get_running_loop().call_later(left, exec_.end, "timeout", grace)

    async def _saved(self, one: BashCommand) -> None:
        await one.save()
        one.let_go()

    async def find(self, session: ToolSession, shell_id: str) -> BashCommand:
        """Return a shell of the session, with all its output if its command has ended."""
        one = self._of.get(session, {}).get(shell_id)
        if one is None:
            raise shell.unknown(shell_id)
        if one.over.done():
            await asyncio.wait([one.task])
        await one.caught_up()
        return one

    def has(self, session: ToolSession, one: BashCommand) -> bool:
        """Return whether a session has the command in the background."""
        return one.id in self._of.get(session, {})

    def forget(self, session: ToolSession, one: BashCommand) -> None:
        """Remove a command from its session's background."""
        self._of.get(session, {}).pop(one.id, None)

    # --- across a restart of the gateway ----------------------------------------------------------------

    def adopted(self) -> Iterator[AdoptedBash]:
        """Yield the commands of an earlier process. Each must be passed to `take_over` or `discard`."""
        for exec_ in self._execs.left_behind():
            try:
                if not exec_.purpose.held:
                    raise ValueError("too many others have ended since")
                record = parsed(exec_.purpose.found)
            except ValueError as error:
                log.warning("exec %s of %s cannot be continued: %s", exec_.id, exec_.tenant, error)
                self.discard(exec_)
            else:
                yield AdoptedBash(exec_, record)

    def discard(self, exec_: Exec) -> None:
        """End a command of an earlier process that nobody needs."""
        task = asyncio.create_task(self._discard(exec_), name=f"end {exec_.id}")
        self._all.add(task)
        task.add_done_callback(self._all.discard)

    async def _discard(self, exec_: Exec) -> None:
        if exec_.reader is not None:
            exec_.reader.close()
        if not exec_.ended.done():
            with contextlib.suppress(GatewayError, TimeoutError):
                await self._execs.cancel(exec_, 0)
        await asyncio.shield(exec_.ended)
        exec_.let_go()

    def take_over(self, root: FilesystemRoot, session: ToolSession, left: AdoptedBash) -> None:
        """Continue a command: in the foreground for the call that `resume` finishes, or in the background."""
        exec_, record = left.exec_, left.record
        words = exec_.spec.argv
        one = left.shell = self._made(root, record, words[2] if len(words) > 2 else "", exec_)
        one.file.take_over(record.file)
        if record.phase != "front":
            one.occupy(self._slots.hold(session))
            self._of.setdefault(session, {})[one.id] = one
            self._due(one)
            saving = asyncio.create_task(self._saved(one), name=f"file of {one.id}")
            self._all.add(saving)
            saving.add_done_callback(self._all.discard)

    async def leave(self) -> set[tuple[str, str]]:
        """Leave the held commands to the next process, and stop recording them.

        Returns the tenants and ids of the calls that the next process will answer. A foreground command whose
        call cannot be repeated is ended, so that the call is answered now.
        """
        self.leaving = True
        held, ending = [one for one in self._live if one.held], list[asyncio.Task[None]]()
        for one in held:
            if one.record.phase == "front" and one.record.call is None:
                ending.append(asyncio.create_task(self.end(one)))
                continue
            with contextlib.suppress(NotFound):
                one.left = self._execs.get(one.tenant, one.exec_id).leave()
        left = [one for one in held if one.left]
        for one in left:
            one.task.cancel()
        await asyncio.gather(*(one.task for one in left), return_exceptions=True)
        if ending:  # the next process ends what does not end in time
            await asyncio.wait(ending, timeout=_BRIEF)
        return {(one.tenant, one.record.call.id) for one in left if one.record.call is not None}


class Bash:
    """The calls of Bash in all tool sessions."""

    def __init__(self, commands: BashCommands, execs: Execs, settings: Settings) -> None:
        self._commands, self._execs, self._settings = commands, execs, settings
        self._telling: dict[
            str, BashCommand
        ] = {}  # by exec id: commands of calls whose result is not recorded yet

    async def run(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        given: Mapping[str, Any],
        exec_id: str,
        by: str,
        call: LastingCall | None,
        begin: Callable[[], Awaitable[None]] | None,
    ) -> ToolAnswer:
        """Run a command under `exec_id`, after `begin`; see `Shells.call`."""
        command: str = given["command"]
        background = bool(given.get("run_in_background"))
        seconds = self._seconds(given.get("timeout"), background)
        record = BashRecord(
            f"bash_{secrets.token_hex(4)}",
            session.name,
            session.cwd,
            "background" if background else "front",
            seconds,
            time.time() + seconds,
            shell.interpretation(command, 1),
            call,
        )
        with contextlib.ExitStack() as taken:
            slot = taken.enter_context(self._commands.make_room(session)) if background else None
            try:
                started = await self._commands.start(root, record, command, exec_id, by, begin)
            except ExecFailed as error:
                if error.facts.get("reason") != "cwd" or session.cwd is None:
                    raise failure("Bash", error) from None
                # the session's current folder is gone
                session.cwd = record.cwd = None
                record.notes = [_reset(root)]
                started = await self._commands.start(root, record, command, exec_id, by, begin)
            if slot is not None:
                started.occupy(slot)
                taken.pop_all()
        record.until = time.time() + seconds  # a busy tenant takes its time to start it
        self._telling[exec_id] = started
        try:
            if slot is not None:
                await self._commands.to_background(session, started, slot)
                return shell.begun(started.id, started.file.path, self._facts(root, session, started))
            return await self._foreground(root, session, started)
        except BaseException:
            await asyncio.shield(self._abandon(session, started))
            raise

    async def resume(self, root: FilesystemRoot, session: ToolSession, one: BashCommand) -> ToolAnswer:
        """Finish the call of a command that was taken over from an earlier process."""
        self._telling[one.exec_id] = one
        record = one.record
        try:
            if record.phase == "front":
                return await self._foreground(root, session, one)
            await one.caught_up()
            await one.save()
            facts = self._facts(root, session, one)
            if record.phase == "background":
                return shell.begun(one.id, one.file.path, facts)
            return self._moved(one, facts)
        except BaseException:
            await asyncio.shield(self._abandon(session, one))
            raise

    def answered(self, exec_id: str) -> None:
        """Note that a Bash call's result is recorded or not needed: the next process need not produce it."""
        one = self._telling.pop(exec_id, None)
        if one is None or one.left:
            return
        if one.record.phase == "front":
            self._commands.drop(one)
        else:
            one.record.call = None
            one.note()

    def _seconds(self, timeout: int | None, background: bool) -> float:
        """Return a command's timeout in seconds: the default for 0 and less, and never above the maximum."""
        settings = self._settings
        default = settings.bash_background_timeout if background else settings.bash_timeout
        most = settings.bash_background_timeout_max if background else settings.bash_timeout_max
        return min(most, default if timeout is None or timeout <= 0 else timeout / 1000)

    async def _foreground(
        self, root: FilesystemRoot, session: ToolSession, started: BashCommand
    ) -> ToolAnswer:
        record = started.record
        done, _ = await asyncio.wait([started.task], timeout=max(0.0, record.until - time.time()))
        if started.left:
            await asyncio.get_running_loop().create_future()  # the next process answers
        if done:
            return await self._finished(root, session, started)
        try:
            record.until = time.time() + self._settings.bash_background_timeout
            await self._commands.to_background(session, started)
        except ToolFailure:
            with contextlib.suppress(NotFound):  # it has been forgotten since it ended
                self._execs.get(started.tenant, started.exec_id).end("timeout", self._settings.cancel_grace)
            await self._commands.end(started)
            facts = self._facts(root, session, started)
            return shell.timed_out(started.printed(), record.seconds, facts)
        return self._moved(started, self._facts(root, session, started))

    def _moved(self, started: BashCommand, facts: Mapping[str, Any]) -> ToolAnswer:
        # BashOutput returns this again, so that its output is complete
        text, _, _ = started.unread["stdout"].look(final=False, lines=False)
        return shell.moved(text, started.id, started.file.path, started.record.seconds, facts)

    async def _finished(self, root: FilesystemRoot, session: ToolSession, started: BashCommand) -> ToolAnswer:
        await started.task
        notes = tuple(started.record.notes)
        ended = started.ended
        if ended is None or ended.code is None:
            why = {} if ended is None or ended.cause is None else {"reason": ended.cause}
            raise Unavailable(
                "the command's exit was lost: the tenant or Incus went away", exec=started.exec_id, **why
            )
        if ended.code == 0 and started.report:
            notes += self._moved_to(root, session, started.report)
        if started.flooded:
            notes += (shell.flooded(self._settings.bash_printed_max),)
        if shell.needs_file(started.printed()):
            await started.save()
        facts = self._facts(root, session, started)
        return shell.finished(started.record.meaning, started.printed(), ended.code, notes, facts)

    def _moved_to(self, root: FilesystemRoot, session: ToolSession, reported: bytes) -> tuple[str, ...]:
        """Make the folder in which a command ended the session's; return the note for the result."""
        try:
            path = _inside(root, reported.decode().removesuffix("\n"))
        except UnicodeDecodeError:
            path = "/"
        if path == root.workspace or path.startswith(root.workspace.rstrip("/") + "/"):
            session.cwd = None if path == root.workspace else path
            return ()
        session.cwd = None
        return (_reset(root),)

    def _facts(self, root: FilesystemRoot, session: ToolSession, started: BashCommand) -> dict[str, Any]:
        facts = {**started.facts(), "cwd": session.cwd or root.workspace}
        if self._commands.has(session, started):
            facts["shellId"] = started.id
        return facts

    async def _abandon(self, session: ToolSession, started: BashCommand) -> None:
        """Remove a command whose call ended early: its processes and its file.

        Unless the gateway is ending and leaves the call to the next process.
        """
        if started.left or (self._commands.leaving and started.held):
            return
        self._commands.forget(session, started)
        await self._commands.end(started)
        await started.file.remove()


def _reset(root: FilesystemRoot) -> str:
    return f"Shell cwd was reset to {root.workspace}"


def _inside(root: FilesystemRoot, path: str) -> str:
    """Return a reported folder as the tenant sees it; commands of the `local` runtime report host paths."""
    seen = root.prefix
    return path[len(seen) :] or "/" if seen and f"{path}/".startswith(f"{seen}/") else path


class Shells:
    """The commands of all tool sessions. Use as an async context manager: leaving it ends every one."""

    def __init__(self, execs: Execs, workers: Workers, settings: Settings) -> None:
        self._commands = BashCommands(execs, workers, settings)
        self._bash = Bash(self._commands, execs, settings)
        self._workers = workers
        self._settings = settings

    async def __aenter__(self) -> Shells:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._commands.close()

    async def call(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        name: str,
        arguments: object,
        *,
        exec_id: str,
        by: str,
        call_id: str | None = None,
        call: LastingCall | None = None,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> EncodedResult:
        """Run one of the three tools. A refusal by the tool itself is a result.

        A Bash command runs under `exec_id`, after `begin`. With `call`, whose result will be recorded, it
        outlives this process; call `answered` afterwards. Raises what `Execs.start` raises if the tenant
        cannot run commands, and `Unavailable` if a command's exit was lost.
        """
        try:
            given = checked(name, arguments)
        except ToolFailure as error:
            return EncodedResult.of(error.answer())
        match name:
            case "Bash":
                work = self._bash.run(root, session, given, exec_id, by, call, begin)
            case "BashOutput":
                work = self._output(root, session, given, call_id)
            case _:
                work = self._kill(session, given, call_id)
        return await _result(session, work)

    def answered(self, exec_id: str) -> None:
        """Note that a Bash call's result is recorded or not needed: the next process need not produce it."""
        self._bash.answered(exec_id)

    def busy(self, session: ToolSession) -> bool:
        """Return whether a command of a session is running."""
        return self._commands.busy(session)

    async def end(self, session: ToolSession) -> None:
        """End every command of a session and forget them; return when their process trees are gone."""
        await self._commands.end_all(session)

    # --- across a restart of the gateway ----------------------------------------------------------------

    async def leave(self) -> set[tuple[str, str]]:
        """Leave the held commands to the next process; return the tenants and ids of their calls."""
        return await self._commands.leave()

    def adopted(self) -> Iterator[AdoptedBash]:
        """Yield the commands of an earlier process, for `take_over` or `discard`."""
        return self._commands.adopted()

    def discard(self, left: AdoptedBash) -> None:
        """End a command that nobody needs."""
        self._commands.discard(left.exec_)

    def take_over(self, root: FilesystemRoot, session: ToolSession, left: AdoptedBash) -> None:
        """Continue a command: in the foreground for the call that `resume` finishes, or in the background."""
        self._commands.take_over(root, session, left)

    async def resume(self, root: FilesystemRoot, session: ToolSession, left: AdoptedBash) -> EncodedResult:
        """Finish the Bash call of a command that was taken over. Raises what `call` raises."""
        one = left.shell
        assert one is not None
        return await _result(session, self._bash.resume(root, session, one))

    # --- BashOutput and KillShell ----------------------------------------------------------------------

    async def _output(
        self, root: FilesystemRoot, session: ToolSession, given: Mapping[str, Any], call_id: str | None
    ) -> ToolAnswer:
        one = await self._commands.find(session, given["bash_id"])
        began = one.asked(call_id)
        ended, status, facts = (
            one.ended,
            one.status,
            one.facts(),
        )  # a snapshot, taken before the wait below
        pattern = given.get("filter")
        looks = {
            name: unread.look(final=ended is not None, lines=pattern is not None)
            for name, unread in one.unread.items()
        }
        texts: dict[str, str] = {name: look[0] for name, look in looks.items()}
        if pattern is not None:
            asked = {"filter": pattern, "streams": texts}
            answer = orjson.loads(await self._workers.call(root, "output/filter", asked, search=True))
            if "error" in answer:
                words = f'Invalid regex pattern "{pattern[:200]}": {answer["error"]}'
                raise ToolFailure("invalid_params", words)
            texts = answer["streams"]
        one.answered(call_id, began, {name: look[1] for name, look in looks.items()})
        facts |= {"shellId": one.id, "lost": {name: look[2] for name, look in looks.items()}}
        if one.file.path is not None:
            facts["outputFile"] = one.file.path
        code = None if ended is None or status == "killed" else ended.code
        return shell.report(status, code, texts, facts)

    async def _kill(self, session: ToolSession, given: Mapping[str, Any], call_id: str | None) -> ToolAnswer:
        one = await self._commands.find(session, given["shell_id"])
        if one.status == "running":
            one.record.killer = mark(call_id)
            one.note()
            killed = await self._commands.cancel(one)
        elif call_id is not None and one.record.killer == mark(call_id):
            killed = KillResult(0, False, 0)  # an earlier process killed it, but could not answer any more
        else:
            raise shell.not_running(one.id, one.status)
        await asyncio.wait([one.task], timeout=self._settings.cancel_timeout)
        facts = {**one.facts(), "shellId": one.id, "killed": killed.killed, "escalated": killed.escalated}
        return shell.killed(one.id, one.command, {**facts, "survivors": killed.survivors})


async def _result(session: ToolSession, work: Coroutine[Any, Any, ToolAnswer]) -> EncodedResult:
    session.last_used = time.monotonic()
    try:
        answer = await work
    except ToolFailure as error:
        answer = error.answer()
    session.last_used = time.monotonic()
    return EncodedResult.of(answer)
