"""Runs the tools Bash, BashOutput and KillShell.

`gateway.tools.shell` has their semantics and texts, `gateway.execs` runs the commands, and the tenant's
worker writes output files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any

import orjson

from gateway.execs import Execs
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import Killed
from gateway.settings import Settings
from gateway.shells.bash import Bash
from gateway.shells.commands import Commands, LeftBehind
from gateway.shells.record import mark
from gateway.tools import shell
from gateway.tools.answer import Answer, ToolFailure
from gateway.tools.file_tools import ToolResult
from gateway.tools.lasting import LastingCall
from gateway.tools.schemas import checked
from gateway.tools.session import ToolSession


class Shells:
    """The commands of all tool sessions. Use as an async context manager: leaving it ends every one."""

    def __init__(self, execs: Execs, workers: Workers, settings: Settings) -> None:
        self._commands = Commands(execs, workers, settings)
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
                work = self._bash.run(root, session, given, exec_id, by, call, begin)
            case "BashOutput":
                work = self._output(root, session, given, call_id)
            case _:
                work = self._kill(session, given, call_id)
        return await _result(session, work)

    def told(self, exec_id: str) -> None:
        """Note that a Bash call's result is recorded or not needed: the next process need not produce it."""
        self._bash.told(exec_id)

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
        return await _result(session, self._bash.resume(root, session, one))

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
