"""Parse what git printed in a tenant. The tenant can forge all of it, so it is bounded text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from gateway.rootfs.paths import show

TITLE_MAX: Final = 4000  # characters
_NAME_MAX: Final = 200
CONFLICTS_MAX: Final = 1000  # paths of one undo that are listed; one that has more cannot be forced
_LEFT_MAX: Final = 20  # paths listed of those that were left out
_FILES_MAX: Final = 10_000  # files listed of one turn

KINDS: Final = frozenset({"turn", "outside", "restored", "deployed", "first"})
ID: Final = re.compile(r"[0-9a-f]{40}")
_COUNTS: Final = re.compile(
    rb"(\d{1,9}) files? changed(?:, (\d{1,9}) insertions?\(\+\))?(?:, (\d{1,9}) deletions?\(-\))?"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One commit of the history. `added` and `removed` count lines, `at` is in seconds since the epoch.

    `kind` is `turn`; `restored` for going back; `outside` for changes found before that; `deployed` for a
    site as it was deployed; or `first` for the workspace as it was found. `left_out` are paths that are too
    large, or not regular files.
    """

    id: str
    kind: str
    agent: str
    by: str
    title: str
    at: int
    files: int = 0
    added: int = 0
    removed: int = 0
    left_out: tuple[str, ...] = ()

    def on_wire(self) -> dict[str, Any]:
        return {
            "turn": self.id,
            "kind": self.kind,
            "agent": self.agent,
            "by": self.by,
            "title": self.title,
            "at": self.at,
            "files": self.files,
            "added": self.added,
            "removed": self.removed,
            "leftOut": list(self.left_out),
        }


def said(text: str, most: int) -> str:
    """Return text for a commit message: without control characters, and as git stores it unchanged."""
    lines = (
        line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)
        for line in text[:most].split("\n")
    )
    return "\n".join(line.rstrip() for line in lines).strip()


def name(text: str) -> str:
    """Return a name for a commit: without the characters that git strips, and never empty."""
    kept = " ".join("".join(" " if char in "<>" else char for char in said(text, _NAME_MAX)).split())
    return kept.strip(".,:;\"'\\ ") or "unknown"


def deployed(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a deployment's last event says of it, as a title, and by whom it was."""
    if facts.get("rollback"):
        what = f"Went back to the site of {facts['rollback']}"
    elif facts.get("env"):
        what = f"Changed {', '.join(facts['env'])} of the environment"
    elif facts.get("template") == "upload":
        what = "Deployed an uploaded folder"
    else:
        what = f"Deployed the template {facts.get('template')}"
    return f"{what} ({facts['deployment']})", str(facts.get("by", ""))


def nobody(at: int) -> Turn:
    """Return the turn of changes that cannot be ascribed to anybody."""
    return Turn("", "outside", "nobody", "nobody", "Changed outside of turns", at)


def both(printed: bytes, turn: Turn) -> tuple[Turn | None, Turn | None]:
    """Return what commit.sh found: of nobody, and `turn`; each None if nothing changed."""
    word, _, rest = printed.partition(b" ")
    if word != b"outside":
        return None, committed(printed, turn)
    commit, _, rest = rest.partition(b"\n")
    counts, _, rest = rest.partition(b"\n")
    return committed(commit + b"\n" + counts + b"\n", nobody(turn.at)), committed(rest, turn)


def committed(printed: bytes, turn: Turn) -> Turn | None:
    """Return `turn` with the output of commit.sh or restore.sh; None if nothing changed."""
    first, _, rest = printed.partition(b"\n")
    found = first.decode("ascii", "replace")
    if not ID.fullmatch(found):
        return None
    counts, _, left = rest.partition(b"\n")
    names = [shown(path) for path in left.split(b"\0")[:-1][:_LEFT_MAX]]
    return replace(_counted(turn, counts), id=found, left_out=tuple(names))


def conflicting(printed: bytes) -> list[bytes]:
    """Return the paths that restore.sh printed as conflicts of an undo."""
    word, _, names = printed.partition(b"\n")
    return names.split(b"\0", CONFLICTS_MAX)[:-1][:CONFLICTS_MAX] if word == b"conflicts" else []


def shown(path: bytes) -> str:
    """Return a path as it is listed: escapes stand for what is not printable."""
    return show(os.fsdecode(path))


def listed(printed: bytes, most: int) -> list[Turn]:
    """Parse the output of list.sh, at most `most` records."""
    found = []
    for record in printed.split(b"\x1e", most + 1)[1 : most + 1]:
        fields = record.split(b"\0", 7)
        if len(fields) != 7:
            continue
        commit, kind, agent, by, at, message = (
            field[: 4 * TITLE_MAX].decode("utf-8", "replace") for field in fields[:6]
        )
        if not ID.fullmatch(commit) or not at.isdecimal() or len(at) > 12:
            continue
        turn = Turn(
            commit,
            kind if kind in KINDS else "turn",
            said(agent, _NAME_MAX),
            said(by, _NAME_MAX),
            said(message, TITLE_MAX),
            int(at),
        )
        found.append(_counted(turn, fields[6]))
    return found


def changes(printed: bytes, most: int) -> dict[str, Any] | None:
    """Parse the output of diff.sh: a turn with its files and at most `most` bytes of its patch."""
    names, _, rest = printed.partition(b"\0\0")
    head, _, patch = rest.partition(b"\x1d")
    turns = listed(head, 1)
    if not turns:
        return None
    files = []
    for entry in names.split(b"\0", _FILES_MAX)[:_FILES_MAX]:
        added, _, more = entry.partition(b"\t")
        removed, tab, path = more.partition(b"\t")
        if not tab:
            continue  # cut off
        binary = not (added.isdigit() and removed.isdigit() and len(added) < 10 and len(removed) < 10)
        files.append(
            {
                "path": shown(path),
                "added": 0 if binary else int(added),
                "removed": 0 if binary else int(removed),
                "binary": binary,
            }
        )
    return {
        **turns[0].on_wire(),
        "changed": files,
        "diff": patch[:most].decode("utf-8", "replace"),
        "truncated": len(patch) > most,
    }


def _counted(turn: Turn, counts: bytes) -> Turn:
    if (told := _COUNTS.search(counts)) is None:
        return turn
    files, added, removed = (int(number or 0) for number in told.groups())
    return replace(turn, files=files, added=added, removed=removed)
