"""Ask a tenant's worker which files of a live site an update removes, and which it keeps."""

from __future__ import annotations

from typing import Any

from gateway.deployments.context import Context
from gateway.tools.mirroring import KEPT, LOST


async def lost(context: Context, tenant: str, stays: dict[str, Any]) -> bytes:
    """Return the files of the live site that are not in the new folder, each followed by a NUL.

    `stays` is `Template.stays()` of that folder.
    """
    if context.workers is None:
        return b""
    root = await context.runtime.filesystem(tenant)
    return await context.workers.call(root, LOST, stays, search=True)


async def kept(context: Context, tenant: str, stays: dict[str, Any]) -> bytes:
    """Return the existing files of the live site that an update keeps, each followed by a NUL."""
    if context.workers is None or not stays["keep"]:
        return b""
    root = await context.runtime.filesystem(tenant)
    return await context.workers.call(root, KEPT, stays, search=True)
