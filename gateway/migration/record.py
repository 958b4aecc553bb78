"""Reads a migration's state from an instance's keys. Incus is the database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from gateway.migration.plan import Plan
from gateway.migration.shifted_mount import Owner
from gateway.rootfs.instance_record import MANAGED
from gateway.runtime.incus.marks import ROLE
from gateway.runtime.incus.migrations import FACTS, FOLDER, OLD, STATE, UNIT
from gateway.runtime.incus.records import DOMAIN, IDLE_STOP, PORT
from gateway.runtime.incus.sites import HEALTH
from gateway.runtime.sites import Recipe
from gateway.runtime.sizes import SIZES

ENDED: Final[Mapping[str, str]] = dict.fromkeys((STATE, OLD, FOLDER, UNIT, FACTS, IDLE_STOP), "")
"""What the keys are changed to once a migration is finished: Incus takes an empty value for none."""


@dataclass(frozen=True, slots=True)
class Moving:
    """A migration. `old` is where the old service listens, ADDRESS:PORT."""

    tenant: str
    domain: str
    state: str
    folder: Path
    unit: str | None
    old: str
    recipe: Recipe
    owner: Owner
    read_only: bool
    leave: tuple[str, ...]
    env: tuple[str, ...]

    @classmethod
    def of(cls, tenant: str, config: Mapping[str, str]) -> Moving:
        """Parse the keys of an instance that has a `STATE`."""
        facts = orjson.loads(config[FACTS])
        start, install, health = tuple(facts["start"]), tuple(facts["install"]), config.get(HEALTH) or "/"
        return cls(
            tenant=tenant,
            domain=config[DOMAIN],
            state=config[STATE],
            folder=Path(config[FOLDER]),
            unit=config.get(UNIT) or None,
            old=config[OLD],
            recipe=Recipe(b"", start, int(config[PORT]), health, install, alone=True),
            owner=Owner(*facts["owner"]),
            read_only=bool(facts["read_only"]),
            leave=tuple(facts["leave"]),
            env=tuple(facts["env"]),
        )

    @property
    def listens(self) -> tuple[str, int]:
        """The address and port of the old service."""
        address, _, port = self.old.partition(":")
        return address, int(port)


def keys(plan: Plan) -> dict[str, str]:
    """Return the keys for the new instance of a migration that begins."""
    wanted, old, size = plan.wanted, plan.old, SIZES[plan.wanted.size]
    facts = {
        "start": plan.recipe.start,
        "install": plan.recipe.install,
        "owner": [plan.owner.uid, plan.owner.gid],
        "read_only": plan.read_only,
        "leave": wanted.leave,
        "env": wanted.env,
    }
    return {
        MANAGED: "true",
        ROLE: "tenant",
        DOMAIN: plan.domain,
        PORT: str(old.port),
        HEALTH: wanted.health,
        IDLE_STOP: "0",
        STATE: "attaching",
        OLD: f"{old.address}:{old.port}",
        FOLDER: str(wanted.folder),
        UNIT: wanted.unit or "",
        FACTS: orjson.dumps(facts).decode(),
        **{f"limits.{name}": size[name] for name in ("cpu", "memory") if name in size},
    }
