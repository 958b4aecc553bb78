"""Runs tenants as Incus system containers.

Incus is the database: which instances are tenants, their state, domain and port are read from it. An
instance is a tenant where `user.gateway.managed` is true in its expanded configuration, which the tenant
profile sets; others do not exist for the gateway. Only where the rootfs lies and which process is the
container's first is kept, for as long as the event stream stands that would tell of a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.errors import (
    Conflict,
    ExecFailed,
    GatewayError,
    InvalidParams,
    NotFound,
    TenantNotRunning,
    Timeout,
    Unavailable,
)
from gateway.incus import ExecSockets, Incus, IncusError, Lost
from gateway.incus.client import instance_path
from gateway.rootfs import FilesystemRoot, IdMap
from gateway.rootfs.cgroups import Cgroup, of_init
from gateway.rootfs.workers import BrokerClient
from gateway.runtime import (
    REPORT_MAX,
    ExecSpec,
    Exit,
    Killed,
    Process,
    Pty,
    Status,
    StreamName,
    Tenant,
    TenantEvent,
)
from gateway.runtime.standby import Standbys
from gateway.runtime.wrapper import (
    CGROUP_PARENT,
    KILL_SCRIPT,
    START_SCRIPT,
    START_SCRIPT_PTY,
    Account,
    Preamble,
    check_size,
    command_line,
)
from gateway.settings import Settings

log = logging.getLogger(__name__)

MANAGED: Final = "user.gateway.managed"
DOMAIN: Final = "user.gateway.domain"
PORT: Final = "user.gateway.port"
_CGROUP_LOOKS: Final = "40"  # two seconds, for a container that is just booting
_MAX_ID: Final = (1 << 31) - 1

_STATUS: Final[Mapping[str, Status]] = {
    "Running": "running",
    "Ready": "running",
    "Stopped": "stopped",
    "Frozen": "frozen",
    "Freezing": "frozen",
    "Starting": "starting",
    "Stopping": "stopping",
    "Aborting": "stopping",
}

# Incus's lifecycle actions that have a name of their own in our events
_LIFECYCLE: Final[Mapping[str, str]] = {
    "instance-created": "tenant.created",
    "instance-started": "tenant.started",
    "instance-stopped": "tenant.stopped",
    "instance-shutdown": "tenant.stopped",
    "instance-restarted": "tenant.restarted",
    "instance-deleted": "tenant.destroyed",
    "instance-renamed": "tenant.renamed",
}

# actions that change nothing of where a tenant's files and processes are
_LOOKS: Final = ("instance-file-", "instance-log-", "instance-metadata-", "instance-console")


@dataclass(frozen=True, slots=True)
class _Located:
    """What is kept of a tenant while the event stream stands."""

    root: FilesystemRoot
    init_pid: int


@dataclass(frozen=True, slots=True)
class _Order:
    """What a waiting shell is to become."""

    spec: ExecSpec
    account: Account
    cwd: str

    def line(self, exec_id: str) -> bytes:
        """Return the line that says so. Raises `InvalidParams` for what no line can carry."""
        spec = self.spec
        return command_line(
            spec.argv,
            exec_id=exec_id,
            cwd=self.cwd,
            env=spec.env,
            account=self.account,
            terminal=spec.pty is not None,
            merged=spec.merged,
        )


class IncusRuntime:
    """The tenants of one Incus project. Use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._incus = Incus(settings.incus_socket, settings.incus_project, settings.incus_timeout)
        self._pools = settings.incus_socket.parent / "storage-pools"
        self.roots: tuple[Path, ...] = (self._pools,)
        self._broker = BrokerClient(at=settings.broker_socket) if settings.broker_socket else None
        self._located: dict[str, _Located] = {}
        self._standbys = Standbys(
            self._stand_by,
            maximum=settings.standby_max,
            age=settings.standby_age,
            idle=settings.standby_idle,
        )
        self._watching = False
        # marks commands of this gateway, in this life or another: another's on the same host are not ours
        self._own = hashlib.sha256(str(settings.state_dir.absolute()).encode()).hexdigest()[:12]
        self._life = f"{self._own}-{secrets.token_hex(4)}"

    async def __aenter__(self) -> IncusRuntime:
        await self._incus.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._standbys.aclose()
        if self._broker is not None:
            await self._broker.aclose()
        await self._incus.__aexit__(kind, error, trace)

    # --- tenants ------------------------------------------------------------------------------------

    async def list(self) -> list[Tenant]:
        with _translated(""):
            instances = await self._incus.get("/1.0/instances", recursion="2")
        return [_tenant(instance) for instance in instances if _is_tenant(instance)]

    async def get(self, name: str) -> Tenant:
        return _tenant(await self._instance(name))

    async def create(self, name: str, *, domain: str | None = None, start: bool = True) -> Tenant:
        body: dict[str, Any] = {
            "name": name,
            "type": "container",
            "source": {"type": "image", "alias": self._settings.image},
            "profiles": [self._settings.profile],
            "config": {} if domain is None else {DOMAIN: domain},
            "start": start,
        }
        with _translated(name):
            await self._operate("POST", "/1.0/instances", body)
        return await self.get(name)

    async def start(self, name: str) -> None:
        tenant = await self.get(name)
        if tenant.status == "frozen":
            await self._state(name, "unfreeze")
        elif tenant.status != "running":
            await self._state(name, "start")

    async def stop(self, name: str) -> None:
        tenant = await self.get(name)
        if tenant.status == "stopped":
            return
        if tenant.status == "frozen":  # a frozen init cannot shut down
            await self._state(name, "stop", force=True)
            return
        try:
            await self._state(name, "stop")
        except Unavailable:  # it does not shut down by itself
            await self._state(name, "stop", force=True)

    async def restart(self, name: str) -> None:
        await self.stop(name)
        await self.start(name)

    async def destroy(self, name: str) -> None:
        tenant = await self.get(name)
        if tenant.status != "stopped":
            await self._state(name, "stop", force=True)
        with _translated(name):
            await self._operate("DELETE", instance_path(name))
        self._changed(name)

    async def filesystem(self, name: str) -> FilesystemRoot:
        return (await self._locate(name)).root

    async def metrics(self, name: str) -> Mapping[str, Any]:
        instance = await self._instance(name)
        state = instance["state"]
        memory = state.get("memory") or {}
        disk = (state.get("disk") or {}).get("root") or {}
        network = {
            interface: {
                "received_bytes": facts["counters"]["bytes_received"],
                "sent_bytes": facts["counters"]["bytes_sent"],
            }
            for interface, facts in (state.get("network") or {}).items()
            if interface != "lo"
        }
        return {
            "cpu_seconds": (state.get("cpu") or {}).get("usage", 0) / 1e9,
            "memory_bytes": memory.get("usage", 0),
            "memory_peak_bytes": memory.get("usage_peak", 0),
            "memory_limit_bytes": memory.get("total", 0),
            "processes": max(0, state.get("processes", 0)),
            "disk_bytes": disk.get("usage"),
            "disk_limit_bytes": disk.get("total"),
            "network": network,
        }

    async def ready(self) -> None:
        with _translated(""):
            await self._incus.get("/1.0")
        if not self._watching:
            raise Unavailable("the Incus event stream is not up yet")

    # --- commands -----------------------------------------------------------------------------------

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self._settings
        check_size(spec.argv, spec.env, one=settings.max_argument, total=settings.max_arguments)
        account = self._account(spec.user)
        cwd = spec.cwd or settings.workspace
        if not cwd.startswith("/"):
            cwd = f"{settings.workspace}/{cwd}"
        order = _Order(spec, account, cwd)
        order.line("")  # refuse what no line can carry before anything is started
        waiting = self._standbys.take(name, spec.pty is not None)
        if isinstance(waiting, IncusProcess):
            try:
                await self._hand_over(waiting, order)
                return waiting
            except ExecFailed as error:
                if "reason" in error.facts:  # said by a shell that lives
                    raise
                log.info("a standby of %s had died: starting anew", name)
            except Unavailable:
                log.info("a standby of %s was lost: starting anew", name)
        process = await self._open(name, spec.pty)
        await self._hand_over(process, order)
        return process

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._standbys.expect(name)

    async def _open(self, name: str, pty: Pty | None) -> IncusProcess:
        """Start a shell that takes a command. Raises what Incus refuses, and `Timeout`."""
        located = await self._locate(name)
        exec_id = f"{self._life}/{secrets.token_hex(8)}"
        script = START_SCRIPT if pty is None else START_SCRIPT_PTY
        command = ["/bin/sh", "-c", script, "sh", exec_id, _CGROUP_LOOKS]
        size = None if pty is None else (pty.cols, pty.rows)
        with _translated(name), _in_time(name, "incusd"):
            async with asyncio.timeout(self._settings.exec_start_timeout):
                sockets = await self._incus.exec(name, command, pty=size)
        return IncusProcess(self, name, exec_id, sockets, located)

    async def _hand_over(self, process: IncusProcess, order: _Order) -> None:
        """Have a shell become the command; ends it where it does not."""
        try:
            with _in_time(process.tenant, "command"):
                async with asyncio.timeout(self._settings.exec_start_timeout):
                    await process.begin(order)
        except BaseException:
            await asyncio.shield(process.abandon())
            raise

    async def _stand_by(self, name: str, terminal: bool) -> IncusProcess:
        """Start a shell and return it once it waits for its line."""
        process = await self._open(name, Pty() if terminal else None)
        try:
            with _in_time(name, "shell"):
                async with asyncio.timeout(self._settings.exec_start_timeout):
                    await process.ready()
        except BaseException:
            await asyncio.shield(process.abandon())
            raise
        return process

    async def kill_inside(self, name: str, exec_id: str, grace: float) -> Killed:
        """End a tree by a second command in the container, where the host's cgroups cannot be reached."""
        limit = self._settings.cancel_timeout
        milliseconds = [str(int(seconds * 1000)) for seconds in (grace, limit)]
        command = ["/bin/sh", "-c", KILL_SCRIPT, "sh", exec_id, *milliseconds]
        with _translated(name):
            async with asyncio.timeout(grace + limit + 5):
                sockets = await self._incus.exec(name, command)
                try:
                    await sockets.close_stdin()
                    said = b""
                    while chunk := await sockets.read("1"):
                        said += chunk
                    await sockets.result()
                finally:
                    await sockets.aclose()
        killed, escalated, survivors, method = said.decode().split()
        return Killed(
            int(killed) - int(survivors),
            escalated == "1",
            int(survivors),
            "cgroup" if method == "cgroup" else "scan",
        )

    async def init_pid(self, name: str) -> int:
        """Return the host's pid of the container's first process now; 0 where it does not run."""
        return (await self._locate(name)).init_pid

    def _account(self, user: str | int | None) -> Account:
        settings = self._settings
        if user is None or user in (settings.workspace_user, settings.workspace_uid):
            uid = settings.workspace_uid
            return Account(settings.workspace_user, uid, uid, f"/home/{settings.workspace_user}")
        if user in ("root", 0, "0"):
            return Account("root", 0, 0, "/root")
        if isinstance(user, int):
            # -1 and its unsigned twin mean "keep", which would be root
            if not 0 < user <= _MAX_ID:
                raise InvalidParams(f"user {user} is out of range", field="user")
            return Account(str(user))
        if not user or len(user) > 256 or user.startswith("-") or not user.isprintable():
            raise InvalidParams("user is a name or a number", field="user")
        if user.isdigit() and not 0 < int(user) <= _MAX_ID:
            raise InvalidParams(f"user {user} is out of range", field="user")
        return Account(user)

    async def sweep(self) -> int:
        """End what commands of an earlier life of this gateway left in running tenants; return how many.

        A gateway that was killed could not end them, and nobody can follow them any more. Commands of this
        life, which may be there already, are told by their folder. Without access to the host's cgroups
        nothing is found.
        """
        ended = 0
        for tenant in await self.list():
            if tenant.status != "running":
                continue
            with contextlib.suppress(NotFound):
                root = of_init((await self._locate(tenant.name)).init_pid)
                if root is None:
                    continue
                for folder in (root / CGROUP_PARENT).glob(f"{self._own}-*"):
                    left = self.cgroup(folder)
                    if folder.name == self._life or not left.reachable():
                        continue
                    killed = await left.kill(0, self._settings.cancel_timeout)
                    ended += killed.killed
                    if killed.killed:
                        log.warning(
                            "ended %d processes left in %s by a gateway that died", killed.killed, tenant.name
                        )
        return ended

    # --- events -------------------------------------------------------------------------------------

    async def watch(self) -> AsyncIterator[TenantEvent]:
        """Yield what happens to tenants, for ever.

        Incus replays nothing: after each gap the instances are listed and the differences published,
        then `gateway.resynced`. The same look is taken every `reconcile_interval`, since Incus drops a
        slow reader's events and a deleted profile key tells nobody.
        """
        known: dict[str, Status] | None = None
        pause = 0.1
        while True:
            try:
                stream = self._incus.events("lifecycle")
                async with contextlib.aclosing(stream):
                    async for event in _with_ticks(stream, self._settings.reconcile_interval):
                        if event is None or event["type"] == "connected":
                            changes, known = await self._differences(known)
                            for change in changes:
                                yield change
                            if event is not None:
                                pause, self._watching = 0.1, True
                                yield TenantEvent("gateway.resynced", None, {"tenants": len(known)})
                            continue
                        async for change in self._lifecycle(event, known or {}):
                            yield change
                raise IncusError("the event stream ended", 0)
            except (GatewayError, IncusError) as error:
                if self._watching:
                    log.warning("Incus event stream lost: %s", error)
            except Exception:
                # one odd answer must not end the watch for ever: look again from the start
                log.exception("an Incus event could not be understood")
            self._watching = False
            self._changed(None)
            await asyncio.sleep(pause)  # back-off of a reconnect, not coordination
            pause = min(pause * 2, 5.0)

    async def _differences(
        self, known: dict[str, Status] | None
    ) -> tuple[Sequence[TenantEvent], dict[str, Status]]:
        now = {tenant.name: tenant.status for tenant in await self.list()}
        changes = [] if known is None else differences(known, now)
        for change in changes:
            self._changed(change.tenant or "")
        return changes, now

    async def _lifecycle(
        self, event: Mapping[str, Any], known: dict[str, Status]
    ) -> AsyncIterator[TenantEvent]:
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        if not action.startswith("instance-") or not name or "/" in name:
            return
        context = metadata.get("context") or {}
        if action == "instance-exec":
            command = context.get("command") or []
            if len(command) > 2 and command[2] in (START_SCRIPT, START_SCRIPT_PTY, KILL_SCRIPT):
                return  # our own, told as exec.started
        elif not action.startswith(_LOOKS):
            self._changed(name)
        old = str(context.get("old_name", "")) if action == "instance-renamed" else ""
        self._changed(old)
        if name not in known and old not in known:
            try:
                await self.get(name)  # is it ours?
            except NotFound:
                return
        requestor = metadata.get("requestor") or {}
        data = {"action": action, "by": requestor.get("username") or requestor.get("protocol") or "guest"}
        if old:
            known.pop(old, None)
            data["from"] = old
        if action == "instance-deleted":
            known.pop(name, None)
        else:
            known[name] = {"tenant.started": "running", "tenant.stopped": "stopped"}.get(  # type: ignore[assignment]
                _LIFECYCLE.get(action, ""), known.get(name, "running")
            )
        # an exec's command line is the tenant's own: only that it happened is told
        yield TenantEvent(_LIFECYCLE.get(action, f"incus.{action}"), name, data)

    def cgroup(self, path: Path) -> Cgroup:
        """Return the group of commands at a path of the host, ended by the broker where there is one."""
        return Cgroup(path) if self._broker is None else Cgroup(path, self._broker.on_tree)

    # --- Incus --------------------------------------------------------------------------------------

    async def _instance(self, name: str) -> dict[str, Any]:
        with _translated(name):
            instance: dict[str, Any] = await self._incus.get(instance_path(name), recursion="1")
        if not _is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        return instance

    async def _locate(self, name: str) -> _Located:
        located = self._located.get(name)
        if located is not None:
            return located
        watching = self._watching  # a change during the look-up must not be kept
        instance = await self._instance(name)
        located = _Located(self._root(name, instance), int(instance["state"].get("pid") or 0))
        if watching and self._watching:
            self._located[name] = located
        return located

    def _root(self, name: str, instance: Mapping[str, Any]) -> FilesystemRoot:
        settings, config = self._settings, instance["config"]
        project = settings.incus_project
        folder = name if project == "default" else f"{project}_{name}"
        pool = instance["expanded_devices"]["root"]["pool"]
        idmap = _idmap(config.get("volatile.idmap.current") or config.get("volatile.idmap.next") or "[]")
        return FilesystemRoot(
            tenant=name,
            path=self._pools / pool / "containers" / folder / "rootfs",
            workspace=settings.workspace,
            uid=settings.workspace_uid,
            gid=settings.workspace_uid,
            idmap=idmap,
            # an empty last idmap means that the kernel maps ids at the mount: the disk holds them unshifted
            shifted=bool(_idmap(config.get("volatile.last_state.idmap") or "[]")),
        )

    async def _state(self, name: str, action: str, *, force: bool = False) -> None:
        timeout = self._settings.lifecycle_timeout
        # a graceful stop gets less than our own limit, so that force still fits
        seconds = -1 if force or action != "stop" else max(1, int(timeout / 4))
        body = {"action": action, "timeout": seconds, "force": force}
        with _translated(name):
            await self._operate("PUT", instance_path(name, "state"), body)
        self._changed(name)

    def _changed(self, name: str | None) -> None:
        """Let go of what is kept of a tenant to which something happened, or of all."""
        if name is None:
            self._located.clear()
        else:
            self._located.pop(name, None)
        self._standbys.drop(name)

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._incus.operate(method, path, body, timeout=self._settings.lifecycle_timeout)


class IncusProcess:
    """One command in a container; see `gateway.runtime.Process`."""

    def __init__(
        self,
        runtime: IncusRuntime,
        tenant: str,
        exec_id: str,
        sockets: ExecSockets,
        located: _Located,
    ) -> None:
        self.tenant = tenant
        self.pid = 0
        self.started_at = 0.0
        self.streams: tuple[StreamName, ...] = ("stdout",)
        self.report = b""
        self._merged = False
        self._runtime = runtime
        self._exec_id = exec_id
        self._sockets = sockets
        self._preamble = Preamble()
        self._located = located
        self._first = b""  # the command's own output that came with the preamble
        self._broken = False

    @property
    def _preamble_stream(self) -> str:
        return "0" if self._sockets.terminal else "2"

    async def ready(self) -> None:
        """Return once the shell waits for its line."""
        await self._feed(until_ready=True)

    async def begin(self, order: _Order) -> None:
        """Hand over the command and return once it runs. Raises `ExecFailed`."""
        preamble, spec = self._preamble, order.spec
        preamble.asked(spec.argv[0][:200], order.cwd[:200], order.account.name[:200])
        self._merged = spec.merged and spec.pty is None
        if spec.pty is None and not spec.merged:
            self.streams = ("stdout", "stderr")
        if spec.pty is not None:  # before it is ready, the terminal would echo the line
            await self.ready()
            await self.resize(spec.pty.cols, spec.pty.rows)
        await self._sockets.write(order.line(self._exec_id))
        if not spec.stdin and spec.pty is None:
            await self._sockets.close_stdin()
        await self._feed(until_ready=False)
        self.pid, self.started_at, self._first = preamble.pid, time.time(), preamble.rest

    async def _feed(self, *, until_ready: bool) -> None:
        preamble = self._preamble
        while not (preamble.ready if until_ready else preamble.started):
            try:
                data = await self._sockets.read(self._preamble_stream)
            except Lost:
                raise Unavailable("the command's start was lost: the tenant or Incus went away") from None
            if not data:
                raise preamble.ended()
            preamble.feed(data)

    async def read(self, stream: StreamName) -> bytes:
        """See `Process`; of a merged command stderr is the report, which `wait` reads."""
        name = "0" if self._sockets.terminal else ("1" if stream == "stdout" else "2")
        if name == self._preamble_stream and self._first:
            first, self._first = self._first, b""
            return first
        try:
            return await self._sockets.read(name)
        except Lost:
            self._broken = True
            return b""

    async def write(self, data: bytes) -> None:
        await self._sockets.write(data)

    async def close_stdin(self) -> None:
        await self._sockets.close_stdin()

    async def resize(self, cols: int, rows: int) -> None:
        # incusd wants the numbers as strings
        size = {"width": str(cols), "height": str(rows)}
        await self._sockets.control({"command": "window-resize", "args": size})

    async def signal(self, number: int) -> None:
        await self._sockets.control({"command": "signal", "signal": number})

    async def wait(self) -> Exit:
        if self._merged:
            while said := await self.read("stderr"):
                self.report = (self.report + said)[:REPORT_MAX]
        try:
            operation = await self._sockets.result()
        except IncusError as error:
            raise Unavailable("the command's exit was lost: Incus went away") from error
        code = operation.metadata.get("return")
        if self._broken or not isinstance(code, int) or code < 0:
            raise Unavailable("the command's exit was lost: the tenant went away")
        await self._tidy()
        return Exit.of(code)

    async def kill(self, grace: float) -> Killed:
        limit = self._runtime._settings.cancel_timeout
        cgroup = self._cgroup()
        if cgroup is not None and cgroup.reachable():
            ended = await cgroup.kill(grace, limit)
            killed = Killed(ended.killed, ended.escalated, ended.survivors)
        else:
            killed = await self._runtime.kill_inside(self.tenant, self._exec_id, grace)
        await self.signal(signal.SIGKILL)  # a leader that left its cgroup; nothing where it has ended
        return killed

    async def aclose(self) -> None:
        await self._sockets.aclose()

    async def abandon(self) -> None:
        """End a command that did not start properly: nothing of it may stay.

        The shell first, so that it goes no further, then what it may have become meanwhile.
        """
        limit = self._runtime._settings.cancel_timeout
        cgroup = self._cgroup()
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(limit):
                await self.signal(signal.SIGKILL)
                if cgroup is not None:
                    await cgroup.kill(0, limit)  # also lets go of the outputs that delay the end
                await self._sockets.result()
                if cgroup is not None:
                    await cgroup.kill(0, limit)
        await self.aclose()

    def _cgroup(self) -> Cgroup | None:
        if self._preamble.ready and self._preamble.method != "cgroup":
            return None
        root = of_init(self._located.init_pid) if self._located.init_pid else None
        return None if root is None else self._runtime.cgroup(root / CGROUP_PARENT / self._exec_id)

    async def _tidy(self) -> None:
        cgroup = self._cgroup()
        if cgroup is not None:
            with contextlib.suppress(Unavailable):  # of a broker; the next start removes it
                await cgroup.remove()


def differences(known: Mapping[str, Status], now: Mapping[str, Status]) -> list[TenantEvent]:
    """Return what must have happened between two looks, marked `resync`: no event told of it."""
    data = {"resync": True}
    changes: list[TenantEvent] = []
    for name, status in now.items():
        if name not in known:
            changes.append(TenantEvent("tenant.created", name, data))
        if known.get(name) != status and status in ("running", "stopped"):
            kind = "tenant.started" if status == "running" else "tenant.stopped"
            if name in known or status == "running":
                changes.append(TenantEvent(kind, name, data))
    changes += [TenantEvent("tenant.destroyed", name, data) for name in known if name not in now]
    return changes


def _is_tenant(instance: Mapping[str, Any]) -> bool:
    # one that is just being made has no expanded configuration yet
    expanded = instance.get("expanded_config") or {}
    return instance.get("type") == "container" and expanded.get(MANAGED) == "true"


def _tenant(instance: Mapping[str, Any]) -> Tenant:
    config, devices = instance["expanded_config"], instance["expanded_devices"]
    port = config.get(PORT, "")
    return Tenant(
        name=instance["name"],
        status=_STATUS.get(instance["status"], "error"),
        domain=config.get(DOMAIN),
        address=_address(instance),
        port=int(port) if port.isdigit() else None,
        created=instance.get("created_at"),
        location=None if instance.get("location") in (None, "", "none") else instance["location"],
        limits={
            "cpu": config.get("limits.cpu"),
            "memory": config.get("limits.memory"),
            "processes": config.get("limits.processes"),
            "disk": devices.get("root", {}).get("size"),
        },
    )


def _address(instance: Mapping[str, Any]) -> str | None:
    for device in instance["expanded_devices"].values():
        if device.get("type") == "nic" and device.get("ipv4.address"):
            return str(device["ipv4.address"])
    for name, interface in ((instance.get("state") or {}).get("network") or {}).items():
        if name != "lo":
            for address in interface["addresses"]:
                if address["family"] == "inet" and address["scope"] == "global":
                    return str(address["address"])
    return None


def _idmap(text: str) -> tuple[IdMap, ...]:
    return tuple(
        IdMap(line["Isuid"], line["Isgid"], line["Nsid"], line["Hostid"], line["Maprange"])
        for line in orjson.loads(text) or ()
    )


@contextlib.contextmanager
def _in_time(name: str, stage: str) -> Iterator[None]:
    """Turn a passed deadline of a start into our error; the log keeps what was waited for."""
    try:
        yield
    except TimeoutError as error:
        log.warning("a command of %s did not start in time: waited for the %s", name, stage)
        raise Timeout("the command did not start in time; the tenant may be overloaded") from error


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn incusd's words, which may name host paths, into ours; the log keeps them."""
    try:
        yield
    except IncusError as error:
        said = error.message
        lowered = said.lower()
        if error.status == 0:
            raise Unavailable(f"Incus cannot be reached; is incusd running? ({said})") from error
        if "not running" in lowered or "is frozen" in lowered or "is stopped" in lowered:
            state = "frozen" if "frozen" in lowered else "stopped"
            raise TenantNotRunning(f"tenant {name} is {state}; start it first", status=state) from error
        if error.status == 404:
            what = f"no tenant {name}" if name else "Incus has no such thing"
            raise NotFound(what) from error
        if error.status == 409 or "already exists" in lowered or "unique constraint" in lowered:
            raise Conflict(f"tenant {name} already exists, or is busy with another change") from error
        if error.status == 408:
            raise Timeout(f"Incus did not finish with tenant {name} in time") from error
        log.warning("Incus on tenant %s: %s", name, said)
        if "retrieve pid" in lowered or "resource temporarily unavailable" in lowered:
            raise Unavailable(
                f"tenant {name} cannot start a process: its process limit is reached"
            ) from error
        raise Unavailable(f"Incus failed with tenant {name}; the gateway's log says why") from error


async def _with_ticks(
    stream: AsyncIterator[dict[str, Any]], interval: float
) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the stream's items, and None whenever `interval` seconds passed without a look."""
    pending: asyncio.Task[dict[str, Any]] | None = None
    due = time.monotonic() + interval
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(stream))
            await asyncio.wait([pending], timeout=max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                due = time.monotonic() + interval
                yield None
            if pending.done():
                task, pending = pending, None
                try:
                    item = task.result()
                except StopAsyncIteration:
                    return
                yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
