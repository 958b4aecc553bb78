"""The Bash commands of all tool sessions: starts them, runs them in the background, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from gateway.admission import Admission, Reservation
from gateway.errors import GatewayError, InvalidParams, NotFound, RateLimited, TooLarge
from gateway.execs import Exec, Execs
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import ExecSpec, Killed
from gateway.settings import Settings
from gateway.shells.printed import OutputFile
from gateway.shells.record import Record, parsed
from gateway.shells.shell_command import Shell
from gateway.tools import shell
from gateway.tools.answer import ToolFailure
from gateway.tools.call import failure
from gateway.tools.lasting import LastingCall
from gateway.tools.session import ToolSession

log = logging.getLogger(__name__)

_BRIEF: Final = 1.0  # seconds to answer the calls that end with this process


@dataclass(slots=True)
class LeftBehind:
    """A Bash command of an earlier process; see `gateway.tools.lasting`. `shell` is set once it continues."""

    exec_: Exec
    record: Record
    shell: Shell | None = None

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


class Commands:
    """The commands of all tool sessions. A background command belongs to its session."""

    def __init__(self, execs: Execs, workers: Workers, settings: Settings) -> None:
        self.leaving = False
        self._execs = execs
        self._workers = workers
        self._settings = settings
        self._of: WeakKeyDictionary[ToolSession, dict[str, Shell]] = WeakKeyDictionary()
        self._slots = Admission[ToolSession](
            "commands in the background",
            each=settings.max_shells,
            name="this session",
            hint="end one with KillShell first",
        )
        self._all: set[asyncio.Task[None]] = set()
        self._live: set[Shell] = set()  # whose output has not been copied completely

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
        record: Record,
        command: str,
        exec_id: str,
        by: str,
        begin: Callable[[], Awaitable[None]] | None,
    ) -> Shell:
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

    def _made(self, root: FilesystemRoot, record: Record, command: str, exec_: Exec) -> Shell:
        file = OutputFile(self._workers, root, f"{record.shell}.txt", self._settings)
        one = Shell(record, command, exec_, file, self._settings.bash_printed_max)
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

    async def end(self, one: Shell) -> None:
        """End a command's process tree and wait until its output is copied."""
        try:
            await self.cancel(one)
        except (GatewayError, TimeoutError) as error:
            log.warning("cannot end shell %s of %s: %s", one.id, one.tenant, error)
        await asyncio.wait([one.task], timeout=self._settings.cancel_timeout)

    def drop(self, one: Shell) -> None:
        """Keep nothing of a command for the next process, if it has ended."""
        with contextlib.suppress(NotFound):
            exec_ = self._execs.get(one.tenant, one.exec_id)
            if exec_.ended.done() and not self.leaving:
                exec_.let_go()

    async def cancel(self, one: Shell) -> Killed:
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
        self, session: ToolSession, started: Shell, slot: Reservation[ToolSession] | None = None
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

    def _due(self, one: Shell) -> None:
        """End a background command at its timeout."""
        if not one.over.done():
            left, grace = max(0.0, one.record.until - time.time()), self._settings.cancel_grace
            exec_ = self._execs.get(one.tenant, one.exec_id)
            one.timer = asyncio.get_running_loop().call_later(left, exec_.end, "timeout", grace)

    async def _saved(self, one: Shell) -> None:
        await one.save()
        one.let_go()

    async def find(self, session: ToolSession, shell_id: str) -> Shell:
        """Return a shell of the session, with all its output if its command has ended."""
        one = self._of.get(session, {}).get(shell_id)
        if one is None:
            raise shell.unknown(shell_id)
        if one.over.done():
            await asyncio.wait([one.task])
        await one.caught_up()
        return one

    def has(self, session: ToolSession, one: Shell) -> bool:
        """Return whether a session has the command in the background."""
        return one.id in self._of.get(session, {})

    def forget(self, session: ToolSession, one: Shell) -> None:
        """Remove a command from its session's background."""
        self._of.get(session, {}).pop(one.id, None)

    # --- across a restart of the gateway ----------------------------------------------------------------

    def left_behind(self) -> Iterator[LeftBehind]:
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
                yield LeftBehind(exec_, record)

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

    def take_over(self, root: FilesystemRoot, session: ToolSession, left: LeftBehind) -> None:
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
