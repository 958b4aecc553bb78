"""Decide which golden copies of uploads to keep.

A copy belongs to one owner and one content, so no owner gets another's. It is removed with the last tenant of
that content, after a long time without use, or when there are too many or too large copies; then the least
recently used goes first. The facts about a copy are stored with it in Incus.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.rootfs.instance_record import identity_of
from gateway.settings import Settings

CONTENT: Final = "user.gateway.content"
"""The key of the upload from which a golden copy or a tenant was made."""

UPLOADER: Final = "user.gateway.uploader"
USED: Final = "user.gateway.used"
BYTES: Final = "user.gateway.bytes"
BASE: Final = "user.gateway.base"
"""The base of a copy: the image and the gateway's way of making copies."""


@dataclass(frozen=True, slots=True)
class UploadedSite:
    """A golden copy of an upload; `used` is in seconds since the epoch."""

    name: str
    identity: str
    content: str
    owner: str
    base: str
    used: float
    bytes: int


def upload_of(instance: Mapping[str, Any], used: Mapping[str, float]) -> UploadedSite | None:
    """Return an instance as an upload's copy, None for a template's. `used` has more recent uses by name."""
    config, name = instance["config"], instance["name"]
    if not config.get(UPLOADER):
        return None
    return UploadedSite(
        name=name,
        identity=identity_of(instance),
        content=config.get(CONTENT, ""),
        owner=config[UPLOADER],
        base=config.get(BASE, ""),
        used=max(number(config.get(USED)), used.get(name, 0.0)),
        bytes=number(config.get(BYTES)),
    )


def surplus(
    copies: Collection[UploadedSite],
    settings: Settings,
    *,
    held: Collection[str],
    base: str,
    now: float,
    coming: str | None = None,
) -> list[UploadedSite]:
    """Return the copies to remove. `held` are the contents of existing tenants.

    With `coming`, room is made for one more copy of that owner.
    """
    kept = list[UploadedSite]()
    for copy in sorted(copies, key=lambda one: one.used, reverse=True):
        fresh = now - copy.used <= settings.upload_copies_unused and copy.base == base
        if fresh and copy.content in held:
            kept.append(copy)
    for owner in {copy.owner for copy in kept}:
        theirs = [copy for copy in kept if copy.owner == owner]
        count = settings.owner_upload_copies - (owner == coming)
        over = _over(theirs, count, settings.owner_upload_copies_bytes)
        kept = [copy for copy in kept if copy not in over]
    count = settings.upload_copies - (coming is not None)
    over = _over(kept, count, settings.upload_copies_bytes)
    stays = {copy.identity for copy in kept} - {copy.identity for copy in over}
    return [copy for copy in copies if copy.identity not in stays]


def freeing(copies: Collection[UploadedSite], wanted: int) -> list[UploadedSite]:
    """Return the least recently used copies whose removal frees `wanted` bytes."""
    gone, freed = list[UploadedSite](), 0
    for copy in sorted(copies, key=lambda one: one.used):
        if freed >= wanted:
            break
        gone.append(copy)
        freed += copy.bytes
    return gone


def _over(newest_first: Sequence[UploadedSite], count: int, room: int) -> list[UploadedSite]:
    """Return the copies exceeding `count` or `room` bytes: the oldest, and any too large by itself."""
    over, held = [copy for copy in newest_first if copy.bytes > room], 0
    fitting = [copy for copy in newest_first if copy.bytes <= room]
    for index, copy in enumerate(fitting):
        held += copy.bytes
        if index >= count or held > room:
            return over + fitting[index:]
    return over


def number(said: str | None) -> int:
    """Parse a non-negative number, 0 if it is not one."""
    return int(said) if said and said.isdecimal() and len(said) < 20 else 0
