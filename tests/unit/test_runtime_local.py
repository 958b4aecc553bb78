"""The runtime contract on `local`: plain processes of this machine."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.deployments.archive import ArchiveEntry, packed
from gateway.errors import Conflict, NotFound, Unavailable
from gateway.runtime.local import LocalRuntime, LocalSites, disks
from gateway.runtime.local.sites import unpack
from gateway.runtime.sites import Order, Recipe
from gateway.settings import Settings
from tests.contracts.runtime import RuntimeContract

_fresh = itertools.count()


@pytest.fixture(scope="module")
async def runtime(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalRuntime]:
    settings = Settings(runtime="local", state_dir=tmp_path_factory.mktemp("state"))
    async with LocalRuntime(settings) as runtime:
        await runtime.tenants.create("demo")
        yield runtime


@pytest.fixture
def name() -> str:
    return "demo"


@pytest.fixture
def fresh() -> str:
    return f"fresh-{next(_fresh)}"


class TestLocal(RuntimeContract):
    sized = False
    whole_trees = os.geteuid() == 0

    async def test_the_gateways_own_environment_stays_with_it(
        self, runtime: LocalRuntime, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from gateway.runtime import ExecSpec
        from tests.contracts.runtime import finish

        monkeypatch.setenv("GATEWAY_SECRET", "told to nobody")
        _, outputs = await finish(await runtime.commands.exec(name, ExecSpec(("env",))))
        assert b"told to nobody" not in outputs[0]


class TestUndo:
    """A failed operation leaves nothing behind and removes nothing of others."""

    @pytest.mark.parametrize("fails", ["before", "after"])
    async def test_a_copy_that_fails_leaves_no_tenant(
        self, runtime: LocalRuntime, fresh: str, monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        real = disks._copy

        async def copy(source: Path, target: Path) -> None:
            if fails == "after":
                await real(source, target)
            raise Unavailable("broken")

        with monkeypatch.context() as patch:
            patch.setattr(disks, "_copy", copy)
            with pytest.raises(Unavailable):
                await runtime.tenants.clone("demo", fresh)
        assert [path.name for path in runtime.disks.home.iterdir() if fresh in path.name] == []
        assert (await runtime.tenants.clone("demo", fresh)).status == "running"

    async def test_the_name_is_taken_after_it_was_looked_for(
        self, runtime: LocalRuntime, fresh: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = disks._copy

        async def copy(source: Path, target: Path) -> None:
            await real(source, target)
            await runtime.tenants.create(fresh, domain="theirs.example.com")

        with monkeypatch.context() as patch:
            patch.setattr(disks, "_copy", copy)
            with pytest.raises(Conflict):
                await runtime.tenants.clone("demo", fresh)
        assert (await runtime.tenants.get(fresh)).domain == "theirs.example.com"
        assert [path.name for path in runtime.disks.home.iterdir() if fresh in path.name] == [fresh]

    async def test_a_destroy_is_of_the_tenant_that_was_there(
        self, runtime: LocalRuntime, fresh: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = runtime.tenants.stop
        await runtime.tenants.create(fresh)

        async def stop(name: str) -> None:
            monkeypatch.setattr(runtime.tenants, "stop", real)
            await runtime.tenants.destroy(name)
            await runtime.tenants.create(name, domain="theirs.example.com")

        monkeypatch.setattr(runtime.tenants, "stop", stop)
        with pytest.raises(NotFound):
            await runtime.tenants.destroy(fresh)
        assert (await runtime.tenants.get(fresh)).domain == "theirs.example.com"


async def test_an_update_loses_what_it_says_and_carries_on_what_is_kept(
    runtime: LocalRuntime, fresh: str
) -> None:
    sites = LocalSites(runtime._settings, runtime)
    recipe = Recipe(packed({"new": ArchiveEntry(b"new")}), ("sleep", "600"), 3000)
    await sites.create(fresh, Order("d-1", "one.example.com", recipe))
    live = sites._folders.of(fresh, "live")
    for path in ("gone/a", "gone.txt", "data/db", "stays"):
        (live / path).parent.mkdir(exist_ok=True)
        (live / path).write_text("old")
    (live / "link").symlink_to("stays")
    try:
        await sites.push(fresh, "next", recipe, None, b"gone\0gone.txt\0link\0never-there\0")
        assert (live / "gone/a").exists()
        (live / "data/late").write_text("late")
        await sites.halt(fresh)
        await sites.settle(fresh, recipe, b"data\0")
        await sites.clear(fresh)
        found = sorted(str(path.relative_to(live)) for path in live.rglob("*") if path.is_file())
        assert found == ["data/db", "data/late", "new", "stays"]
    finally:
        await sites.remove("d-1")
    assert fresh not in [tenant.name for tenant in await runtime.tenants.list()]


async def test_the_oldest_kept_sites_make_room_until_one_is_left(runtime: LocalRuntime, fresh: str) -> None:
    sites = LocalSites(runtime._settings, runtime)
    recipe = Recipe(packed({"new": ArchiveEntry(b"new")}), ("sleep", "600"), 3000)
    ids = [f"d-{digit * 16}" for digit in "0123"]
    await sites.create(fresh, Order(ids[0], "one.example.com", recipe))
    await sites.start(fresh, "live", recipe)
    try:
        for former, live in itertools.pairwise(ids):
            await sites.push(fresh, "next", recipe, None)
            await sites.halt(fresh)
            await sites.settle(fresh, recipe)
            await sites.former.put(fresh, former, live, 10)
            await sites.clear(fresh)
        assert [one.id for one in await sites.former.listed(fresh)] == [ids[2], ids[1], ids[0]]
        assert [await sites.former.spare(fresh) for _ in range(3)] == [True, True, False]
        assert [one.id for one in await sites.former.listed(fresh)] == [ids[2]]
    finally:
        await sites.remove(ids[0])


@pytest.mark.parametrize(
    "entries",
    [{"../out": ArchiveEntry(b"x")}, {"way": ArchiveEntry(link="../..")}, {"way": ArchiveEntry(link="/etc")}],
    ids=["name", "link", "absolute"],
)
def test_nothing_is_unpacked_beyond_the_folder(
    entries: dict[str, ArchiveEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the filters of Python's tarfile, and without, as before 3.11.4."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for filters in (True, False):
        if not filters:
            monkeypatch.delattr(tarfile, "data_filter", raising=False)
        with tarfile.open(fileobj=io.BytesIO(packed(entries))) as tar, pytest.raises(tarfile.TarError):
            unpack(tar, folder)
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", folder]
