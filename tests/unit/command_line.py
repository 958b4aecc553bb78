"""A gateway with one tenant, and the command line as a person runs it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests import forks
from tests.contracts.gateway import no_traceback
from tests.live import LiveGateway


@contextlib.asynccontextmanager
async def served(state: Path, **settings: str) -> AsyncIterator[LiveGateway]:
    """Run a gateway with the runtime `local` and the tenant `demo`."""
    gateway = LiveGateway(
        {"GATEWAY_RUNTIME": "local", "GATEWAY_STATE_DIR": str(state), **settings}, state / "gateway.log"
    )
    await gateway.start()
    assert (await run(gateway, "create", "demo"))[0] == 0
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


async def start(
    gateway: LiveGateway,
    *words: str,
    stdin: int | None = None,
    stdout: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *words),
        env={**gateway.environment, "USER": "tester", **(environment or {})},
        stdin=pipe if stdin is None else stdin,
        stdout=pipe if stdout is None else stdout,
        stderr=pipe,
    )


async def run(gateway: LiveGateway, *words: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Return exit code, output and errors of a command line."""
    environment = {**gateway.environment, "USER": "tester"}
    async with asyncio.timeout(30):
        if forks.can_start(environment):
            code, out, err = await forks.run(*words, environment=environment, stdin=stdin)
        else:
            process = await start(gateway, *words)
            out, err = await process.communicate(stdin)
            assert process.returncode is not None
            code = process.returncode
    assert b"Traceback" not in err
    return code, out, err.decode()
