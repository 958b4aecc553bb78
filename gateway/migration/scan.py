"""Inspects a folder of the host before it moves: its size, and what needs a decision.

Follows no links, and reads only names and `lstat` of files, never contents.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gateway.rootfs.paths import show

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
class Found:
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


def scan(folder: Path, leave: frozenset[str] = frozenset()) -> Found:
    """Inspect a folder except the paths in `leave`. Raises `OSError` if it cannot be read."""
    found, top = Found(), folder.lstat()
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
    found: Found,
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
