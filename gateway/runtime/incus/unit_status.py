"""Parse the output of `unit_status.sh`, run in a container. The tenant can make it print anything."""

from __future__ import annotations

from typing import Final

from gateway.runtime.incus.script_files import script
from gateway.runtime.listening import listener
from gateway.runtime.sites import Service, ServiceState

SCRIPT: Final = script("unit_status")

_DIGITS: Final = 18
_STATES: Final[dict[str, ServiceState]] = {
    "active": "running",
    "reloading": "running",
    "activating": "starting",
}


def read(said: str) -> Service | None:
    """Return the unit's state, None if systemd did not report it."""
    facts, listens = dict[str, str](), set()
    for line in said.splitlines():
        name, _, value = line.partition("=")
        if name == "Listen":
            listens.add(listener(value))
        else:
            facts.setdefault(name, value)
    if "ActiveState" not in facts:
        return None
    # waiting for a restart
    waits = facts.get("SubState") in ("auto-restart", "auto-restart-queued")
    return Service(
        "ended" if waits else _STATES.get(facts["ActiveState"], "ended"),
        restarts=_number(facts.get("NRestarts")),
        started=_number(facts.get("ExecMainStartTimestampMonotonic")) / 1e6,
        oom_kills=_number(facts.get("OomKills")),
        listens=frozenset(one for one in listens if one is not None),
    )


def _number(said: str | None) -> int:
    return int(said) if said and said.isascii() and said.isdecimal() and len(said) <= _DIGITS else 0
