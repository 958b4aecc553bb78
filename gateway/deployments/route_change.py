"""The change of a domain's route by a deployment, and its undo."""

from __future__ import annotations

import contextlib

from gateway.caddy import Caddy


class RouteChange:
    """Routes a domain elsewhere. On failure `undo` restores the route that there was.

    Set `restored` if the former target has another address by then.
    """

    def __init__(self, caddy: Caddy, domain: str, undo: contextlib.AsyncExitStack) -> None:
        self._caddy, self._domain, self._undo = caddy, domain, undo
        self.restored: str | None = None
        self._target = ""

    def to(self, target: str) -> None:
        """Route the domain to a target, and register the undo."""
        self._target = target
        self._undo.callback(self.back, self._caddy.get(self._domain))
        self._caddy.set(self._domain, target)

    def back(self, before: str | None) -> None:
        """Restore a former route, None for none, unless somebody else has changed it since."""
        if self._caddy.get(self._domain) != self._target:
            return
        before = self.restored or before
        if before is None:
            self._caddy.unset(self._domain)
        else:
            self._caddy.set(self._domain, before)
