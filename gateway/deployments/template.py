"""Templates: folders that become sites, as their manifest `site.toml` says or as detected."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gateway.caddy import shipped
from gateway.deployments import archive as archive_limits
from gateway.deployments.archive import (
    LEFT_OUT,
    SHOWN,
    ArchiveEntry,
    check_entry,
    folders_above,
    packed,
    read_archive,
    read_folder,
    refused,
    too_large,
    too_many,
)
from gateway.detection import Clues, Detection, detect
from gateway.detection.clues import line_of
from gateway.detection.frameworks import Framework, Project, expanded, project, recognise
from gateway.detection.sandbox import detect_sandboxed
from gateway.errors import GatewayError, InvalidParams, NotFound, Unavailable
from gateway.rootfs.paths import HOME, show
from gateway.runtime.sites import Recipe
from gateway.settings import Settings
from gateway.tools.globs import rules
from gateway.tools.mirroring import Kind, listed, understood

MANIFEST: Final = "site.toml"
_MANIFEST_MAX: Final = 64 << 10  # bytes
# of one line; of a key with n parts the parser keeps n² words: 64 KiB of dots took 4 GiB
_DOTS_MAX: Final = 128
_WORD_MAX: Final = 4096  # characters
_SERVER: Final = Path(__file__).with_name("serve.js").read_text()
_WATCHER: Final = Path(__file__).with_name("watch.js").read_text()
_DJANGO: Final = Path(__file__).with_name("serve_django.py").read_text()

# characters with a meaning to a shell; `$PORT` alone needs no shell
_SHELL: Final = re.compile(r"[|&;<>()`*?\[\]~#!]|\$(?!PORT(?![A-Za-z0-9_])|\{PORT\})|^\s*\w+=")
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh"})
_UNEXPANDED: Final = re.compile(r"\$\{PORT[^}]+\}")

Word = Annotated[str, StringConstraints(min_length=1, max_length=_WORD_MAX, pattern=r"^[^\x00-\x1f]*$")]
UrlPath = Annotated[str, StringConstraints(pattern=r"^/[!-~]*$", max_length=1024)]


Pattern = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]*$"),
    AfterValidator(understood),
]


def _words(said: Any) -> Any:
    """Return the words of a command given as one string: split as a shell would, or run by one if needed.

    Anything else is returned as it is, for the validation to refuse.
    """
    if isinstance(said, str):
        if len(said) > _WORD_MAX:
            raise PydanticCustomError("long", "it has over {most} characters", {"most": _WORD_MAX})
        if _SHELL.search(said):
            return ("sh", "-c", said)
        try:
            return tuple(shlex.split(said))
        except ValueError:
            raise PydanticCustomError("quotes", "it has an unclosed quote") from None
    if not isinstance(said, list | tuple):
        raise PydanticCustomError(
            "command", 'it must be a list of words, such as ["bun", "serve.ts"], or a string'
        )
    return said


def _expanded(command: tuple[str, ...]) -> tuple[str, ...]:
    if command[:1] and command[0].rpartition("/")[2] not in _SHELLS:
        for word in command:
            if (found := _UNEXPANDED.search(word)) is not None:
                raise PydanticCustomError(
                    "port", "{said} needs a shell; write $PORT", {"said": show(found[0][:SHOWN])}
                )
    return command


def _below(folder: str) -> str:
    if folder != "." and any(part in ("", ".", "..") for part in folder.split("/")):
        raise PydanticCustomError("below", 'it must be a folder of the site, such as "dist", or "."')
    return folder


Install = Annotated[tuple[Word, ...], Field(max_length=64), BeforeValidator(_words)]
Start = Annotated[
    tuple[Word, ...],
    Field(min_length=1, max_length=64),
    BeforeValidator(_words),
    AfterValidator(_expanded),
]
Mode = Literal["dev", "production"]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Overrides(BaseModel):
    """Options of a deployment that override the manifest and what is detected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    install: Install | None = None
    start: Start | None = None
    port: Port | None = None
    mode: Mode | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None}


class Manifest(BaseModel):
    """The contents of `site.toml`. Without `start` and `static`, the kind of site is detected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: Annotated[str, Field(max_length=500)] = ""
    install: Install | None = None
    start: Start | None = None
    static: Annotated[Word, AfterValidator(_below)] | None = None
    port: Port = 3000
    mode: Mode = "dev"
    watch: bool = False
    spa: bool | None = None
    health: UrlPath = "/"
    warm: Annotated[tuple[UrlPath, ...], Field(max_length=16)] = ()
    keep: Annotated[tuple[Pattern, ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.start is not None and self.static is not None:
            raise PydanticCustomError("both", "it has `start` and `static`; leave one out")
        return self

    @property
    def command(self) -> tuple[str, ...]:
        """The words that start the site; for static files, the server for them."""
        if self.static is not None:
            return ("bun", "-e", _SERVER, self.static, *(("spa",) if self.spa else ()))
        start = self.start or ()
        if start[1:3] == ("manage.py", "runserver"):
            start = (start[0], "-c", _DJANGO, *start[1:])
        return ("node", "-e", _WATCHER, "--", *start) if self.watch else start

    def but(self, overrides: Overrides) -> Manifest:
        """Return it with the overrides applied."""
        said = overrides.given
        return self.model_copy(update=({"static": None} if "start" in said else {}) | said)

    def completed(self, found: Detection) -> Manifest:
        """Return it, completed by what was detected."""
        more: dict[str, Any] = {}
        if self.install is None:
            more["install"] = found.install
        if self.start is None and self.static is None:
            more |= {"start": found.start or None, "static": found.static}
            more |= {"watch": self.watch or found.watch, "spa": found.spa if self.spa is None else self.spa}
            more["warm"] = self.warm or ("/",)
        try:
            # it was detected from files that a stranger wrote
            return Manifest.model_validate(self.model_dump() | more)
        except ValidationError as error:
            problem = error.errors()[0]
            raise refused(f"{problem['loc'][0]}, as detected: {problem['msg']}") from None


def read_manifest(said: ArchiveEntry | None) -> Manifest:
    """Read a manifest; an absent one is empty. Raises `InvalidParams`."""
    if said is None:
        return Manifest()
    if said.content is None:
        raise refused(f"{MANIFEST} is a folder or a link; make it a file that says how the site is started")
    if len(said.content) > _MANIFEST_MAX:
        raise refused(f"{MANIFEST} has over {_MANIFEST_MAX >> 10} KiB")
    if any(line.count(b".") > _DOTS_MAX for line in said.content.split(b"\n")):
        raise refused(f"{MANIFEST} has a line with over {_DOTS_MAX} dots; split it")
    try:
        return Manifest.model_validate(tomllib.loads(said.content.decode()))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        where = f"{MANIFEST}: {show(field[:SHOWN])}" if field else MANIFEST
        raise refused(f"{where}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:  # TOML's own, text's, a number of 5000 digits, nesting
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise refused(f"{MANIFEST} is not TOML: {show(why[:SHOWN])}") from None


def written(found: Detection, port: int) -> str:
    """Return what was detected as a manifest, with the reason as a comment."""
    lines = [f"# {line}" for line in found.lines()]
    if found.install:
        lines.append(f"install = {_quoted(line_of(found.install))}")
    if found.static is not None:
        lines.append(f"static = {_quoted(found.static)}")
        lines += ["spa = true"] if found.spa else []
    else:
        lines.append(f"start = {_quoted(line_of(found.start))}")
    if found.watch:
        lines.append("watch = true")
    lines.append(f"port = {port}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # TOML's basic strings have JSON's escapes
    return json.dumps(text, ensure_ascii=False)


NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_INSIDE: Final = re.compile(r"cd '?([^'\s]{1,200})'? && ")
_IGNORE_MAX: Final = 64 << 10  # bytes of one ignore file


@dataclass(frozen=True, slots=True)
class SiteTemplate:
    """A checked template. `shared` if it is the operator's own: only then may others share its copies.

    `detected` is set if its manifest does not say how it is started.
    """

    name: str
    manifest: Manifest
    entries: Mapping[str, ArchiveEntry]
    shared: bool
    detected: Detection | None = None

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

    def update(self) -> SiteTemplate:
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
            if not kept[path.rpartition("/")[0]] and not named.decide(path, folder=entry == ArchiveEntry())
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
        own = {path: ArchiveEntry(content), f"{HOME}/.gitignore": ArchiveEntry(b"*\n")}
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


def named(name: str, settings: Settings) -> SiteTemplate:
    """Read a template by its name. Raises `NotFound`, which lists the existing ones."""
    known = names(settings)
    if name not in known:
        raise NotFound(
            f"no template {name[:63]}; there are: {', '.join(known) or 'none'}", reason="template_missing"
        )
    try:
        entries = read_folder(known[name])
    except OSError as error:
        raise Unavailable(
            f"template {name} cannot be read: {error.strerror}; check its folder's owner and modes",
            reason="template_invalid",
        ) from error
    return checked(name, entries, shared=True)


def uploaded(archive: bytes, overrides: Overrides | None = None) -> SiteTemplate:
    """Read a template from a tar, compressed or not."""
    entries = read_archive(archive)
    return checked("upload", entries, shared=False, overrides=overrides, finding=detect_sandboxed)


def checked(
    name: str,
    entries: Mapping[str, ArchiveEntry],
    *,
    shared: bool,
    overrides: Overrides | None = None,
    finding: Callable[[Clues], Detection] = detect,
) -> SiteTemplate:
    """Make a template of entries. Raises `InvalidParams` and `TooLarge`, which say what is wrong.

    `finding` detects what a folder is; for a stranger's files use `detect_sandboxed`.
    """
    if len(entries) > archive_limits.FILES:
        raise too_many()
    if sum(len(entry.content or b"") for entry in entries.values()) > archive_limits.BYTES:
        raise too_large()
    for path, entry in entries.items():
        check_entry(path, entry, entries)
    # add folders that are only part of other paths
    if len(entries.keys() | folders_above(entries)) > archive_limits.FILES:
        raise too_many()
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
        return SiteTemplate(name, manifest, entries, shared)
    if said.start is not None:  # a start command in a manifest leaves nothing to detect
        return SiteTemplate(name, manifest, entries, shared)
    files = {path: entry.content for path, entry in entries.items() if entry.content is not None}
    production = manifest.mode == "production"
    start = manifest.start
    if production and start is not None:
        start = ("env", "NODE_ENV=production", *start)
        manifest = manifest.model_copy(update={"start": start})
    found = finding(Clues.of(files, production=production)).with_commands(start, manifest.install)
    if found.trouble:
        raise InvalidParams(found.trouble, reason="undetected")
    return SiteTemplate(name, manifest.completed(found), entries, shared, found)


def described_templates(settings: Settings) -> list[dict[str, Any]]:
    """Return the templates that can be deployed by name; a broken one with its error."""
    found: list[dict[str, Any]] = []
    for name, folder in names(settings).items():
        try:
            manifest = checked(name, read_folder(folder), shared=True).manifest
            found.append({"name": name, "description": manifest.description, "port": manifest.port})
        except (GatewayError, OSError) as error:
            why = error.message if isinstance(error, GatewayError) else f"{MANIFEST} cannot be read"
            found.append({"name": name, "description": "", "error": why})
    return found
