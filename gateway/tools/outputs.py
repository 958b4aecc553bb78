"""Write the output of commands to files in the workspace; runs inside workers.

They are in `.gateway/output` of the workspace, since the file tools serve nothing else: there a model, or an
editor, reads with Read and Grep what did not fit into a result. `.gateway/.gitignore` keeps the folder out of
the site's repository; Glob and Grep search it only if it is named. Folders have mode 0700 and files 0600,
owned by the workspace's user. The tenant may change them in any way: every open goes through `tree`, and only
regular files are written to.
"""

from __future__ import annotations

import base64
import os
import stat
import time
from contextlib import suppress
from typing import Any, Final

import orjson
import re2

from gateway.errors import Conflict, GatewayError
from gateway.rootfs.paths import HOME
from gateway.rootfs.root import Root, refusal
from gateway.rootfs.worker import Operation, Workspace

FOLDER: Final = f"{HOME}/output"
_SEEN_MAX = 10_000  # names that are checked when old files are removed
_FILTER_MAX = 4000  # characters
_FILTER_MEMORY = 8 << 20  # bytes of one compiled filter
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# without O_NONBLOCK a FIFO under the file's name would block the worker
_MORE = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def path_of(name: str, workspace: str) -> str:
    """Return the absolute path of an output file, as the tenant sees it."""
    return f"{workspace.rstrip('/')}/{FOLDER}/{name}"


def _create(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Create the file `name` with `data` (base64), and remove others that are too old or too many."""
    try:
        home = _opened(workspace.root.descriptor, HOME)
        try:
            with suppress(FileExistsError):
                _put(os.open(".gitignore", _NEW, 0o600, dir_fd=home), b"*\n")
            folder = _opened(home, "output")
        finally:
            os.close(home)
        try:
            _prune(folder, int(given["age"]), int(given["room"]))
            _put(os.open(given["name"], _NEW, 0o600, dir_fd=folder), base64.b64decode(given["data"]))
        finally:
            os.close(folder)
    except OSError as error:
        raise refusal(error) from None
    return b"{}"


def _opened(parent: int, name: str) -> int:
    """Open a folder, creating it if needed; never through a link."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _put(descriptor: int, data: bytes) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _prune(folder: int, age: int, room: int) -> None:
    """Remove files older than `age` seconds, then the oldest until the rest have at most `room` bytes."""
    with os.scandir(folder) as entries:
        found: list[tuple[float, int, str]] = []
        for entry, _ in zip(entries, range(_SEEN_MAX), strict=False):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    found.append((status.st_mtime, status.st_size, entry.name))
    found.sort(reverse=True)
    oldest = time.time() - age
    for mtime, size, name in found:
        room -= size
        if mtime < oldest or room < 0:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)


def _append(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Append `data` (base64) to the file `name`, which is first cut off after `at` bytes if that is given.

    Raises if it is no longer the same file.
    """
    folder = _folder(workspace.root)
    try:
        descriptor = os.open(given["name"], _MORE, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Conflict("the output file is no longer a regular file", reason="changed")
        if int(given.get("at", 1 << 62)) < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, given["at"])
        _put(descriptor, base64.b64decode(given["data"]))
    except OSError as error:
        raise refusal(error) from None
    finally:
        os.close(folder)
    return b"{}"


def _remove(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Remove the file `name`, if it exists."""
    with suppress(GatewayError, OSError):
        folder = _folder(workspace.root)
        try:
            os.unlink(given["name"], dir_fd=folder)
        finally:
            os.close(folder)
    return b"{}"


def _folder(tree: Root) -> int:
    try:
        return tree.open_real(FOLDER, _DIRECTORY)
    except OSError as error:
        raise refusal(error) from None


def _filter(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Return the lines of each of `streams` that match `filter`, or `error` if the filter is invalid.

    It runs here because the pattern is a client's and the lines are the tenant's.
    """
    pattern: str = given["filter"]
    options = re2.Options()
    options.max_mem = _FILTER_MEMORY
    options.log_errors = False
    options.case_sensitive = False
    try:
        if len(pattern) > _FILTER_MAX:
            raise re2.error("the pattern is too long")
        regex = re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0] if error.args else "it does not parse"
        return orjson.dumps(
            {"error": said.decode(errors="replace") if isinstance(said, bytes) else str(said)}
        )
    return orjson.dumps(
        {
            "streams": {
                name: "\n".join(line for line in text.split("\n") if regex.search(line))
                for name, text in given["streams"].items()
            }
        }
    )


OPERATIONS: dict[str, Operation] = {
    "output/create": _create,
    "output/append": _append,
    "output/remove": _remove,
    "output/filter": _filter,
}
