"""Bash, BashOutput and KillShell over the `local` runtime: recorded cases, and the contract."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.limits.budget import Budget
from gateway.shells.shell_command import Unread
from tests.contracts import claude
from tests.contracts.gateway import no_traceback
from tests.contracts.shells import QUICK, ShellContract
from tests.live import LiveGateway, local_gateway

TENANTS = [f"case-{number}" for number in range(12)]  # run at the same time: most of their time is waiting


@pytest.fixture(scope="module")
def tenant() -> str:
    return "demo"


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), tenant, *TENANTS)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


@pytest.fixture(scope="module")
async def quick(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("quick"), tenant, **QUICK)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


@pytest.fixture
async def disposable(tmp_path: Path, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path, tenant)
    await gateway.start()
    yield gateway
    assert gateway.process is not None
    if gateway.process.returncode is None:
        gateway.process.kill()
        await gateway.process.wait()


@pytest.fixture(scope="module")
async def outcomes(gateway: LiveGateway) -> Mapping[str, claude.Outcome | Exception]:
    state = gateway.environment["GATEWAY_STATE_DIR"]

    def shown(tenant: str, text: str) -> str:
        return text.replace(f"{state}/tenants/{tenant}/root", "")

    return await claude.outcomes(gateway, TENANTS, shown)


@pytest.mark.parametrize("case", claude.BASH_CASES, ids=[case["id"] for case in claude.BASH_CASES])
def test_case(case: Mapping[str, Any], outcomes: Mapping[str, claude.Outcome | Exception]) -> None:
    """The answer, and the files after it, are those that Claude Code's own tool gave."""
    claude.check(case, outcomes[case["id"]])


class TestLocal(ShellContract):
    pass


def test_output_that_nobody_asked_for_is_in_the_tenants_share() -> None:
    """Hundreds of commands that ended unread keep a little each where it is full, and it goes with them."""
    share = Budget(1 << 30, 1 << 20).tenant("demo")
    kept = [Unread(share) for _ in range(300)]
    for one in kept:
        for number in range(50):
            one.add(b"line\n" * 1000, 5000 * number)
    assert share.held <= (1 << 20) + 300 * 2 * (8 << 10)
    text, _, lost = kept[-1].look(final=True, lines=False)
    assert text.endswith("line\n") and lost == 250_000 - len(text)
    kept.clear()
    del one
    gc.collect()
    assert share.held == 0
