"""An install that thrashes is told while it does, and named as what it was where its time runs out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.deployments import phases
from gateway.deployments.context import Context
from gateway.deployments.record import DeploymentEvents
from gateway.errors import ExecFailed
from gateway.runtime.sites import Recipe, Say, Side

MiB = 1 << 20
RECIPE = Recipe(b"", ("x",), 3000, install=("npm", "run", "build"))


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.some = asyncio.Event()

    def say(self, phase: str) -> Callable[[str], None]:
        def one(line: str) -> None:
            self.lines.append(line)
            self.some.set()

        return one

    def flush(self, phase: str = "install") -> None:
        pass


async def installed(seconds: float, error: ExecFailed | None, log: Log, *, killed: bool = False) -> None:
    """Install in a tenant that is short of memory; it ends once that was said, or at once with 0 seconds."""

    async def run(tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        if seconds:
            await log.some.wait()
        if error is not None:
            raise error

    sites: Any = SimpleNamespace(install=run)

    async def has_killed(tenant: str, since: float) -> bool:
        return killed

    pressure = SimpleNamespace(seconds=lambda tenant: seconds, has_killed=has_killed)
    context = cast(Context, SimpleNamespace(sites=sites, pressure=pressure))
    async with asyncio.timeout(60):
        await phases.install(context, "shop", "live", RECIPE, 512 * MiB, cast(DeploymentEvents, log))


def late() -> ExecFailed:
    return ExecFailed("the install command did not end within 600 s", reason="install_failed")


async def test_one_that_thrashes_until_its_time_runs_out_names_the_size_that_does() -> None:
    log = Log()
    with pytest.raises(ExecFailed) as caught:
        await installed(10.0, late(), log)
    assert log.lines == [
        "the tenant is short of memory, so this may take very long: the size medium has 1024 MiB: deploy "
        "with --size medium, or resize an existing tenant with `incus-gateway resize TENANT medium`"
    ]
    assert caught.value.message.startswith(
        "`npm run build` needs more memory than the tenant has (512 MiB): the size medium has 1024 MiB"
    )
    assert caught.value.message.endswith("the install command did not end within 600 s")
    assert caught.value.facts["cause"] == "memory"


async def test_one_that_is_slow_or_fails_by_itself_is_not_taken_for_that() -> None:
    with pytest.raises(ExecFailed) as caught:
        await installed(0.0, late(), Log())
    assert caught.value.message == "the install command did not end within 600 s"
    with pytest.raises(ExecFailed) as caught:
        await installed(10.0, ExecFailed("it ended with 1", reason="install_failed", exit_code=1), Log())
    assert caught.value.message == "it ended with 1"
    await installed(10.0, None, Log())


async def test_one_that_is_killed_lacked_memory_if_the_kernel_says_so() -> None:
    def sigkill() -> ExecFailed:
        return ExecFailed("it ended with 137", reason="install_failed", exit_code=137, cause="killed")

    for killed, why in (
        (True, "needs more memory than"),
        (False, "was killed (SIGKILL), and the kernel reports"),
    ):
        with pytest.raises(ExecFailed, match=re.escape(f"`npm run build` {why}")):
            await installed(0.0, sigkill(), Log(), killed=killed)
