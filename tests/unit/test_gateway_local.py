"""The public contract over the `local` runtime: a live gateway, plain processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests.contracts.files import FilesContract
from tests.contracts.gateway import QUICK, GatewayContract, no_traceback
from tests.contracts.mcp import McpContract
from tests.live import LiveGateway


@pytest.fixture(scope="module")
def tenant() -> str:
    return "demo"


@pytest.fixture(scope="module")
async def state(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> Path:
    folder = tmp_path_factory.mktemp("state")
    async with LocalRuntime(Settings(runtime="local", state_dir=folder)) as runtime:
        await runtime.create(tenant)
    return folder


def local(state: Path, log: Path, **environment: str) -> LiveGateway:
    return LiveGateway({"GATEWAY_RUNTIME": "local", "GATEWAY_STATE_DIR": str(state), **environment}, log)


@pytest.fixture(scope="module")
async def gateway(state: Path) -> AsyncIterator[LiveGateway]:
    gateway = local(state, state / "gateway.log")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


@pytest.fixture(scope="module")
async def quick(state: Path) -> AsyncIterator[LiveGateway]:
    gateway = local(state, state / "quick.log", **QUICK)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    await no_traceback(gateway)


@pytest.fixture
async def disposable(state: Path) -> AsyncIterator[LiveGateway]:
    gateway = local(state, state / "disposable.log")
    await gateway.start()
    yield gateway
    assert gateway.process is not None
    if gateway.process.returncode is None:
        gateway.process.kill()
        await gateway.process.wait()


class TestLocal(GatewayContract):
    pass


class TestLocalMcp(McpContract):
    pass


class TestLocalFiles(FilesContract):
    async def as_root(self, gateway: LiveGateway, tenant: str, script: str) -> None:
        root = f"{gateway.environment['GATEWAY_STATE_DIR']}/tenants/{tenant}/root"
        process = await asyncio.create_subprocess_exec("sh", "-c", script.replace("/srv", f"{root}/srv"))
        assert await process.wait() == 0


async def test_a_port_in_use_is_told_with_what_to_change(gateway: LiveGateway, state: Path) -> None:
    second = local(state, state / "second.log")
    second.environment["GATEWAY_LISTEN"] = f"127.0.0.1:{gateway.port}"
    process = await asyncio.create_subprocess_exec(
        *("incus-gateway", "serve"), env=second.environment, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"in use" in said and b"GATEWAY_LISTEN" in said and b"Traceback" not in said


async def test_without_the_extra_a_gateway_says_what_to_install(state: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mcp'] = None\n")
    gateway = local(state, tmp_path / "log", PYTHONPATH=str(tmp_path))
    await gateway.start()
    try:
        async with gateway.http("demo") as http, http.post("/v1/tenants/demo/mcp", json={}) as response:
            problem = await response.json()
            assert (response.status, problem["code"]) == (501, "not_found")
            assert "install incus-gateway[mcp]" in problem["detail"]
    finally:
        assert await gateway.stop() == 0
