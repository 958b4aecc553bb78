"""Watches a workspace by inotify and reports what changed. Runs in a worker.

One inotify instance for all watches of a tenant, one watch of the kernel for each folder that somebody wants.
A folder is opened by the safe paths of `tree` and watched through that descriptor, before it is listed: so
nothing falls between, and no link is followed, whatever the tenant swaps. A folder that is renamed keeps its
watch. Whatever cannot be kept up with (the kernel's queue, the number of folders, a tree that moves while it
is read) is told as `overflow`, and the tree is read anew, at most once in a second.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import orjson

from gateway.errors import GatewayError, RateLimited, Unavailable
from gateway.files.changes import Change, Changes, Wish
from gateway.rootfs import kernel
from gateway.rootfs.operation import Operation, Workspace
from gateway.rootfs.paths import show, unfinished
from gateway.rootfs.refusals import refusal
from gateway.rootfs.worker import TOLD, answer, frame, receive_request

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW
_MASK = (
    kernel.IN_MODIFY
    | kernel.IN_ATTRIB
    | kernel.IN_MOVED_FROM
    | kernel.IN_MOVED_TO
    | kernel.IN_CREATE
    | kernel.IN_DELETE
    | kernel.IN_ONLYDIR
    | kernel.IN_EXCL_UNLINK
)
_ROOT_MASK = _MASK | kernel.IN_DELETE_SELF | kernel.IN_MOVE_SELF
_BATCH = 256 << 10  # bytes of one read of events; the kernel's queue holds about twice that
_SOON = 0.015  # seconds from a first change until it is told: what belongs together comes together
_PAUSE = 0.1  # seconds between two tellings while changes go on
_ANEW = 1.0  # seconds between two readings of the whole tree
_NAMES = 200_000  # names that are remembered, to tell a file that is replaced from a new one


class _Folder:
    """A folder that is watched. `names` are the entries in it, None where they are not remembered."""

    __slots__ = ("folders", "missed", "name", "names", "parent", "wd")

    def __init__(self, name: str, parent: _Folder | None, wd: int) -> None:
        self.name = name
        self.parent = parent
        self.wd = wd
        self.folders: dict[str, _Folder] = {}
        self.names: set[str] | None = None
        self.missed = False  # something changed while it was on its way from one name to another

    def top(self) -> _Folder:
        folder = self
        while folder.parent is not None:
            folder = folder.parent
        return folder

    def path(self) -> str | None:
        """Return the relative path, None where the folder was moved and its new place is not known yet."""
        parts = []
        folder: _Folder = self
        while folder.parent is not None:
            parts.append(folder.name)
            folder = folder.parent
        return None if folder.name else "/".join(reversed(parts))

    def below(self) -> Iterator[_Folder]:
        """Yield this folder and all below it."""
        stack = [self]
        while stack:
            folder = stack.pop()
            yield folder
            stack.extend(folder.folders.values())


class Watcher:
    """All watches of one tenant. `gone` is set once the workspace itself was moved or removed."""

    def __init__(self, workspace: Workspace) -> None:
        self.gone = False
        self._tree = workspace.root
        self._limits = workspace.limits
        self._wishes: dict[int, Wish] = {}
        self._pending: dict[int, Changes] = {}
        self._by_wd: dict[int, _Folder] = {}
        self._top: _Folder | None = None
        self._moving: dict[int, _Folder] = {}
        self._moved_before: set[int] = set()
        self._names = 0
        self._unwatched = 0
        self._full = ""  # why no more folders could be watched, in words
        self._first = self._told = self._read_anew = 0.0
        self._anew = False
        self.descriptor = self._instance()

    @staticmethod
    def _instance() -> int:
        try:
            return kernel.inotify()
        except OSError as error:
            if error.errno == errno.EMFILE:
                words = "the host's inotify instances are used up; raise fs.inotify.max_user_instances"
                raise RateLimited(words) from None
            raise Unavailable("files cannot be watched on this host") from None

    # requests

    def watch(self, workspace: Workspace, given: dict[str, Any]) -> bytes:
        """Begin a watch; return how many folders of the tenant cannot be watched."""
        roots = []
        for path in given["paths"]:
            root = self._tree.locate(path, self._tree.workspace)
            self._tree.status(root)  # NotFound, and every other refusal of a path
            roots.append(root)
        number: int = given["watch"]
        self._wishes[number] = Wish(roots, given["ignore"])
        self._pending[number] = Changes(self._limits.watch_changes)
        self._unwatched, self._full = 0, ""
        self._look(None, "", "", told=False)
        if self._full:
            self.unwatch(workspace, given)
            raise RateLimited(self._full, folders=len(self._by_wd))
        return orjson.dumps({"unwatched": self._unwatched})

    def unwatch(self, workspace: Workspace, given: dict[str, Any]) -> bytes:
        self._wishes.pop(given["watch"], None)
        self._pending.pop(given["watch"], None)
        if self._top is not None:
            self._prune(self._top, "")
        return b"{}"

    def _prune(self, folder: _Folder, path: str) -> None:
        """Let go of the folders below `folder` that nobody wants any more."""
        stack = [(folder, path)]
        while stack:
            folder, path = stack.pop()
            for name, child in list(folder.folders.items()):
                below = f"{path}/{name}" if path else name
                if self._wanted(below):
                    stack.append((child, below))
                else:
                    del folder.folders[name]
                    self._drop(child)

    # folders

    def _wanted(self, path: str) -> bool:
        return any(wish.enters(path) for wish in self._wishes.values())

    def _look(self, parent: _Folder | None, name: str, path: str, *, told: bool) -> None:
        """Watch and list the folder `name` of `parent`, and those below it that are wanted.

        With `told`, what is in them is told: it came before they were watched.
        """
        stack = [(parent, name, path)]
        while stack:
            parent, name, path = stack.pop()
            try:
                descriptor = self._tree.open_real(path, _FOLDER)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    self._cannot(path)  # not readable, or deeper than a path can name
                continue
            try:
                folder = self._watch_folder(descriptor, parent, name, path)
                if folder is None:
                    continue
                for entry, is_folder in self._list(folder, descriptor):
                    below = f"{path}/{entry}" if path else entry
                    if told and not unfinished(entry):
                        self._note(below, "created", folder=is_folder)
                    if is_folder and self._wanted(below):
                        stack.append((folder, entry, below))
            except OSError:
                self._cannot(path)
            finally:
                os.close(descriptor)

    def _watch_folder(self, descriptor: int, parent: _Folder | None, name: str, path: str) -> _Folder | None:
        known = self._top if parent is None else parent.folders.get(name)
        limit = self._limits.watch_folders
        if known is None and len(self._by_wd) >= limit:
            self._full = f"more than {limit} folders to watch; watch fewer paths, or ignore more names"
            self._cannot(path)
            return None
        os.fchdir(descriptor)
        try:
            wd = kernel.inotify_add(self.descriptor, _ROOT_MASK if parent is None else _MASK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._full = "the host's inotify watches are used up; raise fs.inotify.max_user_watches"
            self._cannot(path)
            return None
        if known is not None and known.wd == wd:
            return known
        if wd in self._by_wd or known is not None:
            # The tree moved while it was read, and what is known of it is wrong somewhere.
            self.lost()
            return None
        folder = self._by_wd[wd] = _Folder(name, parent, wd)
        if parent is None:
            self._top = folder
        else:
            parent.folders[name] = folder
        return folder

    def _list(self, folder: _Folder, descriptor: int) -> list[tuple[str, bool]]:
        """Return the names in a folder, and which of them are folders; remember the names."""
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

    def _forget_names(self, folder: _Folder) -> None:
        if folder.names is not None:
            self._names -= len(folder.names)
            folder.names = None

    def _drop(self, folder: _Folder) -> None:
        """Let go of a folder and all below it."""
        for one in folder.below():
            self._forget_names(one)
            if self._by_wd.get(one.wd) is one:
                del self._by_wd[one.wd]
                kernel.inotify_remove(self.descriptor, one.wd)

    def _cannot(self, path: str) -> None:
        """Note that a folder cannot be watched: whoever wants it is told that changes may be missing."""
        self._unwatched += 1
        for number, wish in self._wishes.items():
            if wish.enters(path):
                self._overflow(number)

    def lost(self) -> None:
        """Something was missed: tell everybody, and read the tree anew."""
        self._anew = True
        for number in self._wishes:
            self._overflow(number)

    def _overflow(self, number: int) -> None:
        self._pending[number].overflow = True
        self._first = self._first or time.monotonic()

    def _again(self) -> None:
        os.close(self.descriptor)
        self.descriptor = self._instance()
        self._by_wd.clear()
        self._moving.clear()
        self._top, self._names, self._anew = None, 0, False
        self._read_anew = time.monotonic()
        self._look(None, "", "", told=False)

    # events

    def read(self) -> None:
        """Take a batch of events."""
        try:
            data = os.read(self.descriptor, _BATCH)
        except BlockingIOError:
            return
        for wd, mask, cookie, name in kernel.inotify_events(data):
            self._event(wd, mask, cookie, os.fsdecode(name))
        for cookie in self._moved_before & self._moving.keys():
            self._drop(self._moving.pop(cookie))  # it left what is watched
        self._moved_before = set(self._moving)

    def _event(self, wd: int, mask: int, cookie: int, name: str) -> None:
        if mask & kernel.IN_Q_OVERFLOW:
            self.lost()
            return
        folder = self._by_wd.get(wd)
        if folder is None:
            return
        if folder is self._top and mask & (kernel.IN_DELETE_SELF | kernel.IN_MOVE_SELF | kernel.IN_UNMOUNT):
            self.gone = True
            return
        if mask & kernel.IN_IGNORED:
            del self._by_wd[wd]  # the folder is gone; its name goes by its parent's event
            return
        path = folder.path()
        if path is None:
            folder.top().missed = True
        if not name or unfinished(name) or path is None:
            return
        below = f"{path}/{name}" if path else name
        is_folder = bool(mask & kernel.IN_ISDIR)
        if mask & (kernel.IN_DELETE | kernel.IN_MOVED_FROM):
            self._name(folder, name, there=False)
            self._note(below, "removed", folder=is_folder)
            child = folder.folders.pop(name, None)
            if is_folder:
                self._note_roots(below, child)
            if child is not None and mask & kernel.IN_MOVED_FROM:
                child.parent = None  # on its way: see _Folder.path
                self._moving[cookie] = child
            elif child is not None:
                self._drop(child)
        elif mask & (kernel.IN_CREATE | kernel.IN_MOVED_TO):
            replaced = self._name(folder, name, there=True) and bool(mask & kernel.IN_MOVED_TO)
            if replaced and is_folder:
                self._note(below, "removed", folder=True)
                replaced = False
            self._note(below, "changed" if replaced else "created", folder=is_folder)
            if is_folder:
                self._arrived(folder, name, below, self._moving.pop(cookie, None) if cookie else None)
        elif folder.names is None or name in folder.names:
            # a file that is being written and has no name yet shows under its number, "#1234"
            self._note(below, "changed", folder=is_folder)

    def _arrived(self, folder: _Folder, name: str, path: str, moved: _Folder | None) -> None:
        old = folder.folders.pop(name, None)
        if old is not None:
            self._drop(old)
        if not self._wanted(path):
            if moved is not None:
                self._drop(moved)
            return
        if moved is None:
            self._look(folder, name, path, told=True)
            return
        moved.parent, moved.name = folder, name
        folder.folders[name] = moved
        self._prune(moved, path)
        self._look(folder, name, path, told=False)
        if moved.missed or any(
            root.startswith(path + "/") for wish in self._wishes.values() for root in wish.roots
        ):
            self.lost()  # what came with it, or changed on its way, is not known

    def _name(self, folder: _Folder, name: str, *, there: bool) -> bool:
        """Remember that a name is there or is not; return whether it was, False where that is not known."""
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

    def _note_roots(self, path: str, gone: _Folder | None) -> None:
        """Tell of the roots of watches that went away with a folder above them, which was `gone`."""
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

    # telling

    def due(self) -> float | None:
        """Return the seconds until there is something to do without an event, None where there is nothing."""
        now = time.monotonic()
        times = []
        if self._first:
            times.append(max(self._first + _SOON, self._told + _PAUSE))
        if self._anew:
            times.append(self._read_anew + _ANEW)
        return max(0.0, min(times) - now) if times else None

    def tell(self, connection: socket.socket) -> None:
        """Do what is due: send what has changed, read the tree anew."""
        now = time.monotonic()
        if self._anew and now >= self._read_anew + _ANEW:
            self._again()
        if self._first and now >= max(self._first + _SOON, self._told + _PAUSE):
            self._first, self._told = 0.0, now
            for number, changes in self._pending.items():
                if changes:
                    told = {"watch": number, **changes.pass_on()}
                    connection.sendall(frame(TOLD, orjson.dumps(told)))


def show_path(path: str) -> str:
    """Return a path as it can be sent: as it is, or escaped where it is not UTF-8."""
    if path.isprintable():
        return path
    try:
        path.encode()
    except UnicodeEncodeError:
        return show(path)
    return path or "."


def serve(connection: socket.socket, workspace: Workspace) -> None:
    """Serve `watch` and `unwatch`, and tell changes, until the gateway closes the socket."""
    watcher: Watcher | None = None
    failed: GatewayError | None = None
    try:
        watcher = Watcher(workspace)
    except GatewayError as error:
        failed = error

    def refuse(workspace: Workspace, given: dict[str, Any]) -> bytes:
        assert failed is not None
        raise failed

    operations: dict[str, Operation] = (
        {"watch": refuse, "unwatch": refuse}
        if watcher is None
        else {"watch": _mapped(watcher.watch), "unwatch": _mapped(watcher.unwatch)}
    )
    rest = 0.0
    while True:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        wait = watcher.due() if watcher is not None else None
        resting = rest - time.monotonic()
        if watcher is not None:
            if resting > 0:
                wait = resting if wait is None else min(wait, resting)
            else:
                poll.register(watcher.descriptor, select.POLLIN)
        ready = dict(poll.poll(None if wait is None else int(wait * 1000) + 1))
        if connection.fileno() in ready:
            request = receive_request(connection)
            if request is None:
                return
            reply = answer(request, workspace, operations)
            assert isinstance(reply, bytes)
            connection.sendall(reply)
        if watcher is None:
            continue
        if watcher.descriptor in ready:
            began = time.monotonic()
            watcher.read()
            # Half of the time at most goes to a tenant that changes files as fast as it can: what the
            # kernel's queue does not hold meanwhile is an overflow, which costs less than reading it all.
            ended = time.monotonic()
            rest = ended + (ended - began)
        if watcher.gone:
            connection.sendall(frame(TOLD, orjson.dumps({"gone": True})))
            return
        watcher.tell(connection)


def _mapped(method: Operation) -> Operation:
    def run(workspace: Workspace, given: dict[str, Any]) -> Any:
        try:
            return method(workspace, given)
        except OSError as error:
            raise refusal(error) from None

    return run


LOOPS = {"watch": serve}

__all__ = ["LOOPS", "Watcher", "serve"]
