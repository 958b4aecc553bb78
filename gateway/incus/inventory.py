"""A cache of a project's instances, so that a list does not fetch all of them each time.

A list of 200 instances costs incusd some 200 ms of CPU time. While its lifecycle events are received, only
the instances they name are fetched again; without events every list is fetched in full.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from gateway.incus.rest import NoQuorum

Fetch = Callable[[str], Awaitable[dict[str, Any] | None]]
"""Returns an instance by name, None if it does not exist."""

_AGE: Final = 30.0  # seconds until everything is fetched again: incusd drops events for a slow reader
_SINGLY: Final = 16  # most changed instances fetched one by one; above that the whole list is
# actions that leave the instance unchanged
_LOOKS: Final = (
    "instance-exec",
    "instance-console",
    "instance-file-",
    "instance-log-",
    "instance-metadata-",
    "instance-snapshot-",
    "instance-backup-",
)


class Inventory:
    """The instances of one project. Returned objects are shared and must not be modified."""

    def __init__(self, fetch_all: Callable[[], Awaitable[list[dict[str, Any]]]], fetch: Fetch) -> None:
        self._fetch_all, self._fetch = fetch_all, fetch
        self._kept: dict[str, dict[str, Any]] | None = None  # None: fetch all
        self._since = 0.0
        self._changed: set[str] = set()
        self._heard = False
        self._refreshing = asyncio.Lock()
        self._profiles: dict[str, tuple[float, dict[str, Any]]] = {}  # with the time of fetching

    async def all(self) -> list[dict[str, Any]]:
        """Return all instances, up to date with every change noted before this call.

        Without a quorum they are as they were, for as long as events are received: hardly anything changes.
        """
        async with self._refreshing:
            try:
                return await self._now()
            except NoQuorum:
                if self._kept is None:
                    raise
                return [*self._kept.values()]

    async def _now(self) -> list[dict[str, Any]]:
        aged = time.monotonic() - self._since > _AGE
        if self._kept is None or not self._heard or aged or len(self._changed) > _SINGLY:
            return await self._ask_for_all()
        changed, kept = self._changed, self._kept
        self._changed = set()  # later changes are fetched by the next call
        try:
            found = await asyncio.gather(*(self._fetch(name) for name in changed))
        except BaseException:
            self._changed |= changed
            raise
        for name, entry in zip(changed, found, strict=True):
            if entry is None:
                kept.pop(name, None)
            else:
                kept[name] = entry
        return [*kept.values()]

    async def profile(self, name: str, fetch: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Return a profile from the cache if possible: incusd lists all its instances to answer."""
        began, profiles = time.monotonic(), self._profiles
        since, kept = profiles.get(name, (0.0, {}))
        if not kept or not self._heard or began - since > _AGE:
            kept = await fetch()
            profiles[name] = began, kept  # if it changed meanwhile, `profiles` is already a discarded dict
        return kept

    async def _ask_for_all(self) -> list[dict[str, Any]]:
        before, self._changed = self._changed, set()
        began = time.monotonic()
        try:
            found = await self._fetch_all()
        except BaseException:
            self._changed |= before
            raise
        self._kept, self._since = {entry["name"]: entry for entry in found}, began
        return found

    # --- invalidation -------------------------------------------------------------------------------

    def touched(self, *names: str) -> None:
        """Mark instances as changed, to be fetched again before they are next returned."""
        self._changed.update(names)

    def listening(self, heard: bool) -> None:
        """Start or stop relying on events: without them, changes made by others go unseen."""
        self._heard = heard
        self._kept, self._profiles = None, {}

    def noted(self, event: Mapping[str, Any]) -> None:
        """Process one lifecycle event of incusd."""
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        if action.startswith("profile-"):
            self._kept, self._profiles = None, {}  # any instance may inherit from it
        elif action.startswith("instance-") and not action.startswith(_LOOKS) and name:
            old = (metadata.get("context") or {}).get("old_name")
            self.touched(name.partition("/")[0], *([str(old)] if old else []))


def touched_by(path: str, body: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the instances that a request changes."""
    match path.split("/"):
        case ["", "1.0", "instances", *rest]:
            given = (body or {}).get("name")
            names = [rest[0]] if rest else []
            # a new instance's name or the target of a rename; at a deeper path it is a snapshot's name
            return [*names, str(given)] if given and len(rest) < 2 else names
    return []
