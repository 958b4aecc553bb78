"""History by turns over the `local` runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests.contracts.gateway import no_traceback
from tests.contracts.history import QUICK, HistoryContract, write
from tests.contracts.processes import mark
from tests.live import LiveGateway, RpcFailure, local_gateway


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), **QUICK)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


@pytest.fixture
async def tenant(gateway: LiveGateway) -> str:
    name = f"t-{mark()}"
    folder = Path(gateway.environment["GATEWAY_STATE_DIR"])
    async with LocalRuntime(Settings(runtime="local", state_dir=folder)) as runtime:
        await runtime.tenants.create(name)
    return name


class TestLocalHistory(HistoryContract):
    async def place(self, gateway: LiveGateway, tenant: str) -> str:
        root = Path(gateway.environment["GATEWAY_STATE_DIR"]) / "tenants" / tenant / "root"
        return f"{root}{await super().place(gateway, tenant)}"


async def test_one_setting_turns_it_off(tmp_path: Path) -> None:
    """Tools work, nothing is kept, and who asks is told why."""
    gateway = await local_gateway(tmp_path, "demo", GATEWAY_HISTORY="false")
    await gateway.start()
    async with gateway.wire("demo") as wire:
        await write(wire, "a", "x\n")
        for method in ("turn/begin", "turn/end", "history/list"):
            with pytest.raises(RpcFailure) as caught:
                await wire.call(method)
            assert (caught.value.code, caught.value.data["reason"]) == ("not_found", "off")
    assert await gateway.stop() == 0
    assert not list((tmp_path / "tenants").rglob("history.git"))
