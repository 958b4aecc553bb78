"""Moves a site from a folder of the host into a tenant, in steps that can be undone.

Run by the operator as root on the host. Other packages use `run` and `plan` and their values.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator

from gateway.caddy import Caddy
from gateway.errors import Conflict
from gateway.host import HostError, Report
from gateway.hostnames import normalized, tenant_name
from gateway.migration.plan import MigrationPlan, Wanted
from gateway.migration.source import Systemctl, Units
from gateway.migration.steps import STEPS, Migration
from gateway.rootfs.shown_folders import PLACES
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.settings import Settings

__all__ = ["STEPS", "Migration", "MigrationPlan", "Wanted", "opened"]


@contextlib.asynccontextmanager
async def opened(
    settings: Settings, domain: str, say: Report, units: Units | None = None
) -> AsyncIterator[Migration]:
    """Open the migration of a domain, and keep other processes from running it meanwhile.

    Raises `HostError` without root or Incus, `Conflict` if another run of it is under way.
    """
    if os.geteuid() != 0:
        raise HostError("a migration needs root: it stops services and mounts folders")
    if settings.runtime != "incus":
        raise HostError("the local runtime has no containers to move a site into")
    PLACES.mkdir(mode=0o711, parents=True, exist_ok=True)
    with (PLACES / f".{tenant_name(normalized(domain))}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(f"another migration of {domain} is running; wait for it") from None
        async with IncusRuntime(settings) as runtime, Caddy(settings) as caddy:
            # not entered as a context, which would remove what the gateway keeps ready
            sites = IncusSites(settings, runtime)
            yield Migration(settings, runtime, sites, caddy, units or Systemctl(), say)
