"""Knows incusd's ways to say no, and what they are in our words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from gateway.errors import Conflict, NotFound, TenantNotRunning, Timeout, Unavailable
from gateway.incus import IncusError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn incusd's words, which may name host paths, into ours; the log keeps them."""
    try:
        yield
    except IncusError as error:
        said = error.message
        lowered = said.lower()
        if error.status == 0:
            raise Unavailable(f"Incus cannot be reached; is incusd running? ({said})") from error
        if "not running" in lowered or "is frozen" in lowered or "is stopped" in lowered:
            state = "frozen" if "frozen" in lowered else "stopped"
            raise TenantNotRunning(f"tenant {name} is {state}; start it first", status=state) from error
        if error.status == 404:
            what = f"no tenant {name}" if name else "Incus has no such thing"
            raise NotFound(what) from error
        if error.status == 409 or "already exists" in lowered or "unique constraint" in lowered:
            raise Conflict(f"tenant {name} already exists, or is busy with another change") from error
        if error.status == 408:
            raise Timeout(f"Incus did not finish with tenant {name} in time") from error
        log.warning("Incus on tenant %s: %s", name, said)
        if "retrieve pid" in lowered or "resource temporarily unavailable" in lowered:
            raise Unavailable(
                f"tenant {name} cannot start a process: its process limit is reached"
            ) from error
        raise Unavailable(f"Incus failed with tenant {name}; the gateway's log says why") from error
