"""Watch a tenant's files in a worker: convert inotify events into the changes for each watch.

One inotify instance serves all watches of a tenant. A folder is opened below the workspace (`rootfs.root`)
and watched through that descriptor before it is listed. So no change is missed in between and no link is
followed, whatever the tenant swaps. A renamed folder keeps its watch.

What cannot be followed (an overflow of the kernel's queue, too many folders, a tree that changes while it is
read) is reported as `overflow`, and the tree is read again, at most once a second.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import orjson

from gateway.errors import GatewayError, RateLimited, Unavailable
from gateway.files.changes import Change, Changes, Wish
from gateway.files.operations import sendable
from gateway.rootfs import file_calls
from gateway.rootfs.messages import TOLD, CallLimits, frame
from gateway.rootfs.paths import show, unfinished
from gateway.rootfs.root import Root, refusal
from gateway.rootfs.worker import Operation, Workspace, answer, receive_request

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
_BATCH: Final = 256 << 10  # bytes of events per read; the kernel's queue holds about twice that
_SOON: Final = 0.015  # seconds from the first change to its message, so that related changes go together
_PAUSE: Final = 0.1  # seconds between two messages while changes continue
_AGAIN: Final = 1.0  # seconds between two reads of the whole tree
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


class WatchedFolders:
    """An inotify instance and the folders it watches. Closing its `descriptor` ends it."""

    def __init__(self, root: Root, limits: CallLimits, watcher: Watcher) -> None:
        self._root = root
        self._limits = limits
        self._watcher = watcher
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
                    self._watcher.unwatched(path)  # unreadable, or too deep for a path
                continue
            try:
                folder = self._watch_folder(descriptor, parent, name, path)
                if folder is None:
                    continue
                for entry, is_folder in self._list(folder, descriptor):
                    below = f"{path}/{entry}" if path else entry
                    if told and not unfinished(entry):
                        self._watcher.found(below, folder=is_folder)
                    if is_folder and self._watcher.wants(below):
                        stack.append((folder, entry, below))
            except OSError:
                self._watcher.unwatched(path)
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
                if self._watcher.wants(below):
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
        if not self._watcher.wants(path):
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
            self._watcher.unwatched(path, why)
            return None
        os.fchdir(descriptor)
        try:
            wd = file_calls.inotify_add(self.descriptor, _ROOT_MASK if parent is None else _MASK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            why = "the host's inotify watches are used up; raise fs.inotify.max_user_watches"
            self._watcher.unwatched(path, why)
            return None
        if known is not None and known.wd == wd:
            return known
        if wd in self._by_wd or known is not None:
            # the tree changed while it was being read, so ours is wrong somewhere
            self._watcher.lost()
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
        """Return whether the folder must be watched."""
        return any(wish.enters(path) for wish in self._wishes.values())

    def found(self, path: str, *, folder: bool) -> None:
        """Report an entry that was created before its folder was watched."""
        self._note(path, "created", folder=folder)

    def unwatched(self, path: str, why: str = "") -> None:
        """Mark each watch of a folder that cannot be watched; `why` names a limit that was hit."""
        self._full = why or self._full
        self._unwatched += 1
        for number, wish in self._wishes.items():
            if wish.enters(path):
                self._overflow(number)

    def lost(self) -> None:
        """Mark all watches, because the tree changed while it was read, and schedule reading it again."""
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


def serve(connection: socket.socket, workspace: Workspace) -> None:
    """Serve `watch` and `unwatch` and send changes until the gateway closes the socket."""
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
            # A tenant that changes files as fast as it can gets at most half of the time. If the kernel's
            # queue overflows meanwhile, that costs less than reading all events.
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
