"""Decide what the .gitignore files of a folder leave out, by git's rules (gitignore(5))."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

_TEXT_MAX: Final = 64 << 10  # bytes of one file
_RULES_MAX: Final = 2000

# whether it takes back, whether it is of folders alone, what it matches
_Rule = tuple[bool, bool, "re.Pattern[str]"]


class Ignored:
    """Decides whether a path below `folder` is left out; ask about a folder before its contents."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rules: dict[str, list[_Rule]] = {}

    def __call__(self, path: str, *, is_folder: bool) -> bool:
        above = path
        while above:  # the innermost file decides, and in it the last rule
            above = above.rpartition("/")[0]
            inner = path[len(above) + 1 :] if above else path
            for negated, folders_only, pattern in reversed(self._of(above)):
                if (is_folder or not folders_only) and pattern.fullmatch(inner):
                    return not negated
        return False

    def _of(self, folder: str) -> list[_Rule]:
        if folder not in self._rules:
            text = b""
            file = self._folder / folder / ".gitignore"
            with contextlib.suppress(OSError):
                if not file.is_symlink():
                    with file.open("rb") as opened:
                        text = opened.read(_TEXT_MAX)
            lines = text.decode("utf-8", "replace").split("\n", _RULES_MAX)[:_RULES_MAX]
            self._rules[folder] = [rule for line in lines if (rule := _rule(line)) is not None]
        return self._rules[folder]


def _rule(line: str) -> _Rule | None:
    line = line.removesuffix("\r")
    stripped = line.rstrip(" ")
    line = stripped + " " if stripped.endswith("\\") and stripped != line else stripped
    if not line or line.startswith("#"):
        return None
    negated, line = line.startswith("!"), line.removeprefix("!")
    folders_only, line = line.endswith("/"), line.removesuffix("/")
    if not line:
        return None
    start = "" if "/" in line else "(?:.*/)?"
    try:
        return negated, folders_only, re.compile(start + _pattern(line.removeprefix("/")), re.DOTALL)
    except re.error:
        return None


def _pattern(glob: str) -> str:
    """Return a glob of git as a regular expression."""
    found, at = "", 0
    while at < len(glob):
        rest = glob[at:]
        whole = at == 0 or glob[at - 1] == "/"
        if whole and rest.startswith("**/"):
            found, at = found + "(?:.*/)?", at + 3
        elif whole and rest == "**":
            found, at = found + ".+", at + 2
        elif rest.startswith("*"):
            found, at = found + "[^/]*", at + len(rest) - len(rest.lstrip("*"))
        elif rest.startswith("?"):
            found, at = found + "[^/]", at + 1
        elif (several := re.match(r"\[([!^]?)(\]?(?:\\.|[^\]\\])*)\]", rest)) is not None:
            without, members = several.groups()
            members = members.replace("[", r"\[").replace("]", r"\]").replace("^", r"\^")
            found, at = f"{found}(?!/)[{'^' if without else ''}{members}]", at + several.end()
        else:
            escaped = rest.startswith("\\") and len(rest) > 1
            found, at = found + re.escape(rest[escaped]), at + 1 + escaped
    return found
