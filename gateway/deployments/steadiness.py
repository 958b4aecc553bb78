"""Check that a service that answered keeps running undisturbed."""

from __future__ import annotations

import time
from typing import Final

from gateway.runtime.sites import Life, Service, Side, SiteServices

SMALL: Final = "give it a larger `size`, or reduce what it needs"
_BUSY: Final = 0.3  # share of time above which a service is still at work, as a compiler beside its server
_SPAN: Final = 0.5  # seconds over which that share is taken at least
_KILLED: Final = f"the kernel killed one of its processes because memory ran out: {SMALL}"


class Steadiness:
    """The checks of one side of a tenant's site since it `answered`, by `time.monotonic()`.

    The service is queried inside the container only if the host does not see the same life of it as before.
    """

    def __init__(self, services: SiteServices, tenant: str, side: Side, answered: float) -> None:
        self._services, self._of, self._answered = services, (tenant, side), answered
        self._life: Life | None = None
        self._before: Service | None = None
        self._ended = False
        self._worked: tuple[float, float] | None = None  # seconds, and when
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether the service was at work between the last two checks: it may be about to restart itself."""
        return self._busy

    @property
    def doubtful(self) -> bool:
        """Whether the last check found the service ended, which the next one must confirm."""
        return self._ended

    async def begin(self) -> None:
        """Note the state that is to last."""
        found = await self._services.life(*self._of)
        if found is not None and found.started <= self._answered:
            self._life = found
            self._measure(found.worked)
        else:
            self._before = await self._services.state(*self._of)

    async def failure(self) -> str:
        """Return what went wrong with the service; empty if nothing did."""
        now = await self._services.life(*self._of)
        if self._life is not None and now is not None and now.first == self._life.first:
            self._ended = False
            self._measure(now.worked)
            return _KILLED if now.oom_kills > self._life.oom_kills else ""
        service = await self._services.state(*self._of)
        why = unsteady(self._before, service, self._answered)
        # once only, and it may just be restarting on purpose
        had, self._ended = self._ended, service is not None and service.state == "ended"
        return why or ("its service ended" if had and self._ended else "")

    def _measure(self, worked: float) -> None:
        now = time.monotonic()
        if self._worked is not None:
            before, at = self._worked
            if now - at < _SPAN:
                return
            self._busy = worked - before > _BUSY * (now - at)
        self._worked = worked, now


def unsteady(before: Service | None, now: Service | None, answered: float) -> str:
    """Return what went wrong with a service since it answered; empty if nothing did.

    A restart on purpose resets systemd's count.
    """
    if now is None:
        return ""
    if now.restarts and now.started > answered:
        times = "" if now.restarts == 1 else f", {now.restarts} times in total"
        return f"its service ended and was restarted{times}"
    if before is not None and before.started == now.started and now.oom_kills > before.oom_kills:
        return _KILLED
    return ""
