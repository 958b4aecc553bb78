"""Merges changes of files until they are sent, and filters them for each client. No IO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Change = Literal["created", "changed", "removed"]

_PATH: Final = 256  # a tenant can make paths of 4000, and wait for them with 64 watches


@dataclass(slots=True)
class _Found:
    """What is known of one path: its changes together, and whether it was `there` before the first of them.

    `folder` says that it is a folder, or was one.
    """

    change: Change
    there: bool
    folder: bool


class Changes:
    """The changes that wait to be told: one of each path, in the order in which the paths first changed.

    At most `maximum` paths, of `_PATH` characters on the whole: more are dropped, and `overflow` says
    that something was.
    """

    def __init__(self, maximum: int) -> None:
        self.overflow = False
        self._room = maximum * _PATH
        self._maximum = maximum
        self._found: dict[str, _Found] = {}

    def __bool__(self) -> bool:
        return self.overflow or bool(self._found)

    def add(self, path: str, change: Change, *, folder: bool = False, there: bool | None = None) -> None:
        """Add a change, which may be several of an earlier telling: then `there` as that had it.

        What was there before and is there after all changes is changed, what only is there after them
        created, and what is not, removed: also where it was created first, since a file that takes the place
        of one that is not remembered is "created" too. A folder in the place of something else, or the other
        way round, is an overflow: what was in it is not told.
        """
        found = self._found.get(path)
        if found is None:
            if len(self._found) < self._maximum and self._room >= len(path):
                self._room -= len(path)
                there = change != "created" if there is None else there
                self._found[path] = _Found(change, there, folder)
            else:
                self.overflow = True
            return
        found.folder |= folder
        if change == "removed":
            found.change = change
            return
        if found.change == "removed" and found.there and found.folder:
            self.overflow = True
        found.change = "changed" if found.there else "created"

    def take(self) -> dict[str, Any]:
        """Return `{changes: [{path, change}], overflow}` and start over."""
        changes = [{"path": path, "change": found.change} for path, found in self._found.items()]
        return self._taken(changes)

    def pass_on(self) -> dict[str, Any]:
        """Do as `take`, each change with all that `add` takes of it: others may yet come to it."""
        return self._taken([{"path": path, **asdict(found)} for path, found in self._found.items()])

    def _taken(self, changes: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"changes": changes, "overflow": self.overflow}
        self._found, self.overflow, self._room = {}, False, self._maximum * _PATH
        return told


class Wish:
    """What one watch wants to see: everything at and below `roots`, but for names in `ignore`.

    Roots are relative paths; "" is the workspace. A root counts even where its own name is ignored.
    """

    def __init__(self, roots: Iterable[str], ignore: Iterable[str]) -> None:
        self.roots = tuple(roots)
        self.ignore = frozenset(ignore)

    def sees(self, path: str) -> bool:
        """Tell whether a change of `path` is told."""
        return any(self._below(path, root) for root in self.roots)

    def enters(self, folder: str) -> bool:
        """Tell whether `folder` must be watched: it is seen, or a root lies below it."""
        prefix = folder + "/"
        return not folder or any(root.startswith(prefix) or self._below(folder, root) for root in self.roots)

    def _below(self, path: str, root: str) -> bool:
        if path == root:
            return True
        if root and not path.startswith(root + "/"):
            return False
        rest = path[len(root) + 1 :] if root else path
        return not self.ignore or self.ignore.isdisjoint(rest.split("/"))
