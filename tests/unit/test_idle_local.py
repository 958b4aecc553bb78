"""Tenants of the `local` runtime sleep and wake."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.constants import constants
from tests.contracts.gateway import no_traceback
from tests.contracts.idle import IdleContract
from tests.live import LiveGateway, local_gateway


@pytest.fixture(scope="module")
def tenants() -> tuple[str, ...]:
    return ("one", "two", "three")


@pytest.fixture(scope="module")
async def sleepy(
    tmp_path_factory: pytest.TempPathFactory, tenants: tuple[str, ...]
) -> AsyncIterator[LiveGateway]:
    quick = {"GATEWAY_IDLE_STOP": "0.5", **constants({"gateway.lifecycle.idle.LOOK_INTERVAL": 0.1})}
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), *tenants, **quick)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


class TestLocal(IdleContract):
    pass
