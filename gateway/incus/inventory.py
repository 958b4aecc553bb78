"""A cache of a project's instances, so that a list does not fetch all of them each time.

A list of 200 instances costs incusd some 200 ms of CPU time. While its lifecycle events are received, only
the instances they name are fetched again; without events every list is fetched in full.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from gateway.incus.rest import NoQuorum

_STATE_AGE: Final = 30.0  # seconds that the state of an instance is taken for, as long as that runs on

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
        if start == start_of(entry) and now - read < _STATE_AGE:
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


Fetch = Callable[[str], Awaitable[dict[str, Any] | None]]
"""Returns an instance by name, None if it does not exist."""

_Found = TypeVar("_Found", dict[str, Any], dict[str, Any] | None)

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
        self._changes = itertools.count()
        self._changed: dict[str, int] = {}  # the last change of each that was not fetched since
        self._reset = 0  # how often all of it had to be fetched again
        self._heard = self._asking_for_all = False
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

    async def one(self, name: str, fetch: Callable[[str], Awaitable[_Found]]) -> dict[str, Any] | _Found:
        """Return an instance, up to date with every change of it noted before this call.

        What is not known is what `fetch` returns.
        """
        change, kept = self._changed.get(name), self._fresh
        if change is None and kept is not None and name in kept:
            return kept[name]
        found = await fetch(name)
        stopping = found is not None and found.get("config") is None
        # if the note of the change is gone, somebody has fetched it later
        if change is not None and name in self._changed and self._kept is not None and not stopping:
            if self._asking_for_all:  # which may have read it earlier
                return found
            if found is None:
                self._kept.pop(name, None)
            else:
                self._kept[name] = found
            if self._changed[name] == change:
                del self._changed[name]
        return found

    @property
    def _fresh(self) -> dict[str, dict[str, Any]] | None:
        """All instances as they were before what `_changed` has; None if all have to be fetched."""
        aged = time.monotonic() - self._since > _AGE
        return self._kept if self._heard and not aged else None

    async def _now(self) -> list[dict[str, Any]]:
        if (kept := self._fresh) is not None and len(self._changed) <= _SINGLY:
            await asyncio.gather(*(self.one(name, self._fetch) for name in self._changed))
            if self._kept is kept:
                return [*kept.values()]
        return await self._ask_for_all()

    async def profile(self, name: str, fetch: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Return a profile from the cache if possible: incusd lists all its instances to answer."""
        began, profiles = time.monotonic(), self._profiles
        since, kept = profiles.get(name, (0.0, {}))
        if not kept or not self._heard or began - since > _AGE:
            kept = await fetch()
            profiles[name] = began, kept  # if it changed meanwhile, `profiles` is already a discarded dict
        return kept

    async def _ask_for_all(self) -> list[dict[str, Any]]:
        before, reset, began = next(self._changes), self._reset, time.monotonic()
        self._asking_for_all = True
        try:
            found = await self._fetch_all()
        finally:
            self._asking_for_all = False
        if self._reset == reset:
            self._kept, self._since = {entry["name"]: entry for entry in found}, began
            self._changed = {name: change for name, change in self._changed.items() if change > before}
        return found

    # --- invalidation -------------------------------------------------------------------------------

    def touched(self, *names: str) -> None:
        """Mark instances as changed, to be fetched again before they are next returned."""
        for name in names:
            self._changed[name] = next(self._changes)

    def listening(self, heard: bool) -> None:
        """Start or stop relying on events: without them, changes made by others go unseen."""
        self._heard = heard
        self._forget_all()

    def noted(self, event: Mapping[str, Any]) -> None:
        """Process one lifecycle event of incusd."""
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        if action.startswith("profile-"):
            self._forget_all()  # any instance may inherit from it
        elif action.startswith("instance-") and not action.startswith(_LOOKS) and name:
            old = (metadata.get("context") or {}).get("old_name")
            self.touched(name.partition("/")[0], *([str(old)] if old else []))

    def _forget_all(self) -> None:
        self._kept, self._profiles = None, {}
        self._reset += 1


def touched_by(path: str, body: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the instances that a request changes."""
    match path.split("/"):
        case ["", "1.0", "instances", *rest]:
            given = (body or {}).get("name")
            names = [rest[0]] if rest else []
            # a new instance's name or the target of a rename; at a deeper path it is a snapshot's name
            return [*names, str(given)] if given and len(rest) < 2 else names
    return []
