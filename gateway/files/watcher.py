"""Convert inotify events into the changes for each watch of a tenant.

One inotify instance serves all watches of a tenant. What it cannot follow (an overflow of the kernel's queue,
too many folders, a tree that changes while it is read) is reported as `overflow`, and the tree is read again,
at most once a second.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any, Final

import orjson

from gateway.errors import RateLimited
from gateway.files.changes import Change, Changes, Wish
from gateway.files.entries import sendable
from gateway.files.watched_folders import Folder, WatchedFolders
from gateway.rootfs import file_calls
from gateway.rootfs.messages import TOLD, frame
from gateway.rootfs.paths import show, unfinished
from gateway.rootfs.worker import Workspace

_BATCH: Final = 256 << 10  # bytes of events per read; the kernel's queue holds about twice that
_SOON: Final = 0.015  # seconds from the first change to its message, so that related changes go together
_PAUSE: Final = 0.1  # seconds between two messages while changes continue
_AGAIN: Final = 1.0  # seconds between two reads of the whole tree


class Watcher:
    """All watches of one tenant. `gone` is set once the workspace itself has been moved or removed."""

    def __init__(self, workspace: Workspace) -> None:
        self.gone = False
        self._root = workspace.root
        self._limits = workspace.limits
        self._wishes: dict[int, Wish] = {}
        self._pending: dict[int, Changes] = {}
        self._folders = WatchedFolders(workspace.root, workspace.limits, self)
        self._unwatched = 0
        self._full = ""  # why no more folders could be watched
        self._first = self._told = self._read_again = 0.0
        self._again = False

    @property
    def descriptor(self) -> int:
        """The descriptor to poll for events; it changes when the tree is read again."""
        return self._folders.descriptor

    # --- requests -------------------------------------------------------------------------------------

    def watch(self, workspace: Workspace, given: dict[str, Any]) -> bytes:
        """Start a watch; return how many folders of the tenant cannot be watched."""
        roots = []
        for path in given["paths"]:
            root = self._root.locate(path, self._root.workspace)
            self._root.status(root)  # raises NotFound and all other refusals of a path
            roots.append(root)
        number: int = given["watch"]
        self._wishes[number] = Wish(roots, given["ignore"])
        self._pending[number] = Changes(self._limits.watch_changes)
        self._unwatched, self._full = 0, ""
        self._folders.look(None, "", "", told=False)
        if self._full:
            self.unwatch(workspace, given)
            raise RateLimited(self._full, folders=len(self._folders))
        return orjson.dumps({"unwatched": self._unwatched})

    def unwatch(self, workspace: Workspace, given: dict[str, Any]) -> bytes:
        self._wishes.pop(given["watch"], None)
        self._pending.pop(given["watch"], None)
        self._folders.prune()
        return b"{}"

    # --- callbacks of the folders ---------------------------------------------------------------------

    def wants(self, path: str) -> bool:
        return any(wish.enters(path) for wish in self._wishes.values())

    def found(self, path: str, *, folder: bool) -> None:
        self._note(path, "created", folder=folder)

    def unwatched(self, path: str, why: str = "") -> None:
        """Mark each watch covering this folder: changes may be missing."""
        self._full = why or self._full
        self._unwatched += 1
        for number, wish in self._wishes.items():
            if wish.enters(path):
                self._overflow(number)

    def lost(self) -> None:
        """Mark all watches as having missed something, and schedule reading the tree again."""
        self._again = True
        for number in self._wishes:
            self._overflow(number)

    def _overflow(self, number: int) -> None:
        self._pending[number].overflow = True
        self._first = self._first or time.monotonic()

    # --- events ---------------------------------------------------------------------------------------

    def read(self) -> None:
        """Process one batch of events."""
        try:
            data = os.read(self.descriptor, _BATCH)
        except BlockingIOError:
            return
        for wd, mask, cookie, name in file_calls.inotify_events(data):
            self._event(wd, mask, cookie, os.fsdecode(name))
        self._folders.drop_moved()

    def _event(self, wd: int, mask: int, cookie: int, name: str) -> None:
        if mask & file_calls.IN_Q_OVERFLOW:
            self.lost()
            return
        folder = self._folders.find(wd)
        if folder is None:
            return
        top_gone = mask & (file_calls.IN_DELETE_SELF | file_calls.IN_MOVE_SELF | file_calls.IN_UNMOUNT)
        if folder is self._folders.top and top_gone:
            self.gone = True
            return
        if mask & file_calls.IN_IGNORED:
            self._folders.forget(wd)  # the folder is gone; its parent's event removes the name
            return
        path = folder.path()
        if path is None:
            folder.top().missed = True
        if not name or unfinished(name) or path is None:
            return
        below = f"{path}/{name}" if path else name
        is_folder = bool(mask & file_calls.IN_ISDIR)
        if mask & (file_calls.IN_DELETE | file_calls.IN_MOVED_FROM):
            self._removed(folder, name, below, is_folder, cookie if mask & file_calls.IN_MOVED_FROM else None)
        elif mask & (file_calls.IN_CREATE | file_calls.IN_MOVED_TO):
            self._appeared(folder, name, below, is_folder, cookie, moved=bool(mask & file_calls.IN_MOVED_TO))
        elif folder.names is None or name in folder.names:
            # an unnamed file being written appears under its inode number, "#1234"
            self._note(below, "changed", folder=is_folder)

    def _removed(self, folder: Folder, name: str, path: str, is_folder: bool, cookie: int | None) -> None:
        self._folders.remember(folder, name, there=False)
        self._note(path, "removed", folder=is_folder)
        child = self._folders.take_out(folder, name, cookie)
        if is_folder:
            self._note_roots(path, child)

    def _appeared(
        self, folder: Folder, name: str, path: str, is_folder: bool, cookie: int, *, moved: bool
    ) -> None:
        replaced = self._folders.remember(folder, name, there=True) and moved
        if replaced and is_folder:
            self._note(path, "removed", folder=True)
            replaced = False
        self._note(path, "changed" if replaced else "created", folder=is_folder)
        if not is_folder:
            return
        known = self._folders.put_in(folder, name, path, cookie)
        if known is not None and (known.missed or self._roots_below(path)):
            self.lost()  # its current contents are unknown

    def _roots_below(self, path: str) -> bool:
        return any(root.startswith(path + "/") for wish in self._wishes.values() for root in wish.roots)

    def _note_roots(self, path: str, gone: Folder | None) -> None:
        """Report roots of watches that vanished together with `gone`, a folder above them."""
        for number, wish in self._wishes.items():
            for root in wish.roots:
                if root.startswith(path + "/"):
                    folder = gone
                    for name in root[len(path) + 1 :].split("/"):
                        folder = folder and folder.folders.get(name)
                    self._pending[number].add(show_path(root), "removed", folder=folder is not None)
                    self._first = self._first or time.monotonic()

    def _note(self, path: str, change: Change, *, folder: bool = False) -> None:
        for number, wish in self._wishes.items():
            if wish.sees(path):
                self._pending[number].add(show_path(path), change, folder=folder)
                self._first = self._first or time.monotonic()

    # --- sending --------------------------------------------------------------------------------------

    def due(self) -> float | None:
        """Return the seconds until `tell` has something to do, None if nothing is pending."""
        now = time.monotonic()
        times = []
        if self._first:
            times.append(max(self._first + _SOON, self._told + _PAUSE))
        if self._again:
            times.append(self._read_again + _AGAIN)
        return max(0.0, min(times) - now) if times else None

    def tell(self, connection: socket.socket) -> None:
        """Do what is due: read the tree again, send changes."""
        now = time.monotonic()
        if self._again and now >= self._read_again + _AGAIN:
            self._again, self._read_again = False, now
            self._folders.read_again()
        if self._first and now >= max(self._first + _SOON, self._told + _PAUSE):
            self._first, self._told = 0.0, now
            for number, changes in self._pending.items():
                if changes:
                    told = {"watch": number, **changes.pass_on()}
                    connection.sendall(frame(TOLD, orjson.dumps(told)))


def show_path(path: str) -> str:
    """Return a path for sending: escaped if it is not UTF-8."""
    return path if sendable(path) else show(path)
