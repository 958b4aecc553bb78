"""Open files in a worker for the gateway: regular files to read, new files to write.

The bytes go through the descriptor passed to the gateway, not through the worker. So only the confined worker
resolves the tenant's paths, and the gateway gets neither a name nor a folder, just one regular file that is
either readable or writable. The gateway copies the bytes without interpreting them, while the worker is free
for the next call. A download continues with the same file even if another replaces it meanwhile.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import IsADirectory, NotFound, RateLimited
from gateway.files.operations import check_conditions, locate, present, stale
from gateway.rootfs import file_calls, kernel
from gateway.rootfs.paths import TEMPORARY
from gateway.rootfs.root import etag, refusal
from gateway.rootfs.worker import Operation, Passing, Workspace


@dataclass(frozen=True, slots=True)
class _Upload:
    """An unfinished upload: the folder and name of its file, and the file it will replace.

    `nameless` is the file itself if it gets its name only at the end, so that a kill leaves nothing behind.
    `old` keeps the replaced file alive until the end: freeing a large file takes a tenth of a second, which
    must happen here and not in the worker for the tenant's other calls.
    """

    directory: int
    temporary: str
    nameless: int | None
    old: int | None


_unfinished: dict[str, _Upload] = {}  # the process serves only one tenant
_UNFINISHED_MAX = 64  # each needs three of a worker's 256 descriptors; the gateway's own limit is lower


def _open(workspace: Workspace, given: dict[str, Any]) -> Passing:
    descriptor, status = workspace.root.open_file(locate(workspace, given["path"]))
    return Passing(orjson.dumps({"etag": etag(status), "size": status.st_size}), descriptor)


def _create(workspace: Workspace, given: dict[str, Any]) -> Passing:
    """Create the file for an upload, beside its target or in the nearest existing folder above.

    Missing folders are created at the end, so that an aborted upload leaves nothing behind.
    """
    if len(_unfinished) >= _UNFINISHED_MAX:
        raise RateLimited("too many unfinished uploads", limit=_UNFINISHED_MAX)
    tree = workspace.root
    path = locate(workspace, given["path"])
    if not path:
        raise IsADirectory("is a directory", reason="directory")
    mode = 0o644
    old: int | None = None
    try:
        directory, name = tree.parent(path)
    except NotFound:
        if given.get("ifMatch") is not None:
            raise stale(None) from None
        folder, directory = _above(workspace, path.rpartition("/")[0])
    else:
        folder = path.rpartition("/")[0]
        try:
            now = present(directory, name)
            check_conditions(now, given)
            if now is not None:
                mode = now.st_mode & 0o777
                with suppress(OSError):  # removed meanwhile
                    old = os.open(name, kernel.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except BaseException:
            os.close(directory)
            raise
    token = os.urandom(8).hex()
    temporary = f"{TEMPORARY}{os.getpid():x}-{token}"
    nameless: int | None = None
    try:
        try:
            descriptor = file_calls.open_nameless(directory, os.O_WRONLY, temporary)
            nameless = os.dup(descriptor)
        except OSError:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
    except BaseException:
        os.close(directory)
        if old is not None:
            os.close(old)
        raise
    _unfinished[token] = _Upload(directory, temporary, nameless, old)
    os.fchmod(descriptor, mode)
    inode = os.fstat(descriptor).st_ino
    told = {"token": token, "folder": folder, "temporary": temporary, "inode": inode}
    return Passing(orjson.dumps(told), descriptor)


def _above(workspace: Workspace, folder: str) -> tuple[str, int]:
    """Return the nearest existing folder above a missing one, and a descriptor of it."""
    while folder:
        folder = folder.rpartition("/")[0]
        try:
            return folder, workspace.root.open(folder, kernel.O_PATH | os.O_DIRECTORY)
        except NotFound:
            continue
    raise NotFound("no such file or directory", reason="missing")


def _finish(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Give an upload its temporary name, from which it will be moved into place, if it has none yet."""
    found = _unfinished.get(given["token"])
    if found is None:
        raise NotFound("no such upload")
    if found.nameless is not None:
        file_calls.name_file(found.nameless, found.directory, found.temporary)
    return b"{}"


def _release(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Forget an upload, and remove its file if it was not committed. Idempotent."""
    found = _unfinished.pop(given["token"], None)
    if found is not None:
        try:
            with suppress(FileNotFoundError):
                os.unlink(found.temporary, dir_fd=found.directory)
        finally:
            for descriptor in (found.directory, found.nameless, found.old):
                if descriptor is not None:
                    os.close(descriptor)
    return b"{}"


def _release_all(workspace: Workspace, given: dict[str, Any]) -> bytes:
    for token in list(_unfinished):
        with suppress(OSError):
            _release(workspace, {"token": token})
    return b"{}"


def _operation(method: Operation) -> Operation:
    def run(workspace: Workspace, arguments: dict[str, Any]) -> bytes | Passing:
        try:
            return method(workspace, arguments)
        except OSError as error:
            raise refusal(error) from None

    return run


OPERATIONS: dict[str, Operation] = {
    "files/open": _operation(_open),
    "files/create": _operation(_create),
    "files/finish": _operation(_finish),
    "files/release": _operation(_release),
    "files/releaseAll": _operation(_release_all),
}
