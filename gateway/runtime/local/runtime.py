"""The local runtime: its tenants, and what each of them does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from gateway.errors import InvalidParams, NotFound, TenantNotRunning, Timeout
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.locations import Folders
from gateway.runtime import (
    Adopted,
    ExecSpec,
    Process,
    Removed,
    Snapshot,
    Space,
    Tenant,
    TenantEvent,
    unheard,
)
from gateway.runtime.launcher import Preamble, check_size, command_line
from gateway.runtime.local.process import LocalProcess
from gateway.runtime.local.tenants import LocalTenants, size
from gateway.runtime.visits import Place, visited
from gateway.settings import Settings

_LOG: Final = Path(__file__).with_name("site_log.sh").read_text()


class LocalRuntime:
    """A `TenantRuntime` of folders under `state_dir/tenants`. An async context manager."""

    def __init__(self, settings: Settings, removed: Removed = unheard) -> None:
        self._settings = settings
        self.removed = removed
        self._home = settings.state_dir / "tenants"
        member = "local" if settings.local_member is None else settings.local_member.name
        self._tenants = LocalTenants(self._home, member)
        self._real_home = os.path.realpath(self._home)  # as commands see it
        self.tenants: Mapping[str, Any] = Folders(self._real_home, "root").to_dict()
        self._running: dict[str, set[LocalProcess]] = {}
        self._events: asyncio.Queue[TenantEvent] = asyncio.Queue(maxsize=1000)

    async def __aenter__(self) -> LocalRuntime:
        self._home.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._running):
            await self._end_all(name)

    async def list(self, *, addresses: bool = True) -> list[Tenant]:
        return self._tenants.list()

    async def get(self, name: str) -> Tenant:
        return self._tenants.get(name)

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        await self.make(name, domain)
        if start:
            await self.start(name)
        return self._tenants.get(name)

    async def make(
        self,
        name: str,
        domain: str | None,
        *,
        disk: Path | None = None,
        site: Mapping[str, Any] | None = None,
    ) -> None:
        """Create a stopped tenant; see `LocalTenants.make`."""
        await self._tenants.make(name, domain, self._settings.workspace, disk=disk, site=site)
        self._tell("tenant.created", name)

    def set_site(self, name: str, **facts: Any) -> None:
        """Record the `domain` of a tenant's site, or the loopback `port` at which it answers."""
        self._tenants.change(name, **facts)

    async def start(self, name: str) -> None:
        if self._tenants.get(name).status != "running":
            self._tenants.change(name, status="running")
            self._tell("tenant.started", name)

    async def stop(self, name: str) -> None:
        if self._tenants.get(name).status != "stopped":
            self._tenants.change(name, status="stopped")
            await self._end_all(name)
            self._tell("tenant.stopped", name)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def mark_asleep(self, name: str, asleep: bool) -> None:
        self._tenants.change(name, asleep=asleep)
        self._tell("incus.instance-updated", name)

    async def visited(self, tenants: Sequence[Tenant]) -> Mapping[str, float]:
        places = {t.name: Place(t.port, "127.0.0.1") for t in tenants if t.port is not None}
        return await asyncio.to_thread(visited, places)

    async def destroy(self, name: str) -> None:
        if not await self.remove(name, self._tenants.get(name).instance):
            raise NotFound(f"no tenant {name}")

    async def remove(self, name: str, instance: str | None) -> bool:
        """Destroy the tenant with this name if it is this instance; return whether it was."""
        with contextlib.suppress(NotFound):
            if self._tenants.get(name).instance == instance:
                await self.stop(name)
            if self._tenants.get(name).instance == instance:
                gone = self._tenants.take_out(name)
                self._tell("tenant.destroyed", name)
                await asyncio.to_thread(shutil.rmtree, gone)
                return True
        return False

    async def rename(self, name: str, domain: str | None) -> None:
        self._tenants.change(name, domain=domain)
        self._tell("incus.instance-updated", name)

    async def resize(self, name: str, size: str) -> None:
        self._tenants.get(name)
        raise InvalidParams(
            "the local runtime has no limits, so its tenants have no size; only tenants in Incus have",
            field="size",
            reason="not_enforced",
        )

    async def clone(
        self, name: str, new: str, *, domain: str | None = None, snapshot: str | None = None
    ) -> Tenant:
        disk = self._tenants.disk(name) if snapshot is None else self._tenants.kept(name, snapshot)
        await self.make(new, domain, disk=disk)
        await self.start(new)
        return self._tenants.get(new)

    async def snapshots(self, name: str) -> Sequence[Snapshot]:
        return await self._tenants.snapshots(name)

    async def snapshot(self, name: str, snapshot: str) -> Snapshot:
        made = await self._tenants.keep(name, snapshot)
        self._tell("tenant.snapshot.created", name, snapshot=snapshot)
        return made

    async def restore(self, name: str, snapshot: str) -> None:
        ran = self._tenants.get(name).status == "running"
        self._tenants.kept(name, snapshot)  # raises if it does not exist
        await self.stop(name)
        await self._tenants.restore(name, snapshot)
        self._tell("incus.instance-restored", name)
        self._tell("tenant.snapshot.restored", name, snapshot=snapshot)
        if ran:
            await self.start(name)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._tenants.kept(name, snapshot))
        self._tell("tenant.snapshot.deleted", name, snapshot=snapshot)

    async def held(self, name: str) -> int | None:
        return None

    async def unshared(self, name: str) -> int | None:
        return await asyncio.to_thread(size, self._tenants.disk(name))

    async def space(self) -> Space | None:
        found = shutil.disk_usage(self._home)
        return Space(found.total, found.used)

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        return ExecSpec(("/bin/sh", "-c", _LOG, "sh", str(lines), *(["-F"] if follow else [])))

    async def filesystem(self, name: str) -> FilesystemRoot:
        self._tenants.get(name)
        return FilesystemRoot(name, self._settings.workspace, prefix=f"{self._real_home}/{name}/root")

    async def metrics(self, name: str) -> Mapping[str, Any]:
        self._tenants.get(name)
        return {"processes": len(self._running.get(name, ()))}

    async def ready(self) -> None:
        return

    async def watch(self) -> AsyncIterator[TenantEvent]:
        yield TenantEvent("gateway.resynced", None, {"tenants": len(await self.list())})
        while True:
            yield await self._events.get()

    async def prepare(self, tenants: Sequence[str]) -> None:
        pass

    def told(self) -> Sequence[str]:
        return ()

    def skip(self, told: Sequence[str]) -> None:
        pass

    async def leave(self) -> None:
        pass

    async def adopt(self) -> Sequence[Adopted]:
        return ()  # plain processes do not survive the gateway

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self._settings
        check_size(spec.argv, spec.env, one=settings.max_argument, total=settings.max_arguments)
        if self._tenants.get(name).status != "running":
            raise TenantNotRunning(f"tenant {name} is stopped; start it first", status="stopped")
        if spec.user not in (None, settings.workspace_user, settings.workspace_uid, os.getuid()):
            raise InvalidParams("the local runtime runs commands only as its own user", field="user")
        exec_id = secrets.token_hex(8)
        cwd = self._folder(name, spec.cwd)
        terminal = spec.pty is not None
        line = command_line(
            spec.argv, cwd=cwd, env=spec.env, merged=spec.merged and not terminal, terminal=terminal
        )
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

    async def sweep(self) -> int:
        return 0  # processes left by a killed gateway cannot be told from others on this machine

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # here a new process starts as fast as a warm one

    def _folder(self, name: str, cwd: str | None) -> str:
        workspace = self._settings.workspace
        home = self._home / name / "root" / workspace.lstrip("/")
        if cwd is None:
            return str(home)
        if cwd == workspace or cwd.startswith(workspace + "/"):
            return str(home / cwd[len(workspace) :].lstrip("/"))
        return str(home / cwd)  # an absolute path is left as it is

    async def _end_all(self, name: str) -> None:
        for process in list(self._running.get(name, ())):
            await process.kill(0)

    def _tell(self, kind: str, name: str, **facts: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # a full queue has no reader
            self._events.put_nowait(TenantEvent(kind, name, facts))
