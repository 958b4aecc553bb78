"""Kernel errors as errors of the gateway, never with a path."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Final

from gateway.errors import (
    Conflict,
    Forbidden,
    GatewayError,
    InvalidParams,
    IsADirectory,
    NotAFile,
    NotFound,
    OutsideWorkspace,
    TooLarge,
    Unavailable,
)

NO_SPACE: Final = "no_space"
"""The `reason` of a write that found no room on the disk."""

Spare = Callable[[str], Awaitable[bool]]
"""Frees space on a tenant's disk after a write found none; returns whether to try again."""


async def nothing_to_spare(tenant: str) -> bool:
    """A `Spare` for disks without anything to give up."""
    return False


# errno -> error, `reason` (a fact that distinguishes errors with the same code), message without a path
_REFUSALS: dict[int, tuple[type[GatewayError], str, str]] = {
    errno.ENOENT: (NotFound, "missing", "no such file or directory"),
    errno.EXDEV: (OutsideWorkspace, "outside", "the path leads out of the workspace"),
    errno.ELOOP: (OutsideWorkspace, "loop", "too many symbolic links"),
    errno.ENOTDIR: (NotAFile, "through_file", "not a directory"),
    errno.EISDIR: (IsADirectory, "directory", "is a directory"),
    errno.ENXIO: (NotAFile, "special", "not a regular file"),
    errno.ENODEV: (NotAFile, "special", "not a regular file"),
    errno.EACCES: (Forbidden, "denied", "permission denied"),
    errno.EPERM: (Forbidden, "denied", "operation not permitted"),
    errno.EOVERFLOW: (Forbidden, "denied", "the owner of the folder is not known here"),
    errno.EROFS: (Forbidden, "denied", "read-only file system"),
    errno.ENAMETOOLONG: (InvalidParams, "too_long", "file name too long"),
    errno.EINVAL: (InvalidParams, "invalid", "invalid path"),
    errno.ENOSPC: (
        TooLarge,
        NO_SPACE,
        "no space left on the disk of the workspace; make room there, or give it a larger one",
    ),
    errno.EDQUOT: (
        TooLarge,
        NO_SPACE,
        "disk quota exceeded; make room in the workspace, or give the tenant a larger disk",
    ),
    errno.EFBIG: (TooLarge, "too_large", "file too large"),
    errno.ENOTEMPTY: (Conflict, "not_empty", "directory not empty"),
    errno.EEXIST: (Conflict, "exists", "file exists"),
    errno.EAGAIN: (Conflict, "busy", "the path keeps changing"),
    errno.ETXTBSY: (Conflict, "busy", "file is busy"),
    errno.EBUSY: (Conflict, "busy", "file is busy"),
}


def refusal(error: OSError) -> GatewayError:
    """Convert a kernel error to the gateway's, with the fact `reason` and without a path."""
    kind, reason, words = _REFUSALS.get(error.errno or 0, (Unavailable, "io", "the file system failed"))
    return kind(words, reason=reason)
