"""The gateway's client of the broker, and what the gateway does as root without a broker at a socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from gateway import errors
from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.rootfs import connections
from gateway.rootfs.locations import Instances, TenantLocator
from gateway.rootfs.messages import MESSAGE_MAX
from gateway.settings import Settings

_log = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds per request

# -c, not -m: the broker must use this process's import path, whatever the environment says.
BOOT = (
    "import sys, importlib; sys.path[:] = sys.argv[1].split('\\n'); "
    "module, _, name = sys.argv[2].partition(':'); "
    "getattr(importlib.import_module(module), name)(sys.argv[3:])"
)

# error classes by wire code
REFUSALS: dict[str, type[GatewayError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GatewayError) and kind is not GatewayError
}


def instances(settings: Settings) -> Instances:
    """Return the tenants of a gateway with these settings."""
    return Instances(
        str(settings.incus_socket),
        settings.incus_project,
        settings.workspace,
        settings.workspace_uid,
        settings.network,
        settings.pool,
        settings.standby_project,
    )


class BrokerClient:
    """Starts the broker and sends requests to it, one at a time.

    The broker is started with the first request, and restarted if it has died. `tenants` describes how it
    finds tenants (see `gateway.rootfs.locations`). With `at`, the client connects to a broker that listens
    there, which has its own description.
    """

    def __init__(
        self,
        operations: str = "",
        tenants: Mapping[str, Any] | None = None,
        *,
        at: Path | None = None,
    ) -> None:
        self._at = at
        self._operations = operations
        self._tenants = orjson.dumps(tenants).decode()
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._readable: asyncio.Future[None] | None = None

    async def prepare(self) -> None:
        """Start the broker ahead of its first request. A hint, never an error."""
        async with self._lock:
            if self._socket is None and self._at is None:
                with suppress(OSError):
                    await self._start()

    async def request(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Send a request; return the answer and the descriptors passed with it.

        Raises the broker's refusals, and `Unavailable` if it fails or is unreachable; its message is then
        only logged.
        """
        async with self._lock:
            # A separate task, which is awaited even if the caller is cancelled: the next request must not get
            # this one's answer with the descriptor of a tenant's worker.
            exchange = asyncio.ensure_future(self._exchange(message))
            cancelled: asyncio.CancelledError | None = None
            while not exchange.done():
                try:
                    await asyncio.wait([exchange])
                except asyncio.CancelledError as error:
                    cancelled = error
            if cancelled is not None:
                if not exchange.cancelled() and exchange.exception() is None:
                    for descriptor in exchange.result()[1]:
                        os.close(descriptor)
                raise cancelled
            answer, descriptors = exchange.result()
        if "refused" in answer:
            raise REFUSALS.get(answer["refused"], Unavailable)(answer["message"], **answer["facts"])
        if "error" in answer:
            _log.warning("the broker refused to %s: %s", message["do"], answer["error"])
            raise Unavailable("the file service could not open the workspace")
        return answer, descriptors

    async def on_tree(self, tenant: str, group: str, step: str) -> None:
        """Run one of `process_tree.STEPS` on a command's cgroup, see `process_tree.of_command`.

        A cgroup that does not exist has ended with its container. Raises `Unavailable`.
        """
        with suppress(NotFound):
            await self.request({"do": "tree", "tenant": tenant, "group": group, "step": step})

    async def pipes(self, tenant: str, group: str) -> list[int]:
        """Open a command's outputs, see `command_pipes.opened`. Raises as `relieve`."""
        _, descriptors = await self.request({"do": "pipes", "tenant": tenant, "group": group})
        return descriptors

    async def relieve(self, tenant: str) -> tuple[str, int] | None:
        """Kill the biggest process of a tenant's site; return its name and bytes, None if there is none.

        Raises `Unavailable`, and `NotFound` if the tenant is not running.
        """
        answer, _ = await self.request({"do": "relieve", "tenant": tenant})
        return (str(answer["process"]), int(answer["bytes"])) if answer else None

    async def reserve(self, tenant: str) -> None:
        """Reserve part of a tenant's CPU for commands, see `site_cgroup.reserve`. Raises as `relieve`."""
        await self.request({"do": "reserve", "tenant": tenant})

    async def bind_ports(self, tenant: str) -> None:
        """Bind a tenant's MAC address to its port, see `rootfs.bridge_port`. Raises as `relieve`."""
        await self.request({"do": "bind_ports", "tenant": tenant})

    async def enforce_quotas(self) -> list[str]:
        """Enforce the disk quotas, and bound how far the kernel reads ahead in the tenants' pool.

        Returns what was changed of the quotas. Raises `Unavailable`.
        """
        answer, _ = await self.request({"do": "quotas"})
        if ahead := answer["read_ahead"]:
            _log.info("%s", ahead)
        return [str(words) for words in answer["changed"]]

    async def limit_disk(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        """Limit a disk, see `locations.TenantLocator.limit_disk`. Raises `NotFound` and `Unavailable`."""
        what = {"do": "limit_disk", "instance": instance, "ending": ending, "standby": standby}
        answer, _ = await self.request(what)
        return None if answer["counted"] is None else int(answer["counted"])

    async def free_disks(self) -> None:
        """Stop counting what was deleted. Raises `Unavailable`."""
        await self.request({"do": "free_disks"})

    async def changed(self, tenant: str, workspace: str, since: str) -> bool:
        """Return whether anything on a tenant's root disk has changed since a snapshot, or may have.

        Raises `Unavailable`, and `NotFound` if there is no such tenant.
        """
        request = {"do": "changed", "tenant": tenant, "workspace": workspace, "since": since}
        answer, _ = await self.request(request)
        return bool(answer["changed"])

    async def break_off(self, tenant: str, port: int, leave: Collection[int]) -> int:
        """Close this host's connections to a tenant's port that the tenant does not read; return how many.

        Connections from the local ports `leave` are kept. Raises as `relieve`.
        """
        request = {"do": "break_off", "tenant": tenant, "port": port, "leave": [*leave]}
        answer, _ = await self.request(request)
        return int(answer["ended"])

    async def _exchange(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        try:
            async with asyncio.timeout(_TIMEOUT):
                connection = self._socket or await (self._connect() if self._at else self._start())
                connection.send(orjson.dumps(message))
                await self._until_readable(connection)
                data, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_MAX, 2)
                for descriptor in descriptors:  # recv_fds makes them inheritable
                    os.set_inheritable(descriptor, False)
        except (OSError, TimeoutError) as error:
            await self.aclose()
            raise Unavailable("the file service did not answer; try again") from error
        except asyncio.CancelledError:  # only when the loop ends
            self._hang_up()
            raise
        if not data:
            await self.aclose()
            raise Unavailable("the file service ended; try again")
        answer: dict[str, Any] = orjson.loads(data)
        return answer, descriptors

    async def _connect(self) -> socket.socket:
        assert self._at is not None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, str(self._at))
        except BaseException:
            connection.close()
            raise
        self._socket = connection
        return connection

    async def _start(self) -> socket.socket:
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-ISBc",
                BOOT,
                "\n".join(path or str(Path.cwd()) for path in sys.path),
                "gateway.rootfs.broker:main",
                str(theirs.fileno()),
                self._operations,
                self._tenants,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        self._socket = ours
        return ours

    async def _until_readable(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._readable = readable = loop.create_future()
        loop.add_reader(connection, _resolve, readable)
        try:
            await readable
        finally:
            if self._readable is readable:
                loop.remove_reader(connection)
                self._readable = None

    def _hang_up(self) -> None:
        if self._socket is not None:
            if self._readable is not None:
                # before the descriptor's number is reused, which would confuse the loop
                asyncio.get_running_loop().remove_reader(self._socket)
                _resolve(self._readable)
                self._readable = None
            self._socket.close()
            self._socket = None

    async def aclose(self) -> None:
        """End the broker and all its workers. Idempotent."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            try:
                async with asyncio.timeout(2):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class DiskLimits:
    """Limits disks through the broker at a socket or, without one, in this process as root.

    Not by the connection of the file tools: their requests would wait meanwhile.
    """

    def __init__(self, broker: Path | None, tenants: TenantLocator) -> None:
        self._tenants = tenants
        self._broker = None if broker is None else BrokerClient(at=broker)
        self._freeing = None if broker is None else BrokerClient(at=broker)

    async def limit(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        """Limit an instance's disk as its size says; return the bytes that count.

        Call it before and after each start, before each stop as `ending`, and when the size has changed:
        while it does not run, a full disk has some slack for Incus. Of a `standby` copy each time that it has
        got something: it is only counted. Returns None for other quotas, which are Incus's affair. Raises
        `NotFound` and `Unavailable`.
        """
        if self._broker is not None:
            return await self._broker.limit_disk(instance, ending=ending, standby=standby)
        if os.geteuid() != 0:
            return None
        limit = partial(self._tenants.limit_disk, instance, ending=ending, standby=standby)
        return await asyncio.to_thread(limit)

    async def free(self) -> None:
        """Stop counting what was deleted; after some seconds or a failure, leave it to the kernel."""
        try:
            if self._freeing is not None:
                await self._freeing.free_disks()
            elif os.geteuid() == 0:
                await asyncio.to_thread(self._tenants.free_disks)
        except (GatewayError, OSError) as error:
            _log.warning("deleted data counts for up to half a minute more: %s", error)

    async def aclose(self) -> None:
        for broker in (self._broker, self._freeing):
            if broker is not None:
                await broker.aclose()


class DeadMemberCutter:
    """Closes connections to dead members without incusd, by the broker or, without one, as root.

    Not by the connection of the file tools: their requests wait for incusd meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        at = settings.broker_socket
        self._broker = None if at is None else BrokerClient(at=at)
        self._incus = settings.incus_socket.parent

    async def cut_off(self, member: str) -> int:
        """Close the connections with a member's Incus at HOST:PORT; return how many.

        Raises `NotFound` and `Unavailable`.
        """
        if self._broker is not None:
            answer, _ = await self._broker.request({"do": "cut_off", "member": member})
            return int(answer["ended"])

        def cut() -> int:
            return connections.cut_off(member, connections.members(self._incus))

        try:
            return await asyncio.to_thread(cut)
        except OSError as error:
            raise Unavailable(f"this process may not close connections: {error}") from error

    async def aclose(self) -> None:
        if self._broker is not None:
            await self._broker.aclose()
