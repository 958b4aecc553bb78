"""Tell from where a site's service listens that it does not listen where it must."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from gateway.runtime.listening import ANYWHERE, ListeningSocket
from gateway.runtime.sites import Service

_GRACE: Final = 3.0  # seconds in which it may still begin to listen on the right port too
# Not for visitors: debuggers (Node, Bun, JVM), Vite's live reload beside a server, databases
_OWN: Final = frozenset(
    {9229, 9230, 6499, 5005, 24678, 1433, 3306, 5432, 5672, 6379, 9200, 11211, 27017, 2019, 53, 22}
)
_CHOSEN: Final = 32_768  # ephemeral ports, which programs use among themselves


class Misplaced:
    """Watches one service that does not answer yet.

    `usual` are the ports of its framework. What it finds may be a helper that starts before the site itself.
    """

    def __init__(self, port: int, addresses: Collection[str], usual: Collection[int] = ()) -> None:
        self._port, self._usual = port, frozenset(usual)
        self._right = ANYWHERE | frozenset(addresses)
        self._since: dict[ListeningSocket, float] = {}

    def look(self, service: Service, now: float) -> ListeningSocket | None:
        """Take what was found at `now`, a monotonic time; return where it has listened wrongly."""
        self._since = {one: self._since.get(one, now) for one in service.listens}
        if self.reached(service):
            return None
        return next((one for one in self.suspects(service) if now - self._since[one] >= _GRACE), None)

    def reached(self, service: Service) -> bool:
        """Return whether it listens where it must."""
        return any(one.port == self._port and one.address in self._right for one in service.listens)

    def suspects(self, service: Service) -> list[ListeningSocket]:
        """Return where it listens and might serve the site, most likely first."""
        sure = {self._port, *self._usual}
        found = [
            one
            for one in service.listens
            if one.port in sure or (one.port not in _OWN and one.port < _CHOSEN)
        ]
        return sorted(found, key=lambda one: (one.port != self._port, one.port not in self._usual, one))
