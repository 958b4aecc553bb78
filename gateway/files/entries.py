"""Describe a file or folder to a client: path, type, size, mode, times and etag."""

from __future__ import annotations

import os
import stat
from typing import Any

from gateway.rootfs.paths import show
from gateway.rootfs.root import Root, etag
from gateway.rootfs.worker import Workspace


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
