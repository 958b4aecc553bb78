"""The file tools on real containers: who owns what, running and stopped, deleted and restored."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.rootfs import FilesystemRoot, Workers
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from gateway.tools import FileTools, ToolResult, ToolSession
from tests.integration import environment
from tests.integration.conftest import Container, MakeTenant


class Files:
    """The tools on one tenant, with one session."""

    def __init__(self, tools: FileTools, root: FilesystemRoot) -> None:
        self.tools = tools
        self.root = root
        self.session = ToolSession()

    async def call(self, tool: str, **given: object) -> ToolResult:
        return await self.tools.call(self.root, self.session, tool, given)

    async def text(self, tool: str, **given: object) -> str:
        """Return the answer's text; it must be none of an error."""
        result = await self.call(tool, **given)
        assert not result.is_error, result.data()
        return str(result.data()["content"][0]["text"])


@pytest.fixture
async def workers(incus_settings: Settings) -> AsyncIterator[Workers]:
    pools = incus_settings.incus_socket.parent / "storage-pools"
    async with Workers(incus_settings, allowed=[pools]) as running:
        yield running


async def files_of(container: Container, workers: Workers, settings: Settings) -> Files:
    async with IncusRuntime(settings) as runtime:
        root = await runtime.filesystem(container.name)
    return Files(FileTools(workers, settings), root)


async def test_ownership(tenant: Container, workers: Workers, incus_settings: Settings) -> None:
    """What the tools write belongs to the workspace's user inside, like what that user writes itself."""
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
    """The tools may what the user may: a file of root's with mode 0600 stays closed to them."""
    files = await files_of(tenant, workers, incus_settings)
    tenant.sh(
        "echo secret > /srv/site/root.txt; chmod 600 /srv/site/root.txt; mkdir -m 700 /srv/site/private"
    )
    result = await files.call("Read", file_path="root.txt")
    assert (result.is_error, result.code) == (True, "forbidden")
    assert (await files.call("Write", file_path="private/x.txt", content="x")).code == "forbidden"
    assert await files.text("Grep", pattern="secret") == "No files found"


async def test_stopped_tenant(make_tenant: MakeTenant, workers: Workers, incus_settings: Settings) -> None:
    """Files of a tenant that never ran are read and written; the tenant then finds them as its own."""
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


async def test_delete_with_live_workers(
    make_tenant: MakeTenant, workers: Workers, incus_settings: Settings
) -> None:
    """Workers do not keep Incus from stopping or deleting a tenant; afterwards they serve nothing of it."""
    container = await make_tenant()
    files = await files_of(container, workers, incus_settings)
    await files.text("Write", file_path="a.txt", content="a\n")
    await files.text("Grep", pattern="a")
    environment.incus("delete", "--force", container.name)
    await asyncio.sleep(1.1)  # the time after which a worker looks whether its workspace is the same
    with contextlib.suppress(GatewayError):
        assert (await files.call("Read", file_path="a.txt")).is_error
    await workers.forget(files.root.tenant)
    assert not Path(files.root.path).exists()


async def test_restored_snapshot(tenant: Container, workers: Workers, incus_settings: Settings) -> None:
    """After a restore the tools see the restored files, without being told."""
    files = await files_of(tenant, workers, incus_settings)
    await files.text("Write", file_path="a.txt", content="old\n")
    environment.incus("snapshot", "create", tenant.name, "s1")
    await files.text("Write", file_path="a.txt", content="new\n")
    environment.incus("snapshot", "restore", tenant.name, "s1")
    await asyncio.sleep(1.1)
    files = await files_of(tenant, workers, incus_settings)
    assert await files.text("Read", file_path="a.txt") == "1\told\n2\t"
    await files.text("Write", file_path="b.txt", content="b\n")
    assert tenant.sh("cat /srv/site/b.txt") == "b\n"


@pytest.mark.parametrize("driver", ["dir"])
async def test_other_pools(driver: str, workers: Workers, incus_settings: Settings, tmp_path: Path) -> None:
    """A pool of folders, on which files may carry other ids on disk, works the same."""
    name = f"t-files-{driver}-{os.getpid()}"
    environment.incus("storage", "create", name, driver, check=False)
    words = ("--profile", incus_settings.profile, "--storage", name)
    environment.incus("launch", incus_settings.image, name, *words, timeout=120)
    try:
        container = Container(name)
        files = await files_of(container, workers, incus_settings)
        await files.text("Write", file_path="x/a.txt", content="a\n")
        assert container.sh("stat -c %U:%G /srv/site/x /srv/site/x/a.txt").split() == ["site:site"] * 2
        container.sh("echo b >> /srv/site/x/a.txt", user=1000)
        assert await files.text("Read", file_path="x/a.txt") == "1\ta\n2\tb\n3\t"
        await workers.forget(files.root.tenant)
    finally:
        environment.incus("delete", "--force", name, check=False)
        environment.incus("storage", "delete", name, check=False)
