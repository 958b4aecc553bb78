"""Knows a tool session: how long it lives, its working directory, which files it has seen in which state."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Literal

from gateway.tools.answer import Seen


class ToolSession:
    """What the calls of one agent share.

    `cwd` is absolute as the tenant sees it; None is the workspace. With `read_before_write` a file that is
    there must have been read before it is changed. At most `maximum` files are remembered: the one that was
    used longest ago is forgotten first and counts as not read. `last_used` is in seconds of `time.monotonic`.
    `life` says what the session ends with: this one call, its connection, or, where it has a name, disuse;
    `ended` that it has. `holders` counts the connections that are open on one with a name: it is in use.
    """

    def __init__(
        self,
        *,
        life: Literal["call", "connection", "named"] = "call",
        read_before_write: bool = False,
        cwd: str | None = None,
        maximum: int = 2000,
    ) -> None:
        self.life = life
        self.ended = False
        self.holders = 0
        self.cwd = cwd
        self.read_before_write = read_before_write
        self.last_used = time.monotonic()
        self._maximum = maximum
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    def seen(self, path: str) -> Seen | None:
        found = self._seen.get(path)
        if found is not None:
            self._seen.move_to_end(path)
        return found

    def remember(self, path: str, seen: Seen) -> None:
        """Note the state of a file as it was seen last."""
        self._seen[path] = seen
        self._seen.move_to_end(path)
        while len(self._seen) > self._maximum:
            self._seen.popitem(last=False)
