"""Which files a search visits: by a glob, or by ripgrep's rules."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

from gateway.errors import GatewayError
from gateway.rootfs.root import Root
from gateway.tools.search.globs import Globs
from gateway.tools.search.ignore_files import Rules, rules

_IGNORE_FILE_MAX = 256 << 10  # bytes of one ignore file


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
    with git's other exclude files. `told` identifies the same rules without holding them.
    """

    __slots__ = ("repository", "stacks", "told")

    def __init__(self, repository: bool = False, stacks: _Stacks = ((), (), ())) -> None:
        self.repository = repository
        self.stacks = stacks
        self.told = tuple(tuple((start, rules.digest) for start, rules in stack) for stack in stacks)


class GrepFilter:
    """Chooses files like ripgrep: by globs, then ignore files (in a repository), then the type."""

    def __init__(self, root: Root, start: str, globs: Globs, types: Globs | None) -> None:
        self._root = root
        self._base = start + "/" if start else ""
        self._globs = globs
        self._types = types
        self._kind = ("sought", start, globs.patterns, types and types.patterns)

    def above(self) -> _State:
        """Return the rules from the folders above the start, beginning with the workspace."""
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
            self._root.status(f"{folder}/{name}" if folder else name)
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
            repository, tracked = True, ()  # rules from above a repository's root do not apply in it
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
            data, _ = self._root.read_file(prefix + name, _IGNORE_FILE_MAX)
        except GatewayError:
            return stack
        found = rules(data.decode("utf-8", "surrogateescape"))
        return ((len(prefix), found), *stack) if found.rules else stack

    def _ignored(self, path: str, state: _State, *, folder: bool) -> bool:
        full = self._base + path
        for stack in state.stacks:
            for start, found in stack:
                inner = (full if start >= len(self._base) else self._told(path))[start:]
                for rule in found.rules:  # like `Rules.decide`, inlined since it runs for each file of a tree
                    if (folder or not rule.folders_only) and rule.matches(inner):
                        return not rule.negated
        return False

    def _told(self, path: str) -> str:
        """Return the path that ripgrep 14, in Claude Code, gives to rules from above the start.

        It is the start and the name: a bug of that version loses the folders in between, and the leading dot
        of a name right at the start.
        """
        _, below, name = path.rpartition("/")
        return self._base + (name if below else name.removeprefix("."))

    def folder(self, path: str, state: _State) -> bool:
        decided = self._globs.decide(path, folder=True)
        return decided if decided is not None else not self._ignored(path, state, folder=True)

    def files(self, prefix: str, names: Sequence[str], state: _State) -> Collection[str]:
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
        told = not prefix and any(start < len(self._base) for start, _ in files)
        if told or any(found.negates for _, found in files):
            return {name for name in names if self._ignored(prefix + name, state, folder=False)}
        # no rule negates another, so all names are matched at once
        left_out: set[str] = set()
        for start, found in files:
            where = (self._base + prefix)[start:] if start >= len(self._base) else self._base[start:]
            for rule in found.rules:
                left_out.update(rule.among(where, names))
        return left_out
