"""Starts worker processes through the broker, checks that each still serves its workspace, and ends them."""

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
from gateway.rootfs.spawn import Spawn
from gateway.rootfs.worker import READY

_log = logging.getLogger(__name__)

SPAWN_TIMEOUT = 10.0  # seconds until a new worker must be ready; it takes milliseconds
_SAME_INTERVAL = 1.0  # seconds between two looks whether a workspace is still the same folder


class Worker(Protocol):
    """The gateway's end of one worker. `checked` is when its workspace was last looked at."""

    number: int
    root: FilesystemRoot
    checked: float
    closed: bool

    def close(self) -> None: ...


class Exchanges:
    """The tenants whose workspace is being exchanged for another folder, or was a moment ago."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._ended: dict[str, float] = {}

    @contextmanager
    def of(self, tenant: str) -> Iterator[None]:
        """Have each call look whether its worker's folder is still the workspace: the old one lives on."""
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
        """Say whether the workspace may be another folder than it was at a moment of the monotonic clock."""
        return tenant in self._running or self._ended.get(tenant, 0.0) >= moment


class WorkerProcesses:
    """The processes behind one pool of workers."""

    def __init__(self, broker: BrokerClient, exchanges: Exchanges) -> None:
        self._broker, self._exchanges = broker, exchanges
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self, spawn: Spawn) -> tuple[int, socket.socket]:
        """Start a worker; return its number and the socket to it, on which its first reply is to come."""
        answer, descriptors = await self._broker.request(spawn.wire())
        connection = socket.socket(fileno=descriptors[0])
        connection.setblocking(False)
        return answer["worker"], connection

    async def ready(self, worker: Worker, first: Awaitable[bytes | memoryview]) -> bytes:
        """Wait for the first reply of a worker; return what it says of itself. Raises `Unavailable`."""
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT):
                reply = await first
        except TimeoutError:
            raise Unavailable("a file worker did not start in time") from None
        if reply[0] != READY:
            said = bytes(reply[1:]).decode("utf-8", "replace")
            _log.error("a file worker of %s did not start: %s", worker.root.tenant, said)
            raise Unavailable("a file worker could not be started")
        return bytes(reply[1:])

    async def serves(self, worker: Worker, root: FilesystemRoot) -> bool:
        """Say whether a worker is open, and `root` still the folder that it was started for."""
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
        """Close a worker and have it killed, without waiting for that. `last` is what it does before."""
        if last is None:
            worker.close()
        task = asyncio.create_task(self._kill(worker, last))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _kill(self, worker: Worker, last: Callable[[], Awaitable[object]] | None) -> None:
        if last is not None:
            with suppress(GatewayError):  # it has ended by itself, or hangs
                await last()
            worker.close()
        try:
            await self._broker.request({"do": "kill", "worker": worker.number})
        except Unavailable:
            _log.info("worker ended with the broker")

    async def ended(self) -> None:
        """Return once the workers that were ended are gone."""
        await asyncio.gather(*self._ending, return_exceptions=True)
