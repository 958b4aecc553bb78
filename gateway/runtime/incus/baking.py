"""Bake a recipe: make a running instance what golden copies of it begin with."""

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
from gateway.runtime.probe import answer, ask
from gateway.runtime.sites import Recipe
from gateway.settings import Settings

_REST_LOOK: Final = 0.5  # seconds between two looks at what a container computes
_REST_LOOKS: Final = 3  # at rest one after another until it is believed: a disk may have held it up
_REST_SHARE: Final = 0.05  # of a CPU, below which it is at rest
_REST_TIMEOUT: Final = 60.0


class Baking:
    """Installs, starts and warms up the sites of golden copies."""

    def __init__(
        self, settings: Settings, incus: Incus, making: Creation, provisioning: Provisioning
    ) -> None:
        self._settings, self._incus = settings, incus
        self._making, self._provisioning = making, provisioning

    async def bake(self, name: str, recipe: Recipe) -> int:
        """Make an instance the site, at rest after its first work, without what copies must not share.

        Return the bytes of its files. Raises what installing and starting raise, and `ExecFailed` if the
        site does not stay up.
        """
        await self._provisioning.push(name, "live", recipe, None)
        await self._provisioning.reachable(name)
        await self._provisioning.install(name, "live", recipe, lambda line: None)
        await self._provisioning.start(name, "live", recipe)
        await self._warm(name, recipe)
        return await self._provisioning.seal(name)

    async def _warm(self, name: str, recipe: Recipe) -> None:
        """Wait until the site answers, have it do its first work, and see that it stays up under it."""
        found = exposure(await self._making.placed(name), recipe.port)
        assert found is not None
        await answer(found.address, found.port, recipe.health, self._settings.verify_timeout)
        answered = time.monotonic()
        for path in recipe.warm:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                await ask(found.address, found.port, path)
        with contextlib.suppress(TimeoutError):  # one that never rests is as warm as it gets
            async with asyncio.timeout(_REST_TIMEOUT):
                await self._at_rest(name)
        now = await self._provisioning.service(name, "live")
        if now is not None and now.restarts and now.started > answered:
            raise ExecFailed("its site did not stay up while it was made ready", reason="unsteady")

    async def _at_rest(self, name: str) -> None:
        """Return once a container has hardly computed for a while.

        A dev server goes on after its answers: Vite bundles the dependencies and then writes them down, and
        one that is stopped before has each copy of it do all that again.
        """
        looks, before = 0, await self._computed(name)
        while looks < _REST_LOOKS:
            await asyncio.sleep(_REST_LOOK)
            now = await self._computed(name)
            looks = looks + 1 if now - before < _REST_SHARE * _REST_LOOK else 0
            before = now

    async def _computed(self, name: str) -> float:
        """Return the CPU seconds of a container."""
        with translated(name):
            state = await self._incus.state(name)
        return float(state["cpu"]["usage"]) / 1e9
