"""Describes a file or folder to a client: its path, type, size, mode, times and etag."""

from __future__ import annotations

import os
import stat
from typing import Any

from gateway.rootfs.operation import Workspace
from gateway.rootfs.paths import show
from gateway.rootfs.root import Root, etag


def locate(workspace: Workspace, path: str) -> str:
    """Return the path below the workspace that a client's `path` names."""
    return workspace.root.locate(path, workspace.root.workspace)


def entry(tree: Root, path: str, status: os.stat_result) -> dict[str, Any]:
    """Return the description of a file: `mode` is its permission bits, `mtime` in seconds since the epoch.

    A link has a `target`: what it points to, or None if that is outside. A path that is not UTF-8 is shown
    escaped, and `escaped` says so: a client cannot name such a file.
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
    """Say whether a path is UTF-8, so that it can be sent."""
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
