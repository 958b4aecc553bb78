"""Checks a client's conditions, `ifMatch` and `ifNoneMatch`, against the file that is there."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

from gateway.errors import Conflict, IsADirectory, NotAFile
from gateway.rootfs.root import etag


def check(now: os.stat_result | None, given: Mapping[str, Any]) -> None:
    """Check the conditions against the file that is there, if any. Raises `Conflict`.

    Each of `ifMatch` and `ifNoneMatch` is an etag, a list of them, or "*", which is any file.
    """
    if_match, if_none_match = given.get("ifMatch"), given.get("ifNoneMatch")
    if if_match is not None and (now is None or not _among(etag(now), if_match)):
        raise stale(now)
    if if_none_match is not None and now is not None and _among(etag(now), if_none_match):
        raise Conflict("the file exists", reason="exists", etag=etag(now))


def _among(tag: str, wanted: str | list[str]) -> bool:
    return tag in wanted or "*" in wanted if isinstance(wanted, list) else wanted in ("*", tag)


def stale(now: os.stat_result | None) -> Conflict:
    """Return the error for a file that the client does not know, with the present etag."""
    if now is None:
        return Conflict("the file is not there any more", reason="stale", etag=None)
    return Conflict(
        "the file is not the version that you know; read it again", reason="stale", etag=etag(now)
    )


def present(directory: int, name: str) -> os.stat_result | None:
    """Return the status of the regular file `name`, None if there is nothing.

    Raises `IsADirectory` and `NotAFile`, also for a link: nothing is written through one.
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
