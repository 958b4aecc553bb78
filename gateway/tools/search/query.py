"""The options of a Grep: context, globs and types, with ripgrep's meaning."""

from __future__ import annotations

from typing import Any

from gateway.tools.answer import ToolFailure
from gateway.tools.search.file_types import TYPES
from gateway.tools.search.globs import GlobError, Globs
from gateway.tools.search.scope import hidden, rejected

_CONTROL = (".git", ".svn", ".hg", ".bzr", ".jj", ".sl")


def check_numbers(given: dict[str, Any]) -> None:
    """Refuse invalid numbers, with Claude Code's texts."""
    for name, hint in (("head_limit", " Pass 0 for unlimited."), ("offset", "")):
        number = given.get(name, 0)
        if number < 0 or number != int(number):
            words = f"{name} must be a whole number of 0 or more, got {number}.{hint}"
            raise ToolFailure("invalid_params", words)
    for flag, number in around(given):
        if number < 0 or number != int(number):
            raise rejected(
                f"error parsing flag {flag}: value is not a valid number: invalid digit found in string"
            )


def around(given: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the requested context as ripgrep's flags; only mode `content` has any."""
    if given.get("output_mode") != "content":
        return []
    for name in ("context", "-C"):
        if name in given:
            return [("-C", given[name])]
    return [(name, given[name]) for name in ("-B", "-A") if name in given]


def overrides(given: dict[str, Any], start: str) -> list[str]:
    """Return the globs that take precedence over ignore files; the last that matches decides."""
    patterns = [f"!{name}" for name in _CONTROL]
    for word in str(given.get("glob", "")).split():
        # A comma separates two globs, unless there are braces; `#` begins a comment.
        parts = [word] if "{" in word and "}" in word else word.split(",")
        patterns += [part for part in parts if part and not part.startswith("#")]
    ours = hidden(start)
    return [*patterns, f"!/{ours}"] if ours else patterns


def type_globs(kind: str) -> list[str]:
    """Return the globs of a file type; for `all`, those of all types."""
    if kind not in TYPES and kind != "all":
        raise rejected(f"unrecognized file type: {kind[:100]}".rstrip())
    return (" ".join(TYPES.values()) if kind == "all" else TYPES[kind]).split()


def filters(given: dict[str, Any], start: str) -> tuple[Globs, Globs | None]:
    types = Globs(type_globs(given["type"])) if given.get("type") else None
    try:
        return Globs(overrides(given, start)), types
    except GlobError as error:
        raise rejected(str(error)) from None
