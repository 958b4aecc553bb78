"""Run workers that pass descriptors or send unsolicited frames; the gateway reads their sockets directly.

They are separate from those of `workers`, whose calls they would delay. A tenant has one of each kind.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import orjson

from gateway.errors import GatewayError, RateLimited, Timeout, Unavailable
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.messages import LENGTH, PASSED, REPLY_MAX, TOLD
from gateway.rootfs.worker_connection import result_of
from gateway.rootfs.worker_processes import WorkerProcesses
from gateway.rootfs.workers import Workers

_READ = 1 << 16  # bytes per read of the socket
_CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_FAREWELL_TIMEOUT = 2.0  # seconds for a worker's last operation

Reply = tuple[bytes, int | None]


class Link:
    """The gateway's end of one worker. Calls are answered in order.

    `told` is called with the payload of each unsolicited frame, `lost` once when the worker ends by itself.
    `holds` counts users; the worker is kept while there are any.
    """

    def __init__(
        self,
        number: int,
        root: FilesystemRoot,
        connection: socket.socket,
        told: Callable[[bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self.number = number
        self.root = root
        self.holds = 0
        self.used = self.checked = time.monotonic()
        self.closed = False
        self._socket = connection
        self._told = told
        self._lost = lost
        self._sending = asyncio.Lock()
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._buffer = bytearray()
        self._passed: deque[int] = deque()
        self._loop = asyncio.get_running_loop()
        self._first = self._expect()
        self._loop.add_reader(connection, self._read)

    async def ready(self) -> bytes:
        """Return the worker's first frame, which precedes any call."""
        reply, _ = await self._first
        return reply

    def _expect(self) -> asyncio.Future[Reply]:
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting.append(reply)
        return reply

    async def call(
        self, operation: str, arguments: dict[str, Any], timeout: float
    ) -> tuple[bytes, int | None]:
        """Run an operation; return its reply and the descriptor passed with it, which the caller owns.

        If the caller has given up, the descriptor is closed. Raises as `Workers.call` does; the worker must
        not be used after a timeout.
        """
        if self.closed:
            raise Unavailable("the file worker ended; try again")
        self.used = time.monotonic()
        request = orjson.dumps((operation, arguments))
        try:
            async with asyncio.timeout(timeout):
                async with self._sending:
                    reply = self._expect()
                    await self._send(LENGTH.pack(len(request)) + request)
                answer, descriptor = await reply
        except TimeoutError:
            self._end()
            raise Timeout("the file operation took too long and was stopped") from None
        try:
            return result_of(operation, answer), descriptor
        except GatewayError:
            if descriptor is not None:
                os.close(descriptor)
            raise

    async def _send(self, frame: bytes) -> None:
        if self.closed:
            raise Unavailable("the file worker ended; try again")
        try:
            await self._loop.sock_sendall(self._socket, frame)
        except OSError:
            self._end()
        except asyncio.CancelledError:
            self._end()  # half a request may have been sent
            raise
        finally:
            if self.closed:
                self._socket.close()

    def _read(self) -> None:
        try:
            # not socket.recv_fds, which ignores its flags, so that children would inherit the descriptors
            data, ancillary, _, _ = self._socket.recvmsg(_READ, socket.CMSG_SPACE(4 * 4), _CLOSE_ON_EXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, ancillary = b"", []
        for level, kind, passed in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._passed.extend(array("i", passed[: len(passed) - len(passed) % 4]))
        # A proper worker passes at most one per reply; more could exhaust this process's descriptors.
        if not data or len(self._passed) > len(self._waiting):
            self._end()
            return
        self._buffer += data
        while len(self._buffer) >= 4:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > REPLY_MAX:
                self._end()
                return
            if len(self._buffer) < 4 + length:
                return
            payload = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            if payload[0] == TOLD:
                self._told(payload[1:])
                continue
            descriptor = self._passed.popleft() if payload[0] == PASSED and self._passed else None
            reply = self._waiting.popleft() if self._waiting else None
            if reply is not None and not reply.done():
                reply.set_result((payload, descriptor))
            elif descriptor is not None:
                os.close(descriptor)

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._lost()

    def close(self) -> None:
        """Close the socket, which ends the worker. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        if self._sending.locked():  # wake the sender, which closes it: the loop still uses the descriptor
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._socket.close()
        while self._passed:
            os.close(self._passed.popleft())
        while self._waiting:
            reply = self._waiting.popleft()
            if not reply.done():
                reply.set_exception(Unavailable("the file worker ended during the call; try again"))
                reply.exception()  # mark as retrieved, or asyncio logs it


class Links:
    """The links of one kind, `loop`, at most one per tenant. An async context manager.

    At most `maximum` run; an unused one makes room, otherwise a new one is refused with `RateLimited`. An
    unused one ends after `idle` seconds. `told` is called with tenant and payload of unsolicited frames,
    `lost` with the tenant whose worker ended by itself. `farewell` is an operation a worker runs before it is
    ended. With `search`, workers have a lower priority.
    """

    def __init__(
        self,
        workers: Workers,
        loop: str,
        *,
        maximum: int,
        idle: float,
        farewell: str = "",
        search: bool = False,
        told: Callable[[str, bytes], None] = lambda tenant, payload: None,
        lost: Callable[[str], None] = lambda tenant: None,
    ) -> None:
        self._workers = workers
        self._processes = WorkerProcesses(workers.broker, workers.exchanges)
        self._kind = loop
        self._maximum = maximum
        self._idle = idle
        self._farewell = farewell
        self._search = search
        self._told = told
        self._lost = lost
        self._links: dict[str, Link] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Links:
        self._sweep()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for tenant in list(self._links):
            self.end(tenant)
        await self._processes.ended()

    async def get(self, root: FilesystemRoot) -> Link:
        """Return the tenant's link, a new one if there is none or its workspace was replaced."""
        lock = self._locks.setdefault(root.tenant, asyncio.Lock())
        async with lock:
            link = self._links.get(root.tenant)
            if link is not None and not await self._processes.serves(link, root):
                self._drop(link)
                self._lost(root.tenant)
                link = None
            if link is None:
                link = await self._spawn(root)
            link.used = time.monotonic()
            return link

    def current(self, tenant: str) -> Link | None:
        """Return the tenant's link, or None."""
        return self._links.get(tenant)

    async def recheck(self, tenant: str, root: FilesystemRoot) -> bool:
        """Return whether a tenant's link, if any, still serves its workspace; if not, end it."""
        link = self._links.get(tenant)
        if link is None:
            return True
        link.checked = 0.0
        if await self._processes.serves(link, root):
            return True
        self.end(tenant)
        return False

    async def _spawn(self, root: FilesystemRoot) -> Link:
        self._make_room()
        spawn = self._workers.spawn(root, self._kind, search=self._search)
        number, connection = await self._processes.start(spawn)
        tenant = root.tenant

        def lost() -> None:
            if self._links.get(tenant) is link:
                self._drop(link)
                self._lost(tenant)

        link = Link(number, root, connection, lambda payload: self._told(tenant, payload), lost)
        self._links[tenant] = link
        try:
            await self._processes.ready(link, link.ready())
        except BaseException:
            self._drop(link)
            raise
        return link

    def _make_room(self) -> None:
        if len(self._links) < self._maximum:
            return
        resting = [link for link in self._links.values() if not link.holds]
        if not resting:
            raise RateLimited("all file workers are busy; try again", limit=self._maximum)
        self._drop(min(resting, key=lambda link: link.used))

    def _drop(self, link: Link) -> None:
        if self._links.get(link.root.tenant) is link:
            del self._links[link.root.tenant]
        last = partial(link.call, self._farewell, {}, _FAREWELL_TIMEOUT) if self._farewell else None
        self._processes.end(link, last)

    def end(self, tenant: str) -> None:
        """End a tenant's worker, if any, without waiting; `lost` is not called."""
        link = self._links.get(tenant)
        if link is not None:
            self._drop(link)

    async def ended(self) -> None:
        """Wait until ended workers are gone."""
        await self._processes.ended()

    def _sweep(self) -> None:
        now = time.monotonic()
        for link in list(self._links.values()):
            if not link.holds and now - link.used >= self._idle:
                self._drop(link)
        for tenant in [name for name, lock in self._locks.items() if not lock.locked()]:
            if tenant not in self._links:
                del self._locks[tenant]
        self._sweeper = asyncio.get_running_loop().call_later(min(self._idle / 4, 30.0), self._sweep)
