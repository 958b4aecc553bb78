"""Starts worker processes through the broker, checks that each still serves its workspace, and ends them."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
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


class WorkerProcesses:
    """The processes behind one pool of workers."""

    def __init__(self, broker: BrokerClient) -> None:
        self._broker = broker
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
        if now - worker.checked < _SAME_INTERVAL:
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
