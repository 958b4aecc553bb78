"""Bake a recipe: turn a running instance into the state from which golden copies start."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from gateway.errors import ExecFailed
from gateway.incus import Incus
from gateway.runtime.incus.addresses import exposure
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.provisioning import Provisioning
from gateway.runtime.incus.site_services import IncusServices
from gateway.runtime.probe import answer, ask
from gateway.runtime.sites import Recipe
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
