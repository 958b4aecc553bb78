"""Run the scripts of a migration in its tenant."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gateway.errors import ExecFailed, Unavailable
from gateway.runtime import Commands, scripts
from gateway.runtime.sites import disk_was_full

_PRINTED: Final = 1 << 20  # bytes that one of our scripts may print
_HERE: Final = Path(__file__).parent


async def inside(
    commands: Commands, tenant: str, script: str, *words: str, seconds: float, given: bytes = b""
) -> str:
    """Run a script of this package as the container's root; return the end of its output.

    Raises `ExecFailed`, `Unavailable` if the disk is full, `TimeoutError` after `seconds`.
    """
    argv = ("/bin/sh", "-c", _HERE.joinpath(f"{script}.sh").read_text(), script, *words)
    ended = await scripts.run(commands.exec, tenant, argv, given=given, seconds=seconds, printed=_PRINTED)
    if ended.code == 0:
        return ended.said.strip()
    if disk_was_full(ended.said):
        raise Unavailable(
            "the tenant's disk is full; go back (--back) and choose a larger --size, or leave paths out "
            "(--leave)",
            reason="disk_full",
        )
    raise ExecFailed(
        f"{script} failed in {tenant}: {ended.said.strip()[-800:] or ended.code}", reason="script_failed"
    )
