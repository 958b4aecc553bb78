"""Watch the folders of a workspace with inotify, and keep a tree of them while the tenant changes it.

A folder is opened below the workspace (`rootfs.root`) and watched through that descriptor before it is
listed. So no change is missed in between and no link is followed, whatever the tenant swaps. A renamed folder
keeps its watch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import islice
from typing import Final, Protocol

from gateway.errors import RateLimited, Unavailable
from gateway.rootfs import file_calls
from gateway.rootfs.messages import Limits
from gateway.rootfs.paths import unfinished
from gateway.rootfs.root import Root

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW
_MASK: Final = (
    file_calls.IN_MODIFY
    | file_calls.IN_ATTRIB
    | file_calls.IN_MOVED_FROM
    | file_calls.IN_MOVED_TO
    | file_calls.IN_CREATE
    | file_calls.IN_DELETE
    | file_calls.IN_ONLYDIR
    | file_calls.IN_EXCL_UNLINK
)
_ROOT_MASK: Final = _MASK | file_calls.IN_DELETE_SELF | file_calls.IN_MOVE_SELF
_NAMES: Final = 200_000  # most remembered names, which tell a replaced file from a new one


class Folder:
    """A watched folder. `names` are its entries, None if they are not remembered."""

    __slots__ = ("folders", "missed", "name", "names", "parent", "wd")

    def __init__(self, name: str, parent: Folder | None, wd: int) -> None:
        self.name = name
        self.parent = parent
        self.wd = wd
        self.folders: dict[str, Folder] = {}
        self.names: set[str] | None = None
        self.missed = False  # something changed in it while it was being moved

    def top(self) -> Folder:
        folder = self
        while folder.parent is not None:
            folder = folder.parent
        return folder

    def path(self) -> str | None:
        """Return the relative path, None if the folder was moved and its new place is unknown yet."""
        parts = []
        folder: Folder = self
        while folder.parent is not None:
            parts.append(folder.name)
            folder = folder.parent
        return None if folder.name else "/".join(reversed(parts))

    def below(self) -> Iterator[Folder]:
        """Yield this folder and all below it."""
        stack = [self]
        while stack:
            folder = stack.pop()
            yield folder
            stack.extend(folder.folders.values())


class Audience(Protocol):
    """The owner of a `WatchedFolders`. Paths are relative to the workspace."""

    def wants(self, path: str) -> bool:
        """Return whether the folder must be watched."""
        ...

    def found(self, path: str, *, folder: bool) -> None:
        """Report an entry that was created before its folder was watched."""
        ...

    def unwatched(self, path: str, why: str = "") -> None:
        """Report a folder that cannot be watched; `why` names a limit that was hit."""
        ...

    def lost(self) -> None:
        """Report that the tree changed while it was being read, so that it must be read again."""
        ...


class WatchedFolders:
    """An inotify instance and the folders it watches. Closing its `descriptor` ends it."""

    def __init__(self, root: Root, limits: Limits, audience: Audience) -> None:
        self._root = root
        self._limits = limits
        self._audience = audience
        self._by_wd: dict[int, Folder] = {}
        self._moving: dict[int, Folder] = {}
        self._moved_before: set[int] = set()
        self._names = 0
        self.top: Folder | None = None
        self.descriptor = _instance()

    def __len__(self) -> int:
        return len(self._by_wd)

    def find(self, wd: int) -> Folder | None:
        return self._by_wd.get(wd)

    def forget(self, wd: int) -> None:
        """Forget a watch that the kernel has ended."""
        del self._by_wd[wd]

    def read_again(self) -> None:
        """Watch all wanted folders again with a new inotify instance."""
        os.close(self.descriptor)
        self.descriptor = _instance()
        self._by_wd.clear()
        self._moving.clear()
        self.top, self._names = None, 0
        self.look(None, "", "", told=False)

    def look(self, parent: Folder | None, name: str, path: str, *, told: bool) -> None:
        """Watch and list the folder `name` in `parent`, and the wanted folders below it.

        With `told`, report their entries, which were created before the folders were watched.
        """
        stack = [(parent, name, path)]
        while stack:
            parent, name, path = stack.pop()
            try:
                descriptor = self._root.open_real(path, _FOLDER)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    self._audience.unwatched(path)  # unreadable, or too deep for a path
                continue
            try:
                folder = self._watch_folder(descriptor, parent, name, path)
                if folder is None:
                    continue
                for entry, is_folder in self._list(folder, descriptor):
                    below = f"{path}/{entry}" if path else entry
                    if told and not unfinished(entry):
                        self._audience.found(below, folder=is_folder)
                    if is_folder and self._audience.wants(below):
                        stack.append((folder, entry, below))
            except OSError:
                self._audience.unwatched(path)
            finally:
                os.close(descriptor)

    def prune(self, folder: Folder | None = None, path: str = "") -> None:
        """Stop watching folders below `folder`, by default the top, that are no longer wanted."""
        folder = folder or self.top
        stack = [] if folder is None else [(folder, path)]
        while stack:
            folder, path = stack.pop()
            for name, child in list(folder.folders.items()):
                below = f"{path}/{name}" if path else name
                if self._audience.wants(below):
                    stack.append((child, below))
                else:
                    del folder.folders[name]
                    self._drop(child)

    def remember(self, folder: Folder, name: str, *, there: bool) -> bool:
        """Remember whether a name exists; return whether it did before, False if unknown."""
        names = folder.names
        if names is None:
            return False
        before = name in names
        if there and not before:
            if self._names >= _NAMES:
                self._forget_names(folder)
                return False
            names.add(name)
            self._names += 1
        elif before and not there:
            names.discard(name)
            self._names -= 1
        return before

    def take_out(self, folder: Folder, name: str, cookie: int | None) -> Folder | None:
        """Detach a folder from its parent and return it; a moved one may reappear by its `cookie`."""
        child = folder.folders.pop(name, None)
        if child is not None and cookie is not None:
            child.parent = None  # being moved: see Folder.path
            self._moving[cookie] = child
        elif child is not None:
            self._drop(child)
        return child

    def put_in(self, folder: Folder, name: str, path: str, cookie: int) -> Folder | None:
        """Watch a folder that appeared in `folder`; return it if it was moved from a watched place."""
        moved = self._moving.pop(cookie, None) if cookie else None
        old = folder.folders.pop(name, None)
        if old is not None:
            self._drop(old)
        if not self._audience.wants(path):
            if moved is not None:
                self._drop(moved)
            return None
        if moved is None:
            self.look(folder, name, path, told=True)
            return None
        moved.parent, moved.name = folder, name
        folder.folders[name] = moved
        self.prune(moved, path)
        self.look(folder, name, path, told=False)
        return moved

    def drop_moved(self) -> None:
        """Drop folders moved away one batch ago that did not reappear: they have left the watched tree."""
        for cookie in self._moved_before & self._moving.keys():
            self._drop(self._moving.pop(cookie))
        self._moved_before = set(self._moving)

    def _watch_folder(self, descriptor: int, parent: Folder | None, name: str, path: str) -> Folder | None:
        known = self.top if parent is None else parent.folders.get(name)
        limit = self._limits.watch_folders
        if known is None and len(self._by_wd) >= limit:
            why = f"there are more than {limit} folders to watch; watch fewer paths, or ignore more names"
            self._audience.unwatched(path, why)
            return None
        os.fchdir(descriptor)
        try:
            wd = file_calls.inotify_add(self.descriptor, _ROOT_MASK if parent is None else _MASK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            why = "the host's inotify watches are used up; raise fs.inotify.max_user_watches"
            self._audience.unwatched(path, why)
            return None
        if known is not None and known.wd == wd:
            return known
        if wd in self._by_wd or known is not None:
            # the tree changed while it was being read, so ours is wrong somewhere
            self._audience.lost()
            return None
        folder = self._by_wd[wd] = Folder(name, parent, wd)
        if parent is None:
            self.top = folder
        else:
            parent.folders[name] = folder
        return folder

    def _list(self, folder: Folder, descriptor: int) -> list[tuple[str, bool]]:
        """Return the names in a folder and whether each is a folder; remember the names."""
        maximum = self._limits.visit_max
        with os.scandir(descriptor) as entries:
            found = [
                (entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(entries, maximum + 1)
            ]
        if len(found) > maximum:
            raise OSError(errno.EFBIG, "too many names")
        self._forget_names(folder)
        if self._names + len(found) <= _NAMES:
            folder.names = {name for name, _ in found}
            self._names += len(found)
        return found

    def _forget_names(self, folder: Folder) -> None:
        if folder.names is not None:
            self._names -= len(folder.names)
            folder.names = None

    def _drop(self, folder: Folder) -> None:
        """Stop watching a folder and everything below it."""
        for one in folder.below():
            self._forget_names(one)
            if self._by_wd.get(one.wd) is one:
                del self._by_wd[one.wd]
                file_calls.inotify_remove(self.descriptor, one.wd)


def _instance() -> int:
    """Return the descriptor of a new inotify instance. Raises `RateLimited`, `Unavailable`."""
    try:
        return file_calls.inotify()
    except OSError as error:
        if error.errno == errno.EMFILE:
            words = "the host's inotify instances are used up; raise fs.inotify.max_user_instances"
            raise RateLimited(words) from None
        raise Unavailable("this host does not support watching files") from None
