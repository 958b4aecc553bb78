"""Remove unfinished files left by killed processes. Runs in a worker.

Writes and edits are renamed into place within a millisecond of their creation, and so are uploads if the
kernel supports unnamed files. A file caught in between by SIGKILL stays under a name that only the gateway
uses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress
from typing import Any

import orjson

from gateway.rootfs import kernel
from gateway.rootfs.paths import unfinished
from gateway.rootfs.walk import Walk
from gateway.rootfs.worker import Operation, Workspace

_FOLDER = kernel.O_PATH | os.O_DIRECTORY


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
    """Remove unfinished files last changed before the epoch time `before`; return how many.

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
            directory = tree.open_real(folder, _FOLDER)
            try:
                os.unlink(name, dir_fd=directory)
                removed += 1
            finally:
                os.close(directory)
    return orjson.dumps({"removed": removed, "visited": walk.visited, "truncated": walk.truncated})


OPERATIONS: dict[str, Operation] = {"files/sweep": _sweep}
