"""The phases of deployments without new files: a rollback, and a change of the environment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from gateway.deployments.entries import LEFT_OUT
from gateway.deployments.phases import Phases
from gateway.deployments.request import Request, Rollback, Variables, check_env
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound
from gateway.runtime.sites import Exchange, Exposure, FormerSites, Recipe

log = logging.getLogger(__name__)


class _Changed(Phases):
    _lives: Recipe | None  # how the live site is started

    async def _begin(self, recipe: Recipe) -> None:
        self._recipe, self._framework = recipe, (None, recipe.start, ())
        self._record.template = recipe.template

    async def create(self) -> dict[str, Any]:
        if self._record.kind != "update":
            raise NotFound(f"tenant {self._record.tenant} is gone")
        return await super().create()

    async def install(self) -> None:
        return

    async def _lasting(self) -> dict[str, Any]:
        return {"keep": self._lives.keep if self._lives else (), "left_out": [*LEFT_OUT]}


class RollbackPhases(_Changed):
    """Put a former site in the place of the live one, which is kept in turn."""

    how: Exchange = "rollback"
    known = True

    async def _read(self) -> None:
        assert isinstance(self._request.template, Rollback)
        former, tenant = self._sites.former, self._record.tenant
        self._record.rollback = await chosen(former, tenant, self._request.template)
        _, self._lives = await former.live(tenant)
        await self._begin(await former.recipe(tenant, self._record.rollback))

    async def _lasting(self) -> dict[str, Any]:
        # what one of both names is not in the other's copy (see put_former.sh)
        lasting = await super()._lasting()
        return lasting | {"keep": [*lasting["keep"], *self._recipe.keep]}

    async def push(self) -> dict[str, Any]:
        assert self._record.rollback is not None
        self._unless_another(self._sites.clear)
        await self._sites.former.take(self._record.tenant, self._record.rollback)
        return {"rollback": self._record.rollback}


class EnvironmentPhases(_Changed):
    """Change the environment of the live site, once it was rehearsed with its files beside it."""

    how: Exchange = "environment"
    _env: Mapping[str, str]
    _copying: asyncio.Task[None]

    async def _read(self) -> None:
        assert isinstance(self._request.template, Variables)
        tenant = self._record.tenant
        self._env = await changed(self._sites.former, tenant, self._request.template)
        _, self._lives = await self._sites.former.live(tenant)
        if self._lives is None:
            raise Conflict(
                f"the gateway does not know how the site of {tenant} is started; deploy it once more, then "
                "change its environment"
            )
        await self._begin(self._lives)

    async def push(self) -> dict[str, Any]:
        self._unless_another(self._sites.clear)
        await self._sites.push(self._record.tenant, "next", self._recipe, self._env, how=self.how)
        return {"env": self._record.env}

    async def route(self) -> dict[str, Any]:
        told = await super().route()
        # while the next site is watched, which takes longer than most copies
        self._copying = asyncio.create_task(self._copy())
        self._undo.push_async_callback(self._stop_copying)
        return told

    async def _exchange(self, seconds: float) -> Exposure:
        live = await super()._exchange(seconds)
        await self._copying
        return live

    async def _copy(self) -> None:
        tenant = self._record.tenant
        if self._context.settings.rollbacks_kept:
            try:
                await self._sites.former.copy(tenant)
            except (GatewayError, TimeoutError, OSError) as error:
                log.info("cannot copy the site of %s yet: %s", tenant, error)

    async def _stop_copying(self) -> None:
        self._copying.cancel()
        await asyncio.wait([self._copying])


KINDS: Final[Mapping[type, type[Phases]]] = {Rollback: RollbackPhases, Variables: EnvironmentPhases}


def phases_of(request: Request) -> type[Phases]:
    """Return the phases for a request."""
    return KINDS.get(type(request.template), Phases)


async def chosen(former: FormerSites, tenant: str, wanted: Rollback) -> str:
    """Return the deployment to go back to. Raises `Conflict` and `NotFound`."""
    kept = [one.id for one in await former.listed(tenant)]
    if wanted.to is None:
        if kept:
            return kept[0]
        raise NotFound(
            f"tenant {tenant} has no earlier site to go back to; each deployment after the first keeps one",
            reason="not_kept",
        )
    if wanted.to in kept:
        return wanted.to
    live, _ = await former.live(tenant)
    if wanted.to == live:
        raise Conflict(f"{wanted.to} is already live")
    raise NotFound(
        f"tenant {tenant} does not keep the site of {wanted.to}; it keeps {', '.join(kept) or 'none'}",
        reason="not_kept",
    )


async def changed(former: FormerSites, tenant: str, wanted: Variables) -> dict[str, str]:
    """Return a site's environment with the changes made. Raises `Conflict` and `InvalidParams`."""
    env = dict(await former.environment(tenant))
    for name, value in wanted.changes.items():
        if value is not None:
            env[name] = value
        elif env.pop(name, None) is None:
            raise InvalidParams(f"{name} is not set", field="env")
    check_env(env)
    return env
