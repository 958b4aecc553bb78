"""Runs a site's install command, and reports if lack of memory holds it up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from gateway.deployments.causes import install_failed, more_memory
from gateway.deployments.context import Context
from gateway.deployments.progress import Progress
from gateway.errors import ExecFailed
from gateway.limits.pressure import Pressure
from gateway.runtime.sites import Recipe, Side

_SHORT: Final = 10.0  # seconds of pressure without a break, from which on it is told
_LOOK: Final = 2.0


async def install(
    context: Context, tenant: str, side: Side, recipe: Recipe, memory: int, progress: Progress
) -> None:
    """Install a site in a tenant with so many bytes of `memory`; 0 if unknown.

    Raises `ExecFailed`, with the cause and the next step where they are known.
    """
    say, pressure, began = progress.say("install"), context.pressure, time.monotonic()
    watching = asyncio.create_task(_tell_shortage(pressure, tenant, memory, say))
    try:
        await context.sites.install(tenant, side, recipe, say)
    except ExecFailed as error:
        # at its limit a tenant reads its programs back from the disk again and again: nothing is killed
        if pressure is not None:
            slow = watching.done() and "exit_code" not in error.facts
            if slow or (error.facts.get("cause") == "killed" and await pressure.has_killed(tenant, began)):
                error.facts["cause"] = "memory"
        raise install_failed(error, recipe.install, memory) from error
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    progress.flush()


async def _tell_shortage(
    pressure: Pressure | None, tenant: str, memory: int, say: Callable[[str], None]
) -> None:
    """Say in the install log that the tenant is short of memory; return once that is said."""
    if pressure is None:
        return
    while pressure.seconds(tenant) < _SHORT:  # noqa: ASYNC110 - memory is looked at every few seconds too
        await asyncio.sleep(_LOOK)
    say(f"the tenant is short of memory, so this may take very long: {more_memory(memory)}")
