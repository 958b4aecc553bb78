"""Formerly live sites in a container; see `gateway.runtime.sites.FormerSites`.

They are in a folder of the container's root, on the workspace's disk. The tenant controls its contents. It is
read through Incus's file API, for which the container need not run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Final

from gateway.errors import Conflict, ExecFailed, GatewayError, NotFound
from gateway.incus import Incus
from gateway.runtime.incus import service_unit
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.provisioning import Provisioning
from gateway.runtime.incus.script_files import script
from gateway.runtime.sites import FORMER_ID, Former, Recipe
from gateway.settings import Settings

log = logging.getLogger(__name__)

_TAKE: Final = script("take_former")
_COPY: Final = script("copy_former")
_PUT: Final = script("put_former")
_NONE: Final = 3  # exit code of take_former.sh if no such site is kept
_LIST_MAX: Final = 64 << 10  # most bytes of each file
_UNIT_MAX: Final = 512 << 10
_ENVIRONMENT_MAX: Final = 288 << 10  # what `check_env` of deployments accepts, escaped: 30 ms at the worst
_SINCE: Final = re.compile(r"[0-9]{1,12}")


class IncusFormerSites:
    def __init__(self, settings: Settings, incus: Incus, provisioning: Provisioning) -> None:
        self._incus, self._provisioning = incus, provisioning
        self._kept, self._uid = provisioning.kept, str(settings.workspace_uid)

    async def listed(self, tenant: str) -> Sequence[Former]:
        text = await self._read(tenant, f"{self._kept}/list", _LIST_MAX)
        found = []
        for line in (text or b"").decode("utf-8", "replace").splitlines():
            identity, _, since = line.partition(" ")
            if FORMER_ID.fullmatch(identity) and _SINCE.fullmatch(since):
                found.append(Former(identity, float(since)))
        return found[::-1]

    async def live(self, tenant: str) -> tuple[str | None, Recipe | None]:
        said = (await self._read(tenant, f"{self._kept}/live", _LIST_MAX) or b"").decode("utf-8", "replace")
        unit = await self._read(tenant, service_unit.unit_path("live"), _UNIT_MAX)
        identity = said if FORMER_ID.fullmatch(said) else None
        return identity, None if unit is None else service_unit.recipe_of(unit)

    async def recipe(self, tenant: str, former: str) -> Recipe:
        unit = await self._read(tenant, f"{self._kept}/{former}/site.service", _UNIT_MAX)
        recipe = None if unit is None else service_unit.recipe_of(unit)
        if recipe is None:
            raise _gone(tenant, former)
        return recipe

    async def environment(self, tenant: str) -> Mapping[str, str]:
        path = service_unit.environment_path("live")
        text = await self._read(tenant, path, _ENVIRONMENT_MAX)
        try:
            return service_unit.environment_of((text or b"").decode())
        except ValueError:
            raise Conflict(
                f"{path} of tenant {tenant} was edited by hand and cannot be parsed; write it as "
                'NAME="value", one per line, or deploy the site with `env`, which rewrites it'
            ) from None

    async def take(self, tenant: str, former: str) -> None:
        try:
            words = (self._provisioning.places[1], self._kept, former)
            await self._provisioning.script(tenant, _TAKE, *words)
        except ExecFailed as error:
            if error.facts.get("exit_code") == _NONE:
                raise _gone(tenant, former) from None
            raise

    async def copy(self, tenant: str) -> None:
        live, following, _ = self._provisioning.places
        await self._provisioning.script(tenant, _COPY, live, following, self._uid)

    async def put(self, tenant: str, former: str, live: str, most: int) -> None:
        words = (*self._provisioning.places, self._kept, former, live, str(most), self._uid)

        async def kept() -> None:
            await self._provisioning.script(tenant, _PUT, *words)

        await self._provisioning.with_room(tenant, kept)  # it may have to be copied

    async def spare(self, tenant: str) -> bool:
        try:
            await self._provisioning.drop_former(tenant, 1)
        except (GatewayError, TimeoutError, OSError):  # no more are kept, or it cannot be asked
            return False
        log.info("the oldest site that %s kept was removed, since its disk is full", tenant)
        return True

    async def _read(self, tenant: str, path: str, most: int) -> bytes | None:
        with translated(tenant):
            return await self._incus.get_file(tenant, path, most)


def _gone(tenant: str, former: str) -> NotFound:
    return NotFound(f"tenant {tenant} no longer keeps deployment {former}", reason="not_kept")
