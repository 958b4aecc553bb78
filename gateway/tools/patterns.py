"""Knows ripgrep's globs, the rules of ignore files, and file types.

All matching is by RE2, in time linear to the name: a glob is the client's and an ignore file the tenant's,
and `*a*a*a*a*b` must cost neither of them anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby
from typing import Any, Final

import re2

from gateway.errors import GatewayError
from gateway.rootfs.root import Root

GLOB_MAX = 2000  # characters of one glob
_RULES_MAX = 2000  # rules of one ignore file
_IGNORE_FILE_MAX = 256 << 10  # bytes of one ignore file
_MEMORY = 1 << 20  # bytes of one compiled glob; re2 refuses what needs more
_FOLDERS = b"(?:[^/]+/)*"

_OPTIONS = re2.Options()
_OPTIONS.encoding = re2.Options.Encoding.LATIN1  # names are bytes
_OPTIONS.max_mem = _MEMORY
_OPTIONS.log_errors = False
_OPTIONS.dot_nl = True


class GlobError(Exception):
    """A glob that does not parse, in the words of ripgrep's parser."""

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
            out.append(b"[^/]")  # one byte, as the names are bytes
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
                continue  # closes nothing, and stands for nothing
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
    """Translate what stands in brackets: bytes, so that no character beyond ASCII is matched by one."""
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
    """Return what `text` can be where nothing in it is wild but one group of alternatives, else None."""
    before, brace, rest = text.partition("{")
    inside, closed, after = rest.partition("}")
    if not _WILD.isdisjoint(before + inside + after) or bool(brace) != bool(closed):
        return None
    # an empty alternative is none
    return tuple(before + one + after for one in inside.split(",") if one or not brace)


class Glob:
    """One glob of an override or an ignore file: `negated`, `folders_only`, and whether it `matches`.

    `name` is the one file name that it matches anywhere, None where it is not as simple.
    """

    __slots__ = ("_endings", "_head", "_regex", "_tail", "folders_only", "name", "negated")

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
        # "**/x" says no more than "x" does.
        while body.startswith("**/") and "/" not in body[3:] and body[3:]:
            body = body[3:]
        anchored = "/" in body
        body = body[1:] if body.startswith("/") else body
        # Two short cuts for what most globs are, a name or its ending; both without a regular expression.
        self.name = body if not anchored and _WILD.isdisjoint(body) else None
        self._endings = _endings(body[1:]) if not anchored and body.startswith("*") else None
        # What stands before the first and after the last wildcard: cheap questions that most names answer
        # with no. A name's beginning is known only where a glob does not speak of its folders.
        literals = re.split(r"[*?\[\]{}\\]", body)
        self._head = "" if anchored else literals[0]
        self._tail = literals[-1].lstrip("/")  # the slash after `**` need not be there
        self._regex = None
        if self.name is None and self._endings is None:
            expression = _translate(body)
            if not anchored:
                expression = b"(?:.*/)?" + expression
            try:
                self._regex = re2.compile(expression, _OPTIONS)
            except re2.error:
                raise GlobError(pattern, "too complex") from None

    def kind(self) -> tuple[bool, bool, bool]:
        """Return what globs must have in common to be asked as one: whether a plain name, and the marks."""
        return self.name is not None, self.negated, self.folders_only

    def matches(self, path: str) -> bool:
        if self._endings is not None:
            return path.endswith(self._endings)
        if self.name is not None:
            return path == self.name or path.endswith("/" + self.name)
        assert self._regex is not None
        if not path.endswith(self._tail):
            return False
        return self._regex.fullmatch(os.fsencode(path)) is not None

    def among(self, prefix: str, names: Collection[str]) -> Collection[str]:
        """Return those of the names of files in the folder `prefix`, with its slash, that it matches."""
        if self.folders_only:
            return ()
        if self._endings is not None:
            endings = self._endings
            return [name for name in names if name.endswith(endings)]
        if self.name is not None:
            return (self.name,) if self.name in names else ()
        head, tail, matches = self._head, self._tail.rpartition("/")[2], self.matches
        likely = [name for name in names if name.startswith(head) and name.endswith(tail)]
        return [name for name in likely if matches(prefix + name)]


class _Names:
    """Globs that stand together and say the same of one name each: one look for all of them."""

    __slots__ = ("_names", "folders_only", "negated")

    def __init__(self, names: Iterable[str], *, negated: bool, folders_only: bool) -> None:
        self._names = frozenset(names)
        self.negated = negated
        self.folders_only = folders_only

    def matches(self, path: str) -> bool:
        return path.rpartition("/")[2] in self._names

    def among(self, prefix: str, names: Collection[str]) -> Collection[str]:
        return () if self.folders_only else self._names.intersection(names)


_Rule = Glob | _Names


def _joined(globs: Sequence[Glob]) -> tuple[_Rule, ...]:
    """Return rules that say the same as `globs` in their order, with fewer questions."""
    rules: list[_Rule] = []
    for (plain, negated, folders_only), group in groupby(globs, Glob.kind):
        if plain:
            rules.append(
                _Names((glob.name for glob in group if glob.name), negated=negated, folders_only=folders_only)
            )
        else:
            rules += group
    return tuple(rules)


class Globs:
    """Globs in the order of a command line: the last that matches a path decides."""

    def __init__(self, patterns: Collection[str]) -> None:
        globs = [Glob(pattern) for pattern in patterns]
        self.patterns = tuple(patterns)
        self._rules = _joined(globs[::-1])
        self.selective = any(not glob.negated for glob in globs)
        self.excludes = any(glob.negated for glob in globs)
        self._single = globs[0] if len(globs) == 1 and not self.excludes else None

    def decide(self, path: str, *, folder: bool) -> bool | None:
        """Say whether the path is taken (True), left out (False) or not spoken of (None)."""
        for rule in self._rules:
            if (folder or not rule.folders_only) and rule.matches(path):
                return not rule.negated
        return False if self.selective and not folder else None

    def among(self, prefix: str, names: Collection[str]) -> Collection[str]:
        """Return those of the files' names in the folder `prefix`, with its slash, that are not left out."""
        if self._single is not None:
            return self._single.among(prefix, names)
        if not self.selective:  # whatever one of them matches is left out
            left_out = set().union(*(rule.among(prefix, names) for rule in self._rules))
            return [name for name in names if name not in left_out] if left_out else names
        decide = self.decide
        return [name for name in names if decide(prefix + name, folder=False) is not False]


class Named:
    """Chooses files by globs alone: what Glob walks.

    Folders are entered unless a glob excludes them, or nothing in them can match: `hidden` itself, those
    beside `prefix`, the literal beginning of the pattern, and with `depth` those that have as many folders
    above them.
    """

    def __init__(self, globs: Globs, prefix: str, depth: int | None, hidden: str | None) -> None:
        self._globs = globs
        self._prefix = prefix
        self._depth = depth
        self._hidden = hidden
        self._kind = ("named", globs.patterns, prefix, depth, hidden)

    def question(self, state: Any) -> Hashable:
        return self._kind

    def enter(self, path: str, hidden: Collection[str], state: Any) -> Any:
        return None

    def folder(self, path: str, state: Any) -> bool:
        prefix = self._prefix
        if prefix and not (path + "/").startswith(prefix) and not prefix.startswith(path + "/"):
            return False
        if path == self._hidden or (self._depth is not None and path.count("/") >= self._depth):
            return False
        return not self._globs.excludes or self._globs.decide(path, folder=True) is not False

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        if self._prefix and not prefix.startswith(self._prefix):
            return ()
        return self._globs.among(prefix, names)


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of an ignore file, last first. `negates`: one takes another back; `digest` is its text's."""

    rules: tuple[_Rule, ...]
    negates: bool
    digest: bytes

    def decide(self, path: str, *, folder: bool) -> bool | None:
        """Say whether a path, relative to the file's folder, is left out; None where no rule speaks of it."""
        for rule in self.rules:
            if (folder or not rule.folders_only) and rule.matches(path):
                return not rule.negated
        return None


@lru_cache(256)
def rules(text: str) -> Rules:
    """Return the rules of an ignore file (gitignore(5)); lines that do not parse are left out."""
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
    return Rules(_joined(found[::-1]), any(rule.negated for rule in found), digest)


# The ignore files that hold in a folder, from the innermost outwards: the length of each file's folder (with
# its slash) and its rules.
_Stack = tuple[tuple[int, Rules], ...]
_Stacks = tuple[_Stack, _Stack, _Stack]


class _State:
    """What holds in a folder: whether a repository was entered, and the ignore files.

    `stacks` are those of each kind, which goes before the next wherever it stands: `.rgignore`, `.ignore` and
    `.gitignore`, with what git excludes otherwise. `told` says the same and keeps no rules.
    """

    __slots__ = ("repository", "stacks", "told")

    def __init__(self, repository: bool = False, stacks: _Stacks = ((), (), ())) -> None:
        self.repository = repository
        self.stacks = stacks
        self.told = tuple(tuple((start, rules.digest) for start, rules in stack) for stack in stacks)


class Sought:
    """Chooses files as ripgrep does: globs, then ignore files (in a repository), then the type."""

    def __init__(self, tree: Root, start: str, globs: Globs, types: Globs | None) -> None:
        self._tree = tree
        self._base = start + "/" if start else ""
        self._globs = globs
        self._types = types
        self._kind = ("sought", start, globs.patterns, types and types.patterns)

    def above(self) -> _State:
        """Return the state from the folders above the start, the workspace first."""
        state = _State()
        parts = self._base.split("/")[:-1]
        for i in range(len(parts)):
            folder = "/".join(parts[:i])
            names = [
                name for name in (".git", ".gitignore", ".ignore", ".rgignore") if self._exists(folder, name)
            ]
            state = self._entered(folder, names, state)
        return state

    def _exists(self, folder: str, name: str) -> bool:
        try:
            self._tree.status(f"{folder}/{name}" if folder else name)
        except GatewayError:
            return False
        return True

    def question(self, state: _State) -> Hashable:
        return self._kind, state.told

    def enter(self, path: str, hidden: Collection[str], state: _State) -> _State:
        return self._entered((self._base + path).rstrip("/"), hidden, state) if hidden else state

    def _entered(self, folder: str, names: Collection[str], state: _State) -> _State:
        repository, (own, ignored, tracked) = state.repository, state.stacks
        if ".git" in names:
            repository, tracked = True, ()  # rules from above a repository's root do not reach into it
            tracked = self._read(folder, ".git/info/exclude", tracked)
        if ".gitignore" in names and repository:
            tracked = self._read(folder, ".gitignore", tracked)
        if ".ignore" in names:
            ignored = self._read(folder, ".ignore", ignored)
        if ".rgignore" in names:
            own = self._read(folder, ".rgignore", own)
        return _State(repository, (own, ignored, tracked))

    def _read(self, folder: str, name: str, stack: _Stack) -> _Stack:
        prefix = folder + "/" if folder else ""
        try:
            data, _ = self._tree.read_file(prefix + name, _IGNORE_FILE_MAX)
        except GatewayError:
            return stack
        found = rules(data.decode("utf-8", "surrogateescape"))
        return ((len(prefix), found), *stack) if found.rules else stack

    def _ignored(self, path: str, state: _State, *, folder: bool) -> bool:
        full = self._base + path
        for stack in state.stacks:
            for start, found in stack:
                inner = (full if start >= len(self._base) else self._told(path))[start:]
                for rule in found.rules:  # as `Rules.decide`, of each file of a tree
                    if (folder or not rule.folders_only) and rule.matches(inner):
                        return not rule.negated
        return False

    def _told(self, path: str) -> str:
        """Return what Claude Code's ripgrep 14 tells rules from above the start: that and the name.

        The folders between the two are lost, and a dot in front of a name at the start, by an oversight that
        the newer one of `sifting` does not have: in large trees such rules are taken as git takes them.
        """
        _, below, name = path.rpartition("/")
        return self._base + (name if below else name.removeprefix("."))

    def folder(self, path: str, state: _State) -> bool:
        decided = self._globs.decide(path, folder=True)
        return decided if decided is not None else not self._ignored(path, state, folder=True)

    def files(self, prefix: str, names: Sequence[str], state: _State) -> Collection[str]:
        chosen = self._globs.among(prefix, names)
        if self._globs.selective:  # what a glob names is taken whatever else is said of it
            return chosen
        if any(state.stacks):
            left_out = self._left_out(prefix, chosen, state)
            chosen = [name for name in chosen if name not in left_out]
        return chosen if self._types is None else self._types.among(prefix, chosen)

    def _left_out(self, prefix: str, names: Collection[str], state: _State) -> Collection[str]:
        """Return those of the files' names in a folder that ignore files leave out."""
        files = [one for stack in state.stacks for one in stack]
        told = not prefix and any(start < len(self._base) for start, _ in files)
        if told or any(found.negates for _, found in files):
            return {name for name in names if self._ignored(prefix + name, state, folder=False)}
        # whichever rule matches, it leaves out: all names are asked of at once
        left_out: set[str] = set()
        for start, found in files:
            where = (self._base + prefix)[start:] if start >= len(self._base) else self._base[start:]
            for rule in found.rules:
                left_out.update(rule.among(where, names))
        return left_out
