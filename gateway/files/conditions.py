"""Check a client's conditions, `ifMatch` and `ifNoneMatch`, against the current file."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

from gateway.errors import Conflict, IsADirectory, NotAFile
from gateway.rootfs.root import etag


def check(now: os.stat_result | None, given: Mapping[str, Any]) -> None:
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
