"""Empty a folder of any depth and width, even while its tenant changes it."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from itertools import islice

from gateway.errors import Timeout
from gateway.rootfs import kernel
from gateway.rootfs.paths import TEMPORARY
from gateway.rootfs.root import Root

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW
_BATCH = 4096  # names per pass over a folder, which may have millions
_DEEP = 2000  # bytes of a path; deeper folders are moved up first, as their paths would get too long


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
            folder = tree.open_real(path, _FOLDER)
        except FileNotFoundError:
            stack.pop()
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP) or not path:
                raise
            stack.pop()  # it is no longer a folder
            with suppress(FileNotFoundError):
                _remove(tree, path, folder=False)
            continue
        try:
            seen, gone, below = _look(tree, folder, path)
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
                _remove(tree, path, folder=True)
                removed += 1
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    continue  # the tenant keeps adding entries: the deadline ends the race
                raise
            stack.pop()
    return removed


def _look(tree: Root, folder: int, path: str) -> tuple[bool, int, list[str]]:
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


def _remove(tree: Root, path: str, *, folder: bool) -> None:
    above, _, name = path.rpartition("/")
    directory = tree.open_real(above, kernel.O_PATH | os.O_DIRECTORY)
    try:
        if folder:
            os.rmdir(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)
