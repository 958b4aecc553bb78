"""History by turns over the `local` runtime."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests.contracts.gateway import no_traceback
from tests.contracts.history import QUICK, HistoryContract, write
from tests.contracts.processes import mark
from tests.live import LiveGateway, RpcFailure, local_gateway
from tests.waits import until


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


async def test_a_git_that_hangs_counts_as_a_command_and_ends_with_its_client(tmp_path: Path) -> None:
    """However many ask at once, and another tenant's history is there meanwhile."""
    gateway = await local_gateway(tmp_path, "demo", "other", **QUICK, GATEWAY_MAX_EXECS="3")
    await gateway.start()
    try:
        for tenant in ("demo", "other"):
            async with gateway.wire(tenant) as wire:
                await write(wire, "a", "x\n")
                await wire.call("turn/end")
        place = next((tmp_path / "tenants/demo").rglob("history.git"))
        (place / "config").unlink()
        os.mkfifo(place / "config")

        def hanging() -> int:
            return sum(place.as_posix().encode() in environment for environment in environments())

        async with gateway.http("demo", "other") as http:
            asked = [asyncio.create_task(http.get("/v1/tenants/demo/history")) for _ in range(12)]
            await until(lambda: sum(task.done() for task in asked) == 9)
            assert [task.result().status for task in asked if task.done()] == [429] * 9
            await until(hanging)
            async with http.get("/v1/tenants/other/history") as answer:
                assert answer.status == 200 and (await answer.json())["turns"]
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: not hanging())
    finally:
        assert await gateway.stop() == 0
    await no_traceback(gateway)


def environments() -> Iterator[bytes]:
    """Yield the environment of each process that we may look at."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield file.read_bytes()


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
