"""The public contract on real containers, and what happens when incusd or a tenant goes away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gateway.host.setup import enforce_quotas
from gateway.settings import Settings
from tests.contracts.files import FilesContract
from tests.contracts.gateway import AGENT, QUICK, GatewayContract, no_traceback
from tests.contracts.idempotency import ReceiptsContract
from tests.contracts.input import InputContract
from tests.contracts.lifecycle import FULL, TIGHT, LifeContract, ask
from tests.contracts.mcp import McpContract
from tests.contracts.pace import PaceContract
from tests.contracts.processes import Tree, alive, mark
from tests.contracts.tokens import TokensContract
from tests.integration import environment
from tests.integration.conftest import Container, Incusd, Lasting
from tests.live import LiveGateway, RpcFailure
from tests.waits import until

INPUT = int(os.environ.get("GATEWAY_TEST_INPUT", "48"))  # MiB that a command is sent

SOON = 5.0  # seconds; within one, where others do not have the CPU


@contextlib.asynccontextmanager
async def live(settings: Settings, log: Path, **more: str) -> AsyncIterator[LiveGateway]:
    # a separate state dir: a gateway ends what an earlier one with the same state dir left running
    state = log.with_suffix("")
    state.mkdir(exist_ok=True)
    gateway = LiveGateway(
        {
            "GATEWAY_INCUS_SOCKET": str(settings.incus_socket),
            "GATEWAY_NETWORK": settings.network,
            "GATEWAY_NETWORK_IPV4": settings.network_ipv4,
            "GATEWAY_POOL": settings.pool,
            "GATEWAY_STATE_DIR": str(state),
            **more,
        },
        log,
    )
    await gateway.start()
    try:
        yield gateway
    finally:
        assert await gateway.stop() == 0, log.read_text()
    await no_traceback(gateway)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
async def gateway(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "gateway.log", **AGENT) as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def quick(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "quick.log", **QUICK) as gateway:
        yield gateway


@pytest.fixture
async def full(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "full.log", **FULL) as gateway:
        yield gateway


@pytest.fixture
async def tight(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    # the kernel may have given up counting what each tenant uses since `setup` looked
    await asyncio.to_thread(enforce_quotas, incus_settings)
    async with live(incus_settings, folder / "tight.log", **TIGHT) as gateway:
        yield gateway


@pytest.fixture
async def disposable(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "disposable.log") as gateway:
        yield gateway


class TestIncus(GatewayContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name

    async def test_written_files_belong_to_the_workspaces_user(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.wire(tenant) as wire:
            path = f"made/{mark()}.txt"
            await wire.call("tools/call", name="Write", arguments={"file_path": path, "content": "x"})
            _, out, _ = await wire.run(command=f"stat -c '%U:%G %a' made {path}")
            assert out == b"site:site 755\nsite:site 644\n"

    async def test_the_contract_of_one_tenant_over_http(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.http(tenant) as http, http.get(f"/v1/tenants/{tenant}") as response:
            one = await response.json()
            assert one["address"].startswith(f"{environment.NETWORK}.")
            assert one["limits"]["memory"] and one["usage"]["memory_bytes"] > 0
            assert one["usage"]["memory_limit_bytes"] == 512 << 20
        async with gateway.http(tenant) as http, http.get(f"/v1/tenants/{tenant}/metrics") as response:
            assert (await response.json())["cpu_seconds"] > 0


class TestIncusInput(InputContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name

    async def test_a_flood_of_input_arrives_whole(self, gateway: LiveGateway, tenant: str) -> None:
        """From a client that ignores the window and sends as fast as it can."""
        piece, digest = os.urandom(1 << 20), hashlib.sha256()
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sha256sum"], stdin=True)
            for _ in range(INPUT):
                await wire.stdin(started["channel"], piece)
                digest.update(piece)
            await wire.call("exec/closeStdin", exec=started["exec"])
            await wire.exited(started["exec"])
            assert wire.output[started["channel"], 1].startswith(digest.hexdigest().encode())


class TestIncusPace(PaceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name


class TestIncusMcp(McpContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name


class TestIncusLife(LifeContract):
    ENDS = 2  # one of each kind; the `local` runtime, where they are cheap, has more

    async def test_what_two_snapshots_share_counts(self, tight: LiveGateway, fresh: str) -> None:
        """Incus attributes it to neither of them; it is counted with the one that remains."""
        url = f"/v1/tenants/{fresh}"
        async with tight.http(fresh) as http:

            async def write() -> None:
                data = io.BytesIO(os.urandom(40 << 20))
                async with http.put(f"{url}/files/a", data=data) as response:
                    assert response.status in (200, 201)

            async def snapshot(name: str, status: int = 201) -> None:
                await ask(http, "POST", f"{url}/snapshots", {"name": name}, status)

            await write()
            await snapshot("s1")
            await snapshot("s2")  # holds nothing more
            await write()
            await snapshot("s3", 413)
            await ask(http, "DELETE", f"{url}/snapshots/s1", status=204)
            await snapshot("s3", 413)
            await ask(http, "DELETE", f"{url}/snapshots/s2", status=204)
            await snapshot("s3")

    async def test_an_operators_snapshots_are_told_too(self, gateway: LiveGateway, fresh: str) -> None:
        async with gateway.wire(fresh) as wire:
            await wire.call("events/subscribe", types=["tenant.snapshot.*"])
            for words in (("create",), ("restore",), ("delete",)):
                await asyncio.to_thread(environment.incus, "snapshot", *words, fresh, "by-hand")
            for kind in ("created", "restored", "deleted"):
                told = await wire.until(
                    lambda kind=kind: wire.notified("event", type=f"tenant.snapshot.{kind}")
                )
                assert (told["data"]["snapshot"], told["data"]["by"]) == ("by-hand", "root")

    @pytest.fixture(scope="class")
    @classmethod
    async def lasting(cls, incus_settings: Settings) -> AsyncIterator[Lasting]:
        async with Lasting.made("life", incus_settings) as lasting:
            yield lasting

    @pytest.fixture
    async def fresh(self, request: pytest.FixtureRequest, lasting: Lasting) -> str:
        # where snapshots may hold little, what was removed from its disk counts a while
        return (await lasting.as_new(other="tight" in request.fixturenames)).name

    async def log(self, gateway: LiveGateway, tenant: str, line: str) -> None:
        # as its site would: journald files what a unit's processes say under that unit
        unit = "[Service]\\nExecStart=/usr/bin/tail -n +1 -f /run/lines\\n"
        script = f"""
            echo '{line}' >>/run/lines
            until systemctl is-active --quiet site.service; do
                mkdir -p /run/systemd/system
                printf '{unit}' >/run/systemd/system/site.service
                systemctl daemon-reload && systemctl start site.service || sleep 0.1  # it may just boot
            done"""
        await asyncio.to_thread(Container(tenant).sh, script)

    async def followers(self, gateway: LiveGateway, tenant: str) -> int:
        return int(await asyncio.to_thread(Container(tenant).sh, "pgrep -c journalctl || :"))

    async def test_what_others_do_is_seen_within_a_second(self, gateway: LiveGateway, fresh: str) -> None:
        """States come from Incus, not from a cache: what another `incus` user did is seen and published."""
        url = f"/v1/tenants/{fresh}"
        async with gateway.wire(fresh) as wire, gateway.http(fresh) as http:
            await wire.call("events/subscribe", types=["tenant.*"])
            for command, kind, status in (
                (("stop", "--force"), "tenant.stopped", "stopped"),
                (("start",), "tenant.started", "running"),
            ):
                await asyncio.to_thread(environment.incus, command[0], fresh, *command[1:])
                assert (await ask(http, "GET", url))["status"] == status
                await wire.until(lambda kind=kind: wire.notified("event", type=kind, subject=fresh), SOON)
            await asyncio.to_thread(environment.incus, "delete", "--force", fresh)
            await ask(http, "GET", url, status=404)
            await wire.until(lambda: wire.notified("event", type="tenant.destroyed", subject=fresh), SOON)

    async def test_a_process_that_takes_too_much_memory_is_told(
        self, gateway: LiveGateway, fresh: str, tenant: Container
    ) -> None:
        """Only to those who may see its tenant."""
        await asyncio.to_thread(environment.incus, "config", "set", fresh, "limits.memory=96MiB")
        async with gateway.wire(fresh) as wire, gateway.wire(tenant.name) as other:
            for one in (wire, other):
                await one.call("events/subscribe", types=["tenant.oom"])
            # at once: in small parts the kernel may look for seconds for what it could reclaim
            take = 'my $taken = "x" x (1 << 31)'
            await wire.run(argv=["perl", "-e", take])
            event = await wire.until(lambda: wire.notified("event", type="tenant.oom", subject=fresh))
            told = event["data"]
            assert told["process"] == "perl"
            assert told["killed"] >= 1
            assert not other.notified("event", type="tenant.oom")

    async def test_nothing_of_a_destroyed_tenant_is_left_in_incus(
        self, gateway: LiveGateway, fresh: str
    ) -> None:
        async with gateway.http(fresh) as http:
            await ask(http, "POST", f"/v1/tenants/{fresh}/snapshots", {"name": "s1"}, 201)
            await ask(http, "DELETE", f"/v1/tenants/{fresh}", status=204)
        pool = f"/1.0/storage-pools/{environment.settings().pool}/volumes?recursion=1"
        for what in ("/1.0/instances?recursion=1", pool):
            found = await asyncio.to_thread(environment.incus, "query", what)
            assert fresh not in found.stdout.decode()


class TestIncusTokens(TokensContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name


class TestIncusReceipts(ReceiptsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name


class TestIncusFiles(FilesContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tenant(cls, shared_tenant: Container) -> str:
        return shared_tenant.name

    async def as_root(self, gateway: LiveGateway, tenant: str, script: str) -> None:
        await asyncio.to_thread(environment.incus, "exec", tenant, "--", "sh", "-c", script)


async def test_a_stopped_and_a_frozen_tenant_say_so(gateway: LiveGateway, tenant: Container) -> None:
    name = tenant.name
    async with gateway.wire(name) as wire, gateway.http(name) as http:
        write = {"file_path": "kept.txt", "content": "kept"}
        await wire.call("tools/call", name="Write", arguments=write)
        for state, command in (("frozen", "pause"), ("stopped", "stop")):
            await asyncio.to_thread(environment.incus, command, name, *(["--force"] * (command == "stop")))
            with pytest.raises(RpcFailure) as caught:
                await wire.call("exec/start", argv=["true"])
            assert (caught.value.code, caught.value.data["status"]) == ("tenant_not_running", state)
            async with http.post(f"/v1/tenants/{name}/exec", json={"argv": ["true"]}) as response:
                assert (response.status, (await response.json())["code"]) == (409, "tenant_not_running")
            # files need no running container
            read = await wire.call("tools/call", name="Read", arguments={"file_path": "kept.txt"})
            assert read["content"][0]["text"] == "1\tkept"
            async with http.post(f"/v1/tenants/{name}/start") as response:
                assert (await response.json())["status"] == "running"
        assert (await wire.run(argv=["true"]))[0]["exitCode"] == 0


async def test_a_tenant_destroyed_during_an_exec(gateway: LiveGateway, tenant: Container) -> None:
    name = tenant.name
    async with gateway.wire(name) as wire, gateway.http(name) as http:
        started = await wire.call("exec/start", command="echo r; sleep 600")
        await wire.until(lambda: wire.output[started["channel"], 1] == b"r\n")
        async with http.delete(f"/v1/tenants/{name}") as response:
            assert response.status == 204
        exit_ = await wire.exited(started["exec"])
        assert exit_["reason"] == "lost" or exit_["signal"] == "KILL"
        assert exit_["exitCode"] != 0
        for method, params in (
            ("exec/start", {"argv": ["true"]}),
            ("tools/call", {"name": "Read", "arguments": {"file_path": "x"}}),
        ):
            with pytest.raises(RpcFailure) as caught:
                await wire.call(method, **params)
            assert caught.value.code == "not_found"
        async with http.get(f"/v1/tenants/{name}") as response:
            assert response.status == 404


async def test_what_others_do_is_told(gateway: LiveGateway, tenant: Container) -> None:
    name = tenant.name
    async with gateway.wire(name) as wire:
        await wire.call("events/subscribe")
        await asyncio.to_thread(environment.incus, "restart", "--force", name)
        restarted = await wire.until(lambda: wire.notified("event", type="tenant.restarted"))
        assert restarted["subject"] == name
        await asyncio.to_thread(environment.incus, "config", "set", name, "user.note=x")
        await wire.until(lambda: wire.notified("event", type="incus.instance-updated"))


async def test_a_killed_incusd_is_told_and_its_return_found(
    gateway: LiveGateway, incusd: Incusd, tenant: Container
) -> None:
    """A running command ends as lost, readiness says why, and everything recovers by itself."""
    name = tenant.name
    async with gateway.wire(name) as wire, aiohttp.ClientSession(gateway.url) as http:
        started = await wire.call("exec/start", command="echo r; sleep 600")
        await wire.until(lambda: wire.output[started["channel"], 1] == b"r\n")
        await incusd.kill()
        exit_ = await wire.exited(started["exec"])
        assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
        async with http.get("/readyz") as response:
            problem = await response.json()
            assert response.status == 503 and "Incus" in problem["detail"]
        async with http.get("/healthz") as response:
            assert response.status == 200
        with pytest.raises(RpcFailure) as caught:
            await wire.call("exec/start", argv=["true"])
        assert caught.value.code == "unavailable"
        await incusd.restart()

        async def ready() -> bool:
            async with http.get("/readyz") as response:
                return response.status == 200

        await until(ready, 60, every=0.05)
        exit_, out, _ = await wire.run(argv=["echo", "back"])
        assert (exit_["exitCode"], out) == (0, b"back\n")
        read = await wire.call("tools/call", name="Write", arguments={"file_path": "b", "content": "x"})
        assert not read["isError"]


async def test_a_killed_gateways_commands_end_with_the_next_one(
    incus_settings: Settings, folder: Path, tenant: Container
) -> None:
    """The trees are found by their cgroups; other processes in the tenant are left alone."""
    other = mark()
    await asyncio.to_thread(tenant.sh, f"setsid sleep {other} </dev/null >/dev/null 2>&1 &")
    tree = Tree()
    async with live(incus_settings, folder / "next.log") as first:
        wire = first.wire(tenant.name)
        socket = await wire.__aenter__()
        await socket.call("exec/start", argv=["bash", "-c", tree.script])
        await tree.grown()
        assert first.process is not None
        first.process.kill()
        await first.process.wait()
        with contextlib.suppress(Exception):
            await wire.__aexit__(None, None, None)
        assert tree.alive() > 0
        await first.start()
        await until(lambda: tree.alive() == 0)
        assert alive(other) == 1


async def test_a_destroy_whose_end_is_not_known_is_in_the_audit(
    gateway: LiveGateway, incusd: Incusd, tenant: Container
) -> None:
    """It may still have been done; a destroy of a tenant that does not exist is not recorded."""
    async with gateway.http(tenant.name, "t-none") as http, gateway.http("*", scopes=("admin",)) as admin:
        await ask(http, "DELETE", "/v1/tenants/t-none", status=404)
        await incusd.kill()
        try:
            await ask(http, "DELETE", f"/v1/tenants/{tenant.name}", status=503)
        finally:
            await incusd.restart()
        entries = {}
        for name in (tenant.name, "t-none"):
            found = (await ask(admin, "GET", f"/v1/audit?tenant={name}"))["entries"]
            entries[name] = [(one["who"], one["facts"]) for one in found if one["action"] == "tenant.destroy"]
    assert entries == {tenant.name: [("test", {"error": "unavailable"})], "t-none": []}
