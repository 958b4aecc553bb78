"""Double a tenant's memory while two of its sites run side by side."""

from __future__ import annotations

from typing import Final

from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.resizing import UPDATING
from gateway.settings import Settings
from gateway.tasks import whole

_TRIES: Final = 20


class Headroom:
    """Extra memory for instances during an update."""

    def __init__(self, settings: Settings, incus: Incus, making: Creation) -> None:
        self._settings, self._incus, self._making = settings, incus, making

    async def grow(self, tenant: str) -> None:
        """Double the memory of an instance that has a limit. Idempotent."""
        path, patience = instance_path(tenant), self._settings.lifecycle_timeout
        for attempt in range(_TRIES):
            with translated(tenant):
                instance, tag = await self._incus.get_tagged(path)
                if UPDATING in instance["config"]:
                    return
                limit = instance["expanded_config"].get("limits.memory", "")
                number, unit = limit.rstrip("KMGTiB"), limit.lstrip("0123456789")
                if not number.isdigit():
                    return
                before, doubled = instance["config"].get("limits.memory", "-"), f"{int(number) * 2}{unit}"
                change = {"config": {UPDATING: f"{before} {doubled}", "limits.memory": doubled}}
                try:
                    await whole(self._incus.operate("PATCH", path, change, timeout=patience, if_match=tag))
                    return
                except IncusError as error:
                    if error.status != 412 or attempt == _TRIES - 1:  # 412: the size was changed meanwhile
                        raise

    async def shrink(self, tenant: str) -> None:
        """Restore the memory limit from before `grow`. Idempotent."""
        config = (await self._making.placed(tenant))["config"]
        if UPDATING not in config:
            return
        before, _, doubled = config[UPDATING].partition(" ")
        change = {UPDATING: ""}
        if config.get("limits.memory") == doubled or not doubled:  # otherwise someone has changed it
            change["limits.memory"] = "" if before == "-" else before
        with translated(tenant):
            await self._making.operate("PATCH", instance_path(tenant), {"config": change})
