"""Marks on instances that are not tenants yet, by which each gateway finds its own.

`user.gateway.role` is `golden` or `pool`, `user.gateway.owner` names the gateway that created the instance,
and `user.gateway.key` what it was made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

from gateway.incus import Incus
from gateway.rootfs.instance_record import MANAGED
from gateway.runtime.incus.addresses import Instance
from gateway.runtime.incus.creation import is_ours
from gateway.settings import Settings

ROLE: Final = "user.gateway.role"
OWNER: Final = "user.gateway.owner"
KEY: Final = "user.gateway.key"

Role = Literal["golden", "pool"]


def owner(settings: Settings, member: str) -> str:
    """Return an id that tells this gateway's instances from those of another on the same Incus.

    In a cluster each `member` has a gateway, whose state dir has the same path as the others'.
    """
    place = f"{member}:{settings.state_dir.absolute()}" if member else str(settings.state_dir.absolute())
    return hashlib.sha256(place.encode()).hexdigest()[:12]


class Marks:
    """The marks of one gateway."""

    def __init__(self, settings: Settings, incus: Incus) -> None:
        self._settings, self._incus = settings, incus

    @property
    def _owner(self) -> str:
        return owner(self._settings, self._incus.known_member)

    def of(self, role: Role, key: str) -> dict[str, str]:
        """Return the configuration that marks an instance."""
        return {MANAGED: "false", ROLE: role, OWNER: self._owner, KEY: key}

    def on(self, instance: Instance, *roles: Role) -> bool:
        """Return whether an instance is this gateway's in one of these roles, and not an operator's copy."""
        config = instance["config"]
        return bool(config.get(ROLE) in roles and config.get(OWNER) == self._owner and is_ours(instance))

    def among(self, instances: Sequence[Instance], *roles: Role) -> Sequence[Instance]:
        """Return this gateway's instances in one of these roles."""
        return [instance for instance in instances if self.on(instance, *roles)]
