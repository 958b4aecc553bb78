"""See whether a site that was just started works: at its own address, then as the world sees it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from gateway.caddy import Caddy, CaddyFailed
from gateway.errors import Timeout
from gateway.runtime.probe import answer
from gateway.runtime.sites import Exposure, Recipe, Side, Sites
from gateway.settings import Settings

_PATIENCE: Final = 2.0  # seconds of waiting for a site until it is asked whether its service lives
_RESTARTS: Final = 4  # of a service by itself, within seconds: it will not come up


@dataclass(frozen=True, slots=True)
class Subject:
    """The side of a tenant's site that is looked at, and what it is to be."""

    tenant: str
    side: Side
    domain: str
    recipe: Recipe
    exposure: Exposure


class Verifier:
    """Looks at sites. It changes nothing in them, and keeps nothing of one look for the next."""

    def __init__(self, sites: Sites, caddy: Caddy, settings: Settings) -> None:
        self._sites, self._caddy, self._settings = sites, caddy, settings

    async def answering(self, site: Subject) -> None:
        """Wait until a side answers at its own address. Raises `Timeout`, `never_healthy`."""
        health, port = site.recipe.health, site.exposure.port
        deadline = time.monotonic() + self._settings.verify_timeout
        why = ""
        while not why:
            try:
                await answer(site.exposure.address, port, health, _PATIENCE)
                return
            except TimeoutError:
                if await self._sites.restarts(site.tenant, site.side) >= _RESTARTS:
                    why = "the site ends again and again"
                elif time.monotonic() > deadline:
                    why = f"the site did not answer {health} on port {port}"
        said = await self._sites.log(site.tenant, site.side)
        raise Timeout(
            f"{why}; it must listen on 0.0.0.0 and $PORT. It last said: {said.strip()[-1000:] or 'nothing'}",
            reason="never_healthy",
        )

    async def seen(self, site: Subject) -> None:
        """Wait until it answers through Caddy under its domain. Raises `Timeout`, `never_healthy`."""
        last = "nothing"
        deadline = time.monotonic() + self._settings.verify_timeout
        while time.monotonic() < deadline:
            try:
                status = await self._caddy.ask(site.domain, site.recipe.health, 10.0)
                if status < 400:
                    return
                last = f"status {status}"
            except CaddyFailed as error:
                last = error.message
                await self._caddy.ensure()
            await asyncio.sleep(0.05)  # nothing to wait on but the answer itself
        raise Timeout(f"{site.domain} does not answer through Caddy: {last}", reason="never_healthy")
