"""Work that runs as long as the gateway: it watches tenants and reacts to what happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from gateway.api.http import end
from gateway.api.services import Services
from gateway.errors import GatewayError, NotFound
from gateway.protocol import CloseCode
from gateway.runtime import TenantEvent
from gateway.runtime.incus import IncusRuntime
from gateway.storage.store import StoreFailed
from gateway.tasks import log_errors, run_forever

log = logging.getLogger(__name__)

# after these events a tenant may have other files, or its files must be closed
_MOVED: Final = frozenset(
    {
        "tenant.stopped",
        "tenant.restarted",
        "tenant.destroyed",
        "tenant.renamed",
        "incus.instance-restored",
        "incus.instance-updated",
    }
)

# after these events a tenant of this name is new, or an instance was renamed to it
_MADE: Final = frozenset({"tenant.created", "tenant.renamed"})

_STARTED: Final = frozenset({"tenant.started", "tenant.restarted", "gateway.resynced"})


# seconds until the websockets of a destroyed tenant are closed: first its clients hear how commands ended
_FAREWELL: Final = 0.5


@contextlib.asynccontextmanager
async def running(services: Services) -> AsyncIterator[BackgroundJobs]:
    """Run all background work, restarting what fails, until the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        background = BackgroundJobs(services)
        for name, work in background.jobs().items():
            task = asyncio.create_task(run_forever(name, work), name=name)
            background.tasks.append(task)
            stack.push_async_callback(end, task)
        yield background


class BackgroundJobs:
    """The background work of one gateway, in `tasks`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.tasks: list[asyncio.Task[None]] = []
        self._unbound: set[str | None] = set()  # tenants that started; None for all that run
        self._started = asyncio.Event()  # set while `_unbound` is not empty
        self._seen = asyncio.Event()  # set once the runtime reports changes
        self._resynced = asyncio.Event()  # set once all existing tenants have been seen
        self._connected = asyncio.Event()  # set after each connection to incusd

    def cancel(self) -> None:
        """End all work. It publishes nothing after the loop's next turn."""
        for task in self.tasks:
            task.cancel()

    async def seen(self, seconds: float) -> None:
        """Wait, up to `seconds`, until all existing tenants have been seen."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._seen.wait()

    def jobs(self) -> Mapping[str, Callable[[], Coroutine[Any, Any, None]]]:
        """Return the jobs by their names in the log."""
        services = self._services
        jobs: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "the watch of tenants": self._watch,
            "the count of events": partial(services.metrics.follow, services.bus),
            "the measurement of the event loop": services.metrics.sample_lag,
            "the recovery of deployments": self._recover,
            "the watch of tokens": services.grants.watch,
            "the history of deployments": services.history.follow,
        }
        jobs |= services.topology.jobs()
        if isinstance(services.runtime, IncusRuntime):
            jobs["the watch of addresses"] = self._bind_ports
            jobs["the watch of disk quotas"] = self._enforce_quotas
            jobs["the watch of limits"] = partial(self._enforce_limits, services.runtime)
            jobs["the kernel's reports on memory"] = partial(self._tell_starved, services.runtime)
        return jobs

    async def _watch(self) -> None:
        """Publish what happens to tenants, and close the files of those that changed."""
        services = self._services
        notices = [
            services.deployments.noticed,
            services.health.noticed,
            services.idle.noticed,
            services.history.noticed,
        ]
        if services.pressure is not None:
            notices.append(services.pressure.noticed)
        swept = False
        async for event in services.names.watch(services.runtime):
            self._seen.set()
            if event.type == "gateway.resynced" and not swept:
                swept = True
                with log_errors("the search for what an earlier gateway left"):
                    await services.runtime.sweep()
            with log_errors(f"the clean-up after {event.type} of {event.tenant}"):
                await self._close_files(event)
            if event.type in _STARTED:
                self._unbound.add(event.tenant)
                self._started.set()
            facts = services.idle.explained(services.lifecycle.explained(event))
            services.topology.changed()
            for notice in notices:
                with log_errors(f"the handling of {event.type} of {event.tenant}"):
                    notice(event)
            if event.type == "gateway.resynced":
                self._resynced.set()
                self._connected.set()
            told = services.bus.publish(event.type, event.tenant, facts)
            await services.names.took(services.runtime, event, told)
            # one that was missed may be of an earlier tenant of this name
            if event.type == "tenant.destroyed" and not event.data.get("resync"):
                later = asyncio.get_running_loop().call_later
                for one in services.connections:
                    if one.tenant == event.tenant:
                        later(_FAREWELL, one.close, CloseCode.UNKNOWN_TENANT, "the tenant was destroyed")

    async def _close_files(self, event: TenantEvent) -> None:
        services = self._services
        if event.tenant is not None and event.type in _MOVED:
            await services.workers.forget(event.tenant)
            if event.type == "incus.instance-updated":
                await services.files.recheck(event.tenant)  # usually only a setting has changed
            else:
                await services.files.forget(event.tenant, event.type.rpartition(".")[2])
        if event.ended is not None:
            services.toolbox.sessions.forget(event.ended)
            try:
                await services.idempotency.forget_tenant(event.ended)
            except StoreFailed as failed:
                log.warning("cannot remove the call records of %s: %s", event.ended, failed.message)
            await services.lifecycle.forget(event.ended)
        # not when the old one is destroyed: its last clients may still ask how their commands ended
        if event.tenant is not None and event.type in _MADE:
            services.execs.forget_tenant(event.tenant)

    async def _recover(self) -> None:
        """Finish or undo the deployments of an earlier process, once Incus answers."""
        await self._resynced.wait()
        await self._services.deployments.recover()

    async def _tell_starved(self, runtime: IncusRuntime) -> None:
        async with contextlib.aclosing(runtime.changes.starved()) as told:
            async for event in told:
                if self._services.pressure is not None:
                    self._services.pressure.noticed(event)
                self._services.bus.publish(event.type, event.tenant, event.data)

    async def _enforce_limits(self, runtime: IncusRuntime) -> None:
        """Keep the limits of tenants in force; see `Resizing.enforce`."""
        while True:
            await asyncio.sleep(self._services.settings.reconcile_interval)
            with log_errors("the look at the limits in force"):
                await runtime.resizing.enforce()

    async def _bind_ports(self) -> None:
        """Bind each starting tenant's hardware address to its port; see `rootfs.bridge_port`."""
        services = self._services
        while True:
            await self._started.wait()
            self._started.clear()
            names, self._unbound = self._unbound, set()
            if None in names:
                with contextlib.suppress(GatewayError):  # the next connection to incusd reports all again
                    names |= {
                        one.name
                        for one in await services.runtime.tenants.list(addresses=False)
                        if one.status == "running"
                    }
            failed = ""
            for name in filter(None, names):
                try:
                    await services.workers.broker.bind_ports(name)
                except NotFound:  # it has just been removed
                    continue
                except GatewayError as error:
                    failed = error.message
                    self._unbound.add(name)  # retry with the next start
            if failed:
                log.warning("cannot bind tenants' addresses to their ports: %s", failed)

    async def _enforce_quotas(self) -> None:
        """Keep the disk quotas enforced, which any restart of incusd may end; see `rootfs.quotas`."""
        services = self._services
        failed = ""
        while True:
            self._connected.clear()
            try:
                for words in await services.workers.broker.enforce_quotas():
                    log.warning("disk quotas: %s", words)
                failed = ""
            except GatewayError as error:
                if error.message != failed:
                    log.warning("cannot check the disk quotas: %s", error.message)
                failed = error.message
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(services.settings.reconcile_interval):
                    await self._connected.wait()
