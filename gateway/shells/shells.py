"""Runs the tools Bash, BashOutput and KillShell.

`gateway.tools.shell` has their semantics and texts, `gateway.execs` runs the commands, and the tenant's
worker writes output files. A command in the foreground belongs to its call: if the call ends early, its whole
process tree is ended. One in the background belongs to its session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any

import orjson

from gateway.errors import ExecFailed, NotFound, Unavailable
from gateway.execs import Execs
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import Killed
from gateway.settings import Settings
from gateway.shells.commands import Commands, LeftBehind
from gateway.shells.record import Record, mark
from gateway.shells.shell_command import Shell
from gateway.tools import shell
from gateway.tools.answer import Answer, ToolFailure
from gateway.tools.call import failure
from gateway.tools.file_tools import ToolResult
from gateway.tools.lasting import LastingCall
from gateway.tools.schemas import checked
from gateway.tools.session import ToolSession

log = logging.getLogger(__name__)


class Shells:
    """The commands of all tool sessions. Use as an async context manager: leaving it ends every one."""

    def __init__(self, execs: Execs, workers: Workers, settings: Settings) -> None:
        self._commands = Commands(execs, workers, settings)
        self._execs = execs
        self._workers = workers
        self._settings = settings
        self._telling: dict[str, Shell] = {}  # by exec id: commands of calls whose result is not recorded yet

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
    ) -> ToolResult:
        """Run one of the three tools. A refusal by the tool itself is a result.

        A Bash command runs under `exec_id`, after `begin`. With `call`, whose result will be recorded, it
        outlives this process; call `told` afterwards. Raises what `Execs.start` raises if the tenant cannot
        run commands, and `Unavailable` if a command's exit was lost.
        """
        try:
            given = checked(name, arguments)
        except ToolFailure as error:
            return ToolResult.of(error.answer())
        match name:
            case "Bash":
                work = self._bash(root, session, given, exec_id, by, call, begin)
            case "BashOutput":
                work = self._output(root, session, given, call_id)
            case _:
                work = self._kill(session, given, call_id)
        return await _result(session, work)

    def told(self, exec_id: str) -> None:
        """Note that a Bash call's result is recorded or not needed: the next process need not produce it."""
        one = self._telling.pop(exec_id, None)
        if one is None or one.left:
            return
        if one.record.phase == "front":
            self._commands.drop(one)
        else:
            one.record.call = None
            one.note()

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

    def left_behind(self) -> Iterator[LeftBehind]:
        """Yield the commands of an earlier process, for `take_over` or `discard`."""
        return self._commands.left_behind()

    def discard(self, left: LeftBehind) -> None:
        """End a command that nobody needs."""
        self._commands.discard(left.exec_)

    def take_over(self, root: FilesystemRoot, session: ToolSession, left: LeftBehind) -> None:
        """Continue a command: in the foreground for the call that `resume` finishes, or in the background."""
        self._commands.take_over(root, session, left)

    async def resume(self, root: FilesystemRoot, session: ToolSession, left: LeftBehind) -> ToolResult:
        """Finish the Bash call of a command that was taken over. Raises what `call` raises."""
        one = left.shell
        assert one is not None
        self._telling[one.exec_id] = one
        return await _result(session, self._resumed(root, session, one))

    async def _resumed(self, root: FilesystemRoot, session: ToolSession, one: Shell) -> Answer:
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

    # --- Bash -----------------------------------------------------------------------------------------

    async def _bash(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        given: Mapping[str, Any],
        exec_id: str,
        by: str,
        call: LastingCall | None,
        begin: Callable[[], Awaitable[None]] | None,
    ) -> Answer:
        command: str = given["command"]
        background = bool(given.get("run_in_background"))
        if background:
            self._commands.make_room(session)
        seconds = self._seconds(given.get("timeout"), background)
        record = Record(
            f"bash_{secrets.token_hex(4)}",
            session.name,
            session.cwd,
            "background" if background else "front",
            seconds,
            time.time() + seconds,
            shell.interpretation(command, 1),
            call,
        )
        try:
            started = await self._commands.start(root, record, command, exec_id, by, begin)
        except ExecFailed as error:
            if error.facts.get("reason") != "cwd" or session.cwd is None:
                raise failure("Bash", error) from None
            # the session's current folder is gone
            session.cwd = record.cwd = None
            record.notes = [_reset(root)]
            started = await self._commands.start(root, record, command, exec_id, by, begin)
        self._telling[exec_id] = started
        try:
            if background:
                await self._commands.to_background(session, started)
                return shell.begun(started.id, started.file.path, self._facts(root, session, started))
            return await self._foreground(root, session, started)
        except BaseException:
            await asyncio.shield(self._abandon(session, started))
            raise

    def _seconds(self, timeout: int | None, background: bool) -> float:
        """Return a command's timeout in seconds: the default for 0 and less, and never above the maximum."""
        settings = self._settings
        default = settings.bash_background_timeout if background else settings.bash_timeout
        most = settings.bash_background_timeout_max if background else settings.bash_timeout_max
        return min(most, default if timeout is None or timeout <= 0 else timeout / 1000)

    async def _foreground(self, root: FilesystemRoot, session: ToolSession, started: Shell) -> Answer:
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

    def _moved(self, started: Shell, facts: Mapping[str, Any]) -> Answer:
        # BashOutput returns this again, so that its output is complete
        text, _, _ = started.unread["stdout"].look(final=False, lines=False)
        return shell.moved(text, started.id, started.file.path, started.record.seconds, facts)

    async def _finished(self, root: FilesystemRoot, session: ToolSession, started: Shell) -> Answer:
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

    def _facts(self, root: FilesystemRoot, session: ToolSession, started: Shell) -> dict[str, Any]:
        facts = {**started.facts(), "cwd": session.cwd or root.workspace}
        if self._commands.has(session, started):
            facts["shellId"] = started.id
        return facts

    async def _abandon(self, session: ToolSession, started: Shell) -> None:
        """Remove a command whose call ended early: its processes and its file.

        Unless the gateway is ending and leaves the call to the next process.
        """
        if started.left or (self._commands.leaving and started.held):
            return
        self._commands.forget(session, started)
        await self._commands.end(started)
        await started.file.remove()

    # --- BashOutput and KillShell ----------------------------------------------------------------------

    async def _output(
        self, root: FilesystemRoot, session: ToolSession, given: Mapping[str, Any], call_id: str | None
    ) -> Answer:
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

    async def _kill(self, session: ToolSession, given: Mapping[str, Any], call_id: str | None) -> Answer:
        one = await self._commands.find(session, given["shell_id"])
        if one.status == "running":
            one.record.killer = mark(call_id)
            one.note()
            killed = await self._commands.cancel(one)
        elif call_id is not None and one.record.killer == mark(call_id):
            killed = Killed(0, False, 0)  # an earlier process killed it, but could not answer any more
        else:
            raise shell.not_running(one.id, one.status)
        await asyncio.wait([one.task], timeout=self._settings.cancel_timeout)
        facts = {**one.facts(), "shellId": one.id, "killed": killed.killed, "escalated": killed.escalated}
        return shell.killed(one.id, one.command, {**facts, "survivors": killed.survivors})


async def _result(session: ToolSession, work: Coroutine[Any, Any, Answer]) -> ToolResult:
    session.last_used = time.monotonic()
    try:
        answer = await work
    except ToolFailure as error:
        answer = error.answer()
    session.last_used = time.monotonic()
    return ToolResult.of(answer)


def _reset(root: FilesystemRoot) -> str:
    return f"Shell cwd was reset to {root.workspace}"


def _inside(root: FilesystemRoot, path: str) -> str:
    """Return a reported folder as the tenant sees it; commands of the `local` runtime report host paths."""
    seen = root.prefix
    return path[len(seen) :] or "/" if seen and f"{path}/".startswith(f"{seen}/") else path
