"""A pool of instances created in advance, which need only a name and a start to become tenants.

They wait stopped, because Incus cannot rename a running instance, and stopping one (0.8 s) takes longer than
starting it (0.15 s, and 0.5 s until its network is up). They use no memory, and their disks are copied
already.
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
from gateway.rootfs.instance_record import identity_of
from gateway.runtime.incus.addresses import Instance
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.marks import KEY, OWNER, Marks
from gateway.runtime.sites import Quiet
from gateway.settings import Settings
from gateway.tasks import whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _PooledInstance:
    """An instance of the pool."""

    name: str
    identity: str

    def is_it(self, instance: Mapping[str, Any]) -> bool:
        return identity_of(instance) == self.identity


class Pool:
    """The pool of one gateway: `GATEWAY_WARM_POOL` instances per key of a golden copy."""

    def __init__(self, settings: Settings, making: Creation, marks: Marks) -> None:
        self._settings, self._making, self._marks = settings, making, marks
        # Incus lists an instance that is still being copied; these are known to be complete
        self._members: dict[str, list[_PooledInstance]] = {}

    async def claim(self, tenant: str, key: str, config: Mapping[str, str], size: Mapping[str, str]) -> bool:
        """Turn an instance of the pool into the tenant; return False if there is none.

        Incus lists an instance that is still being copied, and breaks if it is changed or renamed then; so
        only instances known to be complete are used.
        """
        while members := self._members.get(key):
            member = members.pop()
            try:
                change: dict[str, Any] = {"config": {**config, OWNER: "", KEY: ""}}
                if devices := await self._making.devices(size):
                    change["devices"] = devices
                with translated(member.name):
                    # marked first: from now on it belongs to the deployment, whatever its name
                    await self._making.operate("PATCH", instance_path(member.name), change)
            except BaseException as error:
                removing = self._making.remove(member.is_it, "it could not be taken from the pool")
                await whole(removing)
                if not isinstance(error, GatewayError):
                    raise
                log.warning("cannot use %s of the pool: %s", member.name, error.message)
                continue
            with translated(tenant):
                await self._making.operate("POST", instance_path(member.name), {"name": tenant})
                if "devices" in change:
                    await self._making.limited(tenant)
                await self._making.begin(tenant)
            return True
        return False

    async def fill(self, key: str, source: Mapping[str, str], quiet: Quiet) -> None:
        """Copy `source` until the pool of a key is full, one copy at a time and only while it is `quiet`."""
        members = self._members.setdefault(key, [])
        while len(members) < self._settings.warm_pool:
            await quiet()
            name = f"gateway-pool-{secrets.token_hex(6)}"
            member = _PooledInstance(name, str(uuid4()))
            marks = self._marks.of("pool", key)
            await self._making.make(name, source, marks, {}, start=False, identity=member.identity)
            members.append(member)

    def adopt(self, instance: Instance) -> None:
        """Add a complete instance created by an earlier process."""
        member = _PooledInstance(instance["name"], identity_of(instance))
        self._members.setdefault(instance["config"][KEY], []).append(member)

    async def drain(self) -> None:
        """Destroy all instances of the pool."""
        self._members.clear()
        await self._making.remove(lambda one: self._marks.on(one, "pool"), "the gateway is shutting down")
