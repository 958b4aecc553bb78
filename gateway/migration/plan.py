"""Decides, from values alone, what a migration has to do and what prevents it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gateway.migration.scan import Found
from gateway.migration.service import Old, in_tenant
from gateway.migration.shifted_mount import Owner
from gateway.runtime.sites import Recipe
from gateway.runtime.sizes import SIZES, size_of
from gateway.settings import Settings

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
class Plan:
    """What was found and would be done. `stops` say what prevents it, `notes` what to know before."""

    tenant: str
    domain: str
    wanted: Wanted
    old: Old
    found: Found
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
    found: Found,
    owner: Owner,
    settings: Settings,
    *,
    own_block: bool,
    driver: str = "btrfs",
) -> Plan:
    """Make a plan from what was found."""
    # The tenant gets what its old service had in the folder, but not what another service runs there.
    read_only = owner.uid == 0 or old.uid != owner.uid
    words = wanted.start or in_tenant(old.words, old.folder, wanted.folder, settings.workspace)
    recipe = Recipe(b"", words, old.port, wanted.health, wanted.install, alone=True)
    disk = None if driver == "dir" else size_of(SIZES[wanted.size].get("disk", settings.tenant_disk))
    stops, notes = [*_stops(wanted, old, found, disk)], [*_notes(wanted, old, found, read_only, own_block)]
    return Plan(
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


def _stops(wanted: Wanted, old: Old, found: Found, disk: int | None) -> Iterator[str]:
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


def _notes(wanted: Wanted, old: Old, found: Found, read_only: bool, own_block: bool) -> Iterator[str]:
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
