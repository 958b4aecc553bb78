"""Commands of the local runtime's tenants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.errors import InvalidParams, TenantNotRunning, Timeout
from gateway.runtime import Adopted, ExecSpec, Process
from gateway.runtime.launcher import Preamble, check_size, command_line
from gateway.runtime.local.disks import LocalDisks
from gateway.runtime.local.process import LocalProcess
from gateway.settings import Settings

_SITE_LOG: Final = Path(__file__).with_name("site_log.sh").read_text()


class LocalCommands:
    """Implements `gateway.runtime.Commands` by processes of the gateway's user."""

    def __init__(self, settings: Settings, disks: LocalDisks) -> None:
        self._settings, self._disks = settings, disks
        self._running: dict[str, set[LocalProcess]] = {}

    async def aclose(self) -> None:
        for name in list(self._running):
            await self.end_all(name)

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self._settings
        check_size(spec.argv, spec.env, one=settings.max_argument, total=settings.max_arguments)
        if self._disks.get(name).status != "running":
            raise TenantNotRunning(f"tenant {name} is stopped; start it first", status="stopped")
        if spec.user not in (None, settings.workspace_user, settings.workspace_uid, os.getuid()):
            raise InvalidParams("the local runtime runs commands only as its own user", field="user")
        exec_id = secrets.token_hex(8)
        cwd = self._folder(name, spec.cwd)
        merged = spec.merged and spec.pty is None
        line = command_line(spec.argv, cwd=cwd, env=spec.env, merged=merged, pty=spec.pty)
        preamble = Preamble()
        preamble.asked(spec.argv[0][:200], (spec.cwd or "")[:200], "")
        process = LocalProcess(exec_id, preamble, settings.cancel_timeout)
        try:
            async with asyncio.timeout(settings.exec_start_timeout):
                if spec.before is not None:
                    await spec.before(None)
                await process.begin(line, spec, home=self._folder(name, None))
        except BaseException as error:
            await asyncio.shield(process.abandon())
            if isinstance(error, TimeoutError):
                raise Timeout("the command did not start in time") from error
            raise
        running = self._running.setdefault(name, set())
        running.add(process)
        process.ended.add_done_callback(lambda _: running.discard(process))
        return process

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # here a new process starts as fast as a warm one

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        return ExecSpec(("/bin/sh", "-c", _SITE_LOG, "sh", str(lines), *(["-F"] if follow else [])))

    async def adopt(self) -> Sequence[Adopted]:
        return ()  # plain processes do not survive the gateway

    def running(self, name: str) -> int:
        """Return how many commands of a tenant run."""
        return len(self._running.get(name, ()))

    async def end_all(self, name: str) -> None:
        """Kill all commands of a tenant."""
        for process in list(self._running.get(name, ())):
            await process.kill(0)

    def _folder(self, name: str, cwd: str | None) -> str:
        workspace = self._settings.workspace
        home = self._disks.home / name / "root" / workspace.lstrip("/")
        if cwd is None:
            return str(home)
        if cwd == workspace or cwd.startswith(workspace + "/"):
            return str(home / cwd[len(workspace) :].lstrip("/"))
        return str(home / cwd)  # an absolute path is left as it is
