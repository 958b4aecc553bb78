"""The file tools on real containers: ownership, stopped, deleted and restored tenants."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError, Unavailable
from gateway.host import daemon
from gateway.host.setup import enforce_quotas
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import EncodedResult, FileTools
from tests.integration import environment
from tests.integration.conftest import Container, Incusd, MakeTenant
from tests.integration.sites import filled
from tests.integration.test_attacks_worker import check_confined
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway, RpcFailure
from tests.unit.test_rootfs_workers import children_of, workers_below
from tests.waits import until


class Files:
    """The tools on one tenant, with one session."""

    def __init__(self, tools: FileTools, root: FilesystemRoot) -> None:
        self.tools = tools
        self.root = root
        self.session = ToolSession()

    async def call(self, tool: str, **given: object) -> EncodedResult:
        return await self.tools.call(self.root, self.session, tool, given)

    async def text(self, tool: str, **given: object) -> str:
        """Return the answer's text. Fails if it is an error."""
        result = await self.call(tool, **given)
        assert not result.is_error, result.data()
        return str(result.data()["content"][0]["text"])


@pytest.fixture
async def workers(incus_settings: Settings) -> AsyncIterator[Workers]:
    async with Workers(incus_settings, IncusRuntime(incus_settings).locations) as running:
        yield running


async def files_of(container: Container, workers: Workers, settings: Settings) -> Files:
    async with IncusRuntime(settings) as runtime:
        root = await runtime.filesystem(container.name)
    return Files(FileTools(workers, settings), root)


async def test_ownership(tenant: Container, workers: Workers, incus_settings: Settings) -> None:
    """Files written by the tools belong to the workspace's user, like those that the user writes."""
    files = await files_of(tenant, workers, incus_settings)
    tenant.sh("echo one > /srv/site/mine.txt; chmod 640 /srv/site/mine.txt", user=1000)
    assert await files.text("Read", file_path="mine.txt") == "1\tone\n2\t"
    await files.text("Write", file_path="new/deep/file.txt", content="two\n")
    await files.text("Edit", file_path="mine.txt", old_string="one", new_string="three")
    listed = tenant.sh(
        "cd /srv/site; stat -c '%U:%G %a %n' new new/deep new/deep/file.txt mine.txt; cat mine.txt"
    )
    assert listed.splitlines() == [
        "site:site 755 new",
        "site:site 755 new/deep",
        "site:site 644 new/deep/file.txt",
        "site:site 640 mine.txt",
        "three",
    ]
    tenant.sh("rm -r /srv/site/new; echo four >> /srv/site/mine.txt", user=1000)
    assert "2\tfour" in await files.text("Read", file_path="mine.txt")
    layers = workers.layers(files.root.tenant)
    assert layers is not None
    assert {"mount", "namespaces", "uid", "seccomp"} <= set(layers)


async def test_permissions_hold(tenant: Container, workers: Workers, incus_settings: Settings) -> None:
    """The tools have the user's permissions: they cannot read root's file of mode 0600."""
    files = await files_of(tenant, workers, incus_settings)
    tenant.sh(
        "echo secret > /srv/site/root.txt; chmod 600 /srv/site/root.txt; mkdir -m 700 /srv/site/private"
    )
    result = await files.call("Read", file_path="root.txt")
    assert (result.is_error, result.code) == (True, "forbidden")
    assert (await files.call("Write", file_path="private/x.txt", content="x")).code == "forbidden"
    assert await files.text("Grep", pattern="secret") == "No files found"


async def test_stopped_tenant(make_tenant: MakeTenant, workers: Workers, incus_settings: Settings) -> None:
    """Files of a tenant that never ran can be read and written; the tenant then owns them."""
    container = await make_tenant(start=False)
    files = await files_of(container, workers, incus_settings)
    await files.text("Write", file_path="before.txt", content="start\n")
    await workers.forget(files.root.tenant)
    environment.incus("start", container.name)
    files = await files_of(container, workers, incus_settings)
    assert container.sh("stat -c %U:%G /srv/site/before.txt").strip() == "site:site"
    await files.text("Edit", file_path="before.txt", old_string="start", new_string="running")
    environment.incus("stop", "--force", container.name)
    assert "running" in await files.text("Read", file_path="before.txt")


def aged(workers: Workers) -> None:
    """Make each worker's next call check its workspace again, as it would a second later."""
    for slot in workers._slots.values():
        if slot.worker is not None:
            slot.worker.checked -= 1.0


async def test_delete_with_live_workers(
    make_tenant: MakeTenant, workers: Workers, incus_settings: Settings
) -> None:
    """Workers do not keep Incus from stopping or deleting a tenant; afterwards they serve nothing of it."""
    container = await make_tenant()
    files = await files_of(container, workers, incus_settings)
    await files.text("Write", file_path="a.txt", content="a\n")
    await files.text("Grep", pattern="a")
    environment.incus("delete", "--force", container.name)
    aged(workers)
    with contextlib.suppress(GatewayError):
        assert (await files.call("Read", file_path="a.txt")).is_error
    await workers.forget(files.root.tenant)
    assert not environment.rootfs(container.name).exists()


async def test_restored_snapshot(tenant: Container, workers: Workers, incus_settings: Settings) -> None:
    """After a restore the tools see the restored files, without being told."""
    files = await files_of(tenant, workers, incus_settings)
    await files.text("Write", file_path="a.txt", content="old\n")
    environment.incus("snapshot", "create", tenant.name, "s1")
    await files.text("Write", file_path="a.txt", content="new\n")
    environment.incus("snapshot", "restore", tenant.name, "s1")
    aged(workers)
    files = await files_of(tenant, workers, incus_settings)
    assert await files.text("Read", file_path="a.txt") == "1\told\n2\t"
    await files.text("Write", file_path="b.txt", content="b\n")
    assert tenant.sh("cat /srv/site/b.txt") == "b\n"


def devices(container: Container, *words: str) -> None:
    environment.incus("config", "device", *words[:1], container.name, *words[1:])


@pytest.fixture
def volume(incus_settings: Settings) -> Iterator[str]:
    name = f"t-files-{os.getpid()}"
    environment.incus("storage", "volume", "create", incus_settings.pool, name)
    yield name
    environment.incus("storage", "volume", "delete", incus_settings.pool, name)


@pytest.mark.parametrize("kind", ["folder", "volume"])
async def test_workspace_on_a_disk_device(
    kind: str,
    volume: str,
    make_tenant: MakeTenant,
    workers: Workers,
    incus_settings: Settings,
    tmp_path: Path,
) -> None:
    """If the workspace is a separate disk, as after a migration, the tools open that disk."""
    container = await make_tenant(start=False)
    files = await files_of(container, workers, incus_settings)
    await files.text("Write", file_path="below.txt", content="hidden by the device\n")
    place = (f"source={tmp_path}", "shift=true") if kind == "folder" else ("pool=gwtest", f"source={volume}")
    devices(container, "add", "data", "disk", f"path={incus_settings.workspace}", *place)
    environment.incus("start", container.name)
    container.sh("chown site:site /srv/site; su site -c 'echo one > /srv/site/mine.txt'")
    files = await files_of(container, workers, incus_settings)
    assert await files.text("Glob", pattern="*") == "mine.txt"
    await files.text("Edit", file_path="mine.txt", old_string="one", new_string="two")
    await files.text("Write", file_path="new/a.txt", content="a\n")
    listed = container.sh("cd /srv/site; cat mine.txt; stat -c %U:%G mine.txt new new/a.txt")
    assert listed.split() == ["two", *["site:site"] * 3]
    # and while it is stopped
    environment.incus("stop", "--force", container.name)
    await workers.forget(container.name)
    assert await files.text("Read", file_path="mine.txt") == "1\ttwo\n2\t"
    await workers.forget(container.name)
    devices(container, "set", "data", "readonly=true")
    result = await files.call("Write", file_path="mine.txt", content="three")
    assert (result.is_error, result.code) == (True, "forbidden")
    await workers.forget(container.name)
    devices(container, "remove", "data")
    files = await files_of(container, workers, incus_settings)
    assert await files.text("Glob", pattern="*") == "below.txt"


async def test_a_disk_that_the_broker_cannot_open(
    volume: str, make_tenant: MakeTenant, workers: Workers, incus_settings: Settings, tmp_path: Path
) -> None:
    """If the workspace's disk cannot be opened, an error says so; no empty folder is shown."""
    pool = incus_settings.pool
    container = await make_tenant(start=False)
    environment.incus("storage", "volume", "set", pool, volume, "security.unmapped=true")
    where = f"path={incus_settings.workspace}"
    devices(container, "add", "data", "disk", where, f"pool={pool}", f"source={volume}")
    files = await files_of(container, workers, incus_settings)
    with pytest.raises(Unavailable) as caught:
        await files.call("Glob", pattern="*")
    assert caught.value.facts["device"] == "data" and "use Bash" in caught.value.message
    # a link in the path of a source is not followed
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    devices(container, "remove", "data")
    devices(container, "add", "data", "disk", where, f"source={tmp_path}/link")
    with pytest.raises(Unavailable) as caught:
        await files.call("Glob", pattern="*")
    assert str(tmp_path) not in caught.value.message


async def test_a_disk_below_the_workspace(
    tenant: Container, workers: Workers, incus_settings: Settings, tmp_path: Path
) -> None:
    """Another disk below the workspace is refused: nothing is written under its mount by mistake."""
    tenant.sh("mkdir -p /srv/site/public/up /srv/site/public/other", user=1000)
    devices(tenant, "add", "data", "disk", "path=/srv/site/public/up", f"source={tmp_path}", "shift=true")
    files = await files_of(tenant, workers, incus_settings)
    await files.text("Write", file_path="public/other/a.txt", content="a")
    for tool, given in (
        ("Write", {"content": "x"}),
        ("Read", {}),
        ("Edit", {"old_string": "", "new_string": "x"}),
    ):
        result = await files.call(tool, file_path="public/up/x.txt", **given)
        assert (result.is_error, result.code) == (True, "outside_workspace"), result.data()
    assert await files.text("Glob", pattern="**") == "public/other/a.txt"
    assert not list(tmp_path.iterdir())
    rootfs = environment.rootfs(tenant.name)
    assert not list((rootfs / "srv/site/public/up").iterdir())


async def test_a_killed_gateway_leaves_no_unfinished_file(
    tenant: Container, incus_settings: Settings, tmp_path: Path
) -> None:
    """The next gateway removes what a SIGKILL during an upload and writes has left."""
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        for sent in itertools.count():
            yield bytes(65536)
            if sent == 512:
                begun.set()

    site = environment.rootfs(tenant.name) / "srv" / "site"

    def found() -> list[str]:
        return [str(path.relative_to(site)) for path in site.rglob(".gateway-*")]

    write = {"name": "Write", "arguments": {"file_path": "big.txt", "content": "x" * (4 << 20)}}
    async with live(incus_settings, tmp_path / "gateway.log", GATEWAY_TRANSFER_STALL="4") as gateway:
        async with gateway.http(tenant.name) as http, gateway.wire(tenant.name) as wire:
            path = f"/v1/tenants/{tenant.name}/files/a/upload"
            uploading = asyncio.ensure_future(http.put(path, data=endless()))
            await begun.wait()
            calls = [(await wire.start_call("tools/call", **write))[1] for _ in range(20)]
            await calls[2]
            await gateway.stop(signal.SIGKILL)
            await asyncio.gather(uploading, *calls, return_exceptions=True)
        print("left by the killed one:", found())
        # what one leaves that is killed between two calls of the kernel, which cannot be hit at will
        stray = ".gateway-1f-0123456789ab"
        tenant.sh(
            f"cd /srv/site; mkdir -p b; echo > {stray}; echo > b/{stray}; echo > .gateway-own", user=1000
        )
        made = time.monotonic()
        await gateway.start()
        async with gateway.wire(tenant.name) as wire:
            await wire.call("tools/call", name="Glob", arguments={"pattern": "*"})
            there = found()
            assert len(there) >= 3 or time.monotonic() - made > 4  # none is taken before its time
            await wire.call("tools/call", name="Read", arguments={"file_path": "big.txt"})
            async with asyncio.timeout(30):
                while (left := await asyncio.to_thread(found)) != [".gateway-own"]:
                    assert ".gateway-own" in left
        # it is told once the worker that removes them has answered
        await until(lambda: "unfinished files" in gateway.log.read_text())


def workers_of(gateway: LiveGateway) -> set[int]:
    """Return the processes of a gateway's broker: it is the one child of the gateway that has children."""
    assert gateway.process is not None
    return {worker for broker in children_of(gateway.process.pid) for worker in workers_below(broker)}


async def test_workers_end(
    tenant: Container, make_tenant: MakeTenant, incus_settings: Settings, tmp_path: Path
) -> None:
    """A tenant's workers end when it is stopped, restored or deleted, or its workspace changes."""
    tenant, other = await make_tenant(), tenant
    name = tenant.name
    async with live(incus_settings, tmp_path / "gateway.log") as gateway:
        async with gateway.wire(other.name) as wire, gateway.http(name) as http:
            await wire.call("files/stat", path=".")
            before = workers_of(gateway)  # of the other tenant: they stay through all of this
            assert before

            replaced = 201  # also the answer to an upload

            async def used() -> set[int]:
                """Use a worker of each kind (files, transfers, watches); return them."""
                async with gateway.wire(name) as used:
                    await used.call("tools/call", name="Glob", arguments={"pattern": "*"})
                    await used.call("files/list", path=".", depth=3)
                    async with http.put(f"/v1/tenants/{name}/files/a.txt", data=b"a") as response:
                        assert response.status in (200, 201, replaced)
                    await used.call("files/watch", paths=["."])
                    found = workers_of(gateway) - before
                    assert len(found) >= 4
                return found

            async def ended(workers: set[int]) -> None:
                await until(lambda: not workers & workers_of(gateway))
                assert before <= workers_of(gateway)

            found = await used()
            async with http.post(f"/v1/tenants/{name}/stop") as response:
                assert response.status == 200
            await ended(found)
            environment.incus("start", name)
            found = await used()
            environment.incus("stop", "--force", name)
            await ended(found)
            environment.incus("start", name)
            environment.incus("snapshot", "create", name, "s1")
            found = await used()
            environment.incus("snapshot", "restore", name, "s1")
            await ended(found)
            found = await used()
            tenant.sh("cd /srv; mv site old; install -d -o site -g site site; echo x > site/new.txt")
            # each kind finds out when it is next used, a second after it last looked; an upload needs two
            replaced = 409
            async with asyncio.timeout(15):
                while found & workers_of(gateway):
                    await used()
            replaced = 201
            async with gateway.wire(name) as again:
                assert "new.txt" in str(await again.call("files/list", path="."))
            found = await used()
            environment.incus("delete", "--force", name)
            await ended(found)


async def test_a_full_disk(make_tenant: MakeTenant, incus_settings: Settings, tmp_path: Path) -> None:
    """At its quota a tenant keeps its files; failed writes say why and leave nothing behind."""
    tenant = await make_tenant(start=False)
    # what the image takes counts
    environment.incus("config", "device", "override", tenant.name, "root", "size=730MiB")
    site = environment.rootfs(tenant.name) / "srv" / "site"
    # the kernel may have stopped counting when another test's tenant was deleted
    await asyncio.to_thread(enforce_quotas, incus_settings)
    async with live(incus_settings, tmp_path / "gateway.log") as gateway:
        async with gateway.wire(tenant.name) as wire, gateway.http(tenant.name) as http:

            async def write(content: str) -> dict[str, Any]:
                given = {"file_path": "kept.txt", "content": content}
                return dict(await wire.call("tools/call", name="Write", arguments=given))

            async def upload(size: int) -> tuple[int, dict[str, Any]]:
                path = f"/v1/tenants/{tenant.name}/files/kept.bin"
                async with http.put(path, data=io.BytesIO(bytes(size))) as response:
                    return response.status, await response.json()

            assert not (await write("before\n"))["isError"]
            assert (await upload(100))[0] == 201
            with filled(site, room=2 << 20):
                before = sorted(os.listdir(site))
                result = await write("x" * (6 << 20))
                assert result["isError"]
                assert result["structuredContent"]["code"] == "too_large"
                assert "disk quota exceeded" in result["content"][0]["text"]
                status, said = await upload(6 << 20)
                assert (status, said["code"], said["reason"]) == (413, "too_large", "no_space")
                assert "make room" in said["detail"]
                with pytest.raises(RpcFailure, match="disk quota exceeded") as refused:
                    await wire.call("files/write", path="kept.txt", text="x" * (6 << 20))
                assert (refused.value.code, refused.value.data["reason"]) == ("too_large", "no_space")
                with pytest.raises(RpcFailure, match="disk quota exceeded"):
                    big = "x" * (6 << 20)
                    await wire.call("files/write", path="new/deep/a.txt", text=big, createDirs=True)
                given = {"file_path": "new/deeper/a.txt", "content": big}
                assert (await wire.call("tools/call", name="Write", arguments=given))["isError"]
                assert sorted(os.listdir(site)) == before
                assert (site / "kept.txt").read_text() == "before\n"
                assert (site / "kept.bin").read_bytes() == bytes(100)
            assert not (await write("x" * (6 << 20)))["isError"]
            assert (await upload(6 << 20))[0] == 200


async def test_idle_workers_end(tenant: Container, incus_settings: Settings, tmp_path: Path) -> None:
    """An unused worker ends; the next call gets a new one."""
    async with live(incus_settings, tmp_path / "gateway.log", GATEWAY_WORKER_IDLE="0.5") as gateway:
        async with gateway.wire(tenant.name) as wire:
            await wire.call("files/stat", path=".")
            found = workers_of(gateway)
            assert found
            await until(lambda: not workers_of(gateway))
            await wire.call("files/stat", path=".")
            assert not found & workers_of(gateway)


async def test_shifted_rootfs(
    incusd: Incusd,
    make_tenant: MakeTenant,
    incus_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If Incus shifts the ids on disk, as without idmapped mounts, the tools write with those ids."""
    program = tmp_path / "incusd"
    program.write_text(f'#!/bin/sh\nexec env INCUS_IDMAPPED_MOUNTS_DISABLE=1 {daemon.INCUSD} "$@"\n')
    program.chmod(0o755)
    await asyncio.to_thread(incusd.daemon.stop, instances=False)
    with monkeypatch.context() as patched:
        patched.setattr(daemon, "INCUSD", program)
        await incusd.restart()
        container = await make_tenant()
        await asyncio.to_thread(incusd.daemon.stop, instances=False)
    await incusd.restart()
    config = json.loads(environment.incus("query", f"/1.0/instances/{container.name}").stdout)["config"]
    assert config["volatile.last_state.idmap"] != "[]"
    site = environment.rootfs(container.name) / "srv" / "site"
    base = site.stat().st_uid - incus_settings.workspace_uid
    assert base > 0
    async with Workers(incus_settings, IncusRuntime(incus_settings).locations) as workers:
        files = await files_of(container, workers, incus_settings)
        await files.text("Write", file_path="x/a.txt", content="a\n")
        assert container.sh("stat -c %U:%G /srv/site/x /srv/site/x/a.txt").split() == ["site:site"] * 2
        assert (site / "x" / "a.txt").stat().st_uid == base + incus_settings.workspace_uid
        container.sh("echo b >> /srv/site/x/a.txt", user=1000)
        assert await files.text("Read", file_path="x/a.txt") == "1\ta\n2\tb\n3\t"
        assert {"mount", "uid", "seccomp"} <= set(workers.layers(container.name) or ())
    await check_confined(container, incus_settings)
