"""Claude Code's Glob."""

from __future__ import annotations

import re

from gateway.errors import GatewayError, Timeout
from gateway.rootfs.walk import Walk
from gateway.tools.call import Call, ToolAnswer, text, timed_out
from gateway.tools.globs import GlobError, Globs
from gateway.tools.search import GlobFilter, bad_folder, bounded, exists, hidden, rejected, start_of

GLOB_LIMIT = 100  # paths of one Glob


def glob(call: Call) -> ToolAnswer:
    """ToolAnswer a Glob: the matching paths, oldest first."""
    pattern: str = call.given["pattern"].rstrip()
    if not pattern or pattern.startswith("#"):
        pattern = "**"  # an empty line or a comment for ripgrep
    path: str = call.given.get("path") or "."
    absolute = pattern.startswith("/")
    if absolute:
        path, pattern = _split_absolute(pattern)
    start = start_of(call, path)
    if not absolute and "path" in call.given:
        pattern = _named_once(call, start, pattern)
    try:
        literal = _literal_folder(pattern)
        globs = Globs([_below(pattern, literal)])
    except GlobError as error:
        raise rejected(str(error)) from None
    walk = Walk(
        call.root,
        start,
        GlobFilter(globs, literal, _depth(pattern), hidden(start, pattern)),
        maximum=call.limits.visit_max,
        deadline=call.deadline,
        ordered=False,
        first=literal.rstrip("/"),
    )
    prefix = start + "/" if start else ""
    try:
        found = [(status.st_mtime_ns, prefix + name) for name, status in walk]
        note = bounded(walk, call)
    except Timeout:
        raise timed_out(call.limits.tool_timeout) from None
    except GatewayError as error:
        if absolute and error.facts.get("reason") == "missing":
            return text("No files found", {"files": [], "total": 0, "truncated": False})
        raise bad_folder(call, path, start, error) from None
    found.sort()
    total = len(found)
    names = call.display_all([name for _, name in found[:GLOB_LIMIT]])
    facts = {"files": names, "total": total, "truncated": total > len(names) or walk.truncated}
    if not names:
        return text("No files found" + note, facts)
    lines = "\n".join(names)
    if total > GLOB_LIMIT:
        lines += (
            f"\n(Showing {GLOB_LIMIT} of {total} matching files; {total - GLOB_LIMIT} more are not listed. "
            "Narrow the pattern or path to see the rest.)"
        )
    return text(lines + note, facts)


def _split_absolute(pattern: str) -> tuple[str, str]:
    """Split an absolute glob into the folder before its first wildcard and the rest."""
    parts = pattern.split("/")
    for i, part in enumerate(parts):
        if any(char in part for char in "*?[{"):
            return "/".join(parts[:i]) or "/", "/".join(parts[i:])
    folder, _, name = pattern.rstrip("/").rpartition("/")
    return folder or "/", name


def _named_once(call: Call, start: str, pattern: str) -> str:
    """Return the glob without the searched folder, if it begins with it."""
    parts = _literal_folder(pattern).split("/")[:-1]
    above = call.root.absolute(start).split("/")
    for count in range(len(parts), 0, -1):
        if above[-count:] == parts[:count] and not exists(call.root, f"{start}/{parts[0]}".lstrip("/")):
            return "/".join(pattern.split("/")[count:])
    return pattern


def _literal_folder(pattern: str) -> str:
    """Return the folders at a pattern's beginning without wildcards, with the trailing slash.

    Empty for odd ones, such as `./src`: those match no path, which the glob itself decides.
    """
    if "/" not in pattern or pattern.startswith("!"):
        return ""
    head = re.split(r"[*?\[\]{}\\]", pattern, maxsplit=1)[0].lstrip("/")
    folders = head.rpartition("/")[0]
    return "" if {"", ".", ".."} & set(folders.split("/")) else folders + "/"


def _below(pattern: str, literal: str) -> str:
    """Return a faster glob that is equivalent to `pattern` for paths below the folder `literal`.

    For a plain name in that folder this holds only if no folder below is entered; see `_depth`.
    """
    below = pattern.lstrip("/")[len(literal) :]
    flat = below[:1] not in ("", "!") and "/" not in below and _depth(pattern) is not None
    return below if literal and (flat or below.startswith("**/")) else pattern


def _depth(pattern: str) -> int | None:
    """Return the number of folders above a match; None if it can vary."""
    if (
        pattern.startswith("!")
        or "/" not in pattern.strip("/")
        or "**" in pattern
        or any(char in pattern for char in "{[\\")
    ):
        return None
    return pattern.strip("/").count("/")
