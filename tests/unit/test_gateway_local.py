"""The public contract over the `local` runtime: a live gateway, plain processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests.contracts.files import FilesContract
from tests.contracts.gateway import AGENT, QUICK, GatewayContract, no_traceback
from tests.contracts.idempotency import ReceiptsContract
from tests.contracts.input import InputContract
from tests.contracts.lifecycle import FULL, TIGHT, LifeContract
from tests.contracts.mcp import SESSIONLESS, McpContract, mcp, text
from tests.contracts.operator import OperatorContract
from tests.contracts.pace import PaceContract
from tests.contracts.processes import mark
from tests.live import LiveGateway, local_gateway


@pytest.fixture(scope="module")
def tenant() -> str:
    return "demo"


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), tenant, **AGENT)
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


@contextlib.asynccontextmanager
async def beside(gateway: LiveGateway, folder: Path, **environment: str) -> AsyncIterator[LiveGateway]:
    """Run another gateway of the same tenants."""
    other = await local_gateway(folder, **environment)
    (folder / "tenants").rmdir()
    (folder / "tenants").symlink_to(Path(gateway.environment["GATEWAY_STATE_DIR"]) / "tenants")
    await other.start()
    yield other
    assert await other.stop() == 0


@pytest.fixture
async def full(gateway: LiveGateway, tmp_path: Path) -> AsyncIterator[LiveGateway]:
    async with beside(gateway, tmp_path, **FULL) as full:
        yield full


@pytest.fixture
async def tight(gateway: LiveGateway, tmp_path: Path) -> AsyncIterator[LiveGateway]:
    async with beside(gateway, tmp_path, **TIGHT) as tight:
        yield tight


@pytest.fixture
async def disposable(tmp_path: Path, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path, tenant)
    await gateway.start()
    yield gateway
    assert gateway.process is not None
    if gateway.process.returncode is None:
        gateway.process.kill()
        await gateway.process.wait()


class TestLocal(GatewayContract):
    pass


class TestLocalInput(InputContract):
    pass


class TestLocalPace(PaceContract):
    pass


class TestLocalMcp(McpContract):
    pass


class TestLocalLife(LifeContract):
    sized = False

    @pytest.fixture
    async def fresh(self, gateway: LiveGateway) -> str:
        name = f"fresh-{mark()}"
        folder = Path(gateway.environment["GATEWAY_STATE_DIR"])
        async with LocalRuntime(Settings(runtime="local", state_dir=folder)) as runtime:
            await runtime.tenants.create(name)
        return name

    async def log(self, gateway: LiveGateway, tenant: str, line: str) -> None:
        with Path(gateway.environment["GATEWAY_STATE_DIR"], "tenants", tenant, "site.log").open("a") as log:
            log.write(f"{line}\n")

    async def followers(self, gateway: LiveGateway, tenant: str) -> int:
        found = await asyncio.create_subprocess_exec("pgrep", "-cf", f"/{tenant}/site.log", stdout=-1)
        return int((await found.communicate())[0])


class TestLocalOperator(OperatorContract):
    pass


class TestLocalReceipts(ReceiptsContract):
    pass


class TestLocalFiles(FilesContract):
    async def as_root(self, gateway: LiveGateway, tenant: str, script: str) -> None:
        root = f"{gateway.environment['GATEWAY_STATE_DIR']}/tenants/{tenant}/root"
        process = await asyncio.create_subprocess_exec("sh", "-c", script.replace("/srv", f"{root}/srv"))
        assert await process.wait() == 0


async def refused(gateway: LiveGateway) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *("incus-gateway", "serve"), env=gateway.environment, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 1 and b"Traceback" not in said
    return said


async def test_a_port_in_use_is_told_with_what_to_change(
    gateway: LiveGateway, tmp_path: Path, tenant: str
) -> None:
    second = await local_gateway(tmp_path, tenant)
    second.environment["GATEWAY_LISTEN"] = f"127.0.0.1:{gateway.port}"
    said = await refused(second)
    assert b"in use" in said and b"GATEWAY_LISTEN" in said


async def test_a_state_dir_in_use_is_told_with_what_to_change(gateway: LiveGateway) -> None:
    second = LiveGateway(gateway.environment, gateway.log)
    second.environment["GATEWAY_LISTEN"] = f"127.0.0.1:{second.port}"
    said = await refused(second)
    assert b"another gateway" in said and b"GATEWAY_STATE_DIR" in said


async def test_without_the_extra_a_gateway_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mcp'] = None\n")
    gateway = await local_gateway(tmp_path, "demo", PYTHONPATH=str(tmp_path))
    await gateway.start()
    try:
        async with gateway.http("demo") as http, http.post("/v1/tenants/demo/mcp", json={}) as response:
            problem = await response.json()
            assert (response.status, problem["code"]) == (501, "not_found")
            assert "install its extra mcp" in problem["detail"]
    finally:
        assert await gateway.stop() == 0


async def test_a_pdf_without_its_extra_is_an_error_over_mcp(tmp_path: Path) -> None:
    """Whole, as others get it, Claude Code would put it on its own host and show its model that path."""
    # workers take the gateway's import path, and nothing else of its environment
    (tmp_path / "pypdfium2.py").write_text("raise ImportError\n")
    gateway = await local_gateway(tmp_path, "demo", PYTHONPATH=str(tmp_path))
    await gateway.start()
    try:
        async with mcp(gateway, "demo", SESSIONLESS) as client, gateway.wire("demo") as wire:
            await client.call_tool("Write", {"file_path": "a.pdf", "content": "%PDF-1.7 and no more"})
            whole = await wire.call("tools/call", name="Read", arguments={"file_path": "a.pdf"})
            assert [part["type"] for part in whole["content"]] == ["text", "resource"]
            said = await client.call_tool("Read", {"file_path": "a.pdf"})
            assert said.is_error and "extra `pdf`" in text(said)
            assert (said.structured_content or {})["code"] == "unavailable"
            assert [part.type for part in said.content] == ["text"]
    finally:
        assert await gateway.stop() == 0


async def test_tenants_come_page_by_page(tmp_path: Path) -> None:
    """A list can be asked for in parts, each beginning after the last one's end."""
    names = [f"t{number}" for number in range(5)]
    gateway = await local_gateway(tmp_path, *reversed(names))
    await gateway.start()
    try:
        async with gateway.http("*") as http:
            pages, after = [], ""
            while after is not None:
                async with http.get("/v1/tenants", params={"limit": "2", "after": after}) as response:
                    page = await response.json()
                pages.append([entry["name"] for entry in page["tenants"]])
                after = page.get("next")
            assert pages == [names[:2], names[2:4], names[4:]]
            async with http.get("/v1/tenants") as response:
                assert [entry["name"] for entry in (await response.json())["tenants"]] == names
            for limit in ("0", "1001", "x", "-1", "9" * 30):
                async with http.get("/v1/tenants", params={"limit": limit}) as response:
                    assert response.status == 400
                    assert (await response.json())["field"] == "limit"
    finally:
        await gateway.stop()
