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
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import orjson

from gateway.errors import ExecFailed, GatewayError, InvalidParams, NotFound, TooLarge, Unavailable
from gateway.execs import Execs
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import ExecSpec, Killed
from gateway.settings import Settings
from gateway.shells.printed import OutputFile
from gateway.shells.shell_command import Shell
from gateway.tools import shell
from gateway.tools.answer import Answer, ToolFailure
from gateway.tools.call import failure
from gateway.tools.file_tools import ToolResult
from gateway.tools.schemas import checked
from gateway.tools.session import ToolSession

log = logging.getLogger(__name__)


class Shells:
    """The commands of all tool sessions. Use as an async context manager: leaving it ends every one."""

    def __init__(self, execs: Execs, workers: Workers, settings: Settings) -> None:
        self._execs = execs
        self._workers = workers
        self._settings = settings
        self._of: WeakKeyDictionary[ToolSession, dict[str, Shell]] = WeakKeyDictionary()
        self._all: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Shells:
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in list(self._of):
            await self.end(session)
        for task in self._all:
            task.cancel()
        await asyncio.gather(*self._all, return_exceptions=True)

    async def call(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        name: str,
        arguments: object,
        *,
        exec_id: str,
        by: str,
    ) -> ToolResult:
        """Run one of the three tools. A refusal by the tool itself is a result.

        A Bash command runs under `exec_id`. Raises what `Execs.start` raises if the tenant cannot run
        commands, and `Unavailable` if a command's exit was lost.
        """
        session.last_used = time.monotonic()
        try:
            given = checked(name, arguments)
            match name:
                case "Bash":
                    answer = await self._bash(root, session, given, exec_id, by)
                case "BashOutput":
                    answer = await self._output(root, session, given)
                case _:
                    answer = await self._kill(session, given)
        except ToolFailure as error:
            answer = error.answer()
        session.last_used = time.monotonic()
        return ToolResult.of(answer)

    def busy(self, session: ToolSession) -> bool:
        """Return whether a command of a session runs."""
        return any(not one.task.done() for one in self._of.get(session, {}).values())

    async def end(self, session: ToolSession) -> None:
        """End every command of a session and forget them; return when their process trees are gone.

        A command in the foreground at that moment can no longer go to the background.
        """
        session.ended = True
        shells = list(self._of.pop(session, {}).values())
        await asyncio.gather(*(self._end(one) for one in shells if not one.task.done()))

    async def _end(self, one: Shell) -> None:
        """End a command's process tree and wait until its output is copied."""
        try:
            await self._cancel(one)
        except (GatewayError, TimeoutError) as error:
            log.warning("shell %s of %s could not be ended: %s", one.id, one.tenant, error)
        await asyncio.wait([one.task], timeout=self._settings.cancel_timeout)

    async def _cancel(self, one: Shell) -> Killed:
        return await self._execs.cancel(self._execs.get(one.tenant, one.exec_id))

    # --- Bash -----------------------------------------------------------------------------------------

    async def _bash(
        self, root: FilesystemRoot, session: ToolSession, given: Mapping[str, Any], exec_id: str, by: str
    ) -> Answer:
        command: str = given["command"]
        background = bool(given.get("run_in_background"))
        if background:
            self._make_room(session)
        notes: tuple[str, ...] = ()
        try:
            started = await self._start(root, session.cwd, command, background, exec_id, by)
        except ExecFailed as error:
            if error.facts.get("reason") != "cwd" or session.cwd is None:
                raise failure("Bash", error) from None
            # the session's current folder is gone
            session.cwd, notes = None, (_reset(root),)
            started = await self._start(root, None, command, background, exec_id, by)
        seconds = self._seconds(given.get("timeout"), background)
        try:
            if background:
                await self._to_background(session, started, seconds)
                return shell.begun(started.id, started.file.path, self._facts(root, session, started))
            return await self._foreground(root, session, started, seconds, notes)
        except BaseException:
            await asyncio.shield(self._abandon(session, started))
            raise

    async def _start(
        self,
        root: FilesystemRoot,
        cwd: str | None,
        command: str,
        background: bool,
        exec_id: str,
        by: str,
    ) -> Shell:
        shown = ("bash", "-c", command)
        if background:
            spec = ExecSpec(("/bin/bash", "-c", command), cwd=cwd, shown=shown)
        else:
            argv = ("/bin/bash", "-c", shell.SCRIPT, "bash", command)
            spec = ExecSpec(argv, cwd=cwd, merged=True, shown=shown)
        try:
            exec_ = await self._execs.start(root.tenant, spec, exec_id=exec_id, by=by)
        except (TooLarge, InvalidParams) as error:
            raise failure("Bash", error) from None
        shell_id = f"bash_{secrets.token_hex(4)}"
        started = Shell(
            shell_id,
            command,
            exec_,
            OutputFile(self._workers, root, f"{shell_id}.txt", self._settings),
            self._settings.bash_printed_max,
        )
        self._all.add(started.task)
        started.task.add_done_callback(self._all.discard)
        return started

    def _seconds(self, timeout: int | None, background: bool) -> float:
        """Return a command's timeout in seconds: the default for 0 and less, and never above the maximum."""
        settings = self._settings
        default = settings.bash_background_timeout if background else settings.bash_timeout
        most = settings.bash_background_timeout_max if background else settings.bash_timeout_max
        return min(most, default if timeout is None or timeout <= 0 else timeout / 1000)

    async def _foreground(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        started: Shell,
        seconds: float,
        notes: tuple[str, ...],
    ) -> Answer:
        done, _ = await asyncio.wait([started.task], timeout=seconds)
        if done:
            return await self._finished(root, session, started, notes)
        try:
            await self._to_background(session, started, self._settings.bash_background_timeout)
        except ToolFailure:
            with contextlib.suppress(NotFound):  # it ended, and many others after it
                self._execs.get(started.tenant, started.exec_id).end("timeout", self._settings.cancel_grace)
            await self._end(started)
            return shell.timed_out(started.printed(), seconds, self._facts(root, session, started))
        # BashOutput returns this again, so that its output is complete
        text, _, _ = started.unread["stdout"].look(final=False, lines=False)
        return shell.moved(text, started.id, started.file.path, seconds, self._facts(root, session, started))

    async def _finished(
        self, root: FilesystemRoot, session: ToolSession, started: Shell, notes: tuple[str, ...]
    ) -> Answer:
        await started.task
        ended = started.ended
        if ended is None or ended.code is None:
            raise Unavailable(
                "the command's exit was lost: the tenant or Incus went away", exec=started.exec_id
            )
        if ended.code == 0 and started.report:
            notes += self._moved_to(root, session, started.report)
        if started.flooded:
            notes += (shell.flooded(self._settings.bash_printed_max),)
        if shell.needs_file(started.printed()):
            await started.save()
        facts = self._facts(root, session, started)
        return shell.finished(started.command, started.printed(), ended.code, notes, facts)

    def _moved_to(self, root: FilesystemRoot, session: ToolSession, reported: bytes) -> tuple[str, ...]:
        """Adopt the folder in which a command ended; return the note for the result."""
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
        if started.id in self._of.get(session, {}):
            facts["shellId"] = started.id
        return facts

    async def _abandon(self, session: ToolSession, started: Shell) -> None:
        """Remove a command whose call ended early: its processes and its file."""
        self._of.get(session, {}).pop(started.id, None)
        await self._end(started)
        await started.file.remove()

    # --- in the background ------------------------------------------------------------------------------

    def _make_room(self, session: ToolSession) -> None:
        """Raise `ToolFailure` if the session may have no more shells; forget old ended ones."""
        if session.ended:
            raise ToolFailure("gone", "This tool session has ended; open a new one.")
        if session.lifetime == "call":
            raise ToolFailure(
                "conflict",
                "Commands in the background need a tool session that outlives this call: "
                "name one with X-Tool-Session, or use a websocket.",
            )
        shells = self._of.setdefault(session, {})
        running = sum(one.status == "running" for one in shells.values())
        if running >= self._settings.max_shells:
            raise ToolFailure(
                "rate_limited",
                f"{running} commands run in the background, the most allowed; end one with KillShell first.",
                limit=self._settings.max_shells,
            )
        for one in [one for one in shells.values() if one.status != "running"]:
            if len(shells) < self._settings.shells_kept:
                break
            del shells[one.id]

    async def _to_background(self, session: ToolSession, started: Shell, seconds: float) -> None:
        """Hand a running command over to its session; end it after `seconds` more. Raises `ToolFailure`."""
        self._make_room(session)  # check again, since others may have been started meanwhile
        self._of.setdefault(session, {})[started.id] = started
        if not started.over.done():
            loop, grace = asyncio.get_running_loop(), self._settings.cancel_grace
            exec_ = self._execs.get(started.tenant, started.exec_id)
            started.timer = loop.call_later(seconds, exec_.end, "timeout", grace)
        await started.save()
        started.let_go()

    async def _shell(self, session: ToolSession, shell_id: str) -> Shell:
        """Return a shell of the session, with all its output if its command has ended."""
        one = self._of.get(session, {}).get(shell_id)
        if one is None:
            raise shell.unknown(shell_id)
        if one.over.done():
            await asyncio.wait([one.task])
        return one

    async def _output(self, root: FilesystemRoot, session: ToolSession, given: Mapping[str, Any]) -> Answer:
        one = await self._shell(session, given["bash_id"])
        ended, status, facts = (
            one.ended,
            one.status,
            one.facts(),
        )  # taken at one moment, before the wait below
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
        for name, (_, offset, _) in looks.items():
            one.unread[name].taken(offset)
        facts |= {"shellId": one.id, "lost": {name: look[2] for name, look in looks.items()}}
        if one.file.path is not None:
            facts["outputFile"] = one.file.path
        code = None if ended is None or status == "killed" else ended.code
        return shell.report(status, code, texts, facts)

    async def _kill(self, session: ToolSession, given: Mapping[str, Any]) -> Answer:
        one = await self._shell(session, given["shell_id"])
        if one.status != "running":
            raise shell.not_running(one.id, one.status)
        killed = await self._cancel(one)
        await asyncio.wait([one.task], timeout=self._settings.cancel_timeout)
        facts = {**one.facts(), "shellId": one.id, "killed": killed.killed, "escalated": killed.escalated}
        return shell.killed(one.id, one.command, {**facts, "survivors": killed.survivors})


def _reset(root: FilesystemRoot) -> str:
    return f"Shell cwd was reset to {root.workspace}"


def _inside(root: FilesystemRoot, path: str) -> str:
    """Return a reported folder as the tenant sees it; commands of the `local` runtime report host paths."""
    seen = root.prefix
    return path[len(seen) :] or "/" if seen and f"{path}/".startswith(f"{seen}/") else path
