"""Run the gateway's shell scripts in a tenant. The scripts are beside the code that uses them.

They run inside the container, so whatever a site puts in their way can harm only its own tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.errors import GatewayError
from gateway.runtime import ExecSpec, Process
from gateway.runtime.sites import lines

_PIECE: Final = 1 << 18  # bytes of input written at once

Exec = Callable[[str, ExecSpec], Awaitable[Process]]
"""Starts a command in a tenant, like `gateway.runtime.Commands.exec`."""


@dataclass(frozen=True, slots=True)
class ScriptResult:
    """A script's exit code, and the end of its output."""

    code: int
    said: str


async def run(
    exec_: Exec, tenant: str, argv: Sequence[str], *, given: bytes = b"", seconds: float, printed: int
) -> ScriptResult:
    """Run a command as the tenant's root with the input `given`; on failure kill its whole tree.

    Raises `TimeoutError` after `seconds`, and `ExecFailed` if it does not start or prints more than `printed`
    bytes.
    """
    spec = ExecSpec(tuple(argv), cwd="/", user="root", stdin=True, merged=True)
    process = await exec_(tenant, spec)
    try:
        async with asyncio.timeout(seconds):
            feeding = asyncio.create_task(_feed(process, given))
            try:
                said = await lines(process, None, 0, printed)
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            exit_ = await process.wait()
    except BaseException:
        with contextlib.suppress(GatewayError, TimeoutError):
            await asyncio.shield(process.kill(0))
        raise
    finally:
        await process.aclose()
    return ScriptResult(exit_.code, said)


async def _feed(process: Process, data: bytes) -> None:
    view = memoryview(data)
    for start in range(0, len(view), _PIECE):
        await process.write(bytes(view[start : start + _PIECE]))
    await process.close_stdin()
