"""Run calls in the tenants' workers: start workers, give each one call at a time, and end them.

A tenant has a few workers for calls, started on demand: one for short calls, one for calls that may take
long, so that a heavy Grep does not delay a Read, and more if a search is divided among processors. Each runs
one call at a time, which serialises all writes of a tenant, so that of two concurrent edits of a file none is
lost. Long calls cannot change anything, except the removal of whole trees, which has a separate worker. The
end of a worker costs only one call. Workers that pass descriptors or send unsolicited frames are in `links`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import orjson

from gateway.errors import GatewayError, InvalidParams, RateLimited, Timeout, Unavailable
from gateway.rootfs import FilesystemRoot, kernel
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.messages import CallLimits, Spawn
from gateway.rootfs.worker import NAMED_MAX, SCAN, SCANNED
from gateway.rootfs.worker_connection import Forgotten, WorkerConnection, forgotten, result_of
from gateway.rootfs.worker_processes import SPAWN_TIMEOUT, Exchanges, WorkerProcesses

if TYPE_CHECKING:
    from gateway.settings import Settings

# limits that have a setting
_SET = ("write_max", "tool_timeout", "list_max", "watch_folders", "watch_changes")
_GRACE = 1.0  # seconds after its own deadline before a worker without an answer is killed
_ALONE = 2.0  # seconds without calls after which another tenant counts as inactive
_CHANGES = -1  # the lane of long calls that change something


class _Slot:
    """The slot of one worker of a tenant. `lock` admits one call at a time, in order.

    `starting` is done once the broker has started a worker; if the tenant was `forgotten` meanwhile, it is
    ended.
    """

    __slots__ = ("broke", "forgotten", "lock", "starting", "waiting", "worker")

    def __init__(self) -> None:
        self.broke = False
        self.forgotten = False
        self.lock = asyncio.Lock()
        self.starting: asyncio.Future[None] | None = None
        self.waiting = 0
        self.worker: WorkerConnection | None = None


class Workers:
    """Runs operations in the tenants' workers. An async context manager.

    `tenants` describes how to find tenants; a broker running as a service has its own description.
    `operations` names the module whose table the workers serve. At most `max_workers` run; if all are busy, a
    call that needs another raises `RateLimited`. A worker ends after `worker_idle` seconds without a call, by
    `forget`, when its workspace was replaced, and with the gateway. `opened` is called for each new worker
    for short calls; its argument `broke` tells whether the previous one was ended in the middle of a call.
    """

    def __init__(
        self,
        settings: Settings,
        tenants: Mapping[str, Any] | None = None,
        operations: str = "gateway.tools.worker_operations",
        limits: CallLimits = CallLimits(),  # noqa: B008  # it is frozen
    ) -> None:
        self._limits = replace(limits, **{name: getattr(settings, name) for name in _SET})
        self._memory = settings.worker_memory
        self._idle = settings.worker_idle
        self._maximum = settings.max_workers
        self.broker = BrokerClient(operations, tenants, at=settings.broker_socket)
        self.exchanges = Exchanges()
        self._processes = WorkerProcesses(self.broker, self.exchanges)
        self.opened: Callable[[FilesystemRoot, bool], None] = lambda root, broke: None
        # by tenant and lane: 0 for short calls, from 1 on for searches, `_CHANGES`
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Workers:
        kernel.take_turns(short=True)  # passing on an answer is as urgent as producing it
        self._sweep()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for slot in self._slots.values():
            if slot.worker is not None:
                slot.worker.close()
        self._slots.clear()
        await self._processes.ended()
        await self.broker.aclose()

    async def call(
        self,
        root: FilesystemRoot,
        operation: str,
        arguments: dict[str, Any],
        *,
        search: bool = False,
        share: int = 0,
        changes: bool = False,
    ) -> bytes:
        """Run an operation and return its reply. `search` marks operations that may take long.

        Such an operation cannot change anything unless `changes` is set, and may be one `share` of several.

        Raises the operation's errors; `Unavailable` if the worker ended meanwhile, `Timeout` if it did not
        answer in time (it is killed, and the next call gets a new one), `RateLimited` and `InvalidParams`.
        """
        key = (root.tenant, 0 if not search else _CHANGES if changes else 1 + share)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot()
        slot.waiting += 1
        try:
            async with slot.lock:
                try:  # only now, so that waiting arguments are not in memory twice
                    request = orjson.dumps((operation, arguments))
                except TypeError as error:
                    raise InvalidParams("the input is not valid JSON") from error
                looks = search and not changes
                worker = await self._ready(slot, root, search=search, looks=looks, helps=share > 0)
                worker.send(request)
                try:
                    return result_of(operation, await self._answer(slot, worker, search=search))
                finally:
                    slot.broke |= worker.closed
        finally:
            slot.waiting -= 1

    def rests(self, tenant: str) -> bool:
        """Return whether no call to the tenant's worker for short calls is running or waiting."""
        slot = self._slots.get((tenant, 0))
        return slot is None or not slot.waiting

    def alone(self, tenant: str) -> bool:
        """Return whether no other tenant's worker is, or recently was, in use."""
        since = time.monotonic() - _ALONE
        return not any(
            slot.waiting or (slot.worker is not None and slot.worker.used > since)
            for (other, _), slot in self._slots.items()
            if other != tenant
        )

    async def scan(self, root: FilesystemRoot, arguments: dict[str, Any], shares: int) -> bytes | None:
        """Return the names of matching files, each terminated by NUL, found by several workers in parallel.

        Returns None if the search must be done in another way. Raises `Timeout`, and `Unavailable` if
        `forget` ended the tenant's workers.
        """
        scans = [
            asyncio.ensure_future(
                self.call(root, SCAN, {**arguments, "share": [share, shares]}, search=True, share=share)
            )
            for share in range(shares)
        ]
        try:
            found = await asyncio.gather(*scans)
        except Forgotten:
            raise
        except (RateLimited, Unavailable):
            return None
        finally:
            for scan in scans:
                scan.cancel()
            await asyncio.gather(*scans, return_exceptions=True)  # so that none uses the broker later
        names = b"".join(one.removeprefix(SCANNED) for one in found)
        whole = all(one.startswith(SCANNED) for one in found) and len(names) <= NAMED_MAX
        return names if whole else None

    async def _answer(self, slot: _Slot, worker: WorkerConnection, *, search: bool) -> memoryview:
        try:
            reply = await worker.reply(self._limits.tool_timeout + _GRACE)
        except TimeoutError:
            self._end(slot, worker)
            raise Timeout("the file operation took too long and was stopped") from None
        except asyncio.CancelledError:
            if search:
                self._end(slot, worker)  # it would continue searching for nobody
            raise
        worker.used = time.monotonic()
        return reply

    async def _ready(
        self, slot: _Slot, root: FilesystemRoot, *, search: bool, looks: bool, helps: bool
    ) -> WorkerConnection:
        """Return a worker that is ready for a request, starting one if necessary."""
        worker = slot.worker
        if worker is not None and worker.answers and not worker.closed:
            # Its last caller gave up. Wait for the end, because a write must not be interrupted.
            try:
                await worker.reply(self._limits.tool_timeout + _GRACE)
            except (TimeoutError, GatewayError):
                self._end(slot, worker)
        if worker is not None and not worker.closed:
            if await self._processes.serves(worker, root):
                return worker
            self._end(slot, worker)
        slot.worker = None
        self._make_room(helps=helps)
        return await self._spawn(slot, root, search=search, looks=looks)

    async def _spawn(
        self, slot: _Slot, root: FilesystemRoot, *, search: bool, looks: bool
    ) -> WorkerConnection:
        spawn = self.spawn(root, search=search, looks=looks)
        slot.forgotten = False
        slot.starting = starting = asyncio.get_running_loop().create_future()
        try:
            number, connection = await self._processes.start(spawn)
            worker = WorkerConnection(number, root)
            if slot.forgotten:
                connection.close()
                self._end(slot, worker)
                raise forgotten()
            slot.worker = worker
        finally:
            slot.starting = None
            starting.set_result(None)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=connection)
            said = await self._processes.ready(worker, worker.reply(SPAWN_TIMEOUT))
        except BaseException:
            self._end(slot, worker)
            raise
        worker.layers = tuple(orjson.loads(said))
        if not search:
            broke, slot.broke = slot.broke, False
            self.opened(root, broke)
        return worker

    def spawn(
        self, root: FilesystemRoot, loop: str = "", *, search: bool = False, looks: bool = False
    ) -> Spawn:
        """Return the broker's request for a worker with this gateway's limits."""
        return Spawn(root.tenant, root.workspace, self._limits, self._memory, loop, search, looks)

    def layers(self, tenant: str, *, search: bool = False) -> tuple[str, ...] | None:
        """Return the confinement's layers of a tenant's worker, None if it has none."""
        slot = self._slots.get((tenant, int(search)))
        return slot.worker.layers if slot and slot.worker and not slot.worker.closed else None

    def _make_room(self, *, helps: bool) -> None:
        running = [
            slot for slot in self._slots.values() if slot.worker is not None or slot.starting is not None
        ]
        resting = [slot for slot in running if not slot.waiting]
        # workers that only speed up a search leave half of them to other calls
        if helps and len(running) - len(resting) >= self._maximum // 2:
            raise RateLimited("too many file workers are busy to share a search", limit=self._maximum)
        if len(running) < self._maximum:
            return
        if not resting:
            raise RateLimited("all file workers are busy; try again", limit=self._maximum)
        oldest = min(resting, key=lambda slot: slot.worker.used if slot.worker else 0)
        assert oldest.worker is not None
        self._end(oldest, oldest.worker)

    def _end(self, slot: _Slot, worker: WorkerConnection) -> None:
        """Remove a worker from its slot and kill it without waiting."""
        if slot.worker is worker:
            slot.worker = None
        self._processes.end(worker)

    async def forget(self, tenant: str) -> None:
        """End a tenant's workers and wait until they are gone: before a stop, destroy or restore.

        Their mounts vanish with them, so that the storage can be unmounted. Calls in flight get
        `Unavailable`.
        """
        starting = []
        for (whose, _), slot in self._slots.items():
            # The slot stays, so that waiting and new calls share one queue. `_sweep` drops it.
            if whose == tenant and slot.worker is not None:
                slot.worker.forget()
                self._end(slot, slot.worker)
            elif whose == tenant and slot.starting is not None:
                slot.forgotten = True
                starting.append(slot.starting)
        if starting:
            await asyncio.wait(starting)
        await self._processes.ended()

    def _sweep(self) -> None:
        """End workers idle for too long; reschedules itself several times per idle span."""
        now = time.monotonic()
        for key, slot in list(self._slots.items()):
            worker = slot.worker
            if slot.waiting or (worker is not None and now - worker.used < self._idle and not worker.closed):
                continue
            if worker is not None:
                self._end(slot, worker)
            del self._slots[key]
        pause = min(self._idle / 4, 30.0)
        self._sweeper = asyncio.get_running_loop().call_later(pause, self._sweep)
