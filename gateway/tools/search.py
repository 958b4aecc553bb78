"""What Glob and Grep have in common: where a search begins, which files it visits, and its refusals.

`GlobFilter` chooses by a glob alone, `GrepFilter` by ripgrep's rules. `grep` decides how a search is made.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

from gateway.errors import GatewayError, Timeout
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.paths import HOME, show
from gateway.rootfs.root import Root
from gateway.rootfs.walk import Walk
from gateway.tools.call import Call, ToolFailure, below_cwd, failure, outside
from gateway.tools.globs import Globs, Rules, rules

BRIEF_BYTES = 1 << 20  # bytes of files that a brief Grep may search, with the limits of `brief`
BRIEF_VISITS = 1000
BRIEF_SECONDS = 0.02
_IGNORE_FILE_MAX = 256 << 10  # bytes of one ignore file
# The depth, below both the workspace and the start, at which a folder goes to one worker as a whole: it
# splits what npm and pnpm create, and all workers walk little.
_PARTED, _PARTED_BELOW = 3, 2
_REJECTED = "Search failed — ripgrep rejected the pattern, glob, or file type without searching:\nrg: "
_VERBS = {"Glob": "search", "Grep": "read"}


def rejected(words: str) -> ToolFailure:
    return ToolFailure("invalid_params", _REJECTED + words, tagged=False)


def brief(limits: CallLimits) -> CallLimits:
    """Return the limits of a search that must end at once, or be left to another worker."""
    visits, seconds = min(BRIEF_VISITS, limits.visit_max), min(BRIEF_SECONDS, limits.tool_timeout)
    return replace(limits, visit_max=visits, tool_timeout=seconds)


def bounded(walk: Walk, call: Call) -> str:
    note = too_deep(call) if walk.deep else ""
    if not walk.truncated:
        return note
    if call.brief:
        raise Timeout("too much for a brief search", reason="timeout")
    return f"\n(The search stopped after {call.limits.visit_max} files and folders. Narrow the path.){note}"


def too_deep(call: Call) -> str:
    return f"\n(Folders more than {call.root.depth} deep were left out.)"


def start_of(call: Call, path: str) -> str:
    try:
        return call.locate(path)
    except GatewayError as error:
        raise outside(call, _VERBS[call.tool], path, error) from None


def bad_folder(call: Call, path: str, start: str, error: GatewayError) -> ToolFailure:
    shown = show(path)
    match error.facts.get("reason"):
        case "missing":
            guess = below_cwd(call, start)
            kind = "Directory" if call.tool == "Glob" else "Path"
            words = f"{kind} does not exist: {shown}. {call.where}" + (
                f" Did you mean {guess}?" if guess else ""
            )
            return ToolFailure("not_found", words, tagged=False)
        case "through_file" | "special":
            words = f"Path is not a directory: {shown}"
            if not exists(call.root, start):
                words = f"ENOTDIR: not a directory, stat '{call.absolute(start)}'"
            return ToolFailure("not_a_file", words, tagged=False)
        case "outside" | "loop":
            return outside(call, _VERBS[call.tool], call.absolute(start), error)
        case _:
            return failure(call.tool, error)


def exists(root: Root, path: str) -> bool:
    try:
        root.status(path)
    except GatewayError:
        return False
    return True


def hidden(start: str, pattern: str = "") -> str | None:
    """Return the gateway's own folder if a search would visit it without having named it."""
    return None if start or pattern.startswith(HOME) else HOME


class GlobFilter:
    """Chooses files by globs alone: what Glob walks.

    Folders are entered unless a glob excludes them or nothing in them can match: `hidden` itself, those
    outside `prefix`, the literal beginning of the pattern, and with `depth` those below that many folders.
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


# The ignore files for a folder, innermost first: the length of each file's folder (with its slash) and its
# rules.
_Stack = tuple[tuple[int, Rules], ...]
_Stacks = tuple[_Stack, _Stack, _Stack]


class _State:
    """The rules for a folder: whether a repository was entered, and the ignore files.

    `stacks` has one entry for each kind, in order of precedence: `.rgignore`, `.ignore`, and `.gitignore`
    with git's other exclude files. `digests` identifies the same rules without holding them.
    """

    __slots__ = ("digests", "repository", "stacks")

    def __init__(self, repository: bool = False, stacks: _Stacks = ((), (), ())) -> None:
        self.repository = repository
        self.stacks = stacks
        self.digests = tuple(tuple((start, rules.digest) for start, rules in stack) for stack in stacks)


class GrepFilter:
    """Chooses files like ripgrep: by globs, then ignore files (in a repository), then the type.

    With a `share`, a number and a count, only in the folders that belong to this worker of that many.
    """

    def __init__(
        self, root: Root, start: str, globs: Globs, types: Globs | None, share: tuple[int, int] = (0, 1)
    ) -> None:
        self._root = root
        self._base = start + "/" if start else ""
        self._globs = globs
        self._types = types
        self._share = share
        self._parted = max(_PARTED, self._base.count("/") + _PARTED_BELOW)
        self._kind = ("sought", start, globs.patterns, types and types.patterns, share)

    def above(self) -> _State:
        """Return the rules from the folders above the start, beginning with the workspace."""
        state = _State()
        parts = self._base.split("/")[:-1]
        for i in range(len(parts)):
            folder = "/".join(parts[:i])
            above = folder + "/" if folder else ""
            names = [
                name
                for name in (".git", ".gitignore", ".ignore", ".rgignore")
                if exists(self._root, above + name)
            ]
            state = self._entered(folder, names, state)
        return state

    def question(self, state: _State) -> Hashable:
        return self._kind, state.digests

    def enter(self, path: str, hidden: Collection[str], state: _State) -> _State:
        return self._entered((self._base + path).rstrip("/"), hidden, state) if hidden else state

    def _entered(self, folder: str, names: Collection[str], state: _State) -> _State:
        repository, (ripgrep, ignored, tracked) = state.repository, state.stacks
        if ".git" in names:
            repository, tracked = True, ()  # rules from above a repository's root do not apply in it
            tracked = self._read(folder, ".git/info/exclude", tracked)
        if ".gitignore" in names and repository:
            tracked = self._read(folder, ".gitignore", tracked)
        if ".ignore" in names:
            ignored = self._read(folder, ".ignore", ignored)
        if ".rgignore" in names:
            ripgrep = self._read(folder, ".rgignore", ripgrep)
        return _State(repository, (ripgrep, ignored, tracked))

    def _read(self, folder: str, name: str, stack: _Stack) -> _Stack:
        prefix = folder + "/" if folder else ""
        try:
            data, _ = self._root.read_file(prefix + name, _IGNORE_FILE_MAX)
        except GatewayError:
            return stack
        found = rules(data.decode("utf-8", "surrogateescape"))
        return ((len(prefix), found), *stack) if found.rules else stack

    def _ignored(self, path: str, state: _State, *, folder: bool) -> bool:
        full = self._base + path
        for stack in state.stacks:
            for start, found in stack:
                inner = (full if start >= len(self._base) else self._seen_from_above(path))[start:]
                if (decided := found.decide(inner, folder=folder)) is not None:
                    return decided
        return False

    def _seen_from_above(self, path: str) -> str:
        """Return the path that ripgrep 14, in Claude Code, gives to rules from above the start.

        It is the start and the name: a bug of that version loses the folders in between, and the leading dot
        of a name right at the start.
        """
        _, below, name = path.rpartition("/")
        return self._base + (name if below else name.removeprefix("."))

    def _mine(self, path: str, *, above: bool = False) -> bool:
        """Return whether a folder belongs to this share or, if `above`, may contain folders that do."""
        number, count = self._share
        if count == 1:
            return True
        parts = (self._base + path).split("/", self._parted)
        if above and len(parts) < self._parted:
            return True
        return crc32(os.fsencode("/".join(parts[: self._parted]))) % count == number

    def folder(self, path: str, state: _State) -> bool:
        if not self._mine(path, above=True):
            return False
        decided = self._globs.decide(path, folder=True)
        return decided if decided is not None else not self._ignored(path, state, folder=True)

    def files(self, prefix: str, names: Sequence[str], state: _State) -> Collection[str]:
        if not self._mine(prefix.rstrip("/")):
            return ()
        chosen = self._globs.among(prefix, names)
        if self._globs.selective:  # a glob takes precedence over all other rules
            return chosen
        if any(state.stacks):
            left_out = self._left_out(prefix, chosen, state)
            chosen = [name for name in chosen if name not in left_out]
        return chosen if self._types is None else self._types.among(prefix, chosen)

    def _left_out(self, prefix: str, names: Collection[str], state: _State) -> Collection[str]:
        """Return the names of files in a folder that ignore files leave out."""
        files = [one for stack in state.stacks for one in stack]
        misread = not prefix and any(start < len(self._base) for start, _ in files)
        if misread or any(found.negates for _, found in files):
            return {name for name in names if self._ignored(prefix + name, state, folder=False)}
        # no rule negates another, so all names are matched at once
        left_out: set[str] = set()
        for start, found in files:
            where = (self._base + prefix)[start:] if start >= len(self._base) else self._base[start:]
            for rule in found.rules:
                left_out.update(rule.among(where, names))
        return left_out
