"""The editor's operations on files and folders, run inside a worker.

Each takes the parameters of the method of the same name and returns its result as JSON. Paths in results are
relative to the workspace, which itself is ".". Operations that change a file never follow a link at the end
of its path.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import orjson

from gateway.errors import Conflict, InvalidParams, IsADirectory, NotAFile, NotFound, Timeout, TooLarge
from gateway.rootfs import file_calls, kernel
from gateway.rootfs.paths import TEMPORARY, show, unfinished
from gateway.rootfs.root import Made, Root, etag, refusal
from gateway.rootfs.walk import Walk
from gateway.rootfs.worker import Operation, Workspace

_REAL_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW
_BATCH = 4096  # names per pass over a folder, which may have millions
_DEEP = 2000  # bytes of a path; deeper folders are moved up first, as their paths would get too long
_PARENT = kernel.O_PATH | os.O_DIRECTORY
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK
_NUL_WINDOW = 8192  # a NUL within this many bytes makes a file binary, as for the tools
_ATTEMPTS = 5  # attempts to replace a file while the tenant keeps changing its folder


def locate(workspace: Workspace, path: str) -> str:
    """Return a client's `path` relative to the workspace."""
    return workspace.root.locate(path, workspace.root.workspace)


def entry(tree: Root, path: str, status: os.stat_result) -> dict[str, Any]:
    """Describe a file: `mode` has its permission bits, `mtime` is in seconds since the epoch.

    A link has a `target`, which is None if it is outside of the workspace. A path that is not UTF-8 is
    escaped and marked `escaped`; clients cannot refer to such a file.
    """
    found: dict[str, Any] = {
        "path": path or ".",
        "type": _kind(status.st_mode),
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "mtime": status.st_mtime_ns / 1e9,
        "etag": etag(status),
    }
    if not sendable(path):
        found |= {"path": show(path), "escaped": True}
    if found["type"] == "symlink":
        target = tree.link_target(path)
        found["target"] = None if target is None else (show(target) if target else ".")
    return found


def sendable(path: str) -> bool:
    """Return whether a path is valid UTF-8 and can be sent."""
    if path.isprintable():
        return True
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(mode) else "other"


def check_conditions(now: os.stat_result | None, given: Mapping[str, Any]) -> None:
    """Check the conditions against the current file, if any. Raises `Conflict`.

    `ifMatch` and `ifNoneMatch` are each an etag, a list of etags, or "*" for any file.
    """
    if_match, if_none_match = given.get("ifMatch"), given.get("ifNoneMatch")
    if if_match is not None and (now is None or not _among(etag(now), if_match)):
        raise stale(now)
    if if_none_match is not None and now is not None and _among(etag(now), if_none_match):
        raise Conflict("the file exists", reason="exists", etag=etag(now))


def _among(tag: str, wanted: str | list[str]) -> bool:
    return tag in wanted or "*" in wanted if isinstance(wanted, list) else wanted in ("*", tag)


def stale(now: os.stat_result | None) -> Conflict:
    """Return the error for a file that has changed, with its current etag."""
    if now is None:
        return Conflict("the file no longer exists", reason="stale", etag=None)
    return Conflict("the file has changed since you read it; read it again", reason="stale", etag=etag(now))


def present(directory: int, name: str) -> os.stat_result | None:
    """Return the status of the regular file `name`, None if it does not exist.

    Raises `IsADirectory` and `NotAFile`, also for a link, because nothing is written through links.
    """
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectory("is a directory", reason="directory")
    if stat.S_ISLNK(status.st_mode):
        raise NotAFile("is a symbolic link; name its target instead", reason="link")
    if not stat.S_ISREG(status.st_mode):
        raise NotAFile("not a regular file", reason="special")
    return status


def empty(directory: int, workspace: str, deadline: float) -> int:
    """Remove everything in the folder `directory`, never following links; return the number of entries.

    Uses three descriptors at any depth. Raises `OSError`, and after `deadline` (by `time.monotonic`)
    `Timeout` with `removed` as a fact; removed entries stay removed.
    """
    tree = Root(directory, workspace)
    removed = 0
    stack = [""]
    while stack:
        path = stack[-1]
        try:
            folder = tree.open_real(path, _REAL_FOLDER)
        except FileNotFoundError:
            stack.pop()
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP) or not path:
                raise
            stack.pop()  # it is no longer a folder
            with suppress(FileNotFoundError):
                _remove_entry(tree, path, folder=False)
            continue
        try:
            seen, gone, below = _empty_batch(tree, folder, path)
        finally:
            os.close(folder)
        removed += gone
        if time.monotonic() > deadline:
            raise Timeout(
                "removing took too long; repeat the request to continue", reason="timeout", removed=removed
            )
        if seen:
            stack.extend(below)  # this folder gets another pass afterwards
        elif not path:
            stack.pop()
        else:
            try:
                _remove_entry(tree, path, folder=True)
                removed += 1
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    continue  # the tenant keeps adding entries: the deadline ends the race
                raise
            stack.pop()
    return removed


def _empty_batch(tree: Root, folder: int, path: str) -> tuple[bool, int, list[str]]:
    """Remove a batch of a folder's files; return whether it had entries, how many went, and its folders."""
    prefix = path + "/" if path else ""
    deep = len(os.fsencode(prefix)) > _DEEP
    seen, gone, below = False, 0, []
    with os.scandir(folder) as entries:
        for entry in islice(entries, _BATCH):
            seen = True
            with suppress(FileNotFoundError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=folder)
                    gone += 1
                elif deep:
                    name = f"{TEMPORARY}{os.getpid():x}-{os.urandom(6).hex()}"
                    os.rename(entry.name, name, src_dir_fd=folder, dst_dir_fd=tree.descriptor)
                    below.append(name)
                else:
                    below.append(prefix + entry.name)
    return seen, gone, below


def _remove_entry(tree: Root, path: str, *, folder: bool) -> None:
    above, _, name = path.rpartition("/")
    directory = tree.open_real(above, kernel.O_PATH | os.O_DIRECTORY)
    try:
        if folder:
            os.rmdir(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


class _Unfinished:
    """Selects files with the gateway's temporary names, in all folders."""

    def question(self, state: Any) -> Hashable:
        return "unfinished"

    def enter(self, path: str, hidden: Collection[str], state: Any) -> None:
        return None

    def folder(self, path: str, state: Any) -> bool:
        return True

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        return [name for name in names if unfinished(name)]


def _sweep(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Remove unfinished files left by killed processes, last changed before the epoch time `before`.

    Writes and edits are renamed into place within a millisecond of their creation, and so are uploads if the
    kernel supports unnamed files. A file caught in between by SIGKILL stays under a name that only the
    gateway uses.

    A tenant may create anything under such a name: it loses that, and nothing else is affected.
    """
    tree, limits = workspace.root, workspace.limits
    deadline = time.monotonic() + limits.tool_timeout
    walk = Walk(tree, "", _Unfinished(), maximum=limits.visit_max, deadline=deadline, ordered=False)
    removed = 0
    for path, status in walk:
        if max(status.st_mtime, status.st_ctime) >= given["before"]:
            continue
        folder, _, name = path.rpartition("/")
        with suppress(OSError):
            directory = tree.open_real(folder, _PARENT)
            try:
                os.unlink(name, dir_fd=directory)
                removed += 1
            finally:
                os.close(directory)
    return orjson.dumps({"removed": removed, "visited": walk.visited, "truncated": walk.truncated})


def _stat(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    path = locate(workspace, given["path"])
    return entry(workspace.root, path, workspace.root.status(path))


def _list(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    """List breadth first, so that a limit cuts off the deepest folders."""
    tree, limits = workspace.root, workspace.limits
    start = locate(workspace, given["path"])
    deadline = time.monotonic() + limits.tool_timeout
    found: list[dict[str, Any]] = []
    room, truncated, skipped = limits.write_max, False, 0
    top = tree.open(start, _FOLDER)
    below = Root(top, tree.workspace)
    try:
        queue = deque([("", 1)])
        while queue:
            folder, depth = queue.popleft()
            if len(found) >= limits.list_max or room < 0:
                truncated = True
                break
            try:
                entries, more = _scan(below, folder, limits.list_max - len(found))
            except OSError as error:
                if not folder:
                    raise
                # a folder removed meanwhile does not count as unreadable
                skipped += error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
                continue
            truncated |= more
            for name, status in entries:
                relative = f"{folder}/{name}" if folder else name
                told = entry(tree, f"{start}/{relative}" if start else relative, status)
                room -= len(told["path"]) * 2 + 200
                if room < 0:
                    truncated = True
                    break
                found.append(told)
                if told["type"] == "directory" and depth < given["depth"]:
                    queue.append((relative, depth + 1))
            if time.monotonic() > deadline:
                raise Timeout("listing took too long; ask for a smaller depth", reason="timeout")
    finally:
        below.close()
    return {"path": start or ".", "entries": found, "truncated": truncated, "skipped": skipped}


def _scan(tree: Root, folder: str, maximum: int) -> tuple[list[tuple[str, os.stat_result]], bool]:
    """Return up to `maximum` names and statuses in a folder, sorted, and whether there are more."""
    descriptor = tree.open_real(folder, _FOLDER)
    found = []
    try:
        with os.scandir(descriptor) as entries:
            listed = [item for item in islice(entries, maximum + 1) if not unfinished(item.name)]
            for item in sorted(listed[:maximum], key=lambda item: item.name):
                try:
                    found.append((item.name, item.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue
    finally:
        os.close(descriptor)
    return found, len(listed) > maximum


def _read(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    path = locate(workspace, given["path"])
    try:
        data, status = workspace.root.read_file(path, workspace.limits.write_max)
    except TooLarge as error:
        raise TooLarge("the file is too large to read at once; use GET to stream it", **error.facts) from None
    found: dict[str, Any] = {"etag": etag(status), "size": len(data), "mode": stat.S_IMODE(status.st_mode)}
    text = _text(data)
    if text is None:
        return {"data": base64.b64encode(data).decode("ascii"), **found, "encoding": "base64"}
    return {"text": text, **found, "encoding": "utf-8"}


def _text(data: bytes) -> str | None:
    """Return a file's text, None if it is binary or would grow a lot as JSON."""
    if data.find(b"\0", 0, _NUL_WINDOW) >= 0:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    # a control character takes six bytes
    return text if len(orjson.dumps(text)) <= 2 * len(data) + 64 else None


def _write(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    tree, limit = workspace.root, workspace.limits.write_max
    path = locate(workspace, given["path"])
    if given.get("text") is not None:
        data = given["text"].encode()
    else:
        try:
            data = base64.b64decode(given["data"], validate=True)
        except (ValueError, binascii.Error):
            raise InvalidParams("data: not base64", field="data") from None
    if len(data) > limit:
        raise TooLarge(
            "too large for files/write; use PUT to stream it", reason="too_large", size=len(data), limit=limit
        )
    with tree.taking_back() as made:
        return _put(tree, path, data, given, made)


def _put(tree: Root, path: str, data: bytes, given: dict[str, Any], made: list[Made]) -> dict[str, Any]:
    if_match = given.get("ifMatch")
    directory, name = parent(tree, path, given, made)
    try:
        for attempt in range(_ATTEMPTS):
            old = present(directory, name)
            check_conditions(old, given)
            mode = 0o644 if old is None else old.st_mode
            try:
                status = tree.replace(directory, name, data, mode, expected=old if if_match else None)
            except (Conflict, NotFound) as error:
                # the file changed between the check and the rename: check again
                if attempt == _ATTEMPTS - 1:
                    raise
                if error.facts.get("reason") not in ("changed", "missing"):
                    raise
                continue
            return {"etag": etag(status), "size": len(data), "created": old is None}
        raise AssertionError("unreachable")
    finally:
        os.close(directory)


def parent(tree: Root, path: str, given: dict[str, Any], made: list[Made] | None = None) -> tuple[int, str]:
    """Open the folder of a file to write; create it unless the condition requires an existing file."""
    create = bool(given.get("createDirs")) and given.get("ifMatch") is None
    try:
        return tree.parent(path, create=create, made=made)
    except NotFound:
        if given.get("ifMatch") is not None:
            raise stale(None) from None
        raise


def _move(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    tree = workspace.root
    source, target = locate(workspace, given["from"]), locate(workspace, given["to"])
    if not source or not target:
        raise InvalidParams("the workspace itself cannot be moved or replaced", reason="invalid")
    if target.startswith(source + "/") and stat.S_ISDIR(tree.status(source).st_mode):
        raise InvalidParams("a folder cannot be moved into itself", reason="invalid")
    source_folder, source_name = tree.parent(source)
    try:
        with tree.taking_back() as made:
            create = bool(given.get("createDirs"))
            target_folder, target_name = tree.parent(target, create=create, made=made)
            try:
                if given.get("overwrite"):
                    os.rename(source_name, target_name, src_dir_fd=source_folder, dst_dir_fd=target_folder)
                else:
                    _move_new(source_folder, source_name, target_folder, target_name)
                return entry(tree, target, os.stat(target_name, dir_fd=target_folder, follow_symlinks=False))
            finally:
                os.close(target_folder)
    finally:
        os.close(source_folder)


def _move_new(source_folder: int, source: str, target_folder: int, target: str) -> None:
    try:
        file_calls.rename_new(source_folder, os.fsencode(source), target_folder, os.fsencode(target))
    except FileExistsError:
        now = os.stat(target, dir_fd=target_folder, follow_symlinks=False)
        raise Conflict("the target exists", reason="exists", etag=etag(now)) from None


def _remove(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    tree = workspace.root
    path = locate(workspace, given["path"])
    if not path:
        raise InvalidParams("the workspace itself cannot be removed", reason="invalid")
    directory, name = tree.parent(path)
    try:
        now = os.stat(name, dir_fd=directory, follow_symlinks=False)
        check_conditions(now, given)
        if not stat.S_ISDIR(now.st_mode):
            os.unlink(name, dir_fd=directory)
            return {"removed": 1}
        removed = 0
        if given.get("recursive"):
            folder = Root(directory, tree.workspace).open_real(name, _FOLDER)
            try:
                deadline = time.monotonic() + workspace.limits.tool_timeout
                removed = empty(folder, tree.workspace, deadline)
            finally:
                os.close(folder)
        os.rmdir(name, dir_fd=directory)
        return {"removed": removed + 1}
    except FileNotFoundError:
        if given.get("ifMatch") is not None:
            raise stale(None) from None
        raise
    finally:
        os.close(directory)


def _mkdir(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    tree = workspace.root
    path = locate(workspace, given["path"])
    if not path:
        raise Conflict("the workspace exists", reason="exists")
    with tree.taking_back() as made:
        directory, name = tree.parent(path, create=given.get("createDirs", True), made=made)
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
            return entry(tree, path, os.stat(name, dir_fd=directory, follow_symlinks=False))
        finally:
            os.close(directory)


def _moved_away() -> Conflict:
    # not 404: the target may exist, but the upload was lost with its folder or workspace
    return Conflict("the upload's folder was replaced meanwhile; send it again", reason="changed")


def _commit(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    """Move an upload into place, the last step after `opening`.

    It runs here so that it is ordered with the tenant's other writes. `temporary` in `folder` must still be
    the file with `inode`, because the tenant may have replaced it.
    """
    tree = workspace.root
    path = locate(workspace, given["path"])
    try:
        source = tree.open(given["folder"], kernel.O_PATH | os.O_DIRECTORY)
    except NotFound:
        raise _moved_away() from None
    try:
        try:
            new = os.stat(given["temporary"], dir_fd=source, follow_symlinks=False)
        except FileNotFoundError:
            raise _moved_away() from None
        if not stat.S_ISREG(new.st_mode) or new.st_ino != given["inode"]:
            raise Conflict("the upload was replaced meanwhile", reason="changed")
        with tree.taking_back() as made:
            directory, name = parent(tree, path, given, made)
            try:
                old = present(directory, name)
                check_conditions(old, given)
                os.rename(given["temporary"], name, src_dir_fd=source, dst_dir_fd=directory)
            finally:
                os.close(directory)
    finally:
        os.close(source)
    return {"etag": etag(new), "size": new.st_size, "created": old is None}


_METHODS: dict[str, Callable[[Workspace, dict[str, Any]], dict[str, Any]]] = {
    "files/stat": _stat,
    "files/list": _list,
    "files/read": _read,
    "files/write": _write,
    "files/move": _move,
    "files/remove": _remove,
    "files/mkdir": _mkdir,
    "files/commit": _commit,
}


def _operation(method: Callable[[Workspace, dict[str, Any]], dict[str, Any]]) -> Operation:
    def run(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
        try:
            return orjson.dumps(method(workspace, arguments))
        except OSError as error:
            raise refusal(error) from None

    return run


def _settle(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Flush writes to the disk, so that the quota counts them."""
    file_calls.settle(workspace.root.descriptor)
    return b"{}"


OPERATIONS: dict[str, Operation] = {
    **{name: _operation(method) for name, method in _METHODS.items()},
    "files/settle": _settle,
    "files/sweep": _sweep,
}
