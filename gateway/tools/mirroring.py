"""Find what a workspace has and the folder that is to replace it lacks; runs inside workers.

The folder's ignore files and the patterns of its manifest say what stays. The tenant controls these and the
names, so they are matched here and not in the gateway.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from gateway.errors import Timeout, TooLarge
from gateway.rootfs.operation import Operation, Workspace
from gateway.rootfs.root import Root
from gateway.tools.search.globs import Glob, GlobError
from gateway.tools.search.ignore_files import Rules, rules

Kind = Literal["file", "folder", "link"]
LOST: Final = "workspace/lost"
KEPT: Final = "workspace/kept"
_NAMES_MAX: Final = 8 << 20  # bytes
_DEPTH: Final = 64  # folders below which nothing can stay
_IGNORE: Final = b"# made by incus-gateway"  # as gateway/history/adopt.sh begins it
_OURS: Final = ".gateway"  # output of commands, at the top
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY


def understood(pattern: str) -> str:
    """Return a pattern unchanged. Raises `ValueError` if it does not parse."""
    try:
        Glob(pattern)
    except GlobError as error:
        raise ValueError(str(error)) from None
    return pattern


@dataclass(slots=True)
class _Look:
    tree: Root
    deadline: float
    room: int
    visits: int
    there: Mapping[str, Kind]
    left_out: frozenset[str]
    keep: Rules
    ignored: Mapping[str, Rules]

    def stays(self, path: str, *, folder: bool) -> bool:
        """Return whether the folder says that something it lacks stays."""
        if self.keep.decide(path, folder=folder):
            return True
        above = path
        while above:  # the innermost ignore file first
            above = above.rpartition("/")[0]
            if (found := self.ignored.get(above)) is not None:
                inner = path[len(above) + 1 :] if above else path
                if (decided := found.decide(inner, folder=folder)) is not None:
                    return decided
        return False

    def inside(self, folder: str) -> list[tuple[str, str, bool]] | None:
        """Return name, path and kind (folder or not) of a folder's entries; None if it cannot be read."""
        try:
            descriptor = self.tree.open_real(folder, _FOLDER)
        except OSError:
            return None
        try:
            with os.scandir(descriptor) as listed:
                names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listed)
        finally:
            os.close(descriptor)
        self.visits -= len(names)
        if self.visits < 0:
            raise TooLarge("the workspace has more files than an update may compare")
        if time.monotonic() > self.deadline:
            raise Timeout("finding out what an update removes took too long")
        return [(name, f"{folder}/{name}" if folder else name, is_folder) for name, is_folder in names]

    def kept(self, folder: str, depth: int, kept: list[bytes], *, within: bool = False) -> None:
        """Collect what the manifest keeps below a folder, except what the new folder has itself.

        `within` says that a folder above is kept, and so everything here.
        """
        for name, path, is_folder in self.inside(folder) or ():
            if name in self.left_out:
                continue
            keeps = within or bool(self.keep.decide(path, folder=is_folder))
            if keeps and path not in self.there:
                self._name(path, kept)
            elif is_folder and depth < _DEPTH:
                self.kept(path, depth + 1, kept, within=keeps)

    def below(self, folder: str, depth: int, lost: list[bytes]) -> bool:
        """Collect what is lost below a folder; return whether anything there stays."""
        any_stays = False
        entries = self.inside(folder)
        if entries is None:
            return True  # it has become a link, or the site's user may not read it: the copy reports that
        for name, path, is_folder in entries:
            if (
                name in self.left_out
                or path == _OURS
                or self.stays(path, folder=is_folder)
                or self._made(path)
            ):
                any_stays = True
                continue
            kind = self.there.get(path)
            if not is_folder:
                if kind in ("file", "link"):
                    any_stays = True
                else:
                    self._name(path, lost)
                continue
            inner: list[bytes] = []
            stays = depth < _DEPTH and self.below(path, depth + 1, inner)
            if stays or kind == "folder":
                any_stays = True
                lost += inner
            else:
                self._name(path, lost)
        return any_stays

    def _made(self, path: str) -> bool:
        """Return whether it is the ignore file that the gateway gave a workspace without one."""
        if path != ".gitignore":
            return False
        try:
            descriptor = self.tree.open_real(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            return os.read(descriptor, len(_IGNORE)) == _IGNORE
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _name(self, path: str, names: list[bytes]) -> None:
        name = os.fsencode(path)
        self.room -= len(name) + 1
        if self.room < 0:
            raise TooLarge("the names that an update removes or keeps are too long in total")
        names.append(name)


def _look(workspace: Workspace, given: dict[str, Any]) -> _Look:
    return _Look(
        workspace.root,
        time.monotonic() + workspace.limits.tool_timeout,
        _NAMES_MAX,
        workspace.limits.visit_max,
        given.get("there", {}),
        frozenset(given["left_out"]),
        rules("\n".join(given["keep"])),
        {folder: rules(text) for folder, text in given.get("ignored", {}).items()},
    )


def _lost(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Return the paths that the new folder lacks, each followed by a NUL. A lost folder is one path.

    Of the new folder, `there` has every path with its kind, `ignored` the ignore files by folder, and `keep`
    the manifest's patterns; `left_out` are names that are never part of a deployed folder.
    """
    lost: list[bytes] = []
    _look(workspace, given).below("", 0, lost)
    return b"".join(path + b"\0" for path in lost)


def _kept(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Return the paths that match `keep` and are not `there`, each followed by a NUL."""
    kept: list[bytes] = []
    _look(workspace, given).kept("", 0, kept)
    return b"".join(path + b"\0" for path in kept)


OPERATIONS: dict[str, Operation] = {LOST: _lost, KEPT: _kept}
