"""Removes unfinished files that a killed process left behind. Runs in a worker.

Writes and edits are renamed into place within a millisecond of being made, uploads too where the kernel lets
a file be without a name until then. What a SIGKILL catches in between stays under a name that only we give.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress
from typing import Any

import orjson

from gateway.rootfs import kernel
from gateway.rootfs.operation import Operation, Workspace
from gateway.rootfs.paths import unfinished
from gateway.rootfs.walk import Walk

_FOLDER = kernel.O_PATH | os.O_DIRECTORY


class _Unfinished:
    """Chooses what has a name of ours, in every folder."""

    def question(self, state: Any) -> Hashable:
        return "unfinished"

    def enter(self, path: str, hidden: Collection[str], state: Any) -> None:
        return None

    def folder(self, path: str, state: Any) -> bool:
        return True

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        return [name for name in names if unfinished(name)]


def _sweep(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Remove unfinished files that were last touched before the time `before`; return how many.

    A tenant may have put anything under such a name: it loses what it put there, and nothing else is reached.
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
