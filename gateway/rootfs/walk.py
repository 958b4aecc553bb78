"""Walk over the files of a workspace, with a cache of the names in unchanged folders."""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Protocol

from gateway.errors import Timeout
from gateway.rootfs.root import FOLDER, Root

KEPT_NAMES_MAX: Final = 100_000
_KEPT_CHOICES: Final = 4  # cached answers per folder, for the latest questions
_SETTLED: Final = 100_000_000  # nanoseconds; more recent changes may be followed by others in the same tick


class Chooser(Protocol):
    """Selects the folders a walk enters and the files it yields. Paths are relative to the walk's start.

    `enter` is called for each folder with the `hidden` names in it, which begin with a dot; it returns the
    `state` to pass to the other methods for this folder and to `enter` for the folders below. `files` returns
    which of the names are wanted if they are regular files; `prefix` is the folder's path with a slash. If
    `question` returns equal values, `folder` and `files` must give equal answers for the same names in the
    same place.
    """

    def question(self, state: Any) -> Hashable: ...

    def enter(self, path: str, hidden: Collection[str], state: Any) -> Any: ...

    def folder(self, path: str, state: Any) -> bool: ...

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]: ...


# of a folder: the selected files by name, the selected folders by path
_Choice = tuple[Collection[str], list[str]]


class _FolderListing:
    """The names of files and folders in a folder of `count` entries, and cached selections."""

    __slots__ = ("_choices", "count", "files", "folders", "hidden")

    def __init__(self, files: list[str], folders: list[str], hidden: Collection[str], count: int) -> None:
        self.files = files
        self.folders = folders
        self.hidden = hidden
        self.count = count
        self._choices: dict[Hashable, _Choice] = {}

    def cut(self, room: int) -> _FolderListing:
        """Return a listing with at most `room` of the names."""
        folders = self.folders[: max(0, room - len(self.files))]
        return _FolderListing(self.files[:room], folders, self.hidden, room)

    def chosen(self, chooser: Chooser, path: str, state: Any) -> _Choice:
        question = path, chooser.question(state)  # the path is part of the key, because a parent may be moved
        choice = self._choices.get(question)
        if choice is None:
            prefix = path + "/" if path else ""
            folders = [below for name in self.folders if chooser.folder(below := prefix + name, state)]
            if len(self._choices) >= _KEPT_CHOICES:
                del self._choices[next(iter(self._choices))]
            choice = self._choices[question] = chooser.files(prefix, self.files, state), folders
        return choice


# By device, inode and ctime, which cannot be set: a folder's entries do not change without it.
_kept: OrderedDict[tuple[int, int, int], _FolderListing] = OrderedDict()
_kept_names = 0


def settled(status: os.stat_result) -> bool:
    """Return whether any change from now on will be visible as a different ctime.

    Before Linux 6.13, and on ZFS, the clock of ctimes has a resolution of several milliseconds.
    """
    return time.time_ns() - status.st_ctime_ns > _SETTLED


def forget() -> None:
    """Clear the cache of folders."""
    global _kept_names
    _kept.clear()
    _kept_names = 0


def _keep(key: tuple[int, int, int], listing: _FolderListing) -> None:
    global _kept_names
    _kept[key] = listing
    _kept_names += listing.count + 1
    while _kept_names > KEPT_NAMES_MAX:
        _, dropped = _kept.popitem(last=False)
        _kept_names -= dropped.count + 1


class Walk:
    """A walk over all regular files below a folder. Links are neither followed nor yielded.

    Iteration yields the path and status of each selected file, `ordered` by path or else folder by folder.
    Alternatively, `folders` yields the folders and the names of these files, without their status. If all
    selected files are below one folder, `first` may name it. At most `maximum` entries are examined; more
    sets `truncated`. Raises `Timeout` after `deadline` (by `time.monotonic`). Folders that vanish, are
    unreadable or too deep for a path are counted in `skipped`; a folder below the tree's `depth` sets `deep`.
    """

    def __init__(
        self,
        tree: Root,
        start: str,
        chooser: Chooser,
        *,
        state: Any = None,
        maximum: int,
        deadline: float,
        ordered: bool,
        first: str = "",
    ) -> None:
        self._tree = tree
        self._first = first
        self._start = start
        self._chooser = chooser
        self._state = state
        self._maximum = maximum
        self._deadline = deadline
        self._ordered = ordered
        self._deepest = tree.depth - (start.count("/") + 1 if start else 0)
        self.visited = 0
        self.truncated = False
        self.deep = False
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[str, os.stat_result]]:
        with self._below() as below:
            # files are on the stack with their status, folders with None
            stack: list[tuple[str, os.stat_result | None, Any]] = [(self._first, None, self._state)]
            while stack:
                path, status, state = stack.pop()
                if status is not None:
                    yield path, status
                    continue
                if self.truncated:
                    continue  # no entries may be examined any more
                try:
                    descriptor, names, folders, state = self._look(below, path, state)
                except OSError:
                    self.skipped += 1
                    continue
                files = _with_status(path, descriptor, names)
                if self._ordered:
                    stack += sorted(
                        [
                            *((name, status, None) for name, status in files),
                            *((name, None, state) for name in folders),
                        ],
                        key=_path,
                        reverse=True,
                    )
                else:
                    yield from files
                    stack += [(name, None, state) for name in folders]
                self._hurry()

    def folders(self) -> Iterator[tuple[str, int, Collection[str]]]:
        """Yield each folder's path, its descriptor (valid until the next), and the selected names."""
        with self._below() as below:
            stack = [(self._first, self._state)]
            while stack and not self.truncated:
                path, state = stack.pop()
                try:
                    descriptor, names, folders, state = self._look(below, path, state)
                except OSError:
                    self.skipped += 1
                    continue
                if names:
                    try:
                        yield path, descriptor, names
                    finally:
                        os.close(descriptor)
                stack += [(name, state) for name in folders]
                self._hurry()

    @contextmanager
    def _below(self) -> Iterator[Root]:
        below = Root(self._tree.open(self._start, FOLDER), self._tree.workspace)
        try:
            yield below
        finally:
            below.close()

    def _hurry(self) -> None:
        if time.monotonic() > self._deadline:
            raise Timeout("the search took too long", reason="timeout")

    def _look(self, below: Root, path: str, state: Any) -> tuple[int, Collection[str], list[str], Any]:
        """Read a folder; return its descriptor, the selected names of files, the folders, and their state.

        The caller closes the descriptor, which is -1 if there are no names.
        """
        descriptor = -1
        # A link in the path may lead elsewhere, but only cached listings of folders in this walk are used.
        status = os.stat(path or ".", dir_fd=below.descriptor, follow_symlinks=False)
        listing = _kept.get((status.st_dev, status.st_ino, status.st_ctime_ns))
        try:
            if listing is None:
                descriptor = below.open_real(path, FOLDER)
                listing = self._list(descriptor)
            listing = self._counted(listing)
            state = self._chooser.enter(path, listing.hidden, state)
            names, folders = listing.chosen(self._chooser, path, state)
            if folders and path.count("/") + (1 if path else 0) >= self._deepest:
                self.deep, folders = True, []
            if names:
                if descriptor < 0:
                    descriptor = below.open_real(path, FOLDER)
                kept, descriptor = descriptor, -1
                return kept, names, folders, state
            return -1, names, folders, state
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _list(self, descriptor: int) -> _FolderListing:
        """Return the names in a folder, and cache them if that is safe."""
        before = os.fstat(descriptor)
        lasting = settled(before)
        files: list[str] = []
        folders: list[str] = []
        hidden: set[str] = set()
        count = 0
        # apply the limit before listing, because a folder may have millions of names
        room = self._maximum - self.visited + 1
        with os.scandir(descriptor) as entries:
            for entry in islice(entries, room):
                count += 1
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file(follow_symlinks=False):
                    files.append(name)
                if name[0] == ".":
                    hidden.add(name)
        listing = _FolderListing(files, folders, hidden, count)
        if lasting and count < room:
            _keep((before.st_dev, before.st_ino, before.st_ctime_ns), listing)
        return listing

    def _counted(self, listing: _FolderListing) -> _FolderListing:
        """Count a listing's entries; return the part within the limit."""
        room = self._maximum - self.visited
        self.visited += listing.count
        if self.visited > self._maximum:
            self.visited = self._maximum
            self.truncated = True
            return listing.cut(room)
        return listing


def _with_status(path: str, folder: int, names: Collection[str]) -> list[tuple[str, os.stat_result]]:
    """Return path and status of the names that are regular files; closes `folder` if there are names."""
    if not names:
        return []
    prefix, files = path + "/" if path else "", []
    try:
        for name in names:
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                continue  # gone
            if stat.S_ISREG(status.st_mode):
                files.append((prefix + name, status))
    finally:
        os.close(folder)
    return files


def _path(found: tuple[str, os.stat_result | None, Any]) -> str:
    path, status, _ = found
    return path + "/" if status is None else path  # as in the paths of its files
