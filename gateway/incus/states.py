"""States of instances as a list needs them, each read again after a while: one costs incusd some 10 ms."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from gateway.incus.rest import NoQuorum

_AGE: Final = 30.0  # seconds that the state of an instance is taken for, as long as that runs on

Lacks = Callable[[Mapping[str, Any]], bool]
"""Returns whether something of an instance is unknown that is in its state, also when that is there."""


class States:
    """States that have what was asked for. `read` returns an instance with its state, None for none."""

    def __init__(self, read: Callable[[str], Awaitable[dict[str, Any] | None]]) -> None:
        self._read = read
        self._kept: dict[str, tuple[str, float, Any]] = {}  # id of the start, when it was read, the state

    async def added(self, instances: list[dict[str, Any]], lacks: Lacks) -> list[dict[str, Any]]:
        """Return all instances, with their states where `lacks` says so; without those that are gone."""
        for gone in self._kept.keys() - {entry["name"] for entry in instances}:
            del self._kept[gone]
        found = [await self._one(entry, lacks) if lacks(entry) else entry for entry in instances]
        return [entry for entry in found if entry is not None]

    async def _one(self, entry: dict[str, Any], lacks: Lacks) -> dict[str, Any] | None:
        name, now = entry["name"], time.monotonic()
        start, read, state = self._kept.get(name, ("", 0.0, None))
        if start == start_of(entry) and now - read < _AGE:
            return {**entry, "state": state}
        try:
            found = await self._read(name)
        except NoQuorum:  # its address may be known, and else is not
            return {**entry, "state": state if start == start_of(entry) else {}}
        if found is not None and not lacks(found):  # else it is not known yet
            self._kept[name] = start_of(found), now, found["state"]
        return found


def start_of(instance: Mapping[str, Any]) -> str:
    """Return an id of an instance's last start: incusd records the time before it starts the instance."""
    return f"{instance['config'].get('volatile.uuid')} {instance.get('last_used_at')}"
