"""Start commands in Incus containers, and kill what an earlier gateway left running.

Every command is an Incus exec of a shell that replaces itself by it (`gateway.runtime.launcher`), in a
separate cgroup inside the container's tree.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import signal
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.errors import ExecFailed, GatewayError, InvalidParams, TenantNotRunning, Timeout, Unavailable
from gateway.holder.holder import HolderClient
from gateway.incus import ExecMemory, ExecSockets, Incus, Lost, NotAwaited
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.command_cgroup import CommandCgroup, commands, lives, of_init
from gateway.rootfs.process_tree import of_command
from gateway.runtime import Adopted, ExecSpec, Process, Pty, StreamName
from gateway.runtime.incus.errors import in_time, translated
from gateway.runtime.incus.process import FORMAT, ContainerScripts, HeldCommand, IncusProcess, close, kept
from gateway.runtime.launcher import (
    DRAIN_SCRIPT,
    KILL_SCRIPT,
    START_SCRIPT,
    Account,
    Preamble,
    check_size,
    command_line,
    start_command,
)
from gateway.runtime.warm_shells import WarmShells
from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class Assignment:
    """A command for a waiting shell to run."""

    spec: ExecSpec
    account: Account
    cwd: str

    def line(self) -> bytes:
        """Return the line to send to the shell. Raises `InvalidParams` if a line cannot carry it."""
        spec = self.spec
        merged = spec.merged and spec.pty is None
        return command_line(spec.argv, cwd=self.cwd, env=spec.env, merged=merged, pty=spec.pty)


class IncusShell:
    """One shell of ours. `holding` is set from when its command is to outlive this process."""

    def __init__(
        self,
        inside: ContainerScripts,
        limit: float,
        tenant: str,
        exec_id: str,
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
        holder: HolderClient | None = None,
    ) -> None:
        self.tenant = tenant
        self.holding: HeldCommand | None = None
        self._waiting: HeldCommand | None = None  # what the holder has of it while it waits
        self._holder = holder
        self._inside, self._limit = inside, limit
        self._exec_id = exec_id
        self._sockets = sockets
        self._preamble = Preamble()
        self._fed = 0  # bytes fed to the preamble
        self._group = cgroup

    @classmethod
    def adopted(
        cls,
        inside: ContainerScripts,
        limit: float,
        own: Mapping[str, Any],
        sockets: ExecSockets,
        cgroup: CommandCgroup | None,
        holding: HeldCommand,
    ) -> IncusShell:
        """Continue a shell to which an earlier process was sending its command, from its recorded facts."""
        self = cls(inside, limit, str(own["tenant"]), str(own["exec"]), sockets, cgroup)
        self.holding = holding
        return self

    async def ready(self) -> None:
        """Wait until the shell is ready for its line."""
        await self._feed(until_ready=True)

    def put(self) -> None:
        """Give a shell that waits to the holder, so that this does not delay its command."""
        if (held := self._holdable()) is not None:
            held.prepare()

    async def begin(self, order: Assignment) -> IncusProcess:
        """Send the command and return it once it runs. Raises `ExecFailed`."""
        spec, terminal = order.spec, order.spec.pty is not None
        self._preamble.asked(spec.argv[0][:200], order.cwd[:200], order.account.name[:200])
        if spec.pty is not None:  # a terminal that is not ready yet would echo the line
            await self.ready()
            await self._sockets.resize(spec.pty.cols, spec.pty.rows)
        line, merged = order.line(), spec.merged and not terminal
        if spec.outlive and (held := self._holdable()) is not None:
            held.runs({**self._own(merged), "starting": len(line)})
            self.holding = held
        else:
            self._withdraw()
        if spec.before is not None:
            await spec.before(self.holding)
        await self._sockets.write(line, end=not spec.stdin and not terminal)
        process = await self._become(merged)
        if process.holding is None:
            self._sockets.forgo()
        return process

    def was_told(self, starting: int) -> bool:
        """Return whether an earlier process has sent the command's whole line, of `starting` bytes."""
        return self._sockets.position >= starting

    async def go_on(self, own: Mapping[str, Any], *, stdin: bool) -> IncusProcess:
        """Return the command that an earlier process sent, once it runs. Raises what `begin` raises."""
        if not stdin and not self._sockets.terminal:  # once more does no harm
            await self._sockets.close_stdin()
        return await self._become(bool(own.get("merged")))

    async def _become(self, merged: bool) -> IncusProcess:
        await self._feed(until_ready=False)
        first = self._preamble.rest  # the command's own output that came with the preamble
        own = self._own(merged, time.time(), self._fed - len(first))
        if self.holding is not None:
            self.holding.runs(own)
        return IncusProcess(self._inside, self._limit, own, self._sockets, self._group, self.holding, first)

    def _own(self, merged: bool, started: float = 0.0, skip: int = 0) -> dict[str, Any]:
        """Return what another gateway process needs to continue the command; see `IncusProcess`."""
        return {
            "tenant": self.tenant,
            "exec": self._exec_id,
            "pid": self._preamble.pid,
            "started": started,
            "terminal": self._sockets.terminal,
            "merged": merged,
            "path": self._preamble.terminal,
            "method": self._preamble.method,
            "cgroup": None if self._group is None else str(self._group.path),
            "skip": skip,
        }

    async def _feed(self, *, until_ready: bool) -> None:
        preamble = self._preamble
        while not (preamble.ready if until_ready else preamble.started):
            try:
                data = await self._sockets.read("0" if self._sockets.terminal else "2")
            except Lost:
                raise Unavailable("lost the command at its start: the tenant or Incus went away") from None
            if not data:
                raise preamble.ended()
            self._fed += len(data)
            preamble.feed(data)

    # --- its place at the holder ----------------------------------------------------------------------

    def _holdable(self) -> HeldCommand | None:
        memory = self._sockets.memory
        if self._waiting is None and memory is not None and self._holder is not None:
            self._waiting = HeldCommand(self._holder, f"command/{self._exec_id}", memory, self._sockets, {})
        return self._waiting

    def _withdraw(self) -> None:
        if self._waiting is not None:
            self._waiting.withdraw()
            self._waiting = None

    def leave(self) -> None:
        """Stop reading from and writing to it; it continues for another process."""
        self._sockets.leave()
        if self.holding is not None:
            self.holding.leave()

    # --- its end --------------------------------------------------------------------------------------

    async def abandon(self) -> None:
        """Kill a shell, or a command that did not start properly, leaving nothing behind."""
        await self.end()
        if self.holding is not None:
            self.holding.drop()
            self.holding = self._waiting = None

    async def end(self) -> None:
        """Kill it, but leave its facts to the holder.

        First the shell, so that it goes no further, then whatever it has started meanwhile.
        """
        without = self._preamble.ready and self._preamble.method != "cgroup"
        cgroup = None if without else self._group
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(self._limit):
                await self._sockets.signal(signal.SIGKILL)
                if cgroup is not None:
                    await cgroup.kill(0, self._limit)  # also closes the outputs, which delay the end
                await self._sockets.result()
                if cgroup is not None:
                    await cgroup.kill(0, self._limit)
        await self.aclose()

    async def aclose(self) -> None:
        """Close the sockets. Idempotent."""
        await self._sockets.aclose()
        if self.holding is None:
            self._withdraw()
            self._sockets.forgo()


log = logging.getLogger(__name__)

_CGROUP_LOOKS: Final = 40  # attempts, two seconds in all, for a container that is booting
_BEGINS: Final = 3  # attempts to start a shell, of five seconds each, within `exec_start_timeout`
_DESCRIPTORS: Final = (6, 8)  # number of a held command's descriptors, with and without a terminal
_FILLED: Final = 2.0  # seconds until shells wait
# seconds for a shell that an earlier process has told what to run; nobody is served until then
_GO_ON: Final = 5.0
_MAX_ID: Final = (1 << 31) - 1
_OURS: Final = (START_SCRIPT, KILL_SCRIPT, DRAIN_SCRIPT)


def is_ours(command: list[str]) -> bool:
    """Return whether an exec's command line starts one of the gateway's own scripts."""
    return len(command) > 2 and command[2] in _OURS


class IncusCommands:
    """Commands of one gateway in the containers of one Incus; see `gateway.runtime.Commands`.

    `init_pid` returns the host pid of a container's init process, 0 if it is not running, and raises
    `NotFound`.
    """

    def __init__(
        self,
        settings: Settings,
        incus: Incus,
        init_pid: Callable[[str], Awaitable[int]],
        holder: HolderClient | None = None,
    ) -> None:
        self.settings = settings
        self._holder = holder
        self._ours = weakref.WeakSet[IncusShell | IncusProcess]()  # those that may be held
        self._adopted: set[str] = set()  # cgroups of commands continued from earlier processes
        self._incus = incus
        self._init_pid = init_pid
        self.inside = ContainerScripts(settings, incus)
        self._broker = BrokerClient(at=settings.broker_socket) if settings.broker_socket else None
        self._warm_shells = WarmShells(
            self._wait_warm,
            maximum=settings.warm_shells,
        )
        # marks the commands of this gateway, in all its processes, apart from other gateways on the host
        self._own = hashlib.sha256(str(settings.state_dir.absolute()).encode()).hexdigest()[:12]
        self._life = f"{self._own}-{secrets.token_hex(4)}"

    async def aclose(self) -> None:
        await self._warm_shells.aclose()
        if self._broker is not None:
            await self._broker.aclose()

    async def exec(self, name: str, spec: ExecSpec) -> Process:
        settings = self.settings
        check_size(spec.argv, spec.env)
        account = self._account(spec.user)
        cwd = spec.cwd or settings.workspace
        if not cwd.startswith("/"):
            cwd = f"{settings.workspace}/{cwd}"
        order = Assignment(spec, account, cwd)
        order.line()  # refuse what a line cannot carry before anything is started
        # warm shells already run as the workspace user
        ours = account == self._account(None)
        waiting = await self._warm_shells.take(name, spec.pty is not None) if ours else None
        if isinstance(waiting, IncusShell):
            try:
                return await self._hand_over(waiting, order)
            except ExecFailed as error:
                if "reason" in error.facts:  # the shell is alive and reported it
                    raise
                log.info("a warm shell of %s had died: starting another", name)
            except Unavailable:
                log.info("a warm shell of %s was lost: starting another", name)
            except Timeout:
                await self._running(name)  # the tenant may have been paused without our knowing yet
                raise
        return await self._hand_over(await self._open(name, spec.pty, account), order)

    def expect(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._warm_shells.expect(name)

    def logs(self, lines: int, follow: bool) -> ExecSpec:
        argv = ["journalctl", "--unit=site.service", f"--lines={lines}", "--output=short-iso", "--quiet"]
        argv += ["--no-pager", "--no-hostname", "--all", *(["--follow"] if follow else [])]
        return ExecSpec(tuple(argv), user="root")

    async def expected(self) -> None:
        """Return once shells wait wherever commands are expected; after a moment in any case."""
        await self._warm_shells.filled(_FILLED)

    async def _running(self, name: str) -> None:
        """Raise `TenantNotRunning` if the tenant is paused or stopped."""
        with translated(name):
            found = await self._incus.instance(name, state=lambda one: False)
        if (status := str(found["status"]).lower()) != "running":
            raise TenantNotRunning(f"tenant {name} is {status}; start it first", status=status)

    async def _open(self, name: str, pty: Pty | None, account: Account) -> IncusShell:
        """Start a shell to run a command as `account`. Raises translated Incus errors and `Timeout`."""
        init_pid = await self._init_pid(name)
        with in_time(name, "host"):
            root = await of_init(init_pid) if init_pid else None
        exec_id = f"{self._life}/{secrets.token_hex(8)}"
        command = start_command(exec_id, account, looks=_CGROUP_LOOKS, terminal=pty is not None)
        size = None if pty is None else (pty.cols, pty.rows)
        with translated(name), in_time(name, "incusd"):
            async with asyncio.timeout(self.settings.exec_start_timeout):
                sockets = await self._begin(name, command, size)
        # from here on nothing waits: whoever is cancelled closes the sockets by way of the shell
        cgroup = None if root is None else self.cgroup(name, root, exec_id)
        if cgroup is not None:
            sockets.open_pipes(cgroup.pipes)
        limit = self.settings.cancel_timeout
        shell = IncusShell(self.inside, limit, name, exec_id, sockets, cgroup, self._holder)
        self._ours.add(shell)
        return shell

    async def _begin(self, name: str, command: list[str], pty: tuple[int, int] | None) -> ExecSockets:
        """Have incusd start a shell; again if it did not wait for its sockets, since nothing has run then.

        On a busy host this process may have its turn too late.
        """
        left = _BEGINS
        while True:
            left -= 1
            try:
                outlive = self._holder is not None and self._holder.there
                return await self._incus.exec(name, command, pty=pty, outlive=outlive)
            except NotAwaited as error:
                if not left:
                    raise
                log.warning("starting a command of %s again: %s", name, error.message)

    async def _hand_over(self, shell: IncusShell, order: Assignment) -> IncusProcess:
        """Make a shell run the command; if that fails, kill the shell."""
        try:
            with in_time(shell.tenant, "command"):
                async with asyncio.timeout(self.settings.exec_start_timeout):
                    process = await shell.begin(order)
        except BaseException:
            await asyncio.shield(shell.abandon())
            raise
        self._ours.add(process)
        return process

    async def _wait_warm(self, name: str, terminal: bool) -> IncusShell:
        """Start a shell and return it once it waits for its command line."""
        shell = await self._open(name, Pty() if terminal else None, self._account(None))
        try:
            with in_time(name, "shell"):
                async with asyncio.timeout(self.settings.exec_start_timeout):
                    await shell.ready()
            shell.put()
        except BaseException:
            await asyncio.shield(shell.abandon())
            raise
        return shell

    def _account(self, user: str | int | None) -> Account:
        settings = self.settings
        if user is None or user in (settings.workspace_user, settings.workspace_uid):
            uid = settings.workspace_uid
            return Account(settings.workspace_user, uid, uid, f"/home/{settings.workspace_user}")
        if user in ("root", 0, "0"):
            return Account("root", 0, 0, "/root")
        if isinstance(user, int):
            # -1 and its unsigned equivalent mean "unchanged", which would be root
            if not 0 < user <= _MAX_ID:
                raise InvalidParams(f"user {user} is out of range", field="user")
            return Account(str(user))
        if not user or len(user) > 256 or user.startswith("-") or not user.isprintable():
            raise InvalidParams("user must be a name or a number", field="user")
        if user.isdecimal() and not 0 < int(user) <= _MAX_ID:
            raise InvalidParams(f"user {user} is out of range", field="user")
        return Account(user)

    async def sweep(self, name: str) -> int:
        """Kill processes left in a running tenant by earlier processes of this gateway; return how many.

        A killed gateway could not end them, and nothing can follow them now. Commands that this process has
        already started are recognised by their cgroup. Without access to the host's cgroups this finds
        nothing.
        """
        ended = 0
        root = await of_init(await self._init_pid(name))
        if root is None:
            return 0
        for life in await lives(root, self._own):
            left = self.cgroup(name, root, life)
            if life == self._life or not await left.reachable():
                continue
            groups = [life]
            if any(group.startswith(f"{life}/") for group in self._adopted):
                groups = [group for group in await commands(root, life) if group not in self._adopted]
            for group in groups:
                killed = await self.cgroup(name, root, group).kill(0, self.settings.cancel_timeout)
                ended += killed.killed
                if killed.killed:
                    log.warning("killed %d processes left in %s by an earlier gateway", killed.killed, name)
        return ended

    async def leave(self) -> None:
        """Leave the held commands to another process: neither read them nor tell the holder anything."""
        for one in self._ours:
            if one.holding is not None:
                one.leave()
        if self._holder is not None:
            await self._holder.leave()

    async def adopt(self) -> list[Adopted]:
        """Adopt the held commands of an earlier process; release those that fail, for `sweep` to kill.

        All at once, since nobody is served meanwhile, and a shell may take its time.
        """
        if self._holder is None:
            return []
        held = await self._holder.taken_over()
        found = await asyncio.gather(*(self._continued(self._holder, *one) for one in held.items()))
        return [adopted for adopted in found if adopted is not None]

    async def _continued(self, holder: HolderClient, name: str, descriptors: list[int]) -> Adopted | None:
        try:
            return await self._adopt(holder, name, descriptors)
        except Exception as error:  # one broken record must not affect the others
            log.warning("cannot continue %s of an earlier process: %r", name, error)
            holder.drop(name)
            return None

    async def _adopt(self, holder: HolderClient, name: str, descriptors: list[int]) -> Adopted | None:
        """Continue one command; None for a shell that waited for its command, which ends."""
        if len(descriptors) == 1:
            memory, sockets = ExecMemory(descriptors[0]), None
        elif len(descriptors) in _DESCRIPTORS:
            sockets = await ExecSockets.adopted(descriptors)
            assert sockets.memory is not None
            memory = sockets.memory
        else:
            close(descriptors)
            raise ValueError("these are not the descriptors of a command")
        try:
            if sockets is not None and not memory.noted:
                await sockets.aclose()
                memory.close()
                holder.drop(name)
                return None
            noted: Any = memory.read_facts()
            if noted["format"] != FORMAT:
                raise ValueError(f"unsupported format {noted['format']}")
            own, facts = noted["own"], noted["facts"]
            if facts["over"] is not None and sockets is not None:  # it had ended and was about to be released
                sockets.ended()
                await sockets.aclose()
                sockets, memory = None, memory.reopened()  # its logs are read once more
            holding = HeldCommand(holder, name, memory, sockets, own)
            holding.go_on()
            if sockets is None:
                told, report = kept(memory, own)
                return Adopted(facts, own["pid"], own["started"], holding, told, None, report)
            cgroup = None
            if own["cgroup"] is not None:
                cgroup = self._group(own["tenant"], Path(own["cgroup"]), own["exec"])
                sockets.open_pipes(cgroup.pipes)
            limit = self.settings.cancel_timeout
            outputs: dict[StreamName, tuple[int, bytes]] = {}
            if "starting" in own:
                shell = IncusShell.adopted(self.inside, limit, own, sockets, cgroup, holding)
                self._ours.add(shell)
                if not shell.was_told(int(own["starting"])):
                    purpose = holding.purpose()
                    await shell.end()
                    return Adopted({**facts, "purpose": purpose}, 0, 0.0, holding, {}, None, begun=False)
                try:
                    async with asyncio.timeout(min(_GO_ON, self.settings.exec_start_timeout)):
                        process = await shell.go_on(own, stdin=bool(facts["stdin"]))
                except BaseException:
                    await shell.aclose()
                    raise
            else:
                process = IncusProcess(self.inside, limit, own, sockets, cgroup, holding)
                outputs = process.caught_up(own)
            self._ours.add(process)
            self._adopted.add(own["exec"])
            return Adopted(facts, process.pid, process.started_at, holding, outputs, process)
        except BaseException:
            if sockets is not None:
                await sockets.aclose()
            memory.close()
            raise

    def drop(self, name: str | None) -> None:
        """Discard the warm shells of a tenant whose state changed, or all."""
        self._warm_shells.drop(name)

    def cgroup(self, name: str, container: Path, group: str) -> CommandCgroup:
        """Return a cgroup of commands below a container's; if there is a broker, it does the killing."""
        return self._group(name, of_command(container, group), group)

    def _group(self, name: str, path: Path, group: str) -> CommandCgroup:
        broker = self._broker
        if broker is None:
            return CommandCgroup(path)
        return CommandCgroup(
            path, lambda step, _: broker.on_tree(name, group, step), lambda: broker.pipes(name, group)
        )
