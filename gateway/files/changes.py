"""Merge file changes until they are sent, and filter them for each client. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Change = Literal["created", "changed", "removed"]

_PATH: Final = 256  # average characters per path; a tenant can create paths of 4000 and open 64 watches


@dataclass(slots=True)
class _Found:
    """The merged changes of one path, and whether it was `there` before the first of them.

    `folder` tells whether it is or was a folder.
    """

    change: Change
    there: bool
    folder: bool


class Changes:
    """Changes waiting to be sent: one per path, in the order of the paths' first changes.

    At most `maximum` paths are kept, of `_PATH` characters on average. Others are dropped, and `overflow` is
    set.
    """

    def __init__(self, maximum: int) -> None:
        self.overflow = False
        self._room = maximum * _PATH
        self._maximum = maximum
        self._found: dict[str, _Found] = {}

    def __bool__(self) -> bool:
        return self.overflow or bool(self._found)

    def add(self, path: str, change: Change, *, folder: bool = False, there: bool | None = None) -> None:
        """Add a change. If it is itself the merge of several changes, pass the `there` of that merge.

        A path that existed before and after all changes is changed, one that exists only afterwards is
        created, and one that does not exist any more is removed; also if it was created first, because a file
        replacing one whose name is not remembered is reported as "created" too. A folder replacing something
        else, or the reverse, is an overflow, because its contents are not reported.
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
        """Like `take`, but with all arguments of `add`, so that the changes can be merged further."""
        return self._taken([{"path": path, **asdict(found)} for path, found in self._found.items()])

    def _taken(self, changes: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"changes": changes, "overflow": self.overflow}
        self._found, self.overflow, self._room = {}, False, self._maximum * _PATH
        return told


class Wish:
    """What a watch covers: everything at and below `roots`, except names in `ignore`.

    Roots are relative paths; "" is the workspace. A root is covered even if its own name is ignored.
    """

    def __init__(self, roots: Iterable[str], ignore: Iterable[str]) -> None:
        self.roots = tuple(roots)
        self.ignore = frozenset(ignore)

    def sees(self, path: str) -> bool:
        """Return whether a change of `path` is to be reported."""
        return any(self._below(path, root) for root in self.roots)

    def enters(self, folder: str) -> bool:
        """Return whether `folder` must be watched: it is covered, or a root is below it."""
        prefix = folder + "/"
        return not folder or any(root.startswith(prefix) or self._below(folder, root) for root in self.roots)

    def _below(self, path: str, root: str) -> bool:
        if path == root:
            return True
        if root and not path.startswith(root + "/"):
            return False
        rest = path[len(root) + 1 :] if root else path
        return not self.ignore or self.ignore.isdisjoint(rest.split("/"))
