"""Keeps the instances of a project as incusd last told them, so that a list need not ask for all of them.

incusd answers a list of 200 instances in some 200 ms of its own CPU time. While its lifecycle events are
heard, only the instances they name are asked for again; without them every list is asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

Fetch = Callable[[str], Awaitable[dict[str, Any] | None]]
"""Returns an instance by its name, None where there is none."""

_AGE: Final = 30.0  # seconds until all are asked for again: incusd drops the events of a slow reader
_SINGLY: Final = 16  # more changed ones than these are asked for together
# actions after which an instance is what it was
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
    """The instances of one project. What it returns is shared and must not be changed."""

    def __init__(self, fetch_all: Callable[[], Awaitable[list[dict[str, Any]]]], fetch: Fetch) -> None:
        self._fetch_all, self._fetch = fetch_all, fetch
        self._kept: dict[str, dict[str, Any]] | None = None  # None: ask for all
        self._since = 0.0
        self._changed: set[str] = set()
        self._heard = False
        self._refreshing = asyncio.Lock()
        self._profiles: dict[str, tuple[float, dict[str, Any]]] = {}  # and since when

    async def all(self) -> list[dict[str, Any]]:
        """Return every instance, as it is once all that was noted before this call is taken in."""
        async with self._refreshing:
            aged = time.monotonic() - self._since > _AGE
            if self._kept is None or not self._heard or aged or len(self._changed) > _SINGLY:
                return await self._ask_for_all()
            changed, kept = self._changed, self._kept
            self._changed = set()  # what changes from here on is asked for by the next call
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
        """Return a profile, which incusd answers with a list of all instances that use it."""
        began, profiles = time.monotonic(), self._profiles
        since, kept = profiles.get(name, (0.0, {}))
        if not kept or not self._heard or began - since > _AGE:
            kept = await fetch()
            profiles[name] = began, kept  # if it was changed meanwhile, it is not read from here any more
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

    # --- what is noted ------------------------------------------------------------------------------

    def touched(self, *names: str) -> None:
        """Ask for these again before they are shown: something was done to them."""
        self._changed.update(names)

    def listening(self, heard: bool) -> None:
        """Start or stop to rely on `noted`: without events it is not known what others do."""
        self._heard = heard
        self._kept, self._profiles = None, {}

    def noted(self, event: Mapping[str, Any]) -> None:
        """Take in one lifecycle event of incusd."""
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        if action.startswith("profile-"):
            self._kept, self._profiles = None, {}  # what an instance inherits may be anything now
        elif action.startswith("instance-") and not action.startswith(_LOOKS) and name:
            old = (metadata.get("context") or {}).get("old_name")
            self.touched(name.partition("/")[0], *([str(old)] if old else []))


def touched_by(path: str, body: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the instances that a request to incusd changes."""
    match path.split("/"):
        case ["", "1.0", "instances", *rest]:
            given = (body or {}).get("name")
            names = [rest[0]] if rest else []
            # one that is made, or the new name of one that is renamed; else the name of a snapshot
            return [*names, str(given)] if given and len(rest) < 2 else names
    return []
