"""Turn what incusd refuses, and what it does not do in time, into our errors."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Final

from gateway.errors import Conflict, NotFound, RateLimited, TenantNotRunning, Timeout, Unavailable
from gateway.incus import IncusError

DISK_FULL: Final = "the tenant's disk is full; give it a larger one, or make room on it"
POOL_FULL: Final = "the storage pool is full; enlarge it, or make room in it"
_POOL_AWAY: Final = "the storage pool cannot be used; see `incus storage list` and what its disk says"
_NETWORK_AWAY: Final = (
    "the tenants' network is down in Incus; if Incus has just started, ask again in a minute; otherwise see "
    "`incus network list` and incusd's log"
)
_TAKEN: Final = "no port could be had for the site; set GATEWAY_EXPOSE_PORTS to ports that nobody else uses"

# a pattern of what incusd says, in lower case: which reason that is, and what to do
_CAUSES: Final = {
    "no space left": ("disk_full", POOL_FULL),
    "quota exceeded": ("disk_full", DISK_FULL),
    "storage pool not found": ("no_pool", "the storage pool is missing; run incus-gateway setup"),
    # its disk is away, or the folder or file that it is made of
    'storage pool (is|"[^"]*") unavailable': ("no_pool", _POOL_AWAY),
    "failed to create mount directory": ("no_pool", _POOL_AWAY),
    "requested profile": ("no_pool", "the tenants' profile is missing; run incus-gateway setup"),
    "profile not found": ("no_pool", "the tenants' profile is missing; run incus-gateway setup"),
    # incusd could not bring it up at its start, and tries again each minute
    'network "[^"]*" unavailable': ("no_network", _NETWORK_AWAY),
    # somebody removed the bridge while incusd runs
    'parent device "[^"]*" doesn\'t exist': ("no_network", _NETWORK_AWAY),
    "image not provided": ("no_image", "the base image is missing; run incus-gateway image build"),
    "image not found": ("no_image", "the base image is missing; run incus-gateway image build"),
    "image couldn't be found": ("no_image", "the base image is missing; run incus-gateway image build"),
    "image alias not found": ("no_image", "the base image is missing; run incus-gateway image build"),
    "reached maximum number of": (
        "quota",
        "the Incus project takes no more; raise its limits",
    ),
    "already defined on another nic": (
        "address_shared",
        "another instance has the address of this one too, so that Incus starts neither; whoever runs the "
        "gateway gives one of them another: `incus-gateway doctor` says how",
    ),
    "address already in use": ("port_taken", _TAKEN),
    "starting proxy device": ("port_taken", _TAKEN),
}

# of the others it is enough to ask again once the cause is mended
_KINDS: Final = {"quota": RateLimited, "address_shared": Conflict}

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
            raise Unavailable(
                f"Incus cannot be reached; is incusd running? ({said})", reason="incus_down"
            ) from error
        for pattern, (reason, advice) in _CAUSES.items():
            if re.search(pattern, lowered):
                log.warning("Incus on tenant %s: %s", name, said)
                raise _KINDS.get(reason, Unavailable)(advice, reason=reason) from error
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


@contextlib.contextmanager
def in_time(name: str, stage: str) -> Iterator[None]:
    """Turn a passed deadline of a start into our error; the log keeps what was waited for."""
    try:
        yield
    except TimeoutError as error:
        log.warning("a command of %s did not start in time: waited for the %s", name, stage)
        raise Timeout("the command did not start in time; the tenant may be overloaded") from error
