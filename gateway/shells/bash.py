"""Runs the tool Bash: in the foreground, in the background, and from there to here.

A command in the foreground belongs to its call: if the call ends early, its whole process tree is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway.errors import ExecFailed, NotFound, Unavailable
from gateway.execs import Execs
from gateway.rootfs import FilesystemRoot
from gateway.settings import Settings
from gateway.shells.commands import Commands
from gateway.shells.record import Record
from gateway.shells.shell_command import Shell
from gateway.tools import shell
from gateway.tools.answer import Answer, ToolFailure
from gateway.tools.call import failure
from gateway.tools.lasting import LastingCall
from gateway.tools.session import ToolSession


class Bash:
    """The calls of Bash in all tool sessions."""

    def __init__(self, commands: Commands, execs: Execs, settings: Settings) -> None:
        self._commands, self._execs, self._settings = commands, execs, settings
        self._telling: dict[str, Shell] = {}  # by exec id: commands of calls whose result is not recorded yet

    async def run(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        given: Mapping[str, Any],
        exec_id: str,
        by: str,
        call: LastingCall | None,
        begin: Callable[[], Awaitable[None]] | None,
    ) -> Answer:
        """Run a command under `exec_id`, after `begin`; see `Shells.call`."""
        command: str = given["command"]
        background = bool(given.get("run_in_background"))
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

    async def resume(self, root: FilesystemRoot, session: ToolSession, one: Shell) -> Answer:
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


def _reset(root: FilesystemRoot) -> str:
    return f"Shell cwd was reset to {root.workspace}"


def _inside(root: FilesystemRoot, path: str) -> str:
    """Return a reported folder as the tenant sees it; commands of the `local` runtime report host paths."""
    seen = root.prefix
    return path[len(seen) :] or "/" if seen and f"{path}/".startswith(f"{seen}/") else path
