"""The public contract of a tenant that is another member's: two gateways of the `local` runtime."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.clusters import Relayed, relayed
from tests.contracts.files import FilesContract
from tests.contracts.gateway import AGENT, QUICK, GatewayContract, no_traceback
from tests.contracts.idempotency import ReceiptsContract
from tests.contracts.input import InputContract
from tests.contracts.mcp import McpContract
from tests.contracts.pace import PaceContract
from tests.contracts.tokens import TokensContract
from tests.live import LiveGateway
from tests.unit import test_gateway_local as local


@pytest.fixture(scope="module")
def tenant() -> str:
    return "demo"


@contextlib.asynccontextmanager
async def running(folder: Path, tenant: str, **environment: str) -> AsyncIterator[Relayed]:
    gateway = await relayed(folder, tenant, **environment)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    assert await gateway.entry.stop() == 0
    await no_traceback(gateway)
    await no_traceback(gateway.entry)


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    async with running(tmp_path_factory.mktemp("state"), tenant, **AGENT) as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def quick(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    async with running(tmp_path_factory.mktemp("quick"), tenant, **QUICK) as gateway:
        yield gateway


@pytest.fixture
async def disposable(tmp_path: Path, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await relayed(tmp_path, tenant)
    await gateway.start()
    yield gateway
    assert gateway.home.process is not None
    if gateway.home.process.returncode is None:
        gateway.home.process.kill()
        await gateway.home.process.wait()
    assert await gateway.entry.stop() == 0


class TestRelayed(GatewayContract):
    pass


class TestRelayedInput(InputContract):
    pass


class TestRelayedPace(PaceContract):
    pass


class TestRelayedMcp(McpContract):
    pass


class TestRelayedTokens(TokensContract):
    pass


class TestRelayedReceipts(ReceiptsContract):
    pass


class TestRelayedFiles(FilesContract):
    as_root = local.TestLocalFiles.as_root
