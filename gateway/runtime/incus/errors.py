"""Translate incusd's errors and timeouts into the gateway's errors."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Final

from gateway.errors import Conflict, NotFound, RateLimited, TenantNotRunning, Timeout, Unavailable
from gateway.incus import Elsewhere, IncusError, NoQuorum
from gateway.incus.members import NO_QUORUM
from gateway.runtime import OnAnotherServer

DISK_FULL: Final = "the tenant's disk is full; make room on it, or give the tenant a larger size"
POOL_FULL: Final = "the storage pool is full; enlarge it, or make room in it"
_POOL_AWAY: Final = "the storage pool is unavailable; see `incus storage list`, and check its disk"
_NETWORK_AWAY: Final = (
    "the tenants' network is down in Incus; if Incus has just started, try again in a minute; otherwise see "
    "`incus network list` and incusd's log"
)
_TAKEN: Final = (
    "a proxy device of the instance listens on a port that is taken; free it, or change the device"
)

_RETRY_AFTER: Final = 2  # seconds

# pattern of incusd's message in lower case -> reason, and what to do
_CAUSES: Final = {
    "no space left": ("disk_full", POOL_FULL),
    "quota exceeded": ("disk_full", DISK_FULL),
    "storage pool not found": ("no_pool", "the storage pool is missing; run incus-gateway setup"),
    # its disk is missing, or the folder or file that backs it
    'storage pool (is|"[^"]*") unavailable': ("no_pool", _POOL_AWAY),
    "failed to create mount directory": ("no_pool", _POOL_AWAY),
    "requested profile": ("no_pool", "the tenants' profile is missing; run incus-gateway setup"),
    "profile not found": ("no_pool", "the tenants' profile is missing; run incus-gateway setup"),
    # incusd could not bring it up when it started, and retries every minute
    'network "[^"]*" unavailable': ("no_network", _NETWORK_AWAY),
    # the bridge was removed while incusd was running
    'parent device "[^"]*" doesn\'t exist': ("no_network", _NETWORK_AWAY),
    "image not provided": ("no_image", "the base image is missing; run incus-gateway image build"),
    "image not found": ("no_image", "the base image is missing; run incus-gateway image build"),
    "image couldn't be found": ("no_image", "the base image is missing; run incus-gateway image build"),
    "image alias not found": ("no_image", "the base image is missing; run incus-gateway image build"),
    "reached maximum number of": (
        "quota",
        "a limit of the Incus project is reached; raise it",
    ),
    "already defined on another nic": (
        "address_shared",
        "another instance has the same address, so Incus starts neither; the operator must give one of them "
        "another address: `incus-gateway doctor` says how",
    ),
    "address already in use": ("port_taken", _TAKEN),
    "starting proxy device": ("port_taken", _TAKEN),
}

# all others are `Unavailable`: a retry succeeds once the cause is fixed
_KINDS: Final = {"quota": RateLimited, "address_shared": Conflict}

log = logging.getLogger(__name__)


@contextlib.contextmanager
def translated(name: str) -> Iterator[None]:
    """Translate incusd's errors, whose messages may name host paths, and log the originals."""
    try:
        yield
    except Elsewhere as error:
        # not `NotFound`, upon which the records of a tenant are forgotten
        raise OnAnotherServer(name, error.location) from error
    except IncusError as error:
        said = error.message
        lowered = said.lower()
        if isinstance(error, NoQuorum):
            raise Unavailable(
                f"Incus cannot decide anything now: {said}; running sites and commands keep running",
                reason=NO_QUORUM,
                retry_after=_RETRY_AFTER,
            ) from error
        if error.status == 0:
            raise Unavailable(
                f"cannot reach Incus; is incusd running? ({said})", reason="incus_down"
            ) from error
        for pattern, (reason, advice) in _CAUSES.items():
            if re.search(pattern, lowered):
                log.warning("Incus on tenant %s: %s", name, said)
                raise _KINDS.get(reason, Unavailable)(advice, reason=reason) from error
        if "not running" in lowered or "is frozen" in lowered or "is stopped" in lowered:
            state = "frozen" if "frozen" in lowered else "stopped"
            raise TenantNotRunning(f"tenant {name} is {state}; start it first", status=state) from error
        if error.status == 404:
            what = f"no tenant {name}" if name else "the object does not exist in Incus"
            raise NotFound(what) from error
        if error.status == 409 or "already exists" in lowered or "unique constraint" in lowered:
            raise Conflict(f"tenant {name} already exists, or another change is under way") from error
        if error.status == 408:
            raise Timeout(f"an operation of Incus on tenant {name} timed out") from error
        log.warning("Incus on tenant %s: %s", name, said)
        if "retrieve pid" in lowered or "resource temporarily unavailable" in lowered:
            raise Unavailable(
                f"tenant {name} cannot start a process: its process limit is reached"
            ) from error
        raise Unavailable(f"an operation of Incus on tenant {name} failed; see the gateway's log") from error


@contextlib.contextmanager
def in_time(name: str, stage: str) -> Iterator[None]:
    """Translate a timeout during a start, and log what was waited for."""
    try:
        yield
    except TimeoutError as error:
        log.warning("a command of %s did not start in time: waiting for the %s", name, stage)
        raise Timeout("the command did not start in time; the tenant may be overloaded") from error
