"""Sites in Incus containers: instances from the pool, a golden copy or the image, and their contents.

`user.gateway.deployment` on an instance names the deployment that has not finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final

from gateway.errors import ExecFailed, Unavailable
from gateway.hostnames import plain
from gateway.incus import Incus
from gateway.incus.client import instance_path
from gateway.rootfs.instance_record import MANAGED
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.creation import Creation, is_ours
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.golden_copies import ROLE, UNMARKED, GoldenCopies, Marks, Pool
from gateway.runtime.incus.provisioning import CONTENT, IncusFormerSites, Provisioning
from gateway.runtime.incus.records import (
    ASLEEP,
    DEPLOYMENT,
    DOMAIN,
    PORT,
    domain_config,
    exposure,
    fixed,
    lacks_address,
    old_service,
    sharers,
    status_of,
)
from gateway.runtime.incus.runtime import IncusRuntime
from gateway.runtime.incus.site_services import IncusServices
from gateway.runtime.probe import answer, ask
from gateway.runtime.sites import (
    Exchange,
    Exposure,
    FormerSites,
    Order,
    PreparedCopies,
    Recipe,
    Say,
    Side,
    SiteServices,
    Source,
    TenantSite,
)
from gateway.runtime.sizes import SIZES
from gateway.settings import Settings

_REST_LOOK: Final = 0.5  # seconds between two measurements of CPU use
_REST_LOOKS: Final = 3  # consecutive idle measurements required, since it may just be waiting for a disk
_REST_SHARE: Final = 0.05  # of a CPU, below which a container counts as idle
_REST_TIMEOUT: Final = 60.0


class Baking:
    """Installs, starts and warms up the sites of golden copies."""

    def __init__(
        self,
        settings: Settings,
        incus: Incus,
        making: Creation,
        provisioning: Provisioning,
        services: IncusServices,
    ) -> None:
        self._settings, self._incus = settings, incus
        self._making, self._provisioning, self._services = making, provisioning, services

    async def bake(self, name: str, recipe: Recipe) -> int:
        """Install, start and warm up the site in an instance, and remove what copies must not share.

        Returns the bytes of the instance's files. Raises what installing and starting raise, and `ExecFailed`
        if the site does not stay up.
        """
        await self._provisioning.push(name, "live", recipe, None)
        await self._provisioning.reachable(name)
        await self._provisioning.install(name, "live", recipe, lambda line: None)
        await self._provisioning.start(name, "live", recipe)
        await self._warm(name, recipe)
        return await self._provisioning.seal(name)

    async def _warm(self, name: str, recipe: Recipe) -> None:
        """Wait until the site answers, make it do its initial work, and check that it stays up."""
        found = exposure(await self._making.placed(name), recipe.port)
        assert found is not None
        await answer(found.address, found.port, recipe.health, self._settings.verify_timeout)
        answered = time.monotonic()
        for path in recipe.warm:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                await ask(found.address, found.port, path)
        with contextlib.suppress(TimeoutError):  # a site that is never idle is as warm as it gets
            async with asyncio.timeout(_REST_TIMEOUT):
                await self._at_rest(name)
        now = await self._services.state(name, "live")
        if now is not None and now.restarts and now.started > answered:
            raise ExecFailed("the site did not stay up while it was being prepared", reason="unsteady")

    async def _at_rest(self, name: str) -> None:
        """Wait until a container has used hardly any CPU for a while.

        A dev server keeps working after its answers: Vite bundles the dependencies and then stores them. If
        it is stopped before that, each copy has to do it again.
        """
        looks, before = 0, await self._computed(name)
        while looks < _REST_LOOKS:
            await asyncio.sleep(_REST_LOOK)
            now = await self._computed(name)
            looks = looks + 1 if now - before < _REST_SHARE * _REST_LOOK else 0
            before = now

    async def _computed(self, name: str) -> float:
        """Return the CPU seconds used by a container."""
        with translated(name):
            state = await self._incus.state(name)
        return float(state["cpu"]["usage"]) / 1e9


HEALTH: Final = "user.gateway.health"
LINK: Final = "volatile.eth0.host_name"


class IncusSites:
    """Implements `gateway.runtime.sites.Sites` for one Incus project, mostly through its parts."""

    def __init__(self, settings: Settings, runtime: IncusRuntime) -> None:
        self._settings = settings
        self._incus, self._making, self._resizing = runtime.incus, runtime.making, runtime.resizing
        # separate, because it also runs commands in instances that are not tenants
        self._commands = IncusCommands(settings, self._incus, self._init_pid)
        self._provisioning = Provisioning(settings, self._incus, self._making, self._commands)
        self._services = IncusServices(self._provisioning, self._init_pid)
        self.services: SiteServices = self._services
        self.former: FormerSites = IncusFormerSites(settings, self._incus, self._provisioning)
        baking = Baking(settings, self._incus, self._making, self._provisioning, self._services)
        marks = Marks(settings, self._incus)
        self._pool = Pool(settings, self._making, marks)
        self._golden = GoldenCopies(settings, self._incus, self._making, marks, self._pool, baking.bake)
        self.copies: PreparedCopies = self._golden

    async def __aenter__(self) -> IncusSites:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._services.close()
        await self._golden.aclose()
        await self._commands.aclose()

    async def _init_pid(self, name: str) -> int:
        with translated(name):
            _, init_pid = await self._incus.started(name)
        return init_pid

    # --- instances ----------------------------------------------------------------------------------

    async def create(self, tenant: str, order: Order) -> Source:
        config = {
            MANAGED: "true",
            ROLE: "tenant",
            **domain_config(order.domain),
            PORT: str(order.recipe.port),
            DEPLOYMENT: order.deployment,
            **_content(order.recipe),
        }
        size = SIZES[order.size]
        config |= {f"limits.{name}": size[name] for name in ("cpu", "memory") if name in size}
        key = await self._golden.key(order.recipe)
        if key and await self._pool.claim(tenant, key, config, size):
            return "pool"
        devices = await self._making.devices(size)
        async with self._golden.source(key) as golden:
            source = golden or {"type": "image", "alias": self._settings.image}
            config |= UNMARKED if golden else {}
            await self._making.make(tenant, source, config, devices, start=True)
        return "golden" if golden else "image"

    async def finish(self, tenant: str, order: Order) -> None:
        config = {
            **domain_config(order.domain),
            PORT: str(order.recipe.port),
            HEALTH: order.recipe.health,
            DEPLOYMENT: "",
            CONTENT: "",  # the copy of an earlier upload is no longer kept for this tenant
            **_content(order.recipe),
        }
        with translated(tenant):
            await self._making.operate("PATCH", instance_path(tenant), {"config": config})

    async def remove(self, deployment: str) -> None:
        await self._making.remove(
            lambda one: one["config"].get(DEPLOYMENT) == deployment and is_ours(one),
            f"deployment {deployment} was undone",
        )

    async def listed(self) -> Sequence[TenantSite]:
        sites = []
        with translated(""):
            instances = await self._incus.instances(state=lacks_address)
        sharing = sharers(instances)
        for instance in instances:
            config = instance.get("expanded_config") or {}
            domain = config.get(DOMAIN)
            if not domain or config.get(MANAGED) != "true":
                continue
            port = config.get(PORT, "")
            found = exposure(instance, int(port)) if port.isdigit() else None
            same = () if found is None else sharing.get(found.address, ())
            old = old_service(config)
            sites.append(
                TenantSite(
                    tenant=instance["name"],
                    domain=plain(domain) or domain,
                    running=status_of(instance) in ("running", "frozen"),
                    exposure=old or (found if not same or same[0] == instance["name"] else None),
                    deployment=config.get(DEPLOYMENT) or None,
                    health=config.get(HEALTH) or "/",
                    asleep=config.get(ASLEEP) == "true" and old is None,
                    instance=instance["config"].get("volatile.uuid"),
                    created=instance.get("created_at"),
                    shares_address=len(same) > 1,
                    loose=port.isdigit() and fixed(instance) is None,
                    link=config.get(LINK),
                )
            )
        return sites

    # --- addresses and ports ------------------------------------------------------------------------

    async def anchor(self, tenant: str) -> None:
        await self._making.anchor(tenant)

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        found = exposure(await self._making.placed(tenant), recipe.listens(side))
        if found is None:
            raise Unavailable(f"tenant {tenant} has no address on {self._settings.network}")
        return found

    # --- in the container ---------------------------------------------------------------------------

    async def push(
        self,
        tenant: str,
        side: Side,
        recipe: Recipe,
        env: Mapping[str, str] | None,
        lost: bytes = b"",
        how: Exchange = "update",
    ) -> None:
        await self._provisioning.push(tenant, side, recipe, env, lost, how)

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        await self._provisioning.install(tenant, side, recipe, say)

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        if side == "next" and not recipe.alone:
            await self._resizing.grow(tenant)
        await self._provisioning.start(tenant, side, recipe)

    async def restart(self, tenant: str) -> None:
        await self._provisioning.restart(tenant)

    async def allow(self, tenant: str, domain: str) -> None:
        await self._provisioning.allow(tenant, domain)

    async def halt(self, tenant: str) -> None:
        await self._provisioning.halt(tenant)

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"", how: Exchange = "update") -> None:
        await self._provisioning.settle(tenant, recipe, kept, how)

    async def unsettle(self, tenant: str) -> None:
        await self._provisioning.unsettle(tenant)

    async def clear(self, tenant: str) -> None:
        await self._provisioning.clear(tenant)
        await self._resizing.shrink(tenant)


def _content(recipe: Recipe) -> dict[str, str]:
    return {CONTENT: recipe.key} if recipe.owner else {}
