"""What keeps a site from coming up is told by a reason of its own, with what to do, and leaves nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.caddy import Caddy
from gateway.deployments import Context, Deployer, DeploymentRequest, Record
from gateway.deployments.record import Register
from gateway.errors import GatewayError
from gateway.events import Bus, MemoryJournal
from gateway.ownership.domains import Domains
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.archives import folder
from tests.integration import environment
from tests.integration.sites import OPERATOR, Hosting, RealCaddy, filled, hosting, settings_for
from tests.waits import until

pytestmark = pytest.mark.timeout(300)
DOMAIN = "refused.test"


@dataclass
class Desk:
    """Deployments of this process on the tests' Incus and a real Caddy, under a test's own settings."""

    settings: Settings
    runtime: IncusRuntime
    store: Store
    caddy: RealCaddy

    async def refused(self, template: str | bytes = "static", **changes: Any) -> dict[str, Any]:
        """Deploy what must not work; return the error of the answer once its event said the same.

        Nothing may be left, and no message may name a folder of this host.
        """
        settings = self.settings.model_copy(update=changes)
        host = Hosting(self.settings, Path("/dev/null"))
        before = host.leavings()
        journal = MemoryJournal(10_000)
        bus = Bus(journal)
        async with contextlib.AsyncExitStack() as stack:
            runtime = await stack.enter_async_context(IncusRuntime(settings))
            made = await stack.enter_async_context(IncusSites(settings, runtime))
            caddy = await stack.enter_async_context(Caddy(settings))
            domains = await Domains.opened(runtime.tenants, self.store, bus, settings)
            register = Register(self.store, domains, settings)
            deployments = await stack.enter_async_context(
                Deployer(
                    Context(
                        runtime=runtime,
                        sites=made,
                        caddy=caddy,
                        domains=domains,
                        register=register,
                        bus=bus,
                        settings=settings,
                    )
                )
            )
            deployments._recovered.set()  # nothing is to be found from an earlier life
            record, _ = await deployments.begin(DeploymentRequest(DOMAIN, template), OPERATOR)
            await ended(deployments, record)
            if record.state == "succeeded":  # which it must not: then this test alone fails by it
                environment.incus("delete", "--force", record.tenant, check=False)
                caddy.unset(DOMAIN)
        assert record.state == "rolledback", record
        assert host.leavings() == before
        assert domains.held() == set()
        events = [event for event in (await journal.read(0, 10_000)).events if event.deployment == record.id]
        assert [event.type for event in events][-2:] == ["deployment.failed", "deployment.rolledback"]
        answer = json.loads(json.dumps(record.to_dict()["error"]))
        assert all(event.data["error"] == answer for event in events[-2:])
        assert str(environment.INCUS_DIR) not in answer["message"]
        assert str(settings.state_dir) not in answer["message"]
        assert str(settings.caddy_admin) not in answer["message"]
        return dict(answer)


async def ended(deployments: Deployer, record: Record) -> None:
    async def over() -> bool:
        return (await deployments.get(record.id)).state in ("succeeded", "rolledback")

    await until(over, 120, every=0.05)
    await until(lambda: record.id not in deployments._register.running, every=0.01)


@pytest.fixture(scope="module")
async def desk(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    settings = settings_for(incus_settings, tmp_path_factory.mktemp("refusals") / "state")
    caddy = RealCaddy(settings)
    await caddy.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(caddy.stop)
        store = await stack.enter_async_context(Store(settings.state_dir))
        runtime = await stack.enter_async_context(IncusRuntime(settings))
        yield Desk(settings, runtime, store, caddy)


@contextlib.contextmanager
def profile(**root: str) -> Iterator[str]:
    """Give the name of a profile as the tenants' own, but for its disk."""
    name = f"refusals-{os.getpid()}"
    environment.incus("profile", "copy", "gateway-tenant", name)
    try:
        for key, value in root.items():
            environment.incus("profile", "device", "set", name, "root", f"{key}={value}")
        yield name
    finally:
        environment.incus("profile", "delete", name)


def taken(settings: Settings) -> int:
    """Return how many bytes of its disk's size a new tenant has taken: the image's, where these count."""
    name = f"new-{os.getpid()}"
    environment.incus("init", settings.image, name, "--profile", settings.profile)
    try:
        words = ("btrfs", "qgroup", "show", "-f", "--raw", environment.rootfs(name).parent)
        shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        return int(shown.splitlines()[-1].split()[1])  # Incus itself tells what nobody else has of it
    finally:
        environment.incus("delete", name)


async def test_a_missing_image_and_a_missing_profile_or_pool(desk: Desk, tmp_path: Path) -> None:
    said = await desk.refused(image="no-such-image")
    assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "no_image", "create")
    assert "incus-gateway image build" in said["message"]
    said = await desk.refused(profile="no-such-profile")
    assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "no_pool", "create")
    assert "incus-gateway setup" in said["message"]
    # a pool whose disk is away
    pool, place = f"gone-{os.getpid()}", tmp_path / "pool"
    place.mkdir()
    environment.incus("storage", "create", pool, "dir", f"source={place}")
    try:
        with profile(pool=pool, size="") as name:
            mounted = environment.INCUS_DIR / "storage-pools" / pool
            subprocess.run(["umount", str(mounted)], check=True)
            for below in [*place.iterdir()]:
                below.rmdir()
            said = await desk.refused(profile=name)
            assert (said["code"], said["reason"]) == ("unavailable", "no_pool")
            assert "storage pool" in said["message"]
    finally:
        environment.incus("storage", "delete", pool)


async def test_a_full_disk_of_the_tenant(desk: Desk) -> None:
    """In the middle of the files, and of what the install command writes; neither is tried again."""
    with profile(size=f"{taken(desk.settings) + (40 << 20)}") as name:
        files = [(f"f{number}", bytes(20 << 20)) for number in range(3)]
        said = await desk.refused(folder('start = ["bun", "serve.ts"]', *files), profile=name)
        assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "disk_full", "push")
        assert "tenant's disk is full" in said["message"]
        install = 'install = ["sh", "-c", "fallocate -l 900M large"]'
        said = await desk.refused(folder(f'start = ["bun", "serve.ts"]\n{install}'), profile=name)
        assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "disk_full", "install")
        assert "give the tenant a larger size" in said["message"]


async def test_a_full_pool(desk: Desk) -> None:
    """While the site installs, and while its container is made."""
    pool = environment.INCUS_DIR / "storage-pools" / "gwtest"
    install = 'install = ["sh", "-c", "head -c 400M /dev/zero >large"]'

    def settle() -> None:  # what was deleted gives its room back only when the kernel comes to it
        for what in ("filesystem", "subvolume"):  # it looks each 30 s, and at a sync
            subprocess.run(["btrfs", what, "sync", pool], check=True, capture_output=True)

    settle()
    with filled(pool, room=100 << 20):
        said = await desk.refused(folder(f'start = ["bun", "serve.ts"]\n{install}'))
        assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "disk_full", "install")
        assert "storage pool is full" in said["message"]
    settle()
    with filled(pool):
        said = await desk.refused()
        assert (said["code"], said["reason"]) == ("unavailable", "disk_full")
        assert "storage pool is full" in said["message"]


async def test_what_is_wrong_with_the_site(desk: Desk) -> None:
    """Its install command fails, it ends again and again, or never answers: the last that it said is told."""
    install = 'install = ["sh", "-c", "echo what went wrong; exit 3"]'
    said = await desk.refused(folder(f'start = ["bun", "serve.ts"]\n{install}'))
    assert (said["code"], said["reason"], said["phase"]) == ("exec_failed", "install_failed", "install")
    assert "ended with 3: what went wrong" in said["message"]
    said = await desk.refused(folder('start = ["sh", "-c", "echo what went wrong; exit 3"]'))
    assert (said["code"], said["reason"], said["phase"]) == ("timeout", "never_healthy", "route")
    assert "what went wrong" in said["message"]
    said = await desk.refused(folder('start = ["sleep", "1000"]'), verify_timeout=3.0)
    assert (said["code"], said["reason"]) == ("timeout", "never_healthy")
    assert "must listen on 0.0.0.0 and $PORT" in said["message"]


async def test_a_quota_a_domain_and_a_template(desk: Desk, tmp_path: Path) -> None:
    """What the first phase finds: nothing was done, and nothing is undone."""
    other = f"owner-{os.getpid()}"
    environment.incus(
        *("init", desk.settings.image, other, "--profile", "gateway-tenant"),
        *("--config", f"user.gateway.domain={DOMAIN}"),
    )
    try:
        said = await desk.refused()
        assert (said["code"], said["reason"], said["phase"]) == ("conflict", "domain_owned", "validate")
        assert "with `tenant`" in said["message"]
        environment.incus("config", "set", other, "user.gateway.domain=other.test")
        there = len(await desk.runtime.tenants.list())
        said = await desk.refused(max_tenants=there)
        assert (said["code"], said["reason"], said["phase"]) == ("rate_limited", "quota", "validate")
        assert "GATEWAY_MAX_TENANTS" in said["message"]
        # of the Incus project itself
        listed = len(environment.instances())
        environment.incus("project", "set", "default", f"limits.instances={listed}")
        try:
            said = await desk.refused()
        finally:
            environment.incus("project", "unset", "default", "limits.instances")
        assert (said["code"], said["reason"], said["phase"]) == ("rate_limited", "quota", "create")
        assert "limit of the Incus project" in said["message"]
    finally:
        environment.incus("delete", "--force", other)
    with pytest.raises(GatewayError, match="there are: static, vite-react") as missing:
        await desk.refused("no-such-template")
    assert missing.value.code == "not_found"
    assert missing.value.facts["reason"] == "template_missing"
    # there when it was asked for, and broken when its turn came
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "site.toml").write_text("start = 1")
    said = await desk.refused("mine", templates_dir=tmp_path)
    assert (said["code"], said["reason"], said["phase"]) == ("invalid_params", "template_invalid", "validate")
    said = await desk.refused(folder('start = ["x"]', ("../out", b"")))
    assert (said["code"], said["reason"], said["phase"]) == ("invalid_params", "template_invalid", "validate")


async def test_a_caddy_that_is_down(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start, and when the site is to be seen through it."""
    ask = Caddy.ask

    async def killed(self: Caddy, domain: str, path: str, timeout: float) -> int:
        await desk.caddy.stop()
        return await ask(self, domain, path, timeout)

    try:
        monkeypatch.setattr(Caddy, "ask", killed)
        said = await desk.refused()
        assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "caddy_down", "verify")
        said = await desk.refused()
        assert (said["code"], said["reason"], said["phase"]) == ("unavailable", "caddy_down", "validate")
        assert "incus-gateway doctor" in said["message"]
    finally:
        await desk.caddy.stop()
        await desk.caddy.start()


async def test_a_full_state_dir(incus_settings: Settings, tmp_path: Path) -> None:
    """Nothing new is taken, what ran is undone, and both are on record once there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        async with hosting(incus_settings, disk / "state", reconcile_interval=1.0) as host:
            before = host.leavings()
            install = 'install = ["sh", "-c", "until [ -e /home/site/go ]; do sleep 0.1; done"]'
            archive = base64.b64encode(folder(f'start = ["bun", "serve.ts"]\n{install}')).decode()
            body = {"domain": DOMAIN, "template": {"archive": archive}}
            _, begun, _ = await host.call("POST", "/v1/deployments", body)
            await host.reached(begun["id"], "install")
            with filled(disk):
                (environment.rootfs("refused-test") / "home/site/go").touch()
                record = await host.ended(begun["id"])
                assert record["state"] == "rolledback", record
                assert record["error"]["code"] == "unavailable"
                assert record["error"]["reason"] == "disk_full"
                assert "state dir" in record["error"]["message"]
                assert str(disk) not in record["error"]["message"]
                assert host.leavings() == before
                status, said, _ = await host.call("POST", "/v1/deployments", {**body, "domain": "new.test"})
                assert (status, said["code"], said["reason"]) == (503, "unavailable", "disk_full")
            async with host.gateway.http("*") as session, asyncio.timeout(60):
                kinds = list[bytes]()
                query = f"/v1/events?deployment={begun['id']}&lastEventId=1"
                async with session.get(query, timeout=aiohttp.ClientTimeout(total=None)) as answer:
                    while kinds[-1:] != [b"event: deployment.rolledback"]:
                        line = (await answer.content.readline()).rstrip()
                        kinds += [line] if line.startswith(b"event: ") else []
            assert kinds.count(b"event: deployment.failed") == 1
            await host.gateway.stop()
            await host.gateway.start()
            assert await host.ended(begun["id"]) == record
            again = await host.deploy(DOMAIN)
            assert again["state"] == "succeeded", again["error"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
