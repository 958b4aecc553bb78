"""Find sites that read no requests while visitors wait, and have those visitors answered by a page."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Final, Protocol

from gateway.bounds import run_in_thread
from gateway.deployments.register import Register
from gateway.errors import GatewayError
from gateway.rootfs import connections
from gateway.runtime.incus.containers import Containers
from gateway.runtime.probe import ask, own_ports
from gateway.runtime.sites import Site, Sites
from gateway.settings import Settings

log = logging.getLogger(__name__)

_LOOK: Final = 5.0  # seconds of one look at the kernel's tables; it takes a millisecond
_CONNECT: Final = 1.0
_ROUNDS: Final = 10  # rounds of closing connections: Caddy sends some requests once more
_PAUSE: Final = 0.1


class Root(Protocol):
    """What needs root; see `BrokerClient`."""

    async def break_off(self, tenant: str, port: int, leave: Collection[int]) -> int: ...


class Hangs:
    """The watch for sites that hang. Use as an async context manager.

    A site that has not read a request for a quarter of `hang_timeout` is probed. If it does not answer within
    half of that time it hangs: `told` is called with the reason, and connections from which it has read
    nothing are closed, so that Caddy answers their visitors. A request that was read is never cut, since an
    answer may take long. A site without visitors costs nothing.
    """

    def __init__(
        self,
        containers: Containers,
        sites: Sites,
        root: Root,
        told: Callable[[Site, str], None],
        register: Register,
        settings: Settings,
    ) -> None:
        self._containers, self._sites, self._root, self._told = containers, sites, root, told
        self._register, self._settings = register, settings
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Hangs:
        if self._settings.hang_timeout:
            self._watching = asyncio.create_task(self._watch(), name="sites that hang")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._watching, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        step = self._settings.hang_timeout / 4
        while True:
            await asyncio.sleep(step)
            try:
                found = await run_in_thread(
                    "hangs", _LOOK, connections.waiting, self._settings.network_ipv4, step
                )
                if found:
                    await self._look(found)
            except (GatewayError, OSError) as error:
                log.info("cannot list the visitors that wait for a site: %s", error)
            except Exception:
                log.exception("cannot list the visitors that wait for a site")

    async def _look(self, found: Sequence[connections.Connection]) -> None:
        """Begin to probe each site that has not read what one of these visitors sent."""
        own = own_ports()
        visitors = {(one.local, one.remote) for one in found if one.local[1] not in own}
        ends = {remote for _, remote in visitors}
        for site in await self._sites.listed():
            where = site.exposure
            if where is None or site.deployment is not None or site.tenant in self._asking:
                continue
            # an update shares its processors, and visitors rather wait
            if self._register.deploying(site.tenant):
                continue
            end = (socket.inet_aton(where.address), where.port)
            if end not in ends or not (pid := await self._containers.init_pid(site.tenant)):
                continue
            unread = await run_in_thread("hangs", _LOOK, connections.unread, pid, end)
            if any((local, end) in visitors for local in unread):
                task = asyncio.create_task(self._asked(site), name=f"does {site.tenant} hang")
                self._asking[site.tenant] = task
                task.add_done_callback(partial(self._over, site.tenant))

    def _over(self, tenant: str, task: asyncio.Task[None]) -> None:
        del self._asking[tenant]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cannot check whether a site hangs", exc_info=error)

    async def _asked(self, site: Site) -> None:
        where, limit = site.exposure, self._settings.hang_timeout
        assert where is not None
        try:
            await ask(where.address, where.port, site.health, _CONNECT, limit / 2, host=site.domain)
        except TimeoutError:
            if self._register.deploying(site.tenant):
                return
            self._told(site, f"it has read no request for {limit * 3 / 4:g} s")
            await self._break_off(site.tenant, where.port)
        except (OSError, ValueError):
            return  # it refuses the connection, or answers something

    async def _break_off(self, tenant: str, port: int) -> None:
        try:
            for _ in range(_ROUNDS):
                if not await self._root.break_off(tenant, port, own_ports()):
                    break
                await asyncio.sleep(_PAUSE)  # there is no event for when Caddy tries again
        except GatewayError as error:
            log.info(
                "cannot disconnect the visitors that wait for %s, which hangs: %s", tenant, error.message
            )
