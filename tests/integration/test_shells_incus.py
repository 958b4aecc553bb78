"""Bash, BashOutput, KillShell in real containers: recorded cases, the contract, a tenant that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from tests.contracts import claude
from tests.contracts.claude import call
from tests.contracts.gateway import sse
from tests.contracts.processes import Tree
from tests.contracts.shells import QUICK, ShellContract, background, printed
from tests.integration import environment
from tests.integration.conftest import Container, make_containers
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway

CONTAINERS = 4  # for the cases, one case at a time in each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
async def gateway(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "gateway.log") as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def quick(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "quick.log", **QUICK) as gateway:
        yield gateway


@pytest.fixture
async def disposable(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "disposable.log") as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def tenants(incus_settings: Settings) -> AsyncIterator[list[str]]:
    async with make_containers("shells", incus_settings, CONTAINERS) as containers:
        yield [container.name for container in containers]


@pytest.fixture(scope="module")
async def outcomes(gateway: LiveGateway, tenants: list[str]) -> Mapping[str, claude.Outcome | Exception]:
    return await claude.outcomes(gateway, tenants, lambda _, text: text)


@pytest.mark.parametrize("case", claude.BASH_CASES, ids=[case["id"] for case in claude.BASH_CASES])
def test_case(case: Mapping[str, Any], outcomes: Mapping[str, claude.Outcome | Exception]) -> None:
    """The answer, and the files after it, are those that Claude Code's own tool gave."""
    claude.check(case, outcomes[case["id"]])


class TestIncus(ShellContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name

    async def test_commands_run_as_the_workspaces_user(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            command = "id -un; pwd; echo $HOME; touch owned; stat -c %U:%G owned; rm owned"
            said = await call(wire, "Bash", {"command": command})
            assert said == (False, "site\n/srv/site\n/home/site\nsite:site")


async def test_a_stop_of_the_tenant_ends_what_runs_in_the_background(
    gateway: LiveGateway, tenant: Container
) -> None:
    tree = Tree()
    async with gateway.wire(tenant.name) as wire:
        one = await background(wire, tree.script)
        await tree.grown()
        await printed(wire, one, "ready")
        await asyncio.to_thread(environment.incus, "stop", "--force", tenant.name)
        assert tree.alive() == 0
        text = await printed(wire, one, "<status>failed</status>")
        assert "<exit_code>0" not in text
        # what it printed can still be read
        assert not (await call(wire, "Glob", {"pattern": ".gateway/output/*"}))[0]


async def test_a_tenant_made_anew_knows_nothing_of_what_was_before(
    gateway: LiveGateway, tenant: Container
) -> None:
    async with gateway.http(tenant.name) as http, gateway.wire(tenant.name) as watcher:
        events = await http.get(f"/v1/events?type=tenant.destroyed,tenant.created&tenant={tenant.name}")
        url, headers = f"/v1/tenants/{tenant.name}/tools/", {"X-Tool-Session": "mine"}
        body = {"command": "mkdir deep && cd deep"}
        async with http.post(url + "Bash", json=body, headers=headers) as response:
            assert (await response.json())["structuredContent"]["cwd"] == "/srv/site/deep"
        await watcher.run(argv=["echo", "secret"], execId="mine")
        await asyncio.to_thread(environment.incus, "delete", "--force", tenant.name)
        assert [event["event"] for event in await sse(events, 1)] == ["tenant.destroyed"]
        words = (
            "launch",
            environment.settings().image,
            tenant.name,
            "--profile",
            environment.settings().profile,
        )
        await asyncio.to_thread(environment.incus, *words)
        assert [event["event"] for event in await sse(events, 1)] == ["tenant.created"]
        async with http.post(url + "Bash", json={"command": "pwd"}, headers=headers) as response:
            assert (await response.json())["content"][0]["text"] == "/srv/site"
        async with gateway.wire(tenant.name) as wire:
            _, said, _ = await wire.run(argv=["echo", "anew"], execId="mine")
            assert said == b"anew\n"
            listed = (await wire.call("exec/list"))["execs"]
            assert "secret" not in str(listed)
