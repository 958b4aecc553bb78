"""Formerly live sites of the `local` runtime; see `gateway.runtime.sites.FormerSites`.

Each has a folder beside the workspace with its files and a record of how it was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.errors import NotFound
from gateway.runtime.local.folders import SiteFolders, read, recipe_of, write
from gateway.runtime.sites import FORMER_ID, Former, Recipe


class LocalFormerSites:
    def __init__(self, folders: SiteFolders) -> None:
        self._folders = folders

    async def listed(self, tenant: str) -> Sequence[Former]:
        return await asyncio.to_thread(self._listed, tenant)

    async def live(self, tenant: str) -> tuple[str | None, Recipe | None]:
        facts = self._folders.noted(tenant)
        return facts.get("live"), recipe_of(facts)

    async def recipe(self, tenant: str, former: str) -> Recipe:
        recipe = recipe_of(self._facts(tenant, former))
        if recipe is None:
            raise _gone(tenant, former)
        return recipe

    async def environment(self, tenant: str) -> Mapping[str, str]:
        return dict(self._folders.noted(tenant).get("env_live") or {})

    async def take(self, tenant: str, former: str) -> None:
        facts = self._facts(tenant, former)
        kept = self._place(tenant, former) / "site"
        if not kept.is_dir():
            raise _gone(tenant, former)
        following = self._folders.of(tenant, "next")
        await asyncio.to_thread(shutil.rmtree, following, ignore_errors=True)
        self._folders.note(tenant, taken=former, env_next=facts.get("env_live") or {})
        kept.rename(following)

    def put_back(self, tenant: str) -> None:
        """Put a taken site that is still the next one back where it was kept."""
        taken = self._folders.noted(tenant).get("taken")
        if taken is None:
            return
        following, kept = self._folders.of(tenant, "next"), self._place(tenant, taken)
        if following.is_dir() and kept.is_dir() and not (kept / "site").exists():
            with contextlib.suppress(OSError):  # files copied from the live site do not belong to it
                remove(following, self._folders.beside(tenant, "lasting").read_bytes().split(b"\0")[:-1])
            following.rename(kept / "site")

    async def copy(self, tenant: str) -> None:
        return  # the next side is always a copy

    async def put(self, tenant: str, former: str, live: str, most: int) -> None:
        await asyncio.to_thread(self._put, tenant, former, live, most)

    def _put(self, tenant: str, former: str, live: str, most: int) -> None:
        noted = self._folders.noted(tenant)
        was = noted.get("before")
        if was is None:
            return
        if (taken := noted.get("taken")) is not None:
            self._folders.note(tenant, taken=None)
            shutil.rmtree(self._place(tenant, taken), ignore_errors=True)
        place = self._place(tenant, former)
        # if only the environment changed, the next side has a copy of the site's files
        source = self._folders.beside(tenant, "old")
        if not source.exists():
            source = self._folders.of(tenant, "next")
        if most > 0 and was.get("start") and source.exists():
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_what_lasts(tenant, source)
            shutil.rmtree(place / "site", ignore_errors=True)
            source.rename(place / "site")
            write(place / "facts.json", {**was, "replaced": time.time()})
        self._folders.note(tenant, live=live)
        for one in self._listed(tenant)[most:]:
            shutil.rmtree(self._place(tenant, one.id), ignore_errors=True)

    async def spare(self, tenant: str) -> bool:
        return await asyncio.to_thread(self._spare, tenant)

    def _spare(self, tenant: str) -> bool:
        kept = self._listed(tenant)
        if len(kept) < 2 or self._folders.noted(tenant).get("taken") is not None:
            return False
        shutil.rmtree(self._place(tenant, kept[-1].id), ignore_errors=True)
        return True

    def _remove_what_lasts(self, tenant: str, folder: Path) -> None:
        """Remove files that no rollback changes; those with "./" are not named by a manifest."""
        live, names = self._folders.of(tenant, "live"), [b".git", b".gateway"]
        names = [name for name in names if (live / os.fsdecode(name)).exists()]
        with contextlib.suppress(OSError):
            lasting = self._folders.beside(tenant, "lasting").read_bytes().split(b"\0")[:-1]
            names += [name for name in lasting if not name.startswith(b"./")]
        remove(folder, names)

    def _listed(self, tenant: str) -> list[Former]:
        try:
            names = [entry.name for entry in self._folders.beside(tenant, "kept").iterdir()]
        except OSError:
            return []
        found = [
            Former(name, float(self._facts(tenant, name).get("replaced", 0)))
            for name in names
            if FORMER_ID.fullmatch(name) and (self._place(tenant, name) / "site").is_dir()
        ]
        return sorted(found, key=lambda one: one.replaced, reverse=True)

    def _facts(self, tenant: str, former: str) -> dict[str, Any]:
        return read(self._place(tenant, former) / "facts.json")

    def _place(self, tenant: str, former: str) -> Path:
        return self._folders.beside(tenant, "kept") / former


def remove(folder: Path, names: Sequence[bytes]) -> None:
    """Remove the entries with these names in a folder."""
    for path in (folder / os.fsdecode(name) for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _gone(tenant: str, former: str) -> NotFound:
    return NotFound(f"tenant {tenant} no longer keeps deployment {former}", reason="not_kept")
