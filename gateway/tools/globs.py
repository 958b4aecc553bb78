"""ripgrep's globs, the rules of ignore files (gitignore(5)), and the globs of each file type.

RE2 does all matching, in time linear to the name: globs come from clients and from tenants' ignore files, and
`*a*a*a*a*b` must stay cheap.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

import re2

GLOB_MAX = 2000  # characters of one glob
_MEMORY = 1 << 20  # bytes of one compiled glob; re2 refuses larger ones
_RULES_MAX = 2000  # rules of one ignore file
_FOLDERS = b"(?:[^/]+/)*"

# The globs of each file type of ripgrep 14.1, read at import: a confined worker cannot open the file later.
TYPES: Final[dict[str, list[str]]] = {
    name: globs.split(", ")
    for line in Path(__file__).with_name("file_types.txt").read_text().splitlines()[1:]
    for name, _, globs in [line.partition(": ")]
}

_OPTIONS = re2.Options()
_OPTIONS.encoding = re2.Options.Encoding.LATIN1  # file names are bytes
_OPTIONS.max_mem = _MEMORY
_OPTIONS.log_errors = False
_OPTIONS.dot_nl = True


class GlobError(Exception):
    """A glob that does not parse, with the text of ripgrep's parser."""

    def __init__(self, glob: str, words: str) -> None:
        super().__init__(f"error parsing glob '{glob}': {words}")


def _literal(byte: int) -> bytes:
    return b"\\x%02x" % byte


def _translate(glob: str) -> bytes:
    """Return the glob as a regular expression over bytes, in which `*` and `?` do not match a slash."""
    data = os.fsencode(glob)
    out: list[bytes] = []
    depth = 0
    i, n = 0, len(data)
    while i < n:
        char = data[i : i + 1]
        i += 1
        if char == b"*":
            if data[i : i + 1] != b"*":
                out.append(b"[^/]*")
                continue
            while data[i : i + 1] == b"*":
                i += 1
            starts = not out or out[-1] in (b"/", b"(?:", b"|", _FOLDERS)
            if starts and data[i : i + 1] == b"/":
                i += 1
                out.append(_FOLDERS)
            elif starts and i == n:
                out.append(b".+" if out else b".*")
            else:
                out.append(b"[^/]*")
        elif char == b"?":
            out.append(b"[^/]")  # one byte, since names are bytes
        elif char == b"[":
            end = data.find(b"]", i + 2 if data[i : i + 1] in (b"!", b"^") else i + 1)
            if end < 0:
                raise GlobError(glob, "unclosed character class; missing ']'")
            out.append(_class(glob, data[i:end]))
            i = end + 1
        elif char == b"{":
            if depth:
                raise GlobError(glob, "nested alternate groups are not allowed")
            depth = 1
            out.append(b"(?:")
        elif char == b"}":
            if not depth:
                continue  # closes nothing, and is dropped
            depth = 0
            if out[-1] == b"|":  # an empty alternative is none
                out.pop()
            out.append(b")")
        elif char == b"," and depth:
            if out[-1] not in (b"(?:", b"|"):
                out.append(b"|")
        elif char == b"\\":
            if i == n:
                raise GlobError(glob, "dangling '\\'")
            out.append(_literal(data[i]))
            i += 1
        elif char == b"/":
            out.append(b"/")
        else:
            out.append(_literal(char[0]))
    if depth:
        raise GlobError(glob, "unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)")
    return b"".join(out)


def _class(glob: str, inside: bytes) -> bytes:
    """Translate a bracket expression over bytes; a non-ASCII character never matches as a whole."""
    negated = inside[:1] in (b"!", b"^")
    data = inside[1:] if negated else inside
    ranges: list[bytes] = []
    i = 0
    while i < len(data):
        low = high = data[i]
        if data[i + 1 : i + 2] == b"-" and i + 2 < len(data):
            high = data[i + 2]
            i += 2
        i += 1
        if high < low:
            raise GlobError(glob, f"invalid range; '{chr(low)}' > '{chr(high)}'")
        ranges.append(_literal(low) + b"-" + _literal(high))
    return b"[" + (b"^/" if negated else b"") + b"".join(ranges) + b"]"


_WILD: Final = frozenset("*?[]{}\\/")


def _endings(text: str) -> tuple[str, ...] | None:
    """Return the texts that a glob matches whose only wildcard is one group of alternatives; else None."""
    before, brace, rest = text.partition("{")
    inside, closed, after = rest.partition("}")
    if not _WILD.isdisjoint(before + inside + after) or bool(brace) != bool(closed):
        return None
    # an empty alternative is none
    return tuple(before + one + after for one in inside.split(",") if one or not brace)


class Glob:
    """One glob of a command line or an ignore file: `negated`, `folders_only`, and whether it `matches`."""

    __slots__ = ("_endings", "_head", "_name", "_regex", "_tail", "folders_only", "negated")

    def __init__(self, pattern: str) -> None:
        if len(pattern) > GLOB_MAX:
            raise GlobError(pattern[:40] + "…", "too long")
        body = pattern
        self.negated = body.startswith("!")
        if self.negated:
            body = body[1:]
        if body.startswith(("\\!", "\\#")):
            body = body[1:]
        self.folders_only = body.endswith("/")
        body = body.rstrip("/") if self.folders_only else body or "**"
        # "**/x" means the same as "x".
        while body.startswith("**/") and "/" not in body[3:] and body[3:]:
            body = body[3:]
        anchored = "/" in body
        body = body[1:] if body.startswith("/") else body
        # Two shortcuts for most globs, a name or an ending, without a regular expression.
        self._name = body if not anchored and _WILD.isdisjoint(body) else None
        self._endings = _endings(body[1:]) if not anchored and body.startswith("*") else None
        # The literals before the first and after the last wildcard: cheap checks that most names fail. The
        # beginning of a name is known only if the glob has no folders.
        literals = re.split(r"[*?\[\]{}\\]", body)
        self._head = "" if anchored else literals[0]
        self._tail = literals[-1].lstrip("/")  # the slash after `**` is optional
        self._regex = None
        if self._name is None and self._endings is None:
            expression = _translate(body)
            if not anchored:
                expression = b"(?:.*/)?" + expression
            try:
                self._regex = re2.compile(expression, _OPTIONS)
            except re2.error:
                raise GlobError(pattern, "too complex") from None

    def matches(self, path: str) -> bool:
        if self._endings is not None:
            return path.endswith(self._endings)
        if self._name is not None:
            return path == self._name or path.endswith("/" + self._name)
        assert self._regex is not None
        if not path.endswith(self._tail):
            return False
        return self._regex.fullmatch(os.fsencode(path)) is not None

    def among(self, prefix: str, names: Collection[str]) -> Collection[str]:
        """Return the names of files that it matches in the folder `prefix` (with its slash)."""
        if self.folders_only:
            return ()
        if self._endings is not None:
            endings = self._endings
            return [name for name in names if name.endswith(endings)]
        if self._name is not None:
            return (self._name,) if self._name in names else ()
        head, tail, matches = self._head, self._tail.rpartition("/")[2], self.matches
        likely = [name for name in names if name.startswith(head) and name.endswith(tail)]
        return [name for name in likely if matches(prefix + name)]


class Globs:
    """Globs in the order of a command line; the last one that matches a path decides."""

    def __init__(self, patterns: Collection[str]) -> None:
        globs = [Glob(pattern) for pattern in patterns]
        self.patterns = tuple(patterns)
        self._rules = globs[::-1]
        self.selective = any(not glob.negated for glob in globs)
        self.excludes = any(glob.negated for glob in globs)
        self._single = globs[0] if len(globs) == 1 and not self.excludes else None

    def decide(self, path: str, *, folder: bool) -> bool | None:
        """Return whether the path is included (True), left out (False) or not matched (None)."""
        for rule in self._rules:
            if (folder or not rule.folders_only) and rule.matches(path):
                return not rule.negated
        return False if self.selective and not folder else None

    def among(self, prefix: str, names: Collection[str]) -> Collection[str]:
        """Return the names of files in the folder `prefix` (with its slash) that are not left out."""
        if self._single is not None:
            return self._single.among(prefix, names)
        if not self.selective:  # what any of them matches is left out
            left_out = set().union(*(rule.among(prefix, names) for rule in self._rules))
            return [name for name in names if name not in left_out] if left_out else names
        decide = self.decide
        return [name for name in names if decide(prefix + name, folder=False) is not False]


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of an ignore file, last first. `negates` if any rule is negated; `digest` is of its text."""

    rules: tuple[Glob, ...]
    negates: bool
    digest: bytes

    def decide(self, path: str, *, folder: bool) -> bool | None:
        """Return whether a path, relative to the file's folder, is left out; None if no rule matches."""
        for rule in self.rules:
            if (folder or not rule.folders_only) and rule.matches(path):
                return not rule.negated
        return None


@lru_cache(256)
def rules(text: str) -> Rules:
    """Parse an ignore file (gitignore(5)); lines that do not parse are skipped."""
    found = []
    for line in text.split("\n", _RULES_MAX)[:_RULES_MAX]:
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        stripped = line.rstrip(" ")
        line = stripped + " " if stripped.endswith("\\") and stripped != line else stripped
        try:
            found.append(Glob(line))
        except GlobError:
            continue
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return Rules(tuple(found[::-1]), any(rule.negated for rule in found), digest)
