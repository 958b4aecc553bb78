"""Folders of the `local` runtime's sites, and the file of facts about each."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import NotFound
from gateway.runtime.sites import Recipe, Side
from gateway.settings import Settings

_RECIPE: Final = ("start", "port", "health", "keep", "template")


class SiteFolders:
    """The folders of each tenant's site: the live one and those beside it, and the file of facts."""

    def __init__(self, settings: Settings) -> None:
        self.home = settings.state_dir / "tenants"
        self._workspace = settings.workspace.lstrip("/")

    def of(self, tenant: str, side: Side) -> Path:
        return self._live(tenant) if side == "live" else self.beside(tenant, "next")

    def beside(self, tenant: str, what: str) -> Path:
        live = self._live(tenant)
        return live.with_name(f".{live.name}-{what}")

    def _live(self, tenant: str) -> Path:
        return (self.home / tenant / "root" / self._workspace).absolute()

    def noted(self, tenant: str) -> dict[str, Any]:
        return read(self.home / tenant / "site.json")

    def note(self, tenant: str, **facts: Any) -> None:
        """Update the facts about a site; None removes a fact. Raises `NotFound`."""
        path = self.home / tenant / "site.json"
        if not path.parent.is_dir():
            raise NotFound(f"no tenant {tenant}")
        write(path, {**self.noted(tenant), **facts})


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError:
        return {}
    return found


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write facts, which may contain secrets, atomically and readable only by the owner."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(orjson.dumps({name: value for name, value in facts.items() if value is not None}))
    new.replace(path)


def started_by(recipe: Recipe) -> dict[str, Any]:
    """Return the facts to record about how a site is started."""
    return {name: getattr(recipe, name) for name in _RECIPE}


def recipe_of(facts: dict[str, Any]) -> Recipe | None:
    """Return the recipe recorded in a site's facts, None if there is none."""
    if "start" not in facts:
        return None
    more = {name: facts[name] for name in ("health", "template") if name in facts}
    return Recipe(b"", tuple(facts["start"]), int(facts["port"]), keep=tuple(facts.get("keep", ())), **more)


def before(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts to save before a site is replaced."""
    return {name: facts.get(name) for name in (*_RECIPE, "env_live")}


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack below a folder and nowhere else. Raises `tarfile.TarError`."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    # Python has filters since 3.11.4
    top = folder.resolve()
    for member in tar:
        at = (top / member.name).resolve()
        leads = (at.parent / member.linkname).resolve() if member.issym() else at
        plain = member.isreg() or member.isdir() or member.issym()
        if not (plain and at.is_relative_to(top) and leads.is_relative_to(top)):
            raise tarfile.ExtractError(f"{member.name!r} is not a plain entry of the site's folder")
        tar.extract(member, top)
