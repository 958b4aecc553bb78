"""Ask a tenant's worker which files of a live site an update removes, and which it keeps."""

from __future__ import annotations

from typing import Any

from gateway.deployments.context import Context
from gateway.tools.mirroring import KEPT, LOST


async def lost(context: Context, tenant: str, stays: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
    """Return the paths of the live site that an update removes, and those that no deployed folder had.

    `stays` is `Template.stays()` of the new folder.
    """
    if context.workers is None:
        return [], []
    root = await context.runtime.filesystem(tenant)
    found = (await context.workers.call(root, LOST, stays, search=True)).split(b"\0")[:-1]
    removed, written = ([name[1:] for name in found if name.startswith(sign)] for sign in (b"-", b"+"))
    return removed, written


async def kept(context: Context, tenant: str, stays: dict[str, Any]) -> bytes:
    """Return the existing files of the live site that an update keeps, each followed by a NUL.

    Those that the manifest does not name begin with "./".
    """
    if context.workers is None or (stays.get("clean", True) and not stays["keep"]):
        return b""
    root = await context.runtime.filesystem(tenant)
    return await context.workers.call(root, KEPT, stays, search=True)
