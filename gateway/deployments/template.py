"""Templates: folders that become sites, as their manifest `site.toml` says or as detected."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gateway.caddy import shipped
from gateway.deployments.entries import (
    LEFT_OUT,
    Entry,
    check_entry,
    folders_above,
    packed,
    read_archive,
    read_folder,
    too_large,
    too_many,
)
from gateway.deployments.manifest import MANIFEST, Manifest, Overrides, read_manifest
from gateway.detection import Clues, Detected, detect
from gateway.detection.apart import detect_apart
from gateway.detection.frameworks import Framework, Project, expanded, project, recognise
from gateway.errors import InvalidParams, NotFound, Unavailable
from gateway.rootfs.paths import HOME, show
from gateway.runtime.sites import Recipe
from gateway.settings import Settings
from gateway.tools.globs import rules
from gateway.tools.mirroring import Kind, listed

NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_INSIDE: Final = re.compile(r"cd '?([^'\s]{1,200})'? && ")
_IGNORE_MAX: Final = 64 << 10  # bytes of one ignore file


@dataclass(frozen=True, slots=True)
class Template:
    """A checked template. `shared` if it is the operator's own: only then may others share its copies.

    `detected` is set if its manifest does not say how it is started.
    """

    name: str
    manifest: Manifest
    entries: Mapping[str, Entry]
    shared: bool
    detected: Detected | None = None

    @property
    def digest(self) -> str:
        # parts of the manifest may come from elsewhere
        digest = hashlib.sha256(self.manifest.model_dump_json().encode())
        for path, entry in sorted(self.entries.items()):
            content = hashlib.sha256(entry.content or b"").digest()
            digest.update(
                f"{path}\0{entry.link}\0{entry.executable}\0{entry.content is None}\0".encode() + content
            )
        return digest.hexdigest()

    def stays(self, *, clean: bool = False) -> dict[str, Any]:
        """Return a worker's request for what an update removes; see `gateway.tools.mirroring`."""
        kinds: dict[str, Kind] = dict.fromkeys(folders_above(self.entries), "folder")
        ignored = {}
        for path, entry in self.entries.items():
            kinds[path] = "link" if entry.link is not None else "folder" if entry.content is None else "file"
            above, _, name = path.rpartition("/")
            if name == ".gitignore" and entry.content is not None:
                ignored[above] = entry.content[:_IGNORE_MAX].decode("utf-8", "replace")
        facts = {"keep": self.manifest.keep, "left_out": [*LEFT_OUT], "clean": clean}
        return {"there": kinds, "ignored": ignored, **facts}

    def update(self) -> Template:
        """Return it as an update takes it.

        What `keep` names is a production site's own data: a new one gets the folder's, an update brings none.
        """
        if self.manifest.mode != "production" or not self.manifest.keep:
            return self
        named = rules("\n".join(self.manifest.keep))
        kept = {"": False}  # by folder
        for folder in sorted(folders_above(self.entries)):
            kept[folder] = kept[folder.rpartition("/")[0]] or bool(named.decide(folder, folder=True))
        entries = {
            path: entry
            for path, entry in self.entries.items()
            if not kept[path.rpartition("/")[0]] and not named.decide(path, folder=entry == Entry())
        }
        return replace(self, entries=entries)

    def project(self) -> Project:
        """Return the package.json of the folder in which it is started."""
        start = self.manifest.start or ()
        inside = _INSIDE.match(start[2]) if start[:2] == ("sh", "-c") and len(start) > 2 else None
        manifest = self.entries.get(f"{inside[1]}/package.json" if inside is not None else "package.json")
        return project(None if manifest is None else manifest.content)

    def framework(self) -> tuple[Framework | None, tuple[str, ...], tuple[str, ...]]:
        """Return its framework, if known, and the words of its start and install commands."""
        said = self.project()
        start, install = (
            expanded(words, said) for words in (self.manifest.command, self.manifest.install or ())
        )
        return recognise(start, said.packages), start, install

    def recipe(self, owner: str = "") -> Recipe:
        """Return it as a runtime needs it. Copies of an upload are kept only for an owner."""
        manifest = self.manifest
        return Recipe(
            # caches of compiled files, such as Python's, compare modification times
            archive=self.archive(),
            start=manifest.command,
            port=manifest.port,
            health=manifest.health,
            install=manifest.install or (),
            warm=manifest.warm,
            key=self._key(owner),
            owner="" if self.shared else owner,
            keep=manifest.keep,
            template=self.name,
        )

    def archive(self) -> bytes:
        """Return its files as a tar, with the list of its paths by which updates know what a folder had."""
        path, content = listed([*self.entries, *folders_above(self.entries)])
        own = {path: Entry(content), f"{HOME}/.gitignore": Entry(b"*\n")}
        return packed({**self.entries, **own}, int(time.time()))

    def _key(self, owner: str) -> str:
        if self.shared or not owner:
            return self.digest if self.shared else ""
        return hashlib.sha256(f"{owner} {self.digest}".encode()).hexdigest()


def names(settings: Settings) -> dict[str, Path]:
    """Return every template that can be deployed by name; the operator's take precedence over ours."""
    found: dict[str, Path] = {}
    for folder in (shipped("deploy/templates"), settings.templates_dir):
        if folder is not None and folder.is_dir():
            found |= {
                place.name: place
                for place in sorted(folder.iterdir())
                if NAME.fullmatch(place.name) and (place / MANIFEST).is_file()
            }
    return found


def named(name: str, settings: Settings) -> Template:
    """Read a template by its name. Raises `NotFound`, which lists the existing ones."""
    known = names(settings)
    if name not in known:
        raise NotFound(
            f"no template {name[:63]}; there are: {', '.join(known) or 'none'}", reason="template_missing"
        )
    try:
        entries = read_folder(known[name], settings)
    except OSError as error:
        raise Unavailable(
            f"template {name} cannot be read: {error.strerror}; check its folder's owner and modes",
            reason="template_invalid",
        ) from error
    return checked(name, entries, settings, shared=True)


def uploaded(archive: bytes, settings: Settings, overrides: Overrides | None = None) -> Template:
    """Read a template from a tar, compressed or not."""
    entries = read_archive(archive, settings)
    return checked("upload", entries, settings, shared=False, overrides=overrides, finding=detect_apart)


def checked(
    name: str,
    entries: Mapping[str, Entry],
    settings: Settings,
    *,
    shared: bool,
    overrides: Overrides | None = None,
    finding: Callable[[Clues], Detected] = detect,
) -> Template:
    """Make a template of entries. Raises `InvalidParams` and `TooLarge`, which say what is wrong.

    `finding` detects what a folder is; for a stranger's files use `detect_apart`.
    """
    if len(entries) > settings.template_files:
        raise too_many(settings)
    if sum(len(entry.content or b"") for entry in entries.values()) > settings.template_bytes:
        raise too_large(settings)
    for path, entry in entries.items():
        check_entry(path, entry, entries)
    # add folders that are only part of other paths
    if len(entries.keys() | folders_above(entries)) > settings.template_files:
        raise too_many(settings)
    said = read_manifest(entries.get(MANIFEST))
    manifest = said.but(overrides or Overrides())
    if overrides is not None and overrides.mode and (manifest.start or manifest.static):
        raise InvalidParams(
            f"`mode` is only for a detected start command; here {MANIFEST} or `start` gives one",
            field="mode",
        )
    if manifest.static not in (None, ".") and not manifest.install:
        inside = f"{manifest.static}/"
        if not any(path.startswith(inside) for path in entries):
            raise InvalidParams(
                f"{MANIFEST}: static: there is no folder {show(str(manifest.static))} with files, and no "
                "`install` that makes it",
                reason="template_invalid",
            )
    if manifest.static is not None or (manifest.start is not None and manifest.install is not None):
        return Template(name, manifest, entries, shared)
    if said.start is not None:  # a start command in a manifest leaves nothing to detect
        return Template(name, manifest, entries, shared)
    files = {path: entry.content for path, entry in entries.items() if entry.content is not None}
    production = manifest.mode == "production"
    start = manifest.start
    if production and start is not None:
        start = ("env", "NODE_ENV=production", *start)
        manifest = manifest.model_copy(update={"start": start})
    found = finding(Clues.of(files, production=production)).told(start, manifest.install)
    if found.trouble:
        raise InvalidParams(found.trouble, reason="undetected")
    return Template(name, manifest.completed(found), entries, shared, found)
