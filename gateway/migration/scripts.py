"""Runs the scripts of a migration in its tenant, where what a site left in the way can harm only that."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from gateway.errors import ExecFailed, Unavailable
from gateway.runtime import ExecSpec, TenantRuntime
from gateway.runtime.sites import disk_was_full, lines

_PRINTED: Final = 1 << 20  # bytes that a script of ours may print
_HERE: Final = Path(__file__).parent


async def inside(
    runtime: TenantRuntime, tenant: str, script: str, *words: str, seconds: float, given: bytes = b""
) -> str:
    """Run the script of that name as the container's root; return the end of what it printed.

    Raises `ExecFailed`, `Unavailable` where the disk is full, `TimeoutError` after `seconds`.
    """
    text = _HERE.joinpath(f"{script}.sh").read_text()
    argv = ("/bin/sh", "-c", text, script, *words)
    process = await runtime.exec(tenant, ExecSpec(argv, cwd="/", user="root", stdin=True, merged=True))
    try:
        async with asyncio.timeout(seconds):
            if given:
                await process.write(given)
            await process.close_stdin()
            said = await lines(process, None, 0, _PRINTED)
            exit_ = await process.wait()
    except BaseException:
        with contextlib.suppress(Exception):
            await asyncio.shield(process.kill(0))
        raise
    finally:
        await process.aclose()
    if exit_.code == 0:
        return said.strip()
    if disk_was_full(said):
        raise Unavailable(
            "the tenant's disk is full; go back (--back) and choose a larger --size, or leave paths out "
            "(--leave)",
            reason="disk_full",
        )
    raise ExecFailed(
        f"{script} failed in {tenant}: {said.strip()[-800:] or exit_.code}", reason="script_failed"
    )
