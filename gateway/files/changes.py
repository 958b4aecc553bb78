"""Knows how changes of files are put together until they are told, and which a client wants. No IO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Change = Literal["created", "changed", "removed"]

# what two changes of one path are together; any other pair is the later one
_TOGETHER: dict[tuple[Change, Change], Change] = {
    ("created", "changed"): "created",
    ("removed", "created"): "changed",
}


class Changes:
    """The changes that wait to be told: one of each path, in the order in which the paths first changed.

    At most `maximum` paths: those over it are dropped, and `overflow` says that something was.
    """

    def __init__(self, maximum: int) -> None:
        self.overflow = False
        self._maximum = maximum
        self._found: dict[str, Change] = {}

    def __bool__(self) -> bool:
        return self.overflow or bool(self._found)

    def add(self, path: str, change: Change, *, folder: bool = False) -> None:
        """Add a change. A `folder` in the place of another is an overflow: what was in that is not told."""
        before = self._found.get(path)
        if before is not None:
            self._found[path] = _TOGETHER.get((before, change), change)
            self.overflow |= folder and (before, change) == ("removed", "created")
        elif len(self._found) < self._maximum:
            self._found[path] = change
        else:
            self.overflow = True

    def take(self) -> dict[str, Any]:
        """Return `{changes: [{path, change}], overflow}` and begin anew."""
        told = {
            "changes": [{"path": path, "change": change} for path, change in self._found.items()],
            "overflow": self.overflow,
        }
        self._found, self.overflow = {}, False
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
