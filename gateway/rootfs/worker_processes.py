"""Start worker processes through the broker, check that they still serve their workspaces, and end them."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from gateway.errors import GatewayError, Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.messages import READY, Spawn

_log = logging.getLogger(__name__)

SPAWN_TIMEOUT = 10.0  # seconds for a new worker to get ready, which takes milliseconds
_SAME_INTERVAL = 1.0  # seconds between checks whether a workspace is still the same folder


class Worker(Protocol):
    """The gateway's end of one worker. `checked` is when its workspace was last checked."""

    number: int
    root: FilesystemRoot
    checked: float
    closed: bool

    def close(self) -> None: ...


class Exchanges:
    """The tenants whose workspace is being, or was just, exchanged for another folder."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._ended: dict[str, float] = {}

    @contextmanager
    def of(self, tenant: str) -> Iterator[None]:
        """Make each call check its worker's folder meanwhile, because the old one continues to exist."""
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            now = time.monotonic()
            running, ended = +self._running, {**self._ended, tenant: now}
            self._running = running
            self._ended = {name: end for name, end in ended.items() if now - end < _SAME_INTERVAL}

    def since(self, tenant: str, moment: float) -> bool:
        """Return whether the workspace may have been exchanged since a moment of the monotonic clock."""
        return tenant in self._running or self._ended.get(tenant, 0.0) >= moment


class WorkerProcesses:
    """The processes of one pool of workers."""

    def __init__(self, broker: BrokerClient, exchanges: Exchanges) -> None:
        self._broker, self._exchanges = broker, exchanges
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self, spawn: Spawn) -> tuple[int, socket.socket]:
        """Start a worker; return its number and a socket, on which its first reply will arrive."""
        answer, descriptors = await self._broker.request(spawn.wire())
        connection = socket.socket(fileno=descriptors[0])
        connection.setblocking(False)
        return answer["worker"], connection

    async def ready(self, worker: Worker, first: Awaitable[bytes | memoryview]) -> bytes:
        """Wait for a worker's first reply and return its payload. Raises `Unavailable`."""
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT):
                reply = await first
        except TimeoutError:
            raise Unavailable("a file worker did not start in time") from None
        if reply[0] != READY:
            said = bytes(reply[1:]).decode("utf-8", "replace")
            _log.error("a file worker of %s did not start: %s", worker.root.tenant, said)
            raise Unavailable("cannot start a file worker")
        return bytes(reply[1:])

    async def serves(self, worker: Worker, root: FilesystemRoot) -> bool:
        """Return whether a worker is open and `root` is still the folder it was started for."""
        if worker.closed or worker.root != root:
            return False
        now = time.monotonic()
        known = now - worker.checked < _SAME_INTERVAL
        if known and not self._exchanges.since(root.tenant, worker.checked):
            return True
        worker.checked = now
        answer, _ = await self._broker.request({"do": "same", "worker": worker.number})
        return bool(answer["same"]) and not worker.closed

    def end(self, worker: Worker, last: Callable[[], Awaitable[object]] | None = None) -> None:
        """Close and kill a worker without waiting. `last` runs before that."""
        if last is None:
            worker.close()
        task = asyncio.create_task(self._kill(worker, last))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _kill(self, worker: Worker, last: Callable[[], Awaitable[object]] | None) -> None:
        if last is not None:
            with suppress(GatewayError):  # it has already ended, or hangs
                await last()
            worker.close()
        try:
            await self._broker.request({"do": "kill", "worker": worker.number})
        except Unavailable:
            _log.info("worker ended with the broker")

    async def ended(self) -> None:
        """Wait until ended workers are gone."""
        await asyncio.gather(*self._ending, return_exceptions=True)
