"""Keep a pool of instances made ahead, which only need a name and a start to be tenants.

One waits stopped: Incus renames no running one, and to stop it (0.8 s) costs more than to start it (0.15 s,
and 0.5 s until its network is up). It costs no memory, and no copy of a disk is left to do.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from gateway.errors import GatewayError
from gateway.incus.client import instance_path
from gateway.runtime.incus.addresses import Instance
from gateway.runtime.incus.creation import Creation, identity_of
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.marks import KEY, OWNER, Marks
from gateway.runtime.sites import Quiet
from gateway.settings import Settings
from gateway.tasks import whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Member:
    """An instance of the pool."""

    name: str
    identity: str

    def is_it(self, instance: Mapping[str, Any]) -> bool:
        return identity_of(instance) == self.identity


class Pool:
    """The pool of one gateway, by the keys of golden copies; `GATEWAY_WARM_POOL` instances of each."""

    def __init__(self, settings: Settings, making: Creation, marks: Marks) -> None:
        self._settings, self._making, self._marks = settings, making, marks
        # Incus shows an instance that is still being copied: these were seen to be whole
        self._members: dict[str, list[_Member]] = {}

    async def claim(self, tenant: str, key: str, config: Mapping[str, str], size: Mapping[str, str]) -> bool:
        """Make an instance of the pool the tenant; say whether there was one.

        Incus lists an instance that is still being copied, and breaks where it is changed or renamed then: so
        one is taken only of those that were seen to be whole.
        """
        while members := self._members.get(key):
            member = members.pop()
            try:
                change: dict[str, Any] = {"config": {**config, OWNER: "", KEY: ""}}
                if devices := await self._making.devices(size):
                    change["devices"] = devices
                with translated(member.name):
                    # marked first: from now on it belongs to the deployment, whatever it is called
                    await self._making.operate("PATCH", instance_path(member.name), change)
            except BaseException as error:
                removing = self._making.remove(member.is_it, "it could not be taken from the pool")
                await whole(removing)
                if not isinstance(error, GatewayError):
                    raise
                log.warning("%s of the pool cannot be used: %s", member.name, error.message)
                continue
            with translated(tenant):
                await self._making.operate("POST", instance_path(member.name), {"name": tenant})
                await self._making.operate(
                    "PUT", instance_path(tenant, "state"), {"action": "start", "timeout": -1}
                )
            return True
        return False

    async def fill(self, key: str, source: Mapping[str, str], quiet: Quiet) -> None:
        """Copy `source` until the pool of a key is full, one copy at a time and while it is `quiet`."""
        members = self._members.setdefault(key, [])
        while len(members) < self._settings.warm_pool:
            await quiet()
            name = f"gateway-pool-{secrets.token_hex(6)}"
            member = _Member(name, str(uuid4()))
            marks = self._marks.of("pool", key)
            await self._making.make(name, source, marks, {}, start=False, identity=member.identity)
            members.append(member)

    def adopt(self, instance: Instance) -> None:
        """Take over a complete instance that an earlier process made."""
        member = _Member(instance["name"], identity_of(instance))
        self._members.setdefault(instance["config"][KEY], []).append(member)

    async def drain(self) -> None:
        """Destroy all instances of the pool."""
        self._members.clear()
        await self._making.remove(lambda one: self._marks.on(one, "pool"), "the gateway ends")
