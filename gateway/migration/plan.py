"""Inspects a folder of the host before it moves: its size, and what needs a decision.

Follows no links, and reads only names and `lstat` of files, never contents.

Decides, from values alone, what a migration has to do and what prevents it.

Reads a migration's state from an instance's keys. Incus is the database.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.migration.source import Old, Owner, in_tenant
from gateway.rootfs.instance_record import MANAGED
from gateway.rootfs.paths import show
from gateway.runtime.incus.golden_copies import ROLE
from gateway.runtime.incus.records import DOMAIN, FACTS, FOLDER, IDLE_STOP, MIGRATION_STATE, OLD, PORT, UNIT
from gateway.runtime.incus.sites import HEALTH
from gateway.runtime.sites import Recipe
from gateway.runtime.sizes import SIZES, size_of
from gateway.settings import Settings

_NAMED: Final = 10  # paths of each kind that are listed
_SECRETS: Final = re.compile(
    r"\.env(\..+)?|.*\.(pem|key|p12|pfx|keystore)|id_(rsa|dsa|ecdsa|ed25519)|\.(npmrc|netrc|pgpass|git-credentials)"
    r"|(secrets?|credentials|service-account.*)\.(json|toml|ya?ml)",
    re.IGNORECASE,
)
_HARMLESS: Final = re.compile(r"\.env\.(example|sample|template|dist)", re.IGNORECASE)


@dataclass(slots=True)
class Paths:
    """Paths of one kind: their number, and the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(path)

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(map(show, self.first)) + more


@dataclass(slots=True)
class FolderContents:
    """The contents of a folder. Paths are relative to it; `size` is in bytes on disk."""

    files: int = 0
    size: int = 0
    out: Paths = field(default_factory=Paths)  # links that lead out of the folder
    special: Paths = field(default_factory=Paths)  # sockets, pipes and devices
    foreign: Paths = field(default_factory=Paths)  # with other owners than the folder's
    unreadable: Paths = field(default_factory=Paths)  # unreadable for the folder's owner
    native: Paths = field(default_factory=Paths)  # modules with machine code
    secret: Paths = field(default_factory=Paths)  # judged by their names
    mounts: Paths = field(default_factory=Paths)  # other file systems, below it
    setuid: Paths = field(default_factory=Paths)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        kinds = ("out", "special", "foreign", "unreadable", "native", "secret", "mounts", "setuid")
        paths = {kind: {"count": (p := getattr(self, kind)).count, "first": p.first} for kind in kinds}
        return {"files": self.files, "size": self.size, **paths}


def scan(folder: Path, leave: frozenset[str] = frozenset()) -> FolderContents:
    """Inspect a folder except the paths in `leave`. Raises `OSError` if it cannot be read."""
    found, top = FolderContents(), folder.lstat()
    links: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        at = pending.pop()
        with os.scandir(folder / at) as listed:
            for entry in listed:
                path = f"{at}/{entry.name}" if at else entry.name
                if path in leave:
                    continue
                facts = entry.stat(follow_symlinks=False)
                _one(found, path, entry.name, facts, top, links)
                if stat.S_ISLNK(facts.st_mode) and _leads_out(path, str((folder / path).readlink()), folder):
                    found.out.add(path)
                if stat.S_ISDIR(facts.st_mode) and facts.st_dev == top.st_dev:
                    pending.append(path)
    return found


def _one(
    found: FolderContents,
    path: str,
    name: str,
    facts: os.stat_result,
    top: os.stat_result,
    links: set[tuple[int, int]],
) -> None:
    mode, file = facts.st_mode, stat.S_ISREG(facts.st_mode)
    if facts.st_dev != top.st_dev:
        found.mounts.add(path)
        return
    found.files += 1
    if (facts.st_dev, facts.st_ino) not in links:
        found.size += facts.st_blocks * 512
    if file and facts.st_nlink > 1:
        links.add((facts.st_dev, facts.st_ino))
    if not (file or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        found.special.add(path)
        return
    if facts.st_uid != top.st_uid:
        found.foreign.add(path)
    if not stat.S_ISLNK(mode) and not _readable(facts, top):
        found.unreadable.add(path)
    if file and mode & (stat.S_ISUID | stat.S_ISGID):
        found.setuid.add(path)
    if file and name.endswith(".node"):
        found.native.add(path)
    if file and _SECRETS.fullmatch(name) and not _HARMLESS.fullmatch(name) and "node_modules/" not in path:
        found.secret.add(path)


def _readable(facts: os.stat_result, owner: os.stat_result) -> bool:
    """Return whether the folder's owner can read a file, or list and enter a folder."""
    shift = 6 if facts.st_uid == owner.st_uid else 3 if facts.st_gid == owner.st_gid else 0
    wanted = 5 if stat.S_ISDIR(facts.st_mode) else 4
    return (facts.st_mode >> shift) & wanted == wanted


def _leads_out(path: str, target: str, folder: Path) -> bool:
    """Return whether a link leads out of the folder, judged by its text alone.

    The folder's absolute path is fine: in the tenant it leads to the workspace, too.
    """
    absolute = os.path.normpath((folder / path).parent / target)
    return absolute != str(folder) and not absolute.startswith(f"{folder}/")


_IMAGE: Final = 700 << 20  # bytes of a tenant's disk for its system and a copy's growth


@dataclass(frozen=True, slots=True)
class Wanted:
    """The operator's request. Paths in `leave` are relative to the folder."""

    folder: Path
    unit: str | None = None
    port: int | None = None
    size: str = "small"
    start: tuple[str, ...] = ()
    install: tuple[str, ...] = ()
    health: str = "/"
    env: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """What was found and would be done. `stops` say what prevents it, `notes` what to know before."""

    tenant: str
    domain: str
    wanted: Wanted
    old: Old
    found: FolderContents
    owner: Owner
    recipe: Recipe
    read_only: bool
    size: int | None
    own_block: bool
    notes: tuple[str, ...] = field(default=())
    stops: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON, with only the names of variables."""
        return {
            "tenant": self.tenant,
            "domain": self.domain,
            "from": str(self.wanted.folder),
            "unit": self.wanted.unit,
            "owner": {"uid": self.owner.uid, "gid": self.owner.gid},
            "old": {
                "start": list(self.old.words),
                "user": self.old.uid,
                "address": self.old.address,
                "port": self.old.port,
                "env": sorted(self.old.environment),
            },
            "start": list(self.recipe.start),
            "install": list(self.recipe.install),
            "attached": "read-only" if self.read_only else "writable",
            "disk": self.size,
            "found": self.found.to_dict(),
            "notes": list(self.notes),
            "stops": list(self.stops),
        }

    def lines(self) -> Iterator[str]:
        """Yield it as lines for a person."""
        old, found = self.old, self.found
        yield f"{self.domain} moves from {self.wanted.folder} into tenant {self.tenant}"
        unit = self.wanted.unit or "no unit"
        yield f"  old service  {unit}, port {old.port}, user {old.uid}: {' '.join(old.words)}"
        yield f"  in tenant    {' '.join(self.recipe.start)}"
        yield f"  variables    {', '.join(sorted(old.environment)) or 'none'} (values are not shown)"
        yield f"  folder       {found.files} files and folders, {_mib(found.size)}; owner {self.owner.uid}"
        yield f"  tenant disk  {_mib(self.size) if self.size else 'without a limit'}, size {self.wanted.size}"
        yield f"  attached     {'read-only' if self.read_only else 'writable, as its owner'}"
        yield "steps: attach, copy, switch (the old service is stopped then); finish when you say so"
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"in the way: {stop}" for stop in self.stops)


def decided(
    tenant: str,
    domain: str,
    wanted: Wanted,
    old: Old,
    found: FolderContents,
    owner: Owner,
    settings: Settings,
    *,
    own_block: bool,
    driver: str = "btrfs",
) -> MigrationPlan:
    """Make a plan from what was found."""
    # The tenant gets what its old service had in the folder, but not what another service runs there.
    read_only = owner.uid == 0 or old.uid != owner.uid
    words = wanted.start or in_tenant(old.words, old.folder, wanted.folder, settings.workspace)
    recipe = Recipe(b"", words, old.port, wanted.health, wanted.install, alone=True)
    disk = None if driver == "dir" else size_of(SIZES[wanted.size].get("disk", settings.tenant_disk))
    stops, notes = [*_stops(wanted, old, found, disk)], [*_notes(wanted, old, found, read_only, own_block)]
    return MigrationPlan(
        tenant,
        domain,
        wanted,
        old,
        found,
        owner,
        recipe,
        read_only,
        disk,
        own_block,
        tuple(notes),
        tuple(stops),
    )


def _stops(wanted: Wanted, old: Old, found: FolderContents, disk: int | None) -> Iterator[str]:
    if old.port < 1024:
        yield f"port {old.port} needs root in a tenant too; make the old service listen on 1024 or above"
    if disk is not None and found.size + _IMAGE > disk:
        fits = [name for name, size in SIZES.items() if size_of(size.get("disk", "0")) > found.size + _IMAGE]
        fix = f"--size {fits[0]}" if fits else "--leave for what the site does not need"
        yield f"{_mib(found.size)} do not fit on a disk of {_mib(disk)} beside the system; use {fix}"
    if found.unreadable.count:
        yield (
            f"the folder's owner cannot read {found.unreadable}: give them to that user, or leave them out "
            "with --leave PATH"
        )
    if found.mounts.count:
        yield f"other file systems, mounted at {found.mounts}, are not copied; use --leave PATH"


def _notes(
    wanted: Wanted, old: Old, found: FolderContents, read_only: bool, own_block: bool
) -> Iterator[str]:
    if read_only:
        why = "root runs its service" if old.uid == 0 else "its owner is another user than the service's"
        yield (
            f"the folder is attached read-only ({why}): what the tenant wrote there could be run by that "
            "user on this host. Files can be changed once they are copied"
        )
    else:
        yield "while it is attached, what the tenant writes runs on this host, as the old service's user"
    if own_block:
        yield (
            "Caddy has its own block for this domain, which takes precedence over the gateway's routes: "
            "comment it out once the folder is attached (visitors then reach the old service through the "
            "gateway's route), or the switch is refused"
        )
    if found.out.count:
        yield f"links that lead out of the folder are copied as they are, and lead nowhere: {found.out}"
    if found.special.count:
        yield f"sockets, pipes and devices are not copied: {found.special}"
    if found.foreign.count:
        yield f"of other owners, and of the site's user once copied: {found.foreign}"
    if found.setuid.count:
        yield f"set-uid and set-gid bits are not copied: {found.setuid}"
    if found.native.count and not wanted.install:
        yield (
            f"native modules were built for this host: {found.native}. The copy is tried before "
            "the switch; --install 'bun install' reinstalls node_modules in the tenant instead"
        )
    if found.secret.count:
        yield (
            f"judging by their names, these hold secrets: {found.secret}. Once attached, the tenant's "
            "commands and agents can read them; --leave PATH keeps one out of the copy"
        )
    if wanted.unit is None:
        yield (
            "without --unit the old process is paused for a moment at the switch and then continues: stop "
            "it yourself once the site has moved. Of its variables only those named with --env are taken "
            "over"
        )


def _mib(size: int | None) -> str:
    return f"{(size or 0) / (1 << 20):.0f} MiB"


ENDED: Final[Mapping[str, str]] = dict.fromkeys((MIGRATION_STATE, OLD, FOLDER, UNIT, FACTS, IDLE_STOP), "")
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
        """Parse the keys of an instance that has a `MIGRATION_STATE`."""
        facts = orjson.loads(config[FACTS])
        start, install, health = tuple(facts["start"]), tuple(facts["install"]), config.get(HEALTH) or "/"
        return cls(
            tenant=tenant,
            domain=config[DOMAIN],
            state=config[MIGRATION_STATE],
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


def keys(plan: MigrationPlan) -> dict[str, str]:
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
        MIGRATION_STATE: "attaching",
        OLD: f"{old.address}:{old.port}",
        FOLDER: str(wanted.folder),
        UNIT: wanted.unit or "",
        FACTS: orjson.dumps(facts).decode(),
        **{f"limits.{name}": size[name] for name in ("cpu", "memory") if name in size},
    }
