"""History by turns in real containers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.settings import Settings
from tests.contracts.history import QUICK, HistoryContract
from tests.integration.conftest import MakeTenant
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, tmp_path_factory.mktemp("gateway") / "gateway.log", **QUICK) as gateway:
        yield gateway


class TestIncusHistory(HistoryContract):
    @pytest.fixture
    async def tenant(self, make_tenant: MakeTenant) -> str:
        return (await make_tenant()).name
